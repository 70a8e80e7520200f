"""Pictures of solutions. Each function draws on the Axes that it is given, in the style it finds, and returns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches whose panels make room for each other.

    It belongs to no window and no global state: `figure.savefig(...)` works without a display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib, which is not installed: pip install "pyjlode[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def trajectory(
    ax: Axes,
    t: Tensor,
    h: Tensor,
    *,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    **line: Any,
) -> Axes:
    """Draw states against time, one line for each component.

    Args:
        ax: where to draw.
        t: shape (T,), any device and dtype.
        h: shape (T,) or (T, ...); the components are those of `h.reshape(T, -1)`.
        labels, colors: one for each component; by default no label, and the colours of the style.
        line: for `ax.plot`, e.g. `linestyle="none", marker="o"` for measured points.

    Returns:
        `ax`.
    """
    x, ys = _numbers(t), _numbers(h.reshape(len(t), -1))
    for i in range(ys.shape[1]):
        own: dict[str, Any] = {} if labels is None else {"label": labels[i]}
        if colors is not None:
            own["color"] = colors[i]
        ax.plot(x, ys[:, i], **own, **line)
    return ax


def phase_portrait(ax: Axes, h: Tensor, *, dims: tuple[int, int] = (0, 1), **line: Any) -> Axes:
    """Draw one component of a trajectory against another.

    Args:
        ax: where to draw.
        h: shape (T, D) for one trajectory, or (T, B, D) for B of them; any device and dtype.
        dims: the components across and up.
        line: for `ax.plot`.

    Returns:
        `ax`.
    """
    x, y = dims
    h = _numbers(h)
    ax.plot(h[..., x], h[..., y], **line)
    return ax


def vector_field(
    ax: Axes,
    f: Callable[[Tensor, Tensor], Tensor],
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    t: float = 0.0,
    points: int = 32,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **stream: Any,
) -> Axes:
    """Draw the streamlines of a field in the plane at one time.

    Args:
        ax: where to draw; its axes must be linear (draw the logarithm of the state where they should not be).
        f: `f(t, h)` with `t` 0-d and `h` of shape (points**2, 2), a batch of states; returns the same shape.
        xlim, ylim: the rectangle; the axes are set to it.
        t: the time.
        points: grid points along each side.
        dtype, device: of the states that f is called with.
        stream: for `ax.streamplot`.

    Returns:
        `ax`.
    """
    x = torch.linspace(*xlim, points, dtype=dtype, device=device)
    y = torch.linspace(*ylim, points, dtype=dtype, device=device)
    grid = torch.cartesian_prod(y, x).flip(-1)
    with torch.no_grad():
        slope = f(torch.tensor(t, dtype=dtype, device=device), grid)
    u, v = _numbers(slope.reshape(points, points, 2).movedim(-1, 0))
    ax.streamplot(_numbers(x), _numbers(y), u, v, **stream)
    ax.set_xlim(*xlim)
    ax.set_ylim(*ylim)
    return ax


def _numbers(x: Tensor) -> Any:
    return x.detach().cpu().numpy()

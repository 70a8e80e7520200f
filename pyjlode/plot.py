"""Pictures of solutions. Each function draws on the Axes that it is given, in the style it finds, and returns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .errors import BadOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .solution import Solution


class Flow(Protocol):
    """What `density_flow` asks of a flow; `pyjlode.nn.CNF` is one."""

    def log_prob(self, x: Tensor, t: float | None = None) -> Tensor: ...


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


def density_flow(
    ax: Axes,
    flow: Flow,
    *,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    t: float | None = None,
    points: int = 128,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **image: Any,
) -> Axes:
    """Draw the density of a flow in the plane, where it ends or on its way: one picture of a film.

    Args:
        ax: where to draw.
        flow: `flow.log_prob(x, t)` for `x` of shape (n, 2) gives (n,); a `pyjlode.nn.CNF`.
        xlim, ylim: the rectangle; the axes are set to it.
        t: the time at which the flow stops; by default its end.
        points: grid points along each side.
        dtype, device: of the points that the flow is called with.
        image: for `ax.imshow`.

    Returns:
        `ax`.
    """
    x = torch.linspace(*xlim, points, dtype=dtype, device=device)
    y = torch.linspace(*ylim, points, dtype=dtype, device=device)
    grid = torch.cartesian_prod(y, x).flip(-1)
    with torch.no_grad():
        density = flow.log_prob(grid, t).exp().reshape(points, points)
    # The first and the last grid point are the middles of pixels.
    dx, dy = (xlim[1] - xlim[0]) / (points - 1) / 2, (ylim[1] - ylim[0]) / (points - 1) / 2
    extent = (xlim[0] - dx, xlim[1] + dx, ylim[0] - dy, ylim[1] + dy)
    ax.imshow(_numbers(density), **{"extent": extent, "origin": "lower", "aspect": "auto", **image})
    ax.set_xlim(*xlim)
    ax.set_ylim(*ylim)
    return ax


def steps(ax: Axes, solution: Solution, **line: Any) -> Axes:
    """Draw a solution and, under it, the steps that made it: accepted ones as marks, rejected ones as crosses.

    Args:
        ax: where to draw; the marks stand along its lower edge, each where a step begins.
        solution: of `pyjlode.solve`, with its dense output.
        line: for `ax.plot`, of the solution.

    Returns:
        `ax`.

    Raises:
        BadOption: the solution kept no account of its steps: `solve(..., dense=False)`, or a solver that tells none.
    """
    if solution.steps is None:
        raise BadOption(
            "this solve kept no account of its steps: call solve(..., dense=True) on the native engine, and not with "
            "scipy_solver."
        )
    solution.plot(ax, **line)
    # In units of the axes' height, so that the marks stand below whatever the solution is.
    ax.margins(y=0.12)
    where: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "linestyle": "none", "clip_on": False}
    accepted, rejected = solution.steps.accepted, solution.steps.rejected
    starts = [t for t, _ in accepted]
    ax.plot(starts, [0.03] * len(starts), marker="|", ms=9, color="0.35", label=f"{len(starts)} accepted", **where)
    if rejected:
        starts = [t for t, _ in rejected]
        ax.plot(starts, [0.075] * len(starts), marker="x", ms=5, color="C3", label=f"{len(starts)} rejected", **where)
    return ax


def _numbers(x: Tensor) -> Any:
    return x.detach().cpu().numpy()

"""`steady_state`: where a system comes to rest, and how that depends on everything in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import BadShape, BadTolerance, NotConverged, SolveError

_ROUNDS = 18  # solves, each ten times as long as the one before
_STEPS = 5_000  # of one solve
_CORRECTIONS = 12
_NEAR = 0.01  # of the size of the state: how far the first correction of Newton's may go
_ORDERS = 2  # of derivatives
_ROUNDING = 1e3  # a correction of so many units of rounding is none


def steady_state(
    f: Callable[[Tensor, Tensor], Tensor],
    h0: Tensor,
    *,
    t: float = 0.0,
    rtol: float | None = None,
    atol: float | None = None,
    batch_dims: int = 0,
    method: str = "bdf",
) -> Tensor:
    """The state at which `f(t, h) = 0`, to which the solution of `h' = f(t, h)` from `h0` goes.

    The solution is followed over longer and longer times, roughly, until Newton's iteration has little left to do: then
    that ends it. Differentiable with respect to every tensor that f depends on, by the implicit function theorem:
    `dh = -(df/dh)^-1 df`. `h0` says which state is found, if there are several, and has no gradient. Deep equilibrium
    models (Bai, Kolter & Koltun 2019) are `f(t, h) = g(h, x) - h`.

    Args:
        f: as in `odeint`, for one tensor.
        h0: where to start; any shape, float32 or float64.
        t: the time that f is given, all the while.
        rtol, atol: the last Newton correction of each element is below `atol + rtol |h|`; by default the fourth root of
            the dtype's resolution cubed (2e-12 in float64, 6e-6 in float32), for both.
        batch_dims: so many first dimensions count independent systems: their Jacobian is one block for each.
        method: follows the solution; one for stiff systems.

    All of it runs on PyTorch, whatever engine `odeint` would choose. The Jacobian is dense, by autograd: a product for
    each number of a system.

    Returns:
        The state, of the shape of `h0`, with first and second derivatives; those of higher order are not right.

    Raises:
        BadShape: `h0` is no tensor of floats, or f gives another shape.
        BadTolerance: a negative tolerance.
        NotConverged: the solution does not come to rest, or the Jacobian there is singular: a conserved quantity makes
            states of rest that are not isolated. If `h0` itself is at rest it is the result, stable or not.
    """
    h0 = _checked(f, h0, batch_dims)
    eps = torch.finfo(h0.dtype).eps
    rtol = eps**0.75 if rtol is None else rtol
    atol = eps**0.75 if atol is None else atol
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise BadTolerance(f"rtol and atol must not be negative, nor both zero; got {rtol!r} and {atol!r}.")
    system = _System(f, torch.as_tensor(t, dtype=h0.dtype, device=h0.device), h0.shape, batch_dims)
    with torch.no_grad():
        h, J = _found(system, h0.detach().reshape(system.rows).clone(), rtol, atol, method)
    if torch.is_grad_enabled():
        # Steps of a Newton iteration that autograd sees, from where they change nothing: each makes one more order of
        # derivative exact.
        for _ in range(_ORDERS):
            h = h + _solved(-J, system(h))
    return h.reshape(h0.shape)


class _System:
    """f over rows, (B, n) -> (B, n), each a system of its own."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], t: Tensor, shape: torch.Size, batch_dims: int) -> None:
        self.f, self.t, self.shape = f, t, shape
        self.rows = (shape[:batch_dims].numel(), shape[batch_dims:].numel())

    def __call__(self, h: Tensor) -> Tensor:
        slopes = self.f(self.t, h.reshape(self.shape))
        if not isinstance(slopes, Tensor) or slopes.shape != self.shape:
            got = f"shape {tuple(slopes.shape)}" if isinstance(slopes, Tensor) else type(slopes).__name__
            raise BadShape(f"f must return dh/dt of the shape of h, {tuple(self.shape)}; it returned {got}.")
        return slopes.reshape(self.rows)

    def after(self, h: Tensor, span: float, size: Tensor, method: str) -> Tensor:
        """The state (B, n) a time later, roughly: Newton's iteration makes it exact."""
        from .odeint import odeint

        def f(t: Tensor, h: Tensor) -> Tensor:
            return self(h)

        atol = 1e-6 * float(size.max()) or 1e-6
        how: dict[str, Any] = {"method": method, "rtol": 1e-4, "atol": atol, "max_num_steps": _STEPS, "batch_dims": 1}
        # Of the native engine: what is solved here has no derivative.
        return odeint(f, h, [0.0, span], engine="torch", **how)[-1]

    @torch.enable_grad()
    def jacobian(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """f (B, n) and df/dh (B, n, n)."""
        h = h.detach().requires_grad_()
        slopes = self(h)
        n = h.shape[1]
        if not slopes.requires_grad:
            return slopes.detach(), h.new_zeros(*h.shape, n)
        rows = [
            torch.autograd.grad(slopes[:, i].sum(), h, retain_graph=i + 1 < n, materialize_grads=True)[0]
            for i in range(n)
        ]
        return slopes.detach(), torch.stack(rows, 1)


def _found(system: _System, h: Tensor, rtol: float, atol: float, method: str) -> tuple[Tensor, Tensor]:
    """The state of rest (B, n), and the Jacobian there (B, n, n)."""
    slopes, J = system.jacobian(h)
    if not bool(slopes.isfinite().all()):
        raise NotConverged("steady_state: f is not finite at h0.", t=float(system.t), dt=0.0)
    size, tiny = h.abs(), torch.finfo(h.dtype).tiny
    span = float(((size.amax(1) + atol) / slopes.abs().amax(1).clamp_min(tiny)).amin()) if h.numel() else 1.0
    why = ""
    for _ in range(_ROUNDS):
        ends = _newton(system, h, slopes, J, size, rtol, atol)
        if ends is not None:
            return ends
        try:
            h = system.after(h, span, size, method)
        except SolveError as error:
            why = f" ({type(error).__name__}: {error})"
            break
        size, span = torch.maximum(size, h.abs()), 10 * span
        slopes, J = system.jacobian(h)
    singular = bool(_solved(-J, slopes).isnan().any())
    raise NotConverged(
        "steady_state: "
        + (
            "the Jacobian is singular: the system keeps a quantity, so that its states of rest are not isolated. Write "
            "the kept quantity into f, and solve for fewer numbers."
            if singular
            else "the solution from h0 does not come to rest: an oscillation does not, nor what grows without bound."
        )
        + f" The largest |f| is {float(slopes.abs().max()):.3g}.{why}",
        t=float(system.t),
        dt=0.0,
    )


def _newton(
    system: _System, h: Tensor, slopes: Tensor, J: Tensor, size: Tensor, rtol: float, atol: float
) -> tuple[Tensor, Tensor] | None:
    """Newton's iteration, where it begins so near to its end that this is where the solution goes."""
    room = size + 1e-3 * size.amax(1, keepdim=True) if h.numel() else size
    last = math.inf
    for _ in range(_CORRECTIONS):
        change = _solved(-J, slopes)
        if not bool((change.abs() <= _NEAR * room + atol).all()):  # NaN, too: J is singular
            return None
        h = h + change
        if bool((change.abs() <= atol + rtol * h.abs()).all()):
            return h, J
        largest = float((change.abs() / room.clamp_min(torch.finfo(h.dtype).tiny)).max())
        if largest > last / 2:
            # It does not get smaller: by rounding, or it does not converge.
            return (h, J) if largest <= _ROUNDING * torch.finfo(h.dtype).eps else None
        last = largest
        slopes, J = system.jacobian(h)
    return None


def _solved(A: Tensor, b: Tensor) -> Tensor:
    """A (B, n, n), b (B, n) -> (B, n); NaN where A is singular to rounding."""
    LU, pivots, info = torch.linalg.lu_factor_ex(A)
    x = torch.linalg.lu_solve(LU, pivots, b[..., None])[..., 0]
    diagonal = LU.diagonal(dim1=-2, dim2=-1).abs()
    low = diagonal.amin(-1) <= 4 * torch.finfo(A.dtype).eps * diagonal.amax(-1) if A.shape[-1] else info != 0
    return torch.where(((info != 0) | low)[:, None], torch.nan, x)


def _checked(f: Any, h0: Any, batch_dims: int) -> Tensor:
    if not isinstance(h0, Tensor) or h0.dtype not in (torch.float32, torch.float64):
        what = h0.dtype if isinstance(h0, Tensor) else type(h0).__name__
        raise BadShape(f"steady_state takes h0 as one tensor of float32 or float64; got {what}.")
    if not 0 <= batch_dims < max(h0.ndim, 1):
        raise BadShape(f"batch_dims={batch_dims} leaves nothing of a state of shape {tuple(h0.shape)}.")
    return h0

"""`scipy_solver`: any method of `scipy.integrate.solve_ivp`, for comparison. On the host, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadOption, EngineUnavailable, NonFiniteState, StepSizeTooSmall
from ..problem import ODEProblem
from ..solution import Stats
from .checkpoints import All
from .loop import Record


class ScipyDense:
    """SciPy's dense output as tensors of shape (n,) and (M, n)."""

    def __init__(self, sol: Any, like: Tensor, span: tuple[float, float]) -> None:
        self.sol, self.like, self.span = sol, like, span

    def at(self, t: float) -> Tensor:
        return torch.from_numpy(self.sol(t)).to(self.like)

    def __call__(self, times: Tensor) -> Tensor:
        return torch.from_numpy(self.sol(times.detach().cpu().numpy()).T.copy()).to(self.like)


@torch.no_grad()
def solve(p: ODEProblem, stats: Stats, *, dense: bool) -> Record:
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise EngineUnavailable("method='scipy_solver' needs SciPy: pip install scipy.") from error
    if p.event_fn is not None:
        raise BadOption("method='scipy_solver' does not take event_fn; use one of the other methods.")
    if len(p.times) == 1:
        return Record(p.y0[None], All())

    def f(t: float, y: np.ndarray) -> np.ndarray:
        return p.f(p.time(t), torch.from_numpy(y).to(p.y0)).double().cpu().numpy()

    def tolerance(tol: float | Tensor) -> Any:
        return tol.double().cpu().numpy() if isinstance(tol, Tensor) else tol

    o = p.options
    extra: dict[str, Any] = {} if o.first_step is None else {"first_step": o.first_step}
    if o.solver == "LSODA" and o.min_step:
        extra["min_step"] = o.min_step
    ends = (p.times[0], p.times[-1])
    result = solve_ivp(
        f,
        ends,
        p.y0.double().cpu().numpy(),
        method=o.solver,
        t_eval=p.times,
        dense_output=dense,
        rtol=tolerance(p.rtol),
        atol=tolerance(p.atol),
        max_step=o.max_step,
        **extra,
    )
    stats.naccept = len(result.t) if not dense else len(result.sol.ts) - 1
    stats.njac = int(result.njev or 0)
    if not result.success:
        t = float(result.t[-1]) if len(result.t) else ends[0]
        raise StepSizeTooSmall(f"scipy_solver ({o.solver}) stopped near t={t:.6g}: {result.message}", t=t, dt=0.0)
    if not np.isfinite(result.y).all():
        raise NonFiniteState(f"scipy_solver ({o.solver}) returned NaN or infinity.", t=ends[1], dt=math.nan)
    ys = torch.from_numpy(result.y.T.copy()).to(p.y0)
    return Record(ys, All(), dense=ScipyDense(result.sol, p.y0, ends) if dense else None)

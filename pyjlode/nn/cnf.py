"""`CNF`: a continuous normalizing flow, a density that is moved by a differential equation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .. import arguments, mistakes
from ..errors import BadOption, BadShape
from ..odeint import odeint, solve
from ..solution import Stats
from ..solver import check
from . import matching
from . import trace as divergence
from .flow_transform import FlowTransform
from .vector_distribution import VectorDistribution


class Flow(NamedTuple):
    """Where a flow took a batch, and what it met on the way.

    Attributes:
        h: shape (..., D), the end of each path.
        log_det: shape (...), log |det dh(end)/dh(start)|, which is the integral of tr(df/dh).
        kinetic_energy: shape (...), the integral of |f|², where it was asked for.
        jacobian_norm: shape (...), the integral of the squared Frobenius norm of df/dh, where it was asked for.
    """

    h: Tensor
    log_det: Tensor
    kinetic_energy: Tensor | None = None
    jacobian_norm: Tensor | None = None


class CNF(nn.Module):
    """A continuous normalizing flow: points of a base distribution at `t[0]`, carried by `f`, are data at `t[1]`.

    The log-density of a point falls along its path by the divergence of the field, `d log p / dt = -tr(df/dh)`, so that
    it is exact up to the solver's tolerance, for any `f`.

    Args:
        f: `f(t, h) -> dh/dt` for `h` of shape (..., D); twice differentiable. No row may depend on another (no batch
            normalisation).
        base: a distribution of vectors of D elements, or of scalars with batch shape (D,); or D itself, for a standard
            normal that moves with the module. Parameters of a distribution are not the module's.
        t: the times of the base and of the data.
        trace: "exact", D products with the Jacobian for each evaluation; or "hutchinson", an unbiased estimate from
            `probes` of them, drawn once and held for the whole solve. May be set later: a flow trained with estimates
            is evaluated with `flow.trace = "exact"`.
        noise: of the estimate: "rademacher" (the smaller variance) or "gaussian".
        probes: random vectors for each row.
        kinetic_energy, jacobian_norm: weights in `loss` of the integrals of |f|² and of |df/dh|² (estimated with the
            trace's own probes). Both make the flow straighter, and so cheaper to solve.
        solver_options: keyword arguments for `pyjlode.solve`. Here `adjoint` is True, and `rtol` and `atol` are 1e-5,
            if nothing else is said.

    Attributes:
        stats: the account of the last solve, a `pyjlode.Stats`; None before the first. Backward passes add to it.
        base: the base distribution.

    Raises:
        BadOption: an unknown `trace` or `noise`, or less than one probe, here or when they are set later.
        BadShape: `base` is not one of vectors.
        TypeError: `solver_options` has a name that `pyjlode.solve` does not know.
        What `pyjlode.Solver` raises: they say something that is wrong for every state.

    Source: Chen, Rubanova, Bettencourt & Duvenaud, Neural ordinary differential equations, 2018, section 4; Grathwohl,
    Chen, Bettencourt, Sutskever & Duvenaud, FFJORD: free-form continuous dynamics for scalable reversible generative
    models, 2018; the two regularisers, Finlay, Jacobsen, Nurbekyan & Oberman, How to train your neural ODE: the world
    of Jacobian and kinetic regularization, 2020.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        base: Distribution | int,
        *,
        t: tuple[float, float] = (0.0, 1.0),
        trace: str = "exact",
        noise: str = "rademacher",
        probes: int = 1,
        kinetic_energy: float = 0.0,
        jacobian_norm: float = 0.0,
        **solver_options: Any,
    ) -> None:
        super().__init__()
        solver_options = mistakes.with_options(solver_options, arguments.KEYWORDS)
        inspect.signature(odeint).bind(f, None, None, **solver_options)
        check({"adjoint": True, **solver_options})
        self.f = f
        self.t = (float(t[0]), float(t[1]))
        self.trace, self.noise, self.probes = trace, noise, probes
        self.kinetic_energy, self.jacobian_norm = kinetic_energy, jacobian_norm
        self.solver_options: dict[str, Any] = {"adjoint": True, "rtol": 1e-5, "atol": 1e-5, **solver_options}
        self.stats: Stats | None = None
        self._base = VectorDistribution(base)

    def __setattr__(self, name: str, value: Any) -> None:
        # Settings are meant to be changed, and a misspelt one would be another flow.
        if name == "trace" and value not in divergence.TRACES:
            raise BadOption(f"trace must be one of {', '.join(divergence.TRACES)}; got {value!r}.")
        if name == "noise" and value not in divergence.NOISES:
            raise BadOption(f"noise must be one of {', '.join(divergence.NOISES)}; got {value!r}.")
        if name == "probes" and value < 1:
            raise BadOption(f"probes must be at least 1; got {value}.")
        super().__setattr__(name, value)

    @property
    def base(self) -> Distribution:
        """The distribution at `t[0]`."""
        return self._base()

    @property
    def transform(self) -> FlowTransform:
        """The map from base to data as a `torch.distributions.Transform`, for `TransformedDistribution` and
        `ComposeTransform`."""
        return FlowTransform(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base.

        Args:
            x: shape (..., D).

        Returns:
            `(z, log_det)`, shapes (..., D) and (...): the points at `t[0]`, and log |det dz/dx|.

        Raises:
            BadShape: `x` is not of shape (..., D); and what `pyjlode.solve` raises.
        """
        flow = self.integrate(x, self.t[1], self.t[0])
        return flow.h, flow.log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base to data: `(x, log_det)` from `z` of shape (..., D), with log |det dx/dz|. Raises what `forward` does."""
        flow = self.integrate(z, *self.t)
        return flow.h, flow.log_det

    def log_prob(self, x: Tensor, t: float | None = None) -> Tensor:
        """Log-density of the flow.

        Args:
            x: shape (..., D).
            t: where the flow stops; by default where the data are, `t[1]`.

        Returns:
            Shape (...). With `trace="hutchinson"`, an unbiased estimate of it.

        Raises:
            What `forward` raises.
        """
        flow = self.integrate(x, self.t[1] if t is None else t, self.t[0])
        return self._base_log_prob(flow.h) + flow.log_det

    def _base_log_prob(self, z: Tensor) -> Tensor:
        return self.base.log_prob(z) if z.numel() else z.sum(-1)  # PyTorch's distributions take no empty batch

    def loss(self, x: Tensor) -> Tensor:
        """0-d: the mean of -log p over `x` of shape (..., D), with the weighted regularisers.

        Raises:
            BadShape: `x` is empty, and its mean is none; and what `forward` raises.
        """
        if x.numel() == 0:
            raise BadShape(f"the loss of an empty batch is the mean of nothing; x has shape {tuple(x.shape)}.")
        want = {"kinetic_energy": self.kinetic_energy != 0, "jacobian_norm": self.jacobian_norm != 0}
        flow = self.integrate(x, self.t[1], self.t[0], **want)
        loss = -(self.base.log_prob(flow.h) + flow.log_det).mean()
        if flow.kinetic_energy is not None:
            loss = loss + self.kinetic_energy * flow.kinetic_energy.mean()
        if flow.jacobian_norm is not None:
            loss = loss + self.jacobian_norm * flow.jacobian_norm.mean()
        return loss

    def matching_loss(self, x: Tensor, *, coupling: str = "ot", sigma: float = 0.0) -> Tensor:
        """0-d: conditional flow matching. Trains the field without a solve; `sample` and `log_prob` then solve as ever.

        Each point of data is paired with one of the base, and the field learns the velocity of the straight line
        between them, at a random time: the mean of |f(t, (1 - s) z + s x + sigma e) - (x - z) / (t[1] - t[0])|² / D,
        with s the part of the way, uniform in [0, 1], and e standard normal.

        Args:
            x: shape (B, D).
            coupling: "ot": the pairs of a batch are those of the smallest sum of squared distances (by SciPy, O(B³)),
                so that paths hardly cross and few evaluations solve them; "independent": random pairs.
            sigma: the width of the paths.

        `f` is called for all rows at once with `t` of shape (B, 1), if it then gives each row what it gives the row by
        itself with a 0-d `t`; else it is mapped by `torch.func.vmap`.

        Raises:
            BadShape: `x` is not of shape (B, D), or is empty. BadOption: an unknown coupling, or there is no SciPy.

        Source: Lipman, Chen, Ben-Hamu, Nickel & Le, Flow matching for generative modeling, 2023; Tong et al., Improving
        and generalizing flow-based generative models with minibatch optimal transport, 2023, section 3.2.
        """
        D = self.base.event_shape[0]
        if x.dim() != 2 or x.shape[1] != D or len(x) == 0:
            raise BadShape(f"matching_loss takes a batch of shape (B, {D}), B > 0; got {tuple(x.shape)}.")
        z = self.base.sample(torch.Size((len(x),))).to(x)
        if coupling == "ot":
            z = z[matching.nearest(z, x)]
        elif coupling != "independent":
            raise BadOption(f'coupling must be "ot" or "independent"; got {coupling!r}.')
        s = torch.rand(len(x), 1, dtype=x.dtype, device=x.device)
        h = torch.lerp(z, x, s)
        if sigma:
            h = h + sigma * torch.randn_like(h)
        start, end = self.t
        slopes = matching.each(self.f, start + s * (end - start), h)
        return (slopes - (x - z) / (end - start)).square().mean()

    @torch.no_grad()
    def sample(self, n: int | tuple[int, ...] = (), t: float | None = None) -> Tensor:
        """Points of the flow: shape (n, D) or (*n, D). Without gradient; `transform` has one.

        Args:
            n: how many.
            t: where the flow stops; by default where the data are, `t[1]`.
        """
        z = self.base.sample(torch.Size((n,) if isinstance(n, int) else n))
        return self._solve(self.f, z, self.t[0], self.t[1] if t is None else t)

    def integrate(
        self, h: Tensor, start: float, end: float, *, kinetic_energy: bool = False, jacobian_norm: bool = False
    ) -> Flow:
        """Carry points along the field from one time to another, in either direction, and integrate what they meet.

        Args:
            h: shape (..., D), the points at `start`.
            kinetic_energy, jacobian_norm: integrate these too.

        Raises:
            What `forward` raises.
        """
        D = self.base.event_shape[0]
        if h.dim() == 0 or h.shape[-1] != D:
            raise BadShape(f"this flow is of vectors of {D} elements, shape (..., {D}); got {tuple(h.shape)}.")
        probes = None if self.trace == "exact" else divergence.draw(self.noise, self.probes, h)
        field = _Field(self.f, probes, kinetic_energy, jacobian_norm)
        integrals = h.new_zeros(1 + kinetic_energy + jacobian_norm, *h.shape[:-1]).unbind()
        h, log_det, *others = self._solve(field, (h, *integrals), start, end)
        # Along a decreasing t these two are negative, as integrals over dt; they are meant as lengths of the path.
        rest = iter(others if end >= start else [-x for x in others])
        return Flow(h, log_det, next(rest) if kinetic_energy else None, next(rest) if jacobian_norm else None)

    def _solve(self, f: Any, state: Any, start: float, end: float) -> Any:
        if start == end:
            return state
        solution = solve(f, state, (start, end), dense=False, **self.solver_options)
        self.stats = solution.stats
        return tuple(x[-1] for x in solution.h) if isinstance(state, tuple) else solution.h[-1]

    def extra_repr(self) -> str:
        how = f"trace={self.trace!r}"
        if self.trace == "hutchinson":
            how += f", noise={self.noise!r}, probes={self.probes}"
        options = "".join(f", {name}={value!r}" for name, value in self.solver_options.items())
        return f"t={self.t}, {how}{options}"


class _Field(nn.Module):
    """`f` beside what is integrated along it, for a state `(h, log_det, ...)`.

    A new one for each solve, which holds that solve's probes: a backward pass must meet those of its own forward pass,
    whatever was solved in between. A module, so that the front door finds what `f` holds.
    """

    def __init__(
        self, f: Callable[[Tensor, Tensor], Tensor], probes: Tensor | None, kinetic_energy: bool, jacobian_norm: bool
    ) -> None:
        super().__init__()
        self.f, self.probes = f, probes
        self.kinetic_energy, self.jacobian_norm = kinetic_energy, jacobian_norm

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h = state[0]
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():  # the divergence is a derivative, whether or not this solve has one
            if not recorded or not h.requires_grad:
                h = h.detach().requires_grad_()
            dh = self.f(t, h)
            if self.probes is None:
                trace, norm = divergence.exact(dh, h, create_graph=recorded)
            else:
                trace, norm = divergence.hutchinson(dh, h, self.probes, create_graph=recorded)
            slopes = [dh, trace]
            if self.kinetic_energy:
                slopes.append(dh.square().sum(-1))
            if self.jacobian_norm:
                slopes.append(norm)
        return tuple(slopes) if recorded else tuple(x.detach() for x in slopes)

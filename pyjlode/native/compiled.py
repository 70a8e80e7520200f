"""Steps of explicit Runge-Kutta methods as code that PyTorch's compiler makes: one call for each, and its product.

What f is, and which tensors it reads, is captured by Dynamo, once for all fields of one piece of code; guards tell at
the start of each solve which capture f is like. The stages of a step, its error and its slopes for dense output are
then one graph, which TorchInductor compiles: to C++ on a CPU, to Triton on a GPU, where it is replayed as a CUDA graph.
Times, step sizes, tolerances and what f holds are inputs of that, so that nothing is compiled anew from step to step,
nor when parameters change.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import parameters
from ..errors import Discovered, NotCompiled
from ..gradients import other_function
from ..methods.explicit import ExplicitTableau
from ..numbers import as_like, lasting, on_host
from ..problem import ODEProblem, SystemsLayout, like
from ..solution import Stats
from . import controller
from .checkpoints import Kept
from .explicit import ExplicitRK
from .interpolation import powers
from .loop import Record
from .sensitivity import Replay, Sum
from .step import Interval, fraction, host_times, numpy_dtype

log = logging.getLogger("pyjlode")

Function = Callable[..., Sequence[Tensor]]

# Programs kept of one capture: for other methods, norms and numbers of integer tensors.
_KEPT = 64
_ASKED = "compile=True on the native engine"
_lock = threading.RLock()


def prepare(
    p: ODEProblem, stats: Stats, *, gradient: str | None = None, dense: bool = False, of: Captured | None = None
) -> ODEProblem:
    """The problem with compiled steps, where `compile=True` asks for them.

    Args:
        gradient: name of the gradient method; None where the solve has no gradient.
        dense: the dense output will be kept.
        of: gives the field that is captured, its state, and the class of programs; by default those of `p`.

    Raises:
        NotCompiled: there are none for this problem; the message says why.
        Discovered: f uses tensors that require grad and were not known.
    """
    if not p.compile:
        return p
    if obstacle := _obstacle(p, gradient):
        raise NotCompiled(f"{_ASKED}: {obstacle}.")
    try:
        program, held = _program(p, of or _plain)
    except NotCompiled as error:
        raise NotCompiled(f"{_ASKED}: {error}.") from None
    steps = Steps(p, program, held, dense=dense)
    if gradient is not None or p.f.watched:
        steps.look_for_strangers()
    stats.compiled = "steps"
    if gradient not in (None, "discrete"):
        stats.not_compiled = f"the backward solve of adjoint={gradient!r} is not compiled; that of 'discrete' is"
    return like(p, compiled=steps)


def finished(p: ODEProblem, solve: Callable[[], Record]) -> Record:
    """What a solve with the compiled steps of a problem leaves behind."""
    try:
        return solve()
    finally:
        p.compiled.finish()


def _obstacle(p: ODEProblem, gradient: str | None) -> str:
    """Why a problem has no compiled steps, for what is known without a look at f; "" for no reason."""
    if p.transformed:
        return "torch.func and forward mode look into the solver's operations, which are then one; use compile=None"
    if p.method.kind not in ("adaptive", "fixed"):
        return (
            f"{p.method.name!r} is not an explicit Runge-Kutta method, and the steps of no other kind are compiled; "
            "use one, or compile=None"
        )
    if isinstance(p.layout, SystemsLayout) and p.batch > 1:
        return "the systems of batch_dims are states of several tensors; use one tensor, or compile=None"
    if gradient in ("checkpointed", "reversible"):
        return f"adjoint={gradient!r} takes its steps again one by one, not compiled; use adjoint=True, or compile=None"
    if gradient == "forward":
        return "adjoint='forward' solves another system, which is not compiled; use adjoint=True, or compile=None"
    if not p.y0.numel():
        return "the state is empty"
    return ""


Captured = Callable[[ODEProblem], tuple[Any, Tensor, "type[Program]"]]


def _plain(p: ODEProblem) -> tuple[Any, Tensor, type[Program]]:
    return p.f, p.y0, Program


def _program(p: ODEProblem, of: Captured) -> tuple[Program, Any]:
    """The program for a problem, and what its field holds.

    Raises:
        NotCompiled: f cannot be compiled.
    """
    held_by, Trace, surroundings = _capture()
    if obstacle := surroundings():
        raise NotCompiled(obstacle)
    norm = p.norm if p.options.norm is not None else None
    with _lock, lasting():
        field, state, kind = of(p)
        held = held_by(field, p.y0.dtype, p.y0.device)
        tolerances = tuple(isinstance(x, Tensor) and x.ndim > 0 for x in (p.rtol, p.atol))
        sizes = None if p.layout is None else tuple(p.layout.sizes)
        key = (held.key, p.method.name, p.method.adaptive, norm is None, sizes, p.batch, tolerances)
        programs = held.entry.steps
        found = programs.get(key)
        if found is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trace = Trace(held, state)
            found = programs[key] = kind(p, trace, fused=norm is None)
            while len(programs) > _KEPT:
                programs.pop(next(iter(programs)))
    return found, held


@functools.cache
def _capture() -> tuple[Any, Any, Any]:
    """What captures f. Importing it, and Dynamo with it, takes seconds: that is for those who ask for it."""
    from ..capture.held import held_by
    from ..capture.surroundings import surroundings
    from ..capture.trace import Trace

    return held_by, Trace, surroundings


# ----------------------------------------------------------------------------------------------------------------------
# Graphs
# ----------------------------------------------------------------------------------------------------------------------


class Program:
    """The compiled functions of a method for fields that do the same with their tensors; each is made when first asked
    for.

    Args:
        p: a problem of this kind.
        trace: of its field.
        fused: the norm of the error is the default one, which is a part of the graph; else the user's own is called.

    Attributes:
        rows: of K, all that dense output can ask for.
        checked: a step was compared with PyTorch's own.
    """

    def __init__(self, p: ODEProblem, trace: Any, *, fused: bool) -> None:
        tab = p.method.tableau
        assert isinstance(tab, ExplicitTableau)
        self.tab, self.adaptive, self.fused, self.batch = tab, p.method.adaptive, fused, p.batch
        self.sizes = [p.y0.numel()] if p.layout is None else p.layout.sizes
        self.A, self.C, self.P = tab.whole()
        self.rows, self.s = len(self.C), tab.stages
        self.dtype, self.device = p.y0.dtype, p.y0.device
        self.polynomials = torch.tensor(self.P.T, dtype=torch.float64, device=self.device)
        self.slots, self.trained = trace.slots, trace.trained
        self.counts, self.adds = trace.steps, trace.adds
        # Expanded tensors, and slices with gaps, are copied: guards make sure that these are always the same ones.
        self.dense = [x.clone().stride() == x.stride() for x in trace.tensors]
        field = trace.f.module
        if _writes(field):
            raise NotCompiled("f writes into tensors that it holds, as batch normalisation does in training")
        self.value = lambda *args: field(*args).to(self.dtype)
        self.checked = False
        try:
            self.product = trace.vjp.module
        except NotCompiled as error:
            self.product = str(error)
        self.functions: dict[tuple[Any, ...], Any] = {}

    def function(self, kind: tuple[Any, ...], examples: Sequence[Tensor]) -> Any:
        """A compiled function: ("step", with K), ("slopes",) or ("pull", by time, rows).

        Args:
            examples: inputs of it, for shapes, strides and dtypes.

        Raises:
            NotCompiled: PyTorch's compiler does not make it.
        """
        with _lock:
            if kind not in self.functions:
                name, *how = kind
                made = compiled(getattr(self, f"make_{name}")(*how), examples, self.trial(name, examples))
                self.functions[kind] = Graphs(made) if replayed(self.device) else made
            return self.functions[kind]

    def trial(self, name: str, examples: Sequence[Tensor]) -> list[Tensor]:
        """Inputs for which no output is zero, or a matter of rounding, as the error of a good step is."""
        trial = [x.detach().clone() for x in examples]
        if name == "step" and self.adaptive:
            clock, y, k0 = trial[:3]
            clock[0] = 0.1 * (1 + y.abs().amax()) / (1e-3 + k0.abs().amax())
            tolerances = len(trial) - len(self.slots) - 2
            trial[2] = 1.5 * k0
            trial[tolerances : tolerances + 2] = [torch.ones_like(x) for x in trial[tolerances : tolerances + 2]]
        elif name == "pull":
            held = len(trial) - len(self.slots)
            trial[2:held] = [torch.ones_like(x) for x in trial[2:held]]
        return trial

    def sum(self, row: Sequence[float], K: Sequence[Tensor]) -> Tensor | None:
        """Σ row_j K_j without the terms that are zero; None where none is left."""
        total: Tensor | None = None
        for weight, k in zip(row, K):
            if weight:
                total = k * float(weight) if total is None else total + k * float(weight)
        return total

    def point(self, i: int, y: Tensor, dt: Tensor, K: Sequence[Tensor]) -> Tensor:
        """Y_i = y + dt Σ_j A_ij K_j; that of row s is y1."""
        rise = self.sum(self.A[i], K)
        return y if rise is None else y + dt * rise

    def clock(self, clock: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        dt, *times = clock.to(self.dtype).unbind()
        return dt, tuple(times)

    def make_step(self, slopes: bool, ahead: bool = False) -> Function:
        """(clock, y, k0, rtol, atol, *lifted) -> y1, f(t1, y1), verdict and, with `slopes`, K up to row s. Of a fixed
        step (clock, y, *lifted) -> y1 and, with `slopes`, K.

        clock: (1 + rows,) float64: dt, and the times of the rows of K. verdict: the error, and the stretch, |λ dt|, see
        `ExplicitStep`. With `ahead`, (clock, y, k0, control, rtol, atol, *lifted) -> y1, f(t1, y1), (error, stretch,
        next dt), next clock, next control: what `controller.next_factor` makes of it, for a step that begins before
        the host knows whether this one is accepted.
        """
        s = self.s

        def adaptive_ahead(clock: Tensor, y: Tensor, k0: Tensor, control: Tensor, *rest: Tensor) -> Any:
            y1, f1, verdict, *K = adaptive(clock, y, k0, *rest)
            size, following = self.control(clock[0].abs(), verdict[0], control)
            dt = torch.copysign(size, clock[0])
            times = clock[1 + s] + dt * torch.tensor(self.C, dtype=torch.float64, device=clock.device)
            return (y1, f1, torch.cat([verdict, dt[None]]), torch.cat([dt[None], times]), following, *K)

        def adaptive(clock: Tensor, y: Tensor, k0: Tensor, rtol: Tensor, atol: Tensor, *lifted: Tensor) -> Any:
            dt, K, points = self.stages(clock, y, k0, *lifted)
            y1, errors = points[s], self.errors(dt.abs(), K, y, points[s], rtol, atol)
            stretch = self.stretches(points, K, atol + rtol * y.abs()).amax() * dt.abs()
            if self.fused:
                verdict = torch.stack([self.combined([self.norm(x) for x in errors]), stretch]).to(torch.float64)
                return (y1, K[s], verdict, torch.stack(K)) if slopes else (y1, K[s], verdict)
            rest = (torch.stack(errors), stretch.to(torch.float64).reshape(1))
            return (y1, K[s], rest[1], rest[0], torch.stack(K)) if slopes else (y1, K[s], rest[1], rest[0])

        def fixed(clock: Tensor, y: Tensor, *lifted: Tensor) -> Any:
            dt, times = self.clock(clock)
            K: list[Tensor] = []
            for i in range(s + slopes):
                K.append(self.value(times[i], self.point(i, y, dt, K), *lifted))
            y1 = self.point(s, y, dt, K)
            return (y1, torch.stack(K)) if slopes else (y1,)

        return adaptive_ahead if ahead else adaptive if self.adaptive else fixed

    @staticmethod
    def control(dt: Tensor, err: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        """`controller.next_factor` after an accepted step: the size of the next one, and the control of that.

        Args:
            control: (9,) float64: the error of the step before, the order, safety, ifactor, dfactor, the least and the
                largest step, and beta1 and beta2 of the PI controller.
        """
        previous, order, safety, most, least, shortest, longest, beta1, beta2 = control.unbind()
        near = err > controller.FAR
        beta1, beta2 = torch.where(near, beta1, 1 / order), torch.where(near, beta2, 0.0)
        factor = safety ** (order * (beta1 - beta2)) * err**-beta1 * previous**beta2  # infinite for no error
        size = torch.clamp(dt * torch.clamp(factor, least, most), shortest, longest)
        return size, torch.cat([err.clamp_min(1e-4)[None], control[1:]])

    def norm(self, x: Tensor) -> Tensor:
        """As `arguments.default_norm`: 0-d."""
        if self.batch > 1:
            x = x.reshape(self.batch, -1)
            return torch.linalg.vector_norm(x, dim=1).amax() / x.shape[1] ** 0.5
        parts = [part for part in x.split(self.sizes) if part.numel()]
        norms = [torch.linalg.vector_norm(part) / part.numel() ** 0.5 for part in parts]
        return norms[0] if len(norms) == 1 else torch.stack(norms).amax()

    def combined(self, errors: list[Tensor]) -> Tensor:
        """DOP853 damps the fifth-order error by the third-order one (Hairer, Nørsett & Wanner II.10)."""
        if len(errors) == 1:
            return errors[0]
        fifth, third = errors
        return torch.where(fifth == 0, fifth, fifth * (fifth / torch.hypot(fifth, 0.1 * third)))

    def stages(
        self, clock: Tensor, y: Tensor, k0: Tensor, *lifted: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """dt, and the slopes K and the points of a step up to its end."""
        dt, times = self.clock(clock)
        K, points = [k0], [y]
        for i in range(1, self.s + 1):
            points.append(self.point(i, y, dt, K))
            K.append(self.value(times[i], points[i], *lifted))
        return dt, K, points

    def errors(self, dt: Tensor, K: list[Tensor], y: Tensor, y1: Tensor, rtol: Tensor, atol: Tensor) -> list[Tensor]:
        """The estimates of the error of a step over the tolerances, (n,) each."""
        scale = torch.maximum(y.abs(), y1.abs()) * rtol + atol
        estimates = [self.sum(row[: self.s + 1], K) for row in self.tab.E]  # type: ignore[union-attr]
        return [torch.zeros_like(y) if x is None else dt * x / scale for x in estimates]

    def stretches(self, points: list[Tensor], K: list[Tensor], scale: Tensor) -> Tensor:
        """|λ| of each system, (batch,), see `ExplicitStep`."""
        s = self.s
        rise, run = K[s] - K[s - 1], points[s] - points[s - 1]
        rise, run = ((x / scale).reshape(self.batch, -1).square().sum(1) for x in (rise, run))
        return torch.where(run > 0, rise / run, 0.0).sqrt()

    def make_slopes(self, known: int) -> Function:
        """(clock, y, K up to row `known`, *lifted) -> K, all rows."""

        def slopes(clock: Tensor, y: Tensor, K: Tensor, *lifted: Tensor) -> Any:
            dt, times = self.clock(clock)
            all_rows = list(K.unbind())
            for i in range(known, self.rows):
                all_rows.append(self.value(times[i], self.point(i, y, dt, all_rows), *lifted))
            return (torch.stack(all_rows),)

        return slopes

    def make_pull(self, by_time: bool, rows: int) -> Function:
        """(clock, y, a, K_bar, *lifted) -> cotangents of y and of each of θ; `by_time` also those of the clock, and K.

        The reverse mode through the stages, each by PyTorch's own backward pass through f. The cotangent of y1 is a,
        (n,), that of K is K_bar, (rows, n); of no rows, it is not an input.
        """
        if isinstance(self.product, str):
            raise NotCompiled(f"{_ASKED}: {self.product}.")
        vjp, s, A = self.product, self.s, self.A
        stages = max(s, rows)

        def pull(clock: Tensor, y: Tensor, a: Tensor, *rest: Tensor) -> Any:
            dt, times = self.clock(clock)
            bars: list[Tensor | None] = list(rest[0].unbind()) if rows else []
            bars += [None] * (stages - rows)
            lifted = rest[1:] if rows else rest
            K: list[Tensor] = []
            rises: list[Tensor | None] = []
            points: list[Tensor] = []
            for i in range(max(stages, s + 1)):
                rises.append(self.sum(A[i], K))
                points.append(self.point(i, y, dt, K))
                if i < stages:
                    K.append(self.value(times[i], points[i], *lifted))
            y_bar, dt_bar = torch.zeros_like(y), torch.zeros_like(dt)
            time_bars = [torch.zeros_like(dt) for _ in range(self.rows)]
            theta: list[Tensor] | None = None
            for i in reversed(range(len(points))):
                bar = a if i == s else None
                k_bar = bars[i] if i < stages else None
                if k_bar is not None:
                    time_bars[i], h_bar, *by_theta = vjp(times[i], points[i], k_bar, *lifted)
                    bar = h_bar if bar is None else bar + h_bar
                    theta = by_theta if theta is None else [x + g for x, g in zip(theta, by_theta)]
                if bar is None:
                    continue
                y_bar = y_bar + bar
                for j in range(i):
                    if A[i][j]:
                        term = dt * float(A[i][j]) * bar
                        known = bars[j]
                        bars[j] = term if known is None else known + term
                rise = rises[i]
                if rise is not None:
                    dt_bar = dt_bar + (bar * rise).sum()
            theta = [torch.zeros_like(x) for x in lifted[: self.trained]] if theta is None else theta
            if not by_time:
                return (y_bar, *theta)
            by_clock = torch.stack([dt_bar, *time_bars]).to(torch.float64)
            return (y_bar, by_clock, torch.stack(K), *theta)

        return pull


def compiled(f: Function, examples: Sequence[Tensor], trial: Sequence[Tensor]) -> Function:
    """f, a function of tensors that returns a tuple of tensors, compiled for inputs of the shapes of `examples`.

    Args:
        trial: inputs for which the compiled function is compared with the graph that it was made of.

    Raises:
        NotCompiled: PyTorch's compiler fails, or what it makes gives other numbers.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with warnings.catch_warnings(), lasting(), torch.no_grad():
            warnings.simplefilter("ignore")
            inputs: list[Any] = [x.detach() for x in examples]
            module = make_fx(f)(*trial)  # which runs it, and f may write into what it holds
            _leave_apart(module)
            _share(module)
            for node in module.graph.nodes:  # of other tensors without numbers than the compiler's own
                node.meta.clear()
            right = module(*trial)
            with _kept_on_disk():
                made: Any = torch._inductor.compile(module, inputs, options=_OPTIONS)
            _compare(made(*trial), right)
            return made
    except NotCompiled:
        raise
    except Exception as error:
        from ..signals import of_a_signal

        if of_a_signal(error):
            raise
        log.debug("PyTorch's compiler failed", exc_info=True)
        raise NotCompiled(_words(error)) from None


# Of sizes and strides the guards have made sure, and the solver of its own tensors'. With `inplace_buffers` PyTorch's
# compiler (2.13) writes over what a matrix product has still to read: gradients of the last layer came out wrong.
_OPTIONS = {"size_asserts": False, "inplace_buffers": False}


@contextlib.contextmanager
def _kept_on_disk() -> Iterator[None]:
    """Within this context the compiler keeps what it makes for other processes, as it does for graphs with shapes that
    may be symbols; these here are not."""
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        context: Any = tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))))
    except (ImportError, TypeError):  # it costs time alone
        context = contextlib.nullcontext()
    with context:
        yield


def rounding(like: Tensor) -> float:
    """How far, as a part of their size, the same numbers may come out apart; on a GPU matrix products may be rounded to
    the 10 bits of TF32."""
    return float(torch.finfo(like.dtype).eps ** 0.5 * (10 if like.is_cuda else 1))


def _compare(found: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """
    Raises:
        NotCompiled: they differ by more than rounding.
    """
    for x, y in zip(found, right):
        tol = rounding(found[0])
        if y.numel() and not torch.allclose(x, y, rtol=tol, atol=tol * float(y.abs().amax()), equal_nan=True):
            raise NotCompiled(
                f"{_ASKED}: PyTorch's compiler made code that gives other numbers than PyTorch, by "
                f"{float((x - y).abs().max()):.3g}; use compile=None, and tell PyTorch."
            )


def _writes(module: torch.fx.GraphModule) -> bool:
    """Whether a graph writes into a tensor, the statistics of a batch normalisation among them."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if schema.is_mutable:
                return True
            for i, argument in enumerate(schema.arguments):
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                if "batch_norm" in schema.name and argument.name in ("training", "train") and value:
                    return True
    return False


def _words(error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    if "InvalidCxxCompiler" in said or "No working C++ compiler" in said:
        return (
            f"{_ASKED}: on a CPU PyTorch's compiler needs a C++ compiler, and finds none (it looks "
            "for g++ or clang++, or what the environment variable CXX names). Install one, or use compile=None."
        )
    first = said.strip().splitlines()[0]
    return f"{_ASKED}: PyTorch's compiler fails with {first}"


def _leave_apart(module: torch.fx.GraphModule) -> None:
    """Vectors that are joined and then split again: take the parts, which saves a copy of each."""
    aten = torch.ops.aten
    joined: dict[torch.fx.Node, list[tuple[torch.fx.Node, int]]] = {}

    def length(x: Any) -> int | None:
        shape = getattr(x.meta.get("tensor_meta"), "shape", None) if isinstance(x, torch.fx.Node) else None
        return shape[0] if shape is not None and len(shape) == 1 else None

    for node in list(module.graph.nodes):
        if node.target is aten.cat.default:
            sizes = [length(x) for x in node.args[0]]
            if None not in sizes:
                joined[node] = [(x, size) for x, size in zip(node.args[0], sizes) if size is not None]
            continue
        parts = joined.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
        if parts is None:
            continue
        if node.target in (aten.view.default, aten.detach.default):  # the same numbers in the same order
            joined[node] = parts
        elif length(node.args[0]) is not None:
            if node.target is aten.split_with_sizes.default and list(node.args[1]) == [size for _, size in parts]:
                for user in list(node.users):
                    user.replace_all_uses_with(parts[user.args[1]][0])
            elif node.target is aten.slice.Tensor and len(node.args) == 4:
                first, last, start = node.args[2], node.args[3], 0
                last = min(last, sum(size for _, size in parts))
                for part, size in parts:
                    if size and (start, start + size) == (first, last):
                        node.replace_all_uses_with(part)
                    start += size
    module.graph.eliminate_dead_code()
    module.recompile()


def _share(module: torch.fx.GraphModule) -> None:
    """Compute once what a graph computes twice: a product of f goes through f again."""
    try:
        from torch._functorch.compile_utils import fx_graph_cse
    except ImportError:  # it costs time alone
        return
    module.graph = fx_graph_cse(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


class Ahead(NamedTuple):
    """A step that was begun while the verdict on the one before travelled to the host: from (y, k0) at t0, by dt."""

    y: Tensor
    k0: Tensor
    t0: float
    dt: float
    clock: Tensor
    control: Tensor
    outputs: Sequence[Tensor]

    def is_from(self, interval: Interval, y: Tensor, k0: Tensor | None) -> bool:
        """Whether it is the one that is asked for."""
        dt = interval.t1 - interval.t0
        same = y is self.y and k0 is self.k0 and interval.t0 == self.t0 and abs(dt - self.dt) <= 1e-12 * abs(dt)
        return same and not (interval.after_jump or interval.before_jump)


class Verdicts:
    """Numbers on their way from a GPU, past what it was given to do meanwhile."""

    def __init__(self, like: Tensor) -> None:
        self.stream = torch.cuda.Stream(like.device)
        self.numbers = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def mark(self) -> Any:
        """What was done so far."""
        return torch.cuda.current_stream(self.stream.device).record_event()

    def read(self, verdict: Tensor, done: Any) -> list[float]:
        """The numbers of a tensor that was there at a mark."""
        self.stream.wait_event(done)
        with torch.cuda.stream(self.stream):
            self.numbers.copy_(verdict, non_blocking=True)
            self.stream.record_event().synchronize()
        return self.numbers.tolist()


def replayed(device: torch.device) -> bool:
    """Whether functions there are replayed as graphs: launching their kernels one by one takes longer than they do."""
    return device.type == "cuda"


class Graphs:
    """A compiled function as CUDA graphs, each for one solve at a time."""

    def __init__(self, run: Function) -> None:
        self.run = run
        self.idle: list[Graph] = []

    def take(self, inputs: Sequence[Tensor], changing: int) -> Graph:
        """One that nobody uses.

        Args:
            inputs: of the first call.
            changing: how many of them, the first ones, are others at the next call. The rest is copied once.
        """
        if self.idle:
            graph = self.idle.pop()
        else:
            with lasting():
                graph = Graph(self, inputs)
        graph.begin(inputs, changing)
        return graph


class Graph:
    """One CUDA graph, with memory of its own for what goes in and what comes out."""

    def __init__(self, owner: Graphs, inputs: Sequence[Tensor]) -> None:
        self.owner = owner
        self.inputs = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs]
        self.replay, self.outputs = record(owner.run, self.inputs)
        self.changing = 0
        self.done: Any = None  # when the last solve that used it is through with it

    def begin(self, inputs: Sequence[Tensor], changing: int) -> None:
        if self.done is not None:
            torch.cuda.current_stream(self.inputs[0].device).wait_event(self.done)
        self.changing = changing
        if self.inputs[changing:]:
            torch._foreach_copy_(self.inputs[changing:], [x.detach() for x in inputs[changing:]])

    def __call__(self, *changing: Tensor) -> list[Tensor]:
        """What the function returns, in memory that the next call leaves alone."""
        torch._foreach_copy_(self.inputs[: self.changing], list(changing), non_blocking=True)
        self.replay()
        return [x.clone() for x in self.outputs]

    def give_back(self) -> None:
        device = self.inputs[0].device
        if device.type == "cuda":
            self.done = torch.cuda.current_stream(device).record_event()
        self.owner.idle.append(self)


def record(run: Function, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """A CUDA graph of `run(*inputs)`: what runs it again, and its outputs, which are then written anew."""
    device = inputs[0].device
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):  # kernels are loaded at first use, and libraries allocate, which no graph can have
                run(*inputs)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run(*inputs)
    return graph.replay, outputs


# ----------------------------------------------------------------------------------------------------------------------
# One solve
# ----------------------------------------------------------------------------------------------------------------------


class Steps:
    """The compiled steps of one problem; in the place of an `ExplicitRK`.

    Args:
        held: what the field holds.
        dense: the dense output will be kept.
    """

    def __init__(self, p: ODEProblem, program: Program, held: Any, *, dense: bool) -> None:
        self.p, self.program, self.held = p, program, held
        self.s, self.fsal = program.s, True
        y = p.y0
        self.originals = [held.tensors[i] for i in program.slots]
        lifted = [x.detach() if dense else x.detach().contiguous() for x, dense in zip(self.originals, program.dense)]
        # Numbers may lie on the CPU beside a state that does not.
        self.lifted = [x if x.device == y.device or x.ndim else x.to(y.device) for x in lifted]
        self.versions = self.versions_now()
        self.rtol, self.atol = (as_like(x, y).contiguous() for x in (p.rtol, p.atol))
        self.numpy = numpy_dtype(y)
        cubic = p.method.adaptive or p.options.interp == "cubic"
        # Whether outputs may lie within steps, and not only at their ends.
        self.between = (len(p.times) > 2 or p.event_fn is not None) and (
            p.method.adaptive or p.options.step_size is not None or p.options.grid_constructor is not None
        )
        self.slopes = dense or (cubic and self.between)
        self.runs: dict[tuple[Any, ...], Callable[..., Sequence[Tensor]]] = {}
        self.leases: list[Graph] = []
        self.calls = 0  # of f, that its counters have not heard of
        weakref.finalize(self, _give_back, self.leases).atexit = False
        # On a GPU the next step is begun before the host knows that there will be one.
        self.looks_ahead = replayed(y.device) and program.adaptive and program.fused
        self.ahead: Ahead | None = None
        self.verdicts: Any = None
        self.last: tuple[Tensor, float] = (y, 1.0)  # where the last step ended, and its error
        self.previous = 1.0  # the error of the last accepted step

    def versions_now(self) -> list[int]:
        return [0 if x.is_inference() else x._version for x in self.originals]

    def run(self, kind: tuple[Any, ...], *changing: Tensor, more: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        """Call a function of the program.

        Args:
            changing: inputs that are others at each call. more: inputs that are not, before those that f holds.
        """
        changing = tuple([x if x.is_contiguous() else x.contiguous() for x in changing])
        run = self.runs.get(kind)
        if run is None:
            rest = (*more, *self.lifted)
            made = self.program.function(kind, (*changing, *rest))
            if isinstance(made, Graphs):
                run = made.take((*changing, *rest), len(changing))
                self.leases.append(run)
            else:
                run = lambda *changing: made(*changing, *rest)  # noqa: E731
            self.runs[kind] = run
        return run(*changing)

    def clock(self, interval: Interval) -> Tensor:
        """dt and the times of the rows of K: (1 + rows,) float64."""
        clock = np.empty(self.program.rows + 1)
        clock[0] = interval.t1 - interval.t0
        clock[1:] = host_times(interval, self.program.C, self.numpy)
        on_cpu = torch.from_numpy(clock)
        return on_cpu if self.p.y0.device.type == "cpu" else on_cpu.to(self.p.y0.device, non_blocking=True)

    def count(self, calls: int) -> None:
        self.p.f.nfe += calls
        self.calls += calls

    def step(self, interval: Interval, y: Tensor, k0: Tensor | None, *, estimate: bool = True) -> CompiledStep:
        """As `ExplicitRK.step`."""
        if self.looks_ahead:
            return self.step_ahead(interval, y, k0)
        program, clock = self.program, self.clock(interval)
        if not program.adaptive:
            y1, *K = self.run(("step", self.slopes), clock, y)
            self.count(self.s + self.slopes)
            step = CompiledStep(self, interval, clock, y, y1, None, None, *K)
        else:
            if k0 is None:
                k0 = self.p.f(clock[1].to(y), y)
            y1, f1, verdict, *rest = self.run(("step", self.slopes), clock, y, k0, more=(self.rtol, self.atol))
            self.count(self.s)
            error: list[Tensor] = []
            if not program.fused:
                error.append(rest.pop(0))
            step = CompiledStep(self, interval, clock, y, y1, k0, f1, *rest)
            if program.fused:
                step.err, step.stretched = verdict.tolist()
            else:
                step.judge(verdict, *error)
        if not program.checked:
            self.compare(step, k0)
        return step

    def step_ahead(self, interval: Interval, y: Tensor, k0: Tensor | None) -> CompiledStep:
        """The same, of a step that may have been begun already; and the next one is begun, as if this were accepted and
        no stop came near. Where that is wrong nothing but its time is lost."""
        if y is self.last[0]:
            self.previous = max(self.last[1], 1e-4)
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead.is_from(interval, y, k0):
            clock, k0, control, outputs = ahead.clock, ahead.k0, ahead.control, ahead.outputs
        else:
            clock, control = self.clock(interval), self.control()
            k0 = self.p.f(clock[1].to(y), y) if k0 is None else k0
            outputs = self.launch(clock, y, k0, control)
        y1, f1, verdict, clock1, control1, *K = outputs
        if self.verdicts is None:
            self.verdicts = Verdicts(verdict)
        done, following = self.verdicts.mark(), None
        if interval.t1 != self.p.times[-1] and not interval.before_jump:
            following = self.launch(clock1, y1, f1, control1)
        step = CompiledStep(self, interval, clock, y, y1, k0, f1, *K)
        step.err, step.stretched, dt = self.verdicts.read(verdict, done)
        self.last = (y1, step.err)
        if following is not None:
            self.ahead = Ahead(y1, f1, interval.t1, dt, clock1, control1, following)
        if not self.program.checked:
            self.compare(step, k0)
        return step

    def launch(self, clock: Tensor, y: Tensor, k0: Tensor, control: Tensor) -> Sequence[Tensor]:
        self.count(self.s)
        return self.run(("step", self.slopes, True), clock, y, k0, control, more=(self.rtol, self.atol))

    def control(self) -> Tensor:
        """As `Program.control` takes it."""
        o, order = self.p.options, self.program.tab.error_order + 1
        steps = (o.min_step, o.max_step)
        numbers = (self.previous, order, o.safety, o.ifactor, o.dfactor, *steps, *self.p.method.pi)
        return on_host(numbers).to(self.p.y0.device, non_blocking=True)

    def compare(self, step: CompiledStep, k0: Tensor | None) -> None:
        """The first step of a program beside PyTorch's own.

        Raises:
            NotCompiled: they differ.
        """
        with torch.no_grad():
            self.agree(step.y, step.y1, ExplicitRK(self.p).step(step.interval, step.y, k0, estimate=False).y1)

    def agree(self, y: Tensor, y1: Tensor, right: Tensor) -> None:
        """A compiled step from y to y1 with PyTorch's.

        Raises:
            NotCompiled: they differ.
        """
        change, size = right - y, rounding(y)
        apart = (right - y1).abs()
        tol = size * change.abs().amax() + 100 * size**2 * torch.maximum(y.abs(), right.abs()).amax()
        same = (apart <= tol) | ~torch.isfinite(right) | ~torch.isfinite(tol)
        if not bool(same.all()):
            raise NotCompiled(
                f"{_ASKED}: a compiled step ends {float(apart.max()):.3g} away from where PyTorch "
                "has it. f does something that its capture does not show; use compile=None."
            )
        self.program.checked = True

    def look_for_strangers(self) -> None:
        """
        Raises:
            Discovered: f uses tensors that require grad and were not known.
        """
        p = self.p
        if p.named:
            return
        known = {id(x) for x in p.params}
        found: list[Tensor] = []
        for x in self.originals[: self.program.trained]:
            if id(x) in known:
                continue
            if x.is_leaf:
                found.append(x)
            else:
                found += parameters.strangers([x], known, p.cuts, 0)[0]
        if found:
            raise Discovered(found)

    def replay(self, p: ODEProblem) -> CompiledReplay:
        """The backward pass over the steps that were made for p."""
        return CompiledReplay(p)

    def check(self) -> None:
        """
        Raises:
            GradientUnavailable: what f held in the solve was changed in place since.
        """
        if self.versions_now() != self.versions:
            raise other_function()

    def settle(self) -> None:
        """Have f's own counters hear of the calls that were made."""
        calls, self.calls = self.calls, 0
        if not calls:
            return
        for slot, step in zip(self.held.counters, self.program.counts):
            slot.set(slot.get() + calls * step)
        with torch.no_grad():
            for i, step in self.program.adds.items():
                self.held.tensors[i].add_(calls * step)

    def finish(self) -> None:
        """The solve is over."""
        self.settle()
        self.runs.clear()
        _give_back(self.leases)


def _give_back(leases: list[Graph]) -> None:
    while leases:
        leases.pop().give_back()


class CompiledStep:
    """A step, with its slopes where they were asked for."""

    __slots__ = ("K", "clock", "err", "f1", "interval", "k0", "rk", "stretched", "y", "y1")

    def __init__(
        self,
        rk: Steps,
        interval: Interval,
        clock: Tensor,
        y: Tensor,
        y1: Tensor,
        k0: Tensor | None,
        f1: Tensor | None,
        K: Tensor | None = None,
    ) -> None:
        self.rk, self.interval, self.clock, self.y, self.y1 = rk, interval, clock, y, y1
        self.k0, self.f1, self.K = k0, f1, K
        self.err = self.stretched = 0.0

    @property
    def f0(self) -> Tensor | None:
        """f at the start of the step, shape (n,)."""
        return self.k0

    def judge(self, verdict: Tensor, errors: Tensor) -> None:
        """Have the user's own norm measure the step's error."""
        (self.stretched,) = verdict.tolist()
        norms = [self.rk.p.norm(x) for x in errors.unbind()]
        self.err = norms[0] if len(norms) == 1 else float(self.rk.program.combined([on_host(x) for x in norms]))

    def stretch(self) -> float:
        """As `ExplicitStep.stretch`."""
        return self.stretched

    def slopes(self) -> Tensor:
        """K, all rows: (rows, n)."""
        rk, program = self.rk, self.rk.program
        if self.K is None:
            known = 0 if self.k0 is None else 1
            start = self.y.new_empty(0, self.y.numel()) if self.k0 is None else self.k0[None]
        else:
            known, start = len(self.K), self.K
        if known < program.rows:
            with torch.no_grad():
                (self.K,) = rk.run(("slopes", known), self.clock, self.y, start)
            rk.count(program.rows - known)
        assert self.K is not None
        return self.K

    def interpolate(self, times: list[float] | Tensor) -> Tensor:
        """Dense output at M times within the step: (M, n)."""
        theta, P = fraction(self.interval, times), self.rk.program.polynomials
        weights = powers(theta.to(P.device), P.shape[0]) @ P * self.interval.dt
        return torch.addmm(self.y, weights.to(self.y), self.slopes())


# ----------------------------------------------------------------------------------------------------------------------
# The backward pass
# ----------------------------------------------------------------------------------------------------------------------


class CompiledReplay(Replay):
    """The adjoint of a step in one call: the stages again, and the reverse mode through them."""

    def __init__(self, p: ODEProblem) -> None:
        super().__init__(p)
        assert isinstance(p.compiled, Steps)
        self.steps = p.compiled
        self.steps.check()
        program, cubic = self.steps.program, p.method.adaptive or p.options.interp == "cubic"
        rows = program.rows if cubic else program.s
        # Where outputs lie within steps one function serves all steps, if that costs no more than a call of f.
        self.rows = rows if self.steps.between and rows <= program.s + 1 else 0
        self.sums = Sum(self.steps.originals[: self.steps.program.trained])

    def pull(self, kept: Kept, a: Tensor, times: list[float] | Tensor, g: Tensor, params: Sum) -> Tensor:
        steps, program, interval = self.steps, self.steps.program, kept.interval
        inside = len(times) > 0
        changing = [steps.clock(interval), kept.y.detach(), a.contiguous()]
        rows = self.rows
        if inside:
            with torch.no_grad():
                weights = self.weights(interval, times) * (interval.t1 - interval.t0)
            rows = weights.shape[1]
            changing.append(weights.T.to(g) @ g)
        elif rows:
            changing.append(g.new_zeros(rows, g.shape[1]))
        y_bar, *rest = steps.run(("pull", self.want_t, rows), *changing)
        steps.count(max(program.s, rows))
        if inside:
            y_bar = y_bar + g.sum(0)
        if self.want_t:
            by_clock, K, *rest = rest
            self.move(interval, by_clock)
            if inside:
                self.move_outputs(interval, times, K, g)
        self.sums.add(rest)
        return y_bar

    def weights(self, interval: Interval, times: list[float] | Tensor) -> Tensor:
        """W of dense output y + dt W K at M times: (M, rows) float64."""
        p, program = self.p, self.steps.program
        theta = fraction(interval, times)
        if not p.method.adaptive and p.options.interp == "linear":
            return theta[:, None] * on_host(program.A[program.s, : program.s])
        return powers(theta, program.P.shape[1]) @ on_host(program.P.T)

    def move(self, interval: Interval, by_clock: Tensor) -> None:
        """Add the cotangents of a step's start and length."""
        bars = by_clock.to("cpu")
        self.moved_by(interval.at, bars[1:].sum())
        self.moved_by(interval.dt, bars[0] + bars[1:] @ on_host(self.steps.program.C))

    def move_outputs(self, interval: Interval, times: list[float] | Tensor, K: Tensor, g: Tensor) -> None:
        """Add the cotangents of what the outputs within a step have of its times."""
        moving = [interval.at, interval.dt, *([times] if isinstance(times, Tensor) else [])]
        inputs = [x.detach().requires_grad_() for x in moving]  # type: ignore[union-attr]
        with torch.enable_grad():
            at, dt = inputs[:2]
            W = self.weights(interval._replace(at=at, dt=dt), inputs[2] if len(inputs) > 2 else times)
            out = (W.to(K) @ K[: W.shape[1]]) * dt.to(K)
        for x, bar in zip(moving, torch.autograd.grad(out, inputs, g, allow_unused=True)):
            self.moved_by(x, bar)

    def moved_by(self, x: Any, bar: Tensor | None) -> None:
        if bar is not None and isinstance(x, Tensor) and x.requires_grad:
            self.moved.append(x)
            self.moved_bar.append(bar.to(x))

    def finish(self, params: Sum) -> None:
        deliver(self.p, self.steps, self.sums, params)


def deliver(p: ODEProblem, steps: Steps, sums: Sum, params: Sum) -> None:
    """Add what a backward pass summed up, of what the compiled steps hold, to the gradients of the problem's
    parameters."""
    place = {id(x): i for i, x in enumerate(p.params)}
    total: list[Tensor | None] = [None] * len(p.params)
    between: list[tuple[Tensor, Tensor]] = []
    for x, bar in zip(steps.originals, sums.total):
        if bar is None:
            continue
        i = place.get(id(x))
        if i is not None:
            known = total[i]
            total[i] = bar if known is None else known + bar
        elif not x.is_leaf:  # a result that parameters were made into outside of f
            between.append((x, bar))
    params.add(total)
    if between and p.params:
        outputs, bars = zip(*between)
        params.add(torch.autograd.grad(outputs, p.params, bars, allow_unused=True, retain_graph=True))
    steps.finish()

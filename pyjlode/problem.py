"""`ODEProblem`: what an engine is given. A vector field over one flat real vector, and times as Python floats."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import numbers
from .errors import BadOption, BadShape, Discovered
from .methods import Method
from .solution import Stats

Norm = Callable[[Tensor], float]

# Numbers on the CPU that Python looks at faster than PyTorch does.
FEW = 32


# Of a tree that is one tensor: asking PyTorch takes longer than all else that is done with the most common state.
_LEAF = pytree.tree_flatten(torch.empty(0))[1]


class Layout:
    """How a pytree of tensors lies in one flat real vector, and back.

    Complex leaves are stored as pairs of reals. Leaves of different precision share the widest one while they are flat
    and get their own back.

    Args:
        tree: any pytree of floating-point or complex tensors.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self.spec = ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.complex = [leaf.is_complex() for leaf in leaves]
        self.sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in leaves]
        self.size = sum(self.sizes)
        self.device = leaves[0].device if leaves else torch.device("cpu")
        self.dtype = torch.float32
        for leaf in leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.real.dtype)
        # A bare real tensor, by far the most common state, passes through as a view.
        self.bare = self.spec.is_leaf() and not any(self.complex)
        # A tuple of tensors is the next most common: laying it out by hand is faster than asking PyTorch.
        self.plain = type(tree) is tuple and all(isinstance(x, Tensor) for x in tree)

    def flatten(self, tree: Any) -> Tensor:
        """Pytree with leaves of shape (*shape,) -> Tensor of shape (size,)."""
        if self.bare:
            return tree.reshape(-1)
        return self.flatten_leaves(tree if self.plain else pytree.tree_leaves(tree))

    def flatten_result(self, t: Tensor, out: Any) -> Tensor:
        """What `f` returned at time t -> Tensor of shape (size,).

        Raises:
            BadShape: it has not the structure of the state, or not its shapes.
        """
        leaves = self.result_leaves(out)
        for i, (leaf, shape) in enumerate(zip(leaves, self.shapes)):
            if not isinstance(leaf, Tensor) or leaf.shape != shape:
                got = f"of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                what = f"tensor {i} of what f returned" if len(leaves) > 1 else "what f returned"
                raise BadShape(f"{what} at t={numbers.first(t):.6g} is {got}; there h has the shape {tuple(shape)}.")
        return leaves[0].reshape(-1) if self.bare else self.flatten_leaves(leaves)

    def result_leaves(self, out: Any) -> Sequence[Any]:
        """The leaves of what `f` returned, in the order of the state's: dictionaries by their keys, tuples, named
        tuples and lists by position.

        Raises:
            BadShape: it has another structure than the state.
        """
        if self.plain and type(out) is tuple and len(out) == len(self.shapes):
            return out
        if self.spec.is_leaf():
            return (out,)
        return in_order(pytree.tree_unflatten([_STATE] * len(self.shapes), self.spec), out)

    def flatten_leaves(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves in the order of the tree -> Tensor of shape (size,)."""
        # Not `view_as_real`: its backward pass takes no gradient that begins at an odd place, behind three reals, say.
        parts = [torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf for leaf in leaves]
        flat = [part.reshape(-1).to(device=self.device, dtype=self.dtype) for part in parts]
        return self.join(flat) if flat else torch.zeros(0, dtype=self.dtype, device=self.device)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The real numbers of each leaf, (sizes[i],) each -> (size,)."""
        return torch.cat(list(parts))

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """(*lead, size) -> the real numbers of each leaf, (*lead, sizes[i]) each."""
        return flat.split(self.sizes, -1)

    def leaves(self, flat: Tensor) -> list[Tensor]:
        """Tensor of shape (*lead, size) -> list of leaves of shape (*lead, *shape)."""
        lead = flat.shape[:-1]
        leaves = []
        for part, shape, dtype, is_complex in zip(self.split(flat), self.shapes, self.dtypes, self.complex):
            if is_complex:
                pair = part.reshape((*lead, *shape, 2))
                if numbers.transformed():  # derivatives of `complex` have views that `vmap` does not know
                    part = torch.view_as_complex(pair.clone())
                else:
                    part = torch.complex(pair[..., 0], pair[..., 1])
            leaves.append(part.reshape(lead + shape).to(dtype))
        return leaves

    def unflatten(self, flat: Tensor) -> Any:
        """Tensor of shape (*lead, size) -> pytree with leaves of shape (*lead, *shape)."""
        if self.bare:
            return flat if len(self.shapes[0]) == 1 else flat.reshape(flat.shape[:-1] + self.shapes[0])
        leaves = self.leaves(flat)
        return tuple(leaves) if self.plain else pytree.tree_unflatten(leaves, self.spec)


class SystemsLayout(Layout):
    """The layout of independent systems that lie in several tensors: the numbers of one system after those of another.

    Args:
        layout: of the whole state. dims: how many dimensions in front of each leaf count the systems.
    """

    def __init__(self, layout: Layout, dims: int) -> None:
        self.__dict__.update(vars(layout))
        self.count = math.prod(self.shapes[0][:dims])
        self.widths = [size // self.count for size in self.sizes]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(self.count, -1) for part in parts], 1).reshape(-1)

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        rows = flat.reshape(*flat.shape[:-1], self.count, -1).split(self.widths, -1)
        return [part.reshape(*flat.shape[:-1], -1) for part in rows]


_STATE = object()  # stands for a tensor of the state


def in_order(state: Any, out: Any, where: str = "") -> list[Any]:
    """The leaves of `out` in the order of those of `state`, a pytree of the same structure.

    Raises:
        BadShape: the structure is another one; it says what differs, and where.
    """
    if state is _STATE:
        return [out]
    what = f"what f returned{where and ' at '}{where}"
    children: Sequence[tuple[Any, Any, str]]
    if isinstance(state, dict):
        if not isinstance(out, dict):
            raise BadShape(f"{what} is a {type(out).__name__}; there h0 is a dictionary with the keys {list(state)}.")
        missing, more = [k for k in state if k not in out], [k for k in out if k not in state]
        if missing or more:
            said = [f"has not the key{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}"] if missing else []
            said += [f"has {', '.join(map(repr, more))}, which h0 has not"] if more else []
            raise BadShape(f"{what} {' and '.join(said)}.")
        children = [(state[k], out[k], f"[{k!r}]") for k in state]
    elif isinstance(state, (tuple, list)):
        # torchdiffeq, which knows plain tuples only, takes any of these for any other.
        fields = getattr(state, "_fields", None)
        if not isinstance(out, (tuple, list)) or (fields and getattr(out, "_fields", fields) != fields):
            raise BadShape(f"{what} is a {type(out).__name__}; there h0 is a {type(state).__name__}.")
        if len(out) != len(state):
            raise BadShape(f"{what} has {len(out)} elements, and h0 has {len(state)} there: one for each.")
        children = [(a, b, f"[{i}]") for i, (a, b) in enumerate(zip(state, out))]
    else:
        leaves, spec = pytree.tree_flatten(out)
        if spec != pytree.tree_flatten(state, is_leaf=lambda x: x is _STATE)[1]:
            raise BadShape(f"{what} is a {type(out).__name__} of another structure than h0's {type(state).__name__}.")
        return leaves
    return [leaf for a, b, at in children for leaf in in_order(a, b, where + at)]


class Equation(NamedTuple):
    """What is to be solved, as the user gave it: what differs from call to call. See `pyjlode.odeint`."""

    f: Any
    h0: Any
    t: Any
    event_fn: Any = None
    mass_matrix: Any = None
    jac: Any = None
    adjoint_params: Any = None
    events: Any = None


class Field:
    """The vector field on the flat state; counts its calls.

    Args:
        f: `f(t, y)` with `t` a 0-d tensor and `y` of shape (n,), or of `shape`; returns its like.
        shape: of the user's state, where it is one real tensor. This is done here and not in one more function around
            `f` because it is the innermost call of every solve.
        source: what `f` is made of: the user's function, and the shape or the `Layout` of its state; None where a
            capture of the user's function would not show what `f` does.
        parts: tensors that `source` holds, by their `id`, and what stands for them in `f`.
        one: how the state of one system lies, where f is that of one system of a batch and `source` that of all.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        shape: torch.Size | None = None,
        source: tuple[Any, ...] | None = None,
        parts: dict[int, Tensor] | None = None,
        one: Layout | None = None,
    ) -> None:
        self.f, self.shape, self.source, self.parts, self.one = f, shape, source, parts or {}, one
        self.program: Any = None  # of the compiled functions, once it was looked for
        self.seen: Any = None  # where it was called, for those functions to be compared there
        self.flat = shape is None or len(shape) == 1
        self.nfe = 0
        self.watched = False  # nothing is known to need a gradient, and f is to say if something does
        self.differentiates = False  # f asks autograd for derivatives by its own h
        self.probed: Tensor | None = None  # what f returned before the solve, until it is called the next time

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y), shape (n,)."""
        k = self.shaped(t, y)
        return k if self.flat else k.reshape(-1)

    def shaped(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y) as f returned it, for a solver that copies it anyway.

        Raises:
            BadShape: it has another shape than at the start of the solve.
        """
        self.nfe += 1
        given = y
        if not self.flat:
            y = y.reshape(self.shape)  # type: ignore[arg-type]
        if self.differentiates:
            k = self.with_graph(t, y)
        else:
            recorded = not self.watched or torch.is_grad_enabled() or y.requires_grad
            try:
                if recorded:
                    k = self.f(t, y)
                else:  # as `torch.enable_grad()`, which takes a microsecond
                    torch._C._set_grad_enabled(True)
                    try:
                        k = self.f(t, y)
                    finally:
                        torch._C._set_grad_enabled(False)
            except RuntimeError as error:
                if not self.wants_graph(error, y):
                    raise
                k = self.with_graph(t, y)
            if self.watched and k.requires_grad and not y.requires_grad:
                self.look(k, t, y, given)
        if self.shape is not None and k.shape != self.shape:
            raise self.changed(numbers.first(t), k)
        if self.probed is not None:
            k = self.own(k)
        return k

    def wants_graph(self, error: RuntimeError, y: Tensor) -> bool:
        """Whether f failed since it differentiates by its h, as Hamiltonian systems do, and h has no graph; then it
        gets one from now on."""
        self.differentiates = not y.requires_grad and "does not require grad" in str(error)
        return self.differentiates

    def with_graph(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y), in its own shape, of a y that has a graph where f differentiates by it."""
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            if self.differentiates and not y.requires_grad:
                y = y.detach().requires_grad_()
            k = self.f(t, y)
        if self.watched:
            self.look(k, t, y)
            return k.detach()
        return k if recorded else k.detach()

    def look(self, k: Tensor, *point: Tensor) -> None:
        """
        Args:
            point: what f was called with: it may have asked for gradients by that.

        Raises:
            Discovered: the graph of k reaches something else that requires grad.
        """
        from .parameters import strangers

        if found := strangers([k], {id(x) for x in point}, {}, 0)[0]:
            raise Discovered(found)

    def own(self, k: Tensor) -> Tensor:
        """What f returned, in memory that f does not write to again: f may return one buffer at every call."""
        probed, self.probed = self.probed, None
        try:
            again = probed is not None and k.numel() > 0 and k.data_ptr() == probed.data_ptr()
        except RuntimeError:  # within a transform, where tensors have no memory to look at
            return k
        if not again:
            return k
        f = self.f
        self.f = lambda t, y: f(t, y).clone()
        return k.clone()

    def changed(self, t: float, k: Tensor) -> BadShape:
        start = tuple(self.shape or ())
        return BadShape(f"f returned a tensor of shape {tuple(k.shape)} at t={t:.6g}, of shape {start} at the start.")


def flat_field(f: Any, layout: Layout, autocast: bool) -> Field:
    """f on the flat vector."""
    if autocast:  # f answers in a lower precision than the state's, and in the same one when a backward pass asks again
        dtype = torch.get_autocast_dtype(layout.device.type)

        def cast(t: Tensor, y: Tensor) -> Tensor:
            # Without its cache: weights that autocast has cast without a graph would have none when one is wanted.
            with torch.autocast(layout.device.type, dtype=dtype, cache_enabled=False):
                return layout.flatten_result(t, f(t, layout.unflatten(y))).to(layout.dtype)

        return Field(cast)
    if layout.bare:
        return Field(f, layout.shapes[0], (f, layout.shapes[0]))
    return Field(lambda t, y: layout.flatten_result(t, f(t, layout.unflatten(y))), source=(f, layout))


def rms_norm(y: Tensor) -> float:
    """Root mean square of a tensor of any shape; 0 for an empty one."""
    n = y.numel()
    return numbers.read(torch.linalg.vector_norm(y)) / math.sqrt(n) if n else 0.0


def is_finite(x: Tensor) -> bool:
    """Whether every element is finite. The sum tells in one kernel, unless large numbers overflow in it."""
    if numbers.transformed():
        x = numbers.rows(x)
        with numbers.outside():
            return bool(torch.isfinite(x).all())
    if x.numel() <= FEW and x.device.type == "cpu":
        return all(map(math.isfinite, x.tolist() if x.ndim == 1 else x.reshape(-1).tolist()))
    x = x.detach()
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def max_rms_norm(leaves: Sequence[Tensor]) -> float:
    """Largest root mean square among tensors; 0 for none."""
    # One kernel for all leaves and one synchronisation: this runs in every step of an adjoint solve.
    kept = [leaf for leaf in leaves if leaf.numel()]
    if not kept:
        return 0.0
    if numbers.transformed():
        norms = [numbers.read(torch.linalg.vector_norm(leaf)) for leaf in kept]
    else:
        norms = torch.stack(list(torch._foreach_norm(kept))).tolist()
    values = [norm / math.sqrt(leaf.numel()) for norm, leaf in zip(norms, kept)]
    # max() skips a NaN that does not come first; the step must see it.
    return math.nan if any(map(math.isnan, values)) else max(values)


def not_negative(norm: Any) -> float:
    """What the user's norm returned, as a number."""
    value = numbers.read(norm) if isinstance(norm, Tensor) else float(norm)
    if value < 0:
        raise BadOption(f"options['norm'] returned {value:.4g}; a norm is never negative.")
    return value


@dataclass(frozen=True)
class SolverOptions:
    """The user's `options` dictionary, read once; the names are torchdiffeq's.

    Attributes:
        first_step: size of the first step; None selects it (Hairer, Nørsett & Wanner II.4).
        safety, ifactor, dfactor: a new step is the old one times `safety * err**(-1/order)`, at most `ifactor` and at
            least `dfactor`.
        min_step: steps of this size are accepted whatever their error.
        max_step: no step is longer.
        max_num_steps: accepted and rejected steps together; 20 000 by default where an event ends the solve. With
            `events`, from one event to the next.
        max_events: events of one solve, of `events`.
        step_t: times that a step ends at (kinks of f).
        jump_t: times that a step ends at and where f is evaluated anew (jumps of f).
        norm: on the error divided by the tolerance; takes the state as the user wrote it.
        step_size, grid_constructor: grid of the fixed-step methods; neither means `t` itself.
        interp: "linear" or "cubic" output between the points of a fixed grid; "cubic" by default for the methods for
            systems of second order.
        perturb: evaluate f just inside each fixed step, for a field that jumps at grid points.
        max_order: highest order of the Adams methods; None is 5 for the explicit one, whose stability shrinks by half
            with each order, and 12 for the implicit one. Of `bdf`: 5.
        max_iters: iterations of the implicit methods within a step.
        batch_dims: how many of the first dimensions of the state (of each of its tensors) count independent systems.
            Each is then solved as if it were alone, with steps, times (`t` of shape (*batch, T)) and an event of its
            own, by the explicit adaptive methods and those of `pyjlode.native.samples.OWN_STEPS`. The other stiff
            methods take common steps, the error norm being the largest of the systems', with a block of the Jacobian
            for each. See `docs/batches.md`.
        batch_t: the shape of the `t` that `f(t, h)` is given then: "column", (*batch, 1, ...), which broadcasts with
            `h`; "batch", (*batch); "vmap", 0-d, f being mapped over the systems by `torch.func.vmap` as a batch of one.
            "auto" takes the first of these for which f treats each system as it does alone, found out by a few calls.
        on_failure: "raise", or "nan": a system whose solve fails is NaN from there on, and marked in `Stats.samples`.
        consistent: with a singular mass matrix, "check" refuses an `h0` that the algebraic equations do not hold for;
            "compute" changes its algebraic part until they do (Brown, Hindmarsh & Petzold 1998).
        allow_unstable: let `adjoint="backsolve"` solve a stiff system backward.
        specialize: "full" compiles Julia's solver for this very f, if that is a `julia_function`, or is compiled and
            the method explicit: it takes seconds once, and then solves are faster.
        progress: show a bar on standard error while the forward solve runs.
        estimates: add up the solver's estimates of the local error and of the stiffness in `Stats`, as functions of all
            that the solve depends on, for a loss that makes fields cheap to solve. For the explicit adaptive methods
            on the native engine, with `adjoint=False` where gradients are wanted. See `docs/regularize.md`.
        solver: name of the `scipy.integrate.solve_ivp` method.
    """

    first_step: float | None = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 100_000
    max_events: int = 10_000
    step_t: tuple[float, ...] = ()
    jump_t: tuple[float, ...] = ()
    norm: Norm | None = None
    step_size: float | None = None
    grid_constructor: Callable[[Tensor], Tensor] | None = None
    interp: str = "linear"
    perturb: bool = False
    max_order: int | None = None
    max_iters: int | None = None
    batch_dims: int = 0
    consistent: str = "check"
    allow_unstable: bool = False
    specialize: str = "auto"
    progress: bool = False
    estimates: bool = False
    solver: str = "LSODA"
    batch_t: str = "auto"
    on_failure: str = "raise"


NO_OPTIONS = SolverOptions()
EVENT_STEPS = 20_000

Callback = Callable[[float, Any, float], None]


@dataclass(frozen=True)
class Callbacks:
    """The user's `callback_step`, `callback_accept_step` and `callback_reject_step`, as `(t0, y0, dt)` with floats."""

    step: Callback | None = None
    accept: Callback | None = None
    reject: Callback | None = None

    def on(self, view: Callable[[Tensor], Any]) -> Callbacks:
        """The same callbacks for a solve whose state becomes `y0` by `view`."""

        def wrap(call: Callback | None) -> Callback | None:
            return call and (lambda t0, y0, dt: call(t0, view(y0), dt))

        return Callbacks(wrap(self.step), wrap(self.accept), wrap(self.reject))


@dataclass
class AdjointSettings:
    """How the backward solve of a continuous adjoint runs.

    Attributes:
        absolute: `atol` was given for the adjoint: it is in the adjoint's own units. The forward one is in those of the
            state, and a native solve makes one of it that goes with the size of the cotangent.
        seminorm: leave the parameters' part out of the error norm (Kidger, Chen & Lyons 2021).
        norm: on `(t, y, adj_y, *adj_params)`; the user's own.
    """

    method: Method
    rtol: float | Tensor
    atol: float | Tensor
    options: SolverOptions
    absolute: bool = False
    seminorm: bool = False
    norm: Callable[[tuple[Tensor, ...]], Any] | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)


@dataclass(frozen=True)
class Rows:
    """The times of independent systems, each of which is solved on its own.

    Attributes:
        shape: of the batch; B systems in all.
        times: (B, T) float64 on the host. A row that is shorter than others is filled up with its last time.
        own: whether t was given with a row for each system; else all rows are the same.
        asked: the shape in which f wants a time for each system, so that a solver can give it that; (B,) will do, too.
    """

    shape: tuple[int, ...]
    times: np.ndarray
    own: bool
    asked: tuple[int, ...] | None = None

    @property
    def starts(self) -> np.ndarray:
        return np.array(self.times[:, 0])

    @property
    def ends(self) -> np.ndarray:
        return np.array(self.times[:, -1])

    def name(self, i: int) -> str:
        """System number i, as the user counts them."""
        place = np.unravel_index(i, self.shape)
        return f"system {int(place[0])}" if len(place) == 1 else f"system {tuple(map(int, place))}"


@dataclass
class ODEProblem:
    """`y' = f(t, y)` on a flat real vector, checked and ready for an engine.

    Attributes:
        f: the vector field.
        y0: shape (n,), float32 or float64.
        t: the user's output times, shape (T,), with its graph if it requires grad.
        times: the same as Python floats, strictly monotone. With `event_fn`, `times[1]` gives the direction only.
        f0: `f(t0, y0)`, shape (n,), without graph, where the front door has it already.
        norm: of the error over tolerance, on a flat vector.
        rtol, atol: floats or tensors of shape (n,).
        event_fn: `(t: 0-d, y: (n,)) -> Tensor`; the solve ends where the first of its elements crosses zero.
        event_source: the user's event function.
        onward: a solve with `event_fn` ends at the last of `times` where no event ends it before, and gives the states
            at those that it passes.
        directions: of each element of `event_fn`: +1 where only rising through zero counts, -1 falling, 0 both. None:
            both, of all.
        signs: of each element just after the start, 0 where that is not known; None: those of its values there.
        params: tensors requiring grad, other than `y0` and `t`, that f depends on.
        named: `params` are those that the user named, and no others count.
        cuts: where in autograd's graph those of `params` stand that are results of earlier operations.
        suspects: results of earlier operations that f holds and did not use at the start. Weakly: a solve must not keep
            the graph of the last iteration's loss alive because f happens to hold it.
        retain_graph: f runs through a graph made outside of it, which a backward pass through f must leave alive.
        reached: `id` of each leaf that f used at the start.
        bindings: where f holds tensors that it may use in its next call.
        makes_leaves: f makes leaves of its own in each call; `strange` are those that were seen so far.
        own: leaves that the solver itself made in a step that autograd records.
        graph_bytes: what autograd keeps for one call of f; None where it was not looked at.
        graph_nodes: how many nodes such a graph has.
        layout: how the user's state lies in `y0`.
        batch: number B of independent systems, which lie in `y0` one after the other.
        rows: times of these systems, where each is solved with steps of its own; None where all share theirs. f is then
            given times of shape (B,), and `times` are the first and the last of all.
        swept: as `rows`, of systems that are solved one by one, each at times that are 0-d; `rows` is then None.
        mass: (n / B, n / B), M of `M y' = f(t, y)`, the same for each system; None is the identity.
        blind_to_time: f is known to read t as a number.
        products: `v -> J v` and `v -> Jᵀ v` at a time t, `(t: 0-d, v: (n,)) -> (n,)`, for a large linear f.
        split: the stiff and the other part of f, where the method solves each in its own way.
        second_order: y is (q, v), and f is known to give q' = v.
        jac: `(t: 0-d, y: (n,)) -> (B, n / B, n / B)` or what reshapes to it, the user's df/dy.
        compile: whether the engine must (True), may (None: Julia's) or must not (False) compile f.
        transformed: `torch.func` or forward mode is at work: tensors may be wrapped at any moment (by what f holds), so
            that nothing is written in place, and what steers the solve is read by `numbers`. The solve is recorded.
        compiled: the native engine's compiled steps, where it has them.
        repeats: what an engine keeps for problems that are this one but for f's tensors and the values of y0; None
            where there is no other known.
    """

    f: Field
    y0: Tensor
    t: Tensor
    times: list[float]
    method: Method
    rtol: float | Tensor
    atol: float | Tensor
    options: SolverOptions
    norm: Norm = rms_norm
    f0: Tensor | None = None
    event_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    event_source: Callable[[Any, Any], Tensor] | None = None
    onward: bool = False
    directions: tuple[int, ...] | None = None
    signs: tuple[float, ...] | None = None
    params: tuple[Tensor, ...] = ()
    suspects: tuple[weakref.ref[Tensor], ...] = ()
    named: bool = False
    cuts: Mapping[Any, Tensor] = field(default_factory=dict)
    retain_graph: bool = False
    reached: frozenset[int] = frozenset()
    bindings: tuple[Any, ...] = ()
    makes_leaves: bool = False
    strange: dict[int, Tensor] = field(default_factory=dict)
    own: dict[int, Tensor] = field(default_factory=dict)
    graph_bytes: int | None = None
    graph_nodes: int = 0
    layout: Layout | None = None
    batch: int = 1
    rows: Rows | None = None
    swept: Rows | None = None
    mass: Tensor | None = None
    split: tuple[Field, Field] | None = None
    second_order: bool = False
    jac: Callable[[Tensor, Tensor], Tensor] | None = None
    blind_to_time: bool = False
    products: tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] | None = None
    adjoint: AdjointSettings | None = None
    callbacks: Callbacks = field(default_factory=Callbacks)
    compile: bool | None = None
    transformed: bool = False
    compiled: Any = None
    repeats: dict[str, Any] | None = None

    @property
    def nfe(self) -> int:
        """Calls of f so far; of a field that is split, with those of its stiff part."""
        return self.f.nfe + (self.split[0].nfe if self.split else 0)

    @property
    def own_times(self) -> np.ndarray | None:
        """(B, T) float64: of systems that are solved one by one, the times where each has its own."""
        return self.swept.times if self.swept is not None and self.swept.own else None

    def asked(self, t: float, toward: float) -> Tensor:
        """`t`, an end of the solve or of a step, as f sees it: with `perturb` one rounding unit on the way `toward`
        another time."""
        at = self.time(t)
        return torch.nextafter(at, self.time(toward)) if self.options.perturb else at

    def leaf(self, x: Tensor) -> Tensor:
        """A leaf for the solver's own derivatives, where x is not one already that requires grad."""
        if x.requires_grad:
            return x
        x = x.detach().requires_grad_()
        if torch.is_grad_enabled():
            self.own[id(x)] = x
        return x

    @property
    def direction(self) -> float:
        """+1 forward in time, -1 backward."""
        return 1.0 if len(self.times) < 2 or self.times[1] > self.times[0] else -1.0

    @property
    def moving(self) -> bool:
        """Whether a derivative with respect to the times may be asked for."""
        return self.t.requires_grad or (self.transformed and numbers.wrapped(self.t))

    @property
    def start(self) -> Tensor:
        """The first time that f is asked for: 0-d, or one for each system, (B,)."""
        return self.asked(self.times[0], self.times[-1]) if self.rows is None else self.moments(self.rows.starts)

    def moments(self, t: np.ndarray) -> Tensor:
        """A time for each system as f sees them: (B,), of the state's dtype and device."""
        return torch.from_numpy(np.ascontiguousarray(t)).to(self.y0)

    def time(self, t: float) -> Tensor:
        """`t` as f sees it: a 0-d tensor of the state's dtype and device."""
        if self.y0.device.type == "cpu":
            return torch.tensor(t, dtype=self.y0.dtype, device=self.y0.device)
        return torch.full((), t, dtype=self.y0.dtype, device=self.y0.device)  # a launch, and no copy to wait for


@dataclass
class Prepared:
    """A problem and how it is solved.

    Attributes:
        gradient: name of the gradient method; None differentiates through the solver.
        needed: whether anything requires grad.
    """

    problem: ODEProblem
    stats: Stats
    engine: Any
    gradient: str | None
    needed: bool


def like(x: Any, **changes: Any) -> Any:
    """A dataclass as `x` but for some attributes: `dataclasses.replace` without its checks, which for a problem take
    ten times as long as the rest."""
    new = object.__new__(type(x))
    new.__dict__ = {**x.__dict__, **changes}
    return new

"""A compiled vector field for Julia's solvers, compared with PyTorch's at first use."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...capture.surroundings import surroundings
from ...capture.trace import second_product
from ...derivatives import REFUSALS, directional_by_reverse, jacobian
from ...derivatives import vjp as torch_vjp
from ...errors import NotCompiled
from ...methods import Method
from ...notices import warn
from ...parameters import by_tensor
from ...problem import FEW, Layout, ODEProblem, like
from ..calls import Calls, Held
from ..memory import CompiledFunctions, Outcome, ReplayRequest, Request
from ..rhs import Callbacks
from .program import Fields, JuliaField, Program, program_of, refuse, some_outputs

_ADDRESS = ctypes.c_void_p
_FUNCTION = ctypes.PYFUNCTYPE(None, *[_ADDRESS] * 6, ctypes.c_double)
# What an order of summation may change, of a number and of the largest beside it.
_TOLERANCE = {torch.float64: (1e-7, 1e-10), torch.float32: (2e-3, 2e-5)}
# What they may differ by where all of it is rounding, in units of what a move of the last digits makes of it.
_ROUNDINGS = 16
# Points of comparison: of those where f was asked before, and beside them; with its products; with Jacobians.
_SEEN, _POINTS, _PRODUCTS, _JACOBIANS = 10, 6, 6, 3
# What a field calls these functions.
_PLACES = {"sensitivities": "f", "pull": "vjp"}
# Numbers in a state up to which integrators are kept: each keeps some twenty states.
_REPEATED = 10_000


class Holding:
    """What a compiled field holds: its values, and gradients by them.

    Attributes:
        tensors: that its functions read; the first of them are trained.
        own: Julia's.
    """

    p: ODEProblem
    program: Program
    tensors: list[Tensor]
    own: JuliaField
    functions: dict[str, Any] = {}  # noqa: RUF012  # that are called back: none

    def refill(self) -> None:
        """Have Julia's field look at these values again, whatever solve it served in between."""
        self.own.fill(self.tensors)

    @property
    def trained(self) -> list[Tensor]:
        return self.tensors[: self.program.trace.trained]

    @property
    def params(self) -> Layout:
        if self.program.params is None:
            self.program.params = Layout(self.trained)
        return self.program.params

    def parameter_gradients(self, theta: Tensor) -> list[Tensor | None]:
        """Of a gradient by all that the compiled functions hold, shape (m,), those by `p.params`."""
        return self._in_order(unflatten(theta, self.trained))

    def apart(self, both: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """A gradient by the state and then by all that the compiled functions hold, shape (n + m,): that by the state,
        and those by `p.params`."""
        a, *grads = unflatten(both, [self.p.y0, *self.trained])
        return a, self._in_order(grads)

    def _in_order(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        trained, wanted = self.trained, self.p.params
        if len(trained) != len(wanted) or not all(map(operator.is_, trained, wanted)):
            return by_tensor(trained, grads, wanted)
        return [g if g.dtype == x.dtype else g.to(x.dtype) for x, g in zip(wanted, grads)]


class Compiled(Holding, Callbacks):
    """A field of compiled functions: only its event function is called back.

    For as long as this lives, Julia's field is its own; afterwards that serves another.

    Args:
        gradient: name of the gradient method that will be asked for; None for none.
        of: the problem that `p` is the one of the sensitivities of, for an explicit method.

    Raises:
        NotCompiled: it cannot be compiled, or what was compiled differs from PyTorch.
    """

    def __init__(self, calls: Calls, p: ODEProblem, gradient: str | None, of: ODEProblem | None = None) -> None:
        super().__init__(calls, p)
        self.shared: Fields | None = None
        self.calls = calls
        if why := surroundings():
            raise NotCompiled(why)
        if of is not None and not _explicit(p.method):
            raise NotCompiled("the sensitivities of a method for stiff systems are not compiled")
        if p.jac is not None and not _explicit(p.method):
            raise NotCompiled("jac was given, and a compiled f has its own")
        self.of = of or p
        self.program, source = program_of(self.of.f, self.of.y0, at_once=bool(p.compile))
        program = self.program
        self.tensors = tensors = program.read(source)
        trained, constants = self.trained, tensors[program.trace.trained :]
        self._check_parameters(self.of, trained, gradient or ("forward" if of else None))
        names = ["f"]
        if of is not None:
            program.text("sensitivities")  # raises where there are too many
            if [id(x) for x in trained] != [id(x) for x in of.params]:
                raise NotCompiled("it is differentiated by other tensors than those that f was found to use")
            names = ["sensitivities"]
        elif not _explicit(p.method):
            names += ["jac", "tgrad", "jvp"]
        elif p.adjoint is not None and not _explicit(p.adjoint.method):
            names += ["jac", "tgrad"]
        if gradient is not None:
            names += ["pull"] if gradient == "discrete" else ["vjp", "vjp_p"]
            names += ["keep"] if gradient == "discrete" and program.mode == "array" else []
            names += ["bend"] if gradient == "discrete" and not _explicit(p.method) else []
        addresses = {name: program.address(calls, name) for name in names}
        shared = None if self.functions else program.fields.setdefault(tuple(names), Fields())
        own = shared.take(self) if shared else None
        if own is None:
            fields = {_PLACES.get(name, name): address for name, address in addresses.items() if name != "bend"}
            kept = program.kept if "keep" in fields else 0
            functions = CompiledFunctions(n=self.n, event=self.pointers.get("event", 0), kept=kept, **fields)
            functions.lend(
                theta=_flat(trained, self.dtype),
                constants=_flat(constants, self.dtype, program.layers.stop),
                work=torch.empty(max(program.work, 1), dtype=self.dtype),
            )
            if program.layers.known:
                functions.lend(layers=program.layers.table)
            if "jac" in names and program.pattern is not None:
                functions.lend(columns=program.pattern.columns, rows=program.pattern.rows)
            memory = functions.tensors
            parts = _parts(memory["theta"], trained) + _parts(memory["constants"], constants)
            own = JuliaField(calls.compiled_field(self.dtype, functions), memory, parts)
            if shared:
                shared.add(own, self)
        else:
            own.fill(tensors)
        self.own, self.shared, self.field = own, shared, own.held
        self.value = names[0]
        self.addresses = addresses
        self.verify(names, addresses)

    def repeat(self, calls: Calls, algorithm: Held, request: Request) -> None:
        """Keep for the next such problem an integrator, if that holds but little memory and begins again as a new one
        begins: most implicit ones begin with the Jacobian that they ended with."""
        fresh = _explicit(self.p.method) or self.p.method.name == "rodas5p"
        if fresh and self.n <= _REPEATED and self.p.repeats is not None:
            held = calls.repeated(self.field, algorithm, request)
            start = self.p.y0.clone() if self.value == "sensitivities" else None
            name = (self.value, "discrete", "checkpointed")[request.keep]
            self.p.repeats[name] = Repeated(held, self.own, start, bool(request.keep))
            if self.shared is not None:  # the field stays that integrator's
                self.shared.keep(self.own)
                self.shared = None

    def _check_parameters(self, p: ODEProblem, trained: Sequence[Tensor], gradient: str | None) -> None:
        if gradient is None:
            return
        if not agrees(p, trained):
            raise NotCompiled("f uses results of earlier operations, whose graph a compiled f is no part of")

    def call(self, address: int, out: Tensor, t: float, u: Tensor, v: Tensor | None = None) -> Tensor:
        """out, of such a function."""
        m = self.own.memory
        if self.program.layers.known:
            self.calls.prepare(self.field)
        tensors = (out, u if v is None else v, u, m["theta"], m["constants"], m["work"])
        _FUNCTION(address)(*[x.data_ptr() for x in tensors], t)
        return out

    def verify(self, names: Sequence[str], addresses: dict[str, int]) -> None:
        """Compare f at the start, and at first use each function at points all over the solve, with PyTorch's.

        Raises:
            NotCompiled: they differ; a warning shows by how much.
        """
        p, program, value = self.p, self.program, names[0]
        f0 = self.of.f0
        fresh = [name for name in names if name not in program.verified]
        if not fresh and not self._is_covered():
            fresh = [value]
        if not fresh and f0 is None:
            return
        y0 = p.y0.detach().contiguous()
        if f0 is not None and value not in fresh:
            got = self.call(addresses[value], torch.empty_like(y0), p.times[0], y0)
            self.compare(value, got[: len(f0)], f0, y0)
        if not fresh:
            return
        nfe, generator = p.f.nfe, torch.Generator().manual_seed(0)
        points = self._points(generator)
        # A product costs several calls of f, and a Jacobian as many as the state has numbers.
        products = range(0, len(points), max(len(points) // _PRODUCTS, 1))
        jacobians = set(list(products)[:: max(_PRODUCTS // _JACOBIANS, 1)])
        for i, (t, u) in enumerate(points):
            kept = fresh if i in jacobians else [x for x in fresh if x not in ("jac", "jvp", "tgrad", "bend")]
            kept = kept if i in products else [value] if value in kept else []
            v = torch.randn(self.n, generator=generator, dtype=torch.float64).to(y0)
            if len(kept) > 1 and not self._inside(t, u):
                kept = [value] if value in kept else []
            self._verify_at(kept, addresses, float(p.time(t)), u, v)
        p.f.nfe = nfe
        program.verified.update(fresh)
        times = [*(t for t, _ in points), *(program.covered or ())]
        program.covered = min(times), max(times)

    def _inside(self, t: float, u: Tensor) -> bool:
        """Whether f is finite there; where it is not, derivatives are what PyTorch happens to make of them."""
        with torch.no_grad():
            return bool(torch.isfinite(self.p.f(self.p.time(t), u)).all())

    def _is_covered(self) -> bool:
        """Whether functions were compared all over the times of this solve."""
        if self.p.event_fn is not None or self.program.covered is None:
            return True
        low, high = self.program.covered
        room = 1e-6 * (high - low)
        return low - room <= min(self.p.times) and max(self.p.times) <= high + room

    def _points(self, generator: torch.Generator) -> list[tuple[float, Tensor]]:
        """Where functions are compared: the start, where f is known to have been asked, and all over the span beside
        these, with the state moved in every direction. Each state is of shape (n,)."""
        p, of = self.p, self.of
        y0 = of.y0.detach().contiguous()
        seen = self.program.seen.points
        seen = [seen[i] for i in torch.linspace(0, len(seen) - 1, min(len(seen), _SEEN)).round().long().tolist()]
        # The scale of each number; of one that is always zero that of all; and of a system at rest a unit.
        scale = torch.stack([y0, *(h for _, h in seen)]).abs().amax(0)
        largest = float(scale.max())
        scale = torch.where(scale > 0, scale, largest if largest > 0 else 1.0)
        span = p.times[-1] - p.times[0] if p.event_fn is None else p.direction
        points = [(p.times[0], y0), *seen]
        ends = [y0, *(h for _, h in seen)]
        for i in range(_POINTS):
            noise = torch.randn(len(y0), generator=generator, dtype=torch.float64).to(y0)
            move = (0.1, 1.0)[i % 2] * scale * noise
            points.append((p.times[0] + span * (i + 1) / _POINTS, ends[i % len(ends)] + move))
        rest = p.y0.detach()[len(y0) :]  # of sensitivities
        if len(rest) == 0:
            return points

        def beside() -> Tensor:
            return rest + torch.randn(len(rest), generator=generator, dtype=torch.float64).to(rest)

        return [(t, torch.cat([h, beside()])) for t, h in points]

    def look_back(self, times: Sequence[float], states: Tensor) -> None:
        """After the first solve, if nothing was known of it before: compare the functions along it.

        Raises:
            NotCompiled: they differ.
        """
        seen = self.program.seen
        if seen.solved or self.p is not self.of:
            return
        generator, nfe = torch.Generator().manual_seed(1), self.p.f.nfe
        names = [name for name in ("f", "vjp", "vjp_p", "pull") if name in self.addresses]
        for t, h in some_outputs(times, states):
            v = torch.randn(self.n, generator=generator, dtype=torch.float64).to(h)
            self._verify_at(names, self.addresses, float(self.p.time(t)), h.contiguous(), v)
            seen.note(t, h)
        seen.solved = True
        self.p.f.nfe = nfe

    def _verify_at(self, names: Sequence[str], addresses: dict[str, int], t: float, u: Tensor, v: Tensor) -> None:
        p, n, time, none = self.p, self.n, self.p.time(t), torch.zeros_like(u)

        def got(name: str, size: int, v: Tensor | None = None) -> Tensor:
            room = 0
            if name == "pull" and "keep" in addresses:  # last before "pull", which reads what it leaves
                self.compare("keep", got("keep", n), value(none), u, value)
                room = len(self.own.memory["work"])
            return self.call(addresses[name], torch.zeros(size + room, dtype=u.dtype), t, u, v)[:size]

        def value(moved: Tensor) -> Tensor:
            with torch.no_grad():
                return p.f(time, u * (1 + moved)).detach()

        for name in ("f", "sensitivities"):
            if name in names:
                self.compare(name, got(name, n), value(none), u, value)
        if "vjp" in names or "vjp_p" in names or "pull" in names:
            wrt = [x for x in self.trained if x.requires_grad]

            def products(moved: Tensor) -> Tensor:
                _, (by_u, *by_theta) = torch_vjp(p, time, u * (1 + moved), v * (1 + moved), wrt)
                by_u = none if by_u is None else by_u
                filled = [torch.zeros_like(x) if g is None else g for x, g in zip(wrt, by_theta)]
                return torch.cat([by_u, self.params.flatten_leaves(filled)]).detach()

            size, want = self.params.size, products(none)
            if "pull" in names:
                names_of, parts = ("pull", "pull"), got("pull", n + size, v).split([n, size])
            else:
                names_of, parts = ("vjp", "vjp_p"), (got("vjp", n, v), got("vjp_p", size, v))
            for name, part, of in zip(names_of, parts, (slice(0, n), slice(n, None))):

                def moved_part(moved: Tensor, of: slice = of) -> Tensor:
                    return products(moved)[of]

                self.compare(name, part, want[of], u, moved_part)
        if "bend" in names:
            generator = torch.Generator().manual_seed(n)
            m = torch.randn(n * n + n, generator=generator, dtype=torch.float64).to(u)
            bent_u, *bent_theta = _bent(p, time, u, m, [x for x in self.trained if x.requires_grad])
            both = got("bend", n + self.params.size, m)
            self.compare("bend", both[:n], bent_u, u)
            self.compare("bend", both[n:], self.params.flatten_leaves(bent_theta), u)
        if "jac" in names:
            J = jacobian(p, time, u)
            pattern = self.program.pattern
            if pattern is None:
                self.compare("jac", got("jac", n * n), J.T.reshape(-1), u)
            else:
                columns = torch.repeat_interleave(torch.arange(n), pattern.columns.diff())
                full = torch.zeros_like(J)
                full[pattern.rows - 1, columns] = got("jac", len(pattern.rows))
                self.compare("jac", full.reshape(-1), J.reshape(-1), u)
            if "jvp" in names:
                self.compare("jvp", got("jvp", n, v), J @ v, u)
        if "tgrad" in names:
            try:
                want = directional_by_reverse(p, time, u, torch.ones_like(time), None)
            except REFUSALS as error:
                raise NotCompiled(f"PyTorch has no second derivative of f to compare with: {error}") from error
            self.compare("tgrad", got("tgrad", n), want, u)

    def compare(
        self, name: str, got: Tensor, want: Tensor, u: Tensor, of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Compare what a compiled function gave with what PyTorch gives, at the state u.

        Args:
            of: what PyTorch gives where its arguments are moved, relative to what they are.

        Raises:
            NotCompiled: they differ; a warning shows by how much.
        """
        want = want.detach()
        relative, absolute = _TOLERANCE[self.dtype]
        if want.numel() <= FEW:  # at every solve
            a, b = got.tolist(), want.tolist()
            if all(x == y or abs(x - y) <= relative * abs(y) for x, y in zip(a, b)):
                return
        finite = want[want.isfinite()].abs()
        room = relative * want.abs() + absolute * (float(finite.max()) if finite.numel() else 0.0)
        apart = (got - want).abs()
        same = (apart <= room) | (got == want) | (got.isnan() & want.isnan())
        if of is not None and not bool(same.all()):
            # Where all that is summed cancels, rounding is what is left: as much as the last digits make of it.
            last = torch.full_like(u, torch.finfo(u.dtype).eps)
            last[::2] *= -1
            moves = torch.stack([(of(x) - want).abs() for x in (last, -last)])
            same |= apart <= _ROUNDINGS * moves.nan_to_num(0.0, 0.0, 0.0).amax()
        if bool(same.all()):
            return
        i = int((~same).nonzero()[0])
        reason = f"what was compiled differs from PyTorch: {name}[{i}] is {float(got[i])!r}, not {float(want[i])!r}"
        warn(f"f is not compiled: {reason}. Please report this.")
        refuse(self.of.f, name, reason)
        raise NotCompiled(reason)


@dataclass
class Repeated:
    """A solve that is made again and again, from other states and with other values of the tensors that f holds.

    Attributes:
        held: Julia's integrator.
        own: Julia's field, which is the integrator's.
        start: the first state of the sensitivities, shape (n + n (n + m),); None where the state is without them.
        keep: the steps are kept.
        replay: what is said of a replay of them, once one was asked for.
    """

    held: Held
    own: JuliaField
    start: Tensor | None
    keep: bool
    replay: ReplayRequest | None = None

    def again(self, p: ODEProblem, outcome: Outcome) -> Again:
        """The field of such a solve, known by how it went."""
        return Again(p, self, outcome)

    def first(self, y0: Tensor) -> Tensor:
        """The first state of the solve, from that of the problem, shape (n,): perhaps with sensitivities."""
        if self.start is None:
            return y0
        self.start[: len(y0)] = y0
        return self.start

    def solve(self, calls: Calls, tensors: Sequence[Tensor], y0: Tensor, out: Tensor) -> tuple[Held | None, Outcome]:
        """Make such a solve.

        Args:
            tensors: that f holds, in the program's order.
            y0: the first state, contiguous.
            out: room for the states at the output times, (T, ...).

        Returns:
            The solve with its steps, where these are kept, and how it went.
        """
        self.own.fill(tensors)
        held, outcome = calls.again(self.held, y0, out, keep=self.keep)
        self.own.filled = outcome
        return held, outcome


class Again(Holding, Callbacks):
    """The field of a repeated solve, with the values of this one: nothing of it is called back."""

    def __init__(self, p: ODEProblem, repeated: Repeated, outcome: Outcome) -> None:
        self.p, self.own, self.replaying, self.outcome = p, repeated.own, repeated.replay, outcome
        self.program, source = p.f.program
        self.tensors = self.program.read(source)

    def refill(self) -> None:
        if self.own.filled is not self.outcome:  # else nothing was solved in between
            self.own.fill(self.tensors, self.outcome)


def _bent(p: ODEProblem, t: Tensor, u: Tensor, m: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """What `Trace.bend` gives, by PyTorch: derivatives by u, and by `wrt`."""
    h, s = u.detach().requires_grad_(), t.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            return second_product(p.f(s, h), s, h, m, wrt)
    except REFUSALS as error:
        raise NotCompiled(f"PyTorch has no second derivative of f to compare with: {error}") from error


def agrees(p: ODEProblem, trained: Sequence[Tensor]) -> bool:
    """Whether the tensors that a program has as parameters are those by which the problem is to be differentiated: all
    that f was seen to use among the latter. What f holds besides, it does not read."""
    ids, wanted = {id(x) for x in trained}, {id(x) for x in p.params}
    lost = any(id(x) not in ids and id(x) in p.reached for x in p.params)
    # A result of earlier operations may lie in a cache that a capture looks through, and PyTorch does not.
    known = all(x.is_leaf or id(x) in wanted for x in trained)
    return not (lost or p.retain_graph) and known and (p.named or ids <= wanted)


def called_back(p: ODEProblem, gradient: str | None) -> str:
    """Why f would be called back, as far as that is known before f was called; empty where it would be compiled."""
    try:
        if why := surroundings():
            raise NotCompiled(why)
        program, _ = program_of(p.f, p.y0, at_once=bool(p.compile))
        for name in ("f", "vjp", "vjp_p", "pull") if gradient else ("f",):
            if name in program.refused:
                raise NotCompiled(program.refused[name])
        for name in ("f", "vjp") if gradient else ("f",):
            program.text(name)
    except NotCompiled as error:
        return str(error)
    return ""


def in_order(p: ODEProblem) -> ODEProblem | None:
    """The problem with its parameters as the compiled functions have them, without those that f does not use; None
    where the field of the sensitivities is not compiled."""
    if p.compile is False or not _explicit(p.method) or surroundings():
        return None
    try:
        program, source = program_of(p.f, p.y0, at_once=bool(p.compile))
        program.text("sensitivities")
    except NotCompiled:
        return None
    if "sensitivities" in program.refused:
        return None
    trained = [source.tensors[i] for i in program.trace.slots[: program.trace.trained]]
    known = agrees(p, trained) and {id(x) for x in trained} <= {id(x) for x in p.params}
    return like(p, params=tuple(trained)) if known else None


def _explicit(method: Method) -> bool:
    """Whether a solver asks for nothing but f."""
    return method.kind in ("adaptive", "fixed")


def _parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    sizes = [x.numel() for x in tensors]
    return [part.view(x.shape) for part, x in zip(flat[: sum(sizes)].split(sizes), tensors)]


unflatten: Callable[[Tensor, list[Tensor]], list[Tensor]] = torch._C._nn.unflatten_dense_tensors


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype, size: int = 0) -> Tensor:
    """Tensors one after the other, as numbers of one type; and zeros behind them, up to `size` numbers in all."""
    parts = [x.detach().reshape(-1).to("cpu", dtype) for x in tensors]
    rest = size - sum(x.numel() for x in parts)
    return torch.cat([*parts, torch.zeros(max(rest, 0), dtype=dtype)])

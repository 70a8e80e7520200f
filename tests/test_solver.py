"""`Solver`: one reading of what is said of how to solve, for every call."""

import ast
import copy
import dataclasses
import gc
import math
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from problems import GENERAL
from torch import nn

import pyjlode
from pyjlode import METHODS, Solver, errors, odeint, odeint_event, solve
from pyjlode import solver as room
from pyjlode.nn import CNF, NeuralODE

F64 = torch.float64
H0, T = torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([0.0, 0.3, 0.5], dtype=F64)
NATIVE = [name for name, row in METHODS.items() if row.kind not in ("scipy", "second")]
A = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64)


def decay(t, h):
    return -h * (1 + t)


def rms(h):
    return h.square().mean().sqrt()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(A.clone())

    def forward(self, t, h):
        return torch.tanh(h @ self.weight) * torch.cos(t)


# --- A solver gives what odeint gives --------------------------------------------------------------------------------


def answer(call):
    """The result of `call(f, h0, t)`, and its gradients, or the error."""
    f, h0, t = Net(), H0.clone().requires_grad_(), T.clone().requires_grad_()
    try:
        h = call(f, h0, t)
        return [h.detach(), *torch.autograd.grad(h.square().sum(), [h0, t, f.weight], allow_unused=True)]
    except (errors.PyJLODEError, RuntimeError) as error:
        return [f"{type(error).__name__}: {error}"]


def same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b)), (a, b)


GRADIENTS = [("rk4", name) for name in GENERAL] + [("rodas5p", name) for name in GENERAL]


@pytest.mark.parametrize(("method", "adjoint"), [*[(name, True) for name in NATIVE], ("tsit5", False), *GRADIENTS])
def test_every_method_and_gradient_is_that_of_odeint(method, adjoint):
    how = {"rtol": 1e-3, "atol": 1e-4, "adjoint": adjoint}
    if adjoint == "backsolve" and METHODS[method].controlled:
        with pytest.raises(errors.BadOption, match="backward in time"):
            Solver(method, **how)
        return
    solver = Solver(method, **how)
    wanted = answer(lambda f, h0, t: odeint(f, h0, t, method=method, **how))
    same(answer(solver), wanted)
    same(answer(lambda f, h0, t: solver.solve(f, h0, t, dense=False).h), wanted)  # from what it has kept


SETTINGS = {
    "defaults": {},
    "tolerance of each element": {"rtol": 1e-5, "atol": torch.tensor([1e-5, 1e-7], dtype=F64)},
    "tolerances in a list": {"rtol": [1e-3], "atol": [torch.tensor(1e-5)]},
    "steps": {"options": {"first_step": 0.01, "max_step": 0.1, "min_step": 1e-6, "max_num_steps": 1000}},
    "control": {"options": {"safety": 0.8, "ifactor": 5.0, "dfactor": 0.3}},
    "jumps": {"options": {"jump_t": [0.1], "step_t": torch.tensor([0.2, 0.4])}},
    "norm": {"options": {"norm": rms}},
    "grid": {"method": "rk4", "options": {"grid_constructor": lambda f, h0, t: torch.linspace(0, 0.5, 11, dtype=F64)}},
    "grid and adjoint": {"method": "rk4", "adjoint": "backsolve", "options": {"step_size": 0.05, "perturb": True}},
    "adjoint of its own": {
        "adjoint": "backsolve",
        "adjoint_rtol": 1e-5,
        "adjoint_atol": torch.tensor([1e-6, 1e-8], dtype=F64),
        "adjoint_method": "tsit5",
        "adjoint_options": {"norm": "seminorm", "max_step": 0.1},
    },
    "adjoint norm": {"adjoint": "backsolve", "adjoint_options": {"norm": lambda y: max(x.abs().max() for x in y)}},
    "stiff": {"method": "rodas5p", "adjoint": True, "options": {"max_step": 0.1}},
    "a batch": {"method": "bdf", "rtol": 1e-5, "atol": 1e-6, "options": {"batch_dims": 0, "max_order": 3}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_setting_is_that_of_odeint(case):
    how = {"rtol": 1e-4, "atol": 1e-6, **SETTINGS[case]}
    solver, wanted = Solver(**how), answer(lambda f, h0, t: odeint(f, h0, t, **how))
    assert isinstance(wanted[0], torch.Tensor)
    same(answer(solver), wanted)
    same(answer(solver), wanted)


STATES = {
    "a number": torch.tensor(1.0, dtype=F64),
    "float32": torch.tensor([1.0, 2.0]),
    "complex": torch.tensor([1.0, 2.0j]),
    "a matrix": torch.ones(2, 3, dtype=F64),
    "empty": torch.ones(0, 2, dtype=F64),
    "a tuple": (H0, torch.ones((), dtype=torch.float32)),
    "a dictionary": {"b": H0, "a": (H0[:1], [H0.float()])},
}


def slope(t, h):
    return torch.utils._pytree.tree_map(lambda x: -x, h)


def test_one_solver_for_states_of_every_kind():
    solver = Solver("tsit5")
    for _ in range(2):
        for h0 in STATES.values():
            found, wanted = solver(slope, h0, T), odeint(slope, h0, T, method="tsit5")
            assert torch.utils._pytree.tree_all(lambda x: x, torch.utils._pytree.tree_map(torch.equal, found, wanted))


def test_what_belongs_to_the_equation_is_given_to_the_call():
    event = {"event_fn": lambda t, h: h[0] - 0.5}
    solver = Solver("dopri5", adjoint=True)
    same(solver(decay, H0, T[:2], **event)[1], odeint(decay, H0, T[:2], adjoint=True, **event)[1])
    at, h = odeint_event(decay, H0, 0.0, odeint_interface=solver, **event)
    assert torch.equal(at, odeint_event(decay, H0, 0.0, **event)[0])
    assert float(h[-1, 0]) == pytest.approx(0.5, abs=1e-6)
    M = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    jac = {"mass_matrix": M, "jac": lambda t, h: -(1 + t) * torch.eye(2, dtype=F64)}
    stiff = Solver("rodas5p")
    assert torch.equal(stiff(decay, H0, T, **jac), odeint(decay, H0, T, method="rodas5p", **jac))
    net = Net()
    assert not Solver(adjoint=True)(net, H0, T, adjoint_params=()).requires_grad
    assert Solver(adjoint=True)(net, H0, T).requires_grad


def test_a_solution_has_dense_output():
    solution = Solver("vern7").solve(decay, H0, T)
    assert torch.equal(solution.interpolate(0.2), solve(decay, H0, T, method="vern7").interpolate(0.2))
    assert solution.stats.method == "vern7"
    with pytest.raises(errors.BadOption, match="dense=True"):
        Solver().solve(decay, H0, T, dense=False).interpolate(0.2)


def test_under_transforms_and_autocast():
    solver, times = Solver("bosh3", adjoint="backsolve", adjoint_rtol=1e-3), torch.stack([T, 2 * T])
    h0 = torch.stack([H0, 2 * H0])

    def loss(call):
        return lambda h, t: call(decay, h, t)[-1].square().sum()

    for transform in (lambda g: torch.func.vmap(torch.func.grad(g)), lambda g: torch.func.vmap(torch.func.jacrev(g))):
        wanted = transform(loss(lambda *x: odeint(*x, method="bosh3")))(h0, times)
        assert torch.equal(transform(loss(solver))(h0, times), wanted)
    net = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (call(lambda t, h: net(h), H0.float(), T) for call in (Solver("rk4"), rk4))
    assert torch.equal(found, wanted)
    with torch.inference_mode():
        made = Solver("tsit5", rtol=1e-3, atol=torch.tensor([1e-3, 1e-4], dtype=F64))
        made(decay, H0, T)
    h0 = H0.clone().requires_grad_()
    made(decay, h0, T).sum().backward()
    assert h0.grad is not None


@pytest.mark.filterwarnings("ignore")  # of Dynamo's own
def test_in_what_torch_compiles():
    solver, net = Solver("tsit5", adjoint=True), Net()

    def run(h0):
        made = Solver("tsit5", adjoint=True)
        return [call(net, 2 * h0, T) for call in (solver, made, tsit5)]

    for h in torch.compile(run, backend="eager")(H0):
        assert torch.equal(h, solver(net, 2 * H0, T))
        h.sum().backward()


def tsit5(f, h0, t):
    return odeint(f, h0, t, method="tsit5", adjoint=True)


def rk4(f, h0, t):
    return odeint(f, h0, t, method="rk4")


# --- One object ------------------------------------------------------------------------------------------------------


def test_it_cannot_be_changed():
    solver = Solver("tsit5", options={"first_step": 0.1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.rtol = 1.0
    with pytest.raises(TypeError):
        solver.options["first_step"] = 1.0
    other = dataclasses.replace(solver, rtol=1e-3)
    assert (other.rtol, other.method, dict(other.options)) == (1e-3, "tsit5", {"first_step": 0.1})
    assert solver.rtol is None


def test_what_it_was_given_may_be_changed():
    """It has read it by then."""
    atol, times, options = torch.tensor([1e-3, 1e-3], dtype=F64), [0.1], {"max_step": 0.1}
    options["step_t"] = times
    solver = Solver("dopri5", rtol=1e-3, atol=atol, options=options)
    wanted, key = solver(decay, H0, T), hash(solver)
    atol.fill_(1e-12)
    times.append(0.2)
    options["max_step"] = 1e-3
    assert torch.equal(solver(decay, H0, T), wanted)
    assert hash(solver) == key == hash(Solver("dopri5", rtol=1e-3, atol=atol * 0 + 1e-3, options=dict(solver.options)))


EQUAL = [
    ({}, {"method": "dopri5"}),
    ({"rtol": 1}, {"rtol": torch.tensor(1.0)}),
    ({"options": {}}, {"options": None}),
    ({"method": "fixed_adams"}, {"method": "implicit_adams"}),
    ({"options": {"step_t": [0.5], "first_step": 1}}, {"options": {"first_step": 1.0, "step_t": torch.tensor([0.5])}}),
    ({"atol": torch.tensor([1.0, 2.0])}, {"atol": torch.tensor([1.0, 2.0])}),
    ({"options": {"norm": rms}}, {"options": {"norm": rms}}),
    ({"method": pyjlode.julia_method("KenCarp47()")}, {"method": pyjlode.julia_method("KenCarp47()")}),
    ({"options": {"dtype": F64}}, {}),
]
OTHERS = [
    {},
    {"method": "tsit5"},
    {"method": pyjlode.julia_method("KenCarp47()")},
    {"rtol": 1e-3},
    {"atol": 1e-3},
    {"atol": torch.tensor([1e-3, 2e-3])},
    {"atol": torch.tensor([1e-3, 2e-3], dtype=F64)},
    {"adjoint": True},
    {"adjoint": "backsolve"},
    {"adjoint": "backsolve", "adjoint_rtol": 1e-3},
    {"adjoint": "backsolve", "adjoint_options": {}},
    {"engine": "torch"},
    {"compile": False},
    {"options": {"first_step": 1.0}},
    {"options": {"max_step": 1.0}},
    {"options": {"norm": rms}},
    {"options": {"norm": lambda h: rms(h)}},
    {"options": {"step_t": [0.1]}},
]


@pytest.mark.parametrize("pair", EQUAL, ids=range(len(EQUAL)))
def test_solvers_that_say_the_same_are_equal(pair):
    a, b = (Solver(**how) for how in pair)
    assert a == b
    assert hash(a) == hash(b)
    assert {a: 1}[b] == 1


def test_solvers_that_say_something_else_are_not():
    solvers = [Solver(**how) for how in OTHERS]
    assert len(set(solvers)) == len(solvers)
    assert Solver() != "dopri5"


@pytest.mark.parametrize("how", [how for how in OTHERS if "norm" not in how.get("options", {})], ids=str)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_work(how, copied):
    solver = Solver(**how)
    other = copied(solver)
    assert other == solver
    assert hash(other) == hash(solver)
    if "KenCarp47" not in repr(how):
        assert torch.equal(other(decay, H0, T), solver(decay, H0, T))


def test_a_solver_with_a_function_of_a_module_is_pickled():
    solver = Solver(options={"norm": rms})
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert copy.deepcopy(solver) == solver


def test_its_representation_is_the_call_that_makes_it():
    assert repr(Solver()) == "Solver()"
    solver = Solver("tsit5", rtol=1e-6, adjoint=True, options={"step_t": [0.5]})
    assert repr(solver) == "Solver('tsit5', rtol=1e-06, adjoint=True, options={'step_t': (0.5,)})"
    assert eval(repr(solver)) == solver


# --- Errors and warnings ---------------------------------------------------------------------------------------------

WRONG = {
    "method": (errors.UnknownMethod, {"method": "dorpi5"}),
    "method of a class": (errors.BadOption, {"method": dict}),
    "rtol": (errors.BadTolerance, {"rtol": -1.0}),
    "atol": (errors.BadTolerance, {"atol": math.nan}),
    "atol is a word": (errors.BadTolerance, {"atol": "1e-3"}),
    "both zero": (errors.BadTolerance, {"rtol": 0, "atol": 0.0}),
    "adjoint": (errors.BadOption, {"adjoint": "guass"}),
    "adjoint is a number": (errors.BadOption, {"adjoint": 1}),
    "backsolve of a stiff method": (errors.BadOption, {"method": "rodas5p", "adjoint": "backsolve"}),
    "engine": (errors.BadOption, {"engine": "fortran"}),
    "compile": (errors.BadOption, {"compile": "yes"}),
    "options": (errors.BadOption, {"options": "step_size"}),
    "option": (errors.BadOption, {"options": {"frist_step": 1.0}}),
    "value of an option": (errors.BadOption, {"options": {"first_step": -1.0}}),
    "norm": (errors.BadOption, {"options": {"norm": 3}}),
    "adjoint_options": (errors.BadOption, {"adjoint": "backsolve", "adjoint_options": {"norm": "max"}}),
    "adjoint_options are a word": (errors.BadOption, {"adjoint": "backsolve", "adjoint_options": "norm"}),
    "adjoint_method": (errors.UnknownMethod, {"adjoint": "backsolve", "adjoint_method": "rk5"}),
    "adjoint_method and options": (
        errors.BadOption,
        {"adjoint": "backsolve", "adjoint_method": "tsit5", "options": {"first_step": 1.0}},
    ),
    "no backward solve": (errors.BadOption, {"adjoint_rtol": 1e-3}),
    "none either": (errors.BadOption, {"adjoint": "discrete", "adjoint_options": {}}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_where_it_is_written(case):
    """And as odeint says it."""
    kind, how = WRONG[case]
    with pytest.raises(kind) as caught:
        Solver(**how)
    with pytest.raises(kind) as told:
        odeint(decay, H0, T, **how)
    assert str(caught.value) == str(told.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"atol": torch.ones(3)}, "does not broadcast"),
        ({"atol": [1.0, 2.0]}, "2 parts"),
        ({"atol": torch.tensor([1.0, -1.0])}, "not negative in every element"),
        ({"rtol": torch.zeros(2), "atol": 0.0}, "both zero"),
        ({"method": "bdf", "options": {"batch_dims": 1}}, "batch_dims"),
    ],
)
def test_what_is_wrong_for_a_state_is_said_before_f_is_called(how, words):
    solver = Solver(**how)
    for _ in range(2):
        with pytest.raises((errors.BadTolerance, errors.BadOption), match=words):
            solver(lambda t, h: pytest.fail("called"), H0, T)


def test_unknown_arguments_are_explained():
    with pytest.raises(TypeError, match=r"Solver\(\).*'rtol'"):
        Solver("tsit5", rtoll=1e-3)
    with pytest.raises(TypeError, match="step_size="):
        Solver(dt=0.1)
    with pytest.raises(TypeError, match=r"solve\(\).*'rtol'"):
        solve(decay, H0, T, rtoll=1e-3)
    with pytest.raises(TypeError, match="rtol"):
        Solver()(decay, H0, T, rtol=1e-3)


def test_a_warning_points_at_the_line_that_says_it():
    made = [
        lambda: Solver("rk4", options={"safety": 0.5}),
        lambda: dataclasses.replace(Solver("rk4"), options={"safety": 0.5}),
        lambda: odeint(decay, H0, T, method="rk4", options={"safety": 0.5}),
        lambda: odeint(decay, H0, T, method="rk4", options={"safety": 0.5}),  # and again, where it is kept
    ]
    for make in made:
        with pytest.warns(UserWarning, match="rk4 makes no use") as told:
            make()
        assert [x.filename for x in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver = Solver("rk4", options={"safety": 0.5})
    solver(decay, H0, T)  # it was told once
    pickle.loads(pickle.dumps(solver))


# --- Rooms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odeint", "solver", "arguments", "first", "problem", "solution", "transforms"])
def test_only_the_choice_of_engine_knows_the_engines(name):
    tree = ast.parse((Path(room.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    modules = [x.module or "" for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)]
    names = [y.name for x in ast.walk(tree) if isinstance(x, ast.ImportFrom) for y in x.names]
    assert not {"native", "bridge"} & {x.partition(".")[0] for x in [*modules, *names]}


# --- What is kept ----------------------------------------------------------------------------------------------------


def test_calls_that_say_the_same_have_one_solver():
    room._kept.clear()
    for _ in range(3):
        odeint(decay, H0, T, rtol=1e-3, options={"step_t": [0.1], "first_step": 0.1})
        odeint(decay, H0, T, rtol=1e-3, atol=torch.tensor([1e-3, 1e-4], dtype=F64))
    assert len(room._kept) == 2
    # What is equal to Python, and another thing here.
    for how in ({"adjoint": True}, {"options": {"progress": True}}, {"method": "bdf", "options": {"batch_dims": 1}}):
        given = how.get("options", how)
        (name,) = given
        room.kept({"method": "bdf", **how})
        other = {"method": "bdf", **({"options": {name: float(given[name])}} if "options" in how else {name: 1})}
        with pytest.raises(errors.BadOption):
            odeint(decay, H0[None], T, **other)


def test_solvers_and_readings_are_kept_in_number():
    for i in range(2 * room._SOLVERS):
        room.kept({"rtol": 1e-3 + 1e-6 * i})
    assert len(room._kept) <= room._SOLVERS
    solver = Solver("euler")
    for n in range(1, 3 * room._STATES):
        solver(decay, torch.ones(n), T)
    assert len(solver._readings) <= room._STATES


@pytest.mark.parametrize("adjoint", [False, "backsolve"])
def test_nothing_of_the_users_is_kept_alive(adjoint):
    def run():
        net, h0, atol = Net(), H0.clone().requires_grad_(), torch.full((2,), 1e-5, dtype=F64)

        def norm(h):
            return rms(h @ net.weight.detach())

        def grid(f, h, t):
            return t

        h = odeint(net, h0, T, adjoint=adjoint, atol=atol)
        h = h + odeint(net, h0, T, adjoint=adjoint, rtol=1e-4, options={"norm": norm, "step_t": h.detach()[1:2, 0]})
        h = h + odeint(net, h0, T, adjoint=adjoint, method="rk4", options={"grid_constructor": grid})
        h.sum().backward()
        return [weakref.ref(x) for x in (net, h0, atol, norm, grid, h)]

    gone = run()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 6


def test_a_solver_keeps_no_state_and_no_function():
    solver = Solver("tsit5", rtol=1e-3, adjoint="backsolve")

    def run():
        net, h0 = Net(), H0.clone().requires_grad_()
        solver(net, h0, T).sum().backward()
        return [weakref.ref(x) for x in (net, h0)]

    gone = run()
    gc.collect()
    assert [ref() for ref in gone] == [None] * 2


# --- Layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [lambda **how: NeuralODE(Net(), **how), lambda **how: CNF(Net(), 2, **how)])
def test_a_layer_says_what_is_wrong_where_it_is_written(layer):
    with pytest.raises(errors.UnknownMethod, match="dopri5"):
        layer(method="dorpi5")
    with pytest.raises(errors.BadOption, match="first_step"):
        layer(options={"frist_step": 0.1})
    with pytest.raises(TypeError, match="rtoll"):
        layer(rtoll=1e-3)

"""What a type checker and a person at a prompt see: names, types, what is shown, and the short ways to say a thing."""

import inspect
import os
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import pyjlode
from pyjlode import arguments, errors, hints, odeint, odeint_event, solve
from pyjlode.engines import choice
from pyjlode.methods import ALIASES
from pyjlode.nn import NeuralODE
from pyjlode.solver import Solver

ROOT = Path(__file__).parents[1]
F64 = torch.float64
H0, T = torch.tensor([1.0, 2.0], dtype=F64), torch.linspace(0, 1, 5, dtype=F64)


def decay(t, h):
    return -h


# --- Types say what the tables say -----------------------------------------------------------------------------------


def test_names_are_those_of_the_tables():
    assert set(typing.get_args(hints.MethodName)) == {*pyjlode.METHODS, *ALIASES}
    assert set(typing.get_args(hints.GradientName)) == set(pyjlode.GRADIENTS)
    assert set(typing.get_args(hints.EngineName)) == {*choice.ENGINES, *choice.ALIASES}


def test_options_are_those_that_are_read():
    assert set(hints.Options.__annotations__) == arguments.OPTIONS
    assert set(hints.KeywordOptions.__annotations__) == arguments.KEYWORDS


def test_keywords_are_those_of_the_calls():
    said = set(hints.Said.__annotations__) - arguments.KEYWORDS
    assert said | {"f", "h0", "t", "event_fn"} == set(inspect.signature(odeint).parameters)
    how = set(hints.How.__annotations__) - arguments.KEYWORDS
    assert how == {name for name, x in Solver.__dataclass_fields__.items() if x.init}
    assert set(hints.What.__annotations__) <= set(inspect.signature(Solver.solve).parameters)


USER = """
import torch
from torch import Tensor
import pyjlode
from pyjlode import METHODS, Solver, odeint, odeint_event, solve
from pyjlode.nn import NeuralODE, TimeMLP

h0, t = torch.ones(2), torch.linspace(0, 1, 5)


def f(t: Tensor, h: Tensor) -> Tensor:
    return -h


h: Tensor = odeint(f, h0, t, method="tsit5", adjoint=True, max_step=0.1)
pair: tuple[Tensor, Tensor] = odeint(lambda t, y: (y[1], -y[0]), (h0, h0), t, engine="native", progress=True)
event_t, hs = odeint(f, h0, t[:2], event_fn=lambda t, h: h.sum() - 1, args=())
(event_t * hs).sum()
solution = solve(f, h0, t, options={"batch_dims": 0})
x: Tensor = solution.interpolate(0.5) + solution.h[0]
y: Tensor = Solver("rk4", step_size=0.1, adjoint="discrete")(f, h0, t)
z: Tensor = pyjlode.odeint_adjoint(f, h0, t, adjoint_options={"norm": "seminorm"})
when, (start, end) = pyjlode.odeint_event(f, (h0, h0), 0.0, event_fn=lambda t, h: h[0].sum() - 1)
between: Tensor = pyjlode.odeint_dense(f, h0, 0.0, 1.0)(0.5) + start + end + when
named = odeint(f, h0, t, method=METHODS["bosh3"])
layer: Tensor = NeuralODE(TimeMLP([2, 8, 2]), method="rk4")(h0)
pyjlode.plot.figure(2, 2)
"""
WRONG = [
    'odeint(f, h0, t, method="dorpi5")',
    'odeint(f, h0, t, adjoint="discreet")',
    'odeint(f, h0, t, engine="fortran")',
    "odeint(f, h0, t, max_stepp=0.1)",
    "word: str = odeint(f, h0, t)",
    'Solver("rk4", step_size="small")',
]


def strict(program, folder):
    file = folder / "user.py"
    file.write_text(program)
    call = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(file)]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(call, capture_output=True, text=True, cwd=folder, env=env)


@pytest.mark.slow
def test_a_program_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy")
    done = strict(USER, tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_mypy_finds_what_is_wrong(tmp_path):
    pytest.importorskip("mypy")
    done = strict(USER + "\n".join(WRONG) + "\n", tmp_path)
    first = USER.count("\n") + 1
    for i, code in enumerate(WRONG):
        assert f"user.py:{first + i}: error" in done.stdout, code


def test_the_package_says_that_it_is_typed():
    assert (Path(pyjlode.__file__).parent / "py.typed").exists()


# --- Short ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "option"),
    [("rk4", {"step_size": 0.05}), ("dopri5", {"max_step": 0.02}), ("tsit5", {"first_step": 1e-3})],
)
def test_an_option_may_be_a_keyword(method, option):
    right = odeint(decay, H0, T, method=method, options=option)
    assert not torch.equal(
        right, odeint(decay, H0, T, method=method, **({"step_size": 0.25} if method == "rk4" else {}))
    )
    for found in (
        odeint(decay, H0, T, method=method, **option),
        odeint(func=decay, y0=H0, t=T, method=method, **option),
        solve(decay, H0, T, method=method, **option).h,
        Solver(method, **option)(decay, H0, T),
        pyjlode.odeint_adjoint(decay, H0, T, method=method, **option),
        NeuralODE(decay, T, method=method, return_trajectory=True, **option)(H0),
    ):
        assert torch.equal(found, right)
    assert Solver(method, **option) == Solver(method, options=option)
    with pytest.raises(TypeError, match="twice"):
        odeint(decay, H0, T, method=method, options=option, **option)


def test_keywords_that_are_no_options_are_still_explained():
    with pytest.raises(TypeError, match="step_size="):
        odeint(decay, H0, T, dt=0.1)
    with pytest.raises(TypeError, match="method="):
        odeint(decay, H0, T, solver="Tsit5")
    with pytest.raises(TypeError, match="max_step"):
        odeint(decay, H0, T, max_stepp=0.1)


def test_a_batch_of_events_by_keyword():
    event_t, _ = odeint_event(decay, H0[:, None], 0.0, event_fn=lambda t, h: h - 0.5, batch_dims=1)
    assert torch.allclose(event_t, (H0 / 0.5).log(), rtol=1e-6)


def test_progress_is_a_keyword(capsys):
    right = odeint(decay, H0, T)
    assert torch.equal(odeint(decay, H0, T, progress=True), right)
    assert "dopri5" in capsys.readouterr().err


def test_args_are_what_f_takes_after_t_and_h():
    k, c = torch.tensor(0.5, dtype=F64, requires_grad=True), 0.25

    def f(t, h, k, c):
        return -k * h + c

    def closed(t, h):
        return -k * h + c

    for adjoint in (False, True, "backsolve", "gauss"):
        right = odeint(closed, H0, T, adjoint=adjoint)
        found = odeint(f, H0, T, args=(k, c), adjoint=adjoint)
        assert torch.equal(found, right)
        expected = torch.autograd.grad(right.sum(), k)
        assert torch.equal(torch.autograd.grad(found.sum(), k)[0], expected[0])
        assert torch.equal(solve(f, H0, T, args=[k, c], adjoint=adjoint).h, right)
        solver = Solver(adjoint=adjoint)
        assert torch.equal(solver(f, H0, T, args=(k, c)), right)
        assert torch.equal(solver.solve(f, H0, T, args=(k, c)).h, right)
    dense = pyjlode.odeint_dense(f, H0, 0.0, 1.0, args=(k, c))
    assert torch.allclose(dense(1.0), odeint(closed, H0, T)[-1], rtol=1e-6)


def test_args_go_to_events_and_jacobians_too():
    k = torch.tensor(0.5, dtype=F64)
    event_t, _ = odeint_event(
        lambda t, h, k, level: -k * h, H0, 0.0, event_fn=lambda t, h, k, level: h[0] - level, args=(k, 0.5)
    )
    assert torch.allclose(event_t, torch.tensor(0.5, dtype=F64).log() / -k, rtol=1e-6)
    seen = []

    def jac(t, h, k):
        seen.append(k)
        return -k * torch.eye(2, dtype=F64)

    h = odeint(lambda t, h, k: -k * h, H0, T, method="rodas5p", jac=jac, args=(k,))
    assert torch.allclose(h[-1], H0 * torch.exp(-k), rtol=1e-5)
    assert all(x is k for x in seen)
    assert seen


def test_numbers_among_args_compile_nothing_anew(julia):
    k = torch.tensor(0.5, dtype=F64)
    for i in range(12):
        solution = solve(lambda t, h, k, c: c - k * h, H0, [0.0, 1.0], args=(k, 0.1 * i), engine="julia")
        assert bool(solution.stats.compiled) == (i > 0), solution.stats.not_compiled
        exact = 0.2 * i + (H0 - 0.2 * i) * torch.exp(-k)
        assert torch.allclose(solution.h[-1], exact, rtol=1e-6)


def test_callbacks_are_heard_with_args():
    heard = []

    def f(t, h, k):
        return -k * h

    f.callback_step = lambda t, h, dt: heard.append(float(t))
    odeint(f, H0, T, args=(1.0,))
    assert heard


def test_args_must_be_a_tuple():
    with pytest.raises(errors.BadOption, match="tuple"):
        odeint(lambda t, h, k: -k * h, H0, T, args=torch.tensor(1.0))


def test_native_is_another_word_for_torch(monkeypatch):
    assert Solver(engine="native") == Solver(engine="torch")
    solution = solve(decay, H0, T, engine="native")
    assert solution.stats.engine == "torch"
    monkeypatch.setenv("PYJLODE_ENGINE", "native")
    assert solve(decay, H0, T).stats.engine == "torch"
    with pytest.raises(errors.BadOption, match="native"):
        Solver(engine="fortran")


# --- What is shown ----------------------------------------------------------------------------------------------------


def test_modules_are_reached_without_an_import():
    code = "import pyjlode, sys; print('pyjlode.nn' in sys.modules); pyjlode.nn.NeuralODE; pyjlode.plot.figure"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert {"nn", "plot"} <= set(dir(pyjlode))
    with pytest.raises(AttributeError, match="no attribute 'nm'"):
        pyjlode.nm  # noqa: B018


def test_what_is_shown_is_short():
    solution = solve(lambda t, h: (-h[0], -h[1]), (H0, H0[:1].float()), T)
    text = repr(solution)
    assert len(text) < 200
    for part in ("(5, 2) float64", "(5, 1) float32", "t=0 ... 1", "dopri5 on torch", f"{solution.stats.nfe} calls"):
        assert part in text
    table = repr(pyjlode.METHODS)
    assert len(table.splitlines()) == len(pyjlode.METHODS) + 1
    assert max(map(len, table.splitlines())) < 120
    assert all(name in table for name in pyjlode.METHODS)
    assert len(repr(pyjlode.METHODS["dopri5"])) < 150


def test_a_notebook_shows_a_picture():
    pytest.importorskip("matplotlib")
    shown = solve(decay, H0, T)._repr_html_()
    assert shown.startswith("<svg")
    assert "dopri5 on torch" in shown
    many = solve(decay, torch.ones(50, dtype=F64), T)._repr_html_()
    assert many.startswith("<pre>")
    again = pickle.loads(pickle.dumps(solve(decay, H0, T)))
    assert again._repr_html_().startswith("<svg")


# --- Solutions as values ----------------------------------------------------------------------------------------------


def test_solutions_are_compared_by_their_numbers():
    a, b = solve(decay, H0, T), solve(decay, H0, T, dense=False)
    assert a == b
    assert a.stats != solve(decay, H0, T, rtol=1e-3).stats
    assert a != solve(decay, H0, T, rtol=1e-3)
    assert a != solve(decay, H0.float(), T)
    assert a != solve(lambda t, h: (-h[0],), (H0,), T)
    assert a != a.h.tolist()
    assert a == pickle.loads(pickle.dumps(a))
    with pytest.raises(TypeError):
        hash(a)


def test_solutions_with_events_are_compared_by_these_too():
    def solved(level):
        return solve(decay, H0, T, events=[pyjlode.Event(lambda t, h: h[0] - level, affect=lambda t, h: h / 2)])

    assert solved(0.5) == solved(0.5)
    assert solved(0.5) == pickle.loads(pickle.dumps(solved(0.5)))
    assert solved(0.5) != solved(0.75)


def test_a_system_that_failed_is_equal_to_itself():
    def f(t, h):
        return torch.where(h > 1.5, h**3, -h)

    a, b = (solve(f, H0[:, None], T * 2, options={"batch_dims": 1, "on_failure": "nan"}) for _ in range(2))
    assert bool(a.h.isnan().any())
    assert a == b
    assert a.stats.systems == b.stats.systems

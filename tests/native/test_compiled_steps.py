"""Compiled steps give what PyTorch's own operations give, and so do their products.

What is made of a graph is the compiler's business, and takes it seconds. So most of these tests run the graphs as they
are, operation by operation; those that say `the_compiler` have them compiled.
"""

import gc
import shutil
import warnings
import weakref

import pytest
import torch
from torch import nn

import pyjlode
from pyjlode import METHODS, Solver, odeint, solve
from pyjlode.errors import BadOption, GradientUnavailable, NotCompiled
from pyjlode.native import compiled

F64 = torch.float64
EXPLICIT = [name for name, row in METHODS.items() if row.kind in ("adaptive", "fixed")]
TIMES = torch.tensor([0.0, 0.3, 0.55, 1.0], dtype=F64)
HOW = {"engine": "torch", "rtol": 1e-4, "atol": 1e-6}

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture
def graphs(monkeypatch):
    """Graphs run as they are; gives how many were made."""
    made = []

    def keep(module, inputs, options=None):
        made.append(module)
        return module

    monkeypatch.setattr(torch._inductor, "compile", keep)
    return made


@pytest.fixture
def the_compiler(monkeypatch):
    """Gives how many graphs were compiled."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler for PyTorch's")
    made, own = [], torch._inductor.compile

    def count(module, *args, **kwargs):
        made.append(module)
        return own(module, *args, **kwargs)

    monkeypatch.setattr(torch._inductor, "compile", count)
    return made


class Net(nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)

    def forward(self, t, h):
        return self.net(torch.cat([h, torch.sin(3 * t).expand(*h.shape[:-1], 1)], -1))


class Small(nn.Module):
    """A few operations: a step of many stages is a long graph."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([1.1, 0.4], dtype=F64))

    def forward(self, t, h):
        return torch.sin(t + self.rate * h.flip(0))


def answer(f, *, h0=None, t=TIMES, moving=True, **kwargs):
    """States, and the gradient of a loss of all of them by h0, t and the parameters."""
    h0 = torch.tensor([0.8, -0.5], dtype=F64) if h0 is None else h0
    h0, t = h0.clone().requires_grad_(), t.clone().requires_grad_(moving)
    h = odeint(f, h0, t, **{**HOW, **kwargs})
    loss = (h * torch.linspace(1, 2, h.numel(), dtype=h.dtype).view_as(h)).sum()
    wanted = [h0, *f.parameters(), *([t] if moving else [])]
    return [h.detach(), *torch.autograd.grad(loss, wanted)]


def same(a, b, rtol=1e-11):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


# ----------------------------------------------------------------------------------------------------------------------
# The law: the same numbers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EXPLICIT)
def test_every_method(method, graphs):
    f = Small()
    t = TIMES[[0, -1]] if method in ("vern7", "vern9") else TIMES  # outputs within these steps double the stages
    kwargs = {"method": method, "rtol": 1e-4, "atol": 1e-6, "adjoint": True, "t": t}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs))
    assert graphs


@pytest.mark.parametrize("adjoint", [False, "discrete"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_way_to_the_gradient_of_the_steps(adjoint, backward, graphs):
    f, t = Net(), TIMES.flip(0) if backward else TIMES
    kwargs = {"method": "bosh3", "adjoint": adjoint, "t": t}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs))


OPTIONS = [
    ("bosh3", {"first_step": 0.02, "max_step": 0.1}),
    ("bosh3", {"step_t": [0.1, 0.4]}),
    ("bosh3", {"jump_t": [0.25, 0.6]}),
    ("bosh3", {"norm": lambda h: h.abs().max()}),
    ("rk4", {"step_size": 0.13}),
    ("rk4", {"step_size": 0.13, "interp": "cubic"}),
    ("rk4", {"perturb": True}),
    ("midpoint", {"grid_constructor": lambda f, h, t: torch.linspace(0, 1, 9, dtype=F64)}),
]


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_every_option(method, options, graphs):
    f, moving = Small(), "grid_constructor" not in options
    kwargs = {"method": method, "options": options, "adjoint": True, "moving": moving}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs))


def test_the_last_state_alone(graphs):
    f, t = Net(), TIMES[[0, -1]]
    kwargs = {"method": "bosh3", "adjoint": True, "t": t, "moving": False}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs))


def test_batches_in_single_precision(graphs):
    f, h0 = Net(torch.float32), torch.randn(5, 2)
    kwargs = {"method": "bosh3", "rtol": 1e-4, "atol": 1e-5, "h0": h0, "adjoint": True, "t": TIMES.float()}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs), 1e-4)


def test_tolerances_of_each_element_and_states_of_several_tensors(graphs):
    W = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def f(t, h):
        return {"x": h["v"], "v": -W * torch.sin(h["x"]) * torch.cos(t)}

    h0 = {"x": torch.tensor([0.5, 1.0], dtype=F64), "v": torch.zeros(2, dtype=F64)}
    rtol = {"x": torch.tensor([1e-4, 1e-6], dtype=F64), "v": torch.tensor(1e-3, dtype=F64)}
    results = []
    for compile in (True, None):
        h = odeint(f, h0, TIMES, method="bosh3", engine="torch", rtol=rtol, adjoint=True, compile=compile)
        results.append([h["x"].detach(), h["v"].detach(), torch.autograd.grad(h["x"].square().sum(), W)[0]])
    same(*results)


def test_events(graphs):
    f = Net()

    def event(h0, compile):
        t, h = pyjlode.odeint_event(
            f, h0, torch.tensor(0.0, dtype=F64), event_fn=lambda t, h: h[0] - 0.6, method="bosh3", adjoint=True,
            compile=compile, **HOW,
        )  # fmt: skip
        return [t.detach(), h.detach(), *torch.autograd.grad(t + h.square().sum(), [h0, *f.parameters()])]

    h0 = torch.tensor([0.8, -0.5], dtype=F64, requires_grad=True)
    found = event(h0, True)
    assert 0.0 < float(found[0]) < 100.0
    same(found, event(h0, None), 1e-9)


@pytest.mark.parametrize("method", ["bosh3", "vern7", "rk4"])
def test_dense_output_and_callbacks(method, graphs):
    class Watched(Small):
        def callback_step(self, t, h, dt):
            self.seen.append((float(t), h.tolist(), float(dt)))

    f, at = Watched(), torch.linspace(0, 1, 33, dtype=F64)
    h0, options, results = torch.tensor([0.8, -0.5], dtype=F64), {"step_size": 0.1} if method == "rk4" else {}, []
    with torch.no_grad():
        for compile in (True, None):
            f.seen = []
            solution = solve(f, h0, TIMES[[0, -1]], method=method, compile=compile, options=options, **HOW)
            seen = torch.tensor([[t, *h, dt] for t, h, dt in f.seen], dtype=F64)
            results.append([solution.h, solution.interpolate(at), seen, torch.tensor(solution.steps.accepted)])
    same(*results, 1e-6)  # the size of a step is a root of its error, which is a difference


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolating", "quadrature", "gauss"])
def test_adjoints_with_a_backward_solve_of_their_own(adjoint, graphs):
    f, kwargs = Net(), {"method": "bosh3", "adjoint": adjoint, "moving": False}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs), 1e-9)
    h0 = torch.tensor([0.8, -0.5], dtype=F64, requires_grad=True)
    stats = solve(f, h0, TIMES, adjoint=adjoint, compile=True, method="bosh3", **HOW).stats
    assert stats.compiled == "steps"
    assert adjoint in stats.not_compiled


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, graphs):
    f = Net()
    h0 = torch.tensor([0.8, -0.5], dtype=F64)
    with context():
        a, b = (odeint(f, h0, TIMES, method="bosh3", compile=compile, **HOW) for compile in (True, None))
    same([a.clone()], [b.clone()])
    same(answer(f, method="bosh3", compile=True), answer(f, method="bosh3"))  # what was made there serves gradients too


def test_states_that_do_not_lie_in_one_piece(the_compiler):
    """What is compiled for one layout in memory would read another one wrong."""
    h0 = torch.tensor([0.8, 9.0, -0.5, 9.0], dtype=F64)
    wide, gaps = torch.tensor(0.7, dtype=F64).expand(2), torch.tensor([0.3, 9.0, 0.6, 9.0], dtype=F64)[::2]
    f, how = lambda t, h: torch.sin(wide * h.flip(0) + t * gaps), {"method": "midpoint", **HOW}
    for h in (h0[::2].clone(), h0[::2], h0[::2].clone()):
        same([odeint(f, h, TIMES, compile=True, **how)], [odeint(f, h, TIMES, **how)])
    assert len(the_compiler) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What f holds
# ----------------------------------------------------------------------------------------------------------------------


def test_what_f_holds_may_change_and_nothing_is_made_anew(graphs):
    class Field(Small):
        scale = 1.0

        def forward(self, t, h):
            return self.scale * super().forward(t, h)

    f, counts = Field(), []
    kwargs = {"method": "adaptive_heun", "adjoint": True, "moving": False, "rtol": 1e-3}
    for i in range(4):
        same(answer(f, compile=True, **kwargs), answer(f, **kwargs))
        counts.append(len(graphs))
        with torch.no_grad():
            for x in f.parameters():
                x.mul_(0.9)
        f.scale = 0.5 + 0.1 * i  # a number of Python's becomes an input when it is another one
    assert counts[2] == counts[-1], counts
    # Another wrapper, another module of the same kind, other tolerances.
    other = Field()
    same(answer(other, compile=True, **{**kwargs, "rtol": 1e-4}), answer(other, **{**kwargs, "rtol": 1e-4}))
    assert len(graphs) == counts[-1]


def test_training_and_evaluation_are_told_apart(graphs):
    class Field(Small):
        def forward(self, t, h):
            return super().forward(t, h) * (2.0 if self.training else 1.0)

    f = Field()
    for mode in (True, False, True):
        f.train(mode)
        same(answer(f, compile=True, method="midpoint"), answer(f, method="midpoint"))


def test_counters_hear_of_every_call(graphs):
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.nfe = 0
            self.register_buffer("evaluations", torch.tensor(0.0))

        def forward(self, t, h):
            self.nfe += 1
            self.evaluations += 1
            return super().forward(t, h)

    f = Counts()
    answer(f, compile=True, method="bosh3", adjoint=True)  # a first solve is compared
    for compile in (True, None):
        f.nfe, before = 0, float(f.evaluations)
        h0 = torch.tensor([0.8, -0.5], dtype=F64, requires_grad=True)
        solution = solve(f, h0, TIMES, method="bosh3", adjoint=True, compile=compile, dense=False, **HOW)
        solution.h.sum().backward()
        looks = f.nfe - solution.stats.nfe - solution.stats.nfe_backward
        assert looks == 0
        assert float(f.evaluations) - before == f.nfe


def test_nothing_keeps_a_model_alive(graphs):
    f = Net()
    ref = weakref.ref(f.net[0].weight)
    answer(f, compile=True, method="bosh3", adjoint=True)
    del f
    gc.collect()
    assert ref() is None


def test_a_constant_that_is_written_to_before_the_backward_pass(graphs):
    W, c = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.tensor([1.0, 2.0], dtype=F64)
    h = odeint(
        lambda t, h: -W * c * h, torch.ones(2, dtype=F64), TIMES, method="euler", adjoint=True, compile=True, **HOW
    )
    c.mul_(2)
    with pytest.raises(GradientUnavailable, match="changed in between"):
        h.sum().backward()


def test_tensors_that_lie_hidden_are_found(graphs):
    W = torch.tensor(0.7, dtype=F64, requires_grad=True)
    ref = weakref.ref(W)
    results = []
    for compile in (True, None):
        h = odeint(lambda t, h: -ref() * h, torch.ones(2, dtype=F64), TIMES, method="bosh3", compile=compile, **HOW)
        results.append(list(torch.autograd.grad(h.sum(), W)))
    same(*results)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------

H0 = torch.tensor([0.8, -0.5], dtype=F64)


def dropout():
    net = nn.Sequential(nn.Linear(2, 8, dtype=F64), nn.Dropout(0.5), nn.Linear(8, 2, dtype=F64))
    return lambda t, h: net(h)


def batch_norm():
    net = nn.Sequential(nn.Linear(2, 3, dtype=F64), nn.BatchNorm1d(3, dtype=F64), nn.Linear(3, 2, dtype=F64))
    return lambda t, h: net(h)


REFUSED = {
    "random": (lambda: (dropout(), H0, {}), "random"),
    "a branch on a value": (lambda: (lambda t, h: -h if t > 0.5 else h, H0, {}), "Python number or a branch"),
    "kept results": (lambda: (Keeps(), H0, {}), "changes what it holds"),
    "statistics of a batch": (lambda: (batch_norm(), torch.ones(2, 2, dtype=F64), {}), "writes into"),
    "another method": (lambda: (lambda t, h: -h, H0, {"method": "rodas5p"}), "not an explicit"),
    "a multistep method": (lambda: (lambda t, h: -h, H0, {"method": "explicit_adams"}), "not an explicit"),
    "sensitivities": (lambda: (Net(), H0, {"adjoint": "forward"}), "another system"),
    "an empty state": (lambda: (lambda t, h: -h, H0[:0], {}), "empty"),
    "progress": (lambda: (lambda t, h: -h, H0, {"options": {"progress": True}}), "solved within another"),
}


class Keeps(nn.Module):
    def forward(self, t, h):
        self.last = -h
        return self.last


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_says_so(case):
    make, words = REFUSED[case]
    f, h0, how = make()
    with pytest.raises(NotCompiled, match=words) as caught:
        odeint(f, h0, TIMES, compile=True, **{**HOW, **how})
    assert "compile=True on the native engine" in str(caught.value)
    if case not in ("random", "progress"):
        odeint(f, h0, TIMES, **{**HOW, **how})


def test_transforms_are_refused():
    f = Net()
    with pytest.raises(NotCompiled, match=r"torch\.func"):
        torch.func.jacrev(lambda h0: odeint(f, h0, TIMES, compile=True, **HOW))(H0)


def test_second_derivatives_are_refused(graphs):
    h0 = H0.clone().requires_grad_()
    h = odeint(Net(), h0, TIMES, method="bosh3", compile=True, **HOW)
    with pytest.raises(GradientUnavailable, match="without compile=True"):
        torch.autograd.grad(h.sum(), h0, create_graph=True)


def test_a_machine_without_a_compiler_says_so():
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.raises(NotCompiled, match=r"needs a C\+\+ compiler"),
    ):
        odeint(lambda t, h: -h * torch.cos(7 * t), H0, TIMES, method="heun2", compile=True, **HOW)


def test_compile_is_off_by_default(graphs):
    solution = solve(Net(), H0, TIMES, method="bosh3", **HOW)
    assert not graphs
    assert solution.stats.compiled == ""
    with pytest.raises(BadOption):
        odeint(Net(), H0, TIMES, compile="yes", **HOW)


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's compiler
# ----------------------------------------------------------------------------------------------------------------------


def test_the_compiler_makes_the_same_numbers_once(the_compiler):
    """A training loop by `odeint`, and then a solver that says the same: all is compiled in the first step."""

    class Field(Net):  # code of its own: no other test has compiled it
        def forward(self, t, h):
            return super().forward(t, h) * (1 - 0.1 * h)

    f, twin = Field(), Field()
    twin.load_state_dict(f.state_dict())
    how = {"method": "bosh3", "adjoint": True, **HOW}
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for net, compile in ((f, True), (twin, None)):
                loss = odeint(net, H0, TIMES, compile=compile, **how)[1:].square().sum()
                grads = torch.autograd.grad(loss, list(net.parameters()))
                with torch.no_grad():
                    for x, g in zip(net.parameters(), grads):
                        x -= 0.1 * g
            counts.append(len(the_compiler))
            same(*([x.detach() for x in net.parameters()] for net in (f, twin)))
    solver = Solver(compile=True, **how)
    same([solver(f, H0, TIMES).detach()], [odeint(twin, H0, TIMES, **how).detach()])
    assert counts == [2, 2, 2]
    assert len(the_compiler) == 2


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def replayed(monkeypatch, graphs):
    """CUDA graphs without a GPU: what is replayed reads and writes the same memory each time."""
    recorded = []

    def record(run, inputs):
        outputs = [x.clone() for x in run(*inputs)]

        def replay():
            with torch.no_grad():
                for out, x in zip(outputs, run(*inputs)):
                    out.copy_(x)

        recorded.append(outputs)
        return replay, outputs

    class Verdicts:
        def __init__(self, like):
            pass

        def mark(self):
            pass

        def read(self, verdict, done):
            return verdict.tolist()

    monkeypatch.setattr(compiled, "Verdicts", Verdicts)
    monkeypatch.setattr(compiled, "replayed", lambda device: True)
    monkeypatch.setattr(compiled, "record", record)
    return recorded


AHEAD = [
    ({}, True),
    ({"first_step": 0.3}, False),  # too long: it is rejected
    ({"step_t": [0.1, 0.4], "max_step": 0.07}, False),
    ({"jump_t": [0.25, 0.6], "min_step": 1e-4}, False),
    ({"norm": lambda h: h.abs().max()}, False),
]


@pytest.mark.parametrize(("options", "backward"), AHEAD)
def test_steps_that_begin_before_the_verdict_on_the_last_one(options, backward, replayed):
    class Field(Small):  # code of its own: no other test has compiled it
        def forward(self, t, h):
            return super().forward(t, h) * (1 + 0.3 * torch.cos(9 * h))

    f, t = Field(), TIMES.flip(0) if backward else TIMES
    kwargs = {"method": "bosh3", "adjoint": True, "t": t, "moving": False, "options": options}
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs), 1e-9)
    stats = [
        solve(f, H0, t, method="bosh3", compile=compile, options=options, dense=False, **HOW).stats
        for compile in (True, None)
    ]
    assert stats[0].naccept == stats[1].naccept
    assert stats[0].nreject == stats[1].nreject
    # In vain: one step for each that was rejected, at each stop, and where the step had to be cut.
    vain = stats[1].nreject + len(options.get("step_t", [])) + len(options.get("jump_t", [])) + 2
    assert stats[0].nfe <= stats[1].nfe + 3 * vain


@pytest.mark.parametrize("method", ["bosh3", "rk4"])
def test_graphs_that_are_replayed(method, replayed):
    class Field(Net):  # code of its own: no other test has compiled it
        def forward(self, t, h):
            return super().forward(t, h) * (1 + 0.1 * h)

    f, kwargs = Field(), {"method": method, "adjoint": True}
    with torch.inference_mode():
        odeint(f, H0, TIMES, compile=True, method=method, **HOW)
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs))
    count = len(replayed)
    with torch.no_grad():
        for x in f.parameters():
            x.mul_(0.9)
    same(answer(f, compile=True, **kwargs), answer(f, **kwargs))
    assert len(replayed) == count
    # Two solves at a time have memory of their own.
    solutions = [solve(f, h0, TIMES[[0, -1]], compile=True, method=method, **HOW) for h0 in (H0.detach(), 2 * H0)]
    right = [solve(f, h0, TIMES[[0, -1]], method=method, **HOW) for h0 in (H0, 2 * H0)]
    with torch.no_grad():
        for a, b in zip(solutions, right):
            same([a.interpolate(0.4)], [b.interpolate(0.4)])


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_on_a_gpu(method, the_compiler):
    f = Net(torch.float32).cuda()
    kwargs = {"method": method, "adjoint": True, "h0": torch.randn(64, 2, device="cuda"), "t": TIMES.float().cuda()}
    kwargs |= {"rtol": 1e-4, "atol": 1e-5, "moving": False}
    for _ in range(3):
        right = answer_on(f, **kwargs)
        same(answer_on(f, compile=True, **kwargs), right, 1e-4)
        with torch.no_grad():
            for x in f.parameters():
                x.mul_(0.9)
    count = len(the_compiler)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        found = answer_on(f, compile=True, **kwargs)
    torch.cuda.current_stream().wait_stream(aside)
    same(found, answer_on(f, **kwargs), 1e-4)
    assert len(the_compiler) == count


def answer_on(f, **kwargs):
    h0 = kwargs.pop("h0").clone().requires_grad_()
    kwargs.pop("moving")
    h = odeint(f, h0, kwargs.pop("t"), **{**HOW, **kwargs})
    return [h.detach(), *torch.autograd.grad(h.square().mean(), [h0, *f.parameters()])]


@pytest.mark.cuda
def test_one_wait_for_the_host_a_step():
    f = Net(torch.float32).cuda()
    h0, t = torch.randn(64, 2, device="cuda"), torch.tensor([0.0, 2.0], device="cuda")
    with torch.no_grad():
        solver = Solver("dopri5", rtol=1e-4, atol=1e-5, engine="torch", compile=True)
        steps = solver.solve(f, h0, t, dense=False).stats
        solver(f, h0, t)
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            solver(f, h0, t)
    waits = sum(x.count for x in profile.key_averages() if x.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    assert waits <= steps.naccept + steps.nreject + 10, waits

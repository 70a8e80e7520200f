"""Tracing and generation, which need no Julia: what is lifted, what is refused and why, and how the text looks."""

import ctypes
import math
import pathlib
import pickle
import random as pyrandom
import re
import time

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import pyjlode
from pyjlode.bridge.codegen import array, scalar
from pyjlode.bridge.codegen.ops import ELEMENTWISE
from pyjlode.bridge.codegen.program import FUNCTIONS, Program, program_of
from pyjlode.capture.held import held_by
from pyjlode.capture.trace import Trace
from pyjlode.errors import NotCompiled
from pyjlode.problem import Field

H = torch.tensor([0.3, -0.2], dtype=torch.float64)


def trace(f, h=H):
    field = Field(f, h.shape, (f, h.shape))
    source = held_by(field, h.dtype)
    return Trace(source, h.reshape(-1)), source


def test_parameters_come_first_and_then_constants():
    c = torch.tensor(3.0, dtype=torch.float64)
    net = nn.Linear(2, 2).double()
    made, source = trace(lambda t, h: net(h) * c)
    assert made.trained == 2
    assert [source.tensors[i] for i in made.slots][2] is c
    got = made.f.module(torch.zeros(()), H, net.weight, net.bias, c * 2)
    assert torch.allclose(got, net(H) * c * 2)


def test_products_are_those_of_autograd():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    made, source = trace(lambda t, h: net(h) * t)
    tensors = [source.tensors[i] for i in made.slots]
    t, v = torch.tensor(0.7, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    h = H.clone().requires_grad_()
    want = torch.autograd.grad(net(h) * t, [h, *tensors], v)
    got = made.vjp.module(t, H, v, *tensors)
    assert all(torch.allclose(a, b) for a, b in zip(got[1:], want))
    J = torch.autograd.functional.jacobian(lambda h: net(h) * t, H)
    assert torch.allclose(made.jvp.module(t, H, v, *tensors)[0], J @ v)


buffer = torch.zeros(2, dtype=torch.float64)
hidden = [torch.ones(2, dtype=torch.float64)]


class Keeping:
    def __init__(self):
        self.last = []

    def __call__(self, t, h):
        self.last.append(1.0)
        return -h


def branches(t, h):
    return h if h.sum() > 0 else -h


def number(t, h):
    return -h * float(t)


def random(t, h):
    return -h + torch.randn_like(h)


def writes(t, h):
    buffer.copy_(h)
    return -buffer


def by_numpy(t, h):
    return -h * torch.from_numpy(buffer.numpy())


def complex_numbers(t, h):
    return torch.view_as_real(torch.view_as_complex(h[None]) * 1j)[0]


def single(t, h):
    return (h.float() * 2).double()


def indexed(t, h):
    return h[torch.argsort(h)]


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (branches, "Python number or a branch"),
        (number, "Python number or a branch"),
        (random, "random"),
        (writes, "writes into a tensor"),
        (by_numpy, "leaves PyTorch: numpy"),
        (complex_numbers, "complex"),
        (single, "float32"),
        (indexed, "no Julia for aten.|indexes by numbers"),
        (Keeping(), "changes what it holds"),
    ],
)
def test_refused_with_the_reason(f, why):
    with pytest.raises(NotCompiled, match=why):
        program_of(Field(f, H.shape, (f, H.shape)), H)
    with pytest.raises(NotCompiled, match=why):  # and from memory
        program_of(Field(f, H.shape, (f, H.shape)), H)


def test_alike_share_a_program():
    def make():
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        f = lambda t, h: net(h)  # noqa: E731
        return Field(f, H.shape, (f, H.shape))

    assert program_of(make(), H)[0] is program_of(make(), H)[0]


HELD = torch.tensor(2.0, dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 0.7], dtype=torch.float64, requires_grad=True)


def caught(t, h):
    try:
        return -h * float(t)
    except RuntimeError:
        return -h


def by_address(t, h):
    memory = (ctypes.c_double * 2).from_address(h.data_ptr())
    return torch.stack([-h[0] * 2, h[1] * memory[0]])


class Doubled(torch.autograd.Function):
    """Its backward pass is not the derivative of its forward pass."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * w, 3 * g * x


class Outside(torch.autograd.Function):
    """Leaves PyTorch on its way back."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * torch.from_numpy(np.cos(x.detach().numpy()))


ESCAPES = {
    "list_of_tensors": lambda t, h: torch.tensor([h[1], torch.sin(t) - h[0]]),
    "numpy": lambda t, h: torch.from_numpy(np.sin(h.detach().clone().numpy())),
    "array": lambda t, h: h * np.sin(t.detach()),
    "asarray": lambda t, h: h * float(np.asarray(t.detach())),
    "interp": lambda t, h: h * float(np.interp(t.detach().numpy(), [0.0, 1.0], [0.0, 2.0])),
    "tolist": lambda t, h: torch.tensor(h.tolist(), dtype=h.dtype),
    "item": lambda t, h: -h * t.item(),
    "float": lambda t, h: -h * float(t),
    "int": lambda t, h: -h * int(t),
    "math": lambda t, h: -h * math.sin(t),
    "branch": lambda t, h: h if t < 1 else -h,
    "branch_on_a_float": lambda t, h: h if float(t) < 1 else -h,
    "branch_on_an_item": lambda t, h: h * (1 if t.item() < 1 else 2),
    "branch_on_an_int": lambda t, h: h * (3 if int(t) == 0 else 2),
    "branch_on_a_held_number": lambda t, h: h * (3 if HELD.item() < 3 else 2),
    "branch_on_the_state": lambda t, h: h * (3 if float(h[0]) < 3 else 2),
    "largest": lambda t, h: h * max(float(t), 0.5),
    "contains": lambda t, h: -h if 0.3 in h else h,
    "equal": lambda t, h: -h if torch.equal(h, h + t) else h,
    "allclose": lambda t, h: -h if torch.allclose(h, h + t) else h,
    "full": lambda t, h: -h * torch.full((2,), t),
    "legacy": lambda t, h: torch.Tensor([h[0], h[1]]).double(),
    "new_tensor": lambda t, h: h.new_tensor([h[0], h[1]]),
    "address": by_address,
    "dlpack": lambda t, h: torch.from_numpy(np.from_dlpack(h.detach()) * 1.0),
    "storage": lambda t, h: h * h.untyped_storage().nbytes(),
    "printed": lambda t, h: h * len(repr(t)),
    "formatted": lambda t, h: h * len(f"{t:.2f}"),
    "pickled": lambda t, h: pickle.loads(pickle.dumps(h)),
    "caught": caught,
    "held_item": lambda t, h: -h / HELD.item(),
    "held_float": lambda t, h: -h / float(HELD),
    "held_numpy": lambda t, h: -h / float(HELD.numpy()),
    "held_full": lambda t, h: -h * torch.full((2,), HELD),
    "held_setting": lambda t, h: torch.clamp(h, min=float(HELD)),
    "held_arange": lambda t, h: torch.arange(0, HELD, 1, dtype=h.dtype) * h,
    "weight_numpy": lambda t, h: h * torch.as_tensor(WEIGHT.detach().numpy()),
    "numpy_random": lambda t, h: -h * np.random.rand(),  # noqa: NPY002
    "python_random": lambda t, h: -h * pyrandom.random(),
    "clock": lambda t, h: -h * (1 + 0 * time.time()),
    "globals": lambda t, h: -h * globals()["HELD"],
    "mask": lambda t, h: -h * h[h > 0].sum(),
    "nonzero": lambda t, h: -h * len(torch.nonzero(h)),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_what_leaves_pytorch_is_refused_as_such(name):
    f = ESCAPES[name]
    why = "leaves PyTorch|Python number or a branch|random|differs each time|no walk|shape of a tensor's numbers"
    for h in (H, 0 * H):
        with pytest.raises(NotCompiled, match=why):
            program_of(Field(f, H.shape, (f, H.shape)), h)


@pytest.mark.parametrize(
    "f",
    [
        lambda t, h: -h * torch.tensor([1.0, 2.0], dtype=h.dtype),
        lambda t, h: -h * torch.tensor(3).item(),
        lambda t, h: -h * torch.as_tensor(t),
        lambda t, h: -h * float(np.sin(0.3)) * len(h),
        lambda t, h: -h * torch.linspace(0, 1, 2, dtype=h.dtype),
        lambda t, h: -h[torch.tensor([1, 0])],
    ],
)
def test_constants_of_its_own_are_a_part_of_the_code(f):
    made, _ = trace(f)
    got = made.f.module(torch.tensor(0.7, dtype=H.dtype), H, *made.tensors)
    assert torch.allclose(got, f(torch.tensor(0.7, dtype=H.dtype), H))


def without_graph(t, h):
    with torch.no_grad():
        rate = h * WEIGHT
    return rate * WEIGHT - h * t


@pytest.mark.parametrize(
    "f",
    [
        lambda t, h: -WEIGHT * h.detach() * t,
        lambda t, h: -WEIGHT.detach() * h,
        lambda t, h: -WEIGHT.data * h,
        without_graph,
        lambda t, h: Doubled.apply(h, WEIGHT) - h * t,
        lambda t, h: Doubled.apply(h * t, WEIGHT * 2),
        lambda t, h: torch.round(WEIGHT * h) * t,
        lambda t, h: torch.zeros_like(h),
        lambda t, h: torch.func.grad(lambda x: (WEIGHT * x**3).sum() * t)(h),
        lambda t, h: torch.utils.checkpoint.checkpoint(lambda x: torch.sin(WEIGHT * x), h, use_reentrant=False),
    ],
)
def test_gradients_are_those_of_pytorchs_backward_pass(f):
    made, _ = trace(f)
    t, v = torch.tensor(0.7, dtype=H.dtype, requires_grad=True), torch.tensor([0.4, -1.1], dtype=H.dtype)
    for start in (H, 0 * H):
        h = start.clone().requires_grad_()
        k = f(t, h)
        theta = made.tensors[: made.trained]
        wanted = [t, h, *([WEIGHT] * made.trained)]
        want = [None] * len(wanted)
        if k.requires_grad:
            want = torch.autograd.grad(k, wanted, v, allow_unused=True)
        got = made.vjp.module(t.detach(), start, v, *made.tensors)
        assert len(got) == 2 + len(theta)
        for a, b in zip(got, want):
            assert torch.allclose(a, torch.zeros_like(a) if b is None else b)


def test_a_gradient_that_cannot_be_traced_stops_only_itself():
    program, _ = program_of(Field(f := lambda t, h: Outside.apply(h), H.shape, (f, H.shape)), H)
    assert "sin(" in program.text("f")
    with pytest.raises(NotCompiled, match=r"a product of f: .*f leaves PyTorch"):
        program.text("vjp")


attend = nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize(("inside", "dtype"), [
    (lambda q: attend(q, q.flip(-2), q.cos()), torch.float32),
    (lambda q: attend(q, q.flip(-2), q.cos()), torch.float64),
    (lambda q: attend(q, q.flip(-2), q.cos(), is_causal=True), torch.float32),
    (lambda q: attend(q, q, q, torch.ones(5, 5).tril() > 0, scale=0.3), torch.float64),
])  # fmt: skip
def test_attention_has_a_product(inside, dtype):
    """As PyTorch computes it, it is fused where it can be: of the kernels there is no Julia."""
    h = torch.linspace(-1, 2, 60, dtype=dtype).reshape(1, 2, 5, 6)
    f = lambda t, h: inside(h) - h  # noqa: E731
    program, _ = program_of(Field(f, h.shape, (f, h.shape)), h.reshape(-1))
    assert "pull" in program.text("pull")
    leaf = h.clone().requires_grad_()
    v = torch.cos(h)
    (want,) = torch.autograd.grad(f(0.0, leaf), leaf, v)
    got = program.trace.vjp.module(h[0, 0, 0, 0], h.reshape(-1), v.reshape(-1), *program.trace.tensors)[1]
    torch.testing.assert_close(got.reshape(h.shape), want)


def test_dropout_within_attention_is_refused():
    q = torch.ones(1, 1, 4, 2)
    f = lambda t, h: attend(h, h, h, dropout_p=0.5)  # noqa: E731
    with pytest.raises(NotCompiled, match="random"):
        program_of(Field(f, q.shape, (f, q.shape)), q.reshape(-1))


@pytest.mark.parametrize("error", [NotCompiled("there is no Julia for it"), IndexError("of the compiler")])
def test_a_function_that_there_is_not_is_not_tried_again(error, monkeypatch):
    program, _ = program_of(Field(f := lambda t, h: torch.sin(h) * 3, H.shape, (f, H.shape)), H)
    tried = []

    def fails(self):
        tried.append(1)
        raise error

    monkeypatch.setattr(program, "_texts", {})
    monkeypatch.setattr(Program, "_vjp_text", fails)
    for _ in range(3):
        with pytest.raises(NotCompiled, match=str(error)):
            program.text("vjp")
    assert len(tried) == 1
    assert "sin(" in program.text("f")


TABLE = torch.arange(24.0, dtype=torch.float64).reshape(4, 3, 2).sin()


@pytest.mark.parametrize("pick", [
    lambda x, i: x[i, 0],
    lambda x, i: x[i, i - 3],
    lambda x, i: x[:, i - 2][0],
    lambda x, i: x[..., i - 2][1, 2, None],
    lambda x, i: x[None, i][0, -1],
    lambda x, i: x[1:, i - 1, :][0],
    lambda x, i: x[i - 4][i - 1],
])  # fmt: skip
def test_numbers_that_are_computed_index(pick):
    """`x[i]` with the place i of a time among others, as fields that are driven by data are written."""
    edges = torch.tensor([0.2, 0.6], dtype=torch.float64)
    f = lambda t, h: h * pick(TABLE, torch.searchsorted(edges, t) + 1)  # noqa: E731
    made, _ = trace(f)
    for t in (0.1, 0.3, 0.7):
        t = torch.tensor(t, dtype=torch.float64)
        assert torch.equal(made.f.module(t, H, *made.tensors), f(t, H))


@pytest.mark.parametrize("write", [lambda x: x.add_(1.0), lambda x: x[0].mul_(2.0), lambda x: x.view(2).zero_()])
def test_what_is_written_into_a_picked_part_is_refused(write):
    """It would be written into x."""

    def f(t, h):
        x = h.repeat(2, 1)
        write(x[torch.searchsorted(H.sort()[0], t)])
        return x[0]

    with pytest.raises(NotCompiled, match=r"writes into what it indexes|numbers of a tensor"):
        trace(f)


class Reading(torch.autograd.Function):
    """Reads what it holds on its way back."""

    @staticmethod
    def forward(ctx, x):
        return torch.sin(x)

    @staticmethod
    def backward(ctx, g):
        return g * HELD.item()


def test_what_is_held_may_not_be_read_in_a_backward_pass():
    program, _ = program_of(Field(f := lambda t, h: Reading.apply(h), H.shape, (f, H.shape)), H)
    with pytest.raises(NotCompiled, match=r"a product of f: .*of the numbers of a tensor"):
        program.text("vjp")


def test_the_result_of_an_earlier_operation_is_cut_off():
    w = torch.tensor(0.3, dtype=H.dtype, requires_grad=True)
    c = w.exp()
    program, source = program_of(Field(f := lambda t, h: -c * w * h, H.shape, (f, H.shape)), H)
    v = torch.ones(2, dtype=H.dtype)
    got = dict(zip(program.trace.slots, program.trace.vjp.module(H[0], H, v, *program.trace.tensors)[2:]))
    by = {id(x): got[i] for i, x in enumerate(source.tensors)}
    assert torch.allclose(by[id(w)], -(c * H).sum())
    assert torch.allclose(by[id(c)], -(w * H).sum())
    c.sum().backward()  # its graph is still there


class Counting(nn.Module):
    def __init__(self, step=1):
        super().__init__()
        self.nfe, self.step = 0, step

    def forward(self, t, h):
        self.nfe += self.step
        return -h


TIMES = 0


def counts_globally(t, h):
    global TIMES
    TIMES += 1
    return -h


def counting_closure():
    n = 0

    def f(t, h):
        nonlocal n
        n = n + 2
        return -h

    return f


@pytest.mark.parametrize(
    ("f", "step"), [(Counting(), 1), (Counting(3), 3), (counts_globally, 1), (counting_closure(), 2)]
)
def test_a_counter_stops_nothing(f, step):
    program, source = program_of(Field(f, H.shape, (f, H.shape)), H)
    (slot,) = source.counters
    assert program.trace.steps == [step]
    before = slot.get()
    f(None, H)
    assert slot.get() == before + step  # it is a number as before
    again, _ = program_of(Field(f, H.shape, (f, H.shape)), H)
    assert again is program


class CountingInABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("evaluations", torch.tensor(0.0))

    def forward(self, t, h):
        self.evaluations += 1
        return -h


def test_a_counter_may_be_a_buffer():
    f = CountingInABuffer()
    buffer = f.evaluations
    program, source = program_of(Field(f, H.shape, (f, H.shape)), H)
    assert [(source.tensors[i] is buffer, step) for i, step in program.trace.adds.items()] == [(True, 1.0)]
    assert f.evaluations is buffer
    assert float(buffer) == 0.0
    assert program.trace.slots == []


class KeepingAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()
        self.history, self.cache, self.last = [], {}, torch.zeros(2)

    def forward(self, t, h):
        self.last = self.net(h)
        self.history.append(self.last)
        self.cache["last"] = self.last
        return self.last


@pytest.mark.parametrize("again", [False, True])
def test_what_f_keeps_is_refused_and_no_tensor_of_a_trace_stays_there(again):
    f = KeepingAll()
    if again:  # everything is there already, and looks as before
        f(None, H)
    last, length, cache = f.last, len(f.history), dict(f.cache)
    with pytest.raises(NotCompiled, match="changes what it holds"):
        program_of(Field(f, H.shape, (f, H.shape)), H)
    assert f.last is last
    assert len(f.history) == length
    assert f.cache == cache


class Ageing(Counting):
    """What it counts is a part of what it answers, sooner or later."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, t, h):
        self.nfe += 1
        return self.how(self.nfe, h)


@pytest.mark.parametrize(
    "how",
    [
        lambda n, h: -h * n,
        lambda n, h: n * -h,
        lambda n, h: -h if n < 1000 else h,
        lambda n, h: -h / (n % 7 + 1),
        lambda n, h: h * [1.0, 2.0, 3.0, 4.0, 5.0, 6.0][n],
        lambda n, h: -h * len(str(n)),
        lambda n, h: -h * math.exp(-n),
        lambda n, h: torch.pow(h, n),
    ],
)
def test_a_number_that_f_changes_and_uses_is_refused(how):
    f = Ageing(how)
    with pytest.raises(NotCompiled, match=r"uses nfe"):
        program_of(Field(f, H.shape, (f, H.shape)), H)
    assert isinstance(f.nfe, int)


POINT = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


def written(t, h):
    d = torch.zeros_like(h)
    d[0] = h[1]
    d[1] = -h[0] - POINT * h[1]
    return d


ONE_NUMBER = [
    written,
    lambda t, h: -h * POINT.sum(),
    lambda t, h: -h * POINT.sum(0),
    lambda t, h: -h * t.sum(-1, keepdim=True),
    lambda t, h: -h * POINT.mean(),
    lambda t, h: -h * torch.softmax(POINT * 2, 0),
    lambda t, h: -h * torch.log_softmax(POINT, -1),
    lambda t, h: -h * POINT.amax(),
    lambda t, h: -h * (t * POINT).max(),
    lambda t, h: -h * (POINT * t).prod(),
    lambda t, h: -h * torch.linalg.vector_norm(POINT),
    lambda t, h: -h * torch.logsumexp(POINT, 0),
    lambda t, h: -h * POINT.cumsum(0),
    lambda t, h: -h * POINT.var(correction=0),
    lambda t, h: torch.where((POINT > 0).any(), -h, h),
]
# Each as one of the two kinds of code, in turn; as the other one where there is time.
KINDS = ("scalar", "array")
IN_TURN = [(f, KINDS[i % 2]) for i, f in enumerate(ONE_NUMBER)]
IN_TURN += [pytest.param(f, KINDS[1 - i % 2], marks=pytest.mark.slow) for i, f in enumerate(ONE_NUMBER)]


@pytest.mark.parametrize(("f", "mode"), IN_TURN)
def test_one_number_is_reduced(f, mode, monkeypatch):
    monkeypatch.setattr(scalar, "LIMIT", -1 if mode == "array" else 1 << 20)
    made, _ = trace(f)
    program = Program(made)
    for name in FUNCTIONS:
        # Sweeps need the second, of straight-line code; loops keep values for their products by the first.
        if name != {"scalar": "keep", "array": "bend"}[mode]:
            assert f"function {name}" in program.text(name)


def code_of(f, h=H):
    made, _ = trace(f, h)
    return scalar.evaluate(made.f, (torch.zeros((), dtype=h.dtype), h, *made.tensors), made.trained, scalar.LIMIT)


def test_constants_fold_and_common_expressions_are_shared():
    code, (out,) = code_of(lambda t, h: torch.sin(h) * 1.0 + 0.0 + torch.sin(h) * (2.0 - 1.0))
    lines = code.lines(out.tolist(), ["du[1]", "du[2]"])
    assert "\n".join(lines).count("sin(") == 2
    code, (out,) = code_of(lambda t, h: h * torch.tensor([1.0, 0.0]).to(h) * 2)
    assert out[1] == code.zero


def test_structural_zeros_of_the_jacobian():
    n = 40
    h = torch.randn(n, dtype=torch.float64)
    f = lambda t, h: torch.cat([h[1:], h[:1] * 0]) - 2 * h * h  # noqa: E731
    program, _ = program_of(Field(f, h.shape, (f, h.shape)), h)
    columns = program.pattern.columns.diff().tolist()
    assert columns == [1] + [2] * (n - 1)
    assert "J[79]" in program.text("jac")
    assert "J[80]" not in program.text("jac")


def test_source_is_readable():
    net = nn.Linear(2, 2).double()
    text = pyjlode.julia_source(net_of(net), H)
    assert "# p[1:4]: net.weight (2, 2)" in text
    for name in ("f(du", "jac(J", "tgrad(dT", "jvp(out", "vjp(out", "vjp_p(out"):
        assert f"function {name}" in text
    assert "# tanh" in text


def net_of(net):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, h):
            return torch.tanh(self.net(h))

    return Net()


def test_source_of_what_cannot_be_compiled():
    with pytest.raises(NotCompiled, match="random"):
        pyjlode.julia_source(random, H)


def test_the_documentation_lists_the_operations():
    text = (pathlib.Path(__file__).parents[3] / "docs" / "compiled.md").read_text()
    text = text.partition("## Operations")[2]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    listed = set(re.findall(r"`(\w+)`", " ".join(rows)))
    array_mode = {name.removeprefix("do_") for name in vars(array._Emission) if name.startswith("do_")}
    known = {*ELEMENTWISE, *scalar._SPECIAL, *array_mode, *scalar.EMPTY, *scalar.ZEROS}
    known |= {name for name in scalar.MOVES if not name.endswith("_copy")}
    known |= {"convolution_backward", "ones_like", "full_like", "new_full", "new_ones"}
    assert listed == known

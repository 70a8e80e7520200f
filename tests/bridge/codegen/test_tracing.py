"""Tracing and generation, which need no Julia: what is lifted, what is refused and why, and how the text looks."""

import pathlib
import re

import pytest
import torch
from torch import nn

import pyjlode
from pyjlode.bridge.codegen import array, scalar
from pyjlode.bridge.codegen.capture import held
from pyjlode.bridge.codegen.ops import ELEMENTWISE
from pyjlode.bridge.codegen.program import program_of
from pyjlode.bridge.codegen.trace import Trace
from pyjlode.errors import NotCompiled
from pyjlode.problem import Field

H = torch.tensor([0.3, -0.2], dtype=torch.float64)


def trace(f, h=H):
    field = Field(f, h.shape, (f, h.shape))
    source = held(field.source)
    return Trace(field, source, h.reshape(-1)), source


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


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, t, h):
        self.calls += 1
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
        (Counting(), "changes what it holds"),
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
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    listed = set(re.findall(r"`(\w+)`", " ".join(rows)))
    array_mode = {name.removeprefix("do_") for name in vars(array._Emission) if name.startswith("do_")}
    known = {*ELEMENTWISE, *scalar._SPECIAL, *array_mode, *scalar.EMPTY, *scalar.ZEROS}
    known |= {name for name in scalar.MOVES if not name.endswith("_copy")}
    known |= {"convolution_backward", "ones_like", "full_like", "new_full", "new_ones"}
    assert listed == known

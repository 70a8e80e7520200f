"""Signals through samples, and equations along them: closed forms, SciPy's curves, torchcde where it is installed."""

import math

import pytest
import torch

import pyjlode
from pyjlode import CDE, Interpolation, odeint
from pyjlode.errors import BadDtype, BadOption, BadShape, BadTime
from pyjlode.nn import NeuralCDE

F64 = torch.float64
NAN = math.nan
KINDS = ("linear", "hermite", "natural")
TIGHT = {"rtol": 1e-9, "atol": 1e-10, "engine": "torch"}
T = torch.tensor([0.0, 1.0, 1.5, 3.0, 4.0, 4.2, 6.0], dtype=F64)


def samples(missing=False):
    x = torch.randn(3, len(T), 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    if missing:
        x[0, 2, 0] = x[1, 3:5, 1] = x[2, 1:6, 0] = NAN
    return x


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
def test_through_the_samples(kind, missing):
    x = samples(missing)
    X = Interpolation(x, T, kind)
    at = X(T).movedim(0, 1)
    torch.testing.assert_close(at[~x.isnan()], x[~x.isnan()], rtol=1e-12, atol=1e-12)
    assert torch.equal(X(T)[3], X(T[3]))
    assert torch.equal(X(3.0), X(T[3]))
    moments = torch.linspace(0.01, 5.99, 57, dtype=F64).requires_grad_()
    for weight in (torch.zeros(3, 2, dtype=F64), torch.ones(3, 2, dtype=F64)):
        (slope,) = torch.autograd.grad((X(moments) * (weight + 0.5)).sum(), moments)
        torch.testing.assert_close(slope, (X.derivative(moments) * (weight + 0.5)).sum((1, 2)))


@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
def test_curves_are_those_of_scipy(missing):
    scipy = pytest.importorskip("scipy.interpolate")
    x, at = samples(missing), torch.linspace(0, 6, 61, dtype=F64)
    curves = {kind: Interpolation(x, T, kind)(at) for kind in KINDS}
    for i in range(3):
        for k in range(2):
            seen = ~x[i, :, k].isnan()
            t, values = T[seen].numpy(), x[i, seen, k].numpy()
            spline = scipy.CubicSpline(t, values, bc_type="natural")(at)
            torch.testing.assert_close(curves["natural"][:, i, k], torch.from_numpy(spline))
            line = scipy.make_interp_spline(t, values, k=1)(at)
            torch.testing.assert_close(curves["linear"][:, i, k], torch.from_numpy(line))


def test_hermite_looks_back():
    """What comes after the next sample changes nothing before it; the slope at a sample is that of the line to it."""
    x = samples()
    X, other = Interpolation(x, T, "hermite"), x.clone()
    other[:, 4:] += 1
    at = torch.linspace(0, 3, 31, dtype=F64)
    assert torch.equal(X(at), Interpolation(other, T, "hermite")(at))
    rise = (x[:, 2] - x[:, 1]) / (T[2] - T[1])
    torch.testing.assert_close(X.derivative(T[2] + 1e-12), rise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(X.derivative(T[2]), rise, rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
def test_torchcde(kind, missing):
    torchcde = pytest.importorskip("torchcde")
    x = samples(missing)
    coefficients = {
        "linear": torchcde.linear_interpolation_coeffs,
        "hermite": torchcde.hermite_cubic_coefficients_with_backward_differences,
        "natural": torchcde.natural_cubic_coeffs,
    }[kind](x, T)
    theirs = (torchcde.LinearInterpolation if kind == "linear" else torchcde.CubicSpline)(coefficients, T)
    ours = Interpolation(x, T, kind)
    for t in [*torch.linspace(0, 6, 25, dtype=F64), *T]:
        torch.testing.assert_close(ours(t), theirs.evaluate(t))
        torch.testing.assert_close(ours.derivative(t), theirs.derivative(t))
    net = torch.nn.Linear(4, 8).double()

    def g(t, h):
        return torch.tanh(net(h)).reshape(*h.shape[:-1], 4, 2)

    h0, results, kinks = torch.ones(3, 4, dtype=F64), [], {"jump_t": T[1:-1]}
    cde = CDE(g, ours)
    for h in (
        odeint(cde, h0, T, options=cde.options, rtol=1e-7, atol=1e-8, engine="torch"),
        torchcde.cdeint(theirs, g, h0, T, rtol=1e-7, atol=1e-8, adjoint=False, options=kinks).movedim(-2, 0),
    ):
        results.append((h.detach(), *torch.autograd.grad(h[-1].sum(), net.parameters())))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "values", "slopes"),
    [
        (
            "linear",
            [[0.3, 1.2], [2.0, 2.6666667], [2.3, 4.7]],
            [[1.0, 0.6666667], [1.0, 1.3333333], [-1.0, 1.0]],
        ),
        (
            "hermite",
            [[0.3, 1.2], [2.0, 2.5185185], [2.426, 4.721]],
            [[1.0, 0.6666667], [1.0, 1.3333333], [-1.66, 0.89]],
        ),
        (
            "natural",
            [[0.265875, 1.1403243], [2.375, 2.6236236], [2.402375, 4.7295135]],
            [[0.90875, 0.4843243], [1.25, 1.3723724], [-1.27375, 0.9210811]],
        ),
    ],
)
def test_what_torchcde_gives(kind, values, slopes):
    """torchcde 0.2.5, with values missing."""
    x = torch.tensor([[0, 1], [1, NAN], [NAN, 2], [3, 4], [2, 5]], dtype=F64)
    X = Interpolation(x, torch.tensor([0, 1, 1.5, 3, 4], dtype=F64), kind)
    at = torch.tensor([0.3, 2.0, 3.7], dtype=F64)
    torch.testing.assert_close(X(at), torch.tensor(values, dtype=F64), rtol=0, atol=1e-7)
    torch.testing.assert_close(X.derivative(at), torch.tensor(slopes, dtype=F64), rtol=0, atol=1e-7)


@every_kind
def test_beyond_its_first_and_last_sample_a_channel_is_constant(kind):
    x = torch.tensor([[NAN, 0.0], [1, NAN], [NAN, NAN], [3, NAN], [NAN, NAN]], dtype=F64)
    X = Interpolation(torch.cat([x, torch.full_like(x[:, :1], NAN)], 1), kind=kind)
    at = torch.tensor([0.0, 0.7, 1.0, 2.0, 3.0, 3.5, 4.0], dtype=F64)
    assert X(at)[:, 0].tolist() == pytest.approx([1, 1, 1, 2, 3, 3, 3])
    assert X(at)[:, 1:].abs().max() == 0  # one sample, and none
    assert X.derivative(at)[-2:].abs().max() == 0


@every_kind
def test_gradient_by_the_samples(kind):
    x = samples(missing=True)[:, :5].requires_grad_()
    at = torch.tensor([0.3, 1.2, 2.5, 3.3], dtype=F64)

    def f(x):
        X = Interpolation(x, T[:5], kind)
        return X(at).square().sum() + X.derivative(at).square().sum()

    (got,) = torch.autograd.grad(f(x), x)
    assert not got.isnan().any()
    direction = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = (f(x + 1e-6 * direction) - f(x - 1e-6 * direction)) / 2e-6
    seen = ~x.detach().isnan()
    torch.testing.assert_close((got * direction)[seen].sum(), want, rtol=1e-6, atol=1e-7)


@every_kind
@pytest.mark.parametrize("adjoint", [False, True, "gauss"], ids=str)
def test_a_linear_cde_is_the_exponential_of_its_control(kind, adjoint):
    """dh = h a dX, so h = h0 exp(a (X - X0)), whatever the way."""
    x = samples()[0].requires_grad_()
    a = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    X = Interpolation(x, T, kind)
    cde = CDE(lambda t, h: h[..., None] * a, X)
    h0 = torch.tensor([1.0, 2.0], dtype=F64)
    h = odeint(cde, h0, T, options=cde.options, adjoint=adjoint, rtol=1e-7, atol=1e-8, engine="torch")
    want = h0 * torch.exp((x - x[0]) @ a)[:, None]
    torch.testing.assert_close(h, want, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(h[-1].sum() + h[3, 0], (a, x), retain_graph=True)
    wanted = torch.autograd.grad(want[-1].sum() + want[3, 0], (a, x))
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_driven_system_and_its_kinks():
    """h' = -h + X(t) with X piecewise linear; few steps fail where they end at the kinks."""
    X = Interpolation(torch.tensor([0.0, 1.0, 1.0, -1.0], dtype=F64), torch.tensor([0.0, 1.0, 2.0, 2.5], dtype=F64))
    assert X.kinks == (1.0, 2.0)
    got = pyjlode.solve(
        lambda t, h: X(t) - h, torch.zeros(1, dtype=F64), [0.0, 1.0, 2.0], options=X.options, **TIGHT, dense=False
    )
    e = math.exp(-1)
    assert got.h[:, 0].tolist() == pytest.approx([0, e, e * e + 1 - e], abs=1e-8)
    free = pyjlode.solve(lambda t, h: X(t) - h, torch.zeros(1, dtype=F64), [0.0, 1.0, 2.0], **TIGHT, dense=False)
    assert got.stats.nreject < free.stats.nreject


def test_signals_with_times_of_their_own():
    t = [torch.tensor([0.0, 1.0, 3.0], dtype=F64), torch.tensor([0.5, 1.0], dtype=F64)]
    x = [torch.tensor([[0.0], [1.0], [5.0]], dtype=F64), torch.tensor([[2.0], [3.0]], dtype=F64)]
    X = Interpolation(x, t)
    assert X.kinks == (0.5, 1.0)
    at = torch.tensor([0.0, 0.5, 0.75, 2.0, 3.0], dtype=F64)
    assert X(at)[:, 0, 0].tolist() == pytest.approx([0, 0.5, 0.75, 3, 5])
    assert X(at)[:, 1, 0].tolist() == pytest.approx([2, 2, 2.5, 3, 3])


@every_kind
@pytest.mark.parametrize("observed", [False, True])
def test_a_batch_of_series_is_each_alone(kind, observed):
    """Of different lengths, at times of their own, with values missing."""
    torch.manual_seed(0)
    model = NeuralCDE(2, 5, 3, interpolation=kind, observed=observed, rtol=1e-6, atol=1e-7, engine="torch").double()
    whole = samples(missing=True)
    x, t = [whole[0, :5], whole[1, 1:], whole[2, ::3]], [T[:5], T[1:], T[::3] + 0.1]
    together = model(x, t)
    assert together.shape == (3, 3)
    for i in range(3):
        torch.testing.assert_close(model(x[i], t[i]), together[i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(torch.stack([x[0], x[0]]), t[0])[1], together[0], rtol=1e-4, atol=1e-4)


def test_neural_cde_learns_what_a_channel_sums_to():
    torch.manual_seed(0)
    model = NeuralCDE(1, 6, 1, engine="torch")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(32, 8, 1).cumsum(1) / 3
    x[:, 3] = NAN
    target = x[:, -1] - x[:, 0]
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    assert model.stats.nfe > 0


def test_trajectory_and_other_methods():
    torch.manual_seed(0)
    model = NeuralCDE(2, 4, return_trajectory=True, rtol=1e-7, atol=1e-8, engine="torch").double()
    x = samples()
    h = model(x, T)
    assert h.shape == (7, 3, 4)
    model.return_trajectory = False
    torch.testing.assert_close(model(x, T), h[-1], rtol=1e-6, atol=1e-6)
    model.solver_options |= {"method": "rk4", "options": {"step_size": 0.01}}
    torch.testing.assert_close(model(x, T), h[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (BadOption, "did you mean", lambda: Interpolation(samples(), T, "linaer")),
        (BadShape, "must be a tensor", lambda: Interpolation(1.0)),
        (BadShape, "a time for each", lambda: Interpolation(samples(), T[:3])),
        (BadShape, "at least two", lambda: Interpolation(torch.ones(1))),
        (BadTime, "increasing", lambda: Interpolation(samples(), T.flip(0))),
        (BadTime, "float32", lambda: Interpolation(torch.ones(2), [1e9, 1e9 + 1])),
        (BadTime, "requires grad", lambda: Interpolation(samples(), T.clone().requires_grad_())),
        (BadDtype, "int64", lambda: Interpolation(torch.arange(3))),
        (BadShape, "as many t", lambda: Interpolation([torch.ones(3, 1)], None)),
        (BadShape, "as many channels", lambda: Interpolation([torch.ones(3, 1), torch.ones(3, 2)], [[0, 1, 2]] * 2)),
        (BadOption, "derivative", lambda: CDE(torch.tanh, torch.tanh)),
        (BadShape, "g\\(t, h\\) has shape", lambda: CDE(lambda t, h: h, Interpolation(samples()))(T[0], T[:3])),
        (BadShape, "must have shape", lambda: NeuralCDE(3, 4)(samples())),
        (BadOption, "interpolation", lambda: NeuralCDE(3, 4, interpolation="cubic")),
        (TypeError, "metod", lambda: NeuralCDE(3, 4, metod="tsit5")),
    ],
)
def test_mistakes(error, match, make):
    with pytest.raises(error, match=match):
        make()

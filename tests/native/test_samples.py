"""Independent systems in a batch, each with steps, times and events of its own: as if each were solved alone."""

import math

import pytest
import torch
from designs import covering, latin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyjlode import METHODS, errors, odeint, odeint_event, solve
from pyjlode.derivatives import load_forward_mode
from pyjlode.native import sensitivity
from pyjlode.native.samples import OWN_STEPS, field, narrow

F64 = torch.float64
OWN = {"batch_dims": 1}
NAN = {"batch_dims": 1, "on_failure": "nan"}
G = 9.81


def tensor(*values):
    return torch.tensor(values, dtype=F64)


T = tensor(0.0, 0.4, 1.1, 2.0)
MU = tensor(0.5, 3.0, 12.0)
H0 = tensor([2.0, 0.0], [1.0, -0.5], [0.3, 1.0])
# The second one ends before the others.
ROWS = tensor([0.0, 0.3, 1.0, 2.0], [0.5, 0.7, 0.9, 0.9], [-0.2, 0.1, 1.4, 1.5])
TIMES = {"shared": T, "rows": ROWS, "backward": T.flip(0), "rows backward": -ROWS}


def van_der_pol(t, h, mu):
    """Forced; t is 0-d, or of the shape of a component of h."""
    return torch.stack([h[..., 1], mu * (1 - h[..., 0] ** 2) * h[..., 1] - h[..., 0] + torch.sin(3 * t)], -1)


class Field(nn.Module):
    """Holds a tensor with a part for each system."""

    def __init__(self, mu=MU):
        super().__init__()
        self.mu = nn.Parameter(mu.clone())

    def forward(self, t, h):
        return van_der_pol(t, h, self.mu)


def row(t, i):
    """The times of one system, without what fills them up."""
    t = t[i] if t.ndim > 1 else t
    return t[: int((t == t[-1]).nonzero()[0, 0]) + 1]


def alone(mu, h0, t, **kwargs):
    """The solution of each system, solved by itself."""
    return [
        solve(lambda t, h, m=mu[i]: van_der_pol(t, h, m), h0[i], row(t, i), dense=False, **kwargs)
        for i in range(len(h0))
    ]


def side_by_side(solutions, n):
    rows = [torch.cat([s.h, s.h[-1:].expand(n - len(s.h), *s.h.shape[1:])]) for s in solutions]
    return torch.stack(rows, 1)


# --- Steps and states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "which"), latin(OWN_STEPS, TIMES))
def test_each_is_solved_as_if_alone(method, which):
    t = TIMES[which]
    kwargs = {"method": method, "rtol": 1e-4, "atol": 1e-6}
    with torch.no_grad():
        together = solve(Field(), H0, t, options=OWN, dense=False, **kwargs)
    each = alone(MU, H0, t, **kwargs)
    torch.testing.assert_close(together.h, side_by_side(each, 4), rtol=1e-7, atol=1e-9)
    counts = together.stats.systems
    assert counts.naccept.tolist() == [s.stats.naccept for s in each]
    assert counts.nreject.tolist() == [s.stats.nreject for s in each]
    assert not counts.failed.any()
    assert together.stats.naccept == sum(s.stats.naccept for s in each)
    assert together.stats.nreject == sum(s.stats.nreject for s in each)
    # One call for all of them: as many as the hardest needs.
    assert together.stats.nfe < 1.3 * max(s.stats.nfe for s in each) + 40
    if METHODS[method].kind == "adaptive":
        assert counts.nfe[2] == pytest.approx(each[2].stats.nfe, rel=0.1)


@given(data=st.data())
def test_as_if_alone_over_batches_times_and_methods(data):
    count = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    sign = data.draw(st.sampled_from([1.0, -1.0]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    method = data.draw(st.sampled_from(OWN_STEPS))
    rows = [sign * (torch.rand(n, generator=random, dtype=F64) + 0.05).cumsum(0) for n in lengths]
    h0 = torch.randn(count, 2, generator=random, dtype=F64)
    mu = torch.rand(count, generator=random, dtype=F64)
    kwargs = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    with torch.no_grad():
        h = solve(Field(mu), h0, rows, options=OWN, dense=False, **kwargs)
    assert h.h.shape == (max(lengths), count, 2)
    for i, times in enumerate(rows):
        each = solve(lambda t, h, m=mu[i]: van_der_pol(t, h, m), h0[i], times, dense=False, **kwargs)
        n = len(times)
        torch.testing.assert_close(h.h[:n, i], each.h, rtol=1e-7, atol=1e-8)
        assert (h.h[n:, i] == h.h[n - 1, i]).all()
        assert int(h.stats.systems.naccept[i]) == each.stats.naccept
        assert int(h.stats.systems.nreject[i]) == each.stats.nreject


def test_steps_do_not_add_up():
    """Common steps are all that somebody needs; of their own, systems in different phases need those of one."""
    mu, start = torch.full((12,), 20.0, dtype=F64), torch.linspace(-2, 2, 12, dtype=F64)
    h0, t = torch.stack([start, 1 - start / 4], -1), tensor(0.0, 30.0)
    f = Field(mu)
    with torch.no_grad():
        own, common = (solve(f, h0, t, rtol=1e-5, atol=1e-5, dense=False, options=o) for o in (OWN, {}))
        assert own.stats.nfe < 0.6 * common.stats.nfe
    torch.testing.assert_close(own.h, common.h, rtol=1e-2, atol=1e-2)


def test_rows_of_one_time_and_of_one_system():
    assert torch.equal(odeint(Field(MU[:1]), H0[:1], [[0.5]], options=OWN), H0[None, :1])
    h = odeint(Field(), H0, [[0.5], [0.0, 1.0], [2.0]], options=OWN)
    assert torch.equal(h[:, [0, 2]], H0[None, [0, 2]].expand(2, -1, -1))
    torch.testing.assert_close(h[1, 1], odeint(lambda t, h: van_der_pol(t, h, MU[1]), H0[1], [0.0, 1.0])[-1])


def test_two_batch_dims():
    h0, t = torch.randn(2, 3, 2, dtype=F64), torch.stack([ROWS, ROWS + 0.5])
    h = odeint(lambda t, h: -h * torch.cos(t), h0, t, options={"batch_dims": 2})
    exact = h0 * torch.exp(t[..., :1].sin() - t.sin())[..., None].movedim(2, 0).unsqueeze(0).squeeze(0)
    torch.testing.assert_close(h, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{"step_t": [0.6, 1.3]}, {"jump_t": [0.6, 1.3]}])
def test_stops(options):
    rates = tensor(1.0, 2.0, 3.0)[:, None]

    def f(t, h):
        return torch.where((t < 0.6) | (t > 1.3), -h, 2 * h) * rates

    h = solve(f, H0, T, options={**OWN, **options}, dense=False)
    torch.testing.assert_close(h.h[-1], H0 * torch.exp(rates * (2 * 0.7 - 1.3)), rtol=1e-5, atol=1e-8)
    if "jump_t" in options:
        assert int(h.stats.systems.nreject.max()) <= 1


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_those_at_their_end_leave_if_that_is_right(method, monkeypatch):
    """Only where f has nothing of its own for each; else they rest, whatever f does with what it holds."""
    sizes: list[int] = []
    own = torch.linspace(1, 2, 8, dtype=F64)[:, None]

    def alike(t, h):
        sizes.append(len(h))
        return torch.stack([h[:, 1], -h[:, 0]], 1) * torch.cos(t)

    def apart(t, h):
        return alike(t, h) * own

    def first_ones(t, h):
        return alike(t, h) * own[: len(h)]

    def later(t, h):  # it is seen in a step, and not before
        return alike(t, h) * (own if bool((t > 6).any()) else 1.0)

    h0 = torch.randn(8, 2, dtype=F64)
    t = torch.stack([torch.zeros(8, dtype=F64), tensor(1, 8, 1.5, 7, 2.5, 1.2, 0.5, 2.0)], 1)
    for f in (alike, apart, first_ones, later):
        kwargs = {"method": method, "options": OWN, "rtol": 1e-5, "atol": 1e-7, "dense": False}
        with torch.no_grad():
            want = solve(f, h0, t, **kwargs)
            assert set(sizes) == {8}
            monkeypatch.setattr(narrow, "_WORTH", 0)
            sizes.clear()
            got = solve(f, h0, t, **kwargs)
            monkeypatch.undo()
        torch.testing.assert_close(got.h, want.h, rtol=1e-10, atol=1e-12)
        assert torch.equal(got.stats.systems.naccept, want.stats.systems.naccept)
        assert torch.equal(got.stats.systems.nfe, want.stats.systems.nfe) or f is later
        assert sizes[-1] == (1 if f is alike else 8)
        sizes.clear()


# --- What f is given --------------------------------------------------------------------------------------------------


def component(t, h):
    return torch.stack([h[:, 1] * t, -h[:, 0] * torch.sin(t)], 1)


def column(t, h):
    return torch.tanh(torch.cat([h, t.expand(len(h), 1)], -1)[:, 1:]) * torch.sin(t)


def one_time(t, h):
    return torch.tanh(torch.cat([h, t.reshape(1, 1).expand(len(h), 1)], -1)[:, 1:])


class Square:
    """h has as many numbers as there are systems: shapes alone do not show what t is multiplied with."""

    K = torch.linspace(-1, 1, 9, dtype=F64).reshape(3, 3)

    def __call__(self, t, h):
        return torch.tanh(h @ (self.K * t))


@pytest.mark.parametrize(
    ("f", "how"), [(component, "batch"), (column, "column"), (one_time, "vmap"), (Square(), "vmap")]
)
def test_the_shape_of_t_is_found_out(f, how):
    h0 = torch.randn(3, 3 if isinstance(f, Square) else 2, dtype=F64)
    h = odeint(f, h0, ROWS, options=OWN)
    assert set(field._by_f[f].values()) == {how}
    torch.testing.assert_close(h, odeint(f, h0, ROWS, options={**OWN, "batch_t": how}), rtol=0, atol=0)
    for i in range(3):
        each = odeint(f, h0[i : i + 1], row(ROWS, i))[:, 0]
        torch.testing.assert_close(h[: len(each), i], each, rtol=1e-9, atol=1e-11)


def test_systems_that_are_not_independent():
    with pytest.raises(errors.BadFunction, match="no batch normalisation"):
        odeint(lambda t, h: h - h.mean(0), H0, T, options=OWN)
    with pytest.raises(errors.BadFunction, match="broadcasts"):
        odeint(lambda t, h: h if t < 0.1 else -h, H0, ROWS, options=OWN)


def test_other_mistakes_are_still_explained():
    with pytest.raises(errors.BadFunction, match="takes one argument"):
        odeint(lambda h: h, H0, T, options=OWN)
    with pytest.raises(errors.BadShape, match=r"\(3, 1\)"):
        odeint(lambda t, h: h[:, :1], H0, T, options=OWN)


# --- States -----------------------------------------------------------------------------------------------------------


def test_tuples():
    """Each system's error is the largest of its tensors', as of one alone."""

    def f(t, state):
        x = state[0]
        return -x * t, x.square().sum(-1)

    x, s = torch.randn(3, 2, dtype=F64), torch.zeros(3, dtype=F64)
    together = solve(f, (x, s), ROWS, options=OWN, dense=False, rtol=1e-6, atol=(1e-8, 1e-7))
    for i in range(3):
        each = solve(f, (x[i], s[i]), row(ROWS, i), dense=False, rtol=1e-6, atol=(1e-8, 1e-7))
        assert each.stats.naccept == together.stats.systems.naccept[i]
        for a, b in zip(together.h, each.h):
            torch.testing.assert_close(a[: len(b), i], b, rtol=1e-9, atol=1e-11)


def test_complex_and_float32():
    w, h0 = tensor(1.0, 2.0, 3.0)[:, None], torch.randn(3, 2, dtype=torch.complex128)
    exact = h0 * torch.exp(1j * w * (torch.sin(ROWS.T) - torch.sin(ROWS[:, 0]))[..., None])
    torch.testing.assert_close(
        odeint(lambda t, h: 1j * w * h * torch.cos(t), h0, ROWS, options=OWN), exact, rtol=1e-6, atol=1e-6
    )
    h = odeint(Field(MU.float()), H0.float(), ROWS.float(), rtol=1e-5, atol=1e-5, options=OWN)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h.double(), odeint(Field(), H0, ROWS, options=OWN), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
@pytest.mark.parametrize("own", [False, True])
def test_nothing_to_solve(shape, own):
    t = (ROWS[: shape[0]] if own else T).clone().requires_grad_()
    h0 = torch.zeros(shape, dtype=F64, requires_grad=True)
    h = odeint(lambda t, h: -h, h0, t, options=OWN)
    h.sum().backward()
    assert h.shape == (4, *shape)
    assert h0.grad.shape == shape


def test_autocast():
    net = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = odeint(lambda t, h: 0.1 * net(h), H0.float(), ROWS.float(), rtol=1e-2, atol=1e-2, options=OWN)
    assert h.dtype == torch.float32


# --- Gradients --------------------------------------------------------------------------------------------------------


def gradients(f, h0, t, weights, inputs, **kwargs):
    h = odeint(f, h0, t, rtol=1e-5, atol=1e-7, **kwargs)
    return torch.autograd.grad((h * weights).sum(), inputs)


@pytest.mark.parametrize(
    ("method", "which", "adjoint"),
    covering(["dopri5", "dopri8", "bosh3", "vern7", "rodas5p"], ["shared", "rows", "rows backward"], [False, True]),
)
def test_gradients_are_those_of_each_alone(method, which, adjoint):
    t = TIMES[which]
    weights, mus = torch.randn(4, 3, 2, dtype=F64), MU / 6
    f, h0, t = Field(mus), H0.clone().requires_grad_(), t.clone().requires_grad_()
    kwargs = {"adjoint": adjoint, "method": method}
    got = gradients(f, h0, t, weights, (h0, f.mu, t), options=OWN, **kwargs)
    want = [torch.zeros_like(x) for x in got]
    for i in range(3):
        times, start, mu = (x.detach().clone().requires_grad_() for x in (row(t, i), H0[i], mus[i]))
        n = len(times)
        w = torch.cat([weights[: n - 1, i], weights[n - 1 :, i].sum(0, keepdim=True)])
        of_h0, of_mu, of_t = gradients(
            lambda t, h, m=mu: van_der_pol(t, h, m), start, times, w, (start, mu, times), **kwargs
        )
        want[0][i], want[1][i] = of_h0, of_mu
        want[2] += of_t if t.ndim == 1 else torch.nn.functional.pad(of_t, (0, 4 - n)) * (torch.arange(3) == i)[:, None]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_gradcheck_and_second_derivatives():
    rows = torch.stack([ROWS[0], tensor(0.5, 0.7, 0.9, 1.2)])

    def f(h0, mu, t):
        return odeint(lambda t, h: van_der_pol(t, h, mu), h0, t, options=OWN, rtol=1e-6, atol=1e-6)[1:]

    inputs = [x.clone().requires_grad_() for x in (H0[:2], MU[:2] / 6, rows)]
    assert torch.autograd.gradcheck(f, inputs, eps=1e-5, atol=1e-4)
    assert torch.autograd.gradgradcheck(
        lambda h0: f(h0, MU[:1] / 6, rows[:1])[-1], [H0[:1].clone().requires_grad_()], eps=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolating", "quadrature", "gauss", "forward"])
def test_other_adjoints(adjoint):
    """Right with one t for all, with common steps backward; refused where these cannot be."""

    def of(adjoint):
        f, h0 = Field(MU / 6), H0.clone().requires_grad_()
        h = odeint(f, h0, T, adjoint=adjoint, rtol=1e-6, atol=1e-8, options=OWN)
        return torch.autograd.grad(h.square().sum(), (h0, f.mu))

    for a, b in zip(of(adjoint), of("discrete")):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for more in ({"t": ROWS}, {"t": T, "options": NAN}, {"t": T[:2], "event_fn": lambda t, h: h[..., 0]}):
        with pytest.raises(errors.BadOption, match="common steps"):
            odeint(Field(), H0, adjoint=adjoint, **{"options": OWN, **more})


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "vern7"])
def test_graphs_that_are_kept_and_steps_taken_again_give_the_same(method, monkeypatch):
    def of():
        f, h0 = Field(MU / 3), H0.clone().requires_grad_()
        h = odeint(f, h0, ROWS, adjoint=True, method=method, rtol=1e-5, atol=1e-7, options=OWN)
        first = torch.autograd.grad(h.square().sum(), (h0, f.mu), retain_graph=True)
        return [*first, *torch.autograd.grad(h.square().sum(), (h0, f.mu))]

    kept = of()
    for budget in (0, 60_000):  # of none, and of some
        monkeypatch.setattr(sensitivity, "GRAPH_BUDGET", budget)
        for a, b in zip(kept, of()):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_function_that_changed_is_no_gradient(monkeypatch):
    monkeypatch.setattr(sensitivity, "GRAPH_BUDGET", 0)
    f = Field(MU / 6)
    f.scale = 1.0
    h = odeint(lambda t, h: f.scale * f(t, h), H0, T, adjoint=True, options=OWN)
    f.scale = 2.0
    with pytest.raises(errors.GradientUnavailable, match="other values"):
        h.sum().backward()


def test_what_rests_has_no_part_in_gradients():
    """f has no derivative at the end of one system, and none where another would have gone in a rejected step."""

    def f(t, h):
        return -k[:, None] * h.sqrt() * (1 + 0 * t)

    t = [[0.0, 1.0, 2.0], [0.0, 0.1], [0.0, 0.5]]
    for adjoint in (False, True):
        k = tensor(1.0, 2.0, 0.1).requires_grad_()
        h = odeint(f, tensor([1.2], [0.01], [1.0]), t, adjoint=adjoint, options=OWN)
        got = torch.autograd.grad(h[-1, 2].sum() + h[1, 0].sum(), k)[0]
        # h = (sqrt(h0) - k t / 2)^2
        want = tensor(-(1.2**0.5 - 0.5) * 1.0, 0.0, -(1 - 0.025) * 0.5)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


# --- Events -----------------------------------------------------------------------------------------------------------


def fall(t, h):
    return torch.stack([h[..., 1], torch.full_like(h[..., 1], -G)], -1)


def landed(h0):
    """When and how fast a body reaches the ground."""
    flight = (h0[:, 1] + (h0[:, 1] ** 2 + 2 * G * h0[:, 0]).sqrt()) / G
    return flight, h0[:, 1] - G * flight


BALLS = tensor([10.0, 0.0], [2.0, 3.0], [5.0, -1.0])


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "vern7", "rodas5p"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_each_has_its_event(method, adjoint):
    h0, t0 = BALLS.clone().requires_grad_(), tensor(0.0, 1.0, 2.0).requires_grad_()
    kwargs = {"adjoint": adjoint, "method": method, "options": OWN}
    event_t, h = odeint_event(fall, h0, t0, event_fn=lambda t, h: h[..., 0], **kwargs)
    flight, speed = landed(h0)
    assert event_t.shape == (3,)
    assert h.shape == (2, 3, 2)
    torch.testing.assert_close(event_t, t0 + flight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(h[1, :, 1], speed, rtol=1e-8, atol=1e-8)
    weights = tensor(1.0, -2.0, 0.5)
    got = torch.autograd.grad((weights * event_t).sum() + (weights**2 * h[1, :, 1]).sum(), (h0, t0))
    want = torch.autograd.grad((weights * (t0 + flight)).sum() + (weights**2 * speed).sum(), (h0, t0))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_several_event_functions_of_each_in_either_direction_of_time():
    def event_fn(t, h):
        return torch.stack([h[..., 0], h[..., 0] - 11.0], -1)

    h0 = tensor([10.0, 8.0], [10.0, 1.0])
    event_t, _ = odeint_event(fall, h0, 0.0, event_fn=event_fn, options=OWN)
    torch.testing.assert_close(
        event_t, torch.stack([(8 - (64 - 2 * G) ** tensor(0.5)[0]) / G, landed(h0)[0][1]]), rtol=1e-7, atol=1e-7
    )
    back, _ = odeint_event(fall, h0, 0.0, event_fn=event_fn, reverse_time=True, options=OWN)
    torch.testing.assert_close(back, (h0[:, 1] - (h0[:, 1] ** 2 + 2 * G * h0[:, 0]).sqrt()) / G, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("adjoint", [False, True])
def test_without_an_event(adjoint):
    h0 = tensor([10.0, 0.0], [-2.0, -3.0], [5.0, -1.0]).requires_grad_()
    options = {**OWN, "max_num_steps": 60}
    event_t, h = odeint_event(fall, h0, 0.0, event_fn=lambda t, h: h[..., 0], adjoint=adjoint, options=options)
    assert event_t.isnan().tolist() == [False, True, False]
    assert h[1].isnan().any(-1).tolist() == [False, True, False]
    met = event_t.isfinite()
    got = torch.autograd.grad(event_t[met].sum() + h[1, met].sum(), h0)[0]
    flight, speed = landed(h0[met])
    want = torch.autograd.grad((flight + speed).sum(), h0)[0]
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("adjoint", [False, True])
def test_an_event_function_with_a_parameter_of_its_own(adjoint):
    height = tensor(1.0, 0.5, 2.0).requires_grad_()
    event_t, h = odeint_event(fall, BALLS, 0.0, event_fn=lambda t, h: h[..., 0] - height, adjoint=adjoint, options=OWN)
    got = torch.autograd.grad(event_t.sum() + h[1].sum(), height)[0]
    flight, speed = landed(torch.stack([BALLS[:, 0] - height, BALLS[:, 1]], 1))
    want = torch.autograd.grad((flight + speed + height).sum(), height)[0]
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_events_as_if_alone():
    event = lambda t, h: h[..., 0] - 0.1 * torch.cos(t)  # noqa: E731
    with torch.no_grad():
        event_t, h = odeint(Field(MU / 4), H0, T[:2], event_fn=event, options=OWN)
    for i in range(3):
        t, each = odeint(lambda t, h, i=i: van_der_pol(t, h, MU[i] / 4), H0[i], T[:2], event_fn=event)
        torch.testing.assert_close(event_t[i], t, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(h[1, i], each[1], rtol=1e-9, atol=1e-9)


# --- Failures ---------------------------------------------------------------------------------------------------------


def explode(t, h):
    return h**2


@pytest.mark.parametrize("adjoint", [False, True])
def test_one_that_blows_up_does_not_sink_the_others(adjoint):
    h0, t = tensor([1.0], [0.2], [0.5]).requires_grad_(), tensor(0.0, 0.5, 1.5, 3.0)
    solution = solve(explode, h0, t, adjoint=adjoint, options=NAN, dense=False)
    exact = h0 / (1 - h0 * t[:, None, None])
    ok = solution.h.isfinite()
    assert ok[..., 0].tolist() == [[True] * 3, [True] * 3, [False, True, True], [False, True, False]]
    torch.testing.assert_close(solution.h[ok], exact[ok], rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(h[ok].sum(), h0)[0] for h in (solution.h, exact))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    stats = solution.stats.systems
    assert stats.failed.tolist() == [True, False, True]
    assert sorted(stats.why) == [0, 2]
    assert "t=1" in stats.why[0]


def test_the_default_raises_and_names_the_system():
    with pytest.raises((errors.StepSizeTooSmall, errors.NonFiniteState), match="system 1 of the batch"):
        odeint(explode, tensor([0.2], [1.0]), tensor(0.0, 3.0), options=OWN)
    with pytest.raises(errors.MaxStepsReached, match="system 2 of the batch"):
        odeint(Field(), H0, T, rtol=1e-5, atol=1e-5, options={**OWN, "max_num_steps": 30})


@pytest.mark.parametrize("adjoint", [False, True])
def test_too_many_steps_and_a_start_that_is_nan(adjoint):
    h = solve(Field(), H0, T, rtol=1e-5, atol=1e-5, adjoint=adjoint, dense=False, options={**NAN, "max_num_steps": 30})
    assert h.stats.systems.failed.tolist() == [False, False, True]
    assert h.h[-1].isfinite().all(-1).tolist() == [True, True, False]
    start = torch.where(tensor(0.0, 1.0, 0.0)[:, None] == 1, math.nan, H0).requires_grad_()
    f = Field(MU / 6)
    h = odeint(f, start, ROWS, adjoint=adjoint, options=NAN)
    assert h[1:].isfinite().all(0).all(-1).tolist() == [True, False, True]
    by_h0, by_mu = torch.autograd.grad(h[:, [0, 2]].sum(), (start, f.mu))
    assert by_h0.isfinite().all()
    assert by_mu.isfinite().all()
    assert by_mu[1] == 0


def test_one_that_is_stiff_is_named():
    rates = tensor(1.0, 1e4)[:, None]
    with pytest.warns(UserWarning, match="system 1 of the batch is stiff"):
        odeint(
            lambda t, h: -rates * (h - torch.cos(t)),
            torch.zeros(2, 1, dtype=F64),
            tensor(0.0, 1.0),
            rtol=1e-4,
            atol=1e-4,
            options=OWN,
        )


@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
def test_inference_mode(method):
    f = Field(MU / 6)
    with torch.no_grad():
        want = odeint(f, H0, ROWS, method=method, options=OWN)
    with torch.inference_mode():
        torch.testing.assert_close(odeint(f, H0, ROWS, method=method, options=OWN), want)


# --- Dense output and transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rodas5p"])
def test_dense_output(method):
    kwargs = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    with torch.no_grad():
        solution = solve(Field(MU / 4), H0, ROWS, options=OWN, **kwargs)
    times = torch.stack([torch.linspace(float(x[0]), float(x[-1]), 7, dtype=F64) for x in ROWS])
    h = solution.interpolate(times)
    assert h.shape == (7, 3, 2)
    for i in range(3):
        each = solve(lambda t, h, i=i: van_der_pol(t, h, MU[i] / 4), H0[i], row(ROWS, i), **kwargs)
        torch.testing.assert_close(h[:, i], each.interpolate(times[i]), rtol=1e-7, atol=1e-8)
    assert solution.interpolate(0.6).shape == (3, 2)
    with pytest.raises(errors.BadTime, match="system 1"):
        solution.interpolate(1.2)


def test_dense_output_has_a_gradient():
    f, times = Field(MU / 6), torch.stack([torch.linspace(float(x[0]), float(x[-1]), 5, dtype=F64) for x in ROWS])
    times[1, 1:] = torch.linspace(0.51, 0.89, 4, dtype=F64)
    times.requires_grad_()
    a = solve(f, H0, ROWS, options=OWN).interpolate(times)
    b = odeint(f, H0, times, options=OWN)
    (of_mu, of_times), (mu, t) = (torch.autograd.grad(h[1:-1].square().sum(), (f.mu, times)) for h in (a, b))
    torch.testing.assert_close(of_mu, mu, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(of_times[:, 1:-1], t[:, 1:-1], rtol=1e-3, atol=1e-4)


def test_torch_func():
    load_forward_mode()  # torch warns of a deprecation of its own

    def end(h0):
        return odeint(lambda t, h: van_der_pol(t, h, MU / 6), h0, ROWS, rtol=1e-5, options=OWN)[-1]

    h0 = H0.clone().requires_grad_()
    want = torch.autograd.grad(end(h0).square().sum(), h0)[0]
    torch.testing.assert_close(torch.func.grad(lambda h: end(h).square().sum())(H0), want)
    torch.testing.assert_close(torch.func.jacfwd(end)(H0), torch.func.jacrev(end)(H0))
    both = torch.func.vmap(end)(torch.stack([H0, H0 + 1]))
    torch.testing.assert_close(both, torch.stack([end(H0), end(H0 + 1)]), rtol=1e-4, atol=1e-4)
    with pytest.raises(errors.BadOption, match="vmap"):
        torch.func.grad(lambda h: odeint_event(fall, h, 0.0, event_fn=lambda t, h: h[..., 0], options=OWN)[0].sum())(H0)


# --- What has common steps --------------------------------------------------------------------------------------------


def test_methods_with_common_steps_say_so():
    stats = solve(Field(), H0, T[:2], method="radau5", rtol=1e-3, options=OWN, dense=False).stats
    assert "common steps: radau5" in stats.reason
    assert stats.systems is None
    ask = {"rows": {"t": ROWS}, "nan": {"options": NAN}, "event": {"t": T[:2], "event_fn": lambda t, h: h[..., 0]}}
    for more in ask.values():
        with pytest.raises(errors.BadOption, match="dopri5"):
            odeint(Field(), H0, **{"t": T, "method": "bdf", "options": OWN, **more})


def test_callbacks_are_not_called():
    f = Field()
    f.callback_step = lambda t, y, dt: pytest.fail("it was called")
    with pytest.warns(UserWarning, match="not called"):
        odeint(f, H0, T, options=OWN)


WRONG = {
    "a turn": ([[0.0, 1.0, 0.5]] * 3, "strictly"),
    "two directions": ([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], "strictly"),
    "a repeated time": ([[0.0, 0.5, 0.5, 1.0]] * 3, "repeats"),
    "another batch": (ROWS[:2], "a row for each"),
    "NaN": ([[0.0, math.nan]] * 3, "NaN"),
    "whole numbers": (torch.tensor([[0, 1]] * 3), "floating"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_times(case):
    t, match = WRONG[case]
    with pytest.raises((errors.BadTime, errors.BadDtype), match=match):
        odeint(Field(), H0, t, options=OWN)


def test_wrong_options():
    with pytest.raises(errors.BadTime, match="batch_dims"):
        odeint(Field(), H0, ROWS)
    for options in ({"on_failure": "nan"}, {**OWN, "on_failure": "skip"}, {**OWN, "batch_t": "row"}):
        with pytest.raises(errors.BadOption):
            odeint(Field(), H0, T, options=options)
    with pytest.raises(errors.BadOption, match="same batch"):
        odeint(lambda t, h: h, (H0, H0[:2]), T, options=OWN)

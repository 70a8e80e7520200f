"""States on a CUDA device, with each engine: as on the CPU. What Julia does there without a device is tested in
`tests/bridge/test_places.py`."""

import math
import warnings

import pytest
import torch
from problems import GENERAL

from pyjlode import errors, odeint, odeint_event, solve
from pyjlode.bridge import runtime
from pyjlode.nn import CNF, TimeMLP

pytestmark = pytest.mark.cuda

F32, F64 = torch.float32, torch.float64
T = torch.linspace(0, 1, 4, dtype=F64)


@pytest.fixture(params=["torch", "julia"])
def engine(request):
    if request.param == "julia":
        request.getfixturevalue("julia")
        if why := runtime.without("CUDA"):
            pytest.skip(why)
    return request.param


class MLP(torch.nn.Module):
    def __init__(self, dtype=F64, width=16):
        super().__init__()
        layers = torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 2)
        self.net = torch.nn.Sequential(*layers).to(dtype)

    def forward(self, t, h):
        return self.net(h) * torch.cos(t)


def stiff(t, h):
    """Robertson's reaction."""
    x, y, z = h.unbind(-1)
    a, b, c = 0.04 * x, 1e4 * y * z, 3e7 * y * y
    return torch.stack([b - a, a - b - c, c], -1)


def on_both(run):
    """What `run(device)` gives, on the CPU."""
    return run("cpu"), [x.cpu() for x in run("cuda")]


@pytest.mark.parametrize("dtype", [F32, F64, torch.complex64])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "rk4"])
def test_solutions(method, dtype, engine):
    options = {"step_size": 0.01} if method == "rk4" else {}
    rate = -0.5 + (1j if dtype.is_complex else 0)

    def run(device):
        h0 = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], device=device).to(dtype)
        return [odeint(lambda t, h: rate * h * torch.cos(t), h0, T.to(device), method=method, options=options,
                       engine=engine, rtol=1e-5, atol=1e-6)]  # fmt: skip

    (here,), (there,) = on_both(run)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adjoint", [False, *GENERAL])
def test_gradients(adjoint, engine):
    if engine == "julia" and adjoint is False:
        pytest.skip("the Julia engine is not followed by autograd")

    def run(device):
        torch.manual_seed(1)
        net = MLP().to(device)
        h0 = torch.tensor([[1.0, 0.2], [0.3, -0.4]], dtype=F64, device=device, requires_grad=True)
        t = T.to(device).requires_grad_()
        h = odeint(net, h0, t, adjoint=adjoint, engine=engine, method="dopri5", rtol=1e-8, atol=1e-9)
        return torch.autograd.grad(h.square().sum(), (h0, t, *net.parameters()))

    for here, there in zip(*on_both(run)):
        torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["rodas5p", "radau5", "kvaerno5", "bdf", "auto"])
def test_stiff(method, engine):
    if (method, engine) == ("auto", "julia"):
        pytest.skip("'auto' is the native engine's")

    def run(device):
        h0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64, device=device)
        return [odeint(stiff, h0, torch.tensor([0.0, 40.0], device=device), method=method, engine=engine, rtol=1e-6,
                       atol=1e-10)[-1]]  # fmt: skip

    (here,), (there,) = on_both(run)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-8)


def test_batches_of_stiff_systems():
    def run(device):
        h0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64, device=device).repeat(64, 1)
        options = {"batch_dims": 1}
        return [odeint(stiff, h0, torch.tensor([0.0, 1.0]), method="rodas5p", options=options, engine="torch")[-1]]

    (here,), (there,) = on_both(run)
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)


def test_events(engine):
    def run(device):
        rate = torch.tensor(0.7, dtype=F64, device=device, requires_grad=True)
        t, _ = odeint_event(lambda t, h: -rate * h, torch.ones(1, dtype=F64, device=device), torch.tensor(0.0),
                            event_fn=lambda t, h: h[0] - 0.5, engine=engine, adjoint=True, rtol=1e-9, atol=1e-10,
                            )  # fmt: skip
        return t.detach(), *torch.autograd.grad(t, rate)

    _, there = on_both(run)
    assert float(there[0]) == pytest.approx(math.log(2) / 0.7, rel=1e-6)
    assert float(there[1]) == pytest.approx(-math.log(2) / 0.49, rel=1e-5)


def test_nothing_is_copied(engine):
    """f is shown the solver's own stage arrays: few addresses, that come again and again."""
    if engine == "torch":
        pytest.skip("there h is what the step made")
    seen = []

    def f(t, h):
        assert h.device.type == "cuda"
        seen.append(h.data_ptr())
        return -h

    odeint(f, torch.ones(1000, dtype=F64, device="cuda"), T, engine=engine, rtol=1e-8, atol=1e-8)
    assert 2 < len(set(seen)) < len(seen) / 2


def test_a_side_stream_beside_other_work(engine):
    """The solve waits for what its stream has to do, and for nothing else; what comes after waits for the solve."""
    h0 = torch.zeros(1 << 20, device="cuda")
    work = torch.randn(2048, 2048, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x = work
        for _ in range(30):
            x = x @ work / 2048**0.5
        h0.fill_(1.0)  # late
        h = odeint(lambda t, h: -h, h0, T, engine=engine, rtol=1e-5, atol=1e-6)
        last = h[-1] * 2
    for _ in range(30):  # meanwhile, on the first stream
        work = work @ work / 2048**0.5
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(last, torch.full_like(last, 2 * math.exp(-1)), rtol=1e-4, atol=0)


def test_errors_come_through(engine):
    def f(t, h):
        if t > 0.5:
            raise ZeroDivisionError("of f's own")
        return -h

    with pytest.raises(ZeroDivisionError, match="of f's own"):
        odeint(f, torch.ones(2, device="cuda"), T, engine=engine)
    with pytest.raises(KeyboardInterrupt):
        odeint(lambda t, h: (_ for _ in ()).throw(KeyboardInterrupt), torch.ones(2, device="cuda"), T, engine=engine)
    with pytest.raises(errors.SolveError):
        odeint(lambda t, h: h * h, torch.ones(2, device="cuda"), 2 * T, engine=engine)
    torch.testing.assert_close(odeint(lambda t, h: -h, torch.ones(2, device="cuda"), T, engine=engine)[-1].cpu(),
                               torch.full((2,), math.exp(-1)), rtol=1e-5, atol=1e-6)  # fmt: skip


def test_one_wait_for_the_device_in_a_step():
    """Of the native engine: the norm of the error is read, and nothing else."""

    def f(t, h):
        return torch.sin(h)

    h0 = torch.ones(64, device="cuda")
    odeint(f, h0, T[[0, -1]], engine="torch", rtol=1e-6, atol=1e-6)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution = solve(f, h0, 40 * T[[0, -1]], engine="torch", dense=False, rtol=1e-6, atol=1e-6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(w.message) for w in caught)
    steps = solution.stats.naccept + solution.stats.nreject
    assert waits <= steps + 20


def test_autocast_and_scaled_gradients(engine):
    net, h0 = MLP(F32).cuda(), torch.randn(64, 2, device="cuda")
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            h = odeint(net, h0, T, adjoint=True, engine=engine, rtol=1e-3, atol=1e-3)
            loss = h[-1].square().mean()
        assert h.dtype == F32
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_normalizing_flow(engine):
    def run(device):
        torch.manual_seed(0)
        flow = CNF(TimeMLP([2, 16, 2]).to(F64), 2, engine=engine, rtol=1e-7, atol=1e-7).to(device)
        x = torch.tensor([[0.1, 0.2], [-0.5, 1.0]], dtype=F64, device=device)
        loss = flow.log_prob(x).mean()
        return [loss.detach(), *torch.autograd.grad(loss, flow.parameters())]

    for here, there in zip(*on_both(run)):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


def test_memory_goes_with_the_solve(engine):
    f = MLP(F32, 64).cuda()
    h0 = torch.randn(1 << 16, 2, device="cuda")

    def step():
        odeint(f, h0, T, adjoint=True, engine=engine)[-1].sum().backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)

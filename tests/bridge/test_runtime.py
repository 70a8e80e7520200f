"""Julia in the process: its start, its lock, signals, forks, and its end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.usefixtures("julia")

SOLVE = """
import torch, pyjlode
f = lambda t, h: -h
h0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
solve = lambda **k: pyjlode.odeint(f, h0, t, engine="julia", **k)
"""


def python(code, *flags):
    return subprocess.run([sys.executable, *flags, "-c", SOLVE + code], capture_output=True, text=True, timeout=300)


def test_torch_first_starts_julia_without_a_word_and_the_process_ends_cleanly():
    done = python("print(solve()[-1].tolist())", "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert abs(json.loads(done.stdout)[0] - 0.36788) < 1e-4


def test_importing_and_looking_starts_nothing():
    done = python("from pyjlode.bridge import runtime; runtime.find(); import sys; print('juliacall' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_a_fork_is_told_so():
    code = """
import os
solve()
child = os.fork()
if child == 0:
    try:
        solve()
    except pyjlode.errors.EngineUnavailable as error:
        assert "spawn" in str(error)
        print("told", flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(solve().shape)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "told"


def test_in_a_fork_auto_goes_native_even_while_the_parent_is_in_julia():
    code = """
import os, threading, time, torch, pyjlode
def slow(t, h):
    time.sleep(0.005)
    return -h
solve()
del os.environ["PYJLODE_ENGINE"]
busy = threading.Thread(target=lambda: pyjlode.odeint(slow, h0, torch.linspace(0, 1, 200), engine="julia"))
busy.start()
time.sleep(0.1)
for _ in range(3):
    child = os.fork()
    if child == 0:
        solution = pyjlode.solve(f, h0, t)
        assert solution.stats.engine == "torch" and "fork" in solution.stats.reason
        print("native", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
busy.join()
print(pyjlode.solve(f, h0, t).stats.engine)
"""
    env = {**os.environ, "PYJLODE_ENGINE": "auto"}
    done = subprocess.run([sys.executable, "-c", SOLVE + code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["native", "native", "native", "julia"]


def test_an_exception_of_a_signal_handler_is_never_lost():
    """It may come before the first statement of a callback, where nothing in it can catch it."""
    code = """
import random, signal
class Late(TimeoutError):
    pass
def late(*args):
    raise Late
signal.signal(signal.SIGALRM, late)
f = lambda t, h: torch.cos(20 * t) - h
h0, t = torch.zeros(2, dtype=torch.float64), torch.linspace(0, 5, 11, dtype=torch.float64)
solve = lambda: pyjlode.odeint(f, h0, t, engine="julia", compile=False, rtol=1e-6, atol=1e-8)
want, raised, wrong = solve(), 0, 0
for i in range(300):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-2 * random.random())
        h = solve()
        wrong += not torch.equal(h, want)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        raised += 1
print(raised, wrong)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr, done.stderr
    raised, wrong = map(int, done.stdout.split())
    assert wrong == 0
    assert raised > 50


def test_a_time_limit_in_the_start_of_julia_waits_for_its_end():
    code = """
import signal
def late(*args):
    raise TimeoutError
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    solve()
except TimeoutError:
    print("late", solve()[-1, 0].item())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    word, number = done.stdout.split()
    assert word == "late"
    assert abs(float(number) - 0.36788) < 1e-4


def test_an_exception_in_a_trace_leaves_nothing_behind():
    code = """
import random, signal
from pyjlode.capture import held as capture
class Late(Exception):
    pass
def late(*args):
    raise Late
class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.nfe, self.w = 0, torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("n", torch.tensor(0.0, dtype=torch.float64))
    def forward(self, t, h):
        self.nfe += 1
        self.n += 1
        return torch.cos(t) - self.w * h
solve()
signal.signal(signal.SIGALRM, late)
raised = 0
for i in range(60):
    f = Counting()
    capture.forget()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3 + 0.15 * random.random())
        pyjlode.odeint(f, h0, t, engine="julia", compile=True, adjoint=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        raised += 1
    assert type(f.nfe) is int and type(f.n) is torch.Tensor, (f.nfe, f.n)
    assert set(f._buffers) == {"n"} and float(f.n) >= 0 and list(f._parameters) == ["w"]
print(raised)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_ctrl_c_in_a_solve():
    code = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests run in the background of a shell
def slow(t, h):
    time.sleep(0.01)
    return -h
solve()
print("ready", flush=True)
try:
    pyjlode.odeint(slow, h0, torch.tensor([0.0, 1e6], dtype=torch.float64), engine="julia", options={"max_step": 1.0})
except KeyboardInterrupt:
    print("interrupted", solve().shape, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", SOLVE + code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out.startswith("interrupted")
    assert process.returncode == 0


@pytest.mark.parametrize("gradient", [False, True])
def test_a_thousand_solves_leave_nothing_behind(gradient):
    code = f"""
gradient = {gradient}
h0.requires_grad_(gradient)
import gc, resource, statistics, time
from pyjlode.bridge import runtime
def rounds(n):
    walls = []
    for _ in range(n):
        start = time.perf_counter()
        h = solve(adjoint=gradient, rtol=1e-4, atol=1e-6)
        if gradient:
            h[-1].sum().backward()
        walls.append(time.perf_counter() - start)
    return statistics.median(walls)
def state():
    gc.collect()
    with runtime.julia():
        runtime.evaluate("GC.gc(true)")
        live = runtime.evaluate("Base.gc_live_bytes()")
    with open("/proc/self/statm") as f:
        return live, int(f.read().split()[1]) * resource.getpagesize()
rounds(200)
live, rss = state()
first, last = rounds(500), rounds(500)
live2, rss2 = state()
print(live2 - live, rss2 - rss, last / first)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    live, rss, ratio = map(float, done.stdout.split())
    assert live < 5e5
    assert rss < 3e7
    assert ratio < 1.5


def test_doctor_finds_both_engines_in_agreement():
    done = subprocess.run(
        [sys.executable, "-m", "pyjlode", "doctor", "--json"], capture_output=True, text=True, timeout=300
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["problems"] == []
    assert report["difference"] < 1e-6
    assert report["versions"]["SciMLSensitivity"]
    assert set(report["seconds"]) == {"juliacall", "solvers", "sensitivity"}


def test_the_julia_package_alone(julia):
    root = os.path.join(os.path.dirname(__file__), "..", "..", "julia")
    done = subprocess.run(
        [
            julia.executable,
            f"--project={julia.project}",
            "--startup-file=no",
            os.path.join(root, "test", "runtests.jl"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]

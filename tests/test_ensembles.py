"""Ensembles: what comes back is what each system alone gives, whoever works, dies or is interrupted."""

import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import dask
import distributed
import ensemble_work as work
import pytest
import torch

import pyjlode
from pyjlode import errors, tasks
from pyjlode.ensembles import ensemble, ensemble_map

T = torch.linspace(0, 2, 5, dtype=torch.float64)
ONES = torch.ones(20, 1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Other processes find `ensemble_work` beside this file."""
    here = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))


def lorenz_problem(number):
    h0 = 1 + torch.arange(3.0 * number, dtype=torch.float64).reshape(number, 3) / number
    return h0, {"rho": torch.linspace(0, 28, number, dtype=torch.float64)}


@pytest.mark.parametrize("executor", [None, 2, lambda: ThreadPoolExecutor(2)], ids=["here", "processes", "threads"])
def test_each_system_is_solved_as_if_alone(executor):
    h0, params = lorenz_problem(30)
    made = ensemble(work.lorenz, h0, T, params=params, executor=executor, chunk=7, method="tsit5", rtol=1e-6)
    assert made.h.shape == (5, 30, 3)
    assert not made.failed.any()
    for i in (0, 6, 7, 29):
        rho = params["rho"][i]
        alone = pyjlode.solve(
            lambda t, h, rho=rho: work.lorenz(t, h, {"rho": rho}), h0[i], T, method="tsit5", rtol=1e-6, engine="torch"
        )
        torch.testing.assert_close(made.h[:, i], alone.h, rtol=1e-9, atol=1e-9)
        assert made.naccept[i] == alone.stats.naccept
        assert made.nfe[i] > 6 * made.naccept[i]


def test_states_of_several_tensors_rows_of_times_and_events():
    h0 = {"a": ONES.clone(), "b": torch.zeros(20, 2)}
    t = torch.linspace(0, 1, 3)[None] * torch.linspace(1, 2, 20)[:, None]
    made = ensemble(lambda t, h: {"a": -h["a"], "b": torch.ones_like(h["b"])}, h0, t, chunk=6)
    torch.testing.assert_close(made.h["a"][:, :, 0].double(), (-t.T.double()).exp(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.h["b"][:, :, 1], t.T, rtol=1e-5, atol=1e-6)
    assert made.h["b"].dtype == torch.float32

    rates = torch.linspace(0.5, 3, 20, dtype=torch.float64)
    event = ensemble(
        work.decay, ONES, [0.0, 10.0], params=rates, event_fn=lambda t, h, rate: h[:, 0] - 0.5, chunk=6, rtol=1e-9
    )
    torch.testing.assert_close(event.event_t.double(), math.log(2) / rates, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(event.h[1], torch.full_like(ONES, 0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "radau5"])  # steps of their own, and common ones
def test_systems_that_fail_are_named_and_disturb_no_other(method):
    a = torch.full((6,), 0.1, dtype=torch.float64)
    a[[1, 5]] = 10.0  # they blow up at t = 0.1
    with pytest.warns(UserWarning, match=r"2 of 6 systems failed; the first is number 1: StepSizeTooSmall: \w+: at t="):
        made = ensemble(work.blows_up, ONES[:6], T, params=a, chunk=3, method=method)
    assert made.failed.nonzero()[:, 0].tolist() == [1, 5] == list(made.why)
    assert made.h[:, made.failed].isnan().all()
    right = 1 / (1 - 0.1 * T)
    torch.testing.assert_close(made.h[:, ~made.failed, 0], right[:, None].expand(5, 4), rtol=1e-5, atol=1e-6)
    assert "2 failed" in repr(made)


def on_loky():
    return pytest.importorskip("joblib.externals.loky").get_reusable_executor(2)


@pytest.mark.parametrize("executor", [2, pytest.param(on_loky, marks=pytest.mark.slow)])
def test_a_worker_that_dies_costs_only_the_system_that_kills_it(executor):
    deadly = torch.zeros(6, dtype=torch.float64)
    deadly[4] = 1
    with pytest.warns(UserWarning, match="1 of 6 systems failed; the first is number 4: the worker died"):
        made = ensemble(work.kills, ONES[:6], T, params=deadly, executor=executor, chunk=3, retries=0, rtol=1e-6)
    assert list(made.why) == [4]
    right = (-T).exp()[:, None].expand(5, 5)
    torch.testing.assert_close(made.h[:, ~made.failed, 0], right, rtol=1e-5, atol=1e-6)


def test_a_worker_that_dies_once_costs_nothing(tmp_path):
    path = torch.tensor(list(str(tmp_path / "died").encode()), dtype=torch.uint8)
    made = ensemble(work.kills_once, ONES, T, params=path.expand(20, -1), executor=1, chunk=10, rtol=1e-6)
    assert not made.failed.any()
    torch.testing.assert_close(made.h[-1, :, 0], (-T[-1]).exp().expand(20), rtol=1e-5, atol=1e-6)


def test_where_all_workers_die_the_call_ends(monkeypatch):
    monkeypatch.setattr(tasks, "_LOST", 2)
    with pytest.raises(errors.WorkerDied, match="no worker"):
        ensemble(work.kills, ONES, T, params=torch.ones(20, dtype=torch.float64), executor=1, chunk=1, retries=0)


def test_an_executor_of_the_users_that_breaks_loses_what_it_had_and_no_more():
    deadly = torch.zeros(20, dtype=torch.float64)
    deadly[19] = 1
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.warns(UserWarning, match=r"executor=lambda: \.\.\."),
    ):
        made = ensemble(work.kills, ONES, T, params=deadly, executor=pool, chunk=2, retries=0)
    assert 19 in made.why
    torch.testing.assert_close(made.h[-1, :10, 0], (-T[-1]).exp().expand(10), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("executor", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mistake_in_f_is_raised_as_such(executor):
    with pytest.raises(KeyError, match="no such thing") as caught:
        ensemble(work.mistaken, ONES, T, executor=executor)
    if executor:
        assert "ensemble_work.py" in str(caught.value.__cause__)  # the line in the worker


class Interrupted(ThreadPoolExecutor):
    """Never does its third task, and is stopped by Ctrl-C when three others are in `directory`."""

    def __init__(self, directory):
        super().__init__(1)
        self.directory, self.tasks = directory, 0

    def submit(self, *args):
        self.tasks += 1
        if self.tasks == 3:
            threading.Thread(target=self.interrupt).start()
            return Future()
        return super().submit(*args)

    def interrupt(self):
        while len([*self.directory.glob("*.npz")]) < 3:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.fixture
def interruptible():
    """Ctrl-C is a KeyboardInterrupt, which the workers of pytest-xdist switch off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_was_interrupted_goes_on_from_its_directory(tmp_path, interruptible):
    h0, params = lorenz_problem(20)
    settings = {"params": params, "chunk": 5, "rtol": 1e-6, "directory": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        ensemble(work.lorenz, h0, T, executor=Interrupted(tmp_path / "kept"), **settings)
    before = sorted((tmp_path / "kept").glob("*.npz"))
    assert len(before) == 3
    stamps = [x.stat().st_mtime_ns for x in before]
    made = ensemble(work.lorenz, h0, T, executor=lambda: ThreadPoolExecutor(2), **settings)
    whole = ensemble(work.lorenz, h0, T, params=params, chunk=5, rtol=1e-6)
    assert torch.equal(made.h, whole.h)
    assert torch.equal(made.naccept, whole.naccept)
    assert [x.stat().st_mtime_ns for x in before] == stamps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ensemble(work.lorenz, h0, T, **settings).h, whole.h)  # all from files


def test_a_directory_of_another_ensemble_is_refused(tmp_path):
    h0, params = lorenz_problem(4)
    ensemble(work.lorenz, h0, T, params=params, directory=tmp_path / "kept")
    others = [
        (work.lorenz, h0 + 1, T, {"params": params}),
        (work.lorenz, h0, T + 1, {"params": params}),
        (work.lorenz, h0, T, {"params": {"rho": params["rho"] + 1}}),
        (work.lorenz, h0, T, {"params": params, "rtol": 1e-3}),
        (lambda t, h, p: work.lorenz(t, h, p), h0, T, {"params": params}),
        (lambda t, h, p: -work.lorenz(t, h, p), h0, T, {"params": params}),
    ]
    for f, h, t, how in others:
        with pytest.raises(errors.BadOption, match="holds the results of another ensemble"):
            ensemble(f, h, t, directory=tmp_path / "kept", **how)
    (tmp_path / "mine.txt").write_text("a user's")
    with pytest.raises(errors.BadOption, match="is not empty, and holds no ensemble"):
        ensemble(work.lorenz, h0, T, params=params, directory=tmp_path)


@pytest.mark.parametrize("change", ["weight", "code", "number"])
def test_what_f_holds_belongs_to_the_ensemble(change, tmp_path):
    def make(rate, sign, weight):
        net = torch.nn.Linear(1, 1).double()
        torch.nn.init.constant_(net.weight, weight)
        torch.nn.init.zeros_(net.bias)
        return (lambda t, h: rate * net(h)) if sign > 0 else (lambda t, h: -rate * net(h))

    ensemble(make(1.0, 1, 1.0), ONES, T, directory=tmp_path / "kept")
    ensemble(make(1.0, 1, 1.0), ONES, T, directory=tmp_path / "kept")
    other = {"weight": (1.0, 1, 2.0), "code": (1.0, -1, 1.0), "number": (2.0, 1, 1.0)}[change]
    with pytest.raises(errors.BadOption, match="another ensemble"):
        ensemble(make(*other), ONES, T, directory=tmp_path / "kept")


def test_bad_input_says_what_to_do():
    with pytest.raises(errors.BadShape, match="different numbers of systems: \\[3, 20\\]"):
        ensemble(work.decay, ONES, T, params=torch.ones(3))
    with pytest.raises(errors.BadShape, match="a part for each of N systems; got float"):
        ensemble(work.decay, ONES, T, params=1.0)
    with pytest.raises(errors.BadShape, match="holds no systems"):
        ensemble(work.decay, torch.ones(0, 1), T)
    with pytest.raises(errors.BadOption, match="neither a positive number of processes"):
        ensemble(work.decay, ONES, T, params=ONES[:, 0], executor="dask")
    with pytest.raises(errors.BadOption, match="positive number of systems"):
        ensemble(work.decay, ONES, T, params=ONES[:, 0], chunk=0)
    with pytest.raises(errors.BadOption, match="DistributedDataParallel"):
        ensemble(work.decay, ONES, T, params=ONES[:, 0].clone().requires_grad_())
    with pytest.raises(errors.BadOption, match="no gradients"):
        ensemble(work.decay, ONES, T, params=ONES[:, 0], adjoint=True)
    lock = threading.Lock()
    with pytest.raises(errors.BadOption, match="cannot be sent to another process"):
        ensemble(lambda t, h: (lock, -h)[1], ONES, T, executor=1)


def data_sets(rates):
    t = torch.linspace(0, 2, 6, dtype=torch.float64)
    return [(t, torch.exp(-rate * t)) for rate in rates]


@pytest.mark.parametrize("executor", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_fits_are_shared_out(executor, tmp_path):
    rates = [0.3, 1.1]
    found = ensemble_map(work.fit, data_sets(rates), executor=executor, directory=tmp_path / "fits")
    assert found == pytest.approx(rates, rel=1e-4)
    assert len(list((tmp_path / "fits").glob("*.pkl"))) == 2
    assert ensemble_map(work.fit, data_sets(rates), directory=tmp_path / "fits") == found


def test_a_fit_that_raises_leaves_its_exception():
    items = [*data_sets([0.3]), None, *data_sets([0.7])]
    with pytest.warns(UserWarning, match="1 of 3 items failed; the first is number 1: ValueError: no data"):
        found = ensemble_map(work.fit_or_fail, items, chunk=2)
    assert found[::2] == pytest.approx([0.3, 0.7], rel=1e-4)
    assert isinstance(found[1], ValueError)
    with pytest.raises(ValueError, match="no data"):
        ensemble_map(work.fit_or_fail, [None, None])


def test_on_dask_with_a_worker_killed():
    deadly = torch.zeros(4, dtype=torch.float64)
    deadly[1] = 1
    here = {"dashboard_address": None, "silence_logs": 50, "host": "127.0.0.1"}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **here) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor()
        h0, params = lorenz_problem(20)
        made = ensemble(work.lorenz, h0, T, params=params, executor=executor, chunk=4, rtol=1e-6)
        assert torch.equal(made.h, ensemble(work.lorenz, h0, T, params=params, chunk=4, rtol=1e-6).h)
        with pytest.warns(UserWarning, match="1 of 4 systems failed; the first is number 1"):
            made = ensemble(work.kills, ONES[:4], T, params=deadly, executor=executor, chunk=2, retries=0)
    assert list(made.why) == [1]
    torch.testing.assert_close(made.h[-1, 2:, 0], (-T[-1]).exp().expand(2), rtol=1e-5, atol=1e-6)


def test_on_loky():
    """Of joblib, which scikit-learn brings along: as an executor of the user's, and as one that is made here."""
    loky = pytest.importorskip("joblib.externals.loky")
    h0, params = lorenz_problem(20)
    alone = ensemble(work.lorenz, h0, T, params=params, chunk=4, rtol=1e-6)
    for executor in (loky.get_reusable_executor(1), lambda: loky.get_reusable_executor(1)):
        made = ensemble(work.lorenz, h0, T, params=params, executor=executor, chunk=4, rtol=1e-6)
        assert torch.equal(made.h, alone.h)


def of_the_page(word):
    """The block of the page, of those that its tests do not run, that has this word."""
    page = (Path(__file__).parents[1] / "docs" / "ensembles.md").read_text(encoding="utf-8")
    (code,) = (x for x in re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if word in x)
    return code


PROGRAM = """
import os
import torch
import pyjlode
from ensemble_work import decay

h0 = torch.ones(20, 1, dtype=torch.float64)
rho = torch.linspace(0, 28, 20, dtype=torch.float64)


def lorenz(t, h, p):  # that ends the first process to meet the last system
    if p["rho"][-1] == 28 and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(3)
    return decay(t, h, p["rho"])


"""


@pytest.mark.slow
def test_on_mpi_as_the_page_says(tmp_path):
    """A rank that dies ends the job, and the same command goes on from the directory."""
    pytest.importorskip("mpi4py")
    if shutil.which("mpiexec") is None:
        pytest.skip("no mpiexec")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + of_the_page("mpi4py") + "    torch.save(made.h, 'made.pt')\n")
    command = ["mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures", str(program)]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    how = {"cwd": tmp_path, "env": {**os.environ, **root, "OMPI_MCA_rmaps_base_oversubscribe": "1"}, "timeout": 200}
    assert subprocess.run(command, **how).returncode
    kept = {x: x.stat().st_mtime_ns for x in (tmp_path / "runs" / "a").glob("*.npz")}
    assert kept
    assert subprocess.run(command, **how).returncode == 0
    assert {x: x.stat().st_mtime_ns for x in kept} == kept
    rates = torch.linspace(0, 28, 20, dtype=torch.float64)
    torch.testing.assert_close(torch.load(tmp_path / "made.pt")[1, :, 0], (-rates).exp(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_on_ray_as_the_page_says(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        said = {}
        exec(PROGRAM + of_the_page("ray"), said)
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    torch.testing.assert_close(said["made"].h[1, :, 0], (-said["rho"]).exp(), rtol=1e-5, atol=1e-6)

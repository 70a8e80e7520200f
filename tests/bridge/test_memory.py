"""Tensors cross without a copy, and live for as long as the other side may look."""

import copy
import ctypes
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch

from pyjlode import notices, odeint, odeint_dense, solve
from pyjlode.bridge import engine, memory, places, runtime

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64


def test_a_lent_tensor_is_the_tensor():
    x = torch.arange(6, dtype=F64).reshape(2, 3)
    request = memory.Request()
    request.lend(u0=x)
    with runtime.julia():
        lent = "unsafe_load(Ptr{PyJLODE.Request}(a)).u0"
        look = f"Vector{{Float64}}({lent})"
        assert runtime.evaluate(f"a -> Int(pointer({look}))")(request.address) == x.data_ptr()
        # Row-major (2, 3) is column-major (3, 2).
        assert runtime.evaluate(f"a -> reshape({look}, 3, 2)[3, 1]")(request.address) == 2
        runtime.evaluate(f"a -> ({look}[2] = 7; nothing)")(request.address)
    assert x[0, 1] == 7


def test_a_structure_has_the_layout_that_julia_reads():
    with runtime.julia():
        assert runtime.evaluate("sizeof(PyJLODE.Request)") == ctypes.sizeof(memory.Request)
        for structure in (memory.Request, memory.AdjointRequest, memory.Functions, memory.Outcome):
            name = structure.__name__
            assert runtime.evaluate(f"sizeof(PyJLODE.{name})") == ctypes.sizeof(structure)
            fields = runtime.evaluate(f"join(fieldnames(PyJLODE.{name}), ' ')")
            assert fields.split() == [field for field, _ in structure._fields_]


def held():
    gc.collect()
    with runtime.julia():
        runtime.evaluate("GC.gc(true)")
        return runtime.evaluate("length(PyJLODE.HELD)")


def test_lent_tensors_live_as_long_as_the_solution(monkeypatch):
    lent = []

    class Watched(memory.Request):
        def lend(self, **tensors):
            if "u0" in tensors:
                lent.append(weakref.ref(tensors["u0"]))
            super().lend(**tensors)

    def solution():
        return odeint_dense(lambda t, h: -h, torch.ones(4, dtype=F64), 0.0, 1.0, engine="julia", rtol=1e-8, atol=1e-8)

    for _ in range(2):  # makes the solver, and then the compiled field, which stay
        solution()
    before = held()
    monkeypatch.setattr(engine, "Request", Watched)
    t = torch.linspace(0, 1, 3, dtype=F64)
    dense = solution()
    assert held() > before
    assert lent[0]() is not None
    assert torch.allclose(dense(t)[:, 0], torch.exp(-t), atol=1e-6)
    del dense
    assert held() == before
    assert lent[0]() is None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient", sorted(engine.GRADIENTS))
@pytest.mark.parametrize("used", [False, True], ids=["not_used", "used"])
def test_what_a_gradient_needs_goes_with_its_result(compiled, gradient, used):
    """Without the garbage collector, which would come late for so few objects, however large."""
    net, y = torch.nn.Linear(2, 2).double(), torch.ones(2, dtype=F64)

    def run():
        h = odeint(lambda t, h: net(h), y, [0, 1], engine="julia", adjoint=gradient, compile=compiled)
        if used:
            h.sum().backward()

    run()
    gc.collect()
    gc.disable()
    try:
        run()
        assert not [x for x in gc.get_objects() if type(x) is engine.Memory]
    finally:
        gc.enable()


def test_solves_that_live_at_once_have_memory_of_their_own():
    """Compiled fields of one program, with parameters that differ, differentiated in another order."""
    y, t = torch.tensor([1.0, 0.5], dtype=F64), [0.0, 0.4, 1.0]
    rates = [torch.tensor([0.3 * i, -0.2], dtype=F64, requires_grad=True) for i in range(8)]

    def losses(**kwargs):
        return [odeint(lambda t, h, p=p: torch.sin(p * h), y, t, rtol=1e-9, atol=1e-9, **kwargs).sum() for p in rates]

    want = torch.autograd.grad(sum(losses(engine="torch", adjoint="discrete")), rates)
    for gradient in ("gauss", "interpolating"):
        for _ in range(2):
            mine = losses(engine="julia", adjoint=gradient, compile=True)
            for i in (3, 0, 7, 5, 1, 6, 2, 4):
                (got,) = torch.autograd.grad(mine[i], rates[i])
                assert torch.allclose(got, want[i], rtol=1e-6, atol=1e-8)
                mine[i] = None
                odeint(lambda t, h: torch.sin(y * h), y, t, engine="julia", compile=True)  # takes a field that is idle


def test_what_julia_keeps_is_not_pickled():
    with runtime.julia() as calls:
        solver = calls.algorithm("Tsit5()")
    assert copy.deepcopy(solver) is solver
    with pytest.raises(TypeError, match="engine='torch'"):
        pickle.dumps(solver)


def test_f_sees_julias_own_arrays_in_the_users_shape():
    seen, h0 = {}, torch.ones(2, 3, dtype=F64)

    def f(t, h):
        if h.data_ptr() != h0.data_ptr():  # as in the first call, before the solve
            assert seen.setdefault(h.data_ptr(), id(h)) == id(h)  # an address is one tensor: nothing is made around f
        assert h.shape == (2, 3)
        return -h

    t = torch.linspace(0, 5, 3, dtype=F64)
    stats = solve(f, h0, t, engine="julia", dense=False).stats
    assert len(seen) < 25 < stats.nfe


def test_a_state_that_the_user_kept_is_not_freed_under_them():
    notices._warned.discard("kept state")
    kept = []

    def f(t, h):
        kept.append(h)
        return -h

    t = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.warns(UserWarning, match=r"keep h.clone\(\)"):
        odeint(f, torch.ones(1000, dtype=F64), t, engine="julia")
    with runtime.julia():
        runtime.evaluate("GC.gc(true)")
        runtime.evaluate("[rand(1000) for _ in 1:1000]; nothing")
    # Whatever the solver last wrote there, it is of this solve, whose elements are all equal, and not somebody else's.
    assert all(bool((h == h[0]).all()) for h in kept[1:])


def test_a_field_that_keeps_nothing_is_not_warned_about(recwarn):
    t = torch.linspace(0, 1, 4, dtype=F64)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    for state in (torch.ones(3, dtype=F64), torch.ones(2, 3, dtype=F64)):
        odeint(
            lambda t, h: net(h) + h.unbind(-1)[0][..., None], state, t, engine="julia", adjoint=True
        ).sum().backward()
    odeint(lambda t, h: (h[1], -h[0]), (torch.ones(2), torch.ones(2)), t, rtol=1e-4, engine="julia")
    assert not [w for w in recwarn if "clone" in str(w.message)]


def test_views_hold_their_owner():
    class Owner:
        pass

    owner, array = Owner(), (ctypes.c_double * 3)(1.0, 2.0, 3.0)
    alive = weakref.ref(owner)
    views = memory.Views(places.of(torch.zeros(3)), torch.Size([3]), F64)
    views.owner = owner
    part = views[ctypes.addressof(array)][1:]
    del views, owner
    gc.collect()
    assert alive() is not None
    assert part.tolist() == [2.0, 3.0]
    del part
    gc.collect()
    assert alive() is None


def test_peak_memory_of_a_large_state():
    """A state of 1 GB: the solver's own arrays (10 of BS3's, at most) and the two outputs, and no copies on the way.

    In a process of its own, since the peak of a process does not go down again.
    """
    code = """
import resource, torch
from pyjlode import odeint
from pyjlode.bridge import runtime
def halve_twice(y):
    return odeint(lambda t, h: -h, y, [0, 1], engine="julia", method="euler", options={"step_size": 0.5}, rtol=1e-3)
with torch.no_grad():
    halve_twice(torch.ones(10))
    y = torch.ones(2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    h = halve_twice(y)
    assert float(h[-1, 7]) == 0.25, h[-1, 7]
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The two outputs, u and the one before it, k and fsal, the temporary of Euler, and the result of f itself.
    assert float(done.stdout) < 9

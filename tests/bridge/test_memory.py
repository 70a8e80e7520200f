"""Tensors cross without a copy, and live for as long as the other side may look."""

import ctypes
import gc
import subprocess
import sys
import weakref

import pytest
import torch

from pyjlode import odeint, solve
from pyjlode.bridge import memory, runtime

pytestmark = pytest.mark.usefixtures("julia")

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.int64])
def test_a_borrowed_tensor_is_the_tensor(dtype):
    x = torch.arange(6).to(dtype).reshape(2, 3)
    with runtime.julia() as jl:
        borrowed = memory.borrow(jl, x)
        assert int(jl.seval("b -> UInt(pointer(b.array))")(borrowed)) == x.data_ptr()
        # Row-major (2, 3) is column-major (3, 2).
        assert jl.seval("b -> reshape(b.array, 3, 2)[3, 1]")(borrowed) == 2
        jl.seval("b -> (b.array[2] = 7; nothing)")(borrowed)
    assert x[0, 1] == 7


def test_julia_keeps_a_borrowed_tensor_alive():
    class Mine(torch.Tensor):
        pass

    x = torch.ones(4, dtype=F64).as_subclass(Mine)
    alive = weakref.ref(x)
    with runtime.julia() as jl:
        borrowed = memory.borrow(jl, x)
        del x
        gc.collect()
        assert alive() is not None
        assert jl.seval("b -> sum(b.array)")(borrowed) == 4


def test_f_sees_julias_own_arrays_in_the_users_shape():
    seen = {}

    def f(t, h):
        seen.setdefault(h.data_ptr(), h)
        assert seen[h.data_ptr()] is h  # the same address is the same tensor: nothing is made around f
        return -h

    t = torch.linspace(0, 5, 3, dtype=F64)
    stats = solve(f, torch.ones(2, 3, dtype=F64), t, engine="julia", dense=False).stats
    assert all(h.shape == (2, 3) for h in seen.values())
    assert len(seen) < 25 < stats.nfe


def test_a_state_that_the_user_kept_is_not_freed_under_them():
    kept = []

    def f(t, h):
        kept.append(h)
        return -h

    odeint(f, torch.ones(1000, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), engine="julia")
    with runtime.julia() as jl:
        jl.seval("GC.gc(true)")
        jl.seval("[rand(1000) for _ in 1:1000]; nothing")
    # Whatever the solver last wrote there, it is a state of this solve and not somebody else's numbers.
    assert all(bool((h == h[0]).all()) and 0.3 < float(h[0]) <= 1.0 for h in kept[1:])


def test_views_hold_their_owner():
    class Owner:
        pass

    owner, array = Owner(), (ctypes.c_double * 3)(1.0, 2.0, 3.0)
    alive = weakref.ref(owner)
    views = memory.Views(torch.Size([3]), F64)
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

"""Compiled functions compared with PyTorch's own, one by one."""

import ctypes
import math

import pytest
import torch

from pyjlode.bridge import runtime
from pyjlode.bridge.codegen import program as programs
from pyjlode.bridge.codegen import scalar
from pyjlode.bridge.codegen.program import FUNCTIONS, Program
from pyjlode.capture.held import held_by
from pyjlode.capture.trace import Trace
from pyjlode.problem import Field

_C = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 6, ctypes.c_double)
ROOM = {torch.float64: 1e-9, torch.float32: 3e-4}


def program_of(f, h0):
    """A program that is not taken from those kept."""
    field = Field(f, h0.shape, (f, h0.shape))
    source = held_by(field, h0.dtype)
    return Program(Trace(source, h0.detach().reshape(-1))), source


def reference(f, h0, params, t, v):
    """f and its products by autograd, each flat, in the order of the compiled ones."""
    n, t = h0.numel(), h0.new_tensor(t)
    h = h0.detach().reshape(-1)

    def flat(t, h):
        return f(t, h.view(h0.shape)).reshape(-1)

    def grad(wrt, out, bar):
        if not out.requires_grad:
            return [None] * len(wrt)
        return torch.autograd.grad(out, wrt, bar, allow_unused=True, retain_graph=True)

    a, b = h.clone().requires_grad_(), t.clone().requires_grad_()
    k = flat(b, a)
    rows = [grad([a, b], k, e) for e in torch.eye(n, dtype=h.dtype)]
    J = torch.stack([torch.zeros_like(h) if x is None else x for x, _ in rows])
    by_t = torch.stack([torch.zeros_like(t) if x is None else x for _, x in rows])
    theta = [x for x in params if x.requires_grad]
    by_theta = [torch.zeros_like(x) if g is None else g for x, g in zip(theta, grad(theta, k, v))] if theta else []
    vjp = v @ J
    vjp_p = torch.cat([x.reshape(-1) for x in by_theta]) if by_theta else h.new_zeros(0)
    return {
        "f": k.detach(),
        "jac": J.T.reshape(-1),
        "tgrad": by_t,
        "jvp": J @ v,
        "vjp": vjp,
        "vjp_p": vjp_p,
        "pull": torch.cat([vjp, vjp_p]),
    }


# "bend" takes other arguments, and is a part of the gradients that test_walks.py looks at.
ALONE = tuple(name for name in FUNCTIONS if name != "bend")


@pytest.fixture(name="program_of")
def _program_of():
    return program_of


@pytest.fixture
def check(julia, monkeypatch):
    """check(f, h0, mode): f and all its products, compiled in a mode, are PyTorch's, around h0."""

    def run(f, h0, mode, functions=ALONE, points=2, room=0.0):
        monkeypatch.setattr(scalar, "LIMIT", -1 if mode == "array" else 1 << 20)
        monkeypatch.setattr(programs, "_NETWORK", math.inf)
        program, source = program_of(f, h0)
        assert program.mode == mode
        tensors = [source.tensors[i] for i in program.trace.slots]
        count, dtype, n = program.trace.trained, h0.dtype, h0.numel()

        def pack(xs):
            return torch.cat([x.detach().reshape(-1).to(dtype) for x in xs] + [torch.zeros(0, dtype=dtype)])

        theta, constants = pack(tensors[:count]), pack(tensors[count:])
        for point in range(points):
            h, v, t = h0 + 0.05 * point * torch.randn_like(h0), torch.randn(n, dtype=dtype), 0.3 + point
            want = reference(f, h, tensors[:count], t, v)
            want["keep"] = want["f"]
            kept = None  # what "keep" leaves to "pull", which has room to work in behind its output
            for name in functions:
                if name == "keep" and mode == "scalar":
                    continue
                with runtime.julia() as calls:
                    address = program.address(calls, name)
                pattern = program.pattern if name == "jac" else None
                sizes = {"jac": n * n, "vjp_p": len(theta), "pull": n + len(theta)}
                size = sizes.get(name, n) if pattern is None else len(pattern.rows)
                # Behind the constants lie the transposes that the functions ask for, as Julia puts them there.
                held = torch.cat([constants, torch.full((program.layers.stop - len(constants),), 7.0, dtype=dtype)])
                for (trained, start, rows, columns, step), to in program.layers.known.items():
                    matrix = (theta if trained else constants).as_strided((rows, columns), (step, 1), start)
                    held[to : to + rows * columns] = matrix.T.reshape(-1)
                # A guard on both sides: nothing is written beside the output.
                work = torch.full((program.work + 2,), 7.0, dtype=dtype)
                if name == "pull" and mode == "array":
                    work, size = kept, size + program.work
                out = torch.full((size + 2,), 7.0, dtype=dtype)
                tensors_in = (v, h.reshape(-1), theta, held)
                pointers = [x.data_ptr() for x in tensors_in]
                _C(address)(out.data_ptr() + dtype.itemsize, *pointers, work.data_ptr() + dtype.itemsize, t)
                assert float(out[0]) == float(out[-1]) == float(work[0]) == float(work[-1]) == 7.0
                kept = work if name == "keep" else kept
                got = out[1:-1][: sizes.get(name, n)] if pattern is None else out[1:-1]
                if pattern is not None:
                    full = torch.zeros(n, n, dtype=dtype)
                    full[pattern.rows - 1, torch.repeat_interleave(torch.arange(n), pattern.columns.diff())] = got
                    got = full.T.reshape(-1)
                scale = 1 + float(want[name].nan_to_num(0, 0, 0).abs().max()) if want[name].numel() else 1
                near = max(room, ROOM[dtype])
                assert torch.allclose(got, want[name], rtol=near, atol=near * scale, equal_nan=True), (
                    f"{name}: {got} is not {want[name]}\n{program.text(name)}"
                )
        return program

    return run

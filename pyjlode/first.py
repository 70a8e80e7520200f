"""The first call of f, before the solve: it checks what f returns, shows what f depends on, and is the first slope."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import arguments, mistakes, parameters
from .errors import BadOption, BadShape
from .notices import warn
from .problem import ODEProblem, flat_field


def look(
    p: ODEProblem, f: Any, named: tuple[Tensor, ...] | None, gradient: str | None, autocast: bool
) -> tuple[Tensor, bool]:
    """Call f at the start, and note in `p` what it depends on.

    Args:
        f: the user's.
        named: the tensors that the user wants to differentiate by; None for all that f is found to use.
        gradient: name of the gradient method; None differentiates through the solver.

    Returns:
        What f returned, shape (n,), and whether anything requires grad.
    """
    layout, y0 = p.layout, p.y0
    assert layout is not None
    grad = torch.is_grad_enabled() and not p.transformed
    held = parameters.Held(f) if grad else None
    mark = parameters.graph_mark() if grad else 0
    probe = y0.detach().requires_grad_(grad) if gradient else y0
    meter = parameters.GraphMeter() if grad and gradient == "discrete" and not p.compile else None
    call = partial(_call, p=p, probe=probe, autocast=autocast)
    with contextlib.nullcontext() if p.transformed else torch.set_grad_enabled(grad):
        try:
            with meter or contextlib.nullcontext():
                f0 = call(f)
        except RuntimeError as error:
            if meter is None or "saved tensor" not in str(error):
                raise
            meter = None  # f differentiates by torch.func, which does not let what autograd keeps be looked at
            f0 = call(f)
        if grad:
            p.graph_nodes = parameters.graph_mark() - mark
        if held and (changed := held.changed()) and not torch.equal(f0.detach().clone(), call(f)):
            f = parameters.settled(f, changed)
            if p.split:
                raise BadOption(
                    "a part of the Split field changes its own buffers and depends on them (as spectral_norm does in "
                    "training). Put it into eval(), or pass the sum as one function."
                )
            p.f = flat_field(f, layout, autocast)
            p.f.source = None  # a trace of f would not show this
            mark = parameters.graph_mark()
            f0 = call(f)
    needed = grad and (y0.requires_grad or p.t.requires_grad)
    if held:
        p.named = named is not None
        if gradient:
            with torch.enable_grad():
                found = parameters.dependencies(held, f0, probe, mark, partial(call, f), named)
            p.params, p.retain_graph, p.suspects, p.makes_leaves, p.bindings, p.reached = found
            p.cuts = parameters.cut(p.params)
            if held.wanted and not f0.requires_grad and named is None:
                warn(
                    "autograd sees no way from what f returns at t[0] to h or to the tensors that f holds: it is a "
                    "constant there, or f leaves PyTorch or detaches. What f holds is not trained through this solve, "
                    "unless f uses it at other times."
                )
        else:
            p.params = named if named is not None else tuple(held.wanted)
        if p.mass is not None and p.mass.requires_grad:
            _include_mass(p, gradient)
        if meter:
            p.graph_bytes = meter.bytes_beside(p.params)
        needed = needed or bool(p.params) or (f0.requires_grad and gradient is None)
    return f0, needed


def _include_mass(p: ODEProblem, gradient: str | None) -> None:
    """Have the mass matrix among what the solve is differentiated by.

    Raises:
        BadOption: this gradient method does not differentiate by it.
    """
    assert p.mass is not None
    if gradient == "forward":
        raise BadOption(
            "mass_matrix requires grad, and adjoint='forward' does not differentiate by it. Use adjoint=True or "
            "'gauss', or detach it."
        )
    p.params = (*(x for x in p.params if x is not p.mass), p.mass)


def keep(p: ODEProblem, f0: Tensor, gradient: str | None) -> None:
    """Have the solve begin with the slope that f returned."""
    p.f0 = f0 if gradient is None else f0.detach()
    if p.layout is not None and p.layout.bare:  # f may return one buffer of its own, again and again
        p.f0, p.f.probed = p.f0.clone(), f0.detach()


def _call(f: Any, p: ODEProblem, probe: Tensor, autocast: bool) -> Tensor:
    """f(t, y0) at the time that a solver first asks for, checked: shape (n,).

    Args:
        probe: stands for y0.
    """
    t, layout = p.start, p.layout
    version = None if p.transformed or probe.is_inference() else probe._version
    assert layout is not None
    p.f.nfe += 1
    try:
        try:
            out = f(t, layout.unflatten(probe))
        except RuntimeError as error:
            if not p.f.wants_graph(error, probe):
                raise
            with torch.enable_grad():
                out = f(t, layout.unflatten(probe.detach().requires_grad_()))
            if not torch.is_grad_enabled():
                out = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out)
        arguments.check_output(out, layout, autocast)
    except Exception as error:
        fits = partial(arguments.check_output, layout=layout, autocast=autocast)
        own = f.args[0] if p.rows is not None and isinstance(f, partial) else f
        mistakes.call_of_f(own, t, layout.unflatten(probe), fits, error)
        raise
    if version is not None and probe._version != version:
        raise BadShape("f changed h in place; it must leave h as it is and return dh/dt in a tensor of its own.")
    return layout.flatten_result(t, out).to(layout.dtype)

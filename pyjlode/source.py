"""`julia_source`: the Julia code that a vector field becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import arguments
from .problem import flat_field


def julia_source(f: Callable[[Tensor, Any], Any], h0: Any) -> str:
    """The Julia code that `f` and its products are compiled to for the Julia engine. Needs no Julia.

    Args:
        f, h0: as in `odeint`.

    Returns:
        Text of functions `name(out, v, u, p, c, w, t)`, one after the other: `f`, the Jacobian `jac` in column-major
        order (or its non-zeros, where it is sparse), the derivative `tgrad` by t, and the products `jvp`, `vjp` (by the
        state) and `vjp_p` (by the parameters) with `v`. `u` is the state and `out` the result, flat in row-major
        order; `p` are the tensors that require grad and `c` those that do not, as the comments in front say; `w` is
        work space. A comment names the operation of PyTorch that the lines after it come from.

    Raises:
        NotCompiled: `f` cannot be compiled; the message says why.
    """
    from .bridge.codegen.program import program_of, text_of  # half the cost of importing this package

    layout, y0 = arguments.state(h0)
    program, held = program_of(flat_field(f, layout, False), y0)
    names = {id(x): name for name, x in f.named_parameters()} if isinstance(f, nn.Module) else {}
    if isinstance(f, nn.Module):
        names |= {id(x): name for name, x in f.named_buffers()}
    lines = [f"# {program.mode} code for u[1:{program.n}]"]
    start = {"p": 1, "c": 1}
    for i, slot in enumerate(program.trace.slots):
        x, array = held.tensors[slot], "p" if i < program.trace.trained else "c"
        stop = start[array] + x.numel() - 1
        lines.append(f"# {array}[{start[array]}:{stop}]: {names.get(id(x), 'a tensor')} {tuple(x.shape)}")
        start[array] = stop + 1
    return "\n".join(lines) + "\n\n" + text_of(program) + "\n"

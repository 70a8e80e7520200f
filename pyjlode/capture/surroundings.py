"""What lies around a call, in no object of f's, and keeps captured code from standing for f."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._device import DeviceContext

_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def surroundings() -> str:
    """Why nothing compiled can be f just now, for what lies in no object of f's; "" for no reason."""
    if any(map(vars(nn.modules.module).get, _HOOKS)):
        return "hooks are registered for all modules"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active"
    return ""

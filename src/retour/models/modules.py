"""Facts about modules: where they run, and whether a call records gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """Device that `module` computes on; offloaded weights may rest on another."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(module.parameters()).device


def gradients(tensors: Iterable[Tensor]) -> torch.set_grad_enabled:
    """Context that records a graph only where the caller does and one of `tensors` needs it.

    The weights do not count: they carry `requires_grad` by default, and nobody differentiates them
    while inverting.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return torch.set_grad_enabled(wanted)

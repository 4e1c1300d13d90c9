"""A short hash that says whether two models compute the same function.

What is hashed: the names, shapes and *values* of all parameters, and a few facts (prediction kind,
noise levels, scaling, head counts). Values are read as float32, which holds float16 and bfloat16
exactly: the same numbers give the same fingerprint on every device and in every storage type, but
weights *rounded* to a narrower type are another model. Buffers and library versions are left out.

Up to `EVERYTHING` values all are read. Larger models are sampled: an even stride over each tensor,
`SAMPLE` values in all, at least one per tensor; training moves all of a tensor, so it is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

EVERYTHING = 2**25
SAMPLE = 2**22
DIGITS = 16

# What a network computes with the same tensors depends on these.
SHAPING = (
    "act_fn",
    "attention_head_dim",
    "hidden_act",
    "latents_mean",
    "latents_std",
    "norm_eps",
    "norm_num_groups",
    "num_attention_heads",
    "patch_size",
    "scaling_factor",
    "shift_factor",
)


def fingerprint(modules: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> str:
    """Hash `modules` and JSON-able `facts` to 16 hexadecimal digits."""
    named = {
        f"{part}.{name}": weight.detach()
        for part, module in modules.items()
        for name, weight in module.named_parameters()
    }
    total = sum(weight.numel() for weight in named.values())
    stride = 1 if total <= EVERYTHING else -(-total // SAMPLE)
    digest = hashlib.sha256()
    digest.update(json.dumps([facts, _shaping(modules)], sort_keys=True).encode())
    for name in sorted(named):
        digest.update(f"{name}{tuple(named[name].shape)}".encode())
        digest.update(_bytes(named[name], stride))
    return digest.hexdigest()[:DIGITS]


def weight_version(modules: Mapping[str, nn.Module]) -> tuple[Any, ...]:
    """A cheap mark that moves when parameters are stepped by an optimiser, added or cast."""
    weights = [w for module in modules.values() for w in module.parameters()]
    steps = sum(w._version for w in weights if not w.is_inference())
    return len(weights), steps, frozenset(w.dtype for w in weights)


def _shaping(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    facts = {}
    for part, module in modules.items():
        for key in SHAPING:
            value = getattr(module.config, key, None)
            if value is not None:
                facts[f"{part}.{key}"] = list(value) if isinstance(value, (list, tuple)) else value
    return facts


def _bytes(weight: Tensor, stride: int) -> memoryview:
    if weight.is_meta:
        return memoryview(b"")
    values = weight.reshape(-1)[::stride].float().cpu().contiguous()
    return values.numpy().data

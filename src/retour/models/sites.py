"""Finding the attention layers of a network, in order of execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..core.model import AttentionSite

Part = tuple[str, str, nn.Module]


def attention_sites(
    parts: Iterable[Part], kind_of: Callable[[Any], str] | None = None
) -> list[AttentionSite]:
    """Describe the attention layers inside `parts`.

    Args:
        parts: (place, module path, module), in order of execution.
        kind_of: tells a layer's kind; :func:`attention_kind` by default.
    """
    tell = attention_kind if kind_of is None else kind_of
    found = [(place, name, module, tell(module)) for place, name, module in attention_layers(parts)]
    totals = Counter(kind for *_, kind in found)
    seen: Counter[str] = Counter()
    sites = []
    for place, name, module, kind in found:
        index = seen[kind]
        seen[kind] += 1
        sites.append(AttentionSite(name, module, kind, place, index, index / totals[kind]))
    return sites


def attention_kind(module: Any) -> str:
    """`joint` (text keys of its own), `cross` or `self`."""
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "joint"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def attention_layers(parts: Iterable[Part]) -> Iterator[Part]:
    """Find the attention layers inside `parts`, each as a part of its own."""
    for place, path, module in parts:
        for name, child in module.named_modules(prefix=path):
            if hasattr(child, "set_processor") and hasattr(child, "processor"):
                yield place, name, child

"""Energies on what a network computes inside, and their gradients by the latents.

Evaluations are made through denoisers of their own, on the run's ledger: the run's controls do not
see them, and they cost what the ledger says. Rows never mix, so the gradient of the summed energies
is each row's own, and a batch does what its images do alone.

A network set to gradient checkpointing is run without it here: a block that is run again for its
gradient is no longer hooked, and would compute something else than what was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.control import AttentionCall, AttentionControl
from ..attention.features import FeatureCall, FeatureControl, watched
from ..attention.hooks import hooked
from ..core.branches import Branch, Denoiser, Wrapped
from ..core.model import AttentionSite, Condition, FeatureSite, Model

Internals = dict[str, Tensor]


@dataclass(frozen=True)
class Reads:
    """What to read from a network call.

    Attributes:
        maps: ``text``, where image tokens look at the text; ``image``, where at each other; or "".
        largest: finest attention read, as a fraction of the latents' edge.
        features: names of feature sites.
    """

    maps: str = ""
    largest: float = 1.0
    features: frozenset[str] = field(default_factory=frozenset)


class _Maps(AttentionControl):
    def __init__(self, reads: Reads):
        self.reads = reads
        self.found: Internals = {}

    def wants(self, site: AttentionSite) -> bool:
        kinds = {"text": ("cross", "joint"), "image": ("self", "joint")}
        return site.kind in kinds.get(self.reads.maps, ())

    def active(self, call: AttentionCall) -> bool:
        return call.within(self.reads.largest)

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        block = call.image_to_text if self.reads.maps == "text" else call.image_to_image
        self.found[call.site.name] = block(probs)
        return probs


class _Features(FeatureControl):
    def __init__(self, reads: Reads):
        self.reads = reads
        self.found: Internals = {}

    def wants(self, site: FeatureSite) -> bool:
        return site.name in self.reads.features

    def output(self, call: FeatureCall, value: Tensor) -> Tensor:
        self.found[call.site.name] = value
        return value


def look(
    denoise: Denoiser | Wrapped, conditions: Sequence[Condition], x: Tensor, t: float, reads: Reads
) -> tuple[Internals, Internals]:
    """Read attention maps and features, by layer, of one network call without guidance.

    Args:
        denoise: whose model and ledger are used.
        conditions: of the rows, B each.
        x: (len(conditions) * B, C, h, w) latents; the internals carry a graph if they do.
        t: path time.
        reads: what is read.

    Returns:
        Maps (rows, heads, queries, keys) and features (rows, ...).
    """
    branches = [Branch(f"look{k}", condition) for k, condition in enumerate(conditions)]
    own = Denoiser(denoise.model, branches, ledger=denoise.ledger)
    maps, features = _Maps(reads), _Features(reads)
    with hooked(own, [maps]), watched(own, [features]), _run_once(denoise.model):
        own(x, t)
    return maps.found, features.found


@contextmanager
def _run_once(model: Model) -> Iterator[None]:
    """Without gradient checkpointing meanwhile."""
    net = getattr(model, "net", None)
    parts = net.modules() if isinstance(net, nn.Module) else ()
    checkpointed: list[Any] = [
        part for part in parts if getattr(part, "gradient_checkpointing", False)
    ]
    for part in checkpointed:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in checkpointed:
            part.gradient_checkpointing = True


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], power: int) -> Tensor:
    """Per row, the sum over layers of the mean of the differences' absolute powers, (rows,)."""
    parts = [
        (found[name] - wanted[name]).abs().pow(power).flatten(1).mean(1).double() for name in found
    ]
    return torch.stack(parts).sum(0)


def descent(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (rows,) at `x`, and each row's gradient."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        values = energy(leaf)
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slope

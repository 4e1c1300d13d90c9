"""The protocol of a generative model, and the condition that it is given.

An adapter (`retour.models`) wraps one model family behind :class:`Model`; everything else in retour
only ever talks to this protocol.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .grid import Grid
from .path import Path, Prediction, Time, as_time, levels, predict
from .watch import watchers


@dataclass(frozen=True)
class Condition:
    """Conditioning tensors of a batch of prompts.

    Attributes:
        tensors: name -> (B, ...) tensors (`embeds` (B, L, D) always; `pooled`, `time_ids`, ... as
            needed).
        prompts: the B prompts they came from.
    """

    tensors: dict[str, Tensor]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> Condition:
        """Pick (and repeat) rows."""
        index = torch.as_tensor(list(rows))
        tensors = {k: v[index.to(v.device)] for k, v in self.tensors.items()}
        return Condition(tensors, tuple(self.prompts[i] for i in rows))

    def tile(self, count: int) -> Condition:
        """Repeat the whole batch `count` times."""
        return self.take(list(range(len(self))) * count)

    def with_tensors(self, **tensors: Tensor) -> Condition:
        """Return a copy with some tensors replaced (a null-text embedding, a learned concept)."""
        return Condition({**self.tensors, **tensors}, self.prompts)

    def told(self, scale: float | None) -> Condition:
        """Say another guidance scale to a guidance-distilled model, which takes it as an input.

        Other models have no such input, and None changes nothing.
        """
        if scale is None or "guidance" not in self.tensors:
            return self
        return self.with_tensors(guidance=torch.full_like(self.tensors["guidance"], scale))

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate batches."""
        tensors = {k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors}
        return Condition(tensors, tuple(prompt for p in parts for prompt in p.prompts))


@dataclass(frozen=True)
class Word:
    """A word of a prompt and the positions of its tokens in the text sequence."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt: ids as the text encoder sees them, and words as people see them.

    Attributes:
        ids: (L,) token ids with special tokens and padding.
        words: the prompt's words in order, each with its token positions.
        cut: the part of the prompt beyond the encoder's limit ("" if it all fitted).
    """

    ids: tuple[int, ...]
    words: tuple[Word, ...]
    cut: str = ""


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer that hooks may address.

    Attributes:
        name: the module's path inside the network.
        module: the module that owns the processor.
        kind: ``self``, ``cross`` or ``joint`` (image and text tokens in one sequence).
        place: ``down``, ``mid``, ``up`` (UNet) or ``block`` (transformer).
        index: position among the sites of the same kind, in order of execution.
        depth: `index` over the number of such sites, in [0, 1).
    """

    name: str
    module: nn.Module
    kind: str
    place: str
    index: int
    depth: float


@dataclass(frozen=True)
class FeatureSite:
    """One module whose output hooks may address.

    Attributes:
        name: the module's path inside the network; an attention layer's is its site's name.
        module: the module.
        kind: ``resnet``, with its residual; ``conv``, the same before the residual is added;
            ``attention``, after the out-projection and before the residual is added; ``block``, a
            whole block of the network.
        place: ``down``, ``mid``, ``up`` (UNet) or ``block`` (transformer).
        index: position among the sites of the same kind, in order of execution.
        depth: `index` over the number of such sites, in [0, 1).
        factor: how much coarser than the latents its output is, per edge: 2 is 32 of 64.
        part: which entry are the image's features, where the module returns several.
    """

    name: str
    module: nn.Module
    kind: str
    place: str
    index: int
    depth: float
    factor: int
    part: int = 0


@runtime_checkable
class Model(Protocol):
    """What every adapter provides."""

    name: str
    path: Path
    prediction: str
    capabilities: frozenset[str]
    native: int
    multiple: int
    train_steps: int
    default_steps: int
    default_guidance: float

    @property
    def fingerprint(self) -> str:
        """Short hash of weights and config, the same after a reload."""

    @property
    def device(self) -> torch.device:
        """Where the network runs."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled float64 latents: posterior mode, no sample."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> float32 images (B, 3, H, W), about [-1, 1]."""

    def embed(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Condition:
        """Prompts -> condition; `size` is the image's (height, width), for models that use it."""

    def tokens(self, prompt: str) -> Tokens:
        """Tokenise one prompt as the (first) text encoder does."""

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Bare network: latents (R, C, h, w), path times (R,) -> raw float64 output."""

    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        """The model's own sampling grid of `steps` steps for images of `size` (height, width)."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of that size."""

    def attention_sites(self) -> list[AttentionSite]:
        """All attention layers of the network, in order of execution."""

    def feature_sites(self) -> list[FeatureSite]:
        """All modules whose outputs hooks may address, in order of execution."""


@dataclass
class Ledger:
    """Counts what a run costs.

    Attributes:
        rows: network evaluations, one per batch row.
        calls: network calls, whatever their batch.
        network_seconds: time spent inside them.
    """

    rows: int = 0
    calls: int = 0
    network_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def nfe(self, images: int) -> float:
        """Network evaluations per image."""
        return self.rows / images

    @property
    def seconds(self) -> float:
        """Wall time since the ledger was opened."""
        return time.perf_counter() - self.started


def evaluate(
    model: Model, x: Tensor, t: Time, condition: Condition, ledger: Ledger | None = None
) -> Prediction:
    """One network call: `x` (R, C, h, w) at time(s) `t`, as a prediction in `x`'s dtype."""
    for watcher in watchers():
        watcher.called()
    begun = time.perf_counter()
    times = as_time(t).expand(len(x)) if as_time(t).ndim == 0 else as_time(t)
    # A network's answer differs in its last bits with the memory layout of what it is asked (a VAE
    # gives latents channels last), which no exact scheme forgives: every call gets the same layout.
    value = model.network(x.contiguous(), times, condition).to(x.dtype)
    if ledger is not None:
        ledger.rows += len(x)
        ledger.calls += 1
        ledger.network_seconds += time.perf_counter() - begun
    alpha, sigma = levels(model.path, t, x)
    return predict(model.prediction, value, x, alpha, sigma)

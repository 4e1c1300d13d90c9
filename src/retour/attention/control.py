"""What a control is told about an attention in progress, and what it may change of it.

:mod:`.hooks` lets controls take part in a network's attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..core.branches import Rows
from ..core.grid import Step
from ..core.model import AttentionSite
from ..errors import RetourError

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """One attention being computed.

    Attributes:
        site: the layer.
        step: the interval being crossed; None outside of :func:`retour.core.loop.walk`.
        t: path time of the network call.
        rows: names of the R batch rows.
        image: the image tokens on the query axis; on the key axis too unless the site is ``cross``.
        text: the text tokens on the key axis; on the query axis too if the site is ``joint``;
            None if it is ``self``.
        latent: (height, width) of the latents given to the network.
        heads: number of heads.
        rotary: cosines and sines (tokens, d) of the rotary embedding that queries and keys carry
            already; None where positions are told otherwise.
    """

    site: AttentionSite
    step: Step | None
    t: float
    rows: Rows
    image: slice
    text: slice | None
    latent: tuple[int, int]
    heads: int
    rotary: Rotary | None = None

    @property
    def pixels(self) -> int:
        """Number of image tokens."""
        return int(self.image.stop - self.image.start)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the image tokens: h w of them, in the proportions of the latents."""
        return token_grid(self.pixels, *self.latent)

    @property
    def factor(self) -> int:
        """How much coarser this attention is than the latents, per edge: 2 is 32 of 64."""
        return round(math.sqrt(math.prod(self.latent) / self.pixels))

    def within(self, largest: float) -> bool:
        """Whether its edge is at most the fraction `largest` of the latents' edge.

        A transformer works at one resolution only, set by its patches: it is always within.
        """
        return self.site.place == "block" or self.factor * largest >= 1

    def image_to_text(self, maps: Tensor) -> Tensor:
        """Block of (..., queries, keys) maps in which image tokens look at text tokens."""
        if self.text is None:
            raise RetourError(f"attention layer {self.site.name!r} has no text tokens")
        return maps[..., self.image, self.text]

    def image_to_image(self, maps: Tensor) -> Tensor:
        """Block of (..., queries, keys) maps in which image tokens look at image tokens."""
        return maps[..., self.image, self.image]

    def with_block(self, maps: Tensor, block: Tensor, keys: slice) -> Tensor:
        """Return `maps` with the block (image queries, `keys`) replaced; out of place."""
        if block.shape == maps.shape:
            return block
        strip = maps[..., self.image, :]
        strip = torch.slice_scatter(strip, block, -1, keys.start, keys.stop)
        return torch.slice_scatter(maps, strip, -2, self.image.start, self.image.stop)


@lru_cache(maxsize=256)
def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Factor `tokens` into (h, w) with a ratio as near as possible to `height : width`.

    Raises:
        RetourError: no factorisation comes within a factor 1.5 of that ratio.
    """

    def error(h: int) -> float:
        return abs(math.log(h / (tokens // h)) - math.log(height / width))

    h = min((k for k in range(1, tokens + 1) if tokens % k == 0), key=error)
    if error(h) > math.log(1.5):
        raise RetourError(f"{tokens} image tokens fit no grid shaped like {height} x {width}")
    return h, tokens // h


class AttentionControl:
    """Base of everything that reads or changes attention. Each method is a no-op by default.

    Tensors are returned, never edited in place, so that gradients flow through.
    """

    def wants(self, site: AttentionSite) -> bool:
        """Whether to hook that layer at all; asked once, before the run."""
        return True

    def active(self, call: AttentionCall) -> bool:
        """Whether to take part in this call; where nobody does, the bare attention runs."""
        return True

    def needs_maps(self, call: AttentionCall) -> bool:
        """Whether `logits` and `probs` matter in this call; if to nobody, the fused kernel runs."""
        base, cls = AttentionControl, type(self)
        return cls.logits is not base.logits or cls.probs is not base.probs

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (R, heads, tokens, d) each."""
        return q, k, v

    def logits(self, call: AttentionCall, logits: Tensor) -> Tensor:
        """Scaled and masked scores (R, heads, queries, keys), float32 at least."""
        return logits

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        """Attention probabilities (R, heads, queries, keys), float32 at least."""
        return probs

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Attention output before the layer's out-projection, (R, heads, queries, d)."""
        return out

r"""Attention store: where each image location looked in the text, averaged over a run.

For every conditional row and every stored resolution it keeps

.. math:: \bar M = \operatorname{mean}_{\text{steps, layers, heads}} M \in [0,1]^{h\times w\times L}

as a running sum in float32: one (h, w, L) map per row and resolution, whatever the number of layers
and steps. In joint attention M is the block of image queries and text keys.

What is stored is what the store sees: put it before the controls whose changes it shall not see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.model import AttentionSite
from ..errors import RetourError
from .control import AttentionCall, AttentionControl

Key = tuple[str, int, int]


class AttentionStore(AttentionControl):
    """Accumulates text attention of conditional rows, by branch, image and resolution.

    Args:
        largest: finest resolution stored, as a fraction of the latents' edge (0.5: 32 of 64).
    """

    def __init__(self, largest: float = 0.5):
        self.largest = largest
        self._sums: dict[Key, Tensor] = {}
        self._counts: dict[Key, int] = {}

    def wants(self, site: AttentionSite) -> bool:
        """Layers in which the image looks at the text."""
        return site.kind in ("cross", "joint")

    def active(self, call: AttentionCall) -> bool:
        """Inside a run, where the resolution is coarse enough."""
        return call.step is not None and call.within(self.largest)

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        """Add this call's maps; `probs` stays as it is."""
        rows = call.rows.where(half="cond")
        maps = call.image_to_text(probs.detach()[rows]).mean(1).float()
        for index, part in zip(rows.tolist(), maps, strict=True):
            row = call.rows[index]
            self._add((row.branch, row.image, call.factor), part.unflatten(0, call.grid))
        return probs

    def _add(self, key: Key, maps: Tensor) -> None:
        self._sums[key] = self._sums[key] + maps if key in self._sums else maps
        self._counts[key] = self._counts.get(key, 0) + 1

    def factors(self, branch: str, image: int) -> list[int]:
        """Resolutions stored for that row, as downsampling factors, finest first."""
        return sorted(f for b, i, f in self._sums if (b, i) == (branch, image))

    def maps(self, branch: str, image: int, factor: float = 4.0) -> Tensor:
        """Mean maps (h, w, L) of one row at the stored resolution nearest to latents / `factor`.

        Of two equally near ones the coarser is taken, as its maps are cleaner.

        Raises:
            RetourError: nothing is stored for that row.
        """
        stored = self.factors(branch, image)
        if not stored:
            raise RetourError(
                f"no attention maps stored for branch {branch!r}, image {image}: this model has no "
                f"text attention at {self.largest:g} of its latent resolution or below"
            )
        near = min(reversed(stored), key=lambda f: abs(math.log(f / factor)))
        return self._sums[branch, image, near] / self._counts[branch, image, near]

    def word(self, branch: str, image: int, tokens: tuple[int, ...], factor: float = 4.0) -> Tensor:
        """Map (h, w) of some tokens together: their sum."""
        maps = self.maps(branch, image, factor)
        return maps[..., torch.tensor(tokens, dtype=torch.long, device=maps.device)].sum(-1)

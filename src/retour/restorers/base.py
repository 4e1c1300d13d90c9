"""What every restorer is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.grid import Grid
from ..core.guidance import Guidance
from ..core.model import Condition, Ledger, Model
from .operators import Operator


@dataclass
class RestoreJob:
    """A restoration to do.

    Attributes:
        model: the generative model, the prior.
        operator: what happened to the images.
        observed: (B, ...) float64 measurements, of images in [-1, 1].
        size: (height, width) of the images.
        condition: B conditions: what the images show, or nothing.
        negative: B negative (usually empty) conditions.
        grid: the time grid to walk.
        guidance: guidance scale.
        generator: the only source of noise (CPU generator).
        rule: how guidance combines predictions.
        ledger: where evaluations are counted.
    """

    model: Model
    operator: Operator
    observed: Tensor
    size: tuple[int, int]
    condition: Condition
    negative: Condition
    grid: Grid
    guidance: float
    generator: torch.Generator
    rule: Guidance | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def images(self) -> int:
        """Batch size B."""
        return len(self.observed)

    def denoiser(self) -> Denoiser:
        """Denoiser of one branch, ``target``."""
        branch = Branch("target", self.condition, self.negative, self.guidance)
        return Denoiser(self.model, [branch], guidance=self.rule, ledger=self.ledger)

    def noise(self) -> Tensor:
        """Unit noise (B, C, h, w), float64, shared by the images.

        So a batch does what its images do alone.
        """
        shape = self.model.latent_shape(*self.size)
        drawn = torch.randn(1, *shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.model.device).expand(self.images, *shape)


class Restorer(Protocol):
    """A way from measurements to images; holds options only."""

    def restore(self, job: RestoreJob) -> Tensor:
        """Find latents (B, C, h, w) of images that the measurements may be of."""

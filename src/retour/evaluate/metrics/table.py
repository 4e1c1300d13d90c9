"""The metrics as a table: `METRICS` maps the name of a results column to its class.

    metrics = make_metrics(["background_psnr", "clip_whole"], "strict", Backbones())
    for metric in metrics.values():
        values = metric.update(samples)      # one for each sample, NaN where it does not apply
    metrics["clip_whole"].compute()          # their mean, NaN left out

What all metrics have in common is in :mod:`.metric`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import unknown
from .alignment import EMOJI, region, similarity
from .backbones import Backbones
from .metric import Metric
from .perceptual import CnnTaps, SqueezeTaps, Taps, background_distance
from .pixelwise import Convention, Mask, as_mask, exactness, mse, mse_inside, psnr, ssim
from .sample import Sample
from .structure import EmojiClip
from .success import JUDGES, edit_success

METRICS: dict[str, type[Metric]] = {}


def _listed(metric: type[Metric]) -> type[Metric]:
    METRICS[metric.name] = metric
    return metric


def make_metrics(
    names: Iterable[str] | None = None,
    convention: Convention = "strict",
    backbones: Backbones | None = None,
) -> dict[str, Metric]:
    """Metrics by name, with one set of networks between them.

    Args:
        names: columns of `METRICS`; by default all for which there are weights.
        convention: "strict" or "pie_compat".
        backbones: the networks.
    """
    shared = Backbones() if backbones is None else backbones
    usual = [name for name, metric in METRICS.items() if metric.usual(shared)]
    chosen = usual if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return {name: METRICS[name](convention, shared) for name in chosen}


@_listed
class BackgroundPSNR(Metric):
    """Peak signal-to-noise ratio between input and output where no edit may be."""

    name, title, unit = "background_psnr", "background PSNR", "dB"
    needs_mask = True

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """In dB."""
        return [psnr(s.source, s.output, s.edited, self.convention) for s in samples]


@_listed
class BackgroundMSE(Metric):
    """Mean square error between input and output where no edit may be."""

    name, title, unit, better = "background_mse", "background MSE", "x 1e-4", "lower"
    needs_mask = True

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Times 1e4."""
        return [1e4 * mse(s.source, s.output, s.edited, self.convention) for s in samples]


@_listed
class BackgroundSSIM(Metric):
    """Structural similarity between input and output where no edit may be."""

    name, title, unit = "background_ssim", "background SSIM", "x 1e-2"
    needs_mask = True

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Times 100."""
        return [1e2 * ssim(s.source, s.output, s.edited, self.convention) for s in samples]


class _Perceptual(Metric):
    unit, better = "x 1e-3", "lower"
    needs_mask = True

    @property
    def _taps(self) -> Taps:
        return self.backbones.taps

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Times 1000."""
        return [
            1e3 * background_distance(self._taps, s.source, s.output, s.edited, self.convention)
            for s in samples
        ]

    def prepare(self) -> None:
        """Load the network."""
        blank = torch.zeros(3, 32, 32)
        background_distance(self._taps, blank, blank)


@_listed
class BackgroundLPIPS(_Perceptual):
    """LPIPS between input and output where no edit may be; needs its weights."""

    name, title = "background_lpips", "background LPIPS"
    backbone = SqueezeTaps.name

    @property
    def _taps(self) -> Taps:
        return self.backbones.squeeze

    @classmethod
    def usual(cls, backbones: Backbones) -> bool:
        """Only with the weights."""
        return backbones.lpips is not None


@_listed
class BackgroundPerceptual(_Perceptual):
    """Perceptual distance between input and output where no edit may be, offline."""

    name, title = "background_perceptual", "background perceptual distance"
    backbone = CnnTaps.name


@_listed
class Structure(Metric):
    """Structure distance between input and output, over the whole image."""

    name, title = "structure_distance", "structure distance"
    unit, better = "x 1e-3", "lower"
    backbone = EmojiClip.name

    def __init__(self, convention: Convention = "strict", backbones: Backbones | None = None):
        super().__init__(convention, backbones)
        self.backbone = self.backbones.tower(convention).name

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Times 1000."""
        tower = self.backbones.tower(self.convention)
        pairs = ((s.source[None].float(), s.output[None].float()) for s in samples)
        return [1e3 * float(tower.distance(a, b)) for a, b in pairs]

    def prepare(self) -> None:
        """Load the network."""
        self.backbones.tower(self.convention).features(torch.zeros(1, 3, 32, 32))


class _Clip(Metric):
    backbone = EMOJI

    def __init__(self, convention: Convention = "strict", backbones: Backbones | None = None):
        super().__init__(convention, backbones)
        self.backbone = self.backbones.scorer.name

    def prepare(self) -> None:
        """Load the network."""
        self.backbones.scorer.texts(["a"])

    def _score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        scorer = self.backbones.scorer
        found = similarity(scorer.images(images), scorer.texts(prompts), self.convention)
        return [float(value) for value in found]


@_listed
class ClipWhole(_Clip):
    """Similarity of the output and the target prompt in a CLIP."""

    name, title, unit = "clip_whole", "CLIP similarity, whole image", "x 1e-2"

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """100 x the cosine."""
        return self._score([s.output for s in samples], [s.prompt for s in samples])


@_listed
class ClipEdited(_Clip):
    """Similarity of the output's edited region and the target prompt in a CLIP."""

    name, title, unit = "clip_edited", "CLIP similarity, edited region", "x 1e-2"
    needs_mask = True

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """100 x the cosine; NaN where nothing may be edited."""
        parts = [region(s.output, s.edited, self.convention) for s in samples]  # type: ignore[arg-type]
        known = [(p, s.prompt) for p, s in zip(parts, samples, strict=True) if p is not None]
        found = iter(self._score([p for p, _ in known], [t for _, t in known]) if known else [])
        return [math.nan if part is None else next(found) for part in parts]


@_listed
class TruthDistance(Metric):
    """Mean square error between the output and the true edited image, in the edited region."""

    name, title = "truth_distance", "distance to the true edit"
    unit, better = "x 1e-3", "lower"
    needs_truth = needs_mask = True
    quirks = False

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Times 1000; NaN where nothing may be edited."""
        return [1e3 * mse_inside(s.truth, s.output, s.edited) for s in samples]  # type: ignore[arg-type]


@_listed
class EditSuccess(Metric):
    """Share of the edits that happened, see :mod:`retour.evaluate.metrics.success`."""

    name, title, unit = "edit_success", "edit success", "%"
    needs_truth = needs_mask = True
    quirks = False
    backbone = JUDGES

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """100 or 0; NaN where there is no verdict."""
        return [self._verdict(s) for s in samples]

    def _verdict(self, s: Sample) -> float:
        mask: Mask = as_mask(s.edited, s.output)  # type: ignore[arg-type]
        found = edit_success(s.output, s.source_prompt, s.prompt, s.kind, mask, self.backbones.jury)
        return math.nan if found is None else 100.0 * found.success


@_listed
class BackgroundExact(Metric):
    """Share of the background's pixels that the edit left alone, up to 8 of 255 levels a channel.

    Counted from how far the model's own encoder and decoder stray: to the bit, hardly any pixel
    survives these. Without a reconstruction to compare with, from the input.
    """

    name, title, unit = "background_exact", "background exact", "%"
    levels: ClassVar[int] = 8
    needs_truth = needs_mask = True
    quirks = False

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """In percent; NaN where there is no background."""
        return [
            100.0 * exactness(s.source, s.output, s.edited, levels=self.levels, ceiling=s.ceiling)
            for s in samples
        ]

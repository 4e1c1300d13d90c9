"""The metrics as a table: `METRICS` maps the name of a results column to its class.

    metrics = make_metrics(["background_psnr", "clip_whole"], "strict", Backbones())
    for metric in metrics.values():
        values = metric.update(samples)      # one for each sample, NaN where it does not apply
    metrics["clip_whole"].compute()          # their mean, NaN left out

A metric keeps the values that it has seen, so that workers' metrics can be merged in any order with
the same mean to the last bit. It is plain data and goes through pickle: its networks, shared in
:class:`Backbones`, are loaded where they are first used and stay behind when it is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import RetourError, unknown
from ..suite import Item
from .alignment import EMOJI, ClipScorer, region, similarity
from .perceptual import CnnTaps, SqueezeTaps, Taps, background_distance
from .pixelwise import (
    Convention,
    Mask,
    as_mask,
    check_convention,
    exactness,
    mse,
    mse_inside,
    pixels,
    psnr,
    ssim,
)
from .structure import EmojiClip, VitKeys
from .success import JUDGES, Jury, edit_success
from .towers import Source


@dataclass(frozen=True)
class Sample:
    """One edited image and what it is judged by.

    Attributes:
        source: the input, (3, H, W) in [0, 1].
        output: the edited image, of the same shape.
        prompt: what the edit should show.
        edited: (H, W) bool, where an edit may change the image; None if nobody said.
        truth: the true edited image; None where nobody knows it.
        source_prompt: what the input shows.
        kind: name of the edit's kind; "" if unknown.
        ceiling: what the model's encoder and decoder make of the input, of the output's shape;
            None where there is none, or nobody knows it.
    """

    source: Tensor
    output: Tensor
    prompt: str = ""
    edited: Tensor | None = None
    truth: Tensor | None = None
    source_prompt: str = ""
    kind: str = ""
    ceiling: Tensor | None = None

    @classmethod
    def make(
        cls,
        source: Image.Image,
        output: Image.Image,
        *,
        mask: np.ndarray | None = None,
        truth: Image.Image | None = None,
        ceiling: Image.Image | None = None,
        **texts: str,
    ) -> Sample:
        """From pictures and a mask (H, W) bool; `texts` are the other attributes.

        All others are brought to the output's size; pixels of which an edit may
        change a part count as edited.
        """
        size = output.size
        return cls(
            source=pixels(_at(source, size)),
            output=pixels(output),
            edited=None if mask is None else _mask_at(mask, size),
            truth=None if truth is None else pixels(_at(truth, size)),
            ceiling=None if ceiling is None else pixels(_at(ceiling, size)),
            **texts,
        )

    @classmethod
    def of(cls, item: Item, output: Image.Image) -> Sample:
        """What came out for an item of a benchmark set; see `make`."""
        return cls.make(
            item.image,
            output,
            mask=item.mask(),
            truth=item.edited,
            prompt=item.target,
            source_prompt=item.source,
            kind=item.kind,
        )


def _at(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _mask_at(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    picture = Image.fromarray(mask.astype(np.float32))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture) > 0)


@dataclass
class Backbones:
    """Networks of the metrics: the user's, or what ships with retour.

    Attributes:
        structure: folder or hub id of DINO ViT-B/8; None takes `emoji-clip`.
        clip: folder or hub id of a CLIPModel; None takes `emoji-clip`.
        lpips: file of torchvision's squeezenet1_1 weights; None leaves LPIPS out.
        lpips_heads: file of LPIPS's learned weights; None takes torchmetrics' copy.
    """

    structure: Source | None = None
    clip: Source | None = None
    lpips: Source | None = None
    lpips_heads: Source | None = None
    _towers: dict[str, VitKeys | EmojiClip] = field(default_factory=dict, repr=False, compare=False)

    def tower(self, convention: Convention) -> VitKeys | EmojiClip:
        """Of the structure distance."""
        if convention not in self._towers:
            given = self.structure
            self._towers[convention] = EmojiClip() if given is None else VitKeys(given, convention)
        return self._towers[convention]

    @cached_property
    def scorer(self) -> ClipScorer:
        """Of images against texts."""
        return ClipScorer(self.clip)

    @cached_property
    def taps(self) -> Taps:
        """Of the perceptual distance that ships with retour."""
        return CnnTaps()

    @cached_property
    def squeeze(self) -> Taps:
        """Of LPIPS."""
        if self.lpips is None:
            raise RetourError(
                "LPIPS needs weights that do not ship with retour: give the file of torchvision's "
                "squeezenet1_1, or take the metric background_perceptual."
            )
        return SqueezeTaps(self.lpips, self.lpips_heads)

    @cached_property
    def jury(self) -> Jury:
        """Of the success of edits; always the embedded networks, which know its captions."""
        return Jury()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("structure", "clip", "lpips", "lpips_heads")
        return {name: getattr(self, name) for name in kept} | {"_towers": {}}


class Metric:
    """One column of the results: what it is, and the values it has seen.

    Args:
        convention: "strict" or "pie_compat"; metrics without a published quirk are always strict.
        backbones: networks, shared between metrics.

    Attributes:
        name: of the column.
        title: for people.
        unit: of the values as they stand in the column.
        better: which way.
        needs_truth: NaN without the true edited image.
        needs_mask: NaN without a mask.
        quirks: whether the conventions differ.
        backbone: name of the network behind it, "" without one; on the class, the default's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower", "closer"]] = "higher"
    needs_truth: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False
    quirks: ClassVar[bool] = True
    backbone: str = ""

    def __init__(self, convention: Convention = "strict", backbones: Backbones | None = None):
        check_convention(convention)
        self.convention: Convention = convention if self.quirks else "strict"
        self.backbones = Backbones() if backbones is None else backbones
        self.values: list[float] = []

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Values of samples to which the metric applies, in its unit; nothing is remembered."""
        raise NotImplementedError

    def applies(self, sample: Sample) -> bool:
        """Whether a sample has what the metric needs."""
        lacks_truth = self.needs_truth and sample.truth is None
        return not (lacks_truth or (self.needs_mask and sample.edited is None))

    def update(self, samples: Sequence[Sample]) -> list[float]:
        """Measure samples, remember the values and give them back, NaN where it does not apply."""
        fit = [sample for sample in samples if self.applies(sample)]
        found = iter(self.measure(fit) if fit else [])
        values = [next(found) if self.applies(sample) else math.nan for sample in samples]
        self.values += values
        return values

    def compute(self) -> float:
        """Mean of the values so far, NaN left out; NaN without any."""
        kept = [value for value in self.values if not math.isnan(value)]
        if not kept:
            return math.nan
        # Exactly rounded, so that the order of samples does not matter.
        return math.fsum(kept) / len(kept) if all(map(math.isfinite, kept)) else sum(kept)

    def reset(self) -> None:
        """Forget all values."""
        self.values = []

    def merge(self, *others: Metric) -> None:
        """Take in the values of other workers' metrics.

        Raises:
            RetourError: one of them measures something else.
        """
        for other in others:
            if other.describe() != self.describe():
                raise RetourError(
                    f"cannot merge {other.name} ({other.convention}, {other.backbone or 'no net'}) "
                    f"into {self.name} ({self.convention}, {self.backbone or 'no net'}): merge "
                    "what was measured alike."
                )
        for other in others:
            self.values += other.values

    def describe(self) -> dict[str, str]:
        """What readers of a results table must know of the column."""
        return {
            "title": self.title,
            "unit": self.unit,
            "better": self.better,
            "convention": self.convention,
            "backbone": self.backbone,
        }

    def prepare(self) -> None:
        """Load what will be needed, so that missing weights are said before any work."""

    @classmethod
    def usual(cls, backbones: Backbones) -> bool:
        """Whether it belongs to the metrics of a run that names none."""
        return True


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

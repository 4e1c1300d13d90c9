r"""RIVAL: variations of a real image, from a chain that is held against the image's own.

Two chains return side by side: the exemplar's, R, which is put on its inverted track after every
step, and a generated one, G, which starts from R's noise with its places shuffled (one random
permutation of the positions for all channels), so that it has R's statistics and none of its
layout. With time as a fraction :math:`\tau` of the whole (t/1000 in the paper), G takes part in R's
self-attention, unconditional rows with unconditional ones, conditional rows with conditional ones:

.. math::
    \tau > \tau_{align}:&\quad (K, V) \leftarrow (K_R, V_R)\\
    \tau \le \tau_{align}:&\quad (K, V) \leftarrow ([K_G, K_R], [V_G, V_R])

(plain attention while :math:`\tau > \tau_{free}`, so that early steps leave the layout to the text)
and, while :math:`\tau > \tau_{early}`, its guided prediction takes the channel statistics of R's
conditional one: :math:`\epsilon_G \leftarrow \sigma_R (\epsilon_G - \mu_G)/\sigma_G + \mu_R`, with
unbiased variances over the places, plus 1e-5. Smaller thresholds bring G nearer to R.

Four uses, told apart by `mode`: a *variation* (the same words), a new *text* with R as the exemplar
(both shuffled), an *edit* (R's own noise, so its layout too) and *inpaint*, where a mask is given:
places inside it are shuffled among themselves, outside of it G follows R (as the mask of every
editor does). The paper inverts with the caption for variations and with "" for the others, and
guides with 5 and 7; it adds ", best quality, extremely detailed" to the prompts of variations and
texts and takes ", monochrome, lowres, bad anatomy, worst quality, low quality" for the negative
one, which are the caller's to give here.

Where we deviate: what is aligned is the network's own output (noise, v or velocity), since a
velocity's noise says nothing at :math:`\alpha = 0`; ``align="latent"`` aligns the latents after the
step instead. Both thresholds compare with the time of the network call (the published code takes
one count for :math:`\tau_{align}` and another, one lower, for :math:`\tau_{early}`). Several
targets of one image are several generated chains, the k-th shuffled by `seed` + k. Joint attention
exchanges the image's keys and keeps the text's; where R's keys are added, the row's text keys are
doubled with them, so that words keep their weight. A doubled row attends as before, so R's own
attention is never changed.

Cost: 4N evaluations for one target with guidance (two of them R's, shared by all targets).

Reference: Zhang et al., "Real-World Image Variation by Aligning Diffusion Inversion Chain",
NeurIPS 2023, arXiv 2305.18729.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl
from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step
from ..core.model import AttentionSite
from ..core.path import Path, Prediction, express, levels, predict
from ..core.registry import Paper, register
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.base import Replay
from ._track import OnTrack
from .base import EditJob, Editor, Start

NULL = "source-null"
STABILISER = 1e-5

# The largest time fraction at which R is attended to, by mode.
FREE = {"variation": 1.0, "text": 0.96, "edit": 0.9, "inpaint": 1.0}


@dataclass(frozen=True)
class RIVALOptions:
    """Options of RIVAL; times are fractions of the noise path's whole time.

    Attributes:
        mode: `variation`, `text`, `edit`, `inpaint`, or `auto`: inpaint with a mask, a variation
            where the target is the source prompt, else edit.
        t_align: above it R's keys and values replace, below it they are added.
        t_early: above it predictions take R's statistics; 1 switches that off.
        t_free: above it R is not attended to; None takes the mode's (1, 0.96, 0.9, 1).
        align: what takes R's statistics: the `prediction`, the `latent`, or nothing (`off`).
        seed: of the shuffles.
    """

    mode: Literal["auto", "variation", "text", "edit", "inpaint"] = "auto"
    t_align: float = 0.6
    t_early: float = 0.6
    t_free: float | None = None
    align: Literal["prediction", "latent", "off"] = "prediction"
    seed: int = 0


@register(
    "rival",
    task="edit",
    summary="variations of the image: a new chain attends to the inverted one",
    paper=Paper(
        title="Real-World Image Variation by Aligning Diffusion Inversion Chain",
        authors="Zhang, Yuechen and Xing, Jinbo and Lo, Eric and Jia, Jiaya",
        year=2023,
        arxiv="2305.18729",
        venue="NeurIPS 2023",
    ),
    options=RIVALOptions,
    nfe="4N",
    stochastic=True,
    needs={"attention"},
    requires={"trajectory"},
)
class RIVAL(Editor):
    """Variation, text, edit or inpainting with the image as exemplar."""

    source_branch = True

    def __init__(self, options: RIVALOptions | None = None):
        self.options = RIVALOptions() if options is None else options
        for name in ("t_align", "t_early", "t_free"):
            if getattr(self.options, name) is not None:
                check_range(name, getattr(self.options, name), 0, 1)
        if self.options.seed < 0:
            raise RetourError(f"seed must be at least 0, got {self.options.seed}")

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """R without guidance, and where a target is guided, R once more without words."""
        held = tuple(replace(b, scale=1.0) if b.name == "source" else b for b in branches)
        source = held[[b.name for b in held].index("source")]
        if source.uncond is None or not any(b.guided for b in held):
            return held
        return (*held, Branch(NULL, source.uncond, auxiliary=True))

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """Shuffle each target's start as its mode says."""
        start = super().prepare(job, denoiser, replay)
        modes, layout = self.modes(job), denoiser.layout
        state = start.state
        for number, name in enumerate(layout.targets()):
            keys = _keys(self.options.seed + number, state.x.shape[-2:])
            for image in range(layout.images):
                if modes[name, image] != "edit":
                    where = _hole(job.mask, image) if modes[name, image] == "inpaint" else None
                    state = _shuffle_row(state, layout[name].start + image, keys, where)
        return replace(start, state=state)

    def control(self, job: EditJob) -> Control:
        """The two chains."""
        free = {
            key: FREE[mode] if self.options.t_free is None else self.options.t_free
            for key, mode in self.modes(job).items()
        }
        return _Chains(job, self.options, free)

    def modes(self, job: EditJob) -> dict[tuple[str, int], str]:
        """What each target row is.

        Raises:
            RetourError: inpainting without a mask.
        """
        if self.options.mode == "inpaint" and job.mask is None:
            raise RetourError("rival's mode 'inpaint' needs a mask: give mask=... (--mask)")
        return {
            (name, image): self._mode(job, source, target)
            for name, targets in job.targets.items()
            for image, (source, target) in enumerate(zip(job.sources, targets, strict=True))
        }

    def _mode(self, job: EditJob, source: str, target: str) -> str:
        if self.options.mode != "auto":
            return self.options.mode
        if job.mask is not None:
            return "inpaint"
        return "variation" if source == target else "edit"


class _Chains(OnTrack):
    """R on its track; G attending to it, with its statistics."""

    def __init__(self, job: EditJob, options: RIVALOptions, free: Mapping[tuple[str, int], float]):
        super().__init__(job.inversion, ("source", NULL))
        self.path, self.options = job.model.path, options
        self.shared = SharedAttention(self.path, options.t_align, free)

    def attention(self) -> Sequence[AttentionControl]:
        """The shared attention."""
        return (self.shared,)

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Align the targets' predictions with R's."""
        if self.options.align != "prediction":
            return denoise

        def align(prediction: Prediction, x: Tensor, t: float) -> Prediction:
            if fraction(self.path, t) <= self.options.t_early:
                return prediction
            at = levels(self.path, t, x)
            value = aligned(express(denoise.kind, prediction, *at), layout)
            return predict(denoise.kind, value, x, *at)

        return Wrapped(denoise, align)

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Put R on its track, and if so asked align the targets' latents with it."""
        state = super().after_step(step, state, before, layout)
        early = fraction(self.path, step.noisy) > self.options.t_early
        if self.options.align != "latent" or not early:
            return state
        return state.with_x(aligned(state.x, layout))


class SharedAttention(AttentionControl):
    """Targets attend to the exemplar's image tokens: in place of their own, then beside them.

    Args:
        path: the noise path, which says how late a call is.
        t_align: time fraction above which keys and values are replaced.
        free: (target branch, image) -> time fraction above which the row attends to itself only.
    """

    def __init__(self, path: Path, t_align: float, free: Mapping[tuple[str, int], float]):
        self.path, self.t_align, self.free = path, t_align, dict(free)

    def wants(self, site: AttentionSite) -> bool:
        """Layers in which the image looks at the image."""
        return site.kind in ("self", "joint")

    def active(self, call: AttentionCall) -> bool:
        """Inside a run, once a row may attend to R."""
        return call.step is not None and bool(self._pairs(call)[0])

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace or add R's image keys and values; rows without a partner get their own."""
        rows, partners = (torch.tensor(n, device=k.device) for n in self._pairs(call))
        given_k, given_v = (_from_partner(call, x, rows, partners) for x in (k, v))
        if fraction(self.path, call.t) > self.t_align:
            return q, given_k, given_v
        return q, torch.cat([k, given_k], 2), torch.cat([v, given_v], 2)

    def _pairs(self, call: AttentionCall) -> tuple[list[int], list[int]]:
        """Rows that attend to R now, and R's rows of the same half."""
        place = call.rows.conditional()
        now, found = fraction(self.path, call.t), []
        for index, row in enumerate(call.rows):
            partner = place.get(("source" if row.half == "cond" else NULL, row.image))
            if partner is not None and now <= self.free.get((row.branch, row.image), -1.0):
                found.append((index, partner))
        return [i for i, _ in found], [k for _, k in found]


def _from_partner(call: AttentionCall, x: Tensor, rows: Tensor, partners: Tensor) -> Tensor:
    """Return keys or values (R, heads, tokens, d) with some rows' image tokens exchanged."""
    image = x[:, :, call.image]
    image = image.index_copy(0, rows, image[partners])
    return torch.slice_scatter(x, image, 2, call.image.start, call.image.stop)


def fraction(path: Path, t: float) -> float:
    """Time as a fraction of the whole path, 0 clean and 1 noise."""
    return (t - path.t_clean) / (path.t_noise - path.t_clean)


def adain(x: Tensor, like: Tensor) -> Tensor:
    """Give `x` (B, C, h, w) the mean and spread of each channel of `like`."""
    mean, spread = _statistics(x)
    wanted_mean, wanted_spread = _statistics(like)
    return (x - mean) / spread * wanted_spread + wanted_mean


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, (2, 3), keepdim=True)
    return mean, (var + STABILISER).sqrt()


def aligned(x: Tensor, layout: Layout) -> Tensor:
    """Give the targets' rows of a stacked `x` the statistics of the source's."""
    source, targets = x[layout["source"]], layout.targets()
    return layout.replaced(x, {name: adain(x[layout[name]], source) for name in targets})


def _keys(seed: int, size: Sequence[int]) -> Tensor:
    """One random number for each place, (h w,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size[0] * size[1], generator=generator, dtype=torch.float64)


def _hole(mask: Tensor | None, image: int) -> Tensor | None:
    """Places (h w,) that may change."""
    if mask is None:
        return None
    return mask[min(image, len(mask) - 1), 0].flatten() > 0.5


def shuffled(x: Tensor, keys: Tensor, where: Tensor | None = None) -> Tensor:
    """Permute the places of `x` (C, h, w), all channels alike, in the order of `keys` (h w,).

    `where` (h w,), boolean, picks the places that change among themselves.
    """
    places = torch.arange(len(keys)) if where is None else where.cpu().nonzero()[:, 0]
    order = places[keys[places].argsort()]
    flat = x.flatten(1)
    moved = flat.index_copy(1, places.to(x.device), flat[:, order.to(x.device)])
    return moved.reshape(x.shape)


def _shuffle_row(state: State, row: int, keys: Tensor, where: Tensor | None) -> State:
    def change(value: Tensor) -> Tensor:
        if value.shape != state.x.shape:
            return value
        moved = shuffled(value[row], keys, where)
        return value.index_copy(0, torch.tensor([row], device=value.device), moved[None])

    return state.map(change)

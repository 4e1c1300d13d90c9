r"""Blends: keep the source outside of a mask, whatever the editor does inside.

Two masks, one formula, after every step on each target branch:

.. math:: z_{tgt} \leftarrow m \odot z_{tgt} + (1 - m) \odot z_{src}

* :class:`LocalBlend` finds m in the cross attention of chosen words (Prompt-to-Prompt) and takes
  the run's own source branch as :math:`z_{src}`.
* :class:`MaskBlend` is given m by the user and takes the *inverted trajectory* as
  :math:`z_{src}`, so that the background returns exactly as the decoder gives it. It works beside
  any editor; alone it is the editor ``mask-blend``: a new prompt inside the mask, as in DiffEdit
  with a given mask.

Whatever else the solver remembers of the latents (a coupled partner, a previous prediction) is
blended with the same mask where its source is known.

LocalBlend's mask, per image: the words' maps, averaged over steps, layers and heads at the
resolution nearest to 1/4 of the latents (16 x 16 for SD's 64 x 64) and summed over the words'
tokens; max-pooled 3 x 3, brought to latent size (nearest), divided by its maximum, thresholded;
united with the same mask of the source. `subtract` words remove their own mask, not pooled.
Deviations: resolutions are found by size, not by position in a list of SD's layers, and on small
latents maps of 8 x 8 are sought where 1/4 would be coarser; on maps finer than 16 x 16 the pooling
window grows with them; maps are those before editing, as the paper says.

Cost: none beyond the editor's own network calls.

References: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022,
arXiv 2208.01626; Couairon et al., "DiffEdit: Diffusion-based semantic image editing with mask
guidance", 2022, arXiv 2210.11427.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.control import AttentionControl
from ..attention.store import AttentionStore
from ..core.branches import Layout
from ..core.control import Control
from ..core.grid import Step
from ..core.registry import NoOptions, Paper, register
from ..core.state import State
from ..errors import RetourError
from .base import EditJob, Editor

POOLED_GRID = 16  # The paper pools 3 x 3 on a 16 x 16 grid.
LEAST_GRID = 8  # On 4 x 4 maps a pooled mask is half the picture.


def mask_factor(size: Sequence[int]) -> float:
    """How much coarser than latents (h, w) the maps shall be that masks are made of, per edge.

    Four times, where such maps have 8 x 8 places or more.
    """
    return min(4.0, min(size) / LEAST_GRID)


@dataclass(frozen=True)
class BlendTokens:
    """Token positions whose attention makes one target's mask.

    Attributes:
        source: in the source prompt.
        target: in the target prompt.
        not_source: whose mask is taken away, in the source prompt.
        not_target: the same in the target prompt.
    """

    source: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    not_source: tuple[int, ...] = ()
    not_target: tuple[int, ...] = ()


class LocalBlend(Control):
    """Confine targets to where some words look; needs a source branch.

    Args:
        tokens: (target branch, image) -> the tokens of its mask; rows not named, and those without
            any token, are not blended.
        threshold: of the normalised map, in (0, 1).
        start: fraction of the steps to leave alone first (maps are still settling).
        store: where maps are collected; its own by default.
    """

    def __init__(
        self,
        tokens: Mapping[tuple[str, int], BlendTokens],
        *,
        threshold: float = 0.3,
        start: float = 0.2,
        store: AttentionStore | None = None,
    ):
        self.tokens = {key: t for key, t in tokens.items() if t.source or t.target}
        self.threshold, self.start = threshold, start
        self.store = AttentionStore() if store is None else store

    def attention(self) -> Sequence[AttentionControl]:
        """Its store of maps."""
        return (self.store,) if self.tokens else ()

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Blend every target row with its source row, once `start` has passed."""
        if not self.tokens or step.position + 1 <= int(self.start * step.count):
            return state
        size = (state.x.shape[-2], state.x.shape[-1])
        masks = {key: self.mask(*key, size) for key in self.tokens}
        return _blend_rows(state, layout, masks)

    def mask(self, branch: str, image: int, size: tuple[int, int]) -> Tensor:
        """Mask (h, w) of one target row at latent size, boolean."""
        tokens = self.tokens[branch, image]
        include = ((branch, tokens.target), ("source", tokens.source))
        exclude = ((branch, tokens.not_target), ("source", tokens.not_source))
        mask = self._union(include, image, size, pool=True)
        return mask & ~self._union(exclude, image, size, pool=False).to(mask.device)

    def _union(
        self,
        parts: Iterable[tuple[str, tuple[int, ...]]],
        image: int,
        size: tuple[int, int],
        *,
        pool: bool,
    ) -> Tensor:
        union = torch.zeros(size, dtype=torch.bool)
        for branch, tokens in parts:
            if tokens:
                factor = mask_factor(size)
                heat = self.store.word(branch, image, tokens, factor)
                heat = normalised(heat, size, pool=pool)
                union = union.to(heat.device) | (heat > self.threshold)
        return union


def normalised(heat: Tensor, size: tuple[int, int], *, pool: bool) -> Tensor:
    """Heat map (h, w) -> (optionally max-pooled) map at `size` whose maximum is 1."""
    heat = heat[None, None]
    if pool:
        radius = max(1, round(min(heat.shape[-2:]) / POOLED_GRID))
        heat = F.max_pool2d(heat, 2 * radius + 1, stride=1, padding=radius)
    heat = F.interpolate(heat, size)[0, 0]
    return heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)


def _blend_rows(state: State, layout: Layout, masks: Mapping[tuple[str, int], Tensor]) -> State:
    """Give each named target row its source row outside of its mask."""
    keys = list(masks)
    rows = torch.tensor([layout[branch].start + image for branch, image in keys])
    sources = torch.tensor([layout["source"].start + image for _, image in keys])
    mask = torch.stack([masks[key] for key in keys])[:, None]

    def blend(value: Tensor) -> Tensor:
        if value.shape != state.x.shape:
            return value
        index, inside = rows.to(value.device), mask.to(value.device)
        mixed = torch.where(inside, value[index], value[sources.to(value.device)])
        return value.index_copy(0, index, mixed)

    return state.map(blend)


class MaskBlend(Control):
    """Outside of a mask every target follows the inverted source trajectory, exactly.

    Args:
        job: the edit, with its mask (B or 1, 1, h, w) and the inversion whose states are followed.

    Raises:
        RetourError: the job has no mask, or one of another size than the latents.
    """

    def __init__(self, job: EditJob):
        if job.mask is None:
            raise RetourError("blending with a mask needs one: give mask=... (--mask)")
        self.inversion, self.mask = job.inversion, job.mask
        images, _, *frames, height, width = self.inversion.latents.shape
        wanted = (images, 1, *[1 for _ in frames], height, width)
        if tuple(self.mask.shape) not in (wanted, (1, *wanted[1:])):
            raise RetourError(f"the mask has shape {tuple(self.mask.shape)}: give {wanted}")

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Copy the trajectory's state at the end of this step to the outside of the mask."""
        track = self.inversion.at(step.arrival)
        return state.beside(track, lambda value, source: self._blend(value, source, layout))

    def _blend(self, value: Tensor, source: Tensor, layout: Layout) -> Tensor:
        mask, source = self.mask.to(value), source.to(value)
        parts = [
            part if name == "source" else mask * part + (1 - mask) * source
            for name, part in layout.split(value)
        ]
        return torch.cat(parts)


@register(
    "mask-blend",
    task="edit",
    summary="new prompt inside your mask; outside, the source's own trajectory",
    paper=Paper(
        title="DiffEdit: Diffusion-based semantic image editing with mask guidance",
        authors="Couairon, Guillaume and Verbeek, Jakob and Schwenk, Holger and Cord, Matthieu",
        year=2022,
        arxiv="2210.11427",
        venue="ICLR 2023",
    ),
    options=NoOptions,
    nfe="2N",
    requires={"trajectory"},
    facts={"mask": True},
)
class MaskEditor(Editor):
    """Re-prompt inside the user's mask."""

    masks = True

    def __init__(self, options: NoOptions | None = None):
        self.options = NoOptions() if options is None else options

    def control(self, job: EditJob) -> Control:
        """Blend each target with the inverted trajectory outside of the job's mask."""
        return MaskBlend(job)

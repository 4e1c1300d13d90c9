r"""LazyDrag: drag points of a picture, with an explicit map from what moves to where it goes.

1. The drags become a map of the picture's places (:mod:`._drag_map`): destinations and their
   origins, vacated places, a band of transition, background.
2. The start is an inverted state with origins moved to destinations (:mod:`._drag_carry`). Where
   nothing is left its noise is fresh (``fill="noise"``), drawn from the background's own
   (``"around"``), or what FastDrag interpolates there (``"neighbours"``).
3. The target prompt is sampled with attention that keeps the background and gives what moved its
   origin's keys, values and outputs (:mod:`._drag_attention`).

Where we deviate:

- The paper caches the source's attention while inverting; here the source is a branch of the same
  call on its inverted trajectory. That costs N evaluations more and no memory, and works for any
  inversion with a trajectory, saved ones too.
- The paper's map is between tokens, whose keys it rotates to their new place. Where positions are
  added to the tokens instead (SD3) a key cannot be moved, and on small latents a token is much of
  an object. There the map is between the latents' cells, and the source's branch stands on a
  trajectory with everything at its new place already (``reading="carried"``), which attention
  reads without a map. It also moves by parts of a token and scales: a map between tokens
  paints a magnified object as a pattern.
- There the start is also at `strength` 0.5. The paper's usual one is 1, which starts from noise
  alone: that says little of a size, so nothing scales from there, and small pictures lose their
  details. Its fast setting is 0.7; on FLUX's shifted grid that is :math:`\sigma = 0.88`, and as
  much of a picture of 64 times fewer tokens is left at 0.48.
- What moved keeps what it is, whatever the target prompt calls it: its noise, its start and all
  three controls say so, and unguided words are weak. To turn it into something else take
  ``strength=1``, ``renew=0.5``, ``identity_until=0``, ``blend_max=0`` and the model's guidance.
- In mode `move` vacated places take the background's noise: a whole object is gone there, and from
  fresh noise the prompt, which still tells of it, draws it again.
- Models without single-stream blocks are controlled in all joint blocks from `from_depth` on. The
  weight of the output's blend "decays over time": we hold it at `blend_max` for a fifth of the
  steps and bring it to 0 by a cosine at `blend_until`.

The paper runs without classifier-free guidance, and so does `retour.drag`; a guided target's
unconditional row is controlled alike. What moves by less than half a cell (a token, if read there)
stays.

Cost: 2N evaluations (3N guided) of the N steps that are walked, beside the inversion.

Reference: Yin et al., "LazyDrag: Enabling Stable Drag-Based Editing on Multi-Modal Diffusion
Transformers via Explicit Correspondence", ICLR 2026, arXiv 2509.12203.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.control import AttentionControl
from ..core.branches import Branch, Denoiser, Layout, rescale
from ..core.control import Chain, Control
from ..core.grid import Step
from ..core.model import AttentionSite, Model
from ..core.path import Time
from ..core.registry import Paper, register
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.base import Replay
from ..io import Placement
from ..pictures import placements_in
from ._drag_attention import Background, Identity, Queries, Refinement
from ._drag_carry import Fill, Gaps, carried
from ._drag_map import DragMap, Field, coarser, drag_map, finer
from ._drags import Drag, Drags, Mode, check_drags, pull_of, read_drags
from ._track import OnTrack
from .base import EditJob, Editor, Start

SMALL = 0.5


@dataclass(frozen=True)
class LazyDragOptions:
    """Options of LazyDrag.

    Attributes:
        drags: "x,y>x,y; x,y>x,y" in pixels of the picture ("*scale" behind one magnifies what it
            moves), or :class:`Drag` objects; for a batch, a list of such for each image. Without
            any, everything stays in place.
        mode: elastic `drag` of points, or `move` of the masked object as it is.
        field: every token obeys its nearest handle, or the average of all (FastDrag).
        strength: part of the inverted way that is walked back, from the clean end; 1 starts from
            noise alone. None: 1 where `tokens` are read, 0.5 where what is read is `carried`.
        fill: noise that vacated places start from; None: `noise` in mode `drag`, `around` in mode
            `move`. What is interpolated between `neighbours` is weak, which makes them even.
        gaps: noise between the landing places of a magnified object: fresh `noise`; a `copy` of
            the nearest one's, which is no longer white; or a `share` of it, made white by fresh
            noise. None: `noise` where `tokens` are read, `share` where what is read is `carried`.
        renew: share of fresh noise in what moved. With some, and with `identity_until` and
            `blend_max` low, the words decide what stands there.
        reading: where the attention of what moved is read: from the `tokens` it came from, as in
            the paper; or from the source as it stands with everything `carried` to its new place,
            cell by cell of the latents, which also moves by parts of a token and scales. None:
            tokens where keys carry a rotary embedding and so can be moved, carried elsewhere.
        background: keep the background's attention tokens.
        identity_until: fraction of the grid's steps with appended origins.
        queries: which image tokens see those.
        blend_max: weight of the output's blend at first.
        blend_hold: fraction of the grid's steps with that weight.
        blend_until: fraction of the grid's steps by which it has gone.
        band: width of the transition, in tokens; None: a 32nd of the grid's longer side.
        coverage: share of a token that the mask must cover for it to be edited.
        from_depth: first joint block controlled, as a fraction of their number, where a model has
            no single-stream blocks.
        seed: of the fresh noise.
    """

    drags: Drags = ""
    mode: Mode = "drag"
    field: Field = "nearest"
    strength: float | None = None
    fill: Fill | None = None
    gaps: Gaps | None = None
    renew: float = 0.0
    reading: Literal["tokens", "carried"] | None = None
    background: bool = True
    identity_until: float = 0.8
    queries: Queries = "moved"
    blend_max: float = 0.8
    blend_hold: float = 0.2
    blend_until: float = 0.8
    band: int | None = None
    coverage: float = 0.05
    from_depth: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strength is not None:
            check_range("strength", self.strength, 0, 1)
        for name in ("identity_until", "blend_max", "blend_hold", "blend_until"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("renew", "coverage", "from_depth"):
            check_range(name, getattr(self, name), 0, 1)
        if self.band is not None:
            check_range("band", self.band, 0)
        for image in read_drags(self.drags, 1):
            check_drags(image, self.mode)


@register(
    "lazydrag",
    task="edit",
    summary="points dragged: an explicit token map drives noise and attention",
    paper=Paper(
        title="LazyDrag: Enabling Stable Drag-Based Editing on Multi-Modal Diffusion Transformers "
        "via Explicit Correspondence",
        authors="Yin, Zixin and Dai, Xili and Wang, Duomin and Zeng, Xianfang and "
        "Ni, Lionel M. and Yu, Gang and Shum, Heung-Yeung",
        year=2025,
        arxiv="2509.12203",
        venue="ICLR 2026",
    ),
    options=LazyDragOptions,
    nfe="3N",
    stochastic=True,
    needs={"joint-attention"},
    requires={"trajectory"},
    mate="uniinv",
)
class LazyDrag(Editor):
    """Map, start, attention."""

    source_branch = True
    masks = True

    def __init__(self, options: LazyDragOptions | None = None):
        self.options = LazyDragOptions() if options is None else options

    def control(self, job: EditJob) -> Control:
        """Attention control of every target, and the branch that it reads.

        Raises:
            RetourError: a drag outside of the picture, or a mask that covers no token.
        """
        options, sites = self.options, self._sites(job.model)
        maps = self.maps(job)
        found = {(b, i): m for b in job.layout.targets() for i, m in enumerate(maps)}
        controls: list[AttentionControl] = []
        if options.background:
            controls.append(Background(found, sites))
        if options.identity_until > 0:
            controls.append(Identity(found, sites, options.identity_until, options.queries))
        if options.blend_max > 0 and options.blend_until > 0:
            controls.append(
                Refinement(found, sites, options.blend_max, options.blend_hold, options.blend_until)
            )
        track = job.inversion
        if self._carries(job.model):
            times = job.grid.times
            states = {k: self._moved(job, v, times) for k, v in track.states.items()}
            track = replace(track, states=states)
        return Chain([_Source(job.inversion.latents), OnTrack(track, watching=controls)])

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """The inverted noise, moved."""
        depth = self._depth(job)
        state, times = self._at(job, replay.state, depth), job.grid.times[depth : depth + 1]
        moved = state.map(
            lambda v: self._moved(job, v[None], times)[0] if v.shape == state.x.shape else v
        )
        source = moved if self._carries(job.model) else state
        rows = [source if name == "source" else moved for name in job.layout.names]
        memory = {k: torch.cat([r.memory[k] for r in rows]) for k in state.memory}
        facts = {"drags": [[str(d) for d in drags] for drags in self._drags(job)]}
        return Start(State(torch.cat([r.x for r in rows]), memory), depth, facts)

    def _depth(self, job: EditJob) -> int:
        strength = self.options.strength
        if strength is None:
            strength = SMALL if self._carries(job.model) else 1.0
        return max(1, round(strength * job.grid.steps))

    def _at(self, job: EditJob, end: State, depth: int) -> State:
        """The inversion's state at some depth; memories that it does not keep start anew."""
        if depth == job.grid.steps:
            return end
        return job.inversion.at(depth).map(lambda v: v.to(end.x))

    def maps(self, job: EditJob) -> list[DragMap]:
        """One map of the tokens for each image, as attention follows it."""
        if not self._carries(job.model):
            return self._maps(job, _token_grid(job.model, job.inversion.latents))
        grid, patch = _token_grid(job.model, job.inversion.latents), _patch(job.model)
        return [coarser(m, patch, self._band(grid)) for m in self.cells(job)]

    def cells(self, job: EditJob) -> list[DragMap]:
        """One map of the latents' cells for each image, as the latents follow it."""
        height, width = job.inversion.latents.shape[-2:]
        if self._carries(job.model):
            return self._maps(job, (height, width))
        return [finer(m, _patch(job.model)) for m in self.maps(job)]

    def _maps(self, job: EditJob, grid: tuple[int, int]) -> list[DragMap]:
        options = self.options
        return [
            drag_map(
                self._editable(job, image, grid),
                [pull_of(drag, _placement(job, image, grid), grid) for drag in drags],
                options.mode,
                field=options.field,
                band=self._band(grid),
            )
            for image, drags in enumerate(self._drags(job))
        ]

    def _carries(self, model: Model) -> bool:
        reading = self.options.reading
        return not _single(model) if reading is None else reading == "carried"

    def _moved(self, job: EditJob, states: Tensor, times: Sequence[Time]) -> Tensor:
        """States (K, B, C, h, w) with everything where it shall be."""
        options, clean = self.options, job.inversion.latents
        generator = torch.Generator().manual_seed(options.seed)
        noise = torch.randn(clean.shape[1:], generator=generator, dtype=torch.float64)
        gaps = options.gaps or ("share" if self._carries(job.model) else "noise")
        # On the processor, where the maps are.
        moved = carried(
            states.cpu(), clean.to(states).cpu(), times, job.model.path, self.cells(job), noise,
            fill=options.fill or ("noise" if options.mode == "drag" else "around"),
            gaps=gaps, renew=options.renew, seed=options.seed,
        )  # fmt: skip
        return moved.to(states)

    def _band(self, grid: tuple[int, int]) -> int:
        return max(1, round(max(grid) / 32)) if self.options.band is None else self.options.band

    def _drags(self, job: EditJob) -> list[tuple[Drag, ...]]:
        return read_drags(self.options.drags, job.inversion.images)

    def _editable(self, job: EditJob, image: int, grid: tuple[int, int]) -> Tensor:
        if job.mask is None:
            if self.options.mode == "move" and any(self._drags(job)):
                raise RetourError("mode 'move' moves what the mask shows: give a mask (--mask)")
            return torch.ones(grid, dtype=torch.bool)
        share = F.adaptive_avg_pool2d(job.mask[image].cpu().double(), grid)[0]
        return share >= max(self.options.coverage, 1e-9)

    def _sites(self, model: Model) -> frozenset[str]:
        joint = [s for s in model.attention_sites() if s.kind == "joint"]
        chosen = _single(model) or [s for s in joint if s.depth >= self.options.from_depth]
        return frozenset(s.name for s in chosen)


class _Source(Control):
    """The source is read, not guided: one row; it ends as it was, wherever it stood."""

    def __init__(self, latents: Tensor):
        self.latents = latents

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Scale 1."""
        return rescale(branches, source=1.0)

    def finish(self, x: Tensor, layout: Layout) -> Tensor:
        """The data's own latents."""
        return layout.replaced(x, {"source": self.latents.to(x)})


def _single(model: Model) -> list[AttentionSite]:
    """Single-stream blocks' layers, the paper's; their keys carry rotary embeddings."""
    sites = model.attention_sites()
    return [s for s in sites if s.kind == "joint" and s.name.startswith("single_")]


def _patch(model: Model) -> int:
    """Latent cells of one token, along each side."""
    return model.latent_shape(model.multiple, model.multiple)[1]


def _token_grid(model: Model, latents: Tensor) -> tuple[int, int]:
    patch = _patch(model)
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def _placement(job: EditJob, image: int, grid: tuple[int, int]) -> Placement:
    """Where the picture lies on the model's canvas: all over it, where the record does not say."""
    placements = placements_in(job.inversion.record)
    if placements:
        return placements[image]
    width, height = (n * job.model.multiple for n in (grid[1], grid[0]))
    return Placement.plan((width, height), (width, height))

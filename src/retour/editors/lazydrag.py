r"""LazyDrag: drag points of a picture, with an explicit map from what moves to where it goes.

1. The drags become a map between image tokens (:mod:`._drag_map`): destinations and their origins,
   vacated places, a band of transition, background.
2. The start is the inverted noise with origins copied to destinations, and where nothing is left
   fresh noise (``fill="noise"``), or what FastDrag interpolates there (``"neighbours"``).
3. The target prompt is sampled with attention that keeps the background and gives what moved its
   origin's keys, values and outputs (:mod:`._drag_attention`).

Where we deviate: the paper caches the source's attention tensors while inverting, for the
single-stream blocks of FLUX; here the source is a branch on its inverted trajectory, recomputed in
the same call. That costs N evaluations more and no memory, works for any inversion with a
trajectory, saved ones too, and reads the tensors at the trajectory's own states instead of
Uni-Inv's predictions of them. Models without single-stream blocks are controlled in all joint
blocks from `from_depth` on. In mode `move` the vacated places are interpolated unless told
otherwise: a whole object is gone there, and from fresh noise the prompt, which still tells of it,
draws it again. The paper does not say what the places between a magnified object's tokens start
from: fresh noise, since copies are painted as a pattern. The weight of the output's blend "decays
over time": we hold it at `blend_max` for a fifth of the steps and bring it to 0 by a cosine at
`blend_until`. At a partial strength fresh noise is laid over the picture filled in from around the
vacated places, at that level.

The paper runs without classifier-free guidance, and so does `retour.drag`; a guided target's
unconditional row is controlled alike. Drags shorter than half a token do nothing.

Cost: 2N evaluations (3N guided), beside the inversion.

Reference: Yin et al., "LazyDrag: Enabling Stable Drag-Based Editing on Multi-Modal Diffusion
Transformers via Explicit Correspondence", ICLR 2026, arXiv 2509.12203.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.hooks import AttentionControl
from ..core.branches import Branch, Denoiser, rescale
from ..core.control import Chain, Control
from ..core.grid import Step
from ..core.model import Model
from ..core.path import levels
from ..core.registry import Paper, register
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.base import Replay
from ..io import Placement
from ._drag_attention import Background, Identity, Queries, Refinement
from ._drag_map import (
    Drag,
    DragMap,
    Field,
    Mode,
    Pull,
    check_inside,
    drag_map,
    from_neighbours,
    from_tokens,
    parse_drags,
    to_tokens,
)
from ._track import OnTrack
from .base import EditJob, Editor, Start

Drags = str | Sequence[Any]


@dataclass(frozen=True)
class LazyDragOptions:
    """Options of LazyDrag.

    Attributes:
        drags: "x,y>x,y; x,y>x,y" in pixels of the picture ("*scale" behind one magnifies what it
            moves), or :class:`Drag` objects; for a batch, a list of such for each image. Without
            any, everything stays in place.
        mode: elastic `drag` of points, or `move` of the masked object as it is.
        field: every token obeys its nearest handle, or the average of all (FastDrag).
        fill: what the vacated places start from; None: `noise` in mode `drag`, `neighbours` in mode
            `move`. Noise that is interpolated is weak, which makes them even.
        gaps: what the places between the tokens of a magnified object start from: fresh noise, or
            a copy of the nearest token's.
        background: keep the background's attention tokens.
        identity_until: fraction of the steps with appended origins.
        queries: which image tokens see those.
        blend_max: weight of the output's blend at first.
        blend_hold: fraction of the steps with that weight.
        blend_until: fraction of the steps by which it has gone.
        band: width of the transition, in tokens.
        coverage: share of a token that the mask must cover for it to be edited.
        from_depth: first joint block controlled, as a fraction of their number, where a model has
            no single-stream blocks.
        seed: of the fresh noise.
    """

    drags: Drags = ""
    mode: Mode = "drag"
    field: Field = "nearest"
    fill: Literal["noise", "neighbours"] | None = None
    gaps: Literal["noise", "copy"] = "noise"
    background: bool = True
    identity_until: float = 0.8
    queries: Queries = "moved"
    blend_max: float = 0.8
    blend_hold: float = 0.2
    blend_until: float = 0.8
    band: int = 1
    coverage: float = 0.05
    from_depth: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("identity_until", "blend_max", "blend_hold", "blend_until", "coverage"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("from_depth", self.from_depth, 0, 1)
        check_range("band", self.band, 0)
        for image in read_drags(self.drags, 1):
            _check_drags(image, self.mode)


def read_drags(drags: Drags, images: int) -> list[tuple[Drag, ...]]:
    """One tuple of drags for each image: the same for all, or given one by one."""
    if isinstance(drags, str):
        return [parse_drags(drags)] * images
    given = list(drags)
    if any(isinstance(d, Drag) for d in given) or not given:
        if not all(isinstance(d, Drag) for d in given):
            raise RetourError(f"drags mix single drags and lists of them: {drags!r}")
        return [tuple(given)] * images
    per_image = [read_drags(d, 1)[0] for d in given]
    if images > 1 and len(per_image) != images:
        raise RetourError(
            f"{len(per_image)} lists of drags for {images} images: give one for each image"
        )
    return per_image


def _check_drags(drags: Sequence[Drag], mode: Mode) -> None:
    for drag in drags:
        if min(drag.scale) <= 0:
            raise RetourError(f"the drag {drag} has a scale of 0 or below: give a positive one")
        if mode == "drag" and drag.scale != (1.0, 1.0):
            raise RetourError(f"the drag {drag} has a scale, which only mode 'move' knows")


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
        """Attention control of every target, and the source on its trajectory.

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
        return Chain([_PlainSource(), OnTrack(job.inversion, watching=controls)])

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """The inverted noise, moved."""
        maps, options = self.maps(job), self.options
        state = replay.state
        z = state.x
        generator = torch.Generator().manual_seed(options.seed)
        noise = torch.randn(1, *z.shape[1:], generator=generator, dtype=z.dtype).to(z.device)
        fresh = self._fresh(job, maps, z, noise)
        moved = state.map(lambda v: self._moved(v, maps, fresh) if v.shape == z.shape else v)
        rows = [state if name == "source" else moved for name in job.layout.names]
        memory = {k: torch.cat([r.memory[k] for r in rows]) for k in state.memory}
        facts = {"drags": [[str(d) for d in drags] for drags in self._drags(job)]}
        return Start(State(torch.cat([r.x for r in rows]), memory), job.grid.steps, facts)

    def maps(self, job: EditJob) -> list[DragMap]:
        """One map for each image."""
        options, grid = self.options, _token_grid(job.model, job.inversion.latents)
        return [
            drag_map(
                self._editable(job, image, grid),
                [_pull(drag, job, image, grid) for drag in drags],
                options.mode,
                field=options.field,
                band=options.band,
            )
            for image, drags in enumerate(self._drags(job))
        ]

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
        single = [s for s in joint if s.name.startswith("single_")]
        chosen = single or [s for s in joint if s.depth >= self.options.from_depth]
        return frozenset(s.name for s in chosen)

    def _fresh(self, job: EditJob, maps: Sequence[DragMap], z: Tensor, noise: Tensor) -> Tensor:
        """What vacated places start from where it is noise, (B, C, h, w)."""
        alpha, sigma = levels(job.model.path, job.grid.times[-1], z)
        patch = _patch(job.model)
        clean = to_tokens(job.inversion.latents.to(z), patch).cpu()
        filled = [
            from_neighbours(tokens, m.vacated | m.destination, m.size)
            for tokens, m in zip(clean, maps, strict=True)
        ]
        return alpha * from_tokens(torch.stack(filled), patch, maps[0].size).to(z) + sigma * noise

    @property
    def _interpolates(self) -> bool:
        fill, mode = self.options.fill, self.options.mode
        return mode == "move" if fill is None else fill == "neighbours"

    def _moved(self, z: Tensor, maps: Sequence[DragMap], fresh: Tensor) -> Tensor:
        patch = z.shape[-1] // maps[0].size[1]
        tokens, others = (to_tokens(v, patch).cpu() for v in (z, fresh))
        rows = []
        for row, other, m in zip(tokens, others, maps, strict=True):
            moved = row[m.source]
            if self.options.gaps == "noise":
                moved = torch.where(m.gap[:, None], other, moved)
            if self._interpolates:
                moved = from_neighbours(moved, m.vacated, m.size)
            else:
                moved = torch.where(m.vacated[:, None], other, moved)
            rows.append(moved)
        return from_tokens(torch.stack(rows), patch, maps[0].size).to(z)


class _PlainSource(Control):
    """The source is read, not guided: one row."""

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Scale 1."""
        return rescale(branches, source=1.0)


def _patch(model: Model) -> int:
    """Latent cells of one token, along each side."""
    return model.latent_shape(model.multiple, model.multiple)[1]


def _token_grid(model: Model, latents: Tensor) -> tuple[int, int]:
    patch = _patch(model)
    return latents.shape[-2] // patch, latents.shape[-1] // patch


def _pull(drag: Drag, job: EditJob, image: int, grid: tuple[int, int]) -> Pull:
    """A drag in tokens: pixels' centres are at half-integers, tokens' at integers."""
    placements = job.inversion.record.get("placements")
    if placements is None:
        width, height = (n * job.model.multiple for n in (grid[1], grid[0]))
        place = Placement.plan((width, height), (width, height))
    else:
        place = Placement.read(placements[image])
    start, end = (_in_tokens(point, place, grid) for point in (drag.start, drag.end))
    shift = (end[0] - start[0], end[1] - start[1])
    return Pull(start, shift, (drag.scale[1], drag.scale[0]))


def _in_tokens(
    point: tuple[float, float], place: Placement, grid: tuple[int, int]
) -> tuple[float, float]:
    check_inside(point, place.original)
    across, down = point
    left, top, right, bottom = place.source
    to_left, to_top, to_right, to_bottom = place.target
    x = to_left + (across + 0.5 - left) * (to_right - to_left) / (right - left)
    y = to_top + (down + 0.5 - top) * (to_bottom - to_top) / (bottom - top)
    return y / place.canvas[1] * grid[0] - 0.5, x / place.canvas[0] * grid[1] - 0.5

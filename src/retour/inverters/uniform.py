r"""Uniform attention maps: an inversion that no prompt disturbs, beside the one that is edited.

Much of DDIM inversion's error comes from text attention that differs between the way up and the way
down. With uniform maps (:mod:`retour.attention.uniform`), the null prompt and guidance 1 on both
ways there is next to nothing left of it: the *uniform track* is a faithful reconstruction, but it
cannot be edited. So there are two tracks:

* the base inverter's own, with the source prompt: where an edit starts, under any editor;
* the uniform one. Its clean predictions anchor the unedited part of every edit
  (:mod:`retour.editors.uniform` has the adaptive mask); by itself, walked up and down again, it is
  what ``reconstruct`` returns, whatever the guidance asked.

Where we deviate: in the paper the anchor is the uniform track's way *back* (``anchor="returned"``).
That is faithful as far as this way back is, which on the embedded model, whose captions say all
that there is to see, it is not: of 21 edits in 10 steps the background under it came to 14.4 dB,
with a broken margin all around. The default reads the same track's predictions where they are
exact, on its *inverted* states: the clean and the noise part with which each interval leads from
one of them to the next, down to the data itself, as Direct Inversion would keep a branch on its
track. In the limit of many steps both are one. The background comes to 19.4 dB then.

The published code carries the uniform branch along in every edit. Nothing in it depends on the
target, so it is walked once, while inverting, and its predictions are kept: N evaluations less for
each further edit. The mask belongs to the inversion's way back, not to an editor, so it serves
every editor with or without attention control; its options matter on the way back only:
``inversion.with_options(quantile=0.7)``. All intervals have their anchor, masked or not (one of
the published functions lets the latent go stale).

``base`` is any of the inverters that the paper combines with; with ``direct`` the source is put
back on its track after the mask, so `clean_source` is overridden there.

Transformers with joint attention have no cross-attention to make uniform, and are refused.

Cost: the base inverter's (N), and N for the uniform track (2N returned).

Reference: Mo, Zhang, Bai, Su, Wen, "Uniform Attention Maps: Boosting Image Fidelity in
Reconstruction and Editing", WACV 2025, arXiv 2411.19652.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.control import AttentionControl
from ..attention.uniform import UniformMaps
from ..core.branches import Branch, Layout
from ..core.control import Control
from ..core.grid import Grid, Step
from ..core.registry import get, register
from ..core.solver import Solver
from ..core.state import Inversion, State
from ..editors.uniform import UNIFORM_PAPER, AdaptiveMask, Anchored, Dilate, held
from ..errors import check_range
from .base import Job, Replay
from .ddim import DDIMOptions

UNIFORM = "uniform"


@dataclass(frozen=True)
class UniformOptions(DDIMOptions):
    """Options of uniform attention maps.

    Attributes:
        base: inverter of the track that is edited, with its default options.
        quantile: level of the mask's threshold at the last step; the more, the less is edited.
        mask_until: steps are masked below this fraction of the model's training times; 0: never.
        dilation: radius of the mask's dilation, in latent cells.
        dilate: whether the edited or the kept part is dilated.
        clean_source: also give the source branch the faithful latents in the edited part.
        anchor: where the faithful latents are read: on the uniform track's `inverted` states, or
            on its way back (`returned`, as published).
    """

    base: Literal["ddim", "direct", "negative-prompt", "null-text"] = "ddim"
    quantile: float = 0.5
    mask_until: float = 0.2
    dilation: int = 1
    dilate: Dilate = "edit"
    clean_source: bool = False
    anchor: Literal["inverted", "returned"] = "inverted"


@register(
    "uniform-maps",
    task="invert",
    summary="a faithful track with uniform text attention anchors the unedited part of edits",
    paper=UNIFORM_PAPER,
    options=UniformOptions,
    order=1,
    nfe="2N",
    needs={"cross-attention"},
    provides={"trajectory", "anchor"},
)
class UniformInversion:
    """Two tracks up; edits anchored to the second on the way down."""

    def __init__(self, options: UniformOptions):
        self.options = options
        check_range("quantile", options.quantile, 0, 1)
        check_range("mask_until", options.mask_until, 0, 1)
        check_range("dilation", options.dilation, 0)
        self.base = get("invert", options.base).make(**_shared(options))

    def solver(self) -> Solver:
        """DDIM, both ways."""
        return get("solver", "ddim").make(query=self.options.query)

    def invert(self, job: Job) -> Inversion:
        """The base's inversion, and the uniform track up and down."""
        inversion: Inversion = self.base.invert(job)
        track, anchor = self._uniform(job, inversion.grid)
        return replace(
            inversion,
            method="uniform-maps",
            options=asdict(self.options),
            extras={**inversion.extras, "uniform": track, "anchor": anchor},
        )

    def _uniform(self, job: Job, grid: Grid) -> tuple[Tensor, Tensor]:
        """States up (N+1, ...), and the anchor, clean predictions interval by interval (N, ...)."""
        alike = replace(job, condition=job.negative, controls=[_Uniform()])
        up = alike.climb(self.solver(), grid, 1.0)["x"]
        down = up
        if self.options.anchor == "returned":
            down = alike.descend(self.solver(), State(up[-1]), grid, 1.0)["x"]
        path = job.model.path
        x0 = [held(path, s, down[s.index + 1], down[s.index]) for s in grid.walk(down=True)]
        return up, torch.stack(x0[::-1])

    def replay(self, inversion: Inversion) -> Replay:
        """The base's way back, anchored; alone, the uniform track."""
        back: Replay = self.base.replay(inversion)
        return replace(back, control=_Back(inversion, back.control), source_branch=True)


def _mask(inversion: Inversion) -> AdaptiveMask:
    """The adaptive mask that an inversion's options ask for."""
    model, options = inversion.attached(), inversion.options
    return AdaptiveMask(
        model.path,
        inversion.extras["anchor"],
        until=options["mask_until"] * model.train_steps,
        quantile=options["quantile"],
        radius=options["dilation"],
        dilate=options["dilate"],
        clean_source=options["clean_source"],
    )


def _shared(options: UniformOptions) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in fields(DDIMOptions)}


class _Uniform(Control):
    """Uniform maps as a run's control."""

    def attention(self) -> Sequence[AttentionControl]:
        """The maps, in the rows of the job's only branch."""
        return (UniformMaps("source"),)


class _Back(Anchored):
    """Edits go the base's way, masked; the source alone, a reconstruction, the uniform track.

    Args:
        inversion: with both tracks.
        base: the base's way.
    """

    def __init__(self, inversion: Inversion, base: Control):
        super().__init__([_mask(inversion), base])
        self.inversion, self.base = inversion, base

    def masked(self, **changes: Any) -> _Back:
        """The same way under a mask of other numbers."""
        return _Back(self.inversion.with_options(**changes), self.base)

    def attention(self) -> Sequence[AttentionControl]:
        """The edits', and the maps where a branch has their name."""
        return (*super().attention(), UniformMaps(UNIFORM))

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Alone: the null prompt without guidance, under the name that the maps know."""
        if [b.name for b in branches] == ["source"]:
            return (Branch(UNIFORM, self.inversion.negative),)
        return super().branches(step, branches)

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """Alone: start where the uniform track ends."""
        if layout.names != ("source",):
            return super().before_step(step, state, layout)
        if step.position > 0:
            return state
        return state.with_x(self.inversion.extras["uniform"][-1].to(state.x))

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Alone: nothing."""
        if layout.names == ("source",):
            return state
        return super().after_step(step, state, before, layout)

r"""Object-aware inversion and reassembly: each object is edited from the depth that suits it.

A colour changes in the last few steps, a shape needs nearly all of them. For an object named
:math:`o` in the source prompt, :math:`e` in the edit, inside the mask m, and for every depth j:

1. go down from the inverted state :math:`z^{(j)}` with the prompt in which only this object is
   changed, guided away from the *source prompt* (so equal prompts change nothing at any scale);
2. score what comes out: CLIP's fit of e inside m, and the change outside of m
   (:mod:`retour.editors._oir_search`); the best sum gives the object's depth :math:`j_k`.

One object: the best candidate is the result. Several: every object goes down from :math:`z^{(j_k)}`
to depth r, where they meet on the source's own background,
:math:`R = m_{bg} z^{(r)} + \sum_k m_k u_k`; R is inverted q steps further with the source prompt,
without guidance, which mends the seams, and all go down together with the full target prompt.

`retour.edit(inversion, target, editor="oir", mask=...)` edits the one object that the prompts
differ in; :func:`edit_objects` edits several. Where no mask is given, the source's attention to the
object's words makes it.

Where we deviate. The candidates' states at depth r are kept from the search, so they are not
walked again. Fractions of the steps replace the numbers 10 and 10 of 50. Where masks overlap the
deeper object wins; an object whose depth is r or less starts from r + 1, with a warning. Candidates
come down in batches that grow, by any solver and with what the inverter adds
(``schedule="join"``); the published order of calls, for DDIM only, is ``"refill"``. Patches outside
of the mask are hidden from CLIP entirely (published code: their scores are only lowered,
``mask_mode="additive01"``). S_n compares pixels in [-1, 1], not CLIP's normalised ones, which
differ by nearly equal factors. With a mask of `retour.edit` the background is the source's, as for
all editors.

Cost, with N steps and guidance: N(N+1) evaluations, N decodings and N CLIP images for each object,
much less with `every` (coarse, then fine); N for masks from attention; q + 2(r+q) to reassemble.

Reference: Yang et al., "Object-aware Inversion and Reassembly for Image Editing", ICLR 2024, arXiv
2310.12149.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..core.branches import Denoiser
from ..core.control import Control
from ..core.registry import Paper, register
from ..core.state import Inversion, State
from ..errors import RetourError, check_range
from ..inverters.base import Replay, way_back
from ._oir_candidates import join
from ._oir_clip import MaskedCLIP, Scorer, embedded
from ._oir_masks import resized, with_masks
from ._oir_pairs import Pair, Thing, all_replaced, read_pairs, things
from ._oir_search import Choice, search
from ._oir_way import SourceAsNegative, Way, together
from .base import EditJob, Editor, Start

if TYPE_CHECKING:
    from ..api import Result


@dataclass(frozen=True)
class OIROptions:
    """Options of OIR.

    Attributes:
        pairs: the objects: "old phrase -> new phrase @ mask.png; ...", or a list of (old, new,
            mask) or :class:`Pair`; None takes the phrases in which the prompts differ.
        phrase: what CLIP shall see in the mask; None takes the new phrase. For one object only.
        assemble: splice into the source and denoise together; None does so for several objects.
        reassembly: r, as a fraction of the steps; less of it and of q where the model mixes up
            several objects.
        reinversion: q, as a fraction of the steps.
        depth: fraction of the steps to edit from, in place of the search.
        every: try every so manyth depth, then all around the best; 1 tries all.
        schedule: order of the search's calls, `join` or `refill`.
        batch: candidates carried at once (`join`).
        unedited_first: let the source itself be the candidate of depth 1, as published.
        scorer: folder of a transformers CLIP, or any callable like
            :class:`retour.editors._oir_clip.Scorer`; None takes the embedded CLIP.
        mask_mode: how CLIP is kept inside the mask: `exclude` or `additive01`.
        threshold: of the attention, where no mask is given.
    """

    pairs: str | Sequence[Any] | Mapping[str, str] | None = None
    phrase: str | None = None
    assemble: bool | None = None
    reassembly: float = 0.2
    reinversion: float = 0.2
    depth: float | None = None
    every: int = 1
    schedule: Literal["join", "refill"] = "join"
    batch: int = 25
    unedited_first: bool = True
    scorer: str | Callable[..., Tensor] | None = None
    mask_mode: Literal["exclude", "additive01"] = "exclude"
    threshold: float = 0.3


@register(
    "oir",
    task="edit",
    summary="each object from the inversion depth that suits it, then all together",
    paper=Paper(
        title="Object-aware Inversion and Reassembly for Image Editing",
        authors="Yang, Zhen and Ding, Ganggui and Wang, Wen and Chen, Hao and Zhuang, Bohan and "
        "Shen, Chunhua",
        year=2024,
        arxiv="2310.12149",
        venue="ICLR 2024",
    ),
    options=OIROptions,
    nfe="N(N+1) an object",
    needs={"image"},
    requires={"trajectory"},
    mate="ddim",
)
class OIR(Editor):
    """Search of the depth, editing object by object, reassembly."""

    def __init__(self, options: OIROptions | None = None):
        options = OIROptions() if options is None else options
        self.pairs = None if options.pairs is None else read_pairs(options.pairs)
        self.scorer = options.scorer
        _check(options, self.pairs)
        # The record holds the options: phrases, not masks; names, not functions.
        self.options = replace(
            options,
            pairs=None if self.pairs is None else tuple(str(p) for p in self.pairs),
            scorer=getattr(options.scorer, "__name__", options.scorer),
        )

    @property
    def assembles(self) -> bool:
        """Whether the objects meet in the source, or the only one's best candidate is the end."""
        if self.options.assemble is not None:
            return self.options.assemble
        return self.pairs is not None and len(self.pairs) != 1

    def control(self, job: EditJob) -> Control:
        """Guidance away from the source prompt.

        Raises:
            RetourError: phrases that are not in the prompts; an object without mask and words;
                fractions of the steps that do not fit in them.
        """
        for (_, image), target in _rows(job):
            things(job, image, target, self.pairs)
        self._levels(job.grid.steps)
        return SourceAsNegative(job.inversion.condition)

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """Edit every object alone, and bring all to the level where they are one picture."""
        pictures = job.model.decode(job.inversion.latents.to(job.model.device)).cpu()
        size = (pictures.shape[-2], pictures.shape[-1])
        found = {key: things(job, key[1], target, self.pairs) for key, target in _rows(job)}
        masked = with_masks(job, found, size, self.options.threshold, denoiser.ledger)
        scorer, ends, facts = self._load_scorer(), {}, []
        for key, objects in masked.items():
            way = _way(job, denoiser, *key)
            chosen = [self._choose(way, thing, pictures[key[1]], scorer) for thing in objects]
            ends[key] = self._meet(way, job, key[1], objects, chosen)
            facts.append(_facts(key, objects, chosen))
        level, layout = sum(self._levels(job.grid.steps)), denoiser.layout
        keys = [(name, image) for name in layout.names for image in range(layout.images)]
        rows = [ends[k] if k in ends else _way(job, denoiser, *k).at(level) for k in keys]
        return Start(together(rows), level, {"objects": facts})

    def _levels(self, steps: int) -> tuple[int, int]:
        """(r, q) for this number of steps."""
        if not self.assembles:
            return 0, 0
        r, q = (round(part * steps) for part in (self.options.reassembly, self.options.reinversion))
        if r + q > steps or r >= steps:
            raise RetourError(
                f"reassembly {self.options.reassembly:g} and reinversion "
                f"{self.options.reinversion:g} do not fit in {steps} steps: together at most 1"
            )
        return r, q

    def _load_scorer(self) -> Scorer:
        if callable(self.scorer):
            return self.scorer
        if self.scorer is None:
            return embedded(self.options.mask_mode)
        return MaskedCLIP.from_folder(self.scorer, self.options.mask_mode)

    def _choose(self, way: Way, thing: Thing, picture: Tensor, scorer: Scorer) -> Choice:
        condition = way.embed(thing.prompt)
        keep_at, o = self._levels(way.steps)[0], self.options
        if o.depth is not None:
            depth = max(1, round(o.depth * way.steps))
            return Choice(depth, join(way, condition, [depth], keep_at=keep_at), {})
        assert thing.mask is not None
        return search(
            way,
            condition,
            thing.pair.target if o.phrase is None else o.phrase,
            thing.mask,
            picture,
            scorer,
            every=o.every,
            keep_at=keep_at,
            batch=o.batch,
            schedule=o.schedule,
            unedited_first=o.unedited_first,
        )

    def _meet(
        self, way: Way, job: EditJob, image: int, objects: Sequence[Thing], chosen: Sequence[Choice]
    ) -> State:
        """Splice the objects into the source at level r, and invert to level r + q."""
        r, q = self._levels(way.steps)
        state = way.at(r)
        for thing, choice in sorted(zip(objects, chosen, strict=True), key=lambda p: p[1].depth):
            mask = self._splice_mask(job, image, thing, state.x)
            state = _spliced(state, self._arrived(way, thing, choice, r), mask)
        return way.up(state, r, r + q)

    def _splice_mask(self, job: EditJob, image: int, thing: Thing, x: Tensor) -> Tensor:
        if not self.assembles:
            # The candidate itself, kept inside the edit's mask as every editor is.
            return torch.ones_like(x[:, :1]) if job.mask is None else job.mask[image][None].to(x)
        assert thing.mask is not None
        return resized(thing.mask, (x.shape[-2], x.shape[-1]))[None, None].to(x)

    def _arrived(self, way: Way, thing: Thing, choice: Choice, r: int) -> State:
        """The object's state at level r."""
        if r == 0:
            return way.replay.solver.start(choice.candidates.ends[choice.depth])
        if choice.depth > r:
            return choice.candidates.halfway[choice.depth]
        warnings.warn(
            f"{str(thing.pair)!r} is best edited from depth {choice.depth}, which does not reach "
            f"the reassembly depth {r}: it starts from depth {r + 1}",
            stacklevel=2,
        )
        found = choice.candidates.halfway
        if r + 1 not in found:
            found = join(way, way.embed(thing.prompt), [r + 1], keep_at=r).halfway
        return found[r + 1]


def _check(options: OIROptions, pairs: Sequence[Pair] | None) -> None:
    """Refuse what cannot work, before anything is loaded."""
    for name in ("reassembly", "reinversion", "depth", "threshold"):
        if getattr(options, name) is not None:
            check_range(name, getattr(options, name), 0, 1)
    for name in ("every", "batch"):
        check_range(name, getattr(options, name), 1)
    if options.schedule == "refill" and options.every != 1:
        raise RetourError("schedule 'refill' tries all depths: leave every at 1, or use 'join'")
    if options.phrase is not None and pairs is not None and len(pairs) > 1:
        raise RetourError("phrase is for one object: several have their own in pairs")
    if options.assemble is False and pairs is not None and len(pairs) != 1:
        raise RetourError(f"{len(pairs)} objects need assemble: leave it out")
    if isinstance(options.scorer, str) and not Path(options.scorer).is_dir():
        raise RetourError(f"scorer is {options.scorer!r}: name a folder with a transformers CLIP")


def _rows(job: EditJob) -> list[tuple[tuple[str, int], str]]:
    """((target branch, image), target prompt) of every row."""
    return [((name, i), t) for name, targets in job.targets.items() for i, t in enumerate(targets)]


def _way(job: EditJob, denoiser: Denoiser, name: str, image: int) -> Way:
    """The way back of one image, guided as that branch is."""
    [branch] = [b for b in denoiser.branches if b.name == name]
    inversion = job.inversion.take([image])
    replay = way_back(inversion)
    rule, ledger = denoiser.guidance, denoiser.ledger
    return Way(job.model, inversion, replay, branch.scale, rule, ledger)


def _spliced(state: State, other: State, mask: Tensor) -> State:
    """`other` inside the mask, with what solvers remember where both do."""
    memory = {k: torch.lerp(v, other.memory[k], mask) for k, v in state.memory.items()}
    return State(torch.lerp(state.x, other.x, mask), memory)


def _facts(
    key: tuple[str, int], objects: Sequence[Thing], chosen: Sequence[Choice]
) -> dict[str, Any]:
    """What was found, for the record."""
    return {
        "branch": key[0],
        "image": key[1],
        "objects": [
            {
                "pair": str(thing.pair),
                "prompt": thing.prompt,
                "depth": choice.depth,
                "scores": {str(d): list(pair) for d, pair in sorted(choice.scores.items())},
            }
            for thing, choice in zip(objects, chosen, strict=True)
        ],
    }


def edit_objects(
    inversion: Inversion,
    pairs: str | Sequence[Any] | Mapping[str, str],
    target: str | Sequence[str] | None = None,
    **options: Any,
) -> Result:
    """Change several objects, each inside its own mask and from its own depth.

    Args:
        inversion: from `retour.invert`, with its model attached.
        pairs: (phrase of the source prompt, new phrase, mask), any number of them; a mask is
            anything that shows a picture, white inside; left out, attention makes it.
        target: the full target prompt; None replaces all phrases in the source prompt.
        options: of :class:`OIROptions` and of `retour.edit`.
    """
    from ..api import edit

    chosen = read_pairs(pairs)
    if target is None:
        target = [all_replaced(prompt, chosen) for prompt in inversion.prompts]
    return edit(inversion, target, editor="oir", pairs=chosen, **options)

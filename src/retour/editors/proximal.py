r"""Proximal guidance: only large differences between the prompts are amplified, the rest returns.

Prompt-to-Prompt with the source prompt as negative prompt (:mod:`retour.inverters.negative_prompt`)
and two changes, which SPDInv and DCI edit with as well. With :math:`\delta = \epsilon_c -
\epsilon_u` and :math:`\lambda` the quantile q of :math:`|\delta|`,

.. math:: \epsilon = \epsilon_u + w\,\operatorname{prox}(\delta), \qquad
    \operatorname{prox}_{\ell_0}(\delta) = \delta\,[\,|\delta| > \lambda\,], \quad
    \operatorname{prox}_{\ell_1}(\delta) = \operatorname{sign}(\delta)\max(|\delta| - \lambda, 0)

(*proximal guidance*), and in the last steps, after each of them, with M the dilated places where
:math:`|\delta| > \lambda` and :math:`z^*` the inverted trajectory,

.. math:: z \leftarrow z - \eta\,(1 - M)\,(z - z^*)

(*inversion guidance*): what is not being edited comes back as it was, exactly at :math:`\eta = 1`.
In the paper M is one mask for each latent channel. The source has nothing to edit: its M is empty,
and since its two halves are one it is carried without an unconditional row.

Where we deviate: the published M is that of the step alone (``edited="step"``). Late steps find
little left to change in places that earlier ones have edited, and pulling those back, channel by
channel, punches holes of wrong colour into what was edited. That is plain to see where the edited
thing covers more of the picture than the part 1 - q that a step may edit, as on small pictures of
one object. So M holds here what was edited in any step so far (``edited="run"``).

*Channels.* The paper's quantile is one of single numbers, so of a place that changes some channels
are amplified and others left, which is a wrong colour: a white ground asked for in navy blue comes
out green. Here a place is amplified or left as a whole, by the root mean square of its difference
over the channels (``each="place"``); ``each="number"`` is the paper's.

*Guidance.* A difference between two prompts is the whole edit already, and as large as the one
between a prompt and none, or larger: amplified by the same w it oversaturates. The paper's answer
is the threshold, which suffices where little changes. Here targets are also pushed less, at
:math:`w' = 1 + p\,(w - 1)` with p = 0.25, wherever the negative prompt is the source's; ``push=1``
is the edit's guidance as published.

Thresholds are quantiles, so both act alike on noise, velocity and clean faces (here on the
velocity, which is finite everywhere); each image of each branch has its own. Differences of the
size of rounding count as none.

Paper and code differ, and ``prox="published"`` is the code: its "l0" subtracts
:math:`\operatorname{clamp}(\delta, -\lambda, \lambda)`, which is :math:`\ell_1`'s operator; it
compares what is left with :math:`\lambda` again, so M is where :math:`|\delta| > 2\lambda`; and its
quantile runs over source and target together, of which the source's differences are zeros, so its
0.7 is the target's 0.4.

`negative` is the source prompt where the inverter has no negative prompt of its own (learned
embeddings stay). That is guidance 1 for the source: of inverters that are exact at another guidance
it costs the early source branch its exactness, until inversion guidance brings it back;
``negative="inversion"`` leaves theirs.

Where nothing is guided (guidance 1) nothing is measured, and targets are not pulled.

Cost: 3N evaluations for one target (source, and both halves of the target).

Reference: Han et al., "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance",
WACV 2024, arXiv 2306.05414. Default schedules: Li et al., arXiv 2403.11105 and 2506.02560.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Chain, Control
from ..core.grid import Step
from ..core.guidance import CFG, Guidance
from ..core.model import Condition
from ..core.path import Prediction
from ..core.registry import Paper, register
from ..core.rows import rms
from ..core.state import Inversion, State
from ..errors import check_range
from ._inject import pushed
from .base import EditJob
from .p2p import P2POptions, PromptToPrompt, Steps

Prox = Literal["l0", "l1", "published"]
Each = Literal["place", "number"]
ROUNDING = 1e-5  # of the prediction: what equal prompts may differ by in a float32 network


@dataclass(frozen=True)
class Proximal:
    """Guidance by the proximal part of the difference; a guidance rule for any run.

    Attributes:
        quantile: level of the threshold among an image's differences.
        prox: the operator, see the module.
        each: what is kept or left: a `place` with all of its channels, or a single `number`.
        inner: rule that combines what is left.
        watch: told where each batch of predictions is edited, (B, C, h, w) bool, if given.
    """

    quantile: float = 0.7
    prox: Prox = "l0"
    each: Each = "number"
    inner: Guidance = CFG()
    watch: Callable[[Tensor], None] | None = None

    def __post_init__(self) -> None:
        check_range("quantile", self.quantile, 0, 1)

    def active(self, t: float) -> bool:
        """As the inner guidance."""
        return self.inner.active(t)

    def __call__(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        """Inner guidance on differences that were thresholded."""
        size = (cond.velocity - uncond.velocity).abs()
        if self.each == "place":
            size = size.square().mean(1, keepdim=True).sqrt().expand_as(size)
        limit = self.limit(size, uncond.velocity)
        if self.watch is not None:
            self.watch(size > (2 * limit if self.prox == "published" else limit))
        kept = self.kept(size, limit)
        near = Prediction(
            uncond.x0 + kept * (cond.x0 - uncond.x0), uncond.eps + kept * (cond.eps - uncond.eps)
        )
        return self.inner(near, uncond, scale)

    def limit(self, size: Tensor, prediction: Tensor) -> Tensor:
        """Threshold of each row, (B, 1, 1, 1), given the sizes of its differences."""
        flat = size.flatten(1)
        if self.prox == "published":
            flat = torch.cat([flat, torch.zeros_like(flat)], 1)
        limit = ROUNDING * rms(prediction)
        if self.quantile > 0:
            limit = torch.maximum(limit, flat.quantile(self.quantile, 1))
        return limit[:, None, None, None]

    def kept(self, size: Tensor, limit: Tensor) -> Tensor:
        """Part of each difference that is left, in [0, 1]."""
        if self.prox == "l0":
            return (size > limit).to(size)
        return (1 - limit / size).clamp_min(0).nan_to_num(0)


class InversionGuidance(Control):
    """Proximal guidance, and a pull towards the inverted trajectory where it finds nothing to edit.

    Args:
        inversion: whose states are followed, and whose source prompt may be the negative one.
        rule: the guidance; its `inner` and `watch` are set here.
        pull: part of the way to the trajectory, 1 being all of it.
        last: fraction of the steps, at the clean end, after which latents are pulled.
        dilation: radius by which edited places are dilated, in latent cells.
        remember: whether what was edited in an earlier step stays so.
        negative: whether the source prompt replaces the inversion's own negative prompt.
        push: part of the guidance beyond 1 that is left where the source's is the negative prompt.
    """

    def __init__(
        self,
        inversion: Inversion,
        rule: Proximal,
        *,
        pull: float = 1.0,
        last: float = 0.4,
        dilation: int = 1,
        remember: bool = True,
        negative: bool = True,
        push: float = 1.0,
    ):
        self.inversion, self.rule = inversion, rule
        self.negative, self.push = negative, push
        self.pull, self.last, self.dilation, self.remember = pull, last, dilation, remember
        self._seen: list[Tensor] = []
        self._edited: dict[str, Tensor] = {}
        self._unedited: set[str] = {"source"}

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """The source prompt as negative prompt; a branch guided by itself needs no guidance."""
        self._unedited = {"source"}
        return tuple(self._branch(branch) for branch in branches)

    def _branch(self, branch: Branch) -> Branch:
        negative = branch.uncond
        if negative is None:
            return branch
        if self.negative and _same(negative, self.inversion.negative):
            negative = self.inversion.condition
        if _same(negative, branch.condition):
            self._unedited.add(branch.name)
            return replace(branch, uncond=negative, scale=1.0)
        against = _same(negative, self.inversion.condition)
        scale = pushed(branch.scale, self.push) if against else branch.scale
        return replace(branch, uncond=negative, scale=scale)

    def guidance(self, step: Step, rule: Guidance) -> Guidance:
        """The proximal rule around the run's own."""
        return replace(self.rule, inner=rule, watch=self._seen.append)

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Keep what the rule saw in the solver's own evaluations, branch by branch."""
        guided = [branch.name for branch in denoise.branches if branch.guided]
        earlier = self._edited if self.remember and step.position > 0 else {}

        def keep(prediction: Prediction, x: Tensor, t: float) -> Prediction:
            found = dict(zip(guided, self._seen[len(self._seen) - len(guided) :], strict=False))
            self._edited = {n: m | earlier[n] if n in earlier else m for n, m in found.items()}
            self._seen.clear()
            return prediction

        return Wrapped(denoise, keep)

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Pull, with what the solver remembers of the latents too where its track is known."""
        if not step.down or step.index >= round(self.last * step.count, 9):
            return state
        track = self.inversion.at(step.arrival)
        return state.beside(track, lambda value, held: self._pull(value, held, layout))

    def _pull(self, value: Tensor, track: Tensor, layout: Layout) -> Tensor:
        track = track.to(value)
        parts = []
        for name, part in layout.split(value):
            strength = torch.zeros_like(part)
            if name in self._unedited:
                strength += self.pull
            elif name in self._edited:
                strength += self.pull * (1 - self._dilated(self._edited[name]).to(part))
            # Not `part - strength (part - track)`, which at 1 leaves rounding.
            parts.append((1 - strength) * part + strength * track)
        return torch.cat(parts)

    def _dilated(self, mask: Tensor) -> Tensor:
        size = 2 * self.dilation + 1
        return F.max_pool2d(mask.float(), size, stride=1, padding=self.dilation)


def _same(one: Condition, other: Condition) -> bool:
    return one is other or all(
        torch.equal(value, other.tensors[name]) for name, value in one.tensors.items()
    )


@dataclass(frozen=True)
class ProximalOptions(P2POptions):
    """Options of proximal guidance, beside Prompt-to-Prompt's.

    Attributes:
        prox: keep large differences whole (`l0`), shrink all (`l1`), or do as the published code.
        quantile: part of an image's differences that is not amplified.
        pull: part of the way to the inverted trajectory that unedited places are pulled; 0: none.
        pull_last: fraction of the steps, at the clean end, in which they are.
        dilation: radius by which edited places are dilated, in latent cells.
        edited: places count as edited if they are in this step (`step`) or were in any (`run`).
        negative: the negative prompt: the source prompt, or what the inversion brings.
        push: part of the guidance beyond 1 that is left against the source prompt; 1: all of it.
        each: what is amplified or left: a `place` with all of its channels, or a single `number`.
    """

    mode: Literal["auto", "replace", "refine"] = "refine"
    cross_steps: Steps = 0.8
    prox: Prox = "l0"
    quantile: float = 0.7
    pull: float = 1.0
    pull_last: float = 0.4
    dilation: int = 1
    edited: Literal["run", "step"] = "run"
    negative: Literal["source", "inversion"] = "source"
    push: float = 0.25
    each: Each = "place"

    def __post_init__(self) -> None:
        for name in ("quantile", "pull", "pull_last", "push"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("dilation", self.dilation, 0)


@register(
    "proximal",
    task="edit",
    summary="Prompt-to-Prompt that amplifies large differences only; the rest returns on its track",
    paper=Paper(
        title="ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance",
        authors="Han, Ligong and Wen, Song and Chen, Qi and Zhang, Zhixing and Song, Kunpeng and "
        "Ren, Mengwei and Gao, Ruijiang and Stathopoulos, Anastasis and He, Xiaoxiao and "
        "Chen, Yuxiao and Liu, Di and Zhangli, Qilong and Jiang, Jindong and Xia, Zhaoyang and "
        "Srivastava, Akash and Metaxas, Dimitris",
        year=2023,
        arxiv="2306.05414",
        venue="WACV 2024",
    ),
    options=ProximalOptions,
    nfe="3N",
    needs={"attention"},
    requires={"trajectory"},
    mate="negative-prompt",
)
class ProximalEditor(PromptToPrompt):
    """Prompt-to-Prompt with proximal and inversion guidance."""

    options: ProximalOptions

    def __init__(self, options: ProximalOptions | None = None):
        super().__init__(ProximalOptions() if options is None else options)

    def control(self, job: EditJob) -> Control:
        """Guidance and pull, then attention control and local blend."""
        options = self.options
        guide = InversionGuidance(
            job.inversion,
            Proximal(options.quantile, options.prox, options.each),
            pull=options.pull,
            last=options.pull_last,
            dilation=options.dilation,
            remember=options.edited == "run",
            negative=options.negative == "source",
            push=options.push,
        )
        return Chain([guide, super().control(job)])

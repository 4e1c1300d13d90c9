r"""Guide-and-Rescale: hold on to the image by energies on what the network computes inside.

From the inverted noise the target is sampled with guidance; for the first :math:`\tau` of the steps
the gradient of an energy joins in. At :math:`x_t`, with :math:`x^*_t` the inverted latents of the
same time and A, :math:`\Phi` the network's self-attention maps and decoder features,

.. math::
    g_{self} &= \sum_{layers} \operatorname{mean} (A(x^*_t, y_{src}) - A(x_t, y_{src}))^2\\
    g_{feat} &= \operatorname{mean} |\Phi(x^*_t, y_{src}) - \Phi(x_t, y_{src})|
        &&\text{(keep: the decoder's last block)}\\
    g_{feat} &= \operatorname{mean} (\Phi(x^*_t, y_{src}) - \Phi(x_t, y_{trg}))^2
        &&\text{(style: its middle ResNet at a quarter)}\\
    n &= \nabla_{x_t} (v_{self}\, g_{self} + v_{feat}\, g_{feat}), \qquad
    D = w\,(\epsilon(y_{trg}) - \epsilon(\varnothing))\\
    \hat\epsilon &= \epsilon(\varnothing) + D + \gamma n, \qquad
    \gamma \frac{|n|}{|D|} = \operatorname{clip}\Big(\frac{|n|}{|D|}, r_{low}, r_{high}\Big)

A step moves x against :math:`\hat\epsilon`, so it goes down the energy. Norms, energies and
clipping are those of each image. At the first step both latents are one, the energy is 0, and
nothing is added; the same wherever the scaled energy is within 1e-8 of 0. Where D is 0 the ratio
counts as 1.

Networks that predict noise, v or x0 are guided in :math:`\epsilon`, and x0 follows so that
:math:`\alpha x_0 + \sigma \epsilon` stays :math:`x_t`; on the flow the same is done to the
velocity, which is regular at pure noise too.

Presets: ``keep`` for edits of things, ``style`` for styles; :data:`PRESETS` has their numbers, the
published ones for Stable Diffusion. With the style preset's :math:`r_{low} = r_{high}` the scales
only balance the two energies; with the other they also decide where in the interval the ratio is.

Small latents: a map over L places has entries of about 1/L, so the mean of its squares goes like
:math:`L^{-2}`, and the gradient of a mean over places like 1/L. `scaled` therefore multiplies
:math:`v_{self}` by :math:`(L/64^2)^2` and :math:`v_{feat}` by :math:`L/64^2`, with L the number of
latent places: nothing changes at 64 x 64, at 16 x 16 they are 1172 and 31.

Where we deviate: norms are those of the published code (the paper prints squared ones, which do not
bound the ratio), and so is `until` (30 of 50 steps; the paper's appendix says 35). The published
code runs all its evaluations also after the last guided step. Its inversion reads each latent one
grid step too clean, so that its references are one step noisier: ``shift=1``. A solver that asks
between two grid times is given the reference of the nearer one. Joint attention: A is the block of
image queries and image keys. Inversion at guidance 1 is the paper's; the way back of any other
inverter (null-text, negative-prompt) serves as well.

Cost: 2N evaluations, and per guided step two more and a gradient through one (`keep`: 3.2N in all),
or three more and a gradient through two (`style`: 3.5N; published: 4 in place of our 5, since the
target's row is read where guidance needs it anyway). Memory: the maps of one evaluation with their
graph; `self_max=0.5` leaves out the finest, which are nearly all of it.

Reference: Titov et al., "Guide-and-Rescale: Self-Guidance Mechanism for Effective Tuning-Free Real
Image Editing", ECCV 2024, arXiv 2409.01322.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

from torch import Tensor

from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step, part_of
from ..core.guidance import Guidance
from ..core.registry import Paper, register
from ..errors import RetourError, check_range
from ._balance import Halves, Pulled
from ._energy import Internals, Reads, descent, distance, look
from ._inject import decoder_site
from .base import EditJob, Editor

PLACES = 64 * 64  # of the latents that the published scales are for


@dataclass(frozen=True)
class Preset:
    """Numbers of one kind of edit.

    Attributes:
        self_scale: :math:`v_{self}`.
        feature_scale: :math:`v_{feat}`.
        until: :math:`\\tau` as a fraction of the steps.
        low: smallest ratio of the energy's gradient to the guidance.
        high: largest ratio.
        power: of the features' differences.
    """

    self_scale: float
    feature_scale: float
    until: float
    low: float
    high: float
    power: int


PRESETS = {
    "keep": Preset(300_000, 500, 0.6, 0.33, 3.0, 1),
    "style": Preset(100_000, 2.5, 0.5, 1.5, 1.5, 2),
}


@dataclass(frozen=True)
class GuideRescaleOptions:
    """Options of Guide-and-Rescale; None takes the preset's number.

    Attributes:
        preset: `keep` the scene while things change, or change the `style`.
        self_scale: weight of the self-attention energy.
        feature_scale: weight of the feature energy.
        until: fraction of the steps, from the noisy end, that are guided by energies.
        low: smallest ratio of their gradient to the guidance.
        high: largest ratio.
        scaled: adapt both weights to the number of latent places, see the module.
        self_max: finest self-attention in the energy, as a fraction of the latents' edge.
        shift: grid steps by which the reference is noisier than the latents (1: published code).
        depth: where in a transformer the style preset's features are.
    """

    preset: Literal["keep", "style"] = "keep"
    self_scale: float | None = None
    feature_scale: float | None = None
    until: float | None = None
    low: float | None = None
    high: float | None = None
    scaled: bool = True
    self_max: float = 1.0
    shift: int = 0
    depth: float = 0.4

    def numbers(self) -> Preset:
        """The preset with the numbers that were given."""
        preset = PRESETS[self.preset]
        named = {f.name: getattr(self, f.name, None) for f in fields(Preset)}
        return replace(preset, **{k: v for k, v in named.items() if v is not None})


@register(
    "guide-rescale",
    task="edit",
    summary="energies on self-attention and features, balanced against the guidance",
    paper=Paper(
        title="Guide-and-Rescale: Self-Guidance Mechanism for Effective Tuning-Free Real Image "
        "Editing",
        authors="Titov, Vadim and Khalmatova, Madina and Ivanova, Alexandra and "
        "Vetrov, Dmitry and Alanov, Aibek",
        year=2024,
        arxiv="2409.01322",
        venue="ECCV 2024",
    ),
    options=GuideRescaleOptions,
    nfe="3.2N + 0.6N gradients",
    needs={"attention", "features", "gradients"},
    requires={"trajectory"},
)
class GuideRescale(Editor):
    """Self-guidance with rescaled gradients."""

    def __init__(self, options: GuideRescaleOptions | None = None):
        self.options = GuideRescaleOptions() if options is None else options
        numbers = self.options.numbers()
        for name in ("self_scale", "feature_scale", "low"):
            check_range(name, getattr(numbers, name), 0)
        check_range("high", numbers.high, numbers.low)
        check_range("until", numbers.until, 0, 1)
        check_range("self_max", self.options.self_max, 0, 1)
        check_range("shift", self.options.shift, 0)
        check_range("depth", self.options.depth, 0, 1)

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """The usual branches; they must be guided, since energies are measured by the guidance."""
        if any(not branch.guided for branch in branches if branch.name != "source"):
            raise RetourError(
                "guide-rescale balances its energies against the guidance: give a guidance scale "
                "other than 1"
            )
        return branches

    def control(self, job: EditJob) -> Control:
        """The energies of this job."""
        return _Guide(job, self.options)


class Energy:
    """The scaled energy of target latents, given what the network computed for the reference.

    Args:
        job: the edit.
        options: weights and layers.
    """

    def __init__(self, job: EditJob, options: GuideRescaleOptions):
        height, width = job.inversion.latents.shape[-2:]
        numbers = options.numbers()
        part = height * width / PLACES if options.scaled else 1.0
        self.self_scale = numbers.self_scale * part**2
        self.feature_scale = numbers.feature_scale * part
        self.power, self.style = numbers.power, options.preset == "style"
        self.source, self.times = job.inversion.condition, job.grid.times
        self.track, self.shift = job.inversion.states["x"], options.shift
        tap = self._tap(job, (height, width), options)
        self.maps = Reads("image", options.self_max)
        self.features = Reads(features=frozenset({tap}))
        self.both = replace(self.maps, features=self.features.features)

    def _tap(self, job: EditJob, latent: tuple[int, int], options: GuideRescaleOptions) -> str:
        if self.style:
            site = decoder_site(job.model, latent, "resnet", joint="block", depth=options.depth)
            return site.name
        return [site for site in job.model.feature_sites() if site.kind == "block"][-1].name

    def reference(
        self, denoise: Denoiser | Wrapped, step: Step, t: float
    ) -> tuple[Internals, Internals]:
        """Maps and features of the inverted latents nearest to time `t`, B rows."""
        place = min((step.index + 1, step.index), key=lambda k: abs(self.times[k] - t))
        place = min(place + self.shift, len(self.track) - 1)
        x = self.track[place].to(denoise.model.device)
        return look(denoise, [self.source], x, t, self.both)

    def __call__(
        self,
        denoise: Denoiser | Wrapped,
        targets: list[Branch],
        reference: tuple[Internals, Internals],
        x: Tensor,
        t: float,
    ) -> Tensor:
        """Energy per row of `x` (targets * B, C, h, w)."""
        wanted_maps, wanted_features = (
            {k: v.repeat(len(targets), *[1] * (v.ndim - 1)) for k, v in part.items()}
            for part in reference
        )
        sources = [self.source] * len(targets)
        if self.style:
            maps, _ = look(denoise, sources, x, t, self.maps)
            _, features = look(denoise, [b.condition for b in targets], x, t, self.features)
        else:
            maps, features = look(denoise, sources, x, t, self.both)
        return self.self_scale * distance(maps, wanted_maps, 2) + self.feature_scale * distance(
            features, wanted_features, self.power
        )

    def slope(
        self,
        step: Step,
        denoise: Denoiser | Wrapped,
        targets: list[Branch],
        x: Tensor,
        t: float,
    ) -> tuple[Tensor, Tensor]:
        """Energy of each row, and its gradient."""
        reference = self.reference(denoise, step, t)
        return descent(lambda leaf: self(denoise, targets, reference, leaf, t), x)


class _Guide(Control):
    """Adds the rescaled gradient to the predictions of the targets."""

    def __init__(self, job: EditJob, options: GuideRescaleOptions):
        self.numbers, self.energy = options.numbers(), Energy(job, options)
        self.until = part_of(self.numbers.until, job.grid.steps)
        self.halves: Halves | None = None

    def guidance(self, step: Step, rule: Guidance) -> Guidance:
        """The step's rule, watched while energies guide."""
        self.halves = Halves(rule) if step.down and step.position < self.until else None
        return rule if self.halves is None else self.halves

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Predictions with the energies' gradient."""
        if self.halves is None:
            return denoise
        slope, numbers = partial(self.energy.slope, step), self.numbers
        return Pulled(denoise, self.halves, layout, slope, numbers.low, numbers.high)

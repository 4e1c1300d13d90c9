r"""Plug-and-Play: the features of the image's own trajectory, plugged into the target.

A feature source runs beside the target: at the step from time t the network also sees the
*inverted* latents :math:`z^*_t` with the empty prompt. What it computes there replaces, in all rows
of the target,

- for the first `features` of the steps the output of one ResNet block of the decoder (its second
  convolution, before the residual is added): the semantic layout;
- for the first `attention` of the steps queries and keys of the decoder's self-attention from that
  block on: the finer structure. Values are the target's own: the appearance is the text's.

The source's row is put on the inverted trajectory at every step, whatever the inverter's way back
does, and needs no guidance: three rows for one target. With Direct Inversion this editor has no
offsets to add, its trajectory is what matters.

Layers: "decoder layer 4, attention of layers 4 to 11" of Stable Diffusion are the middle ResNet
block of the decoder at a quarter of the latents' edge (at 8 where a quarter would be less: 16 x 16
latents) and all self-attention that runs after it. A transformer with joint attention has neither
decoder nor resolutions: there the image's attention output of the block nearest to `depth` stands
for the block's convolution, and queries and keys of the *image* tokens for self-attention.

Negative prompt: that of the inversion by default. The protocol of Direct Inversion's paper uses
``negative="ugly, blurry, black, low res, unrealistic"``. The original code's slow blend of a second
negative prompt is not offered. That code also inverts in 999 steps, samples in 50 at guidance 10,
and plugs one step longer (features while i <= 40, attention while i <= 25).

Cost: 3N evaluations for one target with guidance.

Reference: Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image
Translation", CVPR 2023, arXiv 2211.12572.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl
from ..attention.features import FeatureCall, FeatureControl
from ..core.branches import Branch, Layout
from ..core.control import Chain, Control
from ..core.grid import Step, part_of
from ..core.model import AttentionSite, FeatureSite
from ..core.registry import Paper, register
from ..core.state import State
from ..errors import check_range
from ._inject import attention_after, borrowed, decoder_site, embed, lenders
from ._track import OnTrack
from .base import EditJob, Editor


@dataclass(frozen=True)
class PnPOptions:
    """Options of Plug-and-Play.

    Attributes:
        features: fraction of the steps, from the noisy end, with the source's features.
        attention: the same for queries and keys of self-attention.
        negative: negative prompt of the targets; None takes the inversion's.
        depth: where in a transformer the features are, as a fraction of its depth.
    """

    features: float = 0.8
    attention: float = 0.5
    negative: str | None = None
    depth: float = 0.4


class InjectedFeatures(FeatureControl):
    """The source's features in all rows of the targets, at one site.

    Args:
        site: name of the site.
        stop: past-the-end step, counted from the noisy end.
    """

    def __init__(self, site: str, stop: int):
        self.site, self.stop = site, stop

    def wants(self, site: FeatureSite) -> bool:
        """The one."""
        return site.name == self.site

    def active(self, call: FeatureCall) -> bool:
        """In the first steps of a descent with a source."""
        return _early(call.step, self.stop) and lenders(call.rows) is not None

    def output(self, call: FeatureCall, value: Tensor) -> Tensor:
        """Each row takes its source's."""
        rows = lenders(call.rows)
        assert rows is not None
        return value[rows.to(value.device)]


class InjectedQueriesAndKeys(AttentionControl):
    """The source's queries and keys of the image in all rows of the targets.

    Args:
        sites: names of the layers.
        stop: past-the-end step, counted from the noisy end.
    """

    def __init__(self, sites: Collection[str], stop: int):
        self.sites, self.stop = frozenset(sites), stop

    def wants(self, site: AttentionSite) -> bool:
        """Self or joint attention among the chosen layers."""
        return site.kind != "cross" and site.name in self.sites

    def active(self, call: AttentionCall) -> bool:
        """In the first steps of a descent with a source."""
        return _early(call.step, self.stop) and lenders(call.rows) is not None

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of the source, values of their own."""
        rows = lenders(call.rows)
        assert rows is not None
        return borrowed(q, rows, call.image), borrowed(k, rows, call.image), v


def _early(step: Step | None, stop: int) -> bool:
    return step is not None and step.down and step.position < stop


@register(
    "pnp",
    task="edit",
    summary="the inverted image's decoder features and self-attention, under the target prompt",
    paper=Paper(
        title="Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation",
        authors="Tumanyan, Narek and Geyer, Michal and Bagon, Shai and Dekel, Tali",
        year=2023,
        arxiv="2211.12572",
        venue="CVPR 2023",
    ),
    options=PnPOptions,
    nfe="3N",
    needs={"attention", "features"},
    requires={"trajectory"},
)
class PlugAndPlay(Editor):
    """Plug-and-Play diffusion features."""

    source_branch = True

    def __init__(self, options: PnPOptions | None = None):
        self.options = PnPOptions() if options is None else options
        for name in ("features", "attention", "depth"):
            check_range(name, getattr(self.options, name), 0, 1)

    def control(self, job: EditJob) -> Control:
        """The feature source on its trajectory, and the injections."""
        return Chain([OnTrack(job.inversion), _Plugs(job, self.options)])


class _Plugs(Control):
    """Conditions of the rows and what is injected in them."""

    def __init__(self, job: EditJob, options: PnPOptions):
        height, width = job.inversion.latents.shape[-2:]
        site = decoder_site(
            job.model, (height, width), "conv", joint="attention", depth=options.depth
        )
        steps, later = job.grid.steps, attention_after(job.model, site)
        self.plugs = InjectedFeatures(site.name, part_of(options.features, steps))
        self.structure = InjectedQueriesAndKeys(later, part_of(options.attention, steps))
        self.track = job.inversion.states["x"]
        self.empty = embed(job, "")
        self.negative = None if options.negative is None else embed(job, options.negative)

    def attention(self) -> Sequence[AttentionControl]:
        """Queries and keys."""
        return (self.structure,)

    def features(self) -> Sequence[FeatureControl]:
        """The decoder's features."""
        return (self.plugs,)

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """An unguided source under the empty prompt; the targets' negative prompt."""
        source = {"condition": self.empty, "scale": 1.0}
        target = {} if self.negative is None else {"uncond": self.negative}
        return tuple(replace(b, **(source if b.name == "source" else target)) for b in branches)

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """The source stands on the inverted latents of the time that is left."""
        track = self.track[step.departure].to(state.x)
        return state.with_x(layout.replaced(state.x, {"source": track}))

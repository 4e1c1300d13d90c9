r"""Adaptive mask of Uniform Attention Maps: unedited places are anchored to a faithful track.

At a step of any two-branch edit let :math:`X_{src}, X_{tgt}` be the clean latents that the two
branches predict, and :math:`X_u` those of a faithful reconstruction at the same level (see
:mod:`retour.inverters.uniform`). Where the branches agree nothing is being edited:

.. math::
    E = \operatorname{dilate}\big[\,|X_{src} - X_{tgt}| > \lambda_i\,\big], \qquad
    X_{tgt} \leftarrow (1-E)\,X_u + E\,X_{tgt},

and each branch goes on as :math:`\alpha_s X + \sigma_s \epsilon` with its own noise unchanged.
:math:`\lambda_i` is the quantile of :math:`|X_{src} - X_{tgt}|`, over all channels and places of an
image, at level :math:`q_i`, the i-th of N numbers from 0 to q: more is anchored as the picture
settles. E is one mask for each latent channel, dilated by 3 x 3. Only steps asked below a time take
part. Optionally the source is cleaned where the target is edited,
:math:`X_{src} \leftarrow E\,X_u + (1-E)\,X_{src}`, so that what editors carry over from it is
clean there; with several targets, where any of them is.

The algorithm box of the paper dilates what is *kept* (``dilate="keep"``); its code, followed here,
dilates what is edited, which leaves a margin around edits.

The paper's main editor is MasaCtrl, so ``uniform-maps`` is MasaCtrl under this mask, which the
inverter of the same name brings along on its way back. The mask comes with any other editor too
(``p2p`` is the paper's second); here its numbers are options of the edit as well, each in place of
the inversion's own. The published runs invert the source branch under the prompt "" and keep it so:
``prompt=""`` when inverting; with another one, as here by default, the source says what it shows.

The paper's gain in background depends on how faithful the uniform track is, hence on the
inverter's `anchor`.

The control reads X off the latents before and after the solver's step (of which the DDIM step is
linear), so it sees what the editor made of the predictions, and acts before blends do.

Cost: that of the editor; the mask asks nothing.

Reference: Mo et al., "Uniform Attention Maps: Boosting Image Fidelity in Reconstruction and
Editing", WACV 2025, arXiv 2411.19652.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.branches import Layout
from ..core.control import Chain, Control
from ..core.grid import Step
from ..core.path import Path, levels
from ..core.registry import Paper, register
from ..core.state import State
from ..errors import check_range
from ..inverters.base import Replay
from .masactrl import MasaCtrl, MasaCtrlOptions

Dilate = Literal["edit", "keep"]
UNIFORM_PAPER = Paper(
    "Uniform Attention Maps: Boosting Image Fidelity in Reconstruction and Editing",
    "Mo, Wenyi and Zhang, Tianyu and Bai, Yalong and Su, Bing and Wen, Ji-Rong",
    2024,
    "2411.19652",
    "WACV 2025",
)

# Predictions of the same thing by a float32 network differ by about as much: that is no edit.
ROUNDING = 1e-6


class AdaptiveMask(Control):
    """Anchor every target to faithful predictions where it agrees with the source.

    Args:
        path: noise path of the model.
        anchor: (N, B, C, h, w) faithful clean latents, interval k's at index k.
        until: path time below which a step is masked.
        quantile: q, level of the threshold at the last step.
        radius: of the dilation, in latent cells.
        dilate: whether the edited or the kept part grows.
        clean_source: also give the source the faithful latents in the edited part.
    """

    def __init__(
        self,
        path: Path,
        anchor: Tensor,
        *,
        until: float,
        quantile: float = 0.5,
        radius: int = 1,
        dilate: Dilate = "edit",
        clean_source: bool = False,
    ):
        self.path, self.anchor, self.until = path, anchor, until
        self.quantile, self.radius, self.dilate = quantile, radius, dilate
        self.clean_source = clean_source

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Mix clean latents, keep the noise."""
        if not (step.down and step.noisy < self.until and "source" in layout.names):
            return state
        found = held(self.path, step, before.x, state.x)
        source, anchor = found[layout["source"]], self.anchor[step.index].to(found)
        mixed, everywhere = found.clone(), torch.zeros_like(source, dtype=torch.bool)
        for name in layout.targets():
            target = found[layout[name]]
            edited = self.edited((source - target).abs(), step)
            mixed[layout[name]] = torch.where(edited, target, anchor)
            everywhere |= edited
        if self.clean_source:
            mixed[layout["source"]] = torch.where(everywhere, anchor, source)
        alpha, _ = levels(self.path, step.s, found)
        return state.with_x(state.x + alpha * (mixed - found))

    def edited(self, gap: Tensor, step: Step) -> Tensor:
        """Where an edit goes on, (B, C, h, w) bool, given |X_src - X_tgt|."""
        level = self.quantile * step.position / max(1, step.count - 1)
        limit = torch.quantile(gap.flatten(1), level, dim=1)[:, None, None, None]
        limit = limit.clamp_min(ROUNDING)
        if self.dilate == "keep":
            return ~_grown(gap <= limit, self.radius)
        return _grown(gap > limit, self.radius)


def held(path: Path, step: Step, before: Tensor, after: Tensor) -> Tensor:
    r"""Clean latents X that a DDIM step held.

    From :math:`x_t = \alpha_t X + \sigma_t E` and :math:`x_s = \alpha_s X + \sigma_s E`.
    """
    alpha_t, sigma_t = levels(path, step.t, before)
    alpha_s, sigma_s = levels(path, step.s, before)
    return (sigma_t * after - sigma_s * before) / (alpha_s * sigma_t - alpha_t * sigma_s)


def _grown(mask: Tensor, radius: int) -> Tensor:
    size = 2 * radius + 1
    return F.max_pool2d(mask.float(), size, stride=1, padding=radius) > 0


class Anchored(Chain):
    """A way back under an adaptive mask."""

    def masked(self, **changes: Any) -> Anchored:
        """The same way under a mask of other numbers."""
        raise NotImplementedError


@dataclass(frozen=True)
class UniformEditOptions(MasaCtrlOptions):
    """Options of MasaCtrl, and of the mask; None takes the inversion's.

    Attributes:
        quantile: level of the mask's threshold at the last step; the more, the less is edited.
        mask_until: steps are masked below this fraction of the model's training times; 0: never.
        clean_source: also give the source branch the faithful latents in the edited part.
    """

    quantile: float | None = None
    mask_until: float | None = None
    clean_source: bool | None = None


@register(
    "uniform-maps",
    task="edit",
    summary="MasaCtrl, anchored to a faithful track wherever source and target agree",
    paper=UNIFORM_PAPER,
    options=UniformEditOptions,
    nfe="4N",
    needs={"attention", "cross-attention"},
    requires={"anchor"},
    mate="uniform-maps",
)
class UniformEditor(MasaCtrl):
    """MasaCtrl under the adaptive mask."""

    options: UniformEditOptions

    def __init__(self, options: UniformEditOptions | None = None):
        super().__init__(UniformEditOptions() if options is None else options)
        for name in ("quantile", "mask_until"):
            if (value := getattr(self.options, name)) is not None:
                check_range(name, value, 0, 1)

    def replay(self, replay: Replay) -> Replay:
        """The inverter's way, under this edit's mask."""
        given = {n: getattr(self.options, n) for n in ("quantile", "mask_until", "clean_source")}
        changes = {name: value for name, value in given.items() if value is not None}
        assert isinstance(replay.control, Anchored)  # it is what provides the anchor
        return replace(replay, control=replay.control.masked(**changes))

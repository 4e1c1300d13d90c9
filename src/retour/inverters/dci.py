r"""DCI: fixed-point inversion whose noise estimate is nudged towards the image itself.

SPDInv (:mod:`.spdinv`) closes the gap between :math:`\epsilon(z_{t-1})` and :math:`\epsilon(z_t)`;
Dual-Conditional Inversion also takes the prompt's part of the error on. In the equation of every
step each noise estimate is moved by :math:`\lambda` towards the *clean latents* :math:`z_0`,

.. math::
    \hat\epsilon = \epsilon - \lambda\,\nabla_\epsilon \lVert \epsilon - z_0 \rVert_2
                 = \epsilon + \lambda\,\frac{z_0 - \epsilon}{\lVert z_0 - \epsilon\rVert_2},
    \qquad F_t(z) = C_1 z_{t-1} + C_2\,\hat\epsilon(z),

and the latents are optimised to a fixed point of that; the correction is a constant for the
gradient. The start, DDIM inversion, is not corrected. With :math:`\lambda = 0` this is SPDInv.
The way back is SPDInv's; the published edits use editor ``proximal``.

The norm is that of an image's whole tensor, hence :math:`\lambda` a length: 2 of about 128 on
Stable Diffusion's 4 x 64 x 64 latents. ``rescale`` keeps that proportion at other sizes,
:math:`\lambda\sqrt{Chw / 16384}` (1 at the published size). Corrected, the fixed point is not the
sampler's inverse any more: reconstruction is not exact even where the search converges.

Measured: on analytic models, whose answer is known, the correction costs accuracy in the noise and
in the return. On the embedded model it pays in the return: of pictures of its own (guidance 1, 20
steps) 0.103 without it, 0.090 at 1, 0.077 at the paper's 2 and 0.084 at 5 (root mean square; DDIM
0.171). Their noise is still found best without: 0.313 against 0.319 at 2 (DDIM 0.351).

Paper and code differ. The paper starts every inner iteration at :math:`z_{t-1}` again, has a
squared norm in one place (``norm="sq"``: its gradient :math:`2(\epsilon - z_0)` is no unit vector)
and plain gradient descent; its code, followed here, starts once a step, uses the norm and AdamW.
Defaults are the paper's :math:`\lambda = 2`, K = 5, 0.001; the code's command line has 1 and 10.

Refused on flow models: a flow's velocity is no noise, and at pure noise the estimate that the
correction moves is the latents themselves. For that reason it is left out at the noisy end of
schedules of zero terminal SNR.

Cost: N (1 + K) evaluations, K at most 5, each of the K with a backward pass.

Reference: Li, Wang, Wang, Tan, Wei, Zhao, "DCI: Dual-Conditional Inversion for Boosting
Diffusion-Based Image Editing", NeurIPS 2025, arXiv 2506.02560.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.path import Path, Prediction, levels, predict
from ..core.registry import Paper, register
from ..core.state import Inversion
from ..errors import check_range
from ._implicit import Search, SearchOptions, climb, replay
from .base import Job, Replay

PUBLISHED_SIZE = 4 * 64 * 64
PURE_NOISE = 1e-3  # signal level below which latents are their noise (SD's least is 0.07)


@dataclass(frozen=True)
class DCIOptions(SearchOptions):
    """Options of Dual-Conditional Inversion.

    Attributes:
        correction: lambda, length of the correction on latents of 4 x 64 x 64.
        rescale: keep its proportion to the latents at other sizes.
        norm: of the reference loss: `l2`, whose gradient is a unit vector, or squared (`sq`).
    """

    rounds: int = 5
    correction: float = 2.0
    rescale: bool = True
    norm: Literal["l2", "sq"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("correction", self.correction, 0)


@register(
    "dci",
    task="invert",
    summary="SPDInv with the noise estimate nudged towards the image's own latents",
    paper=Paper(
        "DCI: Dual-Conditional Inversion for Boosting Diffusion-Based Image Editing",
        "Li, Zixiang and Wang, Haoyu and Wang, Wei and Tan, Chuangchuang and Wei, Yunchao and "
        "Zhao, Yao",
        2025,
        "2506.02560",
        "NeurIPS 2025",
    ),
    options=DCIOptions,
    order=1,
    nfe="up to 6N",
    needs={"gradients", "vp"},
    provides={"trajectory"},
)
class DCI:
    """The searched step up, corrected; DDIM down with the source prompt as negative prompt."""

    def __init__(self, options: DCIOptions):
        self.options = options

    def invert(self, job: Job) -> Inversion:
        """Walk up with the source prompt."""
        options = self.options
        nudge = Nudge(job.latents, job.model.path, options) if options.correction else None
        solver = Search(options, nudge)
        return climb(job, "dci", options, solver, options.inversion_guidance, "loss")

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down."""
        return replay(inversion, self.options)


class Nudge:
    """The correction of a prediction.

    Args:
        reference: (B, C, h, w) clean latents.
        path: noise path.
        options: its length and norm.
    """

    def __init__(self, reference: Tensor, path: Path, options: DCIOptions):
        self.reference, self.path, self.norm = reference, path, options.norm
        proportion = math.sqrt(reference[0].numel() / PUBLISHED_SIZE) if options.rescale else 1.0
        self.length = options.correction * proportion

    def __call__(
        self, prediction: Prediction, y: Tensor, t: float, rows: Sequence[int]
    ) -> Prediction:
        """Noise moved towards the reference; the clean face follows."""
        alpha, sigma = levels(self.path, t, y)
        if float(alpha) < PURE_NOISE:
            return prediction
        with torch.no_grad():
            away = prediction.eps - self.reference[list(rows)]
            size = away.flatten(1).norm(dim=1)[:, None, None, None]
            tiny = torch.finfo(size.dtype).tiny
            slope = away / size.clamp_min(tiny) if self.norm == "l2" else 2 * away
        eps = prediction.eps - self.length * slope
        return predict("eps", eps, y, alpha, sigma)

r"""SCA: semantically consistent unrestricted adversarial examples, for testing one's classifiers.

Usual robustness tests bound the change of pixels. SCA bounds a change of the *starting latents* of
an inversion instead, and lets a text-to-image model draw what comes of it under the image's own
caption: pictures that look natural, keep their meaning, and show where a classifier relies on
something else than meaning.

The image is inverted once with its caption (independent noise maps of SDE-DPM-Solver++, see
inverter `sde-dpm`); the stored maps make the way back :math:`D` exact, :math:`D(x_T) = z_0`. Then,
from :math:`X = x_T`, :math:`g = 0`, for every iteration

.. math::
   z_0 &= D(X), \quad I = \mathrm{decode}(z_0), \quad G = \nabla_{z_0}
          [\mathrm{CE}(F(I), y) - \beta\,\mathrm{MSE}(I, I_{in})] \\
   g &\leftarrow \mu g + G / \lVert G \rVert_1 \\
   X &\leftarrow x_T + \mathrm{clip}(X + \alpha\,\mathrm{sign}(g) - x_T,\, -\epsilon,\, \epsilon)

In the paper the gradient skips the denoiser: its Jacobian :math:`J` is taken as a multiple of the
identity, which the normalisation and the sign make irrelevant, so that no network but decoder and
classifier is differentiated (``gradient="skip"``). With ``gradient="full"``, the default, it is
:math:`J^T G`, the way back differentiated step by step. Noise maps stay as they are.

Where we deviate from the published code. It returns the picture of its last iteration, remembers
the latents of the latest success (one update late), never classifies its last update, and says
"failed" of successes; its sampler falls back to first order in the last step where its inversion
does not, so that even the unchanged latents do not come back. Here every X is judged, the last one
too, as the 8-bit picture that would be returned; the X of the largest margin is kept (``keep``:
"first" stops an image at its first success, the least change; "latest" is the code's memory), D is
run on it once more, and solver memory never outlives a D.

Where our defaults deviate, and why. Those of the published code, for a 512 px latent diffusion
model (radius .1, step size .04, 10 iterations and 10 steps are ours too), are

    gradient="skip", reference=None, strength=1.0, guidance=4.5, keep="latest"

- Box: values of x_T have unit spread, and the paper's box holds 4 x 64 x 64 = 16,384 of them. To
  first order an answer moves by :math:`\epsilon \lVert \nabla \rVert_1`, which at equal
  :math:`\lVert \nabla \rVert_2` grows with the root of their number d. ``reference`` = 16,384
  multiplies box and step by :math:`\sqrt{16384/d}`: 1 for the paper's model, 4 for latents of
  4 x 16 x 16. None takes them as they are.
- Gradient and strength: from the noisy end D contracts, and what is left of a change is no multiple
  of it. On the embedded UNet a step along the skipped gradient's signs reaches 8 % of what one
  along the exact gradient's does to first order, 17, 26 and 38 % at strengths of .8, .6 and .4.
- Guidance: ``None`` is .6 of the model's own default, 4.5 for 7.5. Where guidance is large for the
  model, the two-step solver amplifies a change in few large steps instead: coloured noise that has
  nothing to do with the classifier.

Cost: 2n evaluations to invert, 2n for each of the N_a + 1 judged X and for the last D, 2n more with
a backward pass each for every full gradient (one step's graph in memory, whatever n is); N_a
backward passes of decoder and classifier. With n = 4 of 10 steps and N_a = 10 it is 184.

Reference: Pan et al., "SCA: Improve Semantic Consistent in Unrestricted Adversarial Attacks via
DDPM Inversion", 2024, arXiv 2410.02240.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.model import Model
from ..core.progress import bar
from ..core.registry import Paper, register
from ..errors import RetourError, check_range
from .base import AttackJob, Found, rounded
from .classifiers import wrongness

Keep = Literal["margin", "first", "latest"]
Gradient = Literal["full", "skip"]

PAPER_SIZE = 4 * 64 * 64
PAPER_SHARE = 4.5 / 7.5


@dataclass(frozen=True)
class SCAOptions:
    """Options of SCA; in brackets the paper's, where ours differ.

    Attributes:
        iterations: updates :math:`N_a` of the starting latents.
        radius: how far any of them may move, :math:`\\epsilon`; 0 tests the reconstruction.
        step_size: of one update, :math:`\\alpha`.
        reference: number of latent values that `radius` and `step_size` are meant for, see the
            module; None takes them as they are.
        momentum: :math:`\\mu`, on the normalised gradient.
        mse_weight: :math:`\\beta`, holds the picture near the input.
        gradient: "full" differentiates the way back, "skip" takes its Jacobian as the identity
            (skip).
        keep: which X is returned: of the first success, which changes least, of the largest margin,
            of the latest success (latest).
        inverter: registered inverter; `ddim` is the paper's own comparison.
        steps: of the whole grid.
        guidance: of inversion and way back; None is .6 of the model's default (4.5, of 7.5).
        strength: part of the grid that is walked, from the clean end (1.0). The paper leaves out
            the noisiest tenth of training times, which is what a leading grid of 10 steps does
            anyway.
    """

    iterations: int = 10
    radius: float = 0.1
    step_size: float = 0.04
    reference: int | None = PAPER_SIZE
    momentum: float = 1.0
    mse_weight: float = 0.0
    gradient: Gradient = "full"
    keep: Keep = "first"
    inverter: str = "sde-dpm"
    steps: int = 10
    guidance: float | None = None
    strength: float = 0.4

    def __post_init__(self) -> None:
        for name in ("iterations", "radius", "step_size", "momentum", "mse_weight"):
            check_range(name, getattr(self, name), 0)
        if self.reference is not None:
            check_range("reference", self.reference, 1)
        if self.iterations and not self.step_size:
            raise RetourError(
                f"step_size is 0, so that {self.iterations} iterations change nothing: choose one "
                "above 0, or 0 iterations"
            )


@register(
    "sca",
    task="attack",
    summary="moves inverted starting latents within a small box; the caption keeps the meaning",
    paper=Paper(
        "SCA: Improve Semantic Consistent in Unrestricted Adversarial Attacks via DDPM Inversion",
        "Pan, Zihao and Chen, Lifeng and Wu, Weibin and Cao, Yuhang and Zheng, Zibin",
        2025,
        "2410.02240",
    ),
    options=SCAOptions,
    nfe="2N (2A + 3) + 2N A gradients, A iterations",
    needs={"gradients", "image"},
)
class SCA:
    """Momentum sign steps on starting latents."""

    def __init__(self, options: SCAOptions):
        self.options = options

    def guidance(self, model: Model) -> float:
        """Guidance scale of both ways."""
        given = self.options.guidance
        return PAPER_SHARE * model.default_guidance if given is None else given

    def attack(self, job: AttackJob) -> Found:
        """Search from the inverted latents."""
        o, x_T = self.options, job.start
        x, g, best = x_T, torch.zeros_like(x_T), _Best(x_T, o.keep)
        factor = 1.0 if o.reference is None else math.sqrt(o.reference / x_T[0].numel())
        radius, step = factor * o.radius, factor * o.step_size
        track = job.denoise.track(x)
        unchanged = job.denoise.picked(track[-1])
        margin, gradient = self._judge(job, unchanged)
        best.offer(x, margin)
        with bar(range(o.iterations), o.iterations, "attack") as turns:
            for _ in turns:
                if best.complete:
                    break
                if o.gradient == "full":
                    gradient = job.denoise.pull(x, track, gradient)
                g = o.momentum * g + gradient / _size(gradient)
                x = x_T + (x + step * g.sign() - x_T).clamp(-radius, radius)
                track = job.denoise.track(x)
                margin, gradient = self._judge(job, job.denoise.picked(track[-1]))
                best.offer(x, margin)
        return Found(best.latents, best.margins, torch.stack(best.trace), unchanged)

    def _judge(self, job: AttackJob, z0: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (B,) of the 8-bit pictures, and the gradient of the aim in `z0`."""
        leaf = z0.detach().requires_grad_()
        with torch.enable_grad(), job.classifier.evaluating():
            images = job.render(leaf)
            aim = F.cross_entropy(job.classifier(images), job.labels, reduction="sum")
            if self.options.mse_weight:
                square = (images - job.images).square().mean((1, 2, 3)).sum()
                aim = aim - self.options.mse_weight * square
            [gradient] = torch.autograd.grad(aim, leaf)
            with torch.no_grad():
                margin = wrongness(job.classifier(rounded(images)), job.labels)
        return margin, gradient


def _size(gradient: Tensor) -> Tensor:
    """Sum of absolute values per image (B, 1, 1, 1); a vanished gradient is left as it is."""
    size = gradient.abs().sum((1, 2, 3), keepdim=True)
    return torch.where(size > 0, size, torch.ones_like(size))


class _Best:
    """The best starting latents so far, image by image."""

    def __init__(self, x_T: Tensor, keep: Keep):
        self.keep, self.latents = keep, x_T
        self.margins = x_T.new_full((len(x_T),), -torch.inf)
        self.trace: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether further pictures could not be kept."""
        return self.keep == "first" and bool((self.margins > 0).all())

    def offer(self, x: Tensor, margin: Tensor) -> None:
        """Keep what is better."""
        better = margin > self.margins
        if self.keep == "first":
            better &= self.margins <= 0
        elif self.keep == "latest":
            better |= margin > 0
        self.latents = torch.where(better[:, None, None, None], x, self.latents)
        self.margins = torch.where(better, margin, self.margins)
        self.trace.append(margin)

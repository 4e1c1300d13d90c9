r"""Re-prompt: return from the inversion under the target prompt, with no control at all.

From the inverted noise :math:`z_T` the inverter's own sampler walks back with the target's
conditions. What is preserved is what the noise remembers: the baseline under every other editor.

Cost: the sampler's, 2N evaluations per target with guidance.

Reference: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", 2020, arXiv 2010.02502.
"""

from __future__ import annotations

from ..core.control import Control
from ..core.registry import NoOptions, Paper, register
from .base import EditJob, Editor


@register(
    "reprompt",
    task="edit",
    summary="the target prompt from the inverted noise, nothing else",
    paper=Paper(
        title="Denoising Diffusion Implicit Models",
        authors="Song, Jiaming and Meng, Chenlin and Ermon, Stefano",
        year=2020,
        arxiv="2010.02502",
        venue="ICLR 2021",
    ),
    options=NoOptions,
    nfe="2N",
)
class Reprompt(Editor):
    """No control; no source branch."""

    def __init__(self, options: NoOptions | None = None):
        self.options = NoOptions() if options is None else options

    def control(self, job: EditJob) -> Control:
        """Nothing to do."""
        return Control()

r"""SPDInv: the latents of each step are optimised until they are a fixed point of DDIM inversion.

DDIM inversion asks the network about :math:`z_{t-1}` in place of :math:`z_t`; through that error
the source prompt leaks into the noise, which is then harder to edit with another prompt. With
:math:`\bar\alpha` the squared signal level and

.. math::
    F_t(z) = \sqrt{\tfrac{\bar\alpha_t}{\bar\alpha_{t-1}}}\, z_{t-1} + \Big(\sqrt{1-\bar\alpha_t}
    - \sqrt{\tfrac{\bar\alpha_t}{\bar\alpha_{t-1}}}\sqrt{1-\bar\alpha_{t-1}}\Big)\,
    \epsilon(z, t, c)

AdamW minimises :math:`\operatorname{mean}\,(z - F_t(z))^2` from :math:`z = F_t(z_{t-1})` on
(:mod:`._implicit`): up to 25 steps of 0.001 an interval, until 5e-6. On the way back the source
prompt is the negative prompt, so the source branch takes the way of guidance 1, the one inverted,
at any guidance. The published edits use proximal and inversion guidance as well: editor
``proximal``. Those by MasaCtrl have an unguided source, the null prompt after all and a threshold
of 0.6: ``interpolation=1``, ``source_guidance=1`` and the rule ``Proximal(0.6)``. Their transfer of
colours by wavelets, after Plug-and-Play, is not offered; nor is their loop for it, which asks the
network about the latents as they were and so approaches one plain iteration by AdamW.

Networks that predict no noise start from DDIM inversion with *their* output held, and solve the
same equation in the form of :mod:`retour.solvers.implicit`; on flow models it is Euler's.
``search="picard"`` or ``"anderson"`` iterate it, at no gradient; :mod:`.fixed_point` goes to any
tolerance and takes the guidance in.

Measured on the embedded model: edits by Prompt-to-Prompt miss the background by 0.016 (mean square,
14 pairs, 20 steps), after negative-prompt inversion by 0.022; of pictures made of known noise it
finds that to 0.23, DDIM to 0.32 (root mean square), and with wrong prompts a little nearer too.
That prompts spread the noise less than DDIM's is not seen, neither there (0.37 against 0.36) nor
where the answer is known: there the exact inverse has the largest spread of all.

What to expect: a mean square of 5e-6 is a root mean square of 0.0022 in every step, so the round
trip is a few times better than DDIM's, not exact; and 25 steps of 0.001 move a value by 0.025 at
most, too little on coarse grids. ``extras["loss"]``, (N, B), holds the last loss measured.

Cost: N (1 + K) evaluations, K at most 25, each of the K with a backward pass.

Reference: Li, Li, Guo, Zhang, "Source Prompt Disentangled Inversion for Boosting Image Editability
with Diffusion Models", ECCV 2024, arXiv 2403.11105.
"""

from __future__ import annotations

from ..core.registry import Paper, register
from ..core.state import Inversion
from ._implicit import Search, SearchOptions, climb, replay
from .base import Job, Replay


@register(
    "spdinv",
    task="invert",
    summary="each step's latents optimised to a fixed point; less of the prompt in the noise",
    paper=Paper(
        "Source Prompt Disentangled Inversion for Boosting Image Editability with Diffusion Models",
        "Li, Ruibin and Li, Ruihuang and Guo, Song and Zhang, Lei",
        2024,
        "2403.11105",
        "ECCV 2024",
    ),
    options=SearchOptions,
    order=1,
    nfe="up to 26N",
    needs={"gradients"},
    provides={"trajectory"},
)
class SPDInv:
    """The searched step up; DDIM down with the source prompt as negative prompt."""

    def __init__(self, options: SearchOptions):
        self.options = options

    def invert(self, job: Job) -> Inversion:
        """Walk up with the source prompt."""
        solver, scale = Search(self.options), self.options.inversion_guidance
        return climb(job, "spdinv", self.options, solver, scale, "loss")

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down."""
        return replay(inversion, self.options)

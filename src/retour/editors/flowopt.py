r"""FlowOpt as an editor: the target's own sampler, its noise fitted towards the source.

From the source's noise at a partial level, a few updates :math:`z \leftarrow z - \eta (F(z) - y)`
with :math:`F` the Euler sampler under the *target* prompt and :math:`y` the source: the first
iterate is plain re-prompting, later ones come closer to the source while they still are samples of
the target's flow. Stopping early trades fidelity for strength; a `monitor` sees every iterate but
the last, which is the result.

Where we deviate: the step size is estimated (see :mod:`retour.inverters.flowopt`), a much smaller
fraction of the largest than for inversion, since arriving is not the aim. On eight edits of
emoji-mmdit the iterates at 0.05 undid them in turn, backgrounds first, while shapes came closer to
the source: all were there after two updates, seven after four, five after eight. Eight at 0.02 go
about as far as three at 0.05. The level is that of FLUX in the published settings, 13 of 15 steps
(SD3's is 12 of 15). The sampler is Euler's whatever the inverter.

Cost: (iterations + 1 + `probes` x `rounds`) x `strength` N evaluations, twice that with guidance;
beside the inversion.

Reference: Ronai, Kulikov, Michaeli, "FlowOpt: Fast Optimization Through Whole Flow Processes for
Training-Free Editing", 2025, arXiv 2510.22010.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.control import Control
from ..core.model import Condition
from ..core.registry import get, register
from ..core.rows import copies
from ..core.state import State
from ..errors import check_range
from ..inverters._flowopt import Sampler, SearchOptions, normality, search
from ..inverters.base import Replay
from ..inverters.flowopt import FLOWOPT_PAPER
from .base import EditJob, Editor, Start


@dataclass(frozen=True)
class FlowOptEditOptions(SearchOptions):
    """Options of FlowOpt's editing, beside the search's; 0 iterations are re-prompting.

    Attributes:
        strength: the level to start from, as a part of the grid from the clean end.
        seed: of the probes.
    """

    iterations: int = 8
    fraction: float = 0.02
    strength: float = 13 / 15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("strength", self.strength, 0, 1)


@register(
    "flowopt",
    task="edit",
    summary="the target's sampler with its noise fitted towards the source",
    paper=FLOWOPT_PAPER,
    options=FlowOptEditOptions,
    nfe="26N",
    requires={"trajectory"},
    mate="uniinv",
)
class FlowOptEditor(Editor):
    """Re-prompt from a fitted noise."""

    def __init__(self, options: FlowOptEditOptions | None = None):
        self.options = FlowOptEditOptions() if options is None else options

    def control(self, job: EditJob) -> Control:
        """Nothing to do on the way back."""
        return Control()

    def replay(self, replay: Replay) -> Replay:
        """Plain Euler."""
        return Replay(get("solver", "ddim").make(), State(replay.state.x))

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """Search for the noise of every target."""
        options, names = self.options, job.layout.names
        depth = max(1, round(options.strength * job.grid.steps))
        device = replay.state.x.device
        z = copies(job.inversion.states["x"][depth].to(device), len(names))
        y = copies(job.inversion.latents.to(device), len(names))
        flow = Sampler(
            denoiser.model, _together(denoiser.branches), job.grid, depth,
            rule=denoiser.guidance, ledger=denoiser.ledger,
        )  # fmt: skip
        found = search(flow, z, y, options, self._noise(z))
        facts = {"eta": found.eta.tolist(), "residuals": found.residuals.tolist()}
        facts |= normality(found.z)
        return Start(State(found.z), depth, facts)

    def _noise(self, z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.options.seed)
        shape = (self.options.probes, 1, *z.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=z.dtype).to(z.device)
        return drawn.expand(-1, *z.shape)


def _together(branches: tuple[Branch, ...]) -> Branch:
    """All rows of several branches, guided alike, as one."""
    unconds = [b.uncond for b in branches if b.uncond is not None]
    return Branch(
        "target",
        Condition.cat([b.condition for b in branches]),
        Condition.cat(unconds) if unconds else None,
        branches[0].scale,
    )

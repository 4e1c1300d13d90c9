r"""Direct Inversion (PnP Inversion): keep the source branch on its inverted track.

DDIM inversion at guidance 1 gives the track :math:`z^*_0 \dots z^*_T`. On the way back, with the
editing guidance :math:`w`, the source branch alone is brought back to it after every step:

.. math::
    z^{rec} = \mathrm{DDIM}(z_{src}, \epsilon_w), \quad
    o_i = z^*_{i-1} - z^{rec}, \quad z_{src} \leftarrow z^{rec} + o_i

while the target branch is left alone ("three lines of code"). The source therefore decodes to the
VAE's own reconstruction whatever the guidance and the editor.

Where we deviate: the published code computes all offsets in a pass of its own before editing (for N
= 50: 50 + 200 + 200 = 450 evaluations, since that pass carries both branches and both halves). No
control ever changes the source row, so the offset that the edit batch itself yields is the same
number; ``form="offset"`` (default) takes it there: N + 4N = 250. ``form="two-pass"`` is the
published order of things with the source branch only: N + 2N + 4N = 350, and stores the offsets.
Stored offsets do not pull the source back onto its track: rounding that differs between the two
passes (another batch shape) grows as the model lets it, so the other forms are the safer ones.
``form="overwrite"`` writes :math:`z^*_{i-1}` directly and so needs no unconditional source row: N +
3N = 200; use it with editors that do not read that row.

Cost: N evaluations to invert (3N for ``two-pass``).

Reference: Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code",
2023, arXiv 2310.01506 (ICLR 2024 as "PnP Inversion").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..core.branches import Branch, Layout, rescale
from ..core.control import Control
from ..core.grid import Grid, Step
from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..core.state import Inversion, State
from ..errors import check_range
from .base import Job, Replay
from .ddim import DDIMOptions


@dataclass(frozen=True)
class DirectOptions(DDIMOptions):
    """Options of Direct Inversion; the last three are the paper's ablations.

    Attributes:
        form: where the offsets come from, see the module.
        scale: factor on the offsets (0 is plain DDIM, 1 the method).
        every: correct only every so many steps.
        target_too: add the source's offset to the targets as well.
    """

    form: Literal["offset", "two-pass", "overwrite"] = "offset"
    scale: float = 1.0
    every: int = 1
    target_too: bool = False

    def __post_init__(self) -> None:
        check_range("scale", self.scale)
        check_range("every", self.every, 1)


@register(
    "direct",
    task="invert",
    summary="DDIM with the source branch put back on its track after every step",
    paper=Paper(
        "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code",
        "Ju, Xuan and Zeng, Ailing and Bian, Yuxuan and Liu, Shaoteng and Xu, Qiang",
        2023,
        "2310.01506",
        "ICLR 2024",
    ),
    options=DirectOptions,
    order=1,
    nfe="N",
    provides={"trajectory", "source"},
)
class DirectInversion:
    """DDIM up; DDIM down with the source corrected."""

    def __init__(self, options: DirectOptions):
        self.options = options

    def solver(self) -> Solver:
        """DDIM, both ways."""
        return get("solver", "ddim").make(query=self.options.query)

    def invert(self, job: Job) -> Inversion:
        """Walk up at guidance 1; for ``two-pass``, walk down once to record the offsets."""
        grid = job.grid.truncate(self.options.strength)
        scale, told = self.options.inversion_guidance, self.options.inversion_embedded
        states = job.climb(self.solver(), grid, scale, told=told)
        extras = {}
        if self.options.form == "two-pass":
            extras["offsets"] = self._offsets(job, grid, states["x"])
        return job.pack("direct", self.options, grid, states, **extras)

    def _offsets(self, job: Job, grid: Grid, track: Tensor) -> Tensor:
        recorder = _Recorder(track)
        job.descend(self.solver(), State(track[-1]), grid, job.guidance, recorder)
        return recorder.offsets

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with the source put back on its track."""
        return Replay(self.solver(), inversion.end(), _Correction(inversion, self.options))


class _Recorder(Control):
    """Writes down each offset and keeps the source on its track."""

    def __init__(self, track: Tensor):
        self.track = track
        self.offsets = track.new_zeros(len(track) - 1, *track.shape[1:])

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Record `z* - z_rec`, then stand on `z*`."""
        self.offsets[step.index] = self.track[step.index] - state.x
        return state.with_x(self.track[step.index])


class _Correction(Control):
    """Adds the offsets to the source branch."""

    def __init__(self, inversion: Inversion, options: DirectOptions):
        self.track = inversion.states["x"]
        self.offsets = inversion.extras.get("offsets")
        self.options = options

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """An overwritten source needs no guidance."""
        if self.options.form != "overwrite":
            return branches
        return rescale(branches, source=1.0)

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """The three lines."""
        if "source" not in layout.names or step.position % self.options.every != 0:
            return state
        offset = self._offset(step, state.x[layout["source"]]) * self.options.scale
        x = state.x.clone()
        for name in layout.names if self.options.target_too else ("source",):
            x[layout[name]] += offset
        return state.with_x(x)

    def _offset(self, step: Step, reconstruction: Tensor) -> Tensor:
        if self.offsets is not None:
            return self.offsets[step.index].to(reconstruction)
        return self.track[step.index].to(reconstruction) - reconstruction

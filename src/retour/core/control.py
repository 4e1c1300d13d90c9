"""Controls: what an inverter's replay or an editor does to a run, beside the solver's own step.

Every method is a no-op by default; a run folds a sequence of controls in order. Data arrives
explicitly (`step`, the stacked state, the `layout` of its branches): a control keeps no counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .branches import Branch, Denoiser, Layout, Wrapped
from .grid import Step
from .guidance import Guidance
from .state import State

if TYPE_CHECKING:
    from ..attention.control import AttentionControl
    from ..attention.features import FeatureControl


class Control:
    """Base of replays and editors' controls."""

    def attention(self) -> Sequence[AttentionControl]:
        """Attention controls to hook for the whole run."""
        return ()

    def features(self) -> Sequence[FeatureControl]:
        """Feature controls to hook for the whole run."""
        return ()

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Conditions and guidance scales to use in this step."""
        return branches

    def guidance(self, step: Step, rule: Guidance) -> Guidance:
        """How conditional and unconditional predictions are combined in this step."""
        return rule

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Denoiser that the solver asks in this step: `denoise`, or it wrapped."""
        return denoise

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """State to step from."""
        return state

    def move(self, step: Step, denoise: Denoiser | Wrapped, state: State, layout: Layout) -> State:
        """State to step from, where finding it asks the network: a gradient step on the latents.

        `denoise` is what the solver will be given; `state` is what `before_step` left.
        """
        return state

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """State to carry on with; `before` is what the step started from."""
        return state

    def finish(self, x: Tensor, layout: Layout) -> Tensor:
        """Last word on the final latents (branches * B, C, h, w)."""
        return x


class Attending(Control):
    """Attention controls as a run's control.

    Args:
        controls: in the order in which they fold.
    """

    def __init__(self, *controls: AttentionControl):
        self._controls = controls

    def attention(self) -> Sequence[AttentionControl]:
        """What it was made with."""
        return self._controls


class Chain(Control):
    """Several controls as one."""

    def __init__(self, controls: Sequence[Control]):
        self.controls = tuple(controls)

    def attention(self) -> Sequence[AttentionControl]:
        """All attention controls, in order."""
        return tuple(a for c in self.controls for a in c.attention())

    def features(self) -> Sequence[FeatureControl]:
        """All feature controls, in order."""
        return tuple(f for c in self.controls for f in c.features())

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Folded."""
        for control in self.controls:
            branches = control.branches(step, branches)
        return branches

    def guidance(self, step: Step, rule: Guidance) -> Guidance:
        """Folded."""
        for control in self.controls:
            rule = control.guidance(step, rule)
        return rule

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Folded: the last control's wrapper is the outermost."""
        for control in self.controls:
            denoise = control.denoiser(step, denoise, layout)
        return denoise

    def before_step(self, step: Step, state: State, layout: Layout) -> State:
        """Folded."""
        for control in self.controls:
            state = control.before_step(step, state, layout)
        return state

    def move(self, step: Step, denoise: Denoiser | Wrapped, state: State, layout: Layout) -> State:
        """Folded."""
        for control in self.controls:
            state = control.move(step, denoise, state, layout)
        return state

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Folded."""
        for control in self.controls:
            state = control.after_step(step, state, before, layout)
        return state

    def finish(self, x: Tensor, layout: Layout) -> Tensor:
        """Folded."""
        for control in self.controls:
            x = control.finish(x, layout)
        return x

"""The one loop that every inversion, reconstruction and edit runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from .branches import Denoiser
from .control import Chain, Control
from .grid import Grid, Step
from .progress import bar
from .solver import Solver
from .state import State
from .watch import watchers


@dataclass(frozen=True)
class Event:
    """What an observer sees after each step."""

    step: Step
    state: State
    denoiser: Denoiser


Observer = Callable[[Event], None]


def walk(
    solver: Solver,
    denoiser: Denoiser,
    state: State,
    grid: Grid,
    *,
    down: bool,
    between: tuple[int, int] | None = None,
    controls: Sequence[Control] = (),
    observers: Sequence[Observer] = (),
    label: str = "",
) -> State:
    """Carry `state` across the grid, `down` to data or up to noise, and return its end.

    The controls may rewrite the conditions before each step, the predictions in it, and the state
    before and after it; their attention and feature controls are hooked for the whole walk and
    unhooked afterwards, whatever happens. `between` walks only from one index of the grid's times
    to another, (lower, higher); the controls finish only where the walk reaches the grid's end.
    Beside the `observers`, whoever watches (:mod:`.watch`) sees every step.
    """
    from ..attention.features import watched
    from ..attention.hooks import hooked

    control = Chain(controls)
    layout, branches, rule = denoiser.layout, denoiser.branches, denoiser.guidance
    seen = [*observers, *(watcher.stepped for watcher in watchers())]
    with ExitStack() as stack:
        stack.callback(setattr, denoiser, "branches", branches)
        stack.callback(setattr, denoiser, "guidance", rule)
        hooks = []
        if attention := control.attention():
            hooks.append(stack.enter_context(hooked(denoiser, attention)))
        if features := control.features():
            hooks.append(stack.enter_context(watched(denoiser, features)))
        steps = list(grid.walk(down=down, between=between))
        for step in stack.enter_context(bar(steps, len(steps), label)):
            for handle in hooks:
                handle.step = step
            denoiser.branches = control.branches(step, branches)
            denoiser.guidance = control.guidance(step, rule)
            before = control.before_step(step, state, layout)
            asked = control.denoiser(step, denoiser, layout)
            before = control.move(step, asked, before, layout)
            after = solver.step(asked, before, step, denoiser.model.path)
            state = control.after_step(step, after, before, layout)
            for observer in seen:
                observer(Event(step, state, denoiser))
    goal = None if between is None else between[0 if down else 1]
    if goal not in (None, 0 if down else grid.steps):
        return state
    return state.with_x(control.finish(state.x, layout))

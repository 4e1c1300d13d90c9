import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.branches import Wrapped, rescale
from retour.core.control import Control
from retour.core.grid import flow_grid
from retour.core.guidance import Interval
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State, stack

MODEL = ProblemModel(mixture(), PATHS["flow"], "velocity")
GRID = flow_grid(4)
EULER = get("solver", "euler").make()


class Log(Control):
    """Notes every call, and marks the state so that the order of folding shows."""

    def __init__(self, name, log, factor=1.0):
        self.name, self.log, self.factor = name, log, factor

    def branches(self, step, branches):
        self.log.append((self.name, "branches", step.position))
        return rescale(branches, source=5.0)

    def before_step(self, step, state, layout):
        self.log.append((self.name, "before", step.position))
        return state

    def after_step(self, step, state, before, layout):
        self.log.append((self.name, "after", step.position))
        return state

    def finish(self, x, layout):
        self.log.append((self.name, "finish"))
        return x * self.factor + 1


def test_controls_are_folded_in_order():
    log = []
    denoise = claims.denoiser(MODEL, 4, "red")
    plain = walk(EULER, claims.denoiser(MODEL, 4, "red", 5.0), State(points()), GRID, down=True)
    controls = [Log("a", log, 2.0), Log("b", log, 3.0)]
    end = walk(EULER, denoise, State(points()), GRID, down=True, controls=controls)
    each = [("branches", k) for k in range(4)]
    assert log[:6] == [(n, m, 0) for m in ("branches", "before", "after") for n in "ab"]
    assert len(log) == 4 * 6 + 2 and len(each) == 4
    assert log[-2:] == [("a", "finish"), ("b", "finish")]
    assert torch.equal(end.x, (plain.x * 2 + 1) * 3 + 1)


class Scaled(Control):
    """Multiplies every prediction."""

    def __init__(self, factor):
        self.factor = factor

    def denoiser(self, step, denoise, layout):
        return Wrapped(denoise, lambda found, x, t: found.map(lambda face: self.factor * face))


def test_controls_wrap_the_denoiser_in_order():
    denoise = claims.denoiser(MODEL, 4, "red")
    controls = [Scaled(2.0), Scaled(0.25)]
    end = walk(EULER, denoise, State(points()), GRID, down=True, controls=controls)

    def halved(x, t):
        return denoise(x, t).map(lambda face: face / 2)

    x = points()
    for step in GRID.walk(down=True):
        x = EULER.step(halved, State(x), step, MODEL.path).x
    assert torch.equal(end.x, x)


class Late(Control):
    """Guidance in the last two steps only."""

    def guidance(self, step, rule):
        return rule if step.position >= 2 else Interval(2.0, 3.0, rule)


def test_controls_choose_the_guidance_rule_of_each_step():
    denoise = claims.denoiser(MODEL, 4, "red", 5.0)
    rule = denoise.guidance
    end = walk(EULER, denoise, State(points()), GRID, down=True, controls=[Late()])
    assert denoise.guidance is rule
    assert denoise.ledger.nfe(4) == 2 * 1 + 2 * 2
    x = State(points())
    for step in GRID.walk(down=True):
        scale = 5.0 if step.position >= 2 else 1.0
        x = EULER.step(claims.denoiser(MODEL, 4, "red", scale), x, step, MODEL.path)
    assert torch.equal(end.x, x.x)


def test_branches_are_restored():
    denoise = claims.denoiser(MODEL, 4, "red")
    before = denoise.branches
    walk(EULER, denoise, State(points()), GRID, down=True, controls=[Log("a", [])])
    assert denoise.branches is before


def test_branches_are_restored_after_an_exception():
    class Broken(Log):
        def after_step(self, step, state, before, layout):
            raise RuntimeError("on purpose")

    denoise = claims.denoiser(MODEL, 4, "red")
    before = denoise.branches
    with pytest.raises(RuntimeError, match="on purpose"):
        walk(EULER, denoise, State(points()), GRID, down=True, controls=[Broken("a", [])])
    assert denoise.branches is before


def test_changes_of_branches_last_one_step():
    """Each step starts from the run's own branches, not from what the last step made of them."""

    class Once(Control):
        def branches(self, step, branches):
            seen.append(branches[0].scale)
            return rescale(branches, source=9.0)

    seen = []
    walk(EULER, claims.denoiser(MODEL, 4), State(points()), GRID, down=True, controls=[Once()])
    assert seen == [1.0] * 4


@pytest.mark.parametrize("down", [True, False])
def test_observers_see_every_step(down):
    events = []
    denoise = claims.denoiser(MODEL, 4)
    end = walk(EULER, denoise, State(points()), GRID, down=down, observers=[events.append])
    assert [e.step for e in events] == list(GRID.walk(down=down))
    assert torch.equal(events[-1].state.x, end.x)
    assert all(e.denoiser is denoise for e in events)


def test_a_control_can_hold_the_source_on_its_track():
    track = {}

    class Hold(Control):
        def after_step(self, step, state, before, layout):
            x = state.x.clone()
            x[layout["source"]] = track[step.index]
            return state.with_x(x)

    up = [State(points())]
    denoise = claims.denoiser(MODEL, 4)
    walk(EULER, denoise, up[0], GRID, down=False, observers=[lambda e: up.append(e.state)])
    states = stack(up)["x"]
    track.update(dict(enumerate(states)))
    end = walk(EULER, denoise, State(states[-1]), GRID, down=True, controls=[Hold()])
    assert torch.equal(end.x, points())


@pytest.mark.parametrize("down", [True, False])
def test_a_walk_in_parts_is_the_whole_walk(down):
    class Finish(Control):
        def finish(self, x, layout):
            return x + 1

    seen, given = [], {"down": down, "controls": [Finish()]}
    whole = walk(EULER, claims.denoiser(MODEL, 4), State(points()), GRID, **given)
    state = State(points())
    for between in [(3, 4), (1, 3), (0, 1)][:: 1 if down else -1]:
        state = walk(
            EULER, claims.denoiser(MODEL, 4), state, GRID, between=between,
            observers=[lambda e: seen.append(e.step)], **given,
        )  # fmt: skip
    assert torch.equal(state.x, whole.x)
    assert seen == list(GRID.walk(down=down))


def test_an_empty_part_only_finishes():
    log = []
    start = State(points())
    end = walk(
        EULER, claims.denoiser(MODEL, 4), start, GRID, down=True, between=(0, 0),
        controls=[Log("a", log)],
    )  # fmt: skip
    assert log == [("a", "finish")] and torch.equal(end.x, start.x + 1)

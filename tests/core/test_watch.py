import threading

import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.grid import flow_grid
from retour.core.loop import walk
from retour.core.registry import get
from retour.core.state import State
from retour.core.watch import Watcher, watchers, watching

MODEL = ProblemModel(mixture(), PATHS["flow"], "velocity")
GRID = flow_grid(4)


def run():
    denoise = claims.denoiser(MODEL, 4, "red")
    return walk(get("solver", "heun").make(), denoise, State(points()), GRID, down=True).x


class Log(Watcher):
    def __init__(self, stop_at=None):
        self.calls, self.events, self.stop_at = 0, [], stop_at

    def called(self):
        self.calls += 1
        if self.calls == self.stop_at:
            raise InterruptedError

    def stepped(self, event):
        self.events.append(event)


def test_a_watcher_sees_every_call_and_step_and_changes_nothing():
    plain, log = run(), Log()
    with watching(log):
        watched = run()
    assert torch.equal(plain, watched)
    assert [e.step.position for e in log.events] == [0, 1, 2, 3]
    assert log.calls == 8  # two evaluations a step
    assert torch.equal(log.events[-1].state.x, plain)
    assert watchers() == ()


def test_watchers_nest_and_leave():
    outer, inner = Log(), Log()
    with watching(outer), watching(inner):
        run()
    run()
    assert outer.calls == inner.calls == 8


def test_what_a_watcher_raises_ends_the_run_at_that_call():
    log = Log(stop_at=3)
    with pytest.raises(InterruptedError), watching(log):
        run()
    assert log.calls == 3 and len(log.events) == 1
    assert watchers() == ()


def test_threads_do_not_see_each_others_runs():
    log, seen = Log(), []
    with watching(log):
        thread = threading.Thread(target=lambda: (run(), seen.append(watchers())))
        thread.start()
        thread.join()
    assert log.calls == 0 and seen == [()]


def test_the_latest_clean_estimate_can_be_previewed():
    log = Log()
    with watching(log):
        run()
    latest = log.events[-1].denoiser.latest
    assert latest.shape == points().shape and not latest.requires_grad

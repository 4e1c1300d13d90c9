"""The grid of a benchmark: what is run, and what is refused before any work."""

from __future__ import annotations

import pytest

import retour
import tiny
from retour.errors import RetourError
from retour.evaluate.cases import cut, suite_fingerprint
from retour.evaluate.plan import choose_pairs, make_runs, make_tasks
from retour.evaluate.suite import Suite


@pytest.fixture(scope="module")
def model():
    return retour.load(tiny.sd1())


def labels(runs):
    return [run.label for run in runs]


def test_inverters_cross_editors_and_pairs_follow():
    found = choose_pairs("ddim,direct", "p2p", "virtual+infedit,ddim+p2p")
    assert found == [("ddim", "p2p"), ("direct", "p2p"), ("virtual", "infedit")]
    assert choose_pairs("", "", ["ddim+reprompt"]) == [("ddim", "reprompt")]


def test_an_editor_alone_takes_its_own_inverter(model):
    pairs = choose_pairs(None, "p2p,infedit", "ledits")
    runs = make_runs(model, pairs, [2], 3.0)
    assert labels(runs) == ["direct+p2p", "virtual+infedit", "sde-dpm+ledits"]


def test_runs_that_share_inversions_stand_together(model):
    runs = make_runs(model, choose_pairs("ddim,direct", "p2p,reprompt"), [2, 3], 3.0)
    assert labels(runs) == [
        *("ddim+p2p-2", "ddim+reprompt-2", "ddim+p2p-3", "ddim+reprompt-3"),
        *("direct+p2p-2", "direct+reprompt-2", "direct+p2p-3", "direct+reprompt-3"),
    ]
    tasks = make_tasks([["a", "b"], ["c"]], runs)
    assert [(t.batch, t.items, len(t.runs)) for t in tasks] == [
        *[(0, ("a", "b"), 2)] * 4,
        *[(1, ("c",), 2)] * 4,
    ]


def test_options_go_to_all_or_to_the_one_they_name(model):
    pairs = choose_pairs("ddim,direct", "reprompt")
    given = {"strength": "0.9", "direct.scale": "0.5"}
    first, second = make_runs(model, pairs, [2], 3.0, given)
    assert first.inverter_options == {"strength": 0.9}
    assert second.inverter_options == {"strength": 0.9, "scale": 0.5}
    (run,) = make_runs(model, [("", "pix2pix-zero")], [2], 3.0, None, {"pix2pix_zero.rate": "0.2"})
    assert run.editor_options == {"rate": 0.2}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("ddim", None, None), "without an editor"),
        ((None, None, None), "nothing to run"),
        (("dimm", "p2p", None), "did you mean 'ddim'"),
        (("ddim", "p2q", None), "unknown editor 'p2q'"),
        ((None, None, "ddim+"), "unknown editor ''"),
        ((None, None, "ddim+p2p+x"), "unknown editor"),
    ],
)
def test_what_names_nothing_is_refused(asked, message):
    with pytest.raises(RetourError, match=message.replace("+", r"\+")):
        choose_pairs(*asked)


def test_impossible_pairs_are_named_with_what_would_work(model):
    with pytest.raises(RetourError, match=r"pair 'ddim\+infedit' .* use one of .*virtual"):
        make_runs(model, [("ddim", "infedit")], [2], 3.0)
    with pytest.raises(RetourError, match=r"'uniinv\+lazydrag' .*joint-attention.* use "):
        make_runs(model, [("", "lazydrag")], [2], 3.0)


@pytest.mark.parametrize(
    ("steps", "guidance", "options", "message"),
    [
        ([], 3.0, {}, "at least one"),
        ([0], 3.0, {}, "steps is 0"),
        ([2.5], 3.0, {}, "whole numbers"),
        ([True], 3.0, {}, "whole numbers"),
        ([2], -1.0, {}, "guidance is -1"),
        ([2], float("nan"), {}, "guidance is nan"),
        ([2], 3.0, {"strength": "often"}, r"pair 'ddim\+p2p'.*takes float"),
        ([2], 3.0, {"speed": "1"}, "unknown option of 'ddim'"),
        ([2], 3.0, {"direct.scale": "1"}, "'direct', which is not run"),
    ],
)
def test_bad_settings_are_refused(model, steps, guidance, options, message):
    with pytest.raises(RetourError, match=message):
        make_runs(model, [("ddim", "p2p")], steps, guidance, options)


def test_a_batch_holds_pictures_of_one_canvas(model):
    sizes = [("a", (16, 16)), ("b", (48, 16)), ("c", (32, 32)), ("d", (96, 32)), ("e", (16, 16))]
    assert cut(sizes, model, 2) == [["a", "c"], ["e"], ["b", "d"]]
    with pytest.raises(RetourError, match="batch is 0"):
        cut(sizes, model, 0)


def test_the_suites_fingerprint_sees_contents(tmp_path):
    suite = Suite.paired()
    assert suite_fingerprint(suite) == suite_fingerprint(Suite.paired())
    assert suite_fingerprint(suite) != suite_fingerprint(suite.select(limit=3))


def test_the_package_offers_both_runners():
    from retour import evaluate
    from retour.evaluate import batches, runner

    assert (evaluate.bench, evaluate.batch) == (runner.bench, batches.batch)
    with pytest.raises(AttributeError, match="no attribute 'bnech'"):
        evaluate.bnech  # noqa: B018

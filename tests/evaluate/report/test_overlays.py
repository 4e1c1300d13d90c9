"""Attention overlays: whose words, on which outputs, with which model."""

import numpy as np
import pytest
import torch

import retour
import tiny
from evaluate.bench_folder import build
from problems import PATHS, ProblemModel, pictures
from retour.errors import RetourError
from retour.evaluate.report import overlays, report
from retour.evaluate.report.folder import Bench
from retour.io import read_image, read_record

PROMPTS = "a red apple", "a green apple"


@pytest.fixture(scope="module")
def model():
    return retour.load(tiny.sd1().to(torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("bench")
    return build(path, limit=4, runs=["ddim+p2p", "direct+p2p"], prompts=PROMPTS)


@pytest.fixture(scope="module")
def drawn(folder, model):
    bench = Bench.read(folder)
    return bench, overlays.draw(bench, 2, model)


def test_overlays_of_the_first_items_and_every_run_but_the_ceiling(drawn, folder):
    bench, count = drawn
    found = sorted(p.relative_to(folder / "attention") for p in folder.glob("attention/*/*.png"))
    items = [edit.id for edit in bench.edits[:2]]
    labels = ["copy-input", "ddim+p2p", "direct+p2p"]
    assert [str(p) for p in found] == [f"{label}/{i}.png" for label in labels for i in items]
    assert count == 6


def test_each_shows_the_words_that_tell_the_edit_on_its_own_output(drawn, folder):
    bench, _ = drawn
    item = bench.edits[0].id
    assert read_record(folder / f"attention/direct+p2p/{item}.png") == {
        "words": ["green"],
        "prompt": PROMPTS[1],
    }
    assert read_record(folder / f"attention/copy-input/{item}.png")["words"] == ["red"]
    output = read_image(folder / f"images/direct+p2p/{item}.png")
    shown = read_image(folder / f"attention/direct+p2p/{item}.png")
    assert shown.size == output.size
    grey = np.asarray(output.convert("L"), float).ravel()
    assert np.corrcoef(grey, np.asarray(shown.convert("L"), float).ravel())[0, 1] > 0.5


def test_a_batch_shows_what_its_outputs_show_alone(drawn, folder, model, tmp_path, monkeypatch):
    bench, _ = drawn
    item = bench.edits[1].id
    kept = folder / f"attention/ddim+p2p/{item}.png"
    before = np.asarray(read_image(kept), int)
    kept.unlink()
    monkeypatch.setattr(overlays, "BATCH", 1)
    assert overlays.draw(bench, 2, model) == 1  # Those that are there are kept.
    # Another batch shape rounds otherwise: one grey level at most.
    assert abs(np.asarray(read_image(kept), int) - before).max() <= 1


def test_the_page_holds_them(drawn, folder, tmp_path):
    text = report(folder, tmp_path / "page.html").path.read_text()
    assert 'id="show-attention"> Attention' in text
    assert '"words":["red","","green","green"]' in text


def test_another_model_than_ran_is_refused(folder, model, monkeypatch):
    monkeypatch.setattr("retour.models.load.load", lambda name: model)
    with pytest.raises(RetourError, match="is not the one that ran .*c0ffee00"):
        report(folder, attention=4)
    assert not (folder / "report.html").exists()


def test_a_model_without_attention_and_odd_counts_are_refused(folder):
    bench = Bench.read(folder)
    with pytest.raises(RetourError, match="choose a number of at least 1"):
        overlays.draw(bench, 0)
    bare = ProblemModel(pictures(), PATHS["flow"], "velocity")
    with pytest.raises(RetourError, match="does not attend to words"):
        overlays.draw(bench, 4, bare)


def test_a_plan_without_a_model_is_refused(tmp_path):
    bench = Bench.read(build(tmp_path, limit=1, plan={"model": None}))
    with pytest.raises(RetourError, match="names no model"):
        overlays.draw(bench, 1)


def test_joint_attention_is_drawn_too(tmp_path):
    """The words of a transformer whose text and image tokens attend in one."""
    folder = build(tmp_path, limit=1, runs=["rf-solver+reprompt"], prompts=PROMPTS)
    bench = Bench.read(folder)
    assert overlays.draw(bench, 1, retour.load(tiny.sd3())) == 2
    [item] = [edit.id for edit in bench.edits]
    path = folder / f"attention/rf-solver+reprompt/{item}.png"
    assert read_record(path)["words"] == ["green"]
    plain = read_image(folder / f"images/rf-solver+reprompt/{item}.png")
    assert read_image(path).size == plain.size and read_image(path).tobytes() != plain.tobytes()

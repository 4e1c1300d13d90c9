"""Maps of words: that they are the network's own, whose they are, and what is written."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import retour
import tiny
from problems import PATHS, ProblemModel, pictures
from retour import heat
from retour.attention.control import AttentionControl
from retour.attention.hooks import hooked
from retour.core.branches import Branch, Denoiser

SOURCE, TARGET = "a red apple on a blue background", "a cat on a blue background"
STEPS = 4


@lru_cache
def model(family="sd1"):
    return retour.load(tiny.PIPELINES[family]().to(torch.float64))


@lru_cache
def inverted(family="sd1", images=1):
    generator = torch.Generator().manual_seed(3)
    some = [torch.rand(3, 16, 16, generator=generator) for _ in range(images)]
    return retour.invert(model(family), some, SOURCE, method="ddim", steps=STEPS, guidance=4.0)


class Maps(AttentionControl):
    """Keeps the text maps of all layers as they come."""

    def __init__(self):
        self.kept = []

    def wants(self, site):
        return site.kind in ("cross", "joint")

    def probs(self, call, probs):
        self.kept.append(
            (call.factor, call.image_to_text(probs).mean(1)[0].unflatten(0, call.grid))
        )
        return probs


def by_hand(inversion, factor, steps):
    """Mean maps over layers of one resolution and over the given steps, counted from noise."""
    watch, source = Maps(), Branch("source", inversion.condition)
    net = Denoiser(inversion.model, [source])
    with hooked(net, [watch]):
        for position in steps:
            level = STEPS - position
            net(inversion.states["x"][level], inversion.grid.times[level])
    return torch.stack([m for f, m in watch.kept if f == factor]).mean(0).float()


@pytest.mark.parametrize(("family", "factors"), [("sd1", (1, 2)), ("sdxl", (1, 2)), ("sd3", (2,))])
def test_maps_are_the_networks_own_on_the_inverted_track(family, factors):
    inversion = inverted(family)
    for factor in factors:
        [panel] = retour.explain(inversion, factor=factor).panels
        wanted = by_hand(inversion, factor, range(STEPS))
        words = model(family).tokens(SOURCE).words
        assert panel.words == tuple(SOURCE.split()) and panel.branch == "source"
        assert panel.maps.shape == (len(words), 8 // factor, 8 // factor)
        for k, word in enumerate(words):
            own = wanted[..., list(word.tokens)].sum(-1)
            torch.testing.assert_close(panel.maps[k], own, rtol=0, atol=1e-6)


def test_a_span_of_the_steps():
    inversion = inverted()
    word = list(model().tokens(SOURCE).words[2].tokens)
    for span, steps in [("0-0.5", [0, 1]), ((0.5, 1.0), [2, 3]), ("0.25-0.3", [1])]:
        [panel] = retour.explain(inversion, words="apple", factor=2, span=span).panels
        own = by_hand(inversion, 2, steps)[..., word].sum(-1)
        torch.testing.assert_close(panel.maps[0], own, rtol=0, atol=1e-6)


def test_the_cost_is_one_evaluation_a_step_and_the_targets():
    assert retour.explain(inverted()).record["nfe"] == STEPS
    found = retour.explain(inverted(), target=TARGET)
    assert found.record["nfe"] == STEPS + 2 * STEPS
    assert [p.branch for p in found.panels] == ["source", "target"]
    assert found.panels[1].words == tuple(TARGET.split())
    plain = retour.edit(inverted(), TARGET, editor="reprompt")
    assert np.array_equal(found.panels[1].picture, plain.image)
    assert found.record["source_prompts"] == [SOURCE] and found.record["target_prompts"] == [TARGET]


@pytest.mark.parametrize("method", ["direct", "edict", "virtual"])
def test_targets_come_back_by_the_inverters_own_way(method):
    inversion = retour.invert(model(), torch.rand(3, 16, 16), SOURCE, method=method, steps=STEPS)
    found = retour.explain(inversion, target=TARGET)
    plain = retour.edit(inversion, TARGET, editor="reprompt")
    assert np.array_equal(found.panels[1].picture, plain.image)


def test_chosen_words_of_either_prompt():
    found = retour.explain(inverted(), target=TARGET, words=["Apple", "a", "cat"])
    assert [p.words for p in found.panels] == [("Apple", "a"), ("a", "cat")]
    found = retour.explain(inverted(), target=TARGET, words="cat")
    assert [(p.branch, p.words) for p in found.panels] == [("target", ("cat",))]
    every = retour.explain(inverted()).panels[0].maps
    [panel] = retour.explain(inverted(), words="a").panels
    torch.testing.assert_close(panel.maps[0], every[0] + every[4])


def test_a_batch_does_what_its_images_do_alone():
    batch = inverted(images=2)
    found = retour.explain(batch, target=[TARGET, "a pear"])
    assert [(p.branch, p.image) for p in found.panels] == [
        ("source", 0), ("source", 1), ("target", 0), ("target", 1)
    ]  # fmt: skip
    for k, target in enumerate([TARGET, "a pear"]):
        alone = retour.explain(batch.take([k]), target=target)
        for mine, one in zip(found.panels[k::2], alone.panels, strict=True):
            torch.testing.assert_close(mine.maps, one.maps, rtol=0, atol=1e-6)


def test_pictures_are_inverted_and_drawn_on(gradient):
    found = retour.explain(gradient, SOURCE, model=model(), steps=2, factor=2)
    [panel] = found.panels
    assert panel.picture.size == gradient.size == panel.overlay(0).size
    assert found.record["inverter"] == "ddim"
    decoded = retour.explain(
        retour.invert(model(), gradient, SOURCE, method="ddim", steps=2), factor=2
    )
    assert decoded.panels[0].picture.size == gradient.size
    torch.testing.assert_close(decoded.panels[0].maps, panel.maps)


def test_heat_is_each_words_own_range_or_that_of_all():
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.3]], [[0.0, 0.5], [0.5, 0.5]], [[0.2] * 2] * 2])
    panel = heat.Panel("source", 0, "", Image.new("RGB", (8, 8)), ("x", "y", "z"), maps)
    torch.testing.assert_close(panel.heat(0), (maps[0] - 0.1) / 0.2)
    torch.testing.assert_close(panel.heat(0, "all"), maps[0] / 0.5)
    assert torch.equal(panel.heat(2), torch.zeros(2, 2))


def test_overlays_keep_the_size_and_warm_up_where_it_is_hot():
    spot = torch.zeros(4, 4)
    spot[0, 0] = 1
    drawn = np.asarray(heat.overlay(Image.new("RGB", (32, 16), "gray"), spot), int)
    assert drawn.shape == (16, 32, 3)
    assert drawn[0, 0].sum() > drawn[-1, -1].sum() + 100


def test_files(tmp_path):
    found = retour.explain(inverted(), target=TARGET, words="apple cat")
    paths = found.save(tmp_path / "new" / "folder")
    out = tmp_path / "new" / "folder"
    names = ["maps.safetensors", "sheet.png", "sheet.retour.json"]
    names += ["source-0-01-apple.png", "target-0-01-cat.png"]
    assert sorted(p.name for p in out.iterdir()) == sorted(names) and all(p.exists() for p in paths)
    assert json.loads((out / "sheet.retour.json").read_text())["task"] == "explain"
    assert retour.io.read_record(out / "sheet.png")["nfe"] == found.record["nfe"]
    with safe_open(out / "maps.safetensors", "pt") as file:
        told = json.loads(file.metadata()["retour"])
        assert told["target-0"] == {"prompt": TARGET, "words": ["cat"]}
        assert torch.equal(file.get_tensor("source-0"), found.panels[0].maps)
    found.save(out)
    assert len(list(out.iterdir())) == len(names)


def test_nothing_is_left_on_the_model():
    before = [id(s.module.processor) for s in model().attention_sites()]
    retour.explain(inverted(), target=TARGET)
    assert [id(s.module.processor) for s in model().attention_sites()] == before


def without_attention():
    problem = ProblemModel(pictures(), PATHS["flow"], "velocity")
    return retour.invert(problem, torch.rand(3, 8, 8), "red", method="ddim", steps=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: retour.explain(inverted(), words="banana"), "'banana', which is not in"),
        (lambda: retour.explain(inverted(), span="0.5-0.5"), "span is '0.5-0.5'"),
        (lambda: retour.explain(inverted(), span="0.9-0.1"), "span is .0.9, 0.1."),
        (lambda: retour.explain(inverted(), scale="log"), "unknown scale 'log'"),
        (lambda: retour.explain(inverted(), factor=0.5), "factor is 0.5"),
        (lambda: retour.explain(inverted(), "a cat"), "has its prompt already"),
        (lambda: retour.explain(inverted(), steps=3), "has its steps already"),
        (lambda: retour.explain(inverted(), target=" "), "target is ' '"),
        (lambda: retour.explain(inverted(), target=["a", "b"]), "one for each of 1"),
        (lambda: retour.explain(without_attention()), "does not attend to words"),
        (lambda: heat.check_folder(__file__), "is not a folder"),
        (lambda: heat.check_folder(__file__ + "/sub"), "is not a folder"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(retour.RetourError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)

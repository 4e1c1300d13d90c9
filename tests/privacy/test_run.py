"""`retour.attack` and `retour attack`: record, transfer, bad input."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import retour
import tiny
from privacy import cases
from retour import cli
from retour.io import read_record
from retour.privacy import Classifier, load_classifier

# The published loop, whose steps are known beforehand.
COMMON = {"inverter": "ddim", "steps": 3, "iterations": 2, "guidance": 4.5}
COMMON |= {"gradient": "skip", "strength": 1.0, "reference": None, "keep": "margin"}


def attack(images=None, label="red", **options):
    given = cases.squares(2) if images is None else images
    options = {"classifier": cases.classifier(), "prompt": "red", **COMMON, **options}
    return retour.attack(cases.model(), given, label, **options)


def test_names_are_found_without_loading_torch():
    light = "import sys, retour; assert 'attack' in dir(retour) and 'torch' not in sys.modules"
    lazy = "import retour; assert retour.privacy.load_classifier"
    for code in (light, lazy):
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_record_says_what_happened():
    victim = Classifier(cases.MeanColour(bias=(0.0, 9.0, 0.0)), "biased", cases.COLOURS)
    result = attack(radius=0.4, victims=[victim], seed=3)
    record = json.loads(json.dumps(retour.io.plain(result.record)))
    assert record["task"] == "attack" and record["attack"] == "sca"
    assert record["attack_options"]["radius"] == 0.4
    assert record["classifier"] == "colours" and record["victims"] == ["biased"]
    assert record["labels"] == ["red", "red"] and record["prompts"] == ["red", "red"]
    assert record["inversion"]["seed"] == 3 and record["versions"]["torch"]
    for k, one in enumerate(record["results"]):
        assert one["success"] is result.success[k] is (one["margins"]["adversarial"] > 0)
        assert set(one["margins"]) == {"input", "reconstruction", "adversarial"}
        assert one["predictions"]["adversarial"]["biased"]["label"] == "green"
        assert one["predictions"]["input"]["colours"]["label"] == "red"
        far = one["distances"]
        assert far["input"]["clip_image"] == pytest.approx(1, abs=1e-5)
        assert far["input"]["structure"] == pytest.approx(0, abs=1e-6)
        assert 0 < far["adversarial"]["psnr"] < 60 and far["adversarial"]["structure"] >= 0
        assert one["latent_change"] == pytest.approx(0.08)
    assert record["success_rate"] == np.mean(result.success)


def test_what_is_said_is_said_of_the_returned_picture():
    """Margins are those of the 8-bit picture, at any radius that works or does not."""
    for radius in (0.0, 2.0):
        result = attack(radius=radius, step_size=0.5, iterations=4)
        pixels = torch.stack([retour.io.to_tensor(i) for i in result.images]) / 2 + 0.5
        wrong = cases.classifier()(pixels).argmax(1) != 0
        assert tuple(wrong.tolist()) == result.success
        assert all(result.success) == (radius > 0)


def test_the_picture_is_that_of_the_best_latents():
    result = attack(radius=1.0, step_size=0.3, iterations=3)
    job = cases.job(cases.squares(2), method="ddim", steps=3, guidance=4.5)
    pictures = retour.api.decode(job.model, job.denoise(result.found.start))
    assert [np.asarray(a).tolist() for a in pictures] == [
        np.asarray(b).tolist() for b in result.images
    ]


def test_evaluations_are_those_of_inversion_search_and_the_last_way_back():
    """Guided ddim: 2n up; 2n for each of N_a + 1 judged and for the last."""
    assert attack().record["nfe"] == 2 * 3 * (1 + 2 + 2)


def test_a_full_gradient_walks_every_step_once_more():
    assert attack(gradient="full").record["nfe"] == 2 * 3 * (1 + 2 + 2 + 2)


def test_guidance_is_a_share_of_the_models_own_and_recorded():
    """The paper's 4.5 is .6 of Stable Diffusion's 7.5; this model's own is 3."""
    record = attack(guidance=None, inverter="sde-dpm", iterations=0).record
    assert record["inverter_options"]["inversion_guidance"] == pytest.approx(1.8)
    assert record["inversion"]["guidance"] == pytest.approx(1.8)
    assert record["attack_options"]["guidance"] is None


def test_one_label_each_and_one_for_all():
    result = attack(label=["red", 0])
    assert result.record["labels"] == ["red", "red"]
    assert len(attack(label="red").success) == 2


def test_descriptions_are_asked_for_where_no_prompt_is_given():
    asked = []

    def describe(picture):
        asked.append(picture.size)
        return "red"

    result = attack(prompt=None, describe=describe)
    assert asked == [(8, 8)] * 2
    assert result.record["prompts"] == ["red", "red"] and result.record["prompts_proposed"]
    assert not attack().record["prompts_proposed"]


def test_without_a_describer_the_captioner_is_asked(monkeypatch):
    monkeypatch.setattr("retour.privacy.run.propose", lambda pictures: ["red"] * len(pictures))
    assert attack(prompt=None).record["prompts"] == ["red", "red"]


def test_an_empty_caption_has_no_cosine():
    result = attack(prompt="")
    assert math.isnan(result.record["results"][0]["distances"]["input"]["clip_caption"])


def test_embedded_classifiers_are_each_others_victims():
    found = attack(label="apple", classifier="emoji-cnn", iterations=0)
    assert found.record["victims"] == ["emoji-vit"]
    assert attack().record["victims"] == []


def test_judges_of_one_name_are_told_apart():
    result = attack(victims=[cases.classifier(), cases.classifier(bias=(0.0, 9.0, 0.0))])
    said = result.record["results"][0]["predictions"]["input"]
    assert list(said) == ["colours", "colours 2", "colours 3"]
    assert [answer["label"] for answer in said.values()] == ["red", "red", "green"]


def test_inverter_options_reach_the_inverter():
    result = attack(inverter_options={"query": "departure"})
    assert result.record["inverter_options"]["query"] == "departure"


def test_a_picture_of_another_size_returns_to_it(tmp_path):
    image = Image.fromarray((255 * cases.square()).astype(np.uint8)).resize((48, 24))
    result = attack([image])
    assert result.original_size().size == (48, 24)
    result.save(tmp_path / "out.png", keep_size=True)
    assert read_record(tmp_path / "out.png")["task"] == "attack"


def test_papers_of_attack_and_inverter_are_cited():
    text = retour.cite(attack())
    assert "2410.02240" in text and "2010.02502" in text
    assert "2410.02240" in retour.cite("sca")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: attack(label="rad"), "did you mean 'red'"),
        (lambda: attack(label=["red"]), "1 labels for 2 images"),
        (lambda: attack(label=7), "unknown label"),
        (lambda: attack(label=3, classifier=cases.MeanColour()), "tells 3 classes apart"),
        (lambda: attack(classifier=cases.MeanColour(), label="red"), "no class names"),
        (lambda: attack(classifier=lambda x: x, label=0), "must return logits"),
        (lambda: attack(method="scaa"), "did you mean 'sca'"),
        (lambda: attack(inverter="dim"), "did you mean 'ddim'"),
        (lambda: attack(radius=-1.0), "radius is -1"),
        (lambda: attack(steps=0), "at least 1, got 0"),
        (lambda: attack(prompt=["red"]), "1 prompts for 2 images"),
        (lambda: attack(images=[]), "no image"),
        (lambda: attack(victims=["emoji-cmm"]), "unknown classifier"),
        (lambda: attack(victims=["emoji-cnn"]), "unknown label of 'emoji-cnn' 'red'"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(call, says, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the network ran")

    monkeypatch.setattr(cases.ProblemModel, "network", never)
    with pytest.raises(retour.RetourError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- The command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny.sd1().save_pretrained(path)
    return str(path)


@pytest.fixture
def image(tmp_path, gradient):
    path = tmp_path / "in.png"
    gradient.save(path)
    return str(path)


def run(image, folder, out, *more):
    given = ("--label", "apple", "--model", folder, "--inverter", "ddim", "--steps", 2)
    given += ("--source", "a red apple", "-A", "iterations=1", "-o", out)
    return cli.run([str(a) for a in ("attack", "sca", image, *given, *more)])


def test_the_command_writes_picture_and_record(image, folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert run(image, folder, out, "--json", "-A", "radius=0.2", "--seed", 2) == 0
    printed, record = json.loads(capsys.readouterr().out), read_record(out)
    assert printed["results"] == record["results"] and printed["outputs"] == [str(out)]
    assert record["attack_options"]["radius"] == 0.2 and record["inversion"]["seed"] == 2
    assert set(record["results"][0]["predictions"]["input"]) == {"emoji-cnn", "emoji-vit"}
    assert json.loads((tmp_path / "out.retour.json").read_text()) == record


def test_the_command_says_who_errs(image, folder, tmp_path, capsys):
    options = ("--classifier", "emoji-vit", "--victim", "emoji-cnn", "--keep-size")
    assert run(image, folder, tmp_path / "out.png", *options) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[1].startswith("emoji-vit ") and lines[2].startswith("emoji-cnn ")
    assert all(line.split()[1] in ("holds:", "errs:") for line in lines[1:3])
    assert "latents moved by" in lines[3] and "PSNR" in lines[3]
    assert Image.open(tmp_path / "out.png").size == (48, 32)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--label", "appel"), "did you mean 'apple'"),
        (("--classifier", "emoji-cmm"), "did you mean 'emoji-cnn'"),
        (("--victim", "emoji-cmm"), "did you mean 'emoji-cnn'"),
        (("-A", "radius=wide"), "takes float, got 'wide'"),
        (("-A", "raidus=1"), "did you mean 'radius'"),
        (("-I", "query=now"), "query"),
        (("--inverter", "dim"), "did you mean 'ddim'"),
        (("--source", " "), "source prompt is empty"),
        (("-o", "out.xyz"), "end its name in"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_sentence(more, says, image, folder, tmp_path, capsys):
    assert run(image, folder, tmp_path / "out.png", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error
    assert not (tmp_path / "out.png").exists()


def test_stored_classifiers_are_shared():
    assert load_classifier("emoji-cnn") is load_classifier("emoji-cnn")

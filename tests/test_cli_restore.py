"""`retour restore` and `retour drag` as a user meets them."""

import json

import numpy as np
import pytest
from PIL import Image

import tiny
from retour import cli
from retour.io import read_record
from retour.models.diffusers_sd3 import DiffusersSD3


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny transformer on disk."""
    path = tmp_path_factory.mktemp("model") / "tiny-sd3"
    tiny.sd3().save_pretrained(path)
    return str(path)


@pytest.fixture
def image(tmp_path, gradient):
    gradient.save(tmp_path / "in.png")
    area = np.zeros((32, 48), np.uint8)
    area[8:24, 8:24] = 255
    Image.fromarray(area).save(tmp_path / "mask.png")
    return tmp_path / "in.png"


def retour(*arguments: object) -> int:
    return cli.run([str(a) for a in arguments])


def called_too_early(*_):
    raise AssertionError("the network was called before everything was checked")


def restore(image, folder, *more):
    out = image.with_name("out.png")
    return retour("restore", image, "--model", folder, "--steps", 2, "-o", out, *more)


def drag(image, folder, *more):
    out = image.with_name("out.png")
    given = ("--model", folder, "--steps", 2, "--source", "a cat", "-o", out)
    return retour("drag", image, *given, *more)


@pytest.mark.parametrize(
    ("more", "size", "operator"),
    [
        (("--task", "inpaint", "--mask", "mask.png"), (48, 32), {"name": "inpaint"}),
        (("--task", "sr", "--scale", 2), (96, 64), {"name": "sr", "scale": 2}),
        (("--task", "deblur", "-O", "sigma=2.5"), (48, 32), {"name": "deblur", "sigma": 2.5}),
        (("--task", "motion", "-O", "angle=45"), (48, 32), {"name": "motion", "angle": 45}),
        (("--task", "colour", "--project"), (48, 32), {"name": "colour"}),
        (("--task", "identity", "-R", "space=latent"), (48, 32), {"name": "identity"}),
    ],
)
def test_restore_writes_picture_and_record(
    more, size, operator, image, folder, monkeypatch, capsys
):
    monkeypatch.chdir(image.parent)
    assert restore(image, folder, "--keep-size", "--json", *more) == 0
    printed = json.loads(capsys.readouterr().out)
    record = read_record("out.png")
    assert record["operator"].items() >= operator.items()
    assert printed["restorer"] == record["restorer"] == "flowchef" and printed["nfe"] == 2
    assert Image.open("out.png").size == size


def test_a_guessed_prompt_is_said(image, folder, capsys):
    assert restore(image, folder, "--task", "colour") == 0
    record = read_record(image.with_name("out.png"))
    assert record["prompts_proposed"] and repr(record["prompts"][0]) in capsys.readouterr().err
    assert restore(image, folder, "--task", "colour", "--prompt", "") == 0
    assert "guessed" not in capsys.readouterr().err


def test_steer_writes_a_picture(tmp_path, folder, capsys):
    out = tmp_path / "cat.png"
    given = ("--model", folder, "--steps", 2, "--kappa", 0.1, "-o", out)
    assert retour("steer", "--label", "cat", *given, "--json") == 0
    record = read_record(out)
    assert (record["classifier"], record["label"], record["kappa"]) == ("emoji-cnn", "cat", 0.1)
    assert json.loads(capsys.readouterr().out)["costs"] == pytest.approx(record["costs"])
    assert retour("steer", "--label", "cta", *given) == 2
    assert "did you mean 'cat'" in capsys.readouterr().err
    assert retour("steer", "--label", "cat", *given, "--inner", 0) == 2
    _one_sentence(capsys.readouterr().err, "inner is 0: choose a number of at least 1")
    assert retour("steer", "--label", "cat", *given, "--free", 99) == 2
    _one_sentence(capsys.readouterr().err, "free is 99, which leaves none of")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--task", "inpant"), "did you mean 'inpaint'"),
        (("--task", "inpaint"), "needs a mask"),
        (("--task", "inpaint", "--mask", "no.png"), "no file"),
        (("--task", "inpaint", "--scale", 2, "--mask", "mask.png"), "takes no options"),
        (("--task", "colour", "--mask", "mask.png"), "leave mask out"),
        (("--task", "sr", "--scale", 0), "scale must be at least 1"),
        (("--task", "deblur", "-O", "sigm=2"), "unknown option of 'deblur' 'sigm'"),
        (("--task", "deblur", "-O", "sigma=much"), "takes float, got 'much'"),
        (("--task", "deblur", "-O", "sigma"), "KEY=VALUE"),
        (("--task", "colour", "--method", "flowchief"), "did you mean 'flowchef'"),
        (("--task", "colour", "-R", "kappa=-1"), "kappa is -1"),
        (("--task", "motion", "--project"), "no pseudo-inverse"),
        (("--task", "colour", "--steps", 0), "at least 1"),
        (("--task", "deblur", "-O", "sigma=nan"), "sigma of a blur must be above 0"),
        (("--task", "deblur", "-O", "width=100001"), "width is 100001: choose a number from 1"),
        (("--task", "motion", "-O", "length=100000"), "length is 100000.0: choose a number from 1"),
        (("--task", "motion", "-O", "angle=nan"), "angle of a motion must be a number"),
        (("--task", "sr", "--scale", 5, "--model", "emoji-mmdit"), "with scale 5 the"),
    ],
)
def test_bad_restorations(more, says, image, folder, monkeypatch, capsys):
    monkeypatch.setattr(DiffusersSD3, "network", called_too_early)
    monkeypatch.chdir(image.parent)
    assert restore(image, folder, *more) == 2
    _one_sentence(capsys.readouterr().err, says)
    assert not (image.parent / "out.png").exists()


def test_drag_writes_picture_and_record(image, folder, monkeypatch, capsys):
    monkeypatch.chdir(image.parent)
    more = ("--from", "12,16", "--to", "36,16", "--from", "20,10", "--to", "40,10")
    given = ("--mask", "mask.png", "--mode", "move", "--scale", 1.5, "--prompt", "a red cat")
    assert drag(image, folder, *more, *given, "--keep-size", "--json", "-E", "band=0") == 0
    printed, record = json.loads(capsys.readouterr().out), read_record("out.png")
    assert record["drags"] == [["12,16>36,16*1.5,1.5", "20,10>40,10*1.5,1.5"]]
    assert record["editor"] == "lazydrag" and record["inverter"] == "uniinv"
    assert record["targets"] == ["a red cat"] and record["prompts"] == ["a cat"]
    assert record["editor_options"]["band"] == "0" or record["editor_options"]["band"] == 0
    # Two steps: N + 1 up; down half of the way, source and target.
    assert printed["nfe"] == record["nfe"] == 3 + 2
    assert Image.open("out.png").size == (48, 32)


@pytest.mark.parametrize(("flag", "rounds"), [((), 1), (("--in-turn",), 2)])
def test_pairs_act_together_or_in_turn(flag, rounds, image, folder, monkeypatch):
    monkeypatch.chdir(image.parent)
    more = ("--from", "12,16", "--to", "20,16", "--from", "20,16", "--to", "20,24")
    assert drag(image, folder, *more, *flag) == 0
    record = read_record("out.png")
    assert len(record["rounds"]) == rounds and record["nfe"] == (3 + 2) * rounds
    wanted = [["12,16>20,16", "20,16>20,24"]] if rounds == 1 else [["20,16>20,24"]]
    assert record["drags"] == wanted


POINTS = ("--from", "12,16", "--to", "36,16")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((*POINTS, "--to", "1,1"), "1 handles (--from) and 2 goals"),
        (("--from", "12;16", "--to", "36,16"), "write x,y>x,y"),
        (("--from", "12,16", "--to", "99,16"), "99,16 lies outside"),
        ((*POINTS, "--scale", 2), "only mode 'move'"),
        ((*POINTS, "--scale", 2, "--scale", 3, "--mode", "move"), "2 scales for 1 drags"),
        ((*POINTS, "--mode", "move"), "give a mask"),
        ((*POINTS, "--mode", "push"), "push"),
        ((*POINTS, "--mask", "no.png"), "no file"),
        ((*POINTS, "--source", " "), "source prompt is empty"),
        ((*POINTS, "-E", "bend=1"), "unknown option of 'lazydrag' 'bend'"),
        ((*POINTS, "--inverter", "uninv"), "did you mean 'uniinv'"),
        ((*POINTS, "--mask", "black.png"), "black everywhere"),
        ((*POINTS, "--prompt", ""), "target prompt is empty"),
        ((*POINTS, "--editor", "p2p"), "'p2p' drags no points: use lazydrag"),
    ],
)
def test_bad_drags(more, says, image, folder, monkeypatch, capsys):
    monkeypatch.setattr(DiffusersSD3, "network", called_too_early)
    monkeypatch.chdir(image.parent)
    Image.new("L", (48, 32)).save("black.png")
    assert drag(image, folder, *more) == 2
    _one_sentence(capsys.readouterr().err, says)
    assert not (image.parent / "out.png").exists()


def test_a_unet_cannot_drag(image, tmp_path, capsys):
    tiny.sd1().save_pretrained(tmp_path / "unet")
    capsys.readouterr()
    assert drag(image, tmp_path / "unet", *POINTS) == 2
    _one_sentence(capsys.readouterr().err, "needs joint-attention")


def _one_sentence(text: str, says: str) -> None:
    if "retour: " in text:  # An error; what was remarked on the way to it stands above.
        text = "".join(x for x in text.splitlines(True) if not x.startswith("note: "))
    assert text.count("\n") == 1 and "Traceback" not in text
    assert says in text

"""The command line as a user meets it: main job, bad input, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from retour import cli
from retour.io import read_record
from retour.models.diffusers_unet import DiffusersUNet

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny.sd1().save_pretrained(path)
    return str(path)


@pytest.fixture
def image(tmp_path, gradient):
    path = tmp_path / "in.png"
    gradient.save(path)
    return str(path)


def retour(*arguments: object) -> int:
    """Run in this process; the exit code."""
    return cli.run([str(a) for a in arguments])


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retour", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def called_too_early(*_):
    raise AssertionError("the network was called before everything was checked")


def short(image, folder, out, *more):
    """An edit whose prompts the tiny text encoder reads to their end."""
    given = ("--source", "a cat", "--target", "a dog", "--model", folder, "--steps", 2, "-o", out)
    return retour("edit", image, *given, *more)


@pytest.mark.parametrize(
    "words",
    [
        "edit in.png --target x -o in.png",
        "edit in.png --target x --mask mask.png -o mask.png",
        "edit in-2.png --target x --target y -o in.png",
        "invert a.safetensors --source x -o a.safetensors",
        "reconstruct in.png -o folder/../in.png",
        "vary in.png --count 1 -o link.png",
        "drag in.png --from 1,1 --to 2,2 -o in.png",
        "restore in.png --task sr -o in.png",
        "attack sca in.png --label cat -o in.png",
    ],
)
def test_what_is_read_is_never_overwritten(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to("in.png")
    for name in ("in.png", "in-2.png", "mask.png", "a.safetensors"):
        (tmp_path / name).write_bytes(b"precious")
    assert retour(*words.split()) == 2
    assert "is what is read here: name another file" in capsys.readouterr().err
    assert {p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == {b"precious"}


def edit(image, folder, out, *more):
    given = ("--source", SOURCE, "--target", TARGET, "--model", folder, "--steps", 3, "-o", out)
    return retour("edit", image, *given, *more)


def test_edit_writes_picture_and_record(image, folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert edit(image, folder, out, "--json", "--seed", 3) == 0
    printed = json.loads(capsys.readouterr().out)
    record = read_record(out)
    assert printed["nfe"] == record["nfe"] == 15
    assert record["inversion"]["seed"] == 3 and record["editor"] == "p2p"
    assert printed["outputs"] == [str(out)]
    assert json.loads((tmp_path / "out.retour.json").read_text()) == record


def test_keep_size_and_several_targets(image, folder, tmp_path):
    out = tmp_path / "out.png"
    assert edit(image, folder, out, "--target", "a cat", "--keep-size") == 0
    assert [Image.open(tmp_path / f"out-{k}.png").size for k in (1, 2)] == [(48, 32)] * 2


def test_invert_then_edit_then_reconstruct(image, folder, tmp_path):
    stored, out = tmp_path / "a.safetensors", tmp_path / "out.png"
    given = ("--source", SOURCE, "--model", folder, "--steps", 3)
    assert retour("invert", image, *given, "-o", stored, "--inverter", "edict") == 0
    assert retour("edit", stored, "--target", TARGET, "--model", folder, "-o", out) == 0
    assert read_record(out)["inverter"] == "edict"
    assert retour("reconstruct", stored, "--model", folder, "-o", out) == 0


def test_vary_makes_several(image, folder, tmp_path):
    out = tmp_path / "out.png"
    given = ("--source", SOURCE, "--model", folder, "--steps", 3, "-o", out)
    assert retour("vary", image, *given, "--count", 2, "--seed", 5, "--keep-size") == 0
    pictures = [Image.open(tmp_path / f"out-{k}.png") for k in (1, 2)]
    assert [p.size for p in pictures] == [(48, 32)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
    record = read_record(tmp_path / "out-1.png")
    assert record["editor"] == "rival" and record["editor_options"]["seed"] == 5
    assert record["targets"] == [SOURCE] * 2


def test_explain_writes_a_sheet_and_maps(image, folder, tmp_path, capsys):
    out = tmp_path / "maps"
    given = ("--source", SOURCE, "--model", folder, "--steps", 3, "-o", out)
    assert retour("explain", image, *given, "--words", "apple", "--span", "0-0.7", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["nfe"] == 3 and len(printed["outputs"]) == 3
    assert retour("explain", image, *given, "-o", out) == 0
    assert "source-0-03-apple.png and 5 more files (" in capsys.readouterr().out
    assert Image.open(out / "source-0-01-apple.png").size == (48, 32)
    assert (out / "maps.safetensors").exists()


def test_explain_reads_inversions(image, folder, tmp_path):
    stored, out = tmp_path / "a.safetensors", tmp_path / "maps"
    given = ("--source", SOURCE, "--model", folder, "--steps", 2)
    assert retour("invert", image, *given, "-o", stored) == 0
    assert retour("explain", stored, "--model", folder, "--target", TARGET, "-o", out) == 0
    assert Image.open(out / "target-0-02-green.png").size == (48, 32)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--words", "banana"), "'banana', which is not in"),
        (("--words", ""), "no word to show: name one"),
        (("--span", "half"), "span is 'half'"),
        (("--scale", "log"), "unknown scale 'log'"),
        (("--factor", "0"), "factor is 0"),
        (("--inverter", "dim"), "did you mean 'ddim'"),
        (("--source", ""), "source prompt is empty"),
        (("--target", ""), "target is ''"),
        (("-o", __file__), "is not a folder"),
    ],
)
def test_bad_arguments_of_explain(more, says, image, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DiffusersUNet, "network", called_too_early)
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    given = ("--source", SOURCE, "--model", folder, "--steps", 2)
    assert retour("explain", image, *given, *more) == 2
    _one_sentence(capsys.readouterr().err, says)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_method_options(image, folder, tmp_path):
    out = tmp_path / "out.png"
    more = ("-I", "form=overwrite", "-E", "cross-steps=0.8", "-E", "reweight=green:2")
    assert edit(image, folder, out, *more) == 0
    record = read_record(out)
    assert record["inverter_options"]["form"] == "overwrite"
    assert record["editor_options"]["cross_steps"] == "0.8"


def test_methods_is_a_table_and_a_list(capsys):
    assert retour("methods", "--task", "invert", "--exact", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert "edict" in [m["name"] for m in listed] and all(m["exact"] for m in listed)
    assert {"name", "task", "title", "arxiv", "exact", "order", "nfe"} <= set(listed[0])
    assert retour("methods") == 0
    said = capsys.readouterr()
    proximal = next(line for line in said.out.splitlines() if line.startswith("edit     proximal"))
    assert "negative-prompt" in proximal and "NFE: network evaluations" in said.err
    assert retour("methods", "--needs", "wings") == 0
    assert "no method is like that" in capsys.readouterr().err


def test_cite(capsys):
    assert retour("cite", "direct") == 0
    assert "2310.01506" in capsys.readouterr().out
    assert retour("cite", "p2pp") == 2
    _one_sentence(capsys.readouterr().err, "unknown method 'p2pp': did you mean 'p2p'?")
    assert retour("cite", "P2P") == 2
    _one_sentence(capsys.readouterr().err, "unknown method 'P2P': did you mean 'p2p'")


def _no_file(tmp_path):
    return tmp_path / "none.png", {}


def _bad_files(tmp_path):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    text = tmp_path / "text.png"
    text.write_text("hello")
    cut = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:500])
    wide = tmp_path / "wide.png"
    Image.new("1", (30_000, 8)).save(wide)
    return {"empty": empty, "text": text, "cut": cut, "wide": wide, "none": tmp_path / "none.png"}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "0 bytes"),
        ("text", "not a picture"),
        ("cut", "damaged"),
        ("wide", "30,000 x 8"),
        ("none", "no file"),
    ],
)
def test_bad_pictures(kind, says, folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert edit(_bad_files(tmp_path)[kind], folder, out) == 2
    _one_sentence(capsys.readouterr().err, says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--inverter", "dirct"), "did you mean 'direct'"),
        (("--editor", "p2"), "unknown editor 'p2'"),
        (("--editor", "direct"), "unknown editor 'direct': it is an inverter. Choices:"),
        (("--inverter", "midpoint"), "unknown inverter 'midpoint': it is a solver. Choices:"),
        (("--seed", "1" + "0" * 30), "choose a whole number below 2^63"),
        (("--device", "meta"), "'meta' is not available"),
        (("--source", "caf\udce9"), "has a character that is none (number 4)"),
        (("--steps", "0"), "at least 1"),
        (("--steps", "5000"), "1000 training steps, got 5000"),
        (("--guidance", "nan"), "guidance is nan"),
        (("--source", ""), "prompt"),
        (("--target", " "), "prompt"),
        (("--model", "emoji-nuet"), "unknown model 'emoji-nuet'"),
        (("--model", "weights.ckpt"), "single file"),
        (("--device", "abacus"), "unknown device"),
        (("-o", "/nowhere/out.png"), "no folder '/nowhere'"),
        (("-o", "out.xyz"), "end its name in"),
        (("-I", "form"), "KEY=VALUE"),
        (("-I", "every=often"), "takes int, got 'often'"),
        (("--mask", "none.png"), "no file"),
    ],
)
def test_bad_arguments(more, says, image, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert edit(image, folder, tmp_path / "out.png", *more) == 2
    _one_sentence(capsys.readouterr().err, says)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--target", ""), "target prompt is empty"),
        (("--inverter", "ddim", "--editor", "infedit"), "does not go with inverter 'ddim'"),
        (("--inverter", "ddim", "--editor", "lazydrag"), "needs joint-attention"),
        (("--editor", "mask-blend"), "give mask="),
        (("--mask", "black.png"), "black everywhere"),
        (("-E", "blend=zebra"), "names the word 'zebra'"),
        (("-E", "reweight=zebra:2"), "names the word 'zebra'"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_the_inversion(
    more, says, image, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(DiffusersUNet, "network", called_too_early)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (48, 32)).save("black.png")
    assert edit(image, folder, tmp_path / "out.png", *more) == 2
    _one_sentence(capsys.readouterr().err, says)
    if "--target" not in more:
        return
    given = ("--source", SOURCE, "--model", folder, "--steps", 3, "-o", tmp_path / "out.png")
    assert retour("vary", image, *given, *more) == 2
    _one_sentence(capsys.readouterr().err, says)


def _one_sentence(text: str, says: str) -> None:
    if "retour: " in text:  # An error; what was remarked on the way to it stands above.
        text = "".join(x for x in text.splitlines(True) if not x.startswith("note: "))
    assert text.count("\n") == 1 and "Traceback" not in text
    assert says in text


def test_damaged_and_foreign_inversions(image, folder, tmp_path, capsys):
    stored = tmp_path / "a.safetensors"
    given = ("--source", SOURCE, "--model", folder, "--steps", 2)
    assert retour("invert", image, *given, "-o", stored) == 0
    other = tmp_path / "other"
    tiny.sd2().save_pretrained(other)
    capsys.readouterr()
    out = tmp_path / "out.png"
    assert retour("edit", stored, "--target", TARGET, "--model", other, "-o", out) == 2
    _one_sentence(capsys.readouterr().err, "was made with model")
    stored.write_bytes(stored.read_bytes()[:-100])
    assert retour("edit", stored, "--target", TARGET, "--model", folder, "-o", out) == 2
    _one_sentence(capsys.readouterr().err, "damaged")
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "more", "says"),
    [
        ("edit", ("--steps", 7), "leave out --steps,"),
        ("edit", ("--inverter", "ddim", "-I", "strength=0.5"), "leave out --inverter, -I,"),
        ("edit", ("--source", SOURCE, "--negative", "a cat"), "leave out --source, --negative,"),
        ("edit", ("--seed", 3), "leave out --seed,"),
        ("reconstruct", ("--inverter", "direct"), "leave out --inverter,"),
        ("vary", ("--steps", 7), "leave out --steps,"),
        ("explain", ("--guidance", 2), "leave out --guidance,"),
        ("invert", (), "is an inversion already"),
    ],
)
def test_settings_of_a_stored_inversion_are_not_ignored(
    command, more, says, image, folder, tmp_path, capsys
):
    stored = tmp_path / "a.safetensors"
    given = ("--source", "a cat", "--model", folder, "--steps", 2)
    assert retour("invert", image, *given, "-o", stored) == 0
    capsys.readouterr()
    before = sorted(p.name for p in tmp_path.iterdir())
    out = {"explain": "maps", "invert": "b.safetensors"}.get(command, "out.png")
    target = ("--target", "a dog") if command == "edit" else ()
    given = ("--model", folder, "-o", tmp_path / out, *target)
    assert retour(command, stored, *given, *more) == 2
    _one_sentence(capsys.readouterr().err, says)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_way_back_of_a_stored_inversion_has_settings(image, folder, tmp_path):
    stored, out = tmp_path / "a.safetensors", tmp_path / "out.png"
    given = ("--source", "a cat", "--model", folder, "--steps", 2)
    assert retour("invert", image, *given, "-o", stored) == 0
    back = (stored, "--model", folder, "-o", out, "--guidance", 2)
    assert retour("edit", *back, "--target", "a dog", "-E", "self_steps=0.5") == 0
    assert retour("reconstruct", *back) == 0
    assert retour("vary", *back, "--count", 1, "--seed", 5) == 0
    assert read_record(out)["guidance"] == 2 and read_record(out)["editor_options"]["seed"] == 5


def test_pickles_are_refused(image, folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.unlink()
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    assert edit(image, str(copy), tmp_path / "out.png") == 2
    _one_sentence(capsys.readouterr().err, "can run code")


def test_long_prompt_says_what_was_cut(image, folder, tmp_path, capsys):
    long = " ".join(["green apple"] * 20)
    assert short(image, folder, tmp_path / "out.png", "--target", long) == 0
    _one_sentence(capsys.readouterr().err, "note: the prompt 'green apple green apple")


def test_remarks_are_notes_once_and_those_of_libraries_stay_out(
    image, folder, tmp_path, monkeypatch, capsys
):
    network = DiffusersUNet.network

    def remarking(self, x, t, condition):
        warnings.warn_explicit("of a library", UserWarning, "/lib/torch/nn.py", 1, registry={})
        return network(self, x, t, condition)

    monkeypatch.setattr(DiffusersUNet, "network", remarking)
    frames = [Image.new("L", (16, 16), value) for value in (10, 200, 90)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:])
    assert short(tmp_path / "in.gif", folder, tmp_path / "out.png", "--mask", image) == 0
    said = capsys.readouterr().err
    assert said == f"note: '{tmp_path / 'in.gif'}' has 3 frames: only one is used\n"


def test_a_folder_is_refused_by_a_model_of_pictures(folder, tmp_path, capsys):
    assert edit(tmp_path, folder, tmp_path / "out.png") == 2
    _one_sentence(capsys.readouterr().err, "is a folder: name one picture in it")


def test_half_precision_on_a_cpu_says_nothing(image, folder, tmp_path, capfd):
    assert short(image, folder, tmp_path / "out.png", "--dtype", "float16") == 0
    assert capfd.readouterr().err == ""


def test_the_version_is_told(capsys):
    from retour import __version__

    assert retour("--version") == 0
    assert capsys.readouterr().out == f"retour {__version__}\n"
    assert retour("edit", "-h") == 0 and "--target" in capsys.readouterr().out


def test_usage_errors_and_help():
    assert shell("edit").returncode == 2
    assert shell("--help").returncode == 0
    assert shell("frobnicate").returncode == 2


def test_help_loads_no_torch():
    code = "import sys, retour.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_interrupt_leaves_nothing_half_written(image, folder, tmp_path, monkeypatch, capsys):
    network = DiffusersUNet.network

    def interrupted(self, x, t, condition):
        os.kill(os.getpid(), signal.SIGINT)
        return network(self, x, t, condition)

    monkeypatch.setattr(DiffusersUNet, "network", interrupted)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert edit(image, folder, tmp_path / "out.png") == 130
    _one_sentence(capsys.readouterr().err, "stopped")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_nan_tensor_is_refused():
    from retour import RetourError, invert, load

    tensor = torch.full((3, 16, 16), np.nan)
    with pytest.raises(RetourError, match="NaN"):
        invert(load(tiny.sd1()), tensor, SOURCE)

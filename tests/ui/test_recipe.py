"""What is shown to copy makes the very picture: the script and the command are really run."""

import io
import subprocess

import numpy
import pytest
from PIL import Image

import tiny
from retour import cli, load
from retour.errors import RetourError
from retour.io import read_image
from retour.ui.recipe import Recipe, drag_text, file_name, to_cli, to_python
from retour.ui.work import make
from ui.cases import SOURCE, TARGET, recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models on disk, by family."""
    where = tmp_path_factory.mktemp("models")
    tiny.sd1().save_pretrained(where / "tiny-sd")
    tiny.sd3().save_pretrained(where / "tiny-sd3")
    return {name: str(where / name) for name in ("tiny-sd", "tiny-sd3")}


def half_mask(size):
    mask = numpy.zeros(size[::-1], numpy.uint8)
    mask[:, : size[0] // 2] = 255
    return Image.fromarray(mask)


def shell_words(command):
    """What a shell makes of a command's arguments."""
    script = "retour() { printf '%s\\0' \"$@\"; }\n" + command
    said = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout
    return said.decode().split("\0")[:-1]


CASES = {
    "plain": {},
    "options": {
        "inverter_options": {"strength": 0.7, "query": "departure"},
        "editor_options": {"cross_steps": "0.2-0.8", "blend": "apple", "self_max": 0.25},
        "seed": 5,
    },
    "mask": {"mask": "in-mask.png", "inverter": "direct", "editor": "mask-blend"},
    "random": {"inverter": "edit-friendly", "seed": 11},
    "seeded editor": {"editor": "rival", "seed": 3},
    "hard words": {"source": "--a \"red\" $apple's `pear`\\", "target": "-a 'green' cat; rm *"},
    "drag": {
        "model": "tiny-sd3", "editor": "lazydrag", "inverter": "uniinv", "target": "",
        "drags": ((10, 10, 30, 12), (5, 20, 5, 28)), "guidance": 1.0, "seed": 4,
        "inverter_options": {"strength": 0.9}, "editor_options": {"fill": "neighbours"},
    },
    "drag in turn": {
        "model": "tiny-sd3", "editor": "lazydrag", "inverter": "uniinv", "target": "",
        "drags": ((10, 10, 30, 12), (30, 12, 30, 26)), "in_turn": True, "guidance": 1.0,
    },
    "drag in turn with words": {
        "model": "tiny-sd3", "editor": "lazydrag", "inverter": "uniinv",
        "drags": ((10, 10, 30, 12), (30, 12, 30, 26)), "in_turn": True, "guidance": 1.0,
    },
    "drag with words": {
        "model": "tiny-sd3", "editor": "lazydrag", "inverter": "uniinv",
        "drags": ((10, 10, 30, 12),), "guidance": 1.0, "mask": "in-mask.png",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_python_and_cli_make_the_very_picture(case, folders, gradient, tmp_path, monkeypatch):
    asked = recipe(**CASES[case])
    asked = recipe(**{**CASES[case], "model": folders[asked.model]})
    mask = half_mask(gradient.size) if asked.mask else None
    made = make(asked, load(asked.model), gradient, mask)
    monkeypatch.chdir(tmp_path)
    gradient.save("in.png")
    if mask is not None:
        mask.save("in-mask.png")

    exec(compile(to_python(made.recipe, "py.png"), "copied", "exec"), {})
    assert cli.run(shell_words(to_cli(made.recipe, "cli.png"))) == 0
    wanted = made.after.tobytes()
    assert read_image("py.png").tobytes() == wanted
    assert read_image("cli.png").tobytes() == wanted
    assert read_image("in.png").tobytes() != wanted


def test_a_guess_becomes_part_of_the_recipe(folders, gradient, monkeypatch):
    monkeypatch.setattr("retour._inputs.propose", lambda pictures: [SOURCE] * len(pictures))
    made = make(recipe(source=None), load(folders["tiny-sd"]), gradient)
    assert made.recipe.source == SOURCE and repr(SOURCE) in to_python(made.recipe)


def test_the_png_carries_the_record(folders, gradient):
    made = make(recipe(), load(folders["tiny-sd"]), gradient)
    with Image.open(io.BytesIO(made.png)) as image:
        assert '"editor": "p2p"' in image.info["retour"]
        assert image.convert("RGB").tobytes() == made.after.tobytes()
    assert made.before.size == made.after.size


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "  "}, "target prompt is empty"),
        ({"target": "a" * 2000}, "has 2,000 characters"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10_000}, "steps is 10000"),
        ({"steps": True}, "whole number"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"editor": "mask-blend"}, "works inside a mask"),
        ({"editor": "lazydrag"}, "pick the drag tool"),
        ({"editor": "lazydrag", "drags": ((1, 1, 2, 2),) * 40}, "40 drags are too many"),
        ({"editor": "p2q"}, "did you mean 'p2p'"),
    ],
)
def test_bad_recipes_are_refused(changes, says):
    with pytest.raises(RetourError, match=says):
        recipe(**changes)


def test_device_and_dtype_are_told():
    asked: Recipe = recipe(device="cuda:1", dtype="float16", target=TARGET)
    assert "retour.load('tiny-sd', device='cuda:1', dtype='float16')" in to_python(asked)
    assert "--device cuda:1" in to_cli(asked) and "--dtype float16" in to_cli(asked)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("cat.jpeg", "cat.png"),
        ("../../etc/passwd", "passwd.png"),
        ("C:\\temp\\my cat.png", "my-cat.png"),
        ("--out.png", "out.png"),
        ("a <b>cat (2).png", "a-b-cat-2.png"),
        ("", "picture.png"),
        ("🙂.png", "picture.png"),
        ("a" * 200 + ".png", "a" * 40 + ".png"),
    ],
)
def test_file_names_are_harmless(given, kept):
    assert file_name(given) == kept


def test_drags_are_written_as_drag_reads_them():
    assert drag_text(((1, 2, 3, 4), (5, 6, 7, 8))) == "1,2>3,4; 5,6>7,8"


def test_rounds_are_walked_one_after_the_other(folders, gradient):
    """Both come to the end of the bar, and the bar never falls."""
    asked = recipe(**CASES["drag in turn"])
    told = []
    made = make(asked, load(folders[asked.model]), gradient, tell=told.append)
    assert len(made.record["rounds"]) == 2
    fractions = [p.fraction for p in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    ends = [p.fraction for p in told if p.phase == "edit" and p.step == p.steps]
    assert ends == [0.5, 1.0]

"""Many pictures of one's own: lists are checked line by line, outputs are those of single edits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

import retour
import tiny
from evaluate import benches
from retour.core.progress import quiet
from retour.errors import RetourError
from retour.evaluate.batches import batch
from retour.io import read_record

LIST = """image,source,target,inverter,editor,steps,guidance,mask,options
red.png,a red apple,a green apple,ddim,reprompt,2,3,,
wide.png,a red cat,a green cat,,p2p,2,3,,ddim.x=1
sub/blue.png,a blue pear,a red pear,ddim,reprompt,2,3,,
red.png,a red apple,"a green apple, on blue",direct,p2p,3,2.5,mask.png,direct.scale=0.5
"""


@pytest.fixture(scope="module")
def model():
    return retour.load(tiny.sd1())


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    for name, colour, size in (
        ("red.png", "red", (16, 16)),
        ("wide.png", "navy", (48, 16)),
        ("sub/blue.png", "blue", (32, 32)),
        ("mask.png", "white", (16, 16)),
        ("black.png", "black", (16, 16)),
    ):
        Image.new("RGB", size, colour).save(place / name)
    (place / "text.png").write_text("no picture")
    return place


@pytest.fixture
def jobs(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text(LIST.replace(",ddim.x=1", ","))
    return path


def run(folder, jobs, out, model, **more):
    return batch(folder, jobs, out, model=model, batch=4, threads=1, **more)


def test_every_line_becomes_a_picture(folder, jobs, tmp_path, model):
    out = tmp_path / "out"
    rows = run(folder, jobs, out, model).rows
    assert [row["line"] for row in rows] == [2, 3, 4, 5]
    assert [row["item"] for row in rows] == ["0001-red", "0002-wide", "0003-blue", "0004-red"]
    assert [row["run"] for row in rows] == [
        *("ddim+reprompt", "direct+p2p", "ddim+reprompt", "direct+p2p-2"),
    ]
    assert rows[0]["batch"] == 2 == rows[2]["batch"]
    assert rows[3]["target"] == "a green apple, on blue" and rows[3]["steps"] == 3
    for row in rows:
        record = read_record(out / row["image"])
        assert record["editor"] == row["editor"]
    record = json.loads(rows[3]["record"])
    assert record["inverter_options"]["scale"] == 0.5 and record["masked"]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["record"]["line"] for line in lines] == [2, 3, 4, 5]
    assert parquet.read_table(out / "results.parquet")["input"].to_pylist()[2] == "blue.png"


def test_a_picture_is_that_of_the_single_edit(folder, jobs, tmp_path, model):
    row = run(folder, jobs, tmp_path / "out", model).rows[3]
    single = retour.invert(
        model, folder / "red.png", "a red apple", method="direct", steps=3, guidance=2.5, scale=0.5
    )
    wanted = retour.edit(single, row["target"], editor="p2p", mask=folder / "mask.png")
    saved = Image.open(tmp_path / "out" / row["image"])
    assert np.array_equal(np.asarray(saved), np.asarray(wanted.image))


def test_sizes_can_be_kept(folder, jobs, tmp_path, model):
    kept = run(folder, jobs, tmp_path / "kept", model, keep_size=True).rows
    sizes = [Image.open(tmp_path / "kept" / row["image"]).size for row in kept]
    assert sizes == [(16, 16), (48, 16), (32, 32), (16, 16)]


def test_json_lines_do_as_well(folder, tmp_path, model):
    path = tmp_path / "jobs.jsonl"
    job = {"image": "red.png", "source": "a red apple", "target": "a cat", "steps": 2,
           "options": {"pix2pix-zero.rate": 0.2, "inverter.rate": 0.0, "inverter.steps": 0},
           "editor": "pix2pix-zero"}  # fmt: skip
    path.write_text("\n" + json.dumps(job) + "\n")
    with pytest.raises(RetourError, match="line 2: .*unknown option of 'pix2pix-zero'"):
        run(folder, path, tmp_path / "out", model)
    del job["options"]
    path.write_text(json.dumps({**job, "editor": "reprompt", "guidance": 2}))
    (row,) = run(folder, path, tmp_path / "out", model).rows
    assert (row["line"], row["guidance"], row["inverter"]) == (1, 2.0, "direct")


def test_without_a_source_the_caption_is_proposed(folder, tmp_path, model):
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps({"image": "red.png", "target": "a cat", "steps": 1}))
    (row,) = run(folder, path, tmp_path / "out", model, editor="reprompt").rows
    assert " background" in row["source"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../../etc/passwd,,a cat", "lies outside of"),
        ("/etc/passwd,,a cat", "lies outside of"),
        ("sub/../../x.png,,a cat", "lies outside of"),
        ("gone.png,,a cat", "there is no file"),
        ("text.png,,a cat", "not a picture"),
        ("sub,,a cat", "is a folder"),
        (",,a cat", "has no image"),
        ("red.png,,", "has no target"),
        ("red.png,,a cat,dimm", "did you mean 'ddim'"),
        ("red.png,,a cat,,p2q", "unknown editor 'p2q'"),
        ("red.png,,a cat,ddim,infedit", "does not go with inverter 'ddim'"),
        ("red.png,,a cat,,,0", "steps is 0"),
        ("red.png,,a cat,,,2.5", "steps is '2.5'"),
        ("red.png,,a cat,,,many", "steps is 'many'"),
        ("red.png,,a cat,,,,lots", "guidance is 'lots'"),
        ("red.png,,a cat,,,,nan", "guidance is nan"),
        ("red.png,,a cat,,,,,../pictures2/m.png", "lies outside of"),
        ("red.png,,a cat,,,,,black.png", "black everywhere"),
        ("red.png,,a cat,,mask-blend", "needs a mask"),
        ("red.png,,a cat,,,,,,fast", "key=value, got 'fast'"),
        ("red.png,,a cat,,,,,,speed=1", "unknown option of 'p2p' 'speed'"),
        ("red.png,,a cat,,,,,,ddim.strength=1", "of 'ddim', which this line does not run"),
        ("red.png,,a cat,,,,,,,extra", "more values than columns"),
    ],
)
def test_bad_lines_are_refused_by_number_before_any_work(
    folder, jobs, tmp_path, model, monkeypatch, line, message
):
    monkeypatch.setattr(retour.api, "invert", None)
    jobs.write_text(LIST.replace(",ddim.x=1", ",") + line + "\n")
    out = tmp_path / "out"
    with pytest.raises(RetourError, match=f"1 of 5 jobs .*line 6: .*{message}"):
        run(folder, jobs, out, model)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file '.*list.csv': name the list of jobs"),
        ("image;target\nred.png;a cat\n", "names no column image and target: .* commas between"),
        ("image,image,target\nred.png,b.png,a cat\n", "names image twice"),
        ("image,target\ngone.png,a cat\nred.png,\n", r"check the path; line 3: it has no target$"),
    ],
)
def test_lists_with_a_wrong_head_are_refused(folder, tmp_path, model, text, message):
    listed = tmp_path / "list.csv"
    if text is not None:
        listed.write_text(text)
    with pytest.raises(RetourError, match=message):
        run(folder, listed, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_folder_is_not_followed(folder, jobs, tmp_path, model):
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    jobs.write_text("image,target\nlink.png,a cat\n")
    with pytest.raises(RetourError, match="line 2: 'link.png' lies outside"):
        run(folder, jobs, tmp_path / "out", model)


def test_all_bad_lines_are_told(folder, jobs, tmp_path, model):
    jobs.write_text("image,target\n" + "gone.png,a cat\n" * 12 + "red.png,a cat\n")
    with pytest.raises(RetourError, match=r"12 of 13 jobs.*line 2: .*line 11: .*and 2 more"):
        run(folder, jobs, tmp_path / "out", model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("jobs.txt", b"", "name a .csv or .jsonl"),
        ("jobs.csv", b"", "names no column image and target"),
        ("jobs.csv", b"image,target\n", "holds no jobs"),
        ("jobs.csv", b"picture,target\na,b\n", "names no column image"),
        ("jobs.csv", b"image,target,tarjet\nred.png,b,c\n", "did you mean 'target'"),
        ("jobs.csv", b'image,target\n"a,b\n', "is no CSV"),
        ("jobs.csv", b"\xff\xfe", "in UTF-8"),
        ("jobs.jsonl", b"{\n", "line 1: it is no JSON"),
        ("jobs.jsonl", b"[1]\n", "line 1: it is no JSON object"),
        ("jobs.jsonl", b"[" * 100_000, "line 1: it is no JSON"),
        ("jobs.jsonl", b'{"image": 3, "target": "x"}', "image is 3: give text"),
        ("jobs.jsonl", b'{"image": "red.png", "target": "x", "steps": true}', "steps is True"),
        ("jobs.jsonl", b'{"image": "red.png", "target": "x", "options": 3}', "options are 3"),
        ("jobs.jsonl", b'{"image": "a\\u0000b", "target": "x"}', "null"),
    ],
)
def test_bad_lists_are_refused(folder, tmp_path, model, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RetourError, match=message):
        run(folder, path, tmp_path / "out", model)


def test_missing_places_are_refused(folder, jobs, tmp_path, model):
    with pytest.raises(RetourError, match="no folder"):
        run(tmp_path / "nowhere", jobs, tmp_path / "out", model)
    with pytest.raises(RetourError, match="there is no file .*none.csv"):
        run(folder, tmp_path / "none.csv", tmp_path / "out", model)


def dying(folder, jobs, out, model, renames):
    real, left = os.replace, [renames]

    def replace(source, target):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        real(source, target)

    os.replace = replace
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with quiet():
        run(folder, jobs, out, model)


def test_killed_it_goes_on(folder, jobs, tmp_path, model):
    whole = run(folder, jobs, tmp_path / "whole", model)
    out, deaths, finished = tmp_path / "killed", 0, {}
    while True:
        given = (folder, jobs, out, model, 2 + 3 * (deaths % 3))
        child = multiprocessing.get_context("fork").Process(target=dying, args=given)
        child.start()
        child.join(120)
        if child.exitcode != -signal.SIGKILL:
            break
        deaths += 1
        now = benches.parts(out)
        assert finished.items() <= now.items() and deaths < 40
        finished = now
    assert child.exitcode == 0 and deaths > 2
    keep = ("line", "run", "item", "image", "nfe", "nfe_full", "batch")
    found = parquet.read_table(out / "results.parquet").to_pylist()
    assert [[row[k] for k in keep] for row in found] == [
        [row[k] for k in keep] for row in whole.rows
    ]
    assert benches.pictures(out) == benches.pictures(whole.folder)


def test_a_changed_list_is_another_plan(folder, jobs, tmp_path, model):
    run(folder, jobs, tmp_path / "out", model)
    jobs.write_text(jobs.read_text().replace("a green cat", "a blue cat"))
    with pytest.raises(RetourError, match="another plan"):
        run(folder, jobs, tmp_path / "out", model)
    Image.new("RGB", (16, 16), "pink").save(folder / "red.png")
    with pytest.raises(RetourError, match="another plan"):
        run(folder, jobs, tmp_path / "out", model)

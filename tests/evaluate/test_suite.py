"""The benchmark format: what is written is read back, PIE-Bench's quirks, and hostile folders."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from retour.errors import RetourError
from retour.evaluate.suite import KINDS, Suite, decode_mask, encode_mask, plain_prompt

ENTRY = {
    "image_path": "1_change_object_80/a.jpg",
    "original_prompt": "a [cat] on  a mat",
    "editing_prompt": "a [dog] on a mat",
    "editing_instruction": "make it a dog",
    "editing_type_id": "1",
    "blended_word": "cat dog",
    "mask": [0, 3, 40, 100],
}


def write(folder, entries, size=(8, 6)):
    for entry in entries.values():
        path = folder / "annotation_images" / entry["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(path)
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return folder


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_masks_come_back(mask):
    runs = encode_mask(mask)
    assert all(type(v) is int for v in runs)
    assert np.array_equal(decode_mask(runs, *mask.shape), mask)


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80))))
def test_runs_over_the_end_are_cut(pairs):
    mask = decode_mask([v for pair in pairs for v in pair], 6, 8)
    expected = [any(s <= i < s + n for s, n in pairs) for i in range(48)]
    assert mask.ravel().tolist() == expected


def test_runs_far_beyond_the_end_are_harmless():
    assert not decode_mask([10**30, 10**30, 48, 1], 6, 8).any()


def test_runs_are_row_major():
    assert encode_mask(np.array([[0, 1, 1], [1, 0, 1]], bool)) == [1, 3, 5, 1]


def test_border_rule():
    mask = decode_mask([], 4, 5, border=True)
    assert mask.sum() == 4 * 5 - 2 * 3
    assert not mask[1:-1, 1:-1].any()


def test_a_pie_bench_folder_is_read(tmp_path):
    other = {**ENTRY, "blended_word": "", "image_path": "b.png"}
    entries = {"000000000000": ENTRY, "111000000001": other}
    first, second = Suite.load(write(tmp_path, entries), border=True)
    assert (first.id, first.kind, first.type_id) == ("000000000000", "change_object", "1")
    assert (first.source, first.target) == ("a cat on a mat", "a dog on a mat")
    assert first.words == ("cat", "dog") and second.words is None
    assert first.image.size == (8, 6) and first.edited is None
    assert first.mask().shape == (6, 8)
    assert first.mask()[0].all() and first.mask()[5].all()


def test_brackets_go_wherever_they_stand():
    assert plain_prompt("[a [red] cat]s") == "a red cats"
    assert plain_prompt("a cat[ with a hat]") == "a cat with a hat"


def test_selection_takes_kinds_in_turn():
    suite = Suite.paired()
    chosen = suite.select(limit=14)
    assert [i.kind for i in chosen][:7] == [i.kind for i in chosen][7:]
    assert len({i.kind for i in chosen}) == 7
    assert {i.kind for i in suite.select(["change_style"])} == {"change_style"}
    with pytest.raises(RetourError, match="change_style"):
        suite.select(["style"])


def bad(**changes):
    return {"1": {**ENTRY, **changes}}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[]", "maps no ids"),
        ("{}", "maps no ids"),
        ('{"1": 3}', "lacks one of"),
        (json.dumps(bad(original_prompt=None)), "lacks one of"),
        (json.dumps(bad(mask=[1])), "whole numbers"),
        (json.dumps(bad(mask=[1, -2])), "whole numbers"),
        (json.dumps(bad(mask=[1.5, 2])), "whole numbers"),
        (json.dumps(bad(mask=None)), "whole numbers"),
        (json.dumps(bad(image_path="../../secret.png")), "outside"),
        (json.dumps(bad(image_path="/etc/passwd")), "outside"),
        (json.dumps(bad(image_path="gone.png")), "does not exist"),
        (json.dumps(bad(edited_image_path="gone.png")), "does not exist"),
        (json.dumps(bad(edited_image_path=[1])), "does not exist"),
        (json.dumps(bad(edited_image_path="../annotation_images/a.png")), "outside"),
        (json.dumps(bad(image_path="a\0b.png")), "cannot be"),
        (json.dumps(bad(image_path="a" * 5000)), "cannot be|does not exist"),
        (json.dumps(bad(image_path="")), "does not exist"),
        (json.dumps(bad(image_path="1_change_object_80")), "does not exist"),
        (json.dumps(bad(mask=[True, 2])), "whole numbers"),
        (json.dumps(bad(mask="0 3")), "whole numbers"),
        ('{"1": {"mask": [' + "9" * 5000 + ", 1]}}", "cannot read"),
        (json.dumps(bad(editing_type_id="11")), "must be one of 0, 1"),
        (json.dumps(bad(editing_type_id=None)), "must be one of 0, 1"),
        (json.dumps(bad(editing_prompt="[ ]")), "empty editing_prompt"),
        *[
            (json.dumps({key: ENTRY}), "cannot be a file name")
            for key in ("../1", "a/b", "", ".hidden", "a b", "x" * 101, "\u0000")
        ],
    ],
)
def test_bad_folders_are_refused(tmp_path, mapping, message):
    write(tmp_path, {"1": ENTRY})
    (tmp_path / "mapping_file.json").write_text(mapping)
    with pytest.raises(RetourError, match=message):
        Suite.load(tmp_path)


@pytest.mark.parametrize("key", ["mask", "image_path", "original_prompt", "editing_type_id"])
def test_missing_keys_are_refused(tmp_path, key):
    write(tmp_path, {"1": ENTRY})
    entry = {name: value for name, value in ENTRY.items() if name != key}
    (tmp_path / "mapping_file.json").write_text(json.dumps({"1": entry}))
    with pytest.raises(RetourError, match="entry '1'"):
        Suite.load(tmp_path)


def test_what_pie_bench_leaves_out_may_be_absent(tmp_path):
    optional = ("blended_word", "editing_instruction")
    entry = {name: value for name, value in ENTRY.items() if name not in optional}
    (item,) = Suite.load(write(tmp_path, {"1": {**entry, "editing_type_id": 1}}))
    assert item.words is None and item.instruction == "" and item.kind == "change_object"


def test_the_ten_types_have_their_names(tmp_path):
    entries = {
        f"{n}": {**ENTRY, "editing_type_id": f"{n}", "image_path": f"{n}.png"} for n in range(10)
    }
    kinds = [item.kind for item in Suite.load(write(tmp_path, entries))]
    assert kinds == [KINDS[f"{n}"] for n in range(10)] and kinds[0] == "random"


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "set"
    write(folder, {"1": ENTRY})
    image = folder / "annotation_images" / ENTRY["image_path"]
    image.rename(tmp_path / "secret.jpg")
    image.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(RetourError, match="outside"):
        Suite.load(folder)
    image.unlink()
    image.symlink_to(image)
    with pytest.raises(RetourError, match="cannot be|does not exist"):
        Suite.load(folder)


def test_an_enormous_mapping_is_refused_unread(tmp_path):
    write(tmp_path, {"1": ENTRY})
    with (tmp_path / "mapping_file.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(RetourError, match="no benchmark set needs more"):
        Suite.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"P6 100000 100000 255\n", "too many pixels"), (None, "damaged")],
)
def test_hostile_images_are_refused_when_they_are_needed(tmp_path, content, message):
    write(tmp_path, {"1": {**ENTRY, "edited_image_path": None}}, size=(64, 64))
    path = tmp_path / "annotation_images" / ENTRY["image_path"]
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    (item,) = Suite.load(tmp_path)
    with pytest.raises(RetourError, match=message):
        item.mask()
    with pytest.raises(RetourError, match=message):
        item.image  # noqa: B018


def test_a_damaged_image_is_refused_when_it_is_needed(tmp_path):
    write(tmp_path, {"1": ENTRY})
    (tmp_path / "annotation_images" / ENTRY["image_path"]).write_bytes(b"JFIF")
    (item,) = Suite.load(tmp_path)
    with pytest.raises(RetourError, match="not a picture"):
        item.mask()


def test_a_folder_without_a_mapping_is_refused(tmp_path):
    with pytest.raises(RetourError, match="has no mapping_file.json"):
        Suite.load(tmp_path)


def test_kinds_have_names():
    assert len(set(KINDS.values())) == len(KINDS)

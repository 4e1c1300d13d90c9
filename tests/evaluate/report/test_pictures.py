"""Pictures of the page: exact where small, scaled where large, as many as fit."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from evaluate.bench_folder import build
from retour.evaluate.report import pictures
from retour.evaluate.report.folder import Bench
from retour.io import read_image, save_image


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench.read(build(tmp_path_factory.mktemp("bench"), limit=14))


def decoded(uri):
    head, body = uri.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_small_pictures_are_exact_and_large_ones_scaled(gradient):
    back = decoded(pictures.data_uri(gradient))
    assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(gradient))
    large = decoded(pictures.data_uri(gradient.resize((960, 640))))
    assert large.size == (256, 171)


def test_only_pixels_are_kept(tmp_path, gradient):
    save_image(gradient, tmp_path / "a.png", {"prompt": "a secret"})
    uri = pictures.data_uri(read_image(tmp_path / "a.png"))
    assert b"secret" not in base64.b64decode(uri.split(",")[1])


def test_a_mask_leaves_what_may_change_as_it_is_and_edges_it():
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    layer = np.asarray(pictures.mask_overlay(Image.fromarray(mask)))
    assert np.array_equal(layer[..., 3] == 0, mask > 0)
    edge = {tuple(int(v) for v in pixel) for pixel in layer[3, 4:12]}
    assert edge == {pictures.EDGE, pictures.EDGE_SHADE}
    assert (layer[:3] == pictures.DIM).all() and (layer[:, :3] == pictures.DIM).all()


def test_a_mask_at_the_border_has_no_edge_there():
    for value, wanted in ((255, 0), (0, pictures.DIM[3])):
        layer = np.asarray(pictures.mask_overlay(Image.new("L", (6, 6), value)))
        assert (layer[..., 3] == wanted).all()


@pytest.fixture(scope="module")
def whole(bench):
    return pictures.gallery(bench, 10**9)


def test_all_pictures_of_an_edit(bench, whole):
    found = whole
    assert list(found) == list(range(14))
    wanted = read_image(bench.images[2, 5])
    assert np.array_equal(np.asarray(decoded(found[5]["runs"][2])), np.asarray(wanted))
    assert found[5]["attention"] == [None] * 5


def test_what_does_not_fit_is_left_out_evenly(bench, whole):
    sizes = {k: len(json.dumps(value)) for k, value in whole.items()}
    first = pictures.in_turns(bench.edits)[:7]
    found = pictures.gallery(bench, sum(sizes[k] for k in first))
    assert sorted(found) == sorted(first)
    assert {bench.edits[k].kind for k in found} == set(bench.kinds)
    assert pictures.gallery(bench, 10) == {}

import base64
import io
import json

import numpy
import pytest
from PIL import Image

from retour.errors import RetourError
from retour.ui import drawing
from retour.ui.words import differences

ALLOWED = drawing.limits()


def upload(content, name="a.png"):
    return json.dumps({"name": name, "data": drawing.data_url(content)})


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_an_upload_comes_through(gradient):
    found = drawing.read_file(upload(png(gradient)), ALLOWED)
    assert found.image.tobytes() == gradient.tobytes() and found.name == "a.png"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no file arrived"),
        ("[]", "no file arrived"),
        ('{"name": "x"}', "no file arrived"),
        ('{"name": "x", "data": "hello"}', "'x' did not arrive whole"),
        ('{"name": "x", "data": "data:image/png;base64,@@"}', "'x' did not arrive whole"),
        (upload(b""), "is empty"),
        (upload(b"GIF89a nonsense"), "'a.png' is"),
        (upload(b"%!PS-Adobe-3.0 EPSF"), "not a picture of a known format"),
    ],
)
def test_what_is_no_picture_gets_one_sentence(text, says):
    with pytest.raises(RetourError, match=says) as error:
        drawing.read_file(text, ALLOWED)
    assert "\n" not in str(error.value) and "/tmp" not in str(error.value)


def test_uploads_are_bounded_in_bytes_and_pixels(gradient):
    small = drawing.limits(0.001)
    with pytest.raises(RetourError, match="has about 3,0.. bytes.*at most 1,048"):
        drawing.read_file(upload(bytes(3000)), small)
    with pytest.raises(RetourError, match="has 1,049 bytes.*at most 1,048"):
        drawing.read_file(upload(bytes(1049)), small)
    wide = Image.new("1", (drawing.MAX_SIDE + 1, 1))
    with pytest.raises(RetourError, match="12,001 x 1 pixels: make it smaller"):
        drawing.read_file(upload(png(wide)), ALLOWED)
    bomb = Image.new("1", (6000, 6000))
    with pytest.raises(RetourError, match="6,000 x 6,000 pixels"):
        drawing.read_file(upload(png(bomb)), ALLOWED)


def test_a_picture_beyond_what_is_decoded_at_all_is_told_the_same_limit():
    bomb = Image.new("1", (20_000, 20_000))
    with pytest.raises(RetourError, match="far too many pixels.*at most 24,000,000"):
        drawing.read_file(upload(png(bomb)), ALLOWED)


def painted(size, box):
    layer = numpy.zeros((size[1], size[0], 4), numpy.uint8)
    left, top, right, bottom = box
    layer[top:bottom, left:right] = (244, 63, 94, 255)
    return drawing.data_url(png(Image.fromarray(layer)))


def test_paint_becomes_a_mask_of_the_pictures_size():
    mask = drawing.read_mask(painted((512, 512), (0, 0, 256, 512)), (64, 64), ALLOWED)
    values = numpy.asarray(mask)
    assert mask.mode == "L" and mask.size == (64, 64)
    assert (values[:, :32] == 255).all() and (values[:, 32:] == 0).all()


def test_no_paint_is_no_mask():
    assert drawing.read_mask("", (8, 8), ALLOWED) is None
    assert drawing.read_mask(painted((64, 64), (0, 0, 0, 0)), (8, 8), ALLOWED) is None


def test_points_become_pixels_in_pairs():
    text = json.dumps([[0, 0], [1, 1], [0.5, 0.25], [0.5, 0.75], [0.1, 0.1]])
    assert drawing.read_points(text, (64, 32)) == ((0, 0, 63, 31), (32, 8, 32, 24))
    assert drawing.read_points("", (64, 32)) == ()


@pytest.mark.parametrize("size", [(64, 32), (31, 700), (1, 1)])
def test_a_drawing_goes_back_to_the_page_and_comes_again(size):
    width, height = size
    drags = ((0, 0, width - 1, height - 1), (width // 2, 0, 0, height // 3))
    assert drawing.read_points(json.dumps(drawing.fractions(drags, size)), size) == drags
    spots = numpy.random.default_rng(0).integers(0, 2, (height, width), numpy.uint8) * 255
    spots[0, 0] = 255
    mask = Image.fromarray(spots)
    # As the page enlarges it: every pixel a square.
    sheet = drawing.painting(mask).resize((8 * width, 8 * height), Image.Resampling.NEAREST)
    again = drawing.read_mask(drawing.data_url(png(sheet)), size, ALLOWED)
    assert again.tobytes() == mask.tobytes()


@pytest.mark.parametrize("text", ["[1]", "{", "[[1,2,3]]", '[["a", 0]]', "[[null, 0]]"])
def test_points_that_cannot_be_read(text):
    with pytest.raises(RetourError, match="cannot be read"):
        drawing.read_points(text, (8, 8))


@pytest.mark.parametrize("text", ["[[2, 0]]", "[[-0.1, 0]]", "[[NaN, 0]]", "[[Infinity, 0]]"])
def test_points_outside(text):
    with pytest.raises(RetourError, match="outside"):
        drawing.read_points(text, (8, 8))


def test_too_many_points():
    with pytest.raises(RetourError, match="too many"):
        drawing.read_points(json.dumps([[0, 0]] * 200), (8, 8))


@pytest.mark.parametrize("size", [(64, 48), (700, 300), (3000, 1000)])
def test_shown_pictures_suit_the_eye(size):
    url = drawing.shown(Image.new("RGB", size, "red"))
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert 512 <= max(image.size) <= 1024
    assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_word_differences_in_reading_order():
    assert differences("a red apple on a table", "a green apple") == [
        ("same", "a"),
        ("gone", "red"),
        ("new", "green"),
        ("same", "apple"),
        ("gone", "on a table"),
    ]
    assert differences("", "a cat") == [("new", "a cat")]

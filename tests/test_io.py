import io
import json
import math
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retour.errors import RetourError
from retour.io import (
    WRITABLE,
    PictureWarning,
    Placement,
    atomic_write,
    canvas_size,
    check_writable,
    fit,
    plain,
    read_image,
    read_picture,
    read_record,
    save_image,
    save_json,
    to_image,
    to_tensor,
)


def assert_one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    assert ": " in text, "the way out follows a colon"


def refuse(source, said, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RetourError, match=said) as error:
            read_image(source, **options)
    assert_one_sentence(error)
    return str(error.value)


def pixels(image):
    return numpy.asarray(image).astype(int)


# --- Reading: refused ---------------------------------------------------------------------------


def png_header(width, height):
    """The start of a PNG that claims a size, without its pixels."""

    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), numpy.uint8))

BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"not a picture at all", "not a picture of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "only a signature": (b"\x89PNG\r\n\x1a\n", "not a picture|damaged"),
    "30,000 wide": (png_header(30_000, 10), "30,000 x 10 pixels"),
    "large area": (png_header(10_000, 10_000), "10,000 x 10,000 pixels"),
    "decompression bomb": (png_header(60_000, 60_000), "far too many pixels"),
    "no pixels": (png_header(0, 5), "not a picture|has no pixels"),
    "missing rows": (png_header(64, 64), "damaged"),
    **{
        f"truncated {kind}": (encoded(NOISE, kind)[:-900], "damaged")
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
    },
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path, case):
    content, said = BAD_FILES[case]
    path = tmp_path / "input.png"
    path.write_bytes(content)
    assert "input.png" in refuse(path, said)


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]),
    flip=st.binary(min_size=1, max_size=4),
    at=st.integers(0, 400),
    cut=st.integers(1, 1600),
)
def test_damaged_bytes_raise_nothing_else(tmp_path_factory, kind, flip, at, cut):
    path = tmp_path_factory.mktemp("damaged") / "input"
    content = bytearray(encoded(NOISE.resize((20, 20)), kind))
    content[at : at + len(flip)] = flip
    path.write_bytes(content[:cut])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            assert read_image(path).mode == "RGB"
        except RetourError:
            pass


def test_missing_files_folders_and_odd_paths_are_refused(tmp_path):
    assert str(tmp_path / "no.png") in refuse(tmp_path / "no.png", "there is no file")
    refuse(str(tmp_path), "is a folder")
    refuse("a\0b.png", "cannot read")
    refuse("a" * 5000, "cannot read")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file" / "x.png", "cannot read")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refuse(tmp_path / "pipe.png", "not a regular file")


def test_an_unreadable_file_is_refused(tmp_path, gradient, monkeypatch):
    gradient.save(tmp_path / "a.png")
    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refuse(tmp_path / "a.png", "may not read")


def test_a_file_that_fails_on_opening_is_refused(tmp_path, gradient, monkeypatch):
    gradient.save(tmp_path / "a.png")

    def fail(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", fail)
    refuse(tmp_path / "a.png", "Permission denied")


BAD_VALUES = {
    "a flat array": (numpy.zeros(9), r"shape \(9,\)"),
    "two channels": (numpy.zeros((4, 4, 2)), r"shape \(4, 4, 2\)"),
    "channels first": (numpy.zeros((3, 8, 8)), r"shape \(3, 8, 8\)"),
    "a batch": (numpy.zeros((1, 4, 4, 3)), "shape"),
    "an empty array": (numpy.zeros((0, 4, 3)), "has no pixels"),
    "integers": (numpy.zeros((4, 4), numpy.int64), "int64"),
    "objects": (numpy.full((4, 4), None), "object"),
    "complex": (numpy.zeros((4, 4), complex), "complex"),
    "NaN": (numpy.full((4, 4), numpy.nan), "16 NaN or infinite of 16"),
    "infinite": (numpy.full((4, 4), numpy.inf), "NaN or infinite"),
    "floats to 255": (numpy.full((4, 4), 255.0), "values from 255 to 255"),
    "floats from -1": (numpy.full((4, 4), -1.0), r"scale them to \[0, 1\]"),
    "a wide array": (numpy.zeros((1, 30_000), numpy.uint8), "30,000 x 1 pixels"),
    "a tensor batch": (torch.zeros(1, 3, 4, 4), r"shape \(1, 3, 4, 4\)"),
    "channels last": (torch.zeros(5, 4, 3), r"shape \(5, 4, 3\)"),
    "a NaN tensor": (torch.full((3, 4, 4), math.nan), "48 NaN or infinite of 48"),
    "an empty tensor": (torch.zeros(3, 0, 4), "has no pixels"),
    "a tensor of integers": (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
    "a float image": (Image.fromarray(numpy.full((4, 4), numpy.nan, numpy.float32)), "NaN"),
    "a 32-bit image": (Image.fromarray(numpy.full((4, 4), 70_000, numpy.int32)), "70000"),
    "None": (None, "NoneType"),
    "bytes": (b"\x89PNG", "bytes"),
    "a list": ([[0, 1]], "list"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_objects_are_refused(case):
    refuse(*BAD_VALUES[case])


def test_limits_are_the_callers(gradient):
    refuse(gradient, "48 x 32 pixels.*at most 40 a side", max_side=40)
    refuse(gradient, "48 x 32 pixels.*1,000 in all", max_pixels=1000)


# --- Reading: taken -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_are_read_exactly(tmp_path, gradient, kind):
    path = tmp_path / "picture"
    gradient.save(path, kind)
    picture = read_picture(path)
    assert (picture.name, picture.size, picture.alpha) == ("picture", (48, 32), None)
    assert (pixels(picture.image) == pixels(gradient)).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBX"]
)
def test_every_mode_becomes_rgb(gradient, mode):
    source = gradient.convert("L").convert(mode) if mode == "LA" else gradient.convert(mode)
    image = read_image(source)
    assert (image.mode, image.size) == ("RGB", gradient.size)
    expected = pixels(source.convert("RGB"))
    assert (pixels(image) == expected).all()


def test_transparency_is_composited_on_white_and_kept():
    source = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    source.putpixel((1, 0), (0, 0, 0, 0))
    source.putpixel((2, 0), (0, 0, 0, 128))
    picture = read_picture(source)
    assert pixels(picture.image)[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert pixels(picture.alpha)[0].tolist() == [255, 0, 128]


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    source = Image.new("P", (2, 1))
    source.putpalette([10, 20, 30, 40, 50, 60])
    source.putpixel((1, 0), 1)
    source.save(tmp_path / "p.png", transparency=1)
    assert pixels(read_image(tmp_path / "p.png"))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_files_keep_their_whole_range(tmp_path, suffix):
    levels = numpy.array([[0, 128, 129, 257, 32_896, 65_535]], numpy.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep.{suffix}")
    grey = pixels(read_image(tmp_path / f"deep.{suffix}"))[0, :, 0]
    assert grey.tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("turn", "undo"),
    [(2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270")],
)
def test_the_cameras_rotation_is_applied(tmp_path, gradient, turn, undo):
    exif = Image.Exif()
    exif[0x0112] = turn
    lying = gradient.transpose(Image.Transpose[undo])
    lying.save(tmp_path / "photo.png", exif=exif)
    assert (pixels(read_image(tmp_path / "photo.png")) == pixels(gradient)).all()


def test_damaged_exif_does_not_cost_the_picture(tmp_path, gradient):
    path = tmp_path / "photo.jpg"
    gradient.save(path, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PictureWarning)
        assert read_image(path).size == gradient.size


def test_an_animation_gives_its_first_frame_and_says_so(tmp_path, gradient):
    path = tmp_path / "moving.gif"
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    first.save(path, save_all=True, append_images=[second])
    with pytest.warns(PictureWarning, match="moving.gif' has 2 frames"):
        assert read_image(path).getpixel((4, 4)) == (255, 0, 0)


def test_arrays_and_tensors_of_one_picture_agree(gradient):
    array = numpy.asarray(gradient)
    floats = array / 255
    tensor = torch.from_numpy(numpy.moveaxis(array, -1, 0).copy())
    sources = [array, array[:, ::-1][:, ::-1], floats, floats.astype(numpy.float32), tensor]
    sources += [array.astype(numpy.uint16) * 257, tensor.double() / 255]
    sources += [(tensor.float() / 255).requires_grad_()]
    for source in sources:
        assert (pixels(read_image(source)) == array).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_read(dtype):
    assert pixels(read_image(torch.ones(3, 2, 2, dtype=dtype))).tolist() == [[[255] * 3] * 2] * 2


@pytest.mark.parametrize(
    "source",
    [numpy.full((4, 6), 0.5), numpy.full((4, 6, 1), 0.5), torch.full((1, 4, 6), 0.5)],
)
def test_one_channel_is_grey(source):
    image = read_image(source)
    assert (image.size, image.getpixel((0, 0))) == ((6, 4), (128, 128, 128))


def test_a_fourth_channel_is_opacity():
    array = numpy.zeros((2, 2, 4), numpy.uint8)
    assert (pixels(read_image(array)) == 255).all()
    assert (pixels(read_image(torch.zeros(4, 2, 2))) == 255).all()


def test_reading_leaves_the_source_alone(gradient):
    image = read_image(gradient)
    image.paste("black", (0, 0, 48, 32))
    assert pixels(gradient).max() > 0


# --- Fitting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "native", "multiple", "canvas"),
    [
        ((200, 100), 64, 8, (96, 48)),
        ((100, 200), 64, 8, (48, 96)),
        ((1000, 1000), 64, 8, (64, 64)),
        ((20, 20), 512, 8, (512, 512)),
        ((4000, 3000), 64, 1, (74, 55)),
    ],
)
def test_known_canvases(size, native, multiple, canvas):
    fitted = canvas_size(size, native, multiple)
    assert fitted == canvas or (multiple == 1 and abs(fitted[0] - canvas[0]) <= 2)


sides = st.integers(1, 20_000)


@given(width=sides, height=sides, native=st.integers(8, 1024), multiple=st.sampled_from([1, 2, 8]))
def test_canvases_hold_multiples_and_bounded_areas(width, height, native, multiple):
    canvas = canvas_size((width, height), native, multiple)
    assert all(side >= multiple and side % multiple == 0 for side in canvas)
    # One row of cells more than the bound, where a square of cells already exceeds it.
    assert math.prod(canvas) <= 1.5 * (native + multiple) ** 2
    assert canvas_size((height, width), native, multiple) == (
        canvas if width == height else canvas[::-1]
    )


@given(
    short=st.integers(100, 5000),
    ratio=st.floats(1, 4),
    cells=st.integers(8, 128),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_canvases_keep_aspect_and_area(short, ratio, cells, multiple):
    long = round(short * ratio)
    canvas = canvas_size((long, short), cells * multiple, multiple)
    # Rounding the short side of n / sqrt(a) >= 4 cells, then the long one of >= 7.5, costs at most
    # log(1 + 0.5 / 7) in the aspect and log((9/8)^2 (1 + 0.5 / 7)) in the area; the choice made can
    # only be better in the sum of the first and a quarter of the second.
    most = math.log(1 + 0.5 / 7) + 0.25 * math.log((9 / 8) ** 2 * (1 + 0.5 / 7)) + 0.02
    aspect = abs(math.log(canvas[0] / canvas[1] * short / long))
    area = abs(math.log(math.prod(canvas) / (cells * multiple) ** 2))
    assert aspect + 0.25 * area <= most


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    mode=st.sampled_from(["stretch", "pad", "crop"]),
)
def test_the_way_back_gives_the_original_size(size, mode):
    image = Image.new("RGB", size, (200, 100, 50))
    fitted, placement = fit(image, native=64, multiple=8, mode=mode)
    assert fitted.size == placement.canvas
    for canvas in (fitted, fitted.resize((fitted.width * 3, fitted.height * 3))):
        back = placement.restore(canvas, base=image)
        assert back.size == size
        assert (pixels(back) == (200, 100, 50)).all()


def test_padding_repeats_the_edges_and_comes_off_again(gradient):
    placement = Placement.plan(gradient.size, (48, 48), "pad")
    fitted = placement.place(gradient)
    assert (pixels(fitted)[:8] == pixels(gradient)[0]).all()
    assert (pixels(fitted)[40:] == pixels(gradient)[-1]).all()
    assert (pixels(placement.restore(fitted)) == pixels(gradient)).all()


def test_a_mask_goes_the_same_way(gradient):
    mask = gradient.convert("L")
    placement = Placement.plan(gradient.size, (64, 64), "pad")
    assert placement.place(mask).mode == "L"
    assert placement.place(mask).size == (64, 64)


def test_cropping_cuts_the_edges_and_fills_them_from_the_original(gradient):
    placement = Placement.plan(gradient.size, (32, 32), "crop")
    fitted = placement.place(gradient)
    assert (pixels(fitted) == pixels(gradient)[:, 8:40]).all()
    black = Image.new("RGB", (32, 32))
    back = pixels(placement.restore(black, base=gradient))
    assert (back[:, 8:40] == 0).all()
    assert (back[:, :8] == pixels(gradient)[:, :8]).all()
    assert (back[:, 40:] == pixels(gradient)[:, 40:]).all()


def test_what_does_not_fit_is_refused(gradient):
    placement = Placement.plan(gradient.size, (32, 32), "crop")
    for said, call in {
        "pass the original as base": lambda: placement.restore(gradient),
        "base has 5 x 5": lambda: placement.restore(gradient, base=Image.new("RGB", (5, 5))),
        "pass one of 48 x 32": lambda: placement.place(Image.new("RGB", (5, 5))),
        "did you mean 'crop'": lambda: fit(gradient, native=64, mode="krop"),
        "native size is 4": lambda: fit(gradient, native=4, multiple=8),
        "multiple is 0": lambda: fit(gradient, native=4, multiple=0),
    }.items():
        with pytest.raises(RetourError, match=said) as error:
            call()
        assert_one_sentence(error)


# --- Tensors ------------------------------------------------------------------------------------


def test_all_levels_survive_the_way_through_a_tensor():
    levels = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    image = Image.fromarray(numpy.stack([levels, levels.T, levels[::-1]], axis=-1))
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((3, 16, 16), torch.float32)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert (pixels(to_image(tensor)) == pixels(image)).all()
    assert (pixels(to_image(tensor.double())) == pixels(image)).all()


def test_tensors_are_clamped_and_rounded():
    values = torch.tensor([-9.0, 9.0, 0.0, 0.49 / 127.5])
    image = to_image(values.expand(3, 1, 4))
    # 127.5 rounds to the even 128.
    assert pixels(image)[0, :, 0].tolist() == [0, 255, 128, 128]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1, 3, 4, 4), torch.zeros(4, 4, 4), torch.full((3, 4, 4), math.nan)],
)
def test_bad_tensors_are_refused(tensor):
    with pytest.raises(RetourError) as error:
        to_image(tensor)
    assert_one_sentence(error)


# --- Writing ------------------------------------------------------------------------------------


class DiskError(Exception):
    pass


@pytest.mark.parametrize("interruption", [DiskError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_interrupted_write_leaves_nothing(tmp_path, interruption, before):
    path = tmp_path / "out.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(interruption), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise interruption
    assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else ["out.txt"])
    assert before is None or path.read_text() == before


def test_a_complete_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "out.txt"
    for text in ("one", "two"):
        with atomic_write(str(path)) as temporary:
            assert (temporary.parent, temporary.suffix) == (tmp_path.resolve(), ".txt")
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said(tmp_path):
    with pytest.raises(RetourError, match="No space left") as error, atomic_write(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert_one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is a folder"),
        ("missing/out.png", "there is no folder"),
        ("file/out.png", "there is no folder"),
        ("a\0b.png", "cannot write"),
        ("a" * 300 + ".png", "cannot write"),
    ],
)
def test_bad_targets_are_refused(tmp_path, name, said):
    (tmp_path / "file").write_text("x")
    target = os.path.join(tmp_path, name)
    with pytest.raises(RetourError, match=said) as error:
        check_writable(target)
    assert_one_sentence(error)


@pytest.mark.skipif(not Path(os.devnull).is_char_device(), reason="needs a device file")
def test_a_device_is_not_replaced():
    with pytest.raises(RetourError, match="not a regular file"):
        check_writable(os.devnull)


@pytest.mark.parametrize(
    ("locked", "said"), [("folder", "may not write to the folder"), ("out.png", "write-protected")]
)
def test_protected_targets_are_refused(tmp_path, monkeypatch, locked, said):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out.png").write_text("x")
    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != locked)
    with pytest.raises(RetourError, match=said) as error:
        check_writable(folder / "out.png")
    assert_one_sentence(error)


RECORD = {"prompt": "ein grüner Apfel 🍏\n\udc80", "nfe": 50, "psnr": math.inf, "steps": (1, 2)}


def test_a_record_comes_back_from_a_png(tmp_path, gradient):
    path = tmp_path / "out.png"
    save_image(gradient, path, RECORD)
    assert read_record(path) == {**RECORD, "psnr": "inf", "steps": [1, 2]}
    assert (pixels(read_image(path)) == pixels(gradient)).all()


@pytest.mark.parametrize("suffix", [*WRITABLE, ".PNG", ".JPG"])
def test_pictures_are_saved_in_the_format_of_their_suffix(tmp_path, gradient, suffix):
    path = tmp_path / f"out{suffix}"
    save_image(gradient, path, RECORD)
    with Image.open(path) as image:
        assert image.format == WRITABLE[suffix.lower()]
    assert abs(pixels(read_image(path)) - pixels(gradient)).mean() < 3


def test_a_transparent_picture_is_saved_in_every_format(tmp_path, gradient):
    for suffix in WRITABLE:
        save_image(gradient.convert("RGBA"), tmp_path / f"out{suffix}")
        assert read_image(tmp_path / f"out{suffix}").size == gradient.size


@pytest.mark.parametrize("name", ["out", "out.bmp", "out.png.txt"])
def test_unknown_suffixes_are_refused(tmp_path, gradient, name):
    with pytest.raises(RetourError, match="end its name in .png or .jpg") as error:
        save_image(gradient, tmp_path / name)
    assert_one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_without_a_record_says_so(tmp_path, gradient):
    for name in ("plain.png", "plain.jpg"):
        save_image(gradient, tmp_path / name)
        with pytest.raises(RetourError, match="holds no record"):
            read_record(tmp_path / name)
    with pytest.raises(RetourError, match="there is no file"):
        read_record(tmp_path / "missing.png")


def test_json_is_plain_and_readable(tmp_path):
    @dataclass
    class Options:
        path: Path
        scale: numpy.float32

    values = {
        1: Options(Path("a/b"), numpy.float32(0.5)),
        "sizes": {3, 1, 2},
        "latents": torch.tensor([[1.0, math.nan]]),
        "dtype": torch.float16,
        "text": "grün",
    }
    save_json(values, tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert "grün" in text
    assert json.loads(text) == {
        "1": {"path": "a/b", "scale": 0.5},
        "sizes": [1, 2, 3],
        "latents": [[1.0, "nan"]],
        "dtype": "torch.float16",
        "text": "grün",
    }


def test_text_that_utf_8_cannot_hold_survives_json(tmp_path):
    save_json(RECORD, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == plain(RECORD)

"""Clips in and out of files, folders, lists, arrays and tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

import retour
from retour.errors import RetourError
from retour.io import Clip, clips, fit_clip, read_clip, save_clip, to_clip, to_tensor


def frames(count=3, size=(6, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def same(clip, expected):
    assert len(clip) == len(expected)
    for one, other in zip(clip, expected, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_what_is_saved_is_read_back_exactly(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    save_clip(Clip(tuple(frames()), duration=40), path, {"nfe": 3})
    back = read_clip(path)
    same(back, frames())
    assert back.duration == 40
    if suffix == ".png":
        assert retour.io.read_record(path) == {"nfe": 3}


def test_a_gif_keeps_its_frames_and_pace(tmp_path):
    flat = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    save_clip(Clip(tuple(flat), duration=50), tmp_path / "clip.gif")
    back = read_clip(tmp_path / "clip.gif")
    same(back, flat)
    assert back.duration == 50


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for k, frame in enumerate(frames()):
        frame.save(tmp_path / f"frame-{k}.png")
    (tmp_path / ".hidden").write_text("not a frame")
    same(read_clip(tmp_path), frames())


def test_lists_arrays_tensors_and_single_pictures_are_clips():
    stacked = np.stack([np.asarray(f) for f in frames()])
    same(read_clip(frames()), frames())
    same(read_clip(stacked), frames())
    same(read_clip(torch.from_numpy(stacked).permute(0, 3, 1, 2)), frames())
    same(read_clip(frames()[0]), frames()[:1])
    clip = Clip(tuple(frames()))
    assert read_clip(clip) is clip


def test_tensors_there_and_back():
    tensor = to_tensor(Clip(tuple(frames())))
    assert tensor.shape == (3, 3, 4, 6)
    same(to_clip(tensor), frames())


def test_fitting_moves_every_frame_alike():
    fitted, place = fit_clip(Clip(tuple(frames(size=(12, 8))), duration=99), native=8, multiple=4)
    assert fitted.size == place.canvas and len(fitted) == 3
    assert place.original == (12, 8) and place.duration == 99
    assert retour.io.Placement.read(place.told()) == place


def test_frames_of_several_sizes_are_refused():
    with pytest.raises(RetourError, match="one size, got 6 x 4, 8 x 4"):
        read_clip([frames()[0], frames(size=(8, 4))[0]])
    with pytest.raises(RetourError, match="got none"):
        Clip(())


def test_an_endless_clip_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "MAX_CLIP_PIXELS", 2 * 6 * 4)
    save_clip(Clip(tuple(frames())), tmp_path / "clip.png")
    for source in (tmp_path / "clip.png", frames()):
        with pytest.raises(RetourError, match="more than 2 frames of 6 x 4 pixels"):
            read_clip(source)


def test_folders_without_frames_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(RetourError, match="holds no frames"):
        read_clip(tmp_path)
    save_clip(Clip(tuple(frames(8, (40, 40)))), tmp_path / "clip.png")
    whole = (tmp_path / "clip.png").read_bytes()
    (tmp_path / "clip.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RetourError, match=r"damaged|cannot be decoded"):
        read_clip(tmp_path / "clip.png")
    with pytest.raises(RetourError, match="there is no file"):
        read_clip(tmp_path / "missing.gif")


def test_a_format_without_frames_is_refused(tmp_path):
    with pytest.raises(RetourError, match="end its name in"):
        save_clip(Clip(tuple(frames())), tmp_path / "clip.jpg")
    assert list(tmp_path.iterdir()) == []

"""Mean distance: nothing where a picture was moved exactly, the whole way where it was not."""

import numpy as np
import pytest
import torch

import retour
import tiny
from retour.errors import RetourError
from retour.evaluate.drag import NetworkFeatures, Patches
from retour.evaluate.metrics import pixels
from retour.evaluate.suite import Suite


def blob(shift=(0, 0), side=48):
    """A picture with a grainy object on an even ground, moved by (right, down)."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((3, side, side), 0.9, dtype=torch.float64)
    right, down = shift
    grain = torch.rand(3, 14, 14, generator=generator, dtype=torch.float64)
    picture[:, 8 + down : 22 + down, 6 + right : 20 + right] = grain
    return picture


HANDLES = [(8.0, 10.0), (12.0, 15.0), (18.0, 20.0)]


@pytest.mark.parametrize("shift", [(0, 0), (20, 0), (0, 18), (21, 17), (-3, 5)])
def test_a_whole_shift_is_found_without_any_error(shift):
    goals = [(x + shift[0], y + shift[1]) for x, y in HANDLES]
    assert Patches().distances(blob(), blob(shift), HANDLES, goals) == [0.0] * 3


def test_what_stayed_is_as_far_away_as_it_should_have_gone():
    goals = [(x + 9, y + 12) for x, y in HANDLES]
    assert Patches().distances(blob(), blob(), HANDLES, goals) == [15.0] * 3


def test_distance_is_to_where_it_went():
    goals = [(x + 20, y + 10) for x, y in HANDLES]
    found = Patches().distances(blob(), blob((17, 6)), HANDLES, goals)
    assert found == pytest.approx([5.0] * 3)


def test_a_little_noise_does_not_matter():
    noise = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(1)).double()
    goals = [(x + 20, y) for x, y in HANDLES]
    assert Patches().distances(blob(), blob((20, 0)) + 0.05 * noise, HANDLES, goals) == [0.0] * 3


@pytest.mark.parametrize("lazy", [False, True])
def test_what_really_moved_in_the_paired_set(lazy):
    """The object's own pixels, moved by whole ones over an even ground."""
    for before, after, handles, goals in scenes(6):
        found = Patches().distances(before, before if lazy else after, handles, goals)
        way = [np.hypot(a - c, b - d) for (a, b), (c, d) in zip(handles, goals, strict=True)]
        assert found == pytest.approx(way if lazy else [0.0] * len(handles), abs=1e-9)


def scenes(count):
    generator = np.random.default_rng(0)
    for item in Suite.paired().select(kinds=["change_position"], limit=count):
        before, after = (object_of(image) for image in (item.image, item.edited))
        shift = [int(a.min() - b.min()) for a, b in zip(after, before, strict=True)]
        chosen = generator.choice(len(before[0]), 5, replace=False)
        handles = [(float(before[1][k]), float(before[0][k])) for k in chosen]
        goals = [(x + shift[1], y + shift[0]) for x, y in handles]
        yield pixels(item.image), pixels(item.edited), handles, goals


def object_of(image):
    """Rows and columns of what is not background."""
    levels = np.asarray(image).astype(int)
    ground = np.median(levels.reshape(-1, 3), 0)
    return np.nonzero(np.abs(levels - ground).max(-1) > 0)


def test_features_are_compared_by_cosine_and_averaged_over_noises():
    model = retour.load(tiny.sd1())
    matcher = NetworkFeatures(model, site="up_blocks.1", draws=2)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    first, again = matcher.features(image), matcher.features(image)
    assert torch.equal(first, again) and first.shape[-2:] == (16, 16)
    many = torch.tensor([[3.0, 0.1, -1.0], [0.0, 0.1, -1.0]])
    assert matcher.likeness(torch.tensor([2.0, 2.0]), many).argmax() == 1  # length is nothing
    assert matcher.distances(image, image, [(3, 5)], [(3, 5)]) == [0.0]
    assert "up_blocks.1" in matcher.name and "11 x 11" in Patches().name


@pytest.mark.slow
def test_the_embedded_network_finds_it_to_about_two_latent_cells():
    matcher = NetworkFeatures(retour.load("emoji-unet"), draws=2)
    found, way = [], []
    for before, after, handles, goals in scenes(3):
        found += matcher.distances(before, after, handles, goals)
        way += [np.hypot(a - c, b - d) for (a, b), (c, d) in zip(handles, goals, strict=True)]
    print("found", np.mean(found), "way", np.mean(way))
    assert np.mean(found) < 8 < np.mean(way) / 2


def test_input_is_checked():
    image = torch.rand(3, 8, 8)
    with pytest.raises(RetourError, match="no features called"):
        NetworkFeatures(retour.load(tiny.sd1()), site="up_blocks.9")
    with pytest.raises(RetourError, match="outside of the picture, 8 x 8"):
        Patches().distances(image, image, [(8, 2)], [(1, 1)])
    with pytest.raises(RetourError, match="resize the edited one"):
        Patches().distances(image, image[..., :4], [(1, 2)], [(1, 1)])
    with pytest.raises(RetourError, match="must be odd"):
        Patches(4)

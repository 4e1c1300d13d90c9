"""Metrics against figures computed by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from retour.errors import RetourError
from retour.evaluate import metrics


def constant(value: float) -> torch.Tensor:
    return torch.full((3, 4, 4), value, dtype=torch.float64)


def quarter() -> np.ndarray:
    """The upper left 2 x 2 of 4 x 4: 12 pixels of background."""
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    return mask


def test_denominators_by_hand():
    a, b, mask = constant(0.5), constant(0.6), quarter()
    b[:, :2, :2] = 1.0  # must not count
    assert metrics.mse(a, b, mask) == pytest.approx(0.01)
    assert metrics.mse(a, b, mask, "pie_compat") == pytest.approx(0.01 * 12 / 16)
    assert metrics.mse_inside(a, b, mask) == pytest.approx(0.25)
    assert metrics.mse(a, b) == pytest.approx((12 * 0.01 + 4 * 0.25) / 16)
    assert metrics.psnr(a, b, mask) == pytest.approx(20.0)
    assert metrics.psnr(a, b, mask, "pie_compat") == pytest.approx(20.0 - 10 * math.log10(12 / 16))


def test_pie_compat_is_the_product_with_the_unedited_part():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 4, 4, generator=rng, dtype=torch.float64)
    keep = torch.as_tensor(~quarter()).double()
    by_product = (a * keep - b * keep).square().mean()
    assert metrics.mse(a, b, quarter(), "pie_compat") == pytest.approx(float(by_product))


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_equal_backgrounds_are_infinitely_good(convention):
    a, b = constant(0.5), constant(0.5)
    b[:, :2, :2] = 0.9
    assert metrics.mse(a, b, quarter(), convention) == 0
    assert metrics.psnr(a, b, quarter(), convention) == math.inf


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_no_background_is_not_a_number(convention):
    everything = np.ones((4, 4), bool)
    assert math.isnan(metrics.psnr(constant(0), constant(1), everything, convention))
    assert math.isnan(metrics.mse_inside(constant(0), constant(1), ~everything))


def test_pixels_are_exact_fractions():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    expected = torch.arange(48, dtype=torch.float64).reshape(4, 4, 3).permute(2, 0, 1) / 255
    # io.to_tensor is float32.
    assert torch.allclose(metrics.pixels(image), expected, atol=1e-7, rtol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(RetourError, match="shapes"):
        metrics.mse(constant(0), torch.zeros(3, 5, 5))
    with pytest.raises(RetourError, match="does not fit"):
        metrics.mse(constant(0), constant(0), np.zeros((5, 5), bool))
    with pytest.raises(RetourError, match="pie_compat"):
        metrics.mse(constant(0), constant(0), quarter(), "pie")


def test_structure_distance_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # orthogonal: cosines 1 0 0 1
    b = torch.tensor([[3.0, 0.0], [1.0, 1.0]])  # 45 degrees: cosines 1 r r 1
    assert metrics.structure_distance(a, b) == pytest.approx(2 * 0.5 / 4)
    assert metrics.structure_distance(a, 7 * a) == pytest.approx(0, abs=1e-12)
    batch = metrics.structure_distance(torch.stack([a, a]), torch.stack([a, b]))
    assert batch.tolist() == pytest.approx([0, 0.25])


def test_the_norms_of_empty_features_are_floored():
    similarity = metrics.self_similarity(torch.zeros(3, 2))
    assert torch.equal(similarity, torch.zeros(3, 3))


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A random CLIP of 2 x 2 patches."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    shape["num_attention_heads"] = 2
    vision = {**shape, "image_size": 16, "patch_size": 8}
    text = {**shape, "vocab_size": 20, "max_position_embeddings": 8}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return metrics.EmojiClip(folder)


def test_substitute_backbone_gives_patch_tokens_without_the_class_token(tower):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert tower.features(images).shape == (2, 4, 16)
    assert tower.features(torch.rand(1, 3, 20, 24)).shape == (1, 4, 16)
    assert tower.distance(images, images).tolist() == [0, 0]
    assert (tower.distance(images, images.flip(-1)) > 0).all()
    assert "dino" not in tower.name.lower()


def test_missing_backbone_is_said(tmp_path):
    tower = metrics.EmojiClip(tmp_path)
    assert not tower.available
    with pytest.raises(RetourError, match="no CLIP"):
        tower.features(torch.zeros(1, 3, 16, 16))

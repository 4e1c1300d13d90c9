"""OIR's scorer: a CLIP that sees the inside of a mask only."""

import pytest
import torch

import retour
from retour.editors._oir_clip import MaskedCLIP, embedded


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def test_the_outside_of_the_mask_is_not_seen():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    changed = torch.where(mask.bool(), pictures, -pictures)
    for mode, leaks in [("exclude", False), ("additive01", True)]:
        clip = embedded(mode)
        found, other = (clip(p, "a red apple", mask) for p in (pictures, changed))
        assert bool((found - other).abs().max() > 1e-4) is leaks
        assert found.shape == (2,) and bool((found.abs() <= 1).all())
    inside = torch.where(mask.bool(), -pictures, pictures)
    assert (embedded()(inside, "a red apple", mask) - found).abs().max() > 1e-4


def test_a_mask_of_everything_is_plain_clip():
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = embedded()
    plain = clip.model.get_image_features(pixel_values=pictures)
    plain = getattr(plain, "pooler_output", plain)
    wanted = torch.nn.functional.normalize(plain, dim=-1) @ clip.embed_text("a cat")
    close(clip(pictures, "a cat", torch.ones(64, 64)), wanted, 1e-5)


def test_the_added_matrix_is_the_published_one():
    mask = torch.zeros(64, 64)
    mask[:8, :16] = 1
    seen = torch.zeros(65)
    seen[:3] = 1
    assert torch.equal(embedded("additive01").bias(mask)[0, 0], seen[:, None] * seen)
    hidden = embedded().bias(mask)[0, 0]
    assert torch.equal(hidden == 0, (seen > 0).expand(65, 65)) and hidden[0, -1] == -torch.inf


def test_a_mask_smaller_than_a_patch_keeps_its_patch():
    mask = torch.zeros(64, 64)
    mask[17, 33] = 1
    assert embedded().seen(mask).nonzero().tolist() == [[2, 4]]
    assert torch.isfinite(embedded()(torch.zeros(1, 3, 64, 64), "a cat", mask)).all()


def test_any_clip_can_be_given(tmp_path):
    folder = retour.models.load.WEIGHTS / "clip"
    own = MaskedCLIP.from_folder(folder)
    pictures, mask = torch.rand(2, 3, 64, 64) * 2 - 1, torch.ones(64, 64)
    close(own(pictures, "a cat", mask), embedded()(pictures, "a cat", mask), 1e-6)
    with pytest.raises(retour.RetourError, match="there is no CLIP at"):
        MaskedCLIP.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(retour.RetourError, match="cannot read a CLIP"):
        MaskedCLIP.from_folder(tmp_path)

"""Code paths of the original backbones, on tiny random models of the same families."""

import math

import pytest
import torch

from retour.errors import RetourError
from retour.evaluate import metrics
from retour.evaluate.metrics import perceptual
from retour.evaluate.metrics.alignment import CLIP_MEAN, CLIP_STD, region
from retour.evaluate.metrics.structure import IMAGENET_MEAN, IMAGENET_STD
from retour.evaluate.metrics.towers import resized

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=4), add_pooling_layer=False)
    folder = tmp_path_factory.mktemp("tiny-dino")
    model.eval().save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = {w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 8, **ends}
    config = CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8}
    )
    folder = tmp_path_factory.mktemp("tiny-clip")
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer(words, [])
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_keys_are_the_last_blocks_projections_of_all_tokens(vit):
    """The last block's keys, computed by hand from the hidden states before it."""
    folder, model = vit
    image = noise(1, 3, 16, 16)
    keys = metrics.VitKeys(folder).features(image)
    assert keys.shape == (1, 1 + 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        states = model(pixel_values=(image - mean) / std, output_hidden_states=True).hidden_states
        block = model.layers[-1]
        wanted = block.attention.k_proj(block.layernorm_before(states[-2]))
    torch.testing.assert_close(keys, wanted, rtol=0, atol=1e-5)


def test_the_published_convention_feeds_levels_up_to_255(vit):
    folder, _ = vit
    image = noise(1, 3, 16, 16)
    by_hand = metrics.VitKeys(folder).features(255 * image)
    assert torch.equal(metrics.VitKeys(folder, "pie_compat").features(image), by_hand)


def test_keys_give_a_distance_and_leave_no_hook(vit):
    folder, _ = vit
    tower = metrics.VitKeys(folder)
    a, b = noise(2, 3, 16, 24), noise(2, 3, 16, 24, seed=1)
    assert tower.distance(a, a).tolist() == [0, 0]
    torch.testing.assert_close(tower.distance(a, b), tower.distance(b, a))
    assert (tower.distance(a, b) > 0).all()
    model, last = tower._tower
    assert not last._forward_hooks
    assert folder.name in tower.name


def test_the_shorter_side_is_resized_and_the_longer_one_bounded():
    """224 and 480 for DINO."""
    assert resized(noise(1, 3, 30, 40), 224, 480, "bilinear").shape[-2:] == (224, 299)
    assert resized(noise(1, 3, 10, 100), 224, 480, "bilinear").shape[-2:] == (48, 480)


def test_clip_vectors_are_the_models_own(clip):
    folder, model, tokenizer = clip
    scorer = metrics.ClipScorer(folder)
    image = noise(3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    levels = (image * 255).round() / 255
    with torch.no_grad():
        output = model(
            pixel_values=((levels - mean) / std)[None],
            **tokenizer(["a b"], return_tensors="pt"),
        )
    torch.testing.assert_close(scorer.images([image]), output.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(scorer.texts(["a b"]), output.text_embeds, rtol=0, atol=1e-6)
    assert scorer.name == folder.name


def test_clip_takes_pictures_as_its_own_processor_does(clip):
    """Bicubic to the shorter side, middle square: to a grey level of Pillow's resizing."""
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessor

    from retour.evaluate.metrics.alignment import _fitted

    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((60, 40), 3)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    wanted = processor(smooth, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    found = _fitted(metrics.pixels(smooth), 16)
    assert found.shape == wanted.shape == (3, 16, 16)
    assert (found - wanted).abs().max() <= 1.01 / 255


def test_a_clip_may_bring_its_own_statistics(clip, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(clip[0], tmp_path / "own")
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    image = noise(3, 16, 16)
    own, usual = (metrics.ClipScorer(f).images([image]) for f in (folder, clip[0]))
    assert not torch.allclose(own, usual, atol=1e-3)
    config.write_text(json.dumps({"image_mean": 3}))
    with pytest.raises(RetourError, match="does not say image_mean"):
        metrics.ClipScorer(folder).images([image])


def test_too_long_texts_are_cut_and_any_size_is_taken(clip):
    scorer = metrics.ClipScorer(clip[0])
    assert scorer.texts(["a " * 50, "b"]).shape == (2, 512)
    assert scorer.images([noise(3, 9, 40), noise(3, 16, 16)]).shape == (2, 512)


def test_similarity_by_hand():
    image = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert metrics.similarity(image, text).tolist() == pytest.approx([60, -100])
    assert metrics.similarity(image, text, "pie_compat").tolist() == pytest.approx([60, 0])


def test_the_edited_region():
    image = noise(3, 8, 12)
    mask = torch.zeros(8, 12, dtype=torch.bool)
    assert region(image, mask) is None
    mask[1:3, 2:7] = True
    assert torch.equal(region(image, mask, "pie_compat"), image * mask)
    assert torch.equal(region(image, mask), image[:, 0:5, 2:7])
    mask[:, :] = True
    assert torch.equal(region(image, mask), image)


def test_a_wide_region_is_as_square_as_the_image_allows():
    mask = torch.zeros(8, 30, dtype=torch.bool)
    mask[6, 10:30] = True
    assert region(noise(3, 8, 30), mask).shape == (3, 8, 20)


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_columns_with_the_users_own_networks_by_a_plain_computation(vit, clip, convention):
    """What `--backbone structure=FOLDER --backbone clip=FOLDER` measures, in a few plain lines."""
    (dino, net), (folder, judge, tokenizer) = vit, clip
    source, output = ((noise(3, 16, 16, seed=k) * 255).round().double() / 255 for k in (1, 2))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    sample = metrics.Sample(source, output, "a b", mask)
    own = metrics.Backbones(structure=dino, clip=folder)
    names = ("structure_distance", "clip_whole", "clip_edited")
    found = {
        name: metric.measure([sample])[0]
        for name, metric in metrics.make_metrics(names, convention, own).items()
    }

    def similarities(image):
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = (image.float() * (255 if convention == "pie_compat" else 1) - mean) / std
        states = net(pixel_values=x[None], output_hidden_states=True).hidden_states
        block = net.layers[-1]
        keys = block.attention.k_proj(block.layernorm_before(states[-2]))[0]
        return torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)

    def score(image):
        mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        tokens = tokenizer(["a b"], return_tensors="pt")
        said = judge(pixel_values=((image.float() - mean) / std)[None], **tokens)
        cosine = 100 * float(said.logits_per_image / judge.logit_scale.exp())
        return max(cosine, 0.0) if convention == "pie_compat" else cosine

    with torch.no_grad():
        gap = similarities(source) - similarities(output)
        wanted = 1e3 * float(gap.square().mean())
        assert found["structure_distance"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert found["clip_whole"] == pytest.approx(score(output), abs=1e-4)  # of 100
        if convention == "pie_compat":
            assert found["clip_edited"] == pytest.approx(score(output * mask), abs=1e-4)


@pytest.mark.parametrize("make", [metrics.VitKeys, metrics.ClipScorer])
def test_absent_weights_are_said_in_one_sentence(make, tmp_path):
    ask = {metrics.VitKeys: lambda b: b.features(noise(1, 3, 16, 16))}
    ask[metrics.ClipScorer] = lambda b: b.texts(["a"])
    for source in (tmp_path / "gone", tmp_path, "nobody/no-such-model"):
        with pytest.raises(RetourError, match="cannot load a (ViT|CLIP) from .* give its folder"):
            ask[make](make(source))


# --- Perceptual distance ------------------------------------------------------------------------


def by_loops(maps_a, maps_b, heads, weight):
    """The formula with nothing but loops, one image."""
    total = 0.0
    for layer, (a, b) in enumerate(zip(maps_a, maps_b, strict=True)):
        channels, height, width = a.shape
        over, under = 0.0, 0.0
        for y in range(height):
            for x in range(width):
                norms = [
                    math.sqrt(sum(float(m[c, y, x]) ** 2 for c in range(channels))) for m in (a, b)
                ]
                gap = sum(
                    float(heads[layer][c])
                    * (float(a[c, y, x]) / norms[0] - float(b[c, y, x]) / norms[1]) ** 2
                    for c in range(channels)
                )
                rows = slice(y * weight.shape[0] // height, (y + 1) * weight.shape[0] // height)
                columns = slice(x * weight.shape[1] // width, (x + 1) * weight.shape[1] // width)
                share = float(weight[rows, columns].mean())
                over, under = over + share * gap, under + share
        total += over / under
    return total


def test_the_distance_is_the_formula():
    sizes = [(5, 8, 8), (7, 4, 4), (3, 2, 2)]
    maps = [[noise(2, *s, seed=k + 10 * n) - 0.3 for n, s in enumerate(sizes)] for k in (1, 2)]
    heads = [noise(s[0], seed=30 + n) for n, s in enumerate(sizes)]
    weight = (noise(2, 8, 8, seed=50) > 0.5).float()
    found = metrics.perceptual_distance(*maps, heads, weight)
    for k in (0, 1):
        wanted = by_loops([m[k] for m in maps[0]], [m[k] for m in maps[1]], heads, weight[k])
        assert float(found[k]) == pytest.approx(wanted, rel=1e-5)
    plain = metrics.perceptual_distance(*maps, heads)
    everywhere = metrics.perceptual_distance(*maps, heads, torch.ones(2, 8, 8))
    torch.testing.assert_close(plain, everywhere)


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    """Random weights of the right shapes, as a file."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = perceptual.squeezenet().eval()
    path = tmp_path_factory.mktemp("lpips") / "squeezenet1_1.safetensors"
    save_file({f"features.{k}": v for k, v in net.state_dict().items()}, path)
    return path, net


def test_lpips_is_that_of_torchmetrics(squeeze, monkeypatch):
    """Their code on the same random network: layers, scaling and learned weights agree."""
    from torchmetrics.functional.image import lpips as outside

    path, net = squeeze
    monkeypatch.setattr(outside, "_get_tv_model_features", lambda *_, **__: net)
    theirs = outside._LPIPS(pretrained=True, net="squeeze", pnet_rand=True, eval_mode=True)
    a, b = noise(3, 40, 48), noise(3, 40, 48, seed=1)
    with torch.no_grad():
        wanted = float(theirs(2 * a[None] - 1, 2 * b[None] - 1))
    taps = metrics.SqueezeTaps(path)
    assert metrics.background_distance(taps, a, b) == pytest.approx(wanted, rel=1e-5)
    mask = torch.zeros(40, 48, dtype=torch.bool)
    mask[5:20, 10:30] = True
    with torch.no_grad():
        wanted = float(theirs(2 * (a * ~mask)[None] - 1, 2 * (b * ~mask)[None] - 1))
    found = metrics.background_distance(taps, a, b, mask, "pie_compat")
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_embedded_substitute():
    taps = metrics.CnnTaps()
    a, b = noise(3, 64, 64), noise(3, 64, 64, seed=1)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:40, 10:40] = True
    assert "lpips" not in taps.name.lower()
    for convention in metrics.CONVENTIONS:
        distance = metrics.background_distance(taps, a, b, mask, convention)
        wild = torch.where(mask, 1 - b, b)
        assert distance == metrics.background_distance(taps, a, wild, mask, convention) > 0
        assert metrics.background_distance(taps, a, a, mask, convention) == 0
    assert math.isnan(metrics.background_distance(taps, a, b, torch.ones(64, 64)))
    near, far = ((a + s * (b - 0.5)).clamp(0, 1) for s in (0.05, 0.4))
    distances = [metrics.background_distance(taps, a, x) for x in (near, far)]
    assert distances[0] < distances[1]


def test_wrong_files_of_weights_are_said(tmp_path, squeeze):
    image = noise(1, 3, 32, 32)
    with pytest.raises(RetourError, match="there is no file"):
        metrics.SqueezeTaps(tmp_path / "gone.pth").features(image)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(RetourError, match="cannot be read as weights"):
        metrics.SqueezeTaps(tmp_path / "junk.pth").features(image)
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(RetourError, match="does not hold SqueezeNet"):
        metrics.SqueezeTaps(tmp_path / "other.pth").features(image)
    with pytest.raises(RetourError, match="does not hold LPIPS"):
        metrics.SqueezeTaps(squeeze[0], tmp_path / "other.pth").heads  # noqa: B018


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RetourError, match="cannot be read as weights"):
        metrics.SqueezeTaps(tmp_path / "evil.pth").features(noise(1, 3, 32, 32))
    assert "run" not in capsys.readouterr().out

"""The four trainers on drawn sprites, a step or two each, and what their export holds."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from data.sprites_for_tests import make_sprites
from retour.data.scenes import Mix, Sampler, Studio, make_split
from retour.train import clip, export, latents, mmdit, unet, vae
from retour.train.generator import Easel
from retour.train.loop import Options, Trainer, step_generator


@pytest.fixture(scope="module")
def sampler():
    studio = Studio(make_sprites())
    split = make_split(studio.sprites, share=0, pair_share=0)
    return Sampler(studio, split, part="train", mix=Mix(centred=0.7, two=0.16))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sampler):
    """A folder with every part after a step of training, and the tasks."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    words = [text for texts in clip.phrases(sampler.studio.sprites).values() for text in texts]
    tokenizer = clip.train_tokenizer(words)
    tasks = {"vae": vae.VaeTask(sampler, sampler, 2, "cpu", vae.make_vae((8, 8, 16)))}
    tasks["clip"] = clip.ClipTask(sampler, tokenizer, 4, "cpu", clip.make_clip(tokenizer))
    for name in ("vae", "clip"):
        Trainer(tasks[name], Options(folder, steps=1, batch=2)).fit()
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    pool = latents.build(sampler, autoencoder, tokenizer, count=6, chunk=4)
    pool.write(folder / "pool.safetensors")
    common = latents.Pool.read(folder / "pool.safetensors"), Easel(autoencoder, tokenizer, "cpu")
    words = CLIPTextModel.from_pretrained(folder / "clip")
    pooled = CLIPTextModelWithProjection.from_pretrained(folder / "clip")
    pool, easel = common
    tasks["unet"] = unet.UnetTask(pool, words, easel, 2, 0.5, unet.make_unet((32, 32, 32)))
    tasks["mmdit"] = mmdit.MmditTask(pool, pooled, easel, 2, 0.5, mmdit.make_mmdit(32, 1))
    for name in ("unet", "mmdit"):
        tasks[name].picture = lambda model: None
        Trainer(tasks[name], Options(folder, steps=1, batch=2)).fit()
    return folder, tasks


@pytest.fixture(scope="module")
def weights(runs, tmp_path_factory):
    folder, _ = runs
    target = tmp_path_factory.mktemp("weights")
    (target / "vae").mkdir()
    (target / "vae" / "README.md").write_text("card")
    denoisers = {"unet": folder / "unet", "mmdit": folder / "transformer"}
    export.export(target, folder / "clip", folder / "vae", denoisers)
    return target


@pytest.mark.parametrize("name", ["vae", "clip", "unet", "mmdit"])
def test_a_step_has_one_loss_for_one_seed(runs, name):
    _, tasks = runs
    first, again = (tasks[name].loss(1, step_generator(0, 1))["loss"] for _ in range(2))
    assert torch.isfinite(first)
    if name != "vae":
        assert torch.equal(first, again)


def test_latents_have_unit_scale_and_captions(runs, sampler):
    folder, _ = runs
    pool = latents.Pool.read(folder / "pool.safetensors")
    assert pool.latents.shape == (6, 4, 16, 16) and pool.ids.shape == (6, clip.MAX_TOKENS)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    text = tokenizer.decode(pool.ids[0].tolist(), skip_special_tokens=True)
    assert text.split() == sampler.caption(0).split()
    assert 0.3 < float(pool.latents.float().std()) < 3.0


def test_dropped_captions_are_empty_prompts(runs):
    folder, _ = runs
    pool = latents.Pool.read(folder / "pool.safetensors")
    rows = [pool.batch(5, share, step_generator(0, 0))[1] for share in (0.0, 1.0)]
    assert (rows[1] == pool.empty).all()
    assert not (rows[0] == pool.empty).all(1).any()


def test_no_text_is_unknown_and_words_stay_whole(runs):
    folder, _ = runs
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    tokens = tokenizer.tokenize("a 3d render of a ball")
    assert tokens[-1] == "ball</w>"
    strange = tokenizer("Žluťoučký ☃!").input_ids
    assert strange.count(tokenizer.eos_token_id) == 1
    assert tokenizer.model_max_length == clip.MAX_TOKENS


def test_trimming_padding_changes_no_vector(runs):
    folder, tasks = runs
    tokenizer, model = tasks["clip"].tokenizer, tasks["clip"].model.eval()
    ids = clip.tokenize(tokenizer, ["a ball", "a 3d render of a box"])
    whole = model.text_model(input_ids=ids).pooler_output
    cut = model.text_model(input_ids=clip.trimmed(ids, tokenizer.eos_token_id)).pooler_output
    torch.testing.assert_close(whole, cut)


def test_the_loss_ignores_rows_with_the_same_caption():
    vectors = torch.eye(3)[[0, 0, 1]]
    same = torch.zeros(3, 3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    loss, accuracy = clip.contrastive_loss(vectors, vectors, torch.tensor(50.0), same)
    assert accuracy == 1.0 and loss < 1e-6


def test_the_scheduler_and_the_sd3_embedding_agree_with_diffusers(weights, runs):
    pipe = StableDiffusion3Pipeline.from_pretrained(weights / "emoji-mmdit")
    expected = pipe.encode_prompt("a ball", None, None, max_sequence_length=1)
    ids = clip.tokenize(pipe.tokenizer, ["a ball"])
    words, pooled = mmdit.embed(pipe.text_encoder, ids, t5_rows=1)
    torch.testing.assert_close(words, expected[0])
    torch.testing.assert_close(pooled, expected[2])


def test_the_exported_pipelines_load_without_arguments_and_sample(weights):
    for kind, name in (
        (StableDiffusionPipeline, "emoji-unet"),
        (StableDiffusion3Pipeline, "emoji-mmdit"),
    ):
        pipe = kind.from_pretrained(weights / name)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a red ball", num_inference_steps=1, output_type="np").images
        assert image.shape == (1, 64, 64, 3)


def test_the_export_keeps_values_and_cards_and_shares_by_relative_links(weights, runs):
    folder, _ = runs
    model = CLIPModel.from_pretrained(weights / "clip")
    source = CLIPModel.from_pretrained(folder / "clip").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, source[name].half().to(tensor.dtype))
    assert (weights / "vae" / "README.md").read_text() == "card"
    links = [path for path in weights.rglob("*") if path.is_symlink()]
    assert links and not any(path.readlink().is_absolute() for path in links)
    with safe_open(weights / "vae" / export.MODEL_FILE, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_known_phrases_are_shipped(weights):
    known = json.loads((weights / "clip" / "captions.json").read_text())
    assert "a ball" in known["concepts"] and "scissors" in known["concepts"]
    assert "on a white background" in known["backgrounds"]

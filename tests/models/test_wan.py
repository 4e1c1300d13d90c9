"""The Wan adapter against its pipeline, and every method that its capabilities allow on clips."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import retour
import tiny
from retour.core.model import Model, evaluate
from retour.core.registry import entries
from retour.errors import RetourError
from retour.io import Clip
from retour.models.load import load

PROMPTS = ["a photo of a red apple", "a cat"]
STEPS = 4
FRAMES = 5
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Uniform(FlowMatchEulerDiscreteScheduler):
    """Walks the grid that retour walks; the pipeline has no argument for it."""

    def set_timesteps(self, num_inference_steps, device=None):
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(sigmas=sigmas.tolist(), device=device)


def model():
    found = load(tiny.wan())
    found.native = 16
    return found


def clips(count=2, frames=FRAMES):
    return [np.random.default_rng(k).random((frames, 16, 16, 3)) for k in range(count)]


def able(task):
    offered = model().capabilities
    return [entry for entry in entries(task) if entry.needs <= offered]


def test_it_is_a_model_of_clips():
    found = load(tiny.wan())
    assert isinstance(found, Model) and "video" in found.capabilities
    assert found.multiple == 4 and found.codec.factor == 2
    # 480 x 832 is what the pipeline draws: a square of that area.
    assert found.native == pytest.approx((480 * 832) ** 0.5, abs=1)
    assert (found.default_steps, found.default_guidance) == (50, 5.0)


def test_conditions_equal_the_pipelines():
    pipe = tiny.wan()
    found = load(pipe).embed(PROMPTS).tensors["embeds"]
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=tiny.LONG_TOKENS)
    assert torch.equal(found, wanted)
    assert found[1, -1].abs().max() == 0, "the padding is blank"


def test_latents_are_the_pipelines():
    """Whitened by the VAE's own mean and spread, and decoded as the pipeline decodes."""
    pipe = tiny.wan()
    found = load(pipe)
    pixels = torch.rand(1, 3, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = found.encode(pixels)
    assert latents.shape == (1, 4, 3, 8, 8) and latents.dtype == torch.float64
    config = pipe.vae.config
    mean, std = (
        torch.tensor(v).reshape(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist.mode()
        back = pipe.vae.decode((latents * std + mean).float()).sample
    torch.testing.assert_close(latents, ((raw - mean) / std).double(), **CLOSE)
    torch.testing.assert_close(found.decode(latents), back, **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_euler_of_the_pipeline_is_reproduced(scale):
    pipe = tiny.wan()
    found = load(pipe)
    pipe.scheduler = Uniform(shift=3.0)
    x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        theirs = pipe(
            PROMPTS, height=16, width=16, num_frames=FRAMES, num_inference_steps=STEPS,
            guidance_scale=scale, latents=x.float(), output_type="latent",
            max_sequence_length=tiny.LONG_TOKENS,
        ).frames  # fmt: skip
    grid = found.grid(STEPS)
    cond, free = found.embed(PROMPTS), found.embed([""] * 2)
    for step in grid.walk(down=True):
        with_text, without = (evaluate(found, x, step.t, c) for c in (cond, free))
        x0, eps = (
            getattr(without, face) + scale * (getattr(with_text, face) - getattr(without, face))
            for face in ("x0", "eps")
        )
        x = (1 - step.s) * x0 + step.s * eps
    torch.testing.assert_close(x.float(), theirs, **CLOSE)


@pytest.mark.parametrize("entry", able("invert"), ids=lambda e: e.name)
def test_every_inverter_takes_clips(entry):
    inversion = retour.invert(model(), clips(), PROMPTS, method=entry.name, steps=STEPS, guidance=2)
    assert inversion.states["x"].shape[1:] == (2, 4, 3, 8, 8)
    back = retour.reconstruct(inversion)
    assert all(isinstance(c, Clip) and len(c) == FRAMES for c in back.images)
    if entry.exact or "source" in entry.provides:
        # A float32 network whose rows are batched otherwise on the two ways.
        assert (back.latents - inversion.latents).abs().max() < 1e-5


@pytest.mark.parametrize("entry", able("edit"), ids=lambda e: e.name)
def test_every_editor_takes_clips_and_one_mask_for_their_frames(entry):
    inversion = retour.invert(model(), clips(), PROMPTS, method=entry.mate, steps=STEPS, guidance=2)
    mask = np.pad(np.ones((8, 8)), 4)
    result = retour.edit(inversion, "a blue pear", editor=entry.name, mask=mask)
    assert [(len(c), c.size) for c in result.images] == [(FRAMES, (16, 16))] * 2
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:6, 2:6] = False
    gap = (result.latents - inversion.latents).abs()
    assert gap[..., ~kept].max() > 1e-3
    if not entry.factory.masks:  # the others steer towards the source instead of copying it
        assert gap[..., kept].max() < 1e-5


def test_a_batch_of_clips_does_what_each_does_alone():
    both = retour.invert(model(), clips(), PROMPTS, method="ddim", steps=STEPS, guidance=2)
    for k, clip in enumerate(clips()):
        alone = retour.invert(model(), [clip], PROMPTS[k], method="ddim", steps=STEPS, guidance=2)
        torch.testing.assert_close(both.noise[k], alone.noise[0], rtol=1e-4, atol=1e-4)


def test_from_a_file_to_a_file(tmp_path):
    """An animated picture in, one of its own size and pace out; the record is inside."""
    frames = [Image.new("RGB", (24, 16), (40 * k, 90, 200)) for k in range(FRAMES)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:], duration=120)
    inversion = retour.invert(model(), tmp_path / "in.gif", "a cat", steps=STEPS, method="euler")
    result = retour.edit(inversion, "a red cat", editor="reprompt")
    result.save(tmp_path / "out.png", keep_size=True)
    with Image.open(tmp_path / "out.png") as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (FRAMES, (24, 16), 120)
    assert retour.io.read_record(tmp_path / "out.png")["editor"] == "reprompt"


@pytest.mark.parametrize("frames", [2, 4])
def test_other_numbers_of_frames_are_refused(frames):
    with pytest.raises(RetourError, match=f"1, 3, 5, ... frames, got {frames}: use"):
        retour.invert(model(), clips(1, frames), "a cat", steps=STEPS)


@pytest.mark.parametrize(
    ("task", "name"), [("edit", "p2p"), ("edit", "oir"), ("restore", "flowchef"), ("attack", "sca")]
)
def test_what_needs_pictures_or_attention_says_so(task, name):
    from retour.api import refuse_impossible
    from retour.core.registry import get

    with pytest.raises(RetourError, match="which model .* does not offer"):
        refuse_impossible(model(), get(task, name))


def test_the_variants_of_wan_2_2_are_refused():
    pipe = tiny.wan()
    pipe.register_to_config(boundary_ratio=0.9)
    with pytest.raises(RetourError, match="two networks"):
        load(pipe)
    pipe = tiny.wan()
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(RetourError, match="each token a time"):
        load(pipe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    tiny.wan().save_pretrained(path)
    (path / "retour.json").write_text('{"native": 16}')
    return path


def command(*arguments):
    from retour import cli

    return cli.run([str(a) for a in arguments])


def test_the_command_line_edits_a_folder_of_frames(folder, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    for k in range(FRAMES):
        Image.new("RGB", (16, 16), (40 * k, 90, 200)).save(tmp_path / "frames" / f"{k}.png")
    given = ("--model", folder, "--steps", 2, "--source", "a cat", "--target", "a red cat")
    given = ("edit", tmp_path / "frames", *given, "--editor", "flowedit")
    assert command(*given, "-o", tmp_path / "out.webp") == 0
    with Image.open(tmp_path / "out.webp") as image:
        assert image.n_frames == FRAMES
    capsys.readouterr()
    assert command(*given, "-o", tmp_path / "out.jpg") == 2
    assert "end its name in" in capsys.readouterr().err
    assert not (tmp_path / "out.jpg").exists()


def test_a_model_of_pictures_takes_no_folder(tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    given = ("--source", "a cat", "--target", "a dog", "-o", tmp_path / "out.png")
    assert command("edit", tmp_path, *given) == 2
    assert "is a folder: name one picture in it" in capsys.readouterr().err

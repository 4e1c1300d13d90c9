"""Measure the exported models and draw what they make.

    python -m retour.train.report --data SPRITES --out DIR [--weights DIR] [--count 48]

Reconstructions and retrieval are measured on scenes of training sprites ("train"), on sprites whose
concept was seen in other styles only ("pairs") and on concepts never seen ("concepts"). Generated
images, also of the favourite concepts, get three marks: the background (median colour of the
border, nearest of the palette), the style and the concept (both as the tiny CLIP judges, among the
captions of all three styles and of 100 concepts). The tiny CLIP has seen the same data and is no
perfect judge: its marks for the true images are reported beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from retour.data.palette import nearest_background
from retour.data.scenes import STYLE_PHRASES, Mix, Sampler, Scene, Studio, make_split
from retour.data.sprites import load
from retour.train.clip import embed_images, embed_texts, retrieval, tokenize
from retour.train.export import WEIGHTS
from retour.train.generator import PROMPTS
from retour.train.loop import add_data, grid
from retour.train.vae import psnr, to_tensor

PARTS = ("train", "pairs", "concepts")
SINGLE = Mix(centred=1.0, large=0.0, small=0.0, corner=0.0, two=0.0, recoloured=0.2, jitter=0.0)
SEED = 1000
Generate = Callable[[list[str]], np.ndarray]


class Judge:
    """The tiny CLIP as a judge of images (B, 64, 64, 3) in 0..1."""

    def __init__(self, folder: Path, studio: Studio) -> None:
        """Load the model; `studio` writes the captions that it compares."""
        self.model = CLIPModel.from_pretrained(folder).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.studio = studio

    @torch.no_grad()
    def ranks(self, images: np.ndarray, choices: list[list[Scene]]) -> Tensor:
        """Rank (B,), 0 the best, of the first of each image's choices."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2.0 - 1.0
        vectors = embed_images(self.model, pixels)
        captions = [self.studio.caption(scene) for scenes in choices for scene in scenes]
        texts = embed_texts(self.model, tokenize(self.tokenizer, captions))
        scores = torch.einsum("bd,bcd->bc", vectors, texts.view(len(images), -1, texts.shape[-1]))
        return (scores > scores[:, :1]).sum(dim=1)


def concept_choices(scene: Scene, others: list[str], rng: np.random.Generator) -> list[Scene]:
    """The scene, and 99 like it with other concepts."""
    item = scene.items[0]
    names = rng.choice([name for name in others if name != item.concept], 99, replace=False)
    return [scene, *(replace(scene, items=(replace(item, concept=str(n)),)) for n in names)]


def style_choices(scene: Scene) -> list[Scene]:
    """The scene, and the two like it in other styles."""
    return [scene, *(replace(scene, style=s) for s in STYLE_PHRASES if s != scene.style)]


def border_colour(image: np.ndarray) -> np.ndarray:
    """Median colour (3,), 0..255, of the outer two pixels of an image (H, W, 3) in 0..1."""
    frame = np.ones(image.shape[:2], bool)
    frame[2:-2, 2:-2] = False
    return np.median(image[frame], axis=0) * 255.0


def marks(judge: Judge, images: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """Shares of generated images (B, 64, 64, 3) in 0..1 that show what their scenes say."""
    rng = np.random.default_rng(SEED)
    concepts = judge.studio.sprites.concepts
    grounds = [nearest_background(border_colour(image)) for image in images]
    concept = judge.ranks(images, [concept_choices(s, concepts, rng) for s in scenes])
    style = judge.ranks(images, [style_choices(s) for s in scenes])
    return {
        "background": float(
            np.mean([g == s.background for g, s in zip(grounds, scenes, strict=True)])
        ),
        "style": float((style == 0).float().mean()),
        "concept_top1_of_100": float((concept == 0).float().mean()),
        "concept_top5_of_100": float((concept < 5).float().mean()),
    }


def make_generators(weights: Path, guidance: float) -> dict[str, Generate]:
    """Prompts to images (B, 64, 64, 3) in 0..1 by both models: DDIM 50 and Euler 28 steps."""
    unet = StableDiffusionPipeline.from_pretrained(weights / "emoji-unet")
    mmdit = StableDiffusion3Pipeline.from_pretrained(weights / "emoji-mmdit")
    common = {"guidance_scale": guidance, "output_type": "np"}
    calls = {
        "emoji-unet": (unet, common | {"num_inference_steps": 50}),
        "emoji-mmdit": (mmdit, common | {"num_inference_steps": 28, "max_sequence_length": 1}),
    }

    def bind(pipe: Any, options: dict[str, object]) -> Generate:
        pipe.set_progress_bar_config(disable=True)
        return lambda prompts: (
            pipe(prompts, generator=torch.Generator().manual_seed(SEED), **options).images
        )

    return {name: bind(*call) for name, call in calls.items()}


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """What the autoencoder makes of images (B, 3, 64, 64) in -1..1."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample


def report_vae(
    folder: Path, samplers: dict[str, Sampler], count: int, out: Path
) -> dict[str, float]:
    """Mean PSNR in dB by part, and a picture of held-out scenes over their reconstructions."""
    vae = AutoencoderKL.from_pretrained(folder).eval()
    result = {}
    for part, sampler in samplers.items():
        x = to_tensor([sampler.studio.render(sampler.scene(n)) for n in range(count)])
        y = torch.cat([reconstruct(vae, chunk) for chunk in x.split(32)])
        result[part] = float(psnr(x, y).mean())
    rows = torch.cat([x[:12], y[:12], x[12:24], y[12:24]])
    grid(rows / 2 + 0.5, 12).save(out / "vae.png")
    return result


def report_generator(
    name: str, generate: Generate, judge: Judge, samplers: dict[str, Sampler], count: int, out: Path
) -> dict[str, dict[str, float]]:
    """Marks by part, and pictures of the fixed prompts and of each part."""
    sheet(generate(list(PROMPTS)), 8).save(out / f"{name}.png")
    result = {}
    for part, sampler in samplers.items():
        scenes = [sampler.scene(number) for number in range(count)]
        images = generate([sampler.studio.caption(scene) for scene in scenes])
        sheet(images[:24], 8).save(out / f"{name}-{part}.png")
        result[part] = marks(judge, images, scenes)
    return result


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """A picture of images (B, 64, 64, 3) in 0..1."""
    return grid(torch.from_numpy(images).permute(0, 3, 1, 2), columns)


def measure(
    weights: Path, studio: Studio, count: int, guidance: float, out: Path
) -> dict[str, object]:
    """All figures."""
    split = make_split(studio.sprites)
    plain = {part: Sampler(studio, split, SEED, part) for part in PARTS}
    single = {part: Sampler(studio, split, SEED, part, SINGLE) for part in PARTS}
    single["favourites"] = Sampler(studio, split, SEED, "train", replace(SINGLE, favoured=1.0))
    judge = Judge(weights / "clip", studio)
    result: dict[str, object] = {
        "count": count,
        "guidance": guidance,
        "vae_psnr": report_vae(weights / "vae", plain, 4 * count, out),
        "clip_retrieval_of_100": {
            part: retrieval(judge.model, judge.tokenizer, sampler)
            for part, sampler in plain.items()
        },
        "real_images": {
            part: marks(judge, *real(sampler, count)) for part, sampler in single.items()
        },
    }
    for name, generate in make_generators(weights, guidance).items():
        result[name] = report_generator(name, generate, judge, single, count, out)
    return result


def real(sampler: Sampler, count: int) -> tuple[np.ndarray, list[Scene]]:
    """True images in 0..1 of the first scenes, the ceiling of all marks."""
    scenes = [sampler.scene(number) for number in range(count)]
    return np.stack([sampler.studio.render(scene) for scene in scenes]) / 255.0, scenes


def main() -> None:
    """Measure from the command line; writes report.json and pictures."""
    parser = argparse.ArgumentParser(prog="python -m retour.train.report", description=__doc__)
    add_data(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    studio = Studio(load(options.data, options.concepts))
    figures = measure(options.weights, studio, options.count, options.guidance, options.out)
    (options.out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

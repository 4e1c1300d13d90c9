"""Do two scorers that share nothing agree on how well images show their captions?

    python -m retour.data.sprites --out SPRITES
    python benchmarks/judge.py --data SPRITES [--count 32] [--steps 20] [--fit 800] [--out DIR]

The embedded CLIP has seen the data of the generators that it scores; the independent scorer
(:mod:`retour.evaluate.judge`, extra `judge`) joins two networks that others trained elsewhere by a
linear map, fitted on `--fit` true scenes (some blurred or through JPEG, so that it does not live on
their finest detail), and no training ever uses it. Both score, for the same
`--count` captions of favourite concepts in single-object scenes that the fit did not contain:

- the true images, and the VAE's reconstructions of them
- samples of `emoji-unet` and `emoji-mmdit` from the captions
- the true images blurred (Gaussian, 2 and 5 pixels)
- true images of other captions

Columns for each scorer: how often the image's own caption comes first of 100 (the others are
captions of further scenes), and the mean cosine x 100 with its 95 % interval. Below: both orders of
the rows with their rank correlation; of how many pairs of rows both scorers are sure (the interval
of the paired difference excludes zero), and whether they say the same; and what both know of
scenes, and of concepts, that no fit contained.

Writes `judge.json` and `judge.png` (a row of pictures for each row of the table). What was fitted
and sampled is kept in DIR, so that a second run is quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from retour.data.scenes import Mix, Sampler, Studio, make_split
from retour.data.sprites import load
from retour.evaluate.judge import Judge, Sentences, Trunk, fit_ridge
from retour.evaluate.metrics import ClipScorer
from retour.evaluate.stats import mean_interval, paired_difference
from retour.io import atomic_write, plain, save_json
from retour.models.quiet import quietly
from retour.record import versions
from retour.train.classifier import wear

WEIGHTS = Path(__file__).parents[1] / "src" / "retour" / "weights"
SINGLE = Mix(centred=1.0, large=0.0, small=0.0, corner=0.0, two=0.0, recoloured=0.2, jitter=0.0)
CHOICES, GUIDANCE = 100, 4.0
BLURS = (2, 5)
FIT_SEED, SEED = 501, 901
SCORERS = ("emoji-clip", "independent")


class Scorer(Protocol):
    """Images (B, 3, H, W) in [0, 1] and texts as unit vectors."""

    def images(self, images: Any) -> Tensor:
        """(B, D)."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, D)."""


@dataclass(frozen=True)
class Mark:
    """What a scorer says of a row: share of own captions first, mean cosine x 100."""

    first: float
    score: float
    values: list[float]


@dataclass(frozen=True)
class Scenes:
    """True images (N, 3, 64, 64) in [0, 1], their captions, and the drawing that each shows."""

    images: Tensor
    captions: list[str]
    drawings: list[str]

    @classmethod
    def draw(
        cls, sampler: Sampler, count: int, avoid: Sequence[str] = (), *, worn: bool = False
    ) -> Scenes:
        """The first `count` scenes with captions of their own; `worn` ones are blurred at times."""
        pictures: list[np.ndarray] = []
        captions: list[str] = []
        drawings: list[str] = []
        number, seen = 0, set(avoid)
        while len(captions) < count:
            scene = sampler.scene(number)
            caption = sampler.studio.caption(scene)
            if caption not in seen:
                seen.add(caption)
                captions.append(caption)
                drawings.append(f"{scene.items[0].concept}, {scene.style}")
                picture = sampler.studio.render(scene)
                pictures.append(wear(picture, sampler.rng(number, 3)) if worn else picture)
            number += 1
        return cls(_tensor(np.stack(pictures)), captions, drawings)


def _tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 as (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _bytes(images: Tensor) -> np.ndarray:
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def mark(scorer: Scorer, images: Tensor, captions: Sequence[str], others: Sequence[str]) -> Mark:
    """Score images against their own captions, and rank these among all captions and others."""
    table = scorer.images(images) @ scorer.texts([*captions, *others]).T
    own = table[:, : len(images)].diag()
    better = (table > own[:, None]).sum(1)
    return Mark(float((better == 0).float().mean()), 100 * float(own.mean()), own.tolist())


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    first, second = (_ranks(np.asarray(values, np.float64)) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[:, None] > values).sum(1)
    return below + ((values[:, None] == values).sum(1) - 1) / 2


def blurred(images: Tensor, radius: float) -> Tensor:
    """Gaussian blur."""
    pictures = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius)) for p in _bytes(images)]
    return _tensor(np.stack([np.asarray(p) for p in pictures]))


@torch.no_grad()
def reconstructed(images: Tensor) -> Tensor:
    """Through the VAE."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae").eval()
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def sampled(name: str, captions: list[str], steps: int) -> Tensor:
    """Images of captions by an embedded model."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

    flow = name == "emoji-mmdit"
    with quietly():
        kind = StableDiffusion3Pipeline if flow else StableDiffusionPipeline
        pipe = kind.from_pretrained(WEIGHTS / name)
    pipe.set_progress_bar_config(desc=name)
    made = pipe(
        captions,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **({"max_sequence_length": 1} if flow else {}),
    )
    return torch.from_numpy(made.images).permute(0, 3, 1, 2).float()


def kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of a file, made and written if it is not there."""
    if not path.is_file():
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **make())
    with np.load(path) as found:
        return dict(found)


def rows(scenes: Scenes, steps: int, folder: Path) -> dict[str, Tensor]:
    """Images of each row of the table."""

    def samples(name: str) -> Tensor:
        def make() -> dict[str, np.ndarray]:
            return {"images": _bytes(sampled(name, scenes.captions, steps))}

        path = folder / f"{name}-{len(scenes.captions)}-{steps}.npz"
        return _tensor(kept(path, make)["images"])

    return {
        "true images": scenes.images,
        "VAE reconstructions": reconstructed(scenes.images),
        f"emoji-unet, {steps} steps": samples("emoji-unet"),
        f"emoji-mmdit, {steps} steps": samples("emoji-mmdit"),
        **{f"blurred by {r} pixels": blurred(scenes.images, r) for r in BLURS},
        "images of other captions": scenes.images.roll(1, 0),
    }


def fitted(sampler: Sampler, count: int, avoid: Sequence[str], folder: Path) -> Judge:
    """The independent scorer, fitted on true scenes."""
    trunk, sentences = Trunk(), Sentences()

    def make() -> dict[str, np.ndarray]:
        scenes = Scenes.draw(sampler, count, avoid, worn=True)
        vectors = trunk(scenes.images).numpy(), sentences(scenes.captions).numpy()
        return {"x": vectors[0], "y": vectors[1], "groups": np.array(scenes.drawings)}

    found = kept(folder / f"worn-{count}.npz", make)
    x, y = torch.from_numpy(found["x"]), torch.from_numpy(found["y"])
    linear = fit_ridge(x, y, groups=found["groups"].tolist())
    return Judge(trunk, sentences, linear)


def table(marks: Mapping[str, Mapping[str, Mark]]) -> str:
    """Markdown: a row for each set of images, two columns for each scorer."""
    heads = [f"{s}: first of {CHOICES} | {s}: cosine x 100" for s in SCORERS]
    lines = ["| images | " + " | ".join(heads) + " |", "| --- |" + " --- |" * (2 * len(SCORERS))]
    for name, row in marks.items():
        cells = [f"{100 * row[s].first:.0f} % | {_interval(row[s])}" for s in SCORERS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(mark: Mark) -> str:
    found = mean_interval(100 * np.array(mark.values))
    return f"{mark.score:.1f} [{found.low:.1f}, {found.high:.1f}]"


def sure(marks: Mapping[str, Mapping[str, Mark]]) -> dict[str, int]:
    """Pairs of rows that both scorers can tell apart: alike, opposite; and the rest."""
    counts = {"alike": 0, "opposite": 0, "not sure": 0}
    for a, b in combinations(marks.values(), 2):
        gaps = [paired_difference(a[s].values, b[s].values) for s in SCORERS]
        if not all(gap.apart for gap in gaps):
            counts["not sure"] += 1
        else:
            counts["alike" if gaps[0].mean * gaps[1].mean > 0 else "opposite"] += 1
    return counts


def agreement(marks: Mapping[str, Mapping[str, Mark]]) -> dict[str, Any]:
    """Orders of the rows by each scorer's cosine, and rank correlations: rows, and images."""
    scores = {s: [row[s].score for row in marks.values()] for s in SCORERS}
    names = list(marks)
    values = {s: [v for row in marks.values() for v in row[s].values] for s in SCORERS}
    orders = {s: [names[k] for k in np.argsort(scores[s])[::-1]] for s in SCORERS}
    return {
        "orders": orders,
        "rows": spearman(*scores.values()),
        "images": spearman(*values.values()),
        "pairs": sure(marks),
    }


def draw(images: Mapping[str, Tensor], path: Path, columns: int = 12) -> None:
    """Contact sheet, three times enlarged."""
    strips = [np.concatenate(list(_bytes(row[:columns])), 1) for row in images.values()]
    sheet = Image.fromarray(np.concatenate(strips, 0))
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(path)


class _Clip:
    """The embedded CLIP, for batches."""

    def __init__(self) -> None:
        self.scorer = ClipScorer()

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors."""
        return self.scorer.images(list(images))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors."""
        return self.scorer.texts(texts)


def main() -> None:
    """Fit, sample, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sprite cache")
    parser.add_argument("--count", type=int, default=32, help="captions")
    parser.add_argument("--steps", type=int, default=20, help="of both generators")
    parser.add_argument("--fit", type=int, default=800, help="true scenes of the fit")
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    studio = Studio(load(given.data))
    split = make_split(studio.sprites)
    favoured = replace(SINGLE, favoured=1.0)
    scenes = Scenes.draw(Sampler(studio, split, SEED, "train", favoured), given.count)
    others = Scenes.draw(
        Sampler(studio, split, SEED + 1, "train", favoured), CHOICES - given.count, scenes.captions
    )
    mixed = Sampler(studio, split, FIT_SEED, "train", replace(SINGLE, favoured=0.7, jitter=0.04))
    judge = fitted(mixed, given.fit, scenes.captions + others.captions, given.out)
    scorers: dict[str, Scorer] = dict(zip(SCORERS, (_Clip(), judge), strict=True))
    images = rows(scenes, given.steps, given.out)
    marks = {
        name: {
            s: mark(scorer, row, scenes.captions, others.captions) for s, scorer in scorers.items()
        }
        for name, row in images.items()
    }
    unseen = {}
    for part in ("train", "concepts"):
        fresh = Scenes.draw(Sampler(studio, split, SEED + 2, part, SINGLE), CHOICES)
        unseen[part] = {s: mark(k, fresh.images, fresh.captions, ()) for s, k in scorers.items()}
    found = agreement(marks)
    print(table(marks))
    for scorer, order in found["orders"].items():
        print(f"{scorer}: {' > '.join(order)}")
    print(f"fitted on {given.fit} true scenes, strength {judge.map.strength:g}")
    print(f"rank correlation: {found['rows']:.2f} of rows, {found['images']:.2f} of images")
    print("pairs of rows, both sure: " + ", ".join(f"{n} {k}" for k, n in found["pairs"].items()))
    for part, row in unseen.items():
        told = ", ".join(f"{s} {100 * m.first:.0f} %" for s, m in row.items())
        print(f"own caption first of {CHOICES}, fresh scenes of {part!r}: {told}")
    draw(images, given.out / "judge.png")
    report = {
        "count": given.count,
        "steps": given.steps,
        "guidance": GUIDANCE,
        "fit": given.fit,
        "strength": judge.map.strength,
        "marks": {name: {s: asdict(m) for s, m in row.items()} for name, row in marks.items()},
        "unseen": {part: {s: asdict(m) for s, m in row.items()} for part, row in unseen.items()},
        "agreement": found,
        "versions": versions(),
    }
    save_json(plain(report), given.out / "judge.json")
    print(f"written to {given.out}/judge.json and judge.png")


if __name__ == "__main__":
    main()

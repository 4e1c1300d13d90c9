"""What FlowChef restores, against a classical method for each kind of damage.

    python benchmarks/restore.py [--model emoji-mmdit] [--split public] [--tasks NAMES]
                                 [--images 32] [--batch 16] [--steps N] [-R KEY=VALUE]
                                 [--figure FILE] [--out DIR]

Pictures of the paired set are damaged (TASKS) and restored (`--split test` takes pictures that
nobody looked at while defaults were chosen) by

- `damaged`: what the measurement looks like as a picture;
- `classical`: biharmonic inpainting, bicubic enlargement, Richardson-Lucy (`deblur`), Wiener
  (`motion`), total variation (noise), all of scikit-image with the damage known to them; nothing
  for colour, where the grey picture is the only answer without learning;
- `flowchef`: as `retour restore` does it, with the prompt that is proposed for the damaged picture;
- `flowchef, prompt`: it is told what the picture shows;
- `flowchef, projected`: as the first, then what was measured is put back, where that is offered;
- `vae ceiling`: the true picture through the autoencoder, which latent methods cannot pass.

PSNR (dB) and SSIM of the whole picture, and of the hole alone for inpainting; means over pictures
with 95 % intervals, and FlowChef's difference from the classical method picture by picture. A
picture that is exact counts as 60 dB.
Writes `restore.csv` (every picture), `restore.json` and `restore.png` (a sheet). Needs
`pip install "retour[eval]"`. About 40 minutes at one thread, 20 with `--images 16`.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import retour
from retour.core.model import Model
from retour.core.progress import quiet
from retour.evaluate.metrics import pixels, psnr, ssim
from retour.evaluate.stats import mean_interval, paired_difference
from retour.evaluate.suite import PUBLIC, SPLITS, Item, Suite
from retour.io import atomic_write, plain, save_image, save_json, to_image, to_tensor
from retour.record import versions
from retour.restorers.operators import (
    GaussianBlur,
    Grey,
    Identity,
    Inpaint,
    MotionBlur,
    Operator,
    SuperResolution,
)
from retour.restorers.run import restore

SHOWN, CELL, LABEL = 4, 96, 16
EXACT = 60.0
METRICS = ("psnr", "ssim", "hole_psnr")
PLAIN, TOLD, PROJECTED = "flowchef", "flowchef, prompt", "flowchef, projected"
CLASSICAL, CEILING, DAMAGED = "classical", "vae ceiling", "damaged"

Picture = np.ndarray


@dataclass(frozen=True)
class Task:
    """A kind of damage.

    Attributes:
        operator: (height, width) -> what happens.
        classical: measurement as a picture (H, W, 3) in [0, 1], the operator -> restored picture.
        noise: standard deviation on the scale [-1, 1].
    """

    operator: Callable[[tuple[int, int]], Operator]
    classical: Callable[[Picture, Operator], Picture]
    noise: float = 0.0


@dataclass(frozen=True)
class Measure:
    """One picture restored by one method."""

    task: str
    method: str
    item: str
    psnr: float
    ssim: float
    hole_psnr: float
    nfe: float
    seconds: float


# --- Classical methods ----------------------------------------------------------------------------


def hole(size: tuple[int, int], side: int = 20) -> Inpaint:
    """A box of `side` of 64 pixels in the middle: 20 in FlowChef's easy setting, 30 in its hard."""
    known = torch.ones(size, dtype=torch.float64)
    first, edge = (64 - side) / 128, side / 64
    (top, left), (high, wide) = (tuple(round(f * n) for n in size) for f in (first, edge))
    known[top : top + high, left : left + wide] = 0
    return Inpaint(known)


def biharmonic(picture: Picture, operator: Operator) -> Picture:
    """Smoothest continuation into the hole."""
    from skimage.restoration import inpaint_biharmonic

    assert isinstance(operator, Inpaint)
    return inpaint_biharmonic(picture, operator.known.numpy() == 0, channel_axis=-1)


def untouched(picture: Picture, operator: Operator) -> Picture:
    """The picture as it is: bicubic enlargement, or grey."""
    return picture


def richardson_lucy(picture: Picture, operator: Operator) -> Picture:
    """Thirty iterations, beyond a reflected border."""
    from skimage.restoration import richardson_lucy as run

    psf, margin = kernel(operator), 16
    return per_channel(picture, margin, lambda c: run(np.clip(c, 0, 1), psf, num_iter=30))


def wiener(picture: Picture, operator: Operator) -> Picture:
    """Regularised inverse filter, beyond a reflected border."""
    from skimage.restoration import wiener as run

    psf = kernel(operator)
    return per_channel(picture, 16, lambda c: run(c, psf, balance=0.03))


def total_variation(picture: Picture, operator: Operator) -> Picture:
    """Chambolle's projection."""
    from skimage.restoration import denoise_tv_chambolle

    return denoise_tv_chambolle(picture, weight=0.15, channel_axis=-1)


def per_channel(picture: Picture, margin: int, fn: Callable[[Picture], Picture]) -> Picture:
    """`fn` on every channel, its border continued by reflection."""
    wide = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    done = np.stack([fn(wide[..., k]) for k in range(3)], -1)
    return done[margin:-margin, margin:-margin]


def kernel(operator: Operator) -> Picture:
    """Point spread of a blur: what it makes of a single bright pixel."""
    side = 33
    point = torch.zeros(1, 1, side, side, dtype=torch.float64)
    point[..., side // 2, side // 2] = 1
    return operator.forward(point)[0, 0].numpy()


TASKS: Mapping[str, Task] = {
    "inpaint": Task(hole, biharmonic),
    "inpaint-large": Task(lambda size: hole(size, 30), biharmonic),
    "sr": Task(lambda size: SuperResolution(4), untouched),
    "deblur": Task(lambda size: GaussianBlur(2.0, 11), richardson_lucy, noise=0.02),
    "motion": Task(lambda size: MotionBlur(9, 30), wiener, noise=0.02),
    "colour": Task(lambda size: Grey(), untouched),
    "identity": Task(lambda size: Identity(), total_variation, noise=0.3),
}


# --- The run --------------------------------------------------------------------------------------


Found = tuple[Tensor, float, float]


def restored(
    model: Model, truth: Tensor, prompts: Sequence[str], task: Task, **options: Any
) -> Iterator[tuple[str, Found]]:
    """Method -> pictures (B, 3, H, W) in [0, 1], evaluations and seconds of each picture."""
    operator = task.operator((truth.shape[-2], truth.shape[-1]))
    generator = torch.Generator().manual_seed(0)
    observed = operator.measure(truth, task.noise, generator)
    guess = (operator.guess(observed) / 2 + 0.5).clamp(0, 1)
    damaged = observed / 2 + 0.5 if isinstance(operator, Inpaint) else guess
    yield DAMAGED, (damaged.clamp(0, 1), 0, 0)
    begun = time.perf_counter()
    done = [task.classical(p.permute(1, 2, 0).numpy(), operator) for p in guess]
    classical = torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).clamp(0, 1)
    yield CLASSICAL, (classical, 0, (time.perf_counter() - begun) / len(truth))
    found: Found | None = None
    for name, told in ((PLAIN, None), (TOLD, list(prompts))):
        result = restore(model, observed, operator, prompt=told, **options)
        pictures = torch.stack([pixels(image) for image in result.images])
        seconds = result.record["seconds"] / len(truth)
        yield name, (pictures, result.record["nfe"], seconds)
        found = found or (pictures, result.record["nfe"], seconds)
    if operator.invertible and not task.noise:
        assert found is not None
        x = 2 * found[0] - 1
        x = x + operator.pinv(observed - operator.forward(x))
        yield PROJECTED, ((x / 2 + 0.5).clamp(0, 1), *found[1:])
    with torch.no_grad():
        ceiling = model.decode(model.encode(truth)).double()
    yield CEILING, ((ceiling / 2 + 0.5).clamp(0, 1), 0, 0)


def measure(
    name: str, method: str, items: Sequence[Item], truth: Tensor, found: Found, missing: Any
) -> list[Measure]:
    """PSNR and SSIM of every picture."""
    measures = []
    for item, true, picture in zip(items, truth, found[0], strict=True):
        true = true / 2 + 0.5
        inside = math.nan if missing is None else min(EXACT, psnr(true, picture, ~missing))
        values = min(EXACT, psnr(true, picture)), ssim(true, picture), inside
        measures.append(Measure(name, method, item.id, *values, *found[1:]))
    return measures


def run_all(
    model: Model, items: Sequence[Item], names: Sequence[str], batch: int, **options: Any
) -> tuple[list[Measure], dict[str, dict[str, list[Tensor]]]]:
    """All measures, and the first pictures of every task and method."""
    measures: list[Measure] = []
    shown: dict[str, dict[str, list[Tensor]]] = {}
    for name in names:
        for first in range(0, len(items), batch):
            some = items[first : first + batch]
            truth = torch.stack([to_tensor(item.image).double() for item in some])
            operator = TASKS[name].operator((truth.shape[-2], truth.shape[-1]))
            missing = operator.known == 0 if isinstance(operator, Inpaint) else None
            kept = shown.setdefault(name, {})
            kept.setdefault("true", []).extend(truth / 2 + 0.5)
            told = [item.source for item in some]
            for method, found in restored(model, truth, told, TASKS[name], **options):
                measures += measure(name, method, some, truth, found, missing)
                kept.setdefault(method, []).extend(found[0])
        print(f"{name} done", flush=True)
    return measures, shown


# --- What it says ---------------------------------------------------------------------------------


def values(measures: Sequence[Measure], task: str, method: str, metric: str) -> list[float]:
    """One metric of every picture."""
    return [getattr(m, metric) for m in measures if (m.task, m.method) == (task, method)]


def table(measures: Sequence[Measure]) -> str:
    """Markdown: one row for each task and method."""
    head = "| task | method | PSNR, dB | SSIM | hole's PSNR | NFE |"
    lines = [head, "| --- " * 6 + "|"]
    for task, method in dict.fromkeys((m.task, m.method) for m in measures):
        cells = []
        for metric, digits in zip(METRICS, (2, 3, 2), strict=True):
            value = mean_interval(values(measures, task, method, metric))
            ends = f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"
            cells.append(f"{value.mean:.{digits}f} {ends}" if value.count else "-")
        cost = mean_interval(values(measures, task, method, "nfe")).mean
        lines.append(f"| {task} | {method} | " + " | ".join(cells) + f" | {cost:.0f} |")
    return "\n".join(lines)


def comparison(measures: Sequence[Measure]) -> list[str]:
    """FlowChef against the classical method, picture by picture."""
    lines = []
    for task in dict.fromkeys(m.task for m in measures):
        for method in dict.fromkeys(m.method for m in measures if m.task == task):
            if not method.startswith(PLAIN):
                continue
            for metric in METRICS[: 3 if task.startswith("inpaint") else 2]:
                ours, theirs = (values(measures, task, k, metric) for k in (method, CLASSICAL))
                gap = paired_difference(ours, theirs)
                lines.append(
                    f"{task}, {metric}: {method} - classical = {gap.mean:+.3f} "
                    f"[{gap.low:+.3f}, {gap.high:+.3f}]"
                )
    return lines


def sheet(shown: Mapping[str, Mapping[str, Sequence[Tensor]]], each: int = SHOWN) -> Image.Image:
    """Rows: `each` pictures of every task; columns: the methods."""
    columns = list(dict.fromkeys(m for kept in shown.values() for m in kept))
    rows = [(t, k) for t, kept in shown.items() for k in range(min(each, len(kept["true"])))]
    left, top, step = 6 * LABEL, 2 * LABEL, CELL + 4
    page = Image.new("RGB", (left + len(columns) * step, top + len(rows) * step), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for x, method in enumerate(columns):
        draw.multiline_text((left + x * step, 1), method.replace(", ", ",\n"), "black", font)
    for y, (task, k) in enumerate(rows):
        draw.text((2, top + y * step + CELL // 2), task, "black", font)
        for x, method in enumerate(columns):
            if method in shown[task]:
                image = to_image(2 * shown[task][method][k] - 1)
                image = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
                page.paste(image, (left + x * step, top + y * step))
    return page


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-mmdit")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, with commas between")
    parser.add_argument("--split", choices=SPLITS, default=PUBLIC, help="of the paired set")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="the model's own by default")
    parser.add_argument("-R", dest="options", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--figure", type=Path, help="also a small sheet, a row for each task")
    parser.add_argument("--out", type=Path, default=Path("runs/restore"))
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = options()
    model = retour.load(given.model)
    items = list(Suite.paired(given.split).select(limit=given.images))
    chosen = dict(part.split("=", 1) for part in given.options)
    with quiet():
        measures, shown = run_all(
            model, items, given.tasks.split(","), given.batch, steps=given.steps, **chosen
        )
    given.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out / "restore.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Measure)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measures)
    save_image(sheet(shown), given.out / "restore.png")
    if given.figure is not None:
        # A small file: 256 colours, and the rest by dithering.
        page = sheet(shown, 1)
        save_image(page.quantize(palette=page.quantize(256)), given.figure)
    report = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "split": given.split,
        "images": len(items),
        "steps": model.default_steps if given.steps is None else given.steps,
        "options": chosen,
        "versions": versions(),
        "table": table(measures),
        "differences": comparison(measures),
    }
    save_json(plain(report), given.out / "restore.json")
    print(f"{len(items)} pictures, {model.name} ({model.fingerprint}) {chosen or ''}")
    print(report["table"])
    print(*report["differences"], sep="\n")
    print(f"written to {given.out}: restore.csv, restore.json, restore.png")


if __name__ == "__main__":
    main()

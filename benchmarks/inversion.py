"""Every inverter measured alone: does it come back, and is what it finds noise?

    python benchmarks/inversion.py [--model emoji-unet] [--inverters NAMES] [--images 64]
                                   [--batch 16] [--guidance W] [--steps N] [--out DIR]

The source images of the paired set are inverted with their true prompts and brought back with the
same prompt at the guidance of the way back, no edit. Columns, means over images, of errors with
95 % intervals:

- error of the latents: norm of the returned latents' error over the norm of the latents
- PSNR of the returned image against the input; the "VAE ceiling" row is what no inverter can beat
- noise: mean, standard deviation, excess kurtosis and neighbour correlation of the noisy end
  (white Gaussian: 0, 1, 0, 0; the row "white noise" is drawn)
- NFE up, and up and back; time over that of so many bare network calls at this batch size,
  forward alone (a backward pass counts as time, not as an evaluation)
- peak: growth of the process's resident memory over what it was before the run, MiB (Linux; on a
  GPU, of its allocated memory)

Writes `inversion.json` and `inversion.csv`. All methods run in turn on each batch.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import retour
from retour import api
from retour.core.model import Model
from retour.core.progress import quiet
from retour.evaluate.metrics import pixels, psnr
from retour.evaluate.noise import gaussianity
from retour.evaluate.peak import Peak
from retour.evaluate.stats import mean_interval
from retour.evaluate.suite import Item, Suite
from retour.io import atomic_write, plain, save_json
from retour.record import versions

CEILING, WHITE = "VAE ceiling", "white noise"


@dataclass(frozen=True)
class Measure:
    """One image taken up and back by one method; what does not apply is NaN."""

    method: str
    item: str
    latent: float = math.nan
    psnr: float = math.nan
    mean: float = math.nan
    std: float = math.nan
    kurtosis: float = math.nan
    neighbours: float = math.nan
    nfe_up: float = math.nan
    nfe: float = math.nan
    time: float = math.nan
    peak: float = math.nan


HEADS = {
    "latent": "error of the latents",
    "psnr": "PSNR, dB",
    "nfe_up": "NFE up",
    "nfe": "NFE",
    "peak": "peak, MiB",
}
DIGITS = {name: ".2f" for name in ("psnr", "kurtosis", "time")}
DIGITS |= {name: ".0f" for name in ("nfe_up", "nfe", "peak")}
SAMPLED = ("latent", "psnr")
EXACT = 1e-3


def distinct(suite: Suite, count: int) -> list[Item]:
    """The first items of different source pictures."""
    seen: dict[str, Item] = {}
    for item in suite:
        seen.setdefault(item.source, item)
    return list(seen.values())[:count]


@torch.no_grad()
def bare_seconds(model: Model, items: Sequence[Item]) -> float:
    """Seconds per row of the network alone, at the batch that guidance makes."""
    condition = model.embed([item.source for item in items] * 2)
    x = torch.zeros(len(condition), *model.latent_shape(model.native, model.native))
    times = torch.full((len(x),), model.grid(2).times[1])
    model.network(x, times, condition)
    begun = time.perf_counter()
    for _ in range(5):
        model.network(x, times, condition)
    return (time.perf_counter() - begun) / (5 * len(x))


def run(
    model: Model, items: Sequence[Item], name: str, guidance: float, steps: int | None, bare: float
) -> list[Measure]:
    """One method on one batch."""
    with Peak(model.device) as peak:
        begun = time.perf_counter()
        inversion = api.invert(
            model,
            [item.image for item in items],
            [item.source for item in items],
            method=name,
            steps=steps,
            guidance=guidance,
        )
        back = api.reconstruct(inversion)
        seconds = time.perf_counter() - begun
    up, down = inversion.record["nfe"], back.record["nfe"]
    nfe = up + down
    error = (back.latents - inversion.latents).flatten(1).norm(dim=1)
    error = error / inversion.latents.flatten(1).norm(dim=1)
    moments = gaussianity(inversion.noise)
    return [
        Measure(
            name,
            item.id,
            float(error[k]),
            psnr(pixels(item.image), pixels(back.original_size(k))),
            **{key: float(values[k]) for key, values in moments.items()},
            nfe_up=up,
            nfe=nfe,
            time=seconds / (nfe * len(items) * bare) if nfe else math.nan,
            peak=peak.mib,
        )
        for k, item in enumerate(items)
    ]


def ceiling(model: Model, items: Sequence[Item]) -> list[Measure]:
    """Encode and decode."""
    pictures = [retour.io.fit(i.image, native=model.native, multiple=model.multiple) for i in items]
    images = api.decode(model, api.encode(model, [picture for picture, _ in pictures]))
    back = [place.restore(image) for image, (_, place) in zip(images, pictures, strict=True)]
    return [
        Measure(CEILING, item.id, psnr=psnr(pixels(item.image), pixels(image)))
        for item, image in zip(items, back, strict=True)
    ]


def white(model: Model, items: Sequence[Item], seed: int) -> list[Measure]:
    """Noise as it should be."""
    shape = model.latent_shape(model.native, model.native)
    noise = torch.randn(len(items), *shape, generator=torch.Generator().manual_seed(seed))
    moments = gaussianity(noise.double())
    return [
        Measure(WHITE, item.id, **{key: float(values[k]) for key, values in moments.items()})
        for k, item in enumerate(items)
    ]


def run_all(
    model: Model,
    items: Sequence[Item],
    names: Sequence[str],
    batch: int,
    guidance: float,
    steps: int | None,
) -> list[Measure]:
    """All methods on all batches, in turn."""
    measures = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        measures += ceiling(model, part) + white(model, part, start)
        bare = bare_seconds(model, part)
        for name in names:
            measures += run(model, part, name, guidance, steps, bare)
            print(f"{start + len(part)}/{len(items)} {name}", flush=True)
    return measures


def cell(measures: Sequence[Measure], field: str) -> str:
    """Mean and interval of one measure of one method."""
    value = mean_interval([getattr(m, field) for m in measures])
    if not value.count:
        return "-"
    if field == "latent" and value.mean < EXACT:
        return f"{value.mean:.0e}" if value.mean else "0"
    shape = DIGITS.get(field, ".3f")
    if field not in SAMPLED or math.isnan(value.low):
        return format(value.mean, shape)
    mean, low, high = (format(v, shape) for v in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def table(measures: Sequence[Measure]) -> str:
    """Markdown table, best round trip first."""
    columns = [f.name for f in fields(Measure)][2:]
    rows = {m.method: [k for k in measures if k.method == m.method] for m in measures}

    def quality(name: str) -> float:
        error = mean_interval([m.latent for m in rows[name]]).mean
        return -1.0 if math.isnan(error) else error

    heads = ["method", *(HEADS.get(name, name) for name in columns)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name in sorted(rows, key=quality):
        lines.append(f"| {name} | " + " | ".join(cell(rows[name], c) for c in columns) + " |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--inverters", help="names, with commas between; all that fit by default")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, help="of the way back; the model's by default")
    parser.add_argument("--steps", type=int, help="the model's by default")
    parser.add_argument("--out", type=Path, default=Path("runs/inversion"))
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = options()
    model = retour.load(given.model)
    fitting = [e.name for e in retour.methods(task="invert") if e.needs <= model.capabilities]
    names = given.inverters.split(",") if given.inverters else fitting
    guidance = model.default_guidance if given.guidance is None else given.guidance
    items = distinct(Suite.paired(), given.images)
    given.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        measures = run_all(model, items, names, given.batch, guidance, given.steps)
    with (
        atomic_write(given.out / "inversion.csv") as path,
        path.open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, [f.name for f in fields(Measure)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measures)
    steps = model.default_steps if given.steps is None else given.steps
    report = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "images": len(items),
        "guidance": guidance,
        "steps": steps,
        "batch": given.batch,
        "versions": versions(),
        "table": table(measures),
    }
    save_json(plain(report), given.out / "inversion.json")
    print(
        f"{len(items)} images, {model.name} ({model.fingerprint}), {steps} steps, "
        f"guidance {guidance:g}"
    )
    print(report["table"])
    print(f"written to {given.out}/inversion.json and inversion.csv")


if __name__ == "__main__":
    main()

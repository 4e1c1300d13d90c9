"""Did what was dragged arrive? LazyDrag against editing without a correspondence.

    python benchmarks/drag.py [--model emoji-mmdit] [--split public] [--pairs 24] [--sprites DIR]
                              [--batch 8] [--steps N] [--guidance 1] [-E KEY=VALUE]
                              [--figure FILE] [--out DIR]

Objects of the paired set's position pairs shall be moved, and, with `--sprites` (a folder made by
`python -m retour.data.sprites`), as many further ones shall grow or shrink where they stand;
`--split test` takes others, which nobody looked at while defaults were chosen. The true picture is
known to the pixel, and so is where every point of the object belongs. Methods:

- `copy-input`: nothing is done; mean distance is the whole way;
- `prompt`: no correspondence: the same inversion, re-prompted with where (or how large) the object
  shall be, in words; this is the baseline;
- `paste`: the map applied to the clean latents and the last step sampled: nothing is drawn anew,
  which even grounds and whole objects do not need;
- `noise moved`: LazyDrag's map moves the inverted noise and nothing else is controlled;
- `tokens`: LazyDrag with a map between tokens, as the paper has it, from noise;
- `from noise`: the same, read at its new place cell by cell;
- `start moved`: from the half of the way instead, and nothing else is controlled;
- `lazydrag`: the defaults: that start and attention, with the source prompt as it was;
- `lazydrag, prompt`: the same with the target's words;
- `vae ceiling`: the true picture through the autoencoder.

Measures, each a mean over pictures with a 95 % interval:

- MD, patches: distance in pixels from where five points of the object belong to where they are
  found, by what surrounds them in the true picture;
- MD, network: the same for the points of the *source*, by features of the embedded UNet, which is
  DragBench's metric with another network;
- truth: PSNR (dB) to the true picture; background: PSNR to the source outside of what may change;
- fidelity: 1 - half of the perceptual distance to the source, between 0 and 1 (DragBench's IF with
  the embedded classifier's features; no edit has the best one); and the same to the true picture.

Writes `drag.csv`, `drag.json` and `drag.png`, and with `--figure` a small sheet of the first cases:
before, after, true. About ten minutes at one thread.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import retour
from retour import Drag
from retour.core.model import Model
from retour.core.progress import quiet
from retour.data.palette import BACKGROUNDS
from retour.data.scenes import SIZE, Form, Item, Scene, Studio
from retour.data.sprites import load as load_sprites
from retour.evaluate.drag import Matcher, NetworkFeatures, Patches
from retour.evaluate.metrics import CnnTaps, background_distance, pixels, psnr
from retour.evaluate.stats import mean_interval, paired_difference
from retour.evaluate.suite import PUBLIC, SPLITS, Suite
from retour.io import atomic_write, plain, save_image, save_json, to_image, to_tensor
from retour.record import versions

POINTS, SHOWN, FIGURE, CELL, LABEL = 5, 6, 4, 112, 16
SCALES = ((0.4, 0.65), (0.7, 0.45))
CONCEPTS = {
    "public": "cat apple car star rose penguin house fish balloon strawberry rocket tulip",
    "test": "dog banana tiger sunflower ghost lion castle octopus heart robot umbrella lemon",
}
BASELINE, OURS, COPY, CEILING = "prompt", "lazydrag", "copy-input", "vae ceiling"
PARTS = ("noise moved", "tokens", "from noise", "start moved")
METRICS = {
    "md_patches": ("MD, patches", 2),
    "md_network": ("MD, network", 2),
    "truth": ("truth, dB", 2),
    "background": ("background, dB", 2),
    "fidelity": ("fidelity", 3),
    "likeness": ("fidelity to the truth", 3),
}


@dataclass(frozen=True)
class Case:
    """An object to move or scale.

    Attributes:
        id: name.
        kind: ``move`` or ``scale``.
        before: the picture.
        after: the true one.
        source: prompt of the first.
        target: prompt of the second.
        drag: what to do.
        area: (H, W) bool, the object.
        changed: (H, W) bool, where the two may differ.
        points: of the object, (x, y).
    """

    id: str
    kind: str
    before: Image.Image
    after: Image.Image
    source: str
    target: str
    drag: Drag
    area: np.ndarray
    changed: np.ndarray
    points: tuple[tuple[float, float], ...]

    def goals(self) -> list[tuple[float, float]]:
        """Where the points belong."""
        (x0, y0), (x1, y1), (across, down) = self.drag.start, self.drag.end, self.drag.scale
        return [(x1 + across * (x - x0), y1 + down * (y - y0)) for x, y in self.points]


@dataclass(frozen=True)
class Measure:
    """One case by one method."""

    method: str
    kind: str
    item: str
    md_patches: float
    md_network: float
    truth: float
    background: float
    fidelity: float
    likeness: float
    nfe: float


# --- Cases ----------------------------------------------------------------------------------------


def moved(count: int, split: str = PUBLIC) -> list[Case]:
    """Position pairs of the paired set."""
    cases = []
    for item in Suite.paired(split).select(kinds=["change_position"], limit=count):
        assert item.edited is not None
        areas = [object_of(image) for image in (item.image, item.edited)]
        corners = [np.argwhere(area).min(0) for area in areas]
        down, right = (int(v) for v in corners[1] - corners[0])
        points = points_of(areas[0])
        x, y = points[0]
        cases.append(
            Case(
                item.id, "move", item.image, item.edited, item.source, item.target,
                Drag((x, y), (x + right, y + down)), areas[0], item.mask(), points,
            )
        )  # fmt: skip
    return cases


def scaled(count: int, studio: Studio, concepts: Sequence[str]) -> list[Case]:
    """Objects drawn at two sizes in the middle of an even ground."""
    cases = []
    grounds = [name for name in BACKGROUNDS if name not in ("black", "white")]
    for number in range(count):
        small, large = SCALES[number % len(SCALES)]
        concept = concepts[number % len(concepts)]
        style = studio.sprites.styles[number % len(studio.sprites.styles)]
        ground = grounds[(5 * number) % len(grounds)]
        scenes = [Scene(style, ground, (Item(concept, scale=s),)) for s in (small, large)]
        before, after = (studio.render(scene) for scene in scenes)
        areas = [studio.masks(scene)[0] for scene in scenes]
        sides = [max(2, round(s * SIZE)) for s in (small, large)]
        # The sprite's centre in both, to the pixel that it was pasted on.
        centres = [round(SIZE / 2 - side / 2) + side / 2 - 0.5 for side in sides]
        ratio = sides[1] / sides[0]
        form = Form()
        cases.append(
            Case(
                f"{concept}-{number}", "scale", Image.fromarray(before), Image.fromarray(after),
                studio.caption(scenes[0], form), studio.caption(scenes[1], form),
                Drag((centres[0],) * 2, (centres[1],) * 2, (ratio, ratio)),
                areas[0], areas[0] | areas[1], points_of(areas[0]),
            )
        )  # fmt: skip
    return cases


def object_of(image: Image.Image) -> np.ndarray:
    """(H, W) bool: what is not the ground, the commonest colour."""
    levels = np.asarray(image).astype(int)
    colours, counts = np.unique(levels.reshape(-1, 3), axis=0, return_counts=True)
    return np.abs(levels - colours[counts.argmax()]).max(-1) > 0


def points_of(area: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Points of an object, far from each other; the first nearest to its middle."""
    places = np.argwhere(area).astype(float)
    chosen = [int(np.linalg.norm(places - places.mean(0), axis=1).argmin())]
    # Well inside, where all that surrounds a point is the object's.
    gaps = np.linalg.norm(places - places.mean(0), axis=1)
    inner = np.flatnonzero(gaps <= 0.7 * gaps.max())
    while len(chosen) < POINTS:
        near = np.linalg.norm(places[inner, None] - places[chosen], axis=2).min(1)
        chosen.append(int(inner[near.argmax()]))
    return tuple((float(x), float(y)) for y, x in places[chosen])


# --- Methods --------------------------------------------------------------------------------------

Made = tuple[list[Image.Image], float]
LATENTS_ONLY = {"background": False, "identity_until": 0.0, "blend_max": 0.0}


def edited(model: Model, cases: Sequence[Case], given: argparse.Namespace) -> dict[str, Made]:
    """Method -> pictures and evaluations of each."""
    chosen = dict(part.split("=", 1) for part in given.options)
    inversion = retour.invert(
        model,
        [c.before for c in cases],
        [c.source for c in cases],
        method="uniinv",
        steps=given.steps,
        guidance=given.guidance,
    )
    up = inversion.record["nfe"]
    same, told = [c.source for c in cases], [c.target for c in cases]
    masks = [Image.fromarray(c.area) for c in cases]
    drags = {"drags": [[c.drag] for c in cases], "mode": "move"}

    def run(prompts: list[str], editor: str, **options: Any) -> Made:
        mask = masks if editor == OURS else None
        result = retour.edit(inversion, prompts, editor=editor, mask=mask, **options)
        pictures = [result.original_size(k) for k in range(len(cases))]
        return pictures, up + result.record["nfe_edit"]

    with torch.no_grad():
        truth = torch.stack([to_tensor(c.after) for c in cases])
        ceiling = [to_image(p) for p in model.decode(model.encode(truth))]
    return {
        COPY: ([c.before for c in cases], 0),
        BASELINE: run(told, "reprompt", guidance=given.words),
        "paste": run(same, OURS, **drags, **LATENTS_ONLY, strength=0.0),
        "noise moved": run(same, OURS, **drags, **LATENTS_ONLY, strength=1.0),
        "tokens": run(same, OURS, **drags, reading="tokens", strength=1.0),
        "from noise": run(same, OURS, **drags, strength=1.0),
        "start moved": run(same, OURS, **drags, **LATENTS_ONLY),
        OURS: run(same, OURS, **drags, **chosen),
        f"{OURS}, prompt": run(told, OURS, **drags, **chosen),
        CEILING: (ceiling, 0),
    }


def measure(
    cases: Sequence[Case], made: Mapping[str, Made], matchers: Sequence[Matcher]
) -> list[Measure]:
    """All measures of some cases."""
    patches, network = matchers
    taps, measures = CnnTaps(), []
    for method, (images, nfe) in made.items():
        for case, image in zip(cases, images, strict=True):
            before, after, found = (pixels(p) for p in (case.before, case.after, image))
            goals = case.goals()
            measures.append(
                Measure(
                    method,
                    case.kind,
                    case.id,
                    float(np.mean(patches.distances(after, found, goals, goals))),
                    float(np.mean(network.distances(before, found, case.points, goals))),
                    psnr(after, found),
                    psnr(before, found, case.changed),
                    1 - background_distance(taps, before, found) / 2,
                    1 - background_distance(taps, after, found) / 2,
                    nfe,
                )
            )
    return measures


# --- What it says ---------------------------------------------------------------------------------


def values(measures: Sequence[Measure], kind: str, method: str, metric: str) -> list[float]:
    """One metric of every case of a kind."""
    return [getattr(m, metric) for m in measures if (m.kind, m.method) == (kind, method)]


def finite(given: Sequence[float]) -> np.ndarray:
    """Infinite ones (an untouched picture's PSNR) left out."""
    array = np.asarray(given, float)
    return np.where(np.isfinite(array), array, np.nan)


def table(measures: Sequence[Measure]) -> str:
    """Markdown: one row for each kind and method."""
    titles = [title for title, _ in METRICS.values()]
    lines = [
        "| kind | method | " + " | ".join(titles) + " | NFE |",
        "| --- " * (len(METRICS) + 3) + "|",
    ]
    for kind, method in dict.fromkeys((m.kind, m.method) for m in measures):
        cells = []
        for metric, (_, digits) in METRICS.items():
            value = mean_interval(finite(values(measures, kind, method, metric)))
            ends = f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"
            cells.append(f"{value.mean:.{digits}f} {ends}" if value.count else "-")
        nfe = values(measures, kind, method, "nfe")[0]
        lines.append(f"| {kind} | {method} | " + " | ".join(cells) + f" | {nfe:.0f} |")
    return "\n".join(lines)


def comparison(measures: Sequence[Measure]) -> list[str]:
    """LazyDrag against the baseline and its own parts, case by case."""
    lines = []
    for kind in dict.fromkeys(m.kind for m in measures):
        for metric, (title, digits) in METRICS.items():
            for other in (BASELINE, *PARTS):
                ours, theirs = (finite(values(measures, kind, m, metric)) for m in (OURS, other))
                gap = paired_difference(ours, theirs)
                lines.append(
                    f"{kind}, {title}: {OURS} - {other} = {gap.mean:+.{digits}f} "
                    f"[{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"
                )
    return lines


def arrows(case: Case) -> list[tuple[float, float, float, float]]:
    """What to do, in pixels: the handle's way, or those of the object's corners where it scales."""
    (x0, y0), (x1, y1), (across, down) = case.drag.start, case.drag.end, case.drag.scale
    if case.kind == "move":
        return [(x0, y0, x1, y1)]
    places = np.argwhere(case.area)
    (top, left), (bottom, right) = places.min(0), places.max(0)
    corners = [(float(x), float(y)) for x in (left, right) for y in (top, bottom)]
    return [(x, y, x1 + across * (x - x0), y1 + down * (y - y0)) for x, y in corners]


def with_arrows(case: Case, side: int) -> Image.Image:
    """The picture before, enlarged, with what is to be done."""
    page = case.before.resize((side, side), Image.Resampling.LANCZOS)
    draw, factor = ImageDraw.Draw(page), side / case.before.width
    for way in arrows(case):
        x0, y0, x1, y1 = (factor * (v + 0.5) for v in way)
        length = max(1e-9, float(np.hypot(x1 - x0, y1 - y0)))
        u, v = (x1 - x0) / length, (y1 - y0) / length
        tips = [(x1 - 8 * u + s * 5 * v, y1 - 8 * v - s * 5 * u) for s in (-1, 1)]
        for colour, width in (("white", 5), ("black", 2)):
            draw.line((x0, y0, x1 - 4 * u, y1 - 4 * v), colour, width)
        draw.polygon([(x1, y1), *tips], "black", "white")
    return page


def figure(shown: Sequence[tuple[Case, Mapping[str, Image.Image]]], blocks: int = 2) -> Image.Image:
    """Before with arrows, after by LazyDrag, and true: `blocks` cases side by side."""
    side, gap = 128, 6
    rows = -(-len(shown) // blocks)
    width, height = blocks * (3 * (side + 2) + gap) - gap, LABEL + rows * (side + 2)
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for number, (case, made) in enumerate(shown):
        left = number % blocks * (3 * (side + 2) + gap)
        top = LABEL + number // blocks * (side + 2)
        names = ("before, and what to do", "LazyDrag", "true")
        for k, picture in enumerate((None, made[OURS], case.after)):
            large = (
                with_arrows(case, side)
                if picture is None
                else picture.resize((side, side), Image.Resampling.LANCZOS)
            )
            page.paste(large, (left + k * (side + 2), top))
            if number < blocks:
                draw.text((left + k * (side + 2), 1), names[k], "black", font)
    # A small file: 256 colours, and the rest by dithering.
    return page.quantize(palette=page.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)


def sheet(shown: Sequence[tuple[Case, Mapping[str, Image.Image]]]) -> Image.Image:
    """One row for each case: what was to be done, the truth, all methods."""
    columns = ["source", "true", *[m for m in shown[0][1] if m not in (COPY, CEILING)]]
    step = CELL + 4
    page = Image.new("RGB", (len(columns) * step, len(shown) * step + LABEL), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for x, name in enumerate(columns):
        draw.text((x * step, 1), name, "black", font)
    for y, (case, made) in enumerate(shown):
        pictures: dict[str, Image.Image] = {**made, "source": case.before, "true": case.after}
        for x, name in enumerate(columns):
            large = pictures[name].resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(with_arrows(case, CELL) if x == 0 else large, (x * step, LABEL + y * step))
    return page


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-mmdit")
    parser.add_argument("--split", choices=SPLITS, default=PUBLIC, help="of the paired set")
    parser.add_argument("--pairs", type=int, default=24, help="of each kind")
    parser.add_argument("--sprites", type=Path, help="cache of sprites, for scaled objects")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, help="the model's own by default")
    parser.add_argument("--guidance", type=float, default=1.0, help="of LazyDrag")
    parser.add_argument("--words", type=float, help="guidance of the baseline; the model's own")
    parser.add_argument("-E", dest="options", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--figure", type=Path, help="also a small sheet of the first cases")
    parser.add_argument("--out", type=Path, default=Path("runs/drag"))
    return parser.parse_args()


def run_all(
    model: Model,
    cases: Sequence[Case],
    given: argparse.Namespace,
    matchers: Sequence[Matcher],
    make: Callable[..., dict[str, Made]] = edited,
) -> tuple[list[Measure], list[tuple[Case, dict[str, Image.Image]]]]:
    """All measures, and all pictures."""
    measures, shown = [], []
    for first in range(0, len(cases), given.batch):
        some = cases[first : first + given.batch]
        made = make(model, some, given)
        measures += measure(some, made, matchers)
        shown += [
            (c, {m: images[k] for m, (images, _) in made.items()}) for k, c in enumerate(some)
        ]
        print(f"{first + len(some)} of {len(cases)}", flush=True)
    return measures, shown


def main() -> None:
    """Run, print, write."""
    given = options()
    model = retour.load(given.model)
    given.words = model.default_guidance if given.words is None else given.words
    cases = moved(given.pairs, given.split)
    if given.sprites is not None:
        studio = Studio(load_sprites(given.sprites))
        cases += scaled(given.pairs, studio, CONCEPTS[given.split].split())
    matchers = Patches(), NetworkFeatures(retour.load("emoji-unet"))
    with quiet():
        measures, shown = run_all(model, cases, given, matchers)
    given.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out / "drag.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Measure)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measures)
    kinds = [[s for s in shown if s[0].kind == kind][:SHOWN] for kind in ("move", "scale")]
    save_image(sheet([*kinds[0], *kinds[1]]), given.out / "drag.png")
    if given.figure is not None:
        chosen = [kind[:FIGURE] for kind in kinds if kind]
        save_image(figure([c for pair in zip(*chosen, strict=True) for c in pair]), given.figure)
    report = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "split": given.split,
        "cases": len(cases),
        "matchers": [m.name for m in matchers],
        "options": given.options,
        "steps": model.default_steps if given.steps is None else given.steps,
        "versions": versions(),
        "table": table(measures),
        "differences": comparison(measures),
    }
    save_json(plain(report), given.out / "drag.json")
    print(f"{len(cases)} cases, {model.name} ({model.fingerprint}), guidance {given.guidance:g}")
    print(report["table"])
    print(*report["differences"], sep="\n")
    print(f"written to {given.out}: drag.csv, drag.json, drag.png")


if __name__ == "__main__":
    main()

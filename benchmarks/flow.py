"""Error against cost of the flow inverters.

    python benchmarks/flow.py [--model emoji-mmdit] [--inverters NAMES] [--steps 4,8,16,32]
                              [--tolerances 0.16,0.08,0.04,0.02] [--images 8] [--guidance 1]
                              [--out DIR]

Source pictures of the paired set are inverted with their true prompts at several step counts and
brought back with the same prompt, all at one guidance, so that what is measured is the solver.
Options of an inverter stand behind its name: `rf-solver` is the published code, the midpoint rule,
and `rf-solver:probe=0.01` the paper's text. A row "fireflow, adaptive" finds its grids by error
tolerances instead. Three errors, each a mean over
images with a 95 % interval, against evaluations per image:

- noise: of the noisy end, against a reference of four times as many RF-Solver steps as the most
  that are measured; root mean square over that of the reference (against "up" evaluations)
- latents: of the round trip, over the root mean square of the latents (up and back)
- pixels: of the round trip's decoded picture against the decoded latents, in units of the whole
  range (up and back)

Prints the table, and what FireFlow costs, plain and adaptive, where its error is that of RF-Solver.
Writes `flow.csv` (every image), `flow.json` and `flow.png`. About three minutes at one thread.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import retour
from retour import api
from retour.core.model import Model
from retour.core.progress import quiet
from retour.core.registry import get
from retour.core.state import Inversion
from retour.evaluate.stats import mean_interval
from retour.evaluate.suite import Item, Suite
from retour.io import atomic_write, plain, save_json
from retour.record import versions

ADAPTIVE = "fireflow, adaptive"
REFERENCE, FINER = "rf-solver", 4
INVERTERS = "euler,uniinv,fixed-point,dpm,rf-solver,rf-solver:probe=0.01,heun,fireflow"
ERRORS = {"noise": "nfe_up", "latents": "nfe", "pixels": "nfe"}


@dataclass(frozen=True)
class Measure:
    """One image by one method at one setting (steps, or tolerance)."""

    method: str
    setting: float
    item: str
    nfe_up: float
    nfe: float
    noise: float
    latents: float
    pixels: float


def invert(
    model: Model, items: Sequence[Item], name: str, guidance: float, steps: int, **options: Any
) -> Inversion:
    """Up at the guidance of the way back, embedded guidance included.

    Args:
        model: which flow.
        items: pictures and prompts.
        name: of an inverter, options behind it: "name:key=value:key=value".
        guidance: of both ways.
        steps: of the grid.
        options: further options of the inverter.
    """
    name, *told = name.split(":")
    options |= dict(part.split("=", 1) for part in told)
    known = {f.name for f in fields(get("invert", name).options)}
    alike = {"inversion_guidance": guidance, "inversion_embedded": None}
    return api.invert(
        model,
        [item.image for item in items],
        [item.source for item in items],
        method=name,
        steps=steps,
        guidance=guidance,
        **{k: v for k, v in alike.items() if k in known},
        **options,
    )


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image."""
    return x.double().flatten(1).square().mean(1).sqrt()


def measure(
    items: Sequence[Item], inversion: Inversion, name: str, setting: float, goal: Tensor
) -> list[Measure]:
    """Bring back and compare."""
    back = api.reconstruct(inversion)
    up, down = inversion.record["nfe"], back.record["nfe"]
    data, model = inversion.latents, inversion.model
    assert model is not None
    noise = rms(inversion.noise - goal) / rms(goal)
    latents = rms(back.latents - data) / rms(data)
    pixels = rms(model.decode(back.latents) - model.decode(data)) / 2
    return [
        Measure(name, setting, item.id, up, up + down, *(float(e[k]) for e in errors))
        for errors in [(noise, latents, pixels)]
        for k, item in enumerate(items)
    ]


def run_all(
    model: Model,
    items: Sequence[Item],
    names: Sequence[str],
    steps: Sequence[int],
    tolerances: Sequence[float],
    guidance: float,
) -> Iterator[list[Measure]]:
    """All methods at all settings."""
    goal = invert(model, items, REFERENCE, guidance, FINER * max(steps)).noise
    for name in names:
        for count in steps:
            inversion = invert(model, items, name, guidance, count)
            yield measure(items, inversion, name, count, goal)
    for tolerance in tolerances:
        options = {"tolerance": tolerance}
        inversion = invert(model, items, "fireflow", guidance, max(steps), **options)
        yield measure(items, inversion, ADAPTIVE, tolerance, goal)


Curve = list[tuple[float, float]]


def curves(measures: Sequence[Measure], error: str) -> dict[str, Curve]:
    """For each method (evaluations, mean error), by evaluations."""
    found: dict[str, dict[float, list[Measure]]] = {}
    for m in measures:
        found.setdefault(m.method, {}).setdefault(m.setting, []).append(m)

    def point(group: list[Measure]) -> tuple[float, float]:
        mean = mean_interval([getattr(m, error) for m in group]).mean
        return getattr(group[0], ERRORS[error]), mean

    return {name: sorted(map(point, settings.values())) for name, settings in found.items()}


def cost_at(curve: Curve, error: float) -> float:
    """Evaluations at which a curve has that error, between its points in logarithms; else NaN."""
    for (low, worse), (high, better) in zip(curve, curve[1:], strict=False):
        if worse >= error >= better > 0:
            part = math.log(worse / error) / math.log(worse / better) if worse > better else 0.0
            return float(low * (high / low) ** part)
    return math.nan


def comparison(measures: Sequence[Measure], one: str, other: str) -> list[str]:
    """What `one` costs where its error is that of `other`, and the mean ratio of each error."""
    lines = []
    for error in ERRORS:
        found, ratios = curves(measures, error), []
        for cost, value in found.get(other, []):
            equal = cost_at(found.get(one, []), value)
            if math.isnan(equal):
                continue
            ratios.append(equal / cost)
            lines.append(
                f"{error} error {value:.2e}: {other} {cost:.0f} evaluations, {one} {equal:.1f} "
                f"({ratios[-1]:.2f} of them)"
            )
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines.append(f"{error} error: {one} needs {mean:.2f} of {other}'s evaluations")
    return lines


def table(measures: Sequence[Measure]) -> str:
    """Markdown table, one row for each method and setting."""
    lines = [
        "| method | steps or tolerance | NFE up | NFE | noise | latents | pixels |",
        "| --- " * 7 + "|",
    ]
    groups: dict[tuple[str, float], list[Measure]] = {}
    for m in measures:
        groups.setdefault((m.method, m.setting), []).append(m)
    for (name, setting), group in groups.items():
        cells = []
        for error in ERRORS:
            value = mean_interval([getattr(m, error) for m in group])
            cells.append(f"{value.mean:.2e} [{value.low:.1e}, {value.high:.1e}]")
        costs = f"{group[0].nfe_up:.0f} | {group[0].nfe:.0f}"
        lines.append(f"| {name} | {setting:g} | {costs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(measures: Sequence[Measure], title: str, path: Path) -> None:
    """One panel for each error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(ERRORS), figsize=(15, 5))
    for panel, (error, cost) in zip(panels, ERRORS.items(), strict=True):
        for name, curve in curves(measures, error).items():
            x, y = np.array(curve).T
            panel.loglog(x, y, marker="o", markersize=3, label=name)
        panel.set_xlabel("evaluations up" if cost == "nfe_up" else "evaluations up and back")
        panel.set_ylabel(f"error of the {error}")
        panel.grid(which="both", alpha=0.2)
    panels[-1].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def numbers(text: str, kind: type = float) -> list[Any]:
    """Numbers with commas between."""
    return [kind(part) for part in text.split(",") if part]


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-mmdit")
    parser.add_argument("--inverters", default=INVERTERS, help="names, with commas between")
    parser.add_argument("--steps", default="4,8,16,32")
    parser.add_argument("--tolerances", default="0.16,0.08,0.04,0.02")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.0, help="of both ways")
    parser.add_argument("--out", type=Path, default=Path("runs/flow"))
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = options()
    model = retour.load(given.model)
    names = given.inverters.split(",")
    items = list(Suite.paired().select(limit=given.images))
    given.out.mkdir(parents=True, exist_ok=True)
    measures: list[Measure] = []
    with quiet():
        settings = numbers(given.steps, int), numbers(given.tolerances)
        for group in run_all(model, items, names, *settings, given.guidance):
            measures += group
            print(f"{group[0].method} {group[0].setting:g}", flush=True)
    equal = [
        line for name in ("fireflow", ADAPTIVE) for line in comparison(measures, name, REFERENCE)
    ]
    with atomic_write(given.out / "flow.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Measure)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measures)
    title = f"{len(items)} images, {model.name} ({model.fingerprint}), guidance {given.guidance:g}"
    draw(measures, title, given.out / "flow.png")
    report = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "images": len(items),
        "guidance": given.guidance,
        "versions": versions(),
        "equal_error": equal,
        "table": table(measures),
    }
    save_json(plain(report), given.out / "flow.json")
    print(title)
    print(report["table"])
    print(*equal, sep="\n")
    print(f"written to {given.out}: flow.csv, flow.json, flow.png")


if __name__ == "__main__":
    main()

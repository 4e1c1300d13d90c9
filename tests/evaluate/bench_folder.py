"""A bench folder without a bench: what the runner leaves, with figures and pictures made up."""

import json

import numpy as np
import pyarrow
from pyarrow import parquet

from retour.evaluate.suite import Suite
from retour.io import read_image, save_image

REFERENCES = ["copy-input", "vae-ceiling"]
RUNS = ["ddim+p2p", "direct+p2p", "direct+masactrl"]
METRICS = {
    "background_psnr": {"title": "Background PSNR", "unit": "dB", "better": "higher"},
    "structure_distance": {"title": "Structure distance", "unit": "", "better": "lower"},
    "clip_edited": {"title": "CLIP edited", "unit": "", "better": "higher"},
    "truth_distance": {"title": "Distance to truth", "unit": "", "better": "lower"},
    "edit_success": {"title": "Edit success", "unit": "", "better": "higher"},
}
BACKBONE = {"convention": "strict", "backbone": "emoji-clip"}


def build(folder, limit=8, runs=RUNS, steps=(20,), prompts=None, plan=None):
    """Write a folder and return it; `prompts` are a source and a target for every item."""
    rng = np.random.default_rng(0)
    items = list(Suite.paired().select(limit=limit))
    for item in items:
        save_image(item.image, _made(folder / "inputs" / f"{item.id}.png"))
        save_image(item.edited, _made(folder / "truth" / f"{item.id}.png"))
        mask = np.where(item.mask(), 255, 0).astype(np.uint8)
        save_image(read_image(mask), _made(folder / "masks" / f"{item.id}.png"))
    rows = []
    several = len(steps) > 1
    for k, run in enumerate(runs):
        for count in steps:
            label = f"{run}-{count}" if several else run
            rows += _rows(rng, folder, label, items, run.split("+"), count, 0.25 + 0.2 * k)
    for label in REFERENCES:
        rows += _rows(rng, folder, label, items, ("", ""), None, 0.0)
    if prompts is not None:
        rows = [{**row, "source": prompts[0], "target": prompts[1]} for row in rows]
    write(folder, rows)
    facts = {key: {**BACKBONE, **fact} for key, fact in METRICS.items()}
    (folder / "summary.json").write_text(json.dumps({"metrics": facts}))
    told = {
        "suite": {"name": "paired", "fingerprint": "5a1e5a1e"},
        "model": {"name": "emoji-unet", "fingerprint": "c0ffee00"},
        "runs": [{"label": run} for run in runs],
        "items": [item.id for item in items],
        "seed": 0,
        "batch": 16,
        "versions": {"python": "3.13", "retour": "0.1.0", "torch": "2.13.0"},
        "command": ["retour", "bench", "--suite", "paired", "-o", "bench"],
        "created": "2026-11-23T18:00:00",
        **(plan or {}),
    }
    (folder / "plan.json").write_text(json.dumps(told))
    return folder


def rows_of(folder):
    """The rows of a folder's results."""
    return parquet.read_table(folder / "results.parquet").to_pylist()


def write(folder, rows):
    """Write rows as a folder's results."""
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "results.parquet")


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _rows(rng, folder, label, items, methods, steps, edited):
    rows = []
    for k, item in enumerate(items):
        image, psnr, failure = _output(rng, item, label, edited, 1 if steps is None else steps)
        path = f"images/{label}/{item.id}.png"
        save_image(image, _made(folder / path))
        inverter, editor = methods
        cost = 0.0 if steps is None else 3.0 * steps
        rows.append(
            {
                **{"run": label, "item": item.id, "kind": item.kind, "split": item.split},
                **{"source": item.source, "target": item.target},
                **{"inverter": inverter, "editor": editor, "steps": steps, "guidance": 3.0},
                "batch": k // 16,
                "background_psnr": psnr,
                "structure_distance": 0.02 + failure * rng.uniform(0, 0.02),
                "clip_edited": 0.2 + 0.1 * (1 - failure) + rng.normal(0, 0.02),
                "truth_distance": failure * 0.05 + rng.uniform(0, 0.01),
                "edit_success": float(failure < 0.5),
                **{"nfe_inversion": cost / 3, "nfe_edit": cost * 2 / 3, "nfe": cost},
                **{"nfe_full": cost, "seconds_inversion": cost / 100, "seconds_edit": cost / 50},
                **{"seconds": cost * 3 / 100, "peak_mib": 900.0 + cost, "image": path},
            }
        )
    return rows


def _output(rng, item, label, edited, steps):
    """A mixture of input and truth, with noise where nothing is a reference."""
    a, b = (np.asarray(image, np.float64) for image in (item.image, item.edited))
    if label == "copy-input":
        return item.image, float("inf"), 1.0
    share = np.clip(edited + rng.normal(0.3, 0.25), 0, 1) if edited else 0.0
    noise = rng.normal(0, 60 / np.sqrt(steps) * (0.4 + edited) if edited else 3, a.shape)
    pixels = ((1 - share) * a + share * b + noise).clip(0, 255)
    psnr = 10 * np.log10(255**2 / np.mean((pixels - (1 - share) * a - share * b) ** 2))
    return read_image(pixels.astype(np.uint8)), psnr, float(1 - share)

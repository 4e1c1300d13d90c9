"""A benchmark that takes a second: tiny model, five pairs, two metrics without a net."""

from __future__ import annotations

import pyarrow.parquet as parquet

from retour.evaluate.suite import Suite
from retour.evaluate.work import MEASURED

GIVEN = {
    "inverters": "ddim,direct",
    "editors": "reprompt,p2p",
    "pairs": "infedit",
    "steps": 2,
    "guidance": 3.0,
    "limit": 5,
    "batch": 2,
    "metrics": "background_psnr,truth_distance",
    "threads": 1,
}
RUNS = ("ddim+reprompt", "ddim+p2p", "direct+reprompt", "direct+p2p", "virtual+infedit")


def items():
    return [item.id for item in Suite.paired().select(limit=5)]


def facts(folder):
    """Everything in the results but seconds and memory, so that NaN equals NaN."""
    rows = parquet.read_table(folder / "results.parquet").to_pylist()
    return [
        {k: "nan" if v != v else v for k, v in row.items() if k not in MEASURED} for row in rows
    ]


def pictures(folder):
    return {p.relative_to(folder).as_posix(): pixels(p) for p in folder.glob("i*/**/*.png")}


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size, image.tobytes()


def parts(folder):
    """Finished pieces: an identity that changes when one is written again."""
    found = {}
    for path in folder.glob("parts/[0-9]*.parquet"):
        status = path.stat()
        found[path.name] = status.st_ino, status.st_mtime_ns
    return found

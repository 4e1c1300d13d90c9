"""Commands that run many edits and measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import RetourError, check_range
from ..io import plain
from .application import app
from .arguments import (
    DEFAULT_MODEL,
    DeviceOpt,
    DtypeOpt,
    EditOptions,
    EditorOpt,
    GuidanceOpt,
    InvertOptions,
    JsonOpt,
    KeepOpt,
    MateOpt,
    ModelOpt,
    NegativeOpt,
    SeedOpt,
    StepsOpt,
)
from .support import key_values, print_json, say

CLUSTER, LOCAL = "--cluster", "local"
MOST_GIB = 2**30


class ClusterCommand(TyperCommand):
    """A command whose `--cluster` may stand without an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--cluster` its address."""
        rest = list(args)
        for k in reversed([k for k, arg in enumerate(rest) if arg == CLUSTER]):
            if k + 1 == len(rest) or rest[k + 1].startswith("-"):
                rest.insert(k + 1, LOCAL)
        return super().parse_args(ctx, rest)


OutOpt = Annotated[Path, typer.Option("-o", "--out", help="Folder of the results.")]
BatchOpt = Annotated[int, typer.Option("--batch", help="Images a batch.")]
ThreadsOpt = Annotated[
    int | None, typer.Option("--threads", help="Of torch.", show_default="all; on a cluster 1")
]
CacheOpt = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder of inversions to share.", show_default="inside OUT"),
]
CacheSizeOpt = Annotated[float, typer.Option("--cache-size", help="GiB that it may take.")]
ClusterOpt = Annotated[
    str | None,
    typer.Option(
        CLUSTER, metavar="[ADDRESS]", help="Run on Ray: at an address, or started here without."
    ),
]
WorkersOpt = Annotated[
    int | None,
    typer.Option("--workers", help="Of the cluster.", show_default="one a GPU, or all CPUs"),
]


@app.command(cls=ClusterCommand)
def bench(
    context: typer.Context,
    out: OutOpt,
    suite: Annotated[
        str,
        typer.Option(
            "--suite", help="paired, paired-test, pie, or a folder in PIE-Bench's format."
        ),
    ] = "paired",
    inverters: Annotated[
        str | None,
        typer.Option("--inverters", help="Names: a,b.", show_default="each editor's own"),
    ] = None,
    editors: Annotated[str | None, typer.Option("--editors", help="Names: c,d.")] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Further ones: inverter+editor, or an editor.")
    ] = None,
    model: ModelOpt = None,
    steps: Annotated[str, typer.Option("--steps", help="One number, or several: 10,20.")] = "20",
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    batch: BatchOpt = 16,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Items, evenly of all kinds.", show_default="all"),
    ] = None,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="Of edit: a,b.", show_default="all")
    ] = None,
    border: Annotated[
        bool | None,
        typer.Option(
            "--border/--no-border",
            help="PIE-Bench's rule that the outermost pixels are editable.",
            show_default="for pie",
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="Columns: a,b.", show_default="all")
    ] = None,
    convention: Annotated[
        str, typer.Option("--convention", help="Of metrics: strict or pie_compat.")
    ] = "strict",
    backbones: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="KEY=PATH",
            help="Weights: structure, clip, lpips, lpips_heads.",
            show_default="those that ship with retour",
        ),
    ] = None,
    invert_options: InvertOptions = None,
    edit_options: EditOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    threads: ThreadsOpt = None,
    cache: CacheOpt = None,
    cache_size: CacheSizeOpt = 4.0,
    cluster: ClusterOpt = None,
    workers: WorkersOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure inverters and editors on a set of edits, with intervals; stop and go on at will."""
    from ..core.registry import parse_fields
    from ..evaluate.metrics import Backbones
    from ..evaluate.runner import bench as run

    result = run(
        out,
        suite=suite,
        inverters=inverters,
        editors=editors,
        pairs=pairs,
        model=DEFAULT_MODEL if model is None else model,
        steps=_numbers(steps),
        guidance=guidance,
        negative=negative,
        seed=seed,
        batch=batch,
        limit=limit,
        kinds=kinds,
        border=border,
        metrics=metrics,
        convention=convention,  # type: ignore[arg-type]
        backbones=parse_fields("--backbone", Backbones, key_values(backbones)),
        inverter_options=key_values(invert_options),
        editor_options=key_values(edit_options),
        device=device,
        dtype=dtype,
        threads=threads,
        cache=cache,
        cache_limit=_bytes(cache_size),
        cluster=cluster,
        workers=workers,
        command=command_line(context),
    )
    if as_json:
        print_json(result.describe())
        return
    typer.echo(result.heading())
    typer.echo("\n" + result.table())
    say(f"written to {out}: results.parquet, summary.json, images (see `retour report {out}`)")


@app.command(cls=ClusterCommand)
def batch(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of pictures.")],
    jobs: Annotated[
        Path,
        typer.Option(
            "--jobs",
            help="CSV or JSON lines: image, target, and if wanted source, inverter, editor, steps, "
            "guidance, mask, options.",
        ),
    ],
    out: OutOpt,
    inverter: MateOpt = None,
    editor: EditorOpt = "p2p",
    model: ModelOpt = None,
    steps: StepsOpt = None,
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    size: BatchOpt = 16,
    keep_size: KeepOpt = False,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    threads: ThreadsOpt = None,
    cache_size: CacheSizeOpt = 4.0,
    cluster: ClusterOpt = None,
    workers: WorkersOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Edit many pictures of your own, as a list says; stop and go on at will."""
    from ..evaluate.batches import batch as run

    result = run(
        folder,
        jobs,
        out,
        model=DEFAULT_MODEL if model is None else model,
        inverter=inverter,
        editor=editor,
        steps=steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
        batch=size,
        keep_size=keep_size,
        device=device,
        dtype=dtype,
        threads=threads,
        cache_limit=_bytes(cache_size),
        cluster=cluster,
        workers=workers,
        command=command_line(context),
    )
    if as_json:
        print_json(plain(result.rows))
        return
    cost = sum(row["nfe"] for row in result.rows)
    count = len(result.rows)
    typer.echo(
        f"wrote {count} picture{'s' * (count > 1)} to {out} ({cost:.0f} network evaluations): "
        "results.parquet, results.jsonl, images"
    )


def command_line(context: typer.Context) -> str:
    """What was typed, as a plan keeps it."""
    import shlex

    return shlex.join(["retour", *context.find_root().obj])


def _bytes(gibibytes: float) -> int:
    check_range("cache-size", gibibytes, 0, MOST_GIB)
    return int(gibibytes * 2**30)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RetourError(f"steps are whole numbers with commas between, got {text!r}") from None


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of `retour bench`.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page.", show_default="report.html in DIR"),
    ] = None,
    overlays: Annotated[
        int,
        typer.Option("--overlays", metavar="N", help="Draw attention of N edits first.", min=0),
    ] = 0,
    max_mib: Annotated[
        float, typer.Option("--max-mib", help="How large the page may become.")
    ] = 32.0,
) -> None:
    """Write one HTML page of a bench: table, plots, and every edit side by side."""
    from ..evaluate.report import report as write

    page = write(folder, out, attention=overlays, max_mib=max_mib)
    for note in page.notes:
        say(note)
    typer.echo(f"wrote {page.path} ({page.size / 2**20:.1f} MiB)")

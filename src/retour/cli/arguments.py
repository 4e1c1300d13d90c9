"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "emoji-unet"
FLOW_MODEL = "emoji-mmdit"
DEFAULT_INVERTER = "direct"
TRACK_INVERTER = "ddim"  # Of commands that want the picture's own track, and no help on it.
INVERSION_SUFFIX = ".safetensors"

ImageArg = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGE",
        help="A picture; an inversion file; for a model of clips a folder of frames or a GIF.",
        show_default=False,
    ),
]
PictureArg = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGE",
        help="A picture; for a model of clips a folder of frames or a GIF.",
        show_default=False,
    ),
]
SourceOpt = Annotated[
    str | None, typer.Option("--source", help="What the picture shows; left out: a guess is made.")
]
ModelOpt = Annotated[
    str | None,
    typer.Option("--model", help="Embedded name, folder or hub id.", show_default=DEFAULT_MODEL),
]
FlowModelOpt = Annotated[
    str | None,
    typer.Option("--model", help="Embedded name, folder or hub id.", show_default=FLOW_MODEL),
]
InverterOpt = Annotated[
    str | None,
    typer.Option(
        "--inverter", help="See `retour methods --task invert`.", show_default=DEFAULT_INVERTER
    ),
]
TrackOpt = Annotated[
    str | None,
    typer.Option(
        "--inverter", help="See `retour methods --task invert`.", show_default=TRACK_INVERTER
    ),
]
MateOpt = Annotated[
    str | None,
    typer.Option(
        "--inverter", help="See `retour methods --task invert`.", show_default="the editor's"
    ),
]
EditorOpt = Annotated[str, typer.Option("--editor", help="See `retour methods --task edit`.")]
StepsOpt = Annotated[int | None, typer.Option("--steps", help="Steps.", show_default="the model's")]
GuidanceOpt = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale.", show_default="the model's")
]
NegativeOpt = Annotated[str, typer.Option("--negative", help="Negative prompt.")]
SeedOpt = Annotated[int, typer.Option("--seed", help="Seed of all noise.")]
DeviceOpt = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
DtypeOpt = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
InvertOptions = Annotated[
    list[str] | None, typer.Option("-I", metavar="KEY=VALUE", help="Option of the inverter.")
]
EditOptions = Annotated[
    list[str] | None, typer.Option("-E", metavar="KEY=VALUE", help="Option of the editor.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]
KeepOpt = Annotated[bool, typer.Option("--keep-size", help="Write at the input's own size.")]
TaskOpt = Annotated[
    str | None, typer.Option("--task", help="solver, invert, edit, restore or attack.")
]
AttackOptions = Annotated[
    list[str] | None, typer.Option("-A", metavar="KEY=VALUE", help="Option of the attack.")
]
ClassifierOpt = Annotated[
    str, typer.Option("--classifier", help="The one under test: embedded name or folder.")
]
VictimOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--victim",
        help="Others to show the picture to; repeatable.",
        show_default="the other embedded one",
    ),
]

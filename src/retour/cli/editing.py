"""Commands that invert, and what follows from an inversion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.state import Inversion

from ..errors import RetourError
from ..io import WRITABLE, check_writable, read_picture
from .application import app
from .arguments import (
    DEFAULT_INVERTER,
    INVERSION_SUFFIX,
    TRACK_INVERTER,
    DeviceOpt,
    DtypeOpt,
    EditOptions,
    EditorOpt,
    GuidanceOpt,
    ImageArg,
    InverterOpt,
    InvertOptions,
    JsonOpt,
    KeepOpt,
    MateOpt,
    ModelOpt,
    NegativeOpt,
    PictureArg,
    SeedOpt,
    SourceOpt,
    StepsOpt,
    TrackOpt,
)
from .support import check_method, inversion_of, key_values, outputs, print_record


@app.command()
def edit(
    image: ImageArg,
    target: Annotated[list[str], typer.Option("--target", help="What it shall show; repeatable.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The edited picture.")],
    source: SourceOpt = None,
    inverter: MateOpt = None,
    editor: EditorOpt = "p2p",
    model: ModelOpt = None,
    steps: StepsOpt = None,
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    mask: Annotated[Path | None, typer.Option(help="White where the edit may act.")] = None,
    seed: SeedOpt = 0,
    keep_size: KeepOpt = False,
    invert_options: InvertOptions = None,
    edit_options: EditOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Edit a picture: invert it, and return with another prompt."""
    outs = outputs(out, len(target), [image, mask])
    from .. import api

    if mask is not None:
        read_picture(mask)
    check_method("edit", editor, edit_options)
    asked: dict[str, Any] = {"editor": editor, "guidance": guidance, "mask": mask}
    asked |= key_values(edit_options)
    inversion = inversion_of(
        image, source, model, device, dtype, invert_options, inverter, editor=editor, outs=outs,
        check=lambda found: api.refuse_edit(found, target, **asked), later=["guidance"],
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    result = api.edit(inversion, target, **asked)
    for index, path in enumerate(outs):
        result.save(path, index=index, keep_size=keep_size)
    print_record(result.record, outs, as_json)


@app.command()
def invert(
    image: PictureArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="The inversion, a .safetensors file.")],
    source: SourceOpt = None,
    inverter: InverterOpt = None,
    model: ModelOpt = None,
    steps: StepsOpt = None,
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    invert_options: InvertOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Take a picture back to noise and keep the inversion for any number of edits."""
    check_writable(out, [INVERSION_SUFFIX], [image])
    if image.suffix == INVERSION_SUFFIX:
        raise RetourError(f"'{image}' is an inversion already: give a picture")
    inversion = inversion_of(
        image, source, model, device, dtype, invert_options, inverter, usual=DEFAULT_INVERTER,
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    inversion.save(out)
    print_record(inversion.record, [out], as_json)


@app.command()
def reconstruct(
    image: ImageArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="The reconstructed picture.")],
    source: SourceOpt = None,
    inverter: InverterOpt = None,
    model: ModelOpt = None,
    steps: StepsOpt = None,
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    keep_size: KeepOpt = False,
    invert_options: InvertOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Invert a picture and return along the same prompt: what the round trip gives."""
    check_writable(out, WRITABLE, [image])
    from .. import api

    inversion = inversion_of(
        image, source, model, device, dtype, invert_options, inverter, usual=DEFAULT_INVERTER,
        outs=[out], later=["guidance"],
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    result = api.reconstruct(inversion, guidance=guidance)
    result.save(out, keep_size=keep_size)
    print_record(result.record, [out], as_json)


@app.command()
def vary(
    image: ImageArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="The variations: out-1, out-2, ...")],
    count: Annotated[int, typer.Option("--count", min=1, help="How many.")] = 4,
    target: Annotated[
        str | None,
        typer.Option("--target", help="What they shall show.", show_default="the same"),
    ] = None,
    source: SourceOpt = None,
    inverter: TrackOpt = None,
    model: ModelOpt = None,
    steps: StepsOpt = None,
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    mask: Annotated[Path | None, typer.Option(help="White where they may differ.")] = None,
    seed: SeedOpt = 0,
    keep_size: KeepOpt = False,
    invert_options: InvertOptions = None,
    edit_options: EditOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Make variations of a picture: its things and colours, drawn anew (editor `rival`)."""
    outs = outputs(out, count, [image, mask])
    from .. import api

    if mask is not None:
        read_picture(mask)
    options = {"seed": seed, **key_values(edit_options)}
    check_method("edit", "rival", [f"{key}={value}" for key, value in options.items()])
    asked: dict[str, Any] = {"editor": "rival", "guidance": guidance, "mask": mask, **options}

    def shown(found: Inversion) -> list[str]:
        return [found.prompts[0] if target is None else target] * count

    inversion = inversion_of(
        image, source, model, device, dtype, invert_options, inverter, usual=TRACK_INVERTER,
        check=lambda found: api.refuse_edit(found, shown(found), **asked),
        later=["guidance", "seed"],
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    result = api.edit(inversion, shown(inversion), **asked)
    for index, path in enumerate(outs):
        result.save(path, index=index, keep_size=keep_size)
    print_record(result.record, outs, as_json)


@app.command()
def explain(
    image: ImageArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")] = Path(
        "retour-explain"
    ),
    source: SourceOpt = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A prompt to return to; its words are shown too.")
    ] = None,
    words: Annotated[
        str | None, typer.Option("--words", help="Only these words.", show_default="all")
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(
            "--factor",
            help="How much coarser than the latents, per edge.",
            show_default="a quarter, or 16 x 16",
        ),
    ] = None,
    span: Annotated[
        str, typer.Option("--span", help="Part of the steps that counts, from the noisy end.")
    ] = "0-1",
    scale: Annotated[
        str, typer.Option("--scale", help="Colours by each word's own range, or that of all.")
    ] = "word",
    inverter: TrackOpt = None,
    model: ModelOpt = None,
    steps: StepsOpt = None,
    guidance: GuidanceOpt = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    invert_options: InvertOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Show where each word of the prompt looks: a sheet, a picture a word, and the maps."""
    from ..explanation import check_settings, refuse_words
    from ..explanation import explain as look
    from ..heat import check_folder

    check_folder(out)
    settings: dict[str, Any] = {"factor": factor, "span": span, "scale": scale}
    check_settings(**settings)
    inversion = inversion_of(
        image, source, model, device, dtype, invert_options, inverter, usual=TRACK_INVERTER,
        check=lambda found: refuse_words(found, target, words),
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    drawn = None if image.suffix == INVERSION_SUFFIX else image
    found = look(inversion, target=target, words=words, pictures=drawn, **settings)
    print_record({**found.record, "prompts": list(inversion.prompts)}, found.save(out), as_json)

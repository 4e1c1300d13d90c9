"""The command line. Heavy modules are imported inside the commands, so that help comes at once."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import RetourError
from .io import WRITABLE, check_writable, plain, read_picture

if TYPE_CHECKING:
    from .core.model import Model
    from .core.registry import Entry
    from .core.state import Inversion

app = typer.Typer(
    help="Take anything back through a generative model, and return with an edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_MODEL = "emoji-unet"
FLOW_MODEL = "emoji-mmdit"
INVERSION_SUFFIX = ".safetensors"

ImageArg = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="A picture, or an inversion file.", show_default=False),
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
InverterOpt = Annotated[str, typer.Option("--inverter", help="See `retour methods --task invert`.")]
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
    outs = _outputs(out, len(target))
    from . import api

    if mask is not None:
        read_picture(mask)
    _check_method("edit", editor, edit_options)
    inversion = _inversion(
        image, source, model, device, dtype, invert_options, inverter, editor,
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    result = api.edit(
        inversion,
        target,
        editor=editor,
        guidance=guidance,
        mask=mask,
        **_pairs(edit_options),
    )
    for index, path in enumerate(outs):
        result.save(path, index=index, keep_size=keep_size)
    _report(result.record, outs, as_json)


@app.command()
def invert(
    image: ImageArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="The inversion, a .safetensors file.")],
    source: SourceOpt = None,
    inverter: InverterOpt = "direct",
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
    check_writable(out, [INVERSION_SUFFIX])
    inversion = _inversion(
        image, source, model, device, dtype, invert_options, inverter,
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    inversion.save(out)
    _report(inversion.record, [out], as_json)


@app.command()
def reconstruct(
    image: ImageArg,
    out: Annotated[Path, typer.Option("-o", "--out", help="The reconstructed picture.")],
    source: SourceOpt = None,
    inverter: InverterOpt = "direct",
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
    check_writable(out, WRITABLE)
    from . import api

    inversion = _inversion(
        image, source, model, device, dtype, invert_options, inverter,
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    result = api.reconstruct(inversion, guidance=guidance)
    result.save(out, keep_size=keep_size)
    _report(result.record, [out], as_json)


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
    inverter: InverterOpt = "ddim",
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
    outs = _outputs(out, count)
    from . import api

    if mask is not None:
        read_picture(mask)
    options = {"seed": seed, **_pairs(edit_options)}
    _check_method("edit", "rival", [f"{key}={value}" for key, value in options.items()])
    inversion = _inversion(
        image, source, model, device, dtype, invert_options, inverter,
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    targets = [inversion.prompts[0] if target is None else target] * count
    result = api.edit(inversion, targets, editor="rival", guidance=guidance, mask=mask, **options)
    for index, path in enumerate(outs):
        result.save(path, index=index, keep_size=keep_size)
    _report(result.record, outs, as_json)


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
    inverter: InverterOpt = "ddim",
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
    from .explanation import check_settings
    from .explanation import explain as look
    from .heat import check_folder

    check_folder(out)
    settings: dict[str, Any] = {"factor": factor, "span": span, "scale": scale}
    check_settings(**settings)
    inversion = _inversion(
        image, source, model, device, dtype, invert_options, inverter,
        steps=steps, guidance=guidance, negative=negative, seed=seed,
    )  # fmt: skip
    drawn = None if image.suffix == INVERSION_SUFFIX else image
    found = look(inversion, target=target, words=words, pictures=drawn, **settings)
    _report({**found.record, "prompts": list(inversion.prompts)}, found.save(out), as_json)


@app.command()
def attack(
    method: Annotated[str, typer.Argument(help="See `retour methods --task attack`.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.", show_default=False)],
    label: Annotated[str, typer.Option("--label", help="What the classifier should say.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The adversarial picture.")],
    classifier: ClassifierOpt = "emoji-cnn",
    victim: VictimOpt = None,
    source: SourceOpt = None,
    inverter: Annotated[
        str | None,
        typer.Option("--inverter", help="What inverts.", show_default="the attack's"),
    ] = None,
    model: ModelOpt = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps.", show_default="the attack's")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Guidance scale.", show_default="the attack's"),
    ] = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    keep_size: KeepOpt = False,
    invert_options: InvertOptions = None,
    attack_options: AttackOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Test a classifier of yours: does it hold where the picture's meaning does?"""
    check_writable(out, WRITABLE)
    _check_source(source)
    given = {"inverter": inverter, "steps": steps, "guidance": guidance}
    options = {k: v for k, v in given.items() if v is not None} | _pairs(attack_options)
    from .core.registry import get
    from .privacy import load_classifier
    from .privacy.run import attack as run_attack

    _check_method("invert", get("attack", method).make(**options).options.inverter, invert_options)
    for judge in (classifier, *(victim or ())):
        load_classifier(judge).index(label)
    picture = read_picture(image)
    result = run_attack(
        _load(DEFAULT_MODEL if model is None else model, device, dtype),
        picture.image,
        label,
        classifier=classifier,
        victims=victim or None,
        method=method,
        prompt=source,
        negative=negative,
        seed=seed,
        inverter_options=_pairs(invert_options),
        **options,
    )
    result.save(out, keep_size=keep_size)
    if source is None:
        _say(f"source prompt (guessed): {result.inversion.prompts[0]!r}")
    _report(result.record, [out], as_json)
    if not as_json:
        for line in _verdicts(result.record):
            typer.echo(line)


def _verdicts(record: dict[str, Any]) -> Iterator[str]:
    """What every classifier says before and after, one line each."""
    found = record["results"][0]
    said = found["predictions"]
    for name in (record["classifier"], *record["victims"]):
        before, after = said["input"][name], said["adversarial"][name]
        verdict = "holds" if after["label"] == record["labels"][0] else "errs"
        yield (
            f"{name} {verdict}: {before['label']} ({before['confidence']:.2f}) -> "
            f"{after['label']} ({after['confidence']:.2f})"
        )
    far = found["distances"]["adversarial"]
    yield (
        f"latents moved by {found['latent_change']:.3g} at most; PSNR {far['psnr']:.1f} dB, "
        f"image cosine {far['clip_image']:.3f}"
    )


@app.command()
def restore(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A degraded picture.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The restored picture.")],
    task: Annotated[
        str, typer.Option("--task", help="inpaint, sr, deblur, motion, colour or identity (noise).")
    ],
    mask: Annotated[Path | None, typer.Option(help="inpaint: white where it is missing.")] = None,
    scale: Annotated[
        int | None, typer.Option("--scale", help="sr: how much larger.", show_default="4")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What it shows, if known.")] = "",
    method: Annotated[
        str, typer.Option("--method", help="See `retour methods --task restore`.")
    ] = "flowchef",
    project: Annotated[
        bool, typer.Option("--project", help="At last put what was measured back.")
    ] = False,
    model: FlowModelOpt = None,
    steps: StepsOpt = None,
    guidance: Annotated[float, typer.Option("--guidance", help="Guidance scale.")] = 1.0,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    keep_size: KeepOpt = False,
    operator_options: Annotated[
        list[str] | None,
        typer.Option("-O", metavar="KEY=VALUE", help="What happened: sigma=2, angle=45, ..."),
    ] = None,
    restore_options: Annotated[
        list[str] | None, typer.Option("-R", metavar="KEY=VALUE", help="Option of the method.")
    ] = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Restore a picture that was masked, shrunk, blurred or lost its colours."""
    check_writable(out, WRITABLE)
    _check_method("restore", method, restore_options)
    from .restorers.operators import Inpaint, make_operator, operator_class
    from .restorers.run import restore as run_restore

    given = _pairs(operator_options) | ({} if scale is None else {"scale": scale})
    masked = operator_class(task) is Inpaint
    operator = task if masked and not given else make_operator(task, **given)
    picture = read_picture(image)
    if mask is not None:
        read_picture(mask)
    result = run_restore(
        _load(FLOW_MODEL if model is None else model, device, dtype),
        picture.image,
        operator,
        prompt=prompt,
        method=method,
        mask=mask,
        steps=steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
        project=project,
        **_pairs(restore_options),
    )
    result.save(out, keep_size=keep_size)
    _report(result.record, [out], as_json)


@app.command()
def drag(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The dragged picture.")],
    handle: Annotated[list[str], typer.Option("--from", metavar="X,Y", help="Pixel; repeatable.")],
    goal: Annotated[
        list[str], typer.Option("--to", metavar="X,Y", help="Where it goes; one for each --from.")
    ],
    scale: Annotated[
        list[str] | None,
        typer.Option("--scale", metavar="S", help="mode move: magnify; one for each --from."),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="drag (elastic), or move what the mask shows.")
    ] = "drag",
    mask: Annotated[
        Path | None, typer.Option(help="White where it may change; with move, what moves.")
    ] = None,
    source: SourceOpt = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="What it shall show.", show_default="the same")
    ] = None,
    editor: EditorOpt = "lazydrag",
    inverter: MateOpt = None,
    model: FlowModelOpt = None,
    steps: StepsOpt = None,
    guidance: Annotated[float, typer.Option("--guidance", help="Guidance scale.")] = 1.0,
    seed: SeedOpt = 0,
    keep_size: KeepOpt = False,
    invert_options: InvertOptions = None,
    edit_options: EditOptions = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Drag points of a picture to where they shall be."""
    check_writable(out, WRITABLE)
    _check_source(source)
    from .dragging import drag as run_drag
    from .dragging import pair_points

    drags = pair_points(handle, goal, scale or ())
    _check_method("edit", editor, edit_options)
    if inverter is not None:
        _check_method("invert", inverter, invert_options)
    picture = read_picture(image)
    if mask is not None:
        read_picture(mask)
    result = run_drag(
        _load(FLOW_MODEL if model is None else model, device, dtype),
        picture.image,
        drags,
        prompt=source,
        target=prompt,
        mask=mask,
        mode=mode,
        editor=editor,
        inverter=inverter,
        steps=steps,
        guidance=guidance,
        seed=seed,
        inverter_options=_pairs(invert_options),
        **_pairs(edit_options),
    )
    if source is None:
        _say(f"source prompt (guessed): {result.inversion.prompts[0]!r}")
    result.save(out, keep_size=keep_size)
    _report(result.record, [out], as_json)


@app.command()
def methods(
    task: TaskOpt = None,
    exact: Annotated[bool | None, typer.Option(help="Only (in)exact ones.")] = None,
    order: Annotated[int | None, typer.Option(help="Only of this order.")] = None,
    needs: Annotated[str | None, typer.Option(help="Only those that need this capability.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page of the docs.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the methods and their declared facts."""
    from .core.registry import entries

    facts = {"exact": exact, "order": order, "needs": needs}
    found = entries(task, **{k: v for k, v in facts.items() if v is not None})
    if as_json:
        _print_json([entry.describe() for entry in found])
    elif markdown:
        from .catalogue import page

        typer.echo(page(found), nl=False)
    else:
        _print_table(("task", "name", "order", "exact", "NFE", "what it does"), map(_row, found))


def _row(entry: Entry) -> tuple[str, ...]:
    order = "" if entry.order is None else str(entry.order)
    exact = "yes" if entry.exact else ""
    return entry.task, entry.name, order, exact, entry.nfe, entry.summary


@app.command()
def models(as_json: JsonOpt = False) -> None:
    """List the embedded models."""
    from .models.load import embedded

    found = embedded()
    if as_json:
        _print_json(found)
    else:
        rows = [(name, str(facts.get("summary", ""))) for name, facts in found.items()]
        _print_table(("name", "what it is"), rows)


@app.command()
def cite(name: Annotated[str, typer.Argument(help="Name of a method.")]) -> None:
    """Print the BibTeX of a method."""
    from .api import cite as bibtex

    typer.echo(bibtex(name))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")] = Path(
        "retour-demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="The whole gallery of the README.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Run the main job on the embedded models and write a contact sheet."""
    from .demo import run

    record = run(out, full=full)
    _report(record, [Path(record["sheet"])], as_json)


# --- Helpers --------------------------------------------------------------------------------------


def _outputs(out: Path, count: int) -> list[Path]:
    """`out` itself, or `out-1`, `out-2`, ... for several targets; all checked before any work."""
    many = [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(count)]
    paths = [out] if count == 1 else many
    for path in paths:
        check_writable(path, WRITABLE)
    return paths


def _pairs(options: Sequence[str] | None) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for option in [] if options is None else options:
        key, sign, value = option.partition("=")
        if not sign or not key:
            raise RetourError(f"method options are written KEY=VALUE, got {option!r}")
        pairs[key.replace("-", "_")] = value
    return pairs


def _check_method(task: str, name: str, options: Sequence[str] | None) -> None:
    """Refuse an unknown method or option before any model is loaded."""
    from .core.registry import get

    get(task, name).make(**_pairs(options))


def _check_source(source: str | None) -> None:
    if source is not None and not source.strip():
        raise RetourError("the source prompt is empty: say what the picture shows, or leave it out")


def _load(name: str, device: str | None, dtype: str | None) -> Model:
    from .models.load import load

    return load(name, device=device, dtype=dtype)


def _inversion(
    image: Path,
    source: str | None,
    model: str | None,
    device: str | None,
    dtype: str | None,
    options: Sequence[str] | None,
    method: str | None,
    editor: str = "p2p",
    **settings: Any,
) -> Inversion:
    """Read an inversion file, or invert a picture (by default, as the editor likes it)."""
    from . import api
    from .core.state import Inversion

    if image.suffix == INVERSION_SUFFIX:
        stored = Inversion.load(image)
        name = stored.model_name if model is None else model
        stored.attach(_load(name, device, dtype), source=repr(str(image)))
        return stored
    if source is not None and not source.strip():
        raise RetourError("the source prompt is empty: say what the picture shows, or leave it out")
    if method is not None:
        _check_method("invert", method, options)
    picture = read_picture(image)
    loaded = _load(DEFAULT_MODEL if model is None else model, device, dtype)
    if method is None:
        method = api.usual_inverter(editor, loaded)
        _check_method("invert", method, options)
    inversion = api.invert(
        loaded, picture.image, source, method=method, **settings, **_pairs(options)
    )
    if source is None:
        _say(f"source prompt (guessed): {inversion.prompts[0]!r}")
    return inversion


def _report(record: dict[str, Any], outs: Sequence[Path], as_json: bool) -> None:
    for prompt, cut in record.get("cut", {}).items():
        _say(f"the text encoder's limit cut {cut!r} off {prompt!r}")
    if as_json:
        _print_json(plain({**record, "outputs": [str(path) for path in outs]}))
        return
    names = ", ".join(str(path) for path in outs)
    typer.echo(
        f"wrote {names} ({record['nfe']:.0f} network evaluations, {record['seconds']:.1f} s)"
    )


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(head: Sequence[str], rows: Any) -> None:
    table = [tuple(head), *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


class Stopped(BaseException):
    """Ctrl-C; a KeyboardInterrupt would become the command-line library's own abort, code 1."""


def _stop(*_: object) -> None:
    raise Stopped


def run(arguments: Sequence[str]) -> int:
    """Run a command; return 0, 2 for bad input (said in one sentence), or 130 for Ctrl-C."""
    before = signal.signal(signal.SIGINT, _stop)
    try:
        app(list(arguments), prog_name="retour")
    except RetourError as error:
        _say(f"retour: {error}")
        return error.exit_code
    except Stopped:
        _say("retour: stopped; nothing was left half-written")
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def main() -> None:
    """Entry point of the `retour` command."""
    sys.exit(run(sys.argv[1:]))

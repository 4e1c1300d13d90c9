"""Commands of other purposes: attack, restore, steer, drag."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..io import WRITABLE, check_writable, read_picture
from .application import app
from .arguments import (
    DEFAULT_MODEL,
    FLOW_MODEL,
    AttackOptions,
    ClassifierOpt,
    DeviceOpt,
    DtypeOpt,
    EditOptions,
    EditorOpt,
    FlowModelOpt,
    InvertOptions,
    JsonOpt,
    KeepOpt,
    MateOpt,
    ModelOpt,
    NegativeOpt,
    SeedOpt,
    SourceOpt,
    StepsOpt,
    VictimOpt,
)
from .support import check_method, check_source, key_values, load_model, print_record, say


@app.command()
def attack(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="See `retour methods --task attack`.")
    ],
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
    check_writable(out, WRITABLE, [image])
    check_source(source)
    given = {"inverter": inverter, "steps": steps, "guidance": guidance}
    options = {k: v for k, v in given.items() if v is not None} | key_values(attack_options)
    from ..core.registry import get
    from ..privacy import load_classifier
    from ..privacy.run import attack as run_attack

    check_method("invert", get("attack", method).make(**options).options.inverter, invert_options)
    for judge in (classifier, *(victim or ())):
        load_classifier(judge).index(label)
    picture = read_picture(image)
    result = run_attack(
        load_model(DEFAULT_MODEL if model is None else model, device, dtype),
        picture.image,
        label,
        classifier=classifier,
        victims=victim or None,
        method=method,
        prompt=source,
        negative=negative,
        seed=seed,
        inverter_options=key_values(invert_options),
        **options,
    )
    result.save(out, keep_size=keep_size)
    if source is None:
        say(f"source prompt (guessed): {result.inversion.prompts[0]!r}")
    print_record(result.record, [out], as_json)
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
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="What it shows; left out: a guess is made; '': nothing."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="See `retour methods --task restore`.")
    ] = "flowchef",
    project: Annotated[
        bool, typer.Option("--project", help="At last put what was measured back.")
    ] = False,
    model: FlowModelOpt = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps.", show_default="the method's")
    ] = None,
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
    check_writable(out, WRITABLE, [image, mask])
    check_method("restore", method, restore_options)
    from ..restorers.operators import Inpaint, make_operator, operator_class
    from ..restorers.run import restore as run_restore

    given = key_values(operator_options) | ({} if scale is None else {"scale": scale})
    masked = operator_class(task) is Inpaint
    operator = task if masked and not given else make_operator(task, **given)
    picture = read_picture(image)
    if mask is not None:
        read_picture(mask)
    result = run_restore(
        load_model(FLOW_MODEL if model is None else model, device, dtype),
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
        **key_values(restore_options),
    )
    if prompt is None:
        say(f"prompt (guessed): {result.record['prompts'][0]!r}")
    result.save(out, keep_size=keep_size)
    print_record(result.record, [out], as_json)


@app.command()
def steer(
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture.")],
    label: Annotated[str, typer.Option("--label", help="What the classifier should see.")],
    classifier: Annotated[
        str, typer.Option("--classifier", help="Embedded name or folder.")
    ] = "emoji-cnn",
    prompt: Annotated[str, typer.Option("--prompt", help="What it shall show.")] = "",
    kappa: Annotated[
        float, typer.Option("--kappa", help="Root mean square of a step on the latents.")
    ] = 0.05,
    inner: Annotated[int, typer.Option("--inner", help="Steps of descent in an interval.")] = 1,
    free: Annotated[int, typer.Option("--free", help="Last intervals that are left alone.")] = 0,
    model: FlowModelOpt = None,
    steps: StepsOpt = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Scale.", show_default="the model's; 1 without a prompt"),
    ] = None,
    negative: NegativeOpt = "",
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Sample a picture that a classifier shall see as something."""
    check_writable(out, WRITABLE)
    from ..privacy import load_classifier
    from ..restorers.run import steer as run_steer

    load_classifier(classifier).index(label)
    result = run_steer(
        load_model(FLOW_MODEL if model is None else model, device, dtype),
        classifier=classifier,
        label=label,
        prompt=prompt,
        kappa=kappa,
        inner=inner,
        free=free,
        steps=steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
    )
    result.save(out)
    print_record(result.record, [out], as_json)


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
    in_turn: Annotated[
        bool, typer.Option("--in-turn", help="A round for each pair, from the last one's picture.")
    ] = False,
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
    check_writable(out, WRITABLE, [image, mask])
    check_source(source)
    from ..dragging import drag as run_drag
    from ..dragging import pair_points

    drags = pair_points(handle, goal, scale or ())
    rounds = [[one] for one in drags] if in_turn else [drags]
    check_method("edit", editor, edit_options)
    if inverter is not None:
        check_method("invert", inverter, invert_options)
    picture = read_picture(image)
    if mask is not None:
        read_picture(mask)
    result = run_drag(
        load_model(FLOW_MODEL if model is None else model, device, dtype),
        picture.image,
        rounds,
        prompt=source,
        target=prompt,
        mask=mask,
        mode=mode,
        editor=editor,
        inverter=inverter,
        steps=steps,
        guidance=guidance,
        seed=seed,
        inverter_options=key_values(invert_options),
        **key_values(edit_options),
    )
    if source is None:
        say(f"source prompt (guessed): {result.inversion.prompts[0]!r}")
    result.save(out, keep_size=keep_size)
    print_record(result.record, [out], as_json)

"""`retour.attack`: how does my classifier hold against changes that keep a picture's meaning?

The picture is inverted, an attack looks for starting latents nearby that the classifier gets wrong,
and the record says what it took: whether the classifier errs, whether others err too, and how much
of the picture and of its meaning is left. It is an evaluation of a classifier that one may
differentiate: classifier and right label are the caller's to give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import api
from .._inputs import listed, one_each, prompts_of
from ..captions import propose
from ..core.model import Model
from ..core.registry import get
from ..errors import RetourError
from ..io import fit, read_image
from ..pictures import placements_in
from ..record import describe_run
from .base import AttackJob, Found
from .classifiers import (
    Classifier,
    ClassifierLike,
    embedded_classifiers,
    load_classifier,
    margins,
    predictions,
    stacked,
)
from .distances import distances

Describer = Callable[[Image.Image], str]


@dataclass
class Attack(api.Result):
    """What an attack came to; `images`, `latents` and `record` as of any result.

    Attributes:
        success: per image, whether the classifier is wrong about the returned 8-bit picture.
        reconstructions: what the unchanged starting latents give.
        found: the search's own account: starting latents, margins on the way.
    """

    success: tuple[bool, ...] = ()
    reconstructions: tuple[Image.Image, ...] = ()
    found: Found | None = None


def attack(
    model: api.ModelLike,
    image: Any,
    label: str | int | Sequence[str | int],
    *,
    classifier: ClassifierLike = "emoji-cnn",
    victims: Sequence[ClassifierLike] | None = None,
    method: str = "sca",
    prompt: str | Sequence[str] | None = None,
    describe: Describer | None = None,
    negative: str = "",
    seed: int = 0,
    inverter_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Attack:
    """Test a classifier with pictures made near real ones in a generative model's latent space.

    Args:
        model: a loaded model, a name, a folder, a hub id or a diffusers pipeline.
        image: a path, PIL image, array, or tensor (3, H, W); or a list of them (one batch).
        label: what the classifier should say, a class name or number, one for all or one each.
        classifier: the classifier under test, as `retour.privacy.load_classifier` takes it: a name,
            a folder, a torch module or any callable (B, 3, H, W) in [0, 1] -> logits (B, K), or a
            `retour.privacy.Classifier`, which says its input's size, mean and std.
        victims: further classifiers that the pictures are shown to (transfer), which the attack
            does not see; None: for an embedded classifier, the other embedded ones.
        method: a registered attack.
        prompt: what the image shows, one for all or one each; None asks `describe`.
        describe: picture -> text; None is the embedded caption proposer.
        negative: negative prompt of the guidance.
        seed: seed of all noise of the inversion.
        inverter_options: further options of the inverter that the attack uses.
        options: options of the attack.

    Returns:
        The pictures, with a record: success, margins, predictions of all classifiers and distances
        before and after, largest change of the latents, cost.

    Raises:
        RetourError: for input that cannot be used, before any work.
    """
    model, entry = api.as_model(model), get("attack", method)
    attacker = entry.make(**options)
    wanted = attacker.options
    api.refuse_impossible(model, entry)
    trial = _prepare(model, image, label, classifier, victims)
    prompts = _prompts(prompt, describe, trial.pictures)
    guidance = attacker.guidance(model)
    inversion = api.invert(
        model,
        trial.pictures,
        prompts,
        method=wanted.inverter,
        steps=wanted.steps,
        guidance=guidance,
        negative=negative,
        seed=seed,
        **_inverter_options(wanted, guidance, inverter_options or {}),
    )
    inversion.record["placements"] = trial.placements
    job = AttackJob(inversion, trial.judges[0], trial.truth, trial.images)
    found = attacker.attack(job)
    result = _result(job, found)
    asked = {
        "attack": method,
        "attack_options": asdict(wanted),
        "inverter": inversion.method,
        "inverter_options": inversion.options,
        "classifier": trial.names[0],
        "victims": trial.names[1:],
        "labels": [trial.judges[0].label(k) for k in trial.truth.tolist()],
        "prompts": prompts,
        "prompts_proposed": prompt is None,
    }
    record = describe_run("attack", model, job.ledger, len(prompts), asked)
    for cost in ("nfe", "seconds"):
        record[cost] += inversion.record[cost]
    results = _judge(trial, result, job, prompts)
    result.success = tuple(r["success"] for r in results)
    record["success_rate"] = sum(result.success) / len(results)
    result.record = {**record, "results": results, "inversion": inversion.record}
    return result


# --- Before ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Inputs, checked: B pictures at the model's size and what each should be called.

    Attributes:
        judges: the classifier under test, then the victims.
        truth: (B,) right classes of the former.
        images: (B, 3, H, W) the pictures in [0, 1].
    """

    pictures: list[Image.Image]
    placements: list[dict[str, Any]]
    labels: list[str | int]
    judges: list[Classifier]
    truth: Tensor
    images: Tensor

    @property
    def names(self) -> list[str]:
        """What records call the judges; those of one name are numbered."""
        given = [judge.name for judge in self.judges]
        before = [given[:k].count(name) for k, name in enumerate(given)]
        return [f"{n} {k + 1}" if k else n for n, k in zip(given, before, strict=True)]


def _prepare(
    model: Model,
    image: Any,
    label: str | int | Sequence[str | int],
    classifier: ClassifierLike,
    victims: Sequence[ClassifierLike] | None,
) -> _Trial:
    images = listed(image)
    if not images:
        raise RetourError("there is no image to test the classifier with: pass at least one")
    labels = one_each("labels", label, len(images))
    surrogate = load_classifier(classifier)
    judges = [surrogate, *map(load_classifier, _others(surrogate) if victims is None else victims)]
    truths = [[judge.index(name) for name in labels] for judge in judges]
    fitted = [fit(read_image(i), native=model.native, multiple=model.multiple) for i in images]
    pictures = [picture for picture, _ in fitted]
    pixels = stacked(pictures).to(model.device)
    for judge, classes in zip(judges, truths, strict=True):
        _check_classes(judge, classes, pixels[:1])
    placements = [vars(placement) for _, placement in fitted]
    truth = torch.tensor(truths[0], device=model.device)
    return _Trial(pictures, placements, labels, judges, truth, pixels)


def _inverter_options(wanted: Any, guidance: float, given: Mapping[str, Any]) -> dict[str, Any]:
    """Both ways walk the same part of the grid at the same guidance, unless the caller says so."""
    known = {f.name for f in fields(get("invert", wanted.inverter).options)}
    same = {"inversion_guidance": guidance, "strength": wanted.strength}
    return {k: v for k, v in same.items() if k in known} | dict(given)


def _others(surrogate: Classifier) -> list[str]:
    names = list(embedded_classifiers())
    if surrogate.name not in names or load_classifier(surrogate.name) is not surrogate:
        return []
    return [name for name in names if name != surrogate.name]


def _check_classes(judge: Classifier, truth: Sequence[int], image: Tensor) -> None:
    """Ask once, so that a classifier that does not fit is refused before any work."""
    with torch.no_grad(), judge.evaluating():
        classes = judge(image).shape[1]
    if max(truth) >= classes:
        raise RetourError(
            f"classifier {judge.name!r} tells {classes} classes apart, there is no class "
            f"{max(truth)}: count them from 0"
        )


def _prompts(
    prompt: str | Sequence[str] | None, describe: Describer | None, pictures: list[Image.Image]
) -> list[str]:
    if prompt is None:
        return propose(pictures) if describe is None else [describe(p) for p in pictures]
    return list(prompts_of(prompt, len(pictures)))


# --- After ----------------------------------------------------------------------------------------


def _result(job: AttackJob, found: Found) -> Attack:
    """The pictures of the latents found, D being run on them once more."""
    latents = job.denoise(found.start)
    return Attack(
        images=api.decode(job.model, latents),
        latents=latents,
        inversion=job.inversion,
        record={},
        placements=placements_in(job.inversion.record),
        reconstructions=tuple(api.decode(job.model, found.unchanged)),
        found=found,
    )


def _judge(
    trial: _Trial, result: Attack, job: AttackJob, prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """What all judges say of every picture before and after, and how far it went."""
    stages = {
        "input": trial.pictures,
        "reconstruction": list(result.reconstructions),
        "adversarial": result.images,
    }
    said = {s: [predictions(j, stacked(p)) for j in trial.judges] for s, p in stages.items()}
    margin = {s: margins(trial.judges[0], stacked(p), trial.truth.cpu()) for s, p in stages.items()}
    far = {s: distances(p, trial.pictures, prompts) for s, p in stages.items()}
    assert result.found is not None
    moved = (result.found.start - job.start).abs().amax((1, 2, 3)).tolist()
    return [
        {
            "success": margin["adversarial"][i] > 0,
            "was_right": margin["input"][i] <= 0,
            "margins": {s: margin[s][i] for s in stages},
            "predictions": {
                s: {name: said[s][k][i] for k, name in enumerate(trial.names)} for s in stages
            },
            "distances": {s: {k: v[i] for k, v in far[s].items()} for s in stages},
            "latent_change": moved[i],
        }
        for i in range(len(prompts))
    ]

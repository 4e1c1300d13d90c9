"""State of a run (explicit, float64) and what an inverter returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RetourError, check_range
from .grid import Grid
from .model import Condition
from .rows import copies

if TYPE_CHECKING:
    from .model import Model

FORMAT = "retour-inversion/1"


@dataclass(frozen=True)
class State:
    """Latents plus whatever a solver must remember: coupled partner, previous prediction, velocity.

    Attributes:
        x: (R, C, h, w) latents.
        memory: named tensors of the solver, rows aligned with `x`; absent ones mean "not yet".
    """

    x: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """Apply `fn` to the latents and to every memory."""
        return State(fn(self.x), {k: fn(v) for k, v in self.memory.items()})

    def tile(self, count: int) -> State:
        """One copy of all rows for each of `count` branches."""
        return self.map(lambda v: copies(v, count))

    def beside(self, track: State, combine: Callable[[Tensor, Tensor], Tensor]) -> State:
        """Combine the latents, and every memory that `track` has too, with its own; keep the rest.

        Args:
            track: the state of an inversion, B rows.
            combine: (own rows, B rows of the track) -> new rows.
        """
        memory = {
            name: combine(value, track.memory[name]) if name in track.memory else value
            for name, value in self.memory.items()
        }
        return State(combine(self.x, track.x), memory)

    def with_x(self, x: Tensor) -> State:
        """Replace the latents, keep the memory."""
        return State(x, self.memory)


@dataclass
class Inversion:
    """Real data taken back into a model's latent space: everything needed to return from there.

    Attributes:
        method: registered name of the inverter.
        options: its options, as plain values.
        model_name: name of the model it was made with.
        fingerprint: fingerprint of that model.
        grid: the time grid.
        states: name -> (N+1, B, C, h, w); `x` always, further solver fields (EDICT's `y`) if any;
            index k belongs to `grid.times[k]`, so `states["x"][0]` is the data and [-1] the noise.
        condition: the B source conditions.
        negative: the B negative (empty) conditions.
        guidance: guidance scale used while inverting.
        extras: further tensors (N or N+1, B, ...): offsets, noise maps, embeddings, named by the
            method.
        record: facts of the run (NFE, seconds, versions, picture placement, ...), JSON values.
        model: the live model (never saved).
    """

    method: str
    options: dict[str, Any]
    model_name: str
    fingerprint: str
    grid: Grid
    states: dict[str, Tensor]
    condition: Condition
    negative: Condition
    guidance: float = 1.0
    extras: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    model: Model | None = None

    @property
    def images(self) -> int:
        """Batch size B."""
        return self.states["x"].shape[1]

    @property
    def latents(self) -> Tensor:
        """The data's own latents (B, C, h, w)."""
        return self.states["x"][0]

    @property
    def noise(self) -> Tensor:
        """The noisy end (B, C, h, w)."""
        return self.states["x"][-1]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The B source prompts."""
        return self.condition.prompts

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the pictures as the model sees them, where the record says."""
        placements = self.record.get("placements")
        return (placements[0]["canvas"][1], placements[0]["canvas"][0]) if placements else None

    def at(self, index: int) -> State:
        """State at `grid.times[index]`, as far as it is kept."""
        fields = {name: values[index] for name, values in self.states.items()}
        return State(fields.pop("x"), fields)

    def end(self) -> State:
        """State at the noisy end, from which generation returns."""
        return self.at(-1)

    def take(self, rows: Sequence[int]) -> Inversion:
        """Pick (and repeat) images: several edits of one inversion in one batch, say."""
        index = torch.as_tensor(list(rows))
        record = dict(self.record)
        if "placements" in record:
            record["placements"] = [record["placements"][i] for i in rows]
        return replace(
            self,
            states={k: v[:, index.to(v.device)] for k, v in self.states.items()},
            extras={k: v[:, index.to(v.device)] for k, v in self.extras.items()},
            condition=self.condition.take(rows),
            negative=self.negative.take(rows),
            record=record,
        )

    def with_options(self, **options: Any) -> Inversion:
        """Return with other options: those that only matter on the way back (Direct's `scale`)."""
        return replace(self, options={**self.options, **options})

    def save(self, path: str | PathLike[str]) -> None:
        """Write `path` as one safetensors file whose header carries the JSON description."""
        from safetensors.torch import save

        from ..io import atomic_write

        payload = save(_tensors(self), metadata={"retour": json.dumps(_header(self))})
        with atomic_write(path) as temporary:
            temporary.write_bytes(payload)

    @classmethod
    def load(cls, path: str | PathLike[str], model: Model | None = None) -> Inversion:
        """Read an inversion; with `model`, refuse one that another model made.

        Raises:
            RetourError: the file is missing, damaged, not an inversion, or of another model.
        """
        header, tensors = _read(FilePath(path))
        inversion = _restore(cls, header, tensors, path)
        if model is not None:
            inversion.attach(model, source=str(path))
        return inversion

    def attached(self) -> Model:
        """The live model.

        Raises:
            RetourError: there is none.
        """
        if self.model is None:
            raise RetourError(
                f"this inversion has no model attached: load {self.model_name!r} and pass it to "
                "Inversion.load(path, model)"
            )
        return self.model

    def attach(self, model: Model, source: str = "this inversion") -> None:
        """Connect a live model, after checking that it is the one the inversion was made with."""
        if model.fingerprint != self.fingerprint:
            raise RetourError(
                f"{source} was made with model {self.model_name!r} ({self.fingerprint}), "
                f"not with {model.name!r} ({model.fingerprint}): load that model, or invert again"
            )
        self.model = model


def _tensors(inv: Inversion) -> dict[str, Tensor]:
    groups: dict[str, Mapping[str, Tensor]] = {
        "states": inv.states,
        "condition": inv.condition.tensors,
        "negative": inv.negative.tensors,
        "extras": inv.extras,
    }
    return {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, named in groups.items()
        for name, tensor in named.items()
    }


def _header(inv: Inversion) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "method": inv.method,
        "options": inv.options,
        "model_name": inv.model_name,
        "fingerprint": inv.fingerprint,
        "times": list(inv.grid.times),
        "prompts": list(inv.condition.prompts),
        "negative_prompts": list(inv.negative.prompts),
        "guidance": inv.guidance,
        "record": inv.record,
    }


def _read(path: FilePath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise RetourError(f"there is no inversion file {str(path)!r}: check the path")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads(meta.get("retour", "null"))
    except (SafetensorError, ValueError, OSError) as error:
        raise RetourError(
            f"{str(path)!r} is damaged or not an inversion file ({error}): invert the image again"
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise RetourError(
            f"{str(path)!r} is not a retour inversion of format {FORMAT}: invert the image again"
        )
    return header, tensors


def _restore(
    cls: type[Inversion], header: dict[str, Any], tensors: dict[str, Tensor], path: object
) -> Inversion:
    def group(name: str) -> dict[str, Tensor]:
        return {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")}

    name = repr(str(path))
    try:
        _check_header(header)
        inversion = cls(
            method=header["method"],
            options=header["options"],
            model_name=header["model_name"],
            fingerprint=header["fingerprint"],
            grid=Grid(tuple(header["times"])),
            states=group("states"),
            condition=Condition(group("condition"), tuple(header["prompts"])),
            negative=Condition(group("negative"), tuple(header["negative_prompts"])),
            guidance=header["guidance"],
            extras=group("extras"),
            record=header["record"],
        )
        coherent = _coherent(inversion)
    except (KeyError, IndexError, TypeError, AttributeError, RetourError) as error:
        said = str(error) if isinstance(error, RetourError) else repr(error)
        raise RetourError(f"{name} lacks parts of an inversion ({said}): invert again") from None
    if not coherent:
        raise RetourError(
            f"{name} holds tensors that are not finite, or do not fit its grid and prompts: "
            "invert again"
        )
    return inversion


def _check_header(header: Mapping[str, Any]) -> None:
    kinds = {
        **dict.fromkeys(("method", "model_name", "fingerprint"), str),
        **dict.fromkeys(("options", "record"), dict),
        **dict.fromkeys(("prompts", "negative_prompts"), list),
    }
    wrong = [k for k, kind in kinds.items() if not isinstance(header[k], kind)]
    texts = [*header["prompts"], *header["negative_prompts"]] if not wrong else []
    if wrong or not all(isinstance(text, str) for text in texts):
        raise RetourError(f"{', '.join(wrong) or 'prompts'} of another type")
    check_range("guidance", header["guidance"], 0)


def _coherent(inv: Inversion) -> bool:
    """Whether all tensors are finite and have the shapes that grid and prompts call for."""
    batch, levels = len(inv.condition), (inv.grid.steps + 1, inv.grid.steps)
    conditions = [*inv.condition.tensors.values(), *inv.negative.tensors.values()]
    shapes = [{k: v.shape for k, v in c.tensors.items()} for c in (inv.condition, inv.negative)]
    return (
        all(tuple(v.shape) == tuple(inv.states["x"].shape) for v in inv.states.values())
        and inv.states["x"].shape[:2] == (levels[0], batch)
        and all(v.shape[0] in levels and v.shape[1] == batch for v in inv.extras.values())
        and all(len(v) == batch for v in conditions)
        and len(inv.negative) == batch
        and shapes[0] == shapes[1]
        and all(bool(torch.isfinite(v).all()) for v in (*inv.states.values(), *conditions))
    )


def stack(states: Sequence[State]) -> dict[str, Tensor]:
    """Stack N+1 states (clean first) into the `states` of an :class:`Inversion`.

    Memories that only exist in some of the states (a multistep history) are left out.
    """
    shared = set.intersection(*[set(s.memory) for s in states])
    named = {k: torch.stack([s.memory[k] for s in states]) for k in sorted(shared)}
    return {"x": torch.stack([s.x for s in states]), **named}

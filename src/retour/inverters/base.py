"""What every inverter is given and what it returns; the shared way up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.control import Control
from ..core.grid import Grid
from ..core.guidance import Guidance
from ..core.loop import Event, walk
from ..core.model import Condition, Ledger, Model
from ..core.path import Prediction
from ..core.registry import get
from ..core.solver import Solver
from ..core.state import Inversion, State, stack


@dataclass
class Job:
    """An inversion to do.

    Attributes:
        model: the generative model.
        latents: (B, C, h, w) float64 data latents.
        condition: B source conditions.
        negative: B negative (usually empty) conditions.
        grid: the time grid to walk.
        guidance: the guidance scale that the way back will use.
        generator: the only source of noise (CPU generator).
        rule: how guidance combines predictions.
        ledger: where evaluations are counted.
        controls: further controls for the walk (an editor that records features).
    """

    model: Model
    latents: Tensor
    condition: Condition
    negative: Condition
    grid: Grid
    guidance: float
    generator: torch.Generator
    rule: Guidance | None = None
    ledger: Ledger = field(default_factory=Ledger)
    controls: Sequence[Control] = ()

    def denoiser(self, scale: float, told: float | None = None) -> Denoiser:
        """Denoiser of the source branch alone at the given guidance scale.

        A guidance-distilled model is `told` another embedded scale; None: that of the way back.
        """
        branch = Branch("source", self.condition.told(told), self.negative.told(told), scale)
        return Denoiser(self.model, [branch], guidance=self.rule, ledger=self.ledger)

    def scale(self, given: float | None) -> float:
        """Guidance scale of the way up; None takes that of the way back."""
        return self.guidance if given is None else given

    def climb(
        self, solver: Solver, grid: Grid, scale: float, *, told: float | None = None
    ) -> dict[str, Tensor]:
        """Walk the data up to noise with `solver`; return all N+1 states, clean first."""
        start = solver.start(self.latents)
        return self._trace(solver, start, grid, self.denoiser(scale, told), down=False)

    def descend(
        self, solver: Solver, state: State, grid: Grid, scale: float, *controls: Control
    ) -> dict[str, Tensor]:
        """Walk `state` down to data; return all N+1 states, clean first."""
        return self._trace(solver, state, grid, self.denoiser(scale), *controls, down=True)

    def _trace(
        self,
        solver: Solver,
        state: State,
        grid: Grid,
        denoiser: Denoiser,
        *controls: Control,
        down: bool,
    ) -> dict[str, Tensor]:
        states = [state]

        def keep(event: Event) -> None:
            states.append(event.state)

        walk(
            solver,
            denoiser,
            state,
            grid,
            down=down,
            controls=[*self.controls, *controls],
            observers=[keep],
            label="invert",
        )
        return stack(states[::-1] if down else states)

    def noise(self, count: int) -> Tensor:
        """`count` independent unit noises (count, B, C, h, w), the same for each image.

        Images of a batch share their noise, so that a batch does what its images do alone.
        """
        shape = (count, 1, *self.latents.shape[1:])
        drawn = torch.randn(shape, generator=self.generator, dtype=self.latents.dtype)
        return drawn.to(self.latents.device).expand(count, *self.latents.shape)

    def predict_each(
        self, x: Tensor, times: Sequence[float], scale: float, *, most: int = 64
    ) -> Prediction:
        """Guided predictions of independent states, batched over times and images.

        Args:
            x: (K, B, C, h, w) states of the source branch.
            times: their K path times.
            scale: guidance scale.
            most: network rows in one call.

        Returns:
            A prediction with faces (K, B, C, h, w).
        """
        images = x.shape[1]
        group = max(1, most // ((1 if scale == 1 else 2) * images))
        clock = torch.as_tensor(times, dtype=torch.float64).repeat_interleave(images)
        parts = []
        for states, at in zip(x.split(group), clock.split(group * images), strict=True):
            branch = Branch(
                "source", self.condition.tile(len(states)), self.negative.tile(len(states)), scale
            )
            denoise = Denoiser(self.model, [branch], guidance=self.rule, ledger=self.ledger)
            parts.append(denoise(states.flatten(0, 1), at))
        whole = Prediction(torch.cat([p.x0 for p in parts]), torch.cat([p.eps for p in parts]))
        return whole.map(lambda face: face.unflatten(0, (len(x), images)))

    def pack(
        self,
        method: str,
        options: Any,
        grid: Grid,
        states: dict[str, Tensor],
        **extras: Tensor,
    ) -> Inversion:
        """Pack what was found; `options` is the method's options dataclass."""
        return Inversion(
            method=method,
            options=asdict(options),
            model_name=self.model.name,
            fingerprint=self.model.fingerprint,
            grid=grid,
            states=states,
            condition=self.condition,
            negative=self.negative,
            guidance=self.guidance,
            extras=extras,
            model=self.model,
        )


@dataclass
class Replay:
    """How to come back from an inversion.

    Attributes:
        solver: the matching sampler.
        state: B rows to start from; tiled over the branches of an edit.
        control: the method's correction of the source branch, per-step conditions, ...
        source_branch: whether the way back needs the source branch beside the targets, even where
            the editor does not.
    """

    solver: Solver
    state: State
    control: Control = field(default_factory=Control)
    source_branch: bool = False


class Inverter(Protocol):
    """A way up (`invert`) and its way back (`replay`); holds options only."""

    def invert(self, job: Job) -> Inversion:
        """Take the job's latents to noise."""

    def replay(self, inversion: Inversion) -> Replay:
        """How generation returns from that inversion."""


def way_back(inversion: Inversion) -> Replay:
    """How generation returns from an inversion, by the method that made it, with its options."""
    method: Inverter = get("invert", inversion.method).make(**inversion.options)
    return method.replay(inversion)


@dataclass(frozen=True)
class ClimbOptions:
    """Options that all deterministic inverters share.

    Attributes:
        inversion_guidance: guidance scale on the way up (1: the source prompt alone).
        inversion_embedded: guidance that a guidance-distilled model (FLUX.1-dev) is told on the way
            up; None: that of the way back. Other models take no notice.
        strength: part of the grid that is walked, from the clean end; 1 goes all the way to noise.
    """

    inversion_guidance: float = 1.0
    inversion_embedded: float | None = 1.0
    strength: float = 1.0


class SolverInverter:
    """An inverter that is one solver, walked up and then down again."""

    name: str
    options: ClimbOptions

    def __init__(self, options: Any):
        self.options = options

    def solver(self) -> Solver:
        """The solver of both directions."""
        raise NotImplementedError

    def invert(self, job: Job) -> Inversion:
        """Walk up with the source prompt."""
        grid = job.grid.truncate(self.options.strength)
        scale, told = self.options.inversion_guidance, self.options.inversion_embedded
        states = job.climb(self.solver(), grid, scale, told=told)
        return job.pack(self.name, self.options, grid, states)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with the same solver."""
        return Replay(self.solver(), inversion.end())

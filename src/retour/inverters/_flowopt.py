r"""FlowOpt's iteration: fit the noise so that the whole sampler returns a given image.

With :math:`F` the deterministic sampler from some level down to data, and :math:`y` the data,

.. math:: z \leftarrow z - \eta\,(F(z) - y)

is gradient descent on :math:`\tfrac12 |F(z) - y|^2` whose Jacobian :math:`J_F^\top` is taken to be
the identity: no gradient is ever computed, and the fixed points are exactly the :math:`z` with
:math:`F(z) = y`. For two points with :math:`r = |F(u) - F(v)| / |u - v|` and :math:`c` the cosine
between :math:`F(u) - F(v)` and :math:`u - v`, one iteration changes their distance by

.. math:: \sqrt{1 - 2 \eta r c + \eta^2 r^2},

so it brings every pair closer if :math:`0 < \eta < \eta_{max} = \inf\, 2 \langle \Delta F, \Delta u
\rangle / |\Delta F|^2`. Where :math:`F` is affine with slope :math:`A` per dimension, the residual
shrinks by :math:`|1 - \eta A|`. Nothing guarantees :math:`c > 0` everywhere (guidance and borders
between modes break it); pairs without it bound nothing and are left out of the estimate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.grid import Grid
from ..core.guidance import Guidance
from ..core.loop import Observer, walk
from ..core.model import Ledger, Model
from ..core.progress import bar
from ..core.registry import get
from ..core.rows import along, rms
from ..core.state import State
from ..errors import check_range

REACH = (0.03, 0.3)
"""Sizes of the trial perturbations over that of the latents, in turn."""


@dataclass(frozen=True)
class Iterate:
    """What a monitor sees.

    Attributes:
        index: number of updates so far.
        z: latents at the noisy end (R, C, h, w).
        result: F(z), usable as it is.
        residual: (R,) root mean square of F(z) - y.
    """

    index: int
    z: Tensor
    result: Tensor
    residual: Tensor


Monitor = Callable[[Iterate], "bool | Tensor | None"]


@dataclass(frozen=True)
class SearchOptions:
    """Options of every search.

    Attributes:
        iterations: most updates of the noise.
        eta: step size; None: estimated for each image.
        fraction: of the largest converging step, if `eta` is estimated.
        probes: pairs that the estimate looks at in each round.
        rounds: of the estimate; each looks where F answered most in the one before.
        tolerance: an image whose residual (root mean square, in latents) is at most this is done.
        monitor: a callable that sees every :class:`Iterate`; True stops the search, a mask of its
            rows stops those.
    """

    iterations: int = 30
    eta: float | None = None
    fraction: float = 0.5
    probes: int = 2
    rounds: int = 3
    tolerance: float = 0.0
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        check_range("iterations", self.iterations, 0)
        if self.eta is not None:
            check_range("eta", self.eta, 0)
        check_range("fraction", self.fraction, 0)
        check_range("probes", self.probes, 1)
        check_range("rounds", self.rounds, 1)
        check_range("tolerance", self.tolerance, 0)


@dataclass(frozen=True)
class Search:
    """What the iteration found.

    Attributes:
        z: the last latents (R, C, h, w).
        residuals: (iterates, R) of every result that was computed.
        eta: (R,) step sizes used.
    """

    z: Tensor
    residuals: Tensor
    eta: Tensor


class Sampler:
    """F: from the time of index `depth` down to data by Euler's rule, counted on a ledger.

    Args:
        model: the generative model.
        branch: R conditions with their guidance.
        grid: the time grid.
        depth: index of the time that it starts at.
        rule: how guidance combines predictions.
        ledger: where evaluations are counted.
    """

    def __init__(
        self,
        model: Model,
        branch: Branch,
        grid: Grid,
        depth: int,
        *,
        rule: Guidance | None,
        ledger: Ledger,
    ):
        self.model, self.branch, self.grid, self.depth = model, branch, grid, depth
        self.rule, self.ledger = rule, ledger
        self.solver = get("solver", "ddim").make()

    def __call__(self, z: Tensor, observers: Sequence[Observer] = ()) -> Tensor:
        """Latents (k R, C, h, w), k copies of the rows one after the other -> data latents."""
        copies, branch = len(z) // len(self.branch.condition), self.branch
        uncond = None if branch.uncond is None else branch.uncond.tile(copies)
        tiled = Branch(branch.name, branch.condition.tile(copies), uncond, branch.scale)
        run = Denoiser(self.model, [tiled], guidance=self.rule, ledger=self.ledger)
        return walk(
            self.solver,
            run,
            State(z),
            self.grid,
            down=True,
            between=(0, self.depth),
            observers=observers,
        ).x


def normality(z: Tensor) -> dict[str, list[float]]:
    """Mean square and kurtosis of each row of `z`; of typical noise they are 1 and 3.

    What the search finds drifts from typical noise; forcing it back would cost the residual.
    """
    rows = z.flatten(1)
    spread = (rows - rows.mean(1, keepdim=True)).square()
    kurtosis = spread.square().mean(1) / spread.mean(1).square()
    return {"mean_square": rows.square().mean(1).tolist(), "kurtosis": kurtosis.tolist()}


def largest_step(
    flow: Callable[[Tensor], Tensor], z: Tensor, result: Tensor, noise: Tensor, rounds: int
) -> Tensor:
    """Estimate eta_max from pairs of `z` and perturbed copies of it.

    Random perturbations hardly ever point where F is steep, which is what bounds the step. So the
    changes of F that a round's perturbations made are the next round's perturbations, as in power
    iteration; two such rounds come within a few percent.

    Args:
        flow: F, for any number of copies of the rows.
        z: (R, C, h, w).
        result: F(z).
        noise: (P, R, C, h, w) first perturbations; the sizes `REACH` are used in turn.
        rounds: how often to look.

    Returns:
        (R,) the least bound of each row's pairs; 0 where none of them is one.
    """
    reach = torch.tensor([REACH[k % len(REACH)] for k in range(len(noise))]).to(z)
    size = reach[:, None] * rms(z)
    least = z.new_full((len(z),), torch.inf)
    for _ in range(rounds):
        step = size / noise.flatten(2).square().mean(2).sqrt()
        moved = z + along(step, noise) * noise
        noise = flow(moved.flatten(0, 1)).unflatten(0, moved.shape[:2]) - result
        bounds = pair_bound(moved - z, noise)
        least = torch.minimum(least, torch.where(bounds > 0, bounds, torch.inf).amin(0))
    if bool(least.isinf().any()):
        warnings.warn(
            f"no step size makes FlowOpt converge for {int(least.isinf().sum())} of {len(z)} "
            "latents, which stay as they are: use a smaller guidance or strength, or give eta",
            stacklevel=2,
        )
    return torch.where(least.isinf(), 0.0, least)


def pair_bound(du: Tensor, df: Tensor) -> Tensor:
    """``2 <dF, du> / |dF|^2`` of pairs (P, R, C, h, w): (P, R)."""
    inner = (df * du).flatten(2).sum(2)
    return 2 * inner / df.flatten(2).square().sum(2)


def search(
    flow: Callable[[Tensor], Tensor],
    z: Tensor,
    y: Tensor,
    options: SearchOptions,
    noise: Tensor,
) -> Search:
    """Update `z`; what F makes of the last one is the caller's to find.

    Args:
        flow: F, for any number of copies of the rows.
        z: (R, C, h, w) where to start.
        y: (R, C, h, w) data.
        options: of the search.
        noise: (P, R, C, h, w) unit perturbations for the estimate of the step.
    """
    result = None
    if options.eta is not None or options.iterations == 0:
        eta = z.new_full((len(z),), 0.0 if options.eta is None else options.eta)
    else:
        result = flow(z)
        eta = options.fraction * largest_step(flow, z, result, noise, options.rounds)
    going = torch.ones(len(z), dtype=torch.bool, device=z.device)
    step, residuals = along(eta, z), []
    with bar(range(options.iterations), options.iterations, "flowopt") as counted:
        for k in counted:
            result = flow(z) if result is None else result
            residuals.append(rms(result - y))
            going = going & (residuals[-1] > options.tolerance)
            if options.monitor is not None:
                answer = options.monitor(Iterate(k, z, result, residuals[-1]))
                going = going & ~_stopped(answer, z)
            if not bool(going.any()):
                break
            z = torch.where(along(going, z), z - step * (result - y), z)
            result = None
    return Search(z, torch.stack(residuals) if residuals else z.new_zeros(0, len(z)), eta)


def _stopped(answer: bool | Tensor | None, z: Tensor) -> Tensor:
    stop = torch.as_tensor(False if answer is None else answer, dtype=torch.bool)
    return stop.to(z.device).expand(len(z))

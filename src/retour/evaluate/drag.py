r"""Mean distance: did what was dragged arrive?

Of all pixels of the edited picture, the one that looks most like the handle is where the handle
went; its distance to the goal, in pixels, is averaged over the handles (DragBench's MD). What a
pixel looks like is described in two ways:

- :class:`Patches`: the picture around it, compared by mean square difference. Exact for what was
  moved as it is, blind to what changed its look; it needs no network.
- :class:`NetworkFeatures`: as DragBench does, features of a diffusion network at some noise level,
  averaged over draws of noise and enlarged to the picture, compared by cosine. The published metric
  takes Stable Diffusion 2.1's second upsampling block at t = 261; here it is the embedded UNet's,
  which needs no download, and its figures compare only with each other.

Pictures that are moved by whole pixels over an even ground are found again without any error by
the first, and to about one latent cell by the second.

Reference: Tang et al., "Emergent Correspondence from Image Diffusion", NeurIPS 2023, arXiv
2306.03881; Shi et al., "DragDiffusion: Harnessing Diffusion Models for Interactive Point-based
Image Editing", CVPR 2024, arXiv 2306.14435.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.features import FeatureCall, FeatureControl, watched
from ..core.branches import Branch, Denoiser
from ..core.model import FeatureSite, Model
from ..errors import RetourError

Point = tuple[float, float]
SIDE = 11
SITE = "up_blocks.1"
LEVEL = 0.261  # of the trained levels, as t = 261 of 1000
DRAWS = 8
SEED = 42


class Matcher(ABC):
    """Finds points of one picture in another.

    Attributes:
        name: what the figures are of.
    """

    name: str

    @abstractmethod
    def features(self, image: Tensor) -> Tensor:
        """Picture (3, H, W) in [0, 1] -> features (C, H, W) of its pixels."""

    @abstractmethod
    def likeness(self, one: Tensor, many: Tensor) -> Tensor:
        """How much each of `many` features (C, N) is like `one` (C,): (N,), larger is more."""

    def distances(
        self, source: Tensor, edited: Tensor, handles: Sequence[Point], goals: Sequence[Point]
    ) -> list[float]:
        """How far each handle of `source` ends from its goal in `edited`, in pixels.

        Args:
            source: (3, H, W) in [0, 1].
            edited: picture of the same size.
            handles: (x, y) in pixels.
            goals: where they should be.

        Raises:
            RetourError: pictures of different sizes, or a handle outside of them.
        """
        if source.shape != edited.shape:
            raise RetourError(
                f"cannot find points between pictures of shapes {tuple(source.shape)} and "
                f"{tuple(edited.shape)}: resize the edited one to the source's size"
            )
        found = self.matches(self.features(source), self.features(edited), handles)
        return [
            ((x - goal_x) ** 2 + (y - goal_y) ** 2) ** 0.5
            for (x, y), (goal_x, goal_y) in zip(found, goals, strict=True)
        ]

    def matches(
        self, source: Tensor, edited: Tensor, handles: Sequence[Point]
    ) -> list[tuple[int, int]]:
        """Where handles of features (C, H, W) are found again, (x, y); of equals the first."""
        height, width = source.shape[-2:]
        places = []
        for x, y in handles:
            column, row = round(x), round(y)
            if not (0 <= column < width and 0 <= row < height):
                raise RetourError(
                    f"the handle {x:g},{y:g} lies outside of the picture, {width} x {height} pixels"
                )
            place = int(self.likeness(source[:, row, column], edited.flatten(1)).argmax())
            places.append((place % width, place // width))
        return places


class Patches(Matcher):
    """What surrounds a pixel.

    Args:
        side: of the square, in pixels, odd; beyond the border the outermost pixel goes on.
    """

    def __init__(self, side: int = SIDE):
        if side < 1 or side % 2 == 0:
            raise RetourError(f"the side of a patch must be odd, got {side}")
        self.side, self.name = side, f"{side} x {side} patches"

    def features(self, image: Tensor) -> Tensor:
        """(3 side^2, H, W)."""
        margin = self.side // 2
        wide = F.pad(image[None].double(), [margin] * 4, mode="replicate")
        return F.unfold(wide, self.side)[0].unflatten(-1, image.shape[-2:])

    def likeness(self, one: Tensor, many: Tensor) -> Tensor:
        """Minus the mean square difference."""
        return -(many - one[:, None]).square().mean(0)


class NetworkFeatures(Matcher):
    """What a diffusion network makes of a pixel.

    Args:
        model: whose network; the embedded `emoji-unet`, say.
        site: name of the module whose output is the description.
        level: noise level, as a fraction of the path's times.
        draws: noises averaged.
        seed: of the noises.
    """

    def __init__(
        self,
        model: Model,
        *,
        site: str = SITE,
        level: float = LEVEL,
        draws: int = DRAWS,
        seed: int = SEED,
    ):
        self.model, self.site, self.draws, self.seed = model, site, draws, seed
        low, high = model.path.t_clean, model.path.t_noise
        self.t = float(low + level * (high - low))
        self.name = f"{model.name} {site}"
        if site not in {s.name for s in model.feature_sites()}:
            raise RetourError(f"model {model.name!r} has no features called {site!r}")

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """(C, H, W), of the empty prompt."""
        latents = self.model.encode(image[None] * 2 - 1)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.draws, *latents.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(latents)
        x = self.model.path.add_noise(latents.expand(shape), noise, self.t)
        keep = _Keep(self.site)
        denoiser = Denoiser(self.model, [Branch("source", self.model.embed([""] * self.draws))])
        with watched(denoiser, [keep]):
            denoiser(x, self.t)
        mean = keep.found.mean(0, keepdim=True).double()
        return F.interpolate(mean, image.shape[-2:], mode="bilinear")[0]

    def likeness(self, one: Tensor, many: Tensor) -> Tensor:
        """Cosine."""
        return F.normalize(one, dim=0) @ F.normalize(many, dim=0)


class _Keep(FeatureControl):
    def __init__(self, name: str):
        self.name = name
        self.found = torch.empty(0)

    def wants(self, site: FeatureSite) -> bool:
        return site.name == self.name

    def output(self, call: FeatureCall, value: Tensor) -> Tensor:
        self.found = value.detach()
        return value

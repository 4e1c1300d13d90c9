r"""Linear degradations: what a camera, a scratch or a small file did to a picture.

A measurement is :math:`y = A x + \sigma n`. Every operator acts on images (B, C, H, W) of any size
that it divides, in any float dtype, and knows

- `forward`, :math:`A x`, and `adjoint`, :math:`A^\top y`, with
  :math:`\langle A x, y\rangle = \langle x, A^\top y\rangle`;
- `pinv`, the Moore-Penrose :math:`A^+ y`, where it is cheap; singular values below `cutoff` times
  the largest are left out, which is a truncated SVD;
- `norm`, :math:`\|A\|_2`;
- `observe`, how a degraded *picture* is read as a measurement, and `guess`, the plain picture that
  a measurement looks like (bicubic enlargement, the blurred picture itself, a hole filled
  smoothly).

Operators whose rows and columns are degraded alike are two small matrices, :math:`A = W_h \otimes
W_w`, so that their norm and pseudo-inverse are exact: :math:`A^+ = W_h^+ \otimes W_w^+`.

Pictures are in [-1, 1] here as everywhere inside retour: a hole filled with zeros is grey. Blurs
reflect at the border, as pictures taken of something do; ``boundary="zero"`` is what FlowChef's
experiments use, ``"circular"`` what Fourier methods assume.

A class decorated with `@operator(name)` is a task of `retour restore` and a subject of the tests.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.registry import parse_fields
from ..errors import RetourError, check_range, unknown
from ._matrices import (
    Boundary,
    average_matrix,
    bicubic_matrix,
    border_matrix,
    filled,
    gaussian_matrix,
    line_kernel,
)

LUMA = (0.299, 0.587, 0.114)
CUTOFF = 1e-9
POWER_STEPS = 100

OPERATORS: dict[str, type[Operator]] = {}
C = TypeVar("C", bound="type[Operator]")


def operator(name: str) -> Callable[[C], C]:
    """Class decorator: list an operator under the name of the task that undoes it."""

    def add(cls: C) -> C:
        cls.name = name
        OPERATORS[name] = cls
        return cls

    return add


def make_operator(name: str, **options: Any) -> Operator:
    """Make an operator by name; strings are parsed. `inpaint` takes its mask: make it yourself."""
    cls = operator_class(name)
    if cls is Inpaint:
        raise RetourError("'inpaint' is made of a mask of known pixels and takes no options")
    found: Operator = parse_fields(name, cls, options)
    return found


def operator_class(name: str) -> type[Operator]:
    """The operator of a task; an unknown name is refused with the nearest ones."""
    if name not in OPERATORS:
        raise unknown("operator", name, OPERATORS)
    return OPERATORS[name]


class Operator(ABC):
    """A linear map from images to measurements.

    Attributes:
        name: of the task that undoes it.
        scale: how many times larger, per edge, the image is than the measurement.
        invertible: whether `pinv` is offered.
    """

    name: ClassVar[str]
    scale: int = 1
    invertible: ClassVar[bool] = True

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Measure images (B, C, H, W)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the transpose to measurements; (B, C, H, W)."""

    def pinv(self, y: Tensor, cutoff: float = CUTOFF) -> Tensor:
        """Pseudo-inverse of measurements; (B, C, H, W)."""
        raise RetourError(f"operator {self.name!r} has no cheap pseudo-inverse")

    def norm(self, shape: tuple[int, ...]) -> float:
        """Spectral norm on images (C, H, W), by power iteration unless it is known."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        for _ in range(POWER_STEPS):
            x = self.adjoint(self.forward(x / x.norm()))
        return math.sqrt(float(x.norm()))

    def measure(
        self, x: Tensor, noise: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Degrade images (B, C, H, W).

        Args:
            x: the images.
            noise: standard deviation of the noise added, on the scale [-1, 1].
            generator: where it comes from; the images of a batch share it.
        """
        y = self.forward(x)
        if noise == 0:
            return y
        drawn = torch.randn(y.shape[1:], generator=generator, dtype=torch.float64)
        return y + noise * drawn.to(y)

    def observe(self, pictures: Tensor) -> Tensor:
        """Read degraded pictures (B, 3, h, w) as measurements."""
        return pictures

    def guess(self, y: Tensor) -> Tensor:
        """Show measurements as pictures (B, 3, H, W)."""
        return y

    def check(self, size: tuple[int, int]) -> None:
        """Refuse an image size (H, W) that it cannot measure."""
        if size[0] % self.scale or size[1] % self.scale:
            raise RetourError(
                f"operator {self.name!r} needs image sides in multiples of {self.scale}, got "
                f"{size[1]} x {size[0]} (width x height)"
            )


@operator("identity")
@dataclass(frozen=True)
class Identity(Operator):
    """Nothing but noise: denoising."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """`y` itself."""
        return y

    def pinv(self, y: Tensor, cutoff: float = CUTOFF) -> Tensor:
        """`y` itself."""
        return y

    def norm(self, shape: tuple[int, ...]) -> float:
        """One."""
        return 1.0


@operator("inpaint")
class Inpaint(Operator):
    """Pixels are missing.

    Args:
        known: (H, W) or (B, 1, H, W), 1 where the picture is known, 0 where it is missing.
    """

    def __init__(self, known: Tensor):
        self.known = torch.as_tensor(known)
        values = self.known.unique().tolist()
        if not set(values) <= {0, 1} or not any(values):
            raise RetourError("the mask of known pixels must hold ones, and else zeros only")

    def forward(self, x: Tensor) -> Tensor:
        """Zero what is missing."""
        self.check((x.shape[-2], x.shape[-1]))
        return x * self.known.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """The same: a projection."""
        return self.forward(y)

    def pinv(self, y: Tensor, cutoff: float = CUTOFF) -> Tensor:
        """The same."""
        return self.forward(y)

    def norm(self, shape: tuple[int, ...]) -> float:
        """One."""
        return 1.0

    def observe(self, pictures: Tensor) -> Tensor:
        """Whatever the picture shows in the hole is no measurement."""
        return self.forward(pictures)

    def guess(self, y: Tensor) -> Tensor:
        """Known pixels, continued smoothly into the hole."""
        known = self.known.to(y).expand(len(y), 1, *y.shape[-2:])
        return filled(y * known, known)

    def check(self, size: tuple[int, int]) -> None:
        """Refuse images of another size than the mask's."""
        height, width = self.known.shape[-2:]
        if size != (height, width):
            raise RetourError(
                f"the mask is {width} x {height}, the image {size[1]} x {size[0]}: give a mask of "
                "the image's size"
            )


class Separable(Operator):
    """Rows and columns degraded alike, by one small matrix for each length."""

    @abstractmethod
    def matrix(self, length: int) -> Tensor:
        """(m, `length`) float64 matrix of one axis."""

    def forward(self, x: Tensor) -> Tensor:
        r""":math:`W_h x W_w^\top`."""
        self.check((x.shape[-2], x.shape[-1]))
        rows, columns = (self.matrix(n).to(x) for n in x.shape[-2:])
        return rows @ x @ columns.mT

    def adjoint(self, y: Tensor) -> Tensor:
        r""":math:`W_h^\top y W_w`."""
        rows, columns = (self.matrix(n * self.scale).to(y) for n in y.shape[-2:])
        return rows.mT @ y @ columns

    def pinv(self, y: Tensor, cutoff: float = CUTOFF) -> Tensor:
        r""":math:`W_h^+ y (W_w^+)^\top`."""
        rows, columns = (
            torch.linalg.pinv(self.matrix(n * self.scale), rtol=cutoff).to(y) for n in y.shape[-2:]
        )
        return rows @ y @ columns.mT

    def norm(self, shape: tuple[int, ...]) -> float:
        """Product of the two matrices' norms."""
        return math.prod(float(torch.linalg.matrix_norm(self.matrix(n), 2)) for n in shape[-2:])


@operator("sr")
@dataclass(frozen=True)
class SuperResolution(Separable):
    """The picture was made smaller.

    Attributes:
        scale: how many times, per edge.
        kernel: ``average`` of scale x scale pixels, or antialiased ``bicubic``.
    """

    scale: int = 4
    kernel: Literal["average", "bicubic"] = "average"

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise RetourError(f"scale must be at least 1, got {self.scale}")

    def matrix(self, length: int) -> Tensor:
        """Averaging or bicubic weights."""
        make = {"average": average_matrix, "bicubic": bicubic_matrix}[self.kernel]
        return make(length, self.scale)

    def guess(self, y: Tensor) -> Tensor:
        """Bicubic enlargement."""
        return F.interpolate(y, scale_factor=self.scale, mode="bicubic")


@operator("deblur")
@dataclass(frozen=True)
class GaussianBlur(Separable):
    """Out of focus.

    Attributes:
        sigma: standard deviation of the kernel, in pixels.
        width: of the kernel, in pixels, odd.
        boundary: what lies beyond the border.
    """

    sigma: float = 1.0
    width: int = 11
    boundary: Boundary = "reflect"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise RetourError(f"sigma of a blur must be above 0, got {self.sigma}")
        if self.width < 1 or self.width % 2 == 0:
            raise RetourError(f"width of a kernel must be odd and at least 1, got {self.width}")

    def check(self, size: tuple[int, int]) -> None:
        """Refuse a kernel that no picture of this size shows."""
        super().check(size)
        check_range("width", self.width, 1, 2 * max(size) + 1)

    def matrix(self, length: int) -> Tensor:
        """Banded Gaussian weights."""
        return gaussian_matrix(length, self.sigma, self.width, self.boundary)


class Convolution(Operator):
    """Every channel convolved with one kernel (h, w) of odd sides."""

    invertible = False
    boundary: Boundary

    @property
    @abstractmethod
    def kernel(self) -> Tensor:
        """(h, w) float64."""

    def forward(self, x: Tensor) -> Tensor:
        """Extend beyond the border, then convolve."""
        rows, columns = self._borders(x)
        return _correlate(rows @ x @ columns.mT, self.kernel.flip(0, 1))

    def adjoint(self, y: Tensor) -> Tensor:
        """Correlate, then fold the border back."""
        rows, columns = self._borders(y)
        high, wide = self.kernel.shape
        spread = F.pad(y, (wide - 1, wide - 1, high - 1, high - 1))
        return rows.mT @ _correlate(spread, self.kernel) @ columns

    def _borders(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(x.shape[-2:], self.kernel.shape, strict=True)
        rows, columns = (border_matrix(n, k // 2, self.boundary).to(x) for n, k in pairs)
        return rows, columns


def _correlate(x: Tensor, kernel: Tensor) -> Tensor:
    channels = x.shape[1]
    weight = kernel.to(x).expand(channels, 1, *kernel.shape)
    return F.conv2d(x, weight, groups=channels)


@operator("motion")
@dataclass(frozen=True)
class MotionBlur(Convolution):
    """The camera moved.

    Attributes:
        length: of the track, in pixels.
        angle: of the track in degrees, 0 along the rows, counterclockwise.
        boundary: what lies beyond the border.
    """

    length: float = 9.0
    angle: float = 30.0
    boundary: Boundary = "reflect"

    def __post_init__(self) -> None:
        if not 1 <= self.length < math.inf:
            raise RetourError(f"length of a motion must be at least 1 pixel, got {self.length}")
        if not math.isfinite(self.angle):
            raise RetourError(f"angle of a motion must be a number of degrees, got {self.angle}")

    def check(self, size: tuple[int, int]) -> None:
        """Refuse a track that no picture of this size shows."""
        super().check(size)
        check_range("length", self.length, 1, 2 * max(size))

    @property
    def kernel(self) -> Tensor:
        """A line."""
        return line_kernel(self.length, self.angle)


@operator("colour")
@dataclass(frozen=True)
class Grey(Operator):
    """Colour is lost: the luma of ITU-R BT.601 is measured."""

    @property
    def weights(self) -> Tensor:
        """(3,) float64."""
        return torch.tensor(LUMA, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W)."""
        return torch.einsum("c,bchw->bhw", self.weights.to(x), x)[:, None]

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 3, H, W)."""
        return self.weights.to(y)[:, None, None] * y

    def pinv(self, y: Tensor, cutoff: float = CUTOFF) -> Tensor:
        """The adjoint over the squared norm."""
        return self.adjoint(y) / float(self.weights.square().sum())

    def norm(self, shape: tuple[int, ...]) -> float:
        """That of the weights."""
        return float(self.weights.norm())

    def observe(self, pictures: Tensor) -> Tensor:
        """Their luma."""
        return self.forward(pictures)

    def guess(self, y: Tensor) -> Tensor:
        """A grey picture."""
        return y.expand(-1, 3, -1, -1)

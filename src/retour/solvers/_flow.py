r"""Flow coordinates, in which every path is the linear flow and Euler is DDIM.

.. math:: y = \frac{x}{\alpha+\sigma}, \quad u = \frac{\sigma}{\alpha+\sigma}
          \;\Rightarrow\; y_u = (1-u)\,x_0 + u\,\epsilon, \quad \frac{dy}{du} = V = E - X.

Both ends are ordinary points (:math:`u=0` clean, :math:`u=1` pure noise), so a solver written in
:math:`(y, u)` needs no guard at :math:`\sigma=0` or :math:`\alpha=0`.
"""

from __future__ import annotations

from torch import Tensor

from ..core.path import Path, levels
from ..core.solver import Denoise


def enter(path: Path, x: Tensor, t: float) -> Tensor:
    """Latents at time `t` -> flow coordinates."""
    alpha, sigma = levels(path, t, x)
    return x / (alpha + sigma)


def leave(path: Path, y: Tensor, t: float) -> Tensor:
    """Flow coordinates -> latents at time `t`."""
    alpha, sigma = levels(path, t, y)
    return y * (alpha + sigma)


def clock(path: Path, t: float) -> float:
    """Flow time `u` in [0, 1] of the path's time `t`."""
    return float(path.flow_time(t))


def velocity(denoise: Denoise, path: Path, y: Tensor, t: float) -> Tensor:
    """Flow velocity `V = E - X` at the point with flow coordinates `y` and path time `t`."""
    return denoise(leave(path, y, t), t).velocity

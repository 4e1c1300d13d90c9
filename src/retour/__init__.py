"""retour: take anything back through a generative model, and return with an edit.

The names below are loaded when first used, so that `import retour` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Result as Result
    from .api import cite as cite
    from .api import edit as edit
    from .api import invert as invert
    from .api import methods as methods
    from .api import reconstruct as reconstruct
    from .core.state import Inversion as Inversion
    from .dragging import Drag as Drag
    from .dragging import drag as drag
    from .errors import RetourError as RetourError
    from .explanation import explain as explain
    from .models.load import embedded as embedded
    from .models.load import load as load
    from .privacy.run import attack as attack
    from .restorers.run import restore as restore
    from .restorers.run import steer as steer

__version__ = "0.1.0"

_WHERE = {
    "Result": "api",
    "attack": "privacy.run",
    "cite": "api",
    "Drag": "dragging",
    "drag": "dragging",
    "edit": "api",
    "explain": "explanation",
    "invert": "api",
    "methods": "api",
    "reconstruct": "api",
    "restore": "restorers.run",
    "steer": "restorers.run",
    "Inversion": "core.state",
    "RetourError": "errors",
    "embedded": "models.load",
    "load": "models.load",
}

__all__ = ["__version__", *sorted(_WHERE)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "privacy":
        return importlib.import_module(".privacy", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module 'retour' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})

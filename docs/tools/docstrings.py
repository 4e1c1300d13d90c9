"""Lets mkdocstrings read the docstrings of the sources: roles and formulas become Markdown."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object
from markup import from_docstring


class Roles(Extension):
    """Translates every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = from_docstring(obj.docstring.value)

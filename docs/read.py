"""For `mkdocs.yml`: how the source is read for the API's pages."""

import re
from typing import Any

import griffe

LINK = re.compile(r"`([^`<>]+?)\s*<([^`<>\s]+)>`_")


class Read(griffe.Extension):
    """Sphinx's links as Markdown's, and defaults that are constants as their values."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for everything that it has read."""
        if obj.docstring:
            obj.docstring.value = LINK.sub(_as_markdown, obj.docstring.value)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                constant = obj.module.members.get(str(parameter.default))
                if isinstance(constant, griffe.Attribute):
                    parameter.default = constant.value


def _as_markdown(found: re.Match[str]) -> str:
    title = " ".join(found[1].split())
    return f"[{title}]({found[2]})"

"""For `mkdocs.yml`: the links of docstrings, which are Sphinx's, as Markdown's."""

import re
from typing import Any

import griffe

LINK = re.compile(r"`([^`<>]+?)\s*<([^`<>\s]+)>`_")


class Links(griffe.Extension):
    """Rewrites `` `Title <url>`_ `` as `[Title](url)` before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for everything that it has read."""
        if obj.docstring:
            title = lambda found: " ".join(found[1].split())
            obj.docstring.value = LINK.sub(
                lambda found: f"[{title(found)}]({found[2]})", obj.docstring.value
            )

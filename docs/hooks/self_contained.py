"""Warn of a page that loads anything from another host: readers may have no network. A strict build then fails."""

import logging
import re
from typing import Any

LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]*""")
LINKED = re.compile(r"""<link\b[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]*""")

log = logging.getLogger("mkdocs.hooks.self_contained")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Look at one finished page."""
    for tag in loads_from_elsewhere(output):
        log.warning("%s loads from another host: %s", page.file.src_uri, tag)
    return output


def loads_from_elsewhere(html: str) -> list[str]:
    """Return the tags of a page that load a script, a style, a font or a picture from another host."""
    return [*LOADED.findall(html), *LINKED.findall(html)]

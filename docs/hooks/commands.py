"""The page of the command line: the place `<!-- commands -->` becomes what `--help` says of every command."""

import re
from typing import Any

import typer
import typer.main
from typer.cli import get_docs_for_click

from attnres_rewrite.cli.app import app

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the place, where a page has it."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """Return the commands as Markdown, from the objects that print `--help`."""
    group = typer.main.get_command(app)
    name = "attnres-rewrite"
    text = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name=name), name=name)
    text = text.split("\n", 1)[1]  # the page has a title of its own
    text = text.replace(f"## `{name} ", "## `")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)  # cut short there, whole below
    # a paragraph for each example becomes one block of code
    text = re.sub(rf"^  ({name} .*)\n\n(?=  {name} )", r"    \1\n", text, flags=re.MULTILINE)
    text = re.sub(rf"^  ({name} )", r"    \1", text, flags=re.MULTILINE)
    return "\n".join(_without_tags(line) for line in text.split("\n"))


def _without_tags(line: str) -> str:
    """Escape `<` outside of code, where Markdown takes it for HTML."""
    parts = line.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)

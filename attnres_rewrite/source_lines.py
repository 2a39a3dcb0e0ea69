"""How a source line is shown. Imports nothing, so that the command line stays light."""

from pathlib import Path


def place(source_line: str) -> str:
    """Shorten "file:line" to what tells files apart: below here, or below the packages."""
    if not source_line:
        return "?"
    path = Path(source_line)
    if "site-packages" in path.parts:
        return str(Path(*path.parts[path.parts.index("site-packages") + 1 :]))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source_line

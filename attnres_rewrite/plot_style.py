"""How plots look: on paper, and the SVG of a plot -> the same in the colours of its reader, light or dark.

    style="stroke: #0072b2"   ->   style="stroke: var(--c0072b2)", which a <style> of the picture has for both schemes

A picture in a page knows the scheme of the page, so this needs neither a script nor a style of the page itself.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "savefig.dpi": 300,
    "svg.hashsalt": "attnres",  # the same diagnosis gives the same file
}

# drawn in this and not in black, which SVG takes for granted and does not write, and which lines on cells keep
INK = "#1d2126"
BAND, GREY = "#eeeeee", "#999999"
# of the palette of Okabe and Ito
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
DARK = {
    INK: "#e6e8eb",
    BAND: "#2b323b",
    GREY: "#a2abb6",
    BLUE: "#56b4e9",
    VERMILION: "#f0a04b",
    GREEN: "#2fc79b",
}
# parameters of matplotlib, beside which a figure has no background of its own
ON_A_PAGE: "dict[RcKeyType, Any]" = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}


def follow_scheme(svg: str) -> str:
    """Let the colours of `DARK` follow the scheme; any other stays as it is."""
    light = "".join(f"--c{colour[1:]}:{colour};" for colour in DARK)
    dark = "".join(f"--c{colour[1:]}:{other};" for colour, other in DARK.items())
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    named = re.sub("|".join(DARK), lambda found: f"var(--c{found[0][1:]})", svg)
    return re.sub(r"<svg\b[^>]*>", lambda found: found[0] + style, named, count=1)


def follows_scheme(svg: str) -> bool:
    """Say whether a picture has colours for both schemes."""
    return "prefers-color-scheme" in svg

"""Mirrors attnres_rewrite/plot_style.py: what follows the scheme, and that it can be seen."""

import re
from pathlib import Path

import pytest

from attnres_rewrite import plot_style
from attnres_rewrite.plot_style import BAND, DARK, INK, follow_scheme, follows_scheme

CARDS = {"light": "#ffffff", "dark": "#1b1f25"}


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, as WCAG 2 defines it."""
    dark, bright = sorted(map(luminance, (one, other)))
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_become_names_and_others_stay():
    svg = '<?xml version="1.0"?><svg width="1"><path style="fill: #0072b2; stroke: #000000"/></svg>'
    found = follow_scheme(svg)
    assert found.startswith('<?xml version="1.0"?><svg width="1"><style>svg{')
    assert found.endswith('</style><path style="fill: var(--c0072b2); stroke: #000000"/></svg>')
    assert "@media(prefers-color-scheme:dark){svg{" in found
    assert "--c0072b2:#0072b2;" in found
    assert "--c0072b2:#56b4e9;" in found
    assert follows_scheme(found)
    assert not follows_scheme(svg)


@pytest.mark.parametrize(("light", "dark"), [pair for pair in DARK.items() if pair[0] != BAND])
def test_what_is_drawn_can_be_seen_on_a_dark_card_and_on_a_band(light, dark):
    least = 4.5 if light == INK else 3  # WCAG 2: of text, of graphics
    assert min(contrast(dark, CARDS["dark"]), contrast(dark, DARK[BAND])) >= least


def test_text_can_be_read_on_a_light_card():
    assert contrast(INK, CARDS["light"]) >= 4.5


def test_the_cards_are_those_of_the_page():
    style = (Path(plot_style.__file__).parent / "page" / "report.css").read_text()
    assert re.findall(r"--card: (#\w+)", style)[:2] == list(CARDS.values())

"""Draw a Sketch as SVG text. Colours are classes, which the page's style sheet gives for light and dark."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from attnres_rewrite.page.sketch import Box, Sketch, Wire

BOX_WIDTH, BOX_HEIGHT, INPUT_HEIGHT, GAP = 236, 44, 40, 20
LANE, MARGIN = 15, 10
TITLE_LENGTH, NOTE_LENGTH = 30, 38
LEFT_TINTS = ("stream", "root", "block", "partial")


@dataclass(frozen=True, slots=True)
class _Line:
    """All wires of one value: from one box, in a lane beside the column, to every reader that is not the next box."""

    start: int
    ends: tuple[int, ...]
    tint: str
    is_left: bool


def draw(sketch: Sketch, name: str, title: str) -> str:
    """Return an <svg> element.

    Args:
        sketch: The boxes and wires.
        name: Prefix of the ids, which must differ between the drawings of one page.
        title: What the drawing shows, for those who do not see it.
    """
    lines = _lines(sketch)
    lanes = _lanes(lines)
    left = max((lane + 1 for line, lane in lanes.items() if line.is_left), default=0) * LANE
    right = max((lane + 1 for line, lane in lanes.items() if not line.is_left), default=0) * LANE
    column = _Column(MARGIN + left, _tops(sketch.boxes))
    width, height = column.x + BOX_WIDTH + right + MARGIN, column.tops[-1] + BOX_HEIGHT + MARGIN
    body = [_straight(wire, sketch.boxes, column) for wire in sketch.wires if _is_straight(wire)]
    body += _lane_paths(lanes, sketch.boxes, column)
    body += [_box(box, column.x, top) for box, top in zip(sketch.boxes, column.tops, strict=True)]
    described = "; ".join(f"{box.title}: {box.note}" for box in sketch.boxes)
    return (
        f'<svg class="sketch" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">From top to bottom: {escape(described)}.</desc>{"".join(body)}</svg>'
    )


@dataclass(frozen=True, slots=True)
class _Column:
    x: int
    tops: Sequence[int]


def _tops(boxes: Sequence[Box]) -> list[int]:
    tops: list[int] = []
    y = MARGIN
    for box, after in zip(boxes, [*boxes[1:], None], strict=True):
        tops.append(y)
        y += _height(box) + (GAP // 2 if after is not None and after.kind == "input" else GAP)
    return tops


def _height(box: Box) -> int:
    return INPUT_HEIGHT if box.kind == "input" else BOX_HEIGHT


def _is_straight(wire: Wire) -> bool:
    return wire.end == wire.start + 1


def _lines(sketch: Sketch) -> list[_Line]:
    values: dict[tuple[int, str, bool], list[Wire]] = {}
    for wire in sketch.wires:
        if not _is_straight(wire):
            values.setdefault((wire.start, wire.port, wire.tint in LEFT_TINTS), []).append(wire)
    return [
        _Line(start, tuple(sorted(wire.end for wire in wires)), wires[0].tint, is_left)
        for (start, _, is_left), wires in values.items()
    ]


def _lanes(lines: Iterable[_Line]) -> dict[_Line, int]:
    """Give each line the lane nearest to the column that is free along its whole length, short lines first."""
    taken: dict[tuple[bool, int], list[_Line]] = {}
    lanes: dict[_Line, int] = {}
    for line in sorted(lines, key=lambda line: (line.ends[-1] - line.start, line.start)):
        lane = 0
        while any(_overlap(line, other) for other in taken.get((line.is_left, lane), [])):
            lane += 1
        taken.setdefault((line.is_left, lane), []).append(line)
        lanes[line] = lane
    return lanes


def _overlap(one: _Line, other: _Line) -> bool:
    return one.start < other.ends[-1] and other.start < one.ends[-1]


def _lane_paths(lanes: Mapping[_Line, int], boxes: Sequence[Box], column: _Column) -> list[str]:
    """Draw every line: out of its box, along its lane, and into each reader, at a height of its own there."""
    ordered = sorted(lanes, key=lambda line: -lanes[line])
    paths: list[str] = []
    for line in ordered:
        away = -1 if line.is_left else 1
        edge = column.x if line.is_left else column.x + BOX_WIDTH
        lane = edge + away * (LANE * lanes[line] + LANE - 3)
        heights = [_tap_height(line, end, ordered, boxes, column) for end in line.ends]
        taps = "".join(f"M{lane} {height}H{edge + 5 * away}" for height in heights)
        way = f"M{edge} {_start_height(boxes[line.start], column.tops[line.start])}H{lane}V{heights[-1]}{taps}"
        heads = "".join(_head(edge, height, -away) for height in heights)
        paths.append(f'<g class="wire {line.tint}"><path class="halo" d="{way}"/><path d="{way}"/>{heads}</g>')
    return paths


def _start_height(box: Box, top: int) -> int:
    # below what comes in, but for an input, which nothing comes into
    return top + round(_height(box) * (0.5 if box.kind == "input" else 0.82))


def _tap_height(line: _Line, end: int, lines: Sequence[_Line], boxes: Sequence[Box], column: _Column) -> int:
    into = [other for other in lines if other.is_left == line.is_left and end in other.ends]
    share = (into.index(line) + 1) / (len(into) + 1)
    return column.tops[end] + round(_height(boxes[end]) * 0.72 * share + 2)


def _head(x: int, y: int, direction: int) -> str:
    """Draw the point of an arrow that ends at (x, y), going right (1) or left (-1)."""
    back = x - 7 * direction
    return f'<path class="head" d="M{x} {y}L{back} {y - 4}V{y + 4}Z"/>'


def _straight(wire: Wire, boxes: Sequence[Box], column: _Column) -> str:
    x = column.x + BOX_WIDTH // 2
    top, bottom = column.tops[wire.start] + _height(boxes[wire.start]), column.tops[wire.end]
    return (
        f'<g class="wire {wire.tint}"><path d="M{x} {top}V{bottom - 5}"/>'
        f'<path class="head" d="M{x} {bottom}L{x - 4} {bottom - 7}H{x + 4}Z"/></g>'
    )


def _box(box: Box, x: int, y: int) -> str:
    height = _height(box)
    middle = x + BOX_WIDTH // 2
    hint = f"<title>{escape(f'{box.title}: {box.note}')}</title>"
    tint = f" {box.tint}" if box.kind == "input" else ""
    return (
        f'<g class="box {box.kind}{tint}">{hint}<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{height}" '
        f'rx="{height // 2 if box.kind in ("input", "output") else 7}"/>'
        f'<text x="{middle}" y="{y + height // 2 - 4}" class="name">{escape(_short(box.title, TITLE_LENGTH))}</text>'
        f'<text x="{middle}" y="{y + height // 2 + 12}" class="note">{escape(_short(box.note, NOTE_LENGTH))}</text></g>'
    )


def _short(text: str, length: int) -> str:
    """Cut the middle out of a long text: its ends tell names apart."""
    if len(text) <= length:
        return text
    keep = length - 1
    return f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"

"""Draw accuracy against budget as SVG, without a plotting library: a few lines in a few panels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 430, 280  # of a panel's plot
LEFT, TOP, RIGHT, BOTTOM = 50, 40, 20, 60
LEGEND_ROW = 18
FONT = 'font-family="sans-serif" font-size="12" fill="#222"'


@dataclass(frozen=True)
class Line:
    """Accuracy by budget; the point at budget 0 is `link`."""

    label: str
    color: str
    is_dashed: bool
    points: list[tuple[float, float]]
    none: float  # accuracy without anything recomputed: a ring beside the axis
    full: float  # accuracy of the full prefill: a thin line across


@dataclass(frozen=True)
class Panel:
    """One model's plot."""

    title: str
    lines: list[Line]


def draw(panels: list[Panel]) -> str:
    """Return the SVG."""
    wide = len(panels) * (LEFT + WIDTH + RIGHT)
    high = TOP + HEIGHT + BOTTOM + LEGEND_ROW * max(len(panel.lines) for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * (LEFT + WIDTH + RIGHT) + LEFT} {TOP})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> Iterator[str]:
    yield f'<text x="0" y="-15" {FONT} font-weight="bold">{escape(panel.title)}</text>'
    for percent in range(0, 101, 20):
        x, y = _place(percent / 100, percent / 100)
        yield f'<line x1="0" y1="{y}" x2="{WIDTH}" y2="{y}" stroke="#ddd"/>'
        yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end" {FONT}>{percent}%</text>'
        yield f'<text x="{x}" y="{HEIGHT + 18}" text-anchor="middle" {FONT}>{percent}%</text>'
    caption = "budget of query (at 0: link; ring: none; thin line: full prefill)"
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT + 38}" text-anchor="middle" {FONT}>{caption}</text>'
    for number, line in enumerate(panel.lines):
        yield from _line(line)
        y = HEIGHT + 38 + LEGEND_ROW * (number + 1)
        yield f'<line x1="0" y1="{y - 4}" x2="30" y2="{y - 4}" {_stroke(line)}/>'
        yield f'<text x="38" y="{y}" {FONT}>{escape(line.label)}</text>'


def _line(line: Line) -> Iterator[str]:
    places = [_place(*point) for point in line.points]
    y = _place(0, line.full)[1]
    yield f'<line x1="0" y1="{y}" x2="{WIDTH}" y2="{y}" stroke="{line.color}" stroke-width="0.6"/>'
    yield f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}" fill="none" {_stroke(line)}/>'
    if not line.is_dashed:
        yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{line.color}"/>' for x, y in places)
    yield f'<circle cx="0" cy="{_place(0, line.none)[1]}" r="5" fill="none" stroke="{line.color}"/>'


def _stroke(line: Line) -> str:
    return f'stroke="{line.color}" stroke-width="2"' + (' stroke-dasharray="5 4"' if line.is_dashed else "")


def _place(budget: float, accuracy: float) -> tuple[float, float]:
    return round(budget * WIDTH, 1), round((1 - accuracy) * HEIGHT, 1)

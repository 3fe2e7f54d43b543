"""Line charts as HTML and SVG. They need no script; a small one in the page adds the values under the pointer.

The curves are drawn in a square of 1000 x 1000 that the browser stretches to the width at hand, with strokes that keep
their width. Labels are HTML next to it, so they stay readable on a phone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

MOST_POINTS = 500
"""Points of a curve. Longer ones are drawn as means of equally many steps."""
COLOURS = 8
SIDE = 1000


@dataclass(frozen=True)
class Series:
    """Values of one quantity by step."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    are_points: bool = False
    """Draw a dot for each value: they are few, and far apart."""


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    series: Sequence[Series]
    note: str = ""
    """What the curves mean, if the title does not say it."""
    show: Callable[[float], str] = lambda value: f"{value:.4g}"
    """How a value is written."""
    from_zero: bool = False


def draw(chart: Chart) -> str:
    """Return a chart as HTML."""
    curves = [thinned(series) for series in chart.series]
    first, last = min(min(c.steps) for c in curves), max(max(c.steps) for c in curves)
    lowest, highest = _range(curves, from_zero=chart.from_zero)
    ticks = nice_ticks(lowest, highest)
    lowest, highest = min(lowest, ticks[0]), max(highest, ticks[-1])

    def x(step: float) -> float:
        return SIDE * (step - first) / (last - first) if last > first else SIDE / 2

    def y(value: float) -> float:
        return SIDE * (1 - (value - lowest) / (highest - lowest))

    grid = "".join(f'<path class="grid" d="M0 {y(tick):.1f}H{SIDE}"/>' for tick in ticks)
    drawn = "".join(_curve(curve, number, x, y) for number, curve in enumerate(curves))
    labels = "".join(f'<span style="top:{y(tick) / 10:.2f}%">{escape(chart.show(tick))}</span>' for tick in ticks)
    width = max(len(chart.show(tick)) for tick in ticks)
    legend = "".join(
        f'<li><i class="c{number % COLOURS}"></i>{escape(name)} <b>{escape(value)}</b></li>'
        for number, (name, value) in enumerate((curve.name, chart.show(curve.values[-1])) for curve in curves)
    )
    said = "; ".join(
        f"{curve.name} from {chart.show(curve.values[0])} at step {curve.steps[0]} to {chart.show(curve.values[-1])}"
        for curve in curves
    )
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{note}<ul class="legend">{legend}</ul>'
        f'<div class="axes" style="--labels:{width}ch"><div class="y">{labels}</div>'
        f'<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(chart.title)}: {escape(said)}">{grid}{drawn}</svg></div>'
        f'<div class="x"><span>step {first:,}</span><span>{last:,}</span></div></div>'
        f'<script type="application/json">{_data(chart, curves, first, last)}</script></figure>'
    )


def thinned(series: Series) -> Series:
    """Return a series of at most `MOST_POINTS`: means of equally many neighbors, at the step of the last of them."""
    if len(series.steps) <= MOST_POINTS:
        return series
    of_each = -(-len(series.steps) // MOST_POINTS)
    starts = range(0, len(series.steps), of_each)
    groups = [series.values[start : start + of_each] for start in starts]
    steps = [series.steps[min(start + of_each, len(series.steps)) - 1] for start in starts]
    name = f"{series.name} (means of {of_each:,} rows)"
    return Series(name, steps, [math.fsum(group) / len(group) for group in groups], series.are_points)


def nice_ticks(lowest: float, highest: float) -> list[float]:
    """Return three to six round numbers that span a range, or nearly."""
    rough = (highest - lowest) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    start = math.floor(lowest / step + 1e-9)
    stop = math.ceil(highest / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(start, stop + 1)]


def _range(curves: Sequence[Series], *, from_zero: bool) -> tuple[float, float]:
    values = [value for curve in curves for value in curve.values]
    lowest, highest = min(values), max(values)
    if from_zero:
        lowest = min(0.0, lowest)
    if highest - lowest < 1e-9 * max(abs(highest), 1e-300):
        pad = abs(highest) / 2 or 1.0
        return (lowest, highest + pad) if from_zero else (lowest - pad, highest + pad)
    return lowest, highest


def _curve(curve: Series, number: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    places = [f"{x(step):.1f} {y(value):.1f}" for step, value in zip(curve.steps, curve.values, strict=True)]
    colour = f"c{number % COLOURS}{' dashed' if number >= COLOURS else ''}"
    line = f'<path class="line {colour}" d="M{"L".join(places)}"/>'
    if curve.are_points or len(places) == 1:  # a line without length and with round ends is a dot
        line += f'<path class="dots {colour}" d="{"".join(f"M{place}h.01" for place in places)}"/>'
    return line


def _data(chart: Chart, curves: Sequence[Series], first: int, last: int) -> str:
    """Return what the script of the page shows under the pointer. No text in it can end the element that it is in."""
    shown = [
        {"name": curve.name, "steps": list(curve.steps), "values": [chart.show(value) for value in curve.values]}
        for curve in curves
    ]
    return json.dumps({"first": first, "last": last, "series": shown}, separators=(",", ":")).replace("<", "\\u003c")

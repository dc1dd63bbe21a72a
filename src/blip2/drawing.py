"""Small pictures of numbers, as SVG: curves over steps, bars beside each other, what was said against what is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_BAR, _GAP, _LABELS, _NUMBERS = 16, 10, 250, 150  # pixels


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], axis: str = "step", size: tuple[int, int] = (720, 300)
) -> str:
    """Lines of (x, y) points by name, from zero up, or from the least where that is below it, on one scale.

    Args:
        axis: what x counts.
        size: width and height in pixels.
    """
    width, height = size
    left, bottom = 40, height - 24
    last = max((points[-1][0] for points in lines.values()), default=1)
    values = [value for points in lines.values() for _, value in points]
    low = min([0.0, *values])
    top = max(values, default=1.0)
    top = top if top > low else low + 1.0

    def place(x: float, value: float) -> str:
        return f"{left + (width - left - 8) * x / last:.1f},{bottom - (bottom - 12) * (value - low) / (top - low):.1f}"

    parts = [
        f'<path d="M{left},12V{bottom}H{width - 8}" fill="none" stroke="#888"/>',
        f'<text x="4" y="16">{top:.2f}</text><text x="4" y="{bottom}">{low:.3g}</text>',
        f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">{escape(axis)} {last:g}</text>',
    ]
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, value) for x, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts.append(f'<text x="{left + 12 + 70 * number}" y="{height - 8}" fill="{colour}">{escape(name)}</text>')
    return _page(width, height, parts)


def bars(groups: Mapping[str, Mapping[str, float]], unit: str = "s", width: int = 720) -> str:
    """Horizontal bars by group and name, all from zero; each group on a scale of its own.

    Args:
        groups: what is compared, to its bars: name and length.
        unit: of the numbers at the bars' ends.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    parts: list[str] = []
    at = 20
    for title, group in groups.items():
        longest = max(group.values(), default=1.0) or 1.0
        parts.append(f'<text x="8" y="{at}" font-weight="bold">{escape(title)}</text>')
        at += 6
        for name, value in group.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            length = (width - _LABELS - _NUMBERS) * value / longest
            text = at + _BAR - 4
            parts.append(f'<text x="{_LABELS - 8}" y="{text}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{_LABELS}" y="{at}" width="{length:.1f}" height="{_BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{_LABELS + length + 6:.1f}" y="{text}">{_shown(value)} {escape(unit)}</text>')
            at += _BAR
        at += _GAP + 14
    return _page(width, at - 8, parts)


def reliability(sides: Mapping[str, Sequence[tuple[float, float, float, float]]], side: int = 320) -> str:
    """Shares over the probabilities that were said of them, from 0 to 1 both ways; the diagonal is the truth.

    Args:
        sides: what is compared, to its points: probability, share, and the ends of the share's interval.
        side: of the square in pixels.
    """
    left, top, ticks = 44, 12, (0.0, 0.5, 1.0)
    bottom = top + side

    def x(value: float) -> str:
        return f"{left + side * value:.1f}"

    def y(value: float) -> str:
        return f"{bottom - side * value:.1f}"

    parts = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" stroke="#888"/>',
        f'<path d="M{x(0)},{y(0)}L{x(1)},{y(1)}" stroke="#888" stroke-dasharray="4"/>',
        *(f'<text x="{x(tick)}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>' for tick in ticks),
        *(f'<text x="{left - 6}" y="{y(tick)}" text-anchor="end">{tick:g}</text>' for tick in ticks),
        f'<text x="{x(0.5)}" y="{bottom + 30}" text-anchor="middle">probability of a match</text>',
        f'<text x="12" y="{y(0.5)}" text-anchor="middle" transform="rotate(-90 12 {y(0.5)})">share that match</text>',
    ]
    for number, (name, points) in enumerate(sides.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(said)},{y(share)}" for said, share, _, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for said, share, low, high in points:
            parts.append(f'<path d="M{x(said)},{y(low)}V{y(high)}" stroke="{colour}" stroke-opacity=".5"/>')
            parts.append(f'<circle cx="{x(said)}" cy="{y(share)}" r="3" fill="{colour}"/>')
        parts.append(f'<text x="{left + 8}" y="{top + 16 + 14 * number}" fill="{colour}">{escape(name)}</text>')
    return _page(left + side + 12, bottom + 38, parts)


def _page(width: int, height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    )
    return "\n".join([*head, *parts, "</svg>", ""])


def _shown(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

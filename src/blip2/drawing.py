"""Small pictures of numbers, as SVG: curves over steps, bars beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_BAR, _GAP, _LABELS, _NUMBERS = 16, 10, 250, 150  # pixels


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], axis: str = "step", size: tuple[int, int] = (720, 300)
) -> str:
    """Lines of (x, y) points by name, from zero up, on one scale.

    Args:
        axis: what x counts.
        size: width and height in pixels.
    """
    width, height = size
    left, bottom = 40, height - 24
    last = max((points[-1][0] for points in lines.values()), default=1)
    top = max((value for points in lines.values() for _, value in points), default=1.0) or 1.0

    def place(x: float, value: float) -> str:
        return f"{left + (width - left - 8) * x / last:.1f},{bottom - (bottom - 12) * value / top:.1f}"

    parts = [
        f'<path d="M{left},12V{bottom}H{width - 8}" fill="none" stroke="#888"/>',
        f'<text x="4" y="16">{top:.2f}</text><text x="4" y="{bottom}">0</text>',
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

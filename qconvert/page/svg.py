"""Pictures as SVG; colours that mean nothing come from the style of the page, so that they fit
light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from qconvert.errors import printable
from qconvert.roles import place_of

# Five colours of the scale `viridis`, which stays in order for the colour-blind and in grey.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
LABEL = 200  # pixels of the names beside a picture
WIDE = 760
ROLES_SHOWN = 100  # rows of a map
CELL = 22  # pixels of a field of a map at most


def _colour(share: float) -> str:
    """The colour of a share between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    i = min(int(place), len(_VIRIDIS) - 2)
    mixed = (a + (b - a) * (place - i) for a, b in zip(_VIRIDIS[i], _VIRIDIS[i + 1], strict=True))
    return "#" + "".join(f"{round(c):02x}" for c in mixed)


def _svg(width: float, height: float, inner: Sequence[str], label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'aria-label="{escape(printable(label))}">{"".join(inner)}</svg>'
    )


def _name(text: str, limit: int = 28) -> str:
    """A name that fits beside a picture: its end tells more than its beginning."""
    shown = printable(text)
    return str(escape(shown if len(shown) <= limit else "…" + shown[1 - limit :]))


def layer_map(
    values: Mapping[str, float | None],
    text: Callable[[float], str],
    label: str,
    logarithmic: bool = False,
    least_span: float = 0.0,
) -> Markup | None:
    """A field for each tensor: layers from left to right, a row for each role.

    Tensors outside of the layers stand in a column before them. A field of several tensors, as of
    experts, has the least of their values. None where fewer than two tensors have a finite one, or
    there are too many roles for a picture.

    Args:
        text: of a value, with its unit.
        least_span: what the colours span at least, so that little differences look little; in
            powers of ten where the scale is ``logarithmic``.
    """
    fields: dict[tuple[str, int], tuple[float, str, int]] = {}
    for name, value in values.items():
        if value is None or math.isnan(value) or (logarithmic and value <= 0):
            continue
        place = place_of(name)
        key = place.role, -1 if place.layer is None else place.layer
        least, which, count = fields.get(key, (math.inf, "", 0))
        fields[key] = (*min((least, which), (value, name)), count + 1)
    rows = {role: i for i, role in enumerate(dict.fromkeys(role for role, _ in fields))}
    columns = {layer: i for i, layer in enumerate(sorted({layer for _, layer in fields}))}
    scaled: Callable[[float], float] = math.log10 if logarithmic else float
    found = [scaled(v) for v, _, _ in fields.values() if math.isfinite(v)]
    if len(found) < 2 or len(rows) > ROLES_SHOWN:
        return None
    spare = max(least_span - (max(found) - min(found)), 0.0)
    low, high = min(found) - spare / 2, max(found) + spare / 2
    side = max(min(CELL, (WIDE - LABEL) / len(columns)), 8)
    top = len(rows) * CELL
    parts = [
        f'<text x="{LABEL - 6}" y="{i * CELL + 15}" text-anchor="end">{_name(role)}</text>'
        for role, i in rows.items()
    ]
    for (role, layer), (least, which, count) in fields.items():
        share = (scaled(least) - low) / (high - low) if high > low else 0.5
        share = min(
            max(share, 0.0), 1.0
        )  # of nothing left, and of nothing lost, which are infinite
        more = f", the least of {count}" if count > 1 else ""
        parts.append(
            f'<rect x="{LABEL + columns[layer] * side:g}" y="{rows[role] * CELL}" '
            f'width="{side - 1:g}" height="{CELL - 1}" fill="{_colour(share)}">'
            f"<title>{escape(printable(which))}: {escape(text(least))}{more}</title></rect>"
        )
    step = max(1, math.ceil(34 / side))
    for layer, i in columns.items():
        if layer >= 0 and layer % step == 0:
            at = LABEL + (i + 0.5) * side
            parts.append(
                f'<text class="soft" x="{at:g}" y="{top + 14}" text-anchor="middle">{layer}</text>'
            )
    parts.append(
        f'<text class="soft" x="{LABEL - 6}" y="{top + 14}" text-anchor="end">layer</text>'
    )
    for i in range(20):
        parts.append(
            f'<rect x="{LABEL + 7 * i}" y="{top + 26}" width="7" height="10" '
            f'fill="{_colour(i / 19)}"/>'
        )
    ends = (
        (LABEL - 6, "end", low),
        (LABEL + 146, "start", high),
    )
    for x, anchor, end in ends:
        parts.append(
            f'<text class="soft" x="{x}" y="{top + 35}" text-anchor="{anchor}">'
            f"{escape(text(10.0**end if logarithmic else end))}</text>"
        )
    width = max(LABEL + len(columns) * side, LABEL + 240)
    return _svg(width, top + 42, parts, label)


def bars(
    rows: Sequence[tuple[str, float, str]], label: str, marked: Mapping[str, float] | None = None
) -> Markup:
    """Horizontal bars: (name, value, the value as text); ``marked`` has the start of a bar that
    does not begin at 0.
    """
    top = max((v for _, v, _ in rows), default=0.0) or 1.0
    parts = []
    left = LABEL + 70
    room = WIDE - left - 100
    for i, (name, found, said) in enumerate(rows):
        y = i * CELL
        start = (marked or {}).get(name, 0.0) / top * room
        width = max(found / top * room - start, 1)
        parts.append(
            f'<text x="{left - 6}" y="{y + 15}" text-anchor="end">{_name(name, 42)}'
            f"<title>{escape(printable(name))}</title></text>"
            f'<rect class="fill" x="{left + start:.4g}" y="{y + 4}" width="{width:.4g}" '
            f'height="{CELL - 8}"/>'
            f'<text class="soft" x="{left + start + width + 6:.4g}" y="{y + 15}">'
            f"{escape(said)}</text>"
        )
    return _svg(WIDE, len(rows) * CELL, parts, label)


def _outline(counts: Sequence[int], width: int, height: int, top: int) -> str:
    """Steps over bins of equal width, as the path of an SVG; heights go by the square root, so
    that tails of few values show.

    In whole pixels and relative moves: a page has thousands of these, and is to be small.
    """
    path = [f"M0 {height}"]
    at = before = 0
    for i, count in enumerate(counts):
        now = math.ceil(math.sqrt(count / top) * height)  # of one value too, a pixel
        end = round((i + 1) * width / len(counts))
        if now != before:
            path.append(f"v{before - now}")
        elif i:  # one line with that of the bin before
            at -= int(path.pop()[1:])
        path.append(f"h{end - at}")
        at, before = end, now
    path.append(f"V{height}")
    return "".join(path)


def histogram(
    counts: Sequence[int],
    low: float,
    high: float,
    after: Sequence[int] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Counts of bins of equal width between two values; ``after`` are those of the stored values,
    drawn as a line over them, and ``marks`` values with their meaning.
    """
    width, height = 256, 60
    top = max(max(counts, default=0), max(after, default=0), 1)
    parts = [f'<path class="before" d="{_outline(counts, width, height, top)}"/>']
    if after:
        parts.append(f'<path class="after" d="{_outline(after, width, height, top)}"/>')
    for value, meaning in marks:
        if high > low and low <= value <= high:
            x = (value - low) / (high - low) * width
            parts.append(
                f'<path class="mark" d="M{x:.4g} 0V{height}">'
                f"<title>{escape(meaning)}</title></path>"
            )
    parts.append(f'<path class="axis" d="M0 {height}H{width}"/>')
    ends = f"{low:.3g}", f"{high:.3g}"
    return Markup(
        f'<svg viewBox="0 0 {width} {height + 1}" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram from {ends[0]} to {ends[1]}">'
        f"<title>from {ends[0]} to {ends[1]}</title>{''.join(parts)}</svg>"
    )


def span(low: float, high: float, least: float, most: float) -> Markup:
    """An interval within the widest one."""
    width = 256.0
    scale = width / ((most - least) or 1.0)
    zero = -least * scale
    return Markup(
        f'<svg viewBox="0 0 {width:g} 60" preserveAspectRatio="none" role="img" '
        f'aria-label="from {low:.4g} to {high:.4g}"><title>from {low:.4g} to {high:.4g}</title>'
        f'<rect class="fill" x="{(low - least) * scale:.4g}" y="15" '
        f'width="{max((high - low) * scale, 1):.4g}" height="30"/>'
        f'<path class="mark" d="M{zero:.4g} 0V60"/></svg>'
    )


def curve(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> Markup:
    """A line through (x, y), y on a scale of powers of ten."""
    good = [(x, math.log10(y)) for x, y in points if y > 0]
    if len(good) < 2:
        return Markup("")
    height, left, bottom = 300, 60, 34
    xs, ys = [x for x, _ in good], [y for _, y in good]
    x0, x1 = min(xs), max(xs)
    y0, y1 = math.floor(min(ys)), math.ceil(max(ys))
    across = (WIDE - left - 20) / ((x1 - x0) or 1)
    up = (height - bottom - 10) / ((y1 - y0) or 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) * across, height - bottom - (y - y0) * up

    parts = []
    for power in range(y0, y1 + 1):
        y = at(x0, power)[1]
        parts.append(
            f'<path class="axis" d="M{left} {y:.4g}H{WIDE - 20}"/>'
            f'<text class="soft" x="{left - 6}" y="{y + 4:.4g}" text-anchor="end">1e{power}</text>'
        )
    for bits in range(math.ceil(x0), math.floor(x1) + 1):
        x = at(bits, y0)[0]
        parts.append(
            f'<text class="soft" x="{x:.4g}" y="{height - bottom + 16}" text-anchor="middle">'
            f"{bits}</text>"
        )
    line = "L".join(f"{x:.4g} {y:.4g}" for x, y in (at(*p) for p in sorted(good)))
    parts.append(f'<path class="after" d="M{line}"/>')
    for x, y in good:
        cx, cy = at(x, y)
        parts.append(
            f'<circle class="fill" cx="{cx:.4g}" cy="{cy:.4g}" r="3">'
            f"<title>{x:.3g} {escape(x_name)}, {10**y:.3g} {escape(y_name)}</title></circle>"
        )
    parts.append(
        f'<text class="soft" x="{WIDE - 20}" y="{height - 4}" text-anchor="end">'
        f"{escape(x_name)}</text>"
        f'<text class="soft" x="0" y="{height - 4}">{escape(y_name)}, powers of ten</text>'
    )
    return _svg(WIDE, height, parts, f"{y_name} over {x_name}")

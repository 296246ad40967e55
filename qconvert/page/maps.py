"""Charts that several pages have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qconvert.page.parts import Chart
from qconvert.page.svg import layer_map

DECIBELS_SPAN = 6.0  # of the colours at least: a bit more or less of every weight


def by_layer(
    title: str,
    values: Mapping[str, float | None],
    text: Callable[[float], str],
    caption: str,
    logarithmic: bool = False,
    least_span: float = 0.0,
) -> list[Chart]:
    """A map of tensors by layer and role; empty where it would show nothing."""
    drawn = layer_map(values, text, title, logarithmic, least_span)
    return [] if drawn is None else [Chart(title, drawn, caption)]

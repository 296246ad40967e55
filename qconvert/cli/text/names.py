"""Names of tensors that are too long for a column: cut in the middle, numbers of layers kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qconvert.cli.text.signs import display_width

TAIL_LEAST = 6  # letters of the last part of a name that are worth showing


def shortened_name(name: str, most: int, sign: str) -> str:
    """``name`` in at most ``most`` columns, with ``sign`` for what was left out.

    Of a dotted name whole parts go, the numbers last: what stands before the layer, then what
    stands between the layer and the last two parts.

    >>> shortened_name("model.layers.3.self_attn.k_proj.weight", 28, "~")
    '~3.self_attn.k_proj.weight'
    """
    if display_width(name) <= most:
        return name
    parts = name.split(".")
    kept = [True] * len(parts)
    for i in _expendable(parts):
        kept[i] = False
        if display_width(text := _joined(parts, kept, sign)) <= most:
            return text
    # What has no number is cut in the middle; of a numbered name the end tells most.
    numbers = [i for i, part in enumerate(parts) if _is_number(part)]
    if numbers:
        tail = ".".join(parts[numbers[-1] + 1 :][-2:])
        kept = [_is_number(part) for part in parts]
        head = _joined(parts[: numbers[-1] + 1], kept, sign) + sign
        if tail and (room := most - display_width(head)) >= TAIL_LEAST:
            return head + _end(tail, room)
    return _middle_cut(name, most, sign)


def _is_number(part: str) -> bool:
    """Whether part of a name is a number, or stands for all of them."""
    return part.isdigit() or part == "*"


def _expendable(parts: list[str]) -> Iterator[int]:
    """Parts of a name in the order in which they may go; never the last two, nor numbers."""
    last = len(parts) - 1
    numbers = [i for i, part in enumerate(parts) if _is_number(part)]
    first, final = (numbers[0], numbers[-1]) if numbers else (last, 0)
    yield from range(first if numbers else first - 1)
    if numbers:
        yield from range(final + 1, last - 1)
    yield from (i for i in range(first, final) if not _is_number(parts[i]))


def _joined(parts: Sequence[str], kept: Sequence[bool], sign: str) -> str:
    text, before = "", None
    for part, stays in zip(parts, kept, strict=False):
        if stays:
            text += f".{part}" if before else part
        elif before is not False:
            text += sign
        before = stays
    return text


def _middle_cut(text: str, most: int, sign: str) -> str:
    head = start_of(text, (most - 1) // 2)
    return head + sign + _end(text, most - 1 - display_width(head))


def start_of(text: str, most: int) -> str:
    """As many letters from the start as fit into ``most`` columns."""
    cut = text[:most]
    while display_width(cut) > most:
        cut = cut[:-1]
    return cut


def _end(text: str, most: int) -> str:
    cut = text[len(text) - most :] if most < len(text) else text
    while display_width(cut) > most:
        cut = cut[1:]
    return cut


class DistinctNames:
    """Names in a column of ``most`` columns, two different ones never the same.

    Names that would be cut to the same text get the number of their row. Only hashes are kept, for
    there may be hundreds of thousands: one that two texts share costs no more than such a number.
    """

    def __init__(self, names: Iterable[str], most: int, sign: str) -> None:
        self._most, self._sign = most, sign
        seen: set[int] = set()
        self._shared: set[int] = set()
        for name in names:
            if display_width(name) > most or sign in name:
                told = hash(shortened_name(name, most, sign))
                (self._shared if told in seen else seen).add(told)

    def shown(self, name: str, row: int) -> str:
        """The name in the row of that number."""
        text = shortened_name(name, self._most, self._sign)
        if hash(text) not in self._shared:
            return text
        tag = f"#{row}"
        return shortened_name(name, max(self._most - len(tag), 1), self._sign) + tag

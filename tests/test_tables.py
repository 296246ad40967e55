"""Tables fit any width from 60 columns: names keep their layers, and no two look the same."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import pytest

from qconvert.cli.text.fitting import Column, text_width
from qconvert.cli.text.names import DistinctNames, shortened_name
from qconvert.cli.text.pieces import bar, table, table_lines, wrapped

LLAMA = [
    f"model.layers.{layer}.{part}.weight"
    for layer in range(3)
    for part in (
        *("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    )
]
BERT = [
    f"encoder.layer.{layer}.{part}.dense.{kind}"
    for layer in range(12)
    for part in ("attention.output", "output", "intermediate", "crossattention.output")
    for kind in ("weight", "bias")
]
EXPERTS = [
    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{w}.weight"
    for layer in (0, 31)
    for expert in (0, 7, 117)
    for w in (1, 2, 3)
]
LONG = ["n" * 1020 + "1", "n" * 1020 + "2", "n" * 500 + "3" + "n" * 520, "層" * 40, "層" * 41]


class Stdout(io.StringIO):
    """A standard output of an encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._name = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._name


def columns_of(text: str) -> int:
    """As `unicodedata` has it of the letters that are used here: CJK takes two."""
    return sum(2 if "\u4e00" <= c <= "\u9fff" else 1 for c in text)


@pytest.mark.parametrize("most", [20, 28, 34, 60])
@pytest.mark.parametrize("names", [LLAMA, BERT, EXPERTS, LONG], ids=len)
def test_shortened_names_fit_differ_and_keep_their_numbers(names: list[str], most: int) -> None:
    shown = DistinctNames(names, most, "~")
    told = [shown.shown(name, row) for row, name in enumerate(names, 1)]
    assert len(set(told)) == len(set(names))
    for name, text in zip(names, told, strict=True):
        assert columns_of(text) <= most, text
        assert text == name or "~" in text
        if names is not LONG:
            numbers = [part for part in name.split(".") if part.isdigit()]
            kept = [part for part in text.replace("~", ".").split(".") if part.isdigit()]
            assert kept == numbers, text


def test_names_lose_what_says_least_first() -> None:
    name = "model.layers.3.self_attn.k_proj.weight"
    assert shortened_name(name, 38, "~") == name
    assert shortened_name(name, 37, "~") == "~layers.3.self_attn.k_proj.weight"
    assert shortened_name(name, 30, "~") == "~3.self_attn.k_proj.weight"
    assert shortened_name(name, 25, "~") == "~3~k_proj.weight"
    assert shortened_name(name, 14, "~") == "~3~proj.weight"


WIDE = [Column("tensor", "left"), Column("kind", "left", quiet=True)]
WIDE += [Column(f"figure {i}", "right", keep=i) for i in range(12)]
WIDE += [Column("zeros", "right", quiet=True), Column("why", "left", keep=6)]


def wide_row(name: str) -> Sequence[str]:
    number = str(len(name) / 7)[:6]
    return name, "BF16", *[number] * 12, "0", "since zero points gain 0.7 dB and cost 0.56 dB"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 61, 80, 100, 120, 200, 400])
@pytest.mark.parametrize("names", [LLAMA, BERT, EXPERTS, LONG], ids=len)
def test_no_line_is_wider_than_the_terminal(
    names: list[str], width: int, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Stdout(encoding))
    monkeypatch.setenv("COLUMNS", str(width))
    told = "".join(table_lines(WIDE, names, wide_row))
    told.encode(encoding)
    lines = told.splitlines()
    assert max(map(columns_of, lines)) <= width
    rule = next(i for i, line in enumerate(lines) if set(line) <= {"─", "-"})
    rows = lines[rule + 1 : rule + 1 + len(names)]
    assert len({row.split()[0] for row in rows}) == len(names)
    below = " ".join(" ".join(lines[rule + 1 + len(names) :]).split())
    assert "kind: BF16 in all; zeros: none" in below
    heads = " ".join(lines[:rule])
    missing = [c.heading for c in WIDE if c.heading.split()[-1] not in heads.split()]
    for heading in {*missing} - {"kind", "zeros"}:
        assert heading in below
    if width == 400 and names is LLAMA:
        assert missing == ["kind", "zeros"]
        assert all(row.startswith(name) for row, name in zip(rows, names, strict=True))


def test_the_least_wanted_columns_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = " ".join("".join(table_lines(WIDE, LLAMA, wide_row)).split())
    left = told[told.index("no room for: ") + 13 :].split(" (")[0].split(", ")
    numbers = [int(h.split()[1]) for h in left if h != "why"]
    assert numbers == list(range(len(numbers)))
    assert numbers


def test_of_columns_that_count_the_same_the_first_figure_stays_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    columns = [("name", "left"), ("kind", "left"), ("SQNR dB", "right"), ("error", "right")]
    row = ("x" * 40, "k" * 20, "21.57", "0.123456789", "min-sqnr")
    told = table([*columns, ("fails", "left")], [row])
    heads = told.split("─")[0].split()
    assert set(heads) == {"name", "SQNR", "dB", "fails"}
    assert "no room for: kind, error" in told


def test_a_table_with_room_is_as_wide_as_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    told = table([("name", "left"), ("n", "right")], [("a", "1"), ("bcdef", "20")])
    assert told == "name     n\n──────────\na        1\nbcdef   20\n"


def test_figures_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = [("x" * 90, "1234567890123456", "y" * 90)]
    columns = [Column("name", "left"), Column("figure", "right", keep=8), Column("word", "left")]
    told = table(columns, rows)
    assert " 1234567890123456\n" in told
    assert "no room for: word" in told
    assert max(map(len, told.splitlines())) == 60


@pytest.mark.parametrize(("columns", "wanted"), [("72", 72), ("7", 60), ("0", 100), ("x", 100)])
def test_the_width_of_a_pipe_is_what_columns_says(
    columns: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setenv("COLUMNS", columns)
    assert text_width() == wanted
    monkeypatch.delenv("COLUMNS")
    assert text_width() == 100


def test_bars_are_of_what_the_encoding_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Stdout("utf-8"))
    assert [bar(s, 4) for s in (0, 1e-9, 0.5, 0.53125, 1)] == ["", "▏", "██", "██▏", "████"]
    monkeypatch.setattr(sys, "stdout", Stdout("ascii"))
    assert [bar(s, 4) for s in (0, 1e-9, 0.5, 0.625, 1)] == ["", ".", "##", "##.", "####"]
    monkeypatch.setattr(sys, "stdout", Stdout("latin-1"))
    assert bar(1, 2) == "##"


def test_prose_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    told = wrapped("word " * 40 + "a-b-" * 20, "  ")
    assert max(map(len, told.splitlines())) <= 60
    assert "".join(told.split()) == "word" * 40 + "a-b-" * 20
    assert told.splitlines()[1].startswith("  word")

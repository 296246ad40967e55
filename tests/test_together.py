"""Several schemes of one source in one run: the same files as one at a time, read once."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import ROOT, Call, gaussian, listing, save

import qconvert
from qconvert.progress import Silent

LLAMA = ROOT / "samples" / "tiny-llama"
SCHEMES = "q4_k_m", "q8_0", "q4_block64", "w4a16"


@pytest.mark.parametrize("threads", [1, 3])
def test_files_are_those_of_one_scheme_at_a_time(tmp_path: Path, threads: int) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    found = qconvert.quantize_set(LLAMA, SCHEMES, output=together, threads=threads)
    assert found.status == "pass"
    names = ("tiny-llama.q4_k_m.gguf", "tiny-llama.q8_0.gguf", "tiny-llama.q4_block64.qblk")
    assert [r.output for r in found.reports] == [
        str(together / name) for name in (*names, "tiny-llama-w4a16")
    ]
    for scheme, report in zip(SCHEMES, found.reports, strict=True):
        one = qconvert.quantize(LLAMA, scheme, output=alone / Path(report.output).name)
        theirs, ours = one.to_json(), report.to_json()
        assert theirs.pop("output") != ours.pop("output")
        assert theirs == ours
    assert listing(together) == listing(alone)


class Order(Silent):
    """Which tensors were done, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def advance(self, amount_done: int, item: str = "") -> None:
        if amount_done and item:
            self.names.append(item)


def test_a_tensor_is_done_for_all_schemes_before_the_next_is_read(tmp_path: Path) -> None:
    source = save(
        tmp_path / "m.safetensors", {f"w{i}.weight": gaussian(i, 64, 64) for i in range(6)}
    )
    order = Order()
    qconvert.quantize_set(source, ["q4_block64", "q8_channel", "q6_block32"], progress=order)
    done = [n for n in order.names if n.startswith("w")]
    assert done == [f"w{i}.weight" for i in range(6) for _ in range(3)]


def test_an_error_in_one_leaves_none(tmp_path: Path, call: Call) -> None:
    """At the second tensor, when the first one is written for both."""
    bad = gaussian(2, 64, 64)
    bad[3, 4] = np.nan
    source = save(tmp_path / "m.safetensors", {"a.weight": gaussian(1, 64, 64), "b.weight": bad})
    before = listing(tmp_path)
    done = call("quantize", source, "--scheme", "q8_channel", "--scheme", "q4_block64")
    assert done.code == 3
    assert "b.weight" in done.err
    assert listing(tmp_path) == before


def test_no_scheme_at_all_is_a_usage_error() -> None:
    with pytest.raises(qconvert.UsageError, match="no scheme is named"):
        qconvert.quantize_set(LLAMA, [])


def test_under_strict_a_scheme_with_a_warning_has_no_file(tmp_path: Path, call: Call) -> None:
    line = ("quantize", LLAMA, "-o", tmp_path, "--scheme", "q2_tensor", "--scheme", "q8_channel")
    done = call(*line, "--strict", "--json")
    told = json.loads(done.out)
    assert done.code == 1
    schema = json.loads((ROOT / "formats/reports/quantize-set.json").read_text())
    jsonschema.validate(told, schema)
    assert [r["status"] for r in told["reports"]] == ["fail", "pass"]
    assert [r["written"] for r in told["reports"]] == [False, True]
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-llama.q8_channel.qblk"]
    assert told["warnings"][0].startswith("q2_tensor: the model is broken")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (("-o", "m.qblk"), "a directory that exists"),
        (("-o", "nowhere"), "a directory that exists"),
        (("--scheme", "q8_0"), "two schemes would have one output"),
        (("--html", "p.html"), "the page of one scheme"),
        (("--dry-run",), "--dry-run goes with one scheme"),
        (("--target-bpw", "4.5"), "--scheme and a budget"),
    ],
)
def test_what_goes_with_one_scheme_alone(
    line: tuple[str, ...], told: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m.safetensors", {"a.weight": gaussian(1, 64, 64)})
    before = listing(tmp_path)
    schemes = ("--scheme", "q8_0", "--scheme", "q4_0", "--raw")
    done = call("quantize", "m.safetensors", *schemes, *line)
    assert done.code == 2
    assert told in done.err
    assert listing(tmp_path) == before

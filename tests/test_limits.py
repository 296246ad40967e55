"""``verify --limits``: what a file of limits says is held, and what it says wrongly is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call, gaussian, save

from qconvert.files.limits_file import read_limits

NAMES = ("a.weight", "b.weight")


@pytest.fixture
def place(tmp_path: Path, call: Call) -> Path:
    """A directory with a model, m.safetensors, and what was made of it, m.qblk."""
    tensors = {n: gaussian(i, 40, 64) for i, n in enumerate(NAMES)}
    tensors["a.weight"] = np.clip(tensors["a.weight"], -0.05, 0.05)  # which loses less
    source = save(tmp_path / "m.safetensors", tensors)
    line = ("quantize", source, "--scheme", "q4_channel_sym", "--range", "minmax", "--hash-source")
    assert call(*line, "-o", tmp_path / "m.qblk").code == 0
    return tmp_path


def limited(place: Path, text: str, call: Call, *more: object) -> tuple[int, dict[str, Any], str]:
    path = place / "release.toml"
    path.write_text(text)
    source = () if "alone" in more else ("--against", place / "m.safetensors")
    done = call("verify", place / "m.qblk", *source, "--limits", path, "--json")
    return done.code, json.loads(done.out) if done.out else {}, done.err


def test_each_limit_is_a_check_that_holds_and_fails(place: Path, call: Call) -> None:
    """Just inside and just beyond what a report without limits has measured."""
    found = json.loads(
        call("verify", place / "m.qblk", "--against", place / "m.safetensors", "--json").out
    )
    rows = {t["name"]: t for t in found["tensors"]}
    size = (place / "m.qblk").stat().st_size
    # 40 rows of 64 codes of 4 bits and a scale of 4 bytes; all of the file's weights are these.
    nbytes = 40 * (32 + 4)
    bits = 8 * nbytes / (40 * 64)
    worst = min(rows.values(), key=lambda t: t["sqnr_db"])
    assert worst["name"] == "b.weight"
    for key, value, tensor in (
        ("min_sqnr_db", worst["sqnr_db"], "b.weight"),
        ("max_nmse", worst["nmse"], "b.weight"),
        ("min_output_sqnr_db", min(t["output_sqnr_db"] for t in rows.values()), "b.weight"),
        ("max_bytes", nbytes, "a.weight"),
        ("max_bits_per_weight", bits, "a.weight"),
    ):
        for by, code in ((1.0001, 0), (0.9999, 1)):
            limit = value * (by if key.startswith("max") else 2 - by)
            text = f'[[tensors]]\nglob = "*"\n{key} = {limit!r}\n'
            got, report, err = limited(place, text, call)
            assert got == code, (key, err)
            (check,) = [c for c in report["checks"] if c["id"] == f"limit:{key}"]
            assert check["worst"] == pytest.approx(value)
            assert (check["limit"], check["tensor"]) == (limit, tensor)
            failing = {t["name"] for t in report["tensors"] if f"limit:{key}" in t["fails"]}
            assert bool(failing) == bool(code)
            assert tensor in failing or not code
    for key, value in (("max_bytes", size), ("max_bits_per_weight", bits)):
        assert limited(place, f"[file]\n{key} = {value}\n", call, "alone")[0] == 0
        assert limited(place, f"[file]\n{key} = {value * 0.999}\n", call, "alone")[0] == 1


def test_a_limit_holds_for_what_its_glob_matches_alone(place: Path, call: Call) -> None:
    one = '[[tensors]]\nglob = "a.*"\nmin_sqnr_db = 21\n'
    assert limited(place, one, call)[0] == 0
    code, report, _ = limited(place, one + one.replace("a.", "b."), call)
    assert code == 1
    assert [c["status"] for c in report["checks"] if c["id"].startswith("limit")] == [
        "pass",
        "fail",
    ]
    assert [t["remedy"] for t in report["tensors"]] == [
        None,
        "--tensor-scheme 'b.weight=c5_block16'",  # of more bits than 4.5, scales counted
    ]


def test_what_is_required_of_the_making(place: Path, call: Call) -> None:
    source, file = place / "m.safetensors", place / "m.qblk"
    data = source.read_bytes()
    head = hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()
    right = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "source_header_sha256": head,
        "scheme": "q4_channel_sym",
        "tool": "qconvert 0.1.0",
    }
    lines = "".join(f'{k} = "{v}"\n' for k, v in right.items())
    code, report, _ = limited(place, f"[require]\n{lines}", call, "alone")
    assert code == 0, report
    assert sum(c["id"] == "limit:required" for c in report["checks"]) == 5
    for key, value in right.items():
        wrong = "0" * 64 if key.endswith("sha256") else "x"
        code, report, _ = limited(place, f'[require]\n{key} = "{wrong}"\n', call, "alone")
        assert code == 1
        (check,) = [c for c in report["checks"] if c["id"] == "limit:required"]
        assert check["detail"] == f"{key} is {value}, where {wrong} is required"
    code, report, _ = limited(place, f'[require]\ncalibration_sha256 = "{head}"\n', call)
    assert (code, report["checks"][-1]["detail"]) == (
        1,
        "calibration_sha256 is not recorded in the file",
    )


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("min_sqnr = 3", 3, "unknown key in the file, found 'min_sqnr', wanted tensors file"),
        ('[[tensors]]\nglob = "*"\nmin_sqnr = 3', 3, "found 'min_sqnr', wanted glob min_sqnr_db"),
        ("[file]\nsha256 = 3", 3, "unknown key in [file], found 'sha256', wanted max_bytes"),
        ('[require]\nversion = "1"', 3, "found 'version', wanted sha256 tool scheme"),
        ('[[tensors]]\nglob = "*"', 3, "no limit in [[tensors]] of '*'"),
        ("[[tensors]]\nmin_sqnr_db = 3", 3, "glob of [[tensors]]"),
        ('[[tensors]]\nglob = "z*"\nmax_bytes = 3', 3, "matches no tensor of the file, found 'z*'"),
        ("[file]\nmax_bytes = true", 3, "max_bytes of [file], found True, wanted a finite number"),
        ("[file]\nmax_bytes = -1", 3, "found -1"),
        ("[file]\nmax_bytes = nan", 3, "found nan"),
        ('[require]\nsha256 = "12"', 3, "wanted a text of 64 hexadecimal digits"),
        ("[require]\nscheme = 4", 3, "scheme of [require], found 4"),
        ("[[tensors]", 3, "no TOML: "),
        (f"[file]\nmax_bytes = {'1' * 5000}", 3, "release.toml: no TOML: "),
        (f"[file]\nmax_bytes = 1{'0' * 400}", 3, "wanted a finite number of at least 0"),
        (f"[file]\nmax_bytes = 0x{'f' * 5000}", 3, "found an integer of thousands of digits"),
        (f"[require]\nscheme = 0x{'f' * 5000}", 3, "found an integer of thousands of digits"),
        ("", 3, "no limit in it"),
        ("tensors = 3", 3, "tensors are a list of tables"),
        ("file = 3", 3, "[file] is no table"),
        ("[file]\nmax_divergence_nats = 1", 2, "max_divergence_nats, which needs --text"),
        ("[file]\nmin_cosine = 1", 2, "min_cosine, which needs --text"),
    ],
)
def test_what_is_no_limit_is_refused_by_name(
    text: str, code: int, words: str, place: Path, call: Call
) -> None:
    found = limited(place, text, call)
    assert (found[0], words in found[2]) == (code, True), found


def test_limits_on_errors_need_the_source(place: Path, call: Call) -> None:
    text = '[[tensors]]\nglob = "*"\nmax_nmse = 1\n'
    code, _, err = limited(place, text, call, "alone")
    assert code == 2
    assert "max_nmse, which needs --against" in err


def test_an_increase_may_be_a_percentage(tmp_path: Path) -> None:
    path = tmp_path / "l.toml"
    path.write_text('[file]\nmax_perplexity_increase = "1.5%"\n')
    assert read_limits(path).file == {"max_perplexity_increase": 0.015}


def test_limits_on_static_products_need_samples(tmp_path: Path, call: Call) -> None:
    source = save(tmp_path / "m.safetensors", {"w.weight": gaussian(1, 40, 64)})
    samples = save(tmp_path / "x.safetensors", {"w": gaussian(2, 32, 64) + np.float32(1)})
    calibration, path = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    call("calibrate", source, "--activations", samples, "-o", calibration)
    line = ("quantize", source, "--scheme", "q8_channel", "--calibration", calibration)
    assert call(*line, "-o", path).code == 0
    limits = tmp_path / "l.toml"
    limits.write_text('[[tensors]]\nglob = "*"\nmin_output_sqnr_db = 20\n')
    check = ("verify", path, "--against", source, "--limits", limits)
    assert "needs recorded inputs where activations are static" in call(*check).err
    assert call(*check, "--samples", samples).code == 0

"""``verify --junit`` and ``--manifest``: read by an XML parser and by ``sha256sum -c``."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import ROOT, Call, gaussian, save

from qconvert.errors import InputError
from qconvert.files.manifest import manifest

ODD = "a<b>&\"'\x1b\x07é.weight"


@pytest.fixture
def place(tmp_path: Path, call: Call) -> Path:
    tensors = {ODD: gaussian(1, 40, 64), "b.weight": gaussian(2, 40, 64)}
    source = save(tmp_path / "m.safetensors", tensors)
    assert call("quantize", source, "--scheme", "q4_block32", "-o", tmp_path / "m.qblk").code == 0
    return tmp_path


def suite(path: Path) -> ET.Element:
    root = ET.parse(path).getroot()
    assert root.tag == "testsuites"
    (found,) = root
    for element in (root, found):
        cases = found.findall("testcase")
        assert int(element.get("tests", "")) == len(cases)
        failures = [c for c in cases if c.find("failure") is not None]
        assert int(element.get("failures", "")) == len(failures)
        skipped = [c for c in cases if c.find("skipped") is not None]
        assert int(element.get("skipped", "")) == len(skipped)
    return found


def test_junit_has_a_case_for_each_check_and_each_failing_tensor(place: Path, call: Call) -> None:
    path, report = place / "j.xml", place / "r.json"
    line = ("verify", place / "m.qblk", "--against", place / "m.safetensors")
    assert call(*line, "--junit", path).code == 0
    found = suite(path)
    names = [c.get("name") for c in found]
    assert {"integrity", "quality", "usable", "integer-exact"} <= set(names)
    assert found.findall("testcase/failure") == []
    again = call(*line, "--min-sqnr", 50, "--junit", path, "--report", report)
    assert again.code == 1
    failing = {
        (c.get("classname"), c.get("name")) for c in suite(path) if c.find("failure") is not None
    }
    escaped = "a<b>&\"'\\u001b\\u0007é.weight"
    assert failing == {
        ("qconvert.verify", "min-sqnr"),
        ("qconvert.verify.tensors", escaped),
        ("qconvert.verify.tensors", "b.weight"),
    }
    headline = again.out.splitlines()[-1]
    values = {p.get("name"): p.get("value") for p in suite(path).iter("property")}
    assert values["verdict"] == headline
    text = suite(path).findall("testcase[@name='b.weight']/failure")[0].text
    assert text == "quantize again with --tensor-scheme 'b.weight=bf16'"


def test_junit_says_what_a_damaged_file_fails(place: Path, call: Call) -> None:
    data = bytearray((place / "m.qblk").read_bytes())
    data[-1] ^= 1
    (place / "m.qblk").write_bytes(data)
    assert call("verify", place / "m.qblk", "--junit", place / "j.xml").code == 1
    (case,) = suite(place / "j.xml").findall("testcase")
    assert case.get("name") == "integrity"
    assert case.find("failure") is not None


def check(home: Path, name: str) -> None:
    """`sha256sum -c` accepts a list, where there is one; its lines are checked here anyway."""
    for line in (home / name).read_text().splitlines():
        if not line.startswith("\\"):
            digest, _, file = line.partition("  ")
            assert hashlib.sha256((home / file).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        line = ["sha256sum", "--check", "--strict", name]
        done = subprocess.run(line, cwd=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_manifest_is_what_sha256sum_checks(place: Path, call: Call) -> None:
    (place / "lists").mkdir()
    for name in ("SHA256SUMS", "lists/SHA256SUMS"):
        path = place / name
        assert call("verify", place / "m.qblk", "--manifest", path).code == 0
        assert len(path.read_text().splitlines()) == 1
        check(path.parent, path.name)


def test_a_manifest_lists_every_file_of_a_directory_but_itself(place: Path, call: Call) -> None:
    out = place / "made"
    line = ("quantize", ROOT / "samples/tiny-llama", "--scheme", "w4a16")
    made = call(*line, "-o", out)
    assert made.code == 0, made.err
    (out / "sub").mkdir()
    (out / "sub/a\\b\nc.txt").write_text("odd")
    path = out / "SHA256SUMS"
    done = call("verify", out, "--manifest", path, "--junit", out / "j.xml")
    assert done.code == 0, done.err
    listed = path.read_text()
    inside = [p for p in out.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "j.xml")]
    assert len(listed.splitlines()) == len(inside) > 1
    assert "  sub/a\\\\b\\nc.txt\n" in listed
    check(out, "SHA256SUMS")


def test_a_manifest_lists_all_files_of_a_split_model(place: Path, call: Call) -> None:
    line = ("quantize", place / "m.safetensors", "--scheme", "q4_0", "--raw")
    made = call(*line, "--shard-size", 2000, "-o", place / "s.gguf")
    assert made.code == 0, made.err
    shards = sorted(p.name for p in place.glob("s-*.gguf"))
    assert len(shards) > 1
    assert call("verify", place / shards[0], "--manifest", place / "SUMS").code == 0
    assert [ln.split("  ")[1] for ln in (place / "SUMS").read_text().splitlines()] == shards
    check(place, "SUMS")


def test_nothing_is_listed_that_is_not_good(place: Path, call: Call) -> None:
    line = ("verify", place / "m.qblk", "--against", place / "m.safetensors", "--min-sqnr", 50)
    before = sorted(p.name for p in place.iterdir())
    done = call(*line, "--manifest", place / "SUMS")
    assert done.code == 1
    assert "no list of digests was written: the report is no pass\n" in done.err
    assert sorted(p.name for p in place.iterdir()) == before


@pytest.mark.parametrize("more", [(), ("-q",), ("--json",)])
def test_an_older_list_stays_and_that_is_said(
    more: tuple[str, ...], place: Path, call: Call
) -> None:
    path = place / "SUMS"
    path.write_text("older")
    line = ("verify", place / "m.qblk", "--against", place / "m.safetensors", "--min-sqnr", 50)
    done = call(*line, "--manifest", path, "--force", *more)
    assert (done.code, path.read_text()) == (1, "older")
    assert f"no list of digests was written: the report is no pass; {path} is as it" in done.err
    good = call(*line[:-2], "--manifest", path, "--force", *more)
    assert (good.code, "no list" in good.err) == (0, False)
    check(place, "SUMS")


def test_a_list_that_would_leave_out_files_is_refused(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, away = tmp_path / "made", tmp_path / "away"
    line = ("quantize", ROOT / "samples/tiny-llama", "--scheme", "w4a16")
    assert call(*line, "-o", out).code == 0
    away.mkdir()
    (away / "x").write_text("x")
    (out / "sub").symlink_to(away)
    done = call("verify", out, "--manifest", tmp_path / "SUMS")
    told = f"error: {out / 'sub'}: a link to a directory, whose files no list"
    assert (done.code, done.out, told in done.err) == (3, "", True), done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["away", "made"]
    (out / "sub").unlink()
    (out / "sub").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:  # as of a directory of others; root may read them all
        if os.fspath(path) == str(out / "sub"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match="sub: permission denied"):
        manifest(out, out)


def test_side_files_replace_no_input_and_not_each_other(place: Path, call: Call) -> None:
    line = ("verify", place / "m.qblk", "--against", place / "m.safetensors", "--force")
    for option in ("--junit", "--manifest"):
        for name in ("m.qblk", "m.safetensors"):
            before = (place / name).read_bytes()
            assert call(*line, option, place / name).code == 4
            assert (place / name).read_bytes() == before
    same = call(*line, "--junit", place / "x", "--manifest", place / "x")
    assert (same.code, "are files of their own" in same.err) == (2, True)


@pytest.mark.parametrize("option", ["--junit", "--manifest", "--report", "--html"])
def test_a_hint_names_no_option_that_verify_does_not_have(
    option: str, place: Path, call: Call
) -> None:
    done = call("verify", place / "m.qblk", option, place / "none/x")
    assert (done.code, "hint: create it first, or choose another\n" in done.err) == (4, True), done
    inside = call("verify", place / "m.qblk", option, place / "m.qblk", "--force")
    assert (inside.code, "hint: choose another name\n" in inside.err) == (4, True), inside


def test_names_are_relative_to_where_the_list_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_bytes(b"1")
    wanted = f"{hashlib.sha256(b'1').hexdigest()}  ../a/x\n".encode()
    assert manifest(tmp_path / "a/x", tmp_path / "b") == wanted

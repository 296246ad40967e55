"""`inspect --compare`: what differs, by NumPy on whole arrays and by gguf-py's decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call, Run, environment, save
from numpy.typing import NDArray
from safetensors.numpy import load_file

import qconvert
from qconvert.report import Comparison

TINY = ROOT / "samples" / "tiny-llama"


def gaussian(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def compared(a: Path, b: Path, **options: Any) -> Comparison:
    found = qconvert.inspect(a, compare=b, **options).comparison
    assert found
    return found


def decibels(x: NDArray[Any], y: NDArray[Any]) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, Any], dict[str, Any]]:
    """A base, and what somebody made of it."""
    base = {
        "h.0.up.weight": gaussian(1, 300, 1000),
        "h.0.down.weight": gaussian(2, 64, 64),
        "h.1.up.weight": gaussian(3, 64, 96),
        "h.1.down.weight": gaussian(4, 64, 64),
        "gone.weight": gaussian(5, 8),
        "bad.weight": np.asarray([np.nan, 1, np.inf, 3], np.float32),
        "order": np.arange(6),
    }
    tuned = {k: v.copy() for k, v in base.items() if k != "gone.weight"}
    tuned["h.0.up.weight"] += 0.01 * gaussian(6, 300, 1000)
    tuned["h.0.down.weight"] = base["h.0.down.weight"].astype(ml_dtypes.bfloat16)
    tuned["h.1.up.weight"] = gaussian(3, 96, 64)
    tuned["bad.weight"][1] = np.nan
    tuned["new.weight"] = gaussian(7, 8)
    return (
        save(tmp_path / "a.safetensors", base, format="pt", made="today"),
        save(tmp_path / "b.safetensors", tuned, format="np"),
        base,
        tuned,
    )


def test_what_a_fine_tune_changed_is_told(
    pair: tuple[Path, Path, dict[str, Any], dict[str, Any]], call: Call
) -> None:
    a, b, base, tuned = pair
    found = compared(a, b)
    assert (found.only_a, found.only_b) == (["gone.weight"], ["new.weight"])
    rows = {t.name: t for t in found.tensors}
    assert {n for n, t in rows.items() if t.equal} == {"h.1.down.weight", "order"}
    assert not rows["h.1.up.weight"].comparable
    assert (rows["h.1.up.weight"].a_shape, rows["h.1.up.weight"].b_shape) == ((64, 96), (96, 64))
    for name in ("h.0.up.weight", "h.0.down.weight"):
        x, y = base[name], tuned[name].astype(np.float32)
        assert rows[name].sqnr_db == pytest.approx(decibels(x, y), abs=1e-6)
        assert rows[name].max_error == pytest.approx(float(np.abs(x - y).max()))
        assert rows[name].differing == int((x != y).sum())
    assert (rows["bad.weight"].equal, rows["bad.weight"].differing) == (False, 1)
    both = ["h.0.up.weight", "h.0.down.weight"]
    layer = next(g for g in found.layers if g.name == "h.0")
    x, y = (np.concatenate([m[n].astype(np.float32).ravel() for n in both]) for m in (base, tuned))
    assert layer.sqnr_db == pytest.approx(decibels(x, y), abs=1e-6)
    assert layer.worst_sqnr_db == min(rows[n].sqnr_db or 0 for n in both)
    assert layer.types == ["F32 -> BF16"]
    role = next(g for g in found.roles if g.name == "h.*.down.weight")
    assert (role.tensors, role.equal, role.a_bytes, role.b_bytes) == (2, 1, 32768, 24576)
    assert found.metadata == {"format": ["pt", "np"], "made": ["today", None]}
    done = call("inspect", a, "--compare", b, "-q")
    assert done.code == 0
    told = " ".join(done.out.split())
    for words in (
        "only in A 1 tensor: gone.weight",
        "only in B 1 tensor: new.weight",
        "shape h.1.up.weight: 64x96 in A, 96x64 in B",
        "type 1 F32 to BF16",
        "1 only in A (made); 1 changed (format)",
        "equal in 2 of 6 tensors",
    ):
        assert words in told
    some = compared(a, b, tensor="h.1.")
    assert {t.name for t in some.tensors} == {"h.1.up.weight", "h.1.down.weight"}


def test_a_file_equals_itself_for_any_number_of_threads(
    pair: tuple[Path, Path, dict[str, Any], dict[str, Any]],
) -> None:
    a, b, base, _ = pair
    same = compared(a, a)
    assert all(t.equal for t in same.tensors)
    assert len(same.tensors) == len(base)
    assert (same.sqnr_db, same.metadata, same.facts) == (None, {}, {})
    assert compared(a, b, threads=1) == compared(a, b, threads=4)


def test_a_source_is_compared_with_its_gguf_under_the_names_of_that(tmp_path: Path) -> None:
    """Rows of attn_q and attn_k are in another order there, so that wrong rows would show."""
    out = tmp_path / "m.gguf"
    qconvert.quantize(TINY, "q8_0", output=out)
    found = compared(TINY, out)
    assert (found.only_a, found.only_b) == ([], [])
    source = load_file(TINY / "model.safetensors")
    stored = {t.name: t for t in gguf.GGUFReader(out).tensors}
    rows = {t.name: t for t in found.tensors}
    for name, origin in (
        ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        tensor = stored[name]
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = decibels(source[origin].astype(np.float32), decoded)
        assert rows[name].sqnr_db == pytest.approx(wanted, abs=1e-5)
        assert (rows[name].a_dtype, rows[name].b_dtype) == ("BF16", "Q8_0")
        assert rows[name].a_bytes == source[origin].nbytes
        assert rows[name].b_bytes == tensor.n_bytes
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        assert (rows[name].sqnr_db or 0) > 40
    turned = compared(out, TINY)
    assert [t.name for t in turned.tensors] == [t.name for t in stored.values()]


def test_two_quantizations_are_compared_as_what_they_stand_for(tmp_path: Path) -> None:
    paths = [tmp_path / "4.qblk", tmp_path / "8.qblk"]
    for path, scheme in zip(paths, ("q4_block64", "q8_channel"), strict=True):
        qconvert.quantize(TINY, scheme, output=path)
    found = compared(*paths)
    name = "model.layers.1.mlp.up_proj.weight"
    values = []
    for path in paths:
        with qconvert.load(path) as tensors:
            values.append(tensors[name].dequantize())
    row = next(t for t in found.tensors if t.name == name)
    assert row.sqnr_db == pytest.approx(decibels(*values), abs=1e-6)
    assert found.facts["recipe"] == ["--scheme q4_block64", "--scheme q8_channel"]


def test_models_without_a_name_in_common_are_told_apart(tmp_path: Path, run: Run) -> None:
    other = save(tmp_path / "b.safetensors", {"w": gaussian(1, 64, 64)})
    env = environment(COLUMNS="60")
    done = run("inspect", "samples/tiny-llama", "--compare", other, "-q", cwd=ROOT, env=env)
    assert done.code == 0
    assert "0 of 39 names match" in done.out
    assert max(map(len, done.out.splitlines())) <= 60


@pytest.mark.parametrize(
    "options", [["--top", "2"], ["--csv"], ["--headers-only"], ["--by", "role"]]
)
def test_a_comparison_takes_no_options_of_tables(options: list[str], call: Call) -> None:
    done = call("inspect", TINY, "--compare", TINY, *options)
    assert (done.code, "--compare" in done.err) == (2, True)


def test_the_other_file_must_be_a_model(tmp_path: Path, call: Call) -> None:
    (tmp_path / "x").write_text("nothing")
    assert call("inspect", TINY, "--compare", tmp_path / "x").code == 3
    assert call("inspect", TINY, "--compare", tmp_path / "absent").code == 3

"""What `inspect` points at, by NumPy on whole arrays and by models that were made to stand out."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import re
import shlex
import struct
import subprocess
import termios
from contextlib import suppress
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import COMMAND, ROOT, Call, Run, environment, save
from numpy.typing import NDArray
from safetensors.numpy import load_file

import qconvert
from qconvert.report import InspectReport, TensorSummary

IMATRIX = ROOT / "tests" / "data" / "experts.imatrix.gguf"
TINY = ROOT / "samples" / "tiny-llama"
MATRIX = "model.layers.0.mlp.up_proj.weight"


def gaussian(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def inspected(path: Path, values: NDArray[Any], **options: Any) -> tuple[InspectReport, Any]:
    """The report of a file with one tensor, and that tensor."""
    report = qconvert.inspect(save(path / "m.safetensors", {MATRIX: values}), **options)
    return report, report.tensors[0]


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 5000, 300_000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_percentiles_are_those_of_sorted_values(dtype: Any, size: int, tmp_path: Path) -> None:
    values = (gaussian(size, size) ** 3).astype(dtype)
    _, row = inspected(tmp_path, values)
    ordered = np.sort(values.astype(np.float64))
    assert list(row.percentiles) == ["0.1", "1", "5", "25", "50", "75", "95", "99", "99.9"]
    for p, found in row.percentiles.items():
        wanted = ordered[math.ceil(Fraction(p) * size / 100) - 1]
        if dtype is ml_dtypes.bfloat16:
            assert found == wanted
        else:
            assert found == pytest.approx(wanted, rel=2.0**-8)


def test_percentiles_of_values_beyond_binary32_are_their_ends(tmp_path: Path) -> None:
    _, row = inspected(tmp_path, np.asarray([-1e300, 1.0, 1.0, 1e300]))
    assert (row.percentiles["0.1"], row.percentiles["50"]) == (-1e300, pytest.approx(1, rel=0.004))
    assert row.percentiles["99.9"] == 1e300


def channels(x: NDArray[np.float64]) -> tuple[int, float, int, float, int]:
    """By definition, of the rows of a matrix: widest and its ratio, loudest and its ratio, dead."""
    widest = np.abs(x).max(axis=1)
    rest = np.sort(np.abs(x), axis=1)[:, :-1]
    loud = np.sqrt((rest**2).sum(axis=1) / max(rest.shape[1], 1))
    return (
        int(widest.argmax()),
        widest.max() / np.median(widest),
        int(loud.argmax()),
        loud.max() / np.median(loud),
        int((widest <= 1e-4 * np.median(widest)).sum()),
    )


@pytest.mark.parametrize("shape", [(700, 900), (3, 400_000), (6, 40, 64), (64, 16, 3, 3), (40, 33)])
def test_channels_are_those_of_the_whole_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = gaussian(1, *shape)
    rows = x.reshape(shape[0], -1) if len(shape) != 3 else x.reshape(-1, shape[-1])
    rows[2] *= 9
    rows[1, 5] = 70
    rows[:, 7] = 0
    one, row = inspected(tmp_path, x, threads=1)
    other, _ = inspected(tmp_path, x, threads=4)
    assert one.to_json() == other.to_json()
    for found, of in ((row.rows, rows), (row.columns, rows.T)):
        widest, wide, loudest, loud, dead = channels(of.astype(np.float64))
        assert (found.count, found.dead) == (len(of), dead)
        assert (found.widest, found.loudest) == (widest, loudest)
        assert found.absmax_ratio == pytest.approx(wide, rel=1e-6)
        assert found.rms_ratio == pytest.approx(loud, rel=1e-6)
    values = x.astype(np.float64)
    rms = np.sqrt((values**2).mean())
    assert row.crest == pytest.approx(np.abs(values).max() / rms, rel=1e-6)
    near = (np.abs(values) < np.abs(values).max() / 254).mean()
    assert row.near_zero_share == pytest.approx(near, rel=0.02)


def test_blocks_are_runs_of_32_values_of_a_row(tmp_path: Path) -> None:
    x = gaussian(2, 40, 100)
    x[3, 32:64] = 0.25
    x[4, 30:60] = 0.25  # no block lies in it
    x[5, 64:96] = 0
    x[6, 96:] = 1  # shorter than a block
    _, row = inspected(tmp_path, x)
    assert (row.blocks, row.constant_blocks) == (40 * 3, 2)


def test_vectors_and_integers_have_no_channels(tmp_path: Path) -> None:
    for values in (gaussian(3, 4096), np.arange(4096).reshape(64, 64), gaussian(4, 8, 8)):
        _, row = inspected(tmp_path, values)
        assert (row.rows, row.columns, row.blocks) == (None, None, None)
        assert row.percentiles


# --- findings -------------------------------------------------------------------------------------


def outlier_channel(x: NDArray[np.float32]) -> None:
    x[:, 17] *= 12


def outlier_weight(x: NDArray[np.float32]) -> None:
    x[9, 17] = 40


def nonfinite(x: NDArray[np.float32]) -> None:
    x[3, 3] = np.nan


def dead_rows(x: NDArray[np.float32]) -> None:
    x[20:40] = 0


def constant_blocks(x: NDArray[np.float32]) -> None:
    x[100:140, 64:128] = 0.125


def near_zero(x: NDArray[np.float32]) -> None:
    x[:, 8:] /= 1000


STANDING_OUT = {
    "outlier-channels": (outlier_channel, "--equalise"),
    "outlier-weights": (outlier_weight, f"--tensor-scheme '{MATRIX}=q8_block32'"),
    "heavy-tails": (outlier_weight, "--range mse"),
    "nonfinite": (nonfinite, f"--keep '{MATRIX}'"),
    "dead-channels": (dead_rows, "prune"),
    "constant-blocks": (constant_blocks, "damaged"),
    "near-zero": (near_zero, "blocks or channels"),
}


@pytest.mark.parametrize("kind", STANDING_OUT)
def test_what_stands_out_is_named_with_what_to_do(kind: str, tmp_path: Path, call: Call) -> None:
    change, advice = STANDING_OUT[kind]
    x = gaussian(5, 256, 512)
    healthy = {f"model.layers.{i}.mlp.down_proj.weight": gaussian(i, 64, 256) for i in range(3)}
    path = save(tmp_path / "m.safetensors", {MATRIX: x, **healthy})
    assert qconvert.inspect(path).findings == []
    change(x)
    path = save(tmp_path / "m.safetensors", {MATRIX: x, **healthy})
    found = {f.kind: f for f in qconvert.inspect(path).findings}
    assert found[kind].tensors == [MATRIX]
    assert advice in found[kind].advice
    told = " ".join(call("inspect", path, "-q").out.split())
    assert f"{found[kind].message} try: {found[kind].advice}" in told
    assert told.index(found[kind].message) < told.index(" shape ")


def test_a_scheme_below_its_floor_is_found(tmp_path: Path) -> None:
    heavy = np.random.default_rng(6).standard_t(3, (256, 512)).astype(np.float32)
    report, row = inspected(tmp_path, heavy, scheme="q4_channel")
    poor = next(f for f in report.findings if f.kind == "poor-scheme")
    assert row.sqnr_db is not None
    assert row.sqnr_db < 15  # of 4 bits: qconvert.floors
    assert poor.figures == [row.sqnr_db]
    suggested = re.search(r"--tensor-scheme '(.*)=(q\w+)'", poor.advice)
    assert suggested
    made = qconvert.quantize(
        tmp_path / "m.safetensors", "q4_channel", tensor_scheme={suggested[1]: suggested[2]}
    )
    assert (made.tensors[0].sqnr_db or 0) > 15


def test_a_healthy_model_gets_one_line(call: Call) -> None:
    told = call("inspect", TINY, "-q").out
    assert "nothing stands out" in told
    assert "try:" not in told
    assert call("inspect", TINY, "--json", "-q").json["findings"] == []


@pytest.mark.parametrize("width", [60])
def test_the_outlier_of_minilm_is_found(width: int, minilm: Path, run: Run) -> None:
    done = run("inspect", minilm, "-q", env=environment(COLUMNS=str(width)))
    head = " ".join(done.out[: done.out.index("tensor  ")].split())
    assert "encoder.layer.0.output.dense.weight (55.5 times" in head
    assert "encoder.layer.0.output.dense.weight (kurtosis 1,585)" in head
    fits(done.out, width)


# --- which tensors, in which order ----------------------------------------------------------------


def names_of(call: Call, *options: str) -> list[str]:
    done = call("inspect", TINY, "-q", "--json", *options)
    return [t["name"] for t in done.json["tensors"]]


def test_a_text_matches_anywhere_and_a_glob_the_whole_name(call: Call) -> None:
    every = names_of(call, "--headers-only")
    found = names_of(call, "--headers-only", "--tensor", "layers.0.self_attn")
    assert found == [n for n in every if "layers.0.self_attn" in n]
    assert len(found) == 4
    assert names_of(call, "--headers-only", "--tensor", "*q_proj.weight", "--tensor", "norm") == [
        n for n in every if n.endswith("q_proj.weight") or "norm" in n
    ]
    refused = call("inspect", TINY, "--headers-only", "--tensor", "layers.0.*")
    assert (refused.code, "layers.0.*" in refused.err) == (2, True)


def test_rows_are_sorted_and_cut(call: Call) -> None:
    rows = call("inspect", TINY, "-q", "--json").json["tensors"]
    for column, key, rising in (("kurtosis", "kurtosis", False), ("sqnr", "sqnr_db", True)):
        known = sorted((t[key] for t in rows if t[key] is not None), reverse=not rising)
        done = call("inspect", TINY, "-q", "--json", "--sort", column)
        found = [t[key] for t in done.json["tensors"]]
        assert found == known + [None] * (len(rows) - len(known))
        top = call("inspect", TINY, "-q", "--json", "--sort", column, "--top", "3").json
        assert [t[key] for t in top["tensors"]] == found[:3]
        assert top["total_tensors"] == 39
    sizes = call("inspect", TINY, "-q", "--json", "--headers-only", "--sort", "size").json
    found = [t["nbytes"] for t in sizes["tensors"]]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sort", "colour"], "near-zero"),
        (["--sort", "kurtosis", "--headers-only"], "--headers-only"),
        (["--by", "size"], "layer or role"),
        (["--by", "role", "--top", "3"], "--top"),
        (["--csv", "--json"], "--csv"),
        (["--csv", "--by", "role"], "--csv"),
        (["--top", "0"], "--top"),
    ],
)
def test_what_does_not_go_together_is_refused(options: list[str], said: str, call: Call) -> None:
    done = call("inspect", TINY, *options)
    assert done.code == 2
    assert said in done.err


def test_roles_are_names_without_numbers_and_layers_begin_names(call: Call) -> None:
    rows = call("inspect", TINY, "-q", "--json").json["tensors"]
    found = call("inspect", TINY, "-q", "--json", "--by", "role").json["groups"]
    assert [g["name"] for g in found] == list(
        dict.fromkeys(re.sub(r"\.\d+\.", ".*.", t["name"]) for t in rows)
    )
    role = next(g for g in found if g["name"] == "model.layers.*.self_attn.k_proj.weight")
    mine = [
        t for t in rows if re.fullmatch(r"model\.layers\.\d\.self_attn\.k_proj.weight", t["name"])
    ]
    for key in ("std", "kurtosis", "sqnr_db"):
        assert role[key] == [t[key] for t in mine]
    assert role["nbytes"] == sum(t["nbytes"] for t in mine)
    layers = call("inspect", TINY, "-q", "--json", "--by", "layer").json["groups"]
    names = ["(outside of layers)", *(f"model.layers.{i}" for i in range(4))]
    assert [g["name"] for g in layers] == names
    assert sum(len(g["tensors"]) for g in layers) == 39


def test_bars_over_depth_follow_the_layers(tmp_path: Path, run: Run) -> None:
    """Ten layers, in a file that has them by name: 0, 1, 10, 11, 2, ..."""
    scales = {i: 1 + i for i in range(12)}
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": s * gaussian(1, 64, 64) for i, s in scales.items()
    }
    path = save(tmp_path / "m.safetensors", tensors)
    done = run("inspect", path, "-q", "--by", "role", env=environment(COLUMNS="140"))
    line = next(x for x in done.out.splitlines() if "up_proj" in x)
    bars = [re.findall(r"[▁▂▃▄▅▆▇█]+", line)][0]
    assert bars[0] == "▁▁▂▃▃▄▅▆▆▇██"  # of std: (i / 11) * 8, rounded down
    fits(done.out, 140)


def test_csv_has_every_figure_of_the_json(call: Call, tmp_path: Path) -> None:
    evil = 'a,"b"\r\n\x1b[2J'
    path = save(tmp_path / "m.safetensors", {evil: gaussian(1, 64, 64), "b.weight": gaussian(2, 9)})
    done = call("inspect", path, "-q", "--csv")
    assert "\x1b" not in done.out
    found = list(csv.DictReader(io.StringIO(done.out, newline=""), strict=True))
    assert done.out.count("\r\n") == done.out.count("\n") == 3
    wanted = call("inspect", path, "-q", "--json").json["tensors"]
    for row, t in zip(found, wanted, strict=True):
        assert row["name"] == json.dumps(t["name"])[1:-1].replace('\\"', '"')
        assert row["shape"] == "x".join(map(str, t["shape"]))
        for key, value in t.items():
            if isinstance(value, float | int):
                assert float(row[key]) == value, key
            elif value is None and key in row:
                assert row[key] == ""
        for p, value in t["percentiles"].items():
            assert float(row[f"p{p}"]) == value
        for key, value in (t["rows"] or {}).items():
            assert float(row[f"rows_{key}"]) == value


# --- what a file says of itself -------------------------------------------------------------------


def test_a_gguf_file_is_described_as_gguf_py_reads_it(tmp_path: Path, call: Call) -> None:
    out = tmp_path / "m.gguf"
    qconvert.quantize(TINY, "q4_k_m", output=out, keep="token_embd*")
    told = qconvert.inspect(out, headers_only=True)
    reader = gguf.GGUFReader(out)

    def field(key: str) -> Any:
        found = reader.fields[key]
        return found.contents()

    assert told.facts["architecture"] == field("general.architecture")
    assert told.facts["name"] == field("general.name")
    assert told.facts["context"] == f"{field('llama.context_length')} tokens"
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    model, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    assert told.facts["tokenizer"] == f"{model} ({pre}), {tokens:,} tokens"
    assert told.facts["chat template"] == "no"
    kept = gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert told.facts["file type"] == f"q4_k_m ({int(kept)})"
    assert told.facts["recipe"] == "--scheme q4_k_m --keep token_embd*"
    types: dict[str, list[int]] = {}
    for t in reader.tensors:
        types.setdefault(t.tensor_type.name, []).append(int(t.n_bytes))
    assert {n: (t.tensors, t.nbytes) for n, t in told.types.items()} == {
        name: (len(sizes), sum(sizes)) for name, sizes in types.items()
    }
    shown = call("inspect", out, "-q", "--headers-only").out
    assert "recipe        --scheme q4_k_m --keep token_embd*" in shown


def test_a_directory_and_a_qblk_file_are_described_by_their_configuration(tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text())
    out = tmp_path / "m.qblk"
    qconvert.quantize(TINY, "q8_channel", output=out)
    source, made = (qconvert.inspect(p, headers_only=True).facts for p in (TINY, out))
    for facts in (source, made):
        assert facts["architecture"] == config["architectures"][0]
        assert facts["context"] == f"{config['max_position_embeddings']} tokens"
        assert f"{config['vocab_size']:,} tokens" in facts["tokenizer"]
        assert facts["chat template"] == "no"
    assert "recipe" not in source
    assert made["recipe"] == "--scheme q8_channel"
    assert made["made by"] == f"qconvert {qconvert.__version__} from model.safetensors"


def test_what_a_file_says_need_not_be_true(tmp_path: Path, call: Call) -> None:
    """Neither JSON nor objects: nothing depends on it."""
    for name, text in (("config.json", "[1"), ("tokenizer_config.json", "[]")):
        (tmp_path / name).write_text(text)
    save(tmp_path / "model.safetensors", {"w": gaussian(1, 40, 64)}, **{"qconvert.provenance": "{"})
    done = call("inspect", tmp_path, "--json", "-q")
    assert (done.code, done.json["facts"]) == (0, {})


def test_a_calibration_is_shown_by_its_layers(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "c.safetensors"
    activations = ROOT / "samples" / "activations.safetensors"
    assert call("calibrate", TINY, "--activations", activations, "-o", path, "-q").code == 0
    arrays, inputs = load_file(path), load_file(activations)
    view = qconvert.inspect(path).inputs
    assert view
    assert (view.kind, view.total_layers) == ("calibration", len(view.layers))
    means = {x.name: float((inputs[x.name].astype(np.float64) ** 2).mean()) for x in view.layers}
    ranks = sorted(means.values(), reverse=True)
    for layer in view.layers:
        absmax = np.abs(inputs[layer.name].astype(np.float64)).max(axis=0)
        assert layer.spread == pytest.approx(absmax.max() / np.median(absmax), rel=1e-6)
        assert absmax[layer.hottest].tolist() == pytest.approx(np.sort(absmax)[:-4:-1], rel=1e-6)
        assert layer.mean_square == pytest.approx(means[layer.name], rel=1e-5)
        assert ranks[layer.rank - 1] == pytest.approx(means[layer.name], rel=1e-5)
        assert arrays[f"{layer.name}/mean_square"].shape == (layer.features,)
    done = call("inspect", path, "-q", "--tensor", "layers.2.")
    assert "7 of 28 layers shown" in done.out
    assert call("inspect", path, "--tensor", "nowhere").code == 2
    assert call("inspect", path, "--top", "3").code == 2
    rows = list(csv.DictReader(io.StringIO(call("inspect", path, "-q", "--csv").out, newline="")))
    assert [float(row["spread"]) for row in rows] == [x.spread for x in view.layers]


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_an_importance_matrix_is_shown_by_its_entries(suffix: str, call: Call) -> None:
    reader = gguf.GGUFReader(IMATRIX.with_suffix(".gguf"))
    stored = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    done = call("inspect", IMATRIX.with_suffix(f".{suffix}"), "-q", "--json")
    view = done.json["inputs"]
    assert (view["kind"], view["facts"]["chunks"]) == ("imatrix", "3")
    assert {x["name"] + ".in_sum2" for x in view["layers"]} < set(stored)
    for layer in view["layers"]:
        sums, counts = (stored[f"{layer['name']}.{k}"] for k in ("in_sum2", "counts"))
        mean = sums.reshape(counts.size, -1) / np.maximum(counts.reshape(-1, 1), 1)
        mean[counts.ravel() == 0] = 1
        rms = np.sqrt(mean).ravel()
        assert layer["spread"] == pytest.approx(rms.max() / np.median(rms), rel=1e-5)
        assert layer["hottest"][0] == int(rms.argmax())
        assert layer["mean_square"] == pytest.approx(mean.mean(), rel=1e-5)


# --- what it looks like ---------------------------------------------------------------------------


def fits(text: str, width: int) -> None:
    for line in text.splitlines():
        assert len(line) <= width or "/" in line.split()[0], line


@pytest.mark.parametrize(
    ("width", "ascii_only"), [(60, False), (60, True), (80, False), (120, False), (200, False)]
)
def test_every_layer_is_visible_at_any_width(width: int, ascii_only: bool, run: Run) -> None:
    more = {"PYTHONIOENCODING": "ascii"} if ascii_only else {"LC_ALL": "C.UTF-8"}
    env = environment(COLUMNS=str(width), **more)
    done = run("inspect", "samples/tiny-llama", "-q", cwd=ROOT, env=env)
    assert done.code == 0
    assert done.out.isascii() == ascii_only
    fits(done.out, width)
    rows = [line.split()[0] for line in done.out.splitlines() if re.search(r"\d+x?\d* ", line)]
    for layer in range(4):
        for part in ("q_proj", "k_proj", "gate_proj", "down_proj"):
            mine = [r for r in rows if re.search(rf"\b{layer}\b", r) and f"{part}.weight" in r]
            assert len(mine) == 1, (layer, part)
    assert len({r for r in rows if "weight" in r}) == 39


def test_a_terminal_has_the_width_that_it_says() -> None:
    """A terminal of 62 columns, as tmux has it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 62, 0, 0))
    line = [*COMMAND, "inspect", "samples/tiny-llama", "--headers-only", "-q"]
    done = subprocess.run(line, stdout=theirs, cwd=ROOT, env=environment(), check=False)
    os.close(theirs)
    told = b""
    with suppress(OSError):  # how Linux ends what a terminal says
        while part := os.read(ours, 1 << 16):
            told += part
    os.close(ours)
    assert done.returncode == 0
    lines = told.decode().splitlines()
    assert max(map(len, lines)) <= 62
    assert any(line.startswith("…layers.0.post_attention_layernorm.weight ") for line in lines)


def test_the_c_locale_gets_ascii(run: Run) -> None:
    env = environment(LC_ALL="C")
    done = run("inspect", "samples/tiny-llama", "-q", "--tensor", "*.0.*k_proj*", cwd=ROOT, env=env)
    assert done.out.isascii()
    assert "#" in done.out
    assert "----" in done.out


def test_reasons_are_told_once_in_words(call: Call) -> None:
    told = " ".join(call("inspect", TINY, "-q").out.split())
    rows: list[TensorSummary] = qconvert.inspect(TINY).tensors
    gains = [t.gain_db for t in rows if t.gain_db is not None]
    assert (
        f"{len(gains)} tensors: q4_block64_asym, asymmetric, since zero points gain "
        f"{min(gains):.2f} to {max(gains):.2f} dB and cost 0.56 dB" in told
    )
    assert "9 tensors: keep, fewer than two dimensions" in told


@pytest.mark.parametrize(
    ("scheme", "values", "words"),
    [
        ("q4_block64_sym", gaussian(1, 64, 256), "q4_block64_sym, symmetric as asked: zero points"),
        ("q4_block64", np.abs(gaussian(1, 64, 256)), "since all weights are on one side of 0"),
        ("q4_block64", gaussian(1, 9), "keep, fewer than two dimensions"),
        ("q4_block64", np.zeros((64, 64), np.float32), "nothing is lost"),
    ],
)
def test_reasons_follow_the_rule_that_decided(
    scheme: str, values: Any, words: str, tmp_path: Path, call: Call
) -> None:
    path = save(tmp_path / "m.safetensors", {MATRIX: values})
    told = call("inspect", path, "-q", "--scheme", scheme).out
    assert words in " ".join(told.split())


def test_a_histogram_folds_and_marks(tmp_path: Path, call: Call) -> None:
    x = gaussian(8, 256, 512)
    x[9, 17] = 60
    path = save(tmp_path / "m.safetensors", {MATRIX: x})
    told = call("inspect", path, "--tensor", MATRIX, "--bins", "64", "-q").out
    lines = told[told.index("in std") :].splitlines()[1:]
    empty = re.search(r"…  (\d+) empty bins", told)
    assert empty
    counts, edges = np.histogram(x.astype(np.float64), 64)
    longest = max(len(run) for run in "".join(" x"[int(c > 0)] for c in counts).split("x"))
    assert int(empty[1]) == longest
    deviations = [float(line.split()[1]) for line in lines[:5]]
    wanted = (edges[:5] - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
    assert deviations == pytest.approx(wanted, abs=0.051)
    median = np.percentile(x, 50, method="inverted_cdf")
    marked = next(line for line in lines if re.search(r"p50\b|p1\.\.p99\b|p0\.1\.\.p", line))
    place = int(np.searchsorted(edges, median, "right")) - 1
    assert float(marked.split()[0]) == pytest.approx(edges[place], rel=1e-3, abs=1e-3)


def test_the_grid_of_a_histogram_is_what_the_file_has(tmp_path: Path) -> None:
    """One scale a row, so that the sample is the tensor: codes of the file at their ends."""
    x = gaussian(9, 64, 128)
    _, row = inspected(tmp_path, x, tensor=MATRIX, scheme="q4_channel_sym")
    qconvert.quantize(tmp_path / "m.safetensors", "q4_channel_sym", output=tmp_path / "m.qblk")
    with qconvert.load(tmp_path / "m.qblk") as tensors:
        scale = tensors[MATRIX].quantized().scale.ravel().astype(np.float64)
    ends = np.sort(np.stack([-8 * scale, 7 * scale]), axis=0)
    grid = row.histogram.grid
    assert grid.scheme == "q4_channel_sym"
    assert (grid.low, grid.high) == pytest.approx((np.median(ends[0]), np.median(ends[1])))
    assert (grid.widest_low, grid.widest_high) == pytest.approx((ends[0].min(), ends[1].max()))


def test_an_option_to_paste_is_one_word_whatever_the_name(tmp_path: Path, call: Call) -> None:
    name = "model.x'; touch PWN #[0]*.weight"
    tensor = gaussian(1, 64, 64)
    tensor[3, 3] = np.nan
    source = save(tmp_path / "m.safetensors", {name: tensor, "other.weight": gaussian(2, 64, 64)})
    found = call("inspect", source, "--json").json["findings"]
    (finding,) = [f for f in found if f["kind"] == "nonfinite"]
    option = finding["advice"].partition("keep the tensor with ")[2]
    flag, glob = shlex.split(option)
    assert flag == "--keep"
    assert [n for n in (name, "other.weight", name + "x") if fnmatchcase(n, glob)] == [name]


def test_list_schemes_takes_nothing_else(tmp_path: Path, call: Call) -> None:
    for more in (["m.safetensors"], ["--scheme", "q4_0"], ["-o", tmp_path / "x"], ["--html", "y"]):
        assert call("quantize", "--list-schemes", *more).code == 2
    assert not list(tmp_path.iterdir())

"""Whole conversions to and from GGUF: what the command line puts into the file, and refuses.

Tensors and keys are read by gguf-py. The types of the sample are those that llama-quantize gave it
(llama.cpp 0c1e57098, from a BF16 file of the sample), recorded here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call, Finished, gaussian, listing, save
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIGS, GROUPS, HEADS, INNER, WIDTH, byte_level, weights, write_directory

import qconvert
from qconvert import __version__
from qconvert.cli.main import main
from qconvert.errors import FormatError, InputError, QconvertError
from qconvert.files import open_model
from qconvert.files.gguf import open_gguf
from qconvert.files.gguf_split_reader import SplitGgufModel
from qconvert.files.imatrix import ChannelSums, imatrix_bytes
from qconvert.stages import conversion

SAMPLE = ROOT / "samples" / "tiny-llama"
DATA = Path(__file__).with_name("data")
Arrays = dict[str, NDArray[Any]]

FILES = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
ARCH = "general.architecture"
LLAMA_QUANTIZE = {
    "token_embd.weight": "Q4_K",
    "output_norm.weight": "F32",
    "output.weight": "Q6_K",
    **{f"blk.{i}.{n}_norm.weight": "F32" for i in range(4) for n in ("attn", "ffn")},
    **{f"blk.{i}.attn_{n}.weight": "Q4_K" for i in range(4) for n in ("q", "k", "output")},
    **{f"blk.{i}.ffn_{n}.weight": "Q4_K" for i in range(4) for n in ("gate", "up")},
    **{f"blk.{i}.attn_v.weight": "Q4_K" if i < 2 else "Q6_K" for i in range(4)},
    # rows of 704 values
    **{f"blk.{i}.ffn_down.weight": "Q5_0" if i < 2 else "Q8_0" for i in range(4)},
}


@pytest.fixture
def done(call: Call) -> Call:
    """``quantize`` that has to succeed: its JSON report."""

    def command(model: Path, scheme: str, output: Path, *options: Any) -> dict[str, Any]:
        line = ["quantize", model, "--scheme", scheme, "-o", output, "--json", "-q", *options]
        found = call(*line)
        assert found.code == 0, found
        return found.json

    return command


def made(scheme: str, output: Path, model: Path = SAMPLE, *options: Any) -> Path:
    """For fixtures: convert and give the path."""
    line = ["quantize", model, "--scheme", scheme, "-o", output, "-q", *options]
    assert main([str(a) for a in line]) == 0
    return output


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained sample as Q4_K_M. Read only."""
    return made("q4_k_m", tmp_path_factory.mktemp("sample") / "m.gguf")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained sample as F16. Read only."""
    return made("f16", tmp_path_factory.mktemp("half") / "m.gguf")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the trained sample as Q4_K_M in three files. Read only."""
    directory = tmp_path_factory.mktemp("split")
    made("q4_k_m", directory / "m.gguf", SAMPLE, "--shard-size", "1M")
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of which all rows divide into blocks of 256. Read only."""
    width = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    tensors = weights({**CONFIGS["llama"], **width})
    directory: Path = write_directory(
        tmp_path_factory.mktemp("wide") / "m", "llama", config=width, tensors=tensors
    )
    return directory


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def bytes_of(path: Path) -> dict[str, bytes]:
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def values_of(path: Path) -> Arrays:
    """Decoded by gguf-py, outermost dimension first."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape.tolist()[::-1])
        for t in gguf.GGUFReader(path).tensors
    }


def keys_of(path: Path) -> dict[str, tuple[list[str], Any]]:
    """Types and value of every key, in order."""
    fields = gguf.GGUFReader(path).fields.items()
    return {
        k: ([t.name for t in f.types], f.contents()) for k, f in fields if not k.startswith("GGUF.")
    }


def provenance_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(keys_of(path)["qconvert.provenance"][1])
    return found


def refused(found: Finished, code: int, *words: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert found.code == code, found
    assert found.out == ""
    (line,) = [text for text in found.err.splitlines() if not text.startswith("  hint:")]
    assert line.startswith("error: "), found.err
    for word in words:
        assert word in found.err, found.err


# --- a model directory ----------------------------------------------------------------------------


def test_types_are_those_of_llama_quantize(sample: Path) -> None:
    assert types_of(sample) == LLAMA_QUANTIZE


def test_keys_of_the_quantization(sample: Path) -> None:
    keys = keys_of(sample)
    assert keys["general.architecture"] == (["STRING"], "llama")
    assert keys["general.file_type"] == (["UINT32"], int(gguf.LlamaFileType.MOSTLY_Q4_K_M))
    assert keys["general.quantization_version"] == (["UINT32"], gguf.GGML_QUANT_VERSION)
    assert keys["general.name"] == (["STRING"], "tiny-llama")
    vocabulary = json.loads((SAMPLE / "tokenizer.json").read_text())["model"]["vocab"]
    types, tokens = keys["tokenizer.ggml.tokens"]
    assert types == ["ARRAY", "STRING"]
    assert [tokens[i] for i in vocabulary.values()] == list(vocabulary)


def test_provenance_names_options_and_sources(tmp_path: Path, done: Call) -> None:
    options = ["--tensor-type", "attn_q=q8_0", "--keep", "output.weight", "--shard-size", "9G"]
    options += ["--output-tensor-type", "q5_k", "--hash-source"]
    done(SAMPLE, "q4_0", tmp_path / "m.gguf", *options)
    found = provenance_of(tmp_path / "m.gguf")
    assert found["tool"] == f"qconvert {__version__}"
    (source,) = found["sources"]
    assert (source["name"], source["size"]) == ("model.safetensors", 8_004_184)
    assert len(source["sha256"]) == len(source["header_sha256"]) == 64
    assert found["options"] == {
        "scheme": "q4_0",
        "keep": ["output.weight"],
        "tensor_type": ["--tensor-type 'attn_q=q8_0'"],
        "output_tensor_type": "Q5_K",
        "shard_size": 9_000_000_000,
    }
    assert types_of(tmp_path / "m.gguf")["output.weight"] == "BF16"
    assert types_of(tmp_path / "m.gguf")["blk.3.attn_q.weight"] == "Q8_0"


def interleaved(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head as llama.cpp's rotary embedding wants them (convert_hf_to_gguf)."""
    rows, columns = values.shape
    return (
        values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def test_tensors_decode_to_the_source_within_the_error_of_their_types(sample: Path) -> None:
    stored = load_file(SAMPLE / "model.safetensors")
    config = json.loads((SAMPLE / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    at, mlp = "model.layers.2.self_attn.", "model.layers.2.mlp."
    wanted = {
        "token_embd.weight": stored["model.embed_tokens.weight"],
        "output.weight": stored["lm_head.weight"],
        "output_norm.weight": stored["model.norm.weight"],
        "blk.2.attn_q.weight": interleaved(stored[f"{at}q_proj.weight"], heads),
        "blk.2.attn_k.weight": interleaved(stored[f"{at}k_proj.weight"], groups),
        "blk.2.attn_v.weight": stored[f"{at}v_proj.weight"],
        "blk.2.ffn_down.weight": stored[f"{mlp}down_proj.weight"],
        "blk.0.ffn_down.weight": stored["model.layers.0.mlp.down_proj.weight"],
    }
    least = {"F32": np.inf, "Q4_K": 22.0, "Q5_0": 26.0, "Q6_K": 34.0, "Q8_0": 44.0}  # dB
    found = values_of(sample)
    for name, array in wanted.items():
        original = array.astype(np.float64)
        noise = np.square(found[name] - original).sum()
        sqnr = 10 * np.log10(np.square(original).sum() / noise) if noise else np.inf
        assert sqnr >= least[LLAMA_QUANTIZE[name]], (name, sqnr)


def test_one_thread_and_three_write_the_same_bytes(
    sample: Path, split: Path, tmp_path: Path, done: Call
) -> None:
    for threads in (1, 3):
        done(SAMPLE, "q4_k_m", tmp_path / f"{threads}.gguf", "--threads", threads)
        assert (tmp_path / f"{threads}.gguf").read_bytes() == sample.read_bytes()
    done(SAMPLE, "q4_k_m", tmp_path / "m.gguf", "--shard-size", "1M", "--threads", 3)
    for path in split.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_dry_run_lists_every_tensor_with_type_and_reason(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # room for all reasons
    line = ["quantize", SAMPLE, "--scheme", "q4_k_m", "-o", tmp_path / "m.gguf", "--dry-run"]
    found = call(*line, "--json", "--shard-size", "1M").json
    listed = {t["name"]: t["stored"].upper() for t in found["tensors"]}
    assert listed == LLAMA_QUANTIZE
    reasons = {t["name"]: t["reason"] for t in found["tensors"]}
    assert all(reasons.values())
    assert "704" in reasons["blk.0.ffn_down.weight"]
    assert "Q5_0" in reasons["blk.0.ffn_down.weight"]
    assert (found["files"], Path(found["output"]).name) == (3, "m-00001-of-00003.gguf")
    text = call(*line).out
    for name, reason in reasons.items():
        (row,) = [r for r in text.splitlines() if r.startswith(f"{name} ")]
        assert reason in row
    assert listing(tmp_path) == {}


def test_a_type_that_rows_do_not_fit_is_a_warning(tmp_path: Path, call: Call) -> None:
    line = ["quantize", SAMPLE, "--scheme", "q4_k_m", "-o", tmp_path / "m.gguf"]
    found = call(*line, "--json")
    assert any("4 tensors" in w for w in found.json["warnings"])
    assert (tmp_path / "m.gguf").exists()
    (tmp_path / "m.gguf").unlink()
    assert call(*line, "--strict").code == 1
    assert listing(tmp_path) == {}


def test_pure_gives_one_type_and_refuses_rows_that_do_not_divide(
    tmp_path: Path, call: Call, done: Call
) -> None:
    done(SAMPLE, "q4_0", tmp_path / "m.gguf", "--pure")
    assert set(types_of(tmp_path / "m.gguf").values()) == {"Q4_0", "F32"}
    for option in ("--pure", "--no-fallback"):
        line = ["quantize", SAMPLE, "--scheme", "q4_k_m", "-o", tmp_path / "n.gguf", option]
        refused(call(*line), 3, "blk.0.ffn_down.weight", "704", "256", "--tensor-type")
    assert not (tmp_path / "n.gguf").exists()


# --- an importance matrix -------------------------------------------------------------------------


def test_keys_have_the_values_that_are_asked_for(
    sample: Path, tmp_path: Path, done: Call, call: Call
) -> None:
    asked = ("general.name=str:Ada", "llama.rope.freq_base=float:10000", "my.own=bool:true")
    options = [word for text in asked for word in ("--override-kv", text)]
    report = done(SAMPLE, "q4_k_m", tmp_path / "m.gguf", *options)
    keys, before = keys_of(tmp_path / "m.gguf"), keys_of(sample)
    changed = {k for k in keys if keys[k] != before.get(k)} - {"qconvert.provenance"}
    assert changed == {"general.name", "llama.rope.freq_base", "my.own"}
    assert keys["general.name"] == (["STRING"], "Ada")
    assert keys["llama.rope.freq_base"] == (["FLOAT32"], 10000.0)
    assert keys["my.own"] == (["BOOL"], True)
    assert sum("as --override-kv asks" in note for note in report["notes"]) == 3
    line = ["quantize", SAMPLE, "--scheme", "q4_k_m", "-o", tmp_path / "n.gguf", "--override-kv"]
    refused(call(*line, "general.architecture=str:bert"), 2, "how the file lies")
    refused(call(*line, "llama.block_count=str:4"), 2, "of another type")
    refused(call(*line, "tokenizer.ggml.tokens=str:x"), 2, "of another type")
    refused(call(*line, "llama.block_count=int:four"), 2, "KEY=int:N")


def importance(path: Path, sums: dict[str, NDArray[np.float32]], tokens: int = 4) -> Path:
    """An importance matrix with these mean squares, (matrices, channels) each."""
    whole = {
        name: ChannelSums(np.atleast_2d(s) * tokens, np.full(len(np.atleast_2d(s)), tokens))
        for name, s in sums.items()
    }
    path.write_bytes(imatrix_bytes(whole, datasets=["wiki"], chunk_count=1, chunk_size=tokens))
    return path


def skewed(seed: int, *shape: int) -> NDArray[np.float32]:
    """Few channels that matter much, others little."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.exp(3 * values).astype(np.float32)


@pytest.mark.parametrize("scheme", ["q4_0", "q4_k", "iq4_nl", "q3_k"])
def test_an_importance_matrix_weights_the_error(
    scheme: str, wide: Path, tmp_path: Path, done: Call
) -> None:
    name = "blk.1.attn_v.weight"
    weight = skewed(5, 256)
    file = importance(tmp_path / "i.gguf", {name: weight})
    report = done(wide, scheme, tmp_path / "w.gguf", "--imatrix", file, "--pure")
    done(wide, scheme, tmp_path / "u.gguf", "--pure")
    original = load_file(wide / "model.safetensors")["model.layers.1.self_attn.v_proj.weight"]
    error = [
        float((weight * np.square(values_of(path)[name] - original.astype(np.float64))).sum())
        for path in (tmp_path / "w.gguf", tmp_path / "u.gguf")
    ]
    assert error[0] < 0.9 * error[1]
    plain, weighted = bytes_of(tmp_path / "u.gguf"), bytes_of(tmp_path / "w.gguf")
    assert [n for n in plain if plain[n] != weighted[n]] == [name]
    assert any("blk.0.attn_v.weight" in note for note in report["notes"])
    keys = keys_of(tmp_path / "w.gguf")
    assert keys["quantize.imatrix.file"] == (["STRING"], "i.gguf")
    assert keys["quantize.imatrix.entries_count"][1] == 1
    assert "sha256" in provenance_of(tmp_path / "w.gguf")["imatrix"]


@pytest.mark.parametrize("scheme", ["q4_0", "iq4_nl"])
def test_each_expert_has_its_own_importance(scheme: str, tmp_path: Path, done: Call) -> None:
    """Four matrices of 96 x 64 values, all in one tile."""
    name = "blk.0.ffn_up_exps.weight"
    directory = write_directory(tmp_path / "m", "mixtral")
    right = skewed(6, 4, WIDTH)
    shared = np.repeat(right[:1], 4, axis=0)  # what a tile would do that took its first row's
    errors = []
    for label, each in (("right", right), ("shared", shared)):
        file = importance(tmp_path / f"{label}.imatrix", {name: each})
        done(directory, scheme, tmp_path / f"{label}.gguf", "--imatrix", file)
        found = values_of(tmp_path / f"{label}.gguf")[name]
        assert found.shape == (4, INNER, WIDTH)
        stored = load_file(directory / "model.safetensors")
        experts = [
            stored[f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight"] for e in range(4)
        ]
        noise = np.square(found - np.stack(experts).astype(np.float64))
        errors.append((noise * right[:, None, :]).sum(axis=(1, 2)))
    assert errors[0][0] == errors[1][0]
    assert (errors[0][1:] < 0.9 * errors[1][1:]).all(), errors


def test_importance_that_decides_nothing_is_a_warning(
    wide: Path, tmp_path: Path, done: Call
) -> None:
    file = importance(tmp_path / "i.gguf", {"blk.1.attn_v.weight": skewed(5, 256)})
    report = done(wide, "f16", tmp_path / "m.gguf", "--imatrix", file)
    assert any("--imatrix has no effect" in w for w in report["warnings"])
    assert not [k for k in keys_of(tmp_path / "m.gguf") if "imatrix" in k]
    assert "imatrix" not in provenance_of(tmp_path / "m.gguf")
    both = {"blk.1.attn_v.weight": skewed(5, 256), "blk.9.attn_v.weight": skewed(5, 256)}
    file = importance(tmp_path / "j.gguf", both)
    report = done(wide, "q4_0", tmp_path / "n.gguf", "--imatrix", file)
    assert any("'blk.9.attn_v.weight'" in w for w in report["warnings"])


# --- several files --------------------------------------------------------------------------------


def test_shards_hold_the_tensors_and_keys_of_the_whole(sample: Path, split: Path) -> None:
    paths = sorted(split.iterdir())
    assert [p.name for p in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = keys_of(sample)
    together: dict[str, bytes] = {}
    for number, path in enumerate(paths):
        open_gguf(path).close()  # every rule of the format
        assert path.stat().st_size <= 1_000_000 + (150_000 if number == 0 else 10_000)
        found = keys_of(path)
        assert found.pop("split.no") == (["UINT16"], number)
        assert found.pop("split.count") == (["UINT16"], 3)
        assert found.pop("split.tensors.count") == (["INT32"], 39)
        found.pop("qconvert.provenance", None)
        wanted = {k: v for k, v in whole.items() if k != "qconvert.provenance"}
        assert found == (wanted if number == 0 else {k: wanted[k] for k in wanted if k == ARCH})
        part = bytes_of(path)
        assert not set(part) & set(together)
        together |= part
    assert together == bytes_of(sample)


def test_a_model_that_fits_is_one_file(sample: Path, tmp_path: Path, done: Call) -> None:
    report = done(SAMPLE, "q4_k_m", tmp_path / "m.gguf", "--shard-size", "9M")
    assert list(listing(tmp_path)) == ["m.gguf"]
    assert (report["files"], bytes_of(tmp_path / "m.gguf")) == (1, bytes_of(sample))


def test_one_existing_shard_is_refused_before_the_work(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"mine")
    line = ["quantize", SAMPLE, "--scheme", "q4_k_m", "-o", tmp_path / "m.gguf"]
    monkeypatch.setattr(conversion, "Workers", None)  # the work cannot even begin
    refused(call(*line, "--shard-size", "1M", "-q"), 4, "m-00002-of-00003.gguf", "--force")
    assert listing(tmp_path) == {"m-00002-of-00003.gguf": b"mine"}
    monkeypatch.undo()
    assert call(*line, "--shard-size", "1M", "--force").code == 0
    assert len(listing(tmp_path)) == 3


def test_a_failure_leaves_no_shard(tmp_path: Path, call: Call) -> None:
    directory = tmp_path / "model"
    shutil.copytree(SAMPLE, directory)
    tensors = load_file(directory / "model.safetensors")
    last = "model.layers.3.mlp.down_proj.weight"
    tensors[last] = tensors[last].copy()
    tensors[last][200, 3] = np.nan
    save_file(tensors, directory / "model.safetensors")
    before = listing(tmp_path)
    line = ["quantize", directory, "--scheme", "q4_0", "-o", tmp_path / "m.gguf", "-q"]
    refused(call(*line, "--shard-size", "1M"), 3, "blk.3.ffn_down.weight")
    assert listing(tmp_path) == before


# --- several files as a source --------------------------------------------------------------------


def test_a_split_model_is_read_by_its_first_file(
    sample: Path, split: Path, tmp_path: Path, call: Call, done: Call
) -> None:
    model = open_model(split / "m-00001-of-00003.gguf")
    assert isinstance(model, SplitGgufModel)
    with_gguf = bytes_of(sample)
    assert {t.name: model.raw(t, 0, t.nbytes) for t in model.tensors} == with_gguf
    assert [s.name for s in model.sources] == sorted(p.name for p in split.iterdir())
    assert not [k for k in model.metadata if k.startswith("split.")]
    model.check_unchanged()
    model.close()
    found = call("verify", split / "m-00001-of-00003.gguf", "--against", SAMPLE, "--json")
    assert (found.code, found.json["status"]) == (0, "pass")
    again = tmp_path / "m.gguf"
    done(split / "m-00001-of-00003.gguf", "q4_k_m", again, "--allow-requantize")
    assert bytes_of(again) == with_gguf
    names = [s["name"] for s in provenance_of(again)["sources"]]
    assert names == sorted(p.name for p in split.iterdir())
    assert without(keys_of(again)) == without(keys_of(sample))


def without(keys: dict[str, Any], *more: str) -> dict[str, Any]:
    """Keys that do not say where a file came from."""
    return {k: v for k, v in keys.items() if k not in ("qconvert.provenance", *more)}


def test_a_model_split_by_gguf_py_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", split_max_tensors=2)
    arrays = {f"t{i}": gaussian(i, 3, 32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(tmp_path / "x-00001-of-00003.gguf")
    for tensor in model.tensors:
        wanted = arrays.pop(tensor.name).ravel()
        np.testing.assert_array_equal(model.values(tensor, 0, tensor.size), wanted)
    assert not arrays
    model.close()


def test_no_file_of_a_split_source_is_written_over(split: Path, tmp_path: Path, call: Call) -> None:
    directory = tmp_path / "split"
    shutil.copytree(split, directory)
    before = listing(directory)
    source = directory / "m-00001-of-00003.gguf"
    line = ["quantize", source, "--scheme", "q8_0", "--allow-requantize", "--force", "-q", "-o"]
    for name in ("m-00002-of-00003.gguf", "m-00001-of-00003.gguf"):
        refused(call(*line, directory / name), 4, "the output is the input")
    refused(call(*line, directory / "m.gguf", "--shard-size", "2M"), 4, "the output is the input")
    assert listing(directory) == before


def rewritten(path: Path, **keys: int | None) -> Path:
    """One file of a split model with other ``split`` keys, None to leave one out."""
    reader = gguf.GGUFReader(path)
    wanted = {k: f.contents() for k, f in reader.fields.items() if k.startswith("split.")}
    wanted |= {"split." + k.replace("_", "."): v for k, v in keys.items()}
    tensors = [(t.name, np.array(t.data), t.tensor_type) for t in reader.tensors]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in wanted.items():
        if value is not None:
            writer.add_uint16(key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("change", "code", "kind"),
    [
        (lambda d: (d / FILES[2]).unlink(), "GGUF-SPLIT-MISSING", InputError),
        (lambda d: (d / FILES[0]).rename(d / "m.gguf"), "GGUF-SPLIT-NAME", InputError),
        (lambda d: (d / FILES[1]).rename(d / FILES[0]), "GGUF-SPLIT-NAME", InputError),
        (lambda d: (d / FILES[0]).unlink(), "GGUF-SPLIT-FIRST", InputError),
        (lambda d: shutil.copy(d / FILES[1], d / FILES[2]), "GGUF-SPLIT-KEYS", FormatError),
        (lambda d: rewritten(d / FILES[2], count=4), "GGUF-SPLIT-KEYS", FormatError),
        (lambda d: rewritten(d / FILES[2], no=None), "GGUF-SPLIT-KEYS", FormatError),
        (lambda d: rewritten(d / FILES[0], tensors_count=38), "GGUF-SPLIT-KEYS", FormatError),
        (
            lambda d: (shutil.copy(d / FILES[1], d / FILES[2]), rewritten(d / FILES[2], no=2)),
            "GGUF-DUPLICATE-TENSOR",
            FormatError,
        ),
        (lambda d: (d / FILES[2]).write_bytes(b"GGUF"), "GGUF-TRUNCATED", FormatError),
    ],
)
def test_files_that_are_no_whole_model_are_refused(
    change: Callable[[Path], Any], code: str, kind: type[QconvertError], tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(6):
        writer.add_tensor(f"t{i}", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    open_model(tmp_path / FILES[0]).close()
    change(tmp_path)
    first = next(
        p for p in (tmp_path / FILES[0], tmp_path / "m.gguf", tmp_path / FILES[1]) if p.exists()
    )
    with pytest.raises(kind) as refusal:
        open_model(first)
    assert refusal.value.code == code


# --- from GGUF ------------------------------------------------------------------------------------


def test_a_gguf_source_gives_the_bytes_that_the_directory_gives(
    sample: Path, half: Path, tmp_path: Path, done: Call
) -> None:
    """F16 holds these BF16 weights exactly, so that nothing can differ."""
    assert set(types_of(half).values()) == {"F16", "F32"}
    done(half, "q4_k_m", tmp_path / "m.gguf")
    assert bytes_of(tmp_path / "m.gguf") == bytes_of(sample)
    assert list(keys_of(tmp_path / "m.gguf").items()) == [
        (k, v if k != "qconvert.provenance" else keys_of(tmp_path / "m.gguf")[k])
        for k, v in keys_of(sample).items()
    ]
    assert provenance_of(tmp_path / "m.gguf")["sources"][0]["name"] == "m.gguf"


def foreign(path: Path, *, quantized: bool = False) -> Path:
    """A GGUF file by gguf-py with keys of every type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv([2])
    writer.add_file_type(1)
    writer.add_quantization_version(1)
    writer.add_uint8("own.u8", 200)
    writer.add_int8("own.i8", -3)
    writer.add_uint16("own.u16", 60_000)
    writer.add_int64("own.i64", -(1 << 40))
    writer.add_float64("own.f64", 0.1)
    writer.add_float32("own.f32", 1e-5)
    writer.add_bool("own.flag", True)
    writer.add_string("own.text", "zwölf\n")
    writer.add_array("own.words", ["", "é", "x" * (1 << 20)])  # longer than one read
    writer.add_array("own.floats", [0.5, -1.0])
    writer.add_key_value("own.bytes", [1, 255], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(500)])
    writer.add_string("quantize.imatrix.file", "old.dat")
    writer.add_string("qconvert.provenance", "{}")
    kind = gguf.GGMLQuantizationType.Q8_0
    for i, name in enumerate(("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight")):
        values = gaussian(30 + i, 64, 256)
        if quantized and i:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.add_tensor("output_norm.weight", gaussian(40, 256))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_of_a_gguf_source_are_carried_with_their_types(tmp_path: Path, done: Call) -> None:
    source = foreign(tmp_path / "s.gguf")
    done(source, "q8_0", tmp_path / "m.gguf")
    before, after = keys_of(source), keys_of(tmp_path / "m.gguf")
    own = [k for k in before if k.startswith(("own.", "llama.", "tokenizer."))]
    assert len(own) == 15
    for key in own:
        assert after[key] == before[key], key
    assert after["general.file_type"] == (["UINT32"], int(gguf.LlamaFileType.MOSTLY_Q8_0))
    assert after["general.quantization_version"] == (["UINT32"], 2)
    assert "quantize.imatrix.file" not in after
    assert provenance_of(tmp_path / "m.gguf")["options"] == {"scheme": "q8_0"}
    assert types_of(tmp_path / "m.gguf")["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_quantized_source_needs_leave_and_keeps_what_has_its_type(
    tmp_path: Path, call: Call, done: Call
) -> None:
    source = foreign(tmp_path / "s.gguf", quantized=True)
    target = tmp_path / "m.gguf"
    for kind in ("gguf", "qblk"):
        scheme = {"gguf": "q4_0", "qblk": "q4_block32"}[kind]
        line = ["quantize", source, "--scheme", scheme, "-o", tmp_path / f"m.{kind}", "-q"]
        refused(call(*line), 2, "quantized already", "Q8_0", "--allow-requantize")
    assert list(listing(tmp_path)) == ["s.gguf"]
    options = ["--allow-requantize", "--keep", "*attn_q*", "--tensor-type", "ffn_up=q4_0"]
    done(source, "q8_0", target, *options)
    assert types_of(target) == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q8_0",
        "blk.0.ffn_up.weight": "Q4_0",
        "output_norm.weight": "F32",
    }
    before, after = bytes_of(source), bytes_of(target)
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        assert after[name] == before[name]
    decoded = values_of(source)["blk.0.ffn_up.weight"]
    assert after["blk.0.ffn_up.weight"] == quantized_like_llama(decoded)
    assert provenance_of(target)["options"]["allow_requantize"] is True


def quantized_like_llama(values: NDArray[np.float32]) -> bytes:
    """Q4_0 by our own kernels on values that gguf-py decoded."""
    from qconvert import kernels

    return kernels.ggml_encode("Q4_0", values.reshape(-1, 32), None).tobytes()


def test_a_quantized_source_can_be_decoded(tmp_path: Path, done: Call) -> None:
    source = foreign(tmp_path / "s.gguf", quantized=True)
    done(source, "f32", tmp_path / "m.gguf", "--allow-requantize")
    assert set(types_of(tmp_path / "m.gguf").values()) == {"F32"}
    wanted = values_of(source)
    for name, found in values_of(tmp_path / "m.gguf").items():
        np.testing.assert_array_equal(found, wanted[name])


def test_gguf_becomes_qblk(half: Path, tmp_path: Path, call: Call, done: Call) -> None:
    done(half, "q8_block64", tmp_path / "m.qblk")
    found = call("verify", tmp_path / "m.qblk", "--against", half, "--min-sqnr", 40, "--json")
    assert (found.code, found.json["status"]) == (0, "pass")
    model = open_model(tmp_path / "m.qblk")
    stored = {t.name: t for t in model.tensors}
    wanted = values_of(half)
    assert {n: t.shape for n, t in stored.items()} == {n: v.shape for n, v in wanted.items()}
    name = "blk.1.ffn_down.weight"
    array = model.values(stored[name], 0, stored[name].size)
    assert np.abs(array - wanted[name].ravel()).max() < 0.01 * np.abs(wanted[name]).max()
    model.close()


def test_qblk_with_companions_gives_the_gguf_of_the_directory(
    sample: Path, tmp_path: Path, call: Call, done: Call
) -> None:
    done(SAMPLE, "bf16", tmp_path / "tiny-llama.qblk")  # the weights are BF16: nothing is lost
    done(tmp_path / "tiny-llama.qblk", "q4_k_m", tmp_path / "m.gguf")
    assert bytes_of(tmp_path / "m.gguf") == bytes_of(sample)
    assert without(keys_of(tmp_path / "m.gguf")) == without(keys_of(sample))
    done(SAMPLE, "q8_block32", tmp_path / "q.qblk")
    line = ["quantize", tmp_path / "q.qblk", "--scheme", "q4_k_m", "-o", tmp_path / "q.gguf", "-q"]
    refused(call(*line), 2, "quantized already", "q8_block32", "--allow-requantize")
    done(tmp_path / "q.qblk", "q4_k_m", tmp_path / "q.gguf", "--allow-requantize")
    assert types_of(tmp_path / "q.gguf") == LLAMA_QUANTIZE
    assert without(keys_of(tmp_path / "q.gguf"), "general.name") == without(
        keys_of(sample), "general.name"
    )


# --- refusals, each before a weight is read -------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory, in a process where no weight can be read."""

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(conversion.Job, "tasks", read)
    directory: Path = write_directory(tmp_path / "m", "llama")
    return directory


def change_tensors(directory: Path, change: Callable[[Arrays], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def another_pre_tokenizer(directory: Path) -> None:
    fields = byte_level("llama-bpe")
    fields["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d+|\D+"
    (directory / "tokenizer.json").write_text(json.dumps(fields))


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_DIRECTORIES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda d: (d / "config.json").unlink(), ["ARCH-NO-CONFIG", "config.json"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["ARCH-NO-TOKENIZER", "--raw"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["ST-NO-MODEL"]),
    "pre-tokenizer": (another_pre_tokenizer, ["ARCH-PRE-TOKENIZER", "--pre-tokenizer NAME"]),
    "architecture": (lambda d: change_config(d, architectures=["Nope"]), ["ARCH-UNKNOWN", "Nope"]),
    "tensor missing": (
        lambda d: change_tensors(d, lambda t: t.pop(Q)),
        ["ARCH-TENSOR-MISSING", "'blk.1.attn_q.weight'"],
    ),
    "tensor left over": (
        lambda d: change_tensors(d, lambda t: t.update({"odd.weight": gaussian(1, 4, 4)})),
        ["ARCH-TENSOR-LEFT", "odd.weight"],
    ),
    "shape": (
        lambda d: change_tensors(d, lambda t: t.update({Q: gaussian(1, WIDTH, WIDTH + 2)})),
        ["ARCH-SHAPE", Q, str(WIDTH + 2)],
    ),
    "shape of config": (lambda d: change_config(d, hidden_size=2 * WIDTH), ["ARCH-SHAPE"]),
    "heads": (lambda d: change_config(d, num_attention_heads=HEADS + GROUPS // 2), ["ARCH-"]),
    "vocabulary": (lambda d: change_config(d, vocab_size=100), ["ARCH-"]),
    "json": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_3_is_a_directory_that_llama_cpp_would_not_run(
    case: str, tiny: Path, tmp_path: Path, call: Call
) -> None:
    change, words = BAD_DIRECTORIES[case]
    change(tiny)
    before = listing(tmp_path)
    line = ["quantize", tiny, "--scheme", "q8_0", "-o", tmp_path / "m.gguf", "-q"]
    refused(call(*line), 3, *words)
    assert listing(tmp_path) == before


BAD_LINES: dict[str, tuple[int, list[str], list[str]]] = {
    "imatrix of another width": (
        3, ["--imatrix", str(DATA / "experts.imatrix.gguf")], ["IMATRIX-SHAPE", "32 channels"],
    ),
    "imatrix missing": (3, ["--imatrix", "nowhere.gguf"], ["nowhere.gguf", "FILE-MISSING"]),
    "imatrix is none": (3, ["--imatrix", "m/config.json"], ["IMATRIX-FORMAT"]),
    "pure": (3, ["--pure", "--scheme", "q4_k_m"], ["do not divide", "--pure"]),
    "no fallback": (3, ["--no-fallback", "--scheme", "q4_k_m"], ["do not divide"]),
    "raw mix": (2, ["--raw", "--scheme", "q4_k_m"], ["mix", "--raw"]),
    "raw pure": (2, ["--raw", "--pure"], ["raw", "--tensor-scheme"]),
    "raw type": (2, ["--raw", "--tensor-type", "q=q8_0"], ["raw", "--tensor-scheme"]),
    "raw pre-tokenizer": (2, ["--raw", "--pre-tokenizer", "qwen2"], ["--pre-tokenizer"]),
    "raw imatrix": (
        3, ["--raw", "--imatrix", str(DATA / "experts.imatrix.gguf")], ["IMATRIX-MODEL"],
    ),
    "tensor type of nothing": (2, ["--tensor-type", "nope=q8_0"], ["nope", "no tensor"]),
    "tensor type of a norm": (2, ["--tensor-type", "attn_norm=q8_0"], ["attn_norm"]),
    "no expression": (2, ["--tensor-type", "(=q8_0"], ["regular expression"]),
    "no type": (2, ["--tensor-type", "attn_q=q9_9"], ["q9_9"]),
    "output type": (2, ["--output-tensor-type", "q9_9"], ["q9_9"]),
    "embedding type": (2, ["--token-embedding-type", "q8"], ["q8", "q8_0"]),
    "keep nothing": (2, ["--keep", "nope*"], ["nope*"]),
    "shard size": (2, ["--shard-size", "0"], ["--shard-size"]),
    "shard size in words": (2, ["--shard-size", "big"], ["--shard-size", "500M"]),
    "no calibration": (2, ["--rounding", "compensated"], ["--rounding compensated", "--gram"]),
    "rounding": (2, ["--rounding", "up"], ["nearest or compensated"]),
    "qblk scheme": (2, ["--scheme", "q4_block64"], [".qblk"]),
    "unknown scheme": (2, ["--scheme", "q4_k_x"], ["q4_k_m"]),
    "no directory": (4, ["-o", "nowhere/m.gguf"], ["nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_2_3_and_4_are_refused_before_the_work(
    case: str, tiny: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, options, words = BAD_LINES[case]
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    usual = {"--scheme": "q8_0", "-o": "m.gguf"}
    missing = [w for pair in usual.items() if pair[0] not in options for w in pair]
    line = ["quantize", tiny, *missing, "-q", *options]
    refused(call(*line), code, *words)
    assert listing(tmp_path) == before


def test_3_is_a_name_that_gguf_cannot_hold(tmp_path: Path, call: Call) -> None:
    source = save(tmp_path / "s.safetensors", {"n" * 64: gaussian(1, 32, 32)})
    line = ["quantize", source, "--scheme", "q8_0", "--raw", "-o", tmp_path / "m.gguf", "-q"]
    refused(call(*line), 3, "GGUF-NAME", "63 bytes")
    assert list(listing(tmp_path)) == ["s.safetensors"]


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path, call: Call) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    target = tmp_path / "m.gguf"
    target.write_bytes(b"mine")
    line = ["quantize", directory, "--scheme", "q8_0", "-o", target, "-q"]
    refused(call(*line), 4, "exists", "--force")
    assert target.read_bytes() == b"mine"
    assert call(*line, "--force").code == 0
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_pre_tokenizer_without_a_tokenizer_is_refused(
    half: Path, tmp_path: Path, call: Call
) -> None:
    line = ["quantize", half, "--scheme", "q8_0", "-o", tmp_path / "m.gguf", "-q"]
    refused(call(*line, "--pre-tokenizer", "qwen2"), 2, "--pre-tokenizer")


def test_options_that_may_surprise_are_warnings(tmp_path: Path, done: Call) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    options = ["--pre-tokenizer", "lama-bpe", "--min-values", 5]
    warnings = done(directory, "q8_0", tmp_path / "m.gguf", *options)["warnings"]
    assert any("'lama-bpe'" in w and "'llama-bpe'" in w for w in warnings)
    assert any("--min-values" in w for w in warnings)
    assert keys_of(tmp_path / "m.gguf")["tokenizer.ggml.pre"][1] == "lama-bpe"
    # A name that llama.cpp knows contradicts the rules of tokenizer.json, and gives other tokens.
    told = done(directory, "q8_0", tmp_path / "n.gguf", "--pre-tokenizer", "qwen2")["warnings"]
    assert sum("'llama-bpe'" in w and "'qwen2'" in w for w in told) == 1
    assert all("'llama-bpe'" in w or "other tokens than the tokenizer" in w for w in told)


# --- raw ------------------------------------------------------------------------------------------


def test_raw_keeps_names_and_types_of_anything(tmp_path: Path, done: Call, call: Call) -> None:
    arrays = {"any.weight": gaussian(1, 8, 256), "b": gaussian(2, 3, dtype=ml_dtypes.bfloat16)}
    source = save(tmp_path / "s.safetensors", arrays, author="tests")
    done(source, "q4_k", tmp_path / "m.gguf", "--raw")
    assert types_of(tmp_path / "m.gguf") == {"any.weight": "Q4_K", "b": "BF16"}
    keys = keys_of(tmp_path / "m.gguf")
    assert keys[ARCH][1] == "raw"
    assert keys["qconvert.source.author"][1] == "tests"
    assert "general.file_type" not in keys
    # A raw file stays one, and has no mixes.
    done(tmp_path / "m.gguf", "q8_0", tmp_path / "n.gguf", "--allow-requantize")
    assert types_of(tmp_path / "n.gguf")["any.weight"] == "Q8_0"
    line = ["quantize", tmp_path / "m.gguf", "--scheme", "q4_k_m", "--allow-requantize", "-q"]
    refused(call(*line, "-o", tmp_path / "o.gguf"), 2, "mix")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_converted_and_verified(
    name: str, tmp_path: Path, done: Call, call: Call
) -> None:
    directory = write_directory(tmp_path / name, name)
    target = tmp_path / f"{name}.gguf"
    done(directory, "q4_k_m", target)
    found = call("verify", target, "--against", directory, "--json", "-q", "--rows", 1)
    assert (found.code, found.json["status"]) == (0, "pass"), found


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Names of the source, as inspect lists them, and those of the file.
        ({"keep": "lm_head.weight"}, {"output.weight": "BF16"}),
        ({"keep": "output.weight"}, {"output.weight": "BF16"}),
        (
            {"tensor_scheme": "model.layers.0.*up_proj*=q8_0"},
            {"blk.0.ffn_up.weight": "q8_0"},
        ),
        # A glob is of a whole name: this one is not of blk.0.attn_output.weight.
        ({"tensor_scheme": "output.weight=q8_0"}, {"output.weight": "q8_0"}),
    ],
)
def test_globs_are_of_the_source_names_or_of_the_files(
    options: dict[str, str], wanted: dict[str, str], tmp_path: Path
) -> None:
    sample = ROOT / "samples/tiny-llama"
    plain = qconvert.quantize(sample, "q4_k_m", output=tmp_path / "m.gguf", dry_run=True)
    out = tmp_path / "m.gguf"
    asked = qconvert.quantize(sample, "q4_k_m", output=out, dry_run=True, **options)
    before = {t.name: t.stored for t in plain.tensors}
    changed = {t.name: t.stored for t in asked.tensors if t.stored != before[t.name]}
    assert changed == wanted

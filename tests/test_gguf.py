"""GGUF: block types against gguf-py, the reader and the writer against its reader and writer.

That llama.cpp loads what is written is checked in test_llama_cpp.py.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import tracemalloc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.errors import FormatError, InputError, QconvertError, UnsupportedError
from qconvert.files.gguf import MAX_HEADER, GgufModel, open_gguf
from qconvert.files.gguf_split import SplitGgufWriter, plan_shards, shard_path
from qconvert.files.gguf_writer import GgufTensor, GgufValue, GgufWriter, check_gguf
from qconvert.kernels.reference.ggml import GGML_BLOCKS, GgmlBlock
from qconvert.model import Model, TensorInfo

SEED = 20261122
TYPES = tuple(t for t in GGML_BLOCKS if t not in ("Q1_0", "Q2_0"))  # which gguf-py cannot decode
FROM_MINIMUM = ("Q4_1", "Q5_1")  # the others count from 0
# Types that gguf-py encodes, and whose encoding is settled: what is searched has own tests.
SETTLED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")


# --- block types ----------------------------------------------------------------------------------


def encode(kind: GgmlBlock, blocks: Any, importance: Any = None) -> NDArray[np.uint8]:
    return kernels.ggml_encode(kind.name, blocks, importance)


def decode(kind: GgmlBlock, data: Any) -> NDArray[np.float32]:
    return kernels.ggml_decode(kind.name, data)


def block_cases() -> dict[str, NDArray[np.float32]]:
    """Named blocks, each float32 of shape (k, 32)."""
    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal((500, 32)).astype(np.float32)
    cases = {
        f"normal times {scale:g}": normal * np.float32(scale)
        for scale in (1, 1e-3, 1e-30, 1e4, 1e7, 1e30)
    }
    with np.errstate(under="ignore"):
        for scale in (1e-37, 1e-38, 1e-39, 1e-41, 1e-44):
            cases[f"denormal {scale:g}"] = normal * np.float32(scale)
    bits = rng.integers(0, 1 << 32, (4000, 32), dtype=np.uint32).view(np.float32)
    cases["any finite bits"] = np.where(np.isfinite(bits), bits, np.float32(0))
    cases["range beyond float32"] = rng.choice([-3e38, 3e38, 0], (50, 32)).astype(np.float32)
    cases["ties"] = (rng.integers(-254, 255, (500, 32)) / 2).astype(np.float32)
    cases["ties of largest magnitude"] = rng.choice([-4, 4], (50, 32)).astype(np.float32)
    cases["integers"] = rng.integers(-16, 17, (500, 32)).astype(np.float32)
    cases["negative"] = -np.abs(normal) - 1
    cases["positive"] = np.abs(normal) + 1
    cases["zeros"] = np.zeros((3, 32), np.float32)
    cases["negative zeros"] = np.full((3, 32), -0.0, np.float32)
    cases["constant"] = np.full((3, 32), -3.3, np.float32)
    cases["one value"] = np.eye(32, dtype=np.float32) * np.float32(-7)
    return cases


CASES = block_cases()


def case_of(case: str, ggml_type: str) -> NDArray[np.float32]:
    """A case regrouped, and repeated where it is too short, for the type's blocks."""
    block = GGML_BLOCKS[ggml_type].block
    return np.resize(CASES[case], (max(CASES[case].size // block, 3), block))


def quantized_by_gguf(ggml_type: str, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        data: NDArray[np.uint8] = gguf.quants.quantize(blocks, gguf.GGMLQuantizationType[ggml_type])
    return data


def dequantized_by_gguf(ggml_type: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType[ggml_type]
    with np.errstate(all="ignore"):
        values: NDArray[np.float32] = gguf.quants.dequantize(data, kind)
    return values


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ggml_type", SETTLED)
def test_encoded_bytes_equal_those_of_gguf(ggml_type: str, case: str) -> None:
    kind = GGML_BLOCKS[ggml_type]
    blocks = case_of(case, ggml_type)
    data = encode(kind, blocks)
    assert data.dtype == np.uint8
    assert data.shape == (len(blocks), kind.nbytes)
    np.testing.assert_array_equal(data, quantized_by_gguf(ggml_type, blocks))


@pytest.mark.parametrize("ggml_type", SETTLED)
def test_zeros_of_both_signs_give_the_first_sign_as_in_ggml(ggml_type: str) -> None:
    """gguf-py's minimum of -0 and 0 depends on the processor; ours does not."""
    rng = np.random.default_rng(SEED)
    blocks = rng.choice(np.array([-0.0, 0.0], np.float32), (500, GGML_BLOCKS[ggml_type].block))
    data = kernels.ggml_encode(ggml_type, blocks)
    expected = quantized_by_gguf(ggml_type, blocks)
    if ggml_type in FROM_MINIMUM:
        expected[:, :2] = 0
        expected[:, 2:4] = blocks[:, :1].astype("<f2").view(np.uint8)
    np.testing.assert_array_equal(data, expected)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_decoded_bits_equal_those_of_gguf(ggml_type: str) -> None:
    rng = np.random.default_rng(SEED)
    kind = GGML_BLOCKS[ggml_type]
    # Random bytes: every code, and scales that are 0, negative, denormal, Inf and NaN.
    data = rng.integers(0, 256, (20_000, kind.nbytes), dtype=np.uint8)
    values = decode(kind, data)
    expected = dequantized_by_gguf(ggml_type, data)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(values[known].view(np.uint32), expected[known].view(np.uint32))


@pytest.mark.parametrize("ggml_type", [t for t in TYPES if not t.endswith("_K")])  # test_ggml_k.py
def test_parts_give_the_values(ggml_type: str) -> None:
    kind = GGML_BLOCKS[ggml_type]
    blocks = case_of("normal times 1", ggml_type)
    data = encode(kind, blocks)
    parts = kind.splitter(data)
    assert parts.codes.dtype == np.int16
    assert parts.scale.dtype == np.float32
    assert parts.codes.shape == blocks.shape
    assert parts.scale.shape == (len(blocks), kind.block // kind.group)
    assert (parts.offset is not None) == (ggml_type in FROM_MINIMUM)
    assert kind.codes[0] <= parts.codes.min()
    assert parts.codes.max() <= kind.codes[1]
    codes = parts.codes.reshape(*parts.scale.shape, kind.group)
    values = parts.scale[:, :, None] * codes
    if parts.offset is not None:
        values += parts.offset[:, :, None]
    values = values.reshape(blocks.shape)
    np.testing.assert_array_equal(values, dequantized_by_gguf(ggml_type, data))


# MXFP4 holds any float32, NVFP4's scales saturate.
@pytest.mark.parametrize("ggml_type", [t for t in TYPES if t not in ("MXFP4", "NVFP4")])
def test_scales_beyond_their_type_are_reported(ggml_type: str) -> None:
    kind = GGML_BLOCKS[ggml_type]
    one_of_many = case_of("normal times 1", ggml_type)
    assert kind.finite_scales(encode(kind, one_of_many))
    assert not kind.finite_scales(encode(kind, case_of("normal times 1e+30", ggml_type)))
    one_of_many[17, 3] = 1e30
    assert not kind.finite_scales(encode(kind, one_of_many))


@pytest.mark.parametrize("ggml_type", FROM_MINIMUM)
def test_a_minimum_beyond_float16_is_reported(ggml_type: str) -> None:
    blocks = np.full((1, 32), 1e6, np.float32)  # scale 0
    kind = GGML_BLOCKS[ggml_type]
    assert not kind.finite_scales(encode(kind, blocks))


# --- writing --------------------------------------------------------------------------------------

WRITTEN = (
    GgufTensor("token_embd.weight", (3, 64), "Q4_0"),
    GgufTensor("norm", (5,), "F32"),
    GgufTensor("scalar", (), "F16"),
    GgufTensor("experts", (2, 3, 1, 32), "Q8_0"),
    GgufTensor("ids", (7,), "I64"),
    GgufTensor("h", (3, 3), "BF16"),
)
KEYS: dict[str, str | int | float | bool] = {
    "general.architecture": "llama",
    "general.name": "",
    "general.file_type": 2,
    "negative": -5,
    "large": 1 << 40,
    "least": -(1 << 40),
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "flag": True,
    "text": "zwölf\nlines",
    "general.alignment": "64",
}


def payloads(tensors: Sequence[GgufTensor]) -> list[bytes]:
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, 256, t.nbytes, dtype=np.uint8).tobytes() for t in tensors]


def write(path: Path, tensors: Sequence[GgufTensor], data: Sequence[bytes]) -> None:
    writer = GgufWriter(path, KEYS, tensors)
    for index, payload in enumerate(data):
        writer.begin(index)
        writer.append(payload[:7])
        writer.append(payload[7:])
    writer.finish()


def test_gguf_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"something longer that was here before" * 1000)
    data = payloads(WRITTEN)
    write(path, WRITTEN, data)
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == [t.name for t in WRITTEN]
    for found, tensor, payload in zip(reader.tensors, WRITTEN, data, strict=True):
        assert found.tensor_type.name == tensor.ggml_type
        assert tuple(found.shape.tolist())[::-1] == tensor.shape
        assert found.data.tobytes() == payload
        assert found.data_offset % 32 == 0
    assert path.stat().st_size % 32 == 0
    contents = {key: reader.get_field(key) for key in KEYS if key != "general.alignment"}
    assert {key: field.contents() for key, field in contents.items()} == {
        **{key: value for key, value in KEYS.items() if key != "general.alignment"},
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    }
    types = gguf.GGUFValueType
    assert contents["general.file_type"].types == [types.UINT32]
    assert contents["negative"].types == [types.INT32]
    assert contents["large"].types == [types.UINT64]
    assert contents["least"].types == [types.INT64]
    assert reader.get_field("general.alignment") is None


TYPED: dict[str, tuple[Any, list[str], Any]] = {
    # key: what is given, the types in the file, what gguf-py reads
    "words": (["", "zwölf", "Ġthe"], ["ARRAY", "STRING"], ["", "zwölf", "Ġthe"]),
    "counts": ([1, 2], ["ARRAY", "UINT32"], [1, 2]),
    "some negative": ((1, -2), ["ARRAY", "INT32"], [1, -2]),
    "some large": ([1, 1 << 40], ["ARRAY", "UINT64"], [1, 1 << 40]),
    "numbers": ([0.5, -2.0], ["ARRAY", "FLOAT32"], [0.5, -2.0]),
    "flags": ([True, False], ["ARRAY", "BOOL"], [True, False]),
    "types": (GgufValue("INT32", [1, 6]), ["ARRAY", "INT32"], [1, 6]),
    "charsmap": (GgufValue("UINT8", [0, 255]), ["ARRAY", "UINT8"], [0, 255]),
    "narrow": (GgufValue("UINT16", 3), ["UINT16"], 3),
    "wide": (GgufValue("FLOAT64", 0.1), ["FLOAT64"], 0.1),
    "signed": (GgufValue("INT32", 3), ["INT32"], 3),
}


def test_arrays_and_stated_types_are_written_as_gguf_reads_them(tmp_path: Path) -> None:
    keys = {key: given for key, (given, _, _) in TYPED.items()}
    GgufWriter(tmp_path / "m.gguf", {"general.architecture": "raw", **keys}, []).finish()
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, (_, types, wanted) in TYPED.items():
        field = reader.get_field(key)
        assert [t.name for t in field.types] == types, key
        assert field.contents() == wanted, key
    ours = open_gguf(tmp_path / "m.gguf")
    assert ours.metadata["counts"] == "[2 values]"
    ours.close()


def test_a_model_is_split_at_tensors(tmp_path: Path) -> None:
    assert shard_path(Path("d/m.gguf"), 1, 12) == Path("d/m-00001-of-00012.gguf")
    sizes = [t.nbytes for t in WRITTEN]
    assert sizes == [108, 20, 2, 204, 56, 18]
    assert plan_shards(WRITTEN, 130) == [3, 1, 2]
    assert plan_shards(WRITTEN, 1) == [1] * 6
    assert plan_shards(WRITTEN, 10_000) == [6]
    many = [GgufTensor("t", (1,), "F32")] * 65_536
    with pytest.raises(UnsupportedError) as refusal:
        plan_shards(many, 1)
    assert refusal.value.code == "GGUF-SHARDS"
    counts = [3, 1, 2]
    paths = [shard_path(tmp_path / "m.gguf", i, 3) for i in (1, 2, 3)]
    data = payloads(WRITTEN)
    writer = SplitGgufWriter(paths, KEYS, WRITTEN, counts)
    with pytest.raises(RuntimeError, match="file 2"):
        writer.finish()
    for index, payload in enumerate(data):
        writer.begin(index)
        writer.append(payload)
    writer.finish()
    assert sorted(tmp_path.iterdir()) == paths
    found = []
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        found += [(t.name, t.data.tobytes()) for t in reader.tensors]
        assert len(reader.tensors) == counts[number]
        for key, wanted in (
            ("split.no", ("UINT16", number)),
            ("split.count", ("UINT16", 3)),
            ("split.tensors.count", ("INT32", 6)),
            ("general.architecture", ("STRING", "llama")),
        ):
            field = reader.get_field(key)
            assert (field.types[0].name, field.contents()) == wanted
        assert (reader.get_field("general.name") is not None) == (number == 0)
    assert found == [(t.name, d) for t, d in zip(WRITTEN, data, strict=True)]


def test_a_name_in_two_files_of_a_model_is_refused_before_writing(tmp_path: Path) -> None:
    paths = [shard_path(tmp_path / "m.gguf", i, 2) for i in (1, 2)]
    with pytest.raises(UnsupportedError) as refusal:
        SplitGgufWriter(paths, KEYS, [GgufTensor("t", (1,), "F32")] * 2, [1, 1])
    assert refusal.value.code == "GGUF-DUPLICATE-TENSOR"
    assert not list(tmp_path.iterdir())


def test_we_read_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = payloads(WRITTEN)
    write(path, WRITTEN, data)
    model = open_gguf(path)
    assert model.tensors == tuple(
        TensorInfo(t.name, t.shape, t.ggml_type, t.nbytes) for t in WRITTEN
    )
    assert [model.raw(t, 0, t.nbytes) for t in model.tensors] == data
    model.close()


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, WRITTEN, payloads(WRITTEN))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("code", "tensors"),
    [
        ("GGUF-NAME", [GgufTensor("é" * 32, (1,), "F32")]),
        ("GGUF-NAME", [GgufTensor("", (1,), "F32")]),
        ("GGUF-NAME", [GgufTensor("a\0b", (1,), "F32")]),
        ("GGUF-NAME", [GgufTensor("\ud800", (1,), "F32")]),
        ("GGUF-DIMS", [GgufTensor("t", (1, 1, 1, 1, 1), "F32")]),
        ("GGUF-EMPTY", [GgufTensor("t", (4, 0), "F32")]),
        ("GGUF-BLOCK", [GgufTensor("t", (32, 33), "Q4_0")]),
        ("GGUF-BLOCK", [GgufTensor("t", (), "Q8_0")]),
        ("GGUF-DTYPE", [GgufTensor("t", (1,), "BOOL")]),
        ("GGUF-DTYPE", [GgufTensor("t", (1,), "U8")]),
        ("GGUF-DTYPE", [GgufTensor("t", (1,), "F8_E4M3")]),
        ("GGUF-DUPLICATE-TENSOR", [GgufTensor("t", (1,), "F32")] * 2),
    ],
)
def test_a_tensor_that_gguf_cannot_hold_is_refused_before_writing(
    tmp_path: Path, code: str, tensors: list[GgufTensor]
) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        check_gguf(tensors)
    assert refusal.value.code == code
    with pytest.raises(UnsupportedError):
        GgufWriter(tmp_path / "m.gguf", KEYS, tensors)
    assert not (tmp_path / "m.gguf").exists()


def test_a_name_of_63_bytes_is_written(tmp_path: Path) -> None:
    tensor = GgufTensor("n" * 63, (1,), "F32")
    write(tmp_path / "m.gguf", [tensor], [b"1234"])
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors[0].name == tensor.name


@pytest.mark.parametrize(
    ("code", "metadata"),
    [
        ("GGUF-ARCHITECTURE", {"general.name": "x"}),
        ("GGUF-ARCHITECTURE", {"general.architecture": ""}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": 1 << 64}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": -(1 << 63) - 1}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": 1e300}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": "\ud800"}),
        ("GGUF-KEY", {"general.architecture": "raw", "": 1}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": []}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": ["a", 1]}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": [1, True]}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": [[1], [2]]}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": ["\ud800"]}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": GgufValue("UINT32", -1)}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": GgufValue("UINT8", [0, 256])}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": GgufValue("FLOAT32", 1)}),
        ("GGUF-VALUE", {"general.architecture": "raw", "k": GgufValue("INT32", True)}),
    ],
)
def test_metadata_that_gguf_cannot_hold_is_refused_before_writing(
    tmp_path: Path, code: str, metadata: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        GgufWriter(tmp_path / "m.gguf", metadata, WRITTEN)
    assert refusal.value.code == code
    assert not (tmp_path / "m.gguf").exists()


def test_bytes_that_do_not_fit_the_tensors_are_a_bug(tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path / "m.gguf", KEYS, WRITTEN)
    with pytest.raises(RuntimeError, match="does not follow"):
        writer.begin(1)
    with pytest.raises(RuntimeError, match="too many"):
        writer.append(b"x")
    writer.begin(0)
    writer.append(bytes(WRITTEN[0].nbytes - 1))
    with pytest.raises(RuntimeError, match="too many"):
        writer.append(b"xy")
    for early in (partial(writer.begin, 1), writer.finish):
        with pytest.raises(RuntimeError, match="lacks 1 bytes"):
            early()
    writer.append(b"x")
    with pytest.raises(RuntimeError, match="tensor 1 was not written"):
        writer.finish()
    writer.close()
    writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror() -> None:
    with pytest.raises(OSError, match="No space"):
        GgufWriter(Path("/dev/full"), KEYS, WRITTEN)


# --- reading --------------------------------------------------------------------------------------


def write_with_gguf(path: Path) -> dict[str, NDArray[Any]]:
    """A file by gguf's own writer; name -> the values it stands for, flat."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((4, 96)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["<s>", "", "ü", "x" * 300])
    writer.add_array("scores", [0.5, 1.5])
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("eps", 1e-6)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("template", "a\n{b}")
    kinds = gguf.GGMLQuantizationType
    expected: dict[str, NDArray[Any]] = {}
    for kind in (kinds.F32, kinds.F16, kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q4_1, kinds.Q5_0):
        data = gguf.quants.quantize(x, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = gguf.quants.dequantize(data, kind).reshape(-1)
    whole = rng.integers(-(1 << 40), 1 << 40, (3, 5))
    writer.add_tensor("I64", whole)
    expected["I64"] = whole.reshape(-1).astype(np.float64)
    for name in ("F64", "I8", "I16", "I32"):
        small = rng.integers(-100, 100, (2, 3)).astype(f"{name[0].lower()}{int(name[1:]) // 8}")
        writer.add_tensor(name, small)
        expected[name] = small.reshape(-1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_we_read_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    expected = write_with_gguf(path)
    model: Model = open_gguf(path)
    assert (model.kind, model.path, model.companions) == ("gguf", path, ())
    assert [t.name for t in model.tensors] == list(expected)
    for tensor in model.tensors:
        values = model.values(tensor, 0, tensor.size)
        assert tensor.dtype == tensor.name
        assert values.dtype == (np.float64 if tensor.name in ("F64", "I64", "I32") else np.float32)
        np.testing.assert_array_equal(values, expected[tensor.name])
    assert model.tensors[0].shape == (4, 96)
    assert model.metadata == {
        "general.architecture": "llama",
        "tokens": "[4 values]",
        "scores": "[2 values]",
        "u8": "200",
        "i8": "-3",
        "u16": "60000",
        "i16": "-300",
        "i32": "-70000",
        "u64": str(1 << 63),
        "i64": str(-(1 << 62)),
        "eps": "1e-06",
        "f64": "0.1",
        "yes": "true",
        "no": "false",
        "template": "a\n{b}",
    }
    reader = gguf.GGUFReader(path)
    header = path.read_bytes()[: reader.data_offset]
    (source,) = model.sources
    assert source.name == "m.gguf"
    assert source.size == path.stat().st_size
    assert source.header_sha256 == hashlib.sha256(header).hexdigest()
    model.close()


def test_arrays_of_strings_are_read_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("a.numbers", [1, 2])
    writer.add_array("a.words", ["one", "", "drei €"])
    writer.add_string("a.word", "one")
    writer.add_tensor("w", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(path)
    try:
        assert model.metadata["a.words"] == "[3 values]"
        assert [model.strings(key) for key in ("a.words", "a.word", "a.numbers", "none")] == [
            ("one", "", "drei €"),
            None,
            None,
            None,
        ]
        assert model.values(model.tensors[0], 0, 8).tolist() == list(range(8))
    finally:
        model.close()


@pytest.mark.parametrize("name", ["F32", "BF16", "I64", "Q4_0", "Q5_0"])
def test_any_run_of_values_is_a_slice_of_all(tmp_path: Path, name: str) -> None:
    expected = write_with_gguf(tmp_path / "m.gguf")[name]
    model = open_gguf(tmp_path / "m.gguf")
    tensor = next(t for t in model.tensors if t.name == name)
    rng = random.Random(SEED)
    cuts = [sorted(rng.choices(range(tensor.size + 1), k=2)) for _ in range(50)]
    for start, stop in [*cuts, (0, 0), (tensor.size, tensor.size), (5, 5)]:
        np.testing.assert_array_equal(model.values(tensor, start, stop), expected[start:stop])
    with pytest.raises(ValueError, match="of a tensor of"):
        model.values(tensor, 0, tensor.size + 1)
    with pytest.raises(ValueError, match="of a tensor of"):
        model.raw(tensor, -1, 1)
    model.close()


DECODED_BY_GGUF = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ1_M", "IQ3_S"),
)


def one_tensor(kind: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return gguf_bytes([], [("t", shape, kind, 0)], data)


@pytest.mark.parametrize("ggml_type", DECODED_BY_GGUF)
def test_other_block_types_are_decoded_by_gguf(tmp_path: Path, ggml_type: str) -> None:
    kind = gguf.GGMLQuantizationType[ggml_type]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x70 make every float16 scale finite, wherever the block keeps it.
    data = np.random.default_rng(SEED).integers(0, 0x70, (3, 2 * nbytes), dtype=np.uint8)
    (tmp_path / "m.gguf").write_bytes(one_tensor(kind, (3, 2 * block), data.tobytes()))
    model = open_gguf(tmp_path / "m.gguf")
    expected = dequantized_by_gguf(ggml_type, data).reshape(-1)
    (tensor,) = model.tensors
    assert tensor == TensorInfo("t", (3, 2 * block), ggml_type, data.nbytes)
    for start, stop in ((0, 6 * block), (block - 1, block + 1), (3, 3), (block, block)):
        np.testing.assert_array_equal(model.values(tensor, start, stop), expected[start:stop])
    model.close()


@pytest.mark.parametrize(("number", "bits", "values"), [(41, 1, [-1, 1]), (42, 2, [-1, 0, 1, 2])])
def test_one_and_two_bits_mean_what_llama_cpp_says(
    tmp_path: Path, number: int, bits: int, values: list[int]
) -> None:
    """dequantize_row_q1_0 and _q2_0 of ggml-quants.c, a value at a time."""
    rng = np.random.default_rng(SEED)
    halves = np.float16([0.25, -3, 1e-5])
    codes = rng.integers(0, 256, (3, 16), dtype=np.uint8)
    block = 128 // bits
    data = b"".join(h.tobytes() + c.tobytes() for h, c in zip(halves, codes, strict=True))
    (tmp_path / "m.gguf").write_bytes(one_tensor(number, (3, block), data))
    model = open_gguf(tmp_path / "m.gguf")
    found = model.values(model.tensors[0], 0, 3 * block)
    each = 8 // bits
    wanted = [
        values[int(codes[b, j // each]) >> (j % each * bits) & ((1 << bits) - 1)]
        * np.float32(halves[b])
        for b in range(3)
        for j in range(block)
    ]
    np.testing.assert_array_equal(found, np.float32(wanted))
    model.close()


def test_the_other_type_of_number_42_is_named(tmp_path: Path) -> None:
    """PrismML's blocks: 128 values in 34 bytes, where llama.cpp has 2 x 64 in 36."""
    tensors = [("a", (64, 128), 42, 0), ("b", (64, 128), 42, 64 * 34)]
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([], tensors, bytes(2 * 64 * 36)))
    with pytest.raises(FormatError, match="shares bytes") as refusal:
        open_gguf(tmp_path / "m.gguf")
    assert "blocks of 128" in str(refusal.value.hint)


@pytest.mark.parametrize("ggml_type", ["Q8_K", "Q8_1"])
def test_a_type_that_nothing_decodes_is_refused_by_name(tmp_path: Path, ggml_type: str) -> None:
    kind = gguf.GGMLQuantizationType[ggml_type]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    (tmp_path / "m.gguf").write_bytes(one_tensor(kind, (block,), bytes(nbytes)))
    model = open_gguf(tmp_path / "m.gguf")
    assert model.raw(model.tensors[0], 0, nbytes) == bytes(nbytes)
    with pytest.raises(UnsupportedError, match=ggml_type) as refusal:
        model.values(model.tensors[0], 0, block)
    assert refusal.value.code == "GGUF-DECODE"
    model.close()


# --- refusals: files made by hand -----------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    keys: Sequence[bytes],
    infos: Sequence[tuple[str | bytes, tuple[int, ...], int, int]],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file from its parts; ``counts`` are those of tensors and keys, the true ones by default."""
    tensors, pairs = counts or (len(infos), len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)
    header += b"".join(keys) + b"".join(info(*i) for i in infos)
    return header + bytes(-len(header) % alignment) + data


F32, Q4_0 = 0, 2
U32, BOOL, STRING, ARRAY = 4, 7, 8, 9
ALIGNMENT = "general.alignment"


def uint32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


REFUSED: list[tuple[str, type[QconvertError], bytes]] = [
    ("GGUF-TRUNCATED", FormatError, b""),
    ("GGUF-TRUNCATED", FormatError, b"GGUF\3\0\0"),
    ("GGUF-MAGIC", FormatError, b"GGML" + bytes(40)),
    ("GGUF-VERSION", UnsupportedError, gguf_bytes([], [], version=1)),
    ("GGUF-VERSION", UnsupportedError, gguf_bytes([], [], version=0)),
    ("GGUF-VERSION", UnsupportedError, gguf_bytes([], [], version=4)),
    ("GGUF-ENDIAN", UnsupportedError, gguf_bytes([], [], version=3 << 24)),
    ("GGUF-COUNT", FormatError, gguf_bytes([], [], counts=(1 << 63, 0))),
    ("GGUF-COUNT", FormatError, gguf_bytes([], [], counts=(0, (1 << 64) - 1))),
    ("GGUF-COUNT", FormatError, gguf_bytes([key("k", ARRAY, array(U32, 1 << 62))], [])),
    ("GGUF-COUNT", FormatError, gguf_bytes([key("k", ARRAY, array(STRING, 1 << 61))], [])),
    ("GGUF-TRUNCATED", FormatError, gguf_bytes([key("k", STRING, uint32(255) + uint32(1))], [])),
    (
        "GGUF-TRUNCATED",
        FormatError,
        gguf_bytes([key("k", ARRAY, array(STRING, 1, b"\xff" * 8))], []),
    ),
    ("GGUF-NESTED-ARRAY", FormatError, gguf_bytes([key("k", ARRAY, array(ARRAY, 0))], [])),
    ("GGUF-VALUE-TYPE", FormatError, gguf_bytes([key("k", ARRAY, array(13, 0))], [])),
    ("GGUF-VALUE-TYPE", FormatError, gguf_bytes([key("k", 13, b"")], [])),
    ("GGUF-BOOL", FormatError, gguf_bytes([key("k", BOOL, b"\2")], [])),
    ("GGUF-KEY", FormatError, gguf_bytes([key("", BOOL, b"\1")], [])),
    ("GGUF-DUPLICATE-KEY", FormatError, gguf_bytes([key("k", BOOL, b"\1")] * 2, [])),
    ("GGUF-UTF8", FormatError, gguf_bytes([key(b"\xff", BOOL, b"\1")], [])),
    ("GGUF-UTF8", FormatError, gguf_bytes([key("k", STRING, text(b"\xff"))], [])),
    ("GGUF-UTF8", FormatError, gguf_bytes([], [(b"\xed\xa0\x80", (1,), F32, 0)], bytes(4))),
    ("GGUF-ALIGNMENT", FormatError, gguf_bytes([key(ALIGNMENT, U32, uint32(0))], [])),
    ("GGUF-ALIGNMENT", FormatError, gguf_bytes([key(ALIGNMENT, U32, uint32(48))], [])),
    ("GGUF-ALIGNMENT", FormatError, gguf_bytes([key(ALIGNMENT, U32, uint32(1 << 17))], [])),
    ("GGUF-ALIGNMENT", FormatError, gguf_bytes([key(ALIGNMENT, 10, bytes(8))], [])),
    ("GGUF-ALIGNMENT", FormatError, gguf_bytes([key(ALIGNMENT, STRING, text("32"))], [])),
    ("GGUF-DIMS", FormatError, gguf_bytes([], [("t", (1,) * 5, F32, 0)], bytes(4))),
    ("GGUF-SHAPE", FormatError, gguf_bytes([], [("t", (1 << 32, 1 << 32), F32, 0)], bytes(4))),
    ("GGUF-SHAPE", FormatError, gguf_bytes([], [("t", (0, (1 << 64) - 1), F32, 0)], bytes(4))),
    ("GGUF-TYPE", UnsupportedError, gguf_bytes([], [("t", (1,), 4, 0)], bytes(4))),
    ("GGUF-TYPE", UnsupportedError, gguf_bytes([], [("t", (1,), 9999, 0)], bytes(4))),
    ("GGUF-BLOCK", FormatError, gguf_bytes([], [("t", (32, 16), Q4_0, 0)], bytes(288))),
    ("GGUF-BLOCK", FormatError, gguf_bytes([], [("t", (), Q4_0, 0)], bytes(18))),
    ("GGUF-OFFSET", FormatError, gguf_bytes([], [("t", (1,), F32, 4)], bytes(8))),
    ("GGUF-BOUNDS", FormatError, gguf_bytes([], [("t", (2,), F32, 0)], bytes(7))),
    ("GGUF-BOUNDS", FormatError, gguf_bytes([], [("t", (1 << 60,), F32, 0)], bytes(8))),
    ("GGUF-BOUNDS", FormatError, gguf_bytes([], [("t", (1,), F32, (1 << 64) - 32)], bytes(8))),
    (
        "GGUF-DUPLICATE-TENSOR",
        FormatError,
        gguf_bytes([], [("t", (1,), F32, 0), ("t", (1,), F32, 32)], bytes(64)),
    ),
    (
        "GGUF-OVERLAP",
        FormatError,
        gguf_bytes([], [("a", (9,), F32, 32), ("b", (9,), F32, 0)], bytes(96)),
    ),
]


@pytest.mark.parametrize(
    ("code", "error", "data"), REFUSED, ids=[f"{code}-{i}" for i, (code, *_) in enumerate(REFUSED)]
)
def test_a_broken_rule_is_refused_by_its_code(
    tmp_path: Path, code: str, error: type[QconvertError], data: bytes
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(error) as refusal:
        open_gguf(path)
    assert type(refusal.value) is error
    assert refusal.value.code == code
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def opened(tmp_path: Path, data: bytes) -> GgufModel:
    (tmp_path / "m.gguf").write_bytes(data)
    return open_gguf(tmp_path / "m.gguf")


def test_version_2_and_a_file_without_tensors_are_read(tmp_path: Path) -> None:
    model = opened(tmp_path, gguf_bytes([], [], version=2)[:24])
    assert (model.tensors, model.metadata) == ((), {})
    model.close()


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096, 65536])
def test_tensor_data_begin_at_the_stated_alignment(tmp_path: Path, alignment: int) -> None:
    keys = [key(ALIGNMENT, U32, uint32(alignment))]
    data = gguf_bytes(keys, [("t", (1,), F32, 0)], b"\0\0\x80\x3f", alignment=alignment)
    model = opened(tmp_path, data)
    assert model.values(model.tensors[0], 0, 1).tolist() == [1.0]
    model.close()


def test_empty_tensors_gaps_and_any_order_are_read(tmp_path: Path) -> None:
    infos = [("c", (1,), F32, 96), ("empty", (3, 0), F32, 32), ("a", (1,), F32, 0)]
    model = opened(tmp_path, gguf_bytes([], infos, bytes(96) + b"\0\0\x80\x3f"))
    assert [t.size for t in model.tensors] == [1, 0, 1]
    assert model.values(model.tensors[0], 0, 1).tolist() == [1.0]
    assert model.values(model.tensors[1], 0, 0).size == 0
    model.close()


def test_a_header_longer_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    count = MAX_HEADER - 10
    path.write_bytes(gguf_bytes([key("k", ARRAY, array(0, count))], []))
    os.truncate(path, 2 * MAX_HEADER)  # sparse
    with pytest.raises(FormatError) as refusal:
        open_gguf(path)
    assert refusal.value.code == "GGUF-HEADER-SIZE"


def test_a_large_file_is_not_read_to_open_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    size = 1 << 30
    path.write_bytes(gguf_bytes([], [("t", (size // 4,), F32, 0)]))
    os.truncate(path, path.stat().st_size + size)  # sparse
    tracemalloc.start()
    model = open_gguf(path)
    model.values(model.tensors[0], size // 8, size // 8 + 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    model.close()


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    model = opened(tmp_path, gguf_bytes([], [("t", (8,), F32, 0)], bytes(32)))
    os.truncate(model.path, model.sources[0].size - 1)
    with pytest.raises(FormatError, match="file changed while it was read"):
        model.values(model.tensors[0], 0, 8)
    with pytest.raises(InputError, match="file changed while it was read"):
        model.check_unchanged()
    model.close()
    model.close()


def test_what_is_no_readable_file_is_an_input_error(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path / "missing", tmp_path, pipe):
        with pytest.raises(InputError):
            open_gguf(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([], []))
    path.chmod(0)
    with pytest.raises(InputError):
        open_gguf(path)


def test_no_refusal_leaves_a_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _, _, data in REFUSED:
        with pytest.raises(QconvertError):
            opened(tmp_path, data)
    assert len(os.listdir("/proc/self/fd")) == before


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` cut off, or with a few bytes or one number replaced, the header more often."""
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    broken = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(rng.choice([64, 600, len(data)]))
        if rng.random() < 0.5:
            broken[place] = rng.randrange(256)
        else:
            number = rng.choice([0, 1, 31, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1])
            broken[place : place + 8] = struct.pack("<Q", number)
    return bytes(broken)


def test_damaged_files_are_read_or_refused_in_little_memory(tmp_path: Path) -> None:
    write_with_gguf(tmp_path / "good.gguf")
    good = (tmp_path / "good.gguf").read_bytes()
    rng = random.Random(SEED)
    refused = 0
    tracemalloc.start()
    for _ in range(300):
        try:
            model = opened(tmp_path, mutated(good, rng))
        except QconvertError:
            refused += 1
            continue
        try:
            for tensor in model.tensors:
                model.values(tensor, 0, tensor.size)
        except QconvertError:
            refused += 1
        finally:
            model.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 50 < refused < 300
    assert peak < 4 << 20

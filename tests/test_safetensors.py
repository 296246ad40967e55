"""The safetensors adapter: what it reads equals what safetensors reads, and what it refuses.

Not checked here: files above 2 GiB (pread in pieces is checked by handing it short reads), and
devices, which a test may not create.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from qconvert.errors import (
    FormatError,
    InputError,
    MachineError,
    QconvertError,
    UnsupportedError,
)
from qconvert.files import shards, strict_json
from qconvert.files.safetensors import open_safetensors
from qconvert.kernels.reference import widen
from qconvert.model import DTYPES, Model, SourceFile, TensorInfo

INDEX = "model.safetensors.index.json"
NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def container(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(path: Path, header: object, data: bytes = b"") -> Path:
    path.write_bytes(container(header, data))
    return path


def shard_pair(directory: Path) -> Path:
    """A model of two shards and an index, as Hugging Face lays it out."""
    directory.mkdir(parents=True, exist_ok=True)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write(directory / two, {"__metadata__": {"format": "np", "k": "2"}, "c": entry()}, b"ef")
    header = {"__metadata__": {"format": "pt"}, "b": entry(offsets=(0, 2))}
    write(directory / one, header | {"a": entry(offsets=(2, 4))}, b"abcd")
    write_index(directory, {"a": one, "b": one, "c": two})
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 6}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def refused(path: Path, code: str, kind: type[QconvertError] = FormatError) -> QconvertError:
    with pytest.raises(QconvertError) as caught:
        open_safetensors(path)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture(autouse=True)
def no_file_is_left_open() -> Iterator[None]:
    before = len(os.listdir("/dev/fd"))
    yield
    assert len(os.listdir("/dev/fd")) == before


# What is read


@pytest.mark.parametrize("dtype", NUMPY)
def test_values_equal_those_of_the_safetensors_package(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(1)
    number: np.dtype[Any] = np.dtype(NUMPY[dtype])
    if dtype == "BOOL":
        array = rng.integers(0, 2, (3, 5)).astype(np.bool_)
    elif number.kind == "f":
        array = rng.standard_normal((3, 5)).astype(number)
        array[0, :4] = [np.inf, -np.inf, np.nan, -0.0]
    else:
        limits = np.iinfo(number)
        array = rng.integers(limits.min, limits.max, (3, 5), number, endpoint=True)
        array[0, :2] = limits.min, limits.max
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"t": array}, path, {"format": "np"})
    theirs = safetensors.numpy.load_file(path)["t"]
    with open_safetensors(path) as model:
        (tensor,) = model.tensors
        assert tensor == TensorInfo("t", (3, 5), dtype, array.nbytes)
        values = model.values(tensor, 2, 13)
        wide = dtype == "F64" or (number.kind in "iu" and number.itemsize >= 4)
        assert values.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_array_equal(values, theirs.reshape(-1)[2:13].astype(values.dtype))
        assert model.raw(tensor, 0, tensor.nbytes) == theirs.tobytes()
        assert model.raw(tensor, 3, 4) == theirs.tobytes()[3:7]
        assert model.metadata == {"format": "np"}


def f8_value(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The OCP 8-bit formats by their definition."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << exponent_bits - 1) - 1
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent_bits == 4 and exponent == 15 and mantissa == 7:
        return math.nan
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return math.ldexp(sign * fraction, 1 - bias)
    return math.ldexp(sign * (1 + fraction), exponent - bias)


@pytest.mark.parametrize(("dtype", "layout"), [("F8_E4M3", (4, 3)), ("F8_E5M2", (5, 2))])
def test_every_f8_code_has_the_value_of_its_definition(
    tmp_path: Path, dtype: str, layout: tuple[int, int]
) -> None:
    data = bytes(range(256))
    path = write(tmp_path / "m", {"t": entry(dtype, (16, 16), (0, 256))}, data)
    ((_, theirs),) = safetensors.deserialize(path.read_bytes())
    assert (theirs["dtype"], theirs["shape"], bytes(theirs["data"])) == (dtype, [16, 16], data)
    with open_safetensors(path) as model:
        values = model.values(model.tensors[0], 0, 256)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [f8_value(code, *layout) for code in data])


def test_every_bf16_pattern_is_the_upper_half_of_its_float32(tmp_path: Path) -> None:
    data = np.arange(65536, dtype="<u2").tobytes()
    path = write(tmp_path / "m", {"t": entry("BF16", (65536,), (0, 131072))}, data)
    with open_safetensors(path) as model:
        values = model.values(model.tensors[0], 0, 65536)
    assert values.dtype == np.float32
    assert (values.view(np.uint32) == np.arange(65536, dtype=np.uint32) << 16).all()


def test_every_f16_pattern_is_exact() -> None:
    data = np.arange(65536, dtype="<u2").tobytes()
    expected = [x for (x,) in struct.iter_unpack("<e", data)]
    np.testing.assert_array_equal(widen(data, "F16"), expected)


def test_the_largest_integers_are_rounded_to_float64() -> None:
    numbers = (2**63 - 1, -(2**63), 2**53 + 1)
    assert widen(struct.pack("<3q", *numbers), "I64").tolist() == [float(n) for n in numbers]
    assert widen(struct.pack("<Q", 2**64 - 1), "U64").tolist() == [float(2**64)]


def test_a_bool_other_than_0_is_1() -> None:
    assert widen(b"\x00\x01\x02\xff", "BOOL").tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bytes_are_no_values(dtype: str) -> None:
    assert widen(b"", dtype).shape == (0,)


def test_a_single_file_has_its_tensors_in_file_order_and_its_provenance(tmp_path: Path) -> None:
    header = {
        "z": entry(offsets=(0, 2)),
        "b": entry("F32", (), (2, 6)),
        "a": entry("F32", (0, 3), (6, 6)),
        "y": entry(shape=(1, 1, 1, 1, 1, 1), offsets=(6, 7)),
    }
    text = json.dumps(header).encode() + b"   "  # savers pad the header with spaces
    path = write(tmp_path / "m.safetensors", text, b"ab" + struct.pack("<f", 1.5) + b"c")
    (tmp_path / "config.json").write_text("{}")
    model: Model = open_safetensors(path)
    assert [t.name for t in model.tensors] == ["z", "b", "a", "y"]
    assert [t.shape for t in model.tensors] == [(2,), (), (0, 3), (1, 1, 1, 1, 1, 1)]
    assert model.values(model.tensors[1], 0, 1).tolist() == [1.5]
    assert model.values(model.tensors[2], 0, 0).shape == (0,)
    assert (model.path, model.kind, model.companions) == (path, "safetensors", ())
    (source,) = model.sources
    digest = hashlib.sha256(struct.pack("<Q", len(text)) + text).hexdigest()
    assert source == SourceFile("m.safetensors", path.stat().st_size, digest)
    model.close()
    model.close()


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    with open_safetensors(write(tmp_path / "m", {})) as model:
        assert (model.tensors, model.metadata) == ((), {})


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps({"t": entry()}).encode().ljust(0x0480)
    path = write(tmp_path / "m", text, b"ab")
    assert path.read_bytes().startswith(b"\x80\x04")
    open_safetensors(path).close()


def test_shards_are_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "vocab.txt").mkdir()
    with open_safetensors(shard_pair(tmp_path)) as model:
        assert [t.name for t in model.tensors] == ["b", "a", "c"]
        assert [model.raw(t, 0, 2) for t in model.tensors] == [b"ab", b"cd", b"ef"]
        assert model.metadata == {"format": "pt", "k": "2"}
        assert [s.name for s in model.sources] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert [c.name for c in model.companions] == ["config.json", "tokenizer.json"]
        assert [c.read() for c in model.companions] == [b"config.json", b"tokenizer.json"]
        model.check_unchanged()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["weights.safetensors"], "weights.safetensors"),
        (["._m.safetensors", "m.safetensors"], "m.safetensors"),
        (["model.safetensors", "other.safetensors"], "model.safetensors"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
    ],
)
def test_a_directory_without_index(tmp_path: Path, names: list[str], chosen: str) -> None:
    for name in names:
        write(tmp_path / name, {name: entry()}, b"ab")
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == [chosen]


# --- several files of weights -------------------------------------------------------------------


def test_the_whole_file_is_taken_beside_an_index_as_transformers_takes_it(tmp_path: Path) -> None:
    """``_get_resolved_checkpoint_files`` of transformers 5 looks for the whole file first."""
    shard_pair(tmp_path)
    write(tmp_path / "model.safetensors", {"whole": entry()}, b"ab")
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == ["whole"]
        (warning,) = model.warnings
        assert "model.safetensors.index.json and its 2 shards (2 of them there) are left" in warning
        (note,) = model.notes
        assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in note
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    with open_safetensors(tmp_path) as model:  # a stale index
        assert [t.name for t in model.tensors] == ["whole"]
        assert "(0 of them there)" in model.warnings[0]
        assert model.notes == ()


def test_an_index_of_the_whole_file_alone_is_that_file_s(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    index = {"weight_map": {"a": "model.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with open_safetensors(tmp_path) as model:
        assert (model.notes, model.warnings) == ((), ())
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, "ST-INDEX-ABSENT")


def test_an_index_that_needs_the_whole_file_as_a_part_is_refused_with_both(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    write(tmp_path / "other.safetensors", {"b": entry()}, b"cd")
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    error = refused(tmp_path, "ST-INDEX-WHOLE", InputError)
    assert "other.safetensors" in str(error)
    assert INDEX in str(error)


def test_a_broken_index_beside_the_whole_file_is_left_and_said(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    (tmp_path / INDEX).write_text("{}")
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == ["a"]
        assert f"{INDEX} is left" in model.warnings[0]


@pytest.mark.parametrize(
    "other",
    ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5"],
)
def test_other_weights_beside_the_whole_file_are_left_and_noted(tmp_path: Path, other: str) -> None:
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    write(tmp_path / other, {"b": entry()}, b"cd")
    (tmp_path / "training_args.bin").write_text("no weights")
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == ["a"]
        assert model.notes == (f"weights were taken from model.safetensors; left: {other}",)
        assert model.warnings == ()


def test_an_adapter_is_no_model_and_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", {"lora_A": entry()}, b"ab")
    error = refused(tmp_path, "ST-ADAPTER", InputError)
    assert "merge" in (error.hint or "")
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == ["a"]
        assert "adapter_model.safetensors" in model.warnings[0]


def test_a_file_of_another_name_beside_pickled_weights_is_refused_with_both(
    tmp_path: Path,
) -> None:
    write(tmp_path / "lora.safetensors", {"a": entry()}, b"ab")
    (tmp_path / "pytorch_model.bin").touch()
    error = refused(tmp_path, "ST-CANDIDATES", InputError)
    assert error.found == "lora.safetensors and pytorch_model.bin"


def test_the_file_that_the_configuration_names_goes_first(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    write(tmp_path / "mine.safetensors", {"b": entry()}, b"cd")
    config = tmp_path / "config.json"
    config.write_text('{"transformers_weights": "mine.safetensors"}')
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == ["b"]
        assert model.notes == ("weights were taken from mine.safetensors; left: model.safetensors",)
    for name in ('"gone.safetensors"', '"../model.safetensors"', '"config.json"', "7"):
        config.write_text(f'{{"transformers_weights": {name}}}')
        refused(tmp_path, "ST-NAMED", InputError)
    config.write_text('{"transformers_weights": null}')
    with open_safetensors(tmp_path) as model:
        assert [t.name for t in model.tensors] == ["a"]


def test_small_files_of_modules_and_templates_come_along(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry()}, b"ab")
    for name in (
        "2_Pooling/config.json",
        "deep/er/config.json",
        "elsewhere/config.json",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/notes.txt",
        "chat_template.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    places = ["", "2_Pooling", "deep/er", "../secret", "/etc", "absent"]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": p} for p in places]))
    with open_safetensors(tmp_path) as model:
        assert [c.name for c in model.companions] == [
            "2_Pooling/config.json",
            "additional_chat_templates/tool_use.jinja",
            "chat_template.json",
            "deep/er/config.json",
            "modules.json",
        ]
    for broken in ("", "7", "[7, {}]", "[" * 50):
        (tmp_path / "modules.json").write_text(broken)
        with open_safetensors(tmp_path) as model:
            assert "modules.json" in [c.name for c in model.companions]


def hub_cache(root: Path) -> Path:
    """A snapshot whose files are links into ``blobs``, as huggingface_hub lays it out."""
    repository = root / "models--x--y"
    plain = shard_pair(root / "plain")
    (plain / "config.json").write_text("{}")
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in plain.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_a_hub_cache_snapshot_is_read_under_the_names_of_its_links(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        with open_safetensors(path) as model:
            assert [model.raw(t, 0, 2) for t in model.tensors] == [b"ab", b"cd", b"ef"]
            assert model.sources[0].name == "model-00001-of-00002.safetensors"
            assert [c.name for c in model.companions] == ["config.json"]


def test_values_may_be_read_by_several_threads(tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.float32)
    safetensors.numpy.save_file({"t": array}, tmp_path / "m")
    with open_safetensors(tmp_path / "m") as model, ThreadPoolExecutor(8) as pool:
        starts = range(0, 100_000, 1000)
        parts = pool.map(lambda s: model.values(model.tensors[0], s, s + 1000), starts)
        assert (np.concatenate(list(parts)) == array).all()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 3), offset))
    path = write(tmp_path / "m", {"t": entry("U8", (8,), (0, 8))}, b"abcdefgh")
    with open_safetensors(path) as model:
        assert model.raw(model.tensors[0], 0, 8) == b"abcdefgh"


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 3), (2, 1), (1, -1)])
def test_bytes_outside_the_tensor_are_not_given_out(tmp_path: Path, offset: int, size: int) -> None:
    path = write(tmp_path / "m", {"t": entry()}, b"ab")
    with open_safetensors(path) as model, pytest.raises(ValueError, match="of a tensor of 2"):
        model.raw(model.tensors[0], offset, size)


def test_a_closed_model_does_not_read(tmp_path: Path) -> None:
    with open_safetensors(write(tmp_path / "m", {"t": entry()}, b"ab")) as model:
        pass
    with pytest.raises(ValueError, match="closed"):
        model.raw(model.tensors[0], 0, 1)
    with pytest.raises(ValueError, match="closed"):
        model.check_unchanged()


# What is refused: the header


DUPLICATE_TENSOR = b'{"t":%s,"t":%s}' % ((json.dumps(entry()).encode(),) * 2)


def huge(digits: int) -> bytes:
    number = b"9" * digits
    return b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[%s,%s]}}' % (number, number)


HEADERS = [
    ("not-json", b"{nonsense}", "ST-JSON"),
    ("cut-off-json", b'{"t":', "ST-JSON"),
    ("text-after-json", b"{}x", "ST-JSON"),
    ("nul-padding", b"{}\0", "ST-JSON"),
    ("control-character", b'{"a\n":1}', "ST-JSON"),
    ("too-many-digits", huge(5000), "ST-JSON"),
    ("most-digits", huge(4300), "ST-HOLE"),
    ("not-utf8", b'{"\xff":1}', "ST-UTF8"),
    ("lone-surrogate-in-key", b'{"\\ud800":1}', "ST-UTF8"),
    ("lone-surrogate-in-value", b'{"__metadata__":{"a":"\\udfff"}}', "ST-UTF8"),
    ("same-tensor-twice", DUPLICATE_TENSOR, "ST-DUPLICATE"),
    ("same-key-twice-inside", b'{"t":{"dtype":"U8","dtype":"U8"}}', "ST-DUPLICATE"),
    ("same-metadata-twice", b'{"__metadata__":{"a":"b","a":"b"}}', "ST-DUPLICATE"),
    ("nan", b'{"t":NaN}', "ST-NAN"),
    ("infinity", b'{"t":-Infinity}', "ST-NAN"),
    ("deep-arrays", b'{"t":' + b"[" * 100_000, "ST-NESTING"),
    ("deep-objects", b'{"a":' * 100_000, "ST-NESTING"),
    ("depth-17", b'{"t":' + b"[" * 16 + b"]" * 16 + b"}", "ST-NESTING"),
    ("depth-16", b'{"t":' + b"[" * 15 + b"]" * 15 + b"}", "ST-ENTRY"),
    ("brackets-in-a-string", b'{"t":"\\"' + b"[" * 40 + b'"}', "ST-ENTRY"),
    ("array", b"[]", "ST-HEADER-START"),
    ("leading-space", b" {}", "ST-HEADER-START"),
    ("byte-order-mark", b"\xef\xbb\xbf{}", "ST-HEADER-START"),
    ("metadata-list", {"__metadata__": []}, "ST-METADATA"),
    ("metadata-null", {"__metadata__": None}, "ST-METADATA"),
    ("metadata-number", {"__metadata__": {"a": 1}}, "ST-METADATA"),
    ("name-empty", {"": entry()}, "ST-NAME"),
    ("name-with-nul", {"a\0b": entry()}, "ST-NAME"),
    ("name-too-long", {"é" * 513: entry()}, "ST-NAME"),
    ("entry-list", {"t": [1]}, "ST-ENTRY"),
    ("entry-null", {"t": None}, "ST-ENTRY"),
    ("no-dtype", {"t": {"shape": [2], "data_offsets": [0, 2]}}, "ST-ENTRY"),
    ("no-shape", {"t": {"dtype": "U8", "data_offsets": [0, 2]}}, "ST-ENTRY"),
    ("no-offsets", {"t": {"dtype": "U8", "shape": [2]}}, "ST-ENTRY"),
    ("extra-key", {"t": {**entry(), "scale": 1}}, "ST-ENTRY"),
    ("dtype-number", {"t": entry(dtype=8)}, "ST-ENTRY"),
    ("dtype-list", {"t": entry(dtype=["U8"])}, "ST-ENTRY"),
    ("shape-number", {"t": entry(shape=2)}, "ST-SHAPE"),
    ("shape-null", {"t": entry(shape=None)}, "ST-SHAPE"),
    ("shape-negative", {"t": entry(shape=[-2, -1])}, "ST-SHAPE"),
    ("shape-float", {"t": entry(shape=[2.0])}, "ST-SHAPE"),
    ("shape-bool", {"t": entry(shape=[2, True])}, "ST-SHAPE"),
    ("shape-string", {"t": entry(shape=["2"])}, "ST-SHAPE"),
    ("shape-beyond-64-bits", {"t": entry(shape=[2**64, 0], offsets=[0, 0])}, "ST-SHAPE"),
    ("shape-of-65-dims", {"t": entry(shape=[2, *[1] * 64])}, "ST-SHAPE"),
    ("offsets-null", {"t": entry(offsets=None)}, "ST-OFFSETS"),
    ("offsets-one", {"t": entry(offsets=[0])}, "ST-OFFSETS"),
    ("offsets-three", {"t": entry(offsets=[0, 2, 2])}, "ST-OFFSETS"),
    ("offsets-float", {"t": entry(offsets=[0, 2.0])}, "ST-OFFSETS"),
    ("offsets-bool", {"t": entry(shape=[1], offsets=[False, True])}, "ST-OFFSETS"),
    ("offsets-negative", {"t": entry(offsets=[-2, 0])}, "ST-OFFSETS"),
    ("offsets-reversed", {"t": entry(offsets=[2, 0])}, "ST-OFFSETS"),
    ("size-too-small", {"t": entry(shape=[3])}, "ST-SIZE"),
    ("size-too-large", {"t": entry(shape=[1])}, "ST-SIZE"),
    ("size-of-dtype", {"t": entry("F32", [2])}, "ST-SIZE"),
    ("size-beyond-64-bits", {"t": entry(shape=[2**63, 2, 2**63, 2])}, "ST-SIZE"),
    ("size-equal-modulo-2-to-64", {"t": entry(shape=[2**63 + 1, 2])}, "ST-SIZE"),
    ("beyond", {"t": entry(shape=[3], offsets=[0, 3])}, "ST-BEYOND"),
    ("far-beyond", {"t": entry(shape=[2**60], offsets=[0, 2**60])}, "ST-BEYOND"),
    ("overlap", {"t": entry(), "u": entry(shape=[1], offsets=[1, 2])}, "ST-OVERLAP"),
    ("same-place", {"t": entry(), "u": entry()}, "ST-OVERLAP"),
    ("empty-inside-another", {"t": entry(), "u": entry(shape=[0], offsets=[1, 1])}, "ST-OVERLAP"),
    ("not-from-0", {"t": entry(shape=[1], offsets=[1, 2])}, "ST-HOLE"),
    (
        "hole",
        {"t": entry(shape=[0], offsets=[0, 0]), "u": entry(shape=[1], offsets=[1, 2])},
        "ST-HOLE",
    ),
    ("trailing", {"t": entry(shape=[1], offsets=[0, 1])}, "ST-TRAILING"),
    ("data-without-tensors", {}, "ST-TRAILING"),
]


@pytest.mark.parametrize(
    ("header", "code"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS]
)
def test_header_is_refused(tmp_path: Path, header: object, code: str) -> None:
    error = refused(write(tmp_path / "m.safetensors", header, b"ab"), code)
    assert error.path == str(tmp_path / "m.safetensors")
    assert len(str(error)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("dtype", ["C128", "I4", "F8_E3M4", "F6", "u8", "", "Q4_0"])
def test_unknown_dtype_is_refused_with_the_known_ones(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "m", {"t": entry(dtype)}, b"ab")
    error = refused(path, "ST-DTYPE", UnsupportedError)
    assert error.tensor == "t"
    assert error.wanted == " ".join(DTYPES)


def test_too_many_containers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_JSON_CONTAINERS", 6)
    header = {f"t{i}": entry(shape=[0], offsets=[0, 0]) for i in range(2)}
    refused(write(tmp_path / "m", header), "ST-NESTING")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "ST-SHORT"),
        (b"\x02\0\0\0\0\0\0", "ST-SHORT"),
        (bytes(8), "ST-HEADER-EMPTY"),
        (bytes(8) + b"{}", "ST-HEADER-EMPTY"),
        (struct.pack("<Q", 2) + b"{", "ST-HEADER-BEYOND"),
        (struct.pack("<Q", 2), "ST-HEADER-BEYOND"),
        (struct.pack("<Q", 100_000_000) + b"{}", "ST-HEADER-BEYOND"),
        (struct.pack("<Q", 100_000_001) + b"{}", "ST-HEADER-LIMIT"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "ST-HEADER-LIMIT"),
    ],
)
def test_header_length_is_refused_before_it_is_believed(
    tmp_path: Path, data: bytes, code: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    refused(path, code)


def test_a_header_above_the_limit_is_refused_even_if_it_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "m", b"{}")
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse
    refused(path, "ST-HEADER-LIMIT")


@pytest.mark.parametrize(
    ("data", "found", "hint"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer",
            "git lfs pull",
        ),
        (b"\n <!DOCTYPE html><html><head><title>Sign in</title>", "a web page", "login"),
        (b"<html><body>404</body></html>", "a web page", "download"),
        (b"# A model\n\nIt is small, and of no use to anybody.\n" * 9, "a text file", "directory"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", "a PyTorch", "save_pretrained"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a PyTorch", "save_pretrained"),
        (b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00}", "a PyTorch", "save_pretrained"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "a GGUF file", "by itself"),
        (b"\x89QBLK\r\n\n" + bytes(56), "a qblk file", "by itself"),
        (b'{"metadata": {}, "weight_map": {}}', "a JSON file", "pass the directory"),
    ],
)
def test_what_is_not_safetensors_is_named(
    tmp_path: Path, data: bytes, found: str, hint: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    error = refused(path, "ST-FOREIGN")
    assert (error.found or "").startswith(found)
    assert hint in (error.hint or "")


def test_names_from_the_file_cannot_drive_a_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "m\n", {"\x1b[31m\n": entry(dtype="\x1b\n")}, b"ab")
    assert refused(path, "ST-DTYPE", UnsupportedError).tensor == "\x1b[31m\n"
    with pytest.raises(QconvertError) as caught:
        open_safetensors(path)
    assert str(caught.value).isprintable()


def test_random_damage_is_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    seed = 20240607
    print("seed", seed)
    rng = random.Random(seed)
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", [3, 2], [0, 12]),
        "b": entry("F32", [2], [12, 20]),
        "c": entry("U8", [0], [20, 20]),
    }
    whole = container(header, bytes(20))
    path = tmp_path / "m.safetensors"
    outcomes: set[str | None] = set()
    messages = ""
    for case in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole) - 20)] = rng.choice(
                [rng.randrange(256), *b'0129{}[]",:\\-']
            )
        if case % 3 == 0:
            del damaged[rng.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            with open_safetensors(path) as model:
                for tensor in model.tensors:
                    model.values(tensor, 0, tensor.size)
            outcomes.add("read")
        except QconvertError as error:
            outcomes.add(error.code)
            messages += str(error)
    assert "\n" not in messages
    assert None not in outcomes
    assert len(outcomes) > 8  # the damage reaches many rules


# What is refused: files and directories


def test_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.safetensors", "FILE-MISSING", InputError)
    write(tmp_path / "m", {})
    refused(tmp_path / "m" / "below", "FILE-MISSING", InputError)


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.EACCES, InputError, "FILE-PERMISSION"),
        (errno.EPERM, InputError, "FILE-PERMISSION"),
        (errno.EMFILE, MachineError, "FILE-IO"),
    ],
)
def test_what_the_system_refuses_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[QconvertError],
    code: str,
) -> None:
    # Raised by hand, because root may read everything.
    def refuse(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    refused(tmp_path / "m.safetensors", code, kind)


def test_directory_that_may_not_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        refused(tmp_path, "FILE-PERMISSION", InputError)


def test_read_error_is_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    refused(write(tmp_path / "m", {}), "FILE-IO", MachineError)


def test_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    assert refused(tmp_path / "m.safetensors", "FILE-NOT-REGULAR", InputError).found == "a pipe"


def test_device_is_refused() -> None:
    assert refused(Path("/dev/zero"), "FILE-NOT-REGULAR", InputError).found == "a device"


def test_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        assert refused(Path("s"), "FILE-NOT-REGULAR", InputError).found == "a socket"


def test_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to("m")
    refused(tmp_path / "m", "FILE-PATH", InputError)


def test_file_truncated_after_open_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"t": entry("U8", (8,), (0, 8))}, b"abcdefgh")
    with open_safetensors(path) as model:
        os.truncate(path, path.stat().st_size - 3)
        assert model.raw(model.tensors[0], 0, 5) == b"abcde"
        for read in (model.raw, model.values):
            with pytest.raises(FormatError, match="changed while it was read") as caught:
                read(model.tensors[0], 2, 8 if read == model.values else 6)
            assert caught.value.code == "FILE-CHANGED"
            assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="changed while it was read") as changed:
            model.check_unchanged()
        assert changed.value.code == "FILE-CHANGED"


def test_file_modified_after_open_is_refused_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"t": entry()}, b"ab")
    with open_safetensors(path) as model:
        model.check_unchanged()
        os.utime(path, ns=(1, 1))
        with pytest.raises(InputError) as caught:
            model.check_unchanged()
        assert caught.value.code == "FILE-CHANGED"
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "found", "hint"),
    [
        ([], "[]", "model.safetensors"),
        (["README.md"], "['README.md']", "model.safetensors"),
        (["config.json", "pytorch_model.bin"], "['pytorch_model.bin']", "save_pretrained"),
        (["a.gguf", "pytorch_model.bin"], "['a.gguf']", "by itself"),
        ([".model.safetensors"], "['.model.safetensors']", "model.safetensors"),
    ],
)
def test_directory_without_model_is_refused(
    tmp_path: Path, names: list[str], found: str, hint: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    error = refused(tmp_path, "ST-NO-MODEL", InputError)
    assert error.found == found
    assert hint in (error.hint or "")


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors"],
        ["model-00003-of-00010.safetensors"],
    ],
)
def test_several_files_or_a_part_without_index_are_refused(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        write(tmp_path / name, {})
    assert INDEX in (refused(tmp_path, "ST-NO-INDEX", InputError).hint or "")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"[]", "ST-INDEX"),
        (b"{}", "ST-INDEX"),
        (b'{"weight_map":{}}', "ST-INDEX"),
        (b'{"weight_map":["a"]}', "ST-INDEX"),
        (b"", "ST-JSON"),
        (b"{", "ST-JSON"),
        (b'{"weight_map":{"a":"x","a":"y"}}', "ST-DUPLICATE"),
        (b'{"weight_map":{"a":"x"},"weight_map":{"a":"x"}}', "ST-DUPLICATE"),
        (b'{"metadata":{"total_size":NaN}}', "ST-NAN"),
        (b'{"a":' * 50_000, "ST-NESTING"),
        (b"version https://git-lfs.github.com/spec/v1\n", "ST-FOREIGN"),
    ],
)
def test_index_is_refused(tmp_path: Path, text: bytes, code: str) -> None:
    shard_pair(tmp_path)
    (tmp_path / INDEX).write_bytes(text)
    assert refused(tmp_path, code).path == str(tmp_path / INDEX)


def test_index_above_the_limit_is_refused(tmp_path: Path) -> None:
    shard_pair(tmp_path)
    os.truncate(tmp_path / INDEX, 100_000_001)
    refused(tmp_path, "ST-INDEX")


@pytest.mark.parametrize(
    "name",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "sub\\a.safetensors",
        "C:a.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "a\nb",
        None,
        7,
        ["a"],
    ],
)
def test_shard_name_that_is_not_plain_is_refused(tmp_path: Path, name: object) -> None:
    shard_pair(tmp_path / "m")
    write_index(tmp_path / "m", {"a": name})
    assert refused(tmp_path / "m", "ST-SHARD-NAME").tensor == "a"


def test_missing_shard_is_refused_with_the_number_that_is_there(tmp_path: Path) -> None:
    shard_pair(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    error = refused(tmp_path, "ST-SHARD-MISSING", InputError)
    assert error.path == str(tmp_path / "model-00002-of-00002.safetensors")
    assert error.found == "1 of 2 shards"


def test_hub_cache_link_to_an_absent_blob_is_a_missing_shard(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    refused(snapshot, "ST-SHARD-MISSING", InputError)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("place", ["outside", "models--z--y/blobs"])
def test_link_out_of_the_directory_is_refused(tmp_path: Path, name: str, place: str) -> None:
    snapshot = hub_cache(tmp_path)
    elsewhere = tmp_path / place
    elsewhere.mkdir(parents=True)
    (snapshot / name).resolve().rename(elsewhere / "file")
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(elsewhere / "file")
    assert refused(snapshot, "ST-OUTSIDE", InputError).path == str(snapshot / name)


def test_link_within_the_directory_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "weights", {"t": entry()}, b"ab")
    (tmp_path / "model.safetensors").symlink_to("weights")
    with open_safetensors(tmp_path) as model:
        assert model.sources[0].name == "model.safetensors"


def test_shard_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    shard_pair(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").mkdir()
    error = refused(tmp_path, "FILE-NOT-REGULAR", InputError)
    assert error.found == "a directory"


@pytest.mark.parametrize(
    ("weight_map", "code", "tensor"),
    [
        ({"a": 1, "b": 1, "c": 2, "d": 2}, "ST-INDEX-ABSENT", "d"),
        ({"a": 1, "b": 2, "c": 2}, "ST-INDEX-ABSENT", "b"),
        ({"a": 1, "c": 2}, "ST-INDEX-EXTRA", "b"),
    ],
)
def test_index_that_does_not_agree_with_its_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, int], code: str, tensor: str
) -> None:
    shard_pair(tmp_path)
    names = {tensor: f"model-0000{n}-of-00002.safetensors" for tensor, n in weight_map.items()}
    write_index(tmp_path, names)
    assert refused(tmp_path, code).tensor == tensor


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shard_pair(tmp_path)
    write(tmp_path / "model-00002-of-00002.safetensors", {"a": entry()}, b"ab")
    error = refused(tmp_path, "ST-TWO-SHARDS")
    assert "model-00001-of-00002.safetensors" in error.message


def test_a_card_is_left_out_when_it_is_large(tmp_path: Path) -> None:
    shard_pair(tmp_path)
    (tmp_path / "README.md").touch()
    os.truncate(tmp_path / "README.md", (64 << 20) + 1)
    with open_safetensors(tmp_path) as model:
        assert model.companions == ()
        assert model.warnings == ("README.md of 67,108,865 bytes is left out",)


def test_large_companion_is_refused(tmp_path: Path) -> None:
    shard_pair(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", (64 << 20) + 1)
    refused(tmp_path, "ST-COMPANION", InputError)
    os.truncate(tmp_path / "tokenizer.json", 64 << 20)
    with open_safetensors(tmp_path) as model:
        assert [c.size for c in model.companions] == [64 << 20]


# The profile


def test_the_profile_lists_every_code_and_no_other() -> None:
    package, root = Path(shards.__file__).parents[1], Path(__file__).parents[1]
    code = re.compile(r"\b(?:ST|FILE)-[A-Z0-9-]+[A-Z0-9]")
    adapter = [
        package / "files" / name
        for name in ("safetensors.py", "shards.py", "regular.py", "strict_json.py")
    ]
    used = {c for path in adapter for c in code.findall(path.read_text())}
    assert set(code.findall((root / "formats/safetensors.md").read_text())) == used

"""Importance matrices: llama-imatrix's own files (tests/make_imatrix.py), decoded independently."""

from __future__ import annotations

import hashlib
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from qconvert.errors import FormatError, InputError, QconvertError, UnsupportedError
from qconvert.files.imatrix import ChannelSums, Imatrix, ImatrixFit, imatrix_bytes, read_imatrix
from qconvert.model import TensorInfo

DATA = Path(__file__).with_name("data")
GGUF = DATA / "experts.imatrix.gguf"
OLDER = DATA / "experts.imatrix.dat"
SEED = 20261123

Older = list[tuple[str, int, NDArray[np.float32]]]


def decoded_gguf(path: Path) -> dict[str, ChannelSums]:
    """Sums and counts as gguf-py reads them."""
    arrays = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): ChannelSums(
            np.atleast_2d(sums),
            arrays[name.replace(".in_sum2", ".counts")].reshape(-1).astype(np.int64),
        )
        for name, sums in arrays.items()
        if name.endswith(".in_sum2")
    }


def decoded_older(data: bytes) -> tuple[Older, int, str]:
    """Entries (name, calls, values), chunks and path, decoded with ``struct``."""

    def number() -> int:
        nonlocal position
        position += 4
        value: int = struct.unpack_from("<i", data, position - 4)[0]
        return value

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        return data[position - size : position]

    position, entries = 0, []
    for _ in range(number()):
        name, calls, count = take(number()).decode(), number(), number()
        entries.append((name, calls, np.frombuffer(take(4 * count), "<f4")))
    chunks, path = number(), take(number()).decode()
    assert position == len(data)
    return entries, chunks, path


def older_bytes(entries: Older, end: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        encoded = name.encode()
        parts.append(struct.pack("<i", len(encoded)) + encoded)
        parts.append(struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes())
    return b"".join(parts) + end


def written(path: Path, arrays: dict[str, NDArray[Any]], **metadata: Any) -> Path:
    """A GGUF file of gguf-py with these tensors; None leaves a key out."""
    writer = gguf.GGUFWriter(path, "")
    keys = {"datasets": ["a"], "chunk_count": 1, "chunk_size": 8} | metadata
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"imatrix.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"imatrix.{key}", value)
        elif value is not None:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weight(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, shape, "F32", 4 * int(np.prod(shape)))


def imatrix(**weights: NDArray[np.float32]) -> Imatrix:
    return Imatrix(Path("i.gguf"), "", (), None, None, weights)


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


# --- what llama-imatrix wrote ---------------------------------------------------------------------


def test_the_gguf_form_gives_mean_squares() -> None:
    found = read_imatrix(GGUF)
    expected = decoded_gguf(GGUF)
    assert list(found.weights) == sorted(expected)
    unseen = 0
    for name, sums in expected.items():
        for matrix, count in enumerate(sums.counts):
            got = found.weights[name] if len(sums.counts) == 1 else found.weights[name][matrix]
            wanted = sums.squares[matrix] / np.float32(count) if count else ones(got.size)
            np.testing.assert_array_equal(got, wanted, strict=True)
            unseen += count == 0
    assert unseen == 3  # gate, up and down of the expert that is never chosen
    assert found.weights["blk.0.ffn_down_exps.weight"].shape == (4, 48)


def test_the_older_form_gives_mean_squares() -> None:
    found = read_imatrix(OLDER)
    entries, chunks, path = decoded_older(OLDER.read_bytes())
    assert list(found.weights) == [name for name, _, _ in entries]
    for name, calls, values in entries:
        np.testing.assert_array_equal(found.weights[name], values / np.float32(calls), strict=True)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (chunks, None, (path,))


def test_both_forms_of_one_run_agree() -> None:
    new, old = read_imatrix(GGUF), read_imatrix(OLDER)
    assert new.weights.keys() == old.weights.keys()
    for name, values in new.weights.items():
        # The older form multiplies by the calls and is divided again.
        np.testing.assert_array_max_ulp(values.reshape(-1), old.weights[name], maxulp=2)


def test_provenance() -> None:
    found = read_imatrix(GGUF)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("words.txt",), 3, 64)
    assert found.sha256 == hashlib.sha256(GGUF.read_bytes()).hexdigest()
    assert found.keys() == {
        "quantize.imatrix.file": "experts.imatrix.gguf",
        "quantize.imatrix.dataset": "words.txt",
        "quantize.imatrix.entries_count": 8,
        "quantize.imatrix.chunks_count": 3,
    }


@pytest.mark.parametrize("path", ["/home/a/text.txt", r"C:\a\text.txt", "text.txt"])
def test_directories_stay_out_of_the_metadata(path: str) -> None:
    found = Imatrix(Path("/home/b/i.dat"), "", (path, "other"), None, None, {})
    assert found.keys() == {
        "quantize.imatrix.file": "i.dat",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 0,
    }


def test_writing_gives_the_bytes_of_llama_imatrix() -> None:
    sums = decoded_gguf(GGUF)
    backwards = dict(reversed(sums.items()))
    data = imatrix_bytes(backwards, datasets=["words.txt"], chunk_count=3, chunk_size=64)
    assert data == GGUF.read_bytes()


def test_a_name_that_leaves_no_room_for_the_suffix_is_not_written() -> None:
    sums = ChannelSums(ones(1, 4), np.array([1]))
    imatrix_bytes({"n" * 55: sums}, datasets=[], chunk_count=0, chunk_size=0)
    with pytest.raises(UnsupportedError, match=r"found 64 bytes with '\.in_sum2', wanted at most"):
        imatrix_bytes({"n" * 56: sums}, datasets=[], chunk_count=0, chunk_size=0)


# --- against a model's tensors --------------------------------------------------------------------


@pytest.mark.parametrize("path", [GGUF, OLDER], ids=["gguf", "older"])
def test_each_tensor_finds_the_importance_of_its_channels(path: Path) -> None:
    found = read_imatrix(path)
    dense = found.find(weight("blk.0.attn_q.weight", 32, 32))
    experts = found.find(weight("blk.0.ffn_down_exps.weight", 4, 32, 48))
    assert dense is not None
    assert experts is not None
    assert (dense.shape, experts.shape) == ((32,), (4, 48))
    sums = decoded_gguf(GGUF)["blk.0.ffn_down_exps.weight"]
    np.testing.assert_allclose(experts[1], sums.squares[1] / sums.counts[1], rtol=3e-7)
    assert found.find(weight("blk.0.nonesuch.weight", 32, 32)) is None


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        (ones(31), (8, 32), "found 31 channels, wanted 32 channels"),
        (ones(32), (4, 8, 32), "found 32 channels, wanted 4 matrices of 32 channels"),
        (ones(4, 32), (8, 32), "found 4 matrices of 32 channels, wanted 32 channels"),
        (ones(4, 32), (2, 8, 64), "found 4 matrices of 32 channels, wanted 2 matrices of 64 c"),
    ],
)
def test_an_entry_of_another_width_is_refused(
    values: NDArray[np.float32], shape: tuple[int, ...], message: str
) -> None:
    tensor = weight("w", *shape)
    with pytest.raises(UnsupportedError, match=message) as caught:
        imatrix(w=values).check([tensor])
    assert caught.value.tensor == "w"


def test_missing_and_unused_entries_are_listed() -> None:
    found = imatrix(a=ones(4), b=ones(4), c=ones(4))
    tensors = [weight("x", 2, 4), weight("b", 2, 4), weight("y", 2, 4)]
    assert found.check(tensors) == ImatrixFit(missing=("x", "y"), unused=("a", "c"))
    assert found.check([]) == ImatrixFit(missing=(), unused=("a", "b", "c"))


def test_an_importance_matrix_of_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedError) as caught:
        imatrix(a=ones(4)).check([weight("x", 2, 4)])
    assert str(caught.value) == (
        "i.gguf: the importance matrix is of another model, found entries such as 'a', "
        "wanted tensors such as 'x' [IMATRIX-MODEL]"
    )


# --- damaged and hostile files --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"w": ones(4)}, {}, "a GGUF file, but not an importance matrix"),
        ({"w.in_sum2": ones(4)}, {}, "tensor 'w': bad values '.counts', found none"),
        ({"w.counts": ones(1)}, {}, "tensor 'w': bad values '.in_sum2', found none"),
        (
            {"w.in_sum2": ones(4).astype(np.float16), "w.counts": ones(1)},
            {},
            "bad values '.in_sum2', found 4 of type F16, wanted F32",
        ),
        ({"w.in_sum2": ones(4), "w.counts": ones(3)}, {}, "found 3 counts for 4 sums"),
        ({"w.in_sum2": ones(4), "w.counts": ones(2) / 2}, {}, "wanted a whole number of tokens"),
        ({"w.in_sum2": -ones(4), "w.counts": ones(1)}, {}, "value 0 of the importance matrix is"),
        ({"w.in_sum2": ones(4), "w.counts": ones(1) * np.inf}, {}, "impossible, found inf"),
        ({"w.in_sum2": ones(4) * np.nan, "w.counts": ones(1)}, {}, "impossible, found nan"),
        ({"w.in_sum2": ones(4), "w.counts": -ones(1)}, {}, "impossible, found -1.0"),
        ({"w.in_sum2": ones(4), "w.counts": ones(1)}, {"datasets": None}, "'imatrix.datasets'"),
        ({"w.in_sum2": ones(4), "w.counts": ones(1)}, {"datasets": [1]}, "'imatrix.datasets'"),
        ({"w.in_sum2": ones(4), "w.counts": ones(1)}, {"chunk_count": None}, "'imatrix.chunk_c"),
        ({"w.in_sum2": ones(4), "w.counts": ones(1)}, {"chunk_size": "-8"}, "'imatrix.chunk_size'"),
    ],
)
def test_a_bad_gguf_form_is_refused(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], metadata: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "i.gguf", arrays, **metadata)
    with pytest.raises(FormatError) as caught:
        read_imatrix(path)
    assert message in str(caught.value)


def test_other_tensors_of_the_gguf_form_are_ignored(tmp_path: Path) -> None:
    arrays = {"w.in_sum2": ones(2, 4), "w.counts": 2 * ones(2, 1), "w.in_sum": ones(4)}
    found = read_imatrix(written(tmp_path / "i.gguf", arrays, datasets=["a", "b"]))
    assert list(found.weights) == ["w"]
    np.testing.assert_array_equal(found.weights["w"], ones(2, 4) / 2)
    assert found.datasets == ("a", "b")


ENTRY: Older = [("w", 2, ones(4))]
END = struct.pack("<ii", 3, 4) + b"text"


@pytest.mark.parametrize(
    ("end", "expected"),
    [(b"", (None, ())), (END[:4], (3, ())), (END, (3, ("text",))), (bytes(8), (0, ()))],
)
def test_early_files_of_the_older_form_lack_provenance(
    tmp_path: Path, end: bytes, expected: tuple[int | None, tuple[str, ...]]
) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(older_bytes(ENTRY, end))
    found = read_imatrix(path)
    assert (found.chunk_count, found.datasets) == expected
    np.testing.assert_array_equal(found.weights["w"], ones(4) / 2, strict=True)


def test_values_of_no_calls_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(older_bytes([("w", 0, 3 * ones(4))]))
    np.testing.assert_array_equal(read_imatrix(path).weights["w"], 3 * ones(4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file ends too early, wanted the number of entries"),
        (b"<!DOCTYPE html>\n<html>", "impossible number of entries"),
        (struct.pack("<i", 0) + bytes(64), "impossible number of entries, found 0, wanted 1 to 3"),
        (struct.pack("<i", -1) + bytes(64), "impossible number of entries, found -1"),
        (struct.pack("<ii", 1, 1 << 30) + bytes(64), "impossible number of bytes of a name"),
        (struct.pack("<ii", 1, 65) + bytes(64), "bytes of a name, found 65, wanted 0 to 64"),
        (older_bytes([("", 1, ones(4))]), "an entry without a name of its own"),
        (older_bytes([*ENTRY, *ENTRY]), "an entry without a name of its own, found 'w'"),
        (older_bytes([("w", -1, ones(4))]), "impossible number of calls of 'w', found -1"),
        (
            struct.pack("<ii1sii", 1, 1, b"w", 1, (1 << 31) - 1) + bytes(64),
            "impossible number of values of 'w', found 2147483647, wanted 1 to 16",
        ),
        (older_bytes([("w", 1, np.full(4, np.nan, np.float32))]), "impossible, found nan"),
        (older_bytes([("w", 1, -ones(4))]), "tensor 'w': value 0 of the importance matrix"),
        (older_bytes([("w", 1, ones(4))]).replace(b"w", b"\xff"), "a name is not UTF-8"),
        (older_bytes(ENTRY, END + b"x"), "bytes after the end, found 1 bytes"),
        (older_bytes(ENTRY, struct.pack("<i", -3)), "impossible number of chunks, found -3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_older_form_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_imatrix(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", [GGUF, OLDER], ids=["gguf", "older"])
def test_truncations_are_refused(tmp_path: Path, path: Path) -> None:
    data, cut = path.read_bytes(), tmp_path / "i"
    # The last array's padding may be missing, and so may the older form's provenance or its path.
    whole = {len(data) - n for n in range(17)} if path == GGUF else {len(data) - 17, len(data) - 13}
    for size in {*range(0, len(data), 7), *range(len(data) - 80, len(data))} - whole:
        cut.write_bytes(data[:size])
        with pytest.raises(FormatError):
            read_imatrix(cut)
    for size in whole:
        cut.write_bytes(data[:size])
        assert read_imatrix(cut).weights.keys() == read_imatrix(path).weights.keys()


@pytest.mark.parametrize("path", [GGUF, OLDER], ids=["gguf", "older"])
def test_damage_is_refused_or_read_within_bounds(tmp_path: Path, path: Path) -> None:
    rng, data, damaged = random.Random(SEED), path.read_bytes(), tmp_path / "i"
    refused = 0
    tracemalloc.start()
    for _ in range(500):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice((0, 1, 127, 128, 255))
        damaged.write_bytes(broken)
        try:
            read_imatrix(damaged)
        except QconvertError:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 50, f"seed {SEED}"
    assert peak < 4 << 20


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError):
            read_imatrix(path)

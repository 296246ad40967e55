"""The container: what the package writes and reads against the independent reader and the vectors.

Not checked here: the arithmetic of the schemes (its own vectors judge it), and files above 4 GiB.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from conftest import (
    FORMATS,
    Qblk,
    Run,
    every_kind,
    gaussian,
    read_all_independently,
    read_independently,
    save,
)
from numpy.typing import NDArray

from qconvert.errors import InputError, QconvertError
from qconvert.files.qblk import QblkModel, open_qblk
from qconvert.geometry import TILE_VALUES
from qconvert.model import DTYPES, TensorInfo
from qconvert.ranges import RangeMethod
from qconvert.schemes import SCHEMES, AffineScheme, CastScheme, parse_scheme
from qconvert.stages.quantize import QuantizeOptions, quantize
from qconvert.stages.verify import VerifyOptions, verify

VECTORS = FORMATS / "qblk" / "vectors"
VALID = sorted((VECTORS / "valid").glob("*.qblk"))
RULES: dict[str, dict[str, str]] = json.loads((VECTORS / "invalid.json").read_text())
SCHEMA = json.loads((FORMATS / "qblk" / "schema.json").read_text())
QBLK_SCHEMES = [n for n, s in SCHEMES.items() if isinstance(s, AffineScheme | CastScheme)]
stem = {"ids": lambda p: Path(p).stem}


def convert(source: Path, target: Path, scheme: str, **options: Any) -> Path:
    options.setdefault("range", RangeMethod("minmax"))  # the search is not in question here
    quantize(source, QuantizeOptions(parse_scheme(scheme), target, **options))
    return target


def checked(path: Path) -> QblkModel:
    """The package's own reading, with every rule."""
    model = open_qblk(path)
    try:
        model.check_payload(lambda _: None)
    except BaseException:
        model.close()
        raise
    return model


def value_bytes(model: QblkModel, tensor: TensorInfo) -> bytes:
    """Values as the independent reader hashes them: raw bytes as stored, else binary32."""
    if tensor.dtype not in DTYPES:
        return model.values(tensor, 0, tensor.size).astype("<f4").tobytes()
    return model.raw(tensor, 0, tensor.nbytes)


def hashes(path: Path) -> dict[str, str]:
    model = checked(path)
    try:
        return {t.name: hashlib.sha256(value_bytes(model, t)).hexdigest() for t in model.tensors}
    finally:
        model.close()


def header_of(path: Path) -> dict[str, Any]:
    return Qblk(path).header


@pytest.fixture(scope="module", params=["q4_block64", "q8_channel", "q3_block16_asym", "f16"])
def written(request: pytest.FixtureRequest, model: Path, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("written") / "m.qblk"
    return convert(model, path, request.param, min_values=0)


# --- written files --------------------------------------------------------------------------------


def test_a_written_file_has_the_values_that_the_independent_reader_finds(written: Path) -> None:
    told = read_independently(written)
    assert told.code == 0, told.out
    assert {t["name"]: t["values_sha256"] for t in told.json["tensors"]} == hashes(written)


def test_the_schema_accepts_a_written_header(written: Path) -> None:
    jsonschema.validate(header_of(written), SCHEMA)


def test_kept_tensors_and_metadata_are_those_of_the_source(written: Path) -> None:
    model = open_qblk(written)
    source = every_kind()
    kept = [t for t in model.tensors if model.stored(t).source_dtype == t.dtype]
    assert {"empty", "ids", "mask", "bytes"} <= {t.name for t in kept}
    for t in kept:
        assert t.shape == source[t.name].shape
        assert model.raw(t, 0, t.nbytes) == source[t.name].tobytes()
    assert model.metadata == {"author": "tests"}
    assert {t.name: t.shape for t in model.tensors} == {n: a.shape for n, a in source.items()}
    model.close()


def test_zeros_may_lie_between_header_and_payload(written: Path, tmp_path: Path) -> None:
    """A written file has them already: the header is reserved before its numbers are known."""
    widened = Qblk(written).write(tmp_path / "gap.qblk", gap=100_000)
    assert hashes(widened) == hashes(written)
    assert read_independently(widened).code == 0
    dirty = bytearray(widened.read_bytes())
    dirty[64 + len(Qblk.canonical(header_of(widened))) + 50_000] = 1
    widened.write_bytes(dirty)
    with pytest.raises(QconvertError) as refusal:
        checked(widened)
    assert refusal.value.code == read_independently(widened).json["rule"] == "QBLK-007"


def test_every_scheme_is_read_by_both_and_any_slice_is_a_slice_of_the_whole(
    tmp_path: Path,
) -> None:
    """All 63 affine and cast schemes; three tensors in each file, rows padded and not."""
    tensors = {
        "odd": gaussian(1, 5, 301),
        "even": gaussian(2, 4, 256, dtype=ml_dtypes.bfloat16),
        "conv": gaussian(3, 6, 7, 5, 3, dtype=np.float16) + np.float16(0.2),
    }
    source = save(tmp_path / "m.safetensors", tensors)
    rng = random.Random(7)
    globs = tuple(tensors)
    for name in QBLK_SCHEMES:
        chosen = tuple((g, parse_scheme(name)) for g in globs)  # also where it does not pay
        path = convert(source, tmp_path / f"{name}.qblk", name, tensor_schemes=chosen)
        model = checked(path)
        for t in model.tensors:
            whole = model.values(t, 0, t.size)
            assert len(whole) == t.size
            for _ in range(12):
                start, stop = sorted(rng.choices(range(t.size + 1), k=2))
                part = model.values(t, start, stop)
                assert part.tobytes() == whole[start:stop].tobytes(), (name, t.name, start, stop)
        model.close()
    paths = [tmp_path / f"{name}.qblk" for name in QBLK_SCHEMES]
    for path, told in zip(paths, read_all_independently(paths), strict=True):
        assert told.code == 0, (path.stem, told.out)
        assert {t["name"]: t["values_sha256"] for t in told.json["tensors"]} == hashes(path)


def test_companion_files_are_carried_verbatim(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save(directory / "model.safetensors", {"w": gaussian(1, 40, 64)})
    files = {"config.json": b'{"a" : 1}\r\n', "tokenizer.json": bytes(range(256)) * 9}
    for name, data in (files | {"notes.txt": b"not a part of the model"}).items():
        (directory / name).write_bytes(data)
    path = convert(directory, tmp_path / "m.qblk", "q4_block32")
    model = checked(path)
    assert {c.name: c.read() for c in model.companions} == files
    model.close()
    told = read_independently(path).json["files"]
    assert {f["name"]: f["sha256"] for f in told} == {
        n: hashlib.sha256(d).hexdigest() for n, d in files.items()
    }


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows longer than a tile, one of them no multiple of anything; many small tensors beside."""
    tensors: dict[str, NDArray[Any]] = {f"n{i:02}": gaussian(i, 32, 40) for i in range(12)}
    tensors["long"] = gaussian(90, 3, TILE_VALUES + 77)
    tensors["far"] = gaussian(91, 2, 2 * TILE_VALUES + 32, dtype=ml_dtypes.bfloat16)
    return save(tmp_path_factory.mktemp("long") / "m.safetensors", tensors)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("q4_tensor_asym", "mse"),
        ("q4_tensor", "percentile"),
        ("q5_channel", "percentile"),
        ("q5_channel_asym", "minmax"),
        ("q3_block16_asym", "minmax"),
        ("q8_block256", "mse"),
    ],
)
def test_the_bytes_do_not_depend_on_threads_or_on_the_run(
    long_rows: Path, tmp_path: Path, scheme: str, method: str
) -> None:
    files = []
    for i, threads in enumerate((1, 2, 3, 1)):
        path = convert(
            long_rows, tmp_path / f"{i}.qblk", scheme, threads=threads, range=RangeMethod(method)
        )
        files.append(path.read_bytes())
    assert len(set(files)) == 1


def test_slices_across_tiles_are_slices_of_the_whole(long_rows: Path, tmp_path: Path) -> None:
    model = checked(convert(long_rows, tmp_path / "m.qblk", "q3_block16_asym"))
    tensor = next(t for t in model.tensors if t.name == "long")
    whole = model.values(tensor, 0, tensor.size)
    for start in (TILE_VALUES - 5, TILE_VALUES + 70, 2 * TILE_VALUES + 3):
        part = model.values(tensor, start, start + 100)
        assert part.tobytes() == whole[start : start + 100].tobytes()
    model.close()


@pytest.mark.parametrize("scheme", ["q4_tensor_asym", "q5_channel", "q4_block256"])
def test_a_tensor_of_several_tiles_is_verified(
    long_rows: Path, tmp_path: Path, scheme: str
) -> None:
    path = convert(long_rows, tmp_path / "m.qblk", scheme)
    assert verify(path, VerifyOptions(against=long_rows, rows=1)).status == "pass"


def test_a_long_row_is_read_by_both(long_rows: Path, tmp_path: Path) -> None:
    path = convert(long_rows, tmp_path / "m.qblk", "q4_channel_asym")
    told = read_independently(path)
    assert {t["name"]: t["values_sha256"] for t in told.json["tensors"]} == hashes(path)


def test_the_command_writes_the_bytes_that_the_function_writes(
    small: Path, tmp_path: Path, run: Run
) -> None:
    for name, seed in (("a.qblk", "0"), ("b.qblk", "1")):
        environment = {"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}
        line = ("quantize", small, "--scheme", "q4_block64", "-o", tmp_path / name)
        assert run(*line, env=environment).code == 0
    expected = convert(small, tmp_path / "c.qblk", "q4_block64", range=None).read_bytes()
    assert (tmp_path / "a.qblk").read_bytes() == (tmp_path / "b.qblk").read_bytes() == expected


# --- what the source may hold and the container may not ------------------------------------------


def test_a_file_is_never_written_that_its_reader_refuses(tmp_path: Path) -> None:
    """safetensors has no limit of dimensions, qblk has 16."""
    source = save(tmp_path / "m.safetensors", {"w": gaussian(1, *[1] * 15, 40, 64)})
    path = tmp_path / "m.qblk"
    try:
        convert(source, path, "q8_tensor")
    except InputError:
        assert not path.exists()
    else:
        checked(path).close()


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", VALID, **stem)
def test_a_valid_vector_is_accepted_with_its_values(path: Path) -> None:
    wanted = json.loads(path.with_suffix(".json").read_text())
    values = {t["name"]: t["values_sha256"] for t in wanted["tensors"]}
    assert hashes(path) == values
    model = open_qblk(path)
    files = {f.name: hashlib.sha256(f.read()).hexdigest() for f in model.companions}
    assert files == {f["name"]: f["sha256"] for f in wanted["files"]}
    assert model.metadata == wanted["metadata"]
    for t in model.tensors:
        assert hashlib.sha256(model.values(t, 0, t.size).tobytes()).digest()
    model.close()


@pytest.mark.parametrize("path", VALID, **stem)
def test_the_schema_accepts_a_valid_vector(path: Path) -> None:
    jsonschema.validate(header_of(path), SCHEMA)


def test_the_independent_reader_accepts_every_valid_vector() -> None:
    for path, told in zip(VALID, read_all_independently(VALID), strict=True):
        assert told.code == 0, path
        assert told.json == json.loads(path.with_suffix(".json").read_text()), path


def test_every_vector_is_listed() -> None:
    assert {p.name for p in (VECTORS / "invalid").glob("*.qblk")} == set(RULES)
    assert len(VALID) >= 30
    assert {r["rule"] for r in RULES.values()} == {f"QBLK-{n:03}" for n in range(1, 27)}


@pytest.mark.parametrize("name", RULES, **stem)
def test_an_invalid_vector_is_refused_by_its_rule(name: str) -> None:
    with pytest.raises(InputError) as refusal:
        checked(VECTORS / "invalid" / name)
    assert refusal.value.code == RULES[name]["rule"]


def test_the_independent_reader_refuses_every_invalid_vector_by_the_same_rule() -> None:
    paths = [VECTORS / "invalid" / name for name in RULES]
    for path, told in zip(paths, read_all_independently(paths), strict=True):
        assert (told.code, told.json["rule"]) == (1, RULES[path.name]["rule"]), path


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of segment, padding between them and a companion."""
    directory = tmp_path_factory.mktemp("victim")
    tensors = {"w": gaussian(1, 9, 33), "v": gaussian(2, 8, 40) + 1, "b": gaussian(3, 9)}
    save(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text('{"hidden_size": 33}')
    options = {"min_values": 0, "tensor_schemes": (("v", parse_scheme("q8_channel_sym")),)}
    return convert(directory, directory / "m.qblk", "q3_block16_asym", **options).read_bytes()


def refused_by_both(paths: list[Path]) -> None:
    for path in paths:
        with pytest.raises(QconvertError):
            checked(path)
        try:
            assert verify(path, VerifyOptions()).status == "fail", path
        except InputError as e:  # not even a qblk file, or one of another version
            assert e.code in ("QBLK-001", "QBLK-002"), path  # noqa: PT017
    for path, told in zip(paths, read_all_independently(paths), strict=True):
        assert told.code == 1, path


def test_no_single_byte_can_change_unseen(victim: bytes, tmp_path: Path) -> None:
    rng = random.Random(20)
    paths = []
    places = [*rng.sample(range(len(victim)), 180), 0, 3, 8, 9, 12, 16, 24, 40, 64, 100]
    for place in [*places, *range(len(victim) - 10, len(victim))]:
        damaged = bytearray(victim)
        damaged[place] ^= 1 << rng.randrange(8)
        paths.append(tmp_path / f"{len(paths):03}-byte-{place}")
        paths[-1].write_bytes(damaged)
    assert len(paths) == 200
    refused_by_both(paths)


def test_no_truncation_passes(victim: bytes, tmp_path: Path) -> None:
    rng = random.Random(21)
    paths = []
    for length in [0, 7, 63, 64, len(victim) - 1, *rng.sample(range(len(victim)), 45)]:
        paths.append(tmp_path / f"{len(paths):03}-first-{length}")
        paths[-1].write_bytes(victim[:length])
    refused_by_both(paths)

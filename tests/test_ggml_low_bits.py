"""Q1_0 and Q2_0, which gguf-py does not know: bytes are those of ggml's own functions, recorded,
and values those of loops over its structures.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Call, gaussian, save
from numpy.typing import NDArray

import qconvert
from qconvert import kernels

F32 = NDArray[np.float32]
BLOCKS = {"Q1_0": 128, "Q2_0": 64}
# SHA-256 of what quantize_row_q1_0_ref and quantize_row_q2_0_ref of libggml-base at 0c1e57098 made
# of `numbers`, called with ctypes: (const float *, void *, int64_t).
RECORDED = {
    "Q1_0": "4f7b72b6b7faca0bec3091ebe311cbf9d4767d0a9de04beddc7263232b1063c4",
    "Q2_0": "79b3632754b46059ef77a5651dc9b82ebae6e2a1892a95068a89a10fb1e11d2c",
}


def numbers(block: int) -> F32:
    """Blocks of many kinds, exactly the same everywhere: small integers times powers of two."""
    x = (np.arange(6000 * block, dtype=np.int64) * 2654435761 >> 7) % 4001 - 2000
    blocks = x.reshape(-1, block).astype(np.float32) * np.float32(2.0**-10)
    blocks[::3] *= np.float32(2.0**-14)  # scales below the normal numbers of float16
    blocks[1::3] = np.rint(blocks[1::3])  # ties, and halves
    blocks[7] = 0
    blocks[8] = -0.0
    return blocks


def decoded(name: str, data: bytes) -> list[float]:
    """Blocks of 18 bytes: a float16, and bits or pairs of bits from the lowest on."""
    found = []
    for at in range(0, len(data), 18):
        (scale,) = struct.unpack_from("<e", data, at)
        for byte in data[at + 2 : at + 18]:
            if name == "Q1_0":
                found += [scale if byte >> i & 1 else -scale for i in range(8)]
            else:
                found += [((byte >> i & 3) - 1) * scale for i in (0, 2, 4, 6)]
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_are_those_of_ggml(name: str) -> None:
    blocks = numbers(BLOCKS[name])
    data = np.asarray(kernels.ggml_encode(name, blocks)).tobytes()
    assert hashlib.sha256(data).hexdigest() == RECORDED[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_values_are_those_of_the_structures(name: str) -> None:
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (300, 18)).astype(np.uint8)
    data[:, 1] &= 0x3B  # no Inf and no NaN
    values = np.asarray(kernels.ggml_decode(name, data)).ravel()
    np.testing.assert_array_equal(values, decoded(name, data.tobytes()))


def test_weights_of_two_and_of_three_values_are_restored() -> None:
    rng = np.random.default_rng(5)
    for name, levels in (("Q1_0", [-1, 1]), ("Q2_0", [-1, 0, 1])):
        scale = (np.abs(rng.standard_normal((50, 1))) + 0.1).astype(np.float16).astype(np.float32)
        # The mean of 128 equal magnitudes is that magnitude where sums are exact: 7 bits of it.
        scale = (scale.view(np.uint32) & 0xFFFF8000).view(np.float32)
        x = scale * rng.choice(np.float32(levels), (50, BLOCKS[name]))
        back = kernels.ggml_decode(name, np.asarray(kernels.ggml_encode(name, x)))
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_file_of_them_is_written_read_and_verified(name: str, tmp_path: Path, call: Call) -> None:
    weight: Any = gaussian(3, 48, 256, dtype=ml_dtypes.bfloat16)
    save(tmp_path / "m.safetensors", {"a.weight": weight})
    out = tmp_path / "m.gguf"
    done = call("quantize", tmp_path / "m.safetensors", "--scheme", name, "--raw", "-o", out)
    assert done.code == 0, done.err
    number = {"Q1_0": 41, "Q2_0": 42}[name]  # ggml.h
    data = out.read_bytes()
    place = data.index(b"a.weight") + len(b"a.weight")
    dimensions, columns, rows, kind = struct.unpack_from("<IQQI", data, place)
    assert (dimensions, columns, rows, kind) == (2, 256, 48, number)
    size = 48 * 256 // BLOCKS[name] * 18
    with qconvert.load(out) as found:
        values = found["a.weight"].dequantize().ravel()
    starts = range((len(data) - size - 31) // 32 * 32, len(data) - size + 1, 32)
    assert any(np.array_equal(values, decoded(name, data[n : n + size])) for n in starts)
    checks = call("verify", out, "--against", tmp_path / "m.safetensors", "--json").json["checks"]
    status = {c["id"]: c["status"] for c in checks}
    assert {status[i] for i in ("integrity", "error-bound", "same-tensors")} == {"pass"}, status

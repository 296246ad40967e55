"""K-quants: decoders against gguf-py, our encoder against llama-quantize and against the optimum.

Compared with are figures recorded from llama-quantize: golden_k/make.py says how. That native code
gives the same bytes is shown in test_native.py. Not checked here: that llama.cpp loads a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.kernels.reference.ggml import GGML_BLOCKS, GgmlBlock

F32 = NDArray[np.float32]
GOLDEN = Path(__file__).parent / "golden_k"
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
AFFINE = ("Q2_K", "Q4_K", "Q5_K")
LENGTH = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}
CODES = {"Q2_K": (0, 3), "Q3_K": (-4, 3), "Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31)}
MOST = {"Q2_K": 15, "Q3_K": 31, "Q4_K": 63, "Q5_K": 63, "Q6_K": 127}
LLAMA: dict[str, dict[str, tuple[float, float]]] = json.loads((GOLDEN / "errors.json").read_text())


def encode(kind: GgmlBlock, blocks: Any, importance: Any = None) -> NDArray[np.uint8]:
    return kernels.ggml_encode(kind.name, blocks, importance)


def decode(kind: GgmlBlock, data: Any) -> NDArray[np.float32]:
    return kernels.ggml_decode(kind.name, data)


def normal(*shape: int, seed: int = 1) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_gguf(name: str, data: NDArray[np.uint8]) -> F32:
    with np.errstate(all="ignore"):
        values: F32 = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    return values


def coded(name: str, x: F32, importance: F32 | None = None) -> F32:
    """What gguf-py reads from our bytes."""
    data = kernels.ggml_encode(name, x, importance)
    assert data.dtype == np.uint8
    assert data.shape == (len(x), GGML_BLOCKS[name].nbytes)
    return by_gguf(name, data)


def squared_error(x: F32, y: F32, weight: F32 | float = 1.0) -> float:
    return float((weight * (x.astype(np.float64) - y) ** 2).sum())


# --- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_records_agree_with_gguf(name: str) -> None:
    kind = GGML_BLOCKS[name]
    assert (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (kind.group, kind.codes) == (LENGTH[name], CODES[name])


@pytest.mark.parametrize("name", TYPES)
def test_parts_give_the_values_of_any_bytes(name: str) -> None:
    kind = GGML_BLOCKS[name]
    data = np.random.default_rng(2).integers(0, 256, (3000, kind.nbytes), dtype=np.uint8)
    data = data[np.isfinite(kind.scales(data)).all(axis=1)]
    parts = kind.splitter(data)
    assert (parts.codes.dtype, parts.scale.dtype) == (np.int16, np.float32)
    assert parts.codes.shape == (len(data), 256)
    assert parts.scale.shape == (len(data), 256 // LENGTH[name])
    assert (parts.codes.min(), parts.codes.max()) == CODES[name]
    assert (parts.offset is not None) == (name in AFFINE)
    values = np.repeat(parts.scale, kind.group, axis=1) * parts.codes.astype(np.float32)
    if parts.offset is not None:
        values += np.repeat(parts.offset, kind.group, axis=1)
    np.testing.assert_array_equal(values, by_gguf(name, data))


@pytest.mark.parametrize("name", TYPES)
def test_scales_beyond_float16_are_reported(name: str) -> None:
    kind = GGML_BLOCKS[name]
    x = normal(5, 256)
    assert kind.finite_scales(encode(kind, x))
    x[3, 77] = 1e30
    assert not kind.finite_scales(encode(kind, x))


# --- the encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tensor", LLAMA["Q4_K"])
@pytest.mark.parametrize("name", TYPES)
def test_squared_error_is_below_that_of_llama_quantize(
    name: str, tensor: str, weighted: bool
) -> None:
    with np.load(GOLDEN / "weights.npz") as stored:
        x = stored[tensor].astype(np.float32)
        importance = stored["importance"][None] if weighted else None
    weight = 1.0 if importance is None else importance
    ours = squared_error(x, coded(name, x, importance), weight)
    assert ours < LLAMA[name][tensor][weighted]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "factor"), [
    ("Q2_K", 0.90), ("Q3_K", 0.98), ("Q4_K", 0.97), ("Q5_K", 0.96), ("Q6_K", 0.92),
])  # fmt: skip
def test_mean_error_over_that_of_llama_quantize(name: str, factor: float, weighted: bool) -> None:
    """The margin that the specification states; an average over tensors of ratios."""
    ratios = []
    with np.load(GOLDEN / "weights.npz") as stored:
        importance = stored["importance"][None] if weighted else None
        weight = 1.0 if importance is None else importance
        for tensor, theirs in LLAMA[name].items():
            x = stored[tensor].astype(np.float32)
            ours = squared_error(x, coded(name, x, importance), weight)
            ratios.append(ours / theirs[weighted])
    assert np.mean(ratios) < factor


def on_the_grid(name: str, rng: np.random.Generator) -> F32:
    """Blocks of values that a block can hold: all integers in use, all sub-blocks of full width."""
    kind, most, groups = GGML_BLOCKS[name], MOST[name], 256 // LENGTH[name]
    low, high = CODES[name]
    codes = rng.integers(low, high + 1, (50, groups, kind.group))
    codes[:, :, 0], codes[:, :, 1] = low, high
    codes = rng.permuted(codes, axis=2)
    a = rng.integers(most // 2, most + 1, (50, groups, 1))
    a[:, 3] = most
    d = np.float32(2.0**-9 * 1.25)
    values = d * a * codes
    if name in AFFINE:
        b = rng.integers(1, most + 1, (50, groups, 1))
        b[:, 1] = most
        values = values - np.float32(2.0**-8 * 1.5) * b
    return values.reshape(50, 256).astype(np.float32)


@pytest.mark.parametrize("name", TYPES)
def test_values_on_a_grid_are_found_again(name: str) -> None:
    x = on_the_grid(name, np.random.default_rng(4))
    found = coded(name, x)
    if name in AFFINE:
        np.testing.assert_array_equal(found, x)
    else:  # d is chosen with room above, so that the integers may come out as others
        error = squared_error(x, found) / squared_error(x, np.zeros_like(x))
        assert error < {"Q3_K": 3e-4, "Q6_K": 2e-5}[name]


def best_possible(x: F32, low: int, high: int, affine: bool) -> float:
    """Least squared error of a sub-block, any scale and offset: a dense grid of both, fitted."""
    v = x.astype(np.float64)
    width = np.ptp(v) if affine else np.abs(v).max() * (high - low) / max(high, -low)
    best = np.inf
    for scale in width / (high - low) * np.linspace(0.6, 1.2, 121):
        for signed in (scale,) if affine else (scale, -scale):
            shifts = np.linspace(-0.5, 0.5, 21) if affine else [0.0]
            middle = (v.max() + v.min()) / 2 if affine else 0.0
            for shift in shifts:
                centre = (low + high) / 2 + shift if affine else 0.0
                u = np.clip(np.rint((v - middle) / signed + centre), low, high)
                design = np.stack([u, np.ones_like(u)], axis=1) if affine else u[:, None]
                fit = np.linalg.lstsq(design, v, rcond=None)[0]
                best = min(best, float(((v - design @ fit) ** 2).sum()))
    return best


@pytest.mark.parametrize(("name", "factor"), [
    ("Q2_K", 1.08), ("Q3_K", 1.05), ("Q4_K", 1.07), ("Q5_K", 1.18), ("Q6_K", 1.12),
])  # fmt: skip
def test_error_is_near_the_least_possible_with_scales_of_any_size(name: str, factor: float) -> None:
    """The bound is out of reach: integer scales and two units for 256 values cost something."""
    x = normal(2, 256, seed=5)
    bound = sum(
        best_possible(part, *CODES[name], name in AFFINE) for part in x.reshape(-1, LENGTH[name])
    )
    error = squared_error(x, coded(name, x))
    assert bound <= error < factor * bound


# --- importance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_importance_lowers_the_error_that_it_weights(name: str) -> None:
    x = normal(64, 256, seed=6)
    importance = np.exp(normal(1, 256, seed=7))
    plain, weighted = coded(name, x), coded(name, x, importance)
    assert squared_error(x, weighted, importance) < squared_error(x, plain, importance)
    assert squared_error(x, weighted) > squared_error(x, plain)


@pytest.mark.parametrize("name", TYPES)
def test_equal_importance_of_any_size_and_none_at_all_give_the_plain_bytes(name: str) -> None:
    x, kind = normal(9, 256), GGML_BLOCKS[name]
    plain = encode(kind, x)
    for size in (0.0, 1e-40, 2.0**-126, 1.0, 3e38):
        importance = np.full((1, 256), size, np.float32)
        np.testing.assert_array_equal(encode(kind, x, importance), plain)


@pytest.mark.parametrize("name", TYPES)
def test_values_without_importance_do_no_harm(name: str) -> None:
    x, kind = normal(8, 256), GGML_BLOCKS[name]
    importance = np.ones((1, 256), np.float32)
    importance[:, 5:] = 0
    importance[:, 9] = 1e-30
    data = encode(kind, x, importance)
    assert kind.finite_scales(data)
    assert np.abs(by_gguf(name, data)).max() < 10


@pytest.mark.parametrize("name", TYPES)
def test_a_block_has_the_same_bytes_in_any_company(name: str) -> None:
    x, kind = normal(7, 256), GGML_BLOCKS[name]
    importance = np.exp(normal(3, 256, seed=8))
    for given in (None, importance):
        together = encode(kind, x, given)
        for i in range(7):
            own = None if given is None else given[i % 3][None]
            np.testing.assert_array_equal(encode(kind, x[i : i + 1], own), together[i : i + 1])


# --- values at the edge ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-38, 1e-30])
def test_next_to_nothing_becomes_zero(name: str, value: float) -> None:
    x = np.full((3, 256), value, np.float32)
    assert not coded(name, x).any()


@pytest.mark.parametrize("name", TYPES)
def test_small_weights_use_what_float16_leaves(name: str) -> None:
    """d is a subnormal float16 here, with few steps left: the integer scales make up for that."""
    x = normal(16, 256)
    small = x * np.float32(2.0**-14)
    relative = squared_error(small, coded(name, small)) * 2.0**28 / squared_error(x, coded(name, x))
    assert relative < 1.05


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [-3.3, 3.3, 0.05, -7e4])
def test_a_constant_is_kept(name: str, value: float) -> None:
    x = np.full((2, 256), value, np.float32)
    np.testing.assert_allclose(coded(name, x), x, rtol=1e-3)


@pytest.mark.parametrize("name", AFFINE)
def test_values_close_together_beside_others_of_both_signs(name: str) -> None:
    """All trial grids give such a sub-block one code, which says nothing about an offset."""
    x = normal(8, 256)
    x[:, -32:] = 3 + 0.01 * x[:, -32:]
    np.testing.assert_allclose(coded(name, x)[:, -32:], 3, rtol=0.07)


@pytest.mark.parametrize("name", AFFINE)
def test_values_far_from_zero_on_one_side_keep_their_differences(name: str) -> None:
    """Where all values are positive m is negative: an offset of 0 would leave most codes unused."""
    spread = np.abs(normal(8, 256))
    for x in (spread + 5, -spread - 5):
        error = squared_error(x, coded(name, x)) / x.size
        assert error < {"Q2_K": 0.1, "Q4_K": 0.008, "Q5_K": 0.002}[name] * x.var()


@pytest.mark.parametrize("name", TYPES)
def test_one_value_among_zeros(name: str) -> None:
    x = np.zeros((256, 256), np.float32)
    np.fill_diagonal(x, -7)
    np.testing.assert_allclose(coded(name, x), x, rtol=2e-3, atol=2e-3)

"""Packing of codes and zero points: formats/schemes/SPEC.md section 4."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from stored import in_memory

from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Segment
from qconvert.files import qblk_writer
from qconvert.kernels.reference import pack, unpack

# Six-bit codes have eight-bit zero points, in whole groups of 32 like the others.
WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def test_four_bits_pack_as_the_specification_shows() -> None:
    packed = pack(np.arange(32, dtype=np.uint8) % 16, 4)
    assert packed.tobytes() == bytes.fromhex("00112233445566778899aabbccddeeff")


def test_three_bits_pack_as_the_specification_shows() -> None:
    packed = pack(np.arange(32, dtype=np.uint8) % 8, 3)
    assert packed.tobytes() == bytes.fromhex("0055aaff0055aaff aaaaaaaa")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_single_bit_lands_where_the_formula_says(width: int) -> None:
    for j in range(32):
        for bit in range(width):
            values = np.zeros(32, np.uint8)
            values[j] = 1 << bit
            assert pack(values, width).tobytes() == oracle.pack(values.tolist(), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_many_groups_pack_by_the_formula_and_unpack_to_the_same(width: int) -> None:
    values = np.random.default_rng(width).integers(0, 1 << width, 32 * 50).astype(np.uint8)
    packed = pack(values, width)
    assert packed.tobytes() == oracle.pack(values.tolist(), width)
    assert len(packed) == 50 * 4 * width
    assert unpack(packed, width).tolist() == values.tolist()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_string_of_bytes_is_the_packing_of_some_values(width: int) -> None:
    packed = np.random.default_rng(width).integers(0, 256, 4 * width * 9).astype(np.uint8)
    values = unpack(packed, width)
    assert values.max() < 1 << width
    assert pack(values, width).tolist() == packed.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_zero_points_fill_whole_groups_with_zeros(bits: int, count: int) -> None:
    encoding = Affine(bits, "channel", 0, False, "F32", 40)
    z = np.random.default_rng(count).integers(0, 4 * (2**bits - 1) + 1, count).astype(np.uint8)
    filled = qblk_writer.packed(z, bits + 2)
    assert filled == oracle.pack(z.tolist(), bits + 2)
    assert len(filled) == 4 * (bits + 2) * -(-count // 32)
    assert Segment("zero_points", len(filled), bits + 2) in encoding.segments((count, 40))
    stored = in_memory(encoding, (count, 40), {"scales": bytes(4 * count), "zero_points": filled})
    assert encoding.parameters(stored, 0, count)[1].tolist() == z.tolist()


def test_eight_bit_zero_points_are_signed_bytes_without_filling() -> None:
    encoding = Affine(8, "channel", 0, False, "F32", 40)
    data = bytes([0x80, 0xFF, 0x00, 0x7F])
    assert Segment("zero_points", 4) in encoding.segments((4, 40)), "bytes as they come"
    stored = in_memory(encoding, (4, 40), {"scales": bytes(16), "zero_points": data})
    assert encoding.parameters(stored, 0, 4)[1].tolist() == [0, 127, 128, 255]

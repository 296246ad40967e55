#!/usr/bin/env python3
"""Make the test vectors of the quantization schemes (../SPEC.md); standard library only.

    python regenerate.py           write <scheme>.json
    python regenerate.py --check   exit 1 if a committed file differs, is missing or is extra

Range method: minmax (section 5). Each file is a list of cases; a case is one group:

    case                what it shows
    x                   the weights: binary32 bit patterns, hex, most significant digit first
    scale_dtype, scale  the stored scale: its bit pattern, hex, most significant digit first
    zero_point          as stored (quarter steps below 8 bits, signed at 8), null if symmetric
    codes               as stored: u below 8 bits, q at 8; without padding
    packed              the bytes of the row of codes in file order, with its padding
    zero_points_packed  the bytes of this zero point alone in file order (a group of 32 below
                        8 bits), null if symmetric
    values              the decoded values: binary32 bit patterns

binary32 is emulated: one operation in binary64, rounded to binary32. For a quotient, sum,
difference or product of two binary32 numbers that gives the correctly rounded result even
though it rounds twice, since 53 >= 2 * 24 + 2.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCHEMES = [
    *("q8_tensor_sym", "q8_tensor_asym", "q4_tensor_sym", "q4_tensor_asym"),
    *("q8_block32_sym", "q8_block32_asym", "q4_block32_sym", "q4_block32_asym"),
    *(f"q{b}_block32_sym" for b in (2, 3, 5, 6)),
    *(f"q{b}_block16_asym" for b in (2, 3, 5, 6)),
]


# ---------------------------------------------------------------- numbers


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def bits32(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def from_bits32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def hex32(value: float) -> str:
    return f"{bits32(value):08x}"


def stored(value: float, dtype: str) -> tuple[str, float]:
    """f() of the specification: bit pattern and value of a positive binary32 in the dtype."""
    if dtype == "F16":
        (bits,) = struct.unpack("<H", struct.pack("<e", value))
        bits = bits or (value > 0)
        return f"{bits:04x}", struct.unpack("<e", struct.pack("<H", bits))[0]
    if dtype == "BF16":
        wide = bits32(value)
        high, low = wide >> 16, wide & 0xFFFF
        high += low > 0x8000 or (low == 0x8000 and high & 1)
        high = high or (value > 0)
        return f"{high:04x}", from_bits32(high << 16)
    bits = bits32(value)
    return f"{bits:08x}", value


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


# ---------------------------------------------------------------- sections 2, 4 and 5


def pack(values: list[int], width: int) -> bytes:
    """Section 4, bit by bit from the formula."""
    out = b""
    for first in range(0, len(values), 32):
        shift = 0
        for p in [p for p in (8, 4, 2, 1) if width & p]:
            plane = [0] * (4 * p)
            for j, value in enumerate(values[first : first + 32]):
                part = (value >> shift) & ((1 << p) - 1)
                plane[j % (4 * p)] |= part << (p * (j // (4 * p)))
            out += bytes(plane)
            shift += p
    return out


def quantize(scheme: str, case: str, x: list[float]) -> dict[str, Any]:
    name, per, kind = scheme.split("_")
    b, symmetric = int(name[1:]), kind == "sym"
    n, half = 2**b - 1, 2 ** (b - 1)
    block = int(per[5:]) if per.startswith("block") else 0
    x = [f32(v) for v in x]
    lo, hi = min(0.0, *x), max(0.0, *x)
    amax = max(hi, -lo)  # in this order: 0, not -0, for a group of zeros (QBLK-020)

    first = f32(amax / (half - 1)) if symmetric else f32(f32(hi / n) - f32(lo / n))
    dtype = "F32"
    if block and (amax == 0 or 2.0 ** (b - 23) <= first <= 32768):
        dtype = "F16"
    elif block and b <= 6 and first >= 2.0**-100:
        dtype = "BF16"
    if first == 0 and amax > 0:
        first = 2.0**-149  # not more than the smallest number of any dtype; stored() lifts it
    scale_bits, s = stored(first, dtype)

    z: int | None = None
    if symmetric:
        low, high = (-127, 127) if b == 8 else (-half, half - 1)
        q = [clamp(round(f32(v / s)), low, high) if s else 0 for v in x]
        codes = q if b == 8 else [k + half for k in q]
        values = [f32(k * s) for k in q]
    elif b == 8:
        z = clamp(round(f32(-lo / s)), 0, 255) - 128 if s else -128
        codes = [clamp(round(f32(f32(v / s) + (z + 128))), 0, 255) - 128 if s else -128 for v in x]
        values = [f32((q - z) * s) for q in codes]
    else:
        if not s:
            z = 0
        elif 0.0 in x:
            z = 4 * clamp(round(f32(-lo / s)), 0, n)
        else:
            z = clamp(round(f32(-lo / s) * 4), 0, 4 * n)
        codes = [clamp(round(f32(f32(v / s) + z / 4)), 0, n) if s else 0 for v in x]
        values = [f32((4 * u - z) / 4 * s) for u in codes]

    unit = (block or 1) if b == 8 else max(block, 32)
    padded = codes + [0] * (-len(codes) % unit)
    if b == 8:
        packed = struct.pack(f"{len(padded)}b", *padded)
        zero = None if z is None else struct.pack("b", z)
    else:
        packed = pack(padded, b)
        zero = None if z is None else pack([z] + [0] * 31, b + 2)
    return {
        "case": case,
        "x": [hex32(v) for v in x],
        "scale_dtype": dtype,
        "scale": scale_bits,
        "zero_point": z,
        "codes": codes,
        "packed": packed.hex(),
        "zero_points_packed": None if zero is None else zero.hex(),
        "values": [hex32(v) for v in values],
    }


# ---------------------------------------------------------------- cases


def noise(seed: int, count: int) -> list[float]:
    """Sums of four uniform numbers of a linear congruential generator, around 0."""
    out = []
    for _ in range(count):
        total = 0
        for _ in range(4):
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
            total += (seed >> 40) - 2**23
        out.append(total / 2**25)
    return out


EXAMPLE = [1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]


def cases(scheme: str) -> list[dict[str, Any]]:
    name, per, kind = scheme.split("_")
    b = int(name[1:])
    n, m = 2**b - 1, 2 ** (b - 1) - 1
    size = int(per[5:]) if per.startswith("block") else 32
    tiny = 2.0**-149
    todo: list[tuple[str, list[float]]] = [
        ("example of section 9", EXAMPLE),
        ("example with an exact zero", [*EXAMPLE, 0.0]),
        ("example negated", [-v for v in EXAMPLE]),
        ("all zeros, one of them -0", [0.0] * (size - 1) + [-0.0]),
        ("constant, positive", [0.3] * size),
        ("constant, negative", [-0.3] * size),
        ("a single value", [0.7]),
        ("positive only", [v / 10 for v in range(1, size + 1)]),
        ("negative only", [-v / 10 for v in range(1, size + 1)]),
        ("positive and zero", [v / 10 for v in range(size)]),
        ("negative zero counts as zero", [-0.0, 0.9, -0.77, 0.4]),
        ("denormal weights", [v * tiny for v in (1, -2, 300, -40, 5000, -6000, 70000, 8)]),
        ("the smallest denormal", [tiny, 0.0]),
        ("three smallest denormals", [3 * tiny, -tiny, tiny]),
        ("smallest normal numbers", [2.0**-126, -(2.0**-126), 1.5 * 2.0**-126]),
        ("large", [v * 1e7 for v in EXAMPLE]),
        ("very large", [1e38, -2e38, 3e37, 1.5e38]),
        ("small", [v * 1e-9 for v in EXAMPLE]),
        ("scale at the lower end of F16", [v * 2.0 ** (b - 23) for v in (n, n / 3, -n / 5, 1)]),
        ("noise", noise(1, size)),
        ("noise, short group", noise(2, size - 5)),
        ("noise with outlier", [*noise(3, size - 1), 4.0]),
        ("noise around 2", [v / 4 + 2 for v in noise(4, size)]),
        ("noise around -0.5", [v - 0.5 for v in noise(5, size)]),
        ("noise with zeros", [v if i % 3 else 0.0 for i, v in enumerate(noise(6, size))]),
    ]
    if kind == "sym":
        halves = [k + 0.5 for k in range(-min(m, 6), min(m, 6))]
        todo.append(("ties, scale 1", [float(m), *halves]))
        todo.append(("ties, scale 1/4, sign from below", [-m / 4, *(v / 4 for v in halves)]))
    else:
        steps = [k + 0.5 for k in range(min(n, 8))]
        todo.append(("ties, scale 1, zero point 0", [float(n), *steps]))
        for part in (1, 3, 5, 7):  # -lo / S * 4 = 0.5, 1.5, 2.5, 3.5
            lo = -part / 8
            todo.append((f"tie of the zero point at {part}/8", [lo, n + lo, 0.625, 0.875, 1.125]))
        for lo in (-0.5, -1.5, -2.5):
            group = [lo, n + lo, 0.0, 0.5, -0.25] if n + lo > 0.5 else [lo, n + lo, 0.0]
            todo.append((f"tie of an integer zero point at {-lo}", group))
        todo.append(("ties, zero point 2", [-2.0, n - 2.0, 0.0, 0.5, -0.5, -1.5]))
    return [quantize(scheme, case, x) for case, x in todo]


def self_test() -> None:
    """The worked examples of section 9."""
    one = quantize("q8_tensor_sym", "", EXAMPLE)
    assert one["codes"] == [33, -14, -70, 35, -59, 10, 47, 127]
    two = quantize("q4_tensor_asym", "", EXAMPLE)
    assert two["codes"] == [8, 4, 0, 8, 1, 6, 9, 15]
    assert two["zero_point"] == 21
    assert pack([j % 16 for j in range(32)], 4).hex() == "00112233445566778899aabbccddeeff"
    assert pack([j % 8 for j in range(32)], 3).hex() == "0055aaff0055aaffaaaaaaaa"


def main() -> int:
    self_test()
    files = {}
    for scheme in SCHEMES:
        lines = ",\n".join(json.dumps(case) for case in cases(scheme))
        files[f"{scheme}.json"] = f"[\n{lines}\n]\n".encode()
    extra = sorted({path.name for path in HERE.glob("*.json")} - set(files))
    if "--check" in sys.argv[1:]:
        wrong = [
            name
            for name, data in files.items()
            if not (HERE / name).is_file() or (HERE / name).read_bytes() != data
        ]
        for name in wrong + extra:
            print(f"differs, missing or extra: {name}")
        return 1 if wrong or extra else 0
    for name in extra:
        (HERE / name).unlink()
    for name, data in files.items():
        (HERE / name).write_bytes(data)
    print(f"{len(files)} schemes, {sum(len(cases(scheme)) for scheme in SCHEMES)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())

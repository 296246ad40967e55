"""Names of schemes: formats/schemes/SPEC.md section 1."""

from __future__ import annotations

import itertools

import pytest

from qconvert.encoding import AffineEncoding
from qconvert.errors import UsageError
from qconvert.schemes import (
    SCHEMES,
    AffineScheme,
    CastScheme,
    GgmlScheme,
    affine_scheme,
    parse_scheme,
)

AFFINE = [
    f"q{bits}_{unit}{suffix}"
    for bits, unit, suffix in itertools.product(
        (2, 3, 4, 5, 6, 8),
        ("tensor", "channel", "block16", "block32", "block64", "block128", "block256"),
        ("", "_sym", "_asym"),
    )
]
CODEBOOKS = [
    f"{table}_block{block}{suffix}"
    for table, block, suffix in itertools.product(("nf4", "fp4"), (32, 64, 128, 256), ("", "_dq"))
]
LEVELS = ["c2_block16", "c2_block32", "c3_block16", "c3_block32", "c4_block16", "c4_block32"]
LEVELS += ["c4s_block16", "c2z_block16", "c5_block16", "c5_block32", "c6_block16", "c6_block32"]
OTHERS = ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
OTHERS += ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "tq1_0", "tq2_0", "q1_0", "q2_0"]
OTHERS += ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
OTHERS += ["keep"]
OTHERS += ["q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "mxfp4_moe"]
# formats/exchange
COMPRESSED_TENSORS = [
    f"w{bits}a16{asym}{group}"
    for bits, asym, group in itertools.product(
        (2, 3, 4, 5, 6, 8), ("", "_asym"), ("", "_g32", "_g64", "_g128", "_channel")
    )
]
COMPRESSED_TENSORS += ["w8a8", "fp8_dynamic", "fp8_block"]
MLX = [
    f"mlx_{bits}bit_g{group}"
    for bits, group in itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))
]
GPTQ = [f"gptq_{bits}bit_{unit}" for bits in (4, 8) for unit in ("g32", "g64", "g128", "channel")]
AWQ = [f"awq_4bit_g{group}{sym}" for group in (32, 64, 128) for sym in ("", "_sym")]
BNB = ["bnb_nf4", "bnb_nf4_dq", "bnb_fp4", "bnb_fp4_dq", "bnb_int8"]
EXCHANGE = [*COMPRESSED_TENSORS, "fp8_block128", *MLX, *GPTQ, *AWQ, *BNB]
EXCHANGE += ["nvfp4a16", "mxfp4a16", "mxfp8a16", "w8a8_static", "fp8_static"]
EXCHANGE += ["mlx_mxfp4", "mlx_mxfp8", "mlx_nvfp4", "nvfp4a4", "fp8", "fp8_tensor"]


def test_the_table_holds_the_names_of_the_specification_and_no_others() -> None:
    assert sorted(SCHEMES) == sorted(AFFINE + CODEBOOKS + LEVELS + OTHERS + EXCHANGE)
    assert all(name == scheme.name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize("name", AFFINE)
def test_affine_names_mean_what_they_say(name: str) -> None:
    width, unit, *suffix = name.split("_")
    scheme = parse_scheme(name)
    assert isinstance(scheme, AffineScheme)
    assert scheme.bits == int(width[1:])
    if unit.startswith("block"):
        assert (scheme.granularity, scheme.block) == ("block", int(unit[5:]))
    else:
        assert (scheme.granularity, scheme.block) == (unit, 0)
    assert scheme.symmetric is {"sym": True, "asym": False, "": None}["".join(suffix)]
    settled = f"{width}_{unit}_"
    assert scheme.resolved(True).name == settled + "sym"
    assert scheme.resolved(False).name == settled + "asym"
    assert scheme.with_bits(4).name == name.replace(width, "q4", 1)


@pytest.mark.parametrize("name", [n for n in AFFINE if n.endswith("sym")])
def test_encodings_name_their_scheme(name: str) -> None:
    s = parse_scheme(name)
    assert isinstance(s, AffineScheme)
    encoding = AffineEncoding(s.bits, s.granularity, s.block, bool(s.symmetric), "F32", 64)
    assert encoding.scheme == name
    assert affine_scheme(s.bits, s.granularity, s.block, s.symmetric) == s


def test_casts_and_ggml_types() -> None:
    for name in ("f32", "f16", "bf16"):
        assert parse_scheme(name) == CastScheme(name, name.upper())
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "nvfp4"):
        assert parse_scheme(name) == GgmlScheme(name, name.upper())


@pytest.mark.parametrize("text", ["Q4_BLOCK32_Asym", " q4_block32_asym\n", "q4_Block32_ASYM"])
def test_case_and_surrounding_blanks_do_not_matter(text: str) -> None:
    assert parse_scheme(text).name == "q4_block32_asym"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("q4_blok32", "q4_block32"),
        ("q4_block_32", "q4_block32"),
        ("q8_tensor_symm", "q8_tensor_sym"),
        ("q4_K_N", "q4_k_m"),
        ("fp16", "f16"),
        ("bfloat16", "bf16"),
        ("int8", "bnb_int8"),
        ("", None),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(text: str, meant: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme(text)
    assert f"unknown scheme '{text}'" in str(caught.value)
    hint = caught.value.hint or ""
    if meant is None:
        assert "--list-schemes" in hint, "what shows all, for want of a near name"
    else:
        assert hint.startswith("did you mean")
        assert meant in hint


def test_the_name_of_a_format_is_answered_with_its_schemes() -> None:
    with pytest.raises(UsageError) as caught:
        parse_scheme("AWQ")
    sizes = ("g128", "g64", "g32")
    names = [f"awq_4bit_{g}" for g in sizes] + [f"awq_4bit_{g}_sym" for g in sizes]
    assert caught.value.hint == f"schemes that begin so: {' '.join(names)}"


@pytest.mark.parametrize("text", ["q7_block32", "q4_block48", "q4_block32_sym_asym", "q16_tensor"])
def test_names_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_scheme(text)

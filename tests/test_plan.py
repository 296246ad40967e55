"""Which tensor gets which scheme, how tensors are cut into rows, and rows into tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qconvert.codecs.affine import encoder as affine
from qconvert.containers import CONTAINERS
from qconvert.errors import UsageError
from qconvert.geometry import TILE_VALUES, row_length, tiles
from qconvert.mixes import MixOptions, ModelFacts, parse_mix, parse_tensor_type
from qconvert.model import DTYPES, TensorInfo
from qconvert.schemes import TENSOR_SCHEMES, AffineScheme, CastScheme, MixScheme, parse_scheme
from qconvert.stages.plan import (
    TOKEN_TABLES,
    PlannedTensor,
    PlanOptions,
    check_schemes,
    make_plan,
    plan_mix,
)


def tensor(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, shape, dtype, math.prod(shape) * DTYPES[dtype].size)


def planned(
    t: TensorInfo,
    scheme: str = "q4_block32",
    *,
    keep: tuple[str, ...] = (),
    tensor_schemes: tuple[tuple[str, str], ...] = (),
    min_values: int = 1024,
    container: str = "qblk",
) -> tuple[str | None, str]:
    """Name of the planned scheme and the reason."""
    asked = tuple((glob, TENSOR_SCHEMES[s]) for glob, s in tensor_schemes)
    whole = parse_scheme(scheme)
    check_schemes((whole, *(s for _, s in asked)), CONTAINERS[container])
    assert not isinstance(whole, MixScheme)
    (p,) = make_plan([t], whole, PlanOptions(keep, asked, min_values))
    assert p.tensor is t
    return (p.scheme.name if p.scheme else None), p.reason


MATRIX = tensor("model.layers.0.mlp.up_proj.weight", 64, 64)


# --- what is kept ---------------------------------------------------------------------------------


def test_a_matrix_takes_the_scheme() -> None:
    assert planned(MATRIX) == ("q4_block32", "--scheme q4_block32")


@pytest.mark.parametrize(
    "name",
    [
        "a.bias",
        "model.norm.weight",
        "h.0.input_layernorm.weight",
        "ln.LayerNorm.weight",
        "a.norm.bias",
        "x.LayerNorm.bias",
    ],
)
def test_norms_and_biases_are_kept_by_name_whatever_their_shape(name: str) -> None:
    assert planned(tensor(name, 64, 64)) == (None, "norm or bias by name")


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        # Mamba and Mamba 2, Jamba, gated delta nets
        ("backbone.layers.0.mixer.A_log", (128, 16), "is exponentiated"),
        ("model.layers.0.linear_attn.A_log", (64, 64), "is exponentiated"),
        ("backbone.layers.0.mixer.D", (64, 64), "the recurrence"),
        ("backbone.layers.0.mixer.dt_bias", (64, 64), "norm or bias"),
        ("backbone.layers.0.mixer.conv1d.weight", (1024, 1, 4), "kernels of a convolution"),
        ("model.layers.0.linear_attn.conv1d.weight", (1024, 1, 4), "kernels of a convolution"),
        # RWKV, RecurrentGemma
        ("rwkv.blocks.0.attention.time_decay", (64, 64), "is exponentiated"),
        ("rwkv.blocks.0.attention.time_maa_x", (1, 1, 2048), "the recurrence"),
        ("rwkv.blocks.0.attention.time_mix_key", (1, 1, 2048), "the recurrence"),
        ("model.layers.0.temporal_block.rg_lru.recurrent_param", (64, 64), "is exponentiated"),
        ("model.layers.0.temporal_block.rg_lru.input_gate_bias", (64, 64), "norm or bias"),
        # gpt-oss, ConvBERT
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (32, 96), "norm or bias"),
        ("model.layers.0.mlp.experts.down_proj_bias", (32, 96), "norm or bias"),
        ("encoder.layer.0.attention.self.key_conv_attn_layer.bias", (1024, 1), "norm or bias"),
    ],
)
def test_what_is_no_matrix_of_a_product_is_kept_with_the_reason(
    name: str, shape: tuple[int, ...], why: str
) -> None:
    scheme, reason = planned(tensor(name, *shape))
    assert scheme is None
    assert why in reason


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 96, 64)),
        ("model.layers.0.self_attn.D_proj.weight", (64, 64)),
        ("features.0.weight", (64, 64, 3, 3)),
        ("patch_embed.proj.weight", (64, 3, 14, 14)),
        ("first.weight", (64, 1, 64)),
        ("relative_attention_bias.weight", (64, 64)),
    ],
)
def test_matrices_with_such_names_or_shapes_are_quantized(
    name: str, shape: tuple[int, ...]
) -> None:
    assert planned(tensor(name, *shape))[0] is not None
    assert planned(tensor(name, 4096))[0] is None


def test_tensors_of_one_dimension_or_none_are_kept() -> None:
    for shape in ((), (1,), (100_000,)):
        found = planned(tensor("w", *shape))
        assert found == (None, "fewer than two dimensions (norm, bias, scalar)")


def test_small_tensors_are_kept_below_the_limit_and_not_at_it() -> None:
    assert planned(tensor("w", 31, 33)) == (None, "fewer than 1,024 values")
    assert planned(tensor("w", 32, 32))[0] == "q4_block32"
    assert planned(tensor("w", 31, 33), min_values=1000)[0] == "q4_block32"
    assert planned(tensor("w", 32, 32), min_values=1025) == (None, "fewer than 1,025 values")


@pytest.mark.parametrize("dtype", [d.name for d in DTYPES.values() if not d.floating])
def test_tensors_that_are_not_floating_are_kept_even_when_asked_for(dtype: str) -> None:
    t = tensor("w", 64, 64, dtype=dtype)
    for asked in ((), (("w", "q4_block32"),)):
        found = planned(t, tensor_schemes=asked)
        assert found == (None, f"{dtype} is not a floating dtype")


@pytest.mark.parametrize("dtype", [d.name for d in DTYPES.values() if d.floating])
def test_every_floating_dtype_is_quantized(dtype: str) -> None:
    assert planned(tensor("w", 64, 256, dtype=dtype), "q4_block64")[0] == "q4_block64"


def test_empty_tensors_are_kept_even_when_asked_for() -> None:
    for shape in ((0, 64), (64, 0), (0,)):
        for asked in ((), (("w", "q4_block32"),)):
            assert planned(tensor("w", *shape), tensor_schemes=asked) == (None, "empty")


def test_a_tensor_that_would_not_become_smaller_is_kept() -> None:
    narrow = tensor("w", 2000, 1, dtype="F16")  # 2 bytes, against a padded block with its scale
    assert planned(narrow) == (None, "q4_block32 would not make it smaller")
    assert planned(narrow, tensor_schemes=(("w", "q4_block32"),))[0] is None
    f8 = tensor("w", 64, 64, dtype="F8_E4M3")
    assert planned(f8, "q8_block32") == (None, "q8_block32 would not make it smaller")
    assert planned(f8, "q8_tensor_sym") == (None, "q8_tensor_sym would not make it smaller")
    assert planned(f8, "q6_block32_sym")[0] == "q6_block32_sym"


# --- what the user says ---------------------------------------------------------------------------


def test_keep_wins_over_everything() -> None:
    found = planned(MATRIX, keep=("*up_proj*",), tensor_schemes=(("*", "q8_tensor"),))
    assert found == (None, "--keep '*up_proj*'")


def test_the_first_tensor_scheme_that_matches_wins() -> None:
    asked = (("*mlp*", "q8_channel"), ("*up_proj*", "q2_block16"))
    wanted = ("q8_channel", "--tensor-scheme '*mlp*=q8_channel'")
    assert planned(MATRIX, tensor_schemes=asked) == wanted
    assert planned(MATRIX, tensor_schemes=asked[::-1])[0] == "q2_block16"


@pytest.mark.parametrize(
    "t",
    [
        tensor("a.bias", 64, 64),
        tensor("norm.weight", 4096),
        tensor("w", 2, 64),
        tensor("lm_head.weight", 64, 64),
    ],
    ids=lambda t: t.name,
)
def test_a_tensor_scheme_overrides_the_rules_of_thumb(t: TensorInfo) -> None:
    wanted = ("q2_block32", "--tensor-scheme '*=q2_block32'")
    assert planned(t, "q8_block32", tensor_schemes=(("*", "q2_block32"),)) == wanted


def test_globs_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no tensor matches 'x\*'"):
        planned(MATRIX, keep=("x*",))
    with pytest.raises(UsageError, match="no tensor matches 'MODEL"):
        planned(MATRIX, tensor_schemes=(("MODEL*", "q4_block32"),))


def test_a_glob_that_an_earlier_one_shadows_still_counts_as_matching() -> None:
    assert planned(MATRIX, keep=("*", "*up_proj*"))[1] == "--keep '*'"


# --- token tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", TOKEN_TABLES)
def test_token_tables_take_at_least_four_bits(glob: str) -> None:
    t = tensor(glob.replace("*", "model."), 64, 256)
    for bits in (2, 3):
        for rest in ("block64", "channel_sym", "block32_asym"):
            name, reason = planned(t, f"q{bits}_{rest}")
            assert name == f"q4_{rest}"
            assert "at least 4 bits" in reason
    for bits in (4, 5, 6, 8):
        wanted = (f"q{bits}_block64", f"--scheme q{bits}_block64")
        assert planned(t, f"q{bits}_block64") == wanted


def test_other_matrices_take_two_bits() -> None:
    for name in ("lm_head.weight.scale", "model.output.weight", "up.weight"):
        assert planned(tensor(name, 64, 256), "q2_block64")[0] == "q2_block64"


# --- casts and ggml types -------------------------------------------------------------------------


def test_a_cast_takes_every_floating_tensor_of_another_dtype() -> None:
    for t in (MATRIX, tensor("a.bias", 7), tensor("s"), tensor("n.norm.weight", 8, dtype="BF16")):
        assert planned(t, "f16") == ("f16", "--scheme f16")
    assert planned(tensor("a.bias", 7, dtype="F16"), "f16") == (None, "is F16 already")
    assert planned(tensor("ids", 7, dtype="I64"), "f16")[0] is None
    assert planned(tensor("w", 64, 64, dtype="F16"), "f32")[0] == "f32", "a cast may be larger"


def test_ggml_types_need_rows_of_whole_blocks() -> None:
    assert planned(tensor("w", 64, 96), "q4_0", container="gguf")[0] == "q4_0"
    name, reason = planned(tensor("w", 64, 100), "q4_0", container="gguf")
    assert name is None
    assert reason == "rows of 100 values do not divide into blocks of 32"
    f8 = tensor("w", 64, 96, dtype="F8_E4M3")
    assert planned(f8, "q8_0", container="gguf")[1] == "q8_0 would not make it smaller"


@pytest.mark.parametrize(
    ("container", "scheme"), [("qblk", "q4_0"), ("gguf", "q4_block32"), ("gguf", "q8_tensor_sym")]
)
def test_schemes_go_into_their_own_container_only(container: str, scheme: str) -> None:
    with pytest.raises(UsageError, match=f"{scheme} does not go into a .{container} file"):
        planned(MATRIX, scheme, container=container)
    with pytest.raises(UsageError, match=f"{scheme} does not go into a .{container} file"):
        planned(MATRIX, "f16", tensor_schemes=(("*", scheme),), container=container)


def test_plans_keep_the_order_of_the_tensors() -> None:
    some = [tensor(f"t{i}", 64, 64) for i in (3, 1, 2)]
    plan = make_plan(some, CastScheme("f16", "F16"), PlanOptions())
    assert [p.tensor for p in plan] == some


def test_an_undecided_encoding_is_the_larger_one() -> None:
    for name, dtype in (("q4_block32", "BF16"), ("q4_channel", "F32"), ("q4_tensor", "F32")):
        scheme = parse_scheme(name)
        assert isinstance(scheme, AffineScheme)
        encoding = affine.planned(scheme, MATRIX)
        assert (encoding.symmetric, encoding.scale_dtype) == (False, dtype)
        assert affine.planned(scheme.resolved(True), MATRIX).symmetric


# --- mixes: the rules themselves are held to llama-quantize in test_mixes.py ----------------------


MODEL = [
    tensor("token_embd.weight", 64, 256, dtype="BF16"),
    tensor("output.weight", 64, 256, dtype="BF16"),
    tensor("blk.0.attn_norm.weight", 256, dtype="BF16"),
    tensor("blk.0.attn_q.weight", 256, 256, dtype="BF16"),
    tensor("blk.0.attn_k.weight", 256, 256, dtype="F16"),
    tensor("blk.0.ffn_down.weight", 256, 96, dtype="BF16"),
    TensorInfo("blk.0.ffn_up.weight", (256, 256), "Q4_K", 36_864),
]
FACTS = ModelFacts("llama", n_layer=1, n_head=4, n_head_kv=4)


def mixed(
    name: str,
    *,
    keep: tuple[str, ...] = (),
    tensor_schemes: tuple[tuple[str, str], ...] = (),
    **more: Any,
) -> tuple[dict[str, PlannedTensor], int]:
    asked = tuple((glob, TENSOR_SCHEMES[s]) for glob, s in tensor_schemes)
    options = PlanOptions(keep, asked)
    plan, fell_back = plan_mix(MODEL, options, MixOptions(parse_mix(name), **more), FACTS)
    assert [p.tensor for p in plan] == MODEL
    assert all(p.reason for p in plan)
    return {p.tensor.name: p for p in plan}, fell_back


def schemes(plan: dict[str, PlannedTensor]) -> list[str | None]:
    return [p.scheme and p.scheme.name for p in plan.values()]


def test_a_mix_gives_each_tensor_a_scheme_or_keeps_it() -> None:
    plan, fell_back = mixed("q4_k_m")
    assert schemes(plan) == ["q4_k", "q6_k", "f32", "q4_k", "q4_k", "q8_0", None]
    assert fell_back == 1
    assert plan["blk.0.ffn_up.weight"].reason == "is Q4_K already"
    assert "96" in plan["blk.0.ffn_down.weight"].reason


def test_a_cast_keeps_what_has_its_dtype_and_norms_in_f32() -> None:
    plan, _ = mixed("bf16")
    assert schemes(plan) == [None, None, "f32", None, "bf16", None, "bf16"]


def test_keep_goes_before_globs_and_these_before_expressions() -> None:
    plan, _ = mixed(
        "q4_k_m",
        keep=("*attn_q*",),
        tensor_schemes=(("*attn_[qk]*", "q8_0"), ("output.weight", "f16")),
        tensor_types=(parse_tensor_type("attn_k|token=q5_0"),),
        output_type="Q4_0",
    )
    assert schemes(plan) == ["q5_0", "f16", "f32", None, "q8_0", "q8_0", None]
    assert plan["blk.0.attn_q.weight"].reason == "--keep '*attn_q*'"
    assert plan["output.weight"].reason == "--tensor-scheme 'output.weight=f16'"


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"keep": ("nope*",)}, "nope"),
        ({"tensor_schemes": (("nope*", "q8_0"),)}, "nope"),
        ({"tensor_schemes": (("*attn_norm*", "q8_0"),)}, "attn_norm"),
        ({"tensor_schemes": (("*attn_q*", "q4_block32"),)}, "q4_block32"),
        ({"tensor_types": (parse_tensor_type("nope=q8_0"),)}, "nope"),
    ],
)
def test_what_decides_nothing_in_a_mix_is_refused(asked: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        mixed("q4_k_m", **asked)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((), 1),
        ((7,), 7),
        ((5, 3), 3),
        ((5, 4096), 4096),
        ((8, 64, 96), 96),  # experts
        ((8, 64, 32), 32),
        ((8, 64, 31), 64 * 31),
        ((16, 4, 3, 3), 36),  # convolution
        ((16, 4, 1, 1), 4),
        ((2, 3, 4, 64), 64),
        ((16, 8, 5), 40),
    ],
)
def test_rows_are_those_of_the_specification(shape: tuple[int, ...], wanted: int) -> None:
    assert row_length(shape) == wanted


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (1, 1),
        (5, 7),
        (1000, 1000),
        (3, TILE_VALUES),
        (3, TILE_VALUES - 1),
        (3, TILE_VALUES + 1),
        (2, 5 * TILE_VALUES // 2),
        (TILE_VALUES + 3, 1),
        (TILE_VALUES // 3 + 1, 3),
    ],
)
def test_tiles_cover_every_value_once_in_order_and_are_bounded(rows: int, columns: int) -> None:
    place = 0
    for t in tiles(rows, columns):
        assert t.start == place
        assert 0 < t.rows * t.columns <= TILE_VALUES
        assert t.stop == t.start + t.rows * t.columns
        if t.columns < columns:  # part of one row, from a multiple of every block
            assert t.rows == 1
            assert t.start % columns % 256 == 0
            assert t.start // columns == (t.stop - 1) // columns
        else:
            assert t.start % columns == 0
        assert t.last == (t.stop % columns == 0)
        place = t.stop
    assert place == rows * columns


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_has_no_tiles(rows: int, columns: int) -> None:
    assert list(tiles(rows, columns)) == []

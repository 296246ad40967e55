"""The types of every mix, held to what llama-quantize chose (tests/make_mixes.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from qconvert.errors import UnsupportedError, UsageError
from qconvert.mix_rules import Assigned, assign_types
from qconvert.mixes import (
    ALIASES,
    MIXES,
    MixOptions,
    ModelFacts,
    parse_ggml_type,
    parse_mix,
    parse_tensor_type,
)
from qconvert.model import DTYPES, TensorInfo

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("mixes.json").read_text())


def tensors_of(name: str) -> list[TensorInfo]:
    """The tensors of a recorded model, in the types that a converter leaves them in."""
    described = GOLDEN["models"][name]
    layers: list[int | None] = [None, *range(described["facts"]["n_layer"])]
    result = []
    for layer in layers:
        for pattern, (dtype, shape) in described["tensors"].items():
            if ("*" in pattern) == (layer is not None):
                result.append(info(pattern.replace("*", str(layer)), tuple(shape), dtype))
    return result


def info(name: str, shape: tuple[int, ...], dtype: str = "F16") -> TensorInfo:
    tensor = TensorInfo(name, shape, dtype, 0)
    return TensorInfo(name, shape, dtype, tensor.size * DTYPES[dtype].size)


def facts_of(name: str) -> ModelFacts:
    return ModelFacts(**GOLDEN["models"][name]["facts"])


def options(mix: str, arguments: list[str] | None = None) -> MixOptions:
    """`MixOptions` from llama-quantize's arguments."""
    rest = iter(arguments or [])
    fields: dict[str, Any] = {}
    rules = []
    for argument in rest:
        if argument == "--pure":
            fields["pure"] = True
        elif argument == "--imatrix":
            fields["has_imatrix"] = True
        elif argument == "--output-tensor-type":
            fields["output_type"] = parse_ggml_type(next(rest))
        elif argument == "--token-embedding-type":
            fields["token_embedding_type"] = parse_ggml_type(next(rest))
        else:
            assert argument == "--tensor-type"
            rules.append(parse_tensor_type(next(rest)))
    return MixOptions(parse_mix(mix), tensor_types=tuple(rules), **fields)


def by_name(tensors: list[TensorInfo], assigned: list[Assigned]) -> dict[str, Assigned]:
    return {t.name: a for t, a in zip(tensors, assigned, strict=True)}


def run_id(run: list[Any]) -> str:
    return " ".join([run[0], run[1], *run[2]])


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=run_id)
def test_types_are_those_of_llama_quantize(run: list[Any]) -> None:
    model, mix, arguments, letters = run
    tensors = tensors_of(model)
    expected = {t.name: GOLDEN["types"][x] for t, x in zip(tensors, letters, strict=True)}
    found = by_name(tensors, assign_types(tensors, facts_of(model), options(mix, arguments)))
    differing = {n: (found[n], t) for n, t in expected.items() if found[n].ggml_type != t}
    assert not differing


def assigned_to(
    tensor: TensorInfo, mix: str, *arguments: str, facts: ModelFacts | None = None
) -> Assigned:
    """What a tensor gets in an untied model of eight layers."""
    tensors = [tensor, info("output.weight", (8, 256))]
    return assign_types(tensors, facts or LLAMA, options(mix, list(arguments)))[0]


LLAMA = ModelFacts("llama", 8, 8, 2)
PLAIN = info("blk.0.ffn_up.weight", (4, 256))
NARROW = info("blk.0.ffn_up.weight", (4, 96))


def test_the_recorded_runs_cover_every_mix_and_both_endings() -> None:
    assert {run[1] for run in GOLDEN["runs"]} == MIXES.keys() - {"mxfp4", "nvfp4"}
    endings = {"output.weight" in m["tensors"] for m in GOLDEN["models"].values()}
    assert endings == {True, False}


def test_uniform_mxfp4_is_the_pure_mix_of_llama_quantize() -> None:
    (run,) = [r for r in GOLDEN["runs"] if r[:3] == ["llama, 8 layers", "mxfp4_moe", ["--pure"]]]
    found = assign_types(tensors_of(run[0]), facts_of(run[0]), options("mxfp4"))
    assert [a.ggml_type for a in found] == [GOLDEN["types"][letter] for letter in run[3]]


def test_the_order_of_tensors_does_not_matter() -> None:
    tensors, facts = tensors_of("llama, 8 layers"), facts_of("llama, 8 layers")
    expected = by_name(tensors, assign_types(tensors, facts, options("q4_k_s")))
    tensors.sort(key=lambda t: t.name[::-1])
    assert by_name(tensors, assign_types(tensors, facts, options("q4_k_s"))) == expected


def test_numbers_are_those_of_the_gguf_package() -> None:
    """And those that it may not have yet those of llama.h at 0c1e57098."""
    kinds = {kind.name: kind.value for kind in gguf.LlamaFileType}
    kinds |= {"MOSTLY_Q1_0": 40, "MOSTLY_Q2_0": 41}
    for mix in MIXES.values():
        name = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}.get(mix.name)
        assert mix.file_type == kinds[name or f"MOSTLY_{mix.name.upper()}"]


def test_rows_that_q1_0_does_not_divide_fall_back_where_llama_quantize_stops() -> None:
    assert assigned_to(NARROW, "q1_0").ggml_type == "Q4_0"


def test_names_ignore_case_and_have_the_aliases_of_llama_quantize() -> None:
    assert parse_mix("Q4_K_M") is MIXES["q4_k_m"]
    assert parse_mix("Q4_K") is MIXES["q4_k_m"]
    assert ALIASES == {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
    assert parse_ggml_type("iq4_NL") == "IQ4_NL"


@pytest.mark.parametrize(
    ("parse", "text", "near"),
    [
        (parse_mix, "q4_k_n", "q4_k_m"),
        (parse_mix, "mxfp4-moe", "mxfp4_moe"),
        (parse_ggml_type, "q6k", "q6_k"),
        (parse_tensor_type, "ffn=q6k", "q6_k"),
        (parse_tensor_type, "ffn=q4_k_m", "q4_k"),  # a mix is no tensor type
    ],
)
def test_unknown_names_get_the_nearest(parse: Any, text: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert near in str(caught.value.hint)


@pytest.mark.parametrize("text", ["ffn", "=q8_0", "ffn(=q8_0", "*=q8_0", "a{9999999999}=q8_0"])
def test_a_bad_tensor_type_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--tensor-type"):
        parse_tensor_type(text)


def test_the_last_equals_sign_ends_the_expression() -> None:
    rule = parse_tensor_type(r"attn_(?=[kv])=q8_0")
    assert rule.pattern.pattern == r"attn_(?=[kv])"
    assert str(rule) == "--tensor-type 'attn_(?=[kv])=q8_0'"


@pytest.mark.parametrize(
    "expression",
    [
        "nonesuch",
        "ffn_up",  # an earlier one takes them all
        "attn_norm",  # never quantized
    ],
)
def test_a_tensor_type_that_decides_nothing_is_refused(expression: str) -> None:
    tensors = [PLAIN, info("blk.0.attn_norm.weight", (256,), "F32")]
    arguments = ["--tensor-type", "ffn=q8_0", "--tensor-type", f"{expression}=q6_k"]
    with pytest.raises(UsageError, match=f"{expression}=q6_k' applies to no tensor"):
        assign_types(tensors, LLAMA, options("q4_k_m", arguments))


def test_tensor_type_wins_over_everything() -> None:
    tensors = [info("output.weight", (8, 256)), info("token_embd.weight", (8, 256)), PLAIN]
    arguments = ["--pure", "--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
    for mix in ("q4_0", "f16"):
        rules = ["--tensor-type", "output|embd|ffn=q5_1"]
        found = assign_types(tensors, LLAMA, options(mix, arguments + rules))
        assert [a.ggml_type for a in found] == ["Q5_1"] * 3
        assert {a.reason for a in found} == {"--tensor-type 'output|embd|ffn=q5_1'"}


def test_output_type_reaches_a_tied_embedding_when_pure() -> None:
    tensors = [info("token_embd.weight", (8, 256)), PLAIN]
    arguments = ["--pure", "--output-tensor-type", "q8_0"]
    found = assign_types(tensors, LLAMA, options("q4_k_m", arguments))
    assert [a.ggml_type for a in found] == ["Q8_0", "Q4_K"]


@pytest.mark.parametrize("arguments", [(), ("--tensor-type", "ffn=q4_k")])
def test_rows_that_do_not_divide_fall_back_and_say_so(arguments: tuple[str, ...]) -> None:
    found = assigned_to(NARROW, "q4_k_m", *arguments)
    assert (found.ggml_type, found.fell_back) == ("Q5_0", True)
    why = arguments[1].join(("--tensor-type '", "'")) if arguments else "base type of q4_k_m"
    assert found.reason == (f"rows of 96 values do not divide by 256: Q4_K becomes Q5_0 ({why})")


@pytest.mark.parametrize("option", ["--output-tensor-type", "--token-embedding-type"])
def test_explicit_types_fall_back_too(option: str) -> None:
    # llama-quantize takes these unchecked and then cannot write the rows.
    tensors = [info("output.weight", (8, 96)), info("token_embd.weight", (8, 96))]
    found = assign_types(tensors, LLAMA, options("q8_0", [option, "q6_k"]))
    assert [a.ggml_type for a in found] == ["Q8_0", "Q8_0"]
    assert [a.fell_back for a in found].count(True) == 1


def test_pure_refuses_rows_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedError) as caught:
        assigned_to(NARROW, "q4_k_m", "--pure")
    assert str(caught.value) == (
        "tensor 'blk.0.ffn_up.weight': rows do not divide into blocks of Q4_K, "
        "found 96 values, wanted a multiple of 256"
    )
    assert "--tensor-type 'blk\\.0\\.ffn_up\\.weight=f16'" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output.weight"])
def test_fallback_types_can_be_forbidden(name: str) -> None:
    tensors = [info(name, (4, 96))]
    with pytest.raises(UnsupportedError, match=f"'{name}': rows do not divide"):
        assign_types(tensors, LLAMA, MixOptions(MIXES["q4_k_m"], fallback=False))


def test_reasons_tell_people_which_rule_it_was() -> None:
    assert assigned_to(PLAIN, "q4_k_m").reason == "base type of q4_k_m"
    tensors = tensors_of("llama, 8 layers")
    found = by_name(tensors, assign_types(tensors, facts_of("llama, 8 layers"), options("q4_k_m")))
    assert {
        "output.weight": "q4_k_m gives more bits to the output",
        "blk.3.attn_v.weight": "q4_k_m gives more bits to attention values (4 of 8)",
        "blk.7.ffn_down.weight": "q4_k_m gives more bits to down projections (8 of 8)",
        "blk.1.ffn_down.weight": "base type of q4_k_m",
        "blk.0.attn_norm.weight": "one-dimensional tensors are kept",
    }.items() <= {name: a.reason for name, a in found.items()}.items()
    assert not found["blk.0.attn_norm.weight"].quantizable
    assert found["output.weight"].quantizable


@pytest.mark.parametrize(
    ("tensor", "mix", "expected"),
    [
        (info("blk.0.attn_norm.weight", (256,), "BF16"), "q4_0", "F32"),
        (info("blk.0.attn_norm.weight", (256,), "BF16"), "bf16", "F32"),
        (info("blk.0.attn_q.bias", (256,), "F16"), "f16", "F32"),
        (info("blk.0.ffn_gate_inp.weight", (8, 256), "F16"), "f16", "F32"),
        (info("scale", (), "F16"), "q4_0", "F32"),
        (info("per_layer_model_proj.weight", (8, 256), "BF16"), "q4_0", "BF16"),
        (info("per_layer_model_proj.weight", (8, 256), "F64"), "q4_0", "F32"),
        (info("per_layer_model_proj.weight", (8, 256), "BF16"), "f16", "F16"),
        (info("blk.0.ffn_gate_tid2eid.weight", (8, 256), "I32"), "q4_0", "I32"),
    ],
)
def test_what_is_kept_is_stored_as_converters_store_it(
    tensor: TensorInfo, mix: str, expected: str
) -> None:
    found = assigned_to(tensor, mix)
    assert (found.ggml_type, found.quantizable) == (expected, False)


def test_a_layer_beyond_the_model_is_refused_where_rules_need_it() -> None:
    mixtral = ModelFacts("llama", 2, 8, 2, n_expert=8)
    tensor = info("blk.2.ffn_down_exps.weight", (8, 4, 256))
    with pytest.raises(
        UnsupportedError, match=r"layer is not in the model, wanted blk\.0 to blk\.1"
    ):
        assigned_to(tensor, "q4_k_m", facts=mixtral)

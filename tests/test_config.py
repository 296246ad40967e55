"""What a configuration means: null, absent and default; names beside each other; what is refused.

Wanted values are worked out here or follow from transformers' documentation; that whole models
compute the same is config_table.json's.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CONFIGS, Tensors, weights, write_directory

from qconvert.architectures import GgufSource, open_gguf_source
from qconvert.architectures.config import Config
from qconvert.architectures.config_warnings import config_warnings
from qconvert.architectures.families import CONFIG_CLASSES, hyper_parameters, known_class
from qconvert.architectures.rope import yarn_shares
from qconvert.architectures.source import read_config
from qconvert.errors import FormatError, InputError, QconvertError, UnsupportedError
from qconvert.files import open_model
from qconvert.files.gguf_writer import GgufValue

Fields = dict[str, Any]
CLASSES = {c.name: c for c in CONFIG_CLASSES}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def opened(directory: Path) -> GgufSource:
    return open_gguf_source(open_model(directory))


def read(name: str, **changes: Any) -> tuple[Fields, tuple[str, ...], dict[str, Any]]:
    """Keys, warnings and factors of rotary positions that a tiny configuration gives."""
    fields = {n: v for n, v in CONFIGS[name].items() if n != "qconvert_tokenizer"} | changes
    fields = {n: v for n, v in fields.items() if v != "absent"}
    family, config = read_config(fields, Path("config.json"))
    sizes = family.sizes(config)
    keys, rope = hyper_parameters(family, config, sizes)
    plain = {k: v.value if isinstance(v, GgufValue) else v for k, v in keys.items()}
    return plain, config_warnings(fields, family, config, sizes, rope), rope.tensors


def refused(name: str, **changes: Any) -> QconvertError:
    with pytest.raises(InputError) as refusal:
        read(name, **changes)
    return refusal.value


# --- null, absent, default ------------------------------------------------------------------------


def test_null_absent_and_default_are_three_things() -> None:
    path = Path("config.json")
    absent = Config({}, path, CLASSES["MistralConfig"])
    null = Config({"sliding_window": None}, path, CLASSES["MistralConfig"])
    stated = Config({"sliding_window": 8}, path, CLASSES["MistralConfig"])
    found = [c.optional_count("sliding_window") for c in (absent, null, stated)]
    assert found == [4096, None, 8]
    assert [c.given("sliding_window") for c in (absent, null, stated)] == [False, True, True]
    with pytest.raises(FormatError, match="'hidden_size' is not usable, found null"):
        Config({"hidden_size": None}, path, CLASSES["MistralConfig"])


def test_a_missing_field_has_the_default_of_its_class() -> None:
    keys, _, _ = read("mixtral", rope_theta="absent", rms_norm_eps="absent")
    assert keys["llama.rope.freq_base"] == 1e6
    assert keys["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    keys, _, _ = read("llama", rope_theta="absent", rms_norm_eps="absent")
    assert keys["llama.rope.freq_base"] == 1e4
    assert keys["llama.attention.layer_norm_rms_epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama", "rms_norm_eps", 1),
        ("gemma2", "final_logit_softcapping", 30),
        ("gemma2", "query_pre_attn_scalar", 32.0),
        ("llama", "num_hidden_layers", 2.0),
        ("llama", "num_hidden_layers", True),
        ("llama", "attention_bias", "true"),
        ("qwen2", "layer_types", ["full_attention", 1]),
        ("mistral", "num_key_value_heads", None),
        ("llama", "rope_parameters", []),
        ("qwen3", "use_sliding_window", None),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(name: str, field: str, value: Any) -> None:
    error = refused(name, **{field: value})
    assert error.code == "ARCH-CONFIG"
    assert f"'{field}'" in str(error)


def test_a_soft_cap_of_null_is_none_where_llama_cpp_can_do_without() -> None:
    keys, _, _ = read("gemma2", final_logit_softcapping=None)
    cap = keys["gemma2.final_logit_softcapping"]
    logits = np.array([0.0, 1e-3, -7.25, 30.5, 1e4], np.float32)
    scaled = logits * np.float32(1 / cap)  # in binary32, as ggml does
    np.testing.assert_array_equal(np.tanh(scaled) * np.float32(cap), logits)
    error = refused("gemma2", attn_logit_softcapping=None)
    assert error.code == "ARCH-CONFIG-VALUE"
    assert "attn_logit_softcapping" in str(error)
    keys, _, _ = read("gemma3", final_logit_softcapping=None)
    assert "gemma3.final_logit_softcapping" not in keys


# --- names beside each other ----------------------------------------------------------------------


def test_a_second_name_counts_before_the_field() -> None:
    path = Path("config.json")
    both = {"num_experts": 4, "num_local_experts": 8}
    assert Config(both, path, CLASSES["MixtralConfig"]).count("num_local_experts") == 4
    assert Config(both, path, CLASSES["Qwen3MoeConfig"]).count("num_experts") == 8
    assert "num_local_experts" in str(refused("qwen3-moe", num_local_experts="8"))


def test_the_older_object_replaces_the_newer_one_whole() -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    new = {"rope_type": "default", "rope_theta": 7.0}
    keys, _, _ = read("llama", rope_scaling=linear, rope_parameters=new, rope_theta=500.0)
    assert keys["llama.rope.freq_base"] == 500.0
    assert keys["llama.rope.scaling.factor"] == 4.0
    keys, _, _ = read("llama", rope_scaling={}, rope_parameters=new, rope_theta=500.0)
    assert keys["llama.rope.freq_base"] == 7.0
    keys, _, _ = read("llama", rope_parameters={"rope_type": "default"}, rope_theta=500.0)
    assert keys["llama.rope.freq_base"] == 500.0
    error = refused("llama", rope_parameters={"rope_theta": None}, rope_theta=500.0)
    assert "rope_parameters.rope_theta" in str(error)
    assert "'rope_theta'" in str(refused("llama", rope_theta=None))


def test_the_newer_word_for_the_kind_counts_before_the_older() -> None:
    keys, _, _ = read("llama", rope_scaling={"rope_type": "linear", "type": "dynamic", "factor": 2})
    assert keys["llama.rope.scaling.type"] == "linear"
    error = refused("llama", rope_scaling={"rope_type": None, "type": "linear", "factor": 2})
    assert error.code == "ARCH-ROPE"
    assert "rope_scaling.rope_type" in str(error)


def test_gemma_3_scales_full_layers_only_and_by_the_newer_word_only() -> None:
    keys, found, _ = read("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert keys["gemma3.rope.scaling.factor"] == 8.0
    assert not found
    # what transformers starts from says "default", which the older word does not replace
    keys, found, _ = read("gemma3", rope_scaling={"type": "linear", "factor": 8.0})
    assert "gemma3.rope.scaling.factor" not in keys
    assert "rope_scaling.factor" in found[0]
    sliding = {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}
    assert refused("gemma3", rope_parameters=sliding).code == "ARCH-ROPE"


# --- rotary positions -----------------------------------------------------------------------------


def test_shares_of_yarn_by_hand() -> None:
    # 16 dimensions, 64 tokens: a pair i turns 64 / (2 pi 10000^(i/8)) times. It is 32 times before
    # the first, and once at 8 ln(64 / 2 pi) / ln 10000 = 2.016, which is rounded up to 3.
    found = yarn_shares(10000.0, 8, 64, (32.0, 1.0), truncate=True)
    np.testing.assert_allclose(found, [0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1], rtol=1e-12)
    found = yarn_shares(10000.0, 8, 64, (32.0, 1.0), truncate=False)
    bound = 8 * math.log(64 / (2 * math.pi)) / math.log(10000)
    np.testing.assert_allclose(found, np.clip(np.arange(8) / bound, 0, 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("more", "attention"),
    [
        ({"attention_factor": 1.0}, 1.0),
        ({"attention_factor": None}, 1 + 0.1 * math.log(4)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 2.0},
         (1 + 0.05 * math.log(4)) / (1 + 0.2 * math.log(4))),
        ({"mscale": 0.5}, 1 + 0.1 * math.log(4)),
        ({"mscale": 0, "mscale_all_dim": 2.0}, 1 + 0.1 * math.log(4)),
        ({"factor": 1.0, "attention_factor": 0.5}, 0.5),
    ],
)  # fmt: skip
def test_what_yarn_multiplies_by_reaches_the_key_that_llama_cpp_reads(
    more: Fields, attention: float
) -> None:
    for name in ("llama", "qwen2", "qwen3", "gemma2"):
        keys, _, tensors = read(name, rope_scaling=YARN | more)
        arch = name
        factor = keys[f"{arch}.rope.scaling.factor"]
        own = 1 + 0.1 * math.log(factor)  # llama.cpp's, by which the key is multiplied
        found = keys.get(f"{arch}.rope.scaling.attn_factor", 1.0) * own
        assert found == pytest.approx(attention)
        assert not tensors
        assert not [k for k in keys if "yarn" in k], "keys that its loader does not read"


def test_bounds_of_yarn_are_factors_where_llama_cpp_takes_them_and_refused_elsewhere() -> None:
    bounds = {"beta_fast": 4.0, "beta_slow": 2.0, "truncate": False}
    keys, _, tensors = read("llama", rope_scaling=YARN | bounds, rope_theta=10000.0)
    low, high = (8 * math.log(64 / (b * 2 * math.pi)) / math.log(10000) for b in (4.0, 2.0))
    share = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(tensors["rope_freqs.weight"], 1 / (share / 4 + 1 - share), rtol=1e-6)
    assert keys["llama.rope.scaling.attn_factor"] == pytest.approx(1 + 0.1 * math.log(4))
    assert "llama.rope.scaling.type" not in keys
    for name in ("qwen2", "qwen3", "qwen3-moe", "gemma2"):
        error = refused(name, rope_scaling=YARN | bounds)
        assert error.code == "ARCH-ROPE"
        assert all(f"rope_scaling.{n}" in str(error) for n in bounds)
    # the same as llama.cpp's own, in other words
    for same in ({"beta_fast": 32, "beta_slow": 1.0, "truncate": True}, {"beta_fast": 0}):
        assert "qwen2.rope.scaling.factor" in read("qwen2", rope_scaling=YARN | same)[0]
    assert refused("qwen2", rope_scaling=YARN | {"truncate": None}).code == "ARCH-ROPE"


def test_a_tensor_of_factors_is_made_for_loaders_that_ask_for_one_only() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read("llama", rope_scaling=llama3)[2]
    for name in ("qwen2", "qwen3", "gemma2"):
        assert refused(name, rope_scaling=llama3).code == "ARCH-ROPE"


def test_the_factor_of_longrope_counts_before_the_contexts() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    keys, found, _ = read(
        "phi3", rope_scaling=long | {"factor": 4.0}, original_max_position_embeddings=128
    )
    wanted = math.sqrt(1 + math.log(4) / math.log(128))
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx(wanted)
    assert "128 tokens" in found[0]
    inside = long | {"original_max_position_embeddings": 16}
    keys, _, _ = read("phi3", rope_scaling=inside, original_max_position_embeddings=128)
    assert keys["phi3.rope.scaling.original_context_length"] == 128
    error = refused("phi3", rope_scaling=long, original_max_position_embeddings=1)
    assert "'original_max_position_embeddings' is not usable, found 1" in str(error)


# --- layers and windows ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": 256}, None),  # the context
        ("mistral", {"sliding_window": "absent", "max_position_embeddings": 8192}, 4096),
        ("qwen2", {"sliding_window": 16}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, None),  # from layer 28 on
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
            16,
        ),
        (
            "qwen3",
            {
                "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0,
                "layer_types": ["full_attention"] * 2,
            },
            None,
        ),
        ("qwen3-moe", {"sliding_window": 16, "use_sliding_window": True}, 16),
        ("phi3", {"sliding_window": 16}, 16),
        ("gemma2", {"sliding_window": 16}, None),  # llama.cpp applies it
    ],
)  # fmt: skip
def test_a_window_that_llama_cpp_does_not_apply_is_said(
    name: str, changes: Fields, window: int | None
) -> None:
    found = read(name, **changes)[1]
    assert [f"window of {window}" in w for w in found] == ([True] if window else [])


def test_which_layers_of_gemma_have_a_window_is_a_key() -> None:
    keys, _, _ = read("gemma2", layer_types=["full_attention", "sliding_attention"])
    assert keys["gemma2.attention.sliding_window_pattern"] == [False, True]
    keys, _, _ = read("gemma2", layer_types=["sliding_attention", "full_attention"])
    assert "gemma2.attention.sliding_window_pattern" not in keys
    keys, _, _ = read("gemma3", sliding_window_pattern=2)
    pattern = keys["gemma3.attention.sliding_window_pattern"]
    assert pattern == [True, False, True, False, True, False, True]
    # llama.cpp wants a window for a layer at least, or takes none
    keys, _, _ = read("gemma3", sliding_window_pattern=1)
    assert "gemma3.attention.sliding_window" not in keys
    assert refused("gemma2", layer_types=["full_attention"] * 2).code == "ARCH-CONFIG-VALUE"


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_biases_are_there_when_the_configuration_says_so(flag: str, tmp_path: Path) -> None:
    tensors: Tensors = weights(CONFIGS["llama"])
    biases: Tensors = {}
    part = {"attention_bias": "self_attn", "mlp_bias": "mlp"}[flag]
    for name, values in tensors.items():
        if f".{part}." in name:
            biases[name.replace("weight", "bias")] = np.ones(values.shape[0], np.float32)
    with_biases = tensors | biases
    directory = write_directory(tmp_path / "a", "llama", config={flag: True}, tensors=with_biases)
    assert len(opened(directory).model.tensors) == len(with_biases)
    # transformers would leave them out, and give others to a model that lacks them
    directory = write_directory(tmp_path / "b", "llama", tensors=with_biases)
    with pytest.raises(UnsupportedError) as refusal:
        opened(directory)
    assert refusal.value.code == "ARCH-TENSOR-LEFT"
    assert flag in str(refusal.value)
    directory = write_directory(tmp_path / "c", "llama", config={flag: True})
    with pytest.raises(InputError) as missing:
        opened(directory)
    assert missing.value.code == "ARCH-TENSOR-MISSING"


# --- which class ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model_type": "llama"}, "LlamaConfig"),
        ({"model_type": "llama", "architectures": None}, "LlamaConfig"),
        ({"model_type": "gemma3"}, "Gemma3Config"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaConfig"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "MistralConfig"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertConfig"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "my_llama"}, None),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, None),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "layer_types": []},
         None),
        ({"architectures": [7], "model_type": "llama"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_class_is_that_of_model_type(fields: Fields, name: str | None) -> None:
    known = known_class(fields)
    assert (known.name if known else None) == name


def test_two_words_for_the_class_are_settled_and_said() -> None:
    # a window of 4096 is the default of the class that counts
    _, found, _ = read("llama", model_type="mistral", max_position_embeddings=8192)
    assert "'mistral'" in found[0]
    assert "LlamaForCausalLM" in found[0]
    assert "window of 4096" in found[1]
    error = refused("llama", model_type="my_llama")
    assert "my_llama" in str(error)
    assert "LlamaForCausalLM" in str(error)


def test_a_text_model_inside_another_has_its_own_fields_only() -> None:
    text = {n: v for n, v in CONFIGS["gemma3"].items() if n != "architectures"}
    outside = {"sliding_window": 4, "rope_theta": 7.0, "final_logit_softcapping": 2.0}
    inside = text | {"final_logit_softcapping": 3.0}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    fields = whole | {"text_config": inside} | outside
    family, config = read_config(fields, Path("config.json"))
    sizes = family.sizes(config)
    keys, rope = hyper_parameters(family, config, sizes)
    assert keys["gemma3.attention.sliding_window"] == GgufValue("UINT32", 16)
    assert keys["gemma3.rope.freq_base"] == 1e6
    # transformers does not cap the logits of this class
    assert "gemma3.final_logit_softcapping" not in keys
    found = config_warnings(fields, family, config, sizes, rope)
    assert all(f"'{name}'" in found[0] for name in outside)
    with pytest.raises(FormatError, match="text_config"):
        read_config(whole | {"text_config": []}, Path("config.json"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("configuration_files", ["config.4.0.0.json"]),
        ("per_layer_config", {"0": {"intermediate_size": 32}}),
        ("is_causal", False),
        ("is_causal", None),
    ],
)
def test_fields_of_every_class_that_change_the_model_are_refused(field: str, value: Any) -> None:
    error = refused("llama", **{field: value})
    assert error.code == "ARCH-CONFIG-VALUE"
    assert f"'{field}'" in str(error)


# --- what nobody reads ----------------------------------------------------------------------------


def test_fields_that_nobody_reads_are_named_in_one_warning() -> None:
    _, found, _ = read("llama", rope_thetta=5.0, mlp_biases=True, neftune_noise_alpha=5)
    assert len(found) == 1
    assert "'rope_thetta' (for 'rope_theta'?)" in found[0]
    assert "'mlp_biases' (for 'mlp_bias'?)" in found[0]
    assert "neftune" not in found[0]
    linear = {"rope_type": "linear", "factor": 2.0, "beta_fast": 4.0, "finetuned": True}
    _, found, _ = read("llama", rope_scaling=linear)
    assert "rope_scaling.beta_fast" in found[0]
    assert "finetuned" not in found[0]
    assert not read("llama", my_field=None)[1], "null asks for nothing"
    assert not read("phi3", lm_head_bias=False)[1]
    assert "lm_head_bias" in read("phi3", lm_head_bias=True)[1][0]


def test_a_warning_stays_short() -> None:
    _, found, _ = read("llama", **{f"{i}" + "x" * 10_000: i for i in range(500)})
    assert len(found) == 1
    assert "'0xxx" in found[0]
    assert re.search(r" and 49\d more$", found[0])
    assert len(found[0]) < 450


# --- numbers --------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    *(10**400, -(10**400), 5e-324, 1e308, -1e308, 0, -1, 2**63, 2**31, 1e-31, 1e31, 0.0, -0.0),
    *("x" * 1_000_000, [], [[]], {}, {"__float__": "Infinity"}, True, None, [10**400], 1.5),
]
ROTARY = {
    "llama": [
        YARN,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 32},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8,
         "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
    ],
    "qwen2": [YARN | {"beta_fast": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}],
    "gemma3": [{"rope_type": "linear", "factor": 2.0}],
}  # fmt: skip


def tried(name: str, **changes: Any) -> None:
    """Taken or refused, in few words and without a warning of Python or NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            _, found, tensors = read(name, **changes)
        except InputError as error:
            length = len(error.message + str(error.found) + str(error.wanted))
            found, tensors = ("x" * length,), {}
    assert all(len(text) < 2000 for text in found)
    assert all(np.isfinite(t).all() and (t > 0).all() for t in tensors.values())


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("llama-biases", "smollm")])
def test_no_value_of_any_field_is_a_bug(name: str) -> None:
    known = known_class(CONFIGS[name])
    assert known
    for field in (*known.fields, *known.beside, *known.aliases, "architectures", "model_type"):
        for value in HOSTILE:
            tried(name, **{field: value})


@pytest.mark.parametrize("name", ROTARY)
def test_no_value_of_any_rotary_field_is_a_bug(name: str) -> None:
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                "truncate", "rope_theta", "type", "partial_rotary_factor")  # fmt: skip
    for scaling in ROTARY[name]:
        for field in (*scaling, *optional):
            for value in HOSTILE:
                tried(name, rope_scaling=scaling | {field: value})
                tried(name, rope_parameters=scaling | {field: value})
    tried(name, rope_scaling=YARN | {"rope_theta": 1.0})
    tried(name, rope_scaling=YARN | {"rope_theta": 1.00000001})
    tried(name, rope_scaling=YARN | {"factor": math.exp(-10)})
    tried(name, rope_scaling=YARN | {"mscale": 1e30, "mscale_all_dim": 1e-30})


def test_more_layers_or_experts_than_llama_cpp_holds_are_refused_at_once() -> None:
    assert read("llama", num_hidden_layers=512)
    assert "512" in str(refused("llama", num_hidden_layers=513))
    assert "1024" in str(refused("mixtral", num_local_experts=1025))

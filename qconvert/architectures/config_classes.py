"""What transformers' configuration classes know: names, types and defaults of fields, as data.

Facts are those of transformers 5.24, ``models/*/configuration_*.py``; where transformers is
installed, tests/test_config_classes.py compares every class with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Types, for people. A number with a point is no integer: transformers refuses 1 where it wants 1.0.
INT, FLOAT, BOOL, TEXT = (
    "an integer",
    "a number with a point (30.0, not 30)",
    "true or false",
    "text",
)
INT_OR_NULL, FLOAT_OR_NULL, BOOL_OR_NULL = (
    f"{INT}, or null",
    f"{FLOAT}, or null",
    f"{BOOL}, or null",
)
INTS_OR_NULL, TEXTS_OR_NULL = "a list of integers, or null", "a list of texts, or null"
NUMBER = "a number"
NUMBER_OR_NULL, TEXT_OR_NULL = "a number, or null", f"{TEXT}, or null"
FLOATS = f"a list of {FLOAT.replace('a number', 'numbers')}"
FLOATS_OR_NULL = f"{FLOATS}, or null"
FLOAT_OR_FLOATS_OR_NULL = f"{FLOAT} or {FLOATS}, or null"
INT_OR_TEXT = "an integer or text"
INT_OR_TEXT_OR_NULL = f"{INT_OR_TEXT}, or null"
INT_OR_INTS = "an integer or a list of integers"
INT_OR_INTS_OR_NULL, INTS = f"{INT_OR_INTS}, or null", "a list of integers"
OBJECT_OR_NULL = "an object, or null"
LAYER_OBJECTS_OR_NULL = "an object with objects for full_attention and sliding_attention, or null"

Fields = Mapping[str, tuple[str, object]]
ANY = None  # in `ConfigClass.harmless`: whatever the value


@dataclass(frozen=True, slots=True)
class ConfigClass:
    """A configuration class of transformers.

    Attributes:
        name: the class.
        model_type: what config.json calls it.
        architectures: classes of models with it that we take. The first is what transformers
            makes of a ``model_type`` alone.
        fields: those that what the model computes depends on, with type and default.
        unused: those that it does not depend on: training, generation, ids of tokens.
        beside: names that are read where a file has them, though the class has no such field.
        aliases: second names, and the fields that they stand for.
        harmless: names in published files that the class does not know, and the values that ask
            for nothing (`ANY`: none does).
        theta: base of rotary positions when the file states none.
        divides: whether ``hidden_size`` has to be a multiple of the number of heads, whatever their
            width.
        inner: the object inside that holds the language model's fields, and its class.
        flat: whether these stand at the top where there is no such object.
        outside: objects beside that of the language model which it depends on.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    fields: Fields
    unused: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    harmless: Mapping[str, tuple[object, ...] | None] = field(
        default_factory=lambda: MappingProxyType({})
    )
    theta: float = 10_000.0
    divides: bool = False
    inner: tuple[str, ConfigClass] | None = None
    flat: bool = False
    outside: tuple[str, ...] = ()

    def default(self, name: str) -> object:
        """What the class has for a field that the file does not state; None for no field.

        None for ``tie_word_embeddings`` too: whether two matrices are one is found by comparing
        them, and the flag counts where it is stated.
        """
        known = name in self.fields and name != "tie_word_embeddings"
        return self.fields[name][1] if known else None

    def takes(self, name: str, value: object) -> bool:
        """Whether a value is of the type of the field; a name without one takes any."""
        kind = self.fields[name][0] if name in self.fields else None
        if kind is None or (value is None and kind.endswith("null")):
            return True
        if kind.startswith("'"):
            return value in [option.strip(" '") for option in kind.split(",")]
        if kind == LAYER_OBJECTS_OR_NULL:
            layers = ("full_attention", "sliding_attention")
            return isinstance(value, dict) and all(
                n in layers and isinstance(v, dict) for n, v in value.items()
            )
        if kind in (INT_OR_INTS, INT_OR_INTS_OR_NULL) and type(value) is int:
            return True
        if kind == FLOAT_OR_FLOATS_OR_NULL and type(value) is float:
            return True
        of_list = {
            INT_OR_INTS: int, INT_OR_INTS_OR_NULL: int, INTS: int,
            INTS_OR_NULL: int, TEXTS_OR_NULL: str, FLOATS: float, FLOATS_OR_NULL: float,
            FLOAT_OR_FLOATS_OR_NULL: float,
        }.get(kind)  # fmt: skip
        if of_list:
            return isinstance(value, list) and all(type(v) is of_list for v in value)
        plain = {
            INT: (int,),
            FLOAT: (float,),
            NUMBER: (int, float),
            BOOL: (bool,),
            TEXT: (str,),
            INT_OR_TEXT: (int, str),
            "an object": (dict,),
        }
        return type(value) in plain[kind.removesuffix(", or null")]

    def reads(self, name: str) -> bool:
        """Whether a conversion has use for a field of this name: ids of tokens are among them."""
        return (
            name in self.fields
            or name in self.beside
            or name in self.outside
            or name in self.aliases
            or name.endswith("_token_id")
            or (self.inner is not None and name == self.inner[0])
        )

    def stands_outside(self, name: str) -> bool:
        """Whether a field is the language model's where it has no object of its own."""
        own = name in self.fields or name in self.unused
        return own or name in ("rope_scaling", "rope_theta") or name.endswith("_token_id")

    def knows(self, name: str) -> bool:
        """Whether the class, or its base, does something with a field of this name, or nothing."""
        return self.reads(name) or name in self.unused or name in BASE or name in BOOKKEEPING


# Fields of the base class; those in `BOOKKEEPING` it removes, or keeps without reading them.
BASE = frozenset(
    {
        "model_type", "transformers_version", "architectures", "output_hidden_states",
        "return_dict", "dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label",
        "label2id", "problem_type",
    }
)  # fmt: skip
BOOKKEEPING = frozenset(
    {
        # who made the file, and how a model is to be loaded
        "_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "auto_map",
        "custom_pipelines", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "_attn_implementation_internal", "attn_impl",
        "experts_implementation", "_experts_implementation_internal", "_flash_attn_2_enabled",
        "ignore_keys_at_rope_validation", "quantization_config", "transformers_weights",
        "configuration_files", "transformers.js_config", "unsloth_version", "unsloth_fixed",
        # of base classes before transformers 5
        "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "finetuning_task",
        "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "is_decoder",
        "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
        "num_labels", "output_attentions", "gradient_checkpointing", "use_cache",
        "tie_last_hidden_states", "output_past", "neftune_noise_alpha",
        # ids of tokens, which are the tokenizer's matter
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "cls_token_id",
        "mask_token_id", "decoder_start_token_id",
        # generation
        "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit",
        "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "cache_config",
        "cache_implementation", "compile_config", "constraints", "disable_compile",
        "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff",
        "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids",
        "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "is_assistant",
        "length_penalty", "low_memory", "max_length", "max_matching_ngram_size",
        "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
        "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_logits",
        "output_scores", "penalty_alpha", "prompt_lookup_num_tokens", "remove_invalid_values",
        "renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sequence_bias",
        "stop_strings", "suppress_tokens", "target_lookbehind", "temperature", "token_healing",
        "top_k", "top_p", "typical_p", "watermarking_config",
    }
)  # fmt: skip

# Read by every decoder, field or not: rotary positions, and what changes a model as a whole.
ROTARY = (
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
# The last three are no fields of some classes, but its cache goes by them.
DECODER = (
    *ROTARY, "is_causal", "per_layer_config", "sliding_window", "layer_types",
    "attention_chunk_size",
)  # fmt: skip
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
TRAINING = ("initializer_range", "use_cache", "attention_dropout", *TOKENS)


def decoder_fields(
    sizes: tuple[int, int, int, int, int],
    groups: tuple[str, int | None],
    context: int,
    eps: float = 1e-6,
    *,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    epsilon: str = "rms_norm_eps",
    **more: tuple[str, object],
) -> dict[str, tuple[str, object]]:
    """Fields of every decoder; sizes are of vocabulary, width, inner width, layers and heads."""
    vocabulary, width, inner, layers, heads = sizes
    return {
        "vocab_size": (INT, vocabulary),
        "hidden_size": (INT, width),
        "intermediate_size": (INT, inner),
        "num_hidden_layers": (INT, layers),
        "num_attention_heads": (INT, heads),
        "num_key_value_heads": groups,
        activation[0]: (TEXT, activation[1]),
        "max_position_embeddings": (INT, context),
        epsilon: (FLOAT, eps),
        "tie_word_embeddings": (BOOL, tied),
        "rope_parameters": (OBJECT_OR_NULL, None),
        **more,
    }

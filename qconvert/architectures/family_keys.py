"""Sizes, hyper-parameters and windows of each architecture, from its configuration.

Facts are llama.cpp's: what its loaders read, and what they derive where no key says it. What cannot
be said is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qconvert.architectures.config import Config
from qconvert.architectures.rope import (
    LONG,
    Rope,
    Scalings,
    read_rope,
    read_rope_by_layer,
    settled,
)
from qconvert.errors import FormatError
from qconvert.files.gguf_writer import GgufValue, MetadataValue

Keys = dict[str, MetadataValue]

# llama.cpp ends the process at more (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS); of a head ten times
# what is in use. What is built from these numbers is built before the tensors are seen.
MAX_BLOCKS = 512
MAX_EXPERTS = 1024
MAX_HEAD = 10_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of the tensors of one model, by the names that a slot's shape uses."""

    blocks: int
    head_dim: int
    named: dict[str, int]

    def shape(self, names: str) -> tuple[int, ...]:
        """The dimensions of these names."""
        return tuple(self.named[name] for name in names.split())


SILU = ("silu", "swish")
# ggml has one GELU, the approximation by tanh, from a table of binary16 that is further from either
# than they are from each other.
GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")
# A soft cap of so many leaves every logit as it is, bit for bit: a power of two far above them.
_NO_CAP = 2.0**64


def plain_sizes(config: Config, *, grouped: bool = True, **more: int) -> Sizes:
    """Dimensions that every architecture has; ``grouped`` if queries may share keys.

    Raises:
        FormatError: they contradict each other.
    """
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    groups = (config.optional_count("num_key_value_heads") or heads) if grouped else heads
    stated = _head_dim(config)
    head = stated or width // heads
    divides = config.known is None or config.known.divides
    uneven = heads % groups or (divides and width % heads)
    if uneven or head % 2 or not 0 < head <= MAX_HEAD:
        raise FormatError(
            "heads do not divide as they should",
            path=config.path,
            found=f"{heads} heads, {groups} of keys, width {width}, head width {head}",
            wanted="a multiple of the heads of keys, an even head width"
            + (", and a width that is a multiple of the heads" if divides else ""),
            code="ARCH-HEADS",
        )
    inner = config.count("intermediate_size")
    return Sizes(
        blocks=config.count("num_hidden_layers", most=MAX_BLOCKS),
        head_dim=head,
        named={
            "vocabulary": config.count("vocab_size"),
            "width": width,
            "inner": inner,
            "gate_up": 2 * inner,
            "head": head,
            "query": heads * head,
            "key": groups * head,
            "fused": (heads + 2 * groups) * head,
            "context": config.count("max_position_embeddings"),
            **more,
        },
    )


def _head_dim(config: Config) -> int | None:
    """The width of a head, where one is stated.

    A class without the field takes it from a file that has it, but not as null.
    """
    of_class = config.known is not None and "head_dim" in config.known.fields
    if config.given("head_dim") and not of_class:
        return config.count("head_dim", most=MAX_HEAD)
    return config.optional_count("head_dim", MAX_HEAD)


def filled_sizes(config: Config) -> Sizes:
    """Sizes where llama.cpp's loader takes no other width of heads."""
    sizes = plain_sizes(config)
    if sizes.named["query"] != sizes.named["width"]:
        raise config.unlike("head_dim", "hidden_size / num_attention_heads")
    return sizes


def _common(config: Config, sizes: Sizes) -> Keys:
    heads = config.count("num_attention_heads")
    return {
        "context_length": config.count("max_position_embeddings"),
        "embedding_length": sizes.named["width"],
        "block_count": sizes.blocks,
        "feed_forward_length": sizes.named["inner"],
        "attention.head_count": heads,
        "attention.head_count_kv": sizes.named["key"] // sizes.head_dim,
    }


def decoder_keys(config: Config, sizes: Sizes) -> Keys:
    # transformers makes masks of the first field whatever the class (null counts as false there),
    # and its cache goes by the others.
    config.require("is_causal", (True,), True)
    config.require("attention_chunk_size", (None,))
    declared = config.known and "layer_types" in config.known.fields
    if not declared and any(_layer_types(config, sizes, [])):
        raise config.unlike("layer_types", f"'{_FULL}'")
    return _common(config, sizes) | {
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", zero=True),
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "vocab_size": sizes.named["vocabulary"],
    }


def rotary(scalings: Scalings) -> Callable[[Config, Sizes], Rope]:
    """Rotary positions of an architecture that rotates whole heads."""

    def rope(config: Config, sizes: Sizes) -> Rope:
        return read_rope(settled(config, scalings), sizes.head_dim, scalings)

    return rope


def _expert_keys(config: Config, sizes: Sizes) -> Keys:
    used = config.count("num_experts_per_tok")
    if used > sizes.named["experts"]:
        raise FormatError(
            "more experts are used than there are",
            path=config.path,
            found=f"{used} of {sizes.named['experts']}",
            code="ARCH-EXPERTS",
        )
    return {"expert_count": sizes.named["experts"], "expert_used_count": used}


def mixtral_sizes(config: Config) -> Sizes:
    inner = config.count("intermediate_size")
    return plain_sizes(
        config, experts=config.count("num_local_experts", most=MAX_EXPERTS), expert_inner=inner
    )


def mixtral_keys(config: Config, sizes: Sizes) -> Keys:
    return decoder_keys(config, sizes) | _expert_keys(config, sizes)


def qwen3_moe_sizes(config: Config) -> Sizes:
    return plain_sizes(
        config,
        experts=config.count("num_experts", most=MAX_EXPERTS),
        expert_inner=config.count("moe_intermediate_size"),
    )


def qwen3_moe_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp has experts in every block, and divides the chosen ones' weights by their sum,
    # which is 1 anyway where all are chosen.
    if config.count("decoder_sparse_step") > 1:
        raise config.unlike("decoder_sparse_step", "1")
    plain = config.get("mlp_only_layers") or ()
    if any(layer in plain for layer in range(sizes.blocks)):
        raise config.unlike("mlp_only_layers", "no layer")
    experts = _expert_keys(config, sizes)
    if not config.flag("norm_topk_prob") and experts["expert_used_count"] != sizes.named["experts"]:
        raise config.unlike("norm_topk_prob", "true")
    return (
        decoder_keys(config, sizes)
        | experts
        | {"expert_feed_forward_length": sizes.named["expert_inner"]}
    )


# --- windows ---

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _layer_types(config: Config, sizes: Sizes, usual: list[bool]) -> list[bool]:
    """Which layers look at a window only: as ``layer_types`` says, else as usual.

    Raises:
        FormatError: it is not one of both for each layer.
    """
    types = config.get("layer_types")
    if types is None:
        return usual
    # transformers still takes the older name of full ones
    names = {_FULL: False, "attention": False, _SLIDING: True}
    if (
        not isinstance(types, list)
        or len(types) != sizes.blocks
        or not all(isinstance(t, str) and t in names for t in types)
    ):
        raise config.wrong(
            "layer_types", f"'{_FULL}' or '{_SLIDING}' for each of {sizes.blocks} layers"
        )
    return [names[t] for t in types]


def plain_window(config: Config, sizes: Sizes) -> int | None:
    """A window that all layers have; None if the context is no longer."""
    window = config.optional_count("sliding_window")
    return window if window is not None and window < sizes.named["context"] else None


def switched_window(config: Config, sizes: Sizes) -> int | None:
    """A window that is there when a flag says so, in Qwen2 and 3 for the upper layers only."""
    used = config.flag("use_sliding_window")
    stated = config.optional_count("sliding_window") if used else None
    if config.known and "layer_types" in config.known.fields:
        first = config.get("max_window_layers")
        usual = [stated is not None and i >= first for i in range(sizes.blocks)]
        if not any(_layer_types(config, sizes, usual)):
            return None
        if stated is None:
            raise config.wrong(
                "use_sliding_window", "true with a sliding_window, as layer_types names such layers"
            )
    return stated if stated is not None and stated < sizes.named["context"] else None


# --- Gemma, Phi-3, BERT ---


def _gemma_keys(
    config: Config, sizes: Sizes, largest: int, sliding: list[bool], usual: list[bool]
) -> Keys:
    """Keys of Gemma 2 and 3.

    llama.cpp derives two things from others: the scale of attention from the head width (from the
    width of the model in the one with ``largest`` blocks), and, where no key says it, which layers
    look at a window only.
    """
    heads = config.count("num_attention_heads")
    scale = sizes.named["width"] // heads if sizes.blocks == largest else sizes.head_dim
    if config.count("query_pre_attn_scalar") != scale:
        raise config.unlike("query_pre_attn_scalar", str(scale))
    if config.flag("use_bidirectional_attention"):
        raise config.unlike("use_bidirectional_attention", "false")
    found = decoder_keys(config, sizes)
    window = config.count("sliding_window")  # transformers wants one, be it for no layer
    if any(sliding):
        found["attention.sliding_window"] = window
        if sliding != usual:
            found["attention.sliding_window_pattern"] = GgufValue("BOOL", sliding)
    return found


def _every_nth_full(sizes: Sizes, n: int) -> list[bool]:
    return [bool((i + 1) % n) for i in range(sizes.blocks)]


def gemma2_keys(config: Config, sizes: Sizes) -> Keys:
    if config.get("attn_logit_softcapping") is None:  # llama.cpp always has one for these scores
        raise config.unlike("attn_logit_softcapping", "a number")
    capped = config.get("final_logit_softcapping") is not None
    usual = _every_nth_full(sizes, 2)
    sliding = _layer_types(config, sizes, usual)
    if not any(sliding):  # llama.cpp ends its process
        raise config.unlike("layer_types", f"'{_SLIDING}' for one layer at least")
    return _gemma_keys(config, sizes, 46, sliding, usual) | {
        "attn_logit_softcapping": config.number("attn_logit_softcapping"),
        # llama.cpp takes 30 for an absent one
        "final_logit_softcapping": config.number("final_logit_softcapping") if capped else _NO_CAP,
    }


def gemma3_keys(config: Config, sizes: Sizes) -> Keys:
    pattern = config.get("sliding_window_pattern", 6)
    if type(pattern) is not int or not 0 < abs(pattern) <= MAX_BLOCKS:
        raise config.wrong("sliding_window_pattern", f"an integer from 1 to {MAX_BLOCKS}")
    sliding = _layer_types(config, sizes, _every_nth_full(sizes, pattern))
    found = _gemma_keys(config, sizes, 62, sliding, _every_nth_full(sizes, 6))
    if config.get("final_logit_softcapping") is not None:
        found["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return found


def gemma3_rope(config: Config, sizes: Sizes) -> Rope:
    return read_rope_by_layer(config, sizes.head_dim)


def phi3_keys(config: Config, sizes: Sizes) -> Keys:
    # A window of zero says that there is none.
    return decoder_keys(config, sizes) | {
        "attention.sliding_window": config.optional_count("sliding_window") or 0
    }


def phi3_rope(config: Config, sizes: Sizes) -> Rope:
    parameters = settled(config, LONG)
    rotated = int(sizes.head_dim * min(parameters.part, MAX_HEAD))
    if rotated % 2 or not 0 < rotated <= sizes.head_dim:
        raise parameters.fields.wrong(
            "partial_rotary_factor", f"an even number of {sizes.head_dim} dimensions, not {rotated}"
        )
    return read_rope(parameters, rotated, LONG)


def bert_sizes(config: Config) -> Sizes:
    return plain_sizes(config, grouped=False, types=config.count("type_vocab_size"))


def bert_keys(config: Config, sizes: Sizes) -> Keys:
    if config.stated("position_embedding_type") is not None:
        config.require("position_embedding_type", ("absolute",))
    for name in ("is_decoder", "add_cross_attention"):
        if config.flag(name):
            raise config.unlike(name, "false")
    return _common(config, sizes) | {
        "attention.layer_norm_epsilon": config.number("layer_norm_eps", zero=True),
        "attention.causal": False,
        "vocab_size": sizes.named["vocabulary"],
    }

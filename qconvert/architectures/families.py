"""The table of architectures: which tensors a model has, of which shapes, and which keys.

A new architecture of a known kind is one row of `FAMILIES`. Facts are llama.cpp's: a tensor that
its loader does not ask for, or one that it misses, makes it refuse the whole file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qconvert.architectures.config import Config
from qconvert.architectures.rope import LONG, PLAIN, Rope, read_rope
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.gguf_writer import GgufValue, MetadataValue

Keys = dict[str, MetadataValue]

# Ten times what is in use: what is built from these numbers is built before the tensors are seen.
MAX_BLOCKS = 10_000
MAX_EXPERTS = 10_000
MAX_HEAD = 10_000


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that llama.cpp's loader asks for.

    Attributes:
        name: in GGUF; within a block without ``blk.N.``.
        shape: names of `Sizes`, outermost dimension first.
        optional: whether a model may do without.
        heads: whether its rows are those of heads with rotated halves, to be interleaved.
    """

    name: str
    shape: str
    optional: bool = False
    heads: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of the tensors of one model, by the names that `Slot.shape` uses."""

    blocks: int
    head_dim: int
    named: dict[str, int]

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape that the configuration gives the tensor."""
        return tuple(self.named[name] for name in slot.shape.split())


@dataclass(frozen=True, slots=True)
class Family:
    """One row: what llama.cpp calls an architecture, and what transformers calls it.

    Attributes:
        name: for people.
        classes: values of config.json's ``architectures``.
        arch: GGUF's ``general.architecture``.
        whole: tensors outside the blocks.
        block: tensors of each block.
        keys: hyper-parameters, below ``<arch>.``; rotary ones come from ``rope``.
        sizes: dimensions.
        rope: rotary positions; None without.
        activations: what ``hidden_act`` or ``hidden_activation`` may be, the usual one first.
        norm_offset: whether transformers adds one to the weights of norms; llama.cpp does not.
        tied: what ``tie_word_embeddings`` is where config.json does not say; None: whatever the
            tensors are.
        renames: beginnings of source names, and what stands for them in gguf-py's table.
        dropped: beginnings of source names that llama.cpp has no use for, and why.
        defaults: fields that transformers leaves out of config.json when they have these values.
    """

    name: str
    classes: tuple[str, ...]
    arch: str
    whole: tuple[Slot, ...]
    block: tuple[Slot, ...]
    keys: Callable[[Config, Sizes], Keys]
    sizes: Callable[[Config], Sizes]
    rope: Callable[[Config, Sizes], Rope] | None
    activations: tuple[str, ...]
    norm_offset: bool = False
    tied: bool | None = None
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, object], ...] = ()


# --- tensors ---

OUTPUT = "output.weight"
_WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("output_norm.weight", "width"),
    Slot(OUTPUT, "vocabulary width"),
)


def _attention(heads: bool, bias: bool | None) -> tuple[Slot, ...]:
    """Query, key, value and output; biases are required, absent or (None) either."""
    q, k, v = (("attn_q", "query"), ("attn_k", "key"), ("attn_v", "key"))
    found = [
        Slot(f"{q[0]}.weight", f"{q[1]} width", heads=heads),
        Slot(f"{k[0]}.weight", f"{k[1]} width", heads=heads),
        Slot(f"{v[0]}.weight", f"{v[1]} width"),
        Slot("attn_output.weight", "width query"),
    ]
    if bias is not False:
        found += [
            Slot(f"{q[0]}.bias", q[1], bias is None, heads),
            Slot(f"{k[0]}.bias", k[1], bias is None, heads),
            Slot(f"{v[0]}.bias", v[1], bias is None),
        ]
    return tuple(found)


_NORMS = (Slot("attn_norm.weight", "width"), Slot("ffn_norm.weight", "width"))
_HEAD_NORMS = (Slot("attn_q_norm.weight", "head"), Slot("attn_k_norm.weight", "head"))
_POST_NORMS = (
    Slot("post_attention_norm.weight", "width"),
    Slot("post_ffw_norm.weight", "width"),
)
_GATED = (
    Slot("ffn_gate.weight", "inner width"),
    Slot("ffn_up.weight", "inner width"),
    Slot("ffn_down.weight", "width inner"),
)
_EXPERTS = (
    Slot("ffn_gate_inp.weight", "experts width"),
    Slot("ffn_gate_exps.weight", "experts expert_inner width"),
    Slot("ffn_up_exps.weight", "experts expert_inner width"),
    Slot("ffn_down_exps.weight", "experts width expert_inner"),
)
_LLAMA = (
    *_NORMS,
    *_attention(heads=True, bias=None),
    Slot("attn_output.bias", "width", optional=True),
)
_LLAMA_DENSE = (
    *_GATED,
    Slot("ffn_gate.bias", "inner", optional=True),
    Slot("ffn_up.bias", "inner", optional=True),
    Slot("ffn_down.bias", "width", optional=True),
)
_PHI3 = (
    *_NORMS,
    Slot("attn_qkv.weight", "fused width"),
    Slot("attn_output.weight", "width query"),
    Slot("ffn_up.weight", "gate_up width"),
    Slot("ffn_down.weight", "width inner"),
)
_BERT_WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("position_embd.weight", "context width"),
    Slot("token_types.weight", "types width"),
    Slot("token_embd_norm.weight", "width"),
    Slot("token_embd_norm.bias", "width"),
)
_BERT = (
    *_attention(heads=False, bias=True),
    Slot("attn_output.bias", "width"),
    Slot("attn_output_norm.weight", "width"),
    Slot("attn_output_norm.bias", "width"),
    Slot("ffn_up.weight", "inner width"),
    Slot("ffn_up.bias", "inner"),
    Slot("ffn_down.weight", "width inner"),
    Slot("ffn_down.bias", "width"),
    Slot("layer_output_norm.weight", "width"),
    Slot("layer_output_norm.bias", "width"),
)

# --- hyper-parameters ---


def _sizes(config: Config, *, grouped: bool = True, **more: int) -> Sizes:
    """Dimensions that every architecture has; ``grouped`` if queries may share keys.

    Raises:
        FormatError: they contradict each other.
    """
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    groups = config.count("num_key_value_heads", heads) if grouped else heads
    head = config.optional_count("head_dim", MAX_HEAD) or width // heads
    uneven = heads % groups or (config.get("head_dim") is None and width % heads)
    if uneven or head % 2 or head > MAX_HEAD:
        raise FormatError(
            "heads do not divide as they should",
            path=config.path,
            found=f"{heads} heads, {groups} of keys, width {width}, head width {head}",
            wanted="a multiple of the heads of keys, and an even head width",
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


def _decoder(config: Config, sizes: Sizes) -> Keys:
    return _common(config, sizes) | {
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 1e-6),
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "vocab_size": sizes.named["vocabulary"],
    }


def _plain_rope(config: Config, sizes: Sizes) -> Rope:
    _whole_heads(config)
    return read_rope(config, sizes.head_dim, PLAIN)


def _whole_heads(config: Config) -> None:
    rope = config.section("rope_parameters") or config
    rope.require("partial_rotary_factor", (1.0, 1), 1.0)


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


def _mixtral_sizes(config: Config) -> Sizes:
    inner = config.count("intermediate_size")
    return _sizes(
        config, experts=config.count("num_local_experts", most=MAX_EXPERTS), expert_inner=inner
    )


def _mixtral_keys(config: Config, sizes: Sizes) -> Keys:
    return _decoder(config, sizes) | _expert_keys(config, sizes)


def _qwen3_moe_sizes(config: Config) -> Sizes:
    # transformers 5 writes num_local_experts, earlier versions num_experts
    experts = config.optional_count("num_experts", MAX_EXPERTS) or config.count(
        "num_local_experts", most=MAX_EXPERTS
    )
    return _sizes(config, experts=experts, expert_inner=config.count("moe_intermediate_size"))


def _qwen3_moe_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp has experts in every block, and divides the chosen ones' weights by their sum.
    config.require("decoder_sparse_step", (1,), 1)
    config.require("mlp_only_layers", ([],), [])
    config.require("norm_topk_prob", (True,), False)
    return (
        _decoder(config, sizes)
        | _expert_keys(config, sizes)
        | {"expert_feed_forward_length": sizes.named["expert_inner"]}
    )


def _gemma_keys(config: Config, sizes: Sizes, largest: int, pattern: int) -> Keys:
    """Keys of Gemma 2 and 3.

    llama.cpp derives two things from others: the scale of attention from the head width (from the
    width of the model in the one with ``largest`` blocks), and which layers look at a window only.
    """
    heads = config.count("num_attention_heads")
    scale = sizes.named["width"] // heads if sizes.blocks == largest else sizes.head_dim
    config.require("query_pre_attn_scalar", (scale, float(scale)), scale)
    kinds = ["full_attention" if not (i + 1) % pattern else "sliding_attention"
             for i in range(sizes.blocks)]  # fmt: skip
    config.require("layer_types", (kinds,), kinds)
    config.require("use_bidirectional_attention", (False,), False)
    found = _decoder(config, sizes) | {"attention.sliding_window": config.count("sliding_window")}
    if config.get("final_logit_softcapping") is not None:
        found["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return found


def _gemma2_keys(config: Config, sizes: Sizes) -> Keys:
    return _gemma_keys(config, sizes, largest=46, pattern=2) | {
        "attn_logit_softcapping": config.number("attn_logit_softcapping")
    }


def _gemma3_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("sliding_window_pattern", (6,), 6)
    config.require("attn_logit_softcapping", (None,), None)
    return _gemma_keys(config, sizes, largest=62, pattern=6)


def _gemma3_rope(config: Config, sizes: Sizes) -> Rope:
    rope = read_rope(config, sizes.head_dim, ("default", "linear"), theta=1_000_000.0)
    rope.keys.setdefault("freq_base_swa", 10_000.0)
    return rope


def _phi3_keys(config: Config, sizes: Sizes) -> Keys:
    # A window of zero says that there is none.
    return _decoder(config, sizes) | {
        "attention.sliding_window": config.optional_count("sliding_window") or 0
    }


def _phi3_rope(config: Config, sizes: Sizes) -> Rope:
    scaling = config.section("rope_parameters") or config
    rotated = int(sizes.head_dim * scaling.number("partial_rotary_factor", 1.0))
    if rotated % 2 or rotated > sizes.head_dim:
        raise FormatError(
            "field 'partial_rotary_factor' is not usable",
            path=config.path,
            found=f"{rotated} of {sizes.head_dim} dimensions",
            wanted="an even number",
            code="ARCH-CONFIG",
        )
    return read_rope(config, rotated, LONG)


def _bert_sizes(config: Config) -> Sizes:
    return _sizes(config, grouped=False, types=config.count("type_vocab_size", 2))


def _bert_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("position_embedding_type", ("absolute",), "absolute")
    config.require("is_decoder", (False,), False)
    return _common(config, sizes) | {
        "attention.layer_norm_epsilon": config.number("layer_norm_eps", 1e-12),
        "attention.causal": False,
        "vocab_size": sizes.named["vocabulary"],
    }


# --- rows ---

_UNUSED_HEAD = "is a part that llama.cpp's encoders do not have"
_VISION = "belongs to the vision part, which is a file of its own in llama.cpp"
_SILU = ("silu", "swish")
_GELU = ("gelu_pytorch_tanh", "gelu")
# A family that transformers stores inside a model of text and images.
_INSIDE = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)

FAMILIES = (
    Family(
        "Llama (also Mistral, SmolLM)",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        "llama",
        _WHOLE,
        (*_LLAMA, *_LLAMA_DENSE),
        _decoder,
        _sizes,
        _plain_rope,
        _SILU,
    ),
    Family(
        "Mixtral",
        ("MixtralForCausalLM",),
        "llama",
        _WHOLE,
        (*_LLAMA, *_EXPERTS),
        _mixtral_keys,
        _mixtral_sizes,
        _plain_rope,
        _SILU,
        defaults=(("rope_theta", 1_000_000.0), ("rms_norm_eps", 1e-5)),
    ),
    Family(
        "Qwen2",
        ("Qwen2ForCausalLM",),
        "qwen2",
        _WHOLE,
        (*_NORMS, *_attention(heads=False, bias=True), *_GATED),
        _decoder,
        _sizes,
        _plain_rope,
        _SILU,
    ),
    Family(
        "Qwen3",
        ("Qwen3ForCausalLM",),
        "qwen3",
        _WHOLE,
        (*_NORMS, *_attention(heads=False, bias=False), *_HEAD_NORMS, *_GATED),
        _decoder,
        _sizes,
        _plain_rope,
        _SILU,
        defaults=(("head_dim", 128),),
    ),
    Family(
        "Qwen3 mixture of experts",
        ("Qwen3MoeForCausalLM",),
        "qwen3moe",
        _WHOLE,
        (*_NORMS, *_attention(heads=False, bias=False), *_HEAD_NORMS, *_EXPERTS),
        _qwen3_moe_keys,
        _qwen3_moe_sizes,
        _plain_rope,
        _SILU,
    ),
    Family(
        "Gemma 2",
        ("Gemma2ForCausalLM",),
        "gemma2",
        _WHOLE[:-1],  # its loader has no other output matrix than the token embedding
        (*_NORMS, *_POST_NORMS, *_attention(heads=False, bias=False), *_GATED),
        _gemma2_keys,
        _sizes,
        _plain_rope,
        _GELU,
        norm_offset=True,
        tied=True,
        defaults=(
            ("head_dim", 256),
            ("query_pre_attn_scalar", 256),
            ("sliding_window", 4096),
            ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
        ),
    ),
    Family(
        "Gemma 3 (text)",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3",
        _WHOLE,
        (*_NORMS, *_POST_NORMS, *_HEAD_NORMS, *_attention(heads=False, bias=False), *_GATED),
        _gemma3_keys,
        _sizes,
        _gemma3_rope,
        _GELU,
        norm_offset=True,
        tied=True,
        renames=_INSIDE,
        dropped=(
            ("vision_tower.", _VISION),
            ("model.vision_tower.", _VISION),
            ("multi_modal_projector.", _VISION),
            ("model.multi_modal_projector.", _VISION),
        ),
        defaults=(
            ("vocab_size", 262_208),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("head_dim", 256),
            ("query_pre_attn_scalar", 256),
            ("sliding_window", 4096),
            ("max_position_embeddings", 131_072),
        ),
    ),
    Family(
        "Phi-3",
        ("Phi3ForCausalLM",),
        "phi3",
        _WHOLE,
        _PHI3,
        _phi3_keys,
        _sizes,
        _phi3_rope,
        _SILU,
        defaults=(("rms_norm_eps", 1e-5),),
    ),
    Family(
        "BERT (encoders such as all-MiniLM)",
        ("BertModel", "BertForMaskedLM"),
        "bert",
        _BERT_WHOLE,
        _BERT,
        _bert_keys,
        _bert_sizes,
        None,
        ("gelu",),
        renames=(("bert.", ""),),
        dropped=(("pooler.", _UNUSED_HEAD), ("cls.", _UNUSED_HEAD)),
        tied=True,
    ),
)


def known_family(config: Config) -> Family | None:
    """The row for a configuration; None when no row has its class."""
    names = _class_names(config)
    return next((f for f in FAMILIES if any(n in f.classes for n in names)), None)


def family_of(config: Config) -> Family:
    """The row for a configuration.

    Raises:
        UnsupportedError: no row has its class; the message names those that there are.
    """
    if family := known_family(config):
        return family
    raise UnsupportedError(
        "architecture has no row in our table for GGUF",
        path=config.path,
        found=", ".join(_class_names(config))[:80] or "none named",
        wanted=", ".join(c for family in FAMILIES for c in family.classes),
        hint="--raw writes the tensors under their own names, for tools other than llama.cpp",
        code="ARCH-UNKNOWN",
    )


def _class_names(config: Config) -> list[str]:
    named = config.get("architectures")
    return [n for n in named if isinstance(n, str)] if isinstance(named, list) else []


def hyper_parameters(family: Family, config: Config, sizes: Sizes) -> tuple[Keys, Rope]:
    """The keys below the architecture's name, with what rotary positions need.

    Raises:
        FormatError: a field of the configuration is missing or unusable.
        UnsupportedError: a field asks for something llama.cpp does not do for this architecture.
    """
    name = "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"
    config.require(name, family.activations, family.activations[0])
    keys = family.keys(config, sizes)
    rope = family.rope(config, sizes) if family.rope else Rope()
    keys |= {f"rope.{key}": value for key, value in rope.keys.items()}
    return {f"{family.arch}.{key}": _typed(value) for key, value in keys.items()}, rope


def _typed(value: MetadataValue) -> MetadataValue:
    """Counts as llama.cpp reads them."""
    return GgufValue("UINT32", value) if type(value) is int else value


__all__ = [
    "FAMILIES",
    "MAX_BLOCKS",
    "OUTPUT",
    "Family",
    "Sizes",
    "Slot",
    "family_of",
    "hyper_parameters",
    "known_family",
]

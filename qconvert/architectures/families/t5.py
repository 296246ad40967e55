"""T5, MT5 and UMT5: encoder and decoder with a bias by distance instead of positions, or the
encoder alone.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    INT_OR_NULL,
    TEXT,
    ConfigClass,
)
from qconvert.architectures.families.keys import MAX_BLOCKS, MAX_HEAD, Keys, Sizes
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import OUTPUT

_LAYERS, _DECODER, _FORM = "num_layers", "num_decoder_layers", "feed_forward_proj"
_TIED = "tie_word_embeddings"
_CONTEXT = 512  # what llama.cpp's converter has where nothing is stated; no weight depends on it
_DISTANCE = 128  # llama.cpp has no key for it

_CONFIG = ConfigClass(
    "T5Config",
    "t5",
    ("T5ForConditionalGeneration",),
    MappingProxyType(
        {
            "vocab_size": (INT, 32_128),
            "d_model": (INT, 512),
            "d_kv": (INT, 64),
            "d_ff": (INT, 2048),
            _LAYERS: (INT, 6),
            _DECODER: (INT_OR_NULL, None),
            "num_heads": (INT, 8),
            "relative_attention_num_buckets": (INT, 32),
            "relative_attention_max_distance": (INT, 128),
            "layer_norm_epsilon": (FLOAT, 1e-6),
            _FORM: (TEXT, "relu"),
        }
    ),
    (
        "dropout_rate", "initializer_factor", "use_cache", "classifier_dropout", "is_decoder",
        "pad_token_id", "eos_token_id",
    ),
    # Whether outputs are scaled is read of the flag; the matrices are tied if there is but one.
    (_TIED, "n_positions", "per_layer_config"),
    MappingProxyType(
        {
            "hidden_size": "d_model",
            "num_attention_heads": "num_heads",
            "num_hidden_layers": _LAYERS,
            "head_dim": "d_kv",
        }
    ),
    harmless=MappingProxyType(
        {
            "output_past": ANY,
            "task_specific_params": ANY,
            "dense_act_fn": ANY,  # both are made of feed_forward_proj
            "is_gated_act": ANY,
            "scale_decoder_outputs": ANY,
        }
    ),
)  # fmt: skip
# The model of both sets the flag for either stack itself, the encoder alone goes by it.
_FLAG = "is_decoder"
_ENCODER_CONFIG = replace(
    _CONFIG,
    architectures=("T5EncoderModel",),
    fields=MappingProxyType({**_CONFIG.fields, _FLAG: (BOOL, False)}),
    unused=tuple(name for name in _CONFIG.unused if name != _FLAG),
)
_GATED_FORM = {
    "vocab_size": (INT, 250_112),
    "d_ff": (INT, 1024),
    _LAYERS: (INT, 8),
    "num_heads": (INT, 6),
    _FORM: (TEXT, "gated-gelu"),
}


_START = "decoder_start_token_id"
# MT5 is tied whatever the flag says, and does not scale its outputs.
_MORE_UNUSED = {"MT5": (_START, "bos_token_id", _TIED), "UMT5": (_START,)}


def _multilingual(known: ConfigClass, kind: str, model: str) -> ConfigClass:
    """The same of many languages, with other defaults."""
    return replace(
        known,
        name=f"{kind}Config",
        model_type=kind.lower(),
        architectures=(f"{kind}{model}",),
        fields=MappingProxyType({**known.fields, **_GATED_FORM}),
        unused=(*known.unused, *_MORE_UNUSED[kind]),
        beside=tuple(n for n in known.beside if n not in _MORE_UNUSED[kind]),
    )


_BOTH, _ALONE = "ForConditionalGeneration", "EncoderModel"
CONFIGS = (
    _CONFIG,
    _ENCODER_CONFIG,
    *(_multilingual(_CONFIG, kind, _BOTH) for kind in ("MT5", "UMT5")),
    *(_multilingual(_ENCODER_CONFIG, kind, _ALONE) for kind in ("MT5", "UMT5")),
)


def t5_sizes(config: Config) -> Sizes:
    encoder = config.count(_LAYERS, most=MAX_BLOCKS)
    decoder = config.optional_count(_DECODER, MAX_BLOCKS) or encoder
    heads, head = config.count("num_heads"), config.count("d_kv", most=MAX_HEAD)
    width, inner = config.count("d_model"), config.count("d_ff")
    return Sizes(
        blocks=max(encoder, decoder),
        head_dim=head,
        named={
            "vocabulary": config.count("vocab_size"),
            "width": width,
            "inner": inner,
            "heads": heads,
            "query": heads * head,
            "buckets": config.count("relative_attention_num_buckets"),
            "context": config.count("n_positions", _CONTEXT),
            "encoder": encoder,
            "decoder": decoder,
        },
    )


def t5_encoder_sizes(config: Config) -> Sizes:
    sizes = t5_sizes(config)
    return replace(sizes, blocks=sizes.named["encoder"])


def t5_encoder_keys(config: Config, sizes: Sizes) -> Keys:
    if config.flag(_FLAG):
        raise config.unlike(_FLAG, "false")
    return _stack_keys(config, sizes)


def _stack_keys(config: Config, sizes: Sizes) -> Keys:
    config.require(_FORM, ("relu", "gated-gelu"))
    config.require("relative_attention_max_distance", (_DISTANCE,))
    buckets = sizes.named["buckets"]
    if buckets % 4 or buckets // 4 >= _DISTANCE // 2:
        # halves of them for either direction, halves of these for distances one by one
        raise config.unlike("relative_attention_num_buckets", "a multiple of 4, below 256")
    epsilon = config.number("layer_norm_epsilon", zero=True)
    return {
        "context_length": sizes.named["context"],
        "embedding_length": sizes.named["width"],
        "feed_forward_length": sizes.named["inner"],
        "block_count": sizes.named["encoder"],
        "attention.head_count": sizes.named["heads"],
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.relative_buckets_count": buckets,
        "vocab_size": sizes.named["vocabulary"],
    }


def t5_keys(config: Config, sizes: Sizes) -> Keys:
    pad = config.get("pad_token_id", 0)
    start = config.get("decoder_start_token_id", pad)
    if type(start) is not int or not 0 <= start < sizes.named["vocabulary"]:
        raise config.wrong("decoder_start_token_id", "the id of a token")
    if sizes.named["decoder"] > sizes.named["encoder"]:  # its loader stumbles
        raise config.unlike(_DECODER, f"at most {_LAYERS}, {sizes.named['encoder']}")
    return _stack_keys(config, sizes) | {
        "decoder_block_count": sizes.named["decoder"],
        "decoder_start_token_id": start,
    }


def _first(config: Config, sizes: Sizes, block: int) -> bool:
    return block == 0


def _in_encoder(config: Config, sizes: Sizes, block: int) -> bool:
    return block < sizes.named["encoder"]


def _in_decoder(config: Config, sizes: Sizes, block: int) -> bool:
    return block < sizes.named["decoder"]


def _gated(config: Config, sizes: Sizes, block: int) -> bool:
    return bool(config.get(_FORM) != "relu")


def _decoder_gate(config: Config, sizes: Sizes, block: int) -> bool:
    return _gated(config, sizes, block) and _in_decoder(config, sizes, block)


def _encoder_gate(config: Config, sizes: Sizes, block: int) -> bool:
    return _gated(config, sizes, block) and _in_encoder(config, sizes, block)


def _output_scale(config: Config, sizes: Sizes) -> tuple[float]:
    """What the first T5 multiplies its outputs by: its configurations do not say 'tied: false'."""
    return (1.0 if config.get(_TIED) is False else sizes.named["width"] ** -0.5,)


def _attention(stack: str, name: str) -> tuple[Slot, ...]:
    only = _in_encoder if stack == "enc" else _in_decoder
    return (
        Slot(f"{stack}.blk.{{}}.{name}_norm.weight", "width", only=only),
        *(Slot(f"{stack}.blk.{{}}.{name}_{p}.weight", "query width", only=only) for p in "qkv"),
        Slot(f"{stack}.blk.{{}}.{name}_o.weight", "width query", only=only),
    )


def _feed_forward(stack: str) -> tuple[Slot, ...]:
    only, gate = (_in_encoder, _encoder_gate) if stack == "enc" else (_in_decoder, _decoder_gate)
    return (
        Slot(f"{stack}.blk.{{}}.attn_rel_b.weight", "buckets heads", only=_first),
        Slot(f"{stack}.blk.{{}}.ffn_norm.weight", "width", only=only),
        Slot(f"{stack}.blk.{{}}.ffn_gate.weight", "inner width", only=gate),
        Slot(f"{stack}.blk.{{}}.ffn_up.weight", "inner width", only=only),
        Slot(f"{stack}.blk.{{}}.ffn_down.weight", "width inner", only=only),
    )


_EMBEDDING = Slot("token_embd.weight", "vocabulary width")
_ENCODER = (*_attention("enc", "attn"), *_feed_forward("enc"))
_DECODER_BLOCK = (
    *_attention("dec", "attn"),
    *_attention("dec", "cross_attn"),
    *_feed_forward("dec"),
)
_SHARED = "is the same matrix as 'shared.weight' in T5"
_COPIES = (("encoder.embed_tokens.", _SHARED), ("decoder.embed_tokens.", _SHARED))
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias."

_T5 = Family(
    "T5",
    ("T5ForConditionalGeneration",),
    "t5",
    (
        _EMBEDDING,
        Slot("enc.output_norm.weight", "width"),
        Slot("dec.output_norm.weight", "width", factors=_output_scale),
        Slot(OUTPUT, "vocabulary width"),
    ),
    (*_ENCODER, *_DECODER_BLOCK),
    t5_keys,
    t5_sizes,
    None,
    (),
    dropped=(*_COPIES, (_UNUSED, "is not read by transformers either")),
)
_ENCODER_ROW = Family(
    "T5 encoder (such as sentence-t5)",
    ("T5EncoderModel", "MT5EncoderModel"),
    "t5encoder",
    (_EMBEDDING, Slot("enc.output_norm.weight", "width")),
    _ENCODER,
    t5_encoder_keys,
    t5_encoder_sizes,
    None,
    (),
    dropped=(
        *_COPIES,
        ("decoder.", "belongs to the decoder, which an encoder is without"),
        ("lm_head.", "belongs to the decoder, which an encoder is without"),
    ),
    tied=True,
)


def _in_each_block(family: Family) -> tuple[Slot, ...]:
    """Its blocks, each with a bias by distance of its own."""
    only = {"enc": _in_encoder, "dec": _in_decoder}
    return tuple(
        replace(s, only=only[s.name[:3]]) if "rel_b" in s.name else s for s in family.block
    )


ROWS = (
    _T5,
    replace(
        _T5,
        name="MT5",
        classes=("MT5ForConditionalGeneration",),
        whole=tuple(replace(s, factors=None) for s in _T5.whole),
    ),
    _ENCODER_ROW,
    replace(_T5, name="UMT5", classes=("UMT5ForConditionalGeneration",), block=_in_each_block(_T5)),
    replace(
        _ENCODER_ROW,
        name="UMT5 encoder",
        classes=("UMT5EncoderModel",),
        block=_in_each_block(_ENCODER_ROW),
    ),
)

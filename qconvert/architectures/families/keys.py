"""Sizes, hyper-parameters and windows that architectures share, from the configuration.

Facts are llama.cpp's: what its loaders read, and what they derive where no key says it. What cannot
be said is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.rope import Parameters, Rope, Scalings, read_rope, settled
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
    """Dimensions of the tensors of one model, by the names that a slot's shape uses.

    Attributes:
        blocks: number of blocks.
        head_dim: width of a head.
        named: dimensions.
        by_block: those that differ from block to block.
        further: layers after the blocks that predict further tokens.
    """

    blocks: int
    head_dim: int
    named: dict[str, int]
    by_block: dict[str, tuple[int, ...]] = field(default_factory=dict)
    further: int = 0

    def with_further(self) -> Sizes:
        """The same model with a layer that predicts a further token."""
        return replace(self, further=1, named=self.named | {"both_widths": 2 * self.named["width"]})

    def shape(self, names: str, block: int | None = None) -> tuple[int, ...]:
        """The dimensions of these names; numbers stand for themselves."""
        return tuple(
            int(name)
            if name.isdecimal()
            else self.by_block[name][block]
            if block is not None and name in self.by_block
            else self.named[name]
            for name in names.split()
        )


# A soft cap of so many leaves every logit as it is, bit for bit: a power of two far above them.
NO_CAP = 2.0**64

SILU = ("silu", "swish")
# ggml has one GELU, the approximation by tanh, from a table of binary16 that is further from either
# than they are from each other.
GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")


def plain_sizes(
    config: Config,
    called: Mapping[str, str] = MappingProxyType({}),
    /,
    *,
    grouped: bool = True,
    blocks: int | None = None,
    groups: int | None = None,
    inner: int | None = None,
    context: int | None = None,
    **more: int,
) -> Sizes:
    """Dimensions that every architecture has; ``grouped`` if queries may share keys.

    ``blocks``, ``groups`` of queries with the same keys, the ``inner`` width and the ``context``
    are what fields of every class say, if not given; ``called`` has their names where a class has
    others.

    Raises:
        FormatError: they contradict each other.
    """

    def own(name: str) -> str:
        return called.get(name, name)

    width, heads = config.count(own("hidden_size")), config.count(own("num_attention_heads"))
    if groups is None:
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
    if inner is None:
        none = config.known is not None and "intermediate_size" not in config.known.fields
        inner = more["expert_inner"] if none else config.count("intermediate_size")
    return Sizes(
        blocks=blocks or config.count(own("num_hidden_layers"), most=MAX_BLOCKS),
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
            "context": context or config.count(own("max_position_embeddings")),
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


OLDER_WIDTH = "n_embed"  # counts before hidden_size, in classes that read it


def width_field(config: Config) -> str:
    """The field that is the width of a model whose class reads `OLDER_WIDTH`."""
    return "hidden_size" if config.stated(OLDER_WIDTH) is None else OLDER_WIDTH


def filled_sizes(config: Config) -> Sizes:
    """Sizes where llama.cpp's loader takes no other width of heads."""
    sizes = plain_sizes(config)
    if sizes.named["query"] != sizes.named["width"]:
        raise config.unlike("head_dim", "hidden_size / num_attention_heads")
    return sizes


def common_keys(config: Config, sizes: Sizes) -> Keys:
    more: Keys = {"nextn_predict_layers": sizes.further} if sizes.further else {}
    return more | {
        "context_length": sizes.named["context"],
        "embedding_length": sizes.named["width"],
        "block_count": sizes.blocks + sizes.further,
        "feed_forward_length": sizes.named["inner"],
        "attention.head_count": sizes.named["query"] // sizes.head_dim,
        "attention.head_count_kv": sizes.named["key"] // sizes.head_dim,
    }


def decoder_keys(
    config: Config, sizes: Sizes, epsilon: str | float = "rms_norm_eps", *, mean: bool = False
) -> Keys:
    """Keys of every decoder.

    Args:
        config, sizes: of the model.
        epsilon: field of the norms' smallest divisor, or itself where no field says it.
        mean: whether norms take the mean away (LayerNorm).
    """
    # transformers makes masks of the first field whatever the class (null counts as false there),
    # and its cache goes by the others.
    config.require("is_causal", (True,), True)
    if config.known is None or "attention_chunk_size" not in config.known.fields:
        config.require("attention_chunk_size", (None,))
    declared = config.known and "layer_types" in config.known.fields
    if not declared and any(layer_types(config, sizes, [])):
        raise config.unlike("layer_types", f"'{FULL}'")
    least = config.number(epsilon, zero=True) if isinstance(epsilon, str) else epsilon
    return common_keys(config, sizes) | {
        f"attention.layer_norm_{'' if mean else 'rms_'}epsilon": least,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "vocab_size": sizes.named["vocabulary"],
    }


def rotary(scalings: Scalings) -> Callable[[Config, Sizes], Rope]:
    """Rotary positions of an architecture that rotates whole heads."""

    def rope(config: Config, sizes: Sizes) -> Rope:
        return read_rope(settled(config, scalings), sizes.head_dim, scalings)

    return rope


def partial_rotary(scalings: Scalings, whole: float) -> Callable[[Config, Sizes], Rope]:
    """The same for one that rotates a part of each head, ``whole`` if no field says which."""
    scalings = replace(scalings, whole=whole)

    def rope(config: Config, sizes: Sizes) -> Rope:
        parameters = settled(config, scalings)
        return read_rope(parameters, rotated(parameters, sizes.head_dim), scalings)

    return rope


def rotated(parameters: Parameters, head_dim: int) -> int:
    """How many dimensions of a head are rotated.

    Raises:
        FormatError: none, an odd number, or more than there are.
    """
    found = int(head_dim * min(parameters.part, MAX_HEAD))
    if found % 2 or not 0 < found <= head_dim:
        raise parameters.fields.wrong(
            "partial_rotary_factor", f"an even number of {head_dim} dimensions, not {found}"
        )
    return found


def expert_sizes(config: Config, experts: str, inner: str, **more: int) -> Sizes:
    """`plain_sizes`, with experts.

    Args:
        experts: the field that counts them.
        inner: that of their inner width.
    """
    each = config.count(inner)
    return plain_sizes(
        config,
        grouped=True,
        experts=config.count(experts, most=MAX_EXPERTS),
        expert_inner=each,
        expert_gate_up=2 * each,
        **more,
    )


def expert_keys(config: Config, sizes: Sizes, field: str = "num_experts_per_tok") -> Keys:
    used = config.count(field)
    if used > sizes.named["experts"]:
        raise FormatError(
            "more experts are used than there are",
            path=config.path,
            found=f"{used} of {sizes.named['experts']}",
            code="ARCH-EXPERTS",
        )
    return {"expert_count": sizes.named["experts"], "expert_used_count": used}


def experts_everywhere(config: Config, sizes: Sizes) -> None:
    """Refuse layers without experts, which llama.cpp does not have here."""
    if config.count("decoder_sparse_step", 1) > 1:
        raise config.unlike("decoder_sparse_step", "1")
    plain = config.get("mlp_only_layers") or ()
    if any(layer in plain for layer in range(sizes.blocks)):
        raise config.unlike("mlp_only_layers", "no layer")


_GATING = {"softmax": 1, "sigmoid": 2}  # llama.cpp's numbers


def routed_keys(
    config: Config, sizes: Sizes, gating: str, *, scale: float = 1.0, norm: bool = True
) -> Keys:
    """Keys of experts that a router chooses.

    Args:
        config, sizes: of the model.
        gating: what makes weights of the router's outputs.
        scale: that these are multiplied by.
        norm: whether they are divided by their sum.
    """
    return expert_keys(config, sizes) | {
        "expert_feed_forward_length": sizes.named["expert_inner"],
        "expert_gating_func": _GATING[gating],
        "expert_weights_scale": scale,
        "expert_weights_norm": norm,
    }


def group_keys(config: Config, sizes: Sizes) -> Keys:
    """Experts that are chosen from some of several groups; none where all groups are taken."""
    groups, used = config.count("n_group", 1), config.count("topk_group", 1)
    if used > groups or sizes.named["experts"] % groups:
        raise FormatError(
            "groups of experts are not those that there can be",
            path=config.path,
            found=f"{used} of {groups} groups, {sizes.named['experts']} experts",
            code="ARCH-EXPERTS",
        )
    if used == groups:
        return {}
    each = sizes.named["experts"] // groups
    if each < 2 or config.count("num_experts_per_tok") > each * used:
        raise config.unlike("n_group", "groups of at least two experts, enough of them")
    return {"expert_group_count": groups, "expert_group_used_count": used}


def leading_blocks(config: Config, blocks: int) -> int:
    """How many blocks have no experts: those before all others.

    ``mlp_layer_types`` says it where it is there, else ``first_k_dense_replace``; the first one
    alone has none in a class without that field.

    Raises:
        UnsupportedError: blocks without experts after others, or none with them.
        FormatError: the number is none that there can be.
    """
    types = config.get("mlp_layer_types")
    if types is not None:
        dense = types.index("sparse") if "sparse" in types else len(types)
        if len(types) != blocks or types != ["dense"] * dense + ["sparse"] * (blocks - dense):
            raise config.unlike("mlp_layer_types", "'dense' layers, then 'sparse' ones")
        if dense == blocks:
            raise config.unlike("mlp_layer_types", "'sparse' for one layer at least")
        return int(dense)
    if config.known and "first_k_dense_replace" not in config.known.fields:
        return 1
    found = config.get("first_k_dense_replace")
    if type(found) is not int or not 0 <= found < blocks:
        raise config.wrong("first_k_dense_replace", f"an integer from 0 to {blocks - 1}")
    return found


# --- windows ---

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: Config, sizes: Sizes, usual: list[bool]) -> list[bool]:
    """Which layers look at a window only: as ``layer_types`` says, else as usual.

    Raises:
        FormatError: it is not one of both for each layer.
    """
    # transformers still takes the older name of full ones
    stated = two_kinds(config, sizes, SLIDING, older="attention")
    return usual if stated is None else stated


def two_kinds(
    config: Config, sizes: Sizes, other: str, older: str | None = None
) -> list[bool] | None:
    """Which layers ``layer_types`` says to be of another kind than full attention; None where it
    says nothing.

    Args:
        other: its name.
        older: one more name of full attention.

    Raises:
        FormatError: it is not one of both for each layer.
    """
    types = config.get("layer_types")
    if types is None:
        return None
    names = (FULL, other) if older is None else (FULL, other, older)
    if (
        not isinstance(types, list)
        or len(types) != sizes.blocks
        or any(t not in names for t in types)
    ):
        raise config.wrong(
            "layer_types", f"'{FULL}' or '{other}' for each of {sizes.blocks} layers"
        )
    return [t == other for t in types]


def every_nth_full(sizes: Sizes, n: int) -> list[bool]:
    """Windows in all layers but each so manieth."""
    return [bool((i + 1) % n) for i in range(sizes.blocks)]


def window_keys(config: Config, sliding: list[bool], field: str = "sliding_window") -> Keys:
    """A window, and which layers have it; llama.cpp ends its process where none does."""
    if not any(sliding):
        raise config.unlike("layer_types", f"'{SLIDING}' for one layer at least")
    return {
        "attention.sliding_window": config.count(field),
        "attention.sliding_window_pattern": GgufValue("BOOL", sliding),
    }


def plain_window(config: Config, sizes: Sizes) -> int | None:
    """A window that all layers have; None if the context is no longer."""
    window = config.optional_count("sliding_window")
    return window if window is not None and window < sizes.named["context"] else None

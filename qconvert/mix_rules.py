"""Which ggml type each tensor of a GGUF model gets under a mix: llama-quantize's rules.

The choice depends on a tensor's name, on its place among its like and on a few numbers of the
model; rows that do not divide into blocks fall back to a type with smaller blocks. The rules are
those of llama.cpp at 0c1e57098 (``src/llama-quant.cpp``, and ``conversion/base.py`` for what stays
F32), held to it by ``tests/mixes.json``.

On purpose it differs where llama-quantize ignores an option or cannot go on: ``--tensor-type`` wins
over everything, on unquantized targets too; ``--output-tensor-type`` reaches the token embedding
that serves as output under ``--pure`` as well; explicit types fall back like chosen ones; and
``--pure`` refuses rows that do not divide instead of quietly choosing another type. Targets F32,
F16 and BF16 cast what is kept, as the converter does. Rules for single architectures that nothing
here converts (glm5-next, bailingmoe3) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qconvert.errors import UnsupportedError, UsageError
from qconvert.ggml_types import CASTS
from qconvert.mixes import TENSOR_TYPES, MixOptions, ModelFacts
from qconvert.model import DTYPES, TensorInfo

# What takes the place of a type whose blocks do not divide a row; then F16. Of Q1_0 llama-quantize
# knows none.
_SMALLER_BLOCKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q1_0": "Q4_0",
    "Q2_0": "Q4_0",
}


@dataclass(frozen=True, slots=True)
class Assigned:
    """The type of a tensor.

    Attributes:
        ggml_type: a name of `TENSOR_TYPES`, or the source's dtype for a tensor that is kept.
        reason: why, for people.
        quantizable: False for tensors that no option quantizes (norms, biases, routers ...).
        fell_back: whether the shape forced another type than was wanted.
    """

    ggml_type: str
    reason: str
    quantizable: bool = True
    fell_back: bool = False


def assign_types(
    tensors: Sequence[TensorInfo], facts: ModelFacts, options: MixOptions
) -> list[Assigned]:
    """The type of each tensor, in the order given.

    Args:
        tensors: all tensors of the model, with their GGUF names; shapes outermost dimension first.
            The result does not depend on their order.
        facts: of the same model.
        options: what the user asked for.

    Raises:
        UsageError: a ``--tensor-type`` that applies to no tensor.
        UnsupportedError: rows that do not divide and may not fall back, or a name whose layer is
            not in the model.
    """
    chooser = _Chooser(tensors, facts, options)
    # Rules count tensors in llama.cpp's order: by layer, then by name.
    order = sorted(range(len(tensors)), key=lambda i: _llama_order(tensors[i].name))
    assigned = {i: chooser.assign(tensors[i]) for i in order}
    chooser.check_used()
    return [assigned[i] for i in range(len(tensors))]


def _llama_order(name: str) -> tuple[int, bytes]:
    return _layer(name), name.encode()


def _layer(name: str) -> int:
    """The layer that a name belongs to, -1 for none."""
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1


# What is never quantized: too small to matter, or read by code that wants floats.
_KEPT_PARTS = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")

# Of those, what the converter stores as F32 whatever it stores the rest as.
_FLOAT32_NAMES = re.compile(
    r"""(position_embd | token_types | [va]\.position_embd | posnet\.\d+\.norm[12]
      | blk\.\d+\.( ffn_gate_inp(_shexp)? | ssm_conv1d(_[qkv])? | shortconv\.conv | indexer\.proj
                  | altup_(correct|predict)_coef
                  | time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused) )
        )\.weight""",
    re.VERBOSE,
)


# What the graphs of single projectors want. Gemma 3's turns its last matrix round, which ggml does
# with no quantized type; llama-quantize does not know that, the converter does.
_OF_PROJECTORS = {
    "gemma3": {"v.patch_embd.weight": "F32", "mm.input_projection.weight": "F16"},
    "idefics3": {"v.patch_embd.weight": "F32"},
}
_OF_PIXELS = (".patch_embd.weight", ".patch_merger.weight")


def _of_projector(tensor: TensorInfo, facts: ModelFacts, base: str) -> str | None:
    """The type that llama.cpp's converter gives a tensor of a projector's file whatever it gives
    others; None where it is one of these.
    """
    if not facts.projector:
        return None
    own = _OF_PROJECTORS.get(facts.projector, {}).get(tensor.name)
    if own is None and any(part in tensor.name for part in _OF_PIXELS):
        return "F16" if base == "F16" else "F32"
    return own


def _kept(tensor: TensorInfo) -> str | None:
    """Why a tensor is not quantized; None if it can be."""
    name = tensor.name
    if _is_plain_integer(tensor):
        return "integers are kept"
    # To ggml a matrix of a single row has one dimension.
    if not any(length > 1 for length in tensor.shape[:-1]):
        return "one-dimensional tensors are kept"
    if not name.endswith("weight"):
        return "only weights are quantized"
    if name in _KEPT_NAMES or any(part in name for part in _KEPT_PARTS):
        return "norms, routers, positions and small matrices are kept"
    return None


def _is_plain_integer(tensor: TensorInfo) -> bool:
    return tensor.dtype in DTYPES and not tensor.floating


def _must_be_float32(tensor: TensorInfo) -> bool:
    """Whether converters store the tensor as F32 even when they store weights in 16 bits."""
    return (
        len(tensor.shape) <= 1
        or tensor.name.endswith("_norm.weight")
        or not tensor.name.endswith(".weight")
        or _FLOAT32_NAMES.fullmatch(tensor.name) is not None
    )


_CATEGORIES = (
    # The first that occurs in a name decides; a fused matrix is treated as its value part.
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "other"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "other"),
    ("ffn_gate", "other"),
    ("ffn_down", "ffn_down"),
)


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


def _more_bits(index: int, count: int) -> bool:
    """Whether the ``index``-th of ``count`` is among the first or last eighth, or a third of the
    rest.
    """
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


class _Chooser:
    """The rules, and the counts that they need; tensors must come in llama.cpp's order."""

    def __init__(
        self, tensors: Sequence[TensorInfo], facts: ModelFacts, options: MixOptions
    ) -> None:
        self._facts = facts
        self._options = options
        self._mix = options.mix
        categories = [_category(t.name) for t in tensors]
        self._tied = "output" not in categories
        self._attn_v_count = categories.count("attn_v")
        self._attn_v_seen = 0
        self._ffn_down_seen = 0
        self._base_reason = f"base type of {options.mix.name}"
        self._unused = dict.fromkeys(options.tensor_types)

    def assign(self, tensor: TensorInfo) -> Assigned:
        own = _of_projector(tensor, self._facts, self._mix.base)
        if own is not None:
            return Assigned(own, "what llama.cpp computes with it takes this", quantizable=False)
        why_kept = _kept(tensor)
        if why_kept is not None:
            return self._keep(tensor, why_kept)
        wanted, reason = self._wanted(tensor)
        return self._fitted(tensor, wanted, reason)

    def check_used(self) -> None:
        """Refuse a ``--tensor-type`` that decided nothing."""
        for rule in self._unused:
            raise UsageError(
                f"{rule} applies to no tensor",
                hint="names are GGUF's, such as blk.0.ffn_down.weight; norms and one-dimensional "
                "tensors are never quantized; the first of several that match wins",
            )

    def _keep(self, tensor: TensorInfo, why: str) -> Assigned:
        if _is_plain_integer(tensor):
            return Assigned(tensor.dtype, why, quantizable=False)
        if _must_be_float32(tensor):
            return Assigned("F32", why, quantizable=False)
        if self._mix.base in CASTS:  # as the converter that writes a whole file in this type
            return Assigned(self._mix.base, self._base_reason, quantizable=False)
        return Assigned(
            tensor.dtype if tensor.dtype in TENSOR_TYPES else "F32", why, quantizable=False
        )

    def _wanted(self, tensor: TensorInfo) -> tuple[str, str]:
        """The type before its blocks are held against the shape."""
        options, category = self._options, _category(tensor.name)
        for named in options.tensor_types:
            if named.pattern.search(tensor.name):
                self._unused.pop(named, None)
                return named.ggml_type, str(named)
        if category == "token_embd" and options.token_embedding_type:
            chosen = options.token_embedding_type
            return chosen, f"--token-embedding-type {chosen.lower()}"
        is_output = category == "output" or (category == "token_embd" and self._tied)
        if is_output and options.output_type:
            tied = "" if category == "output" else ": there is no output matrix"
            return options.output_type, f"--output-tensor-type {options.output_type.lower()}{tied}"
        base = self._mix.base, self._base_reason
        if options.pure or self._mix.uniform or self._mix.base in CASTS:
            return base
        rule = self._rule(category, is_output=is_output)
        chosen, what = rule(tensor) if rule else base
        if chosen == self._mix.base:
            return base
        return chosen, f"{self._mix.name} gives more bits to {what}"

    def _rule(
        self, category: str, *, is_output: bool
    ) -> Callable[[TensorInfo], tuple[str, str]] | None:
        if is_output:
            return self._output
        if self._mix.name == "mxfp4_moe":
            return self._mxfp4_moe
        return {
            "token_embd": self._token_embd,
            "attn_v": self._attn_v,
            "attn_k": self._attn_k,
            "attn_output": self._attn_output,
            "ffn_down": self._ffn_down,
        }.get(category)

    def _fitted(self, tensor: TensorInfo, wanted: str, reason: str) -> Assigned:
        """``wanted``, or what replaces it where rows do not divide into its blocks."""
        row = tensor.shape[-1]
        block = TENSOR_TYPES[wanted].block
        if row % block == 0:
            return Assigned(wanted, reason)
        options = self._options
        if options.pure or not options.fallback:
            raise UnsupportedError(
                f"rows do not divide into blocks of {wanted}",
                tensor=tensor.name,
                found=f"{row} values",
                wanted=f"a multiple of {block}",
                hint=("leave out --pure" if options.pure else "allow fallback types")
                + f", or add --tensor-type '{re.escape(tensor.name)}=f16'",
            )
        fallback = _SMALLER_BLOCKS.get(wanted, wanted)
        if row % TENSOR_TYPES[fallback].block:
            fallback = "F16"
        return Assigned(
            fallback,
            f"rows of {row} values do not divide by {block}: {wanted} becomes {fallback} "
            f"({reason})",
            fell_back=True,
        )

    # One rule a category: the type, and what it is given to where that is not the base type.

    def _output(self, tensor: TensorInfo) -> tuple[str, str]:
        many = self._mix.name in ("q8_0", "mxfp4_moe") or self._facts.architecture == "falcon"
        embedding = "the token embedding, as there is no output matrix"
        return "Q8_0" if many else "Q6_K", embedding if self._tied else "the output"

    def _mxfp4_moe(self, tensor: TensorInfo) -> tuple[str, str]:
        experts = len(tensor.shape) >= 3 and tensor.shape[-3] > 1
        return "MXFP4" if experts else "Q8_0", "all but experts"

    def _token_embd(self, tensor: TensorInfo) -> tuple[str, str]:
        ternary = self._mix.name in ("tq1_0", "tq2_0", "q2_0")
        return "Q4_K" if ternary else self._mix.base, "the token embedding"

    def _attn_v(self, tensor: TensorInfo) -> tuple[str, str]:
        name, facts = self._mix.name, self._facts
        index, count = self._attn_v_seen, self._attn_v_count
        self._attn_v_seen += 1
        if facts.n_expert == 8:
            return "Q8_0", "attention values, which are small beside 8 experts"
        chosen = self._mix.base
        if name == "q2_k":
            chosen = "Q4_K" if facts.n_gqa >= 4 else "Q3_K"
        elif name == "q3_k_m":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        elif name == "q3_k_l" or (name in ("iq4_nl", "iq4_xs") and facts.n_gqa >= 4):
            chosen = "Q5_K"
        elif name in ("q4_k_m", "q5_k_m") and _more_bits(index, count):
            chosen = "Q6_K"
        elif name == "q4_k_s" and index < 4:
            chosen = "Q5_K"
        if facts.is_70b and chosen in ("Q3_K", "Q4_K"):
            return "Q5_K", "attention values, which are small in a 70B model"
        return chosen, f"attention values ({index + 1} of {count})"

    def _attn_k(self, tensor: TensorInfo) -> tuple[str, str]:
        chosen = "Q8_0" if self._facts.n_expert == 8 else self._mix.base
        return chosen, "attention keys, which are small beside 8 experts"

    def _attn_output(self, tensor: TensorInfo) -> tuple[str, str]:
        more = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
        if self._facts.architecture == "falcon":
            more = {"q3_k_l": "Q4_K"}
        elif self._facts.n_expert == 8:
            small = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
            more = dict.fromkeys(small, "Q5_K")
        return more.get(self._mix.name, self._mix.base), "the attention output"

    def _ffn_down(self, tensor: TensorInfo) -> tuple[str, str]:
        name, facts, options = self._mix.name, self._facts, self._options
        falcon = facts.architecture == "falcon"
        layer, count = self._ffn_down_seen, facts.n_layer
        self._ffn_down_seen += 1
        if facts.n_expert > 1:  # a layer has several down projections
            layer = _layer(tensor.name)
            if not 0 <= layer < count:
                raise UnsupportedError(
                    "the tensor's layer is not in the model",
                    tensor=tensor.name,
                    wanted=f"blk.0 to blk.{count - 1}",
                )
        more, first = _more_bits(layer, count), layer < count // 8
        chosen = self._mix.base
        if name == "q2_k":
            chosen = "Q3_K"
        elif name == "q3_k_m":
            if layer < count // 16:
                chosen = "Q5_K"
            elif more or not falcon:
                chosen = "Q4_K"
        elif name == "q3_k_l":
            chosen = "Q4_K" if falcon else "Q5_K"
        elif name == "q4_k_m" and falcon:
            chosen = "Q6_K" if layer < count // 16 else "Q5_K" if more else "Q4_K"
        elif name in ("q4_k_m", "q5_k_m") and more:
            chosen = "Q6_K"
        elif (name == "q4_k_s" and first and not falcon) or (
            name in ("iq4_nl", "iq4_xs") and first and not options.has_imatrix
        ):
            chosen = "Q5_K"
        elif name in ("q4_0", "q5_0") and first and options.has_imatrix:
            chosen = {"q4_0": "Q4_1", "q5_0": "Q5_1"}[name]
        return chosen, f"down projections ({layer + 1} of {count})"

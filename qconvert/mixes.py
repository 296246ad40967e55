"""The ggml types and mixes that a user may name for a GGUF file, and how they are asked for.

A mix such as ``q4_k_m`` has a base type and rules that spend more bits where errors cost most; the
rules are in `qconvert.mix_rules`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from qconvert.errors import UsageError
from qconvert.ggml_types import CASTS, GGML_TYPES

# The types that a tensor can be given.
TENSOR_TYPES = {t.name: t for t in GGML_TYPES.values() if t.written or t.name in CASTS}


@dataclass(frozen=True, slots=True)
class Mix:
    """A target that a user may name.

    Attributes:
        name: as on the command line.
        base: the ggml type of tensors that no rule singles out.
        file_type: the value of ``general.file_type`` (llama.cpp's LlamaFileType).
        uniform: no rules, as under ``--pure``, but with fallback types.
    """

    name: str
    base: str
    file_type: int
    uniform: bool = False


MIXES = {
    mix.name: mix
    for mix in (
        Mix("q2_k", "Q2_K", 10),
        Mix("q3_k_s", "Q3_K", 11),
        Mix("q3_k_m", "Q3_K", 12),
        Mix("q3_k_l", "Q3_K", 13),
        Mix("q4_k_s", "Q4_K", 14),
        Mix("q4_k_m", "Q4_K", 15),
        Mix("q5_k_s", "Q5_K", 16),
        Mix("q5_k_m", "Q5_K", 17),
        Mix("q6_k", "Q6_K", 18),
        Mix("q4_0", "Q4_0", 2),
        Mix("q4_1", "Q4_1", 3),
        Mix("q5_0", "Q5_0", 8),
        Mix("q5_1", "Q5_1", 9),
        Mix("q8_0", "Q8_0", 7),
        Mix("iq4_nl", "IQ4_NL", 25),
        Mix("iq4_xs", "IQ4_XS", 30),
        Mix("tq1_0", "TQ1_0", 36),
        Mix("tq2_0", "TQ2_0", 37),
        Mix("q1_0", "Q1_0", 40),
        Mix("q2_0", "Q2_0", 41),
        Mix("mxfp4_moe", "MXFP4", 38),
        # llama-quantize has only the mix above, which leaves a dense model without any MXFP4.
        Mix("mxfp4", "MXFP4", 38, uniform=True),
        Mix("nvfp4", "NVFP4", 39, uniform=True),  # llama-quantize does not write it
        Mix("f16", "F16", 1),
        Mix("bf16", "BF16", 32),
        Mix("f32", "F32", 0),
    )
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


@dataclass(frozen=True, slots=True)
class TensorTypeRule:
    """``--tensor-type REGEX=TYPE``: tensors in whose name the expression is found get the type.

    Attributes:
        option: as the user put it, where that was another option.
    """

    pattern: re.Pattern[str]
    ggml_type: str
    option: str | None = None

    def __str__(self) -> str:
        return self.option or f"--tensor-type '{self.pattern.pattern}={self.ggml_type.lower()}'"


@dataclass(frozen=True, slots=True)
class MixOptions:
    """What the user asked for.

    Attributes:
        mix: the target.
        pure: every quantizable tensor gets the base type, and one that cannot is refused.
        fallback: whether a tensor whose rows do not divide may get another type.
        output_type: ggml type of ``output.weight``, or of the token embedding that takes its place.
        token_embedding_type: ggml type of the token embedding.
        tensor_types: the first rule that matches a tensor wins over everything else.
        has_imatrix: whether an importance matrix will be used.
    """

    mix: Mix
    pure: bool = False
    fallback: bool = True
    output_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[TensorTypeRule, ...] = ()
    has_imatrix: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask about a model; in GGUF the keys of its architecture.

    Attributes:
        architecture: ``general.architecture``.
        n_layer: ``block_count``.
        n_head: ``attention.head_count``, of the first layer where they differ.
        n_head_kv: ``attention.head_count_kv``, likewise; ``n_head`` where the key is absent.
        n_expert: ``expert_count``, else 0.
        projector: ``clip.projector_type`` of a file that turns images into tokens, else nothing.
    """

    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    projector: str = ""

    @property
    def n_gqa(self) -> int:
        """Query heads that share a key and value head."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes the model for one of its 70B class, whose attn_v are small."""
        if self.architecture in ("llama", "llama-embed"):
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return self.n_layer == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(
            self.architecture
        )


def parse_mix(text: str) -> Mix:
    """The mix or plain type of that name, case ignored.

    Raises:
        UsageError: no such name; gives the nearest ones.
    """
    name = text.strip().lower()
    name = ALIASES.get(name, name)
    if name not in MIXES:
        raise _unknown("GGUF type", text, MIXES)
    return MIXES[name]


def parse_ggml_type(text: str) -> str:
    """The ggml type of that name as in `TENSOR_TYPES`, case ignored.

    Raises:
        UsageError: no such type; gives the nearest ones.
    """
    name = text.strip().upper()
    if name not in TENSOR_TYPES:
        raise _unknown("tensor type", text, [n.lower() for n in TENSOR_TYPES])
    return name


def parse_tensor_type(text: str) -> TensorTypeRule:
    """``REGEX=TYPE``; what follows the last ``=`` is the type, case is ignored in both.

    Raises:
        UsageError: no ``=``, no expression, one that does not compile, or an unknown type.
    """
    expression, equals, name = text.rpartition("=")
    if not equals or not expression:
        raise UsageError(
            f"--tensor-type '{text}'",
            wanted="REGEX=TYPE",
            hint="such as --tensor-type 'ffn_down=q6_k'",
        )
    try:
        pattern = re.compile(expression, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as e:
        raise UsageError(f"--tensor-type '{text}': not a regular expression: {e}") from e
    return TensorTypeRule(pattern, parse_ggml_type(name))


def _unknown(what: str, text: str, names: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(text.strip().lower(), list(names), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return UsageError(f"unknown {what} '{text}'", hint=hint)

"""Which tensor gets which scheme, and why: from names, shapes and dtypes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase, translate

from qconvert.codecs import codec_of
from qconvert.codecs.codec import Encoding
from qconvert.codecs.ggml_blocks import encoding_of, type_of
from qconvert.containers import Container, container_for
from qconvert.errors import UsageError
from qconvert.geometry import CONVOLUTION_DIM
from qconvert.mix_rules import assign_types
from qconvert.mixes import MixOptions, ModelFacts, TensorTypeRule, parse_ggml_type
from qconvert.model import DTYPES, TensorInfo
from qconvert.schemes import TENSOR_SCHEMES, KeepScheme, Scheme, TensorScheme

MIN_VALUES = 1024  # smaller tensors: the bytes saved do not matter, the error may
BUDGETED = "chosen for the budget"
_NORM = "norm or bias by name"
_EXPONENT = "is exponentiated: its error would grow into a factor of every step"
_RECURRENT = "a parameter of the recurrence, met once by every token, and no matrix of a product"
# Ends of names of tensors that are no matrices of a product, whatever their shape, and why.
KEPT_NAMES = (
    (("bias", "norm.weight", "Norm.weight"), _NORM),
    (("A_log", "A_logs", "time_decay", "recurrent_param"), _EXPONENT),
    ((".D", ".Ds", ".time_first", ".time_faaaa"), _RECURRENT),
)
_MIXED = re.compile(r".*\.time_(maa|mix)_[^.]*")  # of RWKV: what is mixed with the token before
# Token embeddings and output head take the scheme like other matrices, but never fewer bits than
# this: every token passes through both. The sample model's perplexity rises by 2.8 % at q3_block64
# and 10.1 % at q2_block64 with this rule, by 5.0 % and 25.9 % without.
TOKEN_TABLE_BITS = 4
TOKEN_TABLES = (
    "*embed_tokens.weight",
    "*word_embeddings.weight",
    "*tok_embeddings.weight",
    "*wte.weight",
    "*token_embd.weight",
    "*embed_in.weight",
    "*embed_out.weight",
    "*lm_head.weight",
    "output.weight",
)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user asked for.

    Attributes:
        keep: globs of tensors to keep as they are.
        tensor_schemes: (glob, scheme); the first that matches wins.
        min_values: smallest tensor that is quantized unasked.
        assigned: what a budget has chosen; None keeps a tensor.
        sources: names in the source by those in the file, where the two differ: globs may be of
            either, since a user knows the names of one of them.
    """

    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, TensorScheme], ...] = ()
    min_values: int = MIN_VALUES
    assigned: Mapping[str, TensorScheme | None] = field(default_factory=dict)
    sources: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def matches(self, tensor: TensorInfo, glob: str) -> bool:
        """Whether a glob is of a tensor, by one of its names."""
        names = (tensor.name, *self.sources.get(tensor.name, ()))
        return any(fnmatchcase(name, glob) for name in names)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor with the scheme it will take (None: kept as it is) and the reason."""

    tensor: TensorInfo
    scheme: TensorScheme | None
    reason: str

    @property
    def encoding(self) -> Encoding:
        """How it will lie in the file; while something is undecided, the largest."""
        if self.scheme is None:
            return encoding_of(self.tensor.dtype)
        return codec_of(self.scheme).planned(self.scheme, self.tensor)


def make_plan(
    tensors: Sequence[TensorInfo], scheme: TensorScheme, options: PlanOptions
) -> tuple[PlannedTensor, ...]:
    """Plan every tensor, in order.

    Args:
        scheme: for every tensor that nothing else is said about.

    Raises:
        UsageError: a glob matches no tensor.
    """
    _check_globs(tensors, options)
    return tuple(_plan_one(t, scheme, options) for t in tensors)


def check_schemes(schemes: Iterable[Scheme], container: Container) -> None:
    """Refuse schemes that do not go into the container.

    Raises:
        UsageError: names the first one.
    """
    for scheme in schemes:
        if scheme.family not in (*container.takes, KeepScheme.family):
            other = container_for(scheme.family)
            hint = f"write a {other.suffix} file with -o NAME{other.suffix}"
            if other.directory:
                hint = f"write a directory with --format {other.name}"
            raise UsageError(
                f"scheme {scheme.name} does not go into {container.article}",
                hint=f"{hint}, or choose another scheme",
            )


def plan_mix(
    tensors: Sequence[TensorInfo], options: PlanOptions, mix: MixOptions, facts: ModelFacts
) -> tuple[tuple[PlannedTensor, ...], int]:
    """Plan the tensors of a model that llama.cpp knows, by the rules of a mix.

    Args:
        options: what is kept and which tensors take another type; these go before the rules.

    Returns:
        The plan, and how many tensors took another type because of their shape.

    Raises:
        UsageError: a glob or expression matches no tensor.
        UnsupportedError: see `assign_types`.
    """
    _check_globs(tensors, options)
    rules = [_rule(tensors, options, *asked) for asked in options.tensor_schemes]
    mix = replace(mix, tensor_types=(*rules, *mix.tensor_types))
    assigned = assign_types(tensors, facts, mix)
    planned = []
    for tensor, found in zip(tensors, assigned, strict=True):
        kept = next((g for g in options.keep if options.matches(tensor, g)), None)
        if kept is not None:
            planned.append(PlannedTensor(tensor, None, f"--keep '{kept}'"))
            continue
        if tensor.name in options.assigned:
            planned.append(PlannedTensor(tensor, options.assigned[tensor.name], BUDGETED))
            continue
        scheme = TENSOR_SCHEMES.get(found.ggml_type.lower())
        if scheme is None or found.ggml_type == type_of(tensor.dtype):
            plain = tensor.dtype in DTYPES
            reason = found.reason if plain else f"is {tensor.dtype} already"
            planned.append(PlannedTensor(tensor, None, reason))
            continue
        planned.append(PlannedTensor(tensor, scheme, found.reason))
    pairs = zip(tensors, assigned, strict=True)
    return tuple(planned), sum(a.fell_back for t, a in pairs if t.name not in options.assigned)


def _rule(
    tensors: Sequence[TensorInfo], options: PlanOptions, glob: str, scheme: TensorScheme
) -> TensorTypeRule:
    """A glob as a rule of a mix, whose expressions know the names of the file alone."""
    others = [t for t in tensors if not fnmatchcase(t.name, glob) and options.matches(t, glob)]
    meant = [rf"\A{translate(glob)}", *(rf"\A{re.escape(t.name)}\Z" for t in others)]
    pattern = re.compile("|".join(meant))
    option = f"--tensor-scheme '{glob}={scheme.name}'"
    return TensorTypeRule(pattern, parse_ggml_type(scheme.name), option)


def _check_globs(tensors: Sequence[TensorInfo], options: PlanOptions) -> None:
    for glob in (*options.keep, *(g for g, _ in options.tensor_schemes)):
        if not any(options.matches(t, glob) for t in tensors):
            raise UsageError(
                f"no tensor matches '{glob}'",
                hint="qconvert inspect MODEL lists names; a tensor that the output does without, "
                "such as a head that is tied, cannot be named",
            )


def _plan_one(tensor: TensorInfo, scheme: TensorScheme, options: PlanOptions) -> PlannedTensor:
    def keep(reason: str) -> PlannedTensor:
        return PlannedTensor(tensor, None, reason)

    for glob in options.keep:
        if options.matches(tensor, glob):
            return keep(f"--keep '{glob}'")
    asked = next((g for g in options.tensor_schemes if options.matches(tensor, g[0])), None)
    if not tensor.floating:
        return keep(f"{tensor.dtype} is not a floating dtype")
    if tensor.size == 0:
        return keep("empty")
    if asked:
        return _if_fitting(tensor, asked[1], f"--tensor-scheme '{asked[0]}={asked[1].name}'")
    if not scheme.for_vectors:
        if len(tensor.shape) < 2:
            return keep("fewer than two dimensions (norm, bias, scalar)")
        if (reason := no_matrix(tensor)) is not None:
            return keep(reason)
        if tensor.size < options.min_values:
            return keep(f"fewer than {options.min_values:,} values")
    if tensor.name in options.assigned:
        return PlannedTensor(tensor, options.assigned[tensor.name], BUDGETED)
    raised = scheme.at_least(TOKEN_TABLE_BITS)
    if raised != scheme and any(fnmatchcase(tensor.name, glob) for glob in TOKEN_TABLES):
        return _if_fitting(
            tensor,
            raised,
            f"token embeddings and output head take at least {TOKEN_TABLE_BITS} bits",
        )
    return _if_fitting(tensor, scheme, f"--scheme {scheme.name}")


def no_matrix(tensor: TensorInfo) -> str | None:
    """Why a tensor of two or more dimensions is no matrix of a product; None where it may be."""
    shape = tensor.shape
    reason = next((why for ends, why in KEPT_NAMES if tensor.name.endswith(ends)), None)
    if reason is None and _MIXED.fullmatch(tensor.name):
        reason = _RECURRENT
    if reason is None and len(shape) > 2 and shape[1] == 1 and shape[-1] < CONVOLUTION_DIM:
        return "kernels of a convolution for each channel by itself"
    return reason


def _if_fitting(tensor: TensorInfo, scheme: TensorScheme, reason: str) -> PlannedTensor:
    """Keep a tensor that the scheme cannot take or would not make smaller."""
    refused = codec_of(scheme).refuses(scheme, tensor)
    return PlannedTensor(tensor, scheme if refused is None else None, refused or reason)

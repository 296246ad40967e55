"""Which tensor gets which scheme, and why: from names, shapes and dtypes alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase, translate

from qconvert.encoding import AffineEncoding, stored_size
from qconvert.errors import UsageError
from qconvert.geometry import CONVOLUTION_DIM, row_length
from qconvert.mix_rules import assign_types
from qconvert.mixes import MixOptions, ModelFacts, TensorTypeRule, parse_ggml_type
from qconvert.model import DTYPES, TensorInfo
from qconvert.schemes import SCHEMES, AffineScheme, CastScheme, GgmlScheme, MixScheme, Scheme

MIN_VALUES = 1024  # smaller tensors: the bytes saved do not matter, the error may
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
CONTAINERS = {"qblk": (AffineScheme, CastScheme), "gguf": (GgmlScheme, CastScheme, MixScheme)}


TensorScheme = AffineScheme | CastScheme | GgmlScheme  # what a single tensor can take


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user asked for.

    Attributes:
        scheme: for every tensor that nothing else is said about.
        keep: globs of tensors to keep as they are.
        tensor_schemes: (glob, scheme); the first that matches wins.
        min_values: smallest tensor that is quantized unasked.
    """

    scheme: Scheme
    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, TensorScheme], ...] = ()
    min_values: int = MIN_VALUES


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor with the scheme it will take (None: kept as it is) and the reason."""

    tensor: TensorInfo
    scheme: TensorScheme | None
    reason: str


def make_plan(
    tensors: Sequence[TensorInfo], options: PlanOptions, container: str
) -> tuple[PlannedTensor, ...]:
    """Plan every tensor, in order.

    Raises:
        UsageError: a glob matches no tensor, or a scheme does not go into the container.
    """
    check_container(options, container)
    _check_globs(tensors, options)
    return tuple(_plan_one(t, options) for t in tensors)


def check_container(options: PlanOptions, container: str) -> None:
    """Refuse schemes that do not go into the container.

    Raises:
        UsageError: names the first one.
    """
    for scheme in (options.scheme, *(s for _, s in options.tensor_schemes)):
        if not isinstance(scheme, CONTAINERS[container]):
            other = "gguf" if container == "qblk" else "qblk"
            raise UsageError(
                f"scheme {scheme.name} does not go into a .{container} file",
                hint=f"write a .{other} file with -o NAME.{other}, or choose another scheme",
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
        UsageError: a glob or expression matches no tensor, or a scheme is not one of GGUF's.
        UnsupportedError: see `assign_types`.
    """
    _check_globs(tensors, options)
    rules = [_rule(glob, scheme) for glob, scheme in options.tensor_schemes]
    mix = replace(mix, tensor_types=(*rules, *mix.tensor_types))
    assigned = assign_types(tensors, facts, mix)
    planned = []
    for tensor, found in zip(tensors, assigned, strict=True):
        kept = next((g for g in options.keep if fnmatchcase(tensor.name, g)), None)
        if kept is not None:
            planned.append(PlannedTensor(tensor, None, f"--keep '{kept}'"))
            continue
        scheme = SCHEMES.get(found.ggml_type.lower())
        if scheme is None or found.ggml_type == tensor.dtype:
            plain = tensor.dtype in DTYPES
            reason = found.reason if plain else f"is {tensor.dtype} already"
            planned.append(PlannedTensor(tensor, None, reason))
            continue
        assert isinstance(scheme, CastScheme | GgmlScheme)
        planned.append(PlannedTensor(tensor, scheme, found.reason))
    return tuple(planned), sum(a.fell_back for a in assigned)


def _rule(glob: str, scheme: TensorScheme) -> TensorTypeRule:
    if isinstance(scheme, AffineScheme):
        raise UsageError(f"scheme {scheme.name} is no type of a GGUF tensor")
    pattern = re.compile(translate(glob))
    option = f"--tensor-scheme '{glob}={scheme.name}'"
    return TensorTypeRule(pattern, parse_ggml_type(scheme.name), option)


def _check_globs(tensors: Sequence[TensorInfo], options: PlanOptions) -> None:
    for glob in (*options.keep, *(g for g, _ in options.tensor_schemes)):
        if not any(fnmatchcase(t.name, glob) for t in tensors):
            raise UsageError(
                f"no tensor matches '{glob}'", hint="see the names with: qconvert inspect MODEL"
            )


def _plan_one(tensor: TensorInfo, options: PlanOptions) -> PlannedTensor:
    def keep(reason: str) -> PlannedTensor:
        return PlannedTensor(tensor, None, reason)

    for glob in options.keep:
        if fnmatchcase(tensor.name, glob):
            return keep(f"--keep '{glob}'")
    asked = next((g for g in options.tensor_schemes if fnmatchcase(tensor.name, g[0])), None)
    if not tensor.floating:
        return keep(f"{tensor.dtype} is not a floating dtype")
    if tensor.size == 0:
        return keep("empty")
    if asked:
        return _if_fitting(tensor, asked[1], f"--tensor-scheme '{asked[0]}={asked[1].name}'")
    scheme = options.scheme
    if isinstance(scheme, MixScheme):
        raise AssertionError("a mix has a planner of its own")
    if isinstance(scheme, CastScheme):
        return _if_fitting(tensor, scheme, f"--scheme {scheme.name}")
    if len(tensor.shape) < 2:
        return keep("fewer than two dimensions (norm, bias, scalar)")
    if (reason := no_matrix(tensor)) is not None:
        return keep(reason)
    if tensor.size < options.min_values:
        return keep(f"fewer than {options.min_values:,} values")
    if (
        isinstance(scheme, AffineScheme)
        and scheme.bits < TOKEN_TABLE_BITS
        and any(fnmatchcase(tensor.name, glob) for glob in TOKEN_TABLES)
    ):
        raised = scheme.with_bits(TOKEN_TABLE_BITS)
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
    if isinstance(scheme, GgmlScheme):
        columns = tensor.shape[-1] if tensor.shape else 1
        if columns % scheme.block:
            return PlannedTensor(
                tensor,
                None,
                f"rows of {columns:,} values do not divide into blocks of {scheme.block}",
            )
    if isinstance(scheme, CastScheme):
        if scheme.dtype == tensor.dtype:
            return PlannedTensor(tensor, None, f"is {tensor.dtype} already")
        return PlannedTensor(tensor, scheme, reason)
    if isinstance(scheme, AffineScheme):
        size = stored_size(encoding_of(scheme, tensor), tensor.shape)
    else:
        size = tensor.size // scheme.block * scheme.nbytes
    if size >= tensor.nbytes:
        return PlannedTensor(tensor, None, f"{scheme.name} would not make it smaller")
    return PlannedTensor(tensor, scheme, reason)


def encoding_of(
    scheme: AffineScheme, tensor: TensorInfo, scale_dtype: str | None = None
) -> AffineEncoding:
    """The encoding of a tensor; while undecided, asymmetric with F16 block scales."""
    return AffineEncoding(
        bits=scheme.bits,
        granularity=scheme.granularity,
        block=scheme.block,
        symmetric=bool(scheme.symmetric),
        scale_dtype=scale_dtype or ("F16" if scheme.block else "F32"),
        row_length=row_length(tensor.shape),
    )

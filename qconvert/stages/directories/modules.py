"""Names of modules in quantization blocks."""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.errors import UsageError
from qconvert.exchange_schemes import ExchangeScheme
from qconvert.model import WEIGHT, layer_name
from qconvert.stages.plan import PlannedTensor

HEAD = "lm_head"  # a module even where its weight is the embedding's


def quantized_modules(plan: Sequence[PlannedTensor]) -> dict[str, ExchangeScheme]:
    """Schemes of modules that have codes; others are dense, decoded ones among them."""
    return {
        layer_name(p.tensor.name): p.scheme for p in plan if isinstance(p.scheme, ExchangeScheme)
    }


def dense_modules(plan: Sequence[PlannedTensor]) -> list[str]:
    """Modules with a matrix that has no codes, sorted, and the head if it has none."""
    matrices = (p.tensor for p in plan if len(p.tensor.shape) == 2)
    found = {layer_name(t.name) for t in matrices if t.name.endswith(WEIGHT)}
    return sorted({HEAD, *found} - quantized_modules(plan).keys())


def check_parts_of_names(plan: Sequence[PlannedTensor], dense: Sequence[str]) -> None:
    """Refuse dense modules whose names are parts of those of quantized ones: readers that look for
    them in a name would leave these dense too.

    Raises:
        UsageError: names both.
    """
    quantized = quantized_modules(plan)
    together = "\n".join(quantized)
    for name in dense:
        if name in together:
            other = next(q for q in quantized if name in q)
            raise UsageError(
                "readers take the names of dense modules as parts of names",
                tensor=name + WEIGHT,
                found=f"'{other}', which is quantized",
                hint=f"keep that one too: --keep '{other}{WEIGHT}'",
            )


def one_scheme(plan: Sequence[PlannedTensor], name: str) -> ExchangeScheme:
    """The scheme of all quantized tensors.

    Raises:
        UsageError: there are several, and the format has room for one.
    """
    schemes = list(dict.fromkeys(quantized_modules(plan).values()))
    if len(schemes) > 1:
        raise UsageError(
            f"all quantized weights of a {name} directory have one scheme",
            found=" and ".join(s.name for s in schemes[:2]),
            hint="keep the others with --keep, or choose another --format",
        )
    return schemes[0]

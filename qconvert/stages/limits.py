"""A verified file against a file of limits: a check for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qconvert.errors import InputError, UsageError
from qconvert.files import OpenModel
from qconvert.files.regular import file_sha256
from qconvert.limits import Limits
from qconvert.model import TensorInfo
from qconvert.report import Check, VerifiedTensor, VerifyReport
from qconvert.report.verify import LIMIT

# What a tensor has, by the key of its limit; None where it has lost nothing or has no product.
_FIGURES: dict[str, Callable[[VerifiedTensor], float | None]] = {
    "min_sqnr_db": lambda t: t.sqnr_db,
    "max_nmse": lambda t: t.nmse,
    "min_output_sqnr_db": lambda t: t.output_sqnr_db,
}
_SAID = {
    "min_sqnr_db": "lowest SQNR, in dB",
    "max_nmse": "highest normalised squared error",
    "min_output_sqnr_db": "lowest SQNR of a product, in dB",
    "max_bytes": "most bytes",
    "max_bits_per_weight": "most bits per weight",
}


def check_limits(
    limits: Limits, tensors: Sequence[TensorInfo], *, against: bool, text: bool
) -> None:
    """Refuse, before the long work, limits that cannot be judged.

    Raises:
        UsageError: they need an option that is not there.
        InputError: a glob matches no tensor.
    """
    for key, given, option in (
        (limits.of_errors, against, "--against"),
        (limits.of_text, text, "--text"),
    ):
        if key and not given:
            raise UsageError(f"{limits.path} limits {key}, which needs {option}")
    for of in limits.tensors:
        if not any(fnmatchcase(t.name, of.glob) for t in tensors):
            raise InputError(
                "a glob of [[tensors]] matches no tensor of the file",
                path=limits.path,
                found=f"'{of.glob}'",
                hint="see the names with: qconvert inspect FILE",
            )


def tensor_checks(
    limits: Limits, model: OpenModel, rows: Sequence[VerifiedTensor]
) -> Iterator[tuple[Check, list[str], str, float]]:
    """A check for each limit on tensors, with the names of those that miss it, its key and it."""
    measured = {r.name: r for r in rows}
    for of in limits.tensors:
        found = [t for t in model.tensors if fnmatchcase(t.name, of.glob)]
        for key, limit in of.limits.items():
            figures = _figures(key, found, measured)
            least = key.startswith("min")
            missing = [n for n, f in figures.items() if not (f >= limit if least else f <= limit)]
            detail = f"'{of.glob}': {_SAID[key]}, of {len(found)} tensors"
            if key == "min_output_sqnr_db":
                inputs = sorted({r.inputs for r in measured.values() if r.inputs})
                detail += f", of {' and '.join(inputs)} inputs" if inputs else ""
            if len(missing) > 1:
                detail += f"; {len(missing)} miss it"
            if not figures:
                detail += ": nothing is lost"
            worst = (min if least else max)(figures, key=figures.__getitem__) if figures else None
            figure = None if worst is None else figures[worst]
            yield _check(key, not missing, detail, figure, limit, worst), missing, key, limit


def _figures(
    key: str, tensors: Sequence[TensorInfo], measured: Mapping[str, VerifiedTensor]
) -> dict[str, float]:
    if key == "max_bytes":
        return {t.name: float(t.nbytes) for t in tensors}
    if key == "max_bits_per_weight":
        return {t.name: 8 * t.nbytes / t.size for t in tensors if t.size}
    rows = [measured[t.name] for t in tensors if t.name in measured]
    return {r.name: f for r in rows if (f := _FIGURES[key](r)) is not None}


def file_checks(
    limits: Limits, model: OpenModel, provenance: object, report: VerifyReport, bits: float | None
) -> Iterator[Check]:
    """A check for each limit on the whole."""
    tokens, embeddings = report.token_quality, report.embedding_quality
    figures = {
        "max_bytes": float(sum(f.size for f in model.sources)),
        "max_bits_per_weight": bits,
        "max_divergence_nats": tokens.kl_mean if tokens else None,
        "max_perplexity_increase": tokens.perplexity_increase if tokens else None,
        "min_cosine": embeddings.cosine_mean if embeddings else None,
    }
    said = {
        "max_bytes": "bytes of the file",
        "max_bits_per_weight": "bits per weight of the file",
        "max_divergence_nats": "mean KL divergence of next tokens, in nats",
        "max_perplexity_increase": "increase of the perplexity, as a share",
        "min_cosine": "mean cosine of embeddings with the source's",
    }
    for key, limit in limits.file.items():
        found = figures[key]
        if found is None:  # of a model of the other kind: no doubt is a pass
            yield _check(key, False, f"{said[key]}: this model has none", None, limit)
            continue
        good = found >= limit if key.startswith("min") else found <= limit
        yield _check(key, good, said[key], found, limit)
    for key, wanted in limits.required.items():
        yield _required(key, wanted, model, provenance)


def _required(key: str, wanted: tuple[str, ...], model: OpenModel, provenance: object) -> Check:
    """Whether the file, or what it says of its making, is what is required."""
    if key == "sha256" and model.path.is_dir():
        raise InputError(
            "sha256 of [require] is of one file",
            path=model.path,
            found="a directory",
            hint="hold its files against a list with sha256sum -c; verify --manifest writes one",
        )
    found = [file_sha256(model.path)] if key == "sha256" else _noted(key, provenance)
    detail = f"{key} is what [require] says"
    if not found:
        detail = f"{key} is not recorded in the file"
        if key == "source_sha256":
            detail += ": quantize with --hash-source"
    elif sorted(found) != sorted(wanted):
        detail = f"{key} is {' '.join(found)}, where {' '.join(wanted)} is required"
    return _check("required", sorted(found) == sorted(wanted), detail)


def _noted(key: str, provenance: object) -> list[str]:
    """What a provenance, which comes from a file, says under a key of `REQUIRED`."""

    def member(of: object, name: str) -> Any:
        return of.get(name) if isinstance(of, dict) else None

    options, calibration = member(provenance, "options"), member(provenance, "calibration")
    found: list[Any] = {
        "tool": [member(provenance, "tool")],
        "scheme": [member(options, "scheme") or member(options, "budget")],
        "calibration_sha256": [member(calibration, "sha256")],
        "observer": [member(calibration, "observer")],
    }.get(key, [])
    if key.startswith("source_"):
        sources = member(provenance, "sources")
        name = key.removeprefix("source_")
        found = [member(s, name) for s in sources] if isinstance(sources, list) else []
    return [text for text in found if isinstance(text, str)]


def _check(
    key: str,
    good: bool,
    detail: str,
    worst: float | None = None,
    limit: float | None = None,
    tensor: str | None = None,
) -> Check:
    return Check(f"{LIMIT}{key}", "pass" if good else "fail", detail, worst, limit, tensor)

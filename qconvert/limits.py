"""Limits of a release, as data: what `verify --limits` holds a file against."""

from __future__ import annotations

from dataclasses import dataclass

# Keys of a `[[tensors]]` table besides its glob, and of `[file]`; all are numbers. The first part
# says which side of the number is good.
OF_TENSORS = (
    "min_sqnr_db",
    "max_nmse",
    "min_output_sqnr_db",
    "max_bytes",
    "max_bits_per_weight",
)
OF_FILE = (
    "max_bytes",
    "max_bits_per_weight",
    "max_divergence_nats",
    "max_perplexity_increase",
    "min_cosine",
)
# Keys of `[require]`, all texts: the digest of the file, and what it says of its making; those of
# sources may be lists.
REQUIRED = (
    *("sha256", "tool", "scheme"),
    *("source_sha256", "source_header_sha256", "calibration_sha256", "observer"),
)
OF_TEXT = ("max_divergence_nats", "max_perplexity_increase", "min_cosine")
OF_ERRORS = ("min_sqnr_db", "max_nmse", "min_output_sqnr_db")  # which need the source


@dataclass(frozen=True, slots=True)
class TensorLimits:
    """Limits on every tensor whose name matches a glob; ``limits`` by `OF_TENSORS`."""

    glob: str
    limits: dict[str, float]


@dataclass(frozen=True, slots=True)
class Limits:
    """A file of limits.

    Attributes:
        path: of it, as it was given.
        tensors: one after the other; a tensor keeps to all that match it.
        file: by `OF_FILE`.
        required: by `REQUIRED`.
    """

    path: str
    tensors: tuple[TensorLimits, ...]
    file: dict[str, float]
    required: dict[str, tuple[str, ...]]

    @property
    def of_errors(self) -> str | None:
        """The first key that needs the source."""
        keys = (k for t in self.tensors for k in t.limits)
        return next((k for k in keys if k in OF_ERRORS), None)

    @property
    def of_text(self) -> str | None:
        """The first key that needs a text."""
        return next((k for k in self.file if k in OF_TEXT), None)

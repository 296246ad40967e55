"""What tells the model that a calibration was made with from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qconvert.errors import UnsupportedError
from qconvert.model import Model

DIGEST_BYTES = 4096  # of each tensor


def model_digest(model: Model) -> str:
    """What tells two models apart: SHA-256 over the name, dtype, shape and first 4 KiB of every
    tensor, in order of the names. Training changes every tensor, and 4 KiB cost no second pass.
    """
    digest = hashlib.sha256()
    for t in sorted(model.tensors, key=lambda t: t.name.encode()):
        digest.update(json.dumps([t.name, t.dtype, list(t.shape)]).encode() + b"\n")
        digest.update(model.raw(t, 0, min(DIGEST_BYTES, t.nbytes)))
    return digest.hexdigest()


def check_digest(recorded: str | None, model: Model, path: Path) -> None:
    """Refuse a file that was made with another model than this one.

    Raises:
        UnsupportedError: the digests differ; a file without one fits any model.
    """
    if recorded is None:
        return
    found = model_digest(model)
    if recorded != found:
        raise UnsupportedError(
            "the calibration is of another model",
            path=path,
            found=f"digest {recorded[:16]}...",
            wanted=f"{found[:16]}..., of {model.path}",
            hint="calibrate with this model",
            code="CALIBRATION-MODEL",
        )

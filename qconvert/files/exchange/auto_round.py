"""auto-round's own checkpoints: words of GPTQ or of AWQ, as ``packing_format`` says.

formats/exchange/gptq.md says which of them are read.
"""

from __future__ import annotations

from dataclasses import replace

from qconvert.files.exchange import Checkpoint, Found, awq, gptq
from qconvert.files.exchange.settings import flag, text, unsupported

PACKING = "packing_format"
GPTQ, AWQ = "auto_round:auto_gptq", "auto_round:auto_awq"


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    path = checkpoint.path
    settings = {k: v for k, v in checkpoint.settings.items() if k != PACKING}
    packing = text(path, PACKING, checkpoint.settings.get(PACKING))
    if packing == GPTQ:
        return gptq.find(replace(checkpoint, settings=settings))
    if packing != AWQ:
        raise unsupported(path, f"{PACKING} of auto-round", packing, f"{GPTQ} or {AWQ}")
    zeros = not flag(path, "sym", settings.get("sym", True))
    return awq.find(replace(checkpoint, settings={**settings, "zero_point": zeros}))

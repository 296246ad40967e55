"""MLX checkpoints, as mlx-lm writes them.

formats/exchange/mlx.md says which of them are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.codecs.exchange.layout import Layout
from qconvert.codecs.exchange.mlx import BIASES, MODES, SCALES, WORDS, AffineGroups
from qconvert.errors import FormatError
from qconvert.exchange_schemes import MLX_AFFINE as AFFINE
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.settings import (
    OTHER_VERSIONS,
    check_keys,
    integer,
    refuse_setting,
    scale_dtype,
    section,
    text,
    unsupported,
)

KIND = "mlx"
GROUPS, WIDTHS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
_FIELDS = frozenset({"group_size", "bits", "mode"})
GLOBAL_SCALE = ".global_scale"  # of mode nvfp4 in stacks of experts


@dataclass(frozen=True, slots=True)
class How:
    """How a module is quantized.

    Attributes:
        mode: `AFFINE` or a key of `MODES`.
    """

    mode: str
    bits: int
    group: int


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    settings = checkpoint.settings
    own = {k: v for k, v in settings.items() if not isinstance(v, dict | bool)}
    check_keys(checkpoint.path, "the quantization block", own, _FIELDS)
    overall = _how(checkpoint, own)
    matrices = []
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(WORDS)
        if not name.endswith(WORDS) or info.dtype != "U32":
            continue
        how = overall
        if (entry := settings.get(module, True)) is not True:
            if entry is False:
                raise FormatError(
                    "a weight is quantized that the configuration says is not",
                    path=checkpoint.path,
                    tensor=name,
                    hint=OTHER_VERSIONS,
                    code="EXCHANGE-CONFIG",
                )
            fields = section(checkpoint.path, module, entry)
            check_keys(checkpoint.path, module, fields, _FIELDS)
            how = _how(checkpoint, {**own, **fields} if "mode" in fields else fields)
        matrices.append(_matrix(checkpoint, module, how))
    return Found(KIND, matrices, (SCALES, BIASES, GLOBAL_SCALE))


def _how(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> How:
    path = checkpoint.path
    mode = text(path, "mode", fields.get("mode", AFFINE))
    bits = integer(path, "bits", fields.get("bits"), 1, 8)
    group = integer(path, "group_size", fields.get("group_size"), 1, 1 << 20)
    if mode == AFFINE:
        if bits not in WIDTHS or group not in GROUPS:
            found = f"{bits} bits in groups of {group}"
            refuse_setting(path, "bits", found, f"bits {WIDTHS} and groups {GROUPS}")
    elif mode not in MODES:
        raise unsupported(path, "mode of MLX", mode, " ".join((AFFINE, *MODES)))
    elif (MODES[mode].bits, MODES[mode].group) != (bits, group):
        wanted = f"{MODES[mode].bits} bits in groups of {MODES[mode].group}"
        refuse_setting(path, mode, f"{bits} bits in groups of {group}", wanted)
    return How(mode, bits, group)


def _matrix(checkpoint: Checkpoint, module: str, how: How) -> Matrix:
    tensors = checkpoint.tensors
    words, scales = tensors[module + WORDS], tensors.get(module + SCALES)
    layout: Layout
    if how.mode != AFFINE:
        layout = MODES[how.mode]
    else:
        layout = AffineGroups(
            how.bits, how.group, False, scale_dtype(checkpoint.path, scales, "BF16")
        )
    if len(words.shape) < 2 or words.shape[-1] * 32 % (how.bits * how.group):
        raise FormatError(
            "words of codes do not make whole groups",
            path=checkpoint.path,
            tensor=module + WORDS,
            found=f"{words.dtype} {list(words.shape)}",
            wanted=f"rows of {how.bits}-bit codes in groups of {how.group}",
            code="EXCHANGE-SHAPE",
        )
    shape = (*words.shape[:-1], words.shape[-1] * 32 // how.bits)
    own = [part.suffix for part in layout.parts(shape)]
    parts = {kind: module + kind for kind in own if module + kind in tensors}
    return Matrix(module + WORDS, shape, layout, parts)

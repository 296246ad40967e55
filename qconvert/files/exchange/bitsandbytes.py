"""bitsandbytes checkpoints, as transformers and unsloth save them.

formats/exchange/bnb.md says which of them are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.codecs.codebook import SCALES_BLOCK, scale_table, table_of
from qconvert.codecs.exchange.bitsandbytes import (
    CODES,
    FORMAT,
    ROW_SCALES,
    SCALES,
    SCALES_OF_SCALES,
    STATE,
    TABLE,
    TABLE_OF_SCALES,
    TORCH_NAMES,
    FourBits,
    Int8Rows,
)
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.settings import (
    check_keys,
    integer,
    refuse_setting,
    section,
    text,
    unsupported,
)
from qconvert.files.strict_json import strict_json
from qconvert.kernels.records import F32
from qconvert.model import DTYPES, TensorInfo
from qconvert.schemes import CODEBOOKS

KIND = "bnb"
SUFFIXES: tuple[str, ...] = (SCALES, TABLE, SCALES_OF_SCALES, TABLE_OF_SCALES, ROW_SCALES, FORMAT)
SUFFIXES += tuple(STATE + book for book in CODEBOOKS)
# Ends of what only quantized tensors have, whatever these are called.
_ENDS = tuple(s.removeprefix(CODES) if s.startswith(CODES + ".") else s for s in SUFFIXES)
BLOCKS = tuple(1 << n for n in range(5, 13))  # 32 to 4096
STATE_BYTES = 4096  # at most
# Fields of BitsAndBytesConfig in transformers: codes say the same of themselves.
_FIELDS = frozenset(
    {
        *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
        *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
        *("bnb_4bit_quant_storage", "llm_int8_threshold", "llm_int8_skip_modules"),
        *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
        *("bnb_4bit_blocksize", "modules_to_not_convert", "target_parameters"),
    }
)
_STATE = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; None where its weights are plain, to be quantized as they are
    loaded. See `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    matrices = []
    for name, info in checkpoint.tensors.items():
        module, state, book = name.partition(STATE)
        if state:
            matrices.append(_four_bits(checkpoint, module, book))
        elif name.endswith(ROW_SCALES):
            matrices.append(_eight_bits(checkpoint, name.removesuffix(ROW_SCALES), info))
    codes = {m.parts[CODES] for m in matrices if CODES in m.parts}
    alone = [
        t.name
        for t in checkpoint.tensors.values()
        if t.name.endswith(CODES) and t.dtype in ("U8", "I8") and t.name not in codes
    ]
    if alone:
        raise FormatError(
            "a weight of codes lacks its scales",
            path=checkpoint.path,
            tensor=alone[0],
            found=f"{len(alone)} such tensors beside {len(matrices)} whole weights",
            wanted=f"{STATE}nf4 or {ROW_SCALES}",
            hint="the checkpoint is incomplete: download or save it again",
            code="EXCHANGE-MISSING",
        )
    if not matrices and not any(n.endswith(_ENDS) for n in checkpoint.tensors):
        return None
    check_keys(checkpoint.path, "the quantization block", checkpoint.settings, _FIELDS)
    return Found(KIND, matrices, _ENDS)


def _parts(checkpoint: Checkpoint, module: str) -> dict[str, str]:
    return {s: module + s for s in (CODES, *SUFFIXES) if module + s in checkpoint.tensors}


# --- 4 bits ---


def _four_bits(checkpoint: Checkpoint, module: str, book: str) -> Matrix:
    path, name = checkpoint.path, module + STATE + book
    if book not in CODEBOOKS:
        raise unsupported(path, "table of bitsandbytes", book, " ".join(CODEBOOKS))
    info = checkpoint.tensors[name]
    if info.dtype != "U8" or info.nbytes > STATE_BYTES:
        refuse_setting(path, name, f"{info.dtype} {list(info.shape)}", "a few bytes of JSON")
    fields = section(path, name, strict_json(checkpoint.read(name), path / name))
    double = "nested_offset" in fields
    check_keys(path, name, fields, _STATE | _NESTED)
    if fields.get("quant_type", book) != book:
        refuse_setting(path, "quant_type", fields["quant_type"], book)
    block = integer(path, "blocksize", fields.get("blocksize"), 1, 1 << 20)
    if block not in BLOCKS:
        refuse_setting(path, "blocksize", block, " ".join(map(str, BLOCKS)))
    if double:
        _check_nested(path, fields)
    _check_table(checkpoint, module + TABLE, table_of(book))
    if double:
        _check_table(checkpoint, module + TABLE_OF_SCALES, scale_table())
    dtypes = {torch: ours for ours, torch in TORCH_NAMES.items()}
    dtype = text(path, "dtype", fields.get("dtype", "float32"))
    if dtype not in dtypes:
        refuse_setting(path, "dtype", dtype, " ".join(dtypes))
    codes = checkpoint.tensors.get(module + CODES)
    layout = FourBits(
        *(book, block, double, dtypes[dtype]),
        storage=_storage(codes),
        state_size=info.nbytes,
    )
    return Matrix(module + CODES, _shape(path, fields), layout, _parts(checkpoint, module))


def _storage(codes: TensorInfo | None) -> str:
    """The dtype that codes are wrapped in, which is the user's choice."""
    if codes is None or codes.dtype not in DTYPES or DTYPES[codes.dtype].bits < 8:
        return "U8"
    return codes.dtype


def _shape(path: Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    shape = fields.get("shape")
    if not isinstance(shape, list) or not shape or len(shape) > 4:
        refuse_setting(path, "shape", shape, "numbers of a shape")
    found = tuple(integer(path, "shape", n, 1, 1 << 40) for n in shape)
    if math.prod(found) > 1 << 48:
        refuse_setting(path, "shape", shape, "a shape of a weight")
    return found


def _check_nested(path: Path, fields: Mapping[str, Any]) -> None:
    size, dtype = fields.get("nested_blocksize"), fields.get("nested_dtype", "float32")
    if size != SCALES_BLOCK:
        raise unsupported(path, "blocks of scales of bitsandbytes", size, str(SCALES_BLOCK))
    if dtype != "float32":
        raise unsupported(path, "scales of scales of bitsandbytes", dtype, "float32")
    offset = fields["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset):
        refuse_setting(path, "nested_offset", offset, "a finite number")


def _check_table(checkpoint: Checkpoint, name: str, table: F32) -> None:
    """Refuse another table than that of the name; what is missing or of another shape is refused
    as a part.
    """
    info = checkpoint.tensors.get(name)
    if info is None or (info.dtype, info.shape) != ("F32", table.shape):
        return
    found = np.frombuffer(checkpoint.read(name), "<f4")
    if (found != table).any():
        i = int(np.flatnonzero(found != table)[0])
        first = float(found[i])
        what = f"other numbers than bitsandbytes' own in '{name}'"
        raise unsupported(checkpoint.path, what, f"{first:g}", f"{table[i]:g} at {i}")


# --- 8 bits ---


def _eight_bits(checkpoint: Checkpoint, module: str, scales: TensorInfo) -> Matrix:
    codes, mark = (checkpoint.tensors.get(module + s) for s in (CODES, FORMAT))
    if codes is None or len(codes.shape) != 2:
        raise FormatError(
            "scales of rows without codes",
            path=checkpoint.path,
            tensor=scales.name,
            found=f"{codes.dtype} {list(codes.shape)}" if codes else "no such tensor",
            wanted=f"I8 [out, in] {module}{CODES}",
            hint="the checkpoint is incomplete: download or save it again",
            code="EXCHANGE-ORPHAN",
        )
    if mark is not None and mark.nbytes == 1 and checkpoint.read(mark.name) != b"\0":
        found = checkpoint.read(mark.name)[0]
        raise unsupported(checkpoint.path, f"layout {mark.name}", found, "0, row by row")
    layout = Int8Rows(8, 0, True, "F32", marked=mark is not None)
    return Matrix(module + CODES, codes.shape, layout, _parts(checkpoint, module))

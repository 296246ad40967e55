"""AWQ checkpoints, as AutoAWQ and others write them.

formats/exchange/awq.md says which of them are read.
"""

from __future__ import annotations

from qconvert.codecs.exchange.awq import IN_WORD, Awq
from qconvert.codecs.exchange.columns import CODES, SCALES, ZEROS, Bands
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.gptq import ASIDE, check_integers
from qconvert.files.exchange.settings import (
    check_keys,
    flag,
    integer,
    scale_dtype,
    text,
    unsupported,
)
from qconvert.model import WEIGHT

KIND = "awq"
SUFFIXES = (CODES, ZEROS, SCALES)
_FIELDS = ASIDE | {"bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format"}
# Of transformers' AwqConfig, which GPTQ's is a part of, and of what it fuses as it loads.
_FIELDS |= {"sym", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "pack_dtype"}


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    path, settings = checkpoint.path, checkpoint.settings
    check_keys(path, "the quantization block", settings, _FIELDS)
    check_integers(path, settings)
    version = text(path, "version", settings.get("version", settings.get("format", "gemm")))
    if version.lower() != "gemm":
        raise unsupported(path, "version of AWQ", version, "gemm")
    bits = integer(path, "bits", settings.get("bits", settings.get("w_bit", 4)), 1, 32)
    if bits != 4:
        raise unsupported(path, "bits of AWQ", bits, "4")
    asked = settings.get("group_size", settings.get("q_group_size", 128))
    group = max(integer(path, "group_size", asked, -1, 1 << 20), 0)
    zeros = flag(path, "zero_point", settings.get("zero_point", True))
    bands, matrices = Bands(), []
    for name, codes in checkpoint.tensors.items():
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise FormatError(
                "words of codes that make no matrix",
                path=path,
                tensor=name,
                found=f"{codes.dtype} {list(codes.shape)}",
                wanted="I32 [in, out / 8]",
                code="EXCHANGE-SHAPE",
            )
        dtype = scale_dtype(path, checkpoint.tensors.get(module + SCALES), "F16")
        layout = Awq(4, group, not zeros, dtype, bands=bands)
        parts = {s: module + s for s in SUFFIXES if module + s in checkpoint.tensors}
        shape = (codes.shape[1] * IN_WORD, codes.shape[0])
        matrices.append(Matrix(module + WEIGHT, shape, layout, parts))
    return Found(KIND, matrices, SUFFIXES)

"""Programs that others wrote, doing the conversion that we do: the same source, the same tensors
quantized, a GGUF file that is flushed and renamed. Each is used the straight way.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  # teaches NumPy, and through it safetensors, the name bfloat16
import numpy as np
from safetensors import safe_open

from qconvert.model import TensorInfo
from qconvert.schemes import TENSOR_SCHEMES
from qconvert.stages.plan import PlanOptions, make_plan

PROGRAM = "llama-quantize"
Work = Callable[[], object]
# What gguf-py takes as it is; the rest has no counterpart in GGUF, or none in NumPy.
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")


@dataclass(frozen=True, slots=True)
class Source:
    """A safetensors model: its files and its tensors, in the order of the files."""

    files: tuple[Path, ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def foreign(self) -> str | None:
        """Why gguf-py cannot take these tensors, None when it can."""
        dtypes = {t.dtype for t in self.tensors}.difference(PLAIN)
        return f"gguf-py has no {min(dtypes)} tensors" if dtypes else None

    def quantized(self, kind: str) -> set[str]:
        """Names of the tensors that we quantize to a ggml type."""
        plan = make_plan(self.tensors, TENSOR_SCHEMES[kind.lower()], PlanOptions())
        return {p.tensor.name for p in plan if p.scheme}


def gguf_py_encodes(kind: str) -> bool:
    """Whether gguf-py can quantize to a ggml type."""
    if kind not in gguf.GGMLQuantizationType.__members__:
        return False
    type_ = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[type_][0]), np.float32), type_)
    except NotImplementedError:
        return False
    return True


def gguf_py(source: Source, kind: str, target: Path) -> Work | str:
    """Conversion with the safetensors library and gguf-py, or why there is none."""
    if not gguf_py_encodes(kind):
        return f"gguf-py does not quantize to {kind}"
    chosen = source.quantized(kind)

    def convert() -> None:
        part = target.with_suffix(".partial")
        _write(source, gguf.GGUFWriter(part, "raw"), {name: kind for name in chosen}, {})
        publish(part, target)

    return source.foreign() or convert


def llama_quantize(source: Source, kind: str, target: Path, made: Path, threads: int) -> Work | str:
    """Conversion with llama-quantize, or why there is none.

    Args:
        made: where to put the GGUF file that it converts, with the source's weights as they are.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        return f"no {PROGRAM} on the PATH"
    if reason := source.foreign():
        return reason
    _write_llama(source, source.quantized(kind), made)
    part = target.with_suffix(".partial")
    command = [program, "--pure", str(made), str(part), kind, str(threads)]

    def convert() -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)
        publish(part, target)

    try:
        convert()
    except subprocess.CalledProcessError as e:
        told = (e.stderr or e.stdout).strip().splitlines()
        return f"it failed with exit code {e.returncode}: {told[-1] if told else 'no message'}"
    target.unlink()
    return convert


def publish(part: Path, target: Path) -> None:
    """Flush a finished file and give it its name, as `files.atomic.AtomicOutput` does."""
    _flush(part)
    os.replace(part, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_llama(source: Source, chosen: set[str], made: Path) -> None:
    """A file that llama-quantize accepts whatever the architecture: it looks at the header of a
    llama, and quantizes tensors of two dimensions whose names end in ``weight``.
    """
    writer = gguf.GGUFWriter(made, "llama")
    writer.add_block_count(1)
    writer.add_context_length(1)
    writer.add_embedding_length(1)
    writer.add_feed_forward_length(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {
        t.name: f"t{i}.weight" if t.name in chosen else f"t{i}"
        for i, t in enumerate(source.tensors)
    }
    _write(source, writer, {}, names)


def _write(source: Source, writer: Any, kinds: dict[str, str], names: dict[str, str]) -> None:
    """All tensors through NumPy into a GGUF file: those in ``kinds`` quantized, others as they are,
    under other ``names`` where there are any.
    """
    types = {t.name: gguf.GGMLQuantizationType[kinds.get(t.name, t.dtype)] for t in source.tensors}
    for t in source.tensors:
        shape = gguf.quant_shape_to_byte_shape(t.shape or (1,), types[t.name])
        name = names.get(t.name, t.name)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), types[t.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    left = [t.name for t in reversed(source.tensors)]
    for path in source.files:
        with safe_open(path, "numpy") as file:
            held = set(file.keys())
            while left and left[-1] in held:
                name = left.pop()
                array = file.get_tensor(name)
                if name in kinds:
                    array = gguf.quants.quantize(array.astype(np.float32), types[name])
                writer.write_tensor_data(array)
    writer.close()

"""Records the squared errors that llama-quantize leaves, for tests/test_ggml_codebooks.py.

Needs the shared library of llama-quantize, libggml-base (of commit 0c1e57098 for what is recorded):
llama-quantize hands every tensor to its ggml_quantize_chunk, which is called here.

    python tests/ggml_golden/record.py LIBGGML-BASE MINILM

MINILM is sentence-transformers/all-MiniLM-L6-v2's model.safetensors (Apache-2.0). Writes
weights.npz, float16 numbers of (rows, 256) and importances of (256,), and errors.json: type ->
tensor -> importance ("" for none) -> sum of weight · squared error.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from qconvert.files.safetensors import open_safetensors

HERE = Path(__file__).resolve().parent
TINY = HERE.parent.parent / "samples" / "tiny-llama" / "model.safetensors"
TYPES = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
ROWS = 20
REAL = {
    "llama query": (TINY, "model.layers.0.self_attn.q_proj.weight"),
    "llama down": (TINY, "model.layers.1.mlp.down_proj.weight"),
    "bert dense": (Path(sys.argv[2]), "encoder.layer.3.output.dense.weight"),
    "bert query": (Path(sys.argv[2]), "encoder.layer.0.attention.self.query.weight"),
}


def tensors() -> dict[str, NDArray[np.float16]]:
    rng = np.random.default_rng(20261122)
    shape = (ROWS, 256)
    outliers = rng.standard_normal(shape) * 0.02
    outliers[:, ::37] *= 20
    found = {
        "normal": rng.standard_normal(shape) * 0.02,
        "laplace": rng.laplace(size=shape) * 0.02,
        "student": rng.standard_t(3, size=shape) * 0.02,
        "outliers": outliers,
        "uniform": rng.uniform(-1, 1, shape),
    }
    for name, (path, tensor) in REAL.items():
        model = open_safetensors(path)
        info = next(t for t in model.tensors if t.name == tensor)
        found[name] = model.values(info, 0, ROWS * 256).astype(np.float64).reshape(shape)
        model.close()
    return {name: x.astype(np.float16) for name, x in found.items()}


def importances() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    return {
        "even": rng.random(256).astype(np.float32),
        "squares": np.square(rng.standard_normal(256)).astype(np.float32),
        "uneven": np.exp(2 * rng.standard_normal(256)).astype(np.float32),
    }


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    weights, importance = tensors(), importances()
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        for tensor, stored in weights.items():
            x = stored.astype(np.float32)
            for label, w in {"": None, **importance}.items():
                data = np.zeros((len(x), 256 // block * nbytes), np.uint8)
                where = None if w is None else w.ctypes.data
                assert chunk(kind, x.ctypes.data, data.ctypes.data, 0, *x.shape, where) == data.size
                error = np.square(x.astype(np.float64) - gguf.quants.dequantize(data, kind))
                total = (error if w is None else error * w).sum()
                errors.setdefault(name, {}).setdefault(tensor, {})[label] = float(total)
    np.savez_compressed(HERE / "weights.npz", **weights, **importance)
    (HERE / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")


if __name__ == "__main__":
    main()

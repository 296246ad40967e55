"""Records the squared errors of llama-quantize's K-quants that tests/test_ggml_k.py compares with.

Needs llama-quantize (llama.cpp) on the PATH and all-MiniLM-L6-v2's model.safetensors as argument:

    python tests/golden_k/make.py MODEL.safetensors

Writes weights.npz: ``name`` (k, 256) float16 or float32 rows, the tensors; ``importance`` (256,),
the weights given to llama-quantize as an importance matrix. Writes errors.json: for each type and
tensor Σ(x - x')² without and Σ w (x - x')² with the importance, in float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

HERE = Path(__file__).parent
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
ROWS = 32


def tensors(minilm: str) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(20261122)
    outliers = rng.standard_normal((ROWS, 256))
    outliers[:, [3, 50, 51, 140, 200]] *= 20
    found = {
        "gaussian": rng.standard_normal((ROWS, 256)),
        "laplace": rng.laplace(size=(ROWS, 256)),
        "student": rng.standard_t(5, size=(ROWS, 256)),
        "outliers": outliers,
    }
    layer = "encoder.layer.3."
    real = {
        "minilm query": layer + "attention.self.query.weight",
        "minilm up": layer + "intermediate.dense.weight",
        "minilm words": "embeddings.word_embeddings.weight",
    }
    samples = HERE.parents[1] / "samples" / "tiny-llama" / "model.safetensors"
    tiny = {
        "tiny down": "model.layers.1.mlp.down_proj.weight",
        "tiny key": "model.layers.0.self_attn.k_proj.weight",
    }
    for path, names in ((minilm, real), (str(samples), tiny)):
        with safe_open(path, "pt") as model:
            for short, name in names.items():
                values = model.get_tensor(name).float().numpy().ravel()
                found[short] = values[256 * ROWS :][: 256 * ROWS].reshape(ROWS, 256)
    # float16 keeps the fixture small; what is tested is what is stored.
    return {name: x.astype(np.float16).astype(np.float32) for name, x in found.items()}


def write_model(path: Path, xs: list[NDArray[np.float32]]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(256)
    writer.add_block_count(len(xs))
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for i, x in enumerate(xs):
        writer.add_tensor(f"blk.{i}.attn_k.weight", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_importance(path: Path, importance: NDArray[np.float32], count: int) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["made up"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for i in range(count):
        writer.add_tensor(f"blk.{i}.attn_k.weight.in_sum2", importance[None])
        writer.add_tensor(f"blk.{i}.attn_k.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoded(path: Path) -> list[NDArray[np.float32]]:
    reader = gguf.GGUFReader(path)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return [found[f"blk.{i}.attn_k.weight"] for i in range(len(found))]


def main() -> None:
    xs = tensors(sys.argv[1])
    importance = np.exp(np.random.default_rng(7).standard_normal(256)).astype(np.float32)
    errors: dict[str, dict[str, list[float]]] = {t: {name: [] for name in xs} for t in TYPES}
    with tempfile.TemporaryDirectory() as folder:
        model, out, matrix = (Path(folder) / n for n in ("m.gguf", "q.gguf", "imatrix.gguf"))
        write_model(model, list(xs.values()))
        write_importance(matrix, importance, len(xs))
        for name in TYPES:
            target = {"Q2_K": "Q2_K", "Q6_K": "Q6_K"}.get(name, name + "_S")
            for weight, options in (
                (np.ones(256), []),
                (importance.astype(np.float64), ["--imatrix", str(matrix)]),
            ):
                command = ["llama-quantize", "--pure", *options, str(model), str(out), target]
                subprocess.run(command, check=True, capture_output=True)
                for (key, x), y in zip(xs.items(), decoded(out), strict=True):
                    difference = x.astype(np.float64) - y
                    errors[name][key].append(float((weight * difference**2).sum()))
    stored = {name: x.astype(np.float16) for name, x in xs.items()}
    np.savez_compressed(HERE / "weights.npz", importance=importance, **stored)  # type: ignore[arg-type]
    (HERE / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")


if __name__ == "__main__":
    main()

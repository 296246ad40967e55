"""verify --run: llama.cpp runs a GGUF file, and is held against transformers on the same weights.

What transformers computes with is what the file decodes to, so that no loss of quantization stands
between the two: they differ by their own arithmetic alone, or because the conversion is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import UsageError
from qconvert.files import open_model
from qconvert.model import TensorInfo
from qconvert.progress import Progress
from qconvert.report import Check, LlamaCppRun
from qconvert.running.hugging_face import require
from qconvert.running.llama_cpp import run_gguf
from qconvert.running.quality import compare_logits
from qconvert.running.quantized_model import open_quantized

TOKENS = 32
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1999, prices rose by 3.5%: who could have "
    "known?\n\ndef add(a, b):\n    return a + b\n"
)
# The largest difference that is put down to llama.cpp's arithmetic, as a share of the largest
# output: it takes GELU from a table of binary16 and multiplies F16 with inputs rounded to F16 (up
# to 1.3e-3 found in 43 architectures), BF16 with inputs rounded to BF16 (2.2e-3), and codes with
# inputs of 8 bits in blocks (2.7e-2). With rows in a wrong order it is near 1.
LIMITS = {"plain": 3e-3, "bf16": 2e-2, "codes": 0.1}


def measure_run(
    path: Path, against: Path, progress: Progress
) -> tuple[LlamaCppRun | None, list[Check]]:
    """Run `TOKENS` tokens of a text through both.

    Args:
        path: a GGUF file with llama.cpp's names.
        against: the directory with the model's configuration and tokenizer.

    Returns:
        The figures, none where llama.cpp refuses the file; and the checks.

    Raises:
        UsageError: not a GGUF file.
        InputError: transformers cannot run the model.
        MachineError: torch, transformers or llama-cpp-python is not installed.
    """
    model = open_model(path)
    kind, tensors = model.kind, model.tensors
    model.close()
    if kind != "gguf":
        raise UsageError(
            "--run has llama.cpp run the file", found=f"{path}: {kind}", wanted="a GGUF file"
        )
    (torch,) = require("torch")
    held = open_quantized(path, directory=against, check=False).checkpoint
    encoder = held.kind == "encoder"
    wanted: list[int] = held.tokenizer(TEXT)["input_ids"]
    first = wanted[:TOKENS]
    progress.begin("run through llama.cpp", 1, "files")
    found = run_gguf(path, TEXT, first, "states" if encoder else "logits")
    progress.end()
    if found.refused:
        return None, [Check("llama-runs", "fail", found.refused)]
    with torch.no_grad():
        output = held.model(input_ids=torch.tensor([first]))
    theirs = (output.last_hidden_state if encoder else output.logits)[0].float().numpy()
    ours = found.outputs[:, : theirs.shape[1]]  # a vocabulary that was padded is longer
    checks = [
        Check("llama-runs", "pass", f"{len(first)} tokens through {found.version}"),
        _same_tokens(found.tokens, wanted),
    ]
    run = LlamaCppRun(
        version=found.version,
        tokens=len(first),
        outputs="last hidden states" if encoder else "logits",
        largest_difference=float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    )
    if encoder:
        run.cosine_min = float(_cosines(theirs, ours).min())
    else:
        scores = compare_logits(theirs, ours, np.array(first))
        run.kl_mean = float(scores.divergence.mean())
        run.same_top = float(scores.same_top.mean())
    limit = LIMITS[_arithmetic(tensors)]
    detail = f"{run.outputs} of llama.cpp and transformers, the largest difference as a share"
    good = bool(np.isfinite(ours).all()) and run.largest_difference <= limit
    checks.append(
        Check("llama-outputs", "pass" if good else "fail", detail, run.largest_difference, limit)
    )
    return run, checks


def _same_tokens(found: list[int], wanted: list[int]) -> Check:
    if found == wanted:
        return Check("llama-tokens", "pass", f"{len(wanted)} tokens of a text are the same")
    pairs = enumerate(zip(found, wanted, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(found), len(wanted)))
    a, b = (str(t[place]) if place < len(t) else "none" for t in (found, wanted))
    return Check(
        "llama-tokens",
        "fail",
        f"token {place + 1} of a text is {a} to llama.cpp and {b} to transformers",
    )


def _arithmetic(tensors: Iterable[TensorInfo]) -> str:
    """By what llama.cpp multiplies matrices of these types."""
    types = {t.dtype for t in tensors if len(t.shape) > 1}
    if types <= {"F32", "F16"}:
        return "plain"
    return "bf16" if types <= {"F32", "F16", "BF16"} else "codes"


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    one, other = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found: NDArray[np.float64] = (one * other).sum(axis=1) / np.maximum(norms, 1e-30)
    return found

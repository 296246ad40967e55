"""Runs a GGUF file through llama.cpp, in a process of its own.

llama.cpp ends its process at what it does not like in a file, and writes to stderr as it goes. So
this module is run as a program: a request in JSON on its stdin, the answer on its stdout.
"""

from __future__ import annotations

import ctypes
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import MachineError

INSTALL = "pip install 'qconvert[llama]'"
_CONTEXT = 512
_SECONDS = 600  # after which a process is ended that gives no answer

Wanted = Literal["logits", "states"]


@dataclass(frozen=True, slots=True)
class LlamaRun:
    """What llama.cpp made of a file.

    Attributes:
        version: of llama-cpp-python.
        tokens: of the text.
        outputs: of the tokens that were asked for, (tokens, vocabulary) or (tokens, width).
        refused: what it would not do, for people; the others are then empty.
    """

    version: str
    tokens: list[int]
    outputs: NDArray[np.float32]
    refused: str | None = None


def run_gguf(path: Path, text: str, tokens: Sequence[int], wanted: Wanted) -> LlamaRun:
    """Load a file, cut a text into tokens, and compute what comes out of other tokens.

    Args:
        path: a GGUF file, of several the first.
        text: see `LlamaRun.tokens`.
        tokens: go in at once, from the first position on.
        wanted: logits of a causal model, or last hidden states of an encoder.

    Raises:
        MachineError: llama-cpp-python is not installed.
    """
    request = {"path": str(path), "text": text, "tokens": list(tokens), "wanted": wanted}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],  # nothing is imported from where we started
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _refusal(f"llama.cpp gave no answer in {_SECONDS} seconds")
    header, _, data = done.stdout.partition(b"\n")
    if done.returncode or not header:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return _refusal(f"llama.cpp ended its process: {lines[-1] if lines else done.returncode}")
    answer = json.loads(header)
    if answer.get("missing"):
        raise MachineError(
            "--run needs llama.cpp",
            found=f"no package '{answer['missing']}'",
            hint=f"install with: {INSTALL}",
            code="LLAMA-INSTALL",
        )
    if "refused" in answer:
        return _refusal(answer["refused"])
    return LlamaRun(answer["version"], answer["tokens"], np.load(io.BytesIO(data)))


def _refusal(why: str) -> LlamaRun:
    return LlamaRun("", [], np.zeros((0, 0), np.float32), why)


# --- in the other process -------------------------------------------------------------------------


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as e:
        return {"missing": getattr(e, "name", None) or "llama_cpp"}, None
    last: list[str] = []

    def log(level: int, line: bytes, data: object) -> None:
        if level >= 4 and line.strip():  # errors
            last.append(line.decode("utf-8", "replace").strip())

    kept = llama_cpp.llama_log_callback(log)  # as long as it may be called
    llama_cpp.llama_log_set(kept, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(request["path"].encode(), settings)
    if not model:
        return {"refused": f"llama.cpp does not load it: {last[0] if last else 'no reason'}"}, None
    encoder = request["wanted"] == "states"
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = _CONTEXT
    parameters.type_k = parameters.type_v = 0  # a cache in F32, as transformers has it
    parameters.flash_attn_type = 0
    if encoder:
        parameters.embeddings, parameters.pooling_type = True, 0
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        return {"refused": f"llama.cpp makes no context: {last[0] if last else 'no reason'}"}, None
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    text = request["text"].encode()
    found = (llama_cpp.llama_token * (len(text) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), found, len(found), True, True)
    ids = request["tokens"]
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    batch.n_tokens = len(ids)
    run = llama_cpp.llama_encode if encoder else llama_cpp.llama_decode
    if run(context, batch) != 0:
        return {"refused": f"llama.cpp does not run it: {last[0] if last else 'no reason'}"}, None
    if encoder:
        width, row = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_get_embeddings_ith
    else:
        width = llama_cpp.llama_vocab_n_tokens(vocabulary)
        row = llama_cpp.llama_get_logits_ith
    rows = [np.ctypeslib.as_array(row(context, i), (width,)).copy() for i in range(len(ids))]
    return {"version": llama_cpp.__version__, "tokens": list(found[: max(count, 0)])}, np.stack(
        rows
    )


def _main() -> None:
    answer, outputs = _answer(json.load(sys.stdin))
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    if outputs is not None:
        np.save(sys.stdout.buffer, outputs)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()

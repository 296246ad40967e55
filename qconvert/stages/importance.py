"""A calibration as an importance matrix of llama.cpp, under GGUF's names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.errors import UnsupportedError, UsageError
from qconvert.files.imatrix import ChannelSums, imatrix_bytes
from qconvert.observers.exact import ExactSum
from qconvert.stages.collected import Collected

# model_type of Hugging Face where llama.cpp calls the architecture otherwise.
ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "roberta": "bert",
}
_EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<expert>\d+)\.(?P<role>.+)")


def importance_bytes(collected: Collected, model: Path) -> bytes:
    """The GGUF form of an importance matrix; layers without a name in GGUF are left out.

    Channels are in the order of the checkpoint: llama.cpp permutes rows of some weights, never
    columns.

    Raises:
        UsageError: the calibration is not of a run over text.
        UnsupportedError: llama.cpp has no names for the model, or experts are incomplete.
    """
    run = collected.run
    if run is None:
        raise UsageError(
            "--imatrix needs a run over text", hint="calibrate with --text, then merge if need be"
        )
    named = gguf_names(json.loads((model / "config.json").read_text()), model)
    sums: dict[str, ChannelSums] = {}
    experts: dict[str, dict[int, str]] = {}
    for layer in collected.finished:
        match = _EXPERT.fullmatch(layer)
        stacked = f"{match['before']}.{match['role']}" if match else layer
        name = named(stacked)
        if name is None:
            continue
        if match:
            experts.setdefault(name, {})[int(match["expert"])] = layer
        else:
            sums[name] = _sums(collected, [layer])
    unreached = [m for name in collected.unreached if (m := _EXPERT.fullmatch(name))]
    for m in unreached:
        if name := named(f"{m['before']}.{m['role']}"):
            experts.setdefault(name, {}).setdefault(int(m["expert"]), "")
    for name, layers in experts.items():
        if sorted(layers) != list(range(len(layers))):
            raise UnsupportedError("experts are missing in the calibration", tensor=name)
        if any(layers.values()):
            sums[name] = _sums(collected, [layers[k] for k in range(len(layers))])
    if not sums:
        raise UnsupportedError("llama.cpp has no name for any layer of the model", path=model)
    return imatrix_bytes(
        sums,
        datasets=[entry["name"] for entry in collected.inputs],
        chunk_count=run.chunks,
        chunk_size=run.seqlen,
    )


def gguf_names(config: dict[str, Any], path: Path) -> Callable[[str], str | None]:
    """Layer of the checkpoint -> name of its weight in GGUF, None where it has none.

    Raises:
        UnsupportedError: llama.cpp does not know the architecture.
    """
    import gguf

    kind = config.get("model_type")
    wanted = ARCHITECTURES.get(str(kind), str(kind).replace("_", "-"))
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = known.get(wanted) or known.get(str(kind))
    blocks = config.get("num_hidden_layers")
    if arch is None or not isinstance(blocks, int) or not 0 < blocks < 10_000:
        raise UnsupportedError(
            "llama.cpp has no names for the tensors of this model",
            path=path / "config.json",
            found=f"model_type {kind!r}",
            hint="leave out --imatrix",
            code="IMATRIX-ARCHITECTURE",
        )
    table = gguf.get_tensor_name_map(arch, blocks)

    def named(layer: str) -> str | None:
        found = table.get_name(layer)
        return None if found is None else f"{found}.weight"

    return named


def _sums(collected: Collected, layers: list[str]) -> ChannelSums:
    """Sums of squares and counts of some matrices; zeros for a matrix that saw no token."""
    found = [collected.finished[name] if name else None for name in layers]
    width = next(f.calibration.features for f in found if f)
    squares = np.zeros((len(layers), width), np.float32)
    counts = np.zeros(len(layers), np.int64)
    for k, layer in enumerate(found):
        if layer is not None:
            counts[k] = layer.calibration.samples
            first, _ = layer.arrays["state.first"].tolist()
            squares[k] = ExactSum.unpacked(layer.arrays["squares"], first).values()
    return ChannelSums(squares, counts)

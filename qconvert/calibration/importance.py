"""A calibration as an importance matrix of llama.cpp, under GGUF's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qconvert.architectures import layer_places
from qconvert.calibration.collected import Collected
from qconvert.calibration.exact import ExactSum
from qconvert.errors import UnsupportedError, UsageError
from qconvert.files.imatrix import ChannelSums, imatrix_bytes
from qconvert.files.shards import MAX_COMPANION_BYTES
from qconvert.files.strict_json import read_object


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
    config = model / "config.json"
    place_of = layer_places(read_object(config, MAX_COMPANION_BYTES), config)
    sums: dict[str, ChannelSums] = {}
    experts: dict[str, dict[int, str]] = {}
    for layer in collected.finished:
        place = place_of(layer)
        if place is None:
            continue
        if place.expert is None:
            sums[place.name] = _sums(collected, [layer])
        else:
            experts.setdefault(place.name, {})[place.expert] = layer
    for layer in collected.unreached:
        place = place_of(layer)
        if place is not None and place.expert is not None:
            experts.setdefault(place.name, {}).setdefault(place.expert, "")
    for name, layers in experts.items():
        if sorted(layers) != list(range(len(layers))):
            raise UnsupportedError(
                "experts are missing in the calibration", path=model, tensor=name
            )
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

"""Low-rank adapters (LoRA) that are trained on the fixed integers of a quantized file, and written
as peft writes them.

A linear layer computes W x + B A x, where W is what its file decodes to and A and B have a small
rank (Hu et al., "LoRA", 2021; on quantized weights Dettmers et al., "QLoRA", 2023). B begins at 0,
so that the model begins as the file has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.codecs.codec import Stored
from qconvert.files.adapters import CONFIG, PREFIX, WEIGHTS
from qconvert.files.atomic import AtomicDirectory, machine_errors
from qconvert.files.safetensors_writer import array_parts
from qconvert.running.device import CPU
from qconvert.running.low_rank import attach

SHARE = 0.015  # of a weight's rounding error: how far the first step moves it


class LowRank:
    """The correction of one linear layer.

    Attributes:
        a, b: its parts, (rank, inputs) and (outputs, rank), float32.
        rate: of both, at which a step of Adam moves the weights by `SHARE` of what rounding has
            taken from them, about.
    """

    def __init__(
        self, stored: Stored, rank: int, generator: torch.Generator, device: Any = CPU
    ) -> None:
        outputs, inputs = stored.shape
        bound = 1 / math.sqrt(inputs)
        first = torch.rand((rank, inputs), generator=generator) * (2 * bound) - bound
        self.a = first.to(device).requires_grad_(True)
        self.b = torch.zeros((outputs, rank), requires_grad=True, device=device)
        # A step of Adam adds the rate times A's signs: its root mean square is that times A's, and
        # times the root of the rank.
        self.rate = SHARE * _rounding_error(stored) * math.sqrt(3 / rank) / bound

    @staticmethod
    def size(shape: tuple[int, ...], rank: int) -> int:
        """How many numbers it has."""
        return rank * (shape[0] + shape[1])

    def parameters(self) -> dict[str, Any]:
        """What is trained, by the names of the parts in a file of peft's."""
        return {"lora_A": self.a, "lora_B": self.b}

    def attach(self, module: Any) -> None:
        """Have a linear layer compute with it."""
        attach(module, self.a, self.b)


def _rounding_error(stored: Stored) -> float:
    """Root mean square, about: of a code's step over the root of 12, where the codes reach over six
    times the root mean square of the weights.
    """
    sample = stored.values(0, min(math.prod(stored.shape), 1 << 16))
    size = float(np.sqrt(np.mean(np.square(sample, dtype=np.float64)))) or 1.0
    return size * math.sqrt(3) / 2**stored.encoding.bits


def write_adapter(
    output: Path,
    parts: Mapping[str, LowRank],
    base: str,
    *,
    noted: Mapping[str, Any],
    overwrite: bool,
    inputs: list[Path],
) -> int:
    """Write a directory that peft loads, and ``quantize --adapter`` merges.

    Args:
        output: the directory.
        parts: by the names of the modules.
        base: name or path of the float model that the adapter is for.
        noted: how it was made, for the metadata of the weights.
        overwrite, inputs: see `AtomicDirectory`.

    Returns:
        Bytes written.
    """
    rank = next(iter(parts.values())).a.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "target_modules": sorted(parts),
    }
    arrays = {
        f"{PREFIX}{module}.{kind}.weight": tensor.detach().numpy(force=True)
        for module, part in parts.items()
        for kind, tensor in part.parameters().items()
    }
    metadata = {"format": "pt", "qconvert.provenance": json.dumps(noted, sort_keys=True)}
    with AtomicDirectory(output, overwrite=overwrite, inputs=inputs) as made:
        with machine_errors(output):
            text = json.dumps(config, indent=2) + "\n"
            (made.path / CONFIG).write_text(text)
            with open(made.path / WEIGHTS, "wb") as file:
                file.writelines(array_parts(metadata, arrays))
            size = len(text) + (made.path / WEIGHTS).stat().st_size
        made.commit()
    return size

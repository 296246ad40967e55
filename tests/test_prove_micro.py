"""compressed-tensors' own decompressor against what qconvert writes of small floating numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import qconvert
from qconvert.model import DTYPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("compressed_tensors") is None,
        reason="install compressed-tensors",
    ),
]


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "mxfp8a16"])
def test_the_library_decodes_every_weight_to_the_same_bits(scheme: str, tmp_path: Path) -> None:
    import torch
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig
    from make_foreign import decompressed
    from safetensors.torch import load_file

    place = tmp_path / scheme
    qconvert.quantize(ROOT / "samples" / "tiny-llama", scheme, output=place)
    block = json.loads((place / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(block).config_groups.values()
    assert group.format is not None
    group.format = CompressionFormat(group.format)
    stored = load_file(place / "model.safetensors")
    compared = 0
    with qconvert.load(place) as tensors:
        for name in (n for n in tensors if tensors[n].dtype not in DTYPES):
            module: Any = torch.nn.Module()
            for part, tensor in stored.items():
                if part.rpartition(".")[0] == name.removesuffix(".weight"):
                    module.register_buffer(part.rpartition(".")[2], tensor)
            module.quantization_scheme = group
            peer = decompressed(module).float().numpy()
            own = tensors[name].dequantize()
            np.testing.assert_array_equal(peer.view(np.uint32), own.view(np.uint32), name)
            compared += 1
    assert compared == 28

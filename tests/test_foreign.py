"""Checkpoints that other tools' own libraries wrote, held against the values that these give.

tests/data/foreign/README.md says who wrote and who decoded each of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Call
from safetensors.numpy import load_file

import qconvert
from qconvert.model import DTYPES

FOREIGN = ROOT / "tests" / "data" / "foreign"
CHECKPOINTS = sorted(p.name for p in FOREIGN.iterdir() if p.is_dir()) if FOREIGN.exists() else []


# What is read, by the start of the name of a checkpoint; anything else is refused.
KINDS = ("ct_pack2", "ct_pack3", "ct_pack4_sym_g", "ct_pack4_sym_c", "ct_pack4_asym", "ct_pack5")
KINDS += ("ct_pack6", "ct_pack7", "ct_pack8", "ct_mixed", "ct_ignored", "whole_ct", "ct_fp8")
KINDS += ("ct_int8", "ct_pack4_sym_t", "fp8_")
KINDS += ("mlx_", "whole_mlx", "gptq_", "awq_", "bnb_", "whole_bnb")
KINDS += ("ct_nvfp4", "ct_mxfp", "modelopt", "gpt_oss", "deepseek")
READ = [name for name in CHECKPOINTS if name.startswith(KINDS)]


@pytest.mark.parametrize("name", sorted({*CHECKPOINTS} - {*READ}))
def test_what_is_not_read_is_refused(name: str, tmp_path: Path, call: Call) -> None:
    done = call("quantize", FOREIGN / name, "--scheme", "bf16", "-o", tmp_path / "o.qblk")
    assert done.code == 3


@pytest.mark.parametrize("name", READ)
def test_every_weight_is_read_as_its_own_library_reads_it(name: str) -> None:
    expected = load_file(FOREIGN / name / "expected.safetensors")
    with qconvert.load(FOREIGN / name) as tensors:
        quantized = {n for n in tensors if tensors[n].dtype not in DTYPES}
        assert quantized, "nothing was taken for codes"
        assert set(expected) <= set(tensors), "a weight is missing"
        for weight, values in expected.items():
            found = tensors[weight].dequantize().astype(np.float32)
            assert found.shape == values.shape
            np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32), weight)


def test_the_fixtures_are_there() -> None:
    assert len(CHECKPOINTS) >= 30
    assert Path(FOREIGN / "README.md").is_file()

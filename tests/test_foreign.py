"""Checkpoints that other tools' own libraries wrote, held against the values that these give.

tests/data/foreign/README.md says who wrote and who decoded each of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

import qconvert
from qconvert.model import DTYPES

FOREIGN = ROOT / "tests" / "data" / "foreign"
CHECKPOINTS = sorted(p.name for p in FOREIGN.iterdir() if p.is_dir()) if FOREIGN.exists() else []


@pytest.mark.parametrize("name", CHECKPOINTS)
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

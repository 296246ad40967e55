"""What tools make of directories of ours that take long to install: ONNX Runtime, vLLM, GPTQModel.

    python -m pytest -m consumers tests/test_consumers.py

installs each into an environment of its own below the folder that QCONVERT_CONSUMERS names, or one
that goes with the tests; what is installed there already is used. Without ``-m consumers`` they are
left out: an installation takes minutes and gigabytes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from make_consumers import SHOWN, by_gptqmodel, install, rows

pytestmark = pytest.mark.consumers
# Mean divergence of what a tool computes from what we do with the same weights, in nats, and of
# tokens how many are the same, by the dtype that it computes in: samples/figures.md has some.
CLOSE = {"float32": (1e-8, 1.0), "float16": (2e-5, 0.99), "bfloat16": (1e-3, 0.95)}


# What vLLM 0.32 has no kernel for on a CPU: it ends with an error of its own.
CANNOT = (("w4a16_g64", "float32"), ("w4a16_channel", "bfloat16"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where environments are."""
    named = os.environ.get("QCONVERT_CONSUMERS")
    return Path(named).resolve() if named else tmp_path_factory.mktemp("consumers")


def installed(place: Path, tool: str) -> Path:
    found = place / tool
    if not (found / "bin" / "python").exists():
        install(tool, found)
    return found


@pytest.mark.parametrize("tool", SHOWN)
def test_logits_are_those_of_the_weights_that_we_read(
    tool: str, place: Path, tmp_path: Path
) -> None:
    for row in rows(tool, installed(place, tool), tmp_path, None):
        if (row["scheme"], row["dtype"]) in CANNOT:
            assert "error" in row, row
            continue
        assert "error" not in row, row
        apart, same_top = CLOSE[row["dtype"]]
        if row["scheme"] in ("w8a8", "fp8_dynamic", "fp8_block"):  # whose inputs it makes bytes
            apart, same_top = CLOSE["bfloat16"]
        assert row["apart"] <= apart, row
        assert row["same_top"] >= same_top, row


def test_gptqmodel_decodes_the_same_bits(place: Path) -> None:
    """The tests of test_prove_packed.py that need it, in its environment."""
    done = by_gptqmodel(installed(place, "gptqmodel"))
    assert done == {"tool": "gptqmodel", "passed": 7, "failed": 0, "skipped": 0}

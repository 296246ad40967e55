"""tune --float: a directory whose weights lie on the grid."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_tune import LENGTH, text_of
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.errors import UsageError
from qconvert.files import open_model

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

import qconvert.torch as qt  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    (place / "text.txt").write_text((ROOT / "samples" / "calibration.txt").read_text()[:1600])
    more = {"num_hidden_layers": 1}
    config = CONFIGS["llama"] | more
    return write_directory(place / "llama", "llama", config=more, tensors=weights(config))


def tuned(llama: Path, output: Path, **more: Any) -> Any:
    given: dict[str, Any] = {
        **{"text": text_of(llama), "seqlen": LENGTH, "nsamples": 40, "threads": 1, "batch": 4},
        **{"steps": 6, "scheme": "q2_block32"},
    }
    return qconvert.tune(llama, output=output, **given | more)


def test_transformers_runs_weights_that_are_those_of_the_file(llama: Path, tmp_path: Path) -> None:
    """The file of the same run, decoded by its loader, gives the same logits; its codes are those
    that the directory is quantized to.
    """
    report = tuned(llama, tmp_path / "grid", floats=True)
    assert report.written
    tuned(llama, tmp_path / "t.qblk")
    ids = torch.arange(24)[None] % 200
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grid").eval()
    assert plain.dtype == torch.float32
    file = qt.load_model(tmp_path / "t.qblk", "none")
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, file(input_ids=ids).logits)
    name = "model.layers.0.mlp.up_proj.weight"
    with closing(open_model(tmp_path / "grid")) as grid:
        tensor = next(t for t in grid.tensors if t.name == name)
        values = np.array(grid.values(tensor, 0, tensor.size)).reshape(-1, 32)
    assert max(len(np.unique(block)) for block in values) <= 4  # two bits
    qconvert.quantize(
        tmp_path / "grid",
        "q2_block32",
        output=tmp_path / "again.qblk",
        rounding="nearest",
        range="minmax",
        equalise="off",
    )
    with closing(open_model(tmp_path / "again.qblk")) as again:
        tensor = next(t for t in again.tensors if t.name == name)
        found = np.array(again.values(tensor, 0, tensor.size)).reshape(-1, 32)
    assert (found == values).mean() > 0.9  # blocks that reach from the first code to the last


def test_what_does_not_go_together_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model directory"):
        tuned(llama, tmp_path / "x.qblk", floats=True)
    with pytest.raises(UsageError, match="weights alone"):
        tuned(llama, tmp_path / "x", floats=True, activations="static")
    with pytest.raises(UsageError, match="container"):
        tuned(llama, tmp_path / "x")

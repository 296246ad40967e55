"""--device: which names there are, what torch does not have, and that all goes where it is to go.

No machine of ours has a GPU: torch's answers are replaced, and on one that has, the test at the end
runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import ROOT, Call, Run

from qconvert.errors import MachineError, UsageError
from qconvert.running.device import check_device, chosen_device, device_of

torch = pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

TEXT = ROOT / "samples" / "calibration.txt"
OPTIONS = ("--text", TEXT, "--seqlen", "32", "--nsamples", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_directory(tmp_path_factory.mktemp("model") / "llama", "llama")


def with_devices(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "CPU"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        check_device(name)


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "wanted"),
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda"),
        (0, True, "auto", "mps"),
        (2, True, "auto", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (2, False, "cuda:2", None),
        (0, False, "cuda", None),
        (2, False, "mps", None),
    ],
)
def test_what_torch_has(
    gpus: int, mps: bool, name: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, gpus, mps)
    assert check_device(name) == name
    if wanted is not None:
        assert chosen_device(name) == wanted
        return
    with pytest.raises(MachineError, match=f"no device '{name}'") as refused:
        chosen_device(name)
    assert "--device cpu" in (refused.value.hint or "")


def test_commands_say_what_they_ran_on_or_refuse(
    model: Path, run: Run, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_devices(monkeypatch, 0, False)
    file, quantized = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    refused = call("calibrate", model, *OPTIONS, "--device", "cuda", "-o", file)
    assert "torch has no device 'cuda' here" in refused.err
    assert refused.code == call("calibrate", model, *OPTIONS, "-o", tmp_path / "no" / "c").code
    assert not file.exists()
    done = run("calibrate", model, *OPTIONS, "--device", "auto", "-o", file, "--json").json
    assert done["device"] == "cpu"
    assert call("quantize", model, "--scheme", "q8_channel", "-o", quantized).code == 0
    against = ("verify", quantized, "--against", model)
    quality = run(*against, *OPTIONS, "--device", "auto", "--json").json["token_quality"]
    assert quality["execution"]["device"] == "cpu"
    refused = call(*against, *OPTIONS, "--device", "cuda:0")
    assert "torch has no device 'cuda:0' here" in refused.err
    refused = call(*against, *OPTIONS, "--device", "cuda", "--activations", "dynamic")
    assert "integer products run on the CPU" in refused.err
    assert "--device goes with --text" in call(*against, "--device", "cpu").err


def test_inputs_go_where_the_weights_are(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are moved to where torch computes nothing, and the tokens follow them."""
    from qconvert.running.hugging_face import open_checkpoint
    from qconvert.running.layers import run_tokens

    checkpoint = open_checkpoint(model, streamed=True, device="meta")
    assert {p.device.type for p in checkpoint.model.parameters()} == {"meta"}
    assert device_of(checkpoint.model).type == "meta"
    seen: list[Any] = []

    def forward(input_ids: Any, **options: Any) -> None:
        seen.append(input_ids)

    monkeypatch.setattr(checkpoint.model, "forward", forward)
    run_tokens(checkpoint, np.arange(5))
    assert seen[0].device.type == "meta"
    assert seen[0].shape == (1, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device")
def test_a_gpu_finds_what_the_cpu_finds(model: Path, run: Run, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.safetensors"
        options = ("--gram", "--fisher", "--device", device, "--json")
        found.append(run("calibrate", model, *OPTIONS, *options, "-o", file).json)
    assert [f["device"] for f in found] == ["cpu", "cuda"]
    for one, other in zip(*(f["layers"] for f in found), strict=True):
        assert one["samples"] == other["samples"]
        assert one["high"] == pytest.approx(other["high"], rel=1e-3)

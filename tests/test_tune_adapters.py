"""Adapters that are trained on the integers of a file, held against peft."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Call, listing
from test_tune import LENGTH, text_of
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.errors import InputError, Stopped, UnsupportedError, UsageError
from qconvert.files import open_model
from qconvert.report import TuneReport

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

import qconvert.torch as qt  # noqa: E402
from qconvert.training import loop  # noqa: E402

STEPS = 6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, a text, and the model at 2 bits."""
    place = tmp_path_factory.mktemp("models")
    (place / "text.txt").write_text((ROOT / "samples" / "calibration.txt").read_text()[:1600])
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    more = {"num_hidden_layers": 1}
    made = write_directory(place / "llama", "llama", config=more, tensors=weights(config))
    qconvert.quantize(made, "q2_block32", output=place / "q2.qblk", rounding="nearest")
    return made


def trained(llama: Path, output: Path, **more: Any) -> TuneReport:
    given: dict[str, Any] = {
        **{"text": text_of(llama), "seqlen": LENGTH, "nsamples": 40, "threads": 1, "batch": 4},
        **{"steps": STEPS, "teacher": llama, "train": "adapters", "rank": 4, "lr": 0.02},
    }
    return qconvert.tune(llama.parent / "q2.qblk", output=output, **given | more)


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuneReport]:
    place = tmp_path_factory.mktemp("lora") / "lora"
    return place, trained(llama, place)


def decoded(llama: Path) -> Any:
    """transformers' model with what the file decodes to."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with closing(open_model(llama.parent / "q2.qblk")) as file:
        values = {
            t.name: torch.from_numpy(
                np.array(file.values(t, 0, t.size), np.float32).reshape(t.shape)
            )
            for t in file.tensors
        }
    model.load_state_dict(values)
    return model.eval()


def test_training_is_a_gain_over_the_file(lora: tuple[Path, TuneReport]) -> None:
    place, report = lora
    kl = {m.model: m.kl_mean for m in report.models}
    assert report.chosen == "tuned"
    assert report.trained_tensors == 8
    tuned, quantized = kl["tuned"], kl["quantized"]
    assert tuned is not None
    assert quantized is not None
    assert tuned < 0.95 * quantized
    assert report.output_bytes == sum((place / name).stat().st_size for name in listing(place))


def test_peft_computes_what_was_trained(llama: Path, lora: tuple[Path, TuneReport]) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    ids = torch.arange(24)[None] % 200
    theirs = peft.PeftModel.from_pretrained(decoded(llama), lora[0]).eval()
    ours = qt.load_model(llama.parent / "q2.qblk", "none", adapter=lora[0])
    plain = qt.load_model(llama.parent / "q2.qblk", "none")
    with torch.no_grad():
        wanted, found, before = (m(input_ids=ids).logits for m in (theirs, ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


def test_the_adapter_is_merged_into_another_quantization(
    llama: Path, lora: tuple[Path, TuneReport], tmp_path: Path, call: Call
) -> None:
    """W + B A, by numpy, is what a file of floats has."""
    from safetensors.numpy import load_file

    merged = tmp_path / "merged.qblk"
    assert call("quantize", llama, "--adapter", lora[0], "--scheme", "f32", "-o", merged).code == 0
    parts = load_file(lora[0] / "adapter_model.safetensors")
    place = "model.layers.0.mlp.up_proj"
    a, b = (parts[f"base_model.model.{place}.lora_{p}.weight"] for p in "AB")
    source = load_file(llama / "model.safetensors")[f"{place}.weight"]
    with closing(open_model(merged)) as file:
        tensor = next(t for t in file.tensors if t.name == f"{place}.weight")
        found = np.array(file.values(tensor, 0, tensor.size)).reshape(tensor.shape)
    np.testing.assert_allclose(found, source + b @ a, rtol=1e-6, atol=1e-7)


def test_the_same_seed_gives_the_same_bytes_after_an_interrupt_too(
    llama: Path, lora: tuple[Path, TuneReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, step = tmp_path / "lora", loop._step
    count = 0

    def stopping(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise Stopped(2, "")
        return step(*given)

    with monkeypatch.context() as m:
        m.setattr(loop, "_step", stopping)
        with pytest.raises(Stopped):
            trained(llama, place)
    assert not place.exists()
    trained(llama, place, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (place / name).read_bytes() == (lora[0] / name).read_bytes()


def test_adapters_that_are_no_gain_are_not_written(llama: Path, tmp_path: Path) -> None:
    report = trained(llama, tmp_path / "lora", lr=1.0, steps=2)
    assert not report.written
    assert not (tmp_path / "lora").exists()
    assert "no adapters are written" in " ".join(report.warnings)


def test_what_does_not_go_together_is_refused(
    llama: Path, lora: tuple[Path, TuneReport], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a directory, as peft"):
        trained(llama, tmp_path / "x.qblk")
    with pytest.raises(UsageError, match="--rank"):
        trained(llama, tmp_path / "x", rank=0)
    with pytest.raises(UsageError, match="--train"):
        qconvert.tune(
            llama, scheme="q2_block32", text=text_of(llama), output=tmp_path / "x", train="adapters"
        )
    config = {"num_hidden_layers": 2, "intermediate_size": 128}
    other = write_directory(
        tmp_path / "other", "llama", config=config, tensors=weights(CONFIGS["llama"] | config)
    )
    qconvert.quantize(other, "q2_block32", output=tmp_path / "other.qblk", rounding="nearest")
    with pytest.raises(InputError, match="another model"):
        qt.load_model(tmp_path / "other.qblk", "none", adapter=lora[0])
    (tmp_path / "bad").mkdir()
    kept = json.loads((lora[0] / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(kept))
    with pytest.raises(UnsupportedError):
        qt.load_model(llama.parent / "q2.qblk", "none", adapter=tmp_path / "bad")

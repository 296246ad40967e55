"""Models that see, run on text alone: calibrate --text, verify --text, tune."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_cases import Directories
from conftest import ROOT
from family_models import MORE, NARROW, as_stored, wide
from safetensors.numpy import load_file

import qconvert
from qconvert.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

LENGTH = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def made(name: str, place: Path) -> Path:
    """A model with random weights, and a text beside it."""
    from make_config_table import Transformers

    config = wide((NARROW | MORE)[name])
    shapes = as_stored(name, config, Transformers().shapes(config))
    text = (ROOT / "samples" / "calibration.txt").read_text()[:1600]
    (place / "text.txt").write_text(text)
    return Directories(place / name).made(config["model_type"], config, shapes)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "idefics3"])
def test_the_language_model_is_calibrated_verified_and_tuned(name: str, place: Path) -> None:
    model, text = made(name, place), place / "text.txt"
    output = place / f"{name}.safetensors"
    given: dict[str, Any] = {"text": text, "seqlen": LENGTH, "threads": 1}
    report = qconvert.calibrate(model, output=output, **given)
    assert "no token came through" in report.warnings[0]  # what sees
    found = load_file(output)
    layers = {n.removesuffix("/mean_square") for n in found if n.endswith("/mean_square")}
    assert layers
    assert not [n for n in layers if re.search("visual|vision|connector|projector", n)]
    # What enters the head, by transformers alone.
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    seen: list[Any] = []
    loaded.lm_head.register_forward_pre_hook(lambda m, x: seen.append(x[0][0].double().numpy()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text())["input_ids"]
    every = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    for window in every.copy():
        if tokenizer.bos_token_id is not None:
            window[0] = tokenizer.bos_token_id
        with torch.no_grad():
            loaded(input_ids=torch.from_numpy(window)[None])
    head = next(n for n in layers if n.endswith("lm_head"))
    mean = np.mean(np.concatenate(seen) ** 2, axis=0)
    assert found[f"{head}/mean_square"] == pytest.approx(mean, rel=1e-4)
    quantized = place / f"{name}.qblk"
    qconvert.quantize(model, "q8_channel", output=quantized)
    proof = qconvert.verify(quantized, against=model, **given, nsamples=6)
    assert proof.token_quality is not None
    assert 0 < proof.token_quality.kl_mean < 1e-2
    tuned = qconvert.tune(
        model, scheme="q3_block32", output=place / f"{name}-tuned.qblk", steps=2, blocks=2,
        batch=2, generate=0, nsamples=12, **given,
    )  # fmt: skip
    assert tuned.course[-1].validation < tuned.course[0].validation


def test_one_that_needs_pictures_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("llava", tmp_path)
    kind = transformers.LlavaForConditionalGeneration

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        raise AttributeError("no pixel_values")

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(
        UnsupportedError, match="not run the model on text alone, found AttributeError: no pixel"
    ):
        qconvert.calibrate(model, text=tmp_path / "text.txt", output=tmp_path / "x.safetensors")

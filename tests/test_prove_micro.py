"""compressed-tensors' own decoders, and transformers with them, against what qconvert writes."""

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


SAMPLE = ROOT / "samples" / "tiny-llama"


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(1, 65)[None]).logits


def dense(directory: Path, dtype: Any) -> Any:
    """The sample with the weights that qconvert reads."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=dtype)
    state = model.state_dict()
    with qconvert.load(directory) as tensors:
        for name in tensors:
            values = np.asarray(tensors[name].dequantize(), np.float32)
            state[name].copy_(torch.from_numpy(values))
    return model


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "mxfp8a16"])
def test_transformers_gives_the_logits_of_the_weights_that_we_read(
    scheme: str, tmp_path: Path
) -> None:
    """As it loads such a directory unless told otherwise, which takes a model in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    place = tmp_path / scheme
    qconvert.quantize(SAMPLE, scheme, output=place)
    peer = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    assert torch.equal(logits(peer), logits(dense(place, torch.bfloat16)))


def test_transformers_makes_inputs_bytes_with_the_static_ranges(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    cal, place = tmp_path / "c.safetensors", tmp_path / "m"
    qconvert.calibrate(SAMPLE, text=ROOT / "samples" / "calibration.txt", nsamples=4, output=cal)
    qconvert.quantize(SAMPLE, "w8a8_static", output=place, calibration=cal)
    stored = load_file(place / "model.safetensors")
    own = dense(place, torch.float32)

    def rounded(scale: Any, zero: Any) -> Any:
        def hook(module: Any, inputs: Any) -> Any:
            codes = (inputs[0] / scale + zero).round().clamp(-128, 127)
            return ((codes - zero) * scale,)

        return hook

    for name, module in own.named_modules():
        if f"{name}.input_scale" in stored:
            scale = stored[f"{name}.input_scale"].float()
            zero = stored[f"{name}.input_zero_point"].float()
            module.register_forward_pre_hook(rounded(scale, zero))
    peer = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    torch.testing.assert_close(logits(peer), logits(own), rtol=0, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    assert (logits(peer) - logits(plain)).abs().max() > 0.01  # something was rounded


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    qconvert.calibrate(SAMPLE, text=ROOT / "samples" / "calibration.txt", nsamples=4, output=path)
    return path


@pytest.mark.parametrize("scheme", ["nvfp4a4", "fp8"])
def test_transformers_loads_scales_of_inputs(
    scheme: str, calibration: Path, tmp_path: Path
) -> None:
    """And its inputs are rounded as the scheme says: a little, not to nothing."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    place = tmp_path / "m"
    qconvert.quantize(SAMPLE, scheme, output=place, calibration=calibration)
    stored = load_file(place / "model.safetensors")
    peer = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    part = "input_global_scale" if scheme == "nvfp4a4" else "input_scale"
    scales = {n: b for n, b in peer.state_dict().items() if n.endswith(part)}
    assert len(scales) == 28
    for name, scale in scales.items():
        assert torch.equal(scale.float().cpu(), stored[name].float()), name
    ours, theirs = logits(dense(place, torch.bfloat16)).float(), logits(peer).float()
    apart = ((ours - theirs).square().mean() / ours.square().mean()).sqrt()
    assert 0.001 < apart < (0.3 if scheme == "nvfp4a4" else 0.1), apart


@pytest.mark.parametrize(
    "scheme", ["nvfp4a16", "mxfp4a16", "mxfp8a16", "nvfp4a4", "fp8", "fp8_tensor"]
)
def test_the_library_decodes_every_weight_to_the_same_bits(
    scheme: str, calibration: Path, tmp_path: Path
) -> None:
    import torch
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig
    from make_foreign import decompressed
    from safetensors.torch import load_file

    place = tmp_path / scheme
    static = {"calibration": calibration} if scheme in ("nvfp4a4", "fp8") else {}
    qconvert.quantize(SAMPLE, scheme, output=place, **static)
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


@pytest.mark.parametrize("scheme", ["w4a16_g128", "w4a16_g32"])
def test_the_divergence_that_verify_promises_is_that_of_transformers(
    tmp_path: Path, scheme: str
) -> None:
    """Of next tokens over windows of 128, each beginning with the token that begins a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, text = tmp_path / "made", tmp_path / "text.txt"
    text.write_text((ROOT / "samples" / "eval.txt").read_text()[:12_000])
    qconvert.quantize(SAMPLE, scheme, output=place)
    promised = qconvert.verify(place, against=SAMPLE, text=text, seqlen=128).token_quality
    assert promised is not None
    ids = AutoTokenizer.from_pretrained(SAMPLE)(text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 128 * 128].reshape(-1, 128).clone()
    windows[:, 0] = ids[0]
    logs = []
    for path in (SAMPLE, place):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logs.append(torch.cat([model(w[None]).logits[0] for w in windows]).log_softmax(-1))
    truth, found = logs
    kl = float((truth.exp() * (truth - found)).sum(-1).mean())
    assert promised.tokens == len(truth)
    assert kl > 1e-3
    assert promised.kl_mean == pytest.approx(kl, rel=0.02)

"""What tune begins with and learns from: windows that the float model writes, factors of scales
beside codes, rescaled channels and static ranges of a calibration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.errors import UsageError
from qconvert.files import open_model

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

from qconvert.running.hugging_face import open_checkpoint  # noqa: E402
from qconvert.running.quality import Windows, windows  # noqa: E402
from qconvert.training import judging, modules, scales  # noqa: E402
from qconvert.training.fixed import held  # noqa: E402
from qconvert.training.generated import BEGINNING, written  # noqa: E402
from qconvert.training.loop import Student  # noqa: E402
from qconvert.training.preparation import prepare_model  # noqa: E402

LENGTH = 16
CHANNEL, FACTOR = 5, 64.0


def directory(place: Path, change: Mapping[str, Any]) -> Path:
    """A llama of one layer with some tensors replaced, and a text beside it."""
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    tensors = dict(weights(config)) | dict(change)
    text = (ROOT / "samples" / "calibration.txt").read_text()[:1600]
    (place / "text.txt").write_text(text)
    return write_directory(place / "m", "llama", config={"num_hidden_layers": 1}, tensors=tensors)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("models"), {})


def tuned(model: Path, output: Path, scheme: str, **more: Any) -> Any:
    given: dict[str, Any] = {
        **{"text": model.parent / "text.txt", "seqlen": LENGTH, "nsamples": 40, "threads": 1},
        **{"batch": 4, "steps": 4, "force": True},
    }
    return qconvert.tune(model, scheme=scheme, output=output, **given | more)


def calibrated(model: Path) -> Path:
    path = model.parent / "c.safetensors"
    if not path.exists():
        qconvert.calibrate(
            *(model,), text=model.parent / "text.txt", output=path, gram=True, seqlen=LENGTH,
            nsamples=40, threads=1,
        )  # fmt: skip
    return path


# --- windows that the model writes ----------------------------------------------------------------


def test_windows_begin_in_the_text_and_are_drawn_from_predictions(llama: Path) -> None:
    """Their mean log-likelihood is that of draws: minus the mean entropy of the predictions."""
    model = open_checkpoint(llama, threads=1)
    text = windows(model.tokenizer, llama.parent / "text.txt", LENGTH, "all", 20, 0)
    told: list[int] = []
    found = written(model, text, 100, 3, lambda n, _: told.append(n))
    assert found.inputs.shape == found.targets.shape == (100, LENGTH)
    assert told == [64 * LENGTH, 36 * LENGTH]
    np.testing.assert_array_equal(found.inputs[:, 1:], found.targets[:, :-1])
    assert set(found.inputs[:, 0].tolist()) == set(text.inputs[:, 0].tolist())
    known = [row.tolist() for row in np.concatenate([text.inputs, text.targets[:, -1:]], 1)]
    for row in found.inputs[:, 1:BEGINNING].tolist():
        places = range(LENGTH + 2 - BEGINNING + 1)
        assert any(row == k[i : i + BEGINNING - 1] for k in known for i in places)
    with torch.no_grad():
        logits = model.model(input_ids=torch.from_numpy(found.inputs.copy())).logits.double()
    logs = logits.log_softmax(-1)[:, BEGINNING - 1 :]
    drawn = torch.from_numpy(found.targets[:, BEGINNING - 1 :].copy())
    likelihood = logs.gather(-1, drawn[..., None]).squeeze(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    off = (likelihood + entropy).flatten()
    assert abs(float(off.mean())) < 4 * float(off.std()) / len(off) ** 0.5
    before = torch.random.get_rng_state()
    again = written(model, text, 100, 3, lambda n, _: None)
    assert torch.equal(before, torch.random.get_rng_state())
    np.testing.assert_array_equal(again.inputs, found.inputs)
    other = written(model, text, 100, 4, lambda n, _: None)
    assert (other.inputs != found.inputs).any()


def test_both_kinds_are_spread_evenly() -> None:
    def some(first: int, count: int) -> Windows:
        ids = np.arange(first, first + count)[:, None]
        return Windows(ids, ids, 0)

    found = judging.mixed(some(0, 3), some(100, 4), 8)
    assert found.inputs.ravel().tolist() == [0, 100, 1, 101, 2, 102, 0, 103]
    assert judging.mixed(some(0, 3), some(100, 4), 4).inputs.ravel().tolist() == [*range(100, 104)]


def test_a_short_text_is_added_to(llama: Path, tmp_path: Path) -> None:
    """32 windows of the text for 10 steps of 4: 8 are lacking; at most half of all are written."""
    report = tuned(llama, tmp_path / "m.qblk", "q3_channel", steps=10)
    assert (report.training_windows, report.generated_windows) == (32, 8)
    report = tuned(llama, tmp_path / "m.qblk", "q3_channel", steps=20, batch=8)
    assert (report.training_windows, report.generated_windows) == (32, 80)
    report = tuned(llama, tmp_path / "m.qblk", "q3_channel", steps=2, generate=5)
    assert (report.training_windows, report.generated_windows) == (32, 5)
    report = tuned(llama, tmp_path / "m.qblk", "q3_channel", steps=10, loss="lm")
    assert (report.training_windows, report.generated_windows) == (32, 0)
    with pytest.raises(UsageError, match="--generate goes with --loss distill"):
        tuned(llama, tmp_path / "m.qblk", "q3_channel", generate=5, loss="lm")


# --- factors of scales beside codes ---------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["c3_block16", "q3_block32"])
def test_factors_multiply_what_codes_stand_for(scheme: str, llama: Path, tmp_path: Path) -> None:
    """w' = g s (u(w) - z): gradients by hand, and the file's bytes."""
    name = "model.layers.0.mlp.up_proj.weight"
    path = tmp_path / "q.qblk"
    qconvert.quantize(llama, scheme, output=path, rounding="nearest", equalise="off")
    with closing(open_model(path)) as model:
        (info,) = [t for t in model.tensors if t.name == name]
        base = held(model.stored(info))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weight = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    with closing(open_model(llama)) as source:
        (tensor,) = [t for t in source.tensors if t.name == name]
    from qconvert.schemes import parse_scheme

    scheme_of_file: Any = parse_scheme(scheme)
    fake = modules.FakeWeight(tensor, scheme_of_file, weight, learn=False)
    fake.keep_scales(base)
    plain = fake(weight).detach().clone()
    fake.gains = scales.TunedScales(base)
    log = fake.gains.log
    assert torch.equal(fake(weight).detach(), plain)
    with torch.no_grad():
        log[0], log[1:] = 0.5, -0.25
    found = fake(weight)
    groups = len(log) // weight.shape[0]
    factors = log.detach().exp().reshape(weight.shape[0], groups)
    factors = factors.repeat_interleave(weight.shape[1] // groups, 1)
    assert torch.allclose(found.detach(), plain * factors, rtol=2e-3)  # scales of 16 bits
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found.backward(upstream)
    by_log = (upstream * found.detach()).reshape(len(log), -1).sum(1)
    assert torch.allclose(log.grad, by_log, rtol=1e-4, atol=1e-5)
    passed = weight.grad != 0
    assert passed.float().mean() > 0.9  # others are clipped
    assert torch.allclose(weight.grad[passed], (upstream * factors)[passed], rtol=1e-5)
    stored = fake.stored(weight)
    assert torch.equal(
        torch.from_numpy(stored.values(0, weight.numel()).reshape(weight.shape)), found.detach()
    )


# --- what a calibration gives to begin with -------------------------------------------------------


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function as the llama, with a channel of a norm that is 64 times as large."""
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    tensors = weights(config)
    norm = "model.layers.0.post_attention_layernorm.weight"
    change = {norm: np.array(tensors[norm], np.float32)}
    change[norm][CHANNEL] *= FACTOR
    for layer in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.{layer}.weight"
        change[name] = np.array(tensors[name], np.float32)
        change[name][:, CHANNEL] /= FACTOR
    return directory(tmp_path_factory.mktemp("outliers"), change)


def test_training_begins_with_rescaled_channels(outliers: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.qblk"
    report = tuned(
        *(outliers, output, "c3_block16"), calibration=calibrated(outliers), anyway=True, lr=1e-4,
        generate=8,
    )  # fmt: skip
    assert report.began_compensated == 8
    assert not [n for n in report.notes if "training began with nearest codes" in n]
    with closing(open_model(output)) as model:
        told = json.loads(json.dumps(model.header.provenance))
    assert "model.layers.0.mlp.up_proj.weight" in told["equalisation"]["tensors"]
    kls = {m.model: m.kl_mean for m in report.models}
    assert kls["compensated"] < kls["nearest"]
    # It begins where compensated rounding is: what is trained computes as the file does.
    assert report.course[0].validation < 0.7 * kls["nearest"]
    proof = qconvert.verify(output, against=outliers)
    assert [c.id for c in proof.checks if c.status == "fail"] == []


def test_training_begins_with_calibrated_ranges(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    path = tmp_path / "q.qblk"
    qconvert.quantize(llama, "q4_block32", output=path, calibration=calibrated(llama))
    with qconvert.load(path) as file:
        noted = file[name].activation
    assert noted["observer"] == "nmse"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    training = prepare_model(model, "q4_block32", activations="static")
    student = Student(open_checkpoint(llama, threads=1), training, {})
    student.begin_at({}, {name: noted})
    found = training.inputs[name]
    found.train()
    x = 100 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scale, zero = np.float32(noted["scale"]), noted["zero_point"]
    codes = np.clip(np.rint(x.numpy() / scale + np.float32(zero)), -128, 127)
    np.testing.assert_array_equal(found(x).numpy(), (codes - np.float32(zero)) * scale)
    assert found.note() == noted

"""tune of a quantized file: codes stay bit for bit, scales, zero points and gains are trained."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import ROOT, Call, listing
from test_tune import LENGTH, figures, models, text_of
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.errors import InputError, Stopped, UnsupportedError, UsageError
from qconvert.files import open_model
from qconvert.files.qblk import QblkModel
from qconvert.report import TuneReport

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

import qconvert.torch as qt  # noqa: E402
from qconvert.training import loop, tune_file  # noqa: E402
from qconvert.training.options import TuneOptions  # noqa: E402
from qconvert.training.scales import TunedScales  # noqa: E402

STEPS = 6
# A scale for each block with zero points, one for each row, levels, and a table.
SCHEMES = ["q2_block32_asym", "q3_channel_sym", "c2_block16", "nf4_block64"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer in binary16, whose gains are rounded to that."""
    place = tmp_path_factory.mktemp("models")
    text = (ROOT / "samples" / "calibration.txt").read_text()[:1600]
    (place / "text.txt").write_text(text)
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    halves = {name: w.astype(np.float16) for name, w in weights(config).items()}
    more = {"num_hidden_layers": 1}
    return write_directory(place / "llama", "llama", config=more, tensors=halves)


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of files, one for each scheme."""
    place = tmp_path_factory.mktemp("made")
    for scheme in SCHEMES:
        qconvert.quantize(llama, scheme, output=place / f"{scheme}.qblk", rounding="nearest")
    return place


def tuned(llama: Path, source: Path, output: Path, **more: Any) -> TuneReport:
    given: dict[str, Any] = {
        **{"text": text_of(llama), "seqlen": LENGTH, "nsamples": 40, "threads": 1, "force": True},
        **{"batch": 4, "steps": STEPS, "lr": 0.02, "teacher": llama},
    }
    return qconvert.tune(source, output=output, **given | more)


def segments(path: Path) -> dict[str, dict[str, bytes]]:
    """Of each tensor of a file, checked against its digests."""
    with closing(open_model(path)) as model:
        model.check_payload(lambda _: None)
        found = {}
        for t in model.tensors:
            stored = model.stored(t)
            parts = stored.encoding.segments(t.shape)
            found[t.name] = {p.kind: stored.read(p.kind, 0, p.size) for p in parts}
        return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_stay_bit_for_bit(scheme: str, llama: Path, made: Path, tmp_path: Path) -> None:
    source, output = made / f"{scheme}.qblk", tmp_path / "n.qblk"
    report = tuned(llama, source, output)
    found = models(report)
    assert list(found) == ["float", "quantized", "tuned"]
    assert report.chosen == "tuned"
    assert found["float"].kl_mean == 0
    assert found["tuned"].kl_mean < 0.98 * found["quantized"].kl_mean
    assert scheme in report.scheme
    before, after = segments(source), segments(output)
    assert output.stat().st_size == source.stat().st_size == report.output_bytes
    changed: dict[str, int] = {}
    for name, parts in before.items():
        for kind, data in parts.items():
            if data != after[name][kind]:
                changed[kind] = changed.get(kind, 0) + 1
    assert changed.pop("data") == 3  # norms: all that is kept but for what is looked up
    scales = {"c2_block16": "row_scales"}.get(scheme, "scales")
    assert scales in changed
    assert changed.keys() <= {scales, "zero_points"}
    if "asym" in scheme:
        assert "zero_points" in changed
    # The figures are those of the file, as transformers runs it.
    kl, nll = figures(llama, qt.load_model(output, "none"), 1)
    assert found["tuned"].kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found["tuned"].perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    proof = qconvert.verify(output, against=llama)
    assert [c.id for c in proof.checks if c.status == "fail"] == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_formula(scheme: str, made: Path) -> None:
    """w = s·exp(a)·(u - z - b), as torch's own autograd has it in float64."""
    with closing(open_model(made / f"{scheme}.qblk")) as model:
        (info,) = (t for t in model.tensors if t.name.endswith("0.mlp.up_proj.weight"))
        stored = model.stored(info)
        part = TunedScales(stored)
        base = torch.from_numpy(np.array(stored.values(0, info.size)).reshape(info.shape))
        codes = stored.encoding.codes(stored) if scheme != "nf4_block64" else None
    weight = torch.zeros(info.shape)
    gradient = torch.from_numpy(np.random.default_rng(0).normal(size=info.shape))
    assert torch.equal(part(weight), base)  # the file as it is
    (part(weight) * gradient.float()).sum().backward()
    log = torch.zeros(len(part.log), dtype=torch.float64, requires_grad=True)
    values = base.double()
    if part.zero is None:
        factors = (
            log.exp()
            .reshape(info.shape[0], -1)
            .repeat_interleave(info.shape[1] // (len(log) // info.shape[0]), 1)
        )
        (values * factors * gradient).sum().backward()
    else:
        assert codes is not None
        moved = torch.zeros(len(part.log), dtype=torch.float64, requires_grad=True)
        group = codes.block
        u = torch.from_numpy(codes.codes.astype(np.float64)).reshape(-1, group)
        s = torch.from_numpy(codes.scales.astype(np.float64)).reshape(-1, 1)
        z = torch.from_numpy(codes.zero_points.astype(np.float64)).reshape(-1, 1)
        w = s * log.exp()[:, None] * (u - z - moved[:, None])
        (w * gradient.reshape(-1, group)).sum().backward()
        torch.testing.assert_close(part.zero.grad.double(), moved.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.log.grad.double(), log.grad, rtol=1e-4, atol=1e-5)


def test_parts_can_be_left_out(llama: Path, made: Path, tmp_path: Path) -> None:
    source = made / "q3_channel_sym.qblk"
    before = segments(source)
    for more, wanted in (
        ({"train": "norms"}, {"data"}),
        ({"train": "scales"}, {"scales"}),
        ({"keep": ["*norm*", "*down_proj*"]}, {"scales"}),
    ):
        tuned(llama, source, tmp_path / "n.qblk", anyway=True, **more)
        after = segments(tmp_path / "n.qblk")
        changed = {(n, k) for n, p in before.items() for k, d in p.items() if d != after[n][k]}
        assert {kind for _, kind in changed} == wanted
        if "keep" in more:
            assert not any("down_proj" in name for name, _ in changed)


def test_next_tokens_need_no_teacher(llama: Path, made: Path, tmp_path: Path) -> None:
    source = made / "q2_block32_asym.qblk"
    report = tuned(llama, source, tmp_path / "n.qblk", teacher=None, loss="lm")
    found = models(report)
    assert list(found) == ["quantized", "tuned"]
    assert found["quantized"].kl_mean == 0  # held against itself
    assert found["tuned"].perplexity < found["quantized"].perplexity
    _, nll = figures(llama, qt.load_model(tmp_path / "n.qblk", "none"), 1)
    assert found["tuned"].perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)


def test_where_it_is_no_gain_the_file_is_copied(
    llama: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = made / "q3_channel_sym.qblk", tmp_path / "n.qblk"
    report = tuned(llama, source, output, lr=1.0, steps=1)
    assert report.chosen == "quantized"
    assert "the file is that of the file as it was" in report.warnings[0]
    assert output.read_bytes() == source.read_bytes()
    inner = loop._loss

    def broken(*given: Any) -> Any:
        return inner(*given) * float("nan")

    monkeypatch.setattr(loop, "_loss", broken)
    report = tuned(llama, source, output)
    assert report.stopped == "numbers that are not finite at step 1"
    assert output.read_bytes() == source.read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    llama: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = made / "q2_block32_asym.qblk", tmp_path / "n.qblk"
    tuned(llama, source, tmp_path / "whole.qblk")
    inner, calls = loop.divergence, []

    def divergence(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return inner(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "divergence", divergence)
        with pytest.raises(Stopped, match=f"^3 of {STEPS} steps are kept"):
            tuned(llama, source, output, force=False)
    with pytest.raises(InputError, match="another run: the model"):
        tuned(llama, made / "c2_block16.qblk", output, resume=True)
    assert tuned(llama, source, output, resume=True).resumed_at == 3
    assert output.read_bytes() == (tmp_path / "whole.qblk").read_bytes()
    assert sorted(listing(tmp_path)) == ["n.qblk", "whole.qblk"]


def test_a_file_can_be_tuned_again(llama: Path, made: Path, tmp_path: Path) -> None:
    """Its provenance keeps what was said of it before."""
    once, twice = tmp_path / "1.qblk", tmp_path / "2.qblk"
    tuned(llama, made / "c2_block16.qblk", once, train="norms", anyway=True)
    tuned(llama, once, twice, train="scales", anyway=True)
    with closing(open_model(twice)) as model:
        assert isinstance(model, QblkModel)
        noted: Any = model.header.provenance["finetune"]
        names = {t.name for t in model.tensors}
    assert (
        {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"} <= {*noted["tensors"]} <= names
    )
    assert noted["scales_of"] == "1.qblk"
    assert noted["judged"]["tuned"]["kl"] > 0


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scheme": "q4_block32"}, UsageError, "--scheme does not go with a file that is quantized"),
    ({"tensor_scheme": {"*": "q4_block32"}}, UsageError, "--tensor-scheme does not go with"),
    ({"calibration": "c"}, UsageError, "--calibration does not go with"),
    ({"activations": "static"}, UsageError, "--activations does not go with"),
    ({"train": "weights"}, UsageError, "--train, found weights, wanted all, scales, norms"),
    ({"teacher": None}, UsageError, "no float model to learn from, wanted --teacher"),
    ({"keep": ["nothing*"]}, UsageError, r"--keep: no tensor matches 'nothing\*'"),
    ({"keep": ["*"]}, UsageError, "--train all: the file has nothing of that kind"),
    ({"output": "n.gguf"}, UnsupportedError, r"n\.gguf: .* takes a \.qblk file and writes one"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_wrong_options_are_refused(
    options: dict[str, Any], kind: type[Exception], message: str, llama: Path, made: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        tuned(llama, made / "c2_block16.qblk", **{"output": Path("n.qblk"), **options})
    assert listing(tmp_path) == {}


def test_other_files_are_refused(llama: Path, tmp_path: Path) -> None:
    gguf, encoder, damaged = (tmp_path / n for n in ("m.gguf", "e.qblk", "d.qblk"))
    qconvert.quantize(llama, "q4_0", output=gguf)
    with pytest.raises(UnsupportedError, match=r"m\.gguf: .* takes a \.qblk file"):
        tuned(llama, gguf, tmp_path / "n.qblk")
    qconvert.quantize(write_directory(tmp_path / "bert", "bert"), "q4_block32", output=encoder)
    with pytest.raises(UnsupportedError, match="predict next tokens, found an encoder"):
        tuned(llama, encoder, tmp_path / "n.qblk")
    qconvert.quantize(llama, "q4_block32", output=damaged)
    data = bytearray(damaged.read_bytes())
    data[-70] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputError, match=r"d\.qblk"):
        tuned(llama, damaged, tmp_path / "n.qblk")
    assert not (tmp_path / "n.qblk").exists()
    with pytest.raises(UsageError, match="--scheme is missing"):
        tuned(llama, llama, tmp_path / "n.qblk")


def test_the_command_is_the_function(llama: Path, made: Path, tmp_path: Path, call: Call) -> None:
    source = made / "c2_block16.qblk"
    report = tuned(llama, source, tmp_path / "n.qblk")
    words = ["--steps", str(STEPS), "--nsamples", "40", "--lr", "0.02", "--seqlen", str(LENGTH)]
    line = ["tune", source, "--teacher", llama, "--text", text_of(llama), *words, "--threads", "1"]
    told = call(*line, "-o", tmp_path / "m.qblk", "--json", "--html", tmp_path / "m.html")
    assert told.code == 0, told
    assert (tmp_path / "m.qblk").read_bytes() == (tmp_path / "n.qblk").read_bytes()
    jsonschema.validate(told.json, json.loads((ROOT / "formats/reports/tune.json").read_text()))
    assert told.json == report.to_json() | {"output": str(tmp_path / "m.qblk")}
    shown = call(*line, "-o", tmp_path / "m.qblk", "--force", "-q").out
    assert "over the file as it was" in " ".join(shown.split())


def test_memory_is_stated_per_value(made: Path) -> None:
    """Of the state: four float32 numbers for each scale, zero point and gain."""
    options = TuneOptions(None, Path("t"), Path("o"))
    with closing(open_model(made / "q2_block32_asym.qblk")) as model:
        assert isinstance(model, QblkModel)
        coded = [t for t in model.tensors if "_block32" in t.dtype]
        groups = sum(t.size // 32 for t in coded)
        gains = sum(t.size for t in model.tensors if len(t.shape) == 1)
        _, kept = tune_file._needed(model, options)
    assert 16 * (groups + gains) <= kept <= 16 * (2 * groups + gains)

"""Budgets: the choice against brute force, the prediction against the file that was written."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import ROOT, Call, Run

from qconvert.architectures import restored
from qconvert.calibration.file import Calibration
from qconvert.calibration.observers import ObserverSettings
from qconvert.commands.calibrate import calibrate
from qconvert.commands.inspect import inspect
from qconvert.commands.quantize import quantize
from qconvert.errors import FormatError, UnsupportedError, UsageError
from qconvert.files import open_model
from qconvert.report import QuantizeReport
from qconvert.stages.assignment import assign
from qconvert.stages.quantize_options import PRESETS

WHOLE = {"qblk": "q4_block32", "gguf": "q8_0"}
TEXT = ROOT / "samples" / "calibration.txt"


# --- the assignment -------------------------------------------------------------------------------


def brute_force(costs: list[list[float]], losses: list[list[float]], limit: float) -> float | None:
    found = [
        sum(losses[i][k] for i, k in enumerate(picks))
        for picks in itertools.product(*(range(len(c)) for c in costs))
        if sum(costs[i][k] for i, k in enumerate(picks)) <= limit
    ]
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_better(seed: int) -> None:
    stream = np.random.RandomState(seed)
    for _ in range(10):
        counts = stream.randint(1, 6, size=stream.randint(1, 6))
        costs = [[float(c) for c in stream.randint(1, 30, size=n)] for n in counts]
        losses = [stream.uniform(size=n).tolist() for n in counts]
        limit = float(stream.randint(5, 90))
        wanted, found = brute_force(costs, losses, limit), assign(costs, losses, limit)
        if wanted is None:
            assert found is None
            continue
        assert found is not None
        assert found.optimal
        assert found.gap == 0
        assert found.loss == pytest.approx(wanted, abs=1e-12)
        assert found.cost == sum(c[k] for c, k in zip(costs, found.picks, strict=True)) <= limit
        assert found.loss == sum(e[k] for e, k in zip(losses, found.picks, strict=True))


def test_many_items_are_chosen_for_as_well() -> None:
    """Three hundred tensors of three sizes: the Lagrangian bounds what is left to gain."""
    stream = np.random.RandomState(1)
    bits = np.array([2.5, 3.0, 3.3, 4.0, 4.3, 4.5, 5.3, 6.3, 8.3])
    sizes = stream.choice([100, 400, 1000], size=300) * 1000
    costs = [(s * bits / 8).tolist() for s in sizes]
    losses = [(s * 10 ** stream.normal() * 4.0**-bits).tolist() for s in sizes]
    found = assign(costs, losses, 4.3 * sizes.sum() / 8)
    assert found
    assert found.gap < 1e-3 * found.loss
    assert found.cost <= 4.3 * sizes.sum() / 8


# --- files within a budget ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_directory(tmp_path_factory.mktemp("model") / "llama", "llama")


def informed(model: Path) -> Path:
    """A calibration with Fisher information."""
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")
    from qconvert.stages.calibrate_text import TextOptions, calibrate_text

    path = model.with_suffix(".safetensors")
    settings = ObserverSettings("minmax")
    given = {"seqlen": 32, "nsamples": 8, "threads": 1, "fisher": True}
    calibrate_text(TextOptions(model, (TEXT,), path, settings, **given))
    return path


@pytest.fixture(scope="module")
def calibration(model: Path) -> Path:
    return informed(model)


Make = Callable[..., QuantizeReport]


@pytest.fixture
def make(model: Path, calibration: Path, tmp_path: Path) -> Make:
    """Quantize the model, with its calibration unless told otherwise."""

    def run(name: str = "m.qblk", **options: Any) -> QuantizeReport:
        given = {"output": tmp_path / name, "calibration": calibration, "threads": 1}
        return quantize(model, **given | options)

    return run


def divergence(file: Path, model: Path, calibration: Path) -> float:
    """1/2 Σ D d² of what a file decodes to, under the names of the checkpoint."""
    made, source = open_model(file), open_model(model)
    read: Any = made
    if file.suffix == ".gguf":  # back under the names and in the order of the checkpoint
        config, shapes = model / "config.json", {t.name: t.shape for t in source.tensors}
        read = restored(made, json.loads(config.read_text()), config, shapes).model
    tensors = {t.name: t for t in read.tensors}
    total = 0.0
    with Calibration(calibration) as known:
        for tensor in source.tensors:
            d = known.sensitivity(tensor.name)
            if d is not None:
                after = read.values(tensors[tensor.name], 0, tensor.size)
                errors = after - source.values(tensor, 0, tensor.size).astype(np.float64)
                total += 0.5 * float(np.sum(d.array() * errors.reshape(d.shape) ** 2))
    made.close()
    source.close()
    return total


@pytest.mark.parametrize("name", ["m.qblk", "m.gguf"])
def test_a_file_keeps_to_its_bits_and_to_its_prediction(
    name: str, make: Make, model: Path, calibration: Path, tmp_path: Path
) -> None:
    found = {}
    for bits in (4.8, 6.5):
        report = make(name, target_bpw=bits, force=True, sensitivities=tmp_path / "s.json")
        assert report.model_bits_per_weight
        assert report.prediction
        assert report.prediction.kl
        assert 0.9 * bits < report.model_bits_per_weight <= bits
        assert report.prediction.optimal
        measured = divergence(tmp_path / name, model, calibration)
        assert report.prediction.kl == pytest.approx(measured, rel=1e-4)
        found[bits] = report.prediction.kl
        first = bits == 4.8
        assert (report.prediction.measured > 0) == first  # then it is in the file
    assert found[6.5] < found[4.8] / 3


def test_experts_of_a_gguf_file_keep_to_their_prediction(tmp_path: Path) -> None:
    """They are stacked there, each with columns of its own."""
    model = tiny_models.write_directory(tmp_path / "moe", "qwen3-moe")
    known, file = informed(model), tmp_path / "m.gguf"
    report = quantize(model, target_bpw=7.5, calibration=known, output=file, threads=1)
    assert report.prediction
    assert report.prediction.without == []
    assert report.prediction.kl == pytest.approx(divergence(file, model, known), rel=1e-4)


@pytest.mark.parametrize("name", ["m.qblk", "m.gguf"])
def test_the_mix_is_the_best_of_all(name: str, make: Make, tmp_path: Path) -> None:
    """All but four tensors are kept from the choice; of those every combination is tried."""
    bits = {"m.qblk": 18.0, "m.gguf": 23.5}[name]
    free = {
        "m.qblk": ("lm_head", "layers.0.mlp.up_proj", "layers.1.mlp.down_proj", "embed_tokens"),
        "m.gguf": ("0.attn_q", "0.ffn_up", "1.ffn_down", "token_embd"),
    }[name]
    losses = tmp_path / "s.json"
    first = make(name, target_bpw=6.0, sensitivities=losses, dry_run=True)
    kept = [t.name for t in first.tensors if t.quantized and not any(f in t.name for f in free)]
    fixed = {"keep": kept, "sensitivities": losses, "target_bpw": bits, "dry_run": True}
    report = make(name, **fixed)
    assert report.prediction
    assert report.prediction.measured == 0
    measured = json.loads(losses.read_text())["tensors"]
    chosen = [t for t in report.tensors if t.quantized or t.reason == "chosen for the budget"]
    assert len(chosen) == 4
    schemes = [list(measured[t.name].values()) for t in chosen]
    weights = sum(int(np.prod(t.shape)) for t in report.tensors)
    others = sum(t.nbytes for t in report.tensors) - sum(t.nbytes for t in chosen)
    wanted = brute_force(
        [[s["bytes"] for s in options] for options in schemes],
        [[s["kl"] for s in options] for options in schemes],
        bits * weights / 8 - others,
    )
    assert wanted is not None
    assert report.prediction.kl == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["m.qblk", "m.gguf"])
def test_a_size_is_that_of_the_whole_file(name: str, make: Make, tmp_path: Path) -> None:
    wanted = 100_000
    report = make(name, target_size=wanted)
    size = (tmp_path / name).stat().st_size
    assert report.output_bytes == size <= wanted
    assert size > 0.85 * wanted


def test_a_divergence_is_kept_with_few_bytes(make: Make) -> None:
    rough, fine = (make(max_kl=kl, force=True) for kl in (0.01, 0.001))
    assert rough.prediction
    assert rough.prediction.kl
    assert 0.008 < rough.prediction.kl <= 0.01
    assert fine.prediction
    assert fine.prediction.kl
    assert 0.0008 < fine.prediction.kl <= 0.001
    assert rough.output_bytes < fine.output_bytes


def test_what_was_asked_for_stays(make: Make) -> None:
    report = make(
        target_bpw=6.0, tensor_scheme={"*up_proj*": "q4_block32"}, keep="*q_proj*", dry_run=True
    )
    stored = {t.name: t.stored for t in report.tensors}
    assert {s for n, s in stored.items() if "up_proj" in n} == {"q4_block32"}
    assert {s for n, s in stored.items() if "q_proj" in n} == {"F32"}


@pytest.mark.parametrize(("name", "scheme"), [("m.qblk", "q8_channel"), ("m.gguf", "q8_0")])
def test_norms_stay_as_they_are(name: str, scheme: str, make: Make) -> None:
    """llama.cpp multiplies with float32 norms alone."""
    budget, plain = make(name, target_bpw=5.0), make(name, scheme=scheme, dry_run=True)
    vectors = {t.name: t.stored for t in plain.tensors if len(t.shape) == 1}
    assert len(vectors) == 5
    assert {t.name: t.stored for t in budget.tensors if len(t.shape) == 1} == vectors


def test_rows_that_do_not_divide_take_types_that_do(make: Make) -> None:
    """Rows of 64 and 96 values: nothing with blocks of 256."""
    report = make("m.gguf", target_bpw=5.0)
    taken = {t.stored for t in report.tensors if t.quantized}
    assert taken <= {"q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1", "q8_0", "f16"}
    assert report.prediction
    assert "fall" not in " ".join(report.warnings)


def test_without_gradients_roles_decide_and_nothing_is_predicted(
    make: Make, tmp_path: Path
) -> None:
    report = make(target_bpw=5.0, calibration=None)
    assert report.prediction
    assert report.prediction.kl is None
    assert report.prediction.basis == "priors by role"
    bits = {t.name: t.bits_per_weight for t in report.tensors}
    head, query = bits["lm_head.weight"], bits["model.layers.0.self_attn.q_proj.weight"]
    assert head
    assert query
    assert head > query
    with pytest.raises(UsageError, match="--max-kl needs to know"):
        make(max_kl=0.01, calibration=None, output=tmp_path / "no.qblk")


@pytest.mark.parametrize("container", ["qblk", "gguf"])
def test_the_curve_says_what_each_budget_will_cost_and_lose(
    container: str, make: Make, model: Path, calibration: Path, tmp_path: Path
) -> None:
    """Each of its points is what quantize finds for that many bits."""
    losses = tmp_path / "s.json"
    report = inspect(
        *(model,), curve=True, calibration=calibration, format=container, sensitivities=losses
    )
    assert report.curve
    assert report.curve.container == container
    points = report.curve.points
    assert [p.bits for p in points] == sorted({p.bits for p in points})
    assert [p.nbytes for p in points] == sorted(p.nbytes for p in points)
    assert [p.kl for p in points] == sorted((p.kl for p in points), reverse=True)
    mark = report.curve.smallest["0.01"]
    assert mark == min(p.bits for p in points if p.kl is not None and p.kl <= 0.01)
    (whole,) = [p for p in report.curve.uniform if p.scheme == WHOLE[container]]
    done = make(
        f"m.{container}", scheme=whole.scheme, sensitivities=None, rounding="nearest",
        equalise="off", force=True, **({"pure": True} if container == "gguf" else {}),
    )  # fmt: skip
    assert done.output_bytes <= whole.nbytes < done.output_bytes + 15_000
    quantized = [t for t in done.tensors if t.quantized and len(t.shape) > 1]
    error = sum(math.prod(t.shape) * (t.nmse or 0.0) for t in quantized)
    weights = sum(math.prod(t.shape) for t in quantized)
    assert whole.sqnr_db == pytest.approx(-10 * math.log10(error / weights), abs=0.02)
    with pytest.raises(UsageError, match="no mix"):
        make(f"m.{container}", target_bpw=points[0].bits - 1e-6, sensitivities=losses)
    for point in (points[1], points[-2]):
        done = make(
            f"m.{container}", target_bpw=point.bits, sensitivities=losses, rounding="nearest",
            force=True,
        )  # fmt: skip
        assert done.prediction
        assert done.prediction.measured == 0  # the curve has left them in the file
        assert done.prediction.kl == point.kl
        assert done.output_bytes <= point.nbytes < done.output_bytes + 15_000  # of the header


@pytest.mark.parametrize("name", ["m.qblk", "m.gguf"])
def test_a_preset_is_a_budget_with_a_name(name: str, make: Make, tmp_path: Path) -> None:
    losses = tmp_path / "s.json"
    sizes = []
    for preset, bits in PRESETS.items():
        done = make(name, preset=preset, sensitivities=losses, force=True)
        assert done.scheme == preset
        assert done.model_bits_per_weight
        if done.model_bits_per_weight > bits[name[2:]]:
            # Rows of 64 and 96 values: no ggml type for them has fewer bits than q4_0.
            assert name == "m.gguf"
            assert {t.stored for t in done.tensors if t.quantized} <= {"q4_0", "iq4_nl"}
        sizes.append(done.output_bytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_the_help_names_the_bits_of_the_presets(call: Call) -> None:
    told = " ".join(call("quantize", "--help").out.split())
    qblk, gguf = ([f"{bits[name]:g}" for bits in PRESETS.values()] for name in ("qblk", "gguf"))
    assert f"a budget of {qblk[0]}, {qblk[1]} or {qblk[2]} bits per weight" in told
    assert f"in GGUF {gguf[0]}, {gguf[1]} or {gguf[2]}" in told


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 1.0}, r"--target-bpw: no mix .*found 1.0, wanted \d\.\d+ to \d+\.\d+"),
        ({"target_size": 1000}, r"--target-size: no mix .*found 1,000, wanted [\d,]+ to [\d,]+ b"),
        ({"target_bpw": 4.5, "max_kl": 0.1}, "several budgets"),
        ({"target_bpw": -1}, "a number above 0"),
        ({"target_bpw": 4.5, "scheme": "q4_block64"}, "--scheme and a budget"),
        ({"target_bpw": 4.5, "pure": True}, "--pure"),
        ({"sensitivities": "s.json"}, "goes with a budget"),
        ({"preset": "tiny"}, "found tiny, wanted small or balanced or near-lossless"),
        ({"preset": "small", "target_bpw": 4.5}, "several budgets"),
        ({}, "neither --scheme nor a budget"),
    ],
)
def test_budgets_that_cannot_be(
    options: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make(**options)
    assert not (tmp_path / "m.qblk").exists()


def test_a_curve_without_gradients_predicts_nothing(model: Path, call: Call) -> None:
    curve = inspect(model, curve=True).curve
    assert curve
    assert {p.kl for p in (*curve.points, *curve.uniform)} == {None}
    known = [p.sqnr_db for p in curve.points if p.sqnr_db is not None]
    assert known == sorted(known)
    # Four even levels on one scale have 12.04 dB of uniform weights, which these are; a table that
    # was fitted to them comes near that, and scales of blocks add to it.
    assert 5 < known[0] < 13
    told = call("inspect", model, "--curve").out
    assert "SQNR is that of the weights" in " ".join(told.split())
    assert "nats" not in told


def test_a_curve_by_a_text_is_that_of_a_calibration_with_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")
    made = tmp_path / "c.safetensors"
    calibrate(model, output=made, text=TEXT, nsamples=2, fisher=True)
    assert inspect(model, curve=True, text=TEXT, nsamples=2).curve == (
        inspect(model, curve=True, calibration=made).curve
    )
    for wrong, told in (
        ({"curve": True, "text": TEXT, "calibration": made}, "one of them"),
        ({"curve": True, "nsamples": 2}, "--nsamples goes with --text"),
        ({"text": TEXT}, "go with --curve"),
    ):
        with pytest.raises(UsageError, match=told):
            inspect(model, **wrong)


def test_a_curve_goes_without_what_shows_tensors(model: Path, calibration: Path) -> None:
    with pytest.raises(UsageError, match="goes without --tensor"):
        inspect(model, curve=True, calibration=calibration, tensor="*q_proj*")
    with pytest.raises(UsageError, match="go with --curve"):
        inspect(model, calibration=calibration)


def test_the_curve_is_drawn(model: Path, calibration: Path, call: Call) -> None:
    done = call("inspect", model, "--curve", "--calibration", calibration)
    assert done.code == 0
    assert "KL, nats" in done.out
    assert "█" in done.out
    assert "--target-bpw" in done.out
    assert "--preset balanced: 4.30 bits" in done.out


def test_no_other_models_sensitivities(make: Make, model: Path, tmp_path: Path) -> None:
    losses = tmp_path / "s.json"
    make(target_bpw=5.0, sensitivities=losses)
    with pytest.raises(UnsupportedError, match="of another container"):
        make("m.gguf", target_bpw=5.0, sensitivities=losses)
    other = tiny_models.write_directory(tmp_path / "other", "mistral")
    with pytest.raises(UnsupportedError, match="of another model"):
        quantize(other, target_bpw=5.0, sensitivities=losses, output=tmp_path / "o.qblk", threads=1)
    fields = json.loads(losses.read_text())
    next(iter(fields["tensors"].values()))["q4_block32"]["kl"] = -1
    losses.write_text(json.dumps(fields))
    with pytest.raises(FormatError, match="damaged sensitivities"):
        make(target_bpw=5.0, sensitivities=losses, force=True)
    losses.write_text("{}")
    with pytest.raises(FormatError, match="not a file of sensitivities"):
        make(target_bpw=5.0, sensitivities=losses, force=True)


def test_the_prediction_is_told_before_and_beside_what_is_measured(
    model: Path, calibration: Path, run: Run, call: Call, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    made = call("quantize", model, "--target-bpw", "6", "--calibration", calibration, "-o", file)
    assert made.code == 0
    assert "quantize, predicted divergence" in made.err
    assert "budget     6bpw: predicted divergence" in made.out
    options = ("--text", TEXT, "--seqlen", "32", "--nsamples", "4", "--json")
    quality = run("verify", file, "--against", model, *options).json["token_quality"]
    assert quality["kl_predicted"] > 0
    assert 0.3 < quality["kl_mean"] / quality["kl_predicted"] < 3

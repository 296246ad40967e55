"""tune: a model is trained on its grid, judged on text it has not seen, and written only where that
is better than no training.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import ROOT, Call, listing
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.cli.main import main
from qconvert.errors import (
    InputError,
    MachineError,
    OutputExistsError,
    Terminated,
    UnsupportedError,
    UsageError,
)
from qconvert.files import open_model
from qconvert.report import JudgedModel, TuneReport

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

import qconvert.torch as qt  # noqa: E402
from qconvert.training import beginning, fixed, loop, memory, run  # noqa: E402
from qconvert.training.preparation import prepare_model  # noqa: E402

LENGTH = 16
STEPS = 6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, and beside it a text of some 60 windows."""
    place = tmp_path_factory.mktemp("models")
    text = (ROOT / "samples" / "calibration.txt").read_text()[:1600]
    (place / "text.txt").write_text(text)
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    more = {"num_hidden_layers": 1}
    return write_directory(place / "llama", "llama", config=more, tensors=weights(config))


def text_of(model: Path) -> Path:
    return model.parent / "text.txt"


def tuned(model: Path, output: Path, scheme: str = "q2_block32", **more: Any) -> TuneReport:
    given: dict[str, Any] = {
        **{"text": text_of(model), "seqlen": LENGTH, "nsamples": 40, "threads": 1, "force": True},
        **{"batch": 4, "steps": STEPS, "lr": 3e-3},
    }
    return qconvert.tune(model, scheme=scheme, output=output, **given | more)


@pytest.fixture(scope="module")
def done(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneReport, Path]:
    output = tmp_path_factory.mktemp("tuned") / "m.qblk"
    return tuned(llama, output), output


def models(report: TuneReport) -> dict[str, JudgedModel]:
    return {m.model: m for m in report.models}


# --- what is gained -------------------------------------------------------------------------------


def test_two_bits_are_better_after_training(done: tuple[TuneReport, Path]) -> None:
    report, output = done
    found = models(report)
    assert list(found) == ["float", "nearest", "tuned"]
    assert found["float"].kl_mean == 0
    assert found["tuned"].kl_mean < 0.9 * found["nearest"].kl_mean
    assert report.gain == pytest.approx(found["nearest"].kl_mean - found["tuned"].kl_mean)
    assert 0 < report.gain_error < report.gain
    assert (report.chosen, report.status, report.warnings) == ("tuned", "pass", [])
    assert report.output_bytes == output.stat().st_size
    assert (report.training_windows, report.validation_windows, report.judging_windows) == (
        *(32, 4, 4),
    )


def held_out(model: Path, tenth: int) -> tuple[Any, Any]:
    """Inputs of a tenth of the 40 drawn windows and the tokens that follow, by transformers alone:
    windows of the text, each behind the first token; the first tenth of a permutation chooses the
    state, the second judges.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text_of(model).read_text(), add_special_tokens=False)["input_ids"]
    every = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    drawn = np.sort(np.random.default_rng(0).permutation(len(every))[:40])
    order = np.random.default_rng(0).permutation(40)
    chosen = every[drawn][order][4 * tenth :][:4]
    begin = np.full((len(chosen), 1), tokenizer.bos_token_id)
    return torch.from_numpy(np.hstack([begin, chosen[:, :-1]])), torch.from_numpy(chosen)


def figures(model: Path, quantized: Any, tenth: int) -> tuple[Any, Any]:
    """Divergence from the float model and negative log-likelihood of each token, in float64."""
    inputs, targets = held_out(model, tenth)
    source = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        p, q = (m(input_ids=inputs).logits.double().log_softmax(-1) for m in (source, quantized))
    return (p.exp() * (p - q)).sum(-1).flatten(), -q.gather(-1, targets[..., None]).flatten()


def test_the_figures_are_those_of_the_file(done: tuple[TuneReport, Path], llama: Path) -> None:
    """Divergence and perplexity computed anew, of the file as `load_model` loads it."""
    report, output = done
    kl, nll = figures(llama, qt.load_model(output, "none"), 1)
    found = models(report)["tuned"]
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    assert found.kl_mean_error == pytest.approx(float(kl.std() / len(kl) ** 0.5), rel=1e-6)
    assert found.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-6)


def test_verify_takes_the_file(done: tuple[TuneReport, Path], llama: Path) -> None:
    _, output = done
    proof = qconvert.verify(output, against=llama, text=text_of(llama), seqlen=LENGTH, nsamples=8)
    assert [c.id for c in proof.checks if c.status == "fail"] == []
    assert proof.status == "pass"
    assert proof.token_quality is not None


def test_the_best_state_is_kept(done: tuple[TuneReport, Path]) -> None:
    report, _ = done
    course = {s.step: s.validation for s in report.course}
    assert report.step == min(course, key=lambda step: course[step]) > 0
    assert [s.loss is None for s in report.course] == [True] + [False] * (len(course) - 1)


def test_the_same_seed_gives_the_same_bytes(
    done: tuple[TuneReport, Path], llama: Path, tmp_path: Path
) -> None:
    report, output = done
    again = tuned(llama, tmp_path / "m.qblk")
    assert (tmp_path / "m.qblk").read_bytes() == output.read_bytes()
    assert again.course == report.course
    other = tuned(llama, tmp_path / "m.qblk", seed=1, steps=1)
    assert other.course[0].validation != report.course[0].validation


def test_training_stops_where_it_gets_no_better(llama: Path, tmp_path: Path) -> None:
    """At a rate that only does harm: three validations of the second half without a better one."""
    report = tuned(llama, tmp_path / "m.qblk", "q8_channel", lr=0.05, steps=40)
    assert (report.steps_run, report.step) == (32, 0)
    assert report.stopped == "no better for 32 steps"
    assert [s.step for s in report.course] == [*range(0, 33, 4)]


# --- what is written where training is no gain ----------------------------------------------------


def test_the_untrained_result_is_written_where_it_is_better(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that looks better on the validation windows, and is not on those that judge."""
    report = tuned(llama, tmp_path / "m.qblk", "q8_channel", lr=0.05, steps=2)
    assert report.chosen == "nearest"
    assert "no step was better than none" in report.warnings[0]
    qconvert.quantize(
        llama, "q8_channel", output=tmp_path / "q.qblk", rounding="nearest", equalise="off"
    )
    assert (tmp_path / "m.qblk").read_bytes() == (tmp_path / "q.qblk").read_bytes()
    flattering = iter([2.0, 1.0, 0.5])
    inner = run.train

    def flattered(student: Any, course: Any, adam: Any, teacher: Any, plan: Any, *rest: Any) -> Any:
        plan = loop.Plan(
            *(plan.windows, plan.loss, plan.steps, plan.batch, plan.rates),
            lambda: next(flattering),
        )
        return inner(student, course, adam, teacher, plan, *rest)

    monkeypatch.setattr(run, "train", flattered)
    harm: dict[str, Any] = {"scheme": "q8_channel", "lr": 0.05, "steps": 2}
    report = tuned(llama, tmp_path / "m.qblk", **harm)
    assert (report.step, report.chosen) == (2, "nearest")
    assert report.gain < 0
    assert "not better than nearest rounding on the judging windows" in report.warnings[0]
    assert (tmp_path / "m.qblk").read_bytes() == (tmp_path / "q.qblk").read_bytes()
    flattering = iter([2.0, 1.0, 0.5])
    report = tuned(llama, tmp_path / "m.qblk", anyway=True, **harm)
    assert report.chosen == "tuned"
    assert "written all the same" in report.warnings[0]
    assert (tmp_path / "m.qblk").read_bytes() != (tmp_path / "q.qblk").read_bytes()
    flattering = iter([2.0, 1.0, 0.5])
    report = tuned(llama, tmp_path / "n.qblk", strict=True, **harm)
    assert (report.status, report.written) == ("fail", False)
    assert not (tmp_path / "n.qblk").exists()


@pytest.fixture(scope="module")
def calibration(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    more: dict[str, Any] = {"gram": True, "seqlen": LENGTH, "nsamples": 40, "threads": 1}
    qconvert.calibrate(llama, text=text_of(llama), output=output, **more)
    return output


@pytest.fixture
def drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the last quantization without training was; not aimed at outputs on the text, which is
    so short that all of it would be learned by heart.
    """
    inner = beginning.quantize

    def copied(source: Path, options: Any, *rest: Any) -> Any:
        assert options.repair.windows.shape == (32, LENGTH)  # those that are trained on
        done = inner(source, replace(options, repair=None), *rest)
        shutil.copy(options.output, tmp_path / "draft.qblk")
        names = [t.name for t in done.tensors if t.rounding == "compensated"]
        (tmp_path / "names.json").write_text(json.dumps(names))
        return done

    monkeypatch.setattr(beginning, "quantize", copied)
    return tmp_path / "draft.qblk"


@pytest.mark.parametrize("scheme", ["q3_channel", "c3_block16"])
@pytest.mark.parametrize("train", ["weights", "all"])
def test_training_begins_with_compensated_codes(
    train: str, scheme: str, llama: Path, calibration: Path, drafts: Path, tmp_path: Path
) -> None:
    """On their grid: only codes are others, and factors of scales where these are trained."""
    more: dict[str, Any] = {"calibration": calibration, "lr": 1e-3, "train": train}
    report = tuned(llama, tmp_path / "m.qblk", scheme, generate=0, **more)
    assert list(models(report)) == ["float", "nearest", "compensated", "tuned"]
    assert report.began_compensated == 8
    kl, _ = figures(llama, qt.load_model(drafts, "none"), 0)
    assert report.course[0].validation == pytest.approx(float(kl.mean()), rel=1e-6)
    kl, _ = figures(llama, qt.load_model(drafts, "none"), 1)
    assert models(report)["compensated"].kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    assert report.chosen == "tuned"
    assert report.gain > 0
    kl, _ = figures(llama, qt.load_model(tmp_path / "m.qblk", "none"), 1)
    assert models(report)["tuned"].kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    moved = []
    with qconvert.load(tmp_path / "m.qblk") as a, qconvert.load(drafts) as b:
        names = json.loads(drafts.with_name("names.json").read_text())
        for name in names:
            mine, theirs = a[name].quantized(), b[name].quantized()
            changed = (mine.codes != theirs.codes).mean()
            assert changed < 0.1
            assert changed > 0 or train == "all"  # which may gain by scales before codes
            moved.append(not np.array_equal(mine.scales, theirs.scales))
            np.testing.assert_allclose(mine.scales, theirs.scales, rtol=0.05)
    assert len(names) == 8
    assert moved == [train == "all"] * 8
    assert qconvert.verify(tmp_path / "m.qblk", against=llama).status == "pass"


def test_a_weight_stays_where_it_rounds_to_its_code(llama: Path, calibration: Path) -> None:
    """Others go to what their code stands for. Nearest levels by trying all of them."""
    output = calibration.with_name("q.qblk")
    qconvert.quantize(llama, "c3_block16", output=output, calibration=calibration, force=True)
    name = "model.layers.0.mlp.up_proj.weight"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before = model.get_parameter(name).detach().numpy().copy()
    training = prepare_model(model, "c3_block16")
    checkpoint: Any = loop.Checkpoint(llama, model, None, {}, "causal")
    with closing(open_model(output)) as file:
        (info,) = [t for t in file.tensors if t.name == name]
        base = fixed.held(file.stored(info))
    loop.Student(checkpoint, training, {}).begin_at({name: base})
    with qconvert.load(output) as tensors:
        codes, values = tensors[name].quantized(), tensors[name].dequantize()
    assert codes.table is not None
    place = before / codes.scale + codes.zero_point
    nearest = np.abs(place[..., None] - codes.table).argmin(-1)
    wanted = np.where(nearest == codes.codes, before, values)
    assert 0.02 < (nearest != codes.codes).mean() < 0.9
    np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), wanted)
    made = training.weights[name](model.get_parameter(name)).detach().numpy()
    np.testing.assert_array_equal(made, values)


def test_compensated_rounding_has_to_be_beaten(
    llama: Path, calibration: Path, tmp_path: Path
) -> None:
    harm: dict[str, Any] = {"calibration": calibration, "lr": 0.05, "steps": 1, "generate": 0}
    report = tuned(llama, tmp_path / "m.qblk", "q3_channel", **harm)
    assert report.chosen == "compensated"
    assert "the file is that of compensated rounding" in report.warnings[0]
    assert sorted(listing(tmp_path)) == ["m.qblk"]
    kl, _ = figures(llama, qt.load_model(tmp_path / "m.qblk", "none"), 1)
    assert models(report)["compensated"].kl_mean == pytest.approx(float(kl.mean()), rel=1e-6)
    assert qconvert.verify(tmp_path / "m.qblk", against=llama).status == "pass"
    plain = tmp_path / "p.safetensors"
    few: dict[str, Any] = {"seqlen": LENGTH, "nsamples": 4, "threads": 1}
    qconvert.calibrate(llama, text=text_of(llama), output=plain, **few)
    with pytest.raises(InputError, match="the calibration does not help rounding") as e:
        tuned(llama, tmp_path / "n.qblk", calibration=plain)
    assert "--gram" in str(e.value.hint)


def test_static_ranges_are_in_the_file_whoever_wins(llama: Path, tmp_path: Path) -> None:
    report = tuned(llama, tmp_path / "m.qblk", "q4_block32", activations="static", lr=1e-3)
    assert report.chosen == "tuned"
    harmed = tuned(llama, tmp_path / "n.qblk", "q4_block32", activations="static", lr=1.0, steps=1)
    assert harmed.chosen == "nearest"
    qconvert.quantize(
        llama, "q4_block32", output=tmp_path / "q.qblk", rounding="nearest", equalise="off"
    )
    name = "model.layers.0.mlp.up_proj.weight"
    with (
        qconvert.load(tmp_path / "m.qblk") as a,
        qconvert.load(tmp_path / "n.qblk") as b,
        qconvert.load(tmp_path / "q.qblk") as c,
    ):
        seen = min(report.step, STEPS // 2) * 4 * LENGTH  # until ranges are frozen
        assert a[name].activation["samples"] == b[name].activation["samples"] + seen
        assert b[name].activation["samples"] == 32 * LENGTH  # all that there are to train on
        assert b[name].dequantize().tobytes() == c[name].dequantize().tobytes()
        assert a[name].dequantize().tobytes() != c[name].dequantize().tobytes()
    assert qt.load_model(tmp_path / "n.qblk", "static") is not None


# --- what is trained, and how ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "moved"),
    [("weights", {"matrices"}), ("norms", {"norms"}), ("all", {"matrices", "norms"})],
)
def test_what_is_not_to_be_trained_stays(
    train: str, moved: set[str], llama: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"train": train, "steps": 1, "keep": ["*mlp*"], "lr": 1e-2}
    tuned(llama, tmp_path / "m.qblk", anyway=True, **given)
    qconvert.quantize(
        *(llama, "q2_block32"), output=tmp_path / "q.qblk", keep=["*mlp*"],
        rounding="nearest", equalise="off",
    )  # fmt: skip
    found = set()
    with qconvert.load(tmp_path / "m.qblk") as a, qconvert.load(tmp_path / "q.qblk") as b:
        for name in a:
            if a[name].dequantize().tobytes() != b[name].dequantize().tobytes():
                assert "mlp" not in name
                found.add("norms" if "norm" in name else "matrices")
    assert found == moved


def test_a_gguf_file_is_written_too(llama: Path, tmp_path: Path) -> None:
    report = tuned(llama, tmp_path / "m.gguf", "q4_0", lr=1e-3)
    assert (report.container, report.chosen) == ("gguf", "tuned")
    kl, _ = figures(llama, qt.load_model(tmp_path / "m.gguf", "none", directory=llama), 1)
    assert models(report)["tuned"].kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)


def test_next_tokens_of_the_text_can_be_learned(llama: Path, tmp_path: Path) -> None:
    """Which the model of random weights knows nothing of: the perplexity falls below its own."""
    report = tuned(llama, tmp_path / "m.qblk", "q4_block32", loss="lm", lr=3e-3)
    found = models(report)
    assert found["tuned"].perplexity < 0.8 * found["float"].perplexity
    assert found["tuned"].kl_mean > found["nearest"].kl_mean
    assert report.chosen == "tuned"
    nll = np.log(found["nearest"].perplexity) - np.log(found["tuned"].perplexity)
    assert report.gain == pytest.approx(nll)


def test_another_teacher_is_learned_from(llama: Path, tmp_path: Path) -> None:
    """One whose weights are half as large: the float model itself is far from it."""
    teacher = tmp_path / "teacher"
    shutil.copytree(llama, teacher)
    from safetensors.numpy import load_file, save_file

    tensors = {k: v * np.float32(0.5) for k, v in load_file(llama / "model.safetensors").items()}
    save_file(tensors, teacher / "model.safetensors")
    report = tuned(llama, tmp_path / "m.qblk", "q4_block32", teacher=teacher)
    found = models(report)
    assert found["float"].kl_mean > 0.1
    assert found["tuned"].kl_mean < found["nearest"].kl_mean
    assert report.teacher == str(teacher)


def test_tensors_under_other_names_are_told_of(tmp_path: Path) -> None:
    """transformers joins experts that the files have one by one."""
    model = write_directory(tmp_path / "moe", "qwen3-moe")
    shutil.copy(ROOT / "samples" / "eval.txt", tmp_path / "text.txt")
    report = tuned(model, tmp_path / "m.qblk", steps=1, nsamples=3)
    assert report.chosen == "tuned"
    (note,) = [n for n in report.notes if "that transformers gives them" in n]
    assert "'model.layers.0.mlp.experts.down_proj'" in note
    proof = qconvert.verify(tmp_path / "m.qblk", against=model)
    assert "same-tensors" in {c.id for c in proof.checks if c.status == "fail"}


def test_rates_follow_from_rounding_errors(llama: Path) -> None:
    """6 % of the root mean square of what rounding takes away, by the file's own values, times the
    root of its ratio to the weights; gains of norms 1.5 % of the mean of these ratios.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach().clone()
    training = prepare_model(model, "q4_channel_sym")
    checkpoint: Any = loop.Checkpoint(llama, model, None, {}, "causal")
    norm = "model.norm.weight"
    parameters = {n: model.get_parameter(n) for n in (name, norm)}
    student = loop.Student(checkpoint, training, parameters, gains=True)
    values = training.weights[name].stored(weight).values(0, weight.numel())
    error = values.reshape(weight.shape).astype(np.float64) - weight.numpy()
    rms = float(np.sqrt((error**2).mean()))
    errors = loop.rounding_errors(student)
    assert errors[name] == pytest.approx((rms, float(weight.square().mean().sqrt())), rel=1e-4)
    rates = loop.rates_of(student, None, errors)
    size = errors[name][1]
    assert rates[name] == pytest.approx(0.06 * rms * (rms / size) ** 0.5, rel=1e-4)
    shares = [error / size for error, size in errors.values()]
    assert len(shares) == 9
    assert rates[norm] == pytest.approx(0.015 * np.mean(shares))
    student.begin_at({name: training.weights[name].stored(weight)})
    given = loop.rates_of(student, 2e-4, errors)
    share = errors[name][0] / errors[name][1]
    assert given.pop(f"{name}/scale") == pytest.approx(0.015 * share)
    assert given == {name: 2e-4, norm: 2e-3}


# --- numbers that are none, and interrupts --------------------------------------------------------


def poisoned(layer: Any, how: str) -> None:
    if how == "loss":
        judging = torch.is_inference_mode_enabled  # where it is whole again
        layer.register_forward_hook(lambda m, a, out: out if judging() else out * torch.nan)
    elif how == "gradient":
        layer.weight.register_hook(lambda gradient: gradient * torch.inf)
    else:
        layer.weight.data[3, 1] = torch.nan


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("loss", "the loss is nan, first in the output of layer 'model.layers.0.mlp.down_proj'"),
        ("gradient", "the gradient of 'model.layers.0.mlp.down_proj.weight' is not finite"),
        (
            "weight",
            "are NaN or Inf, the first at index 289, in 'model.layers.0.mlp.down_proj.weight'",
        ),
    ],
)
def test_numbers_that_are_none_name_step_and_layer(
    how: str, said: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step breaks in one layer; the state of the second is kept."""
    inner = loop.divergence
    calls: list[int] = []

    def broken(reference: Any, student: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            poisoned(student.model.model.layers[0].mlp.down_proj, how)
        return inner(reference, student, inputs)

    monkeypatch.setattr(loop, "divergence", broken)
    report = tuned(llama, tmp_path / "m.qblk", steps=5)
    assert report.stopped == "numbers that are not finite at step 3"
    assert report.warnings[0].startswith("training stopped at step 3 of 5: ")
    assert said in report.warnings[0]
    assert "the state of step 2 was kept; take a smaller --lr" in report.warnings[0]
    assert (report.steps_run, report.step, report.chosen) == (2, 2, "tuned")
    with qconvert.load(tmp_path / "m.qblk") as tensors:
        assert all(np.isfinite(tensors[n].dequantize()).all() for n in tensors)


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupt_leaves_nothing_behind(
    stop: type[BaseException], code: int, llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As the signals raise it, within a step."""
    (tmp_path / "m.qblk").write_bytes(b"older")

    def stopped(*_: Any) -> Any:
        raise stop

    monkeypatch.setattr(loop, "divergence", stopped)
    words = ["--text", str(text_of(llama)), "--seqlen", "16", "--threads", "1", "-q"]
    line = ["tune", str(llama), "--scheme", "q2_block32", "-o", str(tmp_path / "m.qblk")]
    assert main([*line, "--force", *words]) == code
    assert listing(tmp_path) == {"m.qblk": b"older"}


# --- what is refused ------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "--steps, found 0, wanted at least 1"),
    ({"seqlen": 3}, "--seqlen, found 3, wanted at least 4"),
    ({"seqlen": 257}, "--seqlen, found 257, wanted at most 256, the model's positions"),
    ({"batch": 0}, "--batch, found 0"),
    ({"nsamples": 2}, "--nsamples, found 2, wanted at least 3"),
    ({"seed": -1}, "--seed, found -1"),
    ({"lr": float("nan")}, "--lr, found nan, wanted a number above 0, at most 1"),
    ({"lr": 2}, "--lr, found 2"),
    ({"loss": "mse"}, "--loss, found mse, wanted distill, lm"),
    ({"device": "tpu"}, "--device, found tpu, wanted cpu, cuda, cuda:N, mps or auto"),
    ({"train": "adapters"}, "--train, found adapters, wanted all, weights, scales, norms"),
    ({"activations": "int8"}, "--activations, found int8, wanted none, dynamic, static"),
    ({"scheme": "q4_k_m"}, "cannot be trained with, found q4_k_m"),
    ({"tensor_scheme": {"*": "bf16"}}, "cannot be trained with, found bf16"),
    ({"scheme": "q4_0"}, r"q4_0 does not go into a \.qblk file"),
    ({"output": "m.bin"}, "cannot tell the container"),
    ({"keep": ["nothing*"]}, r"no tensor matches 'nothing\*'"),
    ({"loss": "lm", "teacher": "t"}, "--teacher goes with --loss distill"),
    ({"train": "norms", "keep": ["*norm*"]}, "--train norms: the model has nothing of that kind"),
    (
        {"scheme": "q4_0", "output": "m.gguf", "activations": "static"},
        "a GGUF file has no place for static ranges",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_refused(
    options: dict[str, Any], message: str, llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        tuned(llama, **{"output": Path("m.qblk"), **options})
    assert listing(tmp_path) == {}


def test_inputs_that_cannot_be_used_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "m.qblk"
    short = tmp_path / "short.txt"
    short.write_text("the tests are at the end " * 3)
    with pytest.raises(InputError, match=r"found \d windows? of 32 tokens, wanted at least 3"):
        tuned(llama, output, text=short, nsamples=None, seqlen=32)
    with pytest.raises(InputError, match=r"found .* windows of 16 tokens, wanted 999,999"):
        tuned(llama, output, nsamples=999_999)
    other = write_directory(tmp_path / "qwen2", "qwen2")
    with pytest.raises(UnsupportedError, match="the teacher has another vocabulary"):
        tuned(llama, output, teacher=other)
    output.write_bytes(b"older")
    with pytest.raises(OutputExistsError):
        tuned(llama, output, force=False)
    with pytest.raises(MachineError, match="the output is the input"):
        tuned(llama, output, text=output)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1000 kB\n")
    with pytest.raises(MachineError, match=r"found 1\.02 MB available, wanted about 5\d\d MB"):
        tuned(llama, output)
    assert output.read_bytes() == b"older"
    monkeypatch.undo()
    with pytest.raises(MachineError, match="absent: no such directory"):
        tuned(llama, tmp_path / "absent" / "m.qblk")


def test_memory_is_reckoned_by_the_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: a model of one matrix, 64 x 128 at 4 bits with scales of 16 bits each 32, and a
    norm of 128; a limit of a container counts as well.
    """
    from qconvert.model import TensorInfo
    from qconvert.schemes import parse_scheme
    from qconvert.stages.plan import PlannedTensor

    scheme: Any = parse_scheme("q4_block32_sym")
    infos = [TensorInfo("w", (64, 128), "F32", 32768), TensorInfo("n", (128,), "F32", 512)]
    plan = [PlannedTensor(infos[0], scheme, ""), PlannedTensor(infos[1], None, "")]
    config = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64}
    values = 8192 + 128
    codes = 5 * 8192 + 8192 // 2 + 2 * 8192 // 32
    token = 2 * (24 * 128 + 6 * 64) + 6 * 64
    libraries = 500 << 20
    for trained, moving in (("all", values), ("norms", 128)):
        wanted = libraries + 4 * (values + 10 + 4 * moving) + codes + 4 * 32 * token
        assert memory.needed_bytes(plan, trained, config, 32, 10) == wanted
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_bytes() is None
    memory.check_memory(1 << 60)  # nobody says that there is less
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.available_bytes() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() is None


# --- the command ----------------------------------------------------------------------------------


def test_the_command_is_the_function(
    done: tuple[TuneReport, Path], llama: Path, tmp_path: Path, call: Call
) -> None:
    report, made = done
    words = ["--steps", str(STEPS), "--nsamples", "40", "--lr", "0.003", "--seqlen", "16"]
    line = [
        "tune",
        llama,
        "--scheme",
        "q2_block32",
        "--text",
        text_of(llama),
        *words,
        "--threads",
        "1",
    ]
    told = call(*line, "-o", tmp_path / "m.qblk", "--json", "--html", tmp_path / "m.html")
    assert told.code == 0, told
    assert (tmp_path / "m.qblk").read_bytes() == made.read_bytes()
    schema = json.loads((ROOT / "formats/reports/tune.json").read_text())
    jsonschema.validate(told.json, schema)
    assert told.json == report.to_json() | {"output": str(tmp_path / "m.qblk")}
    assert "tune, step 1 of 6: held-out loss 0." not in told.out
    assert "load the model; tuning takes about 5" in told.err
    assert "tune, step 0 of 6: held-out loss " in told.err
    assert " left: " in told.err
    page = (tmp_path / "m.html").read_text()
    assert f"{report.models[2].kl_mean:.4g}" in page
    shown = call(*line, "-o", tmp_path / "m.qblk", "--force", "-q")
    figures = [f"{n:.4g}" for n in (report.models[2].kl_mean, report.models[2].perplexity)]
    assert any(row.split()[0] == "tuned" and set(figures) <= set(row.split())
               for row in shown.out.splitlines() if row)  # fmt: skip
    assert f"the state of step {report.step} was kept" in shown.out
    assert main([*map(str, line), "-o", str(tmp_path / "m.qblk"), "-q"]) == 4


def test_the_file_says_how_it_was_made(done: tuple[TuneReport, Path]) -> None:
    report, output = done
    data = output.read_bytes()
    start = data[data.index(b"{") :].decode("utf-8", "replace")
    noted = json.JSONDecoder().raw_decode(start)[0]["provenance"]["finetune"]
    assert (noted["trained"], noted["loss"], noted["steps"], noted["seed"]) == (
        *("all", "distill", STEPS, 0),
    )
    assert noted["step"] == report.step
    assert noted["judged"]["tuned"]["kl"] == pytest.approx(report.models[2].kl_mean, rel=1e-5)


def test_a_device_that_is_not_there_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="torch has no device 'cuda:99' here"):
        tuned(llama, tmp_path / "m.qblk", device="cuda:99")
    assert not listing(tmp_path)

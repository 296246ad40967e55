"""quantize --finetune: scales of rows move, codes stay, and the file is what was judged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call, gaussian, read_independently, save
from safetensors.numpy import load_file
from stored import in_memory, named

pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

import qconvert
from qconvert.codecs.codec import rescaled_numbers
from qconvert.codecs.ggml_blocks import HALVES
from qconvert.codecs.rescaled import TUNED, tuned_tensors
from qconvert.errors import InputError, UnsupportedError, UsageError
from qconvert.files import open_model
from qconvert.ggml_types import WRITTEN
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.report import Finetuning, QuantizeReport
from qconvert.running import tuning
from qconvert.running.hugging_face import Checkpoint, open_checkpoint
from qconvert.running.quantized_model import open_quantized
from qconvert.running.text import token_chunks
from qconvert.stages import finetune, norm_gains, row_places

pytestmark = pytest.mark.filterwarnings("default")  # of torch and transformers, not ours
TEXT = ROOT / "samples" / "calibration.txt"
LENGTH, WINDOWS, STEPS = 16, 20, 6
GIVEN: dict[str, Any] = {"text": TEXT, "seqlen": LENGTH, "nsamples": WINDOWS, "threads": 1}
ROWS, COLUMNS = 12, 512


# --- rows of every family -------------------------------------------------------------------------

SCALED = (
    *("q8_channel", "q4_channel_asym", "q2_block16", "q4_block64_asym", "q6_block32_sym"),
    *("q8_block64", "c2_block16", "c3_block32", "c4s_block16", "nf4_block64"),
    *("c2z_block16", "fp4_block32"),
    *(name.lower() for name in HALVES),
)


def written(scheme: str, directory: Path, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> Path:
    source = save(directory / "s.safetensors", {"w": gaussian(1, *shape)})
    ggml = scheme.upper() in GGML_BLOCKS
    made = directory / ("m.gguf" if ggml else "m.qblk")
    qconvert.quantize(source, scheme, output=made, raw=ggml, force=True)
    return made


@pytest.mark.parametrize("scheme", SCALED)
def test_rows_are_multiplied_and_codes_stay(scheme: str, tmp_path: Path) -> None:
    factors = np.random.default_rng(2).uniform(0.7, 1.4, ROWS - 3).astype(np.float32)
    first = ROWS - len(factors)
    with closing(open_model(written(scheme, tmp_path))) as model:
        stored = named(model, "w")
        encoding = stored.encoding
        assert encoding.unscalable(stored.shape) is None
        before = encoding.values(stored, 0, ROWS * COLUMNS).reshape(ROWS, COLUMNS)
        segments = {
            s.kind: bytearray(stored.read(s.kind, 0, s.size))
            for s in encoding.segments(stored.shape)
        }
        same = {kind: bytes(data) for kind, data in segments.items()}
        for kind, data in encoding.rescaled(stored, first, factors).items():
            whole = len(segments[kind])
            assert len(data) * ROWS == whole * (ROWS - first)
            segments[kind][whole - len(data) :] = bytes(data)
    assert "codes" not in segments or segments["codes"] == same["codes"]
    after = in_memory(encoding, (ROWS, COLUMNS), {k: bytes(v) for k, v in segments.items()})
    values = encoding.values(after, 0, ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    kind = GGML_BLOCKS.get(scheme.upper())
    if kind is not None and scheme not in ("q1_0", "q2_0"):  # which gguf-py does not decode
        data = np.frombuffer(segments["data"], np.uint8)
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
        np.testing.assert_array_equal(theirs.reshape(ROWS, COLUMNS), values)
        blocks = data.reshape(-1, kind.nbytes), np.frombuffer(same["data"], np.uint8)
        parts = kind.splitter(blocks[0]), kind.splitter(blocks[1].reshape(-1, kind.nbytes))
        np.testing.assert_array_equal(parts[0].codes, parts[1].codes)
    np.testing.assert_array_equal(values[:first], before[:first])
    wanted = before[first:] * factors[:, None]
    # A scale or a minimum of 11 bits is half a unit off, 2^-11 of it at most; values may be twice
    # as large without the minimum.
    off = np.abs(values[first:] - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    assert off.max() < 3.01 * 2.0**-11
    assert not np.allclose(values[first:], before[first:], rtol=0.1)  # and they have moved


def test_every_ggml_type_is_known_or_says_why(tmp_path: Path) -> None:
    assert {t.name for t in WRITTEN} - set(HALVES) == {"MXFP4", "NVFP4"}
    for scheme, shape, why in (
        ("mxfp4", (ROWS, COLUMNS), "not numbers of 16 bits"),
        ("q8_tensor", (ROWS, COLUMNS), "one scale"),
        ("nf4_block64_dq", (ROWS, COLUMNS), "in turn"),
        ("nf4_block64", (ROWS, 96), "cross rows"),
        ("f16", (ROWS, COLUMNS), "no scales"),
    ):
        with closing(open_model(written(scheme, tmp_path, shape))) as model:
            stored = named(model, "w")
            assert why in str(stored.encoding.unscalable(shape))


def test_scales_stay_finite_and_above_0() -> None:
    scales = np.array([[60000, 1e-7, 0, 1]], np.float16)
    found = rescaled_numbers(scales, np.array([2], np.float32))
    assert found.tolist() == [[60000, 2 * float(np.float16(1e-7)), 0, 2]]
    smaller = rescaled_numbers(scales, np.array([0.1], np.float32))
    assert smaller[0, 1] == scales[0, 1] != 0
    assert smaller[0, 3] == np.float16(0.1)


# --- whole models ---------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """So large a rate that a few steps tell."""
    monkeypatch.setattr(finetune, "rate_of", lambda tensors: 0.02)


def made(
    model: Path, scheme: str, output: Path, steps: int = STEPS, **more: Any
) -> tuple[QuantizeReport, Finetuning]:
    report = qconvert.quantize(
        model, scheme, output=output, finetune=steps, force=True, **GIVEN | more
    )
    assert report.finetuning
    return report, report.finetuning


def divergence(source: Checkpoint, path: Path, windows: Any) -> float:
    """Of a file from its source, nats a position, in float64 from logits."""
    import torch

    file = open_quantized(path, directory=source.path).checkpoint
    total = 0.0
    for window in windows:
        ids = torch.from_numpy(window[None])
        with torch.no_grad():
            p, q = (
                torch.log_softmax(c.model(input_ids=ids).logits[0].double(), -1)
                for c in (source, file)
            )
        total += float((p.exp() * (p - q)).sum())
    return total / windows.size


@pytest.mark.parametrize(
    ("name", "scheme", "suffix"),
    [("llama", "q3_block32", "qblk"), ("llama", "c2_block16", "qblk"), ("llama", "q3_k", "gguf"),
     ("qwen2", "q4_0", "gguf")],
)  # fmt: skip
@pytest.mark.usefixtures("fast")
def test_the_file_has_the_divergence_that_was_judged(
    name: str, scheme: str, suffix: str, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """With rows of heads in another order in GGUF (llama), and biases (qwen2)."""
    model, output = directory(name), tmp_path / f"m.{suffix}"
    plain = tmp_path / f"p.{suffix}"
    before = qconvert.quantize(model, scheme, output=plain, threads=1)
    report, tuned = made(model, scheme, output)
    source = open_checkpoint(model, threads=1)
    windows = token_chunks(source.tokenizer, TEXT, LENGTH, WINDOWS, 0)
    order = np.random.default_rng(0).permutation(WINDOWS)
    held_out = windows[order[:2]]
    assert (tuned.held_out_windows, tuned.training_windows) == (2, 18)
    assert tuned.kl_before is not None
    assert tuned.kl is not None
    assert tuned.step
    assert tuned.kl < tuned.kl_before
    gain = tuned.kl_before - tuned.kl
    # As computed by torch in float32, and with scales that are not rounded yet.
    assert divergence(source, plain, held_out) == pytest.approx(tuned.kl_before, abs=gain / 50)
    assert divergence(source, output, held_out) == pytest.approx(tuned.kl, abs=gain / 20)
    _same_but_scales(plain, output)
    rows = [(t.name, t.stored, t.nbytes) for t in report.tensors]
    assert rows == [(t.name, t.stored, t.nbytes) for t in before.tensors]
    for now, then in zip(report.tensors, before.tensors, strict=True):
        added = {"rounding": TUNED} if now.quantized and now.name not in tuned.left else {}
        assert (now.decision or {}) == (then.decision or {}) | added
    verified = qconvert.verify(output, against=model)
    assert verified.status == "pass"
    found = {t.name: t.sqnr_db for t in verified.tensors}
    for tensor in report.tensors:
        if tensor.sqnr_db is not None:
            assert tensor.sqnr_db == pytest.approx(found[tensor.name], rel=1e-6)
    if suffix == "qblk":
        assert read_independently(output).code == 0


def _same_but_scales(plain: Path, output: Path) -> None:
    """Codes, kept tensors and sizes are the same, and which tensors say that they were tuned."""
    with closing(open_model(plain)) as one, closing(open_model(output)) as other:
        assert [t.nbytes for t in one.tensors] == [t.nbytes for t in other.tensors]
        moved = set()
        for tensor in one.tensors:
            a, b = one.stored(tensor), named(other, tensor.name)
            assert a.encoding == b.encoding
            if len(tensor.shape) == 1 and "norm" in tensor.name:
                x, y = (e.encoding.values(e, 0, tensor.size) for e in (a, b))
                assert (y / x).min() > 0.6
                assert (y / x).max() < 1.6
                assert len(np.unique(y / x)) > tensor.size / 4
                moved.add(tensor.name)
                assert b.rounding == TUNED
                continue
            for segment in a.encoding.segments(tensor.shape):
                x = np.frombuffer(a.read(segment.kind, 0, segment.size), np.uint8)
                y = np.frombuffer(b.read(segment.kind, 0, segment.size), np.uint8)
                if segment.kind == "data" and (kind := GGML_BLOCKS.get(tensor.dtype)):
                    x, y = x.reshape(-1, kind.nbytes), y.reshape(-1, kind.nbytes)
                    place, count = HALVES[kind.name]
                    if not np.array_equal(x, y):
                        moved.add(tensor.name)
                    x, y = (np.delete(z, slice(place, place + 2 * count), 1) for z in (x, y))
                elif segment.kind in ("scales", "row_scales") and not np.array_equal(x, y):
                    moved.add(tensor.name)
                    continue
                np.testing.assert_array_equal(x, y)
            assert (b.rounding == TUNED) == (tensor.name in moved)
        assert {n for n in moved if "lm_head" in n or "output.weight" in n}
        assert sum("norm" in n for n in moved) > 3
        assert not {n for n in moved if "embd" in n or "embed_tokens" in n}


@pytest.mark.usefixtures("fast")
def test_the_same_bytes_again_and_other_ones_of_another_seed(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model, found = directory("llama"), []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / f"{number}.qblk"
        made(model, "c3_block16", output, seed=seed)
        found.append(output.read_bytes())
    assert found[0] == found[1] != found[2]
    assert {p.name for p in tmp_path.iterdir()} == {"0.qblk", "1.qblk", "2.qblk"}  # no draft


def norm_of(module: Any, gains: Any) -> norm_gains.Norm | None:
    """As `find_norms` takes a norm whose stored vector these numbers are."""
    added = norm_gains._added(module, np.array(gains, np.float32))
    return None if added is None else norm_gains.Norm("n", "F32", np.float32(gains), added)


def test_gains_of_norms_that_add_1_and_of_others() -> None:
    """LayerNorm and RMSNorm of torch, Gemma's of transformers, and as GGUF has it, with 1 added."""
    import torch
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    w = [0.5, -0.25, 1.0, 0.0]
    factors = np.array([2, 1, 0.5, 3], np.float32)
    for module, stored, wanted in (
        (torch.nn.LayerNorm(4), w, [1.0, -0.25, 0.5, 0.0]),
        (torch.nn.RMSNorm(4), w, [1.0, -0.25, 0.5, 0.0]),
        (GemmaRMSNorm(4), w, [2.0, -0.25, 0.0, 2.0]),
        (GemmaRMSNorm(4), [1 + x for x in w], [3.0, 0.75, 1.0, 3.0]),
    ):
        with torch.no_grad():
            module.weight.copy_(torch.tensor(w))
        norm = norm_of(module, stored)
        assert norm is not None
        assert np.frombuffer(norm.tuned(factors), np.float32).tolist() == wanted
        assert module.weight.tolist() == w  # looked at, and left as it was
        assert norm_of(module, [9.0, 9, 9, 9]) is None
    assert norm_of(torch.nn.LayerNorm(4), w[:3]) is None


def test_gains_are_rounded_to_their_dtype_and_stay_finite() -> None:
    for dtype, kind in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        norm = norm_gains.Norm("n", dtype, np.array([1, 60000], np.float32), 0.0)
        found = np.frombuffer(norm.tuned(np.array([1.0007, 1.5], np.float32)), kind)
        wanted = [1.0007, 60000 if dtype == "F16" else 90000]
        assert found.astype(np.float32).tolist() == np.array(wanted, kind).astype(float).tolist()


def test_no_steps_are_the_bytes_without(directory: Callable[[str], Path], tmp_path: Path) -> None:
    model, outputs = directory("llama"), (tmp_path / "a.gguf", tmp_path / "b.gguf")
    qconvert.quantize(model, "q4_k_m", output=outputs[0])
    report = qconvert.quantize(model, "q4_k_m", output=outputs[1], finetune=0)
    assert report.finetuning is None
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_steps_that_are_no_better_change_nothing(
    directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "rate_of", lambda tensors: 50.0)  # which ruins every row
    model, plain, output = directory("llama"), tmp_path / "p.qblk", tmp_path / "m.qblk"
    before = qconvert.quantize(model, "q4_block32", output=plain)
    report, tuned = made(model, "q4_block32", output)
    assert (tuned.step, tuned.tensors, tuned.norms) == (0, 0, 0)
    assert tuned.kl == tuned.kl_before
    assert any("scales stay as they were" in note for note in report.notes)
    digests = []
    for path in (plain, output):
        with closing(open_model(path)) as opened:
            digests.append([opened.raw(t, 0, t.nbytes) for t in opened.tensors])
    assert digests[0] == digests[1]
    assert report.sqnr_db == pytest.approx(before.sqnr_db, rel=1e-9)


@pytest.mark.usefixtures("fast")
def test_what_is_tied_or_no_layer_of_its_own_is_left(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    tied = directory("qwen2"), tmp_path / "t.gguf"
    _, tuned = made(tied[0], "q4_0", tied[1])
    assert "token_embd.weight" in tuned.left
    experts = directory("qwen3-moe"), tmp_path / "e.qblk"
    report, tuned = made(experts[0], "q4_block32", experts[1])
    assert sum("experts" in name for name in tuned.left) > 3
    assert tuned.tensors
    assert any("are not tuned: no linear layer of its own has it" in n for n in report.notes)
    assert qconvert.verify(experts[1], against=experts[0]).status == "pass"


@pytest.mark.usefixtures("fast")
def test_norms_that_do_something_else_are_left_and_named(
    directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_gains, "_added", lambda module, stored: None)
    report, tuned = made(directory("llama"), "q3_block32", tmp_path / "m.qblk")
    assert (tuned.tensors, tuned.norms) == (15, 0)
    assert sum("norm" in name for name in tuned.left) == 5
    assert any("5 tensors" in n and "its norm does not multiply" in n for n in report.notes)
    checks = qconvert.verify(tmp_path / "m.qblk", against=directory("llama")).checks
    assert {c.id: c.detail for c in checks}["kept-exact"] == "5 tensors bit for bit"


def test_shards_and_a_calibration(
    directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "rate_of", lambda tensors: 0.005)
    model, calibration = directory("llama"), tmp_path / "c.safetensors"
    small = {"seqlen": 16, "nsamples": 8, "threads": 1}
    qconvert.calibrate(model, text=TEXT, gram=True, output=calibration, **small)
    report, tuned = made(
        *(model, "q4_0", tmp_path / "m.gguf"),
        shard_size="30K", calibration=calibration, rounding="nearest",
    )  # fmt: skip
    assert report.files > 1
    assert tuned.step
    verified = qconvert.verify(report.output, against=model)
    assert verified.status == "pass"
    nearest = {"calibration": calibration, "rounding": "nearest"}
    report, tuned = made(model, "q4_block32", tmp_path / "m.qblk", **nearest)
    assert tuned.step
    weighted = {t.name: t.weighted_sqnr_db for t in report.tensors if t.weighted}
    plain = qconvert.quantize(model, "q4_block32", output=tmp_path / "p.qblk", threads=1, **nearest)
    for tensor in plain.tensors:
        if tensor.weighted and tensor.weighted_sqnr_db:
            assert weighted[tensor.name] == pytest.approx(tensor.weighted_sqnr_db, abs=3)
            assert weighted[tensor.name] != tensor.weighted_sqnr_db
    assert qconvert.verify(tmp_path / "m.qblk", against=model).status == "pass"


def test_a_text_aims_tensors_first_and_then_tunes_them(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    model, calibration = directory("llama"), tmp_path / "c.safetensors"
    small = {"seqlen": 16, "nsamples": 8, "threads": 1}
    qconvert.calibrate(model, text=TEXT, gram=True, output=calibration, **small)
    report, _ = made(model, "q2_block32", tmp_path / "m.qblk", calibration=calibration)
    assert {t.rounding for t in report.tensors if t.weighted} == {"compensated"}
    assert sum("aimed at the outputs of the float model" in note for note in report.notes) == 1
    with closing(open_model(tmp_path / "m.qblk")) as file:
        noted = file.header.provenance  # type: ignore[attr-defined]
    assert {"repair", "finetune"} <= noted.keys()
    assert qconvert.verify(tmp_path / "m.qblk", against=model).status == "pass"


def test_equal_rows_in_another_order_are_not_told_apart() -> None:
    rows = gaussian(3, 4, 8)
    shuffled = rows[[2, 0, 3, 1]]
    order = row_places._order(shuffled, rows)
    assert order is not None
    assert order.tolist() == [2, 0, 3, 1]
    rows[1] = rows[2]
    assert row_places._order(rows[[2, 0, 3, 1]], rows) is None
    assert row_places._order(rows, rows) is not None
    assert row_places._order(rows[:2], rows) is None


def test_steps_and_rates() -> None:
    assert list(tuning._judged(20)) == [5, 10, 15, 20]
    assert list(tuning._judged(2)) == [1, 2]
    rates = [tuning.schedule(step, 20) for step in range(1, 21)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4]
    assert rates[19] < 0.01


# --- refusals -------------------------------------------------------------------------------------


def test_refusals(
    directory: Callable[[str], Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = directory("llama"), tmp_path / "m.qblk"
    short = tmp_path / "short.txt"
    short.write_text("the cat sat on a mat")
    with pytest.raises(UsageError, match="needs a text"):
        qconvert.quantize(model, "q4_0", output=output, finetune=20)
    with pytest.raises(UsageError, match="--text without a tensor whose codes"):
        qconvert.quantize(model, "q4_block32", output=output, text=TEXT)
    with pytest.raises(UsageError, match="--seed goes with --finetune"):
        qconvert.quantize(model, "q4_block32", output=output, seed=1)
    with pytest.raises(UsageError, match="--seqlen"):
        made(model, "q4_block32", output, seqlen=1 << 20)
    with pytest.raises(InputError, match="too short to tune"):
        made(model, "q4_block32", output, text=short, nsamples=None)
    with pytest.raises(UnsupportedError, match="next tokens"):
        made(directory("bert"), "q4_block32", output)
    with pytest.raises(InputError, match="takes its directory"):
        made(model / "model.safetensors", "q4_block32", output)
    output.write_bytes(b"mine")
    done = call("quantize", model, "--scheme", "q4_block32", "-o", output, "--finetune", "1",
                "--text", TEXT)  # fmt: skip
    assert done.code == 4
    assert "exists" in done.err
    assert output.read_bytes() == b"mine"
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    done = call("quantize", model, "--scheme", "q4_block32", "-o", output, "--finetune", "1",
                "--text", TEXT, "--force")  # fmt: skip
    assert done.code == 4
    assert "install with" in done.err
    assert output.read_bytes() == b"mine"


def test_a_model_that_predicts_nothing_is_refused(
    directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tuning.Tuning({}, 0, float("nan"), float("nan"))
    monkeypatch.setattr(finetune, "tune", lambda *given: nothing)
    with pytest.raises(UnsupportedError, match="no numbers"):
        made(directory("llama"), "q4_block32", tmp_path / "m.qblk")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("noted", [None, {}, {"finetune": 3}, {"finetune": {"tensors": {"a": 1}}}])
def test_provenance_of_others_says_nothing_of_tuning(noted: object) -> None:
    assert tuned_tensors(noted) == frozenset()
    assert tuned_tensors({"finetune": {"tensors": ["a", 3]}}) == {"a"}


@pytest.mark.usefixtures("fast")
def test_the_command_line(directory: Callable[[str], Path], tmp_path: Path, call: Call) -> None:
    model, output = directory("llama"), tmp_path / "m.qblk"
    words = ["quantize", model, "--scheme", "c4_block32", "-o", output, "--finetune", STEPS]
    words += ["--text", TEXT, "--seqlen", LENGTH, "--nsamples", WINDOWS, "--threads", 1]
    done = call(*words)
    assert done.code == 0
    assert f"of {STEPS}: divergence" in done.out
    assert "embed_tokens" in done.out
    with closing(open_model(output)) as made_:
        noted = made_.header.provenance["finetune"]  # type: ignore[attr-defined]
    assert noted["steps"] == STEPS
    assert len(noted["tensors"]) == 15 + 5
    assert sum("norm" in name for name in noted["tensors"]) == 5
    assert "gains of 5 norms" in done.out
    checked = call("verify", output, "--against", model)
    assert checked.code == 0
    assert "5 with gains that were tuned, not compared" in checked.out
    assert "lm_head.weight" in noted["tensors"]
    assert noted["text_sha256"] == hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert noted["nsamples"] == WINDOWS
    assert noted["held_out_kl"][1] < noted["held_out_kl"][0]
    again = call(*words, "--force", "--json")
    assert again.json["finetuning"]["kl"] == pytest.approx(noted["held_out_kl"][1], rel=1e-5)
    assert load_file(model / "model.safetensors")  # untouched

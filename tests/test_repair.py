"""quantize --text: targets that make up for what was lost before them, held against least squares
and against what transformers computes with the decoded weights of the written file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Call, Qblk, gaussian, listing, save
from numpy.typing import NDArray

pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

import torch

import qconvert
from qconvert.errors import InputError, MachineError, UsageError, WeightError
from qconvert.files import open_model
from qconvert.files.scratch import Scratch
from qconvert.running.blocks import BlockChain, NoBlocks
from qconvert.running.hidden_states import HiddenStates
from qconvert.running.hugging_face import open_checkpoint
from qconvert.running.quantized_model import open_quantized
from qconvert.running.text import token_chunks
from qconvert.stages import repair
from qconvert.stages.repair_target import DAMPING, Moments, RepairedModel

pytestmark = pytest.mark.filterwarnings("default")  # of torch and transformers, not ours
TEXT = ROOT / "samples" / "calibration.txt"
WINDOWS, LENGTH = 16, 32
F64 = NDArray[np.float64]


# --- the formula ----------------------------------------------------------------------------------


def least(x: F64, y: F64, weight: F64) -> F64:
    """The T of the least |X W' - Y T'|² + λ |T - W|², by a solver of least squares: damping is so
    many more rows of input.
    """
    root = np.sqrt(DAMPING * np.mean(np.sum(y**2, axis=0)))
    inputs = np.concatenate([y, root * np.eye(y.shape[1])])
    outputs = np.concatenate([x @ weight.T, root * weight.T])
    found: F64 = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    return found


def problem(tokens: int, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    x = gaussian(1, tokens, channels) @ gaussian(2, channels, channels)
    return x, (x + 0.3 * gaussian(3, tokens, channels)).astype(np.float32)


@pytest.mark.parametrize("tokens", [200, 20])  # more and fewer than channels
def test_targets_are_those_of_least_squares(tmp_path: Path, tokens: int) -> None:
    (x, y), weight = problem(tokens, 30), gaussian(4, 8, 30)
    moments = Moments(30)
    for part in (slice(0, 13), slice(13, None)):
        moments.add(x[part], y[part], map)
    change = moments.change()
    assert change is not None
    wanted = least(x.astype(np.float64), y.astype(np.float64), weight.astype(np.float64))
    assert np.abs(wanted - weight).max() > 0.05
    np.testing.assert_allclose(weight + weight @ change, wanted, rtol=1e-8, atol=1e-9)
    with closing(open_model(save(tmp_path / "w.safetensors", {"w": weight}))) as source:
        model = RepairedModel(source, source.tensors[0], change)
        (tensor,) = model.tensors
        assert (tensor.name, tensor.shape, tensor.dtype) == ("w", (8, 30), "F32")
        flat = wanted.astype(np.float32).ravel()
        np.testing.assert_allclose(model.values(tensor, 17, 139), flat[17:139], rtol=1e-6)
        raw = model.raw(tensor, 4 * 17 + 1, 40)
        assert raw == model.values(tensor, 0, 240).tobytes()[69:109]


def test_moments_do_not_depend_on_who_sums_them() -> None:
    x, y = problem(64, 600)
    found = []
    for mapper in (map, lambda work, items: map(work, reversed(items))):
        moments = Moments(600)
        moments.add(x, y, mapper)
        found.append((moments.gram.tobytes(), moments.cross.tobytes()))
    assert found[0] == found[1]


def test_no_input_is_no_reason_for_a_change() -> None:
    moments = Moments(4)
    moments.add(np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32), map)
    assert moments.change() is None


def test_hidden_states_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    with Scratch(tmp_path / "out") as scratch:
        both = [HiddenStates(3, (4, 5), s) for s in (None, scratch)]
        between = scratch.append(b"other bytes")
        for states in both:
            for k in (2, 0):
                states.put(k, gaussian(k, 4, 5))
            for k in range(3):
                wanted = np.zeros((4, 5)) if k == 1 else gaussian(k, 4, 5)
                assert np.array_equal(states.get(k), wanted)
        assert scratch.read(between + 6, 5) == b"bytes"
        with pytest.raises(MachineError, match="lost its end"):
            scratch.read(between, 100)


# --- the blocks of a model ------------------------------------------------------------------------


def tokens_of(model: Path) -> NDArray[np.int64]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return token_chunks(tokenizer, TEXT, LENGTH, WINDOWS)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_blocks_run_alone_as_in_the_model(directory: Callable[[str], Path], name: str) -> None:
    """Windows that were not recorded; Gemma's blocks differ in masks and positions."""
    model = directory(name)
    checkpoint = open_checkpoint(model, threads=1, streamed=True)
    tokens = tokens_of(model)
    chain = BlockChain(checkpoint, tokens[0])
    with torch.inference_mode():
        whole = checkpoint.model(
            input_ids=torch.from_numpy(tokens[1][None]), output_hidden_states=True
        )
    hidden = chain.entering(tokens[1])
    for k in range(len(chain.blocks)):
        np.testing.assert_allclose(hidden, whole.hidden_states[k][0], rtol=1e-4, atol=1e-5)
        hidden = chain.run(k, hidden)
    head = checkpoint.model.lm_head
    last = chain.leaving(head, hidden, tokens[1])
    np.testing.assert_allclose(last, whole.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
    assert chain.leaves(head, tokens[0])
    assert not chain.leaves(checkpoint.model.get_input_embeddings(), tokens[0])
    with torch.inference_mode():  # nothing that was put into the model has stayed there
        again = checkpoint.model(input_ids=torch.from_numpy(tokens[1][None])).logits
    assert torch.equal(again, whole.logits)


def test_layers_that_read_the_same_are_found(directory: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(directory("llama"), threads=1)
    tokens = tokens_of(directory("llama"))
    chain = BlockChain(checkpoint, tokens[0])
    modules = {id(m): n.rpartition(".")[2] for n, m in chain.blocks[1].named_modules()}
    linear = [m for m in chain.blocks[1].modules() if isinstance(m, torch.nn.Linear)]
    groups = chain.readers(1, linear[::-1], chain.entering(tokens[0]))
    found = [{modules[id(m)] for m in group} for group in groups]
    assert found == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]


def test_a_model_that_is_no_chain_is_refused(directory: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(directory("llama"), threads=1)
    tokens = tokens_of(directory("llama"))[0]
    layers = checkpoint.model.model.layers
    assert len(BlockChain(checkpoint, tokens).blocks) == 2

    def refused(hook: Any, said: str) -> None:
        with pytest.raises(NoBlocks, match=said):
            BlockChain(checkpoint, tokens)
        hook.remove()

    between = layers[1].register_forward_pre_hook(lambda _, x: (x[0] + 1, *x[1:]))
    refused(between, "do not take what the block before them gives")
    changing = layers[0].register_forward_hook(lambda _, x, y: y + torch.rand(()))
    refused(changing, "twice the same")
    seeing = layers[1].register_forward_pre_hook(
        lambda _, x, named: (x, {**named, "position_ids": x[0]}), with_kwargs=True
    )
    refused(seeing, "more of the text than hidden states")
    layers[1] = layers[0]
    with pytest.raises(NoBlocks, match="more than once"):
        BlockChain(checkpoint, tokens)


# --- whole conversions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A model with a calibration, converted."""

    model: Path
    calibration: Path

    def quantize(self, output: Path, scheme: str, **options: Any) -> Any:
        given = {"calibration": self.calibration, "threads": 1, **options}
        if "text" in given:
            given = {"nsamples": WINDOWS, "seqlen": LENGTH, **given}
        return qconvert.quantize(self.model, scheme, output=output, **given)


@pytest.fixture(scope="module")
def made(directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("calibrations")

    def calibrated(name: str) -> Made:
        path = home / f"{name}.safetensors"
        if not path.exists():
            qconvert.calibrate(
                *(directory(name),),
                output=path, text=TEXT, gram=True, observer="minmax",
                nsamples=WINDOWS, seqlen=LENGTH, threads=1,
            )  # fmt: skip
        return Made(directory(name), path)

    return calibrated


def logits(model: Any, tokens: NDArray[np.int64]) -> F64:
    with torch.inference_mode():
        found: F64 = model(input_ids=torch.from_numpy(tokens)).logits.double().numpy()
    return found


def inputs(model: Any, name: str, tokens: NDArray[np.int64]) -> F64:
    """What enters a layer, by a hook of this test's own."""
    seen: list[F64] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, x: seen.append(x[0].reshape(-1, x[0].shape[-1]).double().numpy())
    )
    logits(model, tokens)
    hook.remove()
    return seen[0]


def plain_model(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


CASES = [("q3_block32", "qblk"), ("c3_block16", "qblk"), ("q4_0", "gguf")]
LAYERS = {  # of the second block, which needs all of the first, and in GGUF rows of another order
    "model.layers.1.self_attn.q_proj": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.o_proj": "blk.1.attn_output.weight",
    "model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight",
    "lm_head": "output.weight",
}


NAMES = [
    *(
        f"model.layers.{k}.{layer}_proj.weight"
        for k in range(2)
        for layer in (
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("mlp.gate", "mlp.up", "mlp.down"),
        )
    ),
    "lm_head.weight",
]  # in the order in which they run


@pytest.mark.parametrize(("scheme", "suffix"), CASES)
def test_targets_are_for_the_inputs_that_the_written_file_gives(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, suffix: str
) -> None:
    taken: dict[str, tuple[F64, F64]] = {}

    class Seen(RepairedModel):
        def __init__(self, model: Any, tensor: Any, change: F64) -> None:
            super().__init__(model, tensor, change)
            weight = model.values(tensor, 0, tensor.size).reshape(tensor.shape)
            target = self.values(self.tensor, 0, tensor.size).reshape(tensor.shape)
            taken[tensor.name] = weight.astype(np.float64), target.astype(np.float64)

    monkeypatch.setattr(repair, "RepairedModel", Seen)
    one, out = made("llama"), tmp_path / f"out.{suffix}"
    report = one.quantize(out, scheme, text=TEXT)
    tokens = tokens_of(one.model)
    before = plain_model(one.model)
    now = open_quantized(out, directory=one.model).checkpoint.model
    for layer, in_gguf in LAYERS.items():
        x, y = (inputs(m, layer, tokens) for m in (before, now))
        weight, target = taken[in_gguf if suffix == "gguf" else f"{layer}.weight"]
        change = least(x, y, weight) - weight
        assert np.abs(change).max() > 1e-3
        assert np.abs(target - weight - change).max() < 0.01 * np.abs(change).max()
    assert len(taken) == 15
    assert {t.rounding for t in report.tensors if t.name in taken} == {"compensated"}


@pytest.mark.parametrize(("scheme", "suffix"), CASES)
def test_the_model_loses_less(made: Any, tmp_path: Path, scheme: str, suffix: str) -> None:
    one, found = made("llama"), {}
    tokens = tokens_of(one.model)
    wanted = logits(plain_model(one.model), tokens)
    for text in (None, TEXT):
        out = tmp_path / f"{text is not None}.{suffix}"
        report = one.quantize(out, scheme, **({"text": text} if text else {}))
        model = open_quantized(out, directory=one.model).checkpoint.model
        found[text] = float(np.mean((logits(model, tokens) - wanted) ** 2))
        assert qconvert.verify(out, against=one.model).status == "pass"
    assert found[TEXT] < 0.6 * found[None]
    with closing(open_model(out)) as written, closing(open_model(one.model)) as source:
        sizes = {t.name: t for t in source.tensors}
        for row in report.tensors:  # errors are against the weights, whatever was aimed at
            if row.quantized and row.name in sizes:
                t = next(t for t in written.tensors if t.name == row.name)
                x, y = source.values(sizes[row.name], 0, t.size), written.values(t, 0, t.size)
                x = x.astype(np.float64)
                noise = np.sum((y - x) ** 2)
                assert row.sqnr_db == pytest.approx(10 * np.log10(np.sum(x**2) / noise), abs=1e-3)
                assert row.max_error == pytest.approx(np.abs(y - x).max(), rel=1e-5)


def test_report_and_file_say_what_was_done(made: Any, tmp_path: Path) -> None:
    import hashlib

    out = tmp_path / "out.qblk"
    report = made("llama").quantize(out, "q4_block32", text=TEXT)
    note = next(n for n in report.notes if n.startswith("15 matrices are aimed at"))
    assert "16 windows of 32 tokens of 'calibration.txt' through 2 blocks" in note
    assert "in memory" in note
    row = next(t for t in report.tensors if t.name == "lm_head.weight")
    assert row.rounding_reason
    assert row.rounding_reason.endswith("makes up for what the tensors before it lost")
    entry = Qblk(out).tensor("lm_head.weight")
    assert (entry["decision"]["rounding"], entry["decision"]["damping"]) == ("repaired", 0.01)
    digest = hashlib.sha256(TEXT.read_bytes()).hexdigest()
    assert Qblk(out).header["provenance"]["repair"] == {
        "damping": 0.01,
        "seqlen": LENGTH,
        "tensors": NAMES,
        "text": {"name": TEXT.name, "sha256": digest},
        "windows": WINDOWS,
    }
    assert report.warnings == []


def test_the_same_bytes_for_any_number_of_threads_and_wherever_hidden_states_are(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = made("llama"), tmp_path / "out.qblk"
    monkeypatch.setattr(repair, "TOGETHER", 5 * LENGTH)
    files, own = [], torch.get_num_threads()
    for threads, held in ((1, repair.HELD_BYTES), (3, repair.HELD_BYTES), (2, 0)):
        monkeypatch.setattr(repair, "HELD_BYTES", held)
        report = one.quantize(out, "q4_block32", text=TEXT, threads=threads, force=True)
        files.append(out.read_bytes())
        where = "a file beside the output" if held == 0 else "memory"
        assert any(f"MiB in {where}" in note for note in report.notes)
    assert len(set(files)) == 1
    assert torch.get_num_threads() == own
    assert set(listing(tmp_path)) == {"out.qblk"}


def test_the_weights_that_are_converted_run_whatever_was_loaded(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may be rescaled on their way: here it is the running model whose weights are."""
    one, files = made("llama"), []

    def loaded(*given: Any, **options: Any) -> Any:
        found = open_checkpoint(*given, **options)
        for parameter in found.model.parameters():
            parameter.data = parameter.data * 1.5
        return found

    for opened in (open_checkpoint, loaded):
        monkeypatch.setattr(repair, "open_source", opened)
        out = tmp_path / "out.gguf"  # whose rows are in another order
        one.quantize(out, "q4_0", text=TEXT, force=True)
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_a_tied_head_and_few_tokens_are_said(made: Any, tmp_path: Path) -> None:
    report = made("smollm").quantize(tmp_path / "out.qblk", "q4_block32", text=TEXT, nsamples=2)
    assert any(n.startswith("1 are aimed at their own weights, such as") for n in report.notes)
    (warning,) = (w for w in report.warnings if "shorter" in w)
    assert "64 tokens for 96 channels" in warning


@pytest.mark.parametrize(("wide", "narrow", "suffix"), [
    ("q8_block32", "q2_block32", "qblk"), ("q8_0", "q4_0", "gguf"),
])  # fmt: skip
def test_weights_that_make_up_for_others_are_not_called_poor(
    made: Any, tmp_path: Path, wide: str, narrow: str, suffix: str
) -> None:
    """Far from their own weights they are, at eight bits as well, and that is no loss of theirs."""
    one, out = made("llama"), tmp_path / f"out.{suffix}"
    first = {"qblk": "model.layers.0.*", "gguf": "blk.0.*_*.weight"}[suffix]
    norms = [] if suffix == "qblk" else ["*norm*"]
    options = {"tensor_scheme": {first: narrow}, "keep": norms, "text": TEXT}
    report = one.quantize(out, wide, **options)
    behind = {t.name: t.sqnr_db for t in report.tensors if "1" in t.name and t.stored[:2] == "q8"}
    assert min(behind.values()) < 26  # from where on those of eight bits are called poor
    assert report.warnings == []
    found = qconvert.verify(out, against=one.model)
    assert (found.status, [w for w in found.warnings if "poorer" in w]) == ("pass", [])
    quality = [c.detail for c in found.checks if c.id == "quality"]
    assert any("make up for what others have lost" in detail for detail in quality)


@pytest.mark.parametrize(
    ("name", "said"), [("qwen3-moe", "in another form"), ("bert", "it is an encoder")]
)
def test_what_cannot_be_repaired_is_converted_as_without(
    made: Any, tmp_path: Path, name: str, said: str
) -> None:
    one, files = made(name), []
    for text in (None, TEXT):
        out = tmp_path / "out.qblk"
        report = one.quantize(out, "q4_block32", force=True, **({"text": text} if text else {}))
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert any("--text has no effect" in w and said in w for w in report.warnings)


def test_refusals(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    one, out = made("llama"), tmp_path / "out.qblk"
    for options in ({"calibration": None}, {"rounding": "nearest"}, {"no_weighting": True}):
        with pytest.raises(UsageError, match="--text without") as refused:
            one.quantize(out, "q4_block32", text=TEXT, **options)
        assert "--gram" in (refused.value.hint or "")
    with pytest.raises(InputError, match="too short"):
        one.quantize(out, "q4_block32", text=TEXT, nsamples=10**6)
    with pytest.raises(InputError, match="no such file"):
        one.quantize(out, "q4_block32", text=tmp_path / "missing.txt")
    with pytest.raises(InputError, match="takes its directory"):
        Made(one.model / "model.safetensors", one.calibration).quantize(
            out, "q4_block32", text=TEXT
        )
    with pytest.raises(UsageError, match="--seqlen goes with --text"):
        one.quantize(out, "q4_block32", seqlen=32)
    monkeypatch.setattr(Moments, "finite", False)
    with pytest.raises(WeightError, match="NaN or Inf"):
        one.quantize(out, "q4_block32", text=TEXT)
    assert listing(tmp_path) == {}
    words = ["--scheme", "q4_block32", "--calibration", one.calibration, "-o", out]
    done = call("quantize", one.model, *words, "--text", TEXT, "--nsamples", 2, "--dry-run")
    assert done.code == 0, done.err
    assert "warning: --text has no effect on a dry run" in done.err
    assert listing(tmp_path) == {}

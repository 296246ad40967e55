"""tune --blocks: each block learns the float model's hidden states before the whole is trained."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, listing
from safetensors.numpy import load_file
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.errors import Stopped, UnsupportedError, UsageError
from qconvert.files import open_model
from qconvert.report import TuneReport

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

import qconvert.torch as qt  # noqa: E402
from qconvert.running.blocks import BlockChain  # noqa: E402
from qconvert.running.hugging_face import open_checkpoint  # noqa: E402
from qconvert.training import beginning, block_stage, loop, memory, tune  # noqa: E402

LENGTH, BATCH = 16, 4
BLOCKS = 12  # steps of each
SCHEME = "q2_block32"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks, and beside it a text of some 60 windows."""
    place = tmp_path_factory.mktemp("models")
    text = (ROOT / "samples" / "calibration.txt").read_text()[:1600]
    (place / "text.txt").write_text(text)
    return write_directory(place / "llama", "llama", tensors=weights(CONFIGS["llama"]))


def tuned(model: Path, output: Path, **more: Any) -> TuneReport:
    given: dict[str, Any] = {
        **{"scheme": SCHEME, "text": model.parent / "text.txt", "output": output, "force": True},
        **{"seqlen": LENGTH, "nsamples": 40, "threads": 1, "batch": BATCH, "lr": 3e-3},
        **{"blocks": BLOCKS, "steps": 4, "generate": 0},
    }
    return qconvert.tune(model, **given | more)


@pytest.fixture(scope="module")
def only_blocks(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneReport, Path]:
    output = tmp_path_factory.mktemp("blocks") / "m.qblk"
    return tuned(llama, output, steps=0), output


# --- what is learned ------------------------------------------------------------------------------


def training_windows(model: Path) -> Any:
    """Those of the 40 drawn windows that are trained on, by transformers alone, in their order: all
    but the first and the second tenth of a permutation, as the README of `tune` has it.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer((model.parent / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    every = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    drawn = np.sort(np.random.default_rng(0).permutation(len(every))[:40])
    chosen = every[drawn][np.random.default_rng(0).permutation(40)][8:]
    begin = np.full((len(chosen), 1), tokenizer.bos_token_id)
    return torch.from_numpy(np.hstack([begin, chosen[:, :-1]]))


def hidden(model: Any, windows: Any) -> list[Any]:
    """Hidden states behind each block, in float64."""
    found: list[Any] = []
    hooks = [
        block.register_forward_hook(
            lambda m, x, y: found.append((y[0] if isinstance(y, tuple) else y).double())
        )
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return found


def test_the_report_has_the_hidden_states_of_the_file(
    llama: Path, only_blocks: tuple[TuneReport, Path], tmp_path: Path
) -> None:
    """SQNR by transformers alone, of a file whose blocks were trained and of nearest rounding."""
    report, output = only_blocks
    assert (report.block_steps, report.began, report.step) == (BLOCKS, "blocks", 0)
    assert (report.chosen, report.status, report.warnings) == ("tuned", "pass", [])
    nearest = tmp_path / "nearest.qblk"
    qconvert.quantize(llama, SCHEME, output=nearest)
    float_model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    windows = training_windows(llama)
    wanted = hidden(float_model, windows)

    def sqnr(path: Path) -> list[float]:
        states = hidden(qt.load_model(path, activations="none"), windows)
        return [
            float(10 * torch.log10(w.square().sum() / (w - s).square().sum()))
            for w, s in zip(wanted, states, strict=True)
        ]

    trained = sqnr(output)
    assert [b.after_db for b in report.blocks] == pytest.approx(trained, abs=1e-3)
    assert report.blocks[0].before_db == pytest.approx(sqnr(nearest)[0], abs=1e-3)
    for block, untrained in zip(report.blocks, sqnr(nearest), strict=True):
        assert block.before_db is not None
        assert block.after_db is not None
        assert block.after_db > block.before_db + 1
        assert block.after_db > untrained + 1
    assert report.blocks[1].before_db > sqnr(nearest)[1]  # the first one helps the second


def test_its_loss_has_the_gradient_of_the_whole(llama: Path) -> None:
    """The gradient of a block by itself, against transformers' own pass over several windows."""
    model = open_checkpoint(llama, threads=1)
    windows = training_windows(llama)[:3]
    chain = BlockChain(model, windows[0].numpy())
    states = torch.from_numpy(np.stack([chain.entering(w.numpy()) for w in windows]))
    aim = torch.from_numpy(np.random.default_rng(1).normal(size=states.shape).astype(np.float32))
    block = chain.blocks[0]
    weight = block.mlp.down_proj.weight
    with torch.enable_grad():
        weight.requires_grad_(True)
        loss = (chain.run_together(0, states) - aim).square().sum()
        (mine,) = torch.autograd.grad(loss, weight)
        kept: list[Any] = []
        hook = block.register_forward_hook(
            lambda m, x, y: kept.append(y[0] if isinstance(y, tuple) else y)
        )
        model.model(input_ids=windows)
        hook.remove()
        (theirs,) = torch.autograd.grad((kept[0] - aim).square().sum(), weight)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_the_whole_goes_on_from_the_blocks(
    llama: Path, only_blocks: tuple[TuneReport, Path], tmp_path: Path
) -> None:
    report = tuned(llama, tmp_path / "m.qblk")
    assert [b.after_db for b in report.blocks] == [b.after_db for b in only_blocks[0].blocks]
    assert report.course[0].validation == only_blocks[0].course[0].validation
    assert report.step > 0
    found = {m.model: m.kl_mean for m in report.models}
    before = {m.model: m.kl_mean for m in only_blocks[0].models}
    assert found["tuned"] < before["tuned"] < 0.9 * before["nearest"]


def test_weights_begin_in_the_middle_of_their_codes(llama: Path, tmp_path: Path) -> None:
    """With steps of next to nothing no code is another one, and scales stay where they are."""
    given: dict[str, Any] = {"generate": 0, "steps": 0, "lr": None}
    tuned(llama, tmp_path / "blocks.qblk", **given)
    inner = loop.rates_of

    def rates_of(student: Any, given: Any, errors: Any) -> dict[str, float]:
        scale = 1e-3 if seen else 1.0  # asked for blocks first, and then for the steps
        seen.append(1)
        return {name: scale * rate for name, rate in inner(student, given, errors).items()}

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (beginning, tune):
            patch.setattr(module, "rates_of", rates_of)
        report = tuned(llama, tmp_path / "m.qblk", **given | {"steps": 10})
    assert report.step > 0
    mine, blocks = segments(tmp_path / "m.qblk"), segments(tmp_path / "blocks.qblk")
    for name, found in mine.items():
        assert found.get("codes") == blocks[name].get("codes")


def segments(path: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    with closing(open_model(path)) as model:
        for t in model.tensors:
            stored = model.stored(t)
            found[t.name] = {
                s.kind: stored.read(s.kind, 0, s.size)
                for s in stored.encoding.segments(stored.shape)
            }
    return found


def test_scales_alone_leave_the_codes_of_the_blocks(
    llama: Path, only_blocks: tuple[TuneReport, Path], tmp_path: Path
) -> None:
    report = tuned(llama, tmp_path / "m.qblk", train="scales", lr=None, steps=8)
    assert report.trained == "scales"
    assert report.step > 0
    assert report.gain > 0
    mine, blocks = segments(tmp_path / "m.qblk"), segments(tuned_scales_none(llama, tmp_path))
    for name, found in mine.items():
        assert found.get("codes") == blocks[name].get("codes")
        assert found.get("data") == blocks[name].get("data")  # norms
    assert any(found != blocks[name] for name, found in mine.items())


def tuned_scales_none(llama: Path, place: Path) -> Path:
    """The file of the blocks, with their own rates."""
    output = place / "none.qblk"
    tuned(llama, output, train="scales", lr=None, steps=0)
    return output


def test_scales_alone_without_blocks(llama: Path, tmp_path: Path) -> None:
    """Codes and norms are those of nearest rounding."""
    report = tuned(llama, tmp_path / "m.qblk", train="scales", blocks=0, lr=None, steps=8)
    assert (report.blocks, report.began) == ([], "")
    assert report.gain > 0
    nearest = tmp_path / "nearest.qblk"
    qconvert.quantize(llama, SCHEME, output=nearest)
    mine, theirs = segments(tmp_path / "m.qblk"), segments(nearest)
    for name, found in mine.items():
        changed = {kind for kind in found if found[kind] != theirs[name][kind]}
        assert changed <= {"scales", "zero_points"}
        assert bool(changed) == ("codes" in found)


def test_hidden_states_in_a_file_are_the_same(
    llama: Path, only_blocks: tuple[TuneReport, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(block_stage, "HELD_BYTES", 0)
    tuned(llama, tmp_path / "m.qblk", steps=0)
    assert listing(tmp_path) == {"m.qblk": only_blocks[1].read_bytes()}


def test_blocks_that_are_no_gain_are_left(llama: Path, tmp_path: Path) -> None:
    """A calibration is the better beginning where blocks learn next to nothing."""
    calibration = tmp_path / "c.safetensors"
    text = llama.parent / "text.txt"
    qconvert.calibrate(llama, text=text, output=calibration, gram=True, seqlen=LENGTH, threads=1)
    given: dict[str, Any] = {"calibration": calibration, "lr": 1e-9, "steps": 2}
    report = tuned(llama, tmp_path / "m.qblk", **given)
    assert report.began == "untrained"
    assert any("with trained blocks the held-out loss is" in w for w in report.warnings)
    plain = tuned(llama, tmp_path / "n.qblk", blocks=0, **given)
    assert report.course == plain.course
    assert report.models == plain.models


def test_numbers_that_are_none_leave_a_block_as_it_was(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: Callable[..., Any] = block_stage.BlockChain.run_together

    def run_together(self: Any, k: int, states: Any) -> Any:
        found = inner(self, k, states)
        return found * torch.nan if k == 1 and torch.is_grad_enabled() else found

    monkeypatch.setattr(block_stage.BlockChain, "run_together", run_together)
    report = tuned(llama, tmp_path / "m.qblk", steps=0)
    assert report.blocks[1].before_db == report.blocks[1].after_db
    assert report.warnings == [
        f"block 2 stays as it was before: the loss is nan at step 1 of {BLOCKS}"
    ]


def test_a_block_that_is_kept_stays(llama: Path, tmp_path: Path) -> None:
    report = tuned(llama, tmp_path / "m.qblk", steps=0, keep="model.layers.1.*")
    assert report.began == "blocks"
    assert report.blocks[1].before_db == report.blocks[1].after_db
    kept = segments(tmp_path / "m.qblk")["model.layers.1.mlp.up_proj.weight"]
    weight = weights(CONFIGS["llama"])["model.layers.1.mlp.up_proj.weight"]
    assert kept == {"data": weight.tobytes()}


# --- an interrupt ---------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "scales", "norms"])
def test_an_interrupted_run_goes_on(
    train: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the second block, then in the steps of the whole; the bytes are
    those of a run that nobody interrupts.
    """
    given: dict[str, Any] = {"train": train, "activations": "static", "lr": 1e-3, "steps": 6}
    whole = tmp_path / "whole.qblk"
    tuned(llama, whole, **given)
    output = tmp_path / "m.qblk"
    inner, calls = block_stage.BlockStage._step, []

    def stop(self: Any, *some: Any) -> None:
        calls.append(1)
        if len(calls) == BLOCKS + 5:
            signal.raise_signal(signal.SIGINT)
        inner(self, *some)

    with monkeypatch.context() as patch:
        patch.setattr(block_stage.BlockStage, "_step", stop)
        with pytest.raises(Stopped, match=r"^1 of 2 blocks are kept in .*m\.qblk\.partial"):
            tuned(llama, output, **given)
    kept = load_file(tmp_path / "m.qblk.partial")
    source = weights(CONFIGS["llama"])
    for name, array in kept.items():
        block = name.removeprefix("now/")
        if "layers." in block and block in source:
            same = np.array_equal(array, source[block].astype(np.float32))
            assert same == ("layers.1." in block), block
    inner_loss, steps = loop.divergence, []

    def divergence(*some: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return inner_loss(*some)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "divergence", divergence)
        with pytest.raises(Stopped, match=r"^3 of 6 steps are kept"):
            tuned(llama, output, resume=True, **given)
    report = tuned(llama, output, resume=True, **given)
    assert report.resumed_at == 3
    assert len(report.blocks) == 2
    assert listing(tmp_path) == {name: whole.read_bytes() for name in ("m.qblk", "whole.qblk")}


# --- memory, and what is refused ------------------------------------------------------------------


def test_memory_of_a_block_by_hand() -> None:
    """Two blocks of a matrix of 64 x 128 at 4 bits and a norm; the head is none of them."""
    from qconvert.model import TensorInfo
    from qconvert.schemes import parse_scheme
    from qconvert.stages.plan import PlannedTensor

    scheme: Any = parse_scheme("q4_block32_sym")
    plan = [PlannedTensor(TensorInfo("lm_head.weight", (256, 128), "F32", 131072), scheme, "")]
    for k in range(2):
        names = f"model.layers.{k}.w", f"model.layers.{k}.n"
        plan.append(PlannedTensor(TensorInfo(names[0], (64, 128), "F32", 32768), scheme, ""))
        plan.append(PlannedTensor(TensorInfo(names[1], (128,), "F32", 512), None, ""))
    config = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    values, tokens, every = 8192 + 128, 32, 320
    of_token = 24 * 128 + 6 * 4 * 128  # the inner layer is four times as wide where none is given
    wanted = 4 * (4 * values + tokens * of_token) + 5 * values + 2 * 4 * every * 128
    assert memory.block_bytes(plan, config, tokens, every) == wanted
    # With scales alone end to end it is the block that decides, and the head has no gradient.
    needed = [
        memory.needed_bytes(plan, trained, config, tokens, 0, wanted)
        for trained in ("all", "scales")
    ]
    assert needed[0] > needed[1]


def test_bad_input(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "m.qblk"
    with pytest.raises(UsageError, match="--blocks, found -1, wanted at least 0"):
        tuned(llama, output, blocks=-1)
    with pytest.raises(UsageError, match="--steps, found 0, wanted at least 1"):
        tuned(llama, output, blocks=0, steps=0)
    quantized = tmp_path / "q.qblk"
    qconvert.quantize(llama, SCHEME, output=quantized)
    with pytest.raises(UsageError, match="--blocks does not go with a file"):
        tuned(quantized, output, scheme=None, teacher=llama, text=llama.parent / "text.txt")
    bert = write_directory(tmp_path / "bert", "bert")
    with pytest.raises(UsageError, match="--blocks: blocks are those of a causal model"):
        tuned(bert, output, text=llama.parent / "text.txt")

    def shared(self: Any) -> Any:
        raise block_stage.NoBlocks("its blocks share weights")

    with monkeypatch.context() as patch:
        patch.setattr(block_stage.BlockChain, "places", shared)
        with pytest.raises(UnsupportedError, match="not run block by block, found its blocks sha"):
            tuned(llama, output)
    assert not [name for name in listing(tmp_path) if name.startswith(("m.qblk", ".m.qblk"))]

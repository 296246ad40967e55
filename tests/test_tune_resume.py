"""tune: a run that is interrupted or killed can be gone on with, and comes to the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, listing
from safetensors.numpy import load_file
from tiny_models import CONFIGS, weights, write_directory

import qconvert
from qconvert.cli.main import _stop, main
from qconvert.errors import InputError, MachineError, OutputExistsError, Stopped

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

from qconvert.training import loop, options, run  # noqa: E402

STEPS = 8
SCHEME = "q2_block32"
# Of `killed` too; static ranges move with each step of the first half.
GIVEN: dict[str, Any] = {
    **{"seqlen": 16, "nsamples": 40, "threads": 1, "batch": 4, "steps": STEPS, "lr": 3e-3},
    **{"activations": "static"},
}
WORDS = [
    *("--scheme", SCHEME, "--seqlen", "16", "--nsamples", "40", "--threads", "1", "-q"),
    *("--steps", str(STEPS), "--lr", "0.003", "--activations", "static"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    text = (ROOT / "samples" / "calibration.txt").read_text()[:1600]
    (place / "text.txt").write_text(text)
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    more = {"num_hidden_layers": 1}
    return write_directory(place / "llama", "llama", config=more, tensors=weights(config))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is saved after each step."""
    inner = options.TuneOptions.__init__

    def init(self: Any, *args: Any, **named: Any) -> None:
        inner(self, *args, **named | {"save_seconds": 0.0})

    monkeypatch.setattr(options.TuneOptions, "__init__", init)


def tuned(model: Path, output: Path, **more: Any) -> qconvert.report.TuneReport:
    text = model.parent / "text.txt"
    return qconvert.tune(
        model, **{"scheme": SCHEME, "text": text, "output": output, **GIVEN} | more
    )


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a run that nobody interrupts."""
    output = tmp_path_factory.mktemp("whole") / "m.qblk"
    report = tuned(llama, output)
    assert report.chosen == "tuned"
    assert report.resumed_at is None
    return output.read_bytes()


def stopping(number: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a signal arrive within a step, of which each is one batch."""
    inner = loop.divergence
    calls: list[int] = []

    def divergence(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)
        return inner(*given)

    monkeypatch.setattr(loop, "divergence", divergence)


@pytest.mark.parametrize(
    ("number", "code", "how", "step"),
    [
        (signal.SIGINT, 130, "interrupted", 1),
        (signal.SIGTERM, 143, "terminated", 3),
        (signal.SIGINT, 130, "interrupted", 6),  # ranges stay from the fifth on
    ],
)
def test_a_signal_keeps_the_step_and_resume_goes_on(
    number: int, code: int, how: str, step: int, llama: Path, whole: bytes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "m.qblk"
    line = ["tune", str(llama), "--text", str(llama.parent / "text.txt"), "-o", str(output), *WORDS]
    before = signal.signal(number, _stop)  # as the command has it
    try:
        with monkeypatch.context() as patch:
            stopping(number, step, patch)
            assert main(line) == code
    finally:
        signal.signal(number, before)
    err = capsys.readouterr().err
    assert f"{how}: {step} of {STEPS} steps are kept in {output}.partial" in err
    assert "--resume" in err
    assert list(listing(tmp_path)) == ["m.qblk.partial"]
    assert main(line) == 4
    err = capsys.readouterr().err
    assert "an interrupted run has left its state" in err
    assert "TUNE-STATE" in err
    report = tuned(llama, output, resume=True)
    assert report.resumed_at == step
    assert [v.step for v in report.course] == list(range(STEPS + 1))
    assert listing(tmp_path) == {"m.qblk": whole}


def test_a_stopped_run_can_be_stopped_again(
    llama: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "m.qblk"
    for at in (2, 4):
        with monkeypatch.context() as patch:
            stopping(signal.SIGINT, 2, patch)
            with pytest.raises(Stopped, match=f"^{at} of {STEPS} steps are kept"):
                tuned(llama, output, resume=True)
    tuned(llama, output, resume=True)
    assert output.read_bytes() == whole


KILLED = """
import json, os, signal, sys
from pathlib import Path
from qconvert.training import loop
from qconvert.training.options import TuneOptions
from qconvert.training.tune import tune
from qconvert.schemes import parse_scheme
model, output, step, given = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
given = json.loads(given)
calls, inner = [], loop.divergence
def divergence(*a):
    calls.append(1)
    if len(calls) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*a)
loop.divergence = divergence
rate = given.pop("lr")
scheme = parse_scheme("q2_block32")
text = model.parent / "text.txt"
tune(model, TuneOptions(scheme, text, output, rate=rate, save_seconds=0.0, **given))
"""


def test_a_killed_run_goes_on(llama: Path, whole: bytes, tmp_path: Path) -> None:
    import json

    output = tmp_path / "m.qblk"
    killed = [sys.executable, "-c", KILLED, str(llama), str(output), "5", json.dumps(GIVEN)]
    done = subprocess.run(killed, capture_output=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert output.with_name("m.qblk.partial").exists()
    report = tuned(llama, output, resume=True)
    assert report.resumed_at == 4
    assert listing(tmp_path) == {"m.qblk": whole}  # nothing of the killed run is left


@pytest.mark.usefixtures("often")
def test_a_run_killed_after_training_is_judged_and_written(
    llama: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "m.qblk"

    def failed(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(run, "decide", failed)
        with pytest.raises(MemoryError):
            tuned(llama, output)
    assert list(listing(tmp_path)) == ["m.qblk.partial"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", failed)  # no step is run again
        assert tuned(llama, output, resume=True).resumed_at == STEPS
    assert listing(tmp_path) == {"m.qblk": whole}


def test_without_a_state_resume_begins(llama: Path, whole: bytes, tmp_path: Path) -> None:
    assert tuned(llama, tmp_path / "m.qblk", resume=True).resumed_at == 0
    assert listing(tmp_path) == {"m.qblk": whole}


@pytest.fixture
def halted(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that was interrupted after its third step."""
    output = tmp_path / "out" / "m.qblk"
    output.parent.mkdir()
    with monkeypatch.context() as patch:
        stopping(signal.SIGINT, 3, patch)
        with pytest.raises(Stopped):
            tuned(llama, output)
    return output


def test_a_state_of_another_run_is_refused_by_name(
    llama: Path, halted: Path, tmp_path: Path
) -> None:
    before = listing(halted.parent)
    text = tmp_path / "other.txt"
    text.write_text((llama.parent / "text.txt").read_text() + " more")
    for more, words in (
        ({"scheme": "q3_block32"}, "--scheme, found q2_block32, wanted q3_block32"),
        ({"steps": 9}, "--steps, found 8, wanted 9"),
        ({"lr": None}, "--lr, found 0.003"),
        ({"seqlen": 17}, "--seqlen"),
        ({"batch": 3}, "--batch"),
        ({"seed": 1}, "--seed"),
        ({"nsamples": 39}, "--nsamples"),
        ({"loss": "lm"}, "--loss, found distill, wanted lm"),
        ({"train": "norms"}, "--train, found all, wanted norms"),
        ({"activations": "none"}, "--activations, found static, wanted none"),
        ({"keep": "*down_proj*"}, "--keep"),
        ({"tensor_scheme": {"*down_proj*": "q4_block32"}}, "--tensor-scheme"),
        ({"threads": 2}, "--threads, found 1, wanted 2"),
        ({"text": text}, "--text"),
        ({"teacher": llama}, "--teacher"),
    ):
        with pytest.raises(InputError, match=rf"m\.qblk\.partial: .* another run: {words}") as e:
            tuned(llama, halted, resume=True, **more)
        assert e.value.code == "TUNE-RESUME"
    config = CONFIGS["llama"] | {"num_hidden_layers": 1}
    other = {n: -w for n, w in weights(config).items()}
    model = write_directory(
        tmp_path / "llama", "llama", config={"num_hidden_layers": 1}, tensors=other
    )
    with pytest.raises(InputError, match="another run: the model"):
        tuned(model, halted, resume=True, text=llama.parent / "text.txt")
    assert listing(halted.parent) == before


def test_a_damaged_state_is_refused(llama: Path, halted: Path) -> None:
    state = halted.with_name("m.qblk.partial")
    data = state.read_bytes()
    for bad in (data[:-8], b"", data.replace(b'"steps_run\\"', b'"steps_ran\\"')):
        assert bad != data
        state.write_bytes(bad)
        with pytest.raises(InputError, match=r"m\.qblk\.partial: "):
            tuned(llama, halted, resume=True)
    state.write_bytes(data)
    with pytest.raises(OutputExistsError, match="an interrupted run has left its state"):
        tuned(llama, halted)


def test_force_begins_again(llama: Path, whole: bytes, halted: Path) -> None:
    assert tuned(llama, halted, force=True).resumed_at is None
    assert listing(halted.parent) == {"m.qblk": whole}


@pytest.mark.usefixtures("often")
def test_a_full_disk_keeps_the_state_before(
    llama: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills when the third state is half written."""
    output, state = tmp_path / "m.qblk", tmp_path / "m.qblk.partial"
    inner, seen = os.pwrite, set()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if state.exists():
            seen.add(state.stat().st_ino)
        if len(seen) == 2 and offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(MachineError, match=r"m\.qblk\.partial: no space left") as e:
            tuned(llama, output)
    assert e.value.hint == (
        "free some space, or write to another disk; then go on with --resume from the state "
        "before, which is kept"
    )
    assert list(listing(tmp_path)) == ["m.qblk.partial"]
    assert tuned(llama, output, resume=True).resumed_at == 2
    assert output.read_bytes() == whole


def test_its_size_is_known_beforehand(
    llama: Path, halted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained, Adam's two moments and the best state, 4 bytes a value; ranges of static
    activations and the header come on top of it.
    """
    state = halted.with_name("m.qblk.partial")
    arrays = load_file(state)
    adam = {n: a for n, a in arrays.items() if n.startswith("adam/exp_avg/")}
    trained = sum(a.size for n, a in adam.items() if not n.endswith("/input"))
    reported = tuned(llama, tmp_path / "m.qblk").state_bytes
    assert reported == 4 * 4 * trained
    assert reported < state.stat().st_size < 1.2 * reported
    free = os.statvfs(tmp_path)

    def full(_: Any) -> os.statvfs_result:
        return os.statvfs_result([1, 1, *free[2:4], 2 * reported - 1, *free[5:]])

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(MachineError, match=r"n\.qblk\.partial: not enough space on the disk"):
        tuned(llama, tmp_path / "n.qblk")
    tuned(llama, halted, resume=True)  # one of the two is there

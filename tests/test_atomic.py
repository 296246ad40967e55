"""Output is old, absent or complete, whatever happens, and the input is never the output.

Not checked here: power loss, and refusals for lack of permission, which do not stop root; a path
below a file, /proc, a file size limit and errors put in place of system calls stand in for them.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COMMAND, Finished, Run, environment, gaussian, listing, save

from qconvert.cli.main import main
from qconvert.errors import InputError, MachineError, OutputExistsError
from qconvert.files import beside
from qconvert.files.atomic import AtomicOutput, check_space
from qconvert.schemes import parse_scheme
from qconvert.stages import conversion
from qconvert.stages import quantize as stage
from qconvert.stages.quantize import QuantizeOptions, quantize
from qconvert.stages.verify import VerifyOptions, verify


@pytest.fixture(autouse=True)
def nothing_under_construction() -> Iterator[None]:
    """What one test leaves must not fail the next."""
    yield
    beside._under_construction.clear()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a model and its activations."""
    save(tmp_path / "m.safetensors", {"w": gaussian(1, 40, 64), "v": gaussian(2, 64, 40)})
    save(tmp_path / "acts.safetensors", {"w": gaussian(3, 9, 64)})
    return tmp_path


def convert(place: Path, name: str = "out.qblk", **options: Any) -> None:
    quantize(
        place / "m.safetensors",
        QuantizeOptions(parse_scheme("q4_block32"), place / name, **options),
    )


COMMANDS = {
    "qblk": ["quantize", "m.safetensors", "--scheme", "q8_channel", "-o"],
    "gguf": ["quantize", "m.safetensors", "--scheme", "q8_0", "--raw", "--format", "gguf", "-o"],
    "calibration": ["calibrate", "m.safetensors", "--activations", "acts.safetensors", "-o"],
    "report": ["inspect", "m.safetensors", "--headers-only", "--report"],
}
every_command = pytest.mark.parametrize("kind", COMMANDS)
suffix = {"qblk": "o.qblk", "gguf": "o.gguf", "calibration": "o.safetensors", "report": "o.json"}


# --- an existing output ---------------------------------------------------------------------------


@every_command
def test_an_existing_output_is_refused_untouched_and_replaced_with_force(
    kind: str, place: Path, run: Run
) -> None:
    target = place / suffix[kind]
    target.write_bytes(b"precious")
    before = listing(place)
    refused = run(*COMMANDS[kind], target.name, cwd=place)
    assert refused.code == 4
    assert "--force" in refused.err
    assert listing(place) == before
    assert run(*COMMANDS[kind], target.name, "--force", cwd=place).code == 0
    after = listing(place)
    assert after.pop(target.name) != b"precious"
    assert after == {n: d for n, d in before.items() if n != target.name}


def test_an_output_that_appears_meanwhile_is_not_replaced(place: Path) -> None:
    target = place / "new"
    with AtomicOutput(target, overwrite=False) as out:
        out.write_at(0, b"ours")
        target.write_bytes(b"theirs")
        with pytest.raises(OutputExistsError):
            out.commit()
    assert target.read_bytes() == b"theirs"
    assert not list(place.glob(".*"))


def test_a_file_system_without_links_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with AtomicOutput(tmp_path / "new", overwrite=False) as out:
        out.write_at(0, b"ours")
        out.commit()
    assert listing(tmp_path) == {"new": b"ours"}


def test_a_dangling_link_is_an_existing_output(place: Path) -> None:
    (place / "out.qblk").symlink_to("nowhere")
    with pytest.raises(OutputExistsError):
        convert(place)
    assert (place / "out.qblk").is_symlink()


# --- the input is never the output ----------------------------------------------------------------


def spelled(place: Path, name: str) -> dict[str, Path]:
    """Other names of a file of the directory."""
    (place / "link").symlink_to(name)
    os.link(place / name, place / "hard")
    (place / "sub").mkdir()
    (place / "elsewhere").symlink_to(place)
    return {
        "same": place / name,
        "dot": place / "." / "sub" / ".." / name,
        "symlink": place / "link",
        "hard link": place / "hard",
        "directory link": place / "elsewhere" / name,
    }


@pytest.mark.parametrize("force", [False, True])
def test_the_model_is_never_the_output(place: Path, force: bool) -> None:
    before = (place / "m.safetensors").read_bytes()
    for spelling, target in spelled(place, "m.safetensors").items():
        files = sorted(p.name for p in place.iterdir())
        options = QuantizeOptions(parse_scheme("q4_block32"), target, container="qblk", force=force)
        with pytest.raises(MachineError, match="the output is the input"):
            quantize(place / "m.safetensors", options)
        assert (place / "m.safetensors").read_bytes() == before, spelling
        assert sorted(p.name for p in place.iterdir()) == files


@pytest.mark.parametrize("spelling", ["m.safetensors", "./m.safetensors", "link", "hard"])
@pytest.mark.parametrize("kind", COMMANDS)
def test_no_option_writes_over_the_model(
    kind: str, spelling: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spelled(place, "m.safetensors")
    before = listing(place)
    monkeypatch.chdir(place)
    # qblk: the container does not show in this name
    extra = ["--format", "qblk"] if kind == "qblk" else []
    assert main([*COMMANDS[kind], spelling, "--force", *extra]) == 4
    assert listing(place) == before


def test_no_option_writes_over_activations_or_a_calibration(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main([*COMMANDS["calibration"], "c.safetensors"]) == 0
    before = listing(place)
    assert main([*COMMANDS["calibration"], "./acts.safetensors", "--force"]) == 4
    calibrated = ["--calibration", "c.safetensors", "--format", "qblk", "--force"]
    assert main([*COMMANDS["qblk"], "c.safetensors", *calibrated]) == 4
    assert listing(place) == before


def test_no_report_is_written_over_what_is_verified(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main([*COMMANDS["qblk"], "o.qblk"]) == 0
    before = listing(place)
    for target in ("o.qblk", "m.safetensors"):
        line = ["verify", "o.qblk", "--against", "m.safetensors", "--report", target, "--force"]
        assert main(line) == 4
        assert listing(place) == before


def test_no_file_of_a_model_directory_is_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save(directory / names[0], {"a": gaussian(1, 40, 64)})
    save(directory / names[1], {"b": gaussian(2, 40, 64)})
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text("{}")
    before = listing(directory)
    for name in before:
        line = ["quantize", str(directory), "--scheme", "q8_channel", "--format", "qblk"]
        assert main([*line, "-o", str(directory / name), "--force"]) == 4, name
        assert listing(directory) == before


def test_one_file_is_not_output_and_report_at_once(place: Path, run: Run) -> None:
    before = listing(place)
    refused = run(*COMMANDS["qblk"], "o.qblk", "--report", "o.qblk", "--force", cwd=place)
    assert refused.code in (2, 4)
    assert listing(place) == before


# --- a machine that refuses -----------------------------------------------------------------------


@every_command
@pytest.mark.parametrize(
    "target", ["missing/o.qblk", "m.safetensors/o.qblk", "/proc/o.qblk", "sub", "x" * 300 + ".qblk"]
)
def test_an_impossible_output_is_refused_before_the_work(
    kind: str,
    target: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "sub").mkdir()
    before = listing(place)
    monkeypatch.chdir(place)
    extra = ["--format", "qblk", "--force"] if kind == "qblk" else ["--force"]
    assert main([*COMMANDS[kind], target, *extra]) == 4
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err.startswith("error: ")  # no line of progress: nothing was begun
    assert listing(place) == before


def test_a_longest_name_that_is_not_ascii_is_written(place: Path) -> None:
    convert(place, "é" * 125 + ".qblk")  # 255 bytes, the most a file name may have


def limited(size: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return limit


@every_command
def test_a_full_disk_leaves_nothing(kind: str, place: Path, run: Run) -> None:
    before = listing(place)
    # The report of a calibration holds more than this too.
    full = run(*COMMANDS[kind], suffix[kind], cwd=place, preexec_fn=limited(200))
    assert full.code == 4, full
    assert full.err.splitlines()[-2].startswith(f"error: {suffix[kind]}: ")
    assert listing(place) == before


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "link"])
def test_an_error_of_any_write_leaves_nothing(
    call: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = listing(place)
    monkeypatch.setattr(os, call, refuse)
    if call == "link":  # stands in for the last step, whichever it is
        monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.chdir(place)
    assert main([*COMMANDS["qblk"], "o.qblk"]) == 4
    assert "no space left on device" in capsys.readouterr().err
    assert listing(place) == before


def test_short_writes_are_continued(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(place, "whole.qblk")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, bytes(data[:7]), at))
    convert(place, "pieces.qblk")
    assert (place / "whole.qblk").read_bytes() == (place / "pieces.qblk").read_bytes()


def test_too_little_space_is_found_out_before_the_work(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MachineError, match="not enough space"):
        check_space(place / "o.qblk", 1 << 60)
    monkeypatch.setattr(conversion, "check_space", lambda target, _: check_space(target, 1 << 60))
    before = listing(place)
    with pytest.raises(MachineError):
        convert(place)
    assert listing(place) == before


def test_a_directory_that_cannot_be_written_is_one_refusal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a read-only file system unlink of a missing file says EROFS too."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    real = os.open
    monkeypatch.setattr(
        os, "open", lambda p, f, *a, **k: refuse() if f & os.O_CREAT else real(p, f, *a, **k)
    )
    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.chdir(place)
    assert main([*COMMANDS["qblk"], "o.qblk"]) == 4
    assert "read-only file system" in capsys.readouterr().err


def test_what_a_killed_run_left_does_not_stop_the_next(place: Path) -> None:
    """In a container every run has the same process id."""
    left = place / f".out.qblk.partial-{os.getpid()}"
    left.write_bytes(b"half")
    convert(place)
    assert verify(place / "out.qblk", VerifyOptions()).status == "pass"
    assert not left.exists()


# --- durability and mode --------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_the_file_is_on_the_disk_before_its_name_and_the_name_before_success(
    place: Path, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "replace")}

    def fsync(fd: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real["fsync"](fd)

    def naming(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls.append("name")
            real[name](*arguments)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, naming(name))
    convert(place, force=force)
    assert calls == ["file", "name", "directory"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("force", [False, True])
def test_the_mode_follows_the_umask(place: Path, mask: int, mode: int, force: bool) -> None:
    if force:
        (place / "out.qblk").touch(0o777)
    before = os.umask(mask)
    try:
        convert(place, force=force)
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "out.qblk").stat().st_mode) == mode


# --- interrupted ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes some seconds with ``--range mse`` on one thread."""
    tensors = {f"w{i}": gaussian(i, 512, 1024) for i in range(12)}
    return save(tmp_path_factory.mktemp("slow") / "m.safetensors", tensors)


def interrupted(slow: Path, directory: Path, number: int, after: float) -> Finished:
    """Send a signal so many seconds after the work began."""
    line = ["quantize", slow, "--scheme", "q3_block16_asym", "-o", directory / "o.qblk"]
    more = ["--report", directory / "r.json", "--threads", "1"]
    process = subprocess.Popen(
        [*COMMAND, *line, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stderr
    first = process.stderr.readline()
    assert first.startswith("quantize: ")
    time.sleep(after)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return Finished(process.returncode, out, first + err)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_at_any_moment_leaves_all_or_nothing(
    slow: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    rng = random.Random(number)
    for after in [0.0, *(rng.uniform(0, 0.1 * 4**i) for i in range(4))]:
        directory = tmp_path / f"{after:.6f}"
        directory.mkdir()
        left = interrupted(slow, directory, number, after)
        assert left.code in (code, 0), left
        assert "Traceback" not in left.err
        assert "bug" not in left.err
        files = listing(directory)
        if left.code == 0:
            assert set(files) == {"o.qblk", "r.json"}
        else:
            assert not left.out
            *progress, last = left.err.splitlines()
            assert last == word
            assert all(line.startswith("quantize: ") for line in progress[1:])
            assert set(files) <= {"o.qblk", "r.json"}, "a partial file"
        if "o.qblk" in files:  # the signal came after the name was given
            assert verify(directory / "o.qblk", VerifyOptions()).status == "pass"
        shutil.rmtree(directory)


def test_a_kill_leaves_only_a_hidden_partial_file(slow: Path, tmp_path: Path) -> None:
    assert interrupted(slow, tmp_path, signal.SIGKILL, 0.0).code == -signal.SIGKILL
    assert {n.rsplit("-", 1)[0] for n in listing(tmp_path)} == {
        ".o.qblk.partial",
        ".r.json.partial",
    }


def test_a_signal_while_a_report_is_prepared_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the file and the ``with`` block that owns it."""
    before = listing(place)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qconvert.cli.emit.Emitter.__enter__", interrupt)
    monkeypatch.chdir(place)
    assert main([*COMMANDS["report"], "r.json"]) == 130
    assert listing(place) == before


# --- a source that changes ------------------------------------------------------------------------


def changed_while_read(place: Path, change: Callable[[Path], None]) -> Callable[..., Any]:
    real = stage.open_model

    def open_and_change(path: Path) -> Any:
        model = real(path)
        change(path)
        return model

    return open_and_change


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5000)


def touch(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [truncate, touch])
def test_a_source_that_changes_under_way_is_an_input_error_and_leaves_nothing(
    change: Callable[[Path], None], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "open_model", changed_while_read(place, change))
    with pytest.raises(InputError) as refusal:
        convert(place)
    assert refusal.value.code == "FILE-CHANGED"
    assert set(listing(place)) == {"m.safetensors", "acts.safetensors"}


def test_a_source_truncated_during_the_command_exits_with_3(slow: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    shutil.copy(slow, source)
    process = subprocess.Popen(
        [*COMMAND, "quantize", source, "--scheme", "q3_block16_asym", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stderr
    process.stderr.readline()
    os.truncate(source, 4 << 20)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "")
    assert "file changed while it was read" in err
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_weights_that_are_refused_late_leave_nothing(place: Path) -> None:
    bad = gaussian(5, 64, 64)
    bad[-1, -1] = np.nan
    save(place / "m.safetensors", {"a": gaussian(1, 64, 64), "z": bad})
    before = listing(place)
    assert main(["quantize", str(place / "m.safetensors"), "--scheme", "q8_block32"]) == 3
    assert listing(place) == before

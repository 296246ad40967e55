"""Files beside their target: random names and locks, leftovers, and sets that are replaced whole.

Runs that die or write at the same time are child processes made with ``fork``, which all say that
they have the same process number, as in containers.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Call, gaussian, listing, save

from qconvert.errors import MachineError, OutputExistsError
from qconvert.files import beside
from qconvert.files.atomic import AtomicOutput, AtomicSet

NAMES = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.fixture(autouse=True)
def one_process_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)


def child(work: Callable[[], Any]) -> int:
    """Run in a process of its own, which ends as if killed unless the work ends by itself."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_set(directory: Path, text: str, **options: Any) -> None:
    targets = [directory / name for name in NAMES]
    options = {"overwrite": True} | options
    with AtomicSet(directory / "m.gguf", targets, **options) as out:
        for path in out.paths:
            path.write_text(f"{text} {path.name}")
        out.commit()


def of(directory: Path) -> dict[str, str]:
    """Which set each file there is of."""
    return {p.name: p.read_text().split()[0] for p in sorted(directory.glob("m-*"))}


def hidden(directory: Path) -> list[str]:
    return [p.name for p in directory.iterdir() if p.name.startswith(".")]


# --- names, locks, leftovers ----------------------------------------------------------------------


def test_two_runs_with_one_process_number_write_one_target_and_the_last_has_it(
    tmp_path: Path,
) -> None:
    target = tmp_path / "m.qblk"

    def run(word: bytes, before: float, after: float) -> None:
        with AtomicOutput(target, overwrite=True) as out:
            for i in range(0, 3000, 3):
                out.write_at(i, word)
                if i == 1500:
                    time.sleep(before)
            out.commit()
            time.sleep(after)

    slow = child(lambda: run(b"aaa", 0.6, 0))
    time.sleep(0.2)
    quick = child(lambda: run(b"bbb", 0.1, 0))
    assert ended(quick) == 0
    assert target.read_bytes() == b"bbb" * 1000, "complete, and not touched by the other"
    assert ended(slow) == 0
    assert target.read_bytes() == b"aaa" * 1000
    assert not hidden(tmp_path)


def test_what_a_killed_run_left_is_removed_by_the_next_and_only_that(tmp_path: Path) -> None:
    target = tmp_path / "m.qblk"

    def killed() -> None:
        AtomicOutput(target, overwrite=True).write_at(0, b"half")
        signal.raise_signal(signal.SIGKILL)

    assert ended(child(killed)) == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1
    others = [".m.qblk.partial-notes", ".m.qblk.partial-0123456789abcdef0", ".n.qblk.partial-1"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    with AtomicOutput(target, overwrite=False) as out:
        assert len(hidden(tmp_path)) == 1 + len(others)
        out.write_at(0, b"whole")
        out.commit()
    assert sorted(hidden(tmp_path)) == sorted(others)
    assert target.read_bytes() == b"whole"


def test_what_another_run_is_writing_stays(tmp_path: Path) -> None:
    target = tmp_path / "m.qblk"
    with AtomicOutput(target, overwrite=True) as out:
        out.write_at(0, b"theirs")
        beside.remove_leftovers(target)  # as the next run does
        assert out.path.exists()
        out.commit()
    assert target.read_bytes() == b"theirs"


def test_where_there_are_no_locks_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".m.qblk.partial-00000000000000aa"
    left.write_bytes(b"perhaps in use")
    folder = tmp_path / ".m.qblk.partial-00000000000000ab"
    folder.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with AtomicOutput(tmp_path / "m.qblk", overwrite=True) as out:
        out.write_at(0, b"x")
        out.commit()
    write_set(tmp_path, "new")
    assert left.exists()
    assert folder.exists()
    assert set(of(tmp_path).values()) == {"new"}


def test_one_target_is_not_written_twice_by_one_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with AtomicOutput(tmp_path / "m", overwrite=True) as out:
        for same in (tmp_path / "m", tmp_path / "link" / "m"):
            with pytest.raises(MachineError, match="two outputs"):
                AtomicOutput(same, overwrite=True)
        out.commit()
    AtomicOutput(tmp_path / "m", overwrite=True).__exit__(None, None, None)


# --- sets -----------------------------------------------------------------------------------------


def test_a_set_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    write_set(tmp_path, "old", overwrite=False)
    assert of(tmp_path) == dict.fromkeys(NAMES, "old")
    with pytest.raises(OutputExistsError):
        write_set(tmp_path, "new", overwrite=False)
    assert of(tmp_path) == dict.fromkeys(NAMES, "old")
    write_set(tmp_path, "new")
    assert of(tmp_path) == dict.fromkeys(NAMES, "new")
    assert not hidden(tmp_path)


def test_a_file_of_a_set_that_appears_meanwhile_stays_and_the_set_does_not_come(
    tmp_path: Path,
) -> None:
    targets = [tmp_path / name for name in NAMES]
    with AtomicSet(tmp_path / "m.gguf", targets, overwrite=False) as out:
        for path in out.paths:
            path.write_text("ours")
        targets[1].write_text("theirs")
        with pytest.raises(OutputExistsError):
            out.commit()
    assert listing(tmp_path) == {NAMES[1]: b"theirs"}


def test_a_directory_that_appears_meanwhile_under_the_name_of_a_file_stays(tmp_path: Path) -> None:
    write_set(tmp_path, "old")
    with AtomicSet(tmp_path / "m.gguf", [tmp_path / n for n in NAMES], overwrite=True) as out:
        for path in out.paths:
            path.write_text("new")
        (tmp_path / NAMES[1]).unlink()
        (tmp_path / NAMES[1]).mkdir()
        (tmp_path / NAMES[1] / "thesis.odt").write_text("theirs")
        with pytest.raises(MachineError, match="not a regular file"):
            out.commit()
    assert (tmp_path / NAMES[1] / "thesis.odt").read_text() == "theirs"
    assert [(tmp_path / n).read_text().split()[0] for n in NAMES[::2]] == ["old", "old"]
    assert not hidden(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_any_error_while_a_set_is_replaced_leaves_the_old_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th such call fails, for every n there is."""
    real = getattr(os, call)
    for n in range(30):
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_set(tmp_path, "old")
        left = n

        def failing(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **more)

        monkeypatch.setattr(os, call, failing)
        try:
            write_set(tmp_path, "new")
        except MachineError as e:
            assert "input/output error" in str(e)  # noqa: PT017
        monkeypatch.setattr(os, call, real)
        if left >= 0:
            assert n >= 1, "never called"
            return
        found = of(tmp_path)
        assert len(set(found.values())) == 1, (n, found)
        assert list(found) == NAMES
        assert not hidden(tmp_path)
    raise AssertionError("called without an end")


def test_a_run_that_is_killed_while_a_set_is_replaced_leaves_it_old_absent_or_complete(
    tmp_path: Path,
) -> None:
    """At each change of a name; the next run to the output, even one that fails, repairs it."""
    seen = set()
    for n in range(30):
        place = tmp_path / str(n)
        place.mkdir()
        write_set(place, "old")

        def killed(n: int = n, place: Path = place) -> None:
            left = n
            real = {name: getattr(os, name) for name in ("rename", "replace")}

            def counted(name: str) -> Callable[..., None]:
                def call(*arguments: Any, **more: Any) -> None:
                    nonlocal left
                    left -= 1
                    if left == -1:
                        os._exit(9)
                    real[name](*arguments, **more)

                return call

            for name in real:
                setattr(os, name, counted(name))
            write_set(place, "new")

        code = ended(child(killed))
        found = of(place)
        whole = NAMES[0] in found
        if whole:
            assert len(set(found.values())) == 1, (n, found)
            assert list(found) == NAMES
        seen.add(next(iter(found.values())) if whole else "absent")
        beside.remove_leftovers(place / "m.gguf")
        found = of(place)
        assert len(set(found.values())) == 1, (n, found)
        assert list(found) == NAMES
        assert not hidden(place)
        if code == 0:
            assert seen == {"old", "absent", "new"}
            return
    raise AssertionError("renamed without an end")


def test_two_runs_that_replace_one_set_take_turns(tmp_path: Path) -> None:
    write_set(tmp_path, "old")

    def slow(word: str) -> None:
        real = os.replace

        def replace(*arguments: Any, **more: Any) -> None:
            time.sleep(0.02)
            real(*arguments, **more)

        os.replace = replace  # type: ignore[assignment]
        for _ in range(4):
            write_set(tmp_path, word)

    runs = [child(lambda word=word: slow(word)) for word in ("first", "second")]  # type: ignore[misc]
    assert [ended(pid) for pid in runs] == [0, 0]
    found = of(tmp_path)
    assert len(set(found.values())) == 1, found
    assert list(found) == NAMES
    assert not hidden(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_set_has_its_names(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, "old")
    real = os.replace

    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    def replace(*arguments: Any, **more: Any) -> None:
        real(*arguments, **more)
        signal.raise_signal(number)

    monkeypatch.setattr(os, "replace", replace)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            write_set(tmp_path, "new")
    finally:
        signal.signal(number, before)
    assert of(tmp_path) == dict.fromkeys(NAMES, "new")


# --- shards of GGUF -------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of the same names, shapes and sizes, which differ in one weight, the last."""
    tensors = {f"l{i}.weight": gaussian(i, 64, 64) for i in range(3)}
    one = save(tmp_path / "one.safetensors", tensors)
    data = bytearray(one.read_bytes())
    data[-4:] = struct.pack("<f", 0.25)
    other = tmp_path / "other.safetensors"
    other.write_bytes(data)
    return one, other


def shards(call: Call, model: Path, place: Path, *more: str) -> list[Path]:
    place.mkdir(exist_ok=True)
    line = ["quantize", model, "--scheme", "f16", "--raw", "--shard-size", "9K", "-q", *more]
    done = call(*line, "-o", place / "m.gguf")
    assert done.code == 0, done.err
    return sorted(place.glob("m-*.gguf"))


def test_shards_of_two_models_are_refused_by_name_whichever_is_exchanged(
    models: tuple[Path, Path], tmp_path: Path, call: Call
) -> None:
    name = tmp_path / "same.safetensors"
    sets = []
    for i, model in enumerate(models):
        shutil.copy(model, name)
        sets.append(shards(call, name, tmp_path / str(i)))
    again = shards(call, name, tmp_path / "again")
    assert [p.read_bytes() for p in sets[1]] == [p.read_bytes() for p in again]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*sets, strict=True))
    for exchanged in range(3):
        mixed = tmp_path / f"mixed{exchanged}"
        shutil.copytree(tmp_path / "0", mixed)
        shutil.copy(sets[1][exchanged], mixed)
        for line in (["inspect"], ["verify"], ["quantize", "--scheme", "q8_0", "--raw"]):
            told = call(line[0], mixed / NAMES[0], *line[1:], "-q")
            if line[0] == "verify":
                assert told.code == 1
                assert "GGUF-SPLIT-SET" in told.out
                continue
            assert told.code == 3
            assert "GGUF-SPLIT-SET" in told.err
            assert f"{mixed / NAMES[exchanged or 1]}: " in told.err
            assert NAMES[0] in told.err


def test_shards_of_other_programs_have_no_set_and_are_not_mixed_with_ours(
    models: tuple[Path, Path], tmp_path: Path, call: Call
) -> None:
    paths = shards(call, models[0], tmp_path / "set")
    digest = paths[0].read_bytes().split(b'{"set": "')[1][:64]
    for path in paths:  # a key of the same length that says nothing
        path.write_bytes(path.read_bytes().replace(b'"set": "' + digest, b'"cat": "' + digest))
    assert call("inspect", paths[0], "-q").code == 0
    paths[1].write_bytes(paths[1].read_bytes().replace(b'"cat"', b'"set"'))
    assert "GGUF-SPLIT-SET" in call("inspect", paths[0], "-q").err


def test_llama_reads_our_shards_keys(models: tuple[Path, Path], tmp_path: Path, call: Call) -> None:
    gguf = pytest.importorskip("gguf")
    digests = set()
    for path in shards(call, models[0], tmp_path / "set"):
        field = gguf.GGUFReader(path).fields["qconvert.provenance"]
        text = bytes(field.parts[field.data[0]]).decode()
        assert text.startswith('{"set": "')
        digests.add(text[9:73])
    assert len(digests) == 1
    assert digests != {"0" * 64}

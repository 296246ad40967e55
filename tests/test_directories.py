"""Directories that are written beside their target and replaced whole, and what is never replaced.

Runs that die or write at the same time are child processes, as in `test_sets`.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_sets import child, ended, hidden

from qconvert.errors import MachineError, OutputExistsError
from qconvert.files import atomic, beside
from qconvert.files.atomic import AtomicDirectory, remove_partial_files

FILES = ("1_Pooling/config.json", "config.json", "model-00001-of-00001.safetensors")


def fill(directory: Path, word: str) -> Path:
    for name in FILES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"{word} {name}")
    return directory


def write(target: Path, word: str, **options: Any) -> None:
    with AtomicDirectory(target, **{"overwrite": True, **options}) as out:
        fill(out.path, word)
        out.commit()


def files(directory: Path) -> dict[str, str]:
    """Every file below a directory and what is in it."""
    found = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_text("latin-1") for p in found}


def of(target: Path) -> str:
    """Of which run a directory is, with all its files and no other; ``absent`` without one."""
    if not os.path.lexists(target):
        return "absent"
    found = files(target)
    word = found["config.json"].split()[0]
    assert found == {name: f"{word} {name}" for name in FILES}
    return word


def refuse(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


# --- the usual way --------------------------------------------------------------------------------


def test_a_directory_appears_whole_and_is_replaced_whole_with_force_alone(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with AtomicDirectory(target, overwrite=False) as out:
        fill(out.path, "old")
        assert of(target) == "absent"
        out.commit()
        assert of(target) == "old"
    with pytest.raises(OutputExistsError, match="the output exists"):
        AtomicDirectory(target, overwrite=False)
    assert of(target) == "old"
    with AtomicDirectory(target, overwrite=True) as out:
        fill(out.path, "new")
        assert of(target) == "old"
        out.commit()
    assert of(target) == "new"
    assert os.listdir(tmp_path) == ["m"]


def test_files_that_the_new_directory_lacks_go_with_the_old_one(tmp_path: Path) -> None:
    fill(tmp_path / "m", "old")
    (tmp_path / "m" / "model-00002-of-00002.safetensors").write_text("old")
    write(tmp_path / "m", "new")
    assert of(tmp_path / "m") == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "m", "new")
    finally:
        os.umask(before)
    for directory in (tmp_path / "m", tmp_path / "m" / "1_Pooling"):
        assert stat.S_IMODE(directory.stat().st_mode) == mode


@pytest.mark.parametrize("old", [False, True])
def test_everything_is_on_the_disk_before_its_name_and_the_name_before_success(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    if old:
        write(target, "old")
    inodes: list[int] = []
    names: list[int] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename")}

    def fsync(fd: int) -> None:
        inodes.append(os.fstat(fd).st_ino)
        real["fsync"](fd)

    def rename(*arguments: Any) -> None:
        flushed = len(inodes)
        real["rename"](*arguments)
        names.append(flushed)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with AtomicDirectory(target, overwrite=old) as out:
        fill(out.path, "new")
        wanted = {p.stat().st_ino for p in (out.path, *out.path.rglob("*"))}
        out.commit()
    assert len(names) == (3 if old else 1)
    assert wanted <= set(inodes[: names[0]])
    assert tmp_path.stat().st_ino in inodes[names[1 if old else 0] :]
    if old:  # gone from its name before another has it
        assert tmp_path.stat().st_ino in inodes[names[0] : names[1]]


def test_one_target_is_not_written_twice_by_one_run(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "m", overwrite=True):
        with pytest.raises(MachineError, match="two outputs"):
            AtomicDirectory(tmp_path / "m", overwrite=True)
        assert len(hidden(tmp_path)) == 1
    assert not os.listdir(tmp_path)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
def test_any_error_leaves_what_was_there(
    call: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th such call fails, for every n there is; the last flush comes after the name."""
    real = getattr(os, call)
    seen = []
    for n in range(40):
        place = tmp_path / str(n)
        place.mkdir()
        if old:
            write(place / "m", "old")
        left = n

        def failing(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **more)

        monkeypatch.setattr(os, call, failing)
        try:
            write(place / "m", "new", overwrite=old)
        except (MachineError, OSError) as e:  # an OSError is of the test's own writing
            assert "input/output error" in str(e).lower()  # noqa: PT017
        monkeypatch.setattr(os, call, real)
        if left >= 0:
            assert n >= 1, "never called"
            assert of(place / "m") == "new"
            assert "old" in seen if old else "absent" in seen
            return
        seen.append(of(place / "m"))
        assert seen[-1] in ({"old", "new"} if old else {"absent", "new"})
        if call == "open":  # which the removal needs too
            beside.remove_leftovers(place / "m")
        assert not hidden(place)
    raise AssertionError("called without an end")


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with AtomicDirectory(tmp_path / "m", overwrite=False) as out:
            fill(out.path, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not os.listdir(tmp_path)


def test_a_signal_before_the_block_leaves_nothing(tmp_path: Path) -> None:
    """What the command line calls when it is interrupted."""
    AtomicDirectory(tmp_path / "m", overwrite=False)
    assert hidden(tmp_path)
    remove_partial_files()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_new_directory_has_its_name(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m", "old")
    real = os.rename

    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    def rename(*arguments: Any) -> None:
        real(*arguments)
        signal.raise_signal(number)

    monkeypatch.setattr(os, "rename", rename)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stop):
            write(tmp_path / "m", "new")
    finally:
        signal.signal(number, before)
    assert of(tmp_path / "m") == "new"
    assert os.listdir(tmp_path) == ["m"]


def test_a_run_that_is_killed_leaves_it_old_absent_or_complete_and_the_next_repairs_it(
    tmp_path: Path,
) -> None:
    """At each change of a name, before it and after it."""
    seen = []
    for n in range(20):
        place = tmp_path / str(n)
        place.mkdir()
        write(place / "m", "old")

        def killed(n: int = n, place: Path = place) -> None:
            left, real = n, os.rename

            def rename(*arguments: Any) -> None:
                nonlocal left
                for step in (lambda: None, lambda: real(*arguments)):
                    step()
                    left -= 1
                    if left == -1:
                        os._exit(9)

            os.rename = rename  # type: ignore[assignment]
            write(place / "m", "new")

        code = ended(child(killed))
        seen.append(of(place / "m"))
        assert bool(hidden(place)) == (code != 0)
        # The next run, even one that makes nothing, finds the old one again, or the new one.
        AtomicDirectory(place / "m", overwrite=True).__exit__(None, None, None)
        assert of(place / "m") == ("old" if seen[-1] == "absent" else seen[-1])
        assert os.listdir(place) == ["m"]
        if code == 0:
            assert seen == ["old", "absent", "absent", "new", "new", "new", "new"]
            return
    raise AssertionError("renamed without an end")


@pytest.mark.parametrize("times", [1, 2])
def test_an_old_directory_whose_removal_was_cut_short_is_not_put_back(
    times: int, tmp_path: Path
) -> None:
    """By the run that replaced it, and by the next, although the name is free again."""
    target = tmp_path / "m"
    write(target, "old")

    def rmtree(path: Path, **_: object) -> None:
        next(path.rglob("*.safetensors")).unlink()
        os._exit(9)

    def cut(work: Callable[[], None]) -> int:
        def killed() -> None:
            shutil.rmtree = rmtree  # type: ignore[assignment]
            work()

        return ended(child(killed))

    if times == 2:  # killed right after the name was given

        def exit_then() -> None:
            real = os.rename

            def rename(source: Any, to: Any) -> None:
                real(source, to)
                if Path(to) == target:
                    os._exit(9)

            os.rename = rename  # type: ignore[assignment]
            write(target, "new")

        assert ended(child(exit_then)) == 9
        assert cut(lambda: beside.remove_leftovers(target)) == 9
    else:
        assert cut(lambda: write(target, "new")) == 9
    assert hidden(tmp_path)
    target.rename(tmp_path / "elsewhere")
    beside.remove_leftovers(target)
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert of(tmp_path / "elsewhere") == "new"


def test_what_a_killed_run_was_writing_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "m"

    def killed() -> None:
        fill(AtomicDirectory(target, overwrite=False).path, "half")
        signal.raise_signal(signal.SIGKILL)

    assert ended(child(killed)) == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1
    assert of(target) == "absent"
    write(target, "new", overwrite=False)
    assert os.listdir(tmp_path) == ["m"]


def test_what_another_run_is_writing_stays(tmp_path: Path) -> None:
    def slow() -> None:
        with AtomicDirectory(tmp_path / "m", overwrite=True) as out:
            fill(out.path, "slow")
            (tmp_path / "ready").touch()
            time.sleep(0.5)
            out.commit()

    pid = child(slow)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    write(tmp_path / "m", "quick")
    assert of(tmp_path / "m") == "quick"
    assert ended(pid) == 0
    assert of(tmp_path / "m") == "slow"
    assert not hidden(tmp_path)


def test_two_runs_that_replace_one_directory_take_turns(tmp_path: Path) -> None:
    write(tmp_path / "m", "old")

    def slow(word: str) -> None:
        real = os.rename

        def rename(*arguments: Any) -> None:
            time.sleep(0.02)
            real(*arguments)

        os.rename = rename  # type: ignore[assignment]
        for _ in range(4):
            write(tmp_path / "m", word)

    runs = [child(lambda word=word: slow(word)) for word in ("first", "second")]  # type: ignore[misc]
    assert [ended(pid) for pid in runs] == [0, 0]
    assert of(tmp_path / "m") in ("first", "second")
    assert not hidden(tmp_path)


def test_a_directory_is_not_replaced_while_another_run_looks_at_it(tmp_path: Path) -> None:
    target = tmp_path / "m"
    write(target, "old")

    def slow() -> None:
        real = atomic.foreign_entry

        def look(directory: Path) -> str | None:
            (tmp_path / "looks").touch()
            time.sleep(0.3)
            return real(directory)

        atomic.foreign_entry = look  # type: ignore[assignment]
        write(target, "slow")

    def moves_away() -> None:
        real = os.rename

        def rename(*arguments: Any) -> None:
            real(*arguments)
            time.sleep(0.5)

        os.rename = rename  # type: ignore[assignment]
        write(target, "quick")

    runs = [child(slow)]
    while not (tmp_path / "looks").exists():
        time.sleep(0.01)
    runs.append(child(moves_away))
    assert [ended(pid) for pid in runs] == [0, 0]


# --- what comes in between ------------------------------------------------------------------------


def empty(target: Path) -> None:
    target.mkdir()


def of_others(target: Path) -> None:
    target.mkdir()
    (target / "thesis.odt").write_text("theirs")


def plain(target: Path) -> None:
    target.write_text("theirs")


@pytest.mark.parametrize("appear", [empty, of_others, plain])
@pytest.mark.parametrize("old", [False, True])
def test_what_appears_meanwhile_is_not_replaced(
    appear: Callable[[Path], None], old: bool, tmp_path: Path
) -> None:
    target = tmp_path / "m"
    if old:
        write(target, "old")
    with AtomicDirectory(target, overwrite=old) as out:
        fill(out.path, "new")
        if old:
            shutil.rmtree(target)
        appear(target)
        if old and appear is empty:  # which may be replaced
            out.commit()
            assert of(target) == "new"
            return
        with pytest.raises(MachineError):
            out.commit()
    assert os.listdir(tmp_path) == ["m"]
    if target.is_dir():
        assert files(target) == ({"thesis.odt": "theirs"} if appear is of_others else {})
    else:
        assert target.read_text() == "theirs"


def test_what_takes_the_name_between_the_old_and_the_new_stays_and_the_old_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    write(target, "old")
    real = os.rename

    def rename(source: Any, to: Any) -> None:
        real(source, to)
        of_others(target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(MachineError, match="could not be put back") as refusal:
        write(target, "new")
    assert files(target) == {"thesis.odt": "theirs"}
    kept = str(refusal.value.found).removeprefix("them in ")
    assert of(Path(kept) / "m") == "old"


def test_an_old_directory_that_cannot_be_put_back_at_once_is_put_back_by_a_later_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    write(target, "old")

    def failing() -> None:
        real = os.rename

        def rename(source: Any, to: Any) -> None:
            if Path(to) == target:
                refuse(errno.EIO)()
            real(source, to)

        os.rename, os.replace = rename, refuse(errno.EIO)  # type: ignore[assignment]
        with pytest.raises(MachineError, match="could not be put back"):
            write(target, "new")

    assert ended(child(failing)) == 0
    assert of(target) == "absent"
    assert len(hidden(tmp_path)) == 1
    with monkeypatch.context() as patch:  # nor by a next run that cannot
        patch.setattr(os, "replace", refuse(errno.EIO))
        beside.remove_leftovers(target)
    assert len(hidden(tmp_path)) == 1
    beside.remove_leftovers(target)
    assert of(target) == "old"
    assert os.listdir(tmp_path) == ["m"]


# --- what is never replaced -----------------------------------------------------------------------


def refused(target: Path, wanted: str, **options: Any) -> None:
    """Neither with force nor without, and nothing changes."""
    before = files(target.parent)
    for overwrite in (True, False):
        with pytest.raises(MachineError, match=wanted) as refusal:
            AtomicDirectory(target, overwrite=overwrite, **options)
        assert not isinstance(refusal.value, OutputExistsError), "a hint that does not help"
    assert files(target.parent) == before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (".gitattributes", "'.gitattributes'"),
        (".cache/huggingface/download/config.json.metadata", "'.cache/huggingface/download'"),
        (".git/config", "'.git/config'"),
        ("LICENSE", "'LICENSE'"),
        ("pytorch_model.bin", "'pytorch_model.bin'"),
        ("1_Pooling/a/thesis.odt", "'1_Pooling/a/thesis.odt'"),
        ("a/b/c/config.json", "'a/b/c'"),
    ],
)
def test_a_directory_with_what_no_output_has_is_not_replaced(
    name: str, told: str, tmp_path: Path
) -> None:
    target = fill(tmp_path / "m", "old")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text("theirs")
    refused(target, f"does not look like an output, and is not replaced, found {told}")


@pytest.mark.parametrize("lacks", ["config.json", "model-00001-of-00001.safetensors"])
def test_a_directory_without_the_marks_of_an_output_is_not_replaced(
    lacks: str, tmp_path: Path
) -> None:
    (fill(tmp_path / "m", "old") / lacks).unlink()
    refused(tmp_path / "m", "does not look like an output")


def test_a_directory_with_a_link_in_it_is_not_replaced(tmp_path: Path) -> None:
    target = fill(tmp_path / "m", "old")
    (tmp_path / "vocab.json").write_text("theirs")
    (target / "vocab.json").symlink_to(tmp_path / "vocab.json")
    refused(target, "found 'vocab.json'")


def test_an_empty_directory_is_replaced_with_force_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(OutputExistsError):
        AtomicDirectory(tmp_path / "m", overwrite=False)
    write(tmp_path / "m", "new")
    assert of(tmp_path / "m") == "new"


def test_files_that_transformers_saves_are_those_of_an_output(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "samples" / "tiny-llama", tmp_path / "m")
    refused(tmp_path / "m", "found 'COPYRIGHT.python3.11'")
    (tmp_path / "m" / "COPYRIGHT.python3.11").unlink()
    write(tmp_path / "m", "new")
    assert of(tmp_path / "m") == "new"


def test_neither_a_file_nor_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")
    refused(tmp_path / "file", "is not a directory")
    fill(tmp_path / "m", "old")
    (tmp_path / "link").symlink_to("m")
    refused(tmp_path / "link", "is a link")
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(tmp_path / "dangling", "is a link")


@pytest.mark.parametrize("name", [".", "..", "/", "m/.."])
def test_a_directory_without_a_name_of_its_own_is_no_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "m", "old")
    monkeypatch.chdir(tmp_path / "m")
    for overwrite in (True, False):
        with pytest.raises(MachineError, match="no file name"):
            AtomicDirectory(Path(name), overwrite=overwrite)
    assert of(tmp_path / "m") == "old"


def test_a_directory_that_holds_an_input_is_not_replaced_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fill(tmp_path / "m", "old")
    (tmp_path / "model").symlink_to(target)
    (tmp_path / "weights").symlink_to(target / FILES[2])
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for source in (
        target,
        Path("m"),
        tmp_path / "model",
        tmp_path / "weights",
        target / FILES[2],
        target / FILES[0],
        target / "1_Pooling",
        tmp_path / "up" / "m" / ".." / "m" / "config.json",
        tmp_path,  # a model directory, of which files in this one may be read
    ):
        refused(target, "holds an input", inputs=(source,))
        refused(tmp_path / "up" / "m", "holds an input", inputs=(source,))
    write(target, "new", inputs=(tmp_path / "nothing", ROOT / "samples" / "tiny-llama"))
    assert of(target) == "new"


def test_a_directory_in_which_the_command_runs_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fill(tmp_path / "m", "old")
    for place in (target, target / "1_Pooling"):
        monkeypatch.chdir(place)
        refused(target, "holds the current directory")
        refused(target / "1_Pooling" / ".." / ".." / "m", "holds the current directory")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    write(target, "new")
    assert of(target) == "new"


def test_what_becomes_an_input_or_foreign_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = fill(tmp_path / "m", "old")
    with AtomicDirectory(target, overwrite=True) as out:
        fill(out.path, "new")
        (target / "notes.odt").write_text("mine")
        with pytest.raises(MachineError, match=r"found 'notes\.odt'"):
            out.commit()
    assert files(target)["notes.odt"] == "mine"
    assert files(target)["config.json"] == "old config.json"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("name", ["missing/m", "file/m", "/proc/m", "x" * 300])
def test_an_impossible_directory_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError):
        AtomicDirectory(tmp_path / name, overwrite=True)
    assert os.listdir(tmp_path) == ["file"]

"""What a calibration has done so far, kept beside its output for as long as it is not finished.

It is saved every few seconds, and when SIGINT or SIGTERM arrives; the same command with
``--resume`` goes on from there and gives the bytes of a run that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qconvert.calibration.collected import Collected
from qconvert.calibration.document import TextRun
from qconvert.errors import InputError, OutputExistsError, Stopped
from qconvert.files.atomic import AtomicOutput, check_target, machine_errors
from qconvert.interrupts import Held, held

SAVE_SECONDS = 10.0
SAVE_SHARE = 0.05  # of the time goes into saving, at most


class SavedState:
    """The state of a run, in a file whose name is that of the output with ``.partial``.

    Args:
        output: of the run.
        inputs: what is read, which the state must not replace.
        unit: what the run is counted in, for people.
        seconds: at least so long between two saves.

    Attributes:
        path: of the file.
    """

    def __init__(
        self, output: Path, inputs: Sequence[Path], unit: str, seconds: float = SAVE_SECONDS
    ) -> None:
        self.path = state_path(output)
        self._inputs = tuple(inputs)
        self._unit = unit
        self._seconds = seconds
        self._next = time.perf_counter() + seconds
        self._held = Held()

    def check(self, *, resume: bool, force: bool) -> None:
        """Refuse what would be refused when the state is saved, or would take its place.

        Raises:
            OutputExistsError: there is a state, and nobody said what to do with it.
            MachineError: its name is that of an input.
        """
        with machine_errors(self.path):
            check_target(self.path, True, self._inputs)
        if self.path.exists() and not (resume or force):
            raise OutputExistsError(
                "an interrupted run has left its state",
                path=self.path,
                hint="go on with --resume, or start again with --force",
                code="CALIBRATION-STATE",
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let the first signal in the block wait for the next `between`."""
        with held(once=True) as self._held:
            yield

    def between(self, found: Collected) -> None:
        """A place where the run can be left: save if it is time, or if somebody has asked to stop.

        Raises:
            Stopped: the state is saved, and says from where the run goes on.
        """
        number = self._held.number
        if number is None and time.perf_counter() < self._next:
            return
        started = time.perf_counter()
        with AtomicOutput(self.path, overwrite=True, inputs=self._inputs, interim=True) as out:
            found.write_state(out)
            out.commit()
        cost = time.perf_counter() - started
        wait = max(self._seconds, cost / SAVE_SHARE) if self._seconds else 0.0
        self._next = started + cost + wait
        if number is not None:
            self._held.number = None
            raise Stopped(number, self._told(found.run))

    def remove(self) -> None:
        """The run is finished."""
        with machine_errors(self.path, "the state of the finished run cannot be removed: "):
            self.path.unlink(missing_ok=True)

    def _told(self, run: TextRun | None) -> str:
        assert run
        passes = f", of pass {run.groups + 1} over them" if run.groups else ""
        done = f"{run.done:,} of {run.chunks:,} {self._unit}{passes}"
        return f"{done} are kept in {self.path}"


def state_path(output: Path) -> Path:
    """Where an interrupted run to ``output`` leaves its state."""
    return output.with_name(output.name + ".partial")


def check_same_run(
    path: Path, state: Collected, mine: Collected, more: Mapping[str, tuple[object, object]]
) -> TextRun:
    """Refuse a state that another command has left.

    Args:
        path: of the state.
        mine: the run that is to go on from it, as it begins.
        more: what else must be equal: the state's, and that of the run.

    Returns:
        How far the run came.

    Raises:
        InputError: names the first difference.
    """
    theirs, wanted = state.run, mine.run
    assert wanted
    pairs: dict[str, tuple[object, object]] = {
        "model": (state.model, mine.model),
        "text or activations": (state.inputs, mine.inputs),
        "observer": (asdict(state.settings), asdict(mine.settings)),
        "--seqlen": (theirs and theirs.seqlen, wanted.seqlen),
        "--nsamples": (theirs and theirs.nsamples, wanted.nsamples),
        "--seed": (theirs and theirs.seed, wanted.seed),
        "number of pieces": (theirs and theirs.chunks, wanted.chunks),
        **more,
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise InputError(
                f"the state is of another run: {what}",
                path=path,
                found=found,
                wanted=expected,
                hint="run with the same options, or start again with --force, without --resume",
                code="CALIBRATION-RESUME",
            )
    assert theirs
    return theirs

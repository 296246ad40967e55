"""What a long run has done so far, kept beside its output for as long as it is not finished.

It is saved every few seconds, and when SIGINT or SIGTERM arrives; the same command with
``--resume`` goes on from there and gives the bytes of a run that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from qconvert.errors import InputError, MachineError, OutputExistsError, Stopped
from qconvert.files.atomic import AtomicOutput, check_target, machine_errors
from qconvert.interrupts import Held, held

SAVE_SECONDS = 10.0
SAVE_SHARE = 0.05  # of the time goes into saving, at most


class Resumable(Protocol):
    """What a run has done so far, from which it can go on."""

    def write_state(self, out: AtomicOutput) -> None:
        """Write it; nothing of it is let go of."""

    def how_far(self, unit: str) -> str:
        """How much is done, of how much, counted in units, for people."""


class SavedState:
    """The state of a run, in a file whose name is that of the output with ``.partial``.

    Args:
        output: of the run.
        inputs: what is read, which the state must not replace.
        unit: what the run is counted in, for people.
        seconds: at least so long between two saves.
        code: of messages that a state is there, and that it is of another run.

    Attributes:
        path: of the file.
    """

    def __init__(
        self,
        output: Path,
        inputs: Sequence[Path],
        unit: str,
        seconds: float = SAVE_SECONDS,
        code: str = "CALIBRATION",
    ) -> None:
        self.path = state_path(output)
        self._inputs = tuple(inputs)
        self._unit = unit
        self._code = code
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
                code=f"{self._code}-STATE",
            )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let the first signal in the block wait for the next `between`."""
        with held(once=True) as self._held:
            yield

    @property
    def asked(self) -> bool:
        """Whether somebody has asked to stop since the last `between`."""
        return self._held.number is not None

    def between(self, found: Resumable) -> None:
        """A place where the run can be left: save if it is time, or if somebody has asked to stop.

        Raises:
            Stopped: the state is saved, and says from where the run goes on.
            MachineError: it cannot be saved; the one before stays.
        """
        number = self._held.number
        if number is None and time.perf_counter() < self._next:
            return
        started = time.perf_counter()
        try:
            with AtomicOutput(self.path, overwrite=True, inputs=self._inputs, interim=True) as out:
                found.write_state(out)
                out.commit()
        except MachineError as e:
            if e.path == str(self.path) and self.path.exists():
                e.hint = f"{e.hint}; then go on" if e.hint else "go on"
                e.hint += " with --resume from the state before, which is kept"
            raise
        cost = time.perf_counter() - started
        wait = max(self._seconds, cost / SAVE_SHARE) if self._seconds else 0.0
        self._next = started + cost + wait
        if number is not None:
            self._held.number = None
            raise Stopped(number, f"{found.how_far(self._unit)} are kept in {self.path}")

    def remove(self) -> None:
        """The run is finished."""
        with machine_errors(self.path, "the state of the finished run cannot be removed: "):
            self.path.unlink(missing_ok=True)

    def check_same(self, pairs: Mapping[str, tuple[object, object]]) -> None:
        """Refuse a state that another command has left.

        Args:
            pairs: what has to be equal, by name: the state's, and that of the run.

        Raises:
            InputError: names the first difference.
        """
        for what, (found, expected) in pairs.items():
            if found != expected:
                raise InputError(
                    f"the state is of another run: {what}",
                    path=self.path,
                    found=found,
                    wanted=expected,
                    hint="run with the same options, or start again with --force, without --resume",
                    code=f"{self._code}-RESUME",
                )


def state_path(output: Path) -> Path:
    """Where an interrupted run to ``output`` leaves its state."""
    return output.with_name(output.name + ".partial")

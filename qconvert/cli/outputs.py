"""Files that a command writes beside its own output: opened before the long work, together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from qconvert.cli.earlier import Run
from qconvert.files.atomic import AtomicOutput


class OutputFiles:
    """Outputs, all of which are open or none; those without a name are None.

    Args:
        force: whether existing files may be replaced.
        run: whose own earlier files may be replaced anyway.
        inputs: what must not be written over.

    Raises:
        OutputExistsError, MachineError: as of `AtomicOutput`.
    """

    def __init__(
        self, targets: Sequence[Path | None], *, force: bool, run: Run, inputs: Sequence[Path]
    ) -> None:
        with ExitStack() as stack:
            self.files = [
                stack.enter_context(
                    AtomicOutput(target, overwrite=force or run.wrote(target), inputs=inputs)
                )
                if target
                else None
                for target in targets
            ]
            self._open = stack.pop_all()

    @property
    def paths(self) -> list[Path]:
        """Names that they have, now and later."""
        return [path for file in self.files if file for path in (file.path, file.target)]

    def close(self) -> None:
        """Remove those that were not committed."""
        self._open.close()

"""A training that is under way, as a file from which it can go on: `qconvert.files.saved_state`.

The file is safetensors: what is trained, what Adam knows of it and the best state, and as metadata
how far the run is and what it was asked for. Nothing is drawn once training has begun, so that the
number of the step says which windows come next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qconvert.errors import FormatError
from qconvert.files.atomic import AtomicOutput
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.safetensors_writer import CODES, array_parts
from qconvert.files.saved_state import SavedState
from qconvert.files.strict_json import strict_json
from qconvert.model import TensorInfo
from qconvert.report import TunedBlock, TuningStep
from qconvert.training.loop import BLOCKS, Course, State, Student, adam

ENTRY = "qconvert.tuning"
SCHEMA = "qconvert.tuning/1"
BLOCK, NOW, BEST, ADAM = "blocks", "now", "best", "adam"  # begin the names of arrays
CODE = "TUNE-STATE"
AGAIN = "start again with --force, without --resume"
COPIES = 4  # of what is trained: itself, Adam's two moments, the best state


@dataclass
class TuningState:
    """See `qconvert.files.saved_state.Resumable`.

    Attributes:
        asked: all that decides what comes of the run, by the names of options.
        steps: asked for.
        blocks: of the model, where they are trained first.
        of_blocks: what they were when all of them were trained, and the steps began with that.
    """

    student: Student
    course: Course
    optimiser: torch.optim.Optimizer
    asked: Mapping[str, Any]
    steps: int
    blocks: int = 0
    of_blocks: State = field(default_factory=dict)

    def how_far(self, unit: str) -> str:
        if self.blocks and not self.course.began:
            return f"{len(self.course.blocks)} of {self.blocks} blocks"
        return f"{self.course.steps_run:,} of {self.steps:,} {unit}"

    def write_state(self, out: AtomicOutput) -> None:
        course = {
            f.name: getattr(self.course, f.name)
            for f in fields(self.course)
            if f.name not in ("best", "validations")
        }
        for several in ("blocks", "validations"):
            course[several] = [asdict(one) for one in getattr(self.course, several)]
        document = {"schema": SCHEMA, "asked": dict(self.asked), "course": course}
        out.write(array_parts({ENTRY: json.dumps(document)}, dict(self._arrays())))

    def _arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        now = self.student.changing() if self.course.began else self._in_blocks()
        best = self.course.best or {}
        for kind, state in ((BLOCK, self.of_blocks), (NOW, now), (BEST, best)):
            for name, tensor in state.items():
                yield f"{kind}/{name}", tensor.detach().numpy(force=True)
        known = self.optimiser.state_dict()["state"]
        for i, name in enumerate(self.student.parameters):
            for part, tensor in known.get(i, {}).items():
                yield f"{ADAM}/{part}/{name}", tensor.numpy(force=True)

    def begin_with_blocks(self) -> None:
        """The blocks are trained: the steps end to end come next."""
        student, self.course.began = self.student, BLOCKS
        self.of_blocks = student.state(student.of_blocks())
        if student.only_scales:
            student.settle()
        elif student.training.weights.keys() & student.parameters.keys():
            student.keep_scales()
        self.optimiser = adam(student.parameters)

    def _in_blocks(self) -> Mapping[str, torch.Tensor]:
        """What changes while blocks are trained."""
        return self.student.earlier | self.student.changing()

    def take_over(self, saved: SavedState) -> None:
        """Go on from what this very run has left; see `check_state`.

        Raises:
            FormatError: it is damaged.
        """
        with _opened(saved) as (file, document), _damaged(saved):
            self._restore(file, document["course"])
            file.check_unchanged()

    def _restore(self, file: SafetensorsModel, course: dict[str, Any]) -> None:
        infos = {t.name: t for t in file.tensors}
        student = self.student

        def read(name: str) -> torch.Tensor:
            return _tensor(file, infos[name])

        def take(kind: str, names: Mapping[str, torch.Tensor]) -> None:
            with torch.no_grad():
                for name, tensor in names.items():
                    tensor.copy_(read(f"{kind}/{name}"))

        if course["began"] == BLOCKS:
            take(BLOCK, student.changing(student.of_blocks()))
            self.begin_with_blocks()
        changing = student.changing()
        take(NOW, changing if course["began"] else self._in_blocks())
        best = None
        if any(name.startswith(f"{BEST}/") for name in infos):
            best = {name: read(f"{BEST}/{name}") for name in changing}
        state = self.optimiser.state_dict()
        state["state"] = {}
        parts = {n.split("/")[1] for n in infos if n.startswith(f"{ADAM}/")}
        for i, name in enumerate(student.parameters):
            names = {part: f"{ADAM}/{part}/{name}" for part in parts}
            found = {part: read(n) for part, n in names.items() if n in infos}
            if found:
                state["state"][i] = found
        self.optimiser.load_state_dict(state)
        validations = [TuningStep(**v) for v in course.pop("validations")]
        blocks = [TunedBlock(**b) for b in course.pop("blocks")]
        restored = Course(**course, blocks=blocks, validations=validations, best=best)
        for f in fields(restored):
            setattr(self.course, f.name, getattr(restored, f.name))


def began(saved: SavedState) -> str:
    """What the steps end to end of an interrupted run have begun with: see `Course`.

    Raises:
        FormatError: the state is damaged.
    """
    with _opened(saved) as (_, document), _damaged(saved):
        return str(document["course"]["began"])


def check_state(saved: SavedState, asked: Mapping[str, Any]) -> None:
    """Refuse a state that another command has left, or of something else.

    Raises:
        InputError: names the first difference; FormatError: it is damaged, or no such state.
    """
    mine = json.loads(json.dumps(dict(asked)))  # as JSON has them, in which a tuple is a list
    with _opened(saved) as (_, document), _damaged(saved):
        theirs = document["asked"]
        pairs = {what: (theirs.get(what), wanted) for what, wanted in mine.items()}
        saved.check_same({"schema": (document["schema"], SCHEMA)} | pairs)


@contextmanager
def _opened(saved: SavedState) -> Iterator[tuple[SafetensorsModel, dict[str, Any]]]:
    with closing(open_safetensors(saved.path)) as file:
        text = file.metadata.get(ENTRY)
        if text is None:
            raise FormatError(
                "not the state of an interrupted tune", path=saved.path, hint=AGAIN, code=CODE
            )
        yield file, strict_json(text.encode(), saved.path)


@contextmanager
def _damaged(saved: SavedState) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise FormatError(
            "the state of the interrupted run is damaged",
            path=saved.path,
            found=f"{type(e).__name__}: {e}",
            hint=AGAIN,
            code=CODE,
        ) from e


def _tensor(file: SafetensorsModel, info: TensorInfo) -> torch.Tensor:
    values = np.frombuffer(file.raw(info, 0, info.nbytes), CODES[info.dtype])
    return torch.from_numpy(values.reshape(info.shape).copy())

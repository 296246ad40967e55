"""Options of tune, as data; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qconvert.files.saved_state import SAVE_SECONDS, state_path
from qconvert.running.device import CPU
from qconvert.running.text import DEFAULT_SEQLEN
from qconvert.schemes import TensorScheme

ADAPTERS = "adapters"
LOSSES = ("distill", "lm")
PARTS = ("all", "weights", "scales", "norms")
PARTS_OF_FILES = ("all", "scales", "norms", ADAPTERS)
ACTIVATIONS = ("none", "dynamic", "static")
STEPS = 240
RANK = 8
MOST_RANK = 1024
BATCH = 4
FEWEST_WINDOWS = 3  # to train on, to choose a state by, and to judge


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Options of ``qconvert tune``; the command line's help describes each.

    Attributes:
        scheme: None for a file that is quantized already.
        rate: of the weights; None for one that follows from the rounding errors of each tensor.
        teacher: whose predictions are learned; None for those of the model itself, as floats.
        blocks: steps of each block by itself, before those of the whole model; 0 for none.
        generated: windows that the model which is learned from writes itself, to train on beside
            those of the text; None for as many as `Run` thinks right.
        trained: of `PARTS`.
        rank: of adapters.
        device: of torch, as `qconvert.running.device.check_device` takes it.
        floats: whether a directory of float32 weights, which lie on the grid, is written.
        anyway: whether the tuned model is written even where it is not better.
        resume: whether to go on from what an interrupted run has left.
        save_seconds: at least so long between two saves of the state.
    """

    scheme: TensorScheme | None
    text: Path
    output: Path
    steps: int = STEPS
    blocks: int = 0
    rate: float | None = None
    seqlen: int = DEFAULT_SEQLEN
    batch: int = BATCH
    seed: int = 0
    nsamples: int | None = None
    generated: int | None = None
    loss: str = LOSSES[0]
    teacher: Path | None = None
    trained: str = PARTS[0]
    rank: int = RANK
    activations: str = ACTIVATIONS[0]
    calibration: Path | None = None
    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, TensorScheme], ...] = ()
    threads: int | None = None
    device: str = CPU
    floats: bool = False
    anyway: bool = False
    force: bool = False
    strict: bool = False
    resume: bool = False
    save_seconds: float = SAVE_SECONDS

    @property
    def grid(self) -> TensorScheme:
        """The scheme of a model that is not quantized yet."""
        assert self.scheme
        return self.scheme

    @property
    def taken(self) -> int:
        """Windows that steps take, one after the other."""
        return max(self.steps, self.blocks) * self.batch

    @property
    def state(self) -> Path:
        """Where an interrupted run leaves its state."""
        return state_path(self.output)

"""Tensors of a file into a transformers model, by transformers' own loader.

Names in a checkpoint are often not those of the modules: transformers renames tensors, joins the
experts of a layer, takes fused matrices apart. That is left to it. Which tensor went where, and
which went into something new, is seen afterwards by stand-ins: tensors of the right shape that hold
no values and can be told from each other and from any rearrangement of themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qconvert.running.hugging_face import refuse_loading


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and what its loader said.

    Attributes:
        model: in eval mode.
        missing: parameters that no tensor was for.
        unexpected: names, as the loader has them, of tensors that it had no use for.
        mismatched: parameter, shape of the tensor for it, its own shape.
    """

    model: Any
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def load_state(cls: Any, described: Any, state: Mapping[str, Any], path: Any) -> Loaded:
    """A model of a class and a configuration with the given tensors, float32.

    Args:
        cls: of transformers.
        described: its configuration.
        state: torch tensors by the names that they have in a checkpoint.
        path: of the file, for messages.

    Raises:
        UnsupportedError: transformers cannot load them.
    """
    import torch
    import transformers

    with quiet(transformers):
        try:
            model, said = cls.from_pretrained(
                None,
                config=described,
                state_dict=dict(state),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # told below, with both shapes
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as e:  # whatever transformers makes of tensors that it does not like
            refuse_loading(e, path)
    mismatched = [(str(k), tuple(found), tuple(own)) for k, found, own in said["mismatched_keys"]]
    return Loaded(
        model.eval(),
        sorted(map(str, said["missing_keys"])),
        sorted(map(str, said["unexpected_keys"])),
        sorted(mismatched),
    )


class StandIns:
    """Makes stand-ins, and knows them again."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[str, tuple[int, ...]]] = {}  # by where they are in memory
        self._kept: list[Any] = []  # which must not be given to another

    def make(self, name: str, shape: tuple[int, ...]) -> Any:
        """A float32 tensor of a shape, in the memory of a few of its rows and columns.

        Its places overlap in memory, with a step of its own for each dimension: what is transposed,
        permuted, cut or joined is another tensor, or has other steps, shape or beginning.
        """
        import torch

        if not all(shape):
            return torch.empty(shape)
        steps = _steps(len(shape))
        size = 1 + sum(step * (n - 1) for step, n in zip(steps, shape, strict=True))
        number = float(len(self._kept) + 1)  # exact below 2^24: no two stand-ins are equal
        memory = torch.full((size,), number, dtype=torch.float32)
        self._made[memory.data_ptr()] = name, shape
        self._kept.append(memory)
        return memory.as_strided(shape, steps)

    def name_of(self, tensor: Any) -> str | None:
        """Which stand-in, as it was made, a parameter of a loaded model is; None if it is none."""
        if tensor.device.type != "cpu" or tensor.storage_offset():
            return None
        name, shape = self._made.get(tensor.untyped_storage().data_ptr(), (None, ()))
        same = tuple(tensor.shape) == shape and tuple(tensor.stride()) == _steps(len(shape))
        return name if same else None


def _steps(dimensions: int) -> tuple[int, ...]:
    return tuple(range(dimensions, 0, -1))


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Errors of transformers only, and no bars; its settings belong to the program around us."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


__all__ = ["Loaded", "StandIns", "load_state", "quiet"]

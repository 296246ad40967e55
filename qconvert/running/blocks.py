"""The blocks of a causal model, each run by itself on hidden states that are given to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.running.device import on_device
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.layers import rows_of, run_tokens

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
CLOSE = 1e-4  # of the largest value: what another order of sums may do to a block's output
HIDDEN = "hidden_states"  # the argument of a block, where it is given by its name


@contextmanager
def single_threads() -> Iterator[None]:
    """Have torch work on one thread for each that calls it; its bits depend on how many it has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NoBlocks(Exception):
    """The model is not a chain of blocks; says why."""


class _Reached(Exception):
    """What enters a layer, and the end of the pass: the rest is not wanted."""

    def __init__(self, rows: F32) -> None:
        self.rows = rows


@dataclass(frozen=True, slots=True)
class _Call:
    """A block as the model called it.

    Attributes:
        args, kwargs: with the hidden states in their place.
        output: hidden states, or a tuple that begins with them.
    """

    block: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get(HIDDEN)

    @property
    def others(self) -> tuple[Any, ...]:
        """Everything but the hidden states."""
        named = {k: v for k, v in self.kwargs.items() if k != HIDDEN}
        return (*self.args[1:], *named.keys(), *named.values())

    def made_of(self, hidden: Any) -> Any:
        """What the block makes of hidden states, called as it was."""
        args = (hidden, *self.args[1:]) if self.args else ()
        kwargs = self.kwargs if self.args else {**self.kwargs, HIDDEN: hidden}
        found = self.block(*args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    @property
    def result(self) -> Any:
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def bare(self) -> _Call:
        """Without the hidden states, which take memory, and without tensors of `inference_mode`,
        which gradients could not pass.
        """
        kwargs = {k: _copied(v) for k, v in self.kwargs.items() if k != HIDDEN}
        output = (None,) if isinstance(self.output, tuple) else None
        args = (None, *map(_copied, self.args[1:])) if self.args else ()
        return _Call(self.block, args, kwargs, output)


class BlockChain:
    """The blocks of a model in the order in which they run.

    What else than hidden states the model gives to a block (masks, positions) is recorded from one
    window and given again: all windows have to be of its length. Weights may be changed in between;
    `run` and `reach` may be called from several threads at once.

    Args:
        checkpoint: a causal model.
        tokens: of a window, (T,).

    Raises:
        NoBlocks: what the model does is not what its blocks do one after the other, or they are
            given something that depends on the text; held against a whole pass.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: I64) -> None:
        self._checkpoint = checkpoint
        self._calls = self._recorded(tokens)
        others = self._recorded(tokens[::-1])
        if [c.block for c in others] != [c.block for c in self._calls]:
            raise NoBlocks("which blocks run depends on the text")
        for mine, theirs in zip(self._calls, others, strict=True):
            if not _same(mine.others, theirs.others):
                raise NoBlocks("its blocks are given more of the text than hidden states")
        for before, after in zip(self._calls, self._calls[1:], strict=False):
            if not _same(before.result, after.hidden):
                raise NoBlocks("its blocks do not take what the block before them gives")
        for k, call in enumerate(self._calls):
            if not _close(self.run(k, rows_of(call.hidden)), rows_of(call.result)):
                raise NoBlocks("a block does not give twice the same")
        self._last = rows_of(self._calls[-1].result).copy()
        self._calls = [call.bare() for call in self._calls]

    @property
    def blocks(self) -> list[Any]:
        """Modules of torch."""
        return [call.block for call in self._calls]

    def places(self) -> dict[int, int]:
        """The block of each parameter, by the `id` of the parameter.

        Raises:
            NoBlocks: blocks share one.
        """
        found: dict[int, int] = {}
        for k, block in enumerate(self.blocks):
            for parameter in block.parameters():
                if found.setdefault(id(parameter), k) != k:
                    raise NoBlocks("its blocks share weights")
        return found

    def entering(self, tokens: I64) -> F32:
        """Hidden states (T, C) that a window puts into the first block."""
        return self._until(self._calls[0].block, tokens)

    def run(self, k: int, hidden: F32) -> F32:
        """Hidden states (T, C) that a block makes of some."""
        import torch

        given = on_device(hidden[None].copy(), self._checkpoint.model)  # a block may change it
        with torch.inference_mode():
            return rows_of(self._calls[k].made_of(given))

    def run_together(self, k: int, hidden: Any) -> Any:
        """The same of several windows (n, T, C), tensors of torch, and with gradients where they
        are wanted. See `check_together`.
        """
        return self._calls[k].made_of(hidden)

    def check_together(self, k: int, one: F32, other: F32) -> None:
        """Hold what a block makes of two windows at once against what it makes of each.

        Raises:
            NoBlocks: it is something else.
        """
        import torch

        alone = [self.run(k, hidden) for hidden in (one, other)]
        with torch.inference_mode():
            try:
                given = on_device(np.stack([one, other]), self._checkpoint.model)
                both = self.run_together(k, given).numpy(force=True)
            except RuntimeError as e:  # of torch, where shapes do not go together
                raise NoBlocks(f"a block does not take two windows at once: {e}") from e
        if not _close(np.stack(alone), both):
            raise NoBlocks("a block gives something else for two windows at once")

    def reach(self, k: int, hidden: F32) -> F32:
        """What enters the layer of `stopping`, (T, C), in a block that some hidden states enter."""
        try:
            self.run(k, hidden)
        except _Reached as reached:
            return reached.rows
        raise NoBlocks("a layer of a block is not always run")

    @contextmanager
    def stopping(self, layer: Any) -> Iterator[None]:
        """End passes where this module is entered."""
        hook = layer.register_forward_pre_hook(_stop)
        try:
            yield
        finally:
            hook.remove()

    def readers(self, k: int, layers: Sequence[Any], hidden: F32) -> list[list[Any]]:
        """The modules among ``layers`` that a block runs once, in the order in which it does, those
        that read the same input together.
        """
        seen: list[tuple[Any, Any]] = []
        with ExitStack() as hooks:
            for layer in layers:
                hook = layer.register_forward_pre_hook(lambda m, x: seen.append((m, x[0])))
                hooks.callback(hook.remove)
            self.run(k, hidden)
        modules = [id(module) for module, _ in seen]
        groups: list[tuple[Any, list[Any]]] = []
        for module, x in seen:
            if modules.count(id(module)) > 1:
                continue
            same = next((found for read, found in groups if read is x), None)
            if same is None:
                groups.append((x, [module]))
            else:
                same.append(module)
        return [found for _, found in groups]

    def leaves(self, layer: Any, tokens: I64) -> bool:
        """Whether a layer behind the blocks takes nothing but what the last of them gives.

        Args:
            tokens: those that the chain was made with.
        """
        try:
            whole = self._until(layer, tokens)
            same = _close(self.leaving(layer, self._last, tokens), whole)
            other = self.leaving(layer, np.zeros_like(self._last), tokens)
        except NoBlocks:
            return False
        return same and not _close(other, whole)  # or it is before the blocks

    def leaving(self, layer: Any, hidden: F32, tokens: I64) -> F32:
        """What enters a layer behind the blocks, (T, C), when the last gives hidden states."""
        given = on_device(hidden[None].copy(), self._checkpoint.model)
        for call in self._calls:
            result = (given,) if isinstance(call.output, tuple) else given
            call.block.forward = _giving(result)
        try:
            return self._until(layer, tokens)
        finally:
            for call in self._calls:
                del call.block.forward

    def _until(self, layer: Any, tokens: I64) -> F32:
        with self.stopping(layer):
            return self._pass(tokens)

    def _pass(self, tokens: I64) -> F32:
        """A pass of the whole model up to the layer of `stopping`."""
        try:
            run_tokens(self._checkpoint, tokens)
        except _Reached as reached:
            return reached.rows
        raise NoBlocks("a layer of the model is not run")

    def _recorded(self, tokens: I64) -> list[_Call]:
        """The calls of all blocks in a pass over a window."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [
            m for m in self._checkpoint.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        inner = {id(m) for b in blocks for m in b.modules() if m is not b}
        calls: list[_Call] = []

        def note(block: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(_Call(block, args, kwargs, output))

        with ExitStack() as hooks:
            for block in blocks:
                if id(block) not in inner:
                    hook = block.register_forward_hook(note, with_kwargs=True)
                    hooks.callback(hook.remove)
            run_tokens(self._checkpoint, tokens)
        if not calls:
            raise NoBlocks("transformers does not mark its blocks")
        if len({id(c.block) for c in calls}) < len(calls):
            raise NoBlocks("a block runs more than once")
        return calls


def _stop(layer: Any, inputs: tuple[Any, ...]) -> None:
    raise _Reached(rows_of(inputs[0]))


def _copied(value: Any) -> Any:
    """An argument with tensors of its own."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(v) for name, v in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _giving(result: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: result


def _close(a: F32, b: F32) -> bool:
    if a.shape != b.shape or np.array_equal(a, b, equal_nan=True):
        return a.shape == b.shape
    return bool(np.abs(a - b).max(initial=0) <= CLOSE * np.abs(b).max(initial=0))


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, as far as that can be seen."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    plain = (str, int, float, type(None), torch.dtype)  # a bool is an int
    return a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)

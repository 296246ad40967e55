"""quantize --text: matrix by matrix, in the order in which the model runs them, each makes up for
what those before it have lost.

The float model and the model quantized so far run over the text side by side, a block at a time;
only the hidden states between blocks are kept of a pass. A group of matrices that read the same
input gets its targets by `qconvert.stages.repair_target`, is encoded as the conversion does it, and
put into the running model as it decodes. The conversion writes what was encoded here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qconvert.codecs import codec_of
from qconvert.codecs.codec import Encoder, Facts
from qconvert.codecs.compensation import COMPENSATED
from qconvert.errors import WeightError
from qconvert.files.regular import file_sha256, utf8_name
from qconvert.files.scratch import Scratch
from qconvert.geometry import TILE_VALUES, row_length
from qconvert.kernels.records import F32, F64
from qconvert.mapper import Mapper
from qconvert.model import Model
from qconvert.progress import Progress
from qconvert.running.blocks import BlockChain, NoBlocks, single_threads
from qconvert.running.hidden_states import HELD_BYTES, HiddenStates
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.layers import linear_layers
from qconvert.running.quantized_model import open_source
from qconvert.running.text import drawn
from qconvert.stages.ahead import Ahead, encoded_ahead
from qconvert.stages.calibrate_text import text_pieces
from qconvert.stages.made_from import made_from
from qconvert.stages.parallel import Workers
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.quantize_options import RepairText
from qconvert.stages.repair_target import DAMPING, PAIR_BYTES, Moments, RepairedModel
from qconvert.stages.rounding import Roundings
from qconvert.stages.target import Prepared

WINDOWS = 64  # of the text, where nothing else is asked for
TOGETHER = 4096  # tokens whose inputs of a layer are in memory at once; sums depend on it
REASON = "its target makes up for what the tensors before it lost"

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A planned tensor in the running model.

    Attributes:
        parameter: of torch.
        module: the linear layer that it is the weight of, and nothing else; None for others.
        table: whether its rows are looked up.
        rows: of the parameter that those of the tensor are; None where they are in its order.
        added: to the parameter's values in the tensor.
    """

    planned: PlannedTensor
    parameter: Any
    module: Any
    table: bool
    rows: I64 | None
    added: float

    @property
    def name(self) -> str:
        return self.planned.tensor.name

    def placed(self, values: F32) -> Any:
        """Values in the shape of the tensor as the parameter has them, of torch."""
        import torch

        if self.added:
            values = values - np.float32(self.added)
        if self.rows is not None:
            ordered = np.empty_like(values)
            ordered.reshape(len(self.rows), -1)[self.rows] = values.reshape(len(self.rows), -1)
            values = ordered
        return torch.from_numpy(values)


@dataclass(slots=True)
class _Swapped:
    """A parameter whose values are exchanged while it is worked on.

    Attributes:
        loaded: as the model was loaded, mapped from its file.
        own: the weights that are converted, which may have been rescaled after that.
        decoded: what they become; None where they are kept.
    """

    parameter: Any
    loaded: Any
    own: Any
    decoded: Any = None


def repaired(
    repair: RepairText,
    plain: Model,
    prepared: Prepared,
    roundings: Roundings,
    progress: Progress,
    threads: int,
    scratch: Scratch,
    facts: Callable[[PlannedTensor, Workers, Mapper], Facts],
) -> Ahead:
    """Encode the tensors of a model on the inputs that they get once it is quantized.

    Args:
        plain: the source, under its own names.
        roundings: those of repaired tensors are told so.
        facts: of a tensor, as the conversion has them.

    Raises:
        InputError: the source cannot be run, or the text cannot be used.
        WeightError: see `Encoder.encode`; or an activation is NaN or Inf.
        MachineError: torch or transformers is not installed, or the disk refuses.
    """
    text = {"name": utf8_name(repair.text), "sha256": file_sha256(repair.text)}
    checkpoint = open_source(plain.path, streamed=True)
    with ExitStack() as stack:
        # Each window is run by one thread, and sums are cut alike for any number of them.
        stack.enter_context(single_threads())
        stack.enter_context(threadpool_limits(1, "blas"))
        workers = stack.enter_context(Workers(threads))
        try:
            if checkpoint.kind != "causal":
                raise NoBlocks("it is an encoder, whose pieces of text differ in length")
            pieces = _pieces(repair, checkpoint)
            chain = BlockChain(checkpoint, pieces[0])
            places = _places(checkpoint, plain, prepared)
            run = _Run(chain, pieces, places, prepared.model, roundings, scratch, workers)
            run.facts, run.progress = facts, progress
            run.go()
        except NoBlocks as e:
            told = (
                f"--text has no effect, for the model is not run block by block: {e}; tensors are "
                "rounded as without it"
            )
            return Ahead(warnings=(told,))
    for name in run.repaired:
        before = roundings.of[name]
        roundings.of[name] = replace(before, reason=f"{before.reason}; {REASON}")
    return Ahead(
        run.encoders,
        frozenset(run.repaired),
        {
            "repair": {
                "text": text,
                "windows": len(pieces),
                "seqlen": repair.seqlen,
                "tensors": list(run.repaired),
                "damping": DAMPING,
            }
        },
        tuple(run.notes(repair)),
        tuple(run.warnings()),
    )


def _pieces(repair: RepairText, checkpoint: Checkpoint) -> list[I64]:
    """Windows of the text; of a long one the usual number. Or those that are given."""
    if repair.windows is not None:
        return list(repair.windows)
    every = text_pieces(checkpoint, (repair.text,), repair.seqlen, repair.nsamples)
    if repair.nsamples is not None or len(every) <= WINDOWS:
        return every
    what = f"windows of {repair.seqlen:,} tokens"
    return [every[k] for k in drawn(len(every), WINDOWS, 0, repair.text, what)]


def _places(checkpoint: Checkpoint, plain: Model, prepared: Prepared) -> list[_Place]:
    """Where in the running model the tensors of the plan are.

    Raises:
        NoBlocks: one that gets codes is not to be found there as it is in the files.
    """
    from torch import nn

    modules = list(checkpoint.model.modules())
    owners: dict[int, list[Any]] = {}
    for module in modules:
        if type(module) is nn.Linear:
            owners.setdefault(id(module.weight), []).append(module)
    looked_up = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    layers = None
    found = []
    for p in (p for p in prepared.plan if p.scheme or p.tensor.floating):
        origin = prepared.origin(p.tensor.name)
        if origin is None and p.scheme:
            raise NoBlocks(f"'{p.tensor.name}' is made of several matrices")
        parameter = parameters.get(origin or "")
        if parameter is None and origin and p.scheme:
            layers = linear_layers(checkpoint, plain) if layers is None else layers
            layer = layers.get(origin.removesuffix(".weight"))
            whole = layer is not None and layer.module is not None and not layer.partial
            parameter = layer.module.weight if layer and whole else None
        if parameter is None or tuple(parameter.shape) != p.tensor.shape:
            if p.scheme:
                raise NoBlocks(f"the running model has '{origin}' in another form")
            continue
        readers, table = owners.get(id(parameter), []), id(parameter) in looked_up
        module = readers[0] if p.scheme and len(readers) == 1 and not table else None
        made = made_from(prepared.model, p.tensor)
        found.append(_Place(p, parameter, module, table, made.rows, made.added))
    return found


class _Run:
    """One run over the blocks.

    Attributes:
        facts, progress: see `repaired`.
        encoders: of all tensors that get codes.
        repaired: names of those with a target of their own, and the channels of their input.
    """

    facts: Callable[[PlannedTensor, Workers, Mapper], Facts]
    progress: Progress

    def __init__(
        self,
        chain: BlockChain,
        pieces: list[I64],
        places: list[_Place],
        model: Model,
        roundings: Roundings,
        scratch: Scratch,
        workers: Workers,
    ) -> None:
        self.chain = chain
        self.pieces = pieces
        self.model = model
        self.roundings = roundings
        self.scratch = scratch
        self.workers = workers
        self.encoders: dict[str, Encoder] = {}
        self.repaired: dict[str, int] = {}
        self.windows = range(len(pieces))
        step = max(1, TOGETHER // len(pieces[0]))
        self.parts = [self.windows[k : k + step] for k in range(0, len(pieces), step)]
        first = chain.entering(pieces[0])
        self.state_bytes = 2 * len(pieces) * first.nbytes
        self.held = self.state_bytes <= HELD_BYTES
        shape = (first.shape[0], first.shape[1])
        file = None if self.held else scratch
        self.before, self.now = (HiddenStates(len(pieces), shape, file) for _ in range(2))
        self._swapped: dict[int, _Swapped] = {}  # by the parameter
        at = chain.places()
        self.inside: list[list[_Place]] = [[] for _ in chain.blocks]
        self.outside: list[_Place] = []
        for place in places:
            k = at.get(id(place.parameter))
            (self.outside if k is None else self.inside[k]).append(place)
        linear = [p for p in self.outside if p.module is not None]
        alone = len(linear) == 1 and chain.leaves(linear[0].module, pieces[0])
        self.head = linear[0] if alone else None

    def go(self) -> None:
        """Encode everything."""
        places = [p for block in (self.outside, *self.inside) for p in block]
        coded = (p.planned.tensor.nbytes for p in places if p.planned.scheme)
        self.progress.begin("repair", sum(coded), "bytes")
        self._enter()
        for k, inside in enumerate(self.inside):
            self._block(k, inside)
        if self.head:
            change = self._head_change(self.head) if self._aimed(self.head) else None
            self._encode(self.head, change)
        self.progress.end()

    def notes(self, repair: RepairText) -> list[str]:
        """What the report says."""
        windows, where = len(self.pieces), "memory" if self.held else "a file beside the output"
        widest = max(self.repaired.values(), default=0)
        mib = PAIR_BYTES * widest * widest / 2**20
        found = [
            f"{len(self.repaired)} matrices are aimed at the outputs of the float model on the "
            f"inputs that the model quantized so far gives them: {windows} windows of "
            f"{repair.seqlen:,} tokens of '{repair.text.name}' through {len(self.inside)} blocks; "
            f"hidden states took {self.state_bytes / 2**20:,.0f} MiB in {where}, products of "
            f"inputs up to {mib:,.0f} MiB of memory for {widest:,} channels"
        ]
        left = [n for n in self.roundings.compensated if n not in self.repaired]
        if left:
            found.append(
                f"{len(left)} are aimed at their own weights, such as '{left[0]}': they are no "
                "layers that a block, or the head, runs once"
            )
        return found

    def warnings(self) -> list[str]:
        """Layers that saw fewer tokens than they have channels."""
        tokens = sum(map(len, self.pieces))
        short = {name: n for name, n in self.repaired.items() if tokens < n}
        if not short:
            return []
        name = max(short, key=short.__getitem__)
        return [
            f"the text is shorter than {len(short)} layers are wide, such as that of '{name}': "
            f"{tokens:,} tokens for {short[name]:,} channels; give --text more, or raise --nsamples"
        ]

    def _enter(self) -> None:
        """Encode what is outside the blocks, and fill the hidden states."""
        self._take(self.outside)
        for w in self.windows:
            self.before.put(w, self.chain.entering(self.pieces[w]))
        for place in self.outside:
            if place is not self.head:
                self._encode(place, None)
        self._use(now=True)
        for w in self.windows:
            self.now.put(w, self.chain.entering(self.pieces[w]))
        self._forget([p for p in self.outside if self.head is None or p.table])

    def _block(self, k: int, inside: list[_Place]) -> None:
        """Encode the matrices of a block, and bring hidden states through it."""
        self._take(inside)
        of = {id(p.module): p for p in inside if p.module is not None}
        modules = [p.module for p in inside if p.module is not None]
        groups = self.chain.readers(k, modules, self.before.get(0))
        reached = {id(module) for group in groups for module in group}
        for place in (p for p in inside if id(p.module) not in reached):
            self._encode(place, None)
        for group in groups:
            members = [of[id(module)] for module in group]
            change = self._change(k, members) if any(map(self._aimed, members)) else None
            for place in members:
                self._encode(place, change if self._aimed(place) else None)
        for now in (False, True):
            self._use(now=now)
            self._through(k, self._states(now))
        self._forget(inside)

    def _states(self, now: bool) -> HiddenStates:
        return self.now if now else self.before

    def _through(self, k: int, states: HiddenStates) -> None:
        """Bring hidden states through a block."""
        for part in self.parts:
            found = self.workers.map(lambda w: self.chain.run(k, states.get(w)), part)
            for w, hidden in zip(part, found, strict=True):
                states.put(w, hidden)

    def _aimed(self, place: _Place) -> bool:
        """Whether a tensor may have another target than its weights."""
        rounding = self.roundings.of.get(place.name)
        return rounding is not None and rounding.method == COMPENSATED

    def _change(self, k: int, group: list[_Place]) -> F64 | None:
        """What a group's weights are multiplied by, see `Moments.change`."""
        layer = group[0].module

        def inputs(now: bool, part: range) -> F32:
            states = self._states(now)
            self._use(now=now)
            reach = self.workers.map(lambda w: self.chain.reach(k, states.get(w)), part)
            return np.concatenate(list(reach))

        with self.chain.stopping(layer):
            return self._moments(group[0], inputs)

    def _head_change(self, head: _Place) -> F64 | None:
        """The same for the head."""

        def inputs(now: bool, part: range) -> F32:
            states = self._states(now)
            self._use(now=now)
            found = [self.chain.leaving(head.module, states.get(w), self.pieces[w]) for w in part]
            return np.concatenate(found)

        return self._moments(head, inputs)

    def _moments(self, place: _Place, inputs: Callable[[bool, range], F32]) -> F64 | None:
        moments = Moments(place.module.in_features)
        for part in self.parts:
            moments.add(inputs(False, part), inputs(True, part), self.workers.map)
        if not moments.finite:
            raise WeightError(
                "the input of the layer is NaN or Inf",
                path=self.model.path,
                tensor=place.name,
                hint="the model overflows on this text; convert it without --text",
                code="ACTIVATION-NONFINITE",
            )
        return moments.change()

    def _encode(self, place: _Place, change: F64 | None) -> None:
        """Encode a tensor, and put what it decodes to into the running model."""
        p = place.planned
        if p.scheme is None:
            return
        model, tensor, facts = self.model, p.tensor, self.facts(p, self.workers, self.workers.map)
        if change is not None:
            aimed = RepairedModel(model, tensor, change)
            model, tensor = aimed, aimed.tensor
            self.repaired[place.name] = len(change)
        encoder = codec_of(p.scheme).encoder(model, tensor, p.scheme, facts)
        mean_square = facts.mean_square(row_length(tensor.shape))
        ready, values = encoded_ahead(
            *(encoder, self.model, p.tensor, mean_square, self.scratch, self.workers.map),
            repaired=change is not None,
        )
        self.encoders[place.name] = ready
        self._swapped[id(place.parameter)].decoded = place.placed(values)
        self.progress.advance(p.tensor.nbytes, place.name)

    def _take(self, places: list[_Place]) -> None:
        """Run the model with the weights of these tensors, and exchange them from now on."""
        import torch

        for place in places:
            tensor, parameter = place.planned.tensor, place.parameter
            own = np.empty(tensor.size, np.float32)
            for start in range(0, tensor.size, TILE_VALUES):
                stop = min(start + TILE_VALUES, tensor.size)
                own[start:stop] = self.model.values(tensor, start, stop)
            loaded, mine = parameter.data, place.placed(own.reshape(tensor.shape))
            same = torch.equal(loaded.float(), mine)
            self._swapped[id(parameter)] = _Swapped(parameter, loaded, loaded if same else mine)
        self._use(now=False)

    def _use(self, *, now: bool) -> None:
        """Run the model with what tensors decode to, or with their weights."""
        for s in self._swapped.values():
            s.parameter.data = s.decoded if now and s.decoded is not None else s.own

    def _forget(self, places: list[_Place]) -> None:
        """Run the model as it was loaded where these tensors are, and let go of the rest."""
        for place in places:
            swapped = self._swapped.pop(id(place.parameter), None)
            if swapped:
                swapped.parameter.data = swapped.loaded

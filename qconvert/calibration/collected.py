"""What calibration has collected: to files and back, merged, and as rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.calibration.document import (
    CalibrationDocument,
    FisherRun,
    LayerCalibration,
    TextRun,
)
from qconvert.calibration.file import CHANNELS, calibration_parts, read_state
from qconvert.calibration.fisher import PREFIX, FinishedFisher, FisherStatistics, is_gram
from qconvert.calibration.grid import StaticRange
from qconvert.calibration.layer import LayerStatistics
from qconvert.calibration.observers import F64, Observer, ObserverSettings
from qconvert.errors import FormatError, UnsupportedError, UsageError, WeightError
from qconvert.files.atomic import AtomicOutput
from qconvert.files.regular import file_sha256, utf8_name
from qconvert.files.scratch import Scratch
from qconvert.model import Model, layer_name
from qconvert.report import CalibratedLayer, CalibrateReport

Arrays = dict[str, NDArray[Any]]
STATISTICS_BYTES = 2 << 30  # of the layers of one pass


@dataclass(frozen=True, slots=True)
class FinishedLayer:
    """A layer in the form of the file, small: its parameters and its arrays."""

    calibration: LayerCalibration
    arrays: Arrays

    @property
    def has_gram(self) -> bool:
        return "gram.high" in self.arrays


@dataclass(slots=True)
class Collected:
    """A calibration in memory, finished or not.

    Attributes:
        settings: of the observers.
        inputs: name and SHA-256 of what was read, in order.
        model: digest of the model, if one was given.
        run: of a run over text.
        layers: still collecting.
        finished: of groups that are through; read from files.
        unreached: layers that no token came through.
        recorded: sampled rows of input a layer, (rows, features) float32.
        partial: the state of a run that was interrupted.
        scratch: where Gram matrices of finished layers are; None keeps them in memory.
        transposed: layers whose weights are stored (in, out).
        informing: Fisher information still collecting, ``informed`` that of groups that are
            through, by the names of layers and tables.
        labels: tokens that a label is sampled for; None without Fisher information.
        lacking: layers whose gradient was not to be had.
    """

    settings: ObserverSettings
    inputs: list[dict[str, str]] = field(default_factory=list)
    model: str | None = None
    run: TextRun | None = None
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    finished: dict[str, FinishedLayer] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    recorded: Arrays = field(default_factory=dict)
    partial: bool = False
    scratch: Scratch | None = None
    transposed: set[str] = field(default_factory=set)
    informing: dict[str, FisherStatistics] = field(default_factory=dict)
    informed: dict[str, FinishedFisher] = field(default_factory=dict)
    labels: int | None = None
    lacking: list[str] = field(default_factory=list)

    def finish(self, between: Callable[[Collected], None] = lambda _: None) -> None:
        """Bring what was collected into the form of the file, and let go of the statistics.

        Args:
            between: called after each layer.
        """
        for name in list(self.layers):
            layer = self.layers[name]
            if layer.channels.samples:
                self.finished[name] = self._kept(finished(layer, name in self.transposed))
            del self.layers[name]
            between(self)
        for name in list(self.informing):
            statistics = self.informing.pop(name)
            if statistics.uses:
                self.keep_informed(name, statistics)

    def keep_informed(self, name: str, statistics: FisherStatistics) -> None:
        """Bring the Fisher information of a matrix into the form of the file."""
        found = statistics.finished()
        self.informed[name] = replace(found, arrays=self._small(found.arrays))

    def _kept(self, layer: FinishedLayer) -> FinishedLayer:
        """The same, small in memory."""
        return replace(layer, arrays=self._small(layer.arrays))

    def _small(self, arrays: Arrays) -> Arrays:
        """The same, what is large of it in a file."""
        if self.scratch is None:
            return arrays
        return {k: self.scratch.keep(a) if is_gram(k) else a for k, a in arrays.items()}

    @property
    def fisher(self) -> FisherRun | None:
        """What the file says of the Fisher information."""
        if self.labels is None:
            return None
        shapes = {name: self.informed[name].shape for name in sorted(self.informed)}
        return FisherRun(self.labels, shapes, sorted(self.lacking))

    def document(self) -> CalibrationDocument:
        """The JSON of the file, from the finished layers."""
        return CalibrationDocument(
            observer=self.settings.name,
            settings={k: v for k, v in asdict(self.settings).items() if k != "name"},
            inputs=self.inputs,
            layers={n: self.finished[n].calibration for n in sorted(self.finished)},
            model=self.model,
            run=self.run,
            unreached=sorted(self.unreached),
            partial=self.partial,
            fisher=self.fisher,
        )

    def write(self, out: AtomicOutput) -> None:
        """Write the calibration file, of the finished layers."""
        out.write(calibration_parts(self.document(), self._arrays()))

    def write_state(self, out: AtomicOutput) -> None:
        """Write a file from which the run can go on; nothing is let go of."""
        collecting = {n: s for n, s in self.layers.items() if s.channels.samples}
        more = {n: unsettled(s, n in self.transposed) for n, s in collecting.items()}
        halfway = replace_finished(self, more)
        begun = {n: s.finished() for n, s in self.informing.items() if s.uses}
        halfway.informed = {**self.informed, **begun}
        halfway.partial = True
        arrays = halfway._arrays() | {f"{n}/recorded": a for n, a in self.recorded.items()}
        out.write(calibration_parts(halfway.document(), arrays))

    def how_far(self, unit: str) -> str:
        """See `qconvert.files.saved_state.Resumable`."""
        run = self.run
        assert run
        passes = f", of pass {run.groups + 1} over them" if run.groups else ""
        return f"{run.done:,} of {run.chunks:,} {unit}{passes}"

    def _arrays(self) -> Arrays:
        found = {
            f"{name}/{kind}": a
            for name in sorted(self.finished)
            for kind, a in self.finished[name].arrays.items()
        }
        for name in sorted(self.informed):
            found |= {f"{name}/{kind}": a for kind, a in self.informed[name].arrays.items()}
        return found

    def report(
        self,
        inputs: Sequence[Path],
        output: Path,
        *,
        imatrix: Path | None = None,
        record: Path | None = None,
        resumed_at: int | None = None,
        warnings: list[str],
        seconds: float,
        written: bool = True,
    ) -> CalibrateReport:
        """What the command that has made this says of it.

        Args:
            inputs: what was read, as given.
            output, imatrix, record: what was written.
            resumed_at: pieces of text that an interrupted run had done.
        """
        return CalibrateReport(
            kernels=kernels.describe(),
            inputs=[str(p) for p in inputs],
            output=str(output),
            observer=self.settings.name,
            layers=[_row(name, self.finished[name]) for name in sorted(self.finished)],
            chunks=self.run.chunks if self.run else None,
            tokens=self.run.tokens if self.run else None,
            resumed_at=resumed_at,
            unreached=self.unreached,
            imatrix=str(imatrix) if imatrix else None,
            record=str(record) if record else None,
            warnings=warnings,
            seconds=seconds,
            written=written,
        )


def passes(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Layers whose statistics fit in memory together, in the order given.

    Args:
        sizes: bytes of the statistics of each.
        most: bytes of one pass, but for a layer that needs more alone.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


def observe(layer: LayerStatistics, rows: NDArray[np.float32], name: str, path: Path) -> None:
    """Feed finite rows of input to the statistics of a layer.

    Raises:
        WeightError: they are beyond what a Gram matrix holds.
    """
    with gram_limits(name, path):
        layer.update(rows)


@contextmanager
def gram_limits(name: str, path: Path) -> Iterator[None]:
    """Say what is wrong with rows that a Gram matrix cannot hold.

    Raises:
        WeightError: there were such rows.
    """
    try:
        yield
    except OverflowError as e:
        raise WeightError(
            "the activations are too large for a Gram matrix",
            path=path,
            tensor=name,
            found=str(e),
            hint="calibrate without --gram",
        ) from e


def replace_finished(c: Collected, more: Mapping[str, FinishedLayer]) -> Collected:
    """A shallow copy with more finished layers."""
    return replace(c, finished={**c.finished, **more}, layers={})


def finished(layer: LayerStatistics, transposed: bool) -> FinishedLayer:
    """Ranges settled, state packed."""
    return _packed(layer, layer.settings.settle, transposed)


def unsettled(layer: LayerStatistics, transposed: bool) -> FinishedLayer:
    """State packed, without ranges: to search them may take longer than all the rest."""
    return _packed(layer, lambda _: StaticRange(0.0, 0.0, 1.0, 0), transposed)


def _packed(
    layer: LayerStatistics, settle: Callable[[Observer], StaticRange], transposed: bool
) -> FinishedLayer:
    return FinishedLayer(
        LayerCalibration(
            samples=layer.channels.samples,
            features=layer.features,
            input=settle(layer.input),
            output=None if layer.output is None else settle(layer.output),
            transposed=transposed,
        ),
        layer.arrays(),
    )


def restored(
    layer: FinishedLayer, settings: ObserverSettings, norms: F64 | None = None
) -> LayerStatistics:
    """The inverse of `finished`; ``norms`` as of `LayerStatistics`, if more is to come."""
    found = LayerStatistics.restored(layer.arrays, layer.calibration.features, settings, norms)
    if found.channels.samples != layer.calibration.samples:
        raise ValueError("samples")
    return found


def read_collected(path: Path, scratch: Scratch | None = None) -> Collected:
    """A calibration file or the state of an interrupted run; Gram matrices in ``scratch``.

    Raises:
        InputError: it cannot be read, or its arrays are not what a run has left.
    """
    document, arrays = read_state(path, scratch)
    try:
        settings = _settings(document)
        settings.make()
        parts: dict[str, Arrays] = {name: {} for name in document.layers}
        recorded: Arrays = {}
        fisher = document.fisher
        informed: dict[str, Arrays] = {name: {} for name in (fisher.shapes if fisher else ())}
        for name, array in arrays.items():
            layer, _, kind = name.rpartition("/")
            if kind.startswith(PREFIX):
                informed[layer][kind] = array
            elif kind == "recorded":
                recorded[layer] = _recorded(array, document.layers[layer].features)
            else:
                parts[layer][kind] = array
        layers = {n: FinishedLayer(c, parts[n]) for n, c in document.layers.items()}
        for layer_found in layers.values():
            restored(layer_found, settings)
        matrices = {
            name: FinishedFisher(fisher.shapes[name], found) if fisher else None
            for name, found in informed.items()
        }
        for matrix in filter(None, matrices.values()):
            matrix.restored()
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, UsageError) as e:
        raise FormatError(
            "the state in the calibration is damaged",
            path=path,
            found=f"{type(e).__name__}: {e}",
            hint="calibrate again",
            code="CALIBRATION-STATE",
        ) from e
    return Collected(
        settings=settings,
        inputs=document.inputs,
        model=document.model,
        run=document.run,
        finished=layers,
        unreached=document.unreached,
        recorded=recorded,
        partial=not document.finished,
        scratch=scratch,
        informed={name: matrix for name, matrix in matrices.items() if matrix},
        labels=fisher.tokens if fisher else None,
        lacking=fisher.lacking if fisher else [],
    )


def _recorded(array: NDArray[Any], features: int) -> NDArray[np.float32]:
    """Sampled rows of input as a run leaves them.

    Raises:
        ValueError: they are no such rows.
    """
    if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != features:
        raise ValueError("recorded rows")
    if not np.isfinite(array).all():
        raise ValueError("recorded rows that are not finite")
    return array


def _settings(document: CalibrationDocument) -> ObserverSettings:
    given: dict[str, Any] = dict(document.settings)
    return ObserverSettings(document.observer, **given)


def merged(parts: Iterable[tuple[Path, Collected]]) -> Collected:
    """One calibration of all that several have seen: the statistics of a single run over the same.

    Raises:
        UnsupportedError: they differ in observer, model, or width of a layer, or Gram matrices are
            too large together.
        UsageError: moving averages.
    """
    rest = iter(parts)
    first_path, whole = next(rest)
    for path, part in rest:
        for what, found, wanted in (
            ("observers", part.settings, whole.settings),
            ("models", part.model, whole.model),
            ("statistics", _informs(part), _informs(whole)),
        ):
            if found != wanted:
                raise UnsupportedError(
                    f"calibrations with different {what} cannot be merged",
                    path=path,
                    found=found,
                    wanted=f"{wanted}, as in {first_path.name}",
                    code="CALIBRATION-MERGE",
                )
        for name, layer in part.finished.items():
            if layer.calibration.transposed:
                whole.transposed.add(name)
            before = whole.finished.get(name)
            if before is None:
                whole.finished[name] = layer
                continue
            statistics = restored(before, whole.settings)
            try:
                statistics.merge(restored(layer, whole.settings))
            except OverflowError as e:
                raise UnsupportedError(
                    "the Gram matrices are too large together",
                    path=path,
                    tensor=name,
                    found=str(e),
                    hint="merge fewer files",
                    code="CALIBRATION-MERGE",
                ) from e
            except ValueError as e:
                raise UnsupportedError(
                    "the layer differs between the calibrations",
                    path=path,
                    tensor=name,
                    found=_described(layer),
                    wanted=f"{_described(before)}, as in {first_path.name}",
                    code="CALIBRATION-MERGE",
                ) from e
            transposed = before.calibration.transposed
            if layer.calibration.transposed != transposed:
                raise UnsupportedError(
                    "the layer's weight is stored otherwise in the calibrations",
                    path=path,
                    tensor=name,
                    code="CALIBRATION-MERGE",
                )
            whole.finished[name] = whole._kept(finished(statistics, transposed))
        _merge_fisher(whole, part, path)
        whole.inputs = whole.inputs + part.inputs
        whole.run = _joined(whole.run, part.run)
        whole.unreached = [*whole.unreached, *part.unreached]
    whole.unreached = sorted(set(whole.unreached) - set(whole.finished))
    return whole


def _informs(part: Collected) -> str:
    return "of inputs" if part.labels is None else "of inputs, with Fisher information"


def _merge_fisher(whole: Collected, part: Collected, path: Path) -> None:
    """Add the Fisher information of a part.

    Raises:
        UnsupportedError: of a matrix of another shape, of one with other Gram matrices, or too
            large together.
    """
    for name, theirs in part.informed.items():
        mine = whole.informed.get(name)
        if mine is None:
            whole.informed[name] = theirs
            continue
        statistics = mine.restored()
        try:
            statistics.merge(theirs.restored())
        except (ValueError, OverflowError) as e:
            raise UnsupportedError(
                "the Fisher information of a matrix cannot be added",
                path=path,
                tensor=name,
                found=str(e),
                hint="calibrate all parts with the same options",
                code="CALIBRATION-MERGE",
            ) from e
        whole.keep_informed(name, statistics)
    if whole.labels is not None and part.labels is not None:
        whole.labels += part.labels
    whole.lacking = sorted({*whole.lacking, *part.lacking} - set(whole.informed))


def _joined(a: TextRun | None, b: TextRun | None) -> TextRun | None:
    """Two runs as one over both texts; None where they cut text differently."""
    if a is None or b is None or (a.seqlen, a.nsamples, a.seed) != (b.seqlen, b.nsamples, b.seed):
        return None
    return replace(
        a,
        chunks=a.chunks + b.chunks,
        done=a.done + b.done,
        tokens=a.tokens + b.tokens,
        groups=max(a.groups, b.groups),
    )


def _described(layer: FinishedLayer) -> str:
    more = [", with outputs"] if layer.calibration.output else []
    more += [", with Gram matrix"] if layer.has_gram else []
    return f"{layer.calibration.features:,} features{''.join(more)}"


def unreached_warnings(unreached: list[str]) -> list[str]:
    """Layers that no token came through, as a warning."""
    if not unreached:
        return []
    return [
        f"no token came through {len(unreached)} layers, such as '{unreached[0]}': "
        "they are not in the calibration"
    ]


def _row(name: str, layer: FinishedLayer) -> CalibratedLayer:
    settled = layer.calibration
    low, high, _ = (layer.arrays[kind] for kind in CHANNELS)
    widest = np.maximum(-low, high)
    middle = float(np.median(widest.astype(np.float64)))  # whose two middle values may be large
    return CalibratedLayer(
        name=name,
        samples=settled.samples,
        features=settled.features,
        **asdict(settled.input),
        channel_absmax_ratio=float(widest.max()) / middle if middle > 0 else float("inf"),
        output=None if settled.output is None else asdict(settled.output),
    )


def file_note(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file that is read, for `Collected.inputs`.

    Raises:
        InputError: it cannot be read.
    """
    return {"name": utf8_name(path), "sha256": file_sha256(path)}


def features_of(layers: Mapping[str, FinishedLayer]) -> dict[str, int]:
    """Features of each layer."""
    return {name: layer.calibration.features for name, layer in layers.items()}


def model_warnings(model: Model, features: Mapping[str, int], transposed: Set[str]) -> list[str]:
    """Hold the layers against the weights of the model they are for.

    Args:
        features: of each layer.
        transposed: layers whose weights are stored (in, out).

    Raises:
        UnsupportedError: no layer has a weight in the model, or one has another width.
    """
    weights = {layer_name(t.name): t for t in model.tensors if len(t.shape) >= 2}
    strange = [name for name in features if name not in weights]
    if len(strange) == len(features):
        raise UnsupportedError(
            "no layer of the activations has a weight in the model",
            path=model.path,
            found=f"'{strange[0]}' and {len(strange) - 1} more",
            wanted=f"names such as '{next(iter(weights), 'none')}'",
            hint="name the arrays like the layers or weights of the model",
        )
    warnings = []
    if strange:
        warnings.append(
            f"{len(strange)} of {len(features)} layers have no weight in {model.path.name}, "
            f"such as '{strange[0]}'"
        )
    for name in (n for n in features if n in weights):
        width = weights[name].shape[0 if name in transposed else -1]
        if width != features[name]:
            raise UnsupportedError(
                "activations do not fit the model",
                path=model.path,
                tensor=weights[name].name,
                found=f"{features[name]:,} features",
                wanted=f"{width:,}",
            )
    return warnings

"""verify: prove that a written file keeps what it promises; every check can fail and none is
skipped in silence.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qconvert import kernels
from qconvert.calibration.recorded import check_activations, read_batches
from qconvert.codecs.codec import NEAREST, REPAIRED, Coded, Stored
from qconvert.codecs.compensation import COMPENSATED
from qconvert.codecs.rescaled import TUNED, were_trained
from qconvert.codecs.source import F32_MAX
from qconvert.containers import CONTAINERS
from qconvert.errors import FormatError, UnsupportedError, UsageError, WeightError
from qconvert.files import OpenModel, open_model
from qconvert.files.adapters import AdaptedModel, adapter_sha256, open_adapter
from qconvert.files.dequantized import dequantized
from qconvert.files.equalised import Exponents, equalised, read_exponents
from qconvert.files.gguf import KIND, PROJECTOR_FILE
from qconvert.files.limits_file import read_limits
from qconvert.files.provenance import PROVENANCE, provenance_of, read_provenance
from qconvert.files.transposed import input_first
from qconvert.floors import (
    COMPENSATED_DB,
    LOST_DB,
    REPAIRED_DB,
    USABLE_DB,
    Judged,
    Measured,
    expected_db,
    judge,
)
from qconvert.geometry import TILE_VALUES, Tile, tiles
from qconvert.kernels.activations import DynamicInput, StaticInput, as_bytes
from qconvert.kernels.arithmetic import CAST_NUMPY, cast_values
from qconvert.kernels.records import Activations, ErrorSums
from qconvert.limits import Limits
from qconvert.model import DTYPES, Model, TensorInfo, layer_name
from qconvert.progress import Progress, Silent
from qconvert.quantities import counted
from qconvert.remedies import remedy
from qconvert.report import Check, Verdict, VerifiedTensor, VerifyReport
from qconvert.report.verify import of_quality
from qconvert.running.hugging_face import require
from qconvert.stages.checkpoints import as_made
from qconvert.stages.limits import check_limits, file_checks, tensor_checks
from qconvert.stages.paired_histograms import paired_histogram
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.sources import examined
from qconvert.stages.target import target_of
from qconvert.stages.verdict import judge_embeddings, judge_tokens, verdict_of
from qconvert.stages.verify_run import measure_run
from qconvert.stages.verify_text import QualityOptions, measure_quality

HALF_STEP = 0.5 + 2.0**-9  # half a step, and the rounding of the scale and of binary32 arithmetic
RECORDED = 1e-5  # relative; the header has six significant digits
STRANGE_DB = 0.5  # weights of another model come to -3 dB, zeros to 0
SPOILED_DB = 6.0  # products of Gaussian inputs come within 1 dB of their weights
NO_CODES = "the file has no tensor with codes that we have an integer product for"
ACTIVATIONS = ("auto", "static", "dynamic", "dynamic_asym")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Options of ``qconvert verify``; the command line's help describes each.

    Attributes:
        rows: activation rows of the integer product.
        seed: of the Gaussian activations.
        activations: of products of single tensors: ``static``, ``dynamic``, ``dynamic_asym``, or
            ``auto`` for static where the file has parameters and dynamic elsewhere.
        samples: recorded activations to use instead of Gaussian ones.
        quality: what to measure by running the models; None for tensors alone.
        adapter: a directory of peft's, whose corrections are merged into the source first.
        run: whether to have llama.cpp run the file.
        exact: whether every decoded value has to be that of the source.
        histograms: whether to count the values of each tensor before and after, for a picture.
        limits: a file of them.
    """

    against: Path | None = None
    min_sqnr: float | None = None
    max_nmse: float | None = None
    min_output_sqnr: float | None = None
    rows: int = 8
    seed: int = 0
    activations: str = "auto"
    samples: tuple[Path, ...] = ()
    quality: QualityOptions | None = None
    adapter: Path | None = None
    run: bool = False
    exact: bool = False
    histograms: bool = False
    limits: Path | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Inputs of a layer in a file of samples."""

    model: Model
    tensor: TensorInfo
    path: Path


@dataclass
class _Sums:
    """Sums over the tiles of one tensor."""

    error: ErrorSums = field(default_factory=ErrorSums)
    finite: bool = True  # whether every decoded value is
    worst_step: float | None = None
    cast: bool = True  # whether plain numbers are the source's, rounded
    product: str | None = None  # ``integer``, ``float`` or none at all
    exact: bool = True
    float_error: float = 0.0
    signal: float = 0.0  # Σ of the squared float product
    noise: float = 0.0  # Σ of its squared difference from the product that runs

    def add(self, other: _Sums) -> None:
        self.error += other.error
        self.finite &= other.finite
        if other.worst_step is not None:
            self.worst_step = max(self.worst_step or 0.0, other.worst_step)
        self.cast &= other.cast
        self.product = other.product
        self.exact &= other.exact
        self.float_error = max(self.float_error, other.float_error)
        self.signal += other.signal
        self.noise += other.noise

    def compare(
        self, x: NDArray[np.float32], weights: NDArray[np.float32], y: NDArray[np.floating]
    ) -> None:
        """Hold a product against that of the source's weights."""
        truth = x.astype(np.float64) @ weights.astype(np.float64).T
        self.signal = float((truth * truth).sum())
        self.noise = float(((truth - y) ** 2).sum())


def verify(path: Path, options: VerifyOptions, progress: Progress | None = None) -> VerifyReport:
    """Verify a qblk or GGUF file, or a directory.

    A malformed file is the question that is asked, so it gives a report with status ``fail``; a
    missing one, or one of an unknown version, raises.

    Raises:
        InputError: the file or the source cannot be read.
        UsageError: options contradict the file.
    """
    started = time.perf_counter()
    of_errors = (options.min_sqnr, options.max_nmse, options.min_output_sqnr)
    if options.against is None and any(limit is not None for limit in of_errors):
        raise UsageError("limits on errors need the source", hint="give it with --against")
    if options.exact and options.against is None:
        raise UsageError("--exact needs what to compare with", hint="give it with --against")
    if options.quality is not None or options.run:
        if options.against is None:
            name = "--run" if options.quality is None else "--text"
            raise UsageError(f"{name} needs the source", hint="give it with --against")
        require("torch", "transformers", progress=progress)  # now, not after the weights
    limits = read_limits(options.limits) if options.limits else None
    report = VerifyReport(
        kernels=kernels.describe(),
        path=str(path),
        against=str(options.against) if options.against else None,
        checks=[],
        tensors=[],
        sqnr_db=None,
    )
    model = None
    try:
        model = open_model(path)
        exponents = read_exponents(read_provenance(model), path)
    except FormatError as e:
        if model:
            model.close()
        report.checks.append(Check("integrity", "fail", str(e), tensor=e.tensor))
        report.status = "fail"
        report.verdict = Verdict(intact=False)
        return report
    source = None
    try:
        if model.kind == "safetensors" and PROVENANCE not in model.metadata:
            raise UsageError(
                "verify takes what was made of a source",
                found=f"{path}: plain safetensors that qconvert did not write",
                wanted="a quantized file or directory, or a directory of --format hf",
                hint="give the source with --against, and before it what was made",
            )
        alone = model.metadata.get(KIND) == PROJECTOR_FILE
        if alone and (options.run or options.quality is not None):
            raise UsageError(
                f"{'--run' if options.run else '--text'} runs a language model",
                found=f"{path}: what turns images into tokens for one",
                hint="--against alone compares its values; llama-mtmd-cli --mmproj runs it",
            )
        if limits:
            given = {"against": bool(options.against), "text": bool(options.quality)}
            check_limits(limits, model.tensors, **given)
        if options.against:
            source = _source(options, model, exponents)
            report.warnings += _of_adapter(provenance_of(model), options.adapter)
        _Job(model, source, exponents, options, limits, report, progress or Silent()).run()
    finally:
        model.close()
        if source:
            source.close()
    report.status = "fail" if any(c.status == "fail" for c in report.checks) else "pass"
    report.seconds = time.perf_counter() - started
    return report


def _predicted(model: OpenModel) -> float | None:
    """The divergence that was predicted when a file was made, in nats; None where none was."""
    noted = read_provenance(model)
    prediction = noted.get("prediction") if isinstance(noted, dict) else None
    kl = prediction.get("kl") if isinstance(prediction, dict) else None
    return float(kl) if isinstance(kl, int | float) else None


def _of_adapter(noted: Mapping[str, Any], adapter: Path | None) -> list[str]:
    """A warning where the source has not the adapter that the file was made with."""
    recorded = noted.get("adapter")
    if isinstance(recorded, dict) and adapter is None:
        return [
            f"the file was made with the adapter {recorded.get('name')!r} merged into the source: "
            "give it with --adapter"
        ]
    wanted = recorded.get("sha256") if isinstance(recorded, dict) else None
    if adapter is None or adapter_sha256(adapter) == wanted:
        return []
    if wanted is None:
        return [f"the file was made without the adapter {adapter.name!r}"]
    return [f"the file was made with another adapter than {adapter.name!r}, by its SHA-256"]


def _source(options: VerifyOptions, model: OpenModel, exponents: Mapping[str, Exponents]) -> Model:
    """The source under the names of the file that was made from it, with the adapter that was
    merged into it, and equalised as that was.

    Raises:
        UnsupportedError: the file's factors are of other tensors than these, although it is made of
            tensors like these.
    """
    assert options.against
    opened = open_model(options.against)
    try:
        examined(opened)
        if model.kind == "safetensors" or CONTAINERS[model.kind].directory:
            opened = as_made(opened, model)
        target, plain = target_of(CONTAINERS[model.kind]), dequantized(opened)
        if options.adapter:
            plain = AdaptedModel(plain, open_adapter(options.adapter))
        try:
            return target.source_of(model, opened, equalised(plain, exponents))
        except UnsupportedError:
            named = target.source_of(model, opened, plain)
            if {(t.name, t.shape) for t in named.tensors} == {
                (t.name, t.shape) for t in model.tensors
            }:
                raise
            return named  # which has other tensors than the file: a check will say so
    except BaseException:
        opened.close()
        raise


class _Job:
    def __init__(
        self,
        model: OpenModel,
        source: Model | None,
        exponents: Mapping[str, Exponents],
        options: VerifyOptions,
        limits: Limits | None,
        report: VerifyReport,
        progress: Progress,
    ) -> None:
        self.model = model
        self.source = source
        self.exponents = exponents
        self.options = options
        self.limits = limits
        self.report = report
        self.progress = progress
        self.total = ErrorSums()
        self.tensors = {t.name: t for t in model.tensors}
        self.stored = {t.name: model.stored(t) for t in model.tensors}
        self.samples: dict[str, list[_Recorded]] = {}
        self.unused_samples: set[tuple[Path, str]] = set()
        self.judged: Judged | None = None
        self.needed: dict[str, float] = {}  # SQNR in dB that tensors miss a limit for
        self.trained = were_trained(provenance_of(model))
        # Rows of weights that are stored (in, out) meet no input of the layer.
        self.transposed = input_first(source or model)

    def check(
        self,
        id: str,
        good: bool,
        detail: str,
        *,
        worst: float | None = None,
        limit: float | None = None,
        tensor: str | None = None,
    ) -> None:
        status = "pass" if good else "fail"
        self.report.checks.append(Check(id, status, detail, worst, limit, tensor))

    def skip(self, id: str, why: str) -> None:
        self.report.checks.append(Check(id, "skip", why))

    def run(self) -> None:
        if not self._integrity():
            self.report.verdict = Verdict(intact=False)
            return
        with ExitStack() as stack:
            self._open_samples(stack)
            pairs = self._pairs()
            if self.source and self.model.tensors and not pairs:  # all else is about nothing
                told = next(c.detail for c in self.report.failed if c.id == "same-tensors")
                self.report.verdict = Verdict(intact=True, other_model=told)
                self._run()  # which is skipped, as the text is, and says so
                self._quality()
                return
            self._compare(pairs)
        text = self.options.quality is not None
        self.report.verdict = verdict_of(self.report, self.judged, self._bits, text=text)

    @property
    def _bits(self) -> float | None:
        """Per weight, over the whole file."""
        weights = sum(t.size for t in self.model.tensors)
        return 8 * sum(t.nbytes for t in self.model.tensors) / weights if weights else None

    def _compare(self, pairs: dict[str, TensorInfo]) -> None:
        quantized = [t for t in self.model.tensors if t.size and not self._is_copy(t, pairs)]
        for tensor in quantized:
            self._static(tensor)  # a missing calibration costs no time
        self._run()
        self._quality()
        self._kept(pairs)
        self.progress.begin("verify", sum(t.nbytes for t in quantized), "bytes")
        # BLAS with threads of its own beside the workers would have them wait for each other.
        threads = self.options.threads or available_threads()
        with threadpool_limits(1, "blas"), Workers(threads) as workers:
            for tensor in quantized:
                row = self._measure(tensor, pairs.get(tensor.name), workers)
                self.report.tensors.append(row)
                self.progress.advance(tensor.nbytes, tensor.name)
        self.progress.end()
        self.report.warnings += [
            f"samples '{name}' of {path.name} fit no quantized tensor"
            for path, name in sorted(self.unused_samples)
        ]
        if self.source:
            self.source.check_unchanged()
            self.report.sqnr_db = self.total.sqnr_db
        self._verdicts()

    # --- what needs no arithmetic ---

    def _integrity(self) -> bool:
        self.progress.begin("check digests", sum(f.size for f in self.model.sources), "bytes")
        try:
            held = self.model.check_payload(self.progress.advance)
        except FormatError as e:
            self.check("integrity", False, str(e), tensor=e.tensor)
            return False
        finally:
            self.progress.end()
        self.check("integrity", True, held)
        for found in target_of(CONTAINERS[self.model.kind]).examined(self.model):
            broken = f": {found.broken}" if found.broken else ""
            self.check(found.id, not broken, found.detail + broken, tensor=found.tensor)
            self.report.warnings += found.cautions
        return True

    def _pairs(self) -> dict[str, TensorInfo]:
        """Tensors of the source by name, held against those of the file."""
        if not self.source:
            self.skip("same-tensors", "no source: give it with --against")
            return {}
        wanted = {t.name: t for t in self.source.tensors}
        found = {t.name: t for t in self.model.tensors}
        same = [n for n, t in found.items() if n in wanted and wanted[n].shape == t.shape]
        if not same and found:
            self.check(
                "same-tensors",
                False,
                f"{_names_alike(found, wanted)} {self.source.path}, which is not the model that "
                "the file was made from",
            )
            return {}
        missing = sorted(set(wanted) - set(found))
        extra = sorted(set(found) - set(wanted))
        shapes = [n for n in wanted if n in found and wanted[n].shape != found[n].shape]
        dtypes = [
            n
            for n, t in wanted.items()
            if n in found
            and self.stored[n].source_dtype not in (None, t.dtype)
            and not self.trained  # in a dtype of its own
        ]
        for what, names in (
            ("missing from the file", missing),
            ("not in the source", extra),
            ("of another shape than in the source", shapes),
            ("of another source dtype", dtypes),
        ):
            if names:
                self.check("same-tensors", False, f"{len(names)} tensors {what}", tensor=names[0])
        if not (missing or extra or shapes or dtypes):
            self.check("same-tensors", True, f"{len(wanted)} names, shapes and dtypes")
        return {n: t for n, t in wanted.items() if n not in shapes}

    def _is_copy(self, tensor: TensorInfo, pairs: dict[str, TensorInfo]) -> bool:
        """Whether the tensor claims to be the source's, bit for bit."""
        if (noted := self.stored[tensor.name].source_dtype) is not None:
            return noted == tensor.dtype
        original = pairs.get(tensor.name)
        return tensor.dtype in DTYPES and (original is None or original.dtype == tensor.dtype)

    def _kept(self, pairs: dict[str, TensorInfo]) -> None:
        kept = [t for t in self.model.tensors if self._is_copy(t, pairs)]
        tuned = [t for t in kept if self.stored[t.name].rounding == TUNED]
        kept = [t for t in kept if t not in tuned]
        if not self.source:
            self.skip("kept-exact", "no source: give it with --against")
            return
        if self.trained:
            self.skip("kept-exact", "the model was trained after the source")
            return
        for tensor in kept:
            original = pairs.get(tensor.name)
            if original and not self._same_bytes(tensor, original):
                self.check(
                    "kept-exact", False, "a kept tensor differs from the source", tensor=tensor.name
                )
                return
        count = sum(t.name in pairs for t in kept)
        others = f"; {len(tuned)} with gains that were tuned, not compared" if tuned else ""
        self.check("kept-exact", True, f"{count} tensors bit for bit{others}")

    def _same_bytes(self, tensor: TensorInfo, original: TensorInfo) -> bool:
        assert self.source
        if tensor.nbytes != original.nbytes or tensor.dtype != original.dtype:
            return False
        for start in range(0, tensor.nbytes, 4 * TILE_VALUES):
            size = min(4 * TILE_VALUES, tensor.nbytes - start)
            if self.model.raw(tensor, start, size) != self.source.raw(original, start, size):
                return False
        return True

    # --- what needs torch ---

    def _run(self) -> None:
        if not self.options.run:
            return
        assert self.options.against
        if any(c.id == "same-tensors" and c.status == "fail" for c in self.report.checks):
            self.skip("llama-runs", "the file is not of the source, so nothing was run")
            return
        self.report.llama_cpp, checks = measure_run(
            self.model.path, self.options.against, self.progress
        )
        self.report.checks += checks

    def _quality(self) -> None:
        if self.options.quality is None:
            return
        assert self.options.against
        if any(c.id == "same-tensors" and c.status == "fail" for c in self.report.checks):
            self.skip("finite-quality", "the file is not of the source, so nothing was run")
            return
        path, against = self.model.path, self.options.against
        found = measure_quality(path, against, self.options.quality, self.progress)
        if found.tokens:
            found.tokens.kl_predicted = _predicted(self.model)
        self.report.token_quality = found.tokens
        self.report.embedding_quality = found.embeddings
        self.report.checks += found.checks
        told: list[tuple[Check, str | None]] = []
        if found.tokens:
            told.append(judge_tokens(found.tokens, self._bits or 0.0))
        if found.embeddings:
            told.append(judge_embeddings(found.embeddings, self._bits or 0.0))
        for check, warning in told:
            self.report.checks.append(check)
            self.report.warnings += [warning] if warning else []

    # --- what does arithmetic ---

    def _measure(
        self, tensor: TensorInfo, original: TensorInfo | None, workers: Workers
    ) -> VerifiedTensor:
        stored = self.stored[tensor.name]
        columns = stored.encoding.columns(tensor.shape)
        turned = self.transposed(tensor.name)
        static = None if turned else self._static(tensor)
        recorded = None if turned else self._recorded_inputs(tensor, columns)
        x = self._gaussian(tensor, columns, static) if recorded is None else recorded
        dynamic = DynamicInput(symmetric=self.options.activations != "dynamic_asym")
        a = as_bytes(x, static or dynamic)
        total = _Sums()

        def work(tile: Tile) -> _Sums:
            coded = stored.encoding.coded(stored, tile)
            weights = None
            if self.source and original:
                values = self.source.values(original, tile.start, tile.stop)
                weights = _narrow(values, self.source, original).reshape(coded.values.shape)
            return _measure_rows(coded, weights, x, a, tile, stored)

        for part in workers.map(work, tiles(tensor.size // columns, columns)):
            total.add(part)
        row = VerifiedTensor(tensor.name, tensor.dtype, total.finite)
        row.bits_per_weight = 8 * tensor.nbytes / tensor.size
        if self.source and original and tensor.dtype in DTYPES:
            row.cast_exact = total.cast and tensor.dtype in CAST_NUMPY and original.floating
        if self.source and original:
            self.total += total.error
            row.sqnr_db, row.nmse = total.error.sqnr_db, total.error.nmse
            row.max_error, row.worst_step = total.error.worst, total.worst_step
            if self.options.histograms:
                row.histogram = paired_histogram(stored, self.source, original, columns)
        if total.product is not None:
            row.inputs = "Gaussian" if recorded is None else "recorded"
            row.activations = "float"
            if total.product == "integer":
                row.integer_exact, row.float_error = total.exact, total.float_error
                named = self.options.activations.replace("auto", "dynamic")
                row.activations = "static" if static else named
            if recorded is not None or row.activations != "static":
                row.output_sqnr_db = _db(total.signal, total.noise)
        return row

    def _static(self, tensor: TensorInfo) -> StaticInput | None:
        """Scale and zero point of the layer's input from the file, if they are to be used."""
        if self.options.activations.startswith("dynamic"):
            return None
        found = StaticInput.noted(self.stored[tensor.name].activation)
        if found is None and self.options.activations == "static":
            raise UsageError(
                "static activations need a calibration in the file",
                found=f"none for tensor '{tensor.name}'",
                hint="--activations auto takes static parameters where there are any",
            )
        return found

    def _open_samples(self, stack: ExitStack) -> None:
        for path in self.options.samples:
            model = open_model(path)
            stack.callback(model.close)
            for t in model.tensors:
                self.samples.setdefault(layer_name(t.name), []).append(_Recorded(model, t, path))
                self.unused_samples.add((path, t.name))

    def _recorded_inputs(self, tensor: TensorInfo, columns: int) -> NDArray[np.float32] | None:
        """Recorded activation rows of a layer, None without."""
        for r in self.samples.get(layer_name(tensor.name), ()):
            if r.tensor.shape[1:] == (columns,):
                check_activations(r.tensor, r.path)
                self.unused_samples.discard((r.path, r.tensor.name))
                batches = list(_first_rows(r.model, r.tensor, r.path, self.options.rows))
                found = np.concatenate(batches)[: self.options.rows]
                e = self.exponents.get(tensor.name)
                if e is not None and e.columns is not None and e.columns.size == columns:
                    found = np.ldexp(found, -e.columns.ravel().astype(np.int32))
                return found
        return None

    def _gaussian(
        self, tensor: TensorInfo, columns: int, static: StaticInput | None
    ) -> NDArray[np.float32]:
        """Gaussian activation rows, as wide as a static range."""
        digest = hashlib.sha256(f"{self.options.seed} {tensor.name}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        x = random.standard_normal((self.options.rows, columns), np.float32)
        # The range of a static scale is 255 steps wide: four standard deviations to each side.
        return x * np.float32(static.scale * 255 / 8) if static else x

    def _verdicts(self) -> None:
        rows = self.report.tensors
        detail = f"decoded values of {len(rows)} tensors"
        self._of_tensors("finite", detail, [r for r in rows if not r.finite])
        if self.source:
            self._quality_floors(rows)
            self._casts(rows)
            if self.options.exact:
                wrong = [r for r in rows if r.max_error != 0]
                detail = f"decoded values of {len(rows)} tensors are those of --against"
                if wrong:
                    detail += f"; {len(wrong)} have others"
                self._of_tensors("exact", detail, wrong)
            self._error_bound(rows)
            self._recorded(rows)
        else:
            for id in ("quality", "usable", "error-bound", "recorded-error"):
                self.skip(id, "no source: give it with --against")
        products = [r for r in rows if r.integer_exact is not None]
        if products:
            detail = f"int32 accumulation equals exact arithmetic in {len(products)} tensors"
            self._of_tensors("integer-exact", detail, [r for r in rows if r.integer_exact is False])
            detail = "integer path and float product of the same operands, in units of the rounding"
            errors = {r.name: r.float_error or 0.0 for r in products}
            self._limit("float-product", detail, errors, 1.0, max)
        else:
            self.skip("integer-exact", NO_CODES)
            self.skip("float-product", NO_CODES)
        self._limits(rows)
        if self.limits:
            self._stated_limits(self.limits, rows)
        # Of a damaged file, or one of another model, other schemes would mend nothing.
        whole = all(c.status != "fail" or of_quality(c) for c in self.report.checks)
        for row in rows:
            if row.name in self.needed and whole:
                row.remedy = self._remedy(row.name, self.needed[row.name])
        self._compare_outputs(rows)

    def _of_tensors(self, id: str, detail: str, failing: list[VerifiedTensor]) -> None:
        """A check that each tensor meets or not."""
        for row in failing:
            row.fails.append(id)
        self.check(id, not failing, detail, tensor=failing[0].name if failing else None)

    def _quality_floors(self, rows: list[VerifiedTensor]) -> None:
        """Fail where weights are lost or a class of them broken, warn where a width does worse than
        it should.
        """
        roundings = {r.name: self.stored[r.name].rounding for r in rows}
        others = {
            COMPENSATED: (COMPENSATED_DB, "of those whose codes make up for each other's errors"),
            REPAIRED: (REPAIRED_DB, "of those that make up for what others have lost"),
        }
        if self.trained:  # codes of other weights than the source's, as of those
            roundings = dict.fromkeys(roundings, REPAIRED)
            others[REPAIRED] = (REPAIRED_DB, "after training")
        measured = [
            Measured(
                *(r.name, r.stored, self.stored[r.name].encoding.bits, r.sqnr_db),
                self.tensors[r.name].size,
                compensated=roundings[r.name] == COMPENSATED,
                repaired=roundings[r.name] == REPAIRED,
            )
            for r in rows
        ]
        kept = [t for t in self.model.tensors if t.name not in roundings and t.floating]
        measured += [Measured(t.name, t.dtype, 16, None, t.size) for t in kept if len(t.shape) > 1]
        judged = self.judged = judge(measured, self._remedy)
        detail = "lowest SQNR of a tensor, in dB"
        if judged.lost:
            detail = f"the weights of {len(judged.lost)} of {len(rows)} tensors are lost: {detail}"
            if sum(db < STRANGE_DB for db, _ in judged.figures) > len(rows) / 2:
                detail += "; is --against the model that the file was made from?"
        figures: dict[str, dict[str, float]] = {}
        for db, name in judged.figures:
            figures.setdefault(roundings[name], {})[name] = db
        plain = {n: db for how, of in figures.items() if how not in others for n, db in of.items()}
        if plain or not figures:
            self._limit("quality", detail, plain, LOST_DB, min)
        for how, (allowance, which) in others.items():
            if how in figures:
                of_them = f"{detail}, {which}"
                self._limit("quality", of_them, figures[how], LOST_DB - allowance, min)
        bits = {m.name: m.bits for m in measured}
        self.needed |= {name: max(expected_db(bits[name]), LOST_DB) for name in judged.lost}
        self._usable(judged)
        self.report.outliers = judged.outliers
        if judged.warning:
            self.report.warnings.append(judged.warning)

    def _usable(self, judged: Judged) -> None:
        """Fail where a class of tensors has lost so much that no model is known to bear it."""
        if not judged.rest:
            return
        of, db = min(judged.rest.items(), key=lambda item: item[1] - USABLE_DB[item[0]])
        detail = f"SQNR of the {of} together, in dB"
        if judged.lost:
            detail += f", without {counted(len(judged.lost), 'tensor')} that are lost"
        if len(judged.broken) > 1:
            detail += f"; {len(judged.broken)} classes of tensors miss it"
        figure = db if math.isfinite(db) else None
        self.check("usable", not judged.broken, detail, worst=figure, limit=USABLE_DB[of])
        rows = {r.name: r for r in self.report.tensors}
        for broken in judged.broken:
            for name in broken.tensors:
                rows[name].fails.append("usable")
                self.needed[name] = max(self.needed.get(name, 0.0), broken.floor_db)

    def _remedy(self, name: str, needed_db: float) -> str:
        """The option of `quantize` that gives a tensor so many dB."""
        tensor = self.tensors[name]
        columns = self.stored[name].encoding.columns(tensor.shape)
        return remedy(self.model.kind, name, columns, 8 * tensor.nbytes / tensor.size, needed_db)

    def _compare_outputs(self, rows: list[VerifiedTensor]) -> None:
        """Warn where the activations, not the weights, spoil a product."""
        spoiled = [
            r
            for r in rows
            if r.integer_exact is not None
            and r.output_sqnr_db is not None
            and r.sqnr_db is not None
            and r.output_sqnr_db < r.sqnr_db - SPOILED_DB
        ]
        if spoiled:
            worst = min(spoiled, key=lambda r: r.output_sqnr_db or 0.0)
            self.report.warnings.append(
                f"8-bit activations spoil the products of {len(spoiled)} tensors: "
                f"'{worst.name}' has {worst.output_sqnr_db:.1f} dB with {worst.activations} "
                f"activations of {worst.inputs} inputs, its weights {worst.sqnr_db:.1f} dB"
            )

    def _casts(self, rows: list[VerifiedTensor]) -> None:
        cast = [r for r in rows if r.cast_exact is not None]
        if cast:
            detail = f"{len(cast)} tensors are the source's, rounded to their dtype"
            self._of_tensors("cast-exact", detail, [r for r in cast if not r.cast_exact])

    def _error_bound(self, rows: list[VerifiedTensor]) -> None:
        bounded = [r for r in rows if r.worst_step is not None and r.integer_exact is not None]
        steps = {
            r.name: r.worst_step
            for r in bounded
            if r.worst_step is not None and self.stored[r.name].rounding == NEAREST
        }
        others = len(bounded) - len(steps)
        if not steps:
            why = "no tensor has codes that were rounded to the nearest with its scales"
            self.skip("error-bound", why if others else NO_CODES)
            return
        detail = "largest error of an unclipped weight, in steps"
        if others:
            left = counted(others, "tensor")
            detail += f", without {left} whose codes are not the nearest with these scales"
        self._limit("error-bound", detail, steps, HALF_STEP, max)

    def _recorded(self, rows: list[VerifiedTensor]) -> None:
        """The errors that the header records are the ones measured."""
        noted = {r.name: error for r in rows if (error := self.stored[r.name].error)}
        if not noted:
            self.skip("recorded-error", "the file records no errors")
            return
        if self.trained:
            self.skip("recorded-error", "the file's are against trained weights, not the source's")
            return
        wrong = [r for r in rows if r.name in noted and not _agrees(r, noted[r.name])]
        self._of_tensors("recorded-error", f"errors of {len(noted)} tensors", wrong)

    def _limits(self, rows: list[VerifiedTensor]) -> None:
        """Hold every tensor against each limit that was given."""
        o = self.options
        lossy = {r.name: r.sqnr_db for r in rows if r.sqnr_db is not None}
        self._limit("min-sqnr", "lowest SQNR of a tensor, in dB", lossy, o.min_sqnr, min)
        nmse = {r.name: r.nmse for r in rows if r.nmse is not None}
        self._limit("max-nmse", "highest normalised squared error", nmse, o.max_nmse, max)
        outputs = {r.name: r.output_sqnr_db for r in rows if r.output_sqnr_db is not None}
        if o.min_output_sqnr is not None and all(r.inputs is None for r in rows):
            self.skip("min-output-sqnr", "the file has no tensor of codes")
            return
        if o.min_output_sqnr is not None:
            _refuse_unmeasured(rows)
        kinds = sorted({r.inputs for r in rows if r.inputs})
        detail = f"lowest SQNR of a product of {' and '.join(kinds)} inputs, in dB"
        self._limit("min-output-sqnr", detail, outputs, o.min_output_sqnr, min)

    def _stated_limits(self, limits: Limits, rows: list[VerifiedTensor]) -> None:
        """Hold the file and its tensors against a file of limits."""
        if any("min_output_sqnr_db" in of.limits for of in limits.tensors):
            _refuse_unmeasured(rows)
        by_name = {r.name: r for r in rows}
        for check, missing, key, limit in tensor_checks(limits, self.model, rows):
            self.report.checks.append(check)
            for row in (by_name[name] for name in missing if name in by_name):
                row.fails.append(check.id)
                self._need(row.name, key, limit)
        noted = read_provenance(self.model)
        self.report.checks += file_checks(limits, self.model, noted, self.report, self._bits)

    def _need(self, name: str, limit_of: str, limit: float) -> None:
        """Remember what SQNR a tensor needs that misses a limit."""
        if (db := _decibels(limit_of, limit)) is not None:
            self.needed[name] = max(self.needed.get(name, 0.0), db)

    def _limit(
        self,
        id: str,
        detail: str,
        figures: dict[str, float],
        limit: float | None,
        worst_of: Callable[..., str],
    ) -> None:
        """A check of figures by tensor: least ones (``min``) or largest ones (``max``) decide."""
        if limit is None:
            return
        if not figures:
            self.check(id, True, f"{detail}: nothing is lost", limit=limit)
            return
        # Not the other way round: a figure that is no number meets no limit.
        good = {n for n, f in figures.items() if (f >= limit if worst_of is min else f <= limit)}
        for row in self.report.tensors:
            if row.name in figures and row.name not in good:
                row.fails.append(id)
                self._need(row.name, id, limit)
        name = worst_of(figures, key=figures.__getitem__)
        failed = len(figures) - len(good)
        if failed > 1:
            detail = f"{detail}; {failed} of {len(figures)} tensors miss it"
        self.check(id, not failed, detail, worst=figures[name], limit=limit, tensor=name)


def _names_alike(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo]) -> str:
    """How many tensors of a file have their name in a source that has none of their shapes too."""
    names = len(found.keys() & wanted.keys())
    match = "name matches" if len(found) == 1 else "names match"
    return f"{names} of {len(found)} {match}{', but no shape,' if names else ''} those of"


def _decibels(of: str, limit: float) -> float | None:
    """The SQNR that a tensor needs for a limit; None where more bits are no help."""
    if of in ("max-nmse", "max_nmse"):
        return -10 * math.log10(limit) if limit > 0 else math.inf
    given = ("min-sqnr", "min-output-sqnr", "min_sqnr_db", "min_output_sqnr_db")
    return limit if of in given else None


def _refuse_unmeasured(rows: list[VerifiedTensor]) -> None:
    """Refuse a limit on products that are not known.

    Raises:
        UsageError: the activations of a tensor are static, and none of its inputs recorded.
    """
    blind = [r.name for r in rows if r.activations == "static" and r.inputs == "Gaussian"]
    if blind:
        raise UsageError(
            "a limit on products needs recorded inputs where activations are static",
            found=f"none for {len(blind)} tensors, such as '{blind[0]}'",
            hint="give them with --samples FILE, or measure with --activations dynamic",
        )


def _agrees(row: VerifiedTensor, noted: Mapping[str, Any]) -> bool:
    """Whether measured errors are those noted, to the six digits of a note."""
    measured = {"sqnr_db": row.sqnr_db, "nmse": row.nmse, "max": row.max_error}
    return all(
        found is None
        if (value := noted.get(key)) is None
        else isinstance(value, int | float)
        and found is not None
        and math.isclose(found, value, rel_tol=RECORDED, abs_tol=1e-300)
        for key, found in measured.items()
    )


def _narrow(weights: NDArray[Any], source: Model, tensor: TensorInfo) -> NDArray[np.float32]:
    """Weights of the source in float32.

    Raises:
        WeightError: NaN, Inf or beyond the range, which no file can be held against.
    """
    with np.errstate(over="ignore"):
        narrow: NDArray[np.float32] = weights.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise WeightError(
            "weights of the source are NaN, Inf or beyond binary32",
            path=source.path,
            tensor=tensor.name,
            hint="verify against the source that the file was made from",
        )
    return narrow


def _first_rows(
    model: Model, tensor: TensorInfo, path: Path, rows: int
) -> Iterator[NDArray[np.float32]]:
    taken = 0
    for batch in read_batches(model, tensor, path):
        yield batch
        taken += len(batch)
        if taken >= rows:
            return


def _db(signal: float, noise: float) -> float | None:
    """Signal to noise in dB; None without noise, minus infinity without signal."""
    if noise == 0:
        return None
    if not math.isfinite(noise):
        return float("-inf")
    return 10 * math.log10(signal / noise) if signal > 0 else float("-inf")


@np.errstate(over="ignore", invalid="ignore")  # products of huge weights are infinite, rightly
def _measure_rows(
    rows: Coded,
    weights: NDArray[np.float32] | None,
    x: NDArray[np.float32],
    a: Activations,
    tile: Tile,
    stored: Stored,
) -> _Sums:
    """Errors of a tile: of the weights, and of their product with activations ``x``, as bytes
    ``a``.
    """
    found = _Sums()
    found.finite = bool(np.isfinite(rows.values).all())
    dtype, columns = stored.encoding.name, stored.encoding.columns(stored.shape)
    if weights is not None:
        sums = kernels.error_sums(weights, rows.values)
        found.error = ErrorSums(weights.size, *sums)
        found.worst_step = rows.worst_step(weights)
        if rows.integers is None and dtype in CAST_NUMPY:
            promised = cast_values(weights, dtype)[1]
            found.cast = bool((promised.view(np.uint32) == rows.values.view(np.uint32)).all())
    first, column = divmod(tile.start, columns)
    span = slice(column, column + tile.columns)
    if rows.integers is None:
        if dtype not in DTYPES:
            found.product = "float"
            if weights is not None:
                found.compare(x[:, span], weights, x[:, span].astype(np.float64) @ rows.values.T)
        return found
    a = Activations(a.codes[:, span], a.scale, a.zero_point)
    found.product = "integer"
    product = kernels.integer_product(rows.integers, a, check=True)
    found.exact = bool(product.exact)
    if stored.encoding.multiplies and tile.columns == columns:
        # What runs is another kernel, on codes as they are packed: it has to give the same bits.
        packed = stored.encoding.product(stored, first, first + tile.rows, a)
        same = packed.view(np.uint32) == product.y.view(np.uint32)
        found.exact &= bool((same | (np.isnan(packed) & np.isnan(product.y))).all())
    inputs = a.values
    wide = rows.values.astype(np.float64)
    expected = inputs @ wide.T
    # Each group adds two binary32 roundings, relative to the sum of magnitudes.
    terms = 2 * len(rows.integers.spans()) + 4
    magnitude = np.abs(inputs) @ np.abs(wide).T + rows.integers.offset_magnitude(a)
    bound = magnitude * terms * 2.0**-24
    # Denormal scales and products round to multiples of 2^-149, not to 24 bits.
    bound += np.abs(a.scale)[:, None] * (1 + a.codes.shape[1]) * 255 * 128 * 2.0**-149 + 2.0**-149
    difference = np.where(np.isfinite(product.y), np.abs(product.y - expected), 0.0)
    may_overflow = magnitude / np.minimum(a.scale, 1)[:, None] > F32_MAX / 2
    difference[~np.isfinite(product.y) & ~may_overflow] = np.inf
    found.float_error = float((difference / bound).max(initial=0.0))
    if weights is not None:
        found.compare(x[:, span], weights, product.y)
    return found

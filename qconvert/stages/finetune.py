"""quantize --finetune: a first version of the output, which is run and tuned, and the output with
its codes, other scales of rows and other gains of norms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.file import Calibration
from qconvert.codecs.codec import Encoder, Outcome, Stored
from qconvert.codecs.raw import GainsEncoder
from qconvert.codecs.rescaled import PROVENANCE_KEY, TUNED, RescaledEncoder
from qconvert.errors import InputError, UnsupportedError
from qconvert.files import OpenModel, open_model
from qconvert.files.atomic import check_target, draft_directory
from qconvert.files.regular import file_sha256
from qconvert.kernels.records import F32, ErrorSums
from qconvert.model import Model
from qconvert.progress import Progress
from qconvert.report import Finetuning, QuantizedTensor, QuantizeReport
from qconvert.running.hugging_face import (
    Checkpoint,
    checked_config,
    model_class,
    open_checkpoint,
    require,
)
from qconvert.running.quantized_model import open_quantized
from qconvert.running.text import check_positions, token_chunks
from qconvert.running.tuning import BATCH, Tuning, tokens_run, tune
from qconvert.stages.conversion import Job
from qconvert.stages.norm_gains import find_norms
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.quantize_options import FinetuneOptions, QuantizeOptions
from qconvert.stages.rounding import Roundings
from qconvert.stages.row_places import find_places, rate_of
from qconvert.stages.target import Prepared

I64 = NDArray[np.int64]
HELD_OUT = 8  # one window of so many judges
MOST_HELD_OUT = 16


def check_source(source: Path, progress: Progress) -> None:
    """Refuse before the long work a model that cannot be run.

    Raises:
        InputError: it is no directory of a model that transformers runs.
        UnsupportedError: it predicts no next tokens.
        MachineError: torch or transformers is not installed.
    """
    config = checked_config(source)
    require("torch", "transformers", progress=progress)
    _, kind = model_class(config, source)
    if kind != "causal":
        raise UnsupportedError(
            "--finetune is for models that predict next tokens",
            path=source,
            found="an encoder",
            hint="leave out --finetune",
        )


def convert_tuned(
    source: Path,
    output: Path,
    prepared: Prepared,
    plain: Model,
    options: QuantizeOptions,
    calibration: Calibration | None,
    roundings: Roundings,
    report: QuantizeReport,
    progress: Progress,
) -> None:
    """Convert, tune, and write the output.

    Args:
        source: as given, what `check_source` has nothing against.
        output: its name, whole or in several files.

    Raises:
        UsageError: windows are longer than the model's positions.
        InputError: the text cannot be read or is too short.
    """
    assert options.finetune
    for path in prepared.outputs:  # what may not be replaced costs no time
        check_target(path, options.force, [prepared.model.path])
    imitated = open_checkpoint(source, threads=options.threads or available_threads())
    windows = _windows(imitated, options.finetune)
    rest = calibration, roundings
    with draft_directory(output) as directory:
        outputs = tuple(directory / path.name for path in prepared.outputs)
        draft = replace(prepared, outputs=outputs)
        said = replace(report, tensors=[], warnings=[], notes=[])
        quietly = replace(options, strict=False, hash_source=False)
        first = Job(draft, plain, quietly, *rest, said, progress)
        first.write(directory / output.name, interim=True)
        with closing(open_model(outputs[0])) as made:
            tuned = _tuned(imitated, made, prepared, options, windows, progress)
            report.finetuning = tuned.report
            report.notes += _notes(tuned.report)
            del imitated  # its memory
            rows = {row.name: row for row in said.tensors}
            known = replace(options, repair=None)  # which has been done
            job = _TunedJob(prepared, plain, known, *rest, report, progress)
            job.ahead = replace(first.ahead, encoders={})
            job.tuned, job.rows, job.windows = tuned, rows, windows
            job.made = {t.name: made.stored(t) for t in made.tensors}
            job.write(output)


@dataclass(frozen=True, slots=True)
class _Windows:
    training: I64
    held_out: I64


def _windows(source: Checkpoint, options: FinetuneOptions) -> _Windows:
    """Windows to train on, in an order that the seed decides, and others."""
    check_positions(source.text, options.seqlen)
    found = token_chunks(
        source.tokenizer, options.text, options.seqlen, options.nsamples, options.seed
    )
    if len(found) < 2:
        raise InputError(
            "the text is too short to tune by",
            path=options.text,
            found=f"1 window of {options.seqlen:,} tokens",
            wanted="at least 2, one of which judges",
            hint="give more text, or a smaller --seqlen",
            code="TEXT-SHORT",
        )
    order = np.random.default_rng(options.seed).permutation(len(found))
    count = max(1, min(len(found) // HELD_OUT, MOST_HELD_OUT))
    return _Windows(found[order[count:]], found[order[:count]])


@dataclass(frozen=True, slots=True)
class _Tuned:
    """Factors of the rows of tensors, and the bytes of gains, by the names in the output."""

    factors: Mapping[str, F32]
    gains: Mapping[str, bytes]
    report: Finetuning


def _tuned(
    source: Checkpoint,
    made: OpenModel,
    prepared: Prepared,
    options: QuantizeOptions,
    windows: _Windows,
    progress: Progress,
) -> _Tuned:
    """Run the first version, and tune it.

    Raises:
        UnsupportedError: what it predicts is not finite.
    """
    assert options.finetune
    steps = options.finetune.steps
    quantized = open_quantized(
        made.path, directory=source.path, threads=None, check=False, decoded=True
    ).checkpoint
    origins = {p.tensor.name: prepared.origin(p.tensor.name) for p in prepared.plan}
    coded = {p.tensor.name: origins[p.tensor.name] for p in prepared.plan if p.scheme}
    kept = {name: origin for name, origin in origins.items() if name not in coded}
    found, left = find_places(made, coded, quantized.model)
    norms, others = find_norms(made, kept, quantized.model)
    rate = rate_of([t for t in made.tensors if t.name in found])
    report = Finetuning(
        text=str(options.finetune.text),
        steps=steps,
        rate=rate,
        seqlen=options.finetune.seqlen,
        training_windows=min(steps * BATCH, len(windows.training)),
        held_out_windows=len(windows.held_out),
        left=left | others,
    )
    if not found and not norms:
        return _Tuned({}, {}, report)
    tokens = tokens_run(options.finetune.seqlen, windows.held_out.size, steps)
    progress.begin("tune scales", tokens, "tokens")
    modules = [place for place, _ in found.values()] + [norm.place for norm in norms.values()]
    done: Tuning = tune(
        *(source, quantized, modules, windows.training, windows.held_out, steps, rate),
        progress.advance,
    )
    progress.end()
    if not math.isfinite(done.before):
        raise UnsupportedError(
            "the quantized model predicts no numbers that could be tuned",
            path=source.path,
            found=f"a divergence of {done.before} on the held-out windows",
            hint="leave out --finetune, and look at the model with verify --text",
        )
    factors, gains = {}, {}
    if done.factors:
        gains = {name: norm.tuned(done.factors[norm.place]) for name, norm in norms.items()}
        factors = {name: done.factors[place][order] for name, (place, order) in found.items()}
    report.step, report.kl_before, report.kl = done.step, done.before, done.after
    report.tensors, report.norms = len(factors), len(gains)
    return _Tuned(factors, gains, report)


def _notes(tuned: Finetuning) -> list[str]:
    notes = []
    if tuned.kl_before is None:
        notes.append(
            "nothing was tuned: no tensor is the weight of one linear layer, or the gains of a norm"
        )
    elif not tuned.tensors and not tuned.norms:
        notes.append(
            "no step of --finetune was better on the held-out windows: scales stay as they were"
        )
    if tuned.norms:
        notes.append(
            f"the gains of {tuned.norms} norms were tuned beside the scales of rows: these tensors "
            "are kept in their dtype, but are not the source's bit for bit"
        )
    for why, count in Counter(tuned.left.values()).most_common():
        name = next(n for n, reason in tuned.left.items() if reason == why)
        which = f"'{name}' is" if count == 1 else f"{count} tensors, such as '{name}', are"
        notes.append(f"{which} not tuned: {why}")
    return notes


class _TunedJob(Job):
    """Writes the first version once more with other scales.

    Attributes:
        made: tensors of the first version.
        rows: what was reported of them.
        windows: that the text gave.
    """

    made: Mapping[str, Stored]
    windows: _Windows
    tuned: _Tuned
    rows: Mapping[str, QuantizedTensor]

    def _prepared(self, p: PlannedTensor, workers: Workers) -> Callable[[], Encoder]:
        if (gains := self.tuned.gains.get(p.tensor.name)) is not None:
            return partial(GainsEncoder, self.model, p.tensor, p.encoding, gains)
        if p.scheme is None:
            return super()._prepared(p, workers)
        return partial(self._rescaled, p)

    def _rescaled(self, p: PlannedTensor) -> Encoder:
        name = p.tensor.name
        row, stored = self.rows[name], self.made[name]
        layer = self.roundings.layers.get(name)
        squares = None
        if row.weighted and layer and self.calibration:
            columns = stored.encoding.columns(stored.shape)
            squares = self.calibration.mean_squares(layer, columns)
        factors, decision = self.tuned.factors.get(name), row.decision
        if factors is not None:
            decision = {"rounding": TUNED} | (decision or {})  # unless it was another
        said = Outcome(ErrorSums(), decision, row.clipped, row.weighted)
        return RescaledEncoder(self.model, p.tensor, stored, factors, said, squares)

    def _provenance(self, sources: list[Path]) -> dict[str, Any]:
        t, asked = self.tuned.report, self.options.finetune
        assert asked
        noted: dict[str, Any] = {
            "steps": t.steps,
            "step": t.step,
            "seed": asked.seed,
            "seqlen": t.seqlen,
            "nsamples": len(self.windows.training) + len(self.windows.held_out),
            "text_sha256": file_sha256(asked.text),
            "tensors": [*self.tuned.factors, *self.tuned.gains],
        }
        if t.kl is not None and t.kl_before is not None:
            noted["held_out_kl"] = [float(f"{kl:.6g}") for kl in (t.kl_before, t.kl)]
        return super()._provenance(sources) | {PROVENANCE_KEY: noted}

"""tune of a quantized file: codes stay; scales, zero points and gains of norms are trained, or
low-rank adapters beside it.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.codecs.raw import RawEncoding
from qconvert.codecs.rescaled import PROVENANCE_KEY, tuned_tensors
from qconvert.containers import CONTAINERS
from qconvert.errors import UnsupportedError, UsageError, about
from qconvert.files import open_model
from qconvert.files.atomic import AtomicOutput, check_directory, check_target, draft_directory
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_rewrite import write_changed
from qconvert.files.regular import file_sha256
from qconvert.files.safetensors import open_safetensors
from qconvert.files.saved_state import SavedState
from qconvert.kernels.records import Bytes
from qconvert.model import TensorInfo
from qconvert.progress import Progress, Silent
from qconvert.quantities import size
from qconvert.report import TuneReport
from qconvert.running.device import chosen_device, device_of
from qconvert.running.hugging_face import CONFIG, checked_config, language_fields
from qconvert.running.quality import BATCH_TOKENS
from qconvert.running.quantized_model import open_quantized
from qconvert.schemes import parse_scheme
from qconvert.stages.norm_gains import find_norms
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import PlanOptions
from qconvert.stages.row_places import find_places, rate_of
from qconvert.training.adapters import LowRank, write_adapter
from qconvert.training.judging import FLOAT, QUANTIZED, TUNED, WRITTEN, check_disk
from qconvert.training.judging import noted as noted_figures
from qconvert.training.loop import Student
from qconvert.training.memory import LIBRARIES, VALUE, check_memory, token_values
from qconvert.training.modules import WeightHook
from qconvert.training.options import ADAPTERS, TuneOptions
from qconvert.training.preparation import Training
from qconvert.training.run import (
    Run,
    asked_of,
    begun,
    check_numbers,
    check_resumed,
    report_of,
    train_and_judge,
)
from qconvert.training.saving import check_directory_name
from qconvert.training.scales import TunedGains, TunedScales
from qconvert.training.state import COPIES

DECODED_COPIES = 3  # of a weight: the running model's, the decoded one, and its gradient


@dataclass(slots=True)
class _Parts:
    """What is trained: by the names of the tensors, its place in the running model, and itself.

    Attributes:
        rescaled: what is written into the file; empty where there are adapters.
        adapters: what is written beside it.
    """

    rescaled: dict[str, tuple[str, TunedScales | TunedGains]] = field(default_factory=dict)
    adapters: dict[str, tuple[str, LowRank]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rescaled) + len(self.adapters)


def tune_file(source: Path, options: TuneOptions, progress: Progress | None = None) -> TuneReport:
    """Train the scales of a .qblk file, and write it with the same codes, or as it was where that
    is better; or train adapters for it, and write them where they are a gain.

    Raises:
        UsageError: options that do not go with a quantized file.
        InputError: the file, the teacher or the text cannot be used.
        MachineError: the output cannot be written, or memory does not suffice.
        Stopped: a signal arrived; what was done so far is kept.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    inputs = [path for path in (source, options.text, options.teacher) if path]
    adapters = options.trained == ADAPTERS
    (check_directory if adapters else check_target)(options.output, options.force, inputs)
    state = SavedState(options.output, inputs, "steps", options.save_seconds, "TUNE")
    state.check(resume=options.resume, force=options.force)
    with about(source), closing(open_model(source)) as model:
        if adapters:
            check_directory_name(options.output, "adapters become a directory, as peft has them")
        named = adapters or options.output.suffix.lower() == ".qblk"
        if not isinstance(model, QblkModel) or not named:
            raise UnsupportedError(
                "tune of a quantized file takes a .qblk file and writes one",
                path=source if not isinstance(model, QblkModel) else options.output,
                hint="for GGUF files: quantize --finetune, from the float model",
            )
        model.check_payload(lambda _: None)
        needed, kept = _needed(model, options)
        check_memory(needed)
        # Beside the output from now on, as `tune` has it.
        with draft_directory(options.output):
            check_disk(state, kept)
            progress.begin(
                f"load the model; tuning takes about {size(needed)} of memory, and up to "
                f"{size(WRITTEN * kept)} beside the output for what is done so far",
                *(1, "model"),
            )
            run = _Run(source, options, progress)
            progress.end()
            report = report_of(source, CONTAINERS["qblk"], run, needed)
            report.state_bytes, report.scheme = kept, _schemes(model)
            asked = asked_of(run)
            check_resumed(state, options, asked)
            found = {}
            if run.teacher_given:
                found[FLOAT] = run.scores(run.reference, run.split.judging, "judge the teacher")
            parts = _parts(model, run, report)
            rates = _rates(model, parts, options)
            student = _student(run, parts)
            found[QUANTIZED] = run.scores(
                student.checkpoint, run.split.judging, "judge the file as it is"
            )
            check_numbers(run, found[QUANTIZED])
            at = begun(run, report, found, rates, student, asked, state)
            with state.kept():
                train_and_judge(run, report, at, state, (QUANTIZED,))
                if options.strict and report.warnings:
                    report.status = "fail"
                else:
                    (_write_adapter if adapters else _write)(model, run, report, parts)
                state.remove()
    report.seconds = time.perf_counter() - started
    return report


class _Run(Run):
    """See `Run`; the model is that of the file, decoded.

    Attributes:
        teacher_given: whether there is another model than the file's.
    """

    def __init__(self, source: Path, options: TuneOptions, progress: Progress) -> None:
        threads = options.threads or available_threads()
        opened = open_quantized(source, threads=threads, check=False, decoded=True)
        loaded = replace(opened.checkpoint, path=source)
        loaded.model.to(chosen_device(options.device))
        if loaded.kind != "causal":
            raise UnsupportedError(
                "tune of a file is for models that predict next tokens",
                path=source,
                found="an encoder",
            )
        super().__init__(source, options, progress, loaded)
        self.teacher_given = options.teacher is not None
        if not self.teacher_given:  # held against itself as it was
            self.reference = replace(loaded, model=copy.deepcopy(loaded.model))


def _needed(model: QblkModel, o: TuneOptions) -> tuple[int, int]:
    """Memory that all of it takes, and bytes of its state, about and at most."""
    config: dict[str, Any] = {}
    for companion in model.companions:
        if companion.name == CONFIG:
            config = language_fields(json.loads(companion.read()))
    values = sum(t.size for t in model.tensors)
    of_teacher = values
    if o.teacher:
        checked_config(o.teacher)
        with open_safetensors(o.teacher) as teacher:
            of_teacher = sum(t.size for t in teacher.tensors)
    moving = 0
    for t in model.tensors:
        encoding = model.stored(t).encoding
        raw = isinstance(encoding, RawEncoding)
        if o.trained == ADAPTERS:
            moving += 0 if raw or len(t.shape) != 2 else LowRank.size(t.shape, o.rank)
        elif raw and len(t.shape) == 1 and o.trained != "scales":
            moving += t.size
        elif not raw and o.trained != "norms":
            moving += sum(TunedScales.sizes(encoding, t.shape))
    tokens = o.seqlen * max(1, min(o.batch, BATCH_TOKENS // o.seqlen))
    memory = VALUE * (DECODED_COPIES * values + of_teacher + (COPIES + 1) * moving)
    memory += sum(t.nbytes for t in model.tensors) + VALUE * tokens * token_values(config)
    return LIBRARIES + memory, VALUE * COPIES * moving


def _schemes(model: QblkModel) -> str:
    """The schemes of a file, the one of most values first."""
    sizes: Counter[str] = Counter()
    for t in model.tensors:
        if not isinstance(model.stored(t).encoding, RawEncoding):
            sizes[t.dtype] += t.size
    return ", ".join(name for name, _ in sizes.most_common())


def _parts(model: QblkModel, run: Run, report: TuneReport) -> _Parts:
    """What is trained.

    Raises:
        UsageError: there is nothing.
    """
    o = run.options
    names = {t.name: t for t in model.tensors}
    globs = PlanOptions(keep=o.keep)
    for glob in o.keep:
        if not any(globs.matches(t, glob) for t in model.tensors):
            raise UsageError(f"--keep: no tensor matches '{glob}'")
    free = [t for t in model.tensors if not any(globs.matches(t, glob) for glob in o.keep)]
    kept = {t.name for t in free if isinstance(model.stored(t).encoding, RawEncoding)}
    draw = torch.Generator().manual_seed(o.seed)
    found = _Parts()
    left: dict[str, str] = {}
    device = device_of(run.loaded.model)
    if o.trained != "norms":
        coded = {t.name: t.name for t in free if t.name not in kept}
        places, left = find_places(model, coded, run.loaded.model)
        for name, (place, order) in places.items():
            if not np.array_equal(order, np.arange(len(order))):
                left[name] = "its rows have another order in the running model"
                continue
            stored = model.stored(names[name])
            if o.trained == ADAPTERS:
                found.adapters[name] = place, LowRank(stored, o.rank, draw, device)
            else:
                found.rescaled[name] = place, TunedScales(stored, device)
    if o.trained not in ("scales", ADAPTERS):
        norms, others = find_norms(model, {name: name for name in kept}, run.loaded.model)
        left |= others
        for name, norm in norms.items():
            found.rescaled[name] = norm.place, TunedGains(norm, device)
    for why, count in Counter(left.values()).most_common():
        name = next(n for n, reason in left.items() if reason == why)
        which = f"'{name}' is" if count == 1 else f"{count} tensors, such as '{name}', are"
        report.notes.append(f"{which} not tuned: {why}")
    if not found:
        raise UsageError(
            f"--train {o.trained}: the file has nothing of that kind to train",
            found="; ".join(sorted(set(left.values()))) or "no such tensor",
            hint="qconvert inspect shows what it has",
        )
    report.trained_tensors = len(found)
    return found


def _rates(model: QblkModel, parts: _Parts, o: TuneOptions) -> dict[str, float]:
    """Of logarithms of factors, zero points moving as far as scales move the weights; and of
    adapters.
    """
    coded: list[TensorInfo] = [
        t
        for t in model.tensors
        if t.name in parts.rescaled and isinstance(parts.rescaled[t.name][1], TunedScales)
    ]
    rate = o.rate if o.rate is not None else rate_of(coded or model.tensors)
    found: dict[str, float] = {}
    for name, (_, part) in parts.rescaled.items():
        found |= {f"{name}/{kind}": rate * part.unit(kind) for kind in part.parameters()}
    for name, (_, low) in parts.adapters.items():
        each = low.rate if o.rate is None else o.rate
        found |= {f"{name}/{kind}": each for kind in low.parameters()}
    return found


def _student(run: Run, parts: _Parts) -> Student:
    """The file's model, which computes with what is trained."""
    model = run.loaded.model.eval()
    parameters: dict[str, torch.Tensor] = {}
    for name, (place, part) in parts.rescaled.items():
        WeightHook(part, "weight").attach(model.get_submodule(place))
        parameters |= {f"{name}/{kind}": p for kind, p in part.parameters().items()}
    for name, (place, low) in parts.adapters.items():
        low.attach(model.get_submodule(place))
        parameters |= {f"{name}/{kind}": p for kind, p in low.parameters().items()}
    nothing = Training(parse_scheme("keep"), PlanOptions(), (), {}, {})  # type: ignore[arg-type]
    return Student(replace(run.loaded, model=model), nothing, parameters)


def _write(model: QblkModel, run: Run, report: TuneReport, parts: _Parts) -> None:
    """Write the file that was chosen: with other scales, or a copy."""
    o = run.options
    model.check_unchanged()
    changed: dict[str, dict[str, Bytes]] = {}
    provenance = dict(model.header.provenance)
    if report.chosen == TUNED:
        changed = {name: dict(part.segments()) for name, (_, part) in parts.rescaled.items()}
        provenance[PROVENANCE_KEY] = _noted(model, run, report, sorted(changed))
    with AtomicOutput(o.output, overwrite=o.force, inputs=[run.source, o.text]) as out:
        report.output_bytes = write_changed(model, out, changed, provenance)
        out.commit()
    report.written = True
    coded = sum(t.nbytes for t in model.tensors)
    report.model_bits_per_weight = 8 * coded / sum(t.size for t in model.tensors)


def _write_adapter(model: QblkModel, run: Run, report: TuneReport, parts: _Parts) -> None:
    """Write the adapters, if they are a gain."""
    o = run.options
    if report.chosen != TUNED:
        return
    model.check_unchanged()
    report.output_bytes = write_adapter(
        o.output,
        dict(parts.adapters.values()),
        (o.teacher or run.source).name,
        noted={"quantized": file_sha256(run.source), **_training(run, report)},
        overwrite=o.force,
        inputs=[run.source, o.text],
    )
    report.written = True


def _noted(model: QblkModel, run: Run, report: TuneReport, names: list[str]) -> dict[str, Any]:
    """What the provenance says, beside what it said of an earlier training."""
    before = model.header.provenance.get(PROVENANCE_KEY)
    earlier = dict(before) if isinstance(before, dict) else {}
    tensors = sorted({*names, *tuned_tensors(model.header.provenance)})
    return earlier | {"scales_of": run.source.name, **_training(run, report), "tensors": tensors}


def _training(run: Run, report: TuneReport) -> dict[str, Any]:
    """How it was trained, and what came of it."""
    o = run.options
    noted: dict[str, Any] = {
        "loss": o.loss,
        "teacher": o.teacher.name if o.teacher else None,
        "steps": o.steps,
        "step": report.step,
        "rate": o.rate,
        "seed": o.seed,
        "seqlen": o.seqlen,
        "batch": o.batch,
        "text_sha256": file_sha256(o.text),
        "judged": noted_figures(report.models),
    }
    return {k: v for k, v in noted.items() if v is not None}

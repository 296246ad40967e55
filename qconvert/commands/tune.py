"""`qconvert.tune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qconvert.commands.arguments import (
    as_assignments,
    as_float,
    as_path,
    as_texts,
    check_bounds,
    parse_tensor_scheme,
)
from qconvert.errors import UsageError
from qconvert.progress import Progress
from qconvert.report import TuneReport
from qconvert.running.device import CPU, check_device
from qconvert.running.hugging_face import require
from qconvert.running.text import DEFAULT_SEQLEN
from qconvert.schemes import parse_scheme
from qconvert.training.options import (
    ACTIVATIONS,
    BATCH,
    FEWEST_WINDOWS,
    LOSSES,
    MOST_RANK,
    PARTS,
    PARTS_OF_FILES,
    RANK,
    STEPS,
    TuneOptions,
)
from qconvert.training.weights import check_trainable


def tune(
    model: Path | str,
    *,
    scheme: str | None = None,
    text: Path | str,
    output: Path | str,
    steps: int = STEPS,
    blocks: int = 0,
    lr: float | None = None,
    seqlen: int | None = None,
    batch: int = BATCH,
    seed: int = 0,
    nsamples: int | None = None,
    generate: int | None = None,
    loss: str = LOSSES[0],
    teacher: Path | str | None = None,
    train: str = PARTS[0],
    rank: int = RANK,
    activations: str = ACTIVATIONS[0],
    calibration: Path | str | None = None,
    keep: str | Iterable[str] | None = None,
    tensor_scheme: Mapping[str, str] | str | Iterable[str] | None = None,
    floats: bool = False,
    resume: bool = False,
    threads: int | None = None,
    device: str | None = None,
    anyway: bool = False,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> TuneReport:
    """Train a model with the grid of a scheme in place (quantization-aware training), and write it.

    The model computes with the weights that its file will have, and learns to predict next tokens
    with them. What came of it is judged on a part of the text that was not trained on; where
    quantization without training is better, its result is written.

    >>> report = qconvert.tune(
    ...     "samples/tiny-llama",
    ...     scheme="c2_block16",
    ...     text="samples/calibration.txt",
    ...     output="model.qblk",
    ...     steps=2,
    ...     batch=1,
    ...     seqlen=32,
    ...     nsamples=4,
    ... )
    >>> report
    <TuneReport pass: 'model.qblk', c2_block16, tuned after 2 steps, ... bytes>
    >>> [m.model for m in report.models]
    ['float', 'nearest', 'tuned']

    Args:
        model: a directory that transformers runs, of a causal language model, or of an encoder,
            whose embeddings of the lines of the text are learned. It is twice in memory as float32,
            and what is trained four times more. Or a .qblk file of a causal language model: its
            codes stay, and its scales, zero points and gains of norms are trained.
        scheme: one grid for each tensor, such as ``c2_block16``, ``q4_block64`` or ``q4_0``; of a
            directory only.
        text: a UTF-8 file: a tenth of its windows, at most 16, chooses the state that is kept, as
            many judge it, and the others are trained on.
        output: a name that ends in .qblk, or in .gguf for a scheme of ggml's; of adapters a
            directory.
        steps: at most so many; fewer where the model gets no better. With ``blocks`` also 0.
        blocks: before that, so many steps for each block of the model by itself, one after the
            other: it learns the hidden states that the float model has behind it, with gradients
            for that block alone. With ``train="scales"`` memory for gradients is then that of one
            block, as in EfficientQAT.
        lr: learning rate of the weights, ten times which norms have. By default a share of each
            tensor's rounding error. Of a file: of the logarithms of scales and gains.
        seqlen: tokens of a window, 256 by default.
        batch: windows, or lines, of a step.
        seed: of the windows that are drawn, of what they are for, and of their order.
        nsamples: windows that are drawn; all by default.
        generate: windows that the float model writes itself, each from a beginning in the text on,
            and that are trained on among those of the text. By default as many as the text
            is short of for no window to be seen twice, and half of all at most; 0 for none. With a
            calibration, which may have seen the text, as many more choose the state and judge it.
        loss: ``distill`` for the divergence from the teacher, ``lm`` for the next tokens of the
            text.
        teacher: another model of the same vocabulary whose predictions are learned; by default the
            model's own as floats.
        train: ``weights`` that are quantized, ``scales`` and zero points of codes that stay,
            ``norms``, or ``all``: weights and norms, of a file, whose codes stay, scales and norms.
            Of a file also ``adapters``: low-rank corrections of its linear layers (LoRA), which
            become a directory as peft has it, for the float model.
        rank: of adapters.
        activations: how linear layers take their inputs: ``none`` as floats, ``dynamic`` as bytes
            with a scale for each row, ``static`` as bytes with one scale and zero point, which are
            found on the way and go into the file.
        calibration: with Gram matrices: what quantization without training makes of it, with codes
            that are aimed at the float model's outputs, is what training begins with and has to
            beat.
        keep: keep tensors that match this glob, or one of these, as they are, untrained.
        tensor_scheme: another scheme for tensors that match a glob: ``{glob: scheme}``, or texts
            ``"GLOB=SCHEME"``; the first match wins.
        floats: write a model directory of float32 weights that lie on the grid, for whatever runs
            the model, or quantizes it to the same codes.
        resume: go on where an interrupted run has stopped.
        threads: all available processors by default. Another number may give other bytes.
        device: that torch runs the models on: ``cpu``, the default, ``cuda``, ``cuda:N``, ``mps``
            or ``auto``. Quantization itself runs on the CPU. The same seed gives the same bytes
            again on the CPU alone.
        anyway: write the tuned model even where it is not better.
        force: replace an existing output.
        strict: a warning makes the report's status ``fail``, and nothing is written.
        progress: is told of the steps of long work.

    Raises:
        InputError: the model, the teacher, the text or the calibration cannot be used.
        UsageError: options contradict each other or the model.
        MachineError: torch or transformers is not installed, memory does not suffice, or the output
            cannot be written; OutputExistsError: it exists.
        Stopped: an interrupt arrived; what was done is kept, and ``resume`` goes on from there.
    """
    for name, number, least in (
        ("--steps", steps, 0 if blocks else 1),
        ("--blocks", blocks, 0),
        ("--seqlen", seqlen, 4),
        ("--batch", batch, 1),
        ("--seed", seed, 0),
        ("--nsamples", nsamples, FEWEST_WINDOWS),
        ("--generate", generate, 0),
        ("--threads", threads, 1),
    ):
        check_bounds(name, number, least)
    if not 1 <= rank <= MOST_RANK:
        raise UsageError("--rank", found=rank, wanted=f"a number from 1 to {MOST_RANK:,}")
    is_file = Path(model).is_file()
    if lr is not None and not 0 < lr <= 1:
        raise UsageError("--lr", found=lr, wanted="a number above 0, at most 1")
    for name, word, known in (
        ("--loss", loss, LOSSES),
        ("--train", train, PARTS_OF_FILES if is_file else PARTS),
        ("--activations", activations, ACTIVATIONS),
    ):
        if word not in known:
            raise UsageError(name, found=word, wanted=", ".join(known))
    if teacher is not None and loss != LOSSES[0]:
        raise UsageError("--teacher goes with --loss distill")
    if generate and loss != LOSSES[0]:
        raise UsageError("--generate goes with --loss distill")
    if is_file:
        _check_file(scheme, tensor_scheme, calibration, blocks, activations, floats, loss, teacher)
    elif scheme is None:
        raise UsageError("--scheme is missing", hint="such as --scheme c3_block16")
    others = map(parse_tensor_scheme, as_assignments(tensor_scheme))
    options = TuneOptions(
        scheme=check_trainable(parse_scheme(scheme)) if scheme else None,
        text=Path(text),
        output=Path(output),
        steps=steps,
        blocks=blocks,
        rate=as_float(lr),
        seqlen=DEFAULT_SEQLEN if seqlen is None else seqlen,
        batch=batch,
        seed=seed,
        nsamples=nsamples,
        generated=generate,
        loss=loss,
        teacher=as_path(teacher),
        trained=train,
        rank=rank,
        activations=activations,
        calibration=as_path(calibration),
        keep=as_texts(keep),
        tensor_schemes=tuple((glob, check_trainable(other)) for glob, other in others),
        floats=floats,
        resume=resume,
        threads=threads,
        device=check_device(device or CPU),
        anyway=anyway,
        force=force,
        strict=strict,
    )
    require("torch", "transformers", progress=progress)
    if is_file:
        from qconvert.training.tune_file import tune_file as stage  # which imports them
    else:
        from qconvert.training.tune import tune as stage
    return stage(Path(model), options, progress).judged(strict)


def _check_file(
    scheme: object,
    tensor_scheme: object,
    calibration: object,
    blocks: int,
    activations: str,
    floats: bool,
    loss: str,
    teacher: object,
) -> None:
    """Refuse what has no meaning for a file that is quantized already."""
    given = {
        "--scheme": scheme,
        "--tensor-scheme": tensor_scheme,
        "--calibration": calibration,
        "--blocks": blocks,
        "--activations": activations if activations != ACTIVATIONS[0] else None,
        "--float": floats,
    }
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{name} does not go with a file that is quantized already",
                hint="its codes stay as they are; give the directory of the float model for others",
            )
    if loss == LOSSES[0] and teacher is None:
        raise UsageError(
            "a quantized file has no float model to learn from",
            wanted="--teacher MODEL, the directory that it was made of",
            hint="or --loss lm, to learn the next tokens of the text",
        )

"""The commands: signatures and help. Each body imports its stage, calls it and emits the report."""

from __future__ import annotations

import textwrap
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qconvert import __version__
from qconvert.cli import completion
from qconvert.cli.colour import MODES
from qconvert.cli.completion import SORTS
from qconvert.cli.once import OnceCommand
from qconvert.containers import WRITTEN
from qconvert.errors import UsageError
from qconvert.schemes import SCHEME_GRAMMAR
from qconvert.words import words_text

app = typer.Typer(
    name="qconvert",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_FORMATS = tuple(c.name for c in WRITTEN)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="safetensors file or model directory")]
Json = Annotated[bool, typer.Option("--json", help="print the report as one JSON object")]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="also write the report as JSON to FILE"),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="also write the report as a page for a browser to FILE"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no warnings on stderr")]
Color = Annotated[
    str,
    typer.Option(
        "--color",
        metavar="auto|always|never",
        help="colours: auto for terminals, unless NO_COLOR is set [auto]",
        autocompletion=completion.among(*MODES),
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks of errors")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, metavar="N", help="default: all available processors"),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="that torch runs the model on: cpu, cuda, cuda:N, mps or auto; bytes may differ "
        "between devices [cpu]",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="replace existing outputs; reports of a run like this one always are"
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="a warning is a failure: exit code 1, no output")
]
SchemeName = Annotated[
    str, typer.Option("--scheme", metavar="NAME", help=f"one of: {SCHEME_GRAMMAR}")
]


@app.callback(
    invoke_without_command=True,
    epilog=f"\b\nWords:\n{textwrap.indent(words_text(76), '  ')}",
)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Convert model weights to quantized files, and prove the result.

    \b
    Examples:
      qconvert inspect model.safetensors
      qconvert quantize model.safetensors --scheme q4_block64 -o model.qblk
      qconvert verify model.qblk --against model.safetensors --min-sqnr 18

    \b
    Exit codes:
      0 done, every check asked for holds   4 the machine refused (disk full, ...)
      1 the answer is no                    70 a bug in qconvert
      2 the command line is wrong           130, 143, 141 interrupted, terminated,
      3 an input cannot be used             reader of stdout gone

    \b
    Environment: QCONVERT_KERNELS=native|reference, NO_COLOR, TERM,
    QCONVERT_DEBUG=1 (tracebacks)
    """
    if version:
        typer.echo(f"qconvert {__version__}")
        raise typer.Exit


@app.command(cls=OnceCommand)
def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="safetensors, GGUF or qblk file, or directory")
    ],
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor",
            metavar="TEXT",
            help="only tensors with this in their names, with histograms; a glob where it has "
            "wildcards; repeatable",
        ),
    ] = None,
    scheme: Annotated[
        str, typer.Option("--scheme", metavar="NAME", help="suggest symmetric or asymmetric for it")
    ] = "q4_block64",
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="names, shapes and sizes; reads no weights")
    ] = False,
    bins: Annotated[
        int, typer.Option("--bins", min=2, max=200, metavar="N", help="bins of a histogram")
    ] = 32,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="COLUMN",
            help=f"the largest, or worst, first: {', '.join(SORTS[:-1])} or {SORTS[-1]}",
            autocompletion=completion.among(*SORTS),
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, metavar="N", help="so many tensors alone")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="layer|role",
            help="a line for all of a layer, or of a role",
            autocompletion=completion.among("layer", "role"),
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OTHER",
            help="what is different in another file, of any kind: a second quantization, a "
            "fine-tune, the result",
        ),
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="print tensors and all their figures as CSV")
    ] = False,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="what files of all sizes, and of each scheme, lose: SQNR, and with --calibration "
            "made with --fisher the predicted divergence",
        ),
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="of --curve")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="of --curve, in place of --calibration: run MODEL over this text (needs "
            "qconvert[hf])",
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option("--nsamples", min=1, metavar="N", help="windows of --text, drawn [all]"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="qblk|gguf", help="of --curve: container [qblk]"),
    ] = None,
    sensitivities: Annotated[
        Path | None,
        typer.Option(
            "--sensitivities",
            metavar="FILE",
            help="of --curve: what each tensor loses under each scheme; read if it is there, else "
            "measured and written",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    report: ReportFile = None,
    html: Html = None,
    force: Force = False,
    strict: Strict = False,
    color: Color = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Show tensors, statistics, histograms, and the scheme that would suit each.

    \b
    Examples:
      qconvert inspect model.safetensors
      qconvert inspect model.safetensors --tensor layers.0.self_attn
      qconvert inspect model-dir --sort kurtosis --top 5
      qconvert inspect model-dir --by role
      qconvert inspect model-dir --csv > tensors.csv
      qconvert inspect model-dir --compare model.gguf
      qconvert inspect model.q4_block64.qblk --headers-only --json | jq .total_bytes
      qconvert inspect model-dir --curve
      qconvert inspect model-dir --curve --calibration fisher.safetensors
    """
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.text.inspect import inspect_text
    from qconvert.cli.text.inspect_csv import inspect_csv
    from qconvert.commands.inspect import inspect as command

    if csv and (json or curve or by or compare):
        raise UsageError("--csv prints tensors: it goes without --json, --curve, --by, --compare")
    inputs = [path for path in (model, compare, text) if path]
    with Emitter(
        Run("inspect", model), json, report, force, quiet, strict, inputs, html
    ) as emitter:
        done = command(
            model,
            tensor=tensor,
            scheme=scheme,
            headers_only=headers_only,
            bins=bins,
            histograms=html is not None,
            sort=sort,
            top=top,
            by=by,
            compare=compare,
            calibration=calibration,
            text=text,
            nsamples=nsamples,
            curve=curve,
            format=format,
            sensitivities=sensitivities,
            threads=threads,
            strict=strict,
            progress=emitter.progress,
        )
        return emitter.emit(
            done,
            inspect_csv if csv else partial(inspect_text, histograms=bool(tensor)),
            data=csv,
        )


@app.command(cls=OnceCommand)
def calibrate(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="calibration file")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="run the model over this text; repeatable"),
    ] = None,
    activations: Annotated[
        list[Path] | None,
        typer.Option(
            "--activations",
            metavar="FILE",
            help="safetensors file of (samples, features) arrays named like layers; repeatable",
        ),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", metavar="FILE", help="join calibrations of this model; repeatable"),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(
            "--observer",
            metavar="NAME",
            help="minmax, ema, percentile, mse, entropy or nmse: least relative error of a layer's "
            "output, row by row [nmse]",
            autocompletion=completion.observers,
        ),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option("--percentile", metavar="P", help="of the percentile observer [99.99]"),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option("--momentum", metavar="M", help="of the moving average, ema [0.9]"),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="zero point 0; scales of the larger end / 127")
    ] = False,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            metavar="N",
            help="tokens of a window; for encoders, the most of a line [256]",
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option("--nsamples", metavar="N", help="windows or lines of each text [all]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="of the draw of --nsamples and of the labels of --fisher [0]",
        ),
    ] = None,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="static ranges of the layers' outputs too")
    ] = False,
    gram: Annotated[
        bool,
        typer.Option(
            "--gram", help="also keep X^T X of each input, for error-compensated rounding; large"
        ),
    ] = False,
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher",
            help="also keep how much errors of each weight matter, by a backward pass: for budgets "
            "of quantize; with --gram also what compensated rounding makes of it",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where an interrupted run has stopped")
    ] = False,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix", metavar="FILE", help="also write an importance matrix for llama-quantize"
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", metavar="DIR", help="also keep 64 rows of each input, for verify --samples"
        ),
    ] = None,
    threads: Threads = None,
    device: Device = None,
    json: Json = False,
    report: ReportFile = None,
    html: Html = None,
    force: Force = False,
    strict: Strict = False,
    color: Color = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Find static scales and zero points of what enters each layer.

    Either run the model over text (needs torch and transformers: pip install '.[hf]'; MODEL
    is a directory with config and tokenizer), or take recorded activations, or merge calibrations.

    What is done is kept beside the output every few seconds and on Ctrl-C (at the next piece of
    text; a second one stops at once); the same command with --resume goes on from there.

    \b
    Examples:
      qconvert calibrate model-directory --text corpus.txt --nsamples 128 -o calibration.safetensors
      qconvert calibrate model-directory --text corpus.txt --imatrix model.imatrix.gguf \\
          --observer entropy -o calibration.safetensors
      qconvert calibrate model.safetensors --activations acts.safetensors -o calibration.safetensors
      qconvert calibrate model-directory --merge a.safetensors --merge b.safetensors \\
          -o calibration.safetensors
    """
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.text.calibrate import calibrate_text
    from qconvert.commands.calibrate import calibrate as command

    inputs = [model, *(text or ()), *(activations or ()), *(merge or ())]
    with Emitter(
        Run("calibrate", model), json, report, force, quiet, strict, inputs, html
    ) as emitter:
        done = command(
            model,
            output=output,
            text=text,
            activations=activations,
            merge=merge,
            observer=observer,
            percentile=percentile,
            momentum=momentum,
            symmetric=symmetric,
            seqlen=seqlen,
            nsamples=nsamples,
            seed=seed,
            outputs=outputs,
            gram=gram,
            fisher=fisher,
            resume=resume,
            imatrix=imatrix,
            record=record,
            threads=threads,
            device=device,
            force=force,
            strict=strict,
            progress=emitter.progress,
        )
        return emitter.emit(done, calibrate_text)


@app.command(cls=OnceCommand)
def quantize(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="safetensors file or model directory"),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            metavar="NAME",
            help=f"one of: {SCHEME_GRAMMAR}; a budget takes its place; several write a file each",
            autocompletion=completion.schemes,
        ),
    ] = None,
    list_schemes: Annotated[
        bool,
        typer.Option(
            "--list-schemes",
            help="show every scheme, its bits, what runs it and what it is for; takes no MODEL",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help=".qblk or .gguf file, or a directory [MODEL.SCHEME.qblk, MODEL-SCHEME ...]; of "
            "several schemes where their files go",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"container, where name and scheme do not say: {', '.join(_FORMATS)}",
        ),
    ] = None,
    range: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="METHOD",
            help="minmax, percentile or mse (least squared error) [mse up to 6 bits, else minmax]",
            autocompletion=completion.among("minmax", "percentile", "mse"),
        ),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option("--percentile", metavar="P", help="of --range percentile [99.99]"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="weigh errors by the mean squares of the inputs, store static activation "
            "parameters",
        ),
    ] = None,
    no_weighting: Annotated[
        bool,
        typer.Option("--no-weighting", help="of a calibration take the static parameters alone"),
    ] = False,
    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            metavar="nearest|compensated",
            help="compensated: codes make up for each other's errors, by the Gram matrices of the "
            "calibration [where it has them]",
            autocompletion=completion.among("nearest", "compensated"),
        ),
    ] = None,
    equalise: Annotated[
        str | None,
        typer.Option(
            "--equalise",
            metavar="auto|off",
            help="auto: rescale channels between tensors by powers of two where that leaves "
            "clearly less error; the model's function stays the same [auto]",
            autocompletion=completion.among("auto", "off"),
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="run MODEL over this text while it is quantized, and aim each compensated tensor "
            "at its float outputs on the inputs that the tensors before it now give; the "
            "calibration's text will do, measure on another (needs qconvert[hf])",
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option(
            "--nsamples",
            min=1,
            metavar="N",
            help="windows of --text, drawn [of a long one 64, and all for --finetune]",
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", min=2, metavar="N", help="tokens of a window [256]")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="GLOB", help="keep these tensors bit for bit; repeatable"),
    ] = None,
    tensor_scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-scheme",
            metavar="GLOB=NAME",
            help="another scheme for these tensors; repeatable, the first match wins",
            autocompletion=completion.tensor_schemes,
        ),
    ] = None,
    min_values: Annotated[
        int, typer.Option("--min-values", min=0, metavar="N", help="keep smaller tensors")
    ] = 1024,
    hash_source: Annotated[
        bool,
        typer.Option(
            "--hash-source", help="record the SHA-256 of the source files (reads them again)"
        ),
    ] = False,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="take a source that is quantized already"),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="of --scheme keep: refuse tensors whose codes cannot move"),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="DIR",
            help="of a GGUF file into a directory: the original model's, whose config.json and "
            "tokenizer are taken [made of the file]",
        ),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="GGUF: another ggml type for these tensors; repeatable, the first match wins",
        ),
    ] = None,
    output_tensor_type: Annotated[
        str | None,
        typer.Option(
            "--output-tensor-type", metavar="TYPE", help="GGUF: ggml type of the output head"
        ),
    ] = None,
    token_embedding_type: Annotated[
        str | None,
        typer.Option(
            "--token-embedding-type", metavar="TYPE", help="GGUF: ggml type of the token embeddings"
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="GGUF: importance matrix of llama.cpp, to weight the search",
        ),
    ] = None,
    pure: Annotated[
        bool,
        typer.Option("--pure", help="GGUF: one type for all matrices, no mix"),
    ] = False,
    no_fallback: Annotated[
        bool,
        typer.Option(
            "--no-fallback", help="GGUF: refuse matrices whose rows do not divide into blocks"
        ),
    ] = False,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="GGUF: only tensors, under their own names, of any architecture"
        ),
    ] = False,
    mmproj: Annotated[
        bool,
        typer.Option(
            "--mmproj",
            help="GGUF: write what turns images into tokens, for llama.cpp's --mmproj, and not the "
            "language model; --scheme f16 by default",
        ),
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="merge a LoRA adapter, as peft saves it, into the model first",
        ),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only",
            help="GGUF: write --adapter by itself, for llama.cpp's --lora, and not the model",
        ),
    ] = False,
    override_kv: Annotated[
        list[str] | None,
        typer.Option(
            "--override-kv",
            metavar="KEY=TYPE:VALUE",
            help="GGUF: another value of a key, of type int, float, bool or str; repeatable",
        ),
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer",
            metavar="NAME",
            help="GGUF: llama.cpp's name for it, where it is not recognised",
        ),
    ] = None,
    no_mtp: Annotated[
        bool,
        typer.Option(
            "--no-mtp", help="GGUF: leave out a layer that predicts a further token for drafts"
        ),
    ] = False,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help="GGUF, directories: files of at most 500M, 2G ..."
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            "--target-bpw",
            metavar="BITS",
            help="budget: a scheme for each tensor so that the whole file has at most so many bits "
            "per weight and loses the least, by --calibration made with --fisher",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size", metavar="SIZE", help="budget: a file of at most 500M, 2.5G ..."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="NATS",
            help="budget: the smallest file with at most this predicted divergence of next tokens",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="small|balanced|near-lossless",
            help="a budget of 3.4, 4.3 or 6.4 bits per weight; in GGUF 3.9, 4.6 or 6.6",
            autocompletion=completion.among("small", "balanced", "near-lossless"),
        ),
    ] = None,
    finetune: Annotated[
        int,
        typer.Option(
            "--finetune",
            metavar="N",
            help="tune the scales of rows and the gains of norms by N steps of gradient descent "
            "on --text, usually 20; codes and size stay (needs qconvert[hf])",
        ),
    ] = 0,
    seed: Annotated[
        int,
        typer.Option("--seed", metavar="N", help="of --finetune: windows and order"),
    ] = 0,
    sensitivities: Annotated[
        Path | None,
        typer.Option(
            "--sensitivities",
            metavar="FILE",
            help="of a budget: what each tensor loses under each scheme; read if it is there, "
            "else measured and written",
        ),
    ] = None,
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan and write nothing")
    ] = False,
    force: Force = False,
    strict: Strict = False,
    json: Json = False,
    report: ReportFile = None,
    html: Html = None,
    color: Color = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Quantize a model to .qblk, GGUF, or a directory for vLLM, SGLang, transformers or MLX.

    MODEL is a safetensors file, a model directory, or a GGUF or .qblk file.

    Into .qblk, floating tensors of two or more dimensions and at least 1,024 values take the
    scheme, token embeddings and the output head included (with at least 4 bits). Norms, biases,
    one-dimensional and integer tensors stay bit for bit. Casts (f32, f16, bf16) take every floating
    tensor.

    Into GGUF, a model directory becomes a file that llama.cpp runs, with the types that
    llama-quantize would choose for the scheme.

    Into a directory of another tool's format, linear layers take the scheme, as its readers want.

    \b
    Examples:
      qconvert quantize model.safetensors --scheme q4_block64
      qconvert quantize model-directory --preset balanced -o model.gguf
      qconvert quantize model-directory --scheme q4_k_m -o model.gguf
      qconvert quantize model-directory --scheme q4_k_m --scheme q8_0 -o directory
      qconvert quantize model.safetensors --scheme q3_block32 \\
          --tensor-scheme '*down_proj*=q6_block32' --keep 'lm_head.*'
      qconvert quantize model-directory --target-bpw 4.5 \\
          --calibration calibration.safetensors -o model.gguf
      qconvert quantize model-directory --scheme w4a16 -o model-w4a16
      qconvert quantize model-w4a16 --scheme keep -o model.gguf
      qconvert quantize model-directory --adapter lora --preset balanced -o model.gguf
      qconvert quantize model-directory --mmproj -o mmproj-model.gguf
      qconvert quantize model-q4_0.gguf --scheme keep --format mlx -o model-mlx
      qconvert quantize --list-schemes
    """
    if list_schemes:
        if model or scheme or output or html:
            raise UsageError(
                "--list-schemes shows schemes alone", hint="leave MODEL and its options away"
            )
        return _list_schemes(json, report, force, quiet)
    if model is None:
        raise UsageError("missing argument 'MODEL'", hint="see qconvert quantize --help")
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.text.quantize import quantize_set_text, quantize_text
    from qconvert.commands.quantize import quantize as one
    from qconvert.commands.quantize import quantize_set

    given = (calibration, imatrix, text, adapter, config)
    inputs = [model, *(path for path in given if path)]
    several = len(scheme or ()) > 1
    if several and html:
        raise UsageError("--html is the page of one scheme", found=f"{len(scheme or ())} schemes")
    with Emitter(
        Run("quantize", model), json, report, force, quiet, strict, inputs, html
    ) as emitter:
        command: partial[Any]
        if several:
            command = partial(quantize_set, model, scheme or ())
        else:
            command = partial(one, model, scheme[0] if scheme else None)
        done = command(
            output=output,
            format=format,
            range=range,
            percentile=percentile,
            calibration=calibration,
            no_weighting=no_weighting,
            rounding=rounding,
            equalise=equalise,
            text=text,
            nsamples=nsamples,
            seqlen=seqlen,
            keep=keep,
            tensor_scheme=tensor_scheme,
            min_values=min_values,
            hash_source=hash_source,
            allow_requantize=allow_requantize,
            exact=exact,
            adapter=adapter,
            adapter_only=adapter_only,
            config=config,
            tensor_type=tensor_type,
            output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type,
            imatrix=imatrix,
            pure=pure,
            no_fallback=no_fallback,
            raw=raw,
            mmproj=mmproj,
            pre_tokenizer=pre_tokenizer,
            no_mtp=no_mtp,
            override_kv=override_kv,
            shard_size=shard_size,
            target_bpw=target_bpw,
            target_size=target_size,
            max_kl=max_kl,
            preset=preset,
            finetune=finetune,
            seed=seed,
            sensitivities=sensitivities,
            threads=threads,
            dry_run=dry_run,
            force=force,
            strict=strict,
            progress=emitter.progress,
        )
        shown: Any = quantize_set_text if several else quantize_text
        return emitter.emit(done, shown)


def _list_schemes(json: bool, report: Path | None, force: bool, quiet: bool) -> int:
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.text.schemes import schemes_text
    from qconvert.commands.schemes import list_schemes

    with Emitter(Run("schemes"), json, report, force, quiet, False, []) as emitter:
        return emitter.emit(list_schemes(), schemes_text)


@app.command(cls=OnceCommand)
def tune(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="directory of a causal language model or an encoder; or a .qblk file",
        ),
    ],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to train on; a part of it judges. Any other text will do to measure "
            "the result with verify --text",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help=".qblk or .gguf file")
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            metavar="NAME",
            help="of a directory: one grid for each tensor, q..., c..., nf4..., fp4... or a ggml "
            "type such as q4_0",
            autocompletion=completion.schemes,
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=0, metavar="N", help="at most so many; fewer where it gets no better"
        ),
    ] = 240,
    blocks: Annotated[
        int,
        typer.Option(
            "--blocks",
            min=0,
            metavar="N",
            help="before that N steps for each block of the model by itself, which learns the "
            "float model's hidden states; with --train scales the rest takes little memory",
        ),
    ] = 0,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="X",
            help="learning rate of the weights, ten times which norms have [1.5 % of each tensor's "
            "rounding error; norms 0.001]",
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", min=4, metavar="N", help="tokens of a window [256]")
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, metavar="N", help="windows, or lines, of a step")
    ] = 4,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, metavar="N", help="of the draw of windows, their use and order"
        ),
    ] = 0,
    nsamples: Annotated[
        int | None,
        typer.Option("--nsamples", min=3, metavar="N", help="windows of --text, drawn [all]"),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            "--generate",
            min=0,
            metavar="N",
            help="windows to train on that the float model writes itself, each from a beginning in "
            "the text on; 0 for none [as many as a short text lacks]",
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            metavar="distill|lm",
            help="what training makes smaller: the divergence from the teacher's next-token "
            "distributions, or the negative log-likelihood of the text",
            autocompletion=completion.among("distill", "lm"),
        ),
    ] = "distill",
    teacher: Annotated[
        Path | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="of --loss distill: another model of the same vocabulary [MODEL itself]",
        ),
    ] = None,
    train: Annotated[
        str,
        typer.Option(
            "--train",
            metavar="PART",
            help="what is trained: weights that are quantized, scales (and zero points) of codes "
            "that stay, norms, or all; of a file also adapters (LoRA), which become a directory of "
            "peft's",
            autocompletion=completion.among("all", "weights", "scales", "norms", "adapters"),
        ),
    ] = "all",
    rank: Annotated[
        int, typer.Option("--rank", min=1, metavar="N", help="of --train adapters")
    ] = 8,
    activations: Annotated[
        str,
        typer.Option(
            "--activations",
            metavar="MODE",
            help="inputs of linear layers: none (floats), dynamic (bytes with a scale for each "
            "row) or static (bytes with one scale and zero point, which go into the file)",
            autocompletion=completion.among("none", "dynamic", "static"),
        ),
    ] = "none",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="made with calibrate --gram: judge what quantize makes of it too, which has to "
            "be beaten",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", metavar="GLOB", help="keep these tensors as they are, untrained; repeatable"
        ),
    ] = None,
    tensor_scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-scheme",
            metavar="GLOB=NAME",
            help="another scheme for these tensors; repeatable, the first match wins",
            autocompletion=completion.tensor_schemes,
        ),
    ] = None,
    floats: Annotated[
        bool,
        typer.Option(
            "--float", help="write a model directory of float32 weights that lie on the grid"
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where an interrupted run has stopped")
    ] = False,
    threads: Threads = None,
    device: Device = None,
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="write the tuned model even where it is not better"),
    ] = False,
    force: Force = False,
    strict: Strict = False,
    json: Json = False,
    report: ReportFile = None,
    html: Html = None,
    color: Color = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train a model for the grid of a scheme, and write it: quantization-aware training.

    The model computes with the weights that its file will have, and is trained to predict next
    tokens as it did as floats. It pays at 2 or 3 bits and takes a text and time; try quantize with
    a calibration first. A part of the text judges; where quantization without training is better,
    that is said and written. Needs torch and transformers: pip install '.[hf]'.

    Of a .qblk file the codes stay, and with them its size: its scales, zero points and gains of
    norms are trained, to predict as --teacher does, the float model, or the text (--loss lm).

    An encoder learns the embeddings that it gives the lines of the text as floats; take --batch 16.

    What is done is kept beside the output every few seconds and on Ctrl-C (after the step; a second
    one stops at once); the same command with --resume goes on from there.

    \b
    Examples:
      qconvert tune model-directory --scheme c2_block16 --text train.txt -o model.qblk
      qconvert tune model-directory --scheme q4_0 --text train.txt --steps 40 -o model.gguf
      qconvert tune model-directory --scheme c3_block16 --text train.txt \\
          --calibration gram.safetensors -o model.qblk
      qconvert tune model-directory --scheme q4_block64 --activations static --text train.txt \\
          -o model.qblk
      qconvert tune model-directory --scheme c2_block16 --blocks 200 --train scales \\
          --text train.txt -o model.qblk
      qconvert tune small-model --teacher large-model --scheme c3_block16 --text train.txt \\
          -o model.qblk
      qconvert tune model.qblk --teacher model-directory --text train.txt -o tuned.qblk
      qconvert tune model.qblk --teacher model-directory --train adapters --text train.txt -o lora
    """
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.text.tune import tune_text
    from qconvert.commands.tune import tune as command

    inputs = [model, text, *(path for path in (teacher, calibration) if path)]
    with Emitter(Run("tune", model), json, report, force, quiet, strict, inputs, html) as emitter:
        done = command(
            model,
            scheme=scheme,
            text=text,
            output=output,
            steps=steps,
            blocks=blocks,
            lr=lr,
            seqlen=seqlen,
            batch=batch,
            seed=seed,
            nsamples=nsamples,
            generate=generate,
            loss=loss,
            teacher=teacher,
            train=train,
            rank=rank,
            activations=activations,
            calibration=calibration,
            keep=keep,
            tensor_scheme=tensor_scheme,
            floats=floats,
            resume=resume,
            threads=threads,
            device=device,
            anyway=anyway,
            force=force,
            strict=strict,
            progress=emitter.progress,
        )
        return emitter.emit(done, tune_text)


@app.command(cls=OnceCommand)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".qblk or GGUF file, or directory")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="MODEL", help="the source it was made from")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option("--min-sqnr", metavar="DB", help="fail when a tensor is below")
    ] = None,
    max_nmse: Annotated[
        float | None, typer.Option("--max-nmse", metavar="X", help="fail when a tensor is above")
    ] = None,
    min_output_sqnr: Annotated[
        float | None,
        typer.Option("--min-output-sqnr", metavar="DB", help="fail when a product is below"),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="fail when a decoded value is not that of --against"),
    ] = False,
    limits: Annotated[
        Path | None,
        typer.Option(
            "--limits",
            metavar="FILE",
            help="hold file and tensors against a TOML file of limits; see "
            "samples/release-pipeline.md",
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="run the recipe that the file records again, and fail when the bytes differ",
        ),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="of --rebuild: what it was made with"),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", metavar="FILE", help="of --rebuild: what it was made with"),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", metavar="DIR", help="the adapter that was merged into --against first"
        ),
    ] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            help="have llama.cpp run a GGUF file on 32 tokens, and hold it against transformers on "
            "the same weights",
        ),
    ] = False,
    rows: Annotated[
        int,
        typer.Option("--rows", min=1, metavar="N", help="activation rows of the integer product"),
    ] = 8,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            metavar="MODE",
            help="of integer products: static (parameters in the file), dynamic (a scale for each "
            "row), dynamic_asym (and a zero point), or auto (static, else dynamic); of --text also "
            "none (float, all there is for GGUF) [auto; of --text none]",
        ),
    ] = None,
    samples: Annotated[
        list[Path] | None,
        typer.Option(
            "--samples", metavar="FILE", help="recorded activations instead of Gaussian ones"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="run FILE and MODEL over this text: perplexity and divergence of language models, "
            "cosine of an encoder's embeddings of each line (needs qconvert[hf])",
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            min=4,
            metavar="N",
            help="tokens of a window of --text; for encoders, the most of a line [256]",
        ),
    ] = None,
    nsamples: Annotated[
        int | None,
        typer.Option("--nsamples", min=1, metavar="N", help="windows of --text, drawn [all]"),
    ] = None,
    scoring: Annotated[
        str,
        typer.Option(
            "--scoring",
            metavar="WHICH",
            help="tokens of a window: all, or second-half as llama-perplexity",
            autocompletion=completion.among("all", "second-half"),
        ),
    ] = "all",
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="NATS", help="fail when the mean divergence is above"),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            "--max-ppl-increase",
            metavar="SHARE",
            help="fail when the perplexity grows by more, such as 1% or 0.01",
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option("--min-cosine", metavar="X", help="fail when the mean cosine is below"),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="of Gaussian activations and drawn windows")
    ] = 0,
    threads: Threads = None,
    device: Device = None,
    json: Json = False,
    report: ReportFile = None,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", metavar="FILE", help="also write the checks as JUnit XML to FILE"),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="when all is well, write SHA-256 digests of what was verified to FILE, for "
            "sha256sum to check in its directory",
        ),
    ] = None,
    html: Html = None,
    force: Force = False,
    strict: Strict = False,
    color: Color = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Prove that a file is whole, close to its source, and right in integer arithmetic.

    \b
    Examples:
      qconvert verify model.q4_block64.qblk
      qconvert verify model.q4_block64.qblk --against model.safetensors --min-sqnr 18
      qconvert verify model.gguf --against model.safetensors --json | jq -e '.status == "pass"'
      qconvert verify model.qblk --against model-directory --text eval.txt --activations dynamic \\
          --max-kl 0.01 --max-ppl-increase 1%
      qconvert verify model.gguf --against model-directory --text eval.txt --scoring second-half
      qconvert verify model.gguf --against model-directory --run
      qconvert verify model.qblk --against model-directory --limits release.toml \\
          --rebuild --junit junit.xml --manifest SHA256SUMS
    """
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.side_files import SideFiles
    from qconvert.cli.text.verify import verify_text
    from qconvert.commands.verify import verify as command

    single = (against, text, limits, calibration, imatrix, adapter)
    inputs = [file, *(path for path in single if path), *(samples or ())]
    with (
        SideFiles(file, junit, manifest, (report, html), force=force, inputs=inputs) as side,
        Emitter(Run("verify", file), json, report, force, quiet, strict, inputs, html) as emitter,
    ):
        done = command(
            file,
            against=against,
            min_sqnr=min_sqnr,
            max_nmse=max_nmse,
            min_output_sqnr=min_output_sqnr,
            exact=exact,
            limits=limits,
            rebuild=rebuild,
            calibration=calibration,
            imatrix=imatrix,
            adapter=adapter,
            run=run,
            rows=rows,
            activations=activations,
            samples=samples,
            text=text,
            seqlen=seqlen,
            nsamples=nsamples,
            scoring=scoring,
            max_kl=max_kl,
            max_ppl_increase=max_ppl_increase,
            min_cosine=min_cosine,
            seed=seed,
            histograms=html is not None,
            threads=threads,
            device=device,
            strict=strict,
            progress=emitter.progress,
        )
        side.write(done, emitter.files.paths)
        return emitter.emit(done, verify_text)


@app.command(cls=OnceCommand)
def bench(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="a quantized file: what a token costs here; of another the largest matrix, or "
            "with --end-to-end all",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="ROWSxCOLS",
            help="Gaussian weights of this shape; repeatable [4096x4096]",
        ),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme", metavar="NAME", help="repeatable [q4_block64 and q8_block64]; see quantize"
        ),
    ] = None,
    range: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="METHOD",
            help="minmax, percentile or mse",
            autocompletion=completion.among("minmax", "percentile", "mse"),
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            "--rows", min=1, metavar="N", help="activation rows of the products, besides 1"
        ),
    ] = 512,
    end_to_end: Annotated[
        bool,
        typer.Option(
            "--end-to-end",
            help="whole conversions of MODEL instead, against copying it and other programs",
        ),
    ] = False,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            metavar="DIR",
            help="of --end-to-end [beside MODEL]; on a memory file system such as /dev/shm the "
            "disk plays no part",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="FILE", help="exit 1 if a line is slower than in this --report"
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            metavar="SHARE",
            help="of --compare: by how much, beyond the noise of the runs [10%]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="which scheme of MODEL loses least within 8G, 500M ...; converts nothing",
        ),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="medians of so many")] = 5,
    threads: Annotated[int, typer.Option("--threads", min=1, metavar="N")] = 1,
    json: Json = False,
    report: ReportFile = None,
    html: Html = None,
    force: Force = False,
    color: Color = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Measure what a quantized file costs here, kernels and products, or whole conversions.

    Everything is held against references in the same run: copying, float32 BLAS, gguf-py, and where
    they are installed ONNX Runtime and llama-quantize.

    \b
    Examples:
      qconvert bench model.q4_block64.qblk --threads 2
      qconvert bench
      qconvert bench --shape 4096x11008 --scheme q6_block32 --threads 2 --json
      qconvert bench model-directory --memory 8G
      qconvert bench model.safetensors --end-to-end --scheme q8_0 --work-dir /dev/shm
    """
    from qconvert.cli.earlier import Run
    from qconvert.cli.emit import Emitter
    from qconvert.cli.text.bench import bench_text
    from qconvert.commands.bench import bench as command

    inputs = [path for path in (file, compare) if path]
    with Emitter(Run("bench", file), json, report, force, quiet, False, inputs, html) as emitter:
        done = command(
            file,
            shape=shape,
            scheme=scheme,
            range=range,
            rows=rows,
            end_to_end=end_to_end,
            work_dir=work_dir,
            compare=compare,
            threshold=threshold,
            memory=memory,
            runs=runs,
            threads=threads,
            progress=emitter.progress,
        )
        return emitter.emit(done, bench_text)

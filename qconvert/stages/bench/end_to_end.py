"""A whole conversion, against copying the source, gguf-py and llama-quantize.

Every line finds the source in the page cache, writes beside its target, flushes that to the disk
and renames it: equal durability. On a memory file system the disk plays no part.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from qconvert.containers import container_for
from qconvert.errors import InputError, MachineError
from qconvert.files import open_model
from qconvert.files.atomic import AtomicOutput, check_space, machine_errors
from qconvert.schemes import Scheme
from qconvert.stages.bench.kernel_lines import nearest_ggml_type
from qconvert.stages.bench.lines import Line, Section
from qconvert.stages.bench.options import BenchOptions
from qconvert.stages.bench.peers import PROGRAM, Source, Work, gguf_py, llama_quantize
from qconvert.stages.quantize import GgufOptions, QuantizeOptions, quantize

COPY = "copy the source, 1 thread"
SPACE = 3  # source sizes: an output, and what llama-quantize reads
HINT = "choose another directory with --work-dir"


def end_to_end_section(path: Path, options: BenchOptions, stack: ExitStack) -> Section:
    """The lines of every scheme; the output of each run is removed before the next.

    Raises:
        InputError: the source is not a safetensors model.
        MachineError: the working directory cannot be written to, or has too little space.
    """
    source = _source(path)
    folder = _work_dir(path, options.work_dir, SPACE * source.nbytes, stack)
    outputs = folder / "outputs"
    outputs.mkdir()
    section = Section(f"end to end, {path.resolve().name}")
    section.lines.append(_line(COPY, lambda: _copy(source.files, outputs), source, outputs))
    peers: dict[str, tuple[str, ...]] = {}
    for kind in dict.fromkeys(map(nearest_ggml_type, options.schemes)):
        target, made = outputs / "peer.gguf", folder / f"{kind}.gguf"
        works: dict[str, Work | str] = {
            f"gguf-py {kind.lower()}, 1 thread": gguf_py(source, kind, target),
            f"{PROGRAM} {kind.lower()}": llama_quantize(
                source, kind, target, made, options.threads
            ),
        }
        peers[kind] = tuple(works)
        for name, work in works.items():
            if isinstance(work, str):
                section.skip(name, work)
            else:
                section.lines.append(_line(name, work, source, outputs, (COPY,)))
    for scheme in options.schemes:
        against = (COPY, *peers[nearest_ggml_type(scheme)])
        work = _conversion(path, scheme, outputs, options)
        name = f"qconvert quantize {scheme.name}"
        section.lines.append(_line(name, work, source, outputs, against))
    return section


def _line(
    name: str, work: Work, source: Source, outputs: Path, against: tuple[str, ...] = ()
) -> Line:
    def clear() -> None:
        for path in outputs.iterdir():
            path.unlink()

    nbytes = source.nbytes
    return Line(name, work, nbytes / 1e6, "MB/s", nbytes, against=against, after=clear)


def _source(path: Path) -> Source:
    model = open_model(path)
    try:
        if model.kind != "safetensors":
            raise InputError(
                f"a {model.kind} file cannot be converted",
                path=path,
                wanted="a safetensors file or directory",
            )
        names = [s.name for s in model.sources]
        files = [path / name for name in names] if path.is_dir() else [path]
        return Source(tuple(files), model.tensors)
    finally:
        model.close()


def _work_dir(path: Path, wished: Path | None, nbytes: int, stack: ExitStack) -> Path:
    """A new directory beside the source, as output would be, or where the user says; it goes with
    the stack.
    """
    parent = wished or path.resolve().parent
    try:
        with machine_errors(parent):
            made = tempfile.TemporaryDirectory(dir=parent, prefix=".qconvert-bench-")
        folder = Path(stack.enter_context(made))
        check_space(folder / "outputs", nbytes)
    except MachineError as e:
        e.hint = HINT
        raise
    return folder


def _copy(files: Iterable[Path], outputs: Path) -> None:
    """As quickly as the system can (sendfile, where there is that), and as durably as we write."""
    for path in files:
        with AtomicOutput(outputs / path.name, overwrite=False) as out:
            shutil.copyfile(path, out.path)
            out.commit()


def _conversion(
    path: Path, scheme: Scheme, outputs: Path, options: BenchOptions
) -> Callable[[], object]:
    container = container_for(scheme.family)
    asked = QuantizeOptions(
        scheme=scheme,
        output=outputs / f"ours{container.suffix}",
        range=options.range if scheme.default_range else None,
        threads=options.threads,
        gguf=GgufOptions(raw="ggml" in container.takes),  # as the peers: tensors alone
    )
    return lambda: quantize(path, asked)

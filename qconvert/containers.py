"""The table of containers: what a model may lie in, and what may be written, as data.

A new container is a row of this table, a reader, and a target that plans and writes. Their modules
are named here and imported when they are used, for some take a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.exchange_schemes import AWQ, BNB, COMPRESSED_TENSORS, FP8, GPTQ, MLX
from qconvert.schemes import FAMILIES


@dataclass(frozen=True, slots=True)
class Container:
    """A kind of file.

    Attributes:
        name: as ``--format`` and reports have it, and `Model.kind`.
        suffix: of a file that is written; none of a directory.
        magic, at: what a file has at this place; empty for what is told by nothing else.
        reader: ``module:function``, from a path to a `qconvert.files.OpenModel`; none of a
            directory that another tool loads, which is opened as safetensors and then recognised.
        target: module of a `qconvert.stages.target.Target` named ``TARGET``; of what is only read,
            the one that knows its names.
        takes: families of schemes (`qconvert.schemes.FAMILIES`, and ``mix``) that it is written
            with; none: it is only read.
    """

    name: str
    suffix: str
    magic: bytes
    at: int
    reader: str
    target: str
    takes: tuple[str, ...] = ()

    @property
    def directory(self) -> bool:
        """Whether it is a directory of safetensors files."""
        return bool(self.takes) and not self.suffix

    @property
    def article(self) -> str:
        """What one of it is called in a sentence."""
        return f"a directory for {self.name}" if self.directory else f"a {self.suffix} file"


CONTAINERS = {
    c.name: c
    for c in (
        Container(
            *("qblk", ".qblk", b"QBLK", 1),
            reader="qconvert.files.qblk:open_qblk",
            takes=tuple(name for name, family in FAMILIES.items() if family.described),
            target="qconvert.stages.qblk_target",
        ),
        Container(
            *("gguf", ".gguf", b"GGUF", 0),
            reader="qconvert.files.gguf_split_reader:open_gguf_model",
            takes=("ggml", "mix", "raw"),
            target="qconvert.stages.gguf_target",
        ),
        Container(
            *("safetensors", ".safetensors", b"", 0),
            reader="qconvert.files.exchange:open_weights",
            target="qconvert.stages.directories.plain",
        ),
        Container(
            *(COMPRESSED_TENSORS, "", b"", 0),
            reader="",
            takes=(COMPRESSED_TENSORS,),
            target="qconvert.stages.directories.compressed_tensors",
        ),
        Container(
            *(FP8, "", b"", 0),
            reader="",
            takes=(FP8,),
            target="qconvert.stages.directories.fp8",
        ),
        Container(
            *(MLX, "", b"", 0),
            reader="",
            takes=(MLX,),
            target="qconvert.stages.directories.mlx",
        ),
        Container(
            *(GPTQ, "", b"", 0),
            reader="",
            takes=(GPTQ,),
            target="qconvert.stages.directories.gptq",
        ),
        Container(
            *(AWQ, "", b"", 0),
            reader="",
            takes=(AWQ,),
            target="qconvert.stages.directories.awq",
        ),
        Container(
            *(BNB, "", b"", 0),
            reader="",
            takes=(BNB,),
            target="qconvert.stages.directories.bitsandbytes",
        ),
        Container(
            *("hf", "", b"", 0),
            reader="",
            takes=("raw",),
            target="qconvert.stages.directories.plain",
        ),
        Container(*("modelopt", "", b"", 0), reader="", target="qconvert.stages.directories.plain"),
        Container(*("mxfp4", "", b"", 0), reader="", target="qconvert.stages.directories.plain"),
    )
}
WRITTEN = tuple(c for c in CONTAINERS.values() if c.takes)


def container_for(family: str) -> Container:
    """The first container that schemes of a family go into."""
    return next(c for c in WRITTEN if family in c.takes)


def container_of(start: bytes) -> Container:
    """The container of a file that starts like this."""
    return next(c for c in CONTAINERS.values() if start[c.at :].startswith(c.magic))

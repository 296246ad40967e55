"""Everything about the package stands in pyproject.toml; here is how its C is compiled: all files
side by side, one on each processor that this process may use, each as much optimised as it takes.

Each takes seconds, and setuptools would compile them one after another.
"""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def _processors() -> int:
    """Processors that this process may use; fewer than the machine has in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Of GCC's -O3 the loops of the affine schemes need this much: they are as fast, and compile in two
# thirds of the time. The searches of ggml's types take up to twice as long without the rest.
ENOUGH = [
    *("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"),
    *("-finline-functions", "-funswitch-loops", "-fpeel-loops"),
]


def _is_gcc(command: list[str]) -> bool:
    """Whether a compiler is GCC: clang says so too, and does not know all of its options."""
    predefined = [*command, "-dM", "-E", "-x", "c", os.devnull]
    try:
        told = subprocess.run(predefined, capture_output=True, text=True, check=False).stdout
    except OSError:
        return False
    return "__GNUC__" in told and "__clang__" not in told


def _optimisation(source: str) -> list[str]:
    """What replaces the -O3 of pyproject.toml for a file, with GCC."""
    name = Path(source).name
    if name.startswith("portable") and platform.machine() in {"x86_64", "AMD64"}:
        return ["-O2"]  # runs only on processors that were made before AVX2, before 2013
    return ENOUGH if name in {"avx2.c", "avx512.c", "module.c"} else ["-O3"]


class BuildSideBySide(build_ext):
    """`build_ext` with one compiler process to a file."""

    def build_extension(self, ext: Extension) -> None:
        one_after_another = self.compiler.compile

        def compile_all(
            sources: list[str], *, extra_postargs: list[str], **options: Any
        ) -> list[str]:
            self.announce(
                f"compiling {len(sources)} files of {ext.name}: less than a minute", level=2
            )

            known = _is_gcc(getattr(self.compiler, "compiler", []))

            def one(source: str) -> list[str]:
                better = _optimisation(source) if known else ["-O3"]
                arguments = [
                    a for old in extra_postargs for a in (better if old == "-O3" else [old])
                ]
                return one_after_another([source], extra_postargs=arguments, **options)

            with ThreadPoolExecutor(_processors()) as pool:
                return [name for names in pool.map(one, sources) for name in names]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one_after_another


setup(cmdclass={"build_ext": BuildSideBySide})

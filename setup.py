"""Everything about the package stands in pyproject.toml; here is how its C is compiled: all files
side by side, one on each processor that this process may use.

Each takes seconds, and setuptools would compile them one after another.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def _processors() -> int:
    """Processors that this process may use; fewer than the machine has in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BuildSideBySide(build_ext):
    """`build_ext` with one compiler process to a file."""

    def build_extension(self, ext: Extension) -> None:
        one_after_another = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            self.announce(
                f"compiling {len(sources)} files of {ext.name}: less than a minute", level=2
            )
            one = partial(one_after_another, **options)
            with ThreadPoolExecutor(_processors()) as pool:
                objects = pool.map(lambda source: one([source]), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = one_after_another


setup(cmdclass={"build_ext": BuildSideBySide})

"""The table of ggml's types, against gguf-py, the kernels of both kinds, and the help."""

from __future__ import annotations

import gguf
import pytest

from qconvert import kernels
from qconvert.ggml_types import CASTS, GGML_TYPES, WRITTEN
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.mixes import MIXES
from qconvert.schemes import SCHEME_GRAMMAR, SCHEMES

# That gguf-py may not know yet: ggml.h and ggml-common.h at 0c1e57098.
NEWER = {"Q2_0": (42, 64, 18)}


@pytest.mark.parametrize("name", NEWER)
def test_numbers_and_sizes_of_newer_types_are_those_of_ggml(name: str) -> None:
    found = GGML_TYPES[name]
    assert (found.number, found.block, found.nbytes) == NEWER[name]


@pytest.mark.parametrize("name", sorted(GGML_TYPES.keys() - NEWER))
def test_numbers_and_sizes_are_those_of_gguf_py(name: str) -> None:
    found, number = GGML_TYPES[name], gguf.GGMLQuantizationType[name]
    assert found.number == number
    assert (found.block, found.nbytes) == gguf.GGML_QUANT_SIZES[number]


def test_none_that_gguf_py_knows_is_unknown_here() -> None:
    assert GGML_TYPES.keys() - NEWER == {t.name for t in gguf.GGML_QUANT_SIZES} - NEWER.keys()


def test_what_is_written_has_kernels_of_both_kinds_and_is_in_the_help() -> None:
    sizes = {t.name: (t.block, t.nbytes) for t in WRITTEN}
    assert {n: (b.block, b.nbytes) for n, b in GGML_BLOCKS.items()} == sizes
    listed = SCHEME_GRAMMAR.replace(",", " ").split()
    assert {t.lower() for t in (*sizes, *CASTS)} <= {*listed, *MIXES}
    assert {t.lower() for t in sizes} <= SCHEMES.keys()


@pytest.mark.skipif("native" not in kernels.describe(), reason="reference kernels run")
def test_the_native_table_has_the_same_sizes() -> None:
    from qconvert.kernels import _native

    found = {name: (block, nbytes) for name, block, nbytes in _native.ggml_types()}
    assert found == {t.name: (t.block, t.nbytes) for t in WRITTEN}

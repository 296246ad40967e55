"""The table of ggml's types, against gguf-py, the kernels of both kinds, and the help."""

from __future__ import annotations

import gguf
import pytest

from qconvert import kernels
from qconvert.ggml_types import CASTS, GGML_TYPES, WRITTEN
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.mixes import MIXES
from qconvert.schemes import SCHEME_GRAMMAR, SCHEMES


@pytest.mark.parametrize("name", GGML_TYPES)
def test_numbers_and_sizes_are_those_of_gguf_py(name: str) -> None:
    found, number = GGML_TYPES[name], gguf.GGMLQuantizationType[name]
    assert found.number == number
    assert (found.block, found.nbytes) == gguf.GGML_QUANT_SIZES[number]


def test_none_that_gguf_py_knows_is_unknown_here() -> None:
    assert GGML_TYPES.keys() == {t.name for t in gguf.GGML_QUANT_SIZES}


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

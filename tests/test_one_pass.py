"""Tensors are encoded in one pass on a guess from a sample: a wrong guess changes no byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from qconvert.codecs import affine, codec_of
from qconvert.codecs.affine.decide import sample_rows
from qconvert.codecs.affine.encoder import BlockEncoder, planned
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Codec, Encoder
from qconvert.files import open_model
from qconvert.kernels.records import Encoded
from qconvert.model import TensorInfo
from qconvert.schemes import TensorScheme, affine_scheme
from qconvert.stages.quantize import QuantizeOptions, quantize

ROWS, COLUMNS = 4096, 2048  # of which 64 strips of 1,024 values are sampled
SCHEME = affine_scheme(4, "block", 64, None)


class Indices:
    """A model whose values are their own indices."""

    def values(self, _: TensorInfo, start: int, stop: int) -> NDArray[np.float64]:
        return np.arange(start, stop, dtype=np.float64)


def sampled() -> NDArray[np.bool_]:
    """Which values the sample of a block scheme has: indices are asked for and come back."""
    tensor = TensorInfo("w", (ROWS, COLUMNS), "F32", ROWS * COLUMNS * 4)
    places = sample_rows(Indices(), tensor, planned(SCHEME, tensor))
    assert places.max() < 1 << 24, "binary32 holds the indices"
    found = np.zeros(ROWS * COLUMNS, np.bool_)
    found[places.astype(np.int64).ravel()] = True
    return found.reshape(ROWS, COLUMNS)


@pytest.fixture
def misleading(tmp_path: Path) -> Path:
    """Two tensors whose samples say the opposite of the rest, between two that are as they seem."""
    rng = np.random.default_rng(4)
    plain = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    inside = sampled()
    one_sided = np.abs(plain)
    tensors = {
        "a": plain[:64],
        "b": np.where(inside, plain, one_sided),  # mixed where sampled, else all of one sign
        "c": np.where(inside, plain, plain * np.float32(2.0**-60)),  # scales beyond float16
        "d": plain[64:128],
    }
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def written(path: Path, name: str, threads: int) -> Path:
    output = path.with_name(name)
    quantize(path, QuantizeOptions(SCHEME, output=output, threads=threads))
    return output


@pytest.mark.parametrize("threads", [1, 3])
def test_a_wrong_guess_changes_no_byte(
    misleading: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[str] = []
    settled = BlockEncoder.settled

    def counted(self: BlockEncoder, seen: Encoded) -> Encoder:
        found = settled(self, seen)
        if found.encoding != self.encoding:
            again.append(self.tensor.name)
        return found

    monkeypatch.setattr(BlockEncoder, "settled", counted)
    guessed = written(misleading, "guessed.qblk", threads)
    assert "c" in again

    # Told beforehand what the whole tensor says, nothing is encoded twice.
    model = open_model(guessed)
    right = {t.name: model.stored(t).encoding for t in model.tensors}
    model.close()

    def told(*args: Any) -> Encoder:
        found = affine.CODEC.encoder(*args)
        assert isinstance(found, BlockEncoder)
        encoding = right[found.tensor.name]
        assert isinstance(encoding, Affine)
        return replace(found, code=encoding)

    def codec(scheme: TensorScheme) -> Codec[Any]:
        assert codec_of(scheme) is affine.CODEC
        return replace(affine.CODEC, encoder=told)

    again.clear()
    monkeypatch.setattr("qconvert.stages.conversion.codec_of", codec)
    known = written(misleading, "known.qblk", threads)
    assert not again
    assert known.read_bytes() == guessed.read_bytes()

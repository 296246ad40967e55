"""Memory is bounded by chunks and not by the model."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import container, environment, execute
from tiny_models import CONFIGS, source_shapes, write_directory

from qconvert.files.qblk import open_qblk

LIMIT = 400 << 20
ROWS, COLUMNS, TENSORS = 24_576, 4_096, 3  # 600 MB of BF16

PROGRAM = """
import resource, sys
from qconvert.cli.main import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_file_of_600_mb_takes_less_than_400_mib(tmp_path: Path) -> None:
    size = 2 * ROWS * COLUMNS
    header = {
        f"w{i}": {
            "dtype": "BF16",
            "shape": [ROWS, COLUMNS],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(TENSORS)
    }
    values = np.random.default_rng(1).standard_normal(1 << 20, np.float32)
    tile = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    text = json.dumps(header).encode()
    source = tmp_path / "m.safetensors"
    with source.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _ in range(size // len(tile)):
            f.write(tile)
        f.truncate(8 + len(text) + TENSORS * size)  # the rest is a hole, which reads as zeros
    assert source.stat().st_size > 600_000_000
    target = tmp_path / "m.qblk"
    line = ["quantize", source, "--scheme", "q4_block64", "--range", "minmax", "-o", target]
    program = [sys.executable, "-c", PROGRAM, *line]
    done = execute([*program, "--threads", "2"], env=environment())
    os.unlink(source)
    assert done.code == 0, done.err
    peak = int(done.err.splitlines()[-1])
    assert peak < LIMIT, f"{peak >> 20} MiB"
    model = open_qblk(target)
    assert [t.shape for t in model.tensors] == [(ROWS, COLUMNS)] * TENSORS
    model.close()


ROWS_OF = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "head_dim": 64,
}


def test_a_model_for_llama_cpp_of_600_mb_takes_less_than_200_mib(tmp_path: Path) -> None:
    """Permuted rows and stacked experts are read in tiles too, and shards one after the other."""
    config = {**CONFIGS["mixtral"], **ROWS_OF}
    directory: Path = write_directory(tmp_path / "m", "mixtral", config=ROWS_OF, tensors={})
    header, end = {}, 0
    for name, shape in source_shapes(config):
        size = 2 * math.prod(shape)
        offsets = [end, end + size]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        end += size
    assert end > 600_000_000
    container(directory / "model.safetensors", header)
    with (directory / "model.safetensors").open("r+b") as f:
        f.truncate(f.seek(0, os.SEEK_END) + end)  # a hole, which reads as zeros
    line = ["quantize", directory, "--scheme", "q4_0", "--shard-size", "100M"]
    program = [sys.executable, "-c", PROGRAM, *line, "-o", tmp_path / "m.gguf", "--threads", "2"]
    done = execute(program, env=environment())
    assert done.code == 0, done.err
    peak = int(done.err.splitlines()[-1])
    assert peak < 200 << 20, f"{peak >> 20} MiB"
    assert len(list(tmp_path.glob("m-*-of-*.gguf"))) >= 2

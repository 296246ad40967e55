"""Prints how long conversion to each container takes against .qblk at the same scheme.

    python tests/make_speed.py --work DIR [--gib 1] [--runs 3] [--threads 2] [--only NAME]

Each line is a pair of commands that take turns; the figures are medians of whole commands, in
seconds of the clock and of the processors, their ratio, and the most memory that the first one
took. FP8 in blocks to Q4_K_M is held against BF16 to Q4_K_M. It is no test: run it by hand, on a
machine that does nothing else, or go by the seconds of the processors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER = 2048, 8192
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_attention_heads": 16, "num_key_value_heads": 16,
    "head_dim": 128, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "vocab_size": 1024, "torch_dtype": "bfloat16",
}  # fmt: skip
SAMPLE = Path(__file__).parents[1] / "samples" / "tiny-llama"
# What is converted to what, and what it is held against: the scheme of .qblk with the same grid.
LINES = (
    ("compressed-tensors", "w4a16_g32", "q4_block32_sym"),
    ("compressed-tensors", "w4a16_asym_g64", "q4_block64_asym"),
    ("compressed-tensors", "w8a16_g64", "q8_block64_sym"),
    ("mlx", "mlx_4bit_g64", "q4_block64_asym"),
    ("mlx", "mlx_4bit_g32", "q4_block32_asym"),
    ("mlx", "mlx_8bit_g64", "q8_block64_asym"),
    ("gptq", "gptq_4bit_g64", "q4_block64_sym"),
    ("awq", "awq_4bit_g64", "q4_block64_asym"),
    ("bnb", "bnb_nf4", "nf4_block64"),
)
# Conversions of what is quantized already.
FROM_FP8 = ("FP8 to GGUF", "q4_k_m", "BF16 to GGUF")


@dataclass(frozen=True, slots=True)
class Run:
    """What a command took: seconds of the clock and of the processors, and MiB."""

    wall: float
    cpu: float
    peak: float


def model(place: Path, gib: float) -> Path:
    """A Llama of so many GiB of BF16."""
    if (place / "config.json").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    each = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    layers = max(1, round(gib * 2**30 / each))
    stream = np.random.default_rng(1)

    def matrix(*shape: int) -> np.ndarray:
        values = stream.standard_normal(shape, np.float32) * np.float32(0.02)
        return values.astype(ml_dtypes.bfloat16)

    tensors = {"model.norm.weight": np.ones(WIDTH, ml_dtypes.bfloat16)}
    tensors["model.embed_tokens.weight"] = matrix(CONFIG["vocab_size"], WIDTH)
    tensors["lm_head.weight"] = matrix(CONFIG["vocab_size"], WIDTH)
    for i in range(layers):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = np.ones(WIDTH, ml_dtypes.bfloat16)
        for name in "qkvo":
            tensors[f"{at}self_attn.{name}_proj.weight"] = matrix(WIDTH, WIDTH)
        for name in ("gate", "up"):
            tensors[f"{at}mlp.{name}_proj.weight"] = matrix(INNER, WIDTH)
        tensors[f"{at}mlp.down_proj.weight"] = matrix(WIDTH, INNER)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    fields = CONFIG | {"num_hidden_layers": layers}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (SAMPLE / name).read_text()
        if name == "tokenizer.json":
            tokenizer = json.loads(text)
            fields["vocab_size"] = 1024
            kept = {t: i for t, i in tokenizer["model"]["vocab"].items() if i < 1000}
            merges = tokenizer["model"]["merges"]
            pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
            tokenizer["model"] |= {
                "vocab": kept,
                "merges": [
                    p for p in pairs if p[0] in kept and p[1] in kept and "".join(p) in kept
                ],
            }
            for n, token in enumerate(tokenizer["added_tokens"]):
                token["id"] = 1000 + n
            tokenizer["post_processor"] = None
            text = json.dumps(tokenizer)
        (place / name).write_text(text)
    (place / "config.json").write_text(json.dumps(fields))
    return place


def taken(line: list[str], out: Path) -> Run:
    """Run one command, whose output is removed."""
    begun = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "qconvert", *line])
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{' '.join(line)} ended with status {status}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def pairs(source: Path, work: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """What a line is called, and the two commands, without their outputs."""

    def plain(place: Path, scheme: str) -> list[str]:
        more = ["--equalise", "off", "--keep", "*embed*", "--keep", "lm_head*"]
        return ["quantize", str(place), "--scheme", scheme, *more]

    for container, scheme, ours in LINES:
        yield f"{container} {scheme}", plain(source, scheme), plain(source, ours)
    fp8 = work / source.name.replace("bf16", "fp8")
    if not fp8.exists():
        taken_line = ["quantize", str(source), "--scheme", "fp8_block128", "-o", str(fp8), "-q"]
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-m", "qconvert", *taken_line])
    name, scheme, _ = FROM_FP8
    gguf = ["--scheme", scheme, "--format", "gguf", "--equalise", "off"]
    yield (
        f"{name} {scheme}",
        ["quantize", str(fp8), *gguf, "--allow-requantize"],
        ["quantize", str(source), *gguf],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", metavar="NAME", default="")
    given = parser.parse_args()
    source = model(given.work / f"bf16-{given.gib:g}", given.gib)
    print("| conversion | seconds | of the processors | against | ratio | of processors | peak |")
    print("|---|---|---|---|---|---|---|")
    for name, one, other in pairs(source, given.work):
        if given.only not in name:
            continue
        found: tuple[list[Run], list[Run]] = ([], [])
        for _ in range(given.runs):
            for line, runs in zip((one, other), found, strict=True):
                out = given.work / ("out.gguf" if "gguf" in line else "out")
                if "gguf" not in line and line is other:
                    out = given.work / "out.qblk"
                asked = [*line, "-o", str(out), "--threads", str(given.threads), "-q"]
                runs.append(taken(asked, out))
        walls, cpus = (
            [statistics.median(getattr(r, what) for r in runs) for runs in found]
            for what in ("wall", "cpu")
        )
        peak = max(r.peak for r in found[0])
        print(
            f"| {name} | {walls[0]:.1f} | {cpus[0]:.1f} | {other[3]} {walls[1]:.1f} | "
            f"{walls[0] / walls[1]:.2f} | {cpus[0] / cpus[1]:.2f} | {peak:.0f} MiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()

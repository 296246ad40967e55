"""Prints what quantization-aware training gains on a small causal model, as a table.

    python tests/make_qat.py MODEL --train TRAIN --text EVAL --work DIR

Each row is a scheme: the file of nearest rounding, the one whose codes make up for each other's
errors (a calibration with --gram over TRAIN, made once in DIR), and files after so many steps of
training. A step takes 4 windows of 256 tokens of TRAIN in an order that the seed decides, and
follows the gradient of KL(float || quantized) of the next tokens: Adam, the rate reached after 5
steps and lowered to 0 along a cosine, ten times it for norms, a tenth of it for learned scales.
EVAL, which has to be another text, judges files as `qconvert verify --text` does. With --tune a
column more is what `qconvert tune` makes in as many steps at most, from the calibration; scales are
learned here alone.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

import qconvert
import qconvert.torch

SEQLEN, BATCH, WARM_UP = 256, 4, 5
# Scheme, activations, whether scales are learned, and the rate.
ROWS = (
    ("c2_block16", None, False, 2e-4),
    ("q2_block32", None, True, 2e-4),
    ("q4_block64", None, False, 5e-5),
    ("q4_block64", "static", False, 5e-5),
)


def windows(tokenizer: Any, text: Path, seed: int) -> Any:
    """Windows of a text in a random order, (n, `SEQLEN`), each behind the beginning token."""
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    count = len(ids) // (SEQLEN - 1)
    found = np.array(ids[: count * (SEQLEN - 1)]).reshape(count, -1)
    begin = np.full((count, 1), tokenizer.bos_token_id)
    order = np.random.default_rng(seed).permutation(count)
    return torch.from_numpy(np.concatenate([begin, found], 1)[order])


def groups(model: Any, rate: float) -> Iterator[dict[str, Any]]:
    """Parameters with the rates that they take."""
    for name, parameter in model.named_parameters():
        factor = 10 if parameter.ndim == 1 and "norm" in name else 1
        factor = 0.1 if "fake_weight" in name else factor
        yield {"params": [parameter], "lr": rate * factor, "rate": rate * factor}


def divergence(teacher: Any, model: Any, ids: Any) -> Any:
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(input_ids=ids).logits.float(), -1)
    found = functional.log_softmax(model(input_ids=ids).logits.float(), -1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True) / ids.numel()


def train(teacher: Any, model: Any, data: Any, steps: int, rate: float) -> float:
    """Train a prepared model; seconds of a step."""
    started = time.perf_counter()
    optimiser = torch.optim.Adam(list(groups(model, rate)))
    model.train()
    for step in range(1, steps + 1):
        if step == steps // 2 + 1:
            qconvert.torch.freeze(model)
        share = min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for group in optimiser.param_groups:
            group["lr"] = share * group["rate"]
        batch = data[np.arange((step - 1) * BATCH, step * BATCH) % len(data)]
        optimiser.zero_grad()
        divergence(teacher, model, batch).backward()
        optimiser.step()
    model.eval()
    return (time.perf_counter() - started) / max(steps, 1)


def judged(path: Path, source: Path, text: Path, activations: str | None, count: int) -> str:
    proof = qconvert.verify(
        *(path,), against=source, text=text, scoring="second-half", nsamples=count,
        seqlen=SEQLEN, activations=activations or "none",
    )  # fmt: skip
    quality = proof.token_quality
    assert quality
    lost = f"{quality.kl_mean:.5f} ± {quality.kl_mean_error:.5f}"
    return f"{lost}, {100 * quality.perplexity_increase:+.2f} %"


def rows(given: argparse.Namespace) -> Iterator[str]:
    source, work = given.model, given.work
    teacher = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    data = windows(tokenizer, given.train, given.seed)
    calibration = work / "calibration.safetensors"
    if not calibration.exists():
        qconvert.calibrate(
            *(source,), text=given.train, output=calibration, gram=True,
            seqlen=SEQLEN, nsamples=128,
        )  # fmt: skip
    heads = [f"{n} steps" for n in given.steps]
    if given.tune:
        heads.append(f"tune, {max(given.steps)} steps")
    yield f"| scheme | nearest | compensated | {' | '.join(heads)} | s a step |\n"
    yield f"|---|---|---|{'---|' * len(heads)}---|\n"
    for scheme, activations, learn, rate in given.rows:
        how = {"activations": activations, "learn": learn}
        said = ", ".join([scheme, *([activations] if activations else []), *(["learn"] * learn)])
        path = work / f"{said}.qblk"
        first = qconvert.torch.prepare(copy.deepcopy(teacher), scheme, **how)
        if activations:  # ranges for what is not trained
            first.train()
            with torch.no_grad():
                for batch in data[: 8 * BATCH].split(BATCH):
                    first(input_ids=batch)
        qconvert.torch.save_quantized(first, path, tokenizer=tokenizer, force=True)
        cells = [judged(path, source, given.text, activations, given.windows)]
        qconvert.quantize(source, scheme, calibration=calibration, output=path, force=True)
        cells.append(judged(path, source, given.text, activations, given.windows))
        seconds = 0.0
        for steps in given.steps:
            model = qconvert.torch.prepare(copy.deepcopy(teacher), scheme, **how)
            seconds = train(teacher, model, data, steps, rate)
            qconvert.torch.save_quantized(model, path, tokenizer=tokenizer, force=True)
            cells.append(judged(path, source, given.text, activations, given.windows))
        if given.tune:
            cells.append("")
            if not learn:
                qconvert.tune(
                    *(source,), scheme=scheme, text=given.train, output=path, force=True,
                    activations=activations or "none", calibration=calibration,
                    steps=max(given.steps), seed=given.seed,
                )  # fmt: skip
                cells[-1] = judged(path, source, given.text, activations, given.windows)
        yield f"| {said} | {' | '.join(cells)} | {seconds:.1f} |\n"


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[40])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="qconvert tune as well")
    chosen = "numbers of the rows, from 0 on"
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(ROWS)), help=chosen)
    given = parser.parse_args()
    given.rows = [ROWS[i] for i in given.rows]
    given.work.mkdir(parents=True, exist_ok=True)
    for line in rows(given):
        print(line, end="", flush=True)


if __name__ == "__main__":
    main()

"""Prints what quantization-aware training gains on a small causal model, as a table.

    python tests/make_qat.py MODEL --train TRAIN --text EVAL --work DIR

Each row is a scheme: the file of nearest rounding, the one whose codes make up for each other's
errors (a calibration with --gram over TRAIN, made once in DIR), and files after so many steps of
training. A step takes 4 windows of 256 tokens of TRAIN in an order that the seed decides, and
follows the gradient of KL(float || quantized) of the next tokens: Adam, the rate reached after 5
steps and lowered to 0 along a cosine, ten times it for norms, a tenth of it for learned scales.
EVAL, which has to be another text, judges files as `qconvert verify --text` does. Scales are
learned here alone.

    python tests/make_qat.py MODEL --train TRAIN --text EVAL --work DIR --reach

What `qconvert tune` gains, as the table in samples/figures.md: nearest rounding, the best without
training (a calibration over TRAIN with --gram --fisher, made once in DIR, codes aimed at the float
outputs over TRAIN, channels equalised where that gains), and `tune` from that calibration in so
many steps at most, after --blocks N steps of each block. With --more TEXT it learns from that.
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
CALIBRATED = 128  # windows
# Schemes that `tune` is measured with, and how their layers take inputs.
REACH = (
    ("c2_block16", "none"),
    ("c2z_block16", "none"),
    ("c3_block16", "none"),
    ("c4_block16", "none"),
    ("q4_block64", "none"),
    ("q4_block64", "static"),
    ("c4_block16", "static"),
)
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


def quality(path: Path, source: Path, text: Path, activations: str | None, count: int) -> Any:
    proof = qconvert.verify(
        *(path,), against=source, text=text, scoring="second-half", nsamples=count,
        seqlen=SEQLEN, activations=activations or "none",
    )  # fmt: skip
    assert proof.token_quality
    return proof.token_quality


def shown(found: Any) -> str:
    lost = f"{found.kl_mean:.5f} ± {found.kl_mean_error:.5f}"
    return f"{lost}, {100 * found.perplexity_increase:+.2f} %"


def judged(*asked: Any) -> str:
    return shown(quality(*asked))


def calibrated(given: argparse.Namespace, *, fisher: bool) -> Path:
    """A calibration over the text, made once."""
    path: Path = given.work / ("fisher.safetensors" if fisher else "calibration.safetensors")
    if not path.exists():
        qconvert.calibrate(
            *(given.model,), text=given.train, output=path, gram=True, fisher=fisher,
            seqlen=SEQLEN, nsamples=CALIBRATED,
        )  # fmt: skip
    return path


def reach_rows(given: argparse.Namespace) -> Iterator[str]:
    """A row for each scheme and number of steps."""
    source, text, windows = given.model, given.text, given.windows
    calibration = calibrated(given, fisher=True)
    yield "| scheme | bits | nearest | best without training | steps | tuned | less | seconds |\n"
    yield "|---|---|---|---|---|---|---|---|\n"
    for scheme, activations in given.rows:
        how = None if activations == "none" else activations
        said = ", ".join([scheme, *([activations] if how else [])])
        path = given.work / f"{said}.qblk"
        kls = []
        for options in ({"rounding": "nearest"}, {"text": given.train}):
            done = qconvert.quantize(
                source, scheme, calibration=calibration, output=path, force=True, **options
            )
            kls.append(quality(path, source, text, how, windows))
        cells = [said, f"{done.model_bits_per_weight:.2f}", *map(shown, kls)]
        for steps in given.steps:
            started = time.perf_counter()
            qconvert.tune(
                *(source,), scheme=scheme, text=given.more or given.train, output=path, force=True,
                activations=activations, calibration=calibration, steps=steps, seed=given.seed,
                threads=given.threads, blocks=given.blocks, train=given.part,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            tuned = quality(path, source, text, how, windows)
            less = f"{100 * (1 - tuned.kl_mean / kls[-1].kl_mean):.0f} %"
            yield f"| {' | '.join([*cells, str(steps), shown(tuned), less, f'{seconds:.0f}'])} |\n"


def rows(given: argparse.Namespace) -> Iterator[str]:
    source, work = given.model, given.work
    teacher = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    data = windows(tokenizer, given.train, given.seed)
    calibration = calibrated(given, fisher=False)
    heads = [f"{n} steps" for n in given.steps]
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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reach", action="store_true", help="what qconvert tune gains")
    parser.add_argument("--blocks", type=int, default=0, help="of --reach: steps of each block")
    parser.add_argument("--part", default="all", help="of --reach: what tune trains end to end")
    parser.add_argument("--more", type=Path, help="of --reach: another text to train on")
    chosen = "numbers of the rows, from 0 on"
    parser.add_argument("--rows", type=int, nargs="+", help=chosen)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.reach:
        given.rows = [REACH[i] for i in given.rows or range(len(REACH))]
        found = reach_rows(given)
    else:
        given.rows = [ROWS[i] for i in given.rows or range(len(ROWS))]
        found = rows(given)
    for line in found:
        print(line, end="", flush=True)


if __name__ == "__main__":
    main()

"""Prints what files of a model lose, as a table: size against divergence of next tokens.

    python tests/make_reach.py MODEL --calibration-text CALIB --text EVAL --work DIR

The calibration (128 windows of 256 tokens, --gram --fisher) is made once in DIR and kept there, as
is what each tensor loses under each scheme. Text of the calibration and of the measurement have to
differ. Files but those called nearest are aimed at the float outputs over the calibration's text
(--text). GGUF budgets are the sizes of the files of llama.cpp's mixes, which are made first. An
encoder, which predicts no tokens, gets the mean SQNR of its matrices, without data.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qconvert

BITS = (4.9, 4.3, 3.4, 2.65)
MIXES = ("q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
SCHEMES = ("q4_block64", "c4_block16", "c3_block16", "c2_block16", "nf4_block64")
DATA_FREE = (
    "c2_block16",
    "c2z_block16",
    "c3_block16",
    "c4_block32",
    "c4_block16",
    "c4s_block16",
    "q4_block64",
)


def calibrated(model: Path, text: Path, work: Path) -> Path:
    path = work / "calibration.safetensors"
    if not path.exists():
        qconvert.calibrate(
            *(model,), text=text, output=path, observer="minmax", gram=True, fisher=True,
            seqlen=256, nsamples=128,
        )  # fmt: skip
    return path


def asked(model: Path, work: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What the row is called, the suffix of the file, and the options."""
    for scheme in SCHEMES:
        yield f"{scheme} nearest", "qblk", {"scheme": scheme, "rounding": "nearest"}
        yield scheme, "qblk", {"scheme": scheme}
    kept = {"sensitivities": work / "qblk.json"}
    for bits in BITS:
        yield f"--target-bpw {bits}", "qblk", {"target_bpw": bits, **kept}
    kept = {"sensitivities": work / "gguf.json"}
    for mix in MIXES:
        yield f"{mix} nearest", "gguf", {"scheme": mix, "rounding": "nearest"}
        yield mix, "gguf", {"scheme": mix}
        size = (work / f"{mix} nearest.gguf").stat().st_size
        yield f"--target-size of {mix}", "gguf", {"target_size": size, **kept}
    for preset in ("small", "balanced", "near-lossless"):
        for suffix in ("qblk", "gguf"):
            losses = work / f"{suffix}.json"
            yield f"--preset {preset}", suffix, {"preset": preset, "sensitivities": losses}


def rows(
    model: Path, calibration: Path, aim: Path, text: Path, work: Path, windows: int
) -> Iterator[str]:
    yield "| file | container | bits | bytes | predicted KL | KL, nats |\n"
    yield "|---|---|---|---|---|---|\n"
    for name, suffix, options in asked(model, work):
        path = work / f"{name}.{suffix}"
        aimed = None if "nearest" in name.split() else aim
        done = qconvert.quantize(
            *(model,), output=path, calibration=calibration, text=aimed, force=True, **options
        )
        proof = qconvert.verify(
            *(path,), against=model, text=text, scoring="second-half", nsamples=windows,
            seqlen=256,
        )  # fmt: skip
        quality = proof.token_quality
        assert quality
        predicted = done.prediction.kl if done.prediction else None
        yield (
            f"| {name} | {suffix} | {done.model_bits_per_weight:.2f} | {path.stat().st_size:,} | "
            f"{f'{predicted:.5f}' if predicted else ''} | {quality.kl_mean:.5f} |\n"
        )


def encoder_rows(model: Path, work: Path) -> Iterator[str]:
    yield "| scheme | bits | mean SQNR, dB |\n|---|---|---|\n"
    for scheme in DATA_FREE:
        done = qconvert.quantize(model, scheme, output=work / f"{scheme}.qblk", force=True)
        found = [t.sqnr_db for t in done.tensors if t.quantized and t.sqnr_db is not None]
        bits = done.quantized_bits_per_weight
        yield f"| {scheme} | {bits:.3f} | {statistics.mean(found):.2f} |\n"


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    config = json.loads((given.model / "config.json").read_text())
    if given.text is None:
        found = encoder_rows(given.model, given.work)
    else:
        calibration = calibrated(given.model, given.calibration_text, given.work)
        texts = given.calibration_text, given.text
        found = rows(given.model, calibration, *texts, given.work, given.windows)
    print(f"{config['model_type']}, {given.model.name}\n")
    for line in found:
        print(line, end="", flush=True)


if __name__ == "__main__":
    main()

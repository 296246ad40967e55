"""How tests/families.json and the table of families in formats/gguf.md are made.

    python tests/make_families.py [CLASS ...]     with torch, transformers 5.24, llama_cpp and
                                                  llama-quantize on the PATH

Run by hand, never by the suite. For every family of `family_models` a model with random weights is
converted to F32 by qconvert, run by llama.cpp on 32 tokens, and its logits compared with those of
transformers; and the types that `qconvert quantize` gives its tensors for four mixes are compared
with those that llama-quantize announces.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from config_cases import TOLERANCE, Directories, text
from family_document import PAGE, with_table
from family_models import MORE, NARROW, as_stored, wide
from gguf import GGUFReader
from make_config_table import LlamaCpp, Transformers, has_classifier, is_encoder
from make_mixes import chosen

from qconvert.schemes import parse_scheme
from qconvert.stages.quantize import QuantizeOptions, quantize

TOKENS = 32
MIXES = ("q4_k_m", "q3_k_m", "q2_k", "iq4_xs")
LIMIT = 1e-3  # of the largest logit
MODELS = NARROW | MORE
TABLE = Path(__file__).with_name("families.json")


def converted(directory: Path, scheme: str) -> Path:
    """The file that qconvert makes."""
    path = directory.with_name(f"{directory.name}.{scheme}.gguf")
    quantize(directory, QuantizeOptions(scheme=parse_scheme(scheme), output=path, force=True))
    return path


def types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}


def measured(name: str, ours: Transformers, llama: LlamaCpp, home: Path) -> dict[str, Any]:
    """Figures of a family.

    Raises:
        ValueError: llama.cpp does not run the file.
    """
    config = wide(MODELS[name])
    shapes = as_stored(name, config, ours.shapes(config))
    directory = Directories(home).made(config["model_type"], config, shapes)
    whole = converted(directory, "f32")
    wanted = ours.outputs(directory, config)[:TOKENS]
    found = llama.outputs(whole, encoder=is_encoder(config), pooled=has_classifier(config))
    if isinstance(found, str):
        raise ValueError(found)
    found = found[:TOKENS]
    differing = {}
    for mix in MIXES:
        theirs = chosen(whole, [], mix)
        own = types(converted(directory, mix))
        differing |= {f"{mix} {t}": (own[t], theirs[t]) for t in own if own[t] != theirs[t]}
    return {
        "difference": float(f"{np.abs(found - wanted).max() / np.abs(wanted).max():.1e}"),
        "tensors": len(types(whole)),
        "types": len(MIXES) * len(types(whole)),
        "otherwise": differing,
    }


def main() -> None:
    wanted = sys.argv[1:] or list(MODELS)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    ours, llama = Transformers(), LlamaCpp()
    assert len(text()) >= TOKENS
    failed = 0
    for name in wanted:
        try:
            with tempfile.TemporaryDirectory() as home:
                found = measured(name, ours, llama, Path(home))
        except Exception:
            traceback.print_exc()
            print(f"FAILED: {name}", flush=True)
            failed += 1
            continue
        limit = TOLERANCE.get(MODELS[name]["model_type"], LIMIT)
        good = found["difference"] <= limit and not found["otherwise"]
        failed += not good
        print("      " if good else "FAILED", name, found, flush=True)
        table[name] = found
    table = {n: table[n] for n in MODELS if n in table}
    TABLE.write_text(json.dumps(table, indent=0) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), table))
    raise SystemExit(f"{failed} failed" if failed else 0)


if __name__ == "__main__":
    main()

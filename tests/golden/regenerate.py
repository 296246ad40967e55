"""Record what transformers and tokenizers make of the tiny models: golden/architectures.json.

    python tests/golden/regenerate.py        needs torch, transformers 5.23 and tokenizers

The tests only read the file; nothing of qconvert is used here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tiny_models import CONFIGS, TOKENIZERS, write_directory  # noqa: E402

SAMPLE = HERE.parents[1] / "samples" / "tiny-llama"
TEXTS = [
    "the quick brown fox is over there",
    "It's 12345 and 3.14, isn't it?",
    "naïve café — déjà vu",
    "  two  spaces,   three\n\n\nlines\ttab  ",
    "数字 and 漢字 😀",
    "x = 12\r\n\r\n    y",
    "a<tool>b<|end|>c</s>d[SEP]e",
    "",
    " ",
]
POSITIONS = (0, 7, 31)
EVERY = 9  # each ninth logit is recorded


def record(directory: Path, ids: list[int]) -> dict[str, object]:
    """Logits, or hidden states of an encoder, at a few positions."""
    encoder = json.loads((directory / "config.json").read_text())["model_type"] == "bert"
    model = (AutoModel if encoder else AutoModelForCausalLM).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        out = model.eval()(torch.tensor([ids]))
    found = (out.last_hidden_state if encoder else out.logits)[0].double()
    return {
        "ids": ids,
        "largest": float(f"{found.abs().max().item():.6g}"),
        "outputs": {
            str(p): [float(f"{v:.6g}") for v in found[p, ::EVERY].tolist()] for p in POSITIONS
        },
    }


def main() -> None:
    golden: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in CONFIGS.items():
            ids = [5 + (37 * i * i + 11 * i) % (config["vocab_size"] - 8) for i in range(32)]
            golden[name] = record(write_directory(Path(temporary) / name, name), ids)
        for kind, fields in TOKENIZERS.items():
            path = Path(temporary) / "tokenizer.json"
            path.write_text(json.dumps(fields, ensure_ascii=False))
            tokenizer = Tokenizer.from_file(str(path))
            golden[f"tokenizer {kind}"] = {t: tokenizer.encode(t).ids for t in TEXTS}
    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    prompt = tokenizer.encode("Once the file is open, the next step is to").ids
    sample = record(SAMPLE, (prompt * 4)[:32])
    model = AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    sample |= {"prompt": prompt, "greedy": made[0, len(prompt) :].tolist()}
    sample["tokens"] = {t: tokenizer.encode(t).ids for t in TEXTS}
    golden["sample tiny-llama"] = sample
    text = json.dumps(golden, ensure_ascii=True, indent=None, separators=(",", ":"))
    (HERE / "architectures.json").write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()

"""How activations.safetensors was made; needs torch and transformers.

python samples/make_activations.py
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
MODEL = HERE / "tiny-llama"
TEXT = """\
The with statement is used to wrap the execution of a block with methods defined by a context
manager. This allows common try...except...finally usage patterns to be encapsulated.
def parse(text):
    return [line.split(",") for line in text.splitlines()]
"""
TOKENS = 48


def main() -> None:
    """Record the input of every linear layer but the output head."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}

    def record(name: str) -> object:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[name] = inputs[0].reshape(-1, inputs[0].shape[-1])[:TOKENS].half().contiguous()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        model(**tokenizer(TEXT, return_tensors="pt"))
    save_file({name: x.clone() for name, x in found.items()}, HERE / "activations.safetensors")
    print(f"{len(found)} layers, {TOKENS} tokens", file=sys.stderr)


if __name__ == "__main__":
    main()

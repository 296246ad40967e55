"""How tests/mixes.json was made: what llama-quantize chooses for skeletons of models.

Run by hand, never by the suite: ``python tests/make_mixes.py`` with llama.cpp's ``llama-quantize``
on the PATH. The recorded answers are of llama.cpp commit 0c1e57098 (October 2026). A skeleton has
the metadata and the tensor names of a real architecture, rows of a real divisibility and few of
them, and zeros for values: ``--dry-run`` looks at nothing else.

The file holds per model its facts and its tensors (``*`` stands for every layer; type and shape,
outermost dimension first), and per run one letter a tensor, which ``types`` spells out.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

GOLDEN = Path(__file__).with_name("mixes.json")

MIXES = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4_moe"),
    *("f16", "bf16", "f32", "q1_0", "q2_0"),
)
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"),
    *("Q1_0", "Q2_0"),
)
LETTERS = dict(zip(TYPES, "abcdefghijklmnopqrstuvwxyz", strict=False))

Shape = tuple[int, ...]


def decoder(n: int, *, kv: int | None = None, ff: int | None = None) -> dict[str, Shape]:
    """The tensors of a layer with split attention and a gated feed-forward network."""
    return {
        "blk.*.attn_norm.weight": (n,),
        "blk.*.attn_q.weight": (4, n),
        "blk.*.attn_k.weight": (4, n),
        "blk.*.attn_v.weight": (4, n),
        "blk.*.attn_output.weight": (4, kv or n),
        "blk.*.ffn_gate.weight": (4, n),
        "blk.*.ffn_up.weight": (4, n),
        "blk.*.ffn_down.weight": (4, ff or n),
        "blk.*.ffn_norm.weight": (n,),
    }


def few(n: int) -> dict[str, Shape]:
    """Only those tensors of a layer that a rule speaks of."""
    return {k: s for k, s in decoder(n).items() if re.search("attn_[kvo]|ffn_(up|down)", k)}


def ends(n: int, *, tied: bool = False) -> dict[str, Shape]:
    return {
        "token_embd.weight": (8, n),
        "output_norm.weight": (n,),
        **({} if tied else {"output.weight": (8, n)}),
    }


# What convert_hf_to_gguf.py stores as F32 whatever the type of the rest.
FLOAT32 = re.compile(
    r"_norm\.weight$|ffn_gate_inp|position_embd|token_types|ssm_conv1d|time_mix_w1|(?<!\.weight)$"
)


def model(
    architecture: str,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    tensors: dict[str, Shape],
    *,
    n_expert: int = 0,
    dtype: str = "F16",
) -> dict[str, Any]:
    return {
        "facts": {
            "architecture": architecture,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_head_kv": n_head_kv,
            "n_expert": n_expert,
        },
        "tensors": {
            name: ["F32" if len(shape) == 1 or FLOAT32.search(name) else dtype, list(shape)]
            for name, shape in tensors.items()
        },
    }


FUSED = {
    "blk.*.attn_qkv.weight": (12, 256),
    "blk.*.attn_qkv.bias": (12,),
    "blk.*.attn_output.weight": (4, 256),
    "blk.*.ffn_up.weight": (8, 256),
    "blk.*.ffn_down.weight": (4, 512),
    "blk.*.attn_norm.weight": (256,),
}
MIXTRAL = {
    "blk.*.attn_q.weight": (4, 256),
    "blk.*.attn_k.weight": (4, 256),
    "blk.*.attn_v.weight": (4, 256),
    "blk.*.attn_output.weight": (4, 256),
    "blk.*.ffn_gate_inp.weight": (8, 256),
    "blk.*.ffn_gate_exps.weight": (8, 4, 256),
    "blk.*.ffn_up_exps.weight": (8, 4, 256),
    "blk.*.ffn_down_exps.weight": (8, 4, 256),
}
BERT = {
    "token_embd.weight": (8, 384),
    "position_embd.weight": (8, 384),
    "token_types.weight": (2, 384),
    "token_embd_norm.weight": (384,),
    "token_embd_norm.bias": (384,),
    "blk.*.attn_q.weight": (4, 384),
    "blk.*.attn_q.bias": (4,),
    "blk.*.attn_k.weight": (4, 384),
    "blk.*.attn_v.weight": (4, 384),
    "blk.*.attn_output.weight": (4, 384),
    "blk.*.attn_output_norm.weight": (384,),
    "blk.*.ffn_up.weight": (4, 384),
    "blk.*.ffn_down.weight": (4, 1536),
    "blk.*.layer_output_norm.weight": (384,),
}
# Names that the rules keep, or that look like others, beside a plain layer.
ODD = {
    "blk.*.attn_v.weight": (4, 256),
    "blk.*.ffn_down.weight": (4, 256),
    "blk.*.attn_kv_b.weight": (4, 256),
    "blk.*.attn_qkv.weight": (4, 256),
    "blk.*.one_matrix.weight": (1, 4, 256),
    "blk.*.attn_rel_b.weight": (4, 32),
    "blk.*.ssm_conv1d.weight": (4, 4),
    "blk.*.altup_router.weight": (4, 256),
    "blk.*.laurel_l.weight": (4, 256),
    "blk.*.one_row.weight": (1, 256),
    "blk.*.one_column.weight": (256, 1),
    "blk.*.attn_sinks": (4, 256),
    "blk.*.time_mix_w1.weight": (4, 256),
    "per_layer_token_embd.weight": (4, 256),
    "per_layer_model_proj.weight": (4, 256),
    "cls.output.weight": (2, 256),
}

MODELS = {
    "llama, 2 layers, tied": model("llama", 2, 4, 4, ends(256, tied=True) | decoder(256)),
    "llama, 8 layers": model("llama", 8, 8, 2, ends(256) | decoder(256, ff=768)),
    "llama, 11 layers, F32": model("llama", 11, 9, 3, ends(256) | decoder(256), dtype="F32"),
    "llama, 32 layers": model("llama", 32, 8, 4, ends(256) | few(256)),
    "llama, 80 layers": model("llama", 80, 8, 1, ends(256) | few(256)),
    "llama, 80 layers, no GQA": model("llama", 80, 8, 8, ends(256) | few(256)),
    "llama, rows of 64": model("llama", 4, 4, 4, ends(64) | decoder(64, ff=288)),
    "llama, rows of 40": model("llama", 4, 4, 4, ends(40, tied=True) | decoder(40, ff=256)),
    "llama, rows of 384": model("llama", 8, 8, 2, ends(384) | decoder(384, ff=1024), dtype="BF16"),
    "llama, odd names": model("llama", 9, 4, 4, ends(256) | ODD),
    "qwen2, 24 layers": model(
        "qwen2",
        24,
        14,
        2,
        ends(256, tied=True) | decoder(256) | {"blk.*.attn_v.bias": (4,)},
    ),
    "qwen2, 80 layers": model("qwen2", 80, 8, 1, ends(256) | few(256)),
    "qwen3, 28 layers": model("qwen3", 28, 16, 8, ends(256, tied=True) | decoder(256)),
    "gemma2, 26 layers": model("gemma2", 26, 8, 4, ends(256, tied=True) | decoder(256)),
    "gemma3, 18 layers, rows of 640": model(
        "gemma3", 18, 4, 1, ends(640, tied=True) | decoder(640, kv=1024, ff=2048)
    ),
    "phi3, 32 layers": model("phi3", 32, 32, 32, ends(256) | FUSED),
    "bert, 6 layers": model("bert", 6, 12, 12, BERT),
    "mixtral, 32 layers": model("llama", 32, 32, 8, ends(256) | MIXTRAL, n_expert=8),
    "qwen2moe, 24 layers, 60 experts": model(
        "qwen2moe",
        24,
        16,
        16,
        ends(256)
        | MIXTRAL
        | {"blk.*.ffn_down_shexp.weight": (4, 256), "blk.*.ffn_gate_inp_shexp.weight": (1, 256)},
        n_expert=60,
    ),
    "falcon, 32 layers": model("falcon", 32, 71, 1, ends(256) | FUSED),
    "gpt2, 12 layers": model("gpt2", 12, 12, 12, ends(256, tied=True) | FUSED),
}

# Beside the plain run of every mix on every model.
VARIANTS = (
    ("llama, 8 layers", ["--pure"], MIXES),
    ("llama, 2 layers, tied", ["--pure"], ["q4_k_m", "q4_0", "mxfp4_moe", "tq2_0"]),
    ("bert, 6 layers", ["--pure"], ["q4_0", "q8_0", "mxfp4_moe", "f16"]),
    ("llama, 32 layers", ["--imatrix"], MIXES),
    ("bert, 6 layers", ["--imatrix"], ["q4_0", "iq4_xs", "q4_k_m"]),
    ("llama, 8 layers", ["--output-tensor-type", "q8_0"], ["q4_k_m", "q4_0", "f16"]),
    ("llama, 2 layers, tied", ["--output-tensor-type", "f16"], ["q4_k_m", "q5_1"]),
    ("llama, 8 layers", ["--token-embedding-type", "q5_k"], ["q3_k_s", "q8_0", "bf16"]),
    ("llama, 2 layers, tied", ["--token-embedding-type", "q4_1"], ["q4_k_m"]),
    (
        "llama, 2 layers, tied",
        ["--token-embedding-type", "q4_1", "--output-tensor-type", "q8_0"],
        ["q4_k_m"],
    ),
    (
        "llama, odd names",
        ["--token-embedding-type", "q5_0", "--output-tensor-type", "q4_k"],
        ["q6_k"],
    ),
    # Layers that are named do not count among the first four of q4_k_s.
    ("llama, 8 layers", ["--tensor-type", r"blk\.[02]\.attn_v=q8_0"], ["q4_k_s", "q3_k_m"]),
    (
        "llama, 8 layers",
        [
            "--tensor-type",
            "ffn_[ud].*=iq4_nl",
            "--tensor-type",
            "FFN=q6_k",
            "--tensor-type",
            "_Q=bf16",
        ],
        ["q4_k_m", "q8_0"],
    ),
    ("llama, 8 layers", ["--pure", "--tensor-type", "attn_output=q5_k"], ["q4_k_m"]),
    ("bert, 6 layers", ["--tensor-type", "ffn_up=q6_k", "--tensor-type", "attn=tq1_0"], ["q4_k_m"]),
    ("llama, rows of 40", ["--tensor-type", "attn_q=q8_0"], ["q4_0"]),
)


def expanded(described: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, types and shapes with ``*`` replaced by each layer, layers one after the other."""
    layers: list[int | None] = [None, *range(described["facts"]["n_layer"])]
    return [
        (name.replace("*", str(layer)), dtype, tuple(shape))
        for layer in layers
        for name, (dtype, shape) in described["tensors"].items()
        if ("*" in name) == (layer is not None)
    ]


def write_skeleton(path: Path, described: dict[str, Any]) -> None:
    facts = described["facts"]
    architecture = facts["architecture"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(described["tensors"]["token_embd.weight"][1][-1])
    writer.add_feed_forward_length(256)
    writer.add_block_count(facts["n_layer"])
    writer.add_head_count(facts["n_head"])
    writer.add_head_count_kv(facts["n_head_kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_rope_dimension_count(8)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_sliding_window(64)
    writer.add_causal_attention(architecture != "bert")
    writer.add_tokenizer_model("none")
    if facts["n_expert"]:
        writer.add_expert_count(facts["n_expert"])
        writer.add_expert_used_count(2)
    for name, dtype, shape in expanded(described):
        kind = gguf.GGMLQuantizationType[dtype]
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype]
        zeros = np.zeros(shape, stored)
        if dtype == "BF16":
            zeros = zeros.view(np.uint8)
        writer.add_tensor(name, zeros, raw_dtype=kind)
    finish(writer)


def write_imatrix(path: Path, described: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 16)
    for name, _, shape in expanded(described):
        if name.startswith("blk.") and len(shape) > 1:
            writer.add_tensor(f"{name}.in_sum2", np.ones((1, shape[-1]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def chosen(skeleton: Path, arguments: list[str], mix: str) -> dict[str, str]:
    """The type of every tensor that ``llama-quantize --dry-run`` announces."""
    done = subprocess.run(
        ["llama-quantize", "--dry-run", *arguments, skeleton, mix],
        capture_output=True,
        text=True,
        errors="replace",  # it cuts long lists of tokens within a character
        check=False,
    )
    output = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(output)
    types = {}
    # Warnings fall between a tensor's name and its sizes.
    for piece in re.split(r"\[ *\d+/ *\d+\] ", output)[1:]:
        name, source = re.match(r"(\S+) +- \[.*?\], type = +(\S+),", piece).groups()
        target = re.search(r"size = .*MiB -> .*MiB \((\S+)\)", piece)
        types[name] = (target[1] if target else source).upper()
    return types


def record(directory: Path) -> dict[str, Any]:
    runs = []
    for index, (name, described) in enumerate(MODELS.items()):
        skeleton, imatrix = directory / f"{index}.gguf", directory / f"{index}.imatrix.gguf"
        write_skeleton(skeleton, described)
        write_imatrix(imatrix, described)
        cases = [([], mix) for mix in MIXES]
        if name == "llama, odd names":
            # llama-quantize keeps what it does not quantize; the converter would have cast it.
            cases = [case for case in cases if case[1] not in ("bf16", "f32")]
        if name in ("llama, rows of 64", "llama, rows of 40", "llama, odd names"):
            # llama-quantize stops there: it has nothing to fall back on.
            cases = [case for case in cases if case[1] != "q1_0"]
        cases += [(arguments, m) for model, arguments, ms in VARIANTS if model == name for m in ms]
        for arguments, mix in cases:
            given = [x for a in arguments for x in ([a, str(imatrix)] if a == "--imatrix" else [a])]
            types = chosen(skeleton, given, mix)
            letters = "".join(LETTERS[types[tensor]] for tensor, *_ in expanded(described))
            runs.append([name, mix, arguments, letters])
        skeleton.unlink()
        print(name, len(cases), flush=True)
    return {
        "types": {letter: name for name, letter in LETTERS.items()},
        "models": MODELS,
        "runs": runs,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        golden = record(Path(directory))
    lines = [f'"types": {json.dumps(golden["types"])}']
    for key, items in (
        ("models", [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in golden["models"].items()]),
        ("runs", [json.dumps(run) for run in golden["runs"]]),
    ):
        opening, closing = ("{", "}") if key == "models" else ("[", "]")
        lines.append(f'"{key}": {opening}\n' + ",\n".join(items) + f"\n{closing}")
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

"""How tests/data/experts.imatrix.{gguf,dat} were made: by llama-imatrix, and left as it wrote them.

Run by hand, never by the suite: ``python tests/make_imatrix.py`` with llama.cpp's ``llama-imatrix``
on the PATH (llama.cpp commit 0c1e57098, October 2026). The model is one random layer of four
experts, of which the router can never choose the last.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np

DATA = Path(__file__).with_name("data")
WIDTH, FEED_FORWARD, EXPERTS, USED = 32, 48, 4, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
CHUNK, CHUNKS = 64, 3


def write_model(path: Path) -> None:
    random = np.random.default_rng(11)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3, shape).astype(np.float32)

    embedding = matrix(len(TOKENS), WIDTH)
    embedding[:, 0] = 3  # the same for every token: the router sees it ...
    router = matrix(EXPERTS, WIDTH)
    router[-1, 0] = -100  # ... and turns the last expert down
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CHUNK)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, values in {
        "token_embd.weight": embedding,
        "output_norm.weight": np.ones(WIDTH, np.float32),
        "output.weight": matrix(len(TOKENS), WIDTH),
        "blk.0.attn_norm.weight": np.ones(WIDTH, np.float32),
        "blk.0.attn_q.weight": matrix(WIDTH, WIDTH),
        "blk.0.attn_k.weight": matrix(WIDTH, WIDTH),
        "blk.0.attn_v.weight": matrix(WIDTH, WIDTH),
        "blk.0.attn_output.weight": matrix(WIDTH, WIDTH) / 8,
        "blk.0.ffn_norm.weight": np.ones(WIDTH, np.float32),
        "blk.0.ffn_gate_inp.weight": router,
        "blk.0.ffn_gate_exps.weight": matrix(EXPERTS, FEED_FORWARD, WIDTH),
        "blk.0.ffn_up_exps.weight": matrix(EXPERTS, FEED_FORWARD, WIDTH),
        "blk.0.ffn_down_exps.weight": matrix(EXPERTS, WIDTH, FEED_FORWARD),
    }.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory, "model.gguf"))
        words = np.random.default_rng(12).integers(33, 127, CHUNK * CHUNKS)
        Path(directory, "words.txt").write_text("".join(map(chr, words)))
        for form in ("gguf", "dat"):
            output = DATA / f"experts.imatrix.{form}"
            options = f"-m model.gguf -f words.txt -c {CHUNK} --chunks {CHUNKS} -t 1 --no-ppl"
            subprocess.run(
                ["llama-imatrix", *options.split(), "--output-format", form, "-o", output],
                cwd=directory,
                check=True,
            )


if __name__ == "__main__":
    main()

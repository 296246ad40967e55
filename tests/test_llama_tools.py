"""llama.cpp's own tools against ours, on the same files and the same text.

Each test skips, with the reason, where a tool that it runs is not on the PATH.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import ROOT, Call, Finished, execute
from numpy.typing import NDArray

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

SAMPLES = ROOT / "samples"
LLAMA, TEXT = SAMPLES / "tiny-llama", SAMPLES / "eval.txt"
# Weights that ggml has repacked are multiplied with AMX, at which some virtual machines stop that
# say they have it.
COMMON = ("-t", "1", "--no-repack")
# As transformers does: attention in float32, not through a cache of float16.
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")


def tool(name: str, *arguments: Any) -> Finished:
    """Run one of llama.cpp's tools to its end."""
    done = execute([name, *arguments])
    assert done.code == 0, f"{name} {arguments}: exit code {done.code}\n{done.err[-2000:]}"
    return done


def need(*tools: str) -> None:
    for name in tools:
        if shutil.which(name) is None:
            pytest.skip(f"llama.cpp's {name} is not on the PATH")
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")


# --- perplexity -----------------------------------------------------------------------------------

PERPLEXITY = ("-f", TEXT, "-c", "256", *COMMON, *EXACT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, done: Call) -> Path:
    """llama.cpp's distributions of every scored token, by the source in float32."""
    need("llama-perplexity", "llama-quantize")
    place = tmp_path_factory.mktemp("base")
    done("quantize", LLAMA, "--scheme", "f32", "-o", place / "f32.gguf")
    path = place / "base"
    tool("llama-perplexity", "-m", place / "f32.gguf", *PERPLEXITY, "--kl-divergence-base", path)
    return path


def by_llama_cpp(path: Path, base: Path) -> dict[str, float]:
    """What llama-perplexity says of a file; divergences in nats."""
    arguments = ("-m", path, *PERPLEXITY, "--kl-divergence-base", base, "--kl-divergence")
    told = tool("llama-perplexity", *arguments).out
    names = {
        "source_perplexity": r"Mean PPL\(base\)",
        "perplexity": r"Mean PPL\(Q\)",
        "kl_mean": "Mean +KLD",
        "same_top": "Same top p",
    }
    found: dict[str, float] = {}
    for name, label in names.items():
        line = re.search(rf"^{label} *: *([-\d.]+) ± +([-\d.]+|-?nan)", told, re.MULTILINE)
        assert line, told
        found[name], found[f"{name}_error"] = float(line[1]), float(line[2])
    return found


@pytest.mark.parametrize("scheme", ["f16", "q8_0", "q4_k_m", "q4_0", "q2_k"])
def test_perplexity_and_divergence_are_those_of_llama_perplexity(
    scheme: str, base: Path, tmp_path: Path, done: Call
) -> None:
    """llama.cpp multiplies ggml's types with activations of 8 bits, which adds a divergence of its
    own; what ggml decodes, in float32, it computes as we do.
    """
    path = tmp_path / "m.gguf"
    done("quantize", LLAMA, "--scheme", scheme, "-o", path)
    check_quality(path, base, done)


def test_a_compensated_mix_within_a_budget_loses_what_llama_perplexity_says(
    base: Path, tmp_path: Path, done: Call
) -> None:
    known, path = tmp_path / "c.safetensors", tmp_path / "m.gguf"
    options = ("--text", SAMPLES / "calibration.txt", "--seqlen", 256, "--nsamples", 8)
    more = ("--observer", "minmax", "--gram", "--fisher")
    done("calibrate", LLAMA, *options, *more, "-o", known)
    options = ("--target-bpw", 4.6, "--calibration", known, "-o", path, "--json")
    report = done("quantize", LLAMA, *options).json
    assert len({t["stored"] for t in report["tensors"] if t["quantized"]}) > 3
    assert {t["rounding"] for t in report["tensors"]} >= {"compensated"}
    check_quality(path, base, done)


def check_quality(path: Path, base: Path, done: Call) -> None:
    decoded = path.with_name("decoded.gguf")
    tool("llama-quantize", "--allow-requantize", path, decoded, "F32", "1")
    options = ("--text", TEXT, "--seqlen", 256, "--scoring", "second-half", "--json")
    ours = done("verify", path, "--against", LLAMA, *options).json["token_quality"]

    # The base holds logarithms of probabilities in steps of a range over 65,535.
    theirs = by_llama_cpp(decoded, base)
    assert ours["source_perplexity"] == pytest.approx(theirs["source_perplexity"], rel=2e-5)
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=2e-5)
    assert ours["perplexity_error"] == pytest.approx(theirs["perplexity_error"], rel=1e-4)
    assert ours["kl_mean"] == pytest.approx(theirs["kl_mean"], rel=5e-3, abs=3e-6)
    assert 100 * ours["same_top"] == pytest.approx(theirs["same_top"], abs=0.1)

    theirs = by_llama_cpp(path, base)
    assert abs(ours["perplexity"] - theirs["perplexity"]) < 0.1 * ours["perplexity_error"]
    assert -3e-6 < theirs["kl_mean"] - ours["kl_mean"] < 3e-4


# --- importance matrix ----------------------------------------------------------------------------


def sums_of(path: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Sums of squares and counts, as gguf-py reads them."""
    arrays = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): (sums, arrays[name.replace(".in_sum2", ".counts")])
        for name, sums in arrays.items()
        if name.endswith(".in_sum2")
    }


def test_the_importance_matrix_is_that_of_llama_imatrix(tmp_path: Path, done: Call) -> None:
    need("llama-imatrix")
    text, ours, theirs = SAMPLES / "calibration.txt", tmp_path / "a.gguf", tmp_path / "b.gguf"
    done("quantize", LLAMA, "--scheme", "f32", "-o", tmp_path / "f32.gguf")
    arguments = ("-m", tmp_path / "f32.gguf", "-f", text, "-c", "256", *COMMON, *EXACT)
    tool("llama-imatrix", *arguments, "--process-output", "--no-ppl", "-o", theirs)
    options = ("--text", text, "--seqlen", 256, "--imatrix", ours)
    done("calibrate", LLAMA, *options, "-o", tmp_path / "c.safetensors")
    found, wanted = sums_of(ours), sums_of(theirs)
    assert found.keys() == wanted.keys()
    assert len(found) == 29
    for name, (sums, counts) in wanted.items():
        assert (found[name][1] == counts).all()
        apart = np.abs(found[name][0] / sums - 1)
        assert apart.max() < 5e-4, name
        assert np.median(apart) < 1e-4, name


# --- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "least"), [("f32", 0.99999), ("q8_0", 0.9994), ("q6_k", 0.999), ("q4_k_m", 0.985)]
)
def test_embeddings_in_llama_cpp_point_where_those_of_transformers_do(
    scheme: str, least: float, minilm: Path, tmp_path: Path, done: Call
) -> None:
    need("llama-embedding")
    import torch
    import transformers

    lines = [s for s in TEXT.read_text(encoding="utf-8").splitlines() if len(s) > 60][:16]
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(lines), encoding="utf-8")
    done("quantize", minilm, "--scheme", scheme, "-o", tmp_path / "m.gguf")
    options = ("--pooling", "mean", "--embd-output-format", "json", *COMMON)
    told = tool("llama-embedding", "-m", tmp_path / "m.gguf", "-f", text, *options)
    found = [np.array(e["embedding"]) for e in json.loads(told.out)["data"]]
    assert len(found) == len(lines)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    cosines = []
    for line, embedding in zip(lines, found, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(line, return_tensors="pt")).last_hidden_state
        wanted = hidden[0].mean(0).double().numpy()
        cosines.append(embedding @ wanted / np.linalg.norm(embedding) / np.linalg.norm(wanted))
    assert np.mean(cosines) > least
    # What the weights cost by our own measure; llama.cpp's activations of 8 bits cost the rest.
    said = done("verify", tmp_path / "m.gguf", "--against", minilm, "--text", text, "--json").json
    assert np.mean(cosines) < said["embedding_quality"]["cosine_mean"] + 1e-5

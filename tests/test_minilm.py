"""all-MiniLM with static 8-bit activations: the figure that samples/calibration.md gives, by its
commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import ROOT, Call

SAMPLES = ROOT / "samples"
CALIBRATION, SENTENCES = SAMPLES / "calibration.txt", SAMPLES / "sentences.txt"


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_sentences_are_picked_by_their_rule() -> None:
    """samples/README.md: capital, full stop, 5 to 40 words, not in the other texts, no line twice.

    That none was left out cannot be seen here: the text they are from is not in the repository.
    """
    found = lines(SENTENCES)
    assert len(found) == 250
    assert len(set(found)) == len(found)
    assert not set(found) & {*lines(CALIBRATION), *lines(SAMPLES / "eval.txt")}
    for line in found:
        assert "A" <= line[0] <= "Z", line
        assert line.endswith("."), line
        assert 5 <= len(line.split()) <= 40, line


@pytest.mark.slow
def test_static_activations_keep_the_embeddings_of_sentences(
    minilm: Path, tmp_path: Path, done: Call
) -> None:
    if os.environ.get("QCONVERT_KERNELS") == "reference":
        pytest.skip("native kernels give the same bits: once is enough")
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")
    c, q = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    done("calibrate", minilm, "--text", CALIBRATION, "--nsamples", 300, "-o", c)
    done("quantize", minilm, "--scheme", "q8_channel", "--calibration", c, "-o", q)
    against = ("--against", minilm, "--text", SENTENCES)
    told = done("verify", q, *against, "--activations", "static", "--min-cosine", 0.995, "--json")
    found = told.json["embedding_quality"]
    assert found["sentences"] == 250
    assert found["cosine_mean"] >= 0.995

"""verify --run: llama.cpp held against transformers on the weights that a GGUF file decodes to."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Call

from qconvert.running.llama_cpp import LlamaRun, run_gguf
from qconvert.stages import verify_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA = ROOT / "samples" / "tiny-llama"
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp: pip install qconvert[llama]",
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, done: Call) -> Path:
    """The sample as F32. Read only."""
    path = tmp_path_factory.mktemp("run") / "m.gguf"
    done("quantize", LLAMA, "--scheme", "f32", "-o", path)
    return path


def check(report: Path, id: str) -> dict[str, Any]:
    found = [c for c in json.loads(report.read_text())["checks"] if c["id"] == id]
    return found[0] if found else {}


@needs_llama_cpp
@pytest.mark.parametrize("scheme", ["f32", "q4_k_m"])
def test_llama_cpp_computes_the_same(scheme: str, tmp_path: Path, call: Call, done: Call) -> None:
    path, report = tmp_path / "m.gguf", tmp_path / "r.json"
    done("quantize", LLAMA, "--scheme", scheme, "-o", path)
    result = call("verify", path, "--against", LLAMA, "--run", "--report", report)
    assert result.code == 0, result
    run = json.loads(report.read_text())["llama_cpp"]
    assert run["tokens"] == 32
    assert run["largest_difference"] < (1e-5 if scheme == "f32" else 0.05)
    assert run["kl_mean"] < (1e-9 if scheme == "f32" else 1e-2)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("key", "id"),
    [
        ("llama.rope.freq_base=float:100", "llama-outputs"),
        ("tokenizer.ggml.pre=str:falcon", "llama-tokens"),
        ("llama.attention.head_count=int:3", "llama-runs"),
    ],
)
def test_a_wrong_conversion_is_found(
    key: str, id: str, tmp_path: Path, call: Call, done: Call
) -> None:
    path, report = tmp_path / "m.gguf", tmp_path / "r.json"
    done("quantize", LLAMA, "--scheme", "f32", "--override-kv", key, "-o", path)
    result = call("verify", path, "--against", LLAMA, "--run", "--report", report)
    assert result.code == 1, result
    assert check(report, id)["status"] == "fail"


def theirs(tokens: list[int]) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize(
    ("added", "dropped", "failing"),
    [
        (0.0, 0, None),
        (1e-3, 0, None),
        (1e-2, 0, "llama-outputs"),
        (float("nan"), 0, "llama-outputs"),
        (0.0, 1, "llama-tokens"),
    ],
)
def test_what_is_held_against_transformers(
    added: float,
    dropped: int,
    failing: str | None,
    gguf: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs that are off by a share of the largest one, in place of llama.cpp's."""

    def stand_in(path: Path, text: str, tokens: list[int], wanted: str) -> LlamaRun:
        assert (path, wanted, len(tokens)) == (gguf, "logits", 32)
        ids = transformers.AutoTokenizer.from_pretrained(LLAMA)(text)["input_ids"]
        assert ids[:32] == tokens
        outputs = theirs(tokens)
        outputs[3, 7] += added * np.abs(outputs).max()
        return LlamaRun("0", ids[: len(ids) - dropped], outputs)

    monkeypatch.setattr(verify_run, "run_gguf", stand_in)
    report = tmp_path / "r.json"
    result = call("verify", gguf, "--against", LLAMA, "--run", "--report", report)
    assert result.code == (1 if failing else 0), result
    for id in ("llama-runs", "llama-tokens", "llama-outputs"):
        assert check(report, id)["status"] == ("fail" if id == failing else "pass")
    if failing is None:
        found = json.loads(report.read_text())["llama_cpp"]["largest_difference"]
        assert found == pytest.approx(added, rel=0.01, abs=1e-5)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("import os\nos._exit(3)\n", "llama.cpp ended its process: 3"),
        ("import sys\nsys.exit('GGML_ASSERT(x) failed')\n", "GGML_ASSERT(x) failed"),
    ],
)
def test_a_process_that_ends_is_a_failed_check(
    module: str, told: str, gguf: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = tmp_path / "r.json"
    result = call("verify", gguf, "--against", LLAMA, "--run", "--report", report)
    assert result.code == 1, result
    assert told in check(report, "llama-runs")["detail"]


def test_without_llama_cpp_the_command_to_install_is_told(
    gguf: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('none', name='llama_cpp')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = call("verify", gguf, "--against", LLAMA, "--run")
    assert result.code == 4
    assert "no package 'llama_cpp'" in result.err
    assert "pip install 'qconvert[llama]'" in result.err


def test_a_slow_process_is_ended(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("qconvert.running.llama_cpp._SECONDS", 1)
    assert "no answer in 1 seconds" in str(run_gguf(gguf, "a", [1], "logits").refused)


def test_refused(small_qblk: Path, gguf: Path, call: Call) -> None:
    without = call("verify", gguf, "--run")
    assert without.code == 2
    assert "--run needs the source" in without.err
    result = call("verify", small_qblk, "--against", LLAMA, "--run")
    assert result.code in (1, 2)

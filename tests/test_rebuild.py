"""``verify --rebuild``: a recorded recipe gives the same bytes, or the report says what differs."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Call, Finished, Qblk, gaussian, save
from tiny_models import write_directory

from qconvert.commands.rebuild import arguments_of
from qconvert.errors import FormatError
from qconvert.files import open_model
from qconvert.files.provenance import provenance_of, read_provenance

LLAMA = ROOT / "samples/tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of the smallest size, in a directory."""
    return write_directory(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.mlp.up.weight": gaussian(i, 40, 64) for i in range(3)}
    return save(tmp_path / "m.safetensors", tensors | {"b.bias": gaussian(9, 33)})


def rebuild(path: Path, source: Path, call: Call, *more: object) -> Finished:
    before = sorted(p.name for p in path.parent.iterdir())
    done = call("verify", path, "--against", source, "--rebuild", *more)
    assert sorted(p.name for p in path.parent.iterdir()) == before  # nothing is left behind
    return done


@pytest.mark.parametrize(
    "line",
    [
        "--scheme q4_block32 -o m.qblk",
        "--scheme q8_channel --range percentile --percentile 99.5 -o m.qblk",
        "--scheme q4_block64 --range minmax --keep *lm_head* --hash-source -o m.qblk",
        "--scheme q4_channel --tensor-scheme *k_proj*=c4_block16 --equalise off -o m.qblk",
        "--scheme q4_block32 --min-values 5000 -o m.qblk",
        "--scheme bf16 -o m.qblk",
        "--scheme q4_0 --pure --tensor-type attn_v=q8_0 --override-kv general.x=str:a=b -o m.gguf",
        "--scheme q8_0 --override-kv a.b=bool:true --override-kv a.c=float:0.5 -o m.gguf",
        "--scheme q4_k_m --output-tensor-type q8_0 --shard-size 60K -o m.gguf",
        "--scheme q5_1 --raw --tensor-scheme *k_proj*=q8_0 -o m.gguf",
        "--target-bpw 5.5 -o m.qblk",
        "--preset small -o m.gguf",
        "--scheme w8a16_channel -o made",
    ],
)
def test_a_recipe_gives_the_same_bytes_again(
    line: str, model: Path, tmp_path: Path, call: Call
) -> None:
    words = line.split()
    name = words.pop()
    made = call("quantize", model, *words, tmp_path / name)
    assert made.code == 0, made.err
    path = tmp_path / name
    if not path.exists():
        path = min(tmp_path.iterdir())
    done = rebuild(path, model, call)
    assert "the recorded recipe gives the same bytes again" in done.out, done
    assert "rebuilt byte for byte" in done.out.splitlines()[-1]


def test_a_calibration_is_asked_for_and_held_against_its_digest(
    source: Path, tmp_path: Path, call: Call
) -> None:
    x = {f"layers.{i}.mlp.up": gaussian(20 + i, 32, 64) for i in range(3)}
    samples = save(tmp_path / "x.safetensors", x)
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    call("calibrate", source, "--activations", samples, "-o", one)
    call("calibrate", source, "--activations", samples, "--observer", "mse", "-o", other)
    path = tmp_path / "m.qblk"
    line = ("quantize", source, "--scheme", "q4_block32", "--calibration", one, "-o", path)
    assert call(*line).code == 0
    digest = hashlib.sha256(one.read_bytes()).hexdigest()
    missing = rebuild(path, source, call)
    assert missing.code == 2
    assert f"wanted --calibration FILE with SHA-256 {digest}" in missing.err
    wrong = rebuild(path, source, call, "--calibration", other)
    assert wrong.code == 2
    assert "--calibration is not the one that the file was made with" in wrong.err
    assert rebuild(path, source, call, "--calibration", one).code == 0
    plain = tmp_path / "n.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", plain)
    assert "was made without one" in rebuild(plain, source, call, "--calibration", one).err


def test_another_source_is_named(source: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "--hash-source", "-o", path)
    data = bytearray(source.read_bytes())
    data[-200] ^= 1  # a weight; the header stays
    source.write_bytes(data)
    done = rebuild(path, source, call)
    assert done.code == 1
    assert "the source is not the one that is recorded: sha256 of 'm.safetensors' is" in done.out
    moved = shutil.move(source, tmp_path / "n.safetensors")
    done = rebuild(path, Path(moved), call)
    assert "name of 'n.safetensors' is n.safetensors, recorded m.safetensors" in done.out


def test_the_first_other_tensor_is_named(source: Path, tmp_path: Path, call: Call) -> None:
    """A code is changed, and the digests made sound again."""
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "--range", "minmax", "-o", path)
    file = Qblk(path)
    file.data["layers.1.mlp.up.weight", "codes"][0] ^= 1
    file.write(path)
    done = rebuild(path, source, call)
    assert done.code == 1
    assert "gives other bytes: tensor 'layers.1.mlp.up.weight' is the first" in done.out


def test_another_version_is_told(
    source: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.qblk"
    with monkeypatch.context() as m:
        m.setattr("qconvert.stages.conversion.__version__", "0.0.9")
        call("quantize", source, "--scheme", "q4_block32", "-o", path)
    done = rebuild(path, source, call)
    assert done.code == 1
    assert "gives other bytes (made by qconvert 0.0.9, run again by qconvert 0.1.0)" in done.out
    assert "tensors are equal; tool is recorded as qconvert 0.0.9, now qconvert 0.1.0" in done.out


def test_what_cannot_be_run_again_is_refused(source: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", path)
    assert "needs the source" in call("verify", path, "--rebuild").err
    assert "goes with --rebuild" in call("verify", path, "--imatrix", source).err
    file = Qblk(path)
    file.header["provenance"]["options"]["newer"] = 1
    file.write(path)
    done = rebuild(path, source, call)
    assert (done.code, "does not know an option of the recipe, found newer" in done.err) == (
        3,
        True,
    )
    file.header["provenance"] = {}
    file.write(path)
    assert "no provenance of qconvert" in rebuild(path, source, call).err


@pytest.mark.parametrize(
    ("text", "strict"),
    [("{", FormatError), ("[1]", [1]), ("5", 5), ('{"tool": "a"}', {"tool": "a"}), (None, {})],
)
def test_who_shows_a_provenance_bears_what_who_goes_by_it_refuses(
    text: str | None, strict: object, tmp_path: Path
) -> None:
    metadata = {} if text is None else {"qconvert.provenance": text}
    path = save(tmp_path / "m.safetensors", {"w": gaussian(1, 4, 4)}, **metadata)
    with closing(open_model(path)) as model:
        assert provenance_of(model) == (strict if isinstance(strict, dict) else {})
        if strict is FormatError:
            with pytest.raises(FormatError, match="not JSON"):
                read_provenance(model)
        else:
            assert read_provenance(model) == strict


def test_budgets_by_their_names() -> None:
    for name, argument in (
        ("balanced", {"preset": "balanced"}),
        ("4.3bpw", {"target_bpw": 4.3}),
        ("123456bytes", {"target_size": 123456}),
        ("0.02nats", {"max_kl": 0.02}),
    ):
        assert arguments_of({"budget": name}, "qblk") == {"format": "qblk"} | argument


def test_the_report_has_the_check(source: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", path)
    told = json.loads(rebuild(path, source, call, "--json").out)
    (check,) = [c for c in told["checks"] if c["id"] == "rebuild"]
    assert (told["status"], check["status"]) == ("pass", "pass")
    assert np.isfinite(told["verdict"]["worst_db"])

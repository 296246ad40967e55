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
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import write_directory

import qconvert
from qconvert.commands.rebuild import arguments_of
from qconvert.errors import FormatError
from qconvert.files import open_model
from qconvert.files.atomic import completed
from qconvert.files.provenance import provenance_of, read_provenance
from qconvert.stages.rebuild import Recipe

LLAMA = ROOT / "samples/tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of the smallest size, in a directory."""
    return write_directory(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.mlp.up.weight": gaussian(i, 40, 64) for i in range(3)}
    return save(tmp_path / "m.safetensors", tensors | {"b.bias": gaussian(9, 33)})


def words(done: Finished) -> str:
    """What was printed, in one line."""
    return " ".join(done.out.split())


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
        "--scheme w4a16_g32 --shard-size 60K -o made",
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


@pytest.fixture
def made(model: Path, tmp_path: Path, call: Call) -> Path:
    """A directory of codes, made of `model`."""
    path = tmp_path / "made"
    assert call("quantize", model, "--scheme", "w8a16_channel", "-o", path).code == 0
    return path


def test_files_that_no_recipe_makes_are_named(made: Path, model: Path, call: Call) -> None:
    (made / "sub").mkdir()
    for name in ("A.md", "sub/B.md", "Z.md"):
        (made / name).write_text("by somebody")
    # Lists and reports of this run are under construction in there meanwhile.
    more = ("--manifest", made / "SHA256SUMS", "--junit", made / "j.xml")
    line = ("verify", made, "--against", model, "--rebuild")
    done = call(*line, *more, "--report", made / "r.json")
    assert done.code == 0, done
    assert "rebuilt byte for byte" in done.out.splitlines()[-1]
    told = json.loads((made / "r.json").read_text())["checks"][-1]["detail"]
    assert told.endswith("gives the same bytes again; not of it: A.md, Z.md, sub/B.md")
    done = call(*line, *more, "--force", "--json")
    told = json.loads(done.out)["checks"][-1]["detail"]
    assert told.endswith("again; not of it: A.md, SHA256SUMS, Z.md and 3 more")


def test_a_file_that_a_directory_lacks_is_named(model: Path, tmp_path: Path, call: Call) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    shutil.copytree(model, source)
    (source / "generation_config.json").write_text("{}")
    assert call("quantize", source, "--scheme", "w8a16_channel", "-o", made).code == 0
    assert rebuild(made, source, call).code == 0
    (made / "generation_config.json").unlink()
    done = rebuild(made, source, call)
    told = "gives other bytes: 'generation_config.json' is made again and not there"
    assert (done.code, told in words(done)) == (1, True), done


def test_a_directory_is_not_made_by_a_recipe_of_a_file(made: Path, model: Path, call: Call) -> None:
    path = made / "model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["qconvert.provenance"])
    recipe["options"] = {"scheme": "q4_block32", "format": "qblk"}
    save_file(load_file(path), path, metadata | {"qconvert.provenance": json.dumps(recipe)})
    done = rebuild(made, model, call)
    assert (done.code, "gives other bytes: 'made' is not made again" in words(done)) == (1, True)


def test_the_current_directory_is_made_again(
    made: Path, model: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made / "sub").mkdir()
    for place, name in ((made, "."), (made / "sub", "..")):
        monkeypatch.chdir(place)
        done = call("verify", name, "--against", model, "--rebuild")
        assert (done.code, "rebuilt byte for byte" in done.out) == (0, True), done
        assert [p.name for p in made.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["m.qblk", "m.gguf", "made"])
def test_what_is_made_again_is_no_output_of_the_run(name: str, model: Path, tmp_path: Path) -> None:
    scheme = {"m.qblk": "q4_block32", "m.gguf": "q4_0", "made": "w8a16_channel"}[name]
    qconvert.quantize(model, scheme, output=tmp_path / name)
    completed.clear()
    report = qconvert.verify(tmp_path / name, against=model, rebuild=True)
    assert (report.status, completed) == ("pass", [])


def test_what_is_needed_is_looked_at_before_the_weights(
    source: Path, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", path)
    assert "check digests: " in call("verify", path).err  # what is said of reading them
    needless = rebuild(path, source, call, "--imatrix", source)
    assert (needless.code, "digests" in needless.err) == (2, False)
    file = Qblk(path)
    for recipe in ({"options": {"newer": 1}}, {"options": {"keep": 5}}, {}):
        file.header["provenance"] = recipe
        file.write(path)
        done = rebuild(path, source, call)
        assert (done.code, "digests" in done.err) == (3 if recipe else 2, False), done


def test_what_is_not_rebuilt_says_why(source: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", path)
    other = save(tmp_path / "o.safetensors", {"else.weight": gaussian(1, 8, 8)})
    done = rebuild(path, other, call, "--json")
    (check,) = [c for c in json.loads(done.out)["checks"] if c["id"] == "rebuild"]
    assert (done.code, check["status"]) == (1, "skip")
    assert check["detail"] == "not rebuilt: the source is of another model"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = rebuild(path, source, call, "--json")
    (check,) = [c for c in json.loads(done.out)["checks"] if c["id"] == "rebuild"]
    assert (done.code, check["status"]) == (1, "skip")
    assert check["detail"] == "not rebuilt: the file is damaged"


def test_the_name_of_the_source_is_that_of_its_directory(
    model: Path, tmp_path: Path, call: Call
) -> None:
    """Nothing but the name differs, which is said; where more does, that fails."""
    path, moved = tmp_path / "m.gguf", tmp_path / "moved"
    assert call("quantize", model, "--scheme", "q4_0", "-o", path).code == 0
    shutil.copytree(model, moved)
    done = rebuild(path, moved, call)
    assert done.code == 0, done
    told = "again, but for general.name, which is that of the source's directory: 'llama', here"
    assert f"{told} 'moved'" in done.out
    assert f"{told} 'moved'" in done.out.splitlines()[-1]
    assert "byte for byte" not in done.out
    data = path.read_bytes()
    path.write_bytes(data.replace(b"general.type", b"general.typo"))
    done = rebuild(path, moved, call)
    assert (done.code, "metadata 'general.name' differs" in done.out) == (1, True), done
    # A token of the vocabulary, in an array.
    tokens = GGUFReader(path).fields["tokenizer.ggml.tokens"]
    token = bytes(tokens.parts[tokens.data[-1]])
    assert data.count(token) == 1
    path.write_bytes(data.replace(token, token[:-1] + b"~"))
    done = rebuild(path, model, call)
    assert (done.code, "metadata 'tokenizer.ggml.tokens' differs" in done.out) == (1, True), done


def test_a_provenance_that_says_the_same_in_other_bytes(
    model: Path, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "m.gguf"
    assert call("quantize", model, "--scheme", "q4_0", "-o", path).code == 0
    data = path.read_bytes()
    assert data.count(b'}, "sources"') == 1
    path.write_bytes(data.replace(b'}, "sources"', b'} ,"sources"'))
    done = rebuild(path, model, call)
    assert (done.code, "metadata are equal; the layout or" in done.out) == (1, True), done


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


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("keep", 5, "impossible option 'keep' of the recorded recipe, found 5, wanted a list of"),
        ("keep", [5], "found [5], wanted a list of texts"),
        ("tensor_scheme", 5, "wanted a list of texts"),
        ("tensor_type", [5], "wanted a list of texts"),
        ("scheme", ["q4"], 'found ["q4"], wanted a text'),
        ("range", "percentile abc", 'found "percentile abc", wanted what quantize records'),
        ("range", 5, "wanted a text"),
        ("budget", "xbpw", 'found "xbpw"'),
        ("budget", "much", 'found "much"'),
        ("budget", f"{'9' * 5000}bytes", "impossible option 'budget'"),
        ("override_kv", 5, "wanted a list of pairs"),
        ("override_kv", [["a", None]], 'found [["a", null]], wanted a list of pairs'),
        ("override_kv", [["a"]], "wanted a list of pairs"),
        ("min_values", "x", "wanted a whole number"),
        ("min_values", True, "wanted a whole number"),
        ("min_values", -1, "wanted a whole number"),
        ("shard_size", "5", "wanted a whole number"),
        ("format", 5, "wanted a text"),
        ("format", "mlx", 'found "mlx", wanted qblk'),
        ("output_tensor_type", 7, "wanted a text"),
        ("pure", 1, "wanted true"),
        ("raw", False, "wanted true"),
        # Of the right type, and refused by what reads options.
        ("scheme", "q9", "the recorded recipe cannot be run: "),
        ("range", "median", "the recorded recipe cannot be run: --range, found median"),
        ("range", "percentile 3", "cannot be run: --percentile, found 3.0"),
        ("range", "minmax 99", "cannot be run: --percentile goes with --range percentile"),
        ("budget", "small", "cannot be run: what the weights become"),
        ("rounding", "odd", "cannot be run: --rounding, found odd"),
        ("equalise", "on", "cannot be run: --equalise, found on"),
        ("tensor_scheme", ["a"], "cannot be run: --tensor-scheme, found a"),
        ("tensor_type", ["(=q8_0"], "cannot be run: --tensor-type"),
        ("override_kv", [["a=b", 1]], "cannot be run: --override-kv"),
        ("shard_size", 0, "cannot be run: --shard-size, found 0"),
        ("pure", True, "cannot be run: "),
        ("pre_tokenizer", "x", "cannot be run: "),
    ],
)
def test_a_recipe_is_checked_as_what_comes_from_a_file(
    option: str, value: object, told: str, source: Path, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", path)
    file = Qblk(path)
    file.header["provenance"]["options"][option] = value
    file.write(path)
    done = rebuild(path, source, call)
    assert (done.code, told in done.err) == (3, True), done
    assert f"error: {path}: " in done.err


def test_budgets_by_their_names() -> None:
    for name, argument in (
        ("balanced", {"preset": "balanced"}),
        ("4.3bpw", {"target_bpw": 4.3}),
        ("123456bytes", {"target_size": 123456}),
        ("0.02nats", {"max_kl": 0.02}),
    ):
        recipe = Recipe(Path("m.qblk"), "qblk", {"options": {"budget": name}})
        assert arguments_of(recipe) == {"format": "qblk"} | argument


def test_the_report_has_the_check(source: Path, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block32", "-o", path)
    told = json.loads(rebuild(path, source, call, "--json").out)
    (check,) = [c for c in told["checks"] if c["id"] == "rebuild"]
    assert (told["status"], check["status"]) == ("pass", "pass")
    assert np.isfinite(told["verdict"]["worst_db"])

"""Running a model, as far as that goes without torch: refusals, text, merged recordings."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, gaussian, save
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from qconvert.calibration.collected import read_collected
from qconvert.calibration.document import CalibrationDocument
from qconvert.calibration.file import ENTRY, Calibration
from qconvert.calibration.observers import ObserverSettings
from qconvert.cli.main import main
from qconvert.errors import (
    FormatError,
    InputError,
    MachineError,
    QconvertError,
    UnsupportedError,
    WeightError,
)
from qconvert.running.hugging_face import checked_config, open_checkpoint
from qconvert.running.text import sentences, token_chunks
from qconvert.stages.calibrate import (
    CalibrateOptions,
    MergeOptions,
    calibrate,
    merge_calibrations,
)

MODEL = ROOT / "samples" / "tiny-llama"


class Letters:
    """A tokenizer of one token a character, with a first token or without."""

    def __init__(self, first: int | None) -> None:
        self.bos_token_id = first

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"][: options["max_length"]] for t in text]}
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return {"input_ids": begin + [ord(c) for c in text]}


def test_windows_of_a_text(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh", encoding="utf-8")
    assert token_chunks(Letters(None), text, 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    # The first token comes first in each window, in place of what was there.
    assert token_chunks(Letters(1), text, 3).tolist() == [[1, 97, 98], [1, 100, 101], [1, 103, 104]]


def test_lines_of_a_text(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_bytes(b"abc\r\n\n  \nd\nefghij")
    found = [line.tolist() for line in sentences(Letters(1), text, 4)]
    assert found == [[1, 97, 98, 99], [1, 100], [1, 101, 102, 103]]
    text.write_text("\n \n")
    with pytest.raises(InputError, match="no line"):
        sentences(Letters(1), text, 4)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MachineError, match="torch"):
        open_checkpoint(MODEL)
    line = ["calibrate", str(MODEL), "--text", str(MODEL / "config.json")]
    assert main([*line, "-o", str(tmp_path / "c")]) == 4
    assert "pip install torch transformers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_refused_before_anything_is_imported(file: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "m"))
    fields = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(fields | {"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(UnsupportedError, match="HF-CODE"):
        checked_config(model)


def test_config_and_tokenizer_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        checked_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not an object"):
        checked_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer"):
        checked_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "one of --text, --activations, --merge"),
        (["--text", "t", "--activations", "a"], "--text and --activations"),
        (["--activations", "a", "--seqlen", "8"], "--seqlen goes with --text"),
        (["--merge", "a", "--resume"], "--resume goes with --text or --activations"),
        (["--activations", "a", "--imatrix", "i"], "--imatrix goes with"),
        (["--merge", "a", "--record", "d"], "--record goes with --text"),
        (["--merge", "a", "--observer", "mse"], "observer of the files"),
        (["--text", "t", "--momentum", "0.5"], "--observer ema"),
        (["--text", "t", "--observer", "ema", "--momentum", "1"], "below 1"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_command_lines_that_contradict_themselves(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(MODEL), *options, "-o", str(tmp_path / "c")]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- merging --------------------------------------------------------------------------------------


def document(path: Path) -> CalibrationDocument:
    with Calibration(path) as found:
        return found.document


def entry(path: Path) -> str:
    """The JSON of a calibration file."""
    with safe_open(path, "numpy") as file:
        return file.metadata()[ENTRY]


def damage(path: Path, tensors: dict[str, NDArray[Any]], text: str | None = None) -> None:
    """Replace tensors of a calibration file, or its JSON."""
    text = text or entry(path)
    save(path, load_file(path) | tensors, **{ENTRY: text})


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A model, and three recordings of its inputs in files of their own."""
    tensors = {"a.weight": gaussian(1, 8, 40), "b.weight": gaussian(2, 8, 24)}
    model = save(tmp_path / "m.safetensors", tensors)
    recorded = [
        save(tmp_path / f"r{k}", {"a": gaussian(k, 50 + k, 40) * k, "b": gaussian(-k % 9, 7, 24)})
        for k in (1, 2, 3)
    ]
    return model, recorded


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy", "nmse"])
def test_merged_recordings_are_one_run_byte_for_byte(
    kind: str, parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    settings = ObserverSettings(kind)
    calibrate(CalibrateOptions(tuple(recorded), tmp_path / "all", model, settings))
    files = []
    for path in recorded:
        files.append(path.with_suffix(".calibration"))
        calibrate(CalibrateOptions((path,), files[-1], model, settings))
    merge_calibrations(MergeOptions(model, tuple(files), tmp_path / "merged"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "all").read_bytes()
    merge_calibrations(MergeOptions(model, (*files[1:], files[0]), tmp_path / "turned"))
    a, b = load_file(tmp_path / "all"), load_file(tmp_path / "turned")
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_recordings_in_several_passes_give_the_bytes_of_one(
    parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    for name, most in (("one", 1 << 30), ("more", 1)):
        given = CalibrateOptions(tuple(recorded), tmp_path / name, model, gram=True)
        calibrate(replace(given, statistics_bytes=most))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "more").read_bytes()
    x = np.concatenate([load_file(p)["a"] for p in recorded]).astype(np.float64)
    with Calibration(tmp_path / "one") as found:
        assert found.gram("a.weight") == pytest.approx(x.T @ x, rel=1e-9)


@pytest.mark.parametrize("kind", ["gram.high", "gram.low"])
def test_a_gram_matrix_cut_short_is_refused(
    kind: str, parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    path = tmp_path / "c"
    calibrate(CalibrateOptions((recorded[0],), path, model, gram=True))
    damage(path, {f"a/{kind}": load_file(path)[f"a/{kind}"][1:]})
    with Calibration(path) as found, pytest.raises(FormatError, match="impossible values"):
        found.gram("a.weight")
    with pytest.raises(FormatError, match="damaged"):
        merge_calibrations(MergeOptions(model, (path, path), tmp_path / "merged"))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("gram.low", -5), ("gram.low", 1 << 62), ("gram.high", 1 << 61), ("gram.high", -3)],
)
def test_a_gram_matrix_of_impossible_numbers_is_refused(
    kind: str, value: int, parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    path = tmp_path / "c"
    calibrate(CalibrateOptions((recorded[0],), path, model, gram=True))
    damage(path, {f"a/{kind}": np.full(40 * 41 // 2, value)})
    with Calibration(path) as found, pytest.raises(FormatError, match="impossible values"):
        found.gram("a.weight")
    with pytest.raises(FormatError, match="damaged"):
        merge_calibrations(MergeOptions(model, (path, path), tmp_path / "merged"))


def test_a_gram_matrix_of_another_shape_is_refused(
    parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Also where it is kept in a scratch file on the way."""
    model, recorded = parts
    path = tmp_path / "c"
    calibrate(CalibrateOptions((recorded[0],), path, model, gram=True))
    for kind in ("gram.high", "gram.low"):
        damage(path, {f"a/{kind}": load_file(path)[f"a/{kind}"].reshape(2, -1)})
    with pytest.raises(FormatError, match="damaged"):
        merge_calibrations(MergeOptions(model, (path, path), tmp_path / "merged"))


def test_gram_matrices_too_large_together_are_not_merged(
    parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, _ = parts
    large = save(tmp_path / "large", {"a": np.full((3, 40), 4e8, np.float32)})
    path = tmp_path / "c"
    calibrate(CalibrateOptions((large,), path, model, gram=True))
    with pytest.raises(UnsupportedError, match="too large together") as refusal:
        merge_calibrations(MergeOptions(model, (path, path), tmp_path / "merged"))
    assert refusal.value.tensor == "a"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("observer", "settings"),
    [
        ("foo", {}),
        ("mse", {"percentile": True}),
        ("mse", {"percentile": float("nan")}),
        ("mse", {"symmetric": 0.5}),
        ("mse", {"symmetric": True}),  # with a zero point of its own
        ("mse", {"speed": 1.0}),
    ],
)
def test_settings_that_no_run_has_are_refused(
    observer: str, settings: dict[str, Any], parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, _ = parts
    positive = save(tmp_path / "p", {"a": np.abs(gaussian(1, 50, 40))})
    path = tmp_path / "c"
    calibrate(CalibrateOptions((positive,), path, model, ObserverSettings("mse")))
    text = json.loads(entry(path))
    assert text["layers"]["a"]["zero_point"] != 0
    text |= {"observer": observer, "settings": text["settings"] | settings}
    damage(path, {}, json.dumps(text))
    with pytest.raises(FormatError) as refusal:
        merge_calibrations(MergeOptions(model, (path, path), tmp_path / "merged"))
    assert refusal.value.path == str(path)


@pytest.mark.parametrize(
    "rows",
    [
        {"a/recorded": np.zeros((2, 3, 4), np.float32)},
        {"a/recorded": np.zeros((2, 39), np.float32)},
        {"a/recorded": np.zeros((2, 40), np.int64)},
        {"a/recorded": np.full((2, 40), np.nan, np.float32)},
        {"zzz/recorded": np.zeros((2, 40), np.float32)},
    ],
    ids=lambda rows: " ".join(f"{n} {a.dtype} {a.shape}" for n, a in rows.items()),
)
def test_recorded_rows_that_no_run_has_left_are_refused(
    rows: dict[str, NDArray[Any]], parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    path = tmp_path / "c"
    calibrate(CalibrateOptions((recorded[0],), path, model))
    damage(path, {"a/recorded": np.zeros((2, 40), np.float32)})
    read_collected(path)
    damage(path, rows)
    with pytest.raises(FormatError, match="damaged"):
        read_collected(path)


def test_the_smallest_scales_are_read_back(parts: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The shortest decimal of 2^-149 lies below it."""
    model, _ = parts
    tiny = save(tmp_path / "t", {"a": np.full((3, 40), 300 * 2.0**-149, np.float32)})
    for observer in ("minmax", "nmse"):
        path = tmp_path / observer
        calibrate(CalibrateOptions((tiny,), path, model, ObserverSettings(observer)))
        with Calibration(path) as found:
            assert np.float32(found.layers["a"].input.scale) == np.float32(2.0**-149)


def test_the_nmse_observer_weighs_by_the_columns_of_the_weight(tmp_path: Path) -> None:
    """Held against an observer that is given the norms worked out here."""
    rng = np.random.default_rng(5)
    sizes = np.exp2(rng.uniform(-6, 6, (2, 40)))
    weights = {f"{n}.weight": (gaussian(k, 8, 40) * sizes[k]) for k, n in enumerate("ab")}
    weights = {n: w.astype(np.float32) for n, w in weights.items()}
    model = save(tmp_path / "m.safetensors", weights)
    x = {n: gaussian(7, 60, 40) ** 3 for n in "ab"}
    recorded = save(tmp_path / "r", x)
    for name, source in (("with", model), ("without", None)):
        given = CalibrateOptions((recorded,), tmp_path / name, source, ObserverSettings("nmse"))
        calibrate(given)
    found, plain = load_file(tmp_path / "with"), load_file(tmp_path / "without")
    for n in "ab":
        norms = (weights[f"{n}.weight"].astype(np.float64) ** 2).sum(axis=0)
        observer = ObserverSettings("nmse").make(norms)
        observer.update(x[n])
        for key, array in observer.state().items():
            assert found[f"{n}/state.input.{key}"].tobytes() == array.tobytes()
        assert (
            found[f"{n}/state.input.weights"].tobytes()
            != plain[f"{n}/state.input.weights"].tobytes()
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_weight_without_a_norm_is_refused(bad: float, tmp_path: Path) -> None:
    weight = np.ones((4, 40))
    weight[2, 7] = bad
    model = save(tmp_path / "m.safetensors", {"a.weight": weight})
    recorded = save(tmp_path / "r", {"a": gaussian(1, 9, 40)})
    with pytest.raises(WeightError, match="NaN, Inf or too large") as refusal:
        calibrate(CalibrateOptions((recorded,), tmp_path / "c", model, ObserverSettings("nmse")))
    assert refusal.value.found == "column 7"


def test_activations_too_large_for_a_gram_matrix_are_named(
    parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, _ = parts
    large = save(tmp_path / "large", {"a": np.full((3, 40), 1e9, np.float32)})
    with pytest.raises(WeightError, match="too large for a Gram matrix") as refusal:
        calibrate(CalibrateOptions((large,), tmp_path / "c", model, gram=True))
    assert refusal.value.tensor == "a"
    assert not (tmp_path / "c").exists()


def test_merging_takes_finished_calibrations_of_the_model_alone(
    parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    good = tmp_path / "good"
    calibrate(CalibrateOptions((recorded[0],), good, model))
    for path, words in ((model, "not a calibration"), (recorded[0], "not a calibration")):
        with pytest.raises(QconvertError, match=words):
            merge_calibrations(MergeOptions(model, (good, path), tmp_path / "merged"))
    other = save(tmp_path / "other", {"a.weight": gaussian(9, 8, 40)})
    with pytest.raises(UnsupportedError, match="of another model"):
        merge_calibrations(MergeOptions(other, (good,), tmp_path / "merged"))
    with pytest.raises(QconvertError, match="needs a run over text"):
        merge_calibrations(MergeOptions(model, (good,), tmp_path / "merged", tmp_path / "i"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["squares", "state.first", "state.input.extremes", "minimum"])
def test_a_state_with_impossible_arrays_is_refused(
    name: str, parts: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    model, recorded = parts
    path = tmp_path / "c"
    calibrate(CalibrateOptions((recorded[0],), path, model))
    document(path)
    tensors = load_file(path)
    tensors[f"a/{name}"] = tensors[f"a/{name}"][::-1].copy()[:1] * np.array(-1).astype(
        tensors[f"a/{name}"].dtype
    )
    damage(path, tensors)
    with pytest.raises(InputError):
        merge_calibrations(MergeOptions(model, (path, path), tmp_path / "merged"))

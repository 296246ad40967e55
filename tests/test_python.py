"""`import qconvert`: the functions do what the commands do, and are as a person expects of Python.

Reports are held against the ``--json`` of the command with the same options in words.
"""

from __future__ import annotations

import doctest
import inspect
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import numpy as np
import pytest
import typer.models
from conftest import ROOT, Call, environment, gaussian, listing, save

import qconvert
from qconvert.cli import app
from qconvert.commands.arguments import matrix_shapes
from qconvert.report import Report

COMMANDS = ("bench", "calibrate", "inspect", "quantize", "tune", "verify")
FUNCTIONS = (*COMMANDS, "load")
ERRORS = {
    "QconvertError": Exception,
    "UsageError": qconvert.QconvertError,
    "InputError": qconvert.QconvertError,
    "FormatError": qconvert.InputError,
    "UnsupportedError": qconvert.InputError,
    "WeightError": qconvert.InputError,
    "MachineError": qconvert.QconvertError,
    "OutputExistsError": qconvert.MachineError,
    "Stopped": BaseException,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: two matrices with recorded inputs, and the samples."""
    save(tmp_path / "m.safetensors", {"up": gaussian(1, 48, 64), "down": gaussian(2, 64, 32)})
    save(tmp_path / "acts.safetensors", {"up": gaussian(4, 50, 64), "down": gaussian(5, 50, 32)})
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(call: Call, *words: str, code: int = 0) -> str:
    """What a command prints under ``--json``."""
    told = call(*words, "--json")
    assert told.code == code, told
    return told.out


def document(report: Report) -> str:
    """What it would print of this report."""
    return json.dumps(report.to_json(), indent=2) + "\n"


# --- the same as the commands ---------------------------------------------------------------------


def test_inspect_is_the_command(place: Path, call: Call) -> None:
    told = qconvert.inspect("m.safetensors", tensor="u*", bins=7, scheme="q8_block32", threads=1)
    words = ("--tensor", "u*", "--bins", "7", "--scheme", "q8_block32")
    assert document(told) == printed(call, "inspect", "m.safetensors", *words)
    assert [t.name for t in told.tensors] == ["up"]
    headers = qconvert.inspect(Path("m.safetensors"), headers_only=True)
    assert document(headers) == printed(call, "inspect", "m.safetensors", "--headers-only")


def test_calibrate_is_the_command(place: Path, call: Call) -> None:
    told = qconvert.calibrate(
        "m.safetensors",
        activations="acts.safetensors",
        observer="percentile",
        percentile=99,
        symmetric=True,
        output="c.safetensors",
    )
    written = (place / "c.safetensors").read_bytes()
    words = ("--observer", "percentile", "--percentile", "99", "--symmetric", "--force")
    files = ("--activations", "acts.safetensors", "-o", "c.safetensors")
    assert document(told) == printed(call, "calibrate", "m.safetensors", *files, *words)
    assert (place / "c.safetensors").read_bytes() == written
    assert {layer.zero_point for layer in told.layers} == {0}


def test_calibrations_are_merged(place: Path, call: Call) -> None:
    for name in ("a", "b"):
        qconvert.calibrate(
            "m.safetensors", activations=["acts.safetensors"], output=f"{name}.safetensors"
        )
    files = ["a.safetensors", Path("b.safetensors")]
    told = qconvert.calibrate("m.safetensors", merge=files, output="ab.safetensors")
    words = ("--merge", "a.safetensors", "--merge", "b.safetensors", "-o", "ab.safetensors")
    assert document(told) == printed(call, "calibrate", "m.safetensors", *words, "--force")
    assert [layer.samples for layer in told.layers] == [100, 100]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ()),
        ({"output": "o.qblk", "range": "mse"}, ("-o", "o.qblk", "--range", "mse")),
        (
            {"tensor_scheme": {"d*": "q8_channel", "*": "q2_block32"}, "keep": ["u*", "down"]},
            (
                *("--tensor-scheme", "d*=q8_channel", "--tensor-scheme", "*=q2_block32"),
                *("--keep", "u*", "--keep", "down"),
            ),
        ),
        ({"tensor_scheme": ["d*=q3_channel"]}, ("--tensor-scheme", "d*=q3_channel")),
        ({"tensor_scheme": "d*=q3_channel"}, ("--tensor-scheme", "d*=q3_channel")),
        (
            {"range": "percentile", "percentile": 99.0},
            ("--range", "percentile", "--percentile", "99"),
        ),
        (
            {"keep": "up", "min_values": 5, "dry_run": True},
            ("--keep", "up", "--min-values", "5", "--dry-run"),
        ),
        (
            {"hash_source": True, "threads": 2, "format": "QBLK"},
            ("--hash-source", "--format", "qblk"),
        ),
    ],
)
def test_quantize_is_the_command(
    place: Path, call: Call, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    told = qconvert.quantize("m.safetensors", "q4_block32", **options)
    found = {name: data for name, data in listing(place).items() if name.endswith(".qblk")}
    command = ("quantize", "m.safetensors", "--scheme", "q4_block32", *words, "--force")
    assert document(told) == printed(call, *command)
    assert found == {n: d for n, d in listing(place).items() if n.endswith(".qblk")}
    assert bool(found) == told.written != told.dry_run


def test_a_calibration_weighs_unless_told_not_to(place: Path, call: Call) -> None:
    files = {"activations": "acts.safetensors", "output": "c.safetensors"}
    qconvert.calibrate("m.safetensors", **files)
    for options, words in (({}, ()), ({"no_weighting": True}, ("--no-weighting",))):
        told = qconvert.quantize(
            "m.safetensors", "q4_block32", calibration="c.safetensors", force=True, **options
        )
        line = ("--calibration", "c.safetensors", "--force", *words)
        assert document(told) == printed(
            call, "quantize", "m.safetensors", "--scheme", "q4_block32", *line
        )
        assert {t.weighted for t in told.tensors} == {not options}


def test_gguf_is_written_as_the_command_does(place: Path, call: Call) -> None:
    told = qconvert.quantize(
        "samples/tiny-llama",
        "q4_0",
        output="m.gguf",
        tensor_type={"attn_[qk]": "q8_0"},
        output_tensor_type="Q5_1",
        shard_size=2_000_000,
        threads=2,
    )
    found = {n: d for n, d in listing(place).items() if n.endswith(".gguf")}
    words = ("--tensor-type", "attn_[qk]=q8_0", "--output-tensor-type", "q5_1")
    command = ("quantize", "samples/tiny-llama", "--scheme", "q4_0", "-o", "m.gguf")
    assert document(told) == printed(call, *command, *words, "--shard-size", "2M", "--force")
    assert told.files == len(found) > 1
    assert found == {n: d for n, d in listing(place).items() if n.endswith(".gguf")}


def test_verify_is_the_command(place: Path, call: Call) -> None:
    qconvert.quantize("m.safetensors", "q4_block32", output="m.qblk")
    for limit, status, code in ((18, "pass", 0), (40, "fail", 1)):
        told = qconvert.verify(
            Path("m.qblk"),
            against="m.safetensors",
            min_sqnr=limit,
            samples="acts.safetensors",
            activations="dynamic",
            rows=3,
        )
        words = ("--min-sqnr", str(limit), "--samples", "acts.safetensors", "--rows", "3")
        line = ("verify", "m.qblk", "--against", "m.safetensors", *words)
        assert document(told) == printed(call, *line, "--activations", "dynamic", code=code)
        assert told.status == status


def test_verify_of_a_text_is_the_command(place: Path, call: Call) -> None:
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")
    qconvert.quantize("samples/tiny-llama", "q8_channel", output="m.qblk")
    told = qconvert.verify(
        "m.qblk",
        against="samples/tiny-llama",
        text="samples/eval.txt",
        nsamples=2,
        seqlen=64,
        max_ppl_increase="5%",
        max_kl=0.1,
    )
    words = ("--text", "samples/eval.txt", "--nsamples", "2", "--seqlen", "64", "--max-kl", "0.1")
    line = ("verify", "m.qblk", "--against", "samples/tiny-llama", *words)
    assert document(told) == printed(call, *line, "--max-ppl-increase", "0.05")


@pytest.mark.parametrize("shape", [(64, 96), [(64, 96), "64X96"]])
def test_bench_measures_what_the_command_does(place: Path, call: Call, shape: Any) -> None:
    told = qconvert.bench(shape=shape, scheme="q8_block32", rows=2, runs=1).to_json()
    words = ("--shape", "64x96", "--scheme", "q8_block32", "--rows", "2", "--runs", "1")
    command = json.loads(printed(call, "bench", *words))
    timed = {"times", "seconds", "rate", "gigabytes_per_second", "ratios"}
    for report in (told, command):
        for line in report["measurements"]:
            assert timed <= set(line)
            for name in timed:
                del line[name]
    assert told == command


def test_strict_makes_a_warning_a_failure(place: Path, call: Call) -> None:
    options = {"range": "mse", "output": "m.gguf", "raw": True}
    told = qconvert.quantize("m.safetensors", "q8_0", strict=True, **options)
    words = ("--range", "mse", "-o", "m.gguf", "--raw", "--strict")
    line = ("quantize", "m.safetensors", "--scheme", "q8_0", *words)
    assert document(told) == printed(call, *line, code=1)
    assert (told.status, told.written) == ("fail", False)
    assert told.warnings
    assert not Path("m.gguf").exists()
    assert qconvert.quantize("m.safetensors", "q8_0", **options).status == "pass"


# --- options --------------------------------------------------------------------------------------


# What only a command has: where its report goes in which form, which ``--force`` replaces.
SHOWING = {
    "color",
    "json",
    "csv",
    "html",
    "list_schemes",
    "report",
    "junit",
    "manifest",
    "quiet",
    "debug",
}
FORCE = {name: {"force"} for name in ("inspect", "verify", "bench")}


def command_options(name: str) -> dict[str, tuple[Any, Any]]:
    """The options of a command by name: its default, and what Typer is told of it."""
    function = getattr(app, name)
    hints = get_type_hints(function, include_extras=True)
    found = {
        n: (p.default, hints[n].__metadata__[0])
        for n, p in inspect.signature(function).parameters.items()
        if n not in SHOWING | FORCE.get(name, set())
    }
    if name == "quantize":  # whose MODEL may be missing, for --list-schemes
        found["model"] = (inspect.Parameter.empty, found["model"][1])
    if name == "bench":
        found = {"model": found.pop("file"), **found}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_options_and_defaults_are_those_of_the_command(name: str) -> None:
    taken = dict(inspect.signature(getattr(qconvert, name)).parameters)
    assert taken.pop("progress").default is None
    if name in ("inspect", "verify"):
        assert taken.pop("histograms").default is False  # which a command takes for its --html
    told = command_options(name)
    assert {n: p.default for n, p in taken.items()} == {n: d for n, (d, _) in told.items()}
    positional = [n for n, p in taken.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    inputs = [n for n, (_, i) in told.items() if isinstance(i, typer.models.ArgumentInfo)]
    assert positional == inputs + ["scheme"] * (name == "quantize")


NEEDED: dict[str, Callable[..., Report]] = {
    "inspect": lambda **o: qconvert.inspect("m.safetensors", **o),
    "calibrate": lambda **o: qconvert.calibrate("m.safetensors", output="c", text="t", **o),
    "quantize": lambda **o: qconvert.quantize("m.safetensors", "q4_block32", **o),
    "tune": lambda **o: qconvert.tune("m", scheme="q4_block32", text="t", output="o.qblk", **o),
    "verify": lambda **o: qconvert.verify("m.qblk", text="t", **o),
    "bench": lambda **o: qconvert.bench(**o),
}


@pytest.mark.parametrize("name", NEEDED)
def test_bounds_are_those_of_the_command(name: str, place: Path) -> None:
    before = listing(place)
    bounds = [
        (option, wrong)
        for option, (_, told) in command_options(name).items()
        for bound, wrong in ((told.min, -1), (told.max, 1))
        if bound is not None
        for wrong in [bound + wrong]
    ]
    assert bounds
    for option, wrong in bounds:
        with pytest.raises(qconvert.UsageError, match=f"--{option.replace('_', '-')}"):
            NEEDED[name](**{option: wrong})
    assert listing(place) == before


@pytest.mark.parametrize("given", [(64, 96), "64x96", ["64x96"], [(64, 96), "64X96"], [64, 96]])
def test_a_shape_is_a_pair_or_words_or_several(given: Any) -> None:
    assert matrix_shapes(given) == ((64, 96),)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: qconvert.quantize("m.safetensors", "q4_blok64"), "unknown scheme 'q4_blok64'"),
        (lambda: qconvert.quantize("m.safetensors", "f16", format="zip"), "--format, found zip"),
        (lambda: qconvert.quantize("m.safetensors", "f16", range="max"), "--range, found max"),
        (
            lambda: qconvert.quantize("m.safetensors", "f16", tensor_scheme={"*": "q4_k_m"}),
            "found [*]=q4_k_m, wanted a single type",
        ),
        (lambda: qconvert.quantize("m.safetensors", "f16", tensor_scheme="*"), "wanted GLOB=NAME"),
        (lambda: qconvert.quantize("m.safetensors", "q8_0", shard_size=0), "--shard-size, found 0"),
        (lambda: qconvert.quantize("m.safetensors", "q8_0", shard_size="9" * 5000), "--shard-size"),
        (lambda: qconvert.calibrate("m.safetensors", output="c"), "found none, wanted one of"),
        (
            lambda: qconvert.calibrate("m.safetensors", output="c", activations="a", seqlen=9),
            "--seqlen goes with --text",
        ),
        (lambda: qconvert.verify("m.qblk", max_kl=1.0), "--max-kl goes with --text"),
        (lambda: qconvert.verify("m.qblk", text="t", max_ppl_increase=-1), "--max-ppl-increase"),
        (lambda: qconvert.bench("m.safetensors", shape=(1, 1)), "exclude each other"),
        (lambda: qconvert.bench(shape=(64, 0)), "--shape, found 64x0"),
        (lambda: qconvert.bench(shape=(64, 64, 64)), "--shape, found 64x64x64"),
        (lambda: qconvert.bench(end_to_end=True), "needs a MODEL"),
    ],
)
def test_a_wrong_option_is_named(place: Path, call: Callable[[], object], match: str) -> None:
    with pytest.raises(qconvert.UsageError, match=match):
        call()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_a_tree(name: str) -> None:
    assert issubclass(getattr(qconvert, name), ERRORS[name])


def test_what_a_command_ends_with_is_raised(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(qconvert.InputError, match="absent"):
        qconvert.inspect("absent")
    Path("bad.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(qconvert.FormatError) as broken:
        qconvert.load("bad.safetensors")
    assert broken.value.path == "bad.safetensors"
    save(place / "nan.safetensors", {"w": np.full((64, 64), np.nan, np.float32)})
    with pytest.raises(qconvert.WeightError) as bad:
        qconvert.quantize("nan.safetensors", "q4_block32", output="nan.qblk")
    assert bad.value.tensor == "w"
    qconvert.quantize("m.safetensors", "q4_block32", output="m.qblk")
    before = listing(place)
    with pytest.raises(qconvert.OutputExistsError) as exists:
        qconvert.quantize("m.safetensors", "q4_block32", output="m.qblk")
    assert exists.value.hint
    assert repr(exists.value) == "OutputExistsError('m.qblk: the output exists')"
    assert listing(place) == before
    assert not [name for name in before if "partial" in name or name == "nan.qblk"]
    assert capfd.readouterr() == ("", "")


def test_an_error_survives_pickling(place: Path) -> None:
    """As a pool of processes sends it."""
    with pytest.raises(qconvert.InputError) as e:
        qconvert.inspect("absent")
    again = pickle.loads(pickle.dumps(e.value))
    assert (type(again), str(again), again.hint) == (type(e.value), str(e.value), e.value.hint)


# --- the module -----------------------------------------------------------------------------------


def test_dir_is_what_is_public() -> None:
    assert dir(qconvert) == sorted([*FUNCTIONS, "quantize_set", *ERRORS, "__version__"])
    assert qconvert.__all__ == dir(qconvert)
    for name in dir(qconvert):
        assert getattr(qconvert, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qconvert.quantise  # noqa: B018


def test_importing_loads_nothing() -> None:
    """Not even `typing`; and what is not asked for stays away when an error class is."""
    program = (
        "import sys; before = set(sys.modules); import qconvert\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "qconvert.QconvertError; print('numpy' in sys.modules)\n"
        "qconvert.load; print('numpy' in sys.modules)"
    )
    installed = Path(qconvert.__file__).parents[1]
    told = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment(PYTHONPATH=":".join([str(installed), *sys.path])),
    )
    assert told.stdout.splitlines() == ["__future__ qconvert", "False", "True"]


@pytest.mark.slow
def test_the_type_checker_knows_the_functions(tmp_path: Path) -> None:
    good = (
        "from pathlib import Path\nimport qconvert\n"
        "r = qconvert.quantize(Path('m'), 'q4_k_m', output='o.gguf', tensor_scheme={'*': 'f16'})\n"
        "bits: float | None = r.model_bits_per_weight\n"
        "names: list[str] = [t.name for t in qconvert.inspect('m').tensors]\n"
        "qconvert.calibrate('m', output='c', text=['a', Path('b')])\n"
        "qconvert.bench(shape=[(4, 8), '4x8'])\n"
        "with qconvert.load('m') as tensors:\n    codes = tensors['a'].quantized().codes\n"
    )
    bad = "import qconvert\nqconvert.quantise('m')\nqconvert.verify('m', min_sqn=1)\n"
    files = (tmp_path / "good.py", tmp_path / "bad.py")
    for path, text in zip(files, (good, bad), strict=True):
        path.write_text(text)
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in told.stdout.splitlines() if "error:" in line]
    assert len(errors) == 2, told.stdout
    assert "bad.py:2" in errors[0]
    assert 'has no attribute "quantise"' in errors[0]
    assert "bad.py:3" in errors[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_each_function_runs(name: str, place: Path) -> None:
    if name == "tune":
        pytest.importorskip("torch", reason="install qconvert[hf]")
        pytest.importorskip("transformers", reason="install qconvert[hf]")
    function = getattr(qconvert, name)
    parser, told = doctest.DocTestParser(), []
    example = parser.get_doctest(function.__doc__, {"qconvert": qconvert}, name, None, 0)
    assert example.examples
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=options).run(example, out=told.append)
    assert result.failed == 0, "".join(told)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_explained(name: str) -> None:
    function = getattr(qconvert, name)
    assert function.__doc__
    arguments = function.__doc__.split("Args:")[1].split("Raises:")[0]
    explained = {
        n.strip()
        for line in arguments.splitlines()
        if line.startswith(" " * 8) and line[8] != " " and ":" in line
        for n in line.split(":")[0].split(",")
    }
    assert explained == set(inspect.signature(function).parameters)


def test_reports_and_tensors_show_what_they_are(place: Path) -> None:
    made = qconvert.quantize("m.safetensors", "q8_channel", output="m.qblk")
    assert repr(made).startswith("<QuantizeReport pass: 'm.qblk', q8_channel, 2 of 2 tensors")
    assert len(repr(made)) < 160
    dry = qconvert.quantize("m.safetensors", "q8_channel", output="n.qblk", dry_run=True)
    assert "'n.qblk' not written" in repr(dry)
    assert repr(qconvert.inspect("m.safetensors", headers_only=True)) == (
        "<InspectReport pass: 'm.safetensors' (safetensors), 2 tensors>"
    )
    found = qconvert.verify("m.qblk", against="m.safetensors", min_sqnr=99)
    assert repr(found).startswith("<VerifyReport fail: 'm.qblk', ")
    assert "failed: min-sqnr" in repr(found)
    with qconvert.load("m.qblk") as tensors:
        assert repr(tensors) == "<Tensors 'm.qblk' (qblk), 2 tensors>"
        assert repr(tensors["up"]).startswith("<Tensor 'up' q8_channel")
    hostile = place / "x\x1b[2J.safetensors"
    shutil.copy("m.safetensors", hostile)
    assert repr(qconvert.inspect(hostile)).isprintable()


def test_several_may_be_any_iterable(place: Path) -> None:
    globs = MappingProxyType({"up": "q8_channel"})
    made = qconvert.quantize(
        "m.safetensors", "q4_block32", tensor_scheme=globs, keep=(n for n in ("down",))
    )
    assert [t.stored.split("_")[0] for t in made.tensors] == ["F32", "q8"]

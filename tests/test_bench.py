"""bench: its arithmetic with a clock of our own, the kernels left as they were, honest peers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Run, gaussian, save
from safetensors.numpy import save_file

import qconvert
from qconvert import kernels
from qconvert.cli.text.bench import bench_text
from qconvert.errors import FormatError, MachineError, UsageError
from qconvert.kernels import reference
from qconvert.processor import features, model_name
from qconvert.progress import Silent
from qconvert.report import BenchReport, Measurement, SkippedLine
from qconvert.schemes import SCHEMES
from qconvert.stages.bench import BenchOptions, bench, end_to_end
from qconvert.stages.bench.compare import compare, read_earlier
from qconvert.stages.bench.kernel_lines import COPY, nearest_ggml_type
from qconvert.stages.bench.lines import Line, Section, measure
from qconvert.stages.bench.peers import Source, gguf_py, llama_quantize
from qconvert.stages.bench.products import BLAS
from qconvert.stages.quantize import GgufOptions, QuantizeOptions, quantize

SAMPLE = ROOT / "samples" / "tiny-llama"
TINY = BenchOptions(shapes=((64, 128),), rows=3, runs=2)


class Clock:
    """Time that passes only where a line's work says so; the first run of each is the warm-up."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        left = iter((1000.0, *seconds))

        def run() -> None:
            self.told.append(name)
            self.now += next(left)

        return run


def test_lines_take_turns_and_ratios_are_medians_of_rounds() -> None:
    clock = Clock()
    lines = [
        Line("floor", clock.work("floor", 4, 8, 200), 8, "GB/s", 8e9),
        # Half of the work: 2, 8 and 50 seconds for all of it.
        Line("ours", clock.work("ours", 1, 4, 25), 6, "x/s", 0, 0.5, ("floor", "absent")),
    ]
    floor, ours = measure(Section("s", lines), 3, Silent(), clock)
    assert clock.told == ["floor", "ours"] * 4
    assert floor.times == [4, 8, 200]
    assert (floor.seconds, floor.rate, floor.gigabytes_per_second) == (8, 1, 1)
    assert floor.ratios == {}
    assert (ours.seconds, ours.rate, ours.gigabytes_per_second) == (4, 1.5, None)
    assert ours.ratios == {"floor": 2}  # of 4/2, 8/8 and 200/50; the medians would say 8/8 = 1
    assert ours.section == "s"


def test_what_comes_after_a_run_takes_no_time() -> None:
    clock = Clock()
    line = Line("a", clock.work("a", 3, 3), 1, "x/s", after=clock.work("after", 7, 7))
    assert measure(Section("s", [line]), 2, Silent(), clock)[0].times == [3, 3]
    assert clock.told == ["a", "after"] * 3


def test_kernels_are_switched_inside_the_block_alone() -> None:
    def look(name: str) -> None:
        with kernels.running(name):
            assert kernels.describe().removeprefix("native, ") == name
            assert (kernels.encode is reference.encode) == (name == "reference")
            raise ZeroDivisionError

    before = kernels.describe(), kernels.encode
    for name in kernels.available():
        with pytest.raises(ZeroDivisionError):
            look(name)
        assert (kernels.describe(), kernels.encode) == before


def test_a_line_runs_its_kernels_and_leaves_the_chosen_ones() -> None:
    seen: list[object] = []

    def look() -> None:
        seen.append(kernels.describe().removeprefix("native, "))

    lines = [Line(name, look, 1, "", kernels=name) for name in kernels.available()]
    before = kernels.describe()
    measure(Section("s", lines), 1, Silent(), iter(range(99)).__next__)
    assert seen == [*kernels.available()] * 2
    assert kernels.describe() == before


def test_every_kernel_of_every_scheme_is_held_against_the_copy() -> None:
    found = bench(TINY).measurements
    names = {m.name for m in found if COPY in m.ratios}
    for scheme, detail in (("q4_block64", " mse"), ("q8_block64", " minmax")):
        for kernel in kernels.available():
            assert f"quantize {scheme}{detail}, {kernel}" in names
            assert f"dequantize {scheme}, {kernel}" in names
    sections = [s for s in dict.fromkeys(m.section for m in found) if "matmul" in s]
    assert [s.split(", ")[1] for s in sections] == ["1 row", "3 rows"]


def test_a_second_thread_is_held_against_the_first() -> None:
    found = bench(BenchOptions(shapes=((64, 128),), rows=2, runs=1, threads=2)).measurements
    ours = [m for m in found if m.name == "q4_block64 x int8"]
    assert len(ours) == 2
    assert all({BLAS, "q4_block64 x int8, 1 thread"} <= m.ratios.keys() for m in ours)


def test_missing_onnx_runtime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = bench(TINY)
    told = {(s.section.split(", ")[1], s.name): s.reason for s in report.skipped}
    assert {name for _, name in told} == {"MatMulInteger", "MatMulNBits block 64"}
    assert {rows for rows, _ in told} == {"1 row", "3 rows"}
    assert all("pip install onnx onnxruntime" in reason for reason in told.values())
    assert not any("MatMul" in m.name for m in report.measurements)
    assert bench_text(report).count("skipped ") == 4


@pytest.mark.parametrize(
    ("scheme", "operator"),
    [("q4_channel", "MatMulNBits block 128"), ("q8_block32", "MatMulInteger")],
)
def test_onnx_runtime_multiplies_where_it_is_installed(scheme: str, operator: str) -> None:
    pytest.importorskip("onnxruntime", reason="the extra [bench] is not installed")
    pytest.importorskip("onnx", reason="the extra [bench] is not installed")
    report = bench(BenchOptions((SCHEMES[scheme],), shapes=((64, 256),), rows=2, runs=1))
    assert not [s for s in report.skipped if s.name == operator]
    assert sum(m.name == operator for m in report.measurements) == 2
    assert all(operator in m.ratios for m in report.measurements if m.name == f"{scheme} x int8")


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        *(("q2_block16", "Q4_0"), ("q5_channel", "Q5_0"), ("q6_block32", "Q8_0")),
        *(("q4_1", "Q4_1"), ("c4_block16", "Q4_0")),
    ],
)
def test_the_nearest_type_has_no_fewer_bits(scheme: str, kind: str) -> None:
    assert nearest_ggml_type(SCHEMES[scheme]) == kind


def test_levels_are_measured_with_kernels_of_their_own() -> None:
    report = bench(BenchOptions((SCHEMES["c4s_block16"],), shapes=((64, 200),), rows=2, runs=1))
    names = [m.name for m in report.measurements]
    assert "quantize c4s_block16, reference" in names
    assert "dequantize c4s_block16, reference" in names
    assert names.count("c4s_block16 x int8") == 2  # of one row, and of two


def test_a_whole_conversion_of_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    schemes = (SCHEMES["q8_0"], SCHEMES["q8_block64"])
    report = bench(
        BenchOptions(schemes, SAMPLE, runs=1, end_to_end=True, work_dir=tmp_path, threads=2)
    )
    copy, peer, *ours = report.measurements
    assert copy.name == end_to_end.COPY
    assert peer.name == "gguf-py q8_0, 1 thread"
    assert [m.name for m in ours] == ["qconvert quantize q8_0", "qconvert quantize q8_block64"]
    assert all({copy.name, peer.name} == m.ratios.keys() for m in ours)
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("llama-quantize q8_0", "no llama-quantize on the PATH")
    ]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Source:
    tensors = {
        "a.weight": gaussian(1, 40, 64, dtype=ml_dtypes.bfloat16),
        "b.weight": gaussian(2, 64, 96),
        "b.bias": gaussian(3, 64).astype(np.float16),
        "scalar": np.float32(3).reshape(()),
    }
    return end_to_end._source(save(tmp_path / "m.safetensors", tensors))


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def test_gguf_py_does_our_conversion(source: Source, tmp_path: Path) -> None:
    """The same tensors, types and bytes: the comparison is fair."""
    work = gguf_py(source, "Q8_0", tmp_path / "peer.gguf")
    assert not isinstance(work, str)
    work()
    ours = tmp_path / "ours.gguf"
    quantize(source.files[0], QuantizeOptions(SCHEMES["q8_0"], ours, gguf=GgufOptions(raw=True)))
    found, wanted = tensors_of(tmp_path / "peer.gguf"), tensors_of(ours)
    assert found == wanted
    assert found["a.weight"][0] == "Q8_0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "ours.gguf", "peer.gguf"]


def program(folder: Path, script: str) -> None:
    path = folder / "llama-quantize"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_llama_quantize_gets_our_weights(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, 'printf "%s\\n" "$*" > "$0.told"; cp "$2" "$3"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made, target = tmp_path / "made.gguf", tmp_path / "peer.gguf"
    work = llama_quantize(source, "Q4_0", target, made, 3)
    assert not isinstance(work, str)
    assert not target.exists()
    work()
    told = (tmp_path / "llama-quantize.told").read_text()
    assert told == f"--pure {made} {tmp_path / 'peer.partial'} Q4_0 3\n"
    found = tensors_of(target)
    # Only what we quantize is a ``weight``, the one thing that llama-quantize asks of a name.
    assert {(kind, name.endswith("weight")) for name, (kind, _) in found.items()} == {
        ("BF16", True),
        ("F32", True),
        ("F16", False),
        ("F32", False),
    }
    assert gaussian(2, 64, 96).tobytes() in {data for _, data in found.values()}


def test_a_llama_quantize_that_fails_is_told(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "echo one >&2; echo no such type >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = llama_quantize(source, "Q4_0", tmp_path / "x.gguf", tmp_path / "made.gguf", 1)
    assert found == "it failed with exit code 3: no such type"


def test_a_full_disk_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = end_to_end.check_space
    monkeypatch.setattr(end_to_end, "check_space", lambda target, _: check(target, 1 << 60))
    options = BenchOptions(file=SAMPLE, end_to_end=True, work_dir=tmp_path)
    with ExitStack() as stack, pytest.raises(MachineError, match="not enough space") as e:
        end_to_end.end_to_end_section(SAMPLE, options, stack)
    assert e.value.hint is not None
    assert "--work-dir" in e.value.hint
    assert not list(tmp_path.iterdir())


def test_an_error_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MachineError("broken")

    monkeypatch.setattr(end_to_end, "quantize", fail)
    with pytest.raises(MachineError, match="broken"):
        bench(BenchOptions(file=SAMPLE, end_to_end=True, work_dir=tmp_path, runs=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("--end-to-end", 2, "needs a MODEL"),
        ("--work-dir .", 2, "goes with --end-to-end"),
        ("m.safetensors --end-to-end --work-dir nowhere", 4, "--work-dir"),
        ("m.safetensors --end-to-end --shape 4x4", 2, "exclude"),
    ],
)
def test_refusals(line: str, code: int, told: str, tmp_path: Path, run: Run) -> None:
    save(tmp_path / "m.safetensors", {"a": gaussian(1, 32, 64)})
    done = run("bench", *line.split(), cwd=tmp_path)
    assert done.code == code
    assert told in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_command_end_to_end(tmp_path: Path, run: Run) -> None:
    shutil.copytree(SAMPLE, tmp_path / "model")
    words = ["bench", "model", "--end-to-end", "--scheme", "q4_0", "--runs", "3", "--json", "-q"]
    done = run(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    for m in json.loads(done.out)["measurements"]:
        assert len(m["times"]) == 3
        assert m["seconds"] == sorted(m["times"])[1]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_text_names_the_skipped_even_of_an_empty_section() -> None:
    report = BenchReport("k", "m", 1, 1, [], [SkippedLine("section", "peer", "not here")])
    assert "section" in bench_text(report)
    assert "skipped    peer: not here" in bench_text(report)


def test_a_type_that_gguf_py_cannot_quantize_is_named_as_skipped() -> None:
    options = BenchOptions((SCHEMES["q6_k"],), shapes=((8, 256),), rows=1, runs=1)
    skipped = {s.name: s.reason for s in bench(options).skipped}
    assert skipped["gguf-py q6_k"] == "it does not quantize to Q6_K"


# --- what a file costs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "m.qblk"
    qconvert.quantize(ROOT / "samples/tiny-llama", "q4_block64", output=path)
    return path


def test_a_token_reads_all_matrices_but_the_table_of_embeddings(quantized: Path) -> None:
    cost = qconvert.bench(quantized, runs=1).file
    assert cost is not None
    # 4.34375 bits each: 4 of a code, a scale of 16 and a zero point of 6 bits for 64 of them.
    weights = 2048 * 256 + 4 * (3 * 704 * 256 + 2 * 256 * 256 + 2 * 128 * 256)
    assert cost.token_bytes == weights * 4.34375 / 8
    assert cost.float_nbytes == 4 * 4_000_000
    assert sum(layer.count for layer in cost.layers) == 1 + 4 * 7
    assert all(layer.integer for layer in cost.layers)
    installed = importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")
    assert all(bool(layer.peer_ratio) == bool(installed) for layer in cost.layers)
    seconds = sum(layer.count * layer.seconds for layer in cost.layers)
    assert cost.tokens_per_second == pytest.approx(1 / seconds)
    assert cost.bound_tokens_per_second == pytest.approx(
        cost.read_gigabytes_per_second * 1e9 / cost.token_bytes
    )


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        (["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], 2),  # tied
        (["model.embed_tokens.weight", "lm_head.weight"], 1),
        (["embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"], 1),
    ],
)
def test_a_table_of_embeddings_counts_where_it_is_the_head(
    names: list[str], counted: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "m.safetensors"
    save_file({n: rng.standard_normal((64, 64), np.float32) for n in names}, source)
    made = tmp_path / "m.qblk"
    qconvert.quantize(source, "q8_channel", output=made, tensor_scheme=["*=q8_channel"])
    cost = qconvert.bench(made, runs=1).file
    assert cost is not None
    assert sum(layer.count for layer in cost.layers) == counted


def test_types_without_an_integer_product_are_decoded(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((256, 256), np.float32)}, tmp_path / "m.safetensors")
    made = tmp_path / "m.gguf"
    qconvert.quantize(tmp_path / "m.safetensors", "q6_k", output=made, raw=True)
    report = qconvert.bench(made, runs=1)
    assert report.file is not None
    assert [layer.integer for layer in report.file.layers] == [False]
    assert "decoded" in bench_text(report)


@pytest.mark.parametrize(
    ("then", "threshold", "slower"),
    [
        ([1.0, 1.0, 1.0], 0.1, False),
        ([0.8, 0.8, 0.8], 0.1, True),  # a quarter slower now
        ([0.8, 0.8, 0.8], 0.3, False),
        ([0.4, 0.8, 1.2], 0.1, False),  # by less than the runs differ among themselves
        ([2.0, 2.0, 2.0], 0.1, False),
    ],
)
def test_a_line_is_slower_beyond_threshold_and_noise(
    then: list[float], threshold: float, slower: bool, tmp_path: Path
) -> None:
    line = Measurement("s", "a", [1.0, 1.0, 1.0], 1.0, 1.0, "Gop/s")
    report = BenchReport("native", "here", 1, 3, [line], [])
    old = {"section": "s", "name": "a", "times": then}
    earlier = {"schema": "qconvert.bench/1", "machine": "here", "threads": 1, "measurements": [old]}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(earlier))
    compare(report, read_earlier(path), path, threshold)
    assert [c.slower for c in report.compared] == [slower]
    assert report.compared[0].ratio == pytest.approx(1 / sorted(then)[1])
    assert (report.status == "fail") == slower
    assert not report.warnings


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"schema": "qconvert.verify/1"}, "no report of bench"),
        ({"schema": "qconvert.bench/1", "measurements": []}, "none of its lines"),
        ({"schema": "qconvert.bench/1", "measurements": [{"times": [0]}]}, "without times"),
        ({"schema": "qconvert.bench/1", "measurements": [7]}, "without times"),
        ({"schema": "qconvert.bench/1"}, "without times"),
    ],
)
def test_a_report_that_cannot_be_compared_is_refused(
    document: dict[str, object], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    line = Measurement("s", "a", [1.0], 1.0, 1.0, "Gop/s")
    report = BenchReport("native", "here", 1, 1, [line], [])
    with pytest.raises(FormatError, match=told):
        compare(report, read_earlier(path), path, 0.1)


def test_a_processor_tells_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr("qconvert.processor._CPUINFO", path)
    assert features() == {}
    path.write_text("processor : 0\nmodel name : Some CPU\nflags : sse avx2 avx512f avx512_vnni\n")
    assert list(features()) == ["AVX2", "AVX-512", "AVX-512 VNNI"]
    assert model_name() == "Some CPU"
    path.write_text("Features : fp asimd asimddp\n")
    assert list(features()) == ["NEON", "NEON dotprod"]


def test_matrices_of_one_size_are_one_kind_whatever_their_shape(tmp_path: Path) -> None:
    tensors = {
        "layers.0.experts.weight": np.ones((2, 128, 256), np.float32),
        "layers.0.up.weight": np.ones((256, 256), np.float32),
        "transformer.wpe.weight": np.ones((256, 256), np.float32),
        "lm_head.weight": np.ones((64, 256), np.float32),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    made = tmp_path / "m.qblk"
    qconvert.quantize(tmp_path / "m.safetensors", "q8_channel", output=made)
    cost = qconvert.bench(made, runs=1).file
    assert cost is not None
    assert sorted(layer.count for layer in cost.layers) == [1, 2]  # positions are looked up


def test_lines_that_cannot_be_compared_are_told(tmp_path: Path) -> None:
    lines = [Measurement("s", n, [1.0], 1.0, 1.0, "Gop/s") for n in "ab"]
    report = BenchReport("native", "here", 1, 1, lines, [])
    old = {"section": "s", "name": "a", "times": [1.0]}
    path = tmp_path / "old.json"
    document = {"schema": "qconvert.bench/1", "machine": "here", "threads": 1}
    path.write_text(json.dumps({**document, "measurements": [old]}))
    compare(report, read_earlier(path), path, 0.1)
    assert report.warnings == ["1 of 2 lines cannot be compared: old.json has no such line"]


LLAMA = ROOT / "samples" / "tiny-llama"
# 4 layers, 2 heads of keys and 2 of values of 64 dimensions, in 2 bytes each
CACHE = 4 * (2 + 2) * 64 * 2


def test_what_fits_into_a_memory_limit(tmp_path: Path) -> None:
    limit = 4_000_000
    found = qconvert.bench(LLAMA, memory="4M", runs=1).memory
    assert found is not None
    assert (found.limit, found.context_bytes, found.context) == (limit, CACHE, 512)
    choices = {c.scheme: c for c in found.choices if c.container == "gguf"}
    for scheme in ("q2_k", "q8_0"):  # sizes are those of the tensors of real files
        path = tmp_path / f"{scheme}.gguf"
        qconvert.quantize(LLAMA, scheme, output=path)
        tensors = {t.name: t.n_bytes for t in gguf.GGUFReader(path).tensors}
        assert choices[scheme].nbytes == sum(map(int, tensors.values()))
        matrices = [n for n in tensors if "norm" not in n and n != "token_embd.weight"]
        assert choices[scheme].token_bytes == sum(int(tensors[n]) for n in matrices)
    for c in found.choices:
        assert c.fits == (c.nbytes + 512 * CACHE <= limit)
        assert c.context == ((limit - c.nbytes) // CACHE if c.fits else None)
    fitting = [c for c in found.choices if c.fits]
    assert 3 < len(fitting) < len(found.choices)
    assert {c.sqnr_db for c in fitting if c.scheme == found.best} == {
        max(c.sqnr_db or np.inf for c in fitting)
    }


def test_where_nothing_fits_the_smallest_is_named(tmp_path: Path) -> None:
    model = save(tmp_path / "m.safetensors", {"up.weight": gaussian(1, 64, 64)})
    report = qconvert.bench(model, memory=1000, runs=1)
    told = bench_text(report)
    # No configuration: nothing is known of a context, nor what GGUF would make of it.
    assert report.memory is not None
    assert (report.memory.best, report.memory.context) == (None, 0)
    assert [s.name for s in report.skipped] == ["schemes of gguf"]
    least = 64 * (2 + 64 * 2 // 8 + 64 // 16 * 5 / 8)  # scale of the row, codes, scales of blocks
    assert {c.nbytes for c in report.memory.choices if c.scheme == "c2_block16"} == {int(least)}
    assert "Nothing fits: the smallest file, c2_block16, takes" in told
    with pytest.raises(UsageError):
        qconvert.bench(memory="8G")

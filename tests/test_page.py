"""Pages of reports: what is in them, and what a browser makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Run, gaussian, save
from safetensors.numpy import save_file

import qconvert
from qconvert.page import document
from qconvert.page.svg import histogram, layer_map
from qconvert.report import (
    PairedHistogram,
    QuantizedTensor,
    QuantizeReport,
    Report,
    VerifiedTensor,
    VerifyReport,
)
from qconvert.roles import place_of

SAMPLE = ROOT / "samples/tiny-llama"
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
VOID = {"meta", "link", "input", "br", "wbr"}


class Balanced(HTMLParser):
    """Reads a page as HTML and keeps its text by element, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.cells: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open and "title" not in self.open:
            self.cells[-1][-1] += data


def read(page: str) -> Balanced:
    found = Balanced()
    found.feed(page)
    found.close()
    assert not found.open
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "model.qblk"
    qconvert.quantize(SAMPLE, "q4_block64", output=path)
    return path


def many(count: int) -> QuantizeReport:
    """A report of a model of many tensors, as `quantize` gives it."""
    rng = np.random.default_rng(0)
    tensors = [
        QuantizedTensor(
            name=f"model.layers.{i // 7}.mlp.role_{i % 7}.weight",
            shape=(4096, 4096),
            source_dtype="BF16",
            stored="q4_block64_asym",
            quantized=True,
            reason="--scheme q4_block64",
            source_nbytes=2 * 4096**2,
            nbytes=4096**2 // 2,
            bits_per_weight=4.34375,
            sqnr_db=float(rng.uniform(10, 30)),
            max_error=float(rng.uniform(0, 1)),
        )
        for i in range(count)
    ]
    return QuantizeReport(
        kernels="native, avx2",
        source="model",
        output="model.qblk",
        container="qblk",
        scheme="q4_block64",
        range="mse",
        dry_run=False,
        tensors=tensors,
        source_bytes=1,
        output_bytes=1,
        quantized_bits_per_weight=4.34,
        model_bits_per_weight=4.34,
        sqnr_db=20.0,
        calibration=None,
        companions=0,
    )


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11, "self_attn.q_proj"),
        ("blk.3.ffn_down.weight", 3, "ffn_down"),
        ("model.layers.2.mlp.experts.17.up_proj.weight", 2, "mlp.experts.*.up_proj"),
        ("transformer.h.0.attn.c_attn.bias", 0, "attn.c_attn.bias"),
        ("lm_head.weight", None, "lm_head"),
        ("conv1d_2.weight", None, "conv1d_2"),
    ],
)
def test_a_name_tells_layer_and_role(name: str, layer: int | None, role: str) -> None:
    place = place_of(name)
    assert (place.layer, place.role) == (layer, role)


def test_every_command_writes_a_page(run: Run, tmp_path: Path, quantized: Path) -> None:
    pages = {
        "inspect": ["inspect", SAMPLE],
        "quantize": ["quantize", SAMPLE, "--scheme", "q8_channel", "-o", tmp_path / "m.qblk"],
        "verify": ["verify", quantized, "--against", SAMPLE],
        "calibrate": [
            *("calibrate", SAMPLE, "-o", tmp_path / "c.safetensors"),
            *("--activations", ROOT / "samples/activations.safetensors"),
        ],
        "bench": ["bench", "--shape", "64x64", "--runs", "1", "--rows", "2"],
    }
    for name, arguments in pages.items():
        path = tmp_path / f"{name}.html"
        done = run(*map(str, arguments), "--html", str(path), "--quiet")
        assert done.code == 0, done.err
        text = path.read_text("utf-8")
        found = read(text)
        assert f"<title>{name}:" in text
        assert found.loads == ["data:,"]  # the empty picture of the tab, and nothing else
        assert not re.search(r"https?://|@import|url\(", text)
        assert len(text) < 300_000


def test_the_figures_are_those_of_the_report(quantized: Path) -> None:
    report = qconvert.verify(quantized, against=SAMPLE, histograms=True)
    rows = {row[0]: row for row in read("".join(document(report))).cells if row}
    for tensor in report.tensors:
        assert tensor.sqnr_db is not None
        assert rows[tensor.name][3] == f"{tensor.sqnr_db:.2f}"
    assert rows["quality"][1] == "pass"
    assert "PASS  intact, quality as expected of 4.4 bits" in "".join(document(report))


def test_histograms_before_and_after_count_the_same_values(quantized: Path) -> None:
    report = qconvert.verify(quantized, against=SAMPLE, histograms=True)
    with qconvert.load(SAMPLE) as before, qconvert.load(quantized) as after:
        for tensor in report.tensors:
            h = tensor.histogram
            assert h is not None
            x, y = before[tensor.name].dequantize(), after[tensor.name].dequantize()
            rows = max(1, (1 << 18) // x.shape[1])
            x, y = x[:rows].astype(np.float64), y[:rows].astype(np.float64)
            assert h.low == min(x.min(), y.min())
            assert h.high == max(x.max(), y.max())
            edges = np.linspace(h.low, h.high, len(h.before) + 1)
            for values, counts in ((x, h.before), (y, h.after)):
                # A value on an edge may fall to either side by one rounding.
                below = np.searchsorted(np.sort(values.ravel()), edges[1:-1])
                assert np.abs(np.cumsum(counts)[:-1] - below).max() <= 64
                assert sum(counts) == x.size
            assert h.grid == [y.min(), y.max()]  # of scales of blocks, whose values are many


def test_the_few_values_of_a_grid_are_drawn(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"w.weight": gaussian(1, 64, 64)})
    qconvert.quantize(source, "q2_tensor", output=tmp_path / "m.qblk")
    report = qconvert.verify(tmp_path / "m.qblk", against=source, histograms=True)
    with qconvert.load(tmp_path / "m.qblk") as tensors:
        values = np.unique(tensors["w.weight"].dequantize())
    assert len(values) == 4
    assert report.tensors[0].histogram
    assert report.tensors[0].histogram.grid == values.tolist()
    page = "".join(document(report))
    assert page.count("a value that codes stand for") == 4


def test_a_strangers_name_is_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\u202e\x1b[31m'\"&.weight"
    save_file({name: np.ones((4, 4), np.float32)}, tmp_path / "m.safetensors")
    page = "".join(document(qconvert.inspect(tmp_path / "m.safetensors", histograms=True)))
    found = read(page)
    assert page.count("<script>") == 1
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert any(row and row[0].startswith("<script>alert(1)</script>") for row in found.cells)


def test_thousands_of_tensors_are_cut_and_said() -> None:
    page = "".join(document(many(5000)))
    assert "2,000 of 5,000 rows are shown: those with the lowest SQNR" in page
    assert len([row for row in read(page).cells if row and row[0].startswith("model.")]) == 2000


def test_a_thousand_tensors_with_histograms_are_small() -> None:
    """Every bin of another height is the longest picture."""
    bins = [i * 7919 % 997 for i in range(64)]
    tensors = [
        VerifiedTensor(
            name=f"model.layers.{i // 7}.self_attn.some_projection_{i % 7}.weight",
            stored="q4_block64_asym",
            finite=True,
            sqnr_db=21.5,
            nmse=0.0123,
            max_error=0.0123,
            worst_step=0.499,
            output_sqnr_db=20.1,
            activations="dynamic",
            inputs="Gaussian",
            histogram=PairedHistogram(-1.0, 1.0, bins, bins[::-1], [-1.0, 0.0, 1.0]),
        )
        for i in range(1000)
    ]
    report = VerifyReport(
        kernels="native", path="m", against="s", checks=[], tensors=tensors, sqnr_db=21.5
    )
    assert len("".join(document(report)).encode()) < 2_000_000


def test_a_map_has_a_field_for_each_layer_and_role() -> None:
    values = {f"layers.{i}.{role}.weight": float(i) for i in range(80) for role in "qkv"}
    drawn = layer_map(values, lambda v: f"{v:g} dB", "a map")
    assert drawn is not None
    titles = re.findall(r"<title>(layers\.\d+\.[qkv]\.weight): (\d+) dB</title>", drawn)
    assert {name: float(value) for name, value in titles} == values
    assert layer_map({"a": 1.0}, str, "one") is None


def test_an_outline_is_as_high_as_the_root_of_its_counts() -> None:
    drawn = histogram([4, 1, 1, 0], 0.0, 4.0)
    outline = re.search(r'class="before" d="([^"]*)"', drawn)
    assert outline is not None
    x, y, corners = 0, 60, []
    for move, length in re.findall(r"([hv])(-?\d+)", outline[1]):
        x, y = (x + int(length), y) if move == "h" else (x, y + int(length))
        corners.append((x, 60 - y))
    assert corners == [(0, 60), (64, 60), (64, 30), (192, 30), (192, 0), (256, 0)]


def test_a_page_does_not_replace_what_it_is_about(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    done = run("inspect", str(SAMPLE), "--headers-only", "--html", str(page))
    assert done.code == 4
    assert page.read_text() == "mine"
    both = ["--html", str(tmp_path / "x"), "--report", str(tmp_path / "x")]
    assert run("inspect", str(SAMPLE), "--headers-only", *both).code == 2
    assert not (tmp_path / "x").exists()


# --- in a browser ---------------------------------------------------------------------------------

Browse = Callable[..., Any]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a page in a frame of some width, runs a function of its window, gives what that said.

    A page that logs an error fails the test.
    """
    if BROWSER is None:
        pytest.skip("no Chromium here")

    def opened(report: Report, script: str, width: int = 1000) -> Any:
        page, frame = tmp_path / "page.html", tmp_path / "frame.html"
        page.write_text("".join(document(report)), "utf-8")
        frame.write_text(
            f"<iframe src=page.html width={width} height=800 style='border:0'></iframe><script>"
            "const frame = document.querySelector('iframe');"
            "const start = performance.now();"
            "frame.onload = () => { const w = frame.contentWindow, d = w.document;"
            "const ms = performance.now() - start;"
            f"document.title = JSON.stringify((() => {{ {script} }})()); }};</script>"
        )
        done = subprocess.run(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--allow-file-access-from-files", "--enable-logging=stderr", "--log-level=0"),
                *(f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert ":CONSOLE" not in done.stderr, done.stderr
        title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        assert title, "the page did not load"
        return json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    return opened


def test_columns_are_sorted_by_their_values(browse: Browse) -> None:
    report = many(30)
    found = browse(
        report,
        """
        const table = d.querySelector('table');
        const heads = [...table.tHead.rows[0].cells];
        const column = heads.findIndex((head) => head.innerText.includes('SQNR'));
        const rows = () => [...table.tBodies[0].rows];
        const figures = () => rows().map((row) => Number(row.cells[column].innerText));
        const button = heads[column].querySelector('button');
        button.click(); const up = figures(); button.click();
        return [up, figures()];
        """,
    )
    wanted = sorted(round(t.sqnr_db or 0, 2) for t in report.tensors)
    assert found == [wanted, wanted[::-1]]


def test_a_search_leaves_the_rows_with_all_its_words(browse: Browse) -> None:
    found = browse(
        many(70),
        """
        const input = d.querySelector('input');
        input.value = 'layers.3. ROLE_2'; input.dispatchEvent(new w.Event('input'));
        const rows = [...d.querySelector('tbody').rows].filter((r) => r.offsetHeight > 0);
        return [rows.map((r) => r.cells[0].innerText), d.querySelector('output').innerText];
        """,
    )
    assert found == [["model.layers.3.mlp.role_2.weight"], "1 of 70 rows"]


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_nothing_is_wider_than_the_screen(browse: Browse, quantized: Path, width: int) -> None:
    report = qconvert.verify(quantized, against=SAMPLE, histograms=True)
    assert browse(report, "return d.documentElement.scrollWidth", width) <= width


def test_a_thousand_tensors_open_at_once(browse: Browse) -> None:
    """In less than a second on an idle machine; a busy one gets three tries, and two seconds."""
    assert min(browse(many(1000), "return ms") for _ in range(3)) < 2000


def test_rows_that_are_not_laid_out_are_found(browse: Browse) -> None:
    found = browse(
        many(1000),
        """
        const shown = () => [...d.querySelector('tbody').rows].filter((r) => r.offsetHeight).length;
        const first = shown(), input = d.querySelector('input');
        input.value = 'layers.142.mlp.role_5'; input.dispatchEvent(new w.Event('input'));
        const searched = shown(); input.value = '';
        d.querySelector('button[data-all]').click();
        return [first, searched, shown()];
        """,
    )
    assert found == [200, 1, 1000]


# --- what is not a number, and what nobody measured -----------------------------------------------


def test_figures_that_are_infinite_have_a_field() -> None:
    """As the SQNR of a tensor of zeros whose file has others."""
    few = {"layers.0.a": -np.inf, "layers.1.a": 1.0, "layers.2.a": np.nan}
    assert layer_map(few, str, "m") is None
    values = {"layers.0.a": -np.inf, "layers.1.a": 1.0, "layers.2.a": 2.0, "layers.3.a": np.inf}
    drawn = layer_map(values, lambda v: f"{v:g} dB", "m")
    assert drawn is not None
    colours = re.findall(r'fill="(#\w+)"><title>', drawn)
    assert colours == ["#440154", "#440154", "#fde725", "#fde725"]
    assert "<title>layers.0.a: -inf dB</title>" in drawn


def test_what_was_not_measured_is_not_exact(tmp_path: Path, quantized: Path) -> None:
    alone = qconvert.verify(quantized)
    made = qconvert.quantize(SAMPLE, "q4_block64", output=tmp_path / "m.qblk", dry_run=True)
    for report in (alone, made):
        page = "".join(document(report))
        assert "exact" not in [cell for row in read(page).cells for cell in row]
        assert "<dd>exact</dd>" not in page


def test_names_of_files_and_sections_are_text(tmp_path: Path) -> None:
    report = qconvert.bench(shape=(64, 64), runs=1, rows=2)
    for line in report.measurements:
        line.section = "\u202e<b>\udcff"
    page = "".join(document(report))
    page.encode("utf-8")
    assert "\u202e" not in page
    assert "<b>" not in page


def test_values_one_step_apart_have_a_histogram(tmp_path: Path) -> None:
    weights = np.full((64, 64), 1 + 2.0**-52)
    save_file({"w": weights}, tmp_path / "m.safetensors")
    qconvert.quantize(tmp_path / "m.safetensors", "f32", output=tmp_path / "m.qblk")
    made = qconvert.verify(tmp_path / "m.qblk", against=tmp_path / "m.safetensors", histograms=True)
    for tensor in made.tensors:
        if tensor.histogram:
            assert sum(tensor.histogram.before) == sum(tensor.histogram.after) == weights.size

"""What a file of compensated codes is predicted to lose, against what its decoded errors cost."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import ROOT, Call, Qblk
from numpy.typing import NDArray

from qconvert.calibration.file import Calibration
from qconvert.calibration.observers import ObserverSettings
from qconvert.commands.quantize import quantize
from qconvert.files import open_model
from qconvert.model import TensorInfo
from qconvert.stages import compensated_losses
from qconvert.stages.compensated_losses import cost, sampled_rows

F64 = NDArray[np.float64]


def test_the_cost_is_the_sum_over_pairs_of_rows_and_of_columns() -> None:
    rng = np.random.default_rng(1)
    e, h, o = rng.standard_normal((3, 4)), rng.standard_normal((4, 4)), rng.standard_normal((3, 3))
    pairs = [(i, k, j, m) for i in range(3) for k in range(3) for j in range(4) for m in range(4)]
    wanted = sum(o[i, k] * e[i, j] * h[j, m] * e[k, m] for i, k, j, m in pairs)
    assert cost(e, h, o) == pytest.approx(wanted, rel=1e-12)
    assert cost(e, h, o.diagonal()) == pytest.approx(cost(e, h, np.diag(o.diagonal())), rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "most", "wanted"),
    [((6, 4), 24, [0, 1, 2, 3, 4, 5]), ((6, 4), 12, [0, 2, 4]), ((6, 4), 3, [0])],
)
def test_rows_of_a_sample_are_spread_over_all(
    shape: tuple[int, int], most: int, wanted: list[int]
) -> None:
    assert sampled_rows(TensorInfo("a", shape, "F32", 96), most).tolist() == wanted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_directory(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def calibration(model: Path) -> Path:
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")
    from qconvert.stages.calibrate_text import TextOptions, calibrate_text

    path, text = model.with_suffix(".safetensors"), ROOT / "samples" / "calibration.txt"
    given: dict[str, Any] = {"seqlen": 32, "nsamples": 8, "threads": 1, "fisher": True}
    settings = ObserverSettings("minmax")
    calibrate_text(TextOptions(model, (text,), path, settings, gram=True, **given))
    return path


def errors_of(file: Path, model: Path) -> dict[str, F64]:
    with closing(open_model(file)) as made, closing(open_model(model)) as source:
        after = {t.name: made.values(t, 0, t.size) for t in made.tensors}
        return {
            t.name: (after[t.name] - source.values(t, 0, t.size).astype(np.float64)).reshape(
                t.shape
            )
            for t in source.tensors
            if len(t.shape) == 2
        }


def weighed(e: F64, known: Calibration, name: str) -> float:
    """tr(O E H E') with H and O as damped as for the rounding, 0.01 and 0.1 of their mean diagonal;
    of a table that is looked up with what its rows weigh.
    """
    h, o, d = known.input_fisher(name), known.output_fisher(name), known.sensitivity(name)
    assert h is not None
    assert d is not None
    h = h + 0.01 * np.trace(h) / len(h) * np.eye(len(h))
    if o is None:
        o = np.diag(d.array().sum(axis=1))
    else:
        o = o + 0.1 * np.trace(o) / len(o) * np.eye(len(o))
    return float(np.einsum("ik,ij,jm,km->", o, e, h, e, optimize=True))


def test_a_file_is_predicted_to_lose_what_is_left_of_the_cost(
    model: Path, calibration: Path, call: Call, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "target_bpw": 5.0, "calibration": calibration, "equalise": "off",
        "sensitivities": tmp_path / "s.json",
    }  # fmt: skip
    files = {r: tmp_path / f"{r}.qblk" for r in ("nearest", "compensated")}
    made = {
        r: quantize(model, output=file, rounding=r, threads=1, **given) for r, file in files.items()
    }
    plain, best = (made[r].prediction for r in files)
    assert plain
    assert best
    assert plain.kl
    assert best.kl
    assert plain.kl_nearest is None
    assert best.kl_nearest == plain.kl
    left = {r: errors_of(file, model) for r, file in files.items()}
    wanted = 0.0
    with Calibration(calibration) as known:
        for name, e in left["nearest"].items():
            d = known.sensitivity(name)
            assert d is not None
            lost = 0.5 * float(np.sum(d.array() * e**2))
            costs = weighed(left["compensated"][name], known, name), weighed(e, known, name)
            wanted += lost * (min(costs[0] / costs[1], 1) if costs[1] else 1)
    assert best.kl == pytest.approx(wanted, rel=1e-4)
    assert best.kl < 0.8 * plain.kl
    noted = Qblk(files["compensated"]).header["provenance"]["prediction"]
    assert noted["kl"] == pytest.approx(best.kl, rel=1e-5)
    again = tmp_path / "again.qblk"
    quantize(model, output=again, rounding="compensated", threads=3, **given)
    assert again.read_bytes() == files["compensated"].read_bytes()
    shown = call(
        *("quantize", model, "--target-bpw", "5", "--calibration", calibration),
        *("--equalise", "off", "--sensitivities", tmp_path / "s.json", "-o", tmp_path / "m.qblk"),
    )
    assert f"quantize, predicted divergence {best.kl:.3g} nats" in shown.err
    told = " ".join(shown.out.split())
    assert (
        f"predicted divergence {best.kl:.3g} nats by the Fisher information, {plain.kl:.3g} if"
        in told
    )


def test_some_rows_stand_for_all(
    model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of these models by a quarter at most, from half of the rows."""
    given: dict[str, Any] = {"target_bpw": 5.0, "calibration": calibration, "threads": 1}
    given |= {"sensitivities": tmp_path / "s.json", "force": True, "output": tmp_path / "m.qblk"}
    whole = quantize(model, **given).prediction
    monkeypatch.setattr(compensated_losses, "SAMPLE", 1 << 11)
    part = quantize(model, **given).prediction
    assert whole
    assert part
    assert whole.kl
    assert part.kl
    assert part.kl != whole.kl
    assert part.kl == pytest.approx(whole.kl, rel=0.25)
    assert part.kl_nearest == whole.kl_nearest

"""calibrate --fisher: held against torch's own gradients by every weight, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import ROOT
from interrupt import Interrupt
from numpy.typing import NDArray
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

import torch

from qconvert.calibration.factors import input_factor
from qconvert.calibration.file import Calibration
from qconvert.calibration.observers import ObserverSettings
from qconvert.errors import InputError, UnsupportedError
from qconvert.running.gradients import sampled
from qconvert.stages.calibrate import MergeOptions, merge_calibrations
from qconvert.stages.calibrate_text import TextOptions, calibrate_text

pytestmark = pytest.mark.filterwarnings("default")  # of torch and transformers, not ours
TEXT = ROOT / "samples" / "calibration.txt"
F64 = NDArray[np.float64]
LENGTH, WINDOWS, SEED = 16, 3, 5


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., TextOptions]:
    def make(model: Path, **changes: Any) -> TextOptions:
        given: dict[str, Any] = {
            "model": model,
            "texts": (TEXT,),
            "output": tmp_path / "c.safetensors",
            "seqlen": LENGTH,
            "nsamples": WINDOWS,
            "seed": SEED,
            "fisher": True,
            "settings": ObserverSettings("minmax"),
            "threads": 1,
        }
        return TextOptions(**given | changes)

    return make


# --- the sums, against gradients by the weights themselves ----------------------------------------


class Reference:
    """Inputs x and gradients g of each module, with torch's hooks and autograd, in float64."""

    def __init__(self, model: Path, windows: int = WINDOWS, *, experts: bool = False) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        if experts:
            self.model.set_experts_implementation("eager")
        tokens = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
        every = np.array(tokens[: len(tokens) // LENGTH * LENGTH]).reshape(-1, LENGTH)
        self.x: dict[str, list[F64]] = {}
        self.g: dict[str, list[F64]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.register_forward_hook(self._hook(name))
        begin = tokenizer("")["input_ids"][:1]
        for k in sorted(np.random.default_rng(SEED).permutation(len(every))[:windows]):
            window = every[k].astype(np.int64)
            if begin:
                window[0] = begin[0]
            logits = self.model(torch.from_numpy(window)[None]).logits[0]
            labels = sampled(logits.detach().numpy(), window, SEED)
            nll = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(labels), reduction="sum"
            )
            nll.backward()

    def _hook(self, name: str) -> Any:
        def keep(_: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].detach()
            if x.dtype == torch.int64:  # as one of the rows that may be looked up
                x = torch.nn.functional.one_hot(x, self.model.config.vocab_size)
            self.x.setdefault(name, []).append(x[0].double().numpy())
            if output.requires_grad:
                output.register_hook(
                    lambda g: self.g.setdefault(name, []).append(g[0].double().numpy())
                )

        return keep

    def pair(self, name: str) -> tuple[F64, F64]:
        """x and g of D_ij = E[g_i² x_j²]; of a table, gradients and which row was looked up."""
        x, g = np.concatenate(self.x[name]), np.concatenate(self.g[name])
        return (g, x) if "embed" in name else (x, g)


TOKENS = WINDOWS * LENGTH


def close(found: F64 | None, wanted: F64) -> None:
    """To what float32 leaves of sums with terms of either sign."""
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.max())


def marginals(x: F64, g: F64) -> tuple[F64, F64]:
    """Sums of the true D_ij = E[g_i² x_j²] over its columns and over its rows."""
    d = (g**2).T @ x**2 / TOKENS
    return d.sum(axis=1), d.sum(axis=0)


def test_sensitivities_have_the_sums_of_the_true_ones(
    directory: Callable[[str], Path], options: Callable[..., TextOptions]
) -> None:
    model = directory("llama")
    report = calibrate_text(options(model, gram=True))
    wanted = Reference(model)
    assert report.fisher
    assert (report.fisher.labels, report.fisher.seed, report.fisher.lacking) == (TOKENS, SEED, [])
    assert (report.fisher.blocks, report.fisher.passes) == (2, 1)
    with Calibration(options(model).output) as found:
        assert found.sensitivity("model.norm.weight") is None
        assert report.fisher.matrices == len(wanted.x)
        for name in wanted.x:
            x, g = wanted.pair(name)
            d = found.sensitivity(f"{name}.weight")
            assert d is not None
            rows, columns = marginals(x, g)
            array = d.array()
            assert array.sum(axis=1) == pytest.approx(rows, rel=1e-3, abs=1e-6 * rows.max())
            assert array.sum(axis=0) == pytest.approx(columns, rel=1e-3, abs=1e-6 * columns.max())
            assert np.linalg.matrix_rank(array) == 1
            inner, outer = (
                found.input_fisher(f"{name}.weight"),
                found.output_fisher(f"{name}.weight"),
            )
            assert inner is not None
            assert np.array_equal(input_factor(found, name), inner)  # what codes are rounded by
            if name == "model.embed_tokens":
                assert outer is None
                close(inner, x.T @ x / TOKENS)
                continue
            weighted = x * np.sqrt((g**2).sum(axis=1))[:, None]
            second = weighted.T @ weighted / TOKENS
            close(inner, second)
            assert outer is not None
            second = g.T @ g / TOKENS
            close(outer, second)


def test_a_tied_matrix_has_both_of_its_uses(
    directory: Callable[[str], Path], options: Callable[..., TextOptions]
) -> None:
    model = directory("smollm")
    calibrate_text(options(model, gram=True))
    wanted = Reference(model)
    with Calibration(options(model).output) as found:
        d = found.sensitivity("model.embed_tokens.weight")
        inner = found.input_fisher("model.embed_tokens.weight")
        outer = found.output_fisher("model.embed_tokens.weight")
    assert d is not None
    assert inner is not None
    assert outer is not None
    (by_found, ids), (x, g) = wanted.pair("model.embed_tokens"), wanted.pair("lm_head")
    rows = marginals(by_found, ids)[0] + marginals(x, g)[0]
    columns = marginals(by_found, ids)[1] + marginals(x, g)[1]
    assert d.array().sum(axis=1) == pytest.approx(rows, rel=1e-3, abs=1e-6 * rows.max())
    assert d.array().sum(axis=0) == pytest.approx(columns, rel=1e-3)
    weighted = x * np.sqrt((g**2).sum(axis=1))[:, None]
    second = (weighted.T @ weighted + by_found.T @ by_found) / TOKENS
    close(inner, second)
    close(outer, g.T @ g / TOKENS)


def test_a_divergence_is_half_the_weighted_squares(
    directory: Callable[[str], Path], options: Callable[..., TextOptions]
) -> None:
    model = directory("llama")
    calibrate_text(options(model))
    with Calibration(options(model).output) as found:
        d = found.sensitivity("model.layers.1.mlp.down_proj.weight")
        assert found.input_fisher("model.layers.1.mlp.down_proj.weight") is None
    assert d is not None
    errors = np.random.default_rng(0).normal(size=d.shape)
    whole = 0.5 * np.sum(d.array() * errors**2)
    assert d.divergence(0, 0, errors**2) == pytest.approx(whole)
    halves = [
        d.divergence(r, c, errors[r : r + 32, c : c + 48] ** 2) for r in (0, 32) for c in (0, 48)
    ]
    assert sum(halves) == pytest.approx(whole)


def test_the_prediction_is_the_divergence_of_small_errors(
    directory: Callable[[str], Path], options: Callable[..., TextOptions]
) -> None:
    """The law itself: noise on all weights moves next tokens as far as D says, within a third."""
    model = directory("llama")
    calibrate_text(options(model, nsamples=40, seqlen=32))
    reference = Reference(model)
    noise = np.random.default_rng(3)
    predicted = 0.0
    with Calibration(options(model).output) as found, torch.no_grad():
        text = TEXT.read_text(encoding="utf-8")
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"][4000:12000]
        batch = torch.tensor(ids[: len(ids) // 32 * 32]).reshape(-1, 32)
        before = reference.model(batch).logits.double().log_softmax(-1)
        for name, parameter in reference.model.named_parameters():
            d = found.sensitivity(name)
            if d is not None:
                errors = noise.normal(size=d.shape) * 0.01 * float(parameter.std())
                predicted += d.divergence(0, 0, errors**2)
                parameter += torch.from_numpy(errors).float()
        after = reference.model(batch).logits.double().log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=1 / 3)


# --- experts, fused matrices ----------------------------------------------------------------------


def test_experts_and_an_expert_that_no_token_reached(
    directory: Callable[[str], Path], options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    model = tmp_path / "moe"
    tensors = tiny_models.weights(tiny_models.CONFIGS["qwen3-moe"])
    gate = "model.layers.0.mlp.gate.weight"
    tensors[gate][3] = tensors[gate][:3].mean(axis=0) * 1e-3
    tiny_models.write_directory(model, "qwen3-moe", tensors=tensors)
    report = calibrate_text(options(model, nsamples=1, seqlen=4))
    assert report.fisher
    assert report.fisher.lacking == []
    unreached = [n for n in report.unreached if n.endswith("gate_proj")]
    assert unreached
    with Calibration(options(model).output) as found:
        name = unreached[0]
        layer = name.split(".experts.")[0]
        others = [
            f"{layer}.experts.{e}.gate_proj.weight"
            for e in range(4)
            if f"{layer}.experts.{e}.gate_proj" not in report.unreached
        ]
        known = [found.sensitivity(n) for n in others]
        mean = found.sensitivity(f"{name}.weight")
        assert mean is not None
        assert all(known)
        wanted = np.mean([d.array().sum(axis=1) for d in known if d], axis=0)
        assert mean.array().sum(axis=1) == pytest.approx(wanted)


def test_experts_have_the_sums_of_gradients_by_their_parts(
    directory: Callable[[str], Path], options: Callable[..., TextOptions]
) -> None:
    """D of gate and up, which run as one matrix: E[g²] |x|² of what comes out of each half."""
    model = directory("qwen3-moe")
    calibrate_text(options(model, nsamples=1))
    seen: dict[int, list[tuple[F64, F64]]] = {}
    products = torch.nn.functional.linear

    reference = Reference.__new__(Reference)
    reference.x, reference.g = {}, {}

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        y = products(x, weight, bias)
        y.register_hook(
            lambda g: seen.setdefault(weight.data_ptr(), []).append(
                (x.detach().double().numpy(), g.double().numpy())
            )
        )
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        Reference.__init__(reference, model, windows=1, experts=True)
    experts = reference.model.model.layers[1].mlp.experts
    with Calibration(options(model).output) as found:
        for e in range(4):
            pairs = seen.get(experts.gate_up_proj[e].data_ptr(), [])
            if not pairs:
                continue
            x, g = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
            for part, name in enumerate(("gate_proj", "up_proj")):
                half = g[:, part * 48 : part * 48 + 48]
                d = found.sensitivity(f"model.layers.1.mlp.experts.{e}.{name}.weight")
                assert d is not None
                rows = ((half**2).T @ (x**2)).sum(axis=1) / LENGTH
                assert d.array().sum(axis=1) == pytest.approx(rows, rel=1e-3, abs=1e-6 * rows.max())


# --- the same bytes -------------------------------------------------------------------------------


def test_interrupted_grouped_and_merged_runs_are_those_of_one(
    directory: Callable[[str], Path], options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    model = directory("smollm")
    data = TEXT.read_bytes()
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    texts[0].write_bytes(data[:100])
    texts[1].write_bytes(data[40000:40080])
    more = {"nsamples": None, "gram": True}
    report = calibrate_text(options(model, texts=texts, output=tmp_path / "both", **more))
    assert report.chunks
    small = {"statistics_bytes": 8 << 20, "save_seconds": 0.0, **more}
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(options(model, texts=texts, **small), Interrupt(report.chunks + 3))
    with pytest.raises(InputError, match="another run: --fisher"):
        calibrate_text(options(model, texts=texts, resume=True, **small | {"fisher": False}))
    resumed = calibrate_text(options(model, texts=texts, resume=True, **small))
    assert resumed.fisher
    assert resumed.fisher.passes > 1
    a, b = load_file(tmp_path / "both"), load_file(tmp_path / "c.safetensors")
    assert a.keys() == b.keys()
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)
    parts = tuple(tmp_path / p for p in ("first", "second"))
    for text, part in zip(texts, parts, strict=True):
        calibrate_text(options(model, texts=(text,), output=part, **more))
    merge_calibrations(MergeOptions(model, parts, tmp_path / "merged"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "both").read_bytes()
    plain = tmp_path / "plain"
    calibrate_text(options(model, texts=texts[:1], output=plain, fisher=False, **more))
    with pytest.raises(UnsupportedError, match="different statistics"):
        merge_calibrations(MergeOptions(model, (parts[1], plain), tmp_path / "no"))


def test_what_there_was_without_gradients_is_the_same(
    directory: Callable[[str], Path], options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    model = directory("llama")
    calibrate_text(options(model))
    calibrate_text(options(model, output=tmp_path / "plain", fisher=False))
    a, b = load_file(tmp_path / "plain"), load_file(tmp_path / "c.safetensors")
    assert all("/fisher." in name for name in b.keys() - a.keys())
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_labels_follow_the_distribution_and_the_window_alone() -> None:
    logits = np.log(np.tile([0.5, 0.25, 0.125, 0.125], (20_000, 1))).astype(np.float32)
    window = np.arange(20_000)
    labels = sampled(logits, window, 0)
    assert np.bincount(labels) / 20_000 == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.02)
    assert np.array_equal(labels, sampled(logits, window, 0))
    assert not np.array_equal(labels, sampled(logits, window, 1))
    assert not np.array_equal(labels, sampled(logits, window[::-1], 0))


def test_an_encoder_is_refused(
    directory: Callable[[str], Path], options: Callable[..., TextOptions]
) -> None:
    with pytest.raises(UnsupportedError, match="of which an encoder has none"):
        calibrate_text(options(directory("bert")))

"""calibrate --text: what a running model is seen to multiply with, held against torch itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Call, Run, save
from interrupt import Interrupt
from numpy.typing import NDArray
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="install qconvert[hf]")
pytest.importorskip("transformers", reason="install qconvert[hf]")

import torch

from qconvert.calibration.column_norms import column_norms
from qconvert.calibration.document import CalibrationDocument
from qconvert.calibration.file import Calibration
from qconvert.calibration.observers import OBSERVERS, ObserverSettings
from qconvert.errors import (
    InputError,
    OutputExistsError,
    QconvertError,
    UnsupportedError,
    UsageError,
    WeightError,
)
from qconvert.files.imatrix import read_imatrix
from qconvert.files.safetensors import open_safetensors
from qconvert.running.hugging_face import open_checkpoint
from qconvert.running.text import first_token, sentences, token_chunks
from qconvert.stages.calibrate import (
    CalibrateOptions,
    MergeOptions,
    calibrate,
    merge_calibrations,
)
from qconvert.stages.calibrate_text import TextOptions, calibrate_text

pytestmark = pytest.mark.filterwarnings("default")  # of torch and transformers, not ours
MODEL = ROOT / "samples" / "tiny-llama"
TEXT = ROOT / "samples" / "calibration.txt"
WINDOWS, LENGTH = 6, 32


def document(path: Path) -> CalibrationDocument:
    with Calibration(path) as found:
        return found.document


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., TextOptions]:
    def make(**changes: Any) -> TextOptions:
        given: dict[str, Any] = {
            "model": MODEL,
            "texts": (TEXT,),
            "output": tmp_path / "c.safetensors",
            "seqlen": LENGTH,
            "nsamples": WINDOWS,
            "threads": 1,
        }
        return TextOptions(**given | changes)

    return make


@pytest.fixture(scope="module")
def recorded() -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs and outputs of every linear layer for the windows, by hooks of this test's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    every = np.array(tokens[: len(tokens) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    chosen = np.random.default_rng(0).permutation(len(every))[:WINDOWS]
    seen: dict[str, list[tuple[Any, Any]]] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, inputs: Any, output: Any) -> None:
            pair = (inputs[0][0].numpy().copy(), output[0].numpy().copy())
            seen.setdefault(name, []).append(pair)

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(name))
    for k in sorted(chosen):
        window = every[k].copy()
        window[0] = tokenizer.bos_token_id
        with torch.no_grad():
            model(torch.from_numpy(window)[None])
    return {
        n: (np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))
        for n, pairs in seen.items()
    }


# --- the statistics -------------------------------------------------------------------------------


def test_every_linear_layer_is_observed_exactly(
    options: Callable[..., TextOptions],
    recorded: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    tmp_path: Path,
) -> None:
    report = calibrate_text(options(outputs=True, settings=ObserverSettings("minmax")))
    found = load_file(tmp_path / "c.safetensors")
    layers = document(tmp_path / "c.safetensors").layers
    assert set(layers) == set(recorded)
    assert (report.chunks, report.tokens) == (WINDOWS, WINDOWS * LENGTH)
    assert report.unreached == []
    for name, (x, y) in recorded.items():
        layer = layers[name]
        assert (layer.samples, layer.features) == x.shape
        assert found[f"{name}/minimum"].tolist() == x.min(axis=0).tolist()
        assert found[f"{name}/maximum"].tolist() == x.max(axis=0).tolist()
        wanted = np.mean(x.astype(np.float64) ** 2, axis=0)
        assert found[f"{name}/mean_square"] == pytest.approx(wanted, rel=1e-6)
        assert (layer.input.low, layer.input.high) == (min(x.min(), 0), max(x.max(), 0))
        assert layer.output
        assert (layer.output.low, layer.output.high) == (min(y.min(), 0), max(y.max(), 0))


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy", "nmse"])
def test_the_file_is_that_of_the_same_activations_recorded(
    kind: str,
    options: Callable[..., TextOptions],
    recorded: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    tmp_path: Path,
) -> None:
    """All but where it came from: other batches, the same bits."""
    settings = ObserverSettings(kind)
    calibrate_text(options(settings=settings))
    acts = save(tmp_path / "acts.safetensors", {n: x for n, (x, _) in recorded.items()})
    other = tmp_path / "recorded.safetensors"
    calibrate(CalibrateOptions((acts,), other, MODEL, settings))
    ours, theirs = load_file(tmp_path / "c.safetensors"), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)
    a, b = (document(p) for p in (tmp_path / "c.safetensors", other))
    assert a.layers == b.layers
    assert a.model == b.model


@pytest.mark.parametrize("kind", list(OBSERVERS))
def test_interrupted_and_resumed_is_the_same_file_byte_for_byte(
    kind: str, options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    more = {"settings": ObserverSettings(kind), "outputs": True, "save_seconds": 0.0}
    single, records = tmp_path / "single", (tmp_path / "r1", tmp_path / "r2")
    calibrate_text(options(output=single, record=records[0], **more))
    interrupted = options(record=records[1], **more)
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(interrupted, Interrupt(4))
    assert not interrupted.output.exists()
    assert interrupted.state.exists()
    with pytest.raises(InputError, match="interrupted run"):
        document(interrupted.state)
    with pytest.raises(OutputExistsError, match="interrupted run"):
        calibrate_text(interrupted)
    report = calibrate_text(options(record=records[1], resume=True, **more))
    assert report.resumed_at == 3  # the fourth was not saved yet
    assert interrupted.output.read_bytes() == single.read_bytes()
    assert not interrupted.state.exists()
    a, b = (load_file(r / "activations.safetensors") for r in records)
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_several_passes_for_groups_of_layers_give_the_same_statistics(
    options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    settings = ObserverSettings("mse")
    calibrate_text(options(output=tmp_path / "one", settings=settings))
    small = {"settings": settings, "statistics_bytes": 8 << 20, "save_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(options(**small), Interrupt(WINDOWS + 3))
    calibrate_text(options(resume=True, **small))
    a, b = load_file(tmp_path / "one"), load_file(tmp_path / "c.safetensors")
    assert a.keys() == b.keys()
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy", "nmse"])
def test_merged_runs_are_one_run_over_both_texts_byte_for_byte(
    kind: str, options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    data = TEXT.read_bytes()
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    texts[0].write_bytes(data[:3000])
    texts[1].write_bytes(data[40000:42000])
    more = {"settings": ObserverSettings(kind), "nsamples": None, "outputs": True}
    calibrate_text(options(texts=texts, output=tmp_path / "both", **more))
    parts = tuple(tmp_path / p for p in ("first", "second"))
    for text, part in zip(texts, parts, strict=True):
        calibrate_text(options(texts=(text,), output=part, **more))
    merge_calibrations(MergeOptions(MODEL, parts, tmp_path / "merged"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "both").read_bytes()


# --- Gram matrices --------------------------------------------------------------------------------


def test_gram_matrices_are_those_of_all_inputs(
    options: Callable[..., TextOptions],
    recorded: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    tmp_path: Path,
) -> None:
    calibrate_text(options(gram=True))
    with Calibration(tmp_path / "c.safetensors") as found:
        assert found.gram("model.layers.9.mlp.up_proj.weight") is None
        for name, (x, _) in recorded.items():
            wide = x.astype(np.float64)
            wanted, gram = wide.T @ wide, found.gram(f"{name}.weight")
            assert gram is not None
            assert np.array_equal(gram, gram.T)
            reach = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
            assert (np.abs(gram - wanted) <= 1e-13 * reach).all()
    plain = tmp_path / "plain"
    calibrate_text(options(output=plain))
    without, with_gram = load_file(plain), load_file(tmp_path / "c.safetensors")
    assert all(with_gram[n].tobytes() == without[n].tobytes() for n in without)
    with Calibration(plain) as found:
        assert found.gram("lm_head.weight") is None


def test_gram_matrices_of_interrupted_grouped_and_merged_runs_are_those_of_one(
    options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    data = TEXT.read_bytes()
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    texts[0].write_bytes(data[:400])
    texts[1].write_bytes(data[40000:40300])
    more = {"nsamples": None, "gram": True}
    report = calibrate_text(options(texts=texts, output=tmp_path / "both", **more))
    assert report.chunks
    small = {"statistics_bytes": 30 << 20, "save_seconds": 0.0, **more}
    halfway = Interrupt(report.chunks + 3)  # in the second pass
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(options(texts=texts, **small), halfway)
    with pytest.raises(InputError, match="another run: --gram"):
        calibrate_text(options(texts=texts, resume=True, **small | {"gram": False}))
    calibrate_text(options(texts=texts, resume=True, **small))
    a, b = load_file(tmp_path / "both"), load_file(tmp_path / "c.safetensors")
    assert a.keys() == b.keys()
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)
    parts = tuple(tmp_path / p for p in ("first", "second"))
    for text, part in zip(texts, parts, strict=True):
        calibrate_text(options(texts=(text,), output=part, **more))
    merge_calibrations(MergeOptions(MODEL, parts, tmp_path / "merged"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "both").read_bytes()
    plain = tmp_path / "plain"
    calibrate_text(options(texts=texts[:1], output=plain, nsamples=None))
    with pytest.raises(UnsupportedError, match="differs between the calibrations"):
        merge_calibrations(MergeOptions(MODEL, (parts[1], plain), tmp_path / "no"))


def test_recorded_rows_are_rows_of_the_inputs(
    options: Callable[..., TextOptions],
    recorded: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    tmp_path: Path,
) -> None:
    calibrate_text(options(record=tmp_path / "rec"))
    kept = load_file(tmp_path / "rec" / "activations.safetensors")
    for name, (x, _) in recorded.items():
        assert kept[name].shape == (64, x.shape[1])
        rows = {row.tobytes() for row in x}
        assert all(row.tobytes() in rows for row in kept[name])


def test_the_importance_matrix_has_the_sums_under_the_names_of_gguf(
    options: Callable[..., TextOptions],
    recorded: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    tmp_path: Path,
) -> None:
    calibrate_text(options(imatrix=tmp_path / "im.gguf"))
    found = read_imatrix(tmp_path / "im.gguf")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (
        WINDOWS,
        LENGTH,
        ("calibration.txt",),
    )
    assert len(found.weights) == len(recorded)
    for gguf, name in {
        "output.weight": "lm_head",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj",
        "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj",
        "blk.2.attn_output.weight": "model.layers.2.self_attn.o_proj",
    }.items():
        wanted = np.mean(recorded[name][0].astype(np.float64) ** 2, axis=0)
        assert found.weights[gguf] == pytest.approx(wanted, rel=1e-6)


def test_streamed_weights_compute_the_same_bits() -> None:
    tokens = torch.arange(20)[None]
    outputs = []
    for streamed in (False, True):
        checkpoint = open_checkpoint(MODEL, streamed=streamed)
        with torch.no_grad():
            outputs.append(checkpoint.model(tokens).logits)
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.equal(*outputs)


# --- experts, ties, encoders ----------------------------------------------------------------------


def tokenizer_into(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(MODEL / name, directory)
    return directory


SMALL = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts a layer, one token each; the router never chooses the last."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    more = {"num_local_experts": 4, "num_experts_per_tok": 1}
    model = MixtralForCausalLM(MixtralConfig(**SMALL, **more))
    path = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name, values in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            # Every input scores nothing with expert 3, and for 0 or 1 one score is above.
            values[3] = 0
            values[1] = -values[0]
    save(file, tensors, format="pt")
    return tokenizer_into(path)


def test_experts_are_observed_and_those_without_a_token_listed(
    mixtral: Path, options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    report = calibrate_text(options(model=mixtral, imatrix=tmp_path / "im.gguf", outputs=True))
    layers = document(tmp_path / "c.safetensors").layers
    experts = {
        f"model.layers.{k}.block_sparse_moe.experts.3.w{w}" for k in (0, 1) for w in (1, 2, 3)
    }
    assert experts <= set(report.unreached)
    assert not experts & set(layers)
    assert any("no token came through" in w for w in report.warnings)
    tokens = WINDOWS * LENGTH
    for k in (0, 1):
        block = f"model.layers.{k}.block_sparse_moe"
        for w in (1, 2, 3):
            counts = [layers.get(f"{block}.experts.{e}.w{w}") for e in range(4)]
            assert sum(c.samples for c in counts if c) == tokens  # one expert a token
        assert layers[f"{block}.gate"].samples == tokens
    found = read_imatrix(tmp_path / "im.gguf")
    assert found.weights["blk.0.ffn_down_exps.weight"].shape == (4, 48)
    assert (found.weights["blk.0.ffn_down_exps.weight"][3] == 1).all()


def test_a_tied_head_has_the_name_its_weight_is_stored_under(
    options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tmp_path / "tied"
    LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(model)
    calibrate_text(options(model=tokenizer_into(model)))
    layers = document(tmp_path / "c.safetensors").layers
    assert "lm_head" not in layers
    assert layers["model.embed_tokens"].samples == WINDOWS * LENGTH


def test_an_encoder_takes_lines(options: Callable[..., TextOptions], tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    model = tmp_path / "bert"
    config = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    BertForMaskedLM(BertConfig(**config)).save_pretrained(model)
    tokenizer = open_checkpoint(tokenizer_into(model)).tokenizer
    text = tmp_path / "lines.txt"
    text.write_text("one line\n\n  \nanother, rather longer line of text\n" + "word " * 200 + "\n")
    calibrate_text(options(model=model, texts=(text,), nsamples=None))
    lengths = [len(line) for line in sentences(tokenizer, text, LENGTH)]
    assert len(lengths) == 3
    assert lengths[2] == LENGTH
    layers = document(tmp_path / "c.safetensors").layers
    assert layers["bert.encoder.layer.1.output.dense"].features == 48
    assert {layer.samples for layer in layers.values()} == {sum(lengths)}


# --- weights that are no linear layers of torch ---------------------------------------------------


GPT2 = {"vocab_size": 2048, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its matrices are (in, out), and the one after attention is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("gpt2")
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):  # rows and columns of unlike norms
            parameter.add_(0.02 * torch.randn(parameter.shape) * (1 + k % 3))
    model.save_pretrained(path)
    return tokenizer_into(path)


def inputs_of(model_path: Path, cls: str, chosen: Callable[[str, Any], bool]) -> dict[str, Any]:
    """What enters the chosen modules for the windows, by hooks of this test's own."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    model = getattr(transformers, cls).from_pretrained(model_path, dtype=torch.float32).eval()
    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Any:
        return lambda _, x: seen.setdefault(name, []).append(x[0].reshape(-1, x[0].shape[-1]))

    for name, module in model.named_modules():
        if chosen(name, module):
            module.register_forward_pre_hook(hook(name))
    for window in token_chunks(tokenizer, TEXT, LENGTH, WINDOWS, 0):
        with torch.no_grad():
            model(torch.from_numpy(window.copy())[None])
    return {n: torch.cat(rows).numpy() for n, rows in seen.items()}


def test_layers_of_gpt2_are_observed_along_their_inputs(
    gpt2: Path, options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    report = calibrate_text(options(model=gpt2))
    wanted = inputs_of(gpt2, "GPT2LMHeadModel", lambda _, m: type(m).__name__ == "Conv1D")
    assert len(wanted) == 8
    assert report.unreached == []
    assert report.warnings == []
    layers, found = document(tmp_path / "c.safetensors").layers, load_file(report.output)
    assert set(layers) == {*wanted, "transformer.wte"}
    for name, x in wanted.items():
        layer = layers[name]
        assert (layer.samples, layer.features, layer.transposed) == (*x.shape, True)
        assert found[f"{name}/minimum"].tolist() == x.min(axis=0).tolist()
        wide = np.mean(x.astype(np.float64) ** 2, axis=0)
        assert found[f"{name}/mean_square"] == pytest.approx(wide, rel=1e-6)
    assert not layers["transformer.wte"].transposed


def test_norms_of_an_input_first_weight_are_those_of_its_rows(gpt2: Path) -> None:
    name = "transformer.h.1.attn.c_proj"
    stored = load_file(gpt2 / "model.safetensors")[f"{name}.weight"].astype(np.float64)
    assert stored.shape == (32, 32)
    with open_safetensors(gpt2) as model:
        rows = column_norms(model, name, transposed=True)
        columns = column_norms(model, name)
    assert rows == pytest.approx((stored**2).sum(axis=1))
    assert columns == pytest.approx((stored**2).sum(axis=0))
    assert rows != pytest.approx(columns, rel=1e-3)


def test_recorded_inputs_of_gpt2_give_the_same_file_and_it_quantizes(
    gpt2: Path, options: Callable[..., TextOptions], tmp_path: Path, call: Call
) -> None:
    """The orientation comes from config.json there, from the running modules here."""
    calibrate_text(options(model=gpt2))
    wanted = inputs_of(gpt2, "GPT2LMHeadModel", lambda _, m: type(m).__name__ == "Conv1D")
    acts = save(tmp_path / "acts.safetensors", wanted)
    other = tmp_path / "recorded.safetensors"
    calibrate(CalibrateOptions((acts,), other, gpt2))
    ours, theirs = load_file(tmp_path / "c.safetensors"), load_file(other)
    assert theirs.keys() < ours.keys()
    assert all(ours[n].tobytes() == theirs[n].tobytes() for n in theirs)
    out = tmp_path / "m.qblk"
    done = call(
        *("quantize", gpt2, "--scheme", "q8_block32", "-o", out, "--json"),
        *("--calibration", tmp_path / "c.safetensors"),
    )
    assert done.code == 0, done.err
    # Every value of a row meets one channel: within it there is nothing to weigh.
    weighted = {t["name"] for t in done.json["tensors"] if t["weighted"]}
    assert weighted == {"transformer.wte.weight"}
    # Rows of a square weight are no inputs of it either, though they are as long.
    square = save(
        tmp_path / "square.safetensors", {"transformer.h.0.attn.c_proj": np.ones((4, 32))}
    )
    checked = call("verify", out, "--against", gpt2, "--samples", square, "--json")
    assert checked.code == 0
    assert any("fit no quantized tensor" in w for w in checked.json["warnings"])


def test_orientation_outlives_interruptions_and_merging(
    gpt2: Path, options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    calibrate_text(options(model=gpt2, output=tmp_path / "one"))
    broken = {"model": gpt2, "save_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(options(**broken), Interrupt(3))
    calibrate_text(options(resume=True, **broken))
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "one").read_bytes()
    both = (tmp_path / "one", tmp_path / "c.safetensors")
    merge_calibrations(MergeOptions(gpt2, both, tmp_path / "two"))
    layers = document(tmp_path / "two").layers
    assert layers["transformer.h.0.attn.c_proj"].transposed
    assert not layers["transformer.wte"].transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_a_recurrence_are_no_layers_and_what_runs_is_seen(
    dtype: Any, options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    """Mamba multiplies with dt_proj's weight without calling dt_proj."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(6)
    sizes = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16}
    path = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(**sizes)).to(dtype).save_pretrained(path)
    report = calibrate_text(options(model=tokenizer_into(path)))
    assert report.unreached == []
    assert report.warnings == []
    layers = document(tmp_path / "c.safetensors").layers
    assert len(layers) == 2 * 4 + 1  # in, x, dt and out; the head
    time_step = layers["backbone.layers.0.mixer.dt_proj"]
    x = inputs_of(path, "MambaForCausalLM", lambda n, _: n.endswith("0.mixer.x_proj"))
    stored = load_file_any(path / "model.safetensors")["backbone.layers.0.mixer.x_proj.weight"]
    (entering,) = x.values()
    steps = (entering @ stored.T)[:, : time_step.features]  # dt comes first of dt, B and C
    assert time_step.samples == len(steps) == WINDOWS * LENGTH
    found = load_file(report.output)["backbone.layers.0.mixer.dt_proj/maximum"]
    assert found == pytest.approx(steps.max(axis=0), rel=1e-3, abs=1e-4)


def test_a_fused_matrix_that_transformers_takes_apart_is_observed(
    options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "NomicBertConfig"):
        pytest.skip("this transformers has no NomicBert")
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    path = tmp_path / "nomic"
    transformers.NomicBertModel(transformers.NomicBertConfig(**sizes)).save_pretrained(path)
    text = tmp_path / "lines.txt"
    text.write_text("one line\nand another\n")
    report = calibrate_text(options(model=tokenizer_into(path), texts=(text,), nsamples=None))
    assert report.warnings == []
    layers = document(tmp_path / "c.safetensors").layers
    fused = [n for n in layers if n.endswith("Wqkv")]
    assert len(fused) == 2
    assert {layers[n].features for n in fused} == {32}


# --- text -----------------------------------------------------------------------------------------


def test_windows_follow_each_other_and_begin_with_the_first_token() -> None:
    tokenizer = open_checkpoint(MODEL).tokenizer
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    found = token_chunks(tokenizer, TEXT, 50)
    assert found.dtype == np.int64
    assert found.shape == (len(tokens) // 50, 50)
    assert found[:, 1:].tolist() == [
        tokens[k + 1 : k + 50] for k in range(0, len(tokens) // 50 * 50, 50)
    ]
    assert set(found[:, 0].tolist()) == {first_token(tokenizer)} == {2045}


def test_a_draw_is_seeded_nested_and_in_order_of_the_text() -> None:
    tokenizer = open_checkpoint(MODEL).tokenizer
    every = token_chunks(tokenizer, TEXT, 50)
    rows = {row.tobytes(): k for k, row in enumerate(every)}

    def drawn(n: int, seed: int) -> list[int]:
        return [rows[row.tobytes()] for row in token_chunks(tokenizer, TEXT, 50, n, seed)]

    assert drawn(20, 1) == sorted(set(drawn(20, 1)))
    assert len(drawn(20, 1)) == 20
    assert set(drawn(5, 1)) < set(drawn(20, 1))
    assert drawn(20, 1) == drawn(20, 1) != drawn(20, 2)


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "copy"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: (p / "config.json").unlink(), "no such file"),
        (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda p: (p / "config.json").write_text("{"), "JSON"),
        (lambda p: (p / "model.safetensors").unlink(), "no safetensors"),
        (
            lambda p: edit(p / "config.json", auto_map={"AutoModel": "evil.Model"}),
            "code of its own",
        ),
        (
            lambda p: edit(
                p / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}
            ),
            "code of its own",
        ),
        (lambda p: edit(p / "config.json", architectures=["Nonesuch"]), "text alone"),
        (lambda p: edit(p / "config.json", architectures=None), "text alone"),
        (lambda p: edit(p / "config.json", architectures=["pipeline"]), "text alone"),
        (lambda p: edit(p / "config.json", num_hidden_layers=5), "do not make up the model"),
        (lambda p: edit(p / "config.json", hidden_size="many"), "cannot load"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "cannot load"),
        (lambda p: edit(p / "config.json", max_position_embeddings=16), "windows that long"),
    ],
    ids=range(13),
)
def test_models_that_cannot_be_run_are_refused(
    break_it: Callable[[Path], Any], words: str, copy: Path, options: Callable[..., TextOptions]
) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    break_it(copy)
    with pytest.raises(QconvertError, match=words) as refusal:
        calibrate_text(options(model=copy))
    assert isinstance(refusal.value, InputError)
    assert "\n" not in str(refusal.value)
    assert not options().output.exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"seqlen": 1}, UsageError, "--seqlen"),
        ({"nsamples": 0}, UsageError, "--nsamples"),
        ({"seed": -1}, UsageError, "--seed"),
        ({"nsamples": 10**9}, InputError, "too short"),
        ({"texts": (MODEL / "model.safetensors",)}, InputError, "not UTF-8"),
        ({"texts": (MODEL / "absent.txt",)}, InputError, "no such file"),
        ({"model": MODEL / "model.safetensors"}, InputError, "takes its directory"),
        ({"model": MODEL / "absent"}, InputError, "no such file"),
        ({"settings": ObserverSettings("mean")}, UsageError, "unknown observer"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_options_that_cannot_be_met_are_refused(
    change: dict[str, Any],
    error: type[Exception],
    words: str,
    options: Callable[..., TextOptions],
) -> None:
    with pytest.raises(error, match=words):
        calibrate_text(options(**change))
    assert not options().output.exists()


def test_a_text_shorter_than_a_window_is_refused(
    options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("def f(): pass")
    with pytest.raises(InputError, match=r"too short, found \d+ tokens, wanted at least 32"):
        calibrate_text(options(texts=(tmp_path / "short.txt",), nsamples=None))


def test_an_activation_that_is_not_finite_names_layer_and_piece(
    copy: Path, options: Callable[..., TextOptions]
) -> None:
    tensors = load_file_any(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 3e38
    save(copy / "model.safetensors", tensors, format="pt")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.down_proj.*NaN or Inf.*piece 1 "):
        calibrate_text(options(model=copy))


def load_file_any(path: Path) -> dict[str, Any]:
    """All tensors as float32."""
    from safetensors.torch import load_file as load

    return {n: t.float().numpy() for n, t in load(path).items()}


def test_a_state_of_another_run_is_refused(options: Callable[..., TextOptions], copy: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate_text(options(save_seconds=0.0), Interrupt(3))
    for change, words in (
        ({"seqlen": 33}, "--seqlen"),
        ({"seed": 1}, "--seed"),
        ({"settings": ObserverSettings("mse")}, "observer"),
        ({"outputs": True}, "--outputs"),
        ({"texts": (MODEL / "config.json",), "nsamples": WINDOWS, "seqlen": 8}, "text"),
    ):
        with pytest.raises(InputError, match=f"another run: {words}"):
            calibrate_text(options(resume=True, **change))
    options().state.write_bytes(options().state.read_bytes()[:-8])
    with pytest.raises(InputError):
        calibrate_text(options(resume=True))


def test_a_calibration_of_another_model_is_refused(
    options: Callable[..., TextOptions], copy: Path, call: Call, tmp_path: Path
) -> None:
    tensors = load_file_any(copy / "model.safetensors")
    other = tmp_path / "c.safetensors"
    calibrate_text(options())
    save(copy / "model.safetensors", tensors, format="pt")  # the same numbers in another dtype
    done = call(
        *("quantize", copy, "--scheme", "q8_channel", "-o", tmp_path / "m.qblk"),
        *("--calibration", other),
    )
    assert done.code == 3
    assert "of another model" in done.err
    with pytest.raises(UnsupportedError, match="of another model"):
        merge_calibrations(MergeOptions(copy, (other, other), tmp_path / "merged"))


def test_calibrations_that_do_not_fit_together_are_refused(
    options: Callable[..., TextOptions], tmp_path: Path
) -> None:
    paths = {}
    for name, change in {
        "plain": {},
        "mse": {"settings": ObserverSettings("mse")},
        "ema": {"settings": ObserverSettings("ema")},
        "outputs": {"outputs": True},
    }.items():
        paths[name] = tmp_path / name
        calibrate_text(options(output=paths[name], nsamples=1, **change))
    for a, b, words in (
        ("plain", "mse", "different observers"),
        ("plain", "outputs", "differs between"),
        ("ema", "ema", "moving averages"),
    ):
        with pytest.raises(QconvertError, match=words):
            merge_calibrations(MergeOptions(MODEL, (paths[a], paths[b]), tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_the_command_runs_and_the_result_quantizes(run: Run, call: Call, tmp_path: Path) -> None:
    c, q = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    more = ("--record", tmp_path, "--imatrix", tmp_path / "im.gguf", "--json")
    told = run("calibrate", MODEL, "--text", TEXT, "--seqlen", 16, "--nsamples", 4, "-o", c, *more)
    assert told.code == 0, told.err
    assert (told.json["chunks"], told.json["tokens"], len(told.json["layers"])) == (4, 64, 29)
    assert call("quantize", MODEL, "--scheme", "q8_channel", "--calibration", c, "-o", q).code == 0
    samples = tmp_path / "activations.safetensors"
    checked = call("verify", q, "--against", MODEL, "--samples", samples, "--json")
    assert checked.code == 0
    assert checked.json["status"] == "pass"

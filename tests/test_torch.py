"""Quantized files as transformers models, and what `verify --text` says of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Call, Finished, Qblk, environment, execute
from tiny_models import CONFIGS, write_directory

import qconvert
from qconvert.cli.main import main
from qconvert.errors import FormatError, UnsupportedError, UsageError
from qconvert.running.integer_path import StaticInput

pytestmark = pytest.mark.filterwarnings("default")  # those of other packages are theirs

torch: Any = pytest.importorskip("torch", reason="install qconvert[hf]")
transformers: Any = pytest.importorskip("transformers", reason="install qconvert[hf]")

SAMPLES = Path(__file__).parents[1] / "samples"
LLAMA, TEXT = SAMPLES / "tiny-llama", SAMPLES / "eval.txt"


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory, done: Call) -> Path:
    """The sample with 8 bits a channel and static parameters of all layers but the head."""
    place = tmp_path_factory.mktemp("q8")
    calibration, path = place / "c.safetensors", place / "q8.qblk"
    done(
        "calibrate", LLAMA, "--activations", SAMPLES / "activations.safetensors", "-o", calibration
    )
    done("quantize", LLAMA, "--scheme", "q8_channel", "--calibration", calibration, "-o", path)
    return path


@pytest.fixture(scope="module")
def ids() -> Any:
    return torch.randint(0, 2045, (2, 12), generator=torch.Generator().manual_seed(3))


def dequantized(path: Path, config: Path = LLAMA) -> Any:
    """The float model with the values that the file stands for, by transformers alone."""
    described = transformers.AutoConfig.from_pretrained(config)
    with qconvert.load(path) as tensors:
        values = {
            n: torch.from_numpy(t.dequantize().astype(np.float32)) for n, t in tensors.items()
        }
    cls = getattr(transformers, described.architectures[0])
    return cls.from_pretrained(
        None, config=described, state_dict=values, dtype=torch.float32
    ).eval()


def logits(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_float_activations_give_the_model_of_the_dequantized_weights(q8: Path, ids: Any) -> None:
    import qconvert.torch

    model = qconvert.torch.load_model(q8, activations="none")
    found, wanted = logits(model, ids), logits(dequantized(q8), ids)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def exact(layer: Any, tensor: Any, x: Any) -> Any:
    """Section 7 for symmetric or asymmetric 8 bits a channel, sums in int64."""
    found = tensor.quantized()
    k = found.codes.astype(np.int64) - found.zero_point.astype(np.int64)
    rows = x.reshape(-1, k.shape[1]).numpy()
    f32 = np.float32
    if isinstance(layer.activations, StaticInput):
        note = tensor.activation
        s = np.full((len(rows), 1), note["scale"], f32)
        z, low = note["zero_point"], -128
    else:
        s, z, low = (np.abs(rows).max(axis=1, keepdims=True) / f32(127)).astype(f32), 0, -127
    a = np.clip(np.rint(rows / s + f32(z)), low, 127).astype(np.int64) - z
    return ((a @ k.T).astype(f32) * found.scale[:, 0]) * s


@pytest.mark.parametrize("activations", ["dynamic", "auto"])
def test_layers_run_in_integers_within_the_model(q8: Path, ids: Any, activations: str) -> None:
    """Inputs of each linear layer are caught; its outputs are section 7's, bit for bit."""
    import qconvert.torch

    model = qconvert.torch.load_model(q8, activations=activations)
    caught: dict[str, tuple[Any, Any, Any]] = {}

    def catch(name: str) -> Any:
        def keep(layer: Any, inputs: Any, output: Any) -> None:
            caught[name] = (layer, inputs[0].clone(), output.clone())

        return keep

    for name, module in model.named_modules():
        if isinstance(module, qconvert.torch.QuantizedLinear):
            module.register_forward_hook(catch(name))
    logits(model, ids)
    assert len(caught) == 29
    static = [n for n, (layer, *_) in caught.items() if isinstance(layer.activations, StaticInput)]
    assert len(static) == (28 if activations == "auto" else 0)
    with qconvert.load(q8) as tensors:
        for name, (layer, x, out) in caught.items():
            wanted = exact(layer, tensors[f"{name}.weight"], x)
            assert out.shape == (*x.shape[:-1], len(wanted[0]))
            assert out.numpy().tobytes() == wanted.tobytes()


def test_codes_stay_packed(tmp_path: Path, done: Call) -> None:
    import qconvert.torch

    path = tmp_path / "q4.qblk"
    done("quantize", LLAMA, "--scheme", "q4_block64", "-o", path)
    model = qconvert.torch.load_model(path, activations="dynamic")
    layers = [m for m in model.modules() if hasattr(m, "matrix")]
    floats = sum(p.numel() * 4 for p in model.parameters())
    assert len(layers) == 30
    assert sum(m.matrix.nbytes for m in layers) + floats < path.stat().st_size


def test_generation_goes_on_with_the_carried_tokenizer(q8: Path) -> None:
    import qconvert.torch

    model, tokenizer = qconvert.torch.load_model(q8), qconvert.torch.load_tokenizer(q8)
    inputs = tokenizer("If the optional argument", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == 2045
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    again = dequantized(q8).generate(**inputs, max_new_tokens=8, do_sample=False)
    assert out.tolist() == again.tolist()


def test_loading_leaves_the_settings_of_transformers_alone(q8: Path) -> None:
    import qconvert.torch

    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        qconvert.torch.load_model(q8)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_static_names_a_layer_without_parameters(q8: Path) -> None:
    import qconvert.torch

    with pytest.raises(UsageError, match=r"found none for layer 'lm_head'"):
        qconvert.torch.load_model(q8, activations="static")


# --- other architectures --------------------------------------------------------------------------


def checkpoint(place: Path, config: Any) -> Path:
    """A random model of an architecture of transformers, with the sample's tokenizer."""
    torch.manual_seed(5)
    model = getattr(transformers, config.architectures[0])(config)
    for parameter in model.parameters():  # biases and norms that a test can see
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, place)
    return place


SIZES = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


def tied() -> Any:
    return transformers.LlamaConfig(
        **SIZES, **LAYERS, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]
    )


def biased() -> Any:
    return transformers.Qwen2Config(
        **SIZES,
        **LAYERS,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )


def transposed() -> Any:
    """GPT-2 keeps its matrices as (in, out), in a layer of its own."""
    return transformers.GPT2Config(
        vocab_size=2048,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=64,
        architectures=["GPT2LMHeadModel"],
    )


def encoder() -> Any:
    return transformers.BertConfig(**SIZES, **LAYERS, architectures=["BertModel"])


FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}


def renamed(name: str) -> Any:
    """Models whose tensors transformers 5 renames, joins or takes apart while it loads them."""
    wide = SIZES | LAYERS
    return {
        "Mixtral": lambda: transformers.MixtralConfig(
            **wide, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
        ),
        "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(
            **wide, **FEW, num_key_value_heads=1, num_experts=4, head_dim=32
        ),
        "DeepseekV3": lambda: transformers.DeepseekV3Config(
            **wide, **FEW, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=16, n_shared_experts=1,
        ),
        "Qwen3Next": lambda: transformers.Qwen3NextConfig(
            **wide, **FEW, num_key_value_heads=1, num_experts=4, head_dim=32,
            shared_expert_intermediate_size=48, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        "GPTNeoX": lambda: transformers.GPTNeoXConfig(**wide),
        "Mamba": lambda: transformers.MambaConfig(
            vocab_size=2048, hidden_size=64, num_hidden_layers=2
        ),
        "NomicBert": lambda: transformers.NomicBertConfig(**wide),
    }[name]()  # fmt: skip


def answers(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        out = model(input_ids=ids)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize(
    ("name", "joined"),
    [
        ("Mixtral", 24), ("Qwen3Moe", 24), ("DeepseekV3", 12), ("Qwen3Next", 24), ("GPTNeoX", 0),
        ("Mamba", 0), ("NomicBert", 2),
    ],
)  # fmt: skip
def test_tensors_that_transformers_renames_or_joins_are_loaded(
    name: str, joined: int, ids: Any, tmp_path: Path, done: Call
) -> None:
    """As transformers itself loads the same values; ``joined`` tensors become part of others."""
    import qconvert.torch
    from qconvert.running.quantized_model import open_quantized

    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = renamed(name)
    cls = f"{name}Model" if name == "NomicBert" else f"{name}ForCausalLM"
    config.architectures = [cls]
    place, path = checkpoint(tmp_path / "m", config), tmp_path / "m.qblk"
    done("quantize", place, "--scheme", "q8_block32", "-o", path)
    with qconvert.load(path) as tensors:
        values = {
            n: torch.from_numpy(t.dequantize().astype(np.float32)) for n, t in tensors.items()
        }
    wanted = getattr(transformers, cls).from_pretrained(
        None, config=config, state_dict=values, dtype=torch.float32
    )
    if getattr(wanted.config, "_experts_implementation", None):
        wanted.set_experts_implementation("eager")
    model = qconvert.torch.load_model(path, activations="none")
    one, other = answers(model, ids), answers(wanted.eval(), ids)
    assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    found = open_quantized(path, "dynamic")
    assert len(found.dequantized) == joined
    assert found.dynamic
    lossy = answers(found.checkpoint.model, ids)
    assert torch.isfinite(lossy).all()


@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 4), (2, 6, 4), (1, 5), (5, 1), ()])
def test_a_stand_in_is_told_from_any_rearrangement_of_itself(shape: tuple[int, ...]) -> None:
    from qconvert.running.state_dict import StandIns

    stand_ins = StandIns()
    one, other = (stand_ins.make(n, shape) for n in ("one", "other"))
    assert tuple(one.shape) == shape
    for tensor, name in ((one, "one"), (other, "other")):
        assert stand_ins.name_of(torch.nn.Parameter(tensor[...], requires_grad=False)) == name
        assert stand_ins.name_of(tensor.to("cpu", torch.float32)) == name
    assert not torch.equal(one, other)
    changed = [one.clone(), one + 0, torch.stack([one]), torch.stack([one])[0]]
    if one.dim():
        changed += [torch.cat([one, other]), one.flip(0)]
        changed += [part for part in one.chunk(2) if part.shape != one.shape]
        if one.shape[0] in (4, 6):
            heads = one.reshape(2, -1, *one.shape[1:])
            changed.append(heads.transpose(0, 1).reshape(one.shape))
    if one.dim() > 1 and 1 not in one.shape:
        changed.append(one.transpose(-1, -2))
        changed.append(one.transpose(-1, -2).contiguous())
        if one.shape[-1] % 2 == 0:
            pairs = one.reshape(*one.shape[:-1], -1, 2)
            changed.append(pairs.transpose(-1, -2).reshape(one.shape))
    for k, tensor in enumerate(changed):
        assert stand_ins.name_of(tensor) is None, k


def test_a_trained_head_runs_though_the_configuration_ties_it(
    short: Path, tmp_path: Path, done: Call, verify: Verify
) -> None:
    """In .qblk, in GGUF under llama.cpp's names and raw: perplexity is that of the source."""
    place = checkpoint(tmp_path / "m", biased())
    fields = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    for name, more in (("m.qblk", ()), ("m.gguf", ()), ("raw.gguf", ("--raw",))):
        path = tmp_path / name
        scheme = "q8_channel" if name == "m.qblk" else "q8_0"
        done("quantize", place, "--scheme", scheme, *more, "-o", path)
        options = ("--text", short, "--seqlen", 64, "--nsamples", 2, "--json")
        found = verify(path, "--against", place, *options)
        assert found.code == 0, found
        assert found.json["token_quality"]["kl_mean"] < 0.01
        (bar,) = (c for c in found.json["checks"] if c["id"] == "same-model")
        assert bar["status"] == "pass"
        assert bar["worst"] == found.json["token_quality"]["kl_mean"] < bar["limit"]


def test_a_file_that_says_nothing_of_its_source_fails_without_any_limit(
    short: Path, tmp_path: Path, done: Call, verify: Verify
) -> None:
    """Another model of the same configuration and shapes: every other check holds."""
    for k, name in enumerate(("one", "other")):
        torch.manual_seed(k)
        place = tmp_path / name
        model = transformers.LlamaForCausalLM(tied())
        model.save_pretrained(place)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(LLAMA / file, place)
    done("quantize", tmp_path / "one", "--scheme", "q8_channel", "-o", tmp_path / "m.qblk")
    options = ("--text", short, "--seqlen", 64, "--nsamples", 2)
    right = verify(tmp_path / "m.qblk", "--against", tmp_path / "one", *options)
    assert right.code == 0, right
    found = verify(tmp_path / "m.qblk", "--against", tmp_path / "other", *options, "--json")
    assert found.code == 1
    states = {c["id"]: c["status"] for c in found.json["checks"]}
    assert states["same-model"] == "fail"
    text = verify(tmp_path / "m.qblk", "--against", tmp_path / "other", *options).out
    assert "FAIL  same-model" in text
    encoders = [tmp_path / f"e{k}" for k in (0, 1)]
    for k, place in enumerate(encoders):
        torch.manual_seed(k)
        transformers.BertModel(encoder()).save_pretrained(place)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(LLAMA / file, place)
    done("quantize", encoders[0], "--scheme", "q8_channel", "-o", tmp_path / "e.qblk")
    for place, code in zip(encoders, (0, 1), strict=True):
        found = verify(tmp_path / "e.qblk", "--against", place, *options[:4], "--json")
        assert found.code == code, found
        (bar,) = (c for c in found.json["checks"] if c["id"] == "same-model")
        assert bar["status"] == ("fail" if code else "pass")


@pytest.mark.parametrize("config", [tied, biased, transposed])
def test_models_of_other_shapes_are_those_of_the_dequantized_weights(
    config: Any, ids: Any, tmp_path: Path, done: Call
) -> None:
    import qconvert.torch

    place, path = checkpoint(tmp_path / "m", config()), tmp_path / "m.qblk"
    done("quantize", place, "--scheme", "q6_block32", "-o", path)
    wanted = logits(dequantized(path, place), ids)
    size = float(wanted.abs().max())
    found = logits(qconvert.torch.load_model(path, activations="none"), ids)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * size)
    dynamic = logits(qconvert.torch.load_model(path, activations="dynamic"), ids)
    assert torch.allclose(dynamic, wanted, rtol=0, atol=0.1 * size)


def test_plain_weights_are_not_quantized_while_they_are_loaded(
    short: Path, tmp_path: Path, done: Call, verify: Verify
) -> None:
    """bitsandbytes does that, and stays in the configuration of models that were saved plain."""
    place, path = checkpoint(tmp_path / "m", tied()), tmp_path / "m.qblk"
    fields = json.loads((place / "config.json").read_text())
    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (place / "config.json").write_text(json.dumps(fields | {"quantization_config": entry}))
    done("quantize", place, "--scheme", "q8_channel", "-o", path)
    options = ("--text", short, "--seqlen", 64, "--nsamples", 2)
    done("calibrate", place, *options, "-o", tmp_path / "m.cal")
    found = verify(path, "--against", place, *options, "--json")
    assert found.json["token_quality"]["kl_mean"] < 0.01


def test_a_file_made_of_codes_is_not_loaded(tmp_path: Path, done: Call) -> None:
    """Written when nothing looked at its configuration."""
    import qconvert.torch

    place, path = checkpoint(tmp_path / "m", tied()), tmp_path / "m.qblk"
    done("quantize", place, "--scheme", "q8_channel", "-o", path)
    file = Qblk(path)
    fields = json.loads(file.data["config.json", "data"])
    fields["quantization_config"] = {"quant_method": "fp8"}
    file.data["config.json", "data"] = bytearray(json.dumps(fields).encode())
    file.write(path)
    with pytest.raises(UnsupportedError) as refusal:
        qconvert.torch.load_model(path)
    assert refusal.value.code == "ARCH-QUANTIZED"


def test_templates_that_a_file_carries_are_found_again(tmp_path: Path, done: Call) -> None:
    """In a folder of their own: names in a container have no slashes."""
    import qconvert.torch

    place, path = checkpoint(tmp_path / "m", tied()), tmp_path / "m.qblk"
    (place / "chat_template.jinja").write_text("A")
    (place / "additional_chat_templates").mkdir()
    (place / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    done("quantize", place, "--scheme", "q8_channel", "-o", path)
    tokenizer = qconvert.torch.load_tokenizer(path)
    assert tokenizer.chat_template == {"default": "A", "tool_use": "T"}


def test_tied_layers_share_their_codes(tmp_path: Path, done: Call) -> None:
    import qconvert.torch

    place, path = checkpoint(tmp_path / "m", tied()), tmp_path / "m.qblk"
    done("quantize", place, "--scheme", "q8_channel", "-o", path)
    model = qconvert.torch.load_model(path, activations="dynamic")
    assert model.lm_head.matrix is model.model.embed_tokens.matrix


# --- verify --text --------------------------------------------------------------------------------


Verify = Callable[..., Finished]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """The command in this process: another one would import torch anew, for seconds."""

    def command(*arguments: Any) -> Finished:
        capsys.readouterr()
        code = main(["verify", *map(str, arguments)])
        return Finished(code, *capsys.readouterr())

    return command


def by_torch(source: Any, other: Any, windows: int, seqlen: int) -> dict[str, float]:
    """Perplexities and divergence of the first windows, by torch and transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(LLAMA)
    tokens = tokenizer(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    functional, nll, kl, same = torch.nn.functional, [[], []], [], []
    for i in range(windows):
        w = torch.tensor(tokens[i * seqlen : (i + 1) * seqlen])
        x = torch.cat([torch.tensor([2045]), w[:-1]])[None]
        one, two = (logits(m, x)[0].double() for m in (source, other))
        for k, each in enumerate((one, two)):
            nll[k].append(functional.cross_entropy(each, w, reduction="none"))
        p, q = functional.log_softmax(one, -1), functional.log_softmax(two, -1)
        kl.append(functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same.append((one.argmax(-1) == two.argmax(-1)).double())
    return {
        "source_perplexity": float(torch.cat(nll[0]).mean().exp()),
        "perplexity": float(torch.cat(nll[1]).mean().exp()),
        "kl_mean": float(torch.cat(kl).mean()),
        "kl_max": float(torch.cat(kl).max()),
        "kl_p99": float(torch.cat(kl).quantile(0.99)),
        "same_top": float(torch.cat(same).mean()),
    }


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some windows of the sample text."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(TEXT.read_text()[:1500])
    return path


def test_verify_reports_what_torch_computes(q8: Path, short: Path, verify: Verify) -> None:
    limits = ("--max-kl", "0.001", "--max-ppl-increase", "0.5%")
    options = ("--against", LLAMA, "--text", short, "--seqlen", 64, "--json")
    found = verify(q8, *options, *limits)
    assert found.code == 0, found.out
    figures = found.json["token_quality"]
    assert figures["tokens"] == 64 * figures["windows"]
    source = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    wanted = by_torch(source, dequantized(q8), figures["windows"], 64)
    # float32 logits of batches and of single windows differ in their last bits
    for name, value in wanted.items():
        assert figures[name] == pytest.approx(value, rel=2e-3), name
    assert figures["source_perplexity"] == pytest.approx(wanted["source_perplexity"], rel=1e-5)
    increase = wanted["perplexity"] / wanted["source_perplexity"] - 1
    assert figures["perplexity_increase"] == pytest.approx(increase, abs=1e-6)
    ids = [c["id"] for c in found.json["checks"] if c["status"] == "pass"]
    assert {"finite-quality", "max-kl", "max-ppl-increase"} <= set(ids)


def test_a_missed_limit_fails_with_integers(q8: Path, short: Path, verify: Verify) -> None:
    options = ("--text", short, "--seqlen", 64, "--nsamples", 4, "--activations", "dynamic")
    found = verify(q8, "--against", LLAMA, *options, "--max-kl", "1e-9")
    assert found.code == 1, found
    assert "FAIL  max-kl" in found.out
    assert "29 layers in integers with dynamic activations" in found.out
    assert "\nFAIL  intact, quality as expected of 8.1 bits" in found.out
    assert "; limits missed: max-kl; perplexity " in found.out


def test_an_encoder_is_held_by_its_embeddings(tmp_path: Path, done: Call, verify: Verify) -> None:
    place, path = checkpoint(tmp_path / "m", encoder()), tmp_path / "m.qblk"
    done("quantize", place, "--scheme", "q4_block32", "-o", path)
    text = tmp_path / "lines.txt"
    text.write_text("one line\n\nand another, longer one\nthe third\n")
    options = ("--against", place, "--text", text, "--seqlen", 32, "--json")
    found = verify(path, *options, "--min-cosine", "0.5")
    assert found.code == 0, found
    figures = found.json["embedding_quality"]
    assert figures["sentences"] == 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    models = [transformers.BertModel.from_pretrained(place), dequantized(path, place)]
    cosines = []
    for line in text.read_text().split("\n"):
        if line:
            x = tokenizer(line, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                a, b = (m.eval()(input_ids=x).last_hidden_state[0].mean(0) for m in models)
            cosines.append(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    assert figures["cosine_mean"] == pytest.approx(sum(cosines) / 3, abs=1e-5)
    assert figures["cosine_min"] == pytest.approx(min(cosines), abs=1e-5)
    assert verify(path, *options, "--min-cosine", "0.999999").code == 1


def test_a_gguf_file_with_the_names_of_the_source_is_compared_too(
    short: Path, tmp_path: Path, done: Call, verify: Verify
) -> None:
    path = tmp_path / "m.gguf"
    done("quantize", LLAMA, "--scheme", "q8_0", "--raw", "-o", path)
    options = ("--text", short, "--seqlen", 64, "--nsamples", 3, "--max-kl", "0.001")
    found = verify(path, "--against", LLAMA, *options)
    assert found.code == 0, found
    assert "30 tensors dequantized" in found.out
    # No silent fallback to float: llama.cpp's types have no integer layer here.
    found = verify(path, "--against", LLAMA, *options, "--activations", "dynamic")
    assert found.code == 3
    assert "no integer path for ggml's types" in found.err


# --- GGUF with llama.cpp's names ------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_what_llama_cpp_gets_computes_what_the_source_does(
    name: str, tmp_path: Path, done: Call
) -> None:
    """In transformers' modules, whose names and stacks are others than the checkpoint's."""
    import qconvert.torch

    place = write_directory(tmp_path / "tiny", name)
    done("quantize", place, "--scheme", "f32", "-o", tmp_path / "m.gguf")
    found = qconvert.torch.load_model(tmp_path / "m.gguf", "none", directory=place)
    cls = getattr(transformers, CONFIGS[name]["architectures"][0])
    wanted = cls.from_pretrained(place, dtype=torch.float32).eval()
    if "experts" in "".join(n for n, _ in wanted.named_parameters()):
        wanted.set_experts_implementation("eager")
    x = torch.arange(5, 45)[None]
    with torch.inference_mode():
        one, other = (
            m(input_ids=x).last_hidden_state if name == "bert" else m(input_ids=x).logits
            for m in (found, wanted)
        )
    assert torch.equal(one, other)


def test_a_file_for_llama_cpp_is_compared_as_its_decoded_values_are(
    short: Path, tmp_path: Path, done: Call, verify: Verify
) -> None:
    """The same types with the names of the source and with llama.cpp's: the same figures."""
    options = ("--against", LLAMA, "--text", short, "--seqlen", 64, "--nsamples", 3, "--json")
    figures = []
    for more in ((), ("--raw",)):
        path = tmp_path / f"m{len(more)}.gguf"
        done("quantize", LLAMA, "--scheme", "q8_0", *more, "-o", path)
        found = verify(path, *options)
        assert found.code == 0, found
        figures.append(found.json["token_quality"])
    assert figures[0]["kl_mean"] == figures[1]["kl_mean"] > 1e-5
    assert figures[0]["perplexity"] == figures[1]["perplexity"]
    assert figures[0]["execution"] == figures[1]["execution"]
    assert verify(path, *options, "--max-kl", "1e-6").code == 1


def test_an_encoder_for_llama_cpp_is_held_by_its_embeddings(
    tmp_path: Path, done: Call, verify: Verify
) -> None:
    place, text = write_directory(tmp_path / "tiny", "bert"), tmp_path / "lines.txt"
    text.write_text("the quick fox\nover the test\n")
    cosines = []
    for scheme in ("f32", "q8_0"):
        done("quantize", place, "--scheme", scheme, "-o", tmp_path / f"{scheme}.gguf")
        found = verify(tmp_path / f"{scheme}.gguf", "--against", place, "--text", text, "--json")
        assert found.code == 0, found
        cosines.append(found.json["embedding_quality"]["cosine_min"])
    assert cosines[0] == pytest.approx(1, abs=1e-12)
    assert 0.99 < cosines[1] < 0.99999


@pytest.mark.parametrize("activations", ["dynamic", "dynamic_asym", "static", "auto"])
def test_integer_activations_of_ggml_types_are_refused(
    activations: str, tmp_path: Path, done: Call
) -> None:
    import qconvert.torch

    done("quantize", LLAMA, "--scheme", "q8_0", "-o", tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match=r"no integer path for ggml's types.*wanted none"):
        qconvert.torch.load_model(tmp_path / "m.gguf", activations, directory=LLAMA)


# --- refusals -------------------------------------------------------------------------------------


def changed(place: Path, **fields: Any) -> Path:
    """The sample with another config."""
    shutil.copytree(LLAMA, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **fields}))
    return place


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"intermediate_size": 640}, r"mlp\.\w+_proj\.weight.*shape \[.*704.*wanted \[.*640"),
        ({"num_hidden_layers": 5}, r"model\.layers\.4\..*9 tensors missing"),
        ({"num_hidden_layers": 3}, r"model\.layers\.3\..*9 tensors that no layer takes"),
    ],
)
def test_a_file_of_another_model_is_refused(
    fields: dict[str, Any], found: str, tmp_path: Path, done: Call
) -> None:
    import qconvert.torch

    path = tmp_path / "m.qblk"
    done("quantize", changed(tmp_path / "m", **fields), "--scheme", "q8_channel", "-o", path)
    with pytest.raises(UnsupportedError, match=found):
        qconvert.torch.load_model(path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, done: Call) -> None:
    import qconvert.torch

    mark = tmp_path / "ran"
    own = {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"}
    place, path = changed(tmp_path / "m", auto_map=own), tmp_path / "m.qblk"
    (place / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    done("quantize", place, "--scheme", "q8_channel", "-o", path)
    for load in (qconvert.torch.load_model, qconvert.torch.load_tokenizer):
        with pytest.raises(UnsupportedError, match="needs code of its own"):
            load(path)
    assert not mark.exists()


def test_a_damaged_payload_is_refused(q8: Path, tmp_path: Path) -> None:
    import qconvert.torch

    data = bytearray(q8.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.qblk").write_bytes(data)
    with pytest.raises(FormatError, match="QBLK-"):
        qconvert.torch.load_model(tmp_path / "m.qblk")


def test_a_file_without_config_says_so(small_qblk: Path) -> None:
    import qconvert.torch

    with pytest.raises(UnsupportedError, match="carries no config and tokenizer"):
        qconvert.torch.load_model(small_qblk)


def test_a_source_of_other_tensors_is_not_run(q8: Path, tmp_path: Path, verify: Verify) -> None:
    other = checkpoint(tmp_path / "m", tied())
    found = verify(q8, "--against", other, "--text", TEXT, "--json")
    assert found.code == 1
    states = {c["id"]: c["status"] for c in found.json["checks"]}
    assert states["finite-quality"] == "skip"
    assert states["same-tensors"] == "fail"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--max-kl", "1"), 2, "--max-kl goes with --text"),
        (("--text", TEXT), 2, "--text needs the source"),
        (("--text", TEXT, "--against", LLAMA, "--seqlen", 600), 2, "at most 512"),
        (("--text", TEXT, "--against", LLAMA, "--nsamples", 9999), 3, "wanted 9,999"),
        (("--text", TEXT, "--against", LLAMA, "--min-cosine", 1), 2, "for encoders"),
        (("--text", TEXT, "--against", LLAMA, "--max-ppl-increase", "x%"), 2, "such as 1%"),
        (("--text", TEXT, "--against", LLAMA, "--activations", "wild"), 2, "none"),
    ],
)
def test_what_cannot_be_is_refused(
    options: tuple[Any, ...], code: int, said: str, q8: Path, verify: Verify
) -> None:
    found = verify(q8, *options)
    assert found.code == code, found
    assert said in found.err


WITHOUT = "import sys; sys.modules['torch'] = None; "


def test_without_the_extra_the_command_to_install_it_is_given(q8: Path) -> None:
    program = WITHOUT + "from qconvert.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "verify", q8, "--against", LLAMA, "--text", TEXT]
    found = execute(command)
    assert found.code == 4
    assert "pip install torch transformers" in found.err


def test_without_the_extra_the_import_gives_the_command() -> None:
    told = subprocess.run(
        [sys.executable, "-c", WITHOUT + "import qconvert.torch"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert told.returncode == 1
    assert "ImportError: qconvert.torch needs torch and transformers" in told.stderr
    assert "pip install torch transformers" in told.stderr

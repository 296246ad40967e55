"""Every family converts, and comes back: the half of `make_families.py` that needs no llama.cpp.

Tensors are those that transformers saved (their shapes lie in config_table.json), with values that
follow from their names.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from config_cases import TOLERANCE, Directories, unfolded
from conftest import ROOT, Call
from family_document import PAGE, with_table
from family_models import ENCODERS, FURTHER, MORE, NARROW, STACKS, WRAPPED, with_further
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from qconvert.architectures import restored
from qconvert.architectures.mapped import Order, described, inverted, strided
from qconvert.architectures.mapping import map_tensors
from qconvert.architectures.places import Place, layer_places
from qconvert.architectures.source import read_config
from qconvert.architectures.tying import Head
from qconvert.errors import FormatError
from qconvert.files import open_model
from qconvert.model import Model, TensorInfo

TABLE: dict[str, Any] = json.loads((ROOT / "tests" / "config_table.json").read_text())
FIGURES: dict[str, Any] = json.loads((ROOT / "tests" / "families.json").read_text())
# Values that GGUF changes so that they come back rounded.
CHANGED = ("A_log", "norm")
MULTIPLIED = ("falcon_h1",)
PADDED = ("xlm-roberta", "roberta", "camembert")  # positions are counted from the padding's on


def whole(model: Model, tensor: TensorInfo) -> np.ndarray:
    return model.values(tensor, 0, tensor.size).astype(np.float32)


@pytest.mark.parametrize("name", NARROW)
def test_a_family_converts_and_comes_back(name: str, tmp_path: Path, call: Call) -> None:
    shapes = unfolded(TABLE["tensors"][TABLE["bases"][name]["tensors"]])
    directory = Directories(tmp_path).made(name, NARROW[name], shapes)
    path = tmp_path / "m.gguf"
    assert call("quantize", directory, "--scheme", "f32", "-o", path).code == 0
    # every value of the file is what the table of the family says it is
    assert call("verify", path, "--against", directory).code == 0
    source = open_model(directory)
    config = directory / "config.json"
    found = restored(open_model(path), json.loads(config.read_text()), config, shapes)
    left_out = {d.name for d in found.dropped}
    poolers = {"pooler.dense.weight", "pooler.dense.bias"} if name in ENCODERS else set()
    assert {t.name for t in found.model.tensors} == shapes.keys() - left_out
    # of a language model nothing is left out
    inside = ("language_model", "lm_head")
    assert not [
        n for n in left_out - poolers if "text_config" not in NARROW[name] or n.startswith(inside)
    ]
    for tensor in found.model.tensors:
        original = next(t for t in source.tensors if t.name == tensor.name)
        values, wanted = whole(found.model, tensor), whole(source, original)
        if name in PADDED and "position_embeddings" in tensor.name:
            unused = 2 * 64  # up to the padding's, whose id is 1
            assert not values[:unused].any()
            values, wanted = values[unused:], wanted[unused:]
        if name in MULTIPLIED or any(part in tensor.name for part in CHANGED):
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
        else:
            assert values.tobytes() == wanted.tobytes(), tensor.name
    found.model.close()
    source.close()


def test_one_expert_of_jamba_is_a_plain_layer(tmp_path: Path, call: Call) -> None:
    """Of ``num_experts_per_tok`` its default is 2, which nothing then reads."""
    shapes = unfolded(TABLE["tensors"][TABLE["bases"]["jamba"]["tensors"]])
    inside, first = "feed_forward.", "model.layers.0.feed_forward."
    plain = {n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)}
    found = {n: s for n, s in shapes.items() if inside not in n}
    found |= {f"model.layers.{i}.{inside}{n}": s for i in range(4) for n, s in plain.items()}
    fields = {n: v for n, v in NARROW["jamba"].items() if n != "num_experts_per_tok"}
    directory = Directories(tmp_path).made("jamba", fields | {"num_experts": 1}, found)
    path = tmp_path / "m.gguf"
    ran = call("quantize", directory, "--scheme", "f32", "-o", path)
    assert ran.code == 0, ran.err
    assert call("verify", path, "--against", directory).code == 0
    reader = GGUFReader(path)
    assert not [k for k in reader.fields if "expert" in k]
    assert {f"blk.{i}.ffn_gate.weight" for i in range(4)} <= {t.name for t in reader.tensors}


@pytest.mark.parametrize(
    ("name", "field"),
    [("jamba", "mamba_d_conv"), ("mamba", "conv_kernel"), ("bamba", "mamba_d_conv")],
)
def test_a_convolution_of_more_steps_than_there_are_is_refused(name: str, field: str) -> None:
    for steps, good in ((64, True), (65, False)):
        family, config = read_config(NARROW[name] | {field: steps}, Path("config.json"))
        if good:
            assert family.sizes(config).named["ssm_kernel"] == steps
        else:
            with pytest.raises(FormatError, match=field):
                family.sizes(config)


def test_a_part_of_a_reordered_tensor_is_that_part_of_the_whole(tmp_path: Path, call: Call) -> None:
    """gpt-oss: matrices are turned round and every second column taken."""
    shapes = unfolded(TABLE["tensors"][TABLE["bases"]["gpt_oss"]["tensors"]])
    directory = Directories(tmp_path).made("gpt_oss", NARROW["gpt_oss"], shapes)
    path = tmp_path / "m.gguf"
    assert call("quantize", directory, "--scheme", "f32", "-o", path).code == 0
    source, file = open_model(directory), open_model(path)
    fused = next(t for t in source.tensors if t.name.endswith("0.mlp.experts.gate_up_proj"))
    stored = whole(source, fused).reshape(fused.shape)  # experts, width, 2 x inner
    for part, name in enumerate(("gate", "up")):
        tensor = next(t for t in file.tensors if t.name == f"blk.0.ffn_{name}_exps.weight")
        made = whole(file, tensor).reshape(tensor.shape)
        np.testing.assert_array_equal(made, stored[:, :, part::2].transpose(0, 2, 1))
    source.close()
    file.close()


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def packed_experts(place: Path) -> dict[str, np.ndarray]:
    """gpt-oss with experts in MXFP4, as it is published: the codes of each output along its inputs.

    Returns:
        What the experts are, (experts, outputs, inputs), by name.
    """
    draw = np.random.default_rng(7)
    tensors, values = load_file(place / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = draw.integers(0, 16, (experts, outputs, inputs // 32, 32), np.uint8)
        codes[codes == 8] = 0  # -0, of which ggml's numbers have none that differs
        scales = draw.integers(118, 124, (experts, outputs, inputs // 32), np.uint8)
        tensors[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = scales
        scaled = E2M1[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
        values[name] = scaled.reshape(experts, outputs, inputs)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (place / "config.json").write_text(json.dumps(config))
    return values


def test_codes_of_experts_move_into_gguf(tmp_path: Path, call: Call) -> None:
    """gpt-oss: gates and what they multiply alternate in rows of codes, which stay as they are."""
    shapes = unfolded(TABLE["tensors"][TABLE["bases"]["gpt_oss"]["tensors"]])
    directory = Directories(tmp_path).made("gpt_oss", NARROW["gpt_oss"], shapes)
    values, path = packed_experts(directory), tmp_path / "m.gguf"
    result = call("quantize", directory, "--scheme", "keep", "--exact", "-o", path)
    assert result.code == 0, result
    assert "6 quantized tensors moved exactly, 0 decoded" in result.out
    found = {t.name: t for t in GGUFReader(path).tensors}
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        both, down = values[f"{experts}.gate_up_proj"], values[f"{experts}.down_proj"]
        for name, wanted in (("gate", both[:, ::2]), ("up", both[:, 1::2]), ("down", down)):
            tensor = found[f"blk.{block}.ffn_{name}_exps.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type), wanted)
    assert call("verify", path, "--against", directory, "--exact").code == 0


def test_experts_of_either_form_give_the_same_file(tmp_path: Path, call: Call) -> None:
    """Qwen3-VL: published checkpoints have them turned round."""
    name = "qwen3_vl_moe"
    shapes = unfolded(TABLE["tensors"][TABLE["bases"][name]["tensors"]])
    directory = Directories(tmp_path).made(name, NARROW[name], shapes)
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    place = directory / "model.safetensors"
    for path in files:
        assert call("quantize", directory, "--scheme", "q4_0", "-o", path).code == 0
        assert call("verify", path, "--against", directory).code == 0
        tensors = {
            n: np.ascontiguousarray(v.transpose(0, 2, 1)) if ".experts." in n else v
            for n, v in load_file(place).items()
        }
        save_file(tensors, place, metadata={"format": "pt"})
    both = [{t.name: t.data.tobytes() for t in GGUFReader(path).tensors} for path in files]
    assert both[0] == both[1]


def test_places_at_even_distances_are_found_there_and_back() -> None:
    """An array of numpy's says where values of a view lie."""
    array = np.arange(3 * 4 * 10).reshape(3, 4, 10)
    for view, order in (
        (array.transpose(0, 2, 1), strided((3, 10, 4), (40, 1, 10))),
        (array[:, :, 1::2].transpose(0, 2, 1), strided((3, 5, 4), (40, 2, 10), 1)),
        (array[:, 1:3], strided((3, 2, 10), (40, 10, 1), 10)),
    ):
        _check(order, view)


def _check(order: Order, view: np.ndarray) -> None:
    places = np.arange(view.size)
    np.testing.assert_array_equal(order.there(places), view.ravel())
    back = order.back(np.arange(120))
    np.testing.assert_array_equal(back[view.ravel()], places)
    assert (np.delete(back, view.ravel()) == -1).all()


def test_figures_are_there_for_every_model_and_none_is_a_fault() -> None:
    models = NARROW | MORE
    assert FIGURES.keys() == models.keys()
    for name, found in FIGURES.items():
        limit = TOLERANCE.get(models[name]["model_type"], 1e-3)
        assert found["difference"] <= limit, name
        assert found["otherwise"] == {}, name


def test_the_page_has_these_figures() -> None:
    page = PAGE.read_text()
    assert with_table(page, FIGURES) == page


def predicting(name: str, home: Path) -> Path:
    """A checkpoint with a layer that predicts a further token."""
    shapes = unfolded(TABLE["tensors"][TABLE["bases"][name]["tensors"]])
    more = with_further(f"{name}, further", NARROW[name], shapes)
    return Directories(home).made(name, NARROW[name], more)


@pytest.mark.parametrize("name", FURTHER)
def test_a_layer_that_predicts_a_further_token_is_kept(
    name: str, tmp_path: Path, call: Call
) -> None:
    """Under the names that llama.cpp's own converter gives it."""
    directory, path = predicting(name, tmp_path), tmp_path / "m.gguf"
    ran = call("quantize", directory, "--scheme", "f32", "-o", path)
    assert ran.code == 0
    assert "left out" not in ran.out
    assert call("verify", path, "--against", directory).code == 0
    blocks = NARROW[name]["num_hidden_layers"]
    reader = GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{arch}.block_count"].contents() == blocks + 1
    assert reader.fields[f"{arch}.nextn_predict_layers"].contents() == 1
    found = {t.name: t.data for t in reader.tensors}
    source = load_file(directory / "model.safetensors")
    own = FURTHER[name][1]
    places = {"norm": "shared_head_norm", "head": "shared_head_head", "embedding": "embed_tokens"}
    for part, place in own.items():
        wanted = source[f"{place}.weight".format(next=blocks)].astype(np.float32)
        # transformers' Qwen adds one to the weights of norms
        added = name.startswith("qwen") and part in ("enorm", "hnorm", "norm")
        stored = found[f"blk.{blocks}.nextn.{places.get(part, part)}.weight"]
        np.testing.assert_array_equal(stored.reshape(wanted.shape), wanted + added)
    assert f"blk.{blocks}.attn_output.weight" in found
    assert f"blk.{blocks + 1}." not in " ".join(found)


def test_a_layer_that_predicts_a_further_token_is_left_out_on_request(
    tmp_path: Path, call: Call
) -> None:
    directory, path = predicting("glm4_moe", tmp_path), tmp_path / "m.gguf"
    ran = call("quantize", directory, "--scheme", "f32", "--no-mtp", "-o", path, "--json")
    assert ran.code == 0
    said = " ".join(json.loads(ran.out)["notes"])
    assert "'model.layers.2.eh_proj.weight' is left out" in said
    assert "--no-mtp leaves it out" in said
    assert call("verify", path, "--against", directory).code == 0
    reader = GGUFReader(path)
    assert reader.fields["glm4moe.block_count"].contents() == 2
    assert "glm4moe.nextn_predict_layers" not in reader.fields
    assert not [t.name for t in reader.tensors if t.name.startswith("blk.2.")]
    again = call("quantize", path, "--scheme", "f32", "--no-mtp", "-o", tmp_path / "n.gguf")
    assert again.code == 2
    assert "--no-mtp goes with a model directory" in again.err


def test_llama_cpp_has_a_place_for_one_such_layer(tmp_path: Path, call: Call) -> None:
    directory = predicting("glm4_moe", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {n.replace(".2.", ".3."): v.copy() for n, v in tensors.items() if ".layers.2." in n}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ran = call("quantize", directory, "--scheme", "f32", "-o", tmp_path / "m.gguf", "--json")
    assert ran.code == 0
    assert "llama.cpp has a place for one such layer" in ran.out


def test_a_layer_that_the_configuration_denies_is_refused(tmp_path: Path, call: Call) -> None:
    directory = predicting("glm4_moe", tmp_path)
    config = NARROW["glm4_moe"] | {"num_nextn_predict_layers": 0}
    (directory / "config.json").write_text(json.dumps(config))
    assert call("quantize", directory, "--scheme", "f32", "-o", tmp_path / "n.gguf").code == 3


def test_a_further_layer_that_is_not_whole_is_refused(tmp_path: Path, call: Call) -> None:
    directory = predicting("qwen3_next", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["mtp.fc.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ran = call("quantize", directory, "--scheme", "f32", "-o", tmp_path / "m.gguf")
    assert ran.code == 3
    assert "blk.3.nextn.eh_proj.weight" in ran.err


@pytest.mark.parametrize("name", NARROW)
def test_the_way_back_knows_the_names_of_transformers_modules(name: str, tmp_path: Path) -> None:
    """They are not those of checkpoints in some families."""
    torch = pytest.importorskip("torch", reason="pip install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    if name == "gemma3n":
        pytest.importorskip("timm", reason="its vision part is one of timm's")
    fields = NARROW[name]
    place = tmp_path / "config.json"
    place.write_text(json.dumps(fields))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    if name in STACKS:
        kind = transformers.AutoModelForSeq2SeqLM
    if name in WRAPPED:
        kind = transformers.AutoModelForImageTextToText
    elif name in ENCODERS:
        kind = transformers.AutoModel
    if name == "t5-encoder":
        kind = transformers.AutoModelForTextEncoding
    with torch.device("meta"):
        modules = kind.from_config(loaded).state_dict()
    family, config = read_config(dict(fields), place)
    sizes = family.sizes(config)
    infos = [described(n, tuple(v.shape), "F32") for n, v in modules.items()]
    asked = SimpleNamespace(path=place, tensors=infos)
    tied = fields.get("text_config", fields).get("tie_word_embeddings", False)
    mapped, dropped = map_tensors(asked, family, config, sizes, {}, Head(tied=tied))
    back = {t.info.name for t in inverted(mapped)}
    assert back == modules.keys() - {d.name for d in dropped}
    if name not in WRAPPED:
        unused = ("lm_head.weight", "pooler.dense.weight", "pooler.dense.bias")
        copies = {f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
        assert {d.name for d in dropped} <= {*unused, *copies}


def test_a_layer_whose_columns_are_permuted_has_no_place_for_its_statistics() -> None:
    place = layer_places(dict(NARROW["qwen3_5_text"]), Path("config.json"))
    assert place("model.layers.0.linear_attn.out_proj") is None
    assert place("model.layers.0.linear_attn.in_proj_z") == Place("blk.0.attn_gate.weight", None)
    assert place("model.layers.2.self_attn.o_proj") == Place("blk.2.attn_output.weight", None)


def test_a_layer_whose_matrix_is_turned_round_has_the_columns_of_its_inputs() -> None:
    place = layer_places(dict(NARROW["gpt2"]), Path("config.json"))
    assert place("transformer.h.0.attn.c_attn") == Place("blk.0.attn_qkv.weight", None)
    assert place("transformer.h.1.mlp.c_proj") == Place("blk.1.ffn_down.weight", None)

"""Files of what sees: tensors and keys as llama.cpp's own converter writes them.

What that wrote, and how far clip.cpp's embeddings of an image were from those of transformers, lies
in projectors.json (`make_projectors.py`); weights follow from the names of tensors.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_cases import unfolded
from conftest import ROOT, Call
from gguf import GGUFReader
from projector_document import PAGE, with_table
from projector_models import MODELS, OTHERWISE, WITHOUT_CONVERTER, written
from safetensors.numpy import load_file, save_file

from qconvert.architectures.config_classes import BASE
from qconvert.architectures.vision.table import PROJECTORS

TABLE: dict[str, Any] = json.loads((ROOT / "tests" / "projectors.json").read_text())
LIMIT = 2e-4  # of the largest value of the embeddings, in F32 with ggml's roundings


def made(name: str, place: Path) -> Path:
    return written(name, unfolded(TABLE[name]["shapes"]), place / name)


def keys(path: Path) -> dict[str, Any]:
    without = ("general.name", "general.file_type", "qconvert.provenance")
    return {
        k: [[t.name for t in f.types], f.contents()]
        for k, f in GGUFReader(path).fields.items()
        if not k.startswith("GGUF.") and k not in without
    }


def changed(directory: Path, file: str = "config.json", **changes: Any) -> None:
    """Fields with other values, or none where that is None; ``a__b`` is b inside a."""
    fields = json.loads((directory / file).read_text())
    for name, value in changes.items():
        outer, _, inner = name.rpartition("__")
        place = fields[outer] if outer else fields
        if value is None:
            del place[inner]
        else:
            place[inner] = value
    (directory / file).write_text(json.dumps(fields))


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", [n for n in MODELS if n not in WITHOUT_CONVERTER])
def test_tensors_and_keys_are_those_of_the_converter(
    name: str, scheme: str, tmp_path: Path, call: Call
) -> None:
    directory, path = made(name, tmp_path), tmp_path / "mmproj.gguf"
    ran = call("quantize", directory, "--mmproj", "--scheme", scheme, "-o", path)
    assert ran.code == 0, ran
    found = {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape[::-1]], zlib.crc32(t.data.tobytes())]
        for t in GGUFReader(path).tensors
    }
    golden = TABLE[name]["golden"]
    own, theirs = keys(path) | found, golden["keys"] | golden["tensors"][scheme]
    for pattern in OTHERWISE.get(name, ()):
        known = fnmatch.filter(own | theirs, pattern)
        assert known
        assert all(own.pop(key, None) != theirs.pop(key, None) for key in known)
    assert own == theirs
    # and every value is what the table of the projector says of the directory
    assert call("verify", path, "--against", directory).code == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_projector_converts_and_is_quantized(name: str, tmp_path: Path, call: Call) -> None:
    directory = made(name, tmp_path)
    whole, small, again = (tmp_path / f"{n}.gguf" for n in ("whole", "small", "again"))
    assert call("quantize", directory, "--mmproj", "--scheme", "f32", "-o", whole).code == 0
    assert call("quantize", directory, "--mmproj", "--scheme", "q4_0", "-o", small).code == 0
    assert call("verify", small, "--against", directory).code == 0
    assert call("inspect", small).code == 0
    # a file of it is quantized like the directory
    assert call("quantize", whole, "--scheme", "q4_0", "-o", again).code == 0
    types = [{t.name: t.tensor_type.name for t in GGUFReader(p).tensors} for p in (small, again)]
    assert types[0] == types[1]
    assert "Q4_0" in types[0].values()


def test_figures_are_there_for_every_model_and_none_is_a_fault() -> None:
    assert TABLE.keys() == MODELS.keys()
    for name, found in TABLE.items():
        assert found["differences"]["tables"] <= LIMIT, name
        # llama-quantize does not know what Gemma 3's graph does with one matrix
        gemma = {t for t in found["otherwise"] if t.endswith(" mm.input_projection.weight")}
        assert found["otherwise"].keys() == (gemma if name == "gemma3" else set()), name


def test_the_page_has_these_figures() -> None:
    page = PAGE.read_text()
    assert with_table(page, TABLE) == page


def test_without_a_scheme_it_is_f16_under_a_name_that_llama_cpp_knows(
    tmp_path: Path, call: Call
) -> None:
    directory = made("smolvlm", tmp_path)
    ran = call("quantize", directory, "--mmproj")
    assert ran.code == 0, ran
    path = tmp_path / "mmproj-smolvlm.f16.gguf"
    assert keys(path)["general.type"] == [["STRING"], "mmproj"]
    assert "tensors of the language model are left out" in " ".join(ran.out.split())


def test_other_names_of_the_same_tensors_give_the_same_file(tmp_path: Path, call: Call) -> None:
    directory = made("gemma3", tmp_path)
    assert call("quantize", directory, "--mmproj", "-o", tmp_path / "a.gguf").code == 0
    place = directory / "model.safetensors"
    tensors = {
        n.replace("vision_tower.vision_model.", "model.vision_tower.").replace(
            "multi_modal_projector.", "model.multi_modal_projector."
        ): v
        for n, v in load_file(place).items()
    }
    save_file(tensors, place, metadata={"format": "pt"})
    assert call("quantize", directory, "--mmproj", "-o", tmp_path / "b.gguf").code == 0
    files = [GGUFReader(tmp_path / n) for n in ("a.gguf", "b.gguf")]
    first, second = ({t.name: t.data.tobytes() for t in f.tensors} for f in files)
    assert first == second


# InternVL's first form: fields of the tower, beginnings of names, and ends within a block.
FIRST_TOWER = {"attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization"}
FIRST_NAMES = {
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings":
        "vision_model.embeddings.position_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection":
        "vision_model.embeddings.patch_embedding",
    "model.vision_tower.encoder.layer": "vision_model.encoder.layers",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
}  # fmt: skip
FIRST_ENDS = {
    "attention.projection_layer": "attn.proj", "layernorm_before": "norm1",
    "layernorm_after": "norm2", "lambda_1": "ls1", "lambda_2": "ls2",
}  # fmt: skip


def in_first_form(directory: Path, place: Path) -> Path:
    """The same InternVL as ``InternVLChatModel``, with its queries, keys and values in one."""
    shutil.copytree(directory, place)
    fields = json.loads((directory / "config.json").read_text())
    tower = {FIRST_TOWER.get(n, n): v for n, v in fields["vision_config"].items()}
    side, patch = (tower[n][0] for n in ("image_size", "patch_size"))
    (place / "config.json").write_text(json.dumps({
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": fields["downsample_ratio"], "ps_version": "v2", "select_layer": -1,
        "dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12,
        "template": "internvl2_5", "force_image_size": side, "use_thumbnail": True,
        "llm_config": fields["text_config"] | {"architectures": ["Qwen2ForCausalLM"]},
        "vision_config": tower | {
            "model_type": "intern_vit_6b", "architectures": ["InternVisionModel"],
            "image_size": side, "patch_size": patch, "use_flash_attn": True,
            "drop_path_rate": 0.1, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
            "hidden_act": "gelu", "qk_normalization": False,
        },
    }))  # fmt: skip
    found = {}
    for name, values in load_file(directory / "model.safetensors").items():
        for new, old in (*FIRST_NAMES.items(), *FIRST_ENDS.items()):
            name = name.replace(new, old) if "vision" in name or new in FIRST_NAMES else name
        found[name] = values
    for name in [n for n in found if ".attention.q_proj." in n]:
        parts = [found.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        found[name.replace("attention.q_proj", "attn.qkv")] = np.concatenate(parts)
    save_file(found, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("option", ["--mmproj", None])
def test_the_first_form_of_internvl_gives_the_same_file(
    option: str | None, tmp_path: Path, call: Call
) -> None:
    """Both files: of what sees, and of the language model."""
    whole, made_of = made("internvl", tmp_path), []
    for directory in (whole, in_first_form(whole, tmp_path / "first")):
        path = tmp_path / f"{directory.name}.gguf"
        words = [directory, *([option] if option else []), "--scheme", "q8_0", "-o", path]
        ran = call("quantize", *words)
        assert ran.code == 0, ran
        assert call("verify", path, "--against", directory).code == 0
        tensors = {t.name: t.data.tobytes() for t in GGUFReader(path).tensors}
        made_of.append((tensors, keys(path)))
    assert made_of[0] == made_of[1]


@pytest.mark.parametrize(
    ("changes", "option", "code"),
    [
        ({"ps_version": "v1"}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"select_layer": -2}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"vision_config__norm_type": "rms_norm"}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"vision_config__qk_normalization": True}, "--mmproj", "ARCH-CONFIG-VALUE"),
        # the defaults of its own classes, which transformers' do not have
        ({"ps_version": None}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"vision_config__norm_type": None}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"vision_config__qk_normalization": None}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"vision_config__hidden_size": None}, "--mmproj", "ARCH-SHAPE"),
        ({"force_image_size": 28}, "--mmproj", "ARCH-CONFIG-VALUE"),
        ({"llm_config__model_type": "internlm2"}, None, "ARCH-UNKNOWN"),
        ({"llm_config": 7}, None, "ARCH-UNKNOWN"),
        ({"vision_config": []}, "--mmproj", "ARCH-NO-VISION"),
    ],
)
def test_what_the_first_form_cannot_be_is_refused(
    changes: dict[str, Any], option: str | None, code: str, tmp_path: Path, call: Call
) -> None:
    directory = in_first_form(made("internvl", tmp_path), tmp_path / "first")
    changed(directory, **changes)
    words = [directory, *([option] if option else []), "--scheme", "f16", "--json"]
    ran = call("quantize", *words, "-o", tmp_path / "m.gguf")
    assert json.loads(ran.out)["error"]["code"] == code, ran.out


def test_the_first_form_has_at_most_six_tiles_where_it_says_nothing(
    tmp_path: Path, call: Call
) -> None:
    """As InternVLChatConfig has it; of transformers' form llama.cpp's usual number stays unsaid."""
    directory = in_first_form(made("internvl", tmp_path), tmp_path / "first")
    changed(directory, max_dynamic_patch=None, min_dynamic_patch=None, force_image_size=None)
    path = tmp_path / "m.gguf"
    assert call("quantize", directory, "--mmproj", "--scheme", "f16", "-o", path).code == 0
    found = keys(path)
    assert found["clip.vision.preproc_min_tiles"][1] == 1
    assert found["clip.vision.preproc_max_tiles"][1] == 6


@pytest.mark.parametrize("option", ["--mmproj", None])
def test_fields_of_the_first_form_that_nobody_reads_are_said(
    option: str | None, tmp_path: Path, call: Call
) -> None:
    directory = in_first_form(made("internvl", tmp_path), tmp_path / "first")
    words = [directory, *([option] if option else []), "--scheme", "f16", "--json", "--force"]
    ran = call("quantize", *words, "-o", tmp_path / "m.gguf")
    assert "without effect" not in ran.out
    changed(directory, pad2square=True, dynamic_image_size=False, use_thumbnail=False)
    ran = call("quantize", *words, "-o", tmp_path / "m.gguf")
    assert ran.code == 0
    said = next(w for w in json.loads(ran.out)["warnings"] if "without effect" in w)
    assert all(n in said for n in ("pad2square", "dynamic_image_size", "use_thumbnail"))


@pytest.mark.parametrize(
    ("file", "changes", "code", "said"),
    [
        ("config.json", {"vision_config__hidden_act": "relu"}, "ARCH-CONFIG-VALUE", "hidden_act"),
        ("config.json", {"vision_config__num_channels": 1}, "ARCH-CONFIG-VALUE", "num_channels"),
        ("config.json", {"vision_config__image_size": 57}, "ARCH-CONFIG", "image_size"),
        ("config.json", {"vision_config__image_size": [56, 28]}, "ARCH-CONFIG", "image_size"),
        ("config.json", {"vision_config__hidden_size": "64"}, "ARCH-CONFIG", "hidden_size"),
        ("config.json", {"vision_config__hidden_size": 128}, "ARCH-SHAPE", "v"),
        ("config.json", {"vision_config__num_attention_heads": 7}, "ARCH-HEADS", "heads"),
        ("config.json", {"vision_config__num_hidden_layers": 2}, "ARCH-TENSOR-LEFT", "layers.2"),
        ("config.json", {"vision_config": None}, "ARCH-NO-VISION", "vision_config"),
        ("config.json", {"mm_tokens_per_image": 5}, "ARCH-CONFIG", "mm_tokens_per_image"),
        ("config.json", {"model_type": "blip_2"}, "ARCH-UNKNOWN", "blip_2"),
        ("preprocessor_config.json", {"image_mean": None}, "ARCH-CONFIG", "image_mean"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0]}, "ARCH-CONFIG", "image_std"),
        ("preprocessor_config.json", {"image_std": [0.5]}, "ARCH-CONFIG", "image_std"),
        ("preprocessor_config.json", {"do_normalize": False}, "ARCH-CONFIG-VALUE", "do_normalize"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "ARCH-CONFIG-VALUE", "rescale"),
        ("preprocessor_config.json", {"image_seq_length": 9}, "ARCH-CONFIG-VALUE", "image_seq"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    file: str, changes: dict[str, Any], code: str, said: str, tmp_path: Path, call: Call
) -> None:
    directory, path = made("gemma3", tmp_path), tmp_path / "m.gguf"
    changed(directory, file, **changes)
    ran = call("quantize", directory, "--mmproj", "-o", path, "--json")
    assert ran.code in (3, 4), ran
    assert json.loads(ran.out)["error"]["code"] == code, ran.out
    assert said in ran.out
    assert not path.exists()


def test_files_that_are_missing_are_named(tmp_path: Path, call: Call) -> None:
    directory = made("gemma3", tmp_path)
    (directory / "preprocessor_config.json").unlink()
    ran = call("quantize", directory, "--mmproj")
    assert ran.code == 3
    assert "preprocessor_config.json" in ran.err
    # transformers 5 has the same in another file
    picture = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    inside = json.dumps({"image_processor": picture})
    (directory / "processor_config.json").write_text(inside)
    assert call("quantize", directory, "--mmproj").code == 0
    tensors = load_file(directory / "model.safetensors")
    text = {n: v for n, v in tensors.items() if not n.startswith(("vision", "multi"))}
    save_file(text, directory / "model.safetensors", metadata={"format": "pt"})
    ran = call("quantize", directory, "--mmproj", "--force")
    assert ran.code == 3
    assert "no tensors of the part that sees images" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "qblk"), "GGUF file"),
        (("--scheme", "keep"), "--scheme keep"),
        (("--raw",), "--raw"),
        (("--no-mtp",), "--no-mtp"),
        (("--shard-size", "1M"), "reads it whole"),
        (("--pre-tokenizer", "qwen2"), "--pre-tokenizer"),
    ],
)
def test_options_of_a_language_model_do_not_go_with_it(
    options: tuple[str, ...], said: str, tmp_path: Path, call: Call
) -> None:
    ran = call("quantize", made("smolvlm", tmp_path), "--mmproj", *options)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())


def test_it_is_no_language_model_to_run_but_is_made_again(tmp_path: Path, call: Call) -> None:
    directory, path = made("smolvlm", tmp_path), tmp_path / "m.gguf"
    assert call("quantize", directory, "--mmproj", "--scheme", "q8_0", "-o", path).code == 0
    pytest.importorskip("torch", reason="pip install qconvert[hf]")
    ran = call("verify", path, "--against", directory, "--run")
    assert ran.code == 2
    assert "runs a language model" in " ".join(ran.err.split())
    assert call("verify", path, "--against", directory, "--rebuild").code == 0


def test_a_changed_value_is_found(tmp_path: Path, call: Call) -> None:
    directory, path = made("smolvlm", tmp_path), tmp_path / "m.gguf"
    assert call("quantize", directory, "--mmproj", "--scheme", "f32", "-o", path).code == 0
    place = directory / "model.safetensors"
    tensors = load_file(place)
    name = "model.vision_model.encoder.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] += np.float32(0.5)
    save_file(tensors, place, metadata={"format": "pt"})
    ran = call("verify", path, "--against", directory)
    assert ran.code == 1
    assert "v.blk.1.attn_k.weight" in ran.out


@pytest.mark.parametrize("row", PROJECTORS, ids=lambda row: row.name)
def test_a_tower_has_the_fields_of_transformers_and_no_others(row: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    if not transformers.__version__.startswith("5.24."):
        pytest.skip("the tables are those of transformers 5.24")
    known = row.config
    theirs = getattr(transformers, known.name)
    fields = {f.name: f.default for f in dataclasses.fields(theirs)}
    base = {f.name for f in dataclasses.fields(transformers.PretrainedConfig)}
    assert fields.keys() - base == set(known.fields) | set(known.unused)
    assert not set(known.harmless) & (fields.keys() | BASE)
    assert known.aliases == theirs.attribute_map
    for name, (_, default) in known.fields.items():
        assert (type(default), default) == (type(fields[name]), fields[name]), name

"""Channels rescaled by powers of two: held against transformers, calibrations of the rescaled model
and searches by brute force.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from config_cases import Directories, unfolded
from conftest import ROOT, Call, gaussian, save
from family_models import NARROW
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qconvert.architectures.equalisation import channel_groups
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files import open_model
from qconvert.files.equalised import (
    EqualisedModel,
    Exponents,
    equalised,
    noted,
    read_exponents,
)
from qconvert.files.qblk import open_qblk
from qconvert.model import Model
from qconvert.report import EqualisedGroup
from qconvert.stages.equalisation import Choice, exponents_of
from qconvert.stages.equalisation_factors import (
    channel_logarithms,
    column_logarithms,
    powers_of_two,
)

Tensors = dict[str, NDArray[Any]]
# Groups of channels of a block: after each of two norms but BERT's, values, and what a gate
# multiplies but in BERT. An output matrix of its own follows the last norm.
GROUPS = {
    "llama": 2 * 4 + 1, "llama-biases": 2 * 4 + 1, "smollm": 2 * 4, "qwen2": 2 * 4,
    "qwen2-yarn": 2 * 4 + 1, "qwen3": 2 * 4 + 1, "gemma2": 2 * 4, "gemma3": 7 * 4,
    "phi3": 2 * 4 + 1, "mixtral": 2 * 4 + 1, "qwen3-moe": 2 * 4 + 1, "bert": 2,
}  # fmt: skip
PLUS_ONE = ("gemma2", "gemma3")


def rescaled(model: Model, seed: int, most: int = 3) -> EqualisedModel:
    """A model with every group rescaled by random powers of two."""
    random = np.random.default_rng(seed)
    chosen = [
        Choice(
            g,
            random.integers(-most, most + 1, g.size).astype(np.int8),
            EqualisedGroup(g.name, g.size, g.size, 2**most, 1.0, 1.0),
        )
        for g in channel_groups(model)
    ]
    return EqualisedModel(model, exponents_of(chosen))


def arrays(model: Model) -> Tensors:
    return {t.name: model.values(t, 0, t.size).reshape(t.shape) for t in model.tensors}


def with_outliers(tensors: Tensors, layers: int = 2) -> Tensors:
    """The same function with some channels of both norms and of the inner layer rescaled by 16, and
    some by 1/16.
    """
    found = {n: v.copy() for n, v in tensors.items()}
    for i in range(layers):
        at = f"model.layers.{i}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            for channels, factor in (([3, 40], 16), ([7, 50], 1 / 16)):
                found[f"{at}{norm}.weight"][channels] *= factor
                for reader in readers:
                    found[f"{at}{reader}.weight"][:, channels] /= factor
        found[f"{at}mlp.up_proj.weight"][[5, 90]] *= 16
        found[f"{at}mlp.down_proj.weight"][:, [5, 90]] /= 16
    return found


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("outliers") / "llama"
    fields = tiny_models.CONFIGS["llama"]
    return tiny_models.write_directory(
        place, "llama", tensors=with_outliers(tiny_models.weights(fields))
    )


# --- the function is the same ---------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_of_every_architecture(name: str, directory: Callable[[str], Path]) -> None:
    groups = channel_groups(open_model(directory(name)))
    assert len(groups) == GROUPS[name]
    for g in groups:
        assert sorted(np.unique(np.concatenate([p.channels for p in g.givers]))) in (
            list(range(g.size)),
            list(range(-1, g.size)),  # rows that are no channels, in one tensor with them
        )
        assert set(np.unique(np.concatenate([p.channels.ravel() for p in g.takers]))) == set(
            range(g.size)
        )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", GROUPS)
def test_transformers_computes_the_same(
    name: str, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="install qconvert[hf]")
    source = directory(name)
    model = rescaled(open_model(source), seed=1)
    tensors = arrays(model)
    assert any(not np.array_equal(v, tensors[n]) for n, v in arrays(model.source).items())
    fields = json.loads((source / "config.json").read_text())
    other = tiny_models.write_directory(tmp_path / "m", name, tensors=tensors)
    kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, fields["vocab_size"], (2, 24)))
    found = []
    for path in (source, other):
        loaded = kind.from_pretrained(path, dtype=torch.float64).eval()
        if name in ("mixtral", "qwen3-moe"):
            loaded.set_experts_implementation("eager")  # the others know no float64
        with torch.no_grad():
            done = loaded(input_ids=ids)
        found.append((done.last_hidden_state if name == "bert" else done.logits).numpy())
    before, after = found
    # transformers' norms compute in float32 in places; gains less one are stored in float32.
    allowed = 1e-4 if name in PLUS_ONE else 1e-6
    assert np.abs(after - before).max() <= allowed * np.abs(before).max()
    if name not in PLUS_ONE:
        assert np.array_equal(before, after)


# Models of `family_models`, with two blocks and an output matrix of their own but Gemma; nothing of
# what sees is rescaled.
FAMILIES = {
    "qwen2_vl": 2 * 4 + 1, "qwen2_5_vl": 2 * 4 + 1, "qwen3_vl": 2 * 4 + 1, "gemma": 2 * 4,
}  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same_of_language_models_inside_others(
    name: str, tmp_path: Path, call: Call
) -> None:
    table = json.loads((ROOT / "tests" / "config_table.json").read_text())
    shapes = unfolded(table["tensors"][table["bases"][name]["tensors"]])
    directories = [
        Directories(tmp_path / n).made(name, NARROW[name], shapes) for n in ("before", "after")
    ]
    model = rescaled(open_model(directories[0]), seed=1)
    assert len(channel_groups(open_model(directories[0]))) == FAMILIES[name]
    changed = [
        n for n, v in arrays(model.source).items() if not np.array_equal(v, arrays(model)[n])
    ]
    assert changed
    assert not [n for n in changed if "visual" in n]
    save_file(arrays(model), directories[1] / "model.safetensors", metadata={"format": "pt"})
    # what was rescaled is found again, and the file is what the factors in it say
    out = tmp_path / "m.gguf"
    done = call("quantize", str(directories[1]), "--scheme", "q4_0", "-o", str(out), "--json")
    assert done.json["equalisation"]["groups"] == FAMILIES[name]
    assert done.json["equalisation"]["equalised"]
    assert call("verify", str(out), "--against", str(directories[1])).code == 0
    torch = pytest.importorskip("torch", reason="install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="install qconvert[hf]")
    kind = transformers.AutoModelForImageTextToText
    if name == "gemma":
        kind = transformers.AutoModelForCausalLM
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 300, (2, 24)))
    with torch.no_grad():
        before, after = (
            kind.from_pretrained(place, dtype=torch.float64).eval()(input_ids=ids).logits.numpy()
            for place in directories
        )
    allowed = 1e-4 if name == "gemma" else 1e-6
    assert np.abs(after - before).max() <= allowed * np.abs(before).max()


def test_stacked_experts_are_rescaled_each_by_itself(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_model(directory("qwen3-moe"))
    apart = arrays(source)
    together = {n: v for n, v in apart.items() if ".experts." not in n}
    for i in range(2):
        at = f"model.layers.{i}.mlp.experts"

        def every(kind: str, at: str = at) -> NDArray[Any]:
            return np.stack([apart[f"{at}.{e}.{kind}.weight"] for e in range(4)])

        both = np.concatenate([every("gate_proj"), every("up_proj")], axis=1)
        together[f"{at}.gate_up_proj"] = both
        together[f"{at}.down_proj"] = every("down_proj")
    whole = tiny_models.write_directory(tmp_path / "m", "qwen3-moe", tensors=together)
    stacked = {g.name: g for g in channel_groups(open_model(whole))}
    found, wanted = rescaled(open_model(whole), 2), rescaled(source, 2)
    got, expected = arrays(found), arrays(wanted)
    assert len(stacked) == GROUPS["qwen3-moe"]
    for i, e in itertools.product(range(2), range(4)):
        at = f"model.layers.{i}.mlp.experts"
        for kind, part in (("gate_proj", slice(48)), ("up_proj", slice(48, None))):
            one = expected[f"{at}.{e}.{kind}.weight"]
            assert np.array_equal(got[f"{at}.gate_up_proj"][e, part], one)
        assert np.array_equal(got[f"{at}.down_proj"][e], expected[f"{at}.{e}.down_proj.weight"])


# --- factors --------------------------------------------------------------------------------------


def test_the_closed_form_is_the_least_of_all_factors() -> None:
    random = np.random.default_rng(3)
    squares, weights = np.exp(random.normal(0, 2, (2, 4)))

    def cost(logarithms: NDArray[Any]) -> Any:
        factors = 4.0**logarithms
        return np.sum(squares / factors, axis=-1) * np.sum(weights * factors, axis=-1)

    found = column_logarithms(squares, weights)
    steps = np.arange(-4, 4.01, 0.25)
    # A factor for all channels changes nothing, so that the first can be held.
    every = np.array(list(itertools.product([0.0], steps, steps, steps)))
    assert cost(found) <= cost(every).min()
    assert cost(every).min() < 1.05 * cost(found)
    assert cost(found) < 0.9 * cost(np.zeros(4))


def test_powers_of_two_are_the_nearest_to_the_factors() -> None:
    logarithms = np.array([0.0, 1.0, 1.4, -2.6, np.nan, 100.0, 1.0])
    assert powers_of_two(logarithms, 1.0).tolist() == [-1, 0, 0, -4, 0, 26, 0]  # about the median
    assert powers_of_two(logarithms, 0.5).tolist() == [0, 0, 0, -2, 0, 26, 0]
    assert not powers_of_two(np.full(3, np.nan), 1.0).any()


def test_heads_that_share_values_take_the_mean_of_their_logarithms() -> None:
    columns = np.array([[1.0, 2.0, 3.0, np.nan]])
    found = channel_logarithms(columns, np.array([[0, 1, 0, 1]]), 3)
    assert found[:2].tolist() == [2.0, 2.0]
    assert np.isnan(found[2])


# --- quantize and verify --------------------------------------------------------------------------


def lost(path: Path, source: Path) -> float:
    """Relative error of all weights of a qblk file, with the factors that it names taken away."""
    made, original = open_qblk(path), arrays(open_model(source))
    exponents = read_exponents(made.header.provenance, path)
    noise = signal = 0.0
    for tensor in made.tensors:
        values = made.values(tensor, 0, tensor.size).reshape(tensor.shape).astype(np.float64)
        e = exponents.get(tensor.name)
        if e is not None and e.columns is not None:
            values /= 2.0 ** e.columns.ravel()
        if e is not None and e.rows is not None:
            values *= 2.0 ** (e.rows if values.ndim == 1 else e.rows[:, None])
        wanted = original[tensor.name].astype(np.float64)
        scale = np.sqrt(np.mean(wanted**2, axis=0, keepdims=values.ndim > 1))
        noise += float(np.sum(((values - wanted) / scale) ** 2))
        signal += float(np.sum((wanted / scale) ** 2))
    return noise / signal


@pytest.mark.parametrize("scheme", ["q4_block64", "q3_block32", "c4_block16", "nf4_block64"])
def test_outliers_are_found_without_data_and_verified(
    scheme: str, outliers: Path, tmp_path: Path, call: Call
) -> None:
    plain, better = tmp_path / "plain.qblk", tmp_path / "better.qblk"
    options = ["quantize", str(outliers), "--scheme", scheme, "--min-values", "64", "--json"]
    off = call(*options, "--equalise", "off", "-o", str(plain))
    done = call(*options, "-o", str(better))
    assert off.code == done.code == 0
    assert off.json["equalisation"] is None
    told = done.json["equalisation"]
    assert (told["basis"], told["groups"]) == ("the weights alone", 9)
    assert len(told["equalised"]) == 6
    assert {g["name"].split(".")[-2] for g in told["equalised"]} == {
        "input_layernorm", "post_attention_layernorm", "up_proj"
    }  # fmt: skip
    assert all(g["left"] < 0.7 and g["largest"] >= 8 for g in told["equalised"])
    # Errors by the size of each column: what the outputs have lost.
    assert lost(better, outliers) < 0.4 * lost(plain, outliers)
    checked = call("verify", str(better), "--against", str(outliers), "--json")
    assert checked.code == 0
    assert {c["status"] for c in checked.json["checks"]} <= {"pass", "skip"}
    original = tiny_models.write_directory(tmp_path / "m", "llama")
    assert call("verify", str(better), "--against", str(original), "--json").code == 1


def test_the_bytes_are_the_same_for_any_number_of_threads(
    outliers: Path, tmp_path: Path, call: Call
) -> None:
    paths = [tmp_path / f"{n}.qblk" for n in (1, 3)]
    for path, threads in zip(paths, ("1", "3"), strict=True):
        words = ["--scheme", "q4_block32", "--min-values", "64", "-o", str(path)]
        assert call("quantize", str(outliers), *words, "--threads", threads).code == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "bert"])
def test_a_model_without_outliers_stays_byte_for_byte(
    name: str, directory: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    paths = [tmp_path / "a.qblk", tmp_path / "b.qblk"]
    words = ["quantize", str(directory(name)), "--scheme", "q4_block32", "--min-values", "64"]
    told = call(*words, "-o", str(paths[0]), "--json")
    assert told.json["equalisation"]["equalised"] == []
    assert told.json["equalisation"]["groups"] == GROUPS[name]
    off = call(*words, "-o", str(paths[1]), "--equalise", "off")
    assert "equalised" not in off.out
    a, b = (open_qblk(p) for p in paths)
    assert b.header.provenance["options"].pop("equalise") == "off"
    assert a.header.provenance == b.header.provenance
    assert [t.sha256 for t in a.header.tensors] == [t.sha256 for t in b.header.tensors]


def test_gguf_has_the_same_factors(outliers: Path, tmp_path: Path, call: Call) -> None:
    gguf = pytest.importorskip("gguf")
    path, qblk = tmp_path / "m.gguf", tmp_path / "m.qblk"
    assert call("quantize", str(outliers), "--scheme", "q4_0", "-o", str(path)).code == 0
    words = ["--scheme", "q4_block32", "--min-values", "64", "-o", str(qblk)]
    assert call("quantize", str(outliers), *words).code == 0
    fields = gguf.GGUFReader(path)
    text = fields.fields["qconvert.provenance"].contents()
    factors = read_exponents(json.loads(text), path)
    assert factors.keys() == read_exponents(open_qblk(qblk).header.provenance, qblk).keys()
    norm = next(t for t in fields.tensors if t.name == "blk.0.attn_norm.weight").data
    name = "model.layers.0.input_layernorm.weight"
    stored = arrays(open_model(outliers))[name]
    rows = factors[name].rows
    assert rows is not None
    assert rows[3] > 2 > -2 > rows[7]
    assert np.array_equal(norm, stored / 2.0**rows)
    checked = call("verify", str(path), "--against", str(outliers), "--json")
    assert checked.code == 0
    assert {c["status"] for c in checked.json["checks"]} <= {"pass", "skip"}


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "phi3", "qwen2-yarn", "bert"])
@pytest.mark.parametrize("suffix", ["qblk", "gguf"])
def test_every_kind_of_group_is_found_and_verified(
    suffix: str, name: str, directory: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    model = rescaled(open_model(directory(name)), 6, most=5)
    path = tiny_models.write_directory(tmp_path / "m", name, tensors=arrays(model))
    out, off = tmp_path / f"m.{suffix}", tmp_path / f"off.{suffix}"
    scheme = ["q4_block32", "--min-values", "64"] if suffix == "qblk" else ["q4_0"]
    words = ["quantize", str(path), "--scheme", *scheme, "--json", "-o"]
    done, before = call(*words, str(out)), call(*words, str(off), "--equalise", "off")
    assert done.code == before.code == 0
    # Random factors at random channels: whatever is undone is so nearly all of it.
    told = done.json["equalisation"]
    assert len(told["equalised"]) == told["groups"] == GROUPS[name]
    assert done.json["sqnr_db"] > 15
    checked = call("verify", str(out), "--against", str(path), "--json")
    assert checked.code == 0, [c for c in checked.json["checks"] if c["status"] == "fail"]
    assert "skip" not in {c["status"] for c in checked.json["checks"] if "exact" in c["id"]}
    left = sum(np.abs(e.rows).sum() for e in _factors(out).values() if e.rows is not None)
    assert left > 0


def _factors(path: Path) -> dict[str, Exponents]:
    if path.suffix == ".qblk":
        return read_exponents(open_qblk(path).header.provenance, path)
    text = open_model(path).metadata["qconvert.provenance"]
    return read_exponents(json.loads(text), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "no config.json says how layers follow each other"),
        ({"architectures": ["GPTJForCausalLM"], "model_type": "gptj"}, "architecture has no row"),
        ({"num_attention_heads": 8}, "shape contradicts config.json"),
        ({"num_hidden_layers": 3}, "tensor is missing"),
    ],
)
def test_what_is_not_known_is_left_as_it_is_and_said(
    change: dict[str, Any], said: str, outliers: Path, tmp_path: Path, call: Call
) -> None:
    tensors = load_file(outliers / "model.safetensors")
    if change:
        path = tiny_models.write_directory(tmp_path / "m", "llama", tensors=tensors, config=change)
    else:
        path = save(tmp_path / "m.safetensors", tensors)
    words = ["quantize", str(path), "--scheme", "q4_block64", "-o", str(tmp_path / "o.qblk")]
    done = call(*words, "--json")
    assert done.code == 0
    assert done.json["equalisation"]["equalised"] == []
    assert said in done.json["equalisation"]["skipped"][0]
    assert said in call(*words, "--force").out


def test_scales_of_whole_tensors_and_casts_are_left_out(
    outliers: Path, tmp_path: Path, call: Call
) -> None:
    for scheme, said in (("q8_tensor", "whole tensor"), ("bf16", "no tensor gets codes")):
        words = ["--scheme", scheme, "-o", str(tmp_path / f"{scheme}.qblk"), "--json"]
        told = call("quantize", str(outliers), *words).json["equalisation"]
        assert said in told["skipped"][0]


def test_half_precision_is_read_as_float32_and_ends_of_the_range_are_skipped(
    outliers: Path, tmp_path: Path, call: Call
) -> None:
    import ml_dtypes

    tensors = load_file(outliers / "model.safetensors")
    half = {n: v.astype(np.float16) for n, v in tensors.items()}
    path = tiny_models.write_directory(tmp_path / "half", "llama", tensors=half)
    out = tmp_path / "half.qblk"
    words = ["--scheme", "q4_block32", "--min-values", "64", "--json"]
    done = call("quantize", str(path), *words, "-o", str(out))
    assert len(done.json["equalisation"]["equalised"]) == 6
    stored = {t.name: t.source_dtype for t in open_qblk(out).header.tensors}
    assert stored["model.layers.0.input_layernorm.weight"] == "F32"
    assert stored["model.norm.weight"] == stored["lm_head.weight"] == "F16"
    assert call("verify", str(out), "--against", str(path)).code == 0
    brain: Tensors = {n: v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}
    query = brain["model.layers.0.self_attn.q_proj.weight"]
    query[0, 7] = 2.0**-132  # a third of the smallest normal number: not to be divided by 8
    place = tmp_path / "brain"
    tiny_models.write_directory(place, "llama", tensors={})
    save_file(brain, place / "model.safetensors")
    done = call("quantize", str(place), *words, "-o", str(tmp_path / "brain.qblk"))
    told = done.json["equalisation"]
    assert len(told["equalised"]) == 5
    assert told["skipped"] == [
        "model.layers.0.input_layernorm.weight: weights at the end of the range of their dtype"
    ]
    bad = {n: v.copy() for n, v in tensors.items()}
    bad["model.layers.1.self_attn.k_proj.weight"][:] = np.nan
    place = tiny_models.write_directory(tmp_path / "nan", "llama", tensors=bad)
    words += ["--keep", "*layers.1*k_proj*"]
    told = call("quantize", str(place), *words, "-o", str(tmp_path / "nan.qblk")).json
    assert (
        "model.layers.1.input_layernorm.weight: weights that are NaN or Inf"
        in (told["equalisation"]["skipped"])
    )


def test_a_gain_of_rescaled_values_is_exact_in_every_dtype() -> None:
    values = gaussian(1, 6, 4)
    e = Exponents(np.arange(6, dtype=np.int8) - 3, np.array([[1, -2, 0, 5]] * 2, np.int8))
    wanted = values * 2.0 ** e.columns[0] / 2.0 ** e.rows[:, None]  # type: ignore[index]
    for start, stop in ((0, 24), (5, 6), (3, 17), (24, 24)):
        found = e.applied(values.ravel()[start:stop], (6, 4), start)
        assert np.array_equal(found, wanted.ravel()[start:stop])


# --- what a file says -----------------------------------------------------------------------------


def test_factors_are_read_as_they_were_written(directory: Callable[[str], Path]) -> None:
    for name in ("qwen3-moe", "gemma2", "phi3", "llama-biases"):
        source = open_model(directory(name))
        model = rescaled(source, 4, most=26)
        said = json.loads(json.dumps(noted(model)))
        again = equalised(source, read_exponents(said, Path("f")))
        assert isinstance(again, EqualisedModel)
        for tensor, e in model.exponents.items():
            found = again.exponents[tensor]
            assert found.offset == e.offset
            for kind in ("rows", "columns"):
                one, other = getattr(e, kind), getattr(found, kind)
                assert (one is None) == (other is None)
                assert one is None or np.array_equal(one, other)
    assert noted(source) == {}
    assert equalised(source, {}) is source


GOOD = {"tensors": {"a.weight": {"columns": 0, "rows": 1}}, "vectors": ["0Az", "b0"]}


@pytest.mark.parametrize(
    "change",
    [
        [], None, "x", {"tensors": {}}, {"vectors": []}, {"tensors": [], "vectors": []},
        GOOD | {"vectors": ["0Az", "b!"]}, GOOD | {"vectors": ["0Az", ""]},
        GOOD | {"vectors": ["0Az", "b1"]}, GOOD | {"vectors": ["0Az", [1]]},
        GOOD | {"vectors": ["0Az"]}, GOOD | {"tensors": {"a.weight": {"columns": -1}}},
        GOOD | {"tensors": {"a.weight": {"columns": True}}},
        GOOD | {"tensors": {"a.weight": {"columns": 0.0}}},
        GOOD | {"tensors": {"a.weight": {"offset": 2}}},
        GOOD | {"tensors": {"a.weight": {"other": 0}}}, GOOD | {"tensors": {"a.weight": 0}},
    ],
)  # fmt: skip
def test_impossible_factors_are_refused(change: Any) -> None:
    assert read_exponents({"equalisation": GOOD}, Path("f"))["a.weight"].rows is not None
    with pytest.raises(FormatError, match="equalisation"):
        read_exponents({"equalisation": change}, Path("f"))


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    good = {"a.weight": gaussian(1, 2, 3)}
    exponents = read_exponents({"equalisation": GOOD}, Path("f"))
    model = equalised(open_model(save(tmp_path / "good.safetensors", good)), exponents)
    assert np.array_equal(
        arrays(model)["a.weight"], good["a.weight"] * [1, 2, 2.0**-26] / [[0.25], [1]]
    )
    for i, tensor in enumerate(
        (gaussian(1, 3, 2), gaussian(1, 2, 4), gaussian(1, 6), np.zeros((2, 3), np.int32))
    ):
        other = open_model(save(tmp_path / f"{i}.safetensors", {"a.weight": tensor}))
        with pytest.raises(UnsupportedError, match="equalised"):
            equalised(other, exponents)
    other = open_model(save(tmp_path / "name.safetensors", {"b.weight": gaussian(1, 2, 3)}))
    with pytest.raises(UnsupportedError, match="no such tensor"):
        equalised(other, exponents)


def test_a_file_with_impossible_factors_is_no_good(
    outliers: Path, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "m.gguf"
    assert call("quantize", str(outliers), "--scheme", "q4_0", "-o", str(path)).code == 0
    data = path.read_bytes()
    at = data.index(b'"vectors": ["') + len(b'"vectors": ["')
    path.write_bytes(data[:at] + b"!" + data[at + 1 :])
    checked = call("verify", str(path), "--against", str(outliers), "--json")
    assert checked.code == 1
    assert [(c["id"], c["status"]) for c in checked.json["checks"]] == [("integrity", "fail")]
    assert "impossible factors" in checked.json["checks"][0]["detail"]


def test_another_word_for_equalise_is_refused(outliers: Path, call: Call) -> None:
    done = call("quantize", str(outliers), "--scheme", "q4_block64", "--equalise", "on")
    assert (done.code, "auto or off" in done.err) == (2, True)


# --- calibrations ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrations(
    outliers: Path, directory: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Path, Path, EqualisedModel]]:
    """By the model: a calibration of it, one of the same equalised, and that."""
    pytest.importorskip("torch", reason="install qconvert[hf]")
    pytest.importorskip("transformers", reason="install qconvert[hf]")
    from qconvert.calibration.observers import ObserverSettings
    from qconvert.stages.calibrate_text import TextOptions, calibrate_text

    home = tmp_path_factory.mktemp("calibrations")
    found = {}
    for name, source in (("llama", outliers), ("mixtral", directory("mixtral"))):
        model = rescaled(open_model(source), 5)
        other = tiny_models.write_directory(home / f"{name}-model", name, tensors=arrays(model))
        paths = []
        for path in (source, other):
            paths.append(home / f"{name}-{len(paths)}.safetensors")
            text = (ROOT / "samples" / "calibration.txt",)
            options = TextOptions(
                model=path, texts=text, output=paths[-1], seqlen=16, nsamples=3, seed=5, gram=True,
                fisher=True, settings=ObserverSettings("minmax"), threads=1,
                imatrix=paths[-1].with_suffix(".gguf"),
            )  # fmt: skip
            calibrate_text(options)
        found[name] = (paths[0], paths[1], model)
    return found


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_calibration_is_that_of_the_equalised_model(
    name: str, calibrations: Mapping[str, tuple[Path, Path, EqualisedModel]]
) -> None:
    from qconvert.calibration.equalised import EqualisedCalibration
    from qconvert.calibration.file import Calibration

    before, after, model = calibrations[name]
    changed = 0
    with (
        Calibration(before) as original,
        EqualisedCalibration(before, model) as found,
        Calibration(after) as wanted,
    ):
        found.check_model(model)
        assert found.layers.keys() == wanted.layers.keys()
        for layer, expected in wanted.layers.items():
            # Float32 activations are the same digits; sums of them are rounded to 2^-64.
            columns = expected.features
            squares = found.mean_squares(layer, columns)
            assert squares is not None
            np.testing.assert_allclose(squares, wanted.mean_squares(layer, columns), rtol=1e-6)
            np.testing.assert_allclose(found.gram(layer), wanted.gram(layer), rtol=1e-6, atol=1e-9)
            got, truth = found.sensitivity(layer), wanted.sensitivity(layer)
            assert got is not None
            assert truth is not None
            # D is kept as a product of sums, which are not the same of inputs of another length.
            logarithms = np.log(np.maximum([got.array(), truth.array()], 1e-30))
            assert np.corrcoef(logarithms.reshape(2, -1))[0, 1] > 0.9, layer
            # The same change of the function costs the same.
            old = original.sensitivity(layer)
            assert old is not None
            error, e = gaussian(9, *old.shape), model.exponents.get(f"{layer}.weight", Exponents())
            again = e.applied(error.ravel(), error.shape, 0).reshape(error.shape)
            costs = [
                s.divergence(0, 0, d.astype(np.float64) ** 2)
                for s, d in ((old, error), (got, again))
            ]
            assert costs[1] == pytest.approx(costs[0])
            outputs = found.output_fisher(layer)
            largest = np.abs(wanted.output_fisher(layer)).max()  # type: ignore[arg-type]
            np.testing.assert_allclose(
                outputs, wanted.output_fisher(layer), rtol=1e-5, atol=1e-7 * largest
            )
            if e.rows is None:  # else |g|² is that of other outputs
                np.testing.assert_allclose(
                    found.input_fisher(layer), wanted.input_fisher(layer), rtol=1e-4, atol=1e-9
                )
            ours = found.layers[layer].input
            assert (ours.low, ours.high) == pytest.approx((expected.input.low, expected.input.high))
            changed += layer in found.rescaled
    assert changed >= 9


@pytest.mark.filterwarnings("default")
def test_a_calibration_decides_and_is_used(
    outliers: Path,
    calibrations: Mapping[str, tuple[Path, Path, EqualisedModel]],
    tmp_path: Path,
    call: Call,
) -> None:
    path, _, _ = calibrations["llama"]
    out, off = tmp_path / "c.qblk", tmp_path / "off.qblk"
    words = ["quantize", str(outliers), "--scheme", "q4_block32", "--min-values", "64"]
    words += ["--calibration", str(path), "--json"]
    done = call(*words, "-o", str(out))
    told = done.json["equalisation"]
    assert (done.code, told["basis"]) == (0, "the calibration")
    norms = [
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in (0, 1)
        for n in ("input", "post_attention")
    ]
    assert [g["name"] for g in told["equalised"] if "norm" in g["name"]] == norms
    assert any("extremes of their channels" in note for note in done.json["notes"])
    assert call("verify", str(out), "--against", str(outliers)).code == 0
    notes = {t.name: t.activation for t in open_qblk(out).header.tensors}
    query = notes["model.layers.0.self_attn.q_proj.weight"]
    assert query is not None
    assert query["observer"] == "minmax"
    assert call(*words, "-o", str(off), "--equalise", "off").code == 0
    wrong = call(
        *words[:2], "--scheme", "q4_block32", "--calibration", str(calibrations["mixtral"][0])
    )
    assert (wrong.code, "another model" in wrong.err) == (3, True)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_importance_matrix_is_that_of_the_equalised_model(
    name: str, calibrations: Mapping[str, tuple[Path, Path, EqualisedModel]]
) -> None:
    from qconvert.architectures import open_gguf_source
    from qconvert.files.imatrix import read_imatrix
    from qconvert.stages.gguf_target import importance_of

    before, after, model = calibrations[name]
    mapped = open_gguf_source(model).model
    find = importance_of(read_imatrix(before.with_suffix(".gguf")), mapped, model)
    wanted = read_imatrix(after.with_suffix(".gguf"))
    changed = 0
    for tensor in mapped.tensors:
        expected, found = wanted.find(tensor), find(tensor)
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            changed += 1
    assert changed >= 14


@pytest.mark.filterwarnings("default")
def test_an_importance_matrix_decides_and_is_used(
    outliers: Path,
    calibrations: Mapping[str, tuple[Path, Path, EqualisedModel]],
    tmp_path: Path,
    call: Call,
) -> None:
    out = tmp_path / "m.gguf"
    imatrix = calibrations["llama"][0].with_suffix(".gguf")
    words = ["--scheme", "iq4_nl", "--imatrix", str(imatrix), "-o", str(out), "--json"]
    told = call("quantize", str(outliers), *words).json["equalisation"]
    assert told["basis"] == "the importance matrix"
    assert len([g for g in told["equalised"] if "norm" in g["name"]]) == 4
    assert call("verify", str(out), "--against", str(outliers)).code == 0


def test_recorded_inputs_are_rescaled_with_the_weights(
    outliers: Path, tmp_path: Path, call: Call
) -> None:
    out, off = tmp_path / "m.qblk", tmp_path / "off.qblk"
    name = "model.layers.0.self_attn.q_proj"
    x = gaussian(3, 8, 64)
    x[:, [3, 40]] *= 16  # as the norm gives them
    x[:, [7, 50]] /= 16
    samples = save(tmp_path / "samples.safetensors", {name: x})
    found = {}
    for path, how in ((out, "auto"), (off, "off")):
        words = ["--scheme", "q8_block32", "--min-values", "64", "-o", str(path)]
        assert call("quantize", str(outliers), *words, "--equalise", how).code == 0
        words = ["--samples", str(samples), "--activations", "dynamic", "--json"]
        told = call("verify", str(path), "--against", str(outliers), *words).json
        found[how] = next(t for t in told["tensors"] if t["name"] == f"{name}.weight")
    assert found["auto"]["inputs"] == "recorded"
    # Inputs and weights of one size each: 8 bits of both are enough.
    assert found["auto"]["output_sqnr_db"] > 38 > found["off"]["output_sqnr_db"]


@pytest.mark.parametrize("suffix", ["qblk", "gguf"])
def test_a_budget_is_kept_with_factors_and_measured_with_them(
    suffix: str, outliers: Path, tmp_path: Path, call: Call
) -> None:
    known, most = tmp_path / "known.json", 96_000
    words = ["quantize", str(outliers), "--target-size", str(most), "--json"]
    words += ["--sensitivities", str(known)]
    off = call(*words, "--equalise", "off", "-o", str(tmp_path / f"off.{suffix}"))
    assert (off.code, off.json["equalisation"]) == (0, None)
    mixed = call(*words, "-o", str(tmp_path / f"mixed.{suffix}"))
    assert (mixed.code, "SENSITIVITIES-BOUND" in mixed.out) == (3, True)
    known.unlink()
    out = tmp_path / f"m.{suffix}"
    told = call(*words, "-o", str(out)).json
    assert len(told["equalisation"]["equalised"]) == 6
    assert most - 8192 < out.stat().st_size <= most
    again = call(*words, "-o", str(tmp_path / f"again.{suffix}")).json
    assert (told["prediction"]["measured"] > 0, again["prediction"]["measured"]) == (True, 0)
    assert (tmp_path / f"again.{suffix}").read_bytes() == out.read_bytes()
    assert call("verify", str(out), "--against", str(outliers)).code == 0

"""What verify and quantize say of a model: broken, poorer than expected, or as expected, and how it
can be mended.
"""

from __future__ import annotations

import json
import math
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Call, gaussian, save

from qconvert.floors import LOST_DB, USABLE_DB, Measured, expected_nats, judge
from qconvert.remedies import joined, mending, remedy
from qconvert.report import Check, EmbeddingQuality, Execution, TokenQuality
from qconvert.stages.verdict import judge_embeddings, judge_tokens
from qconvert.tensor_classes import class_of

LLAMA = ROOT / "samples/tiny-llama"
RAN = Execution("none", "cpu", 0, 0, 0, 0)
# llama.cpp, tools/perplexity/README.md at 0c1e57098: LLaMA 3 8B without an importance matrix, bits
# per weight (by the sizes in GiB there, of 8.03e9 weights) and mean divergence in nats.
LLAMA_3_8B = {
    "q8_0": (8.51, 0.001355),
    "q6_K": (6.57, 0.005452),
    "q5_0": (5.57, 0.022239),
    "q4_K_M": (4.90, 0.031273),
    "q4_0": (4.64, 0.071940),
    "q3_K_M": (4.00, 0.101913),
    "q3_K_S": (3.65, 0.228217),
    "q2_K": (3.17, 0.445132),
}


def made(scheme: str, path: Path, call: Call) -> str:
    """Quantize the sample; the warnings."""
    return call("quantize", LLAMA, "--scheme", scheme, "-o", path).err


@pytest.mark.parametrize(("scheme", "suffix"), [("q2_tensor", "qblk"), ("tq2_0", "gguf")])
def test_a_broken_model_is_told_by_both(
    scheme: str, suffix: str, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / f"m.{suffix}"
    warned = made(scheme, path, call)
    assert "warning: the model is broken" in warned or "tensors are lost" in warned
    found = call("verify", path, "--against", LLAMA)
    assert found.code == 1
    headline = found.out.splitlines()[-1]
    assert headline.startswith("FAIL  intact, but broken (worst ")
    assert headline.endswith("; not checked: perplexity (no --text)")


@pytest.mark.parametrize(
    ("scheme", "suffix"),
    [
        *(("q4_block64", "qblk"), ("q8_channel", "qblk"), ("c4_block16", "qblk")),
        *(("c2_block16", "qblk"), ("q4_k_m", "gguf"), ("iq4_xs", "gguf"), ("q3_k_m", "gguf")),
        ("q2_k", "gguf"),
    ],
)
def test_models_that_work_pass(scheme: str, suffix: str, tmp_path: Path, call: Call) -> None:
    path = tmp_path / f"m.{suffix}"
    assert "broken" not in made(scheme, path, call)
    found = json.loads(call("verify", path, "--against", LLAMA, "--json").out)
    assert (found["status"], found["warnings"]) == ("pass", [])
    assert (found["verdict"]["intact"], found["verdict"]["quality"]) == (True, "expected")


def test_compensated_codes_of_two_bits_are_not_called_broken(tmp_path: Path, call: Call) -> None:
    calibration, path = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    inputs = ROOT / "samples/activations.safetensors"
    call("calibrate", LLAMA, "--activations", inputs, "--gram", "-o", calibration)
    line = ("quantize", LLAMA, "--scheme", "c2_block16", "--calibration", calibration, "-o", path)
    told = json.loads(call(*line, "--json").out)
    assert sum(t["rounding"] == "compensated" for t in told["tensors"]) == 28
    assert not any("broken" in w for w in told["warnings"])
    found = json.loads(call("verify", path, "--against", LLAMA, "--json").out)
    assert found["verdict"]["quality"] in ("expected", "poor")
    assert min(t["sqnr_db"] or 99 for t in found["tensors"]) < USABLE_DB["MLP"]


def test_the_headline_says_what_was_judged(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    made("q4_block64", path, call)
    found = json.loads(call("verify", path, "--against", LLAMA, "--json").out)
    tensors = found["tensors"]
    bits = found["verdict"]["bits_per_weight"]
    assert (
        0 < 8 * path.stat().st_size / 4e6 - bits < 0.5
    )  # of tensors alone; the file has a tokenizer as well
    worst = min(t["sqnr_db"] for t in tensors if t["sqnr_db"] is not None)
    line = call("verify", path, "--against", LLAMA).out.splitlines()[-1]
    assert line == (
        f"PASS  intact, quality as expected of {bits:.1f} bits (worst {worst:.1f} dB); "
        "not checked: perplexity (no --text)"
    )
    alone = call("verify", path)
    assert alone.code == 0
    assert alone.out.splitlines()[-1] == "PASS  intact; not checked: quality (no --against)"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = call("verify", path, "--against", LLAMA)
    assert damaged.out.splitlines()[-1] == "FAIL  not intact: integrity failed"


def test_every_tensor_that_misses_a_limit_has_a_remedy_that_mends_it(
    tmp_path: Path, call: Call
) -> None:
    """The options are pasted as they stand; afterwards the same limit holds."""
    cases = (
        *(("qblk", "q4_block64", 21.7, False), ("qblk", "q4_block64", 24.0, True)),
        *(("gguf", "q3_k_m", 16.9, False), ("gguf", "q4_k_m", 30.0, True)),
    )
    for suffix, scheme, limit, whole in cases:
        path = tmp_path / f"m.{suffix}"
        made(scheme, path, call)
        check = ("verify", path, "--against", LLAMA, "--min-sqnr", limit)
        found = call(*check)
        assert found.code == 1
        assert "; limits missed: min-sqnr;" in found.out.splitlines()[-1]
        options = [ln.strip() for ln in found.out.splitlines() if ln.startswith("  --")]
        told = json.loads(call(*check, "--json").out)["tensors"]
        missed = sorted((t["sqnr_db"], t["name"]) for t in told if "min-sqnr" in t["fails"])
        assert {name for _, name in missed} == {
            t["name"] for t in told if t["sqnr_db"] is not None and t["sqnr_db"] < limit
        }
        # One scheme for all where most need one: nobody pastes a list of nearly every tensor.
        assert options[0].startswith("--scheme ") == whole
        assert (2 * len(missed) > sum(t["sqnr_db"] is not None for t in told)) == whole
        if whole:
            scheme = options.pop(0).removeprefix("--scheme ")
        words = shlex.split(" ".join(options))
        globs = [word.rpartition("=")[0] for word in words[1::2]]
        assert len(options) < len(missed)
        if not whole:
            assert all(any(fnmatchcase(name, glob) for glob in globs) for _, name in missed)
        again = call("quantize", LLAMA, "--scheme", scheme, "-o", path, "--force", *words)
        assert again.code == 0, again.err
        assert call(*check).code == 0


def test_a_remedy_is_one_word_of_a_shell_whatever_the_name() -> None:
    for name in ("a b", "it's", "x[0]*?", "$(touch y)"):
        option, word = shlex.split(remedy("qblk", name, 64, 4.0, 15.0))
        glob, _, scheme = word.rpartition("=")
        assert (option, scheme) == ("--tensor-scheme", "c4_block16")
        assert fnmatchcase(name, glob)
        assert not fnmatchcase(name + "0", glob)
    assert remedy("gguf", "w", 704, 4.5, 21.0) == "--tensor-scheme 'w=q5_1'"  # 704 = 2.75 x 256
    assert remedy("gguf", "w", 700, 4.5, 21.0) == "--tensor-scheme 'w=bf16'"
    assert remedy("mlx", "w", 64, 4.5, 21.0) == "--keep 'w'"


def test_classes_by_the_names_of_both_worlds() -> None:
    wanted = {
        "attention": "model.layers.0.self_attn.q_proj.weight blk.1.attn_output.weight "
        "encoder.layer.2.attention.output.dense.weight h.0.attn.c_proj.weight",
        "MLP": "model.layers.0.mlp.up_proj.weight blk.1.ffn_down.weight "
        "encoder.layer.2.output.dense.weight encoder.layer.2.intermediate.dense.weight",
        "embeddings": "model.embed_tokens.weight token_embd.weight "
        "embeddings.word_embeddings.weight transformer.wpe.weight",
        "output head": "lm_head.weight output.weight gpt_neox.embed_out.weight",
        "other tensors": "w pooler.dense.weight",
    }
    for of, names in wanted.items():
        assert {class_of(n) for n in names.split()} == {of}, names


def test_a_class_is_judged_by_all_its_weights() -> None:
    """10 log10 of the weights over the sum of weights times relative errors, by hand."""
    up, down = "layers.0.mlp.up.weight", "layers.0.mlp.down.weight"
    found = judge([Measured(up, "q", 4, 20.0, 300), Measured(down, "q", 2, 9.0, 100)])
    mean = (300 * 10**-2 + 100 * 10**-0.9) / 400
    assert found.classes == pytest.approx({"MLP": -10 * math.log10(mean)})
    assert found.broken == []  # one tensor of less in a class that is well
    found = judge([Measured(up, "q", 2, 9.3, 100), Measured(down, "q", 2, 9.1, 100)])
    (broken,) = found.broken
    assert (broken.name, broken.tensors, broken.count) == ("MLP", [down, up], 2)
    kept = Measured("layers.1.mlp.up.weight", "BF16", 16, None, 1000)
    assert judge([Measured(up, "q", 2, 9.3, 100), kept]).broken == []
    # The floor is above what the best four levels of all give (Max, 1960: 0.1175), and below what
    # two bits in blocks have in the sample (10.3 dB) and Q2_K (11.7 dB).
    assert -10 * math.log10(0.1175) < USABLE_DB["MLP"] < 10.3
    # Codes that make up for each other's errors give up weights for outputs.
    assert judge([Measured(up, "q", 2, 4.0, 1, compensated=True)]).broken == []
    assert judge([Measured(up, "q", 2, 3.0, 1, compensated=True)]).broken != []
    assert judge([Measured(up, "q", 2, 1.0, 1, repaired=True)]).broken == []
    # Embeddings bear more; below 6 dB nothing does.
    assert judge([Measured("embed.weight", "q", 2, 8.0)]).broken == []
    assert judge([Measured("embed.weight", "q", 2, LOST_DB - 0.1)]).lost == ["embed.weight"]


def test_outliers_are_those_below_the_median_of_their_kind() -> None:
    def kind(dbs: list[float], stored: str = "q4") -> list[Measured]:
        return [Measured(f"layers.{i}.mlp.up.weight", stored, 4, db) for i, db in enumerate(dbs)]

    (found,) = judge(kind([21.0, 22.0, 23.0, 15.4])).outliers
    assert (found.name, found.median_db, found.count) == ("layers.3.mlp.up.weight", 21.5, 4)
    assert judge(kind([21.0, 22.0, 23.0, 15.6])).outliers == []  # 5.9 dB below 21.5
    assert judge(kind([22.0, 23.0, 10.0])).outliers == []  # too few for a median
    other = [Measured("layers.9.mlp.down.weight", "q4", 4, 10.0)]
    assert judge([*kind([21.0, 22.0, 23.0, 22.0]), *other]).outliers == []  # of another role


def test_outliers_are_named(tmp_path: Path, call: Call) -> None:
    tensors = {f"layers.{i}.mlp.up.weight": gaussian(i, 64, 64) for i in range(6)}
    tensors["layers.4.mlp.up.weight"][0, 0] = 100
    source, path = save(tmp_path / "m.safetensors", tensors), tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q8_tensor_sym", "--range", "minmax", "-o", path)
    told = json.loads(call("verify", path, "--against", source, "--json").out)
    assert [o["name"] for o in told["outliers"]] == ["layers.4.mlp.up.weight"]
    text = call("verify", path, "--against", source).out
    assert text.splitlines()[-1].startswith(
        "PASS  intact, poorer than expected of 8.0 bits (worst "
    )
    assert ": 1 tensor, first of all 'layers.4.mlp.up.weight'; not checked" in text
    assert (
        call("verify", path, "--against", source, "--strict")
        .out.splitlines()[-1]
        .startswith("FAIL  intact, poorer than expected")
    )
    assert "outlier    'layers.4.mlp.up.weight' has " in text
    assert "median of the 6 tensors 'mlp.up' as q8_tensor_sym" in " ".join(text.split())


def test_products_are_not_judged_by_inputs_that_a_calibrated_range_never_sees(
    tmp_path: Path, call: Call
) -> None:
    """Inputs of another mean than the Gaussian ones have: as before a GELU, or behind one."""
    source = save(tmp_path / "m.safetensors", {"w.weight": gaussian(1, 64, 64)})
    x = save(tmp_path / "x.safetensors", {"w": np.abs(gaussian(2, 64, 64)) + np.float32(2)})
    calibration, path = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    call("calibrate", source, "--activations", x, "-o", calibration)
    call("quantize", source, "--scheme", "q8_channel", "--calibration", calibration, "-o", path)
    for mode in ("auto", "static"):
        done = call("verify", path, "--against", source, "--activations", mode, "--json")
        told = json.loads(done.out)
        (tensor,) = told["tensors"]
        assert (tensor["activations"], tensor["inputs"]) == ("static", "Gaussian")
        assert (tensor["output_sqnr_db"], told["warnings"], done.code) == (None, [], 0)
    told = json.loads(call("verify", path, "--against", source, "--samples", x, "--json").out)
    (tensor,) = told["tensors"]
    assert (tensor["activations"], tensor["inputs"]) == ("static", "recorded")
    assert tensor["output_sqnr_db"] > 30


def tokens(kl: float, blind: float, count: int = 1000) -> TokenQuality:
    zeros = dict.fromkeys(
        ("source_perplexity", "source_perplexity_error", "perplexity", "perplexity_error"), 1.0
    )
    return TokenQuality(
        *("t", 1, 8, "all", count, RAN),
        **zeros,
        perplexity_increase=0.0,
        perplexity_increase_error=0.0,
        kl_mean=kl,
        kl_mean_error=0.0,
        kl_p99=kl,
        kl_max=kl,
        same_top=1.0,
        kl_blind=blind,
    )


def test_divergence_is_held_against_a_blind_guess_and_against_its_bits() -> None:
    for bits, nats in LLAMA_3_8B.values():
        assert nats < expected_nats(bits)
        check, warning = judge_tokens(tokens(nats, 5.0), bits)
        assert (check.status, warning) == ("pass", None)
    check, _ = judge_tokens(tokens(1.39, 5.2), 2.15)  # IQ1_M there: four times the perplexity
    assert check == Check("predictions", "fail", check.detail, 1.39 / 5.2, 0.2)
    check, warning = judge_tokens(tokens(0.05, 5.0), 8.5)
    assert check.status == "pass"
    assert warning is not None
    assert "0.05 nats, where at most 0.005 are expected" in warning
    assert judge_tokens(tokens(1.0, 2.0, count=99), 4.0)[0].status == "skip"
    # A model that predicts nothing much has a blind guess that is good, too.
    assert judge_tokens(tokens(0.01, 0.01), 4.0)[0].status == "pass"


def test_embeddings_are_held_against_a_blind_guess_and_against_their_bits() -> None:
    def of(cosine: float, bits: float) -> tuple[str, bool]:
        quality = EmbeddingQuality("t", 250, 9, RAN, cosine, cosine, cosine, spread=0.869)
        check, warning = judge_embeddings(quality, bits)
        return check.status, warning is not None

    # all-MiniLM-L6-v2 on samples/sentences.txt: q8_channel, q4_block64, q3_channel, q4_tensor
    assert of(0.9997, 8.13) == ("pass", False)
    assert of(0.9647, 4.38) == ("pass", False)
    assert of(0.8322, 3.64) == ("pass", False)
    assert of(0.7304, 4.04) == ("fail", True)
    assert of(0.9647, 8.13) == ("pass", True)


def test_figures_of_products_name_their_inputs(tmp_path: Path, call: Call) -> None:
    source = save(tmp_path / "m.safetensors", {"w.weight": gaussian(1, 64, 64)})
    samples = save(tmp_path / "x.safetensors", {"w": gaussian(2, 16, 64) + np.float32(3)})
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q8_channel", "-o", path)
    check = ("verify", path, "--against", source, "--min-output-sqnr", 10)
    for more, inputs in (((), "Gaussian"), (("--samples", samples), "recorded")):
        found = json.loads(call(*check, *more, "--json").out)
        (detail,) = [c["detail"] for c in found["checks"] if c["id"] == "min-output-sqnr"]
        assert detail == f"lowest SQNR of a product of {inputs} inputs, in dB"


def test_remedies_of_all_layers_of_a_role_are_one_option() -> None:
    asked = {
        f"model.layers.{i}.{role}.weight": f"--tensor-scheme 'model.layers.{i}.{role}.weight=q4_k'"
        for i in range(3)
        for role in ("q", "k")
    }
    kept = {
        "model.layers.0.v.weight": None,
        "model.layers.1.v.weight": "--keep 'model.layers.1.v.weight'",
    }
    head = {"lm_head.weight": "--tensor-scheme 'lm_head.weight=q6_k'"}
    assert joined({**head, **asked, **kept}) == [
        "--tensor-scheme 'lm_head.weight=q6_k'",
        "--tensor-scheme 'model.layers.*.q.weight=q4_k'",
        "--tensor-scheme 'model.layers.*.k.weight=q4_k'",
        "--keep 'model.layers.1.v.weight'",
    ]
    # Another scheme in one layer, or a tensor that needs none, leaves each its own.
    asked["model.layers.1.q.weight"] = "--tensor-scheme 'model.layers.1.q.weight=q5_k'"
    asked["model.layers.1.k.weight"] = None  # type: ignore[assignment]
    assert len(joined(asked)) == 5
    # The star of layers.*.w reaches over the experts of a layer, whose weights need nothing.
    nested = {
        "layers.0.w.weight": "--tensor-scheme 'layers.0.w.weight=q4_k'",
        "layers.0.experts.1.w.weight": None,
    }
    assert joined(nested) == ["--tensor-scheme 'layers.0.w.weight=q4_k'"]


def test_what_a_scheme_for_all_gives_is_not_asked_for_again() -> None:
    """Half a model needs two bits' best, which nobody is advised: four bits do for three, too."""
    asked = {f"a{i}.weight": f"--tensor-scheme 'a{i}.weight=c2_block16'" for i in range(8)}
    more = {
        "b.weight": "--tensor-scheme 'b.weight=c3_block16'",
        "c.weight": "--tensor-scheme 'c.weight=q8_block32'",
    }
    assert mending({**asked, **more}, lossy=10) == [
        "--scheme c4_block16",
        "--tensor-scheme 'c.weight=q8_block32'",
    ]


def test_a_class_has_its_lost_tensors_too() -> None:
    """All of attention at 1.8 dB is an attention of 1.8 dB."""
    lost = [Measured(f"layers.{i}.self_attn.q_proj.weight", "tq2_0", 2, 1.8) for i in range(4)]
    good = [Measured(f"layers.{i}.mlp.up_proj.weight", "q4", 4, 21.0) for i in range(4)]
    judged = judge([*lost, *good])
    assert judged.classes == {"attention": pytest.approx(1.8), "MLP": pytest.approx(21.0)}
    assert judged.rest == {"MLP": pytest.approx(21.0)}  # the others are told of one by one
    assert len(judged.lost) == 4


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, call: Call) -> None:
    for option in ("--min-sqnr", "--max-nmse", "--min-output-sqnr"):
        done = call("verify", LLAMA, "--against", LLAMA, option, "nan")
        assert (done.code, done.out) == (2, "")
        assert option in done.err

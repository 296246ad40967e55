"""The outcomes in config_table.json hold: what is refused, what is taken, and with which keys.

transformers recorded what it computes (make_config_table.py); qconvert's half is replayed here, and
llama.cpp's where it is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_cases import (
    BASES,
    EVERY,
    EXACT,
    POSITIONS,
    TOLERANCE,
    Directories,
    changed,
    text,
    unfolded,
)
from family_models import ENCODERS

from qconvert.architectures import GgufSource, open_gguf_source
from qconvert.architectures.families import CONFIG_CLASSES
from qconvert.errors import InputError
from qconvert.files import open_model
from qconvert.files.gguf_writer import GgufValue

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("config_table.json").read_text())
WARNINGS = {
    "attends to all tokens": "window",
    "rotary factors": "longrope",
    "without effect": "unread",
    "by which transformers goes": "class",
    "rounds the bounds": "rounded",
    "by the length of a text": "dynamic",
}


def cases(name: str) -> Iterator[dict[str, Any]]:
    yield from TABLE["cases"][name]


def made(directories: Directories, name: str, case: dict[str, Any]) -> Path:
    shapes = unfolded(TABLE["tensors"][case["tensors"]])
    return directories.made(name, changed(BASES[name], case.get("changes", {})), shapes)


def label(name: str, case: dict[str, Any]) -> str:
    return f"{name}: {case['field']}: {case['value']}"


def opened(home: Path) -> GgufSource:
    return open_gguf_source(open_model(home))


def keys(source: GgufSource) -> dict[str, Any]:
    """Hyper-parameters and factors of rotary positions, as a reader finds them."""
    arch = source.metadata["general.architecture"]
    plain = {k: v.value if isinstance(v, GgufValue) else v for k, v in source.metadata.items()}
    found = {k: v for k, v in plain.items() if k.startswith(f"{arch}.")}
    for tensor in source.model.tensors:
        if tensor.name.startswith("rope_"):
            found[tensor.name] = source.model.values(tensor, 0, tensor.size).tolist()
    return found


@pytest.mark.parametrize("name", BASES)
def test_every_case_comes_out_as_recorded(name: str, tmp_path: Path) -> None:
    directories = Directories(tmp_path)
    base = keys(opened(made(directories, name, TABLE["bases"][name])))
    for case in cases(name):
        home, what = made(directories, name, case), label(name, case)
        if case["verdict"] == "refused":
            with pytest.raises(InputError) as refusal:
                opened(home)
            assert refusal.value.code == case["code"], what
            assert len(str(refusal.value)) < 1000, what
            continue
        source = opened(home)
        kinds = {k for w in source.warnings for words, k in WARNINGS.items() if words in w}
        assert sorted(kinds) == case.get("warnings", []), what
        found = keys(source)
        differing = {k: found.get(k) for k in [*base, *found] if found.get(k) != base.get(k)}
        wanted = case.get("keys", {})
        assert differing.keys() == wanted.keys(), what
        for key, value in wanted.items():
            number = isinstance(value, float | list)
            same = pytest.approx(value, rel=1e-5) if number else value
            assert differing[key] == same, f"{what}: {key}"


def test_no_case_is_a_fault_and_every_outcome_is_there() -> None:
    verdicts = {case["verdict"] for rows in TABLE["cases"].values() for case in rows}
    assert verdicts == {"equal", "no effect", "refused", "warned", "taken"}
    for name, rows in TABLE["cases"].items():
        limit = TOLERANCE.get(name, EXACT)
        for case in rows:
            what = label(name, case)
            if case["verdict"] in ("equal", "no effect"):
                assert case.get("difference", 0) <= limit, what
            if case["verdict"] == "equal":
                assert case["effect"] == "shapes" or case["effect"] > 0, what
            if case["verdict"] == "warned":
                assert {"window", "longrope", "rounded"} & set(case["warnings"]), what


def test_every_field_of_every_class_is_tried() -> None:
    assert {c.model_type for c in CONFIG_CLASSES} == {
        BASES[name]["model_type"] for name in TABLE["cases"]
    }
    for known in CONFIG_CLASSES:
        tried = {f for case in cases(known.model_type) for f in case["field"].split(", ")}
        fields = {*known.fields, *known.unused, *known.beside}
        fields -= {"text_config", "vision_config", "audio_config"}
        fields -= {"id2label", "num_labels"}  # of heads: test_encoders.py
        if known.inner:
            fields.discard("tie_word_embeddings")  # of the weights
        assert fields <= tried, known.name


def test_the_page_is_of_these_outcomes() -> None:
    from config_cases import TOKENS
    from config_document import document

    page = Path(__file__).parents[1] / "formats" / "gguf-configuration.md"
    assert page.read_text() == document(TABLE["cases"], TABLE["bases"], TOKENS)


@pytest.mark.parametrize("name", BASES)
def test_llama_cpp_computes_what_transformers_recorded(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp: pip install qconvert[llama]")
    from test_llama_cpp import loaded, outputs, write_gguf

    base, limit = TABLE["bases"][name], TOLERANCE.get(name, EXACT)
    path, directories = tmp_path / "m.gguf", Directories(tmp_path)
    for case in [base, *cases(name)]:
        # what has no effect, and the keys of the base, gives the file of the base
        if "outputs" not in case and not (case["verdict"] == "no effect" and "keys" in case):
            continue
        home = made(directories, name, case)
        with loaded(write_gguf(home, path)) as model:
            found = outputs(model, text(), encoder=name in ENCODERS)
        recorded = case if "outputs" in case else base
        for position, wanted in zip(POSITIONS, recorded["outputs"], strict=False):
            errors = np.abs(found[position, ::EVERY] - np.array(wanted))
            what = "base" if case is base else label(name, case)
            assert errors.max() <= limit * recorded["largest"], f"{what}, token {position}"

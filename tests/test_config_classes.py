"""The tables of configuration classes against transformers' own classes, where it is installed."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import pytest
from family_models import ENCODERS, STACKS

from qconvert.architectures.config_classes import BASE, BOOKKEEPING, ConfigClass
from qconvert.architectures.families import CONFIG_CLASSES, FAMILIES

transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
if not transformers.__version__.startswith("5.24."):
    pytest.skip("the tables are those of transformers 5.24", allow_module_level=True)

from huggingface_hub.errors import StrictDataclassClassValidationError  # noqa: E402
from transformers.models.auto import configuration_auto, modeling_auto  # noqa: E402

INNER = [c.inner[1] for c in CONFIG_CLASSES if c.inner]
BASE_FIELDS = {f.name for f in dataclasses.fields(transformers.PretrainedConfig)}


def theirs(known: ConfigClass) -> Any:
    return configuration_auto.CONFIG_MAPPING[known.model_type]


def named(known: ConfigClass) -> str:
    return known.name


@pytest.mark.parametrize("known", [*CONFIG_CLASSES, *INNER], ids=named)
def test_a_class_has_the_fields_of_transformers_and_no_others(known: ConfigClass) -> None:
    found = theirs(known)
    assert found.__name__ == known.name
    names = {f.name for f in dataclasses.fields(found)} - BASE_FIELDS
    assert names == set(known.fields) | set(known.unused)
    assert not set(known.fields) & set(known.unused)
    assert not set(known.harmless) & (names | set(known.beside) | BASE)


@pytest.mark.parametrize("known", [*CONFIG_CLASSES, *INNER], ids=named)
def test_defaults_are_those_of_transformers(known: ConfigClass) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(theirs(known))}
    for name, (_, default) in known.fields.items():
        assert (type(default), default) == (type(defaults[name]), defaults[name]), name


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -7, 1.0, 0.5, "a", "", [], [1], [1.0], ["a"], ["a", 1], [None]),
    *({}, {"a": 1}),
]


@pytest.mark.parametrize("known", [*CONFIG_CLASSES, *INNER], ids=named)
def test_a_field_takes_the_types_that_transformers_takes(known: ConfigClass) -> None:
    validators = theirs(known).__validators__
    for name in known.fields:
        for value in VALUES:
            try:
                for validator in validators[name]:
                    validator(value)
                taken = True
            except (TypeError, ValueError):
                taken = False
            assert known.takes(name, value) == taken, (name, value)


@pytest.mark.parametrize("known", CONFIG_CLASSES, ids=named)
def test_second_names_and_the_base_of_rotary_positions(known: ConfigClass) -> None:
    found = theirs(known)
    # transformers may turn it round: the field is stored under the second name
    pairs = {frozenset(pair) for pair in found.attribute_map.items()}
    assert {frozenset(pair) for pair in known.aliases.items()} == pairs
    names = {f.name for f in dataclasses.fields(found)}
    assert not set(known.aliases) & names
    computed = {n for n, v in vars(found).items() if isinstance(v, property)}
    assert all(name in names | computed for name in known.aliases.values())
    theta = found.default_theta
    assert known.theta == (theta["global"] if isinstance(theta, dict) else theta)


# Models that transformers runs with another family's class.
AS_ANOTHER = dict.fromkeys(("internlm3", "exaone"), "LlamaForCausalLM")
# A model type may stand for several classes of models, of which these are the first.
FIRST = list({known.model_type: known for known in reversed(CONFIG_CLASSES)}.values())


@pytest.mark.parametrize("known", FIRST, ids=named)
def test_a_model_type_alone_means_the_first_class(known: ConfigClass) -> None:
    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if known.model_type in ENCODERS:
        mapping = modeling_auto.MODEL_MAPPING_NAMES
    elif known.model_type in STACKS:
        mapping = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    elif known.inner:
        mapping = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if known.model_type in AS_ANOTHER:  # checkpoints name a class of their own
        assert mapping[known.model_type] == AS_ANOTHER[known.model_type]
        assert not hasattr(transformers, known.architectures[0])
        return
    assert known.architectures[0] == mapping[known.model_type]
    for name in known.architectures:
        assert getattr(transformers, name).config_class.__name__ in (
            known.name,
            known.inner[1].name if known.inner else None,
        )


def test_what_transformers_removes_from_every_configuration_is_known() -> None:
    assert BASE_FIELDS <= BASE | BOOKKEEPING
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    assert generation <= BOOKKEEPING


def test_each_class_is_of_one_row() -> None:
    rows = [name for family in FAMILIES for name in family.classes]
    assert sorted(rows) == sorted({name for c in CONFIG_CLASSES for name in c.architectures})


def test_annotations_are_of_the_kinds_compared_here() -> None:
    """Validators of annotations that are texts would take everything, and compare nothing."""
    for known in CONFIG_CLASSES:
        for f in dataclasses.fields(theirs(known)):
            if f.name in known.fields:
                union = typing.get_origin(f.type) is typing.Union
                plain = isinstance(f.type, type | types.UnionType | types.GenericAlias)
                assert plain or union, f.name
                assert typing.get_origin(f.type) in (None, types.UnionType, typing.Union), f.name


# What else a width of 66 has to be equal to, or a divisor of, in some classes.
BESIDE_66 = {
    "mamba2": {"num_heads": 33, "head_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 4},
    "bamba": {"mamba_n_heads": 4},
}


@pytest.mark.parametrize("known", CONFIG_CLASSES, ids=named)
def test_whether_the_width_has_to_be_a_multiple_of_the_heads(known: ConfigClass) -> None:
    # whose modules, not its class, refuse it
    if known.inner or known.model_type in (*ENCODERS, *STACKS):
        return
    try:
        fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        if isinstance(vars(theirs(known)).get("head_dim"), property):
            del fields["head_dim"]  # it is computed
        theirs(known)(hidden_size=66, **fields | BESIDE_66.get(known.model_type, {}))
        divides = False
    except StrictDataclassClassValidationError:
        divides = True
    assert known.divides == divides

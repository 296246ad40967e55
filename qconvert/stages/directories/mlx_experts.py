"""Experts as MLX has them: one stack for all of a layer, under names of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qconvert.errors import InputError
from qconvert.model import Model, TensorInfo
from qconvert.stages.moving import config_of

_PARTS = ("gate_proj", "down_proj", "up_proj")
# By the kind of model: what parts of experts are called in transformers, and in mlx-lm 0.32; and
# the field of the configuration that says how many experts there are.
EXPERTS: Mapping[str, tuple[Mapping[str, str], str]] = {
    "mixtral": (dict(zip(("w1", "w2", "w3"), _PARTS, strict=True)), "num_local_experts"),
    "qwen3_moe": ({name: name for name in _PARTS}, "num_experts"),
}
STACK = "switch_mlp"
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight", re.ASCII)


def stacked(model: Model) -> Model:
    """A model whose experts are stacked, each stack where its first expert was; the same model
    where no kind of it is known that has some.

    Raises:
        InputError: experts are missing or there twice, or of several shapes or dtypes.
    """
    config = config_of(model) or {}
    kind = str(config.get("model_type"))
    if kind not in EXPERTS:
        return model
    from qconvert.architectures.mapped import MappedModel, MappedTensor, described  # 0.1 s

    names, field = EXPERTS[kind]
    stacks: dict[str, dict[str, TensorInfo]] = {}
    order: list[str | TensorInfo] = []
    for tensor in model.tensors:
        found = _EXPERT.fullmatch(tensor.name)
        if found is None or found[3] not in names:
            order.append(tensor)
            continue
        name = f"{found[1]}.{STACK}.{names[found[3]]}.weight"
        if name not in stacks:
            order.append(name)
        experts, number = stacks.setdefault(name, {}), found[2].lstrip("0") or "0"
        if number in experts:
            raise InputError(
                "two tensors are the same expert",
                path=model.path,
                tensor=tensor.name,
                found=f"'{experts[number].name}' too",
                code="ARCH-EXPERTS",
            )
        experts[number] = tensor
    if not stacks:
        return model
    mapped = []
    for item in order:
        if isinstance(item, TensorInfo):
            mapped.append(MappedTensor(item, (item,)))
            continue
        each = _checked(model, item, stacks[item], config.get(field))
        shape = len(each), *each[0].shape
        mapped.append(MappedTensor(described(item, shape, each[0].dtype), tuple(each)))
    return MappedModel(model, mapped)


def _checked(
    model: Model, name: str, experts: Mapping[str, TensorInfo], count: object
) -> Sequence[TensorInfo]:
    """The experts of a stack, in order.

    Args:
        experts: by their numbers, decimal without zeros before them.

    Raises:
        InputError: they are not those that the configuration says, or differ.
    """
    # The length comes first: the number is one of a file, and a list of so many might not fit.
    counted = type(count) is int and len(experts) == count
    order = [str(i) for i in range(len(experts))]
    if not counted or experts.keys() != set(order):
        raise InputError(
            "experts are not those that the configuration says",
            path=model.path,
            tensor=name,
            found=f"{len(experts)} experts",
            wanted=f"{count} experts, counted from 0",
            code="ARCH-EXPERTS",
        )
    found = [experts[number] for number in order]
    other = next((e for e in found if (e.shape, e.dtype) != (found[0].shape, found[0].dtype)), None)
    if other is not None:
        raise InputError(
            "experts to be stacked differ",
            path=model.path,
            tensor=other.name,
            found=f"{other.dtype} {list(other.shape)}",
            wanted=f"{found[0].dtype} {list(found[0].shape)}",
            code="ARCH-EXPERT-DTYPES",
        )
    return found

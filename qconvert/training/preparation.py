"""A live model made ready for quantization-aware training, and integer layers of it afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qconvert.errors import UnsupportedError, UsageError
from qconvert.running.integer_layers import QuantizedEmbedding, QuantizedLinear
from qconvert.running.integer_path import read_matrix
from qconvert.schemes import TensorScheme, parse_scheme
from qconvert.stages.plan import MIN_VALUES, PlannedTensor, PlanOptions, make_plan
from qconvert.training.activations import KINDS, OBSERVERS, FakeInput
from qconvert.training.live import IN_MEMORY, LiveModel, named_tensors
from qconvert.training.modules import FakeWeight, InputHook, WeightHook, detach_hooks
from qconvert.training.weights import check_trainable

RECORD = "_qconvert_training"  # of a prepared model: its `Training`
WEIGHT_CHILD, INPUT_CHILD = "fake_weight", "fake_input"


@dataclass
class Training:
    """What a model was prepared for.

    Attributes:
        scheme: as asked for.
        asked: what else was.
        plan: of its tensors, with the choices of symmetric or asymmetric that were made.
        weights: fake quantization by the names of the tensors.
        inputs: likewise of the inputs of the linear layers that have them.
    """

    scheme: TensorScheme
    asked: PlanOptions
    plan: tuple[PlannedTensor, ...]
    weights: dict[str, FakeWeight]
    inputs: dict[str, FakeInput]

    @property
    def learned(self) -> bool:
        """Whether scales are parameters."""
        return any(weight.scale is not None for weight in self.weights.values())

    @property
    def activations(self) -> str | None:
        """How inputs become bytes."""
        return next((m.kind for m in self.inputs.values()), None)


def prepare_model(
    model: Any,
    scheme: str | TensorScheme,
    *,
    activations: str | None = None,
    observer: str = "ema",
    keep: Sequence[str] = (),
    tensor_scheme: Mapping[str, str] | None = None,
    learn: bool = False,
    learn_inputs: bool = False,
) -> Training:
    """Put fake quantization into a model, in place.

    Other args and errors as of `qconvert.torch.prepare`.

    Args:
        learn_inputs: whether scales of static inputs are learned, where those of weights are not.
    """
    _check_model(model)
    if getattr(model, RECORD, None) is not None:
        raise UsageError("the model is prepared already", hint="prepare the float model once")
    if activations is not None and activations not in KINDS:
        raise UsageError("activations", found=activations, wanted=f"None, {', '.join(KINDS)}")
    if observer not in OBSERVERS:
        raise UsageError(
            "an observer that goes along with training", found=observer, wanted=", ".join(OBSERVERS)
        )
    asked = _trainable(scheme)
    others = tuple((glob, _trainable(s)) for glob, s in (tensor_scheme or {}).items())
    tensors = named_tensors(model, lambda m: False)
    live = LiveModel(tensors)
    options = PlanOptions(tuple(keep), others)
    plan = make_plan(live.tensors, asked, options)
    owners = _owners(model)
    weights = _weights(plan, tensors, owners, learn=learn)
    settled = [_settled(p, weights.get(p.tensor.name)) for p in plan]
    if not weights:
        raise UsageError(
            "nothing of the model takes the scheme",
            found=f"{len(plan)} tensors, all kept: {plan[0].reason if plan else 'none there'}",
            wanted=f"matrices of at least {MIN_VALUES:,} values",
        )
    inputs = _inputs(weights, tensors, owners, activations, observer, learn=learn or learn_inputs)
    for name, weight in weights.items():
        found = owners[id(tensors[name])]
        # A child of one module only: what it learns has one name, wherever it is used.
        first, parameter = found[0]
        first.add_module(f"{WEIGHT_CHILD}_{parameter}", weight)
        for owner, parameter in found:
            WeightHook(weight, parameter).attach(owner)
        if name in inputs:
            linear = [owner for owner, _ in found if type(owner) is torch.nn.Linear]
            linear[0].add_module(INPUT_CHILD, inputs[name])
            for owner in linear:
                InputHook(inputs[name]).attach(owner)
    training = Training(asked, options, tuple(settled), weights, inputs)
    object.__setattr__(model, RECORD, training)
    return training


def _weights(
    plan: Sequence[PlannedTensor],
    tensors: Mapping[str, Any],
    owners: Mapping[int, list[tuple[Any, str]]],
    *,
    learn: bool,
) -> dict[str, FakeWeight]:
    """Of the parameters that take a scheme."""
    found = {}
    for p in plan:
        name = p.tensor.name
        tensor = tensors[name]
        if p.scheme is None or not isinstance(tensor, torch.nn.Parameter):
            continue
        if learn and p.scheme.family != "affine":
            raise UsageError(
                "scales can be learned of schemes with scale and zero point alone",
                found=f"{p.scheme.name} of '{name}'",
                wanted="q..._tensor, _channel or _block...",
                hint="leave out learn=True: scales then follow from the weights",
            )
        _check_owners(name, owners[id(tensor)])
        found[name] = FakeWeight(p.tensor, p.scheme, tensor, learn=learn)
    return found


def _settled(p: PlannedTensor, weight: FakeWeight | None) -> PlannedTensor:
    """A tensor of the plan with the choice that was made for it."""
    if weight is not None:
        return replace(p, scheme=weight.scheme)
    if p.scheme is not None:
        return replace(p, scheme=None, reason="a buffer, which is not trained")
    return p


def _trainable(scheme: str | TensorScheme) -> TensorScheme:
    return check_trainable(parse_scheme(scheme) if isinstance(scheme, str) else scheme)


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise UsageError("model", found=type(model).__name__, wanted="a torch.nn.Module")


def _owners(model: Any) -> dict[int, list[tuple[Any, str]]]:
    """The modules of each parameter, and its name in them."""
    found: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def _check_owners(name: str, owners: list[tuple[Any, str]]) -> None:
    """Refuse parameters that other modules than their own compute with.

    Raises:
        UnsupportedError: there is one.
    """
    kinds = (torch.nn.ParameterList, torch.nn.ParameterDict)
    inner = torch.nn.modules.linear.NonDynamicallyQuantizableLinear  # of MultiheadAttention
    for module, _ in owners:
        if isinstance(module, (*kinds, inner)):
            raise UnsupportedError(
                "another module computes with this weight than the one that has it",
                path=IN_MEMORY,
                tensor=name,
                found=type(module).__name__,
                wanted="a module that uses its own weights in its forward, such as Linear",
                hint=f"keep it: keep=['{name}']",
                code="TRAIN-OWNER",
            )


def _inputs(
    weights: Mapping[str, FakeWeight],
    tensors: Mapping[str, Any],
    owners: Mapping[int, list[tuple[Any, str]]],
    activations: str | None,
    observer: str,
    *,
    learn: bool,
) -> dict[str, FakeInput]:
    """Of the linear layers that run in integers."""
    if activations is None:
        return {}
    found = {
        name: FakeInput(name, activations, observer, learn=learn).to(tensors[name].device)
        for name, weight in weights.items()
        if weight.encoding.multiplies
        and any(type(m) is torch.nn.Linear for m, _ in owners[id(tensors[name])])
    }
    if not found:
        raise UsageError(
            "no linear layer has codes to multiply in integers",
            found=f"activations={activations!r}",
            wanted="None with this scheme",
            hint="schemes q... and c... multiply in integers",
        )
    return found


def training_of(model: Any) -> Training:
    """What a model was prepared for.

    Raises:
        UsageError: it was not, or it has other tensors since.
    """
    _check_model(model)
    found: Training | None = getattr(model, RECORD, None)
    if found is None:
        raise UsageError(
            "the model is not prepared", hint="qconvert.torch.prepare(model, scheme) comes first"
        )
    return found


def live_tensors(model: Any, training: Training) -> dict[str, Any]:
    """The tensors of a prepared model, those of the fake quantization left out.

    Raises:
        UsageError: they are others than when it was prepared.
    """
    found = named_tensors(model, lambda m: isinstance(m, FakeWeight | FakeInput))
    wanted = {p.tensor.name: p.tensor.shape for p in training.plan}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        changed = sorted(dict(shapes.items() ^ wanted.items()))
        raise UsageError(
            "the model has other tensors than when it was prepared",
            found=f"{len(changed)}, such as '{changed[0]}'",
            hint="change the model first, then prepare it",
        )
    return found


def freeze_ranges(model: Any) -> int:
    """Have the observers of static activations look no more; how many there are."""
    inputs = [m for m in training_of(model).inputs.values() if m.kind == "static"]
    for m in inputs:
        m.frozen.fill_(True)
    return len(inputs)


def convert_model(model: Any) -> Any:
    """Exchange the modules of a prepared model for those that `load_model` gives, in place.

    Args and errors as of `qconvert.torch.convert`.
    """
    training = training_of(model)
    tensors = live_tensors(model, training)
    owners = _owners(model)
    places = {id(m): name for name, m in model.named_modules()}
    for name, weight in training.weights.items():
        stored = weight.stored(tensors[name])
        matrix = read_matrix(stored) if weight.encoding.multiplies else None
        values = None
        for owner, parameter in owners[id(tensors[name])]:
            _strip(owner)
            new: Any = None
            if matrix is not None and parameter == "weight" and type(owner) is torch.nn.Linear:
                how = training.inputs[name].how() if name in training.inputs else None
                new = QuantizedLinear(matrix, owner.bias, how)
            elif matrix is not None and type(owner) is torch.nn.Embedding:
                new = QuantizedEmbedding(matrix, owner.padding_idx)
            if new is not None and places[id(owner)]:
                parent, _, last = places[id(owner)].rpartition(".")
                setattr(model.get_submodule(parent), last, new)
                continue
            if values is None:
                values = torch.from_numpy(
                    stored.values(0, tensors[name].numel()).reshape(tensors[name].shape)
                ).to(tensors[name])
                values = torch.nn.Parameter(values, requires_grad=False)
            owner._parameters[parameter] = values
    delattr(model, RECORD)
    return model.eval().requires_grad_(False)


def _strip(module: Any) -> None:
    """Take fake quantization out of a module."""
    detach_hooks(module)
    for name, child in list(module._modules.items()):
        if isinstance(child, FakeWeight | FakeInput):
            del module._modules[name]

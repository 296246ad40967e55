"""A run of tune whose model is a directory of floats."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.errors import UsageError
from qconvert.files.equalised import Exponents
from qconvert.progress import Progress
from qconvert.running.device import chosen_device, on_device
from qconvert.running.hugging_face import open_checkpoint
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import PlanOptions
from qconvert.training.block_stage import names_in_blocks, refusing
from qconvert.training.loop import CLIP, Student, passes
from qconvert.training.options import TuneOptions
from qconvert.training.preparation import Training, prepare_model
from qconvert.training.run import Run

TRIED = 16  # tokens that tell whether a model is run block by block
OBSERVED = 8  # batches that static ranges of the untrained model are taken from


class FloatRun(Run):
    """See `Run`; the model is loaded as floats.

    Attributes:
        in_blocks: parameters that are inside of blocks, where those are trained first.
        exponents: by which the tensors of the last student were rescaled.
    """

    exponents: Mapping[str, Exponents]

    def __init__(self, source: Path, options: TuneOptions, progress: Progress) -> None:
        threads = options.threads or available_threads()
        loaded = open_checkpoint(source, threads=threads, device=chosen_device(options.device))
        self.in_blocks: set[str] = set()
        if options.blocks:
            tokens = np.arange(min(options.seqlen, TRIED))
            with refusing(source):  # before the long work
                self.in_blocks = names_in_blocks(loaded, tokens)
        super().__init__(source, options, progress, loaded)

    def prepare(self, exponents: Mapping[str, Exponents] | None = None) -> Student:
        """A student from the model as it is, or with channels rescaled."""
        o = self.options
        model = copy.deepcopy(self.loaded.model)
        self.exponents = dict(exponents or {})
        with torch.no_grad():
            for name, found in self.exponents.items():
                weight = model.get_parameter(name)
                shape = tuple(weight.shape)
                values = found.applied(weight.numpy(force=True).ravel(), shape, 0).reshape(shape)
                weight.copy_(torch.from_numpy(values))
        training = prepare_model(
            model,
            o.grid,
            activations=None if o.activations == "none" else o.activations,
            keep=o.keep,
            tensor_scheme={glob: scheme.name for glob, scheme in o.tensor_schemes},
            learn_inputs=o.trained in ("all", "scales"),
        )
        parameters, earlier = _trained(model, training, o)
        for name, module in training.inputs.items():
            if module.clip is not None:
                parameters[f"{name}/{CLIP}"] = module.clip
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        student = Student(
            replace(self.loaded, model=model.eval()),
            training,
            parameters,
            earlier,
            only_scales=o.trained == "scales",
            gains=o.trained == "all",
        )
        self._observe(student)
        return student

    def _observe(self, student: Student) -> None:
        """Give static activations their first ranges."""
        if self.options.activations != "static":
            return
        inputs = self.split.training.inputs[: OBSERVED * self.options.batch]
        with torch.no_grad(), student.observing():
            for part in passes(*inputs.shape):
                ids = on_device(inputs[part], student.checkpoint.model)
                student.checkpoint.model(input_ids=ids, use_cache=False)


def _trained(
    model: Any, training: Training, o: TuneOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that are trained end to end, by name, where that is not scales alone, and
    those that only blocks are trained by.

    Raises:
        UsageError: there are none.
    """
    kept = PlanOptions(keep=o.keep)
    infos = {p.tensor.name: p.tensor for p in training.plan}
    norms = {
        f"{place}.{name}".lstrip(".")
        for place, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    norms = {
        n for n in norms & infos.keys() if not any(kept.matches(infos[n], glob) for glob in o.keep)
    }
    weights = set(training.weights)
    every = weights | norms
    chosen = {"weights": weights, "norms": norms, "all": every, "scales": set()}[o.trained]
    of_blocks = set() if not o.blocks else weights if o.trained == "weights" else every
    named = dict(model.named_parameters())
    found = {name: p for name, p in named.items() if name in chosen}
    earlier = {name: p for name, p in named.items() if name in of_blocks - chosen}
    if not found and o.trained != "scales":
        raise UsageError(
            f"--train {o.trained}: the model has nothing of that kind to train",
            hint="--keep may have taken it out",
        )
    return found, earlier

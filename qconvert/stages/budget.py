"""Which scheme each tensor takes so that the whole keeps a budget and loses the least.

With a calibration that has the Fisher information, a loss is the predicted divergence of next
tokens, in nats. Without, it is the relative squared error of a tensor, weighed by its size and by
what tensors of its role have been found to need: an order, not a prediction.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qconvert import __version__
from qconvert.calibration.digest import model_digest
from qconvert.calibration.file import Calibration
from qconvert.codecs.codec import Facts
from qconvert.errors import UsageError
from qconvert.files import OpenModel
from qconvert.files.equalised import noted
from qconvert.files.regular import file_sha256
from qconvert.model import Model, TensorInfo
from qconvert.progress import Progress
from qconvert.report import Prediction
from qconvert.schemes import TENSOR_SCHEMES
from qconvert.stages.assignment import Assignment, assign
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.quantize_options import Budget, QuantizeOptions
from qconvert.stages.sensitivities import (
    KEPT,
    Loss,
    Measuring,
    Sensitivities,
    read_sensitivities,
    sensitivity_of,
)
from qconvert.stages.target import Prepared, Target

ASKED_FOR = ("--tensor-", "--output-tensor-", "--token-embedding-")
INFORMED = "calibrate with --text and --fisher, and give the file with --calibration"
FITS = 3  # times that a size is aimed at, for the header depends on what is chosen

# Bits more or less than the others that tensors of a role need for the least loss, from measured
# divergences of a small llama; an error of b bits is worth 4^b.
ROLES = (
    (re.compile(r"lm_head|embed_out|^output\.weight"), 1.3),
    (re.compile(r"embed|token_embd|wte\."), 0.3),
    (re.compile(r"k_proj|v_proj|attn_k\.|attn_v\.|\.(key|value)\."), 0.4),
    (re.compile(r"down_proj|ffn_down|\.w2\.|fc2|c_proj|dense_4h_to_h"), 0.25),
    (re.compile(r"up_proj|ffn_up|\.w3\.|o_proj|attn_output"), -0.2),
    (re.compile(r"q_proj|attn_q\.|\.query\."), -0.4),
)


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided.

    Attributes:
        options: with the scheme of each tensor.
        prepared: the conversion with them.
        prediction: for the report, and what the file says of it.
        sizes: bytes of the tensors that a scheme was chosen for.
        losses: of them, in nats; none without Fisher information.
    """

    options: QuantizeOptions
    prepared: Prepared
    prediction: Prediction
    sizes: dict[str, int]
    losses: dict[str, float]

    def expect(self, losses: Mapping[str, float]) -> None:
        """Tell other losses of the tensors, in nats, those of the rounding that they get."""
        assert self.prediction.kl is not None
        self.prediction.kl_nearest = self.prediction.kl
        self.prediction.kl = sum(losses.values())
        self.prepared.provenance["prediction"]["kl"] = float(f"{self.prediction.kl:.6g}")


def within_budget(
    target: Target,
    opened: OpenModel,
    plain: Model,
    options: QuantizeOptions,
    output: Path,
    container: str,
    calibration: Calibration | None,
    progress: Progress,
) -> Decided:
    """Choose a scheme for each tensor that the options leave open.

    Raises:
        UsageError: a budget that cannot be met, with the least and the most that can; nothing is
            left open; a limit of the divergence without gradients.
        InputError: sensitivities or a calibration of something else.
    """
    budget = options.budget
    assert budget
    if budget.divergence is not None and not (calibration and calibration.has_fisher):
        raise UsageError("--max-kl needs to know how much errors matter", hint=INFORMED)
    prepared = target.prepare(opened, plain, options, output)
    choices = choices_of(prepared, options, plain, container, calibration, progress)
    found = choices.within(budget, prepared)
    for _ in range(FITS):
        assigned = {
            name: None if scheme == KEPT else TENSOR_SCHEMES[scheme]
            for name, scheme in choices.schemes(found).items()
        }
        chosen = replace(options, assigned=assigned)
        again = target.prepare(opened, plain, chosen, output)
        if budget.size is None:
            break
        if choices.total(found, again) <= budget.size:
            break
        found = choices.within(budget, again)
    informed = choices.informed
    prediction = Prediction(
        budget=budget.name,
        basis="Fisher information" if informed else "priors by role",
        kl=found.loss if informed else None,
        optimal=found.optimal,
        gap=found.gap if informed else None,
        measured=choices.measured,
        sensitivities=str(budget.sensitivities) if budget.sensitivities else None,
        without=choices.without,
    )
    again.provenance["prediction"] = {
        "basis": prediction.basis,
        **({"kl": float(f"{found.loss:.6g}")} if informed else {}),
    }
    sizes = choices.sizes(found)
    losses = choices.losses(found) if informed else {}
    return Decided(chosen, again, prediction, sizes, losses)


def choices_of(
    prepared: Prepared,
    options: QuantizeOptions,
    plain: Model,
    container: str,
    calibration: Calibration | None,
    progress: Progress,
) -> Choices:
    """What the tensors that the options leave open may take, measured where it is not known.

    Raises:
        UsageError: nothing is left open.
        InputError: sensitivities or a calibration of something else.
    """
    tensors = [p.tensor for p in prepared.plan if _open_to_choice(p)]
    if not tensors:
        raise UsageError("a budget with no tensor left to choose a scheme for")
    informed = calibration if calibration and calibration.has_fisher else None
    known, measured = _measured(
        tensors, prepared, options, plain, container, calibration, informed, progress
    )
    return Choices(tensors, known, informed is not None, measured)


def _open_to_choice(p: PlannedTensor) -> bool:
    """Whether it is quantized, and nobody has asked for another scheme."""
    if p.scheme is None or p.scheme.for_vectors:  # norms and biases, which GGUF has in float32
        return False
    return not any(option in p.reason for option in ASKED_FOR)


def _measured(
    tensors: list[TensorInfo],
    prepared: Prepared,
    options: QuantizeOptions,
    plain: Model,
    container: str,
    calibration: Calibration | None,
    informed: Calibration | None,
    progress: Progress,
) -> tuple[Sensitivities, int]:
    """Losses of every tensor, from the file if there is one, and how many had to be measured."""
    weighting = calibration if options.weighting else None
    layers = prepared.layers_of(weighting.layers.keys()) if weighting else {}

    def facts(tensor: TensorInfo) -> Facts:
        layer = layers.get(tensor.name)
        return Facts(
            options.range,
            partial(weighting.mean_squares, layer) if weighting and layer else lambda _: None,
            prepared.importance(tensor),
            tables=True,
        )

    assert options.budget
    bound = {
        "model": _digest(plain),
        "calibration": calibration.sha256() if calibration else None,
        "container": container,
        "--range": options.range.describe() if options.range else None,
        "--no-weighting": not options.weighting,
        "--imatrix": file_sha256(options.gguf.imatrix) if options.gguf.imatrix else None,
        "version": __version__,
    }
    path = options.budget.sensitivities
    known = read_sensitivities(path, bound) if path and path.exists() else Sensitivities(bound)
    measuring = Measuring(
        prepared.model,
        container,
        facts,
        lambda t: sensitivity_of(informed, prepared.model, t) if informed else None,
    )
    missing = measuring.missing(tensors, known)
    if missing:
        measuring.measure(missing, known, options.threads or available_threads(), progress)
        if path:
            inputs = [plain.path, *filter(None, (options.calibration, options.gguf.imatrix))]
            known.write(path, inputs)
    return known, len(missing)


def _digest(model: Model) -> str:
    """Of the model, and of all that was done to its channels."""
    found, done = model_digest(model), noted(model)
    return hashlib.sha256(f"{found} {done}".encode()).hexdigest() if done else found


class Choices:
    """What each tensor may take, and what it costs and loses then.

    Attributes:
        informed: whether losses are nats.
        measured: pairs of a tensor and a scheme that were measured now.
        without: tensors whose sensitivity is not known though that of others is: they are taken to
            lose as much of a nat for an error as the others do in the mean.
    """

    def __init__(
        self, tensors: Sequence[TensorInfo], known: Sensitivities, informed: bool, measured: int
    ) -> None:
        self._tensors = tensors
        self.measured = measured
        self._losses = [known.losses[t.name] for t in tensors]
        self.without: list[str] = []
        if informed:
            pairs = zip(tensors, self._losses, strict=True)
            self.without = [t.name for t, found in pairs if _unknown(found)]
        self.informed = informed and len(self.without) < len(tensors)
        if informed and not self.informed:
            raise UsageError(
                "the calibration has no Fisher information of any tensor",
                hint="calibrate this model with --text and --fisher",
            )
        self._mean = self._mean_of_known() if self.without else 0.0

    def within(self, budget: Budget, prepared: Prepared) -> Assignment:
        """The choice of least loss, or under a limit of the loss that of least bytes.

        Raises:
            UsageError: there is none.
        """
        costs = [[float(loss.nbytes) for loss in found.values()] for found in self._losses]
        losses = [
            [self._loss(tensor, loss) for loss in found.values()]
            for tensor, found in zip(self._tensors, self._losses, strict=True)
        ]
        if budget.divergence is not None:
            turned = assign(losses, costs, budget.divergence)
            if turned is None:
                least = sum(map(min, losses))
                raise _impossible("--max-kl", budget.divergence, f"at least {least:.3g} nats")
            return Assignment(turned.picks, turned.loss, turned.cost, turned.optimal, turned.gap)
        fixed = _fixed(prepared.plan, self._tensors)
        least, most = (sum(map(f, costs)) for f in (min, max))
        if budget.bits is not None:
            limit = budget.bits * _weights(prepared) / 8 - fixed
            if budget.preset:
                limit = max(limit, least)  # shapes may allow no less
            found = assign(costs, losses, limit)
            if found is None:
                ends = [f"{end:.3f}" for end in self.ends(prepared)]
                raise _impossible("--target-bpw", budget.bits, f"{ends[0]} to {ends[1]}")
            return found
        assert budget.size is not None
        beside = fixed + prepared.overhead()
        found = assign(costs, losses, budget.size - beside)
        if found is None:
            ends = [f"{round(end + beside):,}" for end in (least, most)]
            raise _impossible("--target-size", f"{budget.size:,}", f"{ends[0]} to {ends[1]} bytes")
        return found

    def uniform(self, scheme: str) -> Assignment | None:
        """One scheme for all tensors that can take it; those that cannot take the smallest of no
        fewer bytes than it has elsewhere. None where no tensor can.
        """
        bits = [
            loss.nbytes / tensor.size
            for tensor, found in zip(self._tensors, self._losses, strict=True)
            if (loss := found.get(scheme))
        ]
        if not bits:
            return None
        picks = []
        for tensor, found in zip(self._tensors, self._losses, strict=True):
            names, sizes = list(found), [loss.nbytes for loss in found.values()]
            enough = [k for k, n in enumerate(sizes) if n >= min(bits) * tensor.size]
            least = min(enough, key=sizes.__getitem__) if enough else sizes.index(max(sizes))
            picks.append(names.index(scheme) if scheme in found else least)
        chosen = [
            (tensor, list(found.values())[pick])
            for tensor, found, pick in zip(self._tensors, self._losses, picks, strict=True)
        ]
        cost = sum(loss.nbytes for _, loss in chosen)
        total = sum(self._loss(tensor, loss) for tensor, loss in chosen)
        return Assignment(tuple(picks), float(cost), total, optimal=False, gap=0.0)

    def sqnr_db(self, found: Assignment) -> float | None:
        """Of all weights that a scheme is chosen for, each tensor's error by its own energy; None
        where nothing is lost.
        """
        triples = zip(self._tensors, self._losses, found.picks, strict=True)
        error = sum(t.size * list(losses.values())[pick].nmse for t, losses, pick in triples)
        weights = sum(t.size for t in self._tensors)
        return -10 * math.log10(error / weights) if error else None

    def schemes(self, found: Assignment) -> dict[str, str]:
        """The scheme of each tensor."""
        triples = zip(self._tensors, self._losses, found.picks, strict=True)
        return {t.name: list(losses)[pick] for t, losses, pick in triples}

    def total(self, found: Assignment, prepared: Prepared) -> int:
        """Bytes of the files, at most."""
        return round(found.cost) + _fixed(prepared.plan, self._tensors) + prepared.overhead()

    def ends(self, prepared: Prepared) -> tuple[float, float]:
        """Least and most bits per weight that the whole can have."""
        fixed = _fixed(prepared.plan, self._tensors)
        least, most = (
            sum(f(loss.nbytes for loss in losses.values()) for losses in self._losses)
            for f in (min, max)
        )
        weights = _weights(prepared)
        return 8 * (least + fixed) / weights, 8 * (most + fixed) / weights

    def sizes(self, found: Assignment) -> dict[str, int]:
        """Bytes of each tensor."""
        triples = zip(self._tensors, self._losses, found.picks, strict=True)
        return {t.name: list(losses.values())[pick].nbytes for t, losses, pick in triples}

    def losses(self, found: Assignment) -> dict[str, float]:
        """What each tensor loses."""
        triples = zip(self._tensors, self._losses, found.picks, strict=True)
        return {t.name: self._loss(t, list(losses.values())[pick]) for t, losses, pick in triples}

    def _loss(self, tensor: TensorInfo, loss: Loss) -> float:
        if not self.informed:
            return float(tensor.size * loss.nmse * 4.0 ** _extra_bits(tensor.name))
        if loss.kl is not None:
            return loss.kl
        return self._mean * tensor.size * loss.nmse

    def _mean_of_known(self) -> float:
        """Nats for the relative squared error of a weight."""
        known = [
            (loss.kl, tensor.size * loss.nmse)
            for tensor, found in zip(self._tensors, self._losses, strict=True)
            for loss in found.values()
            if loss.kl is not None
        ]
        energy = sum(nmse for _, nmse in known)
        return sum(kl for kl, _ in known) / energy if energy else 0.0


def unknown_sensitivities(without: list[str]) -> list[str]:
    """A warning where the sensitivity of tensors is not known, though that of others is."""
    if not without:
        return []
    return [
        f"the calibration does not say how much errors of {len(without)} tensors matter, such as "
        f"'{without[0]}': they are taken for as sensitive as the others"
    ]


def _unknown(losses: Mapping[str, Loss]) -> bool:
    return any(loss.kl is None for loss in losses.values())


def _fixed(plan: Sequence[PlannedTensor], chosen: Sequence[TensorInfo]) -> int:
    """Bytes of the tensors that nothing is chosen for."""
    names = {tensor.name for tensor in chosen}
    return sum(p.encoding.size(p.tensor.shape) for p in plan if p.tensor.name not in names)


def _weights(prepared: Prepared) -> int:
    return sum(p.tensor.size for p in prepared.plan)


def _extra_bits(name: str) -> float:
    return next((bits for pattern, bits in ROLES if pattern.search(name)), 0.0)


def _impossible(option: str, found: object, wanted: str) -> UsageError:
    return UsageError(f"{option}: no mix of schemes meets it", found=found, wanted=wanted)

"""What tune trains on and judges by, and which of its models is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconvert.errors import InputError, UnsupportedError
from qconvert.files.atomic import check_space, machine_errors
from qconvert.files.saved_state import SavedState
from qconvert.quantities import counted
from qconvert.report import JudgedModel, TuneReport
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.quality import F64, Scores, Windows, mean, perplexity, windows
from qconvert.running.text import check_positions, read_text
from qconvert.training.options import FEWEST_WINDOWS, TuneOptions
from qconvert.training.sentences import sentence_windows

SET_ASIDE = 10  # one window of so many chooses the state, and another one judges
MOST_SET_ASIDE = 16  # windows of each
COMPARED = 1 << 16  # characters of the text that both tokenizers have to agree on
WRITTEN = 2  # states at most beside the output: the last one, while the next is written
SURE = 2  # standard errors that a gain should have
FLOAT, NEAREST, COMPENSATED, TUNED = "float", "nearest", "compensated", "tuned"
QUANTIZED = "quantized"  # a file as it was
WORDS = {
    NEAREST: "nearest rounding",
    COMPENSATED: "compensated rounding",
    QUANTIZED: "the file as it was",
}


def check_disk(state: SavedState, size_of_state: int) -> None:
    """Refuse early where the disk has no room for the state; one of two may be there already."""
    with machine_errors(state.path):
        there = state.path.stat().st_size if state.path.exists() else 0
    check_space(state.path, WRITTEN * size_of_state - there)


@dataclass(frozen=True, slots=True)
class Split:
    """Windows of the text: to train on, to choose a state by, and to judge it."""

    training: Windows
    validation: Windows
    judging: Windows


def split(loaded: Checkpoint, o: TuneOptions) -> Split:
    """The windows of the text, in an order that the seed decides.

    Raises:
        UsageError: windows are longer than the model's positions.
        InputError: the text cannot be read or is too short.
    """
    check_positions(loaded.text, o.seqlen)
    encoder = loaded.kind == "encoder"
    if encoder:
        found = sentence_windows(loaded.tokenizer, o.text, o.seqlen, o.nsamples, o.seed)
    else:
        found = windows(loaded.tokenizer, o.text, o.seqlen, "all", o.nsamples, o.seed)
    count = len(found.inputs)
    if count < FEWEST_WINDOWS:
        raise InputError(
            "the text is too short to tune by",
            path=o.text,
            found=counted(count, "line")
            if encoder
            else f"{counted(count, 'window')} of {o.seqlen:,} tokens",
            wanted=f"at least {FEWEST_WINDOWS}: one to train on, one to choose by, one to judge by",
            hint="give more text, or a smaller --seqlen",
            code="TEXT-SHORT",
        )
    order = np.random.default_rng(o.seed).permutation(count)
    aside = max(1, min(count // SET_ASIDE, MOST_SET_ASIDE))

    def taken(part: slice) -> Windows:
        return Windows(found.inputs[order[part]], found.targets[order[part]], found.first)

    return Split(taken(slice(2 * aside, None)), taken(slice(aside)), taken(slice(aside, 2 * aside)))


def part(of: Windows, chosen: slice) -> Windows:
    """Some of the windows."""
    return Windows(of.inputs[chosen], of.targets[chosen], of.first)


def joined(*several: Windows) -> Windows:
    """All windows of several."""
    inputs, targets = ([getattr(w, name) for w in several] for name in ("inputs", "targets"))
    return Windows(np.concatenate(inputs), np.concatenate(targets), several[0].first)


def mixed(text: Windows, other: Windows, count: int) -> Windows:
    """So many windows: the others once each, and those of the text again and again, evenly spread
    among each other.
    """
    of_text = max(0, count - len(other.inputs))
    both = joined(text, other)
    places = [np.arange(of_text) % len(text.inputs), len(text.inputs) + np.arange(count - of_text)]
    shares = [(np.arange(len(p)) + 0.5) / max(1, len(p)) for p in places]
    order = np.concatenate(places)[np.argsort(np.concatenate(shares), kind="stable")]
    return Windows(both.inputs[order], both.targets[order], text.first)


def check_teacher(loaded: Checkpoint, teacher: Checkpoint, text: Path) -> None:
    """Refuse a teacher whose predictions are of other tokens.

    Raises:
        UnsupportedError: they are.
    """
    sizes = [int(c.model.config.get_text_config().vocab_size) for c in (teacher, loaded)]
    if sizes[0] != sizes[1]:
        raise UnsupportedError(
            "the teacher has another vocabulary than the model",
            path=teacher.path,
            found=f"{sizes[0]:,} tokens",
            wanted=f"{sizes[1]:,}",
        )
    sample = read_text(text)[:COMPARED]
    one, other = (c.tokenizer(sample)["input_ids"] for c in (teacher, loaded))
    if one != other:
        raise UnsupportedError(
            "the teacher has another vocabulary than the model: it makes other tokens of the text",
            path=teacher.path,
            found=f"{len(one):,} tokens",
            wanted=f"the {len(other):,} of the model",
        )


def judged(name: str, scores: Scores | F64) -> JudgedModel:
    """Figures of a model: of next tokens, or of the distances of embeddings."""
    if isinstance(scores, Scores):
        divergence, found = mean(scores.divergence), perplexity(scores.nll)
        return JudgedModel(name, divergence.value, divergence.error, found.value, found.error)
    distance = mean(scores)
    return JudgedModel(name, cosine_mean=1 - distance.value, cosine_mean_error=distance.error)


def noted(models: Sequence[JudgedModel]) -> dict[str, dict[str, float]]:
    """The same for the provenance of a file."""
    found = {}
    for j in models:
        named = {"kl": j.kl_mean, "perplexity": j.perplexity, "cosine": j.cosine_mean}
        found[j.model] = {k: float(f"{v:.6g}") for k, v in named.items() if v is not None}
    return found


def decide(
    losses: Mapping[str, F64],
    untrained: Sequence[str],
    report: TuneReport,
    *,
    anyway: bool,
    adapters: bool = False,
) -> None:
    """Which model is written, and what is said of it.

    Args:
        losses: of the models on the judging windows, token by token.
        untrained: those of them that are written where training was no gain; the best is.
        anyway: whether the tuned one is written in any case.
        adapters: whether nothing is written but what was trained.
    """
    unit = report.unit
    fallback = min(untrained, key=lambda name: float(losses[name].mean()))
    report.chosen = fallback
    instead = f"the file is that of {WORDS[fallback]}, which was not trained"
    if adapters:
        instead = "no adapters are written"
    if TUNED not in losses:
        report.warnings.append(f"no step was better than none on the validation windows: {instead}")
        return
    gain = mean(losses[fallback] - losses[TUNED])
    report.gain, report.gain_error = gain.value, gain.error
    better = gain.value > 0
    if better or anyway:
        report.chosen = TUNED
    if not better:
        written = "the tuned one is written all the same (--anyway)"
        if report.chosen != TUNED:
            written = instead
        much = f"{-gain.value:.2g} ± {gain.error:.1g} {unit} worse"
        if not np.isfinite(gain.value):
            much = "what it predicts is no number"
        report.warnings.append(
            f"the tuned model is not better than {WORDS[fallback]} on the judging windows "
            f"({much}): {written}"
        )
    elif gain.value < SURE * gain.error:
        report.notes.append(
            f"the gain of {gain.value:.2g} {unit} is less than {SURE} standard errors of it "
            f"({gain.error:.1g} each): more text would tell whether it is one"
        )

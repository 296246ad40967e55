"""Perplexity, divergence and cosine against hand-made distributions and torch's own functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconvert.errors import InputError, UsageError
from qconvert.running import quality
from qconvert.running.quality import (
    BlindGuess,
    Scores,
    compare_logits,
    mean,
    perplexity,
    perplexity_increase,
    windows,
)


def scores(source: list[float], quantized: list[float]) -> Scores:
    count = len(source)
    return Scores(
        np.asarray(source), np.asarray(quantized), np.zeros(count), np.ones(count, np.bool_)
    )


def test_two_tokens_by_hand() -> None:
    """p = (1/4, 3/4) against q = (1/2, 1/2), and q = p shifted by a constant."""
    source = np.asarray([[0.0, math.log(3)], [0.0, math.log(3)]], np.float32)
    quantized = np.asarray([[7.0, 7.0], [-2.0, math.log(3) - 2]], np.float32)
    found = compare_logits(source, quantized, np.asarray([0, 1]))
    assert found.source_nll == pytest.approx([math.log(4), math.log(4 / 3)], rel=1e-6)
    assert found.nll == pytest.approx([math.log(2), math.log(4 / 3)], rel=1e-6)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.divergence == pytest.approx([kl, 0], abs=1e-7)
    # A tie has the first token on top.
    assert found.same_top.tolist() == [False, True]


def test_impossible_tokens_add_nothing_and_missed_ones_everything() -> None:
    ninf = -math.inf
    source = np.asarray([[0.0, 0.0, ninf], [0.0, 0.0, 0.0]])
    quantized = np.asarray([[0.0, 0.0, ninf], [0.0, 0.0, ninf]])
    found = compare_logits(source, quantized, np.asarray([0, 0]))
    assert found.divergence.tolist() == [0, math.inf]


def test_large_logits_do_not_overflow() -> None:
    logits = np.asarray([[3e38, 0.0], [-3e38, -3e38]], np.float32)
    found = compare_logits(logits, logits, np.asarray([0, 0]))
    assert found.nll.tolist() == pytest.approx([0, math.log(2)])
    assert found.divergence.tolist() == [0, 0]


def test_tiles_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 23, 11)).astype(np.float32)
    targets = rng.integers(0, 11, 23)
    whole = compare_logits(a, b, targets)
    monkeypatch.setattr(quality, "TILE_LOGITS", 50)
    cut = compare_logits(a, b, targets)
    assert whole.divergence.tolist() == cut.divergence.tolist()
    assert whole.nll.tolist() == cut.nll.tolist()
    assert whole.same_top.tolist() == cut.same_top.tolist()


def test_perplexity_of_a_uniform_guess_is_the_number_of_tokens() -> None:
    found = compare_logits(np.zeros((9, 50)), np.ones((9, 50)), np.arange(9))
    assert perplexity(found.nll).value == pytest.approx(50)
    assert perplexity(found.nll).error == pytest.approx(0, abs=1e-9)


def test_standard_errors_by_the_formula_of_llama_perplexity() -> None:
    """sqrt((mean of squares - square of mean) / (count - 1)), times the perplexity."""
    nll = [2.0, 3.5, 1.0, 4.0, 2.5]
    square, average = sum(v * v for v in nll) / 5, sum(nll) / 5
    error = math.sqrt((square - average**2) / 4)
    assert mean(np.asarray(nll)).error == pytest.approx(error)
    found = perplexity(np.asarray(nll))
    assert found.value == pytest.approx(math.exp(2.6))
    assert found.error == pytest.approx(math.exp(2.6) * error)


def test_the_error_of_an_increase_is_that_of_the_pairs() -> None:
    found = perplexity_increase(scores([1.0, 5.0, 3.0], [1.1, 5.1, 3.1]))
    assert found.value == pytest.approx(math.exp(0.1) - 1)
    assert found.error == pytest.approx(0, abs=1e-12)
    spread = perplexity_increase(scores([1.0, 1.0], [1.0, 1.2]))
    assert spread.error == pytest.approx(math.exp(0.1) * 0.1)


def test_the_blind_guess_is_the_mean_of_the_distributions() -> None:
    """Two positions sure of different tokens: the mean is (1/2, 1/2), log 2 away from each."""
    sure = np.asarray([[0.0, -math.inf], [-math.inf, 0.0]])
    blind = BlindGuess()
    compare_logits(sure, sure, np.asarray([0, 1]), blind)
    assert blind.divergence == pytest.approx(math.log(2))
    # p = (1/4, 3/4) and (3/4, 1/4): mean (1/2, 1/2)
    skewed = np.log(np.asarray([[0.25, 0.75], [0.75, 0.25]]))
    blind = BlindGuess()
    for row in skewed:  # sums add up over calls
        compare_logits(row[None], row[None], np.asarray([0]), blind)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert blind.divergence == pytest.approx(kl)
    same = BlindGuess()
    compare_logits(skewed[[0, 0]], skewed, np.asarray([0, 0]), same)
    assert same.divergence == pytest.approx(0, abs=1e-12)


def test_the_spread_of_directions_is_their_distance_from_their_mean() -> None:
    blind = BlindGuess()
    for direction in ([1.0, 0.0], [0.0, 1.0]):
        blind.add_direction(np.asarray(direction))
    assert blind.spread == pytest.approx(0.5)  # (1/2, 1/2) is sqrt(1/2) away from both


# --- windows --------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a letter: its place in the alphabet; BOS is 99."""

    def __init__(self, begins: bool) -> None:
        self.bos_token_id = 99
        self.begins = begins

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        begin = [99] if self.begins and add_special_tokens else []
        return {"input_ids": begin + [ord(c) - ord("a") for c in text]}


@pytest.fixture
def alphabet(tmp_path: Path) -> Path:
    path = tmp_path / "alphabet.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    return path


def test_every_token_is_scored_given_bos_and_its_window(alphabet: Path) -> None:
    found = windows(Letters(True), alphabet, 8)
    assert found.first == 0
    assert found.targets.tolist() == [list(range(i, i + 8)) for i in (0, 8, 16)]
    assert found.inputs.tolist() == [[99, *range(i, i + 7)] for i in (0, 8, 16)]


def test_without_bos_the_first_of_a_window_is_not_scored(alphabet: Path) -> None:
    found = windows(Letters(False), alphabet, 8)
    assert found.inputs.tolist() == [list(range(i, i + 7)) for i in (0, 8, 16)]
    assert found.targets.tolist() == [list(range(i + 1, i + 8)) for i in (0, 8, 16)]


def test_second_half_is_what_llama_perplexity_scores(alphabet: Path) -> None:
    """Of the tokens with BOS in front: windows of 8, BOS in place of the first, 5 to 7 scored."""
    found = windows(Letters(True), alphabet, 8, "second-half")
    assert found.inputs.tolist() == [
        [99, 0, 1, 2, 3, 4, 5, 6],
        [99, 8, 9, 10, 11, 12, 13, 14],
        [99, 16, 17, 18, 19, 20, 21, 22],
    ]
    assert found.first == 4
    assert found.targets.tolist() == [[4, 5, 6], [12, 13, 14], [20, 21, 22]]


def test_drawn_windows_are_some_of_all(alphabet: Path) -> None:
    every = windows(Letters(True), alphabet, 4).targets.tolist()
    some = windows(Letters(True), alphabet, 4, nsamples=3, seed=5).targets.tolist()
    assert len(some) == 3
    assert all(w in every for w in some)
    assert some != every[:3]


@pytest.mark.parametrize("scoring", ["all", "second-half"])
def test_a_short_text_is_refused_with_both_numbers(alphabet: Path, scoring: str) -> None:
    with pytest.raises(InputError, match=r"too short, found 2[67] tokens, wanted at least 40"):
        windows(Letters(True), alphabet, 40, scoring)


def test_more_windows_than_there_are_is_refused(alphabet: Path) -> None:
    with pytest.raises(InputError, match=r"too short, found 3 windows"):
        windows(Letters(True), alphabet, 8, nsamples=4)


@pytest.mark.parametrize(("seqlen", "scoring"), [(3, "all"), (8, "half")])
def test_impossible_windows_are_refused(alphabet: Path, seqlen: int, scoring: str) -> None:
    with pytest.raises(UsageError):
        windows(Letters(True), alphabet, seqlen, scoring)


# --- torch's own functions ------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # of torch's import
def test_scores_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="install qconvert[hf]")
    functional = torch.nn.functional
    rng = np.random.default_rng(7)
    source = (5 * rng.standard_normal((40, 300))).astype(np.float32)
    quantized = source + rng.standard_normal((40, 300)).astype(np.float32) / 4
    targets = rng.integers(0, 300, 40)
    found = compare_logits(source, quantized, targets)
    one, other = torch.from_numpy(source).double(), torch.from_numpy(quantized).double()
    nll = functional.cross_entropy(other, torch.from_numpy(targets), reduction="none")
    assert found.nll == pytest.approx(nll.numpy(), rel=1e-12)
    kl = functional.kl_div(
        functional.log_softmax(other, -1),
        functional.log_softmax(one, -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert found.divergence == pytest.approx(kl.numpy(), rel=1e-10)
    same = one.argmax(-1) == other.argmax(-1)
    assert found.same_top.tolist() == same.tolist()

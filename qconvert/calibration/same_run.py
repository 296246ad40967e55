"""Whether what an interrupted calibration has left is of the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from qconvert.calibration.collected import Collected
from qconvert.calibration.document import TextRun
from qconvert.files.saved_state import SavedState


def check_same_run(
    saved: SavedState,
    state: Collected,
    mine: Collected,
    more: Mapping[str, tuple[object, object]],
) -> TextRun:
    """Refuse a state that another command has left.

    Args:
        saved: where the state is.
        mine: the run that is to go on from it, as it begins.
        more: what else must be equal: the state's, and that of the run.

    Returns:
        How far the run came.

    Raises:
        InputError: names the first difference.
    """
    theirs, wanted = state.run, mine.run
    assert wanted
    pairs: dict[str, tuple[object, object]] = {
        "model": (state.model, mine.model),
        "text or activations": (state.inputs, mine.inputs),
        "observer": (asdict(state.settings), asdict(mine.settings)),
        "--seqlen": (theirs and theirs.seqlen, wanted.seqlen),
        "--nsamples": (theirs and theirs.nsamples, wanted.nsamples),
        "--seed": (theirs and theirs.seed, wanted.seed),
        "number of pieces": (theirs and theirs.chunks, wanted.chunks),
        **more,
    }
    saved.check_same(pairs)
    assert theirs
    return theirs

"""What to ask `quantize` for where a tensor has lost too much: the next scheme that should do."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qconvert.roles import place_of


@dataclass(frozen=True, slots=True)
class Rung:
    """A scheme that may be advised.

    Attributes:
        bits: per weight, of all that is stored.
        sqnr_db: of the poorest matrix of the sample model and of all-MiniLM-L6-v2.
        row: what the length of rows has to divide by.
    """

    scheme: str
    bits: float
    sqnr_db: float
    row: int = 1


_QBLK = (
    Rung("c2_block16", 2.4, 10.1),
    Rung("c2z_block16", 2.6, 11.2),
    Rung("c3_block16", 3.4, 16.4),
    Rung("c4_block16", 4.4, 22.6),
    Rung("c5_block16", 5.4, 29.3),
    Rung("c6_block16", 6.4, 34.8),
    Rung("q8_block32", 8.5, 43.8),
    Rung("bf16", 16, 50.0),
    Rung("f32", 32, math.inf),
)
_GGUF = (
    Rung("q2_k", 2.625, 11.3, 256),
    Rung("q3_k", 3.4375, 16.1, 256),
    Rung("q4_k", 4.5, 22.3, 256),
    Rung("iq4_nl", 4.5, 21.8, 32),
    Rung("q5_k", 5.5, 28.4, 256),
    Rung("q5_1", 6, 27.8, 32),
    Rung("q6_k", 6.5625, 34.5, 256),
    Rung("q8_0", 8.5, 43.8, 32),
    Rung("bf16", 16, 50.0),
    Rung("f32", 32, math.inf),
)
PATTERNS = 2000  # of names in a model; with more of them it has no layers
FINE_DB = 15.0  # what four bits should at least have, for tensors whose weights are gone
MIXES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # what is asked of a whole model
_FINE = {"qblk": "c4_block16", "gguf": "q4_k"}  # rungs of few bits that models are known to bear
ADVISED = {container: MIXES.get(rung, rung) for container, rung in _FINE.items()}
FEW = 6  # tensors: so many may each be named
LADDERS = {"qblk": _QBLK, "gguf": _GGUF}
_SPECIAL = re.compile(r"[\[*?]")


def remedy(container: str, name: str, columns: int, bits: float, needed_db: float) -> str:
    """The option of `quantize` that gives a tensor what it needs, to be pasted into a shell.

    Args:
        container: a key of `qconvert.containers.CONTAINERS`.
        name: of the tensor in the file, which is the name that the option is asked by.
        columns: of its rows.
        bits: per weight that it takes now.
        needed_db: SQNR that it should have.
    """
    if container not in LADDERS:  # a directory, whose readers take one scheme, or none
        return keeping(name)
    return taking(name, _advised(container, columns, bits, needed_db))


def keeping(name: str) -> str:
    """The option of `quantize` that leaves a tensor as it is, for a shell."""
    return f"--keep {_quoted(_glob(name))}"


def taking(name: str, scheme: str) -> str:
    """The option of `quantize` that gives a tensor a scheme, for a shell."""
    return f"--tensor-scheme {_quoted(f'{_glob(name)}={scheme}')}"


def _glob(name: str) -> str:
    """The glob of one name, whose signs stand for themselves."""
    return _SPECIAL.sub(lambda found: f"[{found[0]}]", name)


def mending(remedies: Mapping[str, str | None], lossy: int) -> list[str]:
    """Options of `quantize` to paste: another scheme for the whole model where more than half of
    its tensors need one, and what single tensors need beyond it; see `joined`.

    Args:
        lossy: tensors that have lost anything.
    """
    needed = {name: _asked_scheme(option) for name, option in remedies.items()}
    schemes = {scheme for scheme in needed.values() if scheme}
    container, ladder = next(
        (c, found)
        for c, rungs in LADDERS.items()
        if schemes <= set(found := [rung.scheme for rung in rungs])
    )
    asked = {name: ladder.index(s) for name, s in needed.items() if s}
    if 2 * len(asked) <= max(lossy, FEW):
        return joined(remedies)
    (usual, _), *_ = Counter(asked.values()).most_common(1)
    chosen = max(usual, ladder.index(_FINE[container]))
    rest = {
        name: None if asked.get(name, len(ladder)) <= chosen else option
        for name, option in remedies.items()
    }
    scheme = ladder[chosen]
    return [f"--scheme {MIXES.get(scheme, scheme)}", *joined(rest)]


def _asked_scheme(option: str | None) -> str:
    """The scheme that an option names; empty where it names none."""
    return (_scheme_of(option) or ("", ""))[1].removeprefix("=")


def joined(remedies: Mapping[str, str | None]) -> list[str]:
    """Options to paste, in the order of their tensors; one for all layers of a role where these
    all need the same.

    Args:
        remedies: the option of each tensor of the file by its name, see `remedy`; None for those
            that need none.
    """
    pattern = {name: place_of(name).pattern for name in remedies}
    needed: dict[str, set[tuple[str, str] | None]] = {}
    for name, option in remedies.items():
        needed.setdefault(pattern[name], set()).add(_scheme_of(option))
    found: dict[str, None] = {}
    shared: dict[str, str | None] = {}
    for name, option in remedies.items():
        if option is None:
            continue
        if pattern[name] not in shared:
            shared[pattern[name]] = _shared(pattern[name], name, needed)
        found[shared[pattern[name]] or option] = None
    return list(found)


def _shared(
    pattern: str, name: str, needed: Mapping[str, set[tuple[str, str] | None]]
) -> str | None:
    """The option for all tensors of a pattern; None where they do not need the same, or the pattern
    is one tensor's name.
    """
    asked, *others = needed[pattern]
    if others or asked is None or pattern == name or _SPECIAL.search(name):
        return None
    # A star reaches over dots, so that a glob may be of tensors with another pattern too.
    if len(needed) > PATTERNS or any(
        n != {asked} for p, n in needed.items() if fnmatchcase(p, pattern)
    ):
        return None
    return f"{asked[0]} {_quoted(pattern + asked[1])}"


def _scheme_of(option: str | None) -> tuple[str, str] | None:
    """An option and what follows the glob of its value."""
    if option is None:
        return None
    flag, value = shlex.split(option)
    _, equals, scheme = value.rpartition("=") if flag == "--tensor-scheme" else ("", "", "")
    return flag, equals + scheme


def _quoted(text: str) -> str:
    """A word of a shell, in quotes whether it needs them or not."""
    return f"'{text}'" if "'" not in text else shlex.quote(text)


def _advised(container: str, columns: int, bits: float, needed_db: float) -> str:
    """The smallest scheme of more bits that should come to so many dB; see `remedy`."""
    fitting = [r for r in LADDERS[container] if columns % r.row == 0]
    more = [r for r in fitting if r.bits > bits and r.sqnr_db >= needed_db]
    return more[0].scheme if more else fitting[-1].scheme

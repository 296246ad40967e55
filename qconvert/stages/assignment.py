"""One choice for each of many items: the least loss within a limit of the cost, exactly.

The multiple-choice knapsack problem. Items are taken one after the other; of the partial choices so
far only those stay that none beats in both cost and loss, and whose loss together with the least
that the Lagrangian of the rest allows (the lower convex hulls of the items, whose steps are taken
in the order of their gain) is below the best choice known: that of the Lagrangian, improved by
exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
MOST_STATES = 1 << 13  # partial choices that are kept; beyond, the best by their bounds
SLACK = 1e-12  # of sums in float64, relative


@dataclass(frozen=True, slots=True)
class Assignment:
    """What was chosen.

    Attributes:
        picks: of each item, an index of its choices.
        cost, loss: of all together.
        optimal: whether nothing better exists; else it may by ``gap`` at most.
        gap: of the loss, by the Lagrangian.
    """

    picks: tuple[int, ...]
    cost: float
    loss: float
    optimal: bool
    gap: float


def assign(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], limit: float
) -> Assignment | None:
    """The choice of least loss whose cost is at most a limit; None if there is no such choice.

    Args:
        costs, losses: of the choices of each item, at least one, finite.
    """
    limit += SLACK * abs(limit)
    items = [_Item.of(c, e) for c, e in zip(costs, losses, strict=True)]
    if sum(item.cost[0] for item in items) > limit:
        return None
    # Where little is at stake comes last: bounds are close by then.
    order = sorted(range(len(items)), key=lambda i: items[i].loss[-1] - items[i].loss[0])
    items = [items[i] for i in order]
    bounds = _suffix_bounds(items)
    known = _exchanged(items, _rounded(items, limit), limit)
    found, complete = _search(items, bounds, limit, known)
    picks = [0] * len(items)
    for place, item, pick in zip(order, items, found, strict=True):
        picks[place] = int(item.index[pick])
    total = [sum(float(table[i][p]) for i, p in enumerate(picks)) for table in (costs, losses)]
    gap = 0.0 if complete else max(0.0, total[1] - float(bounds[0].at(np.array([limit]))[0]))
    return Assignment(tuple(picks), total[0], total[1], complete, gap)


@dataclass(frozen=True, slots=True)
class _Item:
    """Choices that none beats, by rising cost and falling loss; ``index`` is where they were."""

    cost: F64
    loss: F64
    index: I64

    @classmethod
    def of(cls, costs: Sequence[float], losses: Sequence[float]) -> _Item:
        cost, loss = np.asarray(costs, np.float64), np.asarray(losses, np.float64)
        order = np.lexsort((loss, cost))
        best = np.minimum.accumulate(np.concatenate(([np.inf], loss[order][:-1])))
        kept = order[loss[order] < best]
        return cls(cost[kept], loss[kept], kept)

    def hull(self) -> list[int]:
        """Choices on the lower convex hull."""
        found: list[int] = []
        for k in range(len(self.cost)):
            while len(found) > 1:
                a, b = found[-2], found[-1]
                before = (self.loss[b] - self.loss[a]) * (self.cost[k] - self.cost[a])
                if before < (self.loss[k] - self.loss[a]) * (self.cost[b] - self.cost[a]):
                    break
                found.pop()
            found.append(k)
        return found


@dataclass(frozen=True, slots=True)
class _Bound:
    """The least loss of some items by what they may cost, if choices could be mixed."""

    cost: F64
    loss: F64

    def at(self, limits: F64) -> F64:
        """inf where not even the cheapest choices fit."""
        found: F64 = np.interp(limits, self.cost, self.loss, left=np.inf)
        return found


def _steps(items: list[_Item]) -> list[tuple[float, int, int, int, float, float]]:
    """Steps along the hulls in the order of their gain: that, the item, its choices before and
    after, what the step costs, and how it changes the loss.
    """
    found = []
    for i, item in enumerate(items):
        hull = item.hull()
        for a, b in pairwise(hull):
            cost, gain = float(item.cost[b] - item.cost[a]), float(item.loss[b] - item.loss[a])
            found.append((gain / cost, i, a, b, cost, gain))
    return sorted(found)


def _suffix_bounds(items: list[_Item]) -> list[_Bound]:
    """Of the items from each on, and of none."""
    steps = _steps(items)
    of = np.array([step[1] for step in steps], np.int64)
    costs = np.array([step[4] for step in steps])
    gains = np.array([step[5] for step in steps])
    found: list[_Bound] = []
    for k in range(len(items) + 1):
        cost = sum(float(item.cost[0]) for item in items[k:])
        loss = sum(float(item.loss[0]) for item in items[k:])
        rest = of >= k
        found.append(
            _Bound(
                np.cumsum(np.concatenate(([cost], costs[rest]))),
                np.cumsum(np.concatenate(([loss], gains[rest]))),
            )
        )
    return found


def _rounded(items: list[_Item], limit: float) -> list[int]:
    """Steps along the hulls in the order of their gain, those that still fit."""
    picks = [0] * len(items)
    room = limit - sum(float(item.cost[0]) for item in items)
    for _, i, a, b, cost, _ in _steps(items):
        if picks[i] == a and cost <= room:
            picks[i] = b
            room -= cost
    return picks


def _exchanged(items: list[_Item], picks: list[int], limit: float) -> list[int]:
    """Better choices of single items, with what fits, until there are none."""
    picks = list(picks)
    room = limit - sum(float(item.cost[p]) for item, p in zip(items, picks, strict=True))
    while True:
        best = (0.0, -1, -1)
        for i, item in enumerate(items):
            fits = np.flatnonzero(item.cost - item.cost[picks[i]] <= room)
            if fits.size:  # the dearest that fits has the least loss
                gain = float(item.loss[fits[-1]] - item.loss[picks[i]])
                best = min(best, (gain, i, int(fits[-1])))
        if best[0] >= 0:
            return picks
        _, i, pick = best
        room -= float(items[i].cost[pick] - items[i].cost[picks[i]])
        picks[i] = pick


def _search(
    items: list[_Item], bounds: list[_Bound], limit: float, known: list[int]
) -> tuple[list[int], bool]:
    """The best choice, and whether it is known to be; ``known`` is one to beat."""
    best = sum(float(item.loss[p]) for item, p in zip(items, known, strict=True))
    best -= SLACK * abs(best)
    cost, loss = np.zeros(1), np.zeros(1)
    trail: list[tuple[I64, I64]] = []
    complete = True
    for item, rest in zip(items, bounds[1:], strict=True):
        more = np.add.outer(cost, item.cost).ravel()
        worse = np.add.outer(loss, item.loss).ravel()
        with np.errstate(invalid="ignore"):
            reach = worse + rest.at(limit - more)
        kept = np.flatnonzero(reach < best)
        kept = kept[np.lexsort((worse[kept], more[kept]))]
        before = np.minimum.accumulate(np.concatenate(([np.inf], worse[kept][:-1])))
        kept = kept[worse[kept] < before[: len(kept)]]
        if not len(kept):
            return known, complete
        if len(kept) > MOST_STATES:
            complete = False
            kept = np.sort(kept[np.argpartition(reach[kept], MOST_STATES)[:MOST_STATES]])
        trail.append((kept // len(item.cost), kept % len(item.cost)))
        cost, loss = more[kept], worse[kept]
    at = int(np.argmin(loss))
    picks = []
    for parents, chosen in reversed(trail):
        picks.append(int(chosen[at]))
        at = int(parents[at])
    return picks[::-1], complete

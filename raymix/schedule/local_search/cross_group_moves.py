"""Sequences change between micro-batches: of slow and fast groups, and within slow groups.

A trade gives one sequence and takes back one or none. Some are chosen by their size, some drawn
from all there are; all of them are seated, improved and timed side by side, and the best counts.

Legend: K sequences of the batch, G groups; see `cuts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymix.schedule.cost.model import shards
from raymix.schedule.layout import Floats, Ints
from raymix.schedule.local_search.cuts import Cut, Cutter

# Trades that gain less than this part of the time are not worth a change.
_GAIN = 2e-4
# Groups within the first part of each other are level; within the second, equally slow.
_LEVEL, _SLOW = 0.002, 0.01
# Work that is to change sides, as parts of the gap between two groups.
_PARTS = (0.5, 0.25, 0.125)


@dataclass(frozen=True, slots=True)
class _Trade:
    """Two micro-batches of two cuts, or of one, after a trade."""

    giver: int
    taker: int
    given: int
    """Position of the micro-batch in its cut."""
    taken: int
    parts: list[Ints]
    """Sequences of the giving and of the taking micro-batch afterwards."""
    slots: list[Ints]
    """Their slots as they were, (1, K) each, -1 for the one that has come."""


def exchange(cutter: Cutter, cuts: list[Cut], seed: int) -> None:
    """Let the slowest groups trade with the fastest.

    Args:
        cutter: Knows the batch.
        cuts: The cut of each group, changed in place.
        seed: Of the trades that are drawn.
    """
    second_G = np.array([cut.seconds for cut in cuts])
    order = np.argsort(-second_G, kind="stable").tolist()
    highest = float(second_G.max())
    trades: list[_Trade] = []
    for slow, fast in zip(order, order[::-1], strict=True):
        gap = float(second_G[slow] - second_G[fast])
        if gap <= _LEVEL * highest or second_G[slow] < highest * (1 - _SLOW):
            break
        wanted = [gap * part * cutter.layout.context for part in _PARTS]
        trades += _trades(cutter, cuts, (slow, fast), wanted, seed)
    for trade, fresh in zip(trades, _solved(cutter, trades), strict=True):
        one = _replaced(cuts[trade.giver], {trade.given: 0}, fresh)
        two = _replaced(cuts[trade.taker], {trade.taken: 1}, fresh)
        known = max(cuts[trade.giver].seconds, cuts[trade.taker].seconds)
        # Cuts that an earlier trade of the list changed no longer hold what this one assumes.
        same = cuts[trade.giver].seconds == second_G[trade.giver]
        if same and max(one.seconds, two.seconds) < known * (1 - _GAIN):
            cuts[trade.giver], cuts[trade.taker] = one, two


def rearrange(cutter: Cutter, cuts: list[Cut], seed: int) -> None:
    """Let micro-batches of the slowest groups trade with each other."""
    second_G = np.array([cut.seconds for cut in cuts])
    slow = np.flatnonzero(second_G >= second_G.max() * (1 - _SLOW)).tolist()
    trades = [trade for at in slow for trade in _trades(cutter, cuts, (at, at), [], seed)]
    best: dict[int, Cut] = {}
    for trade, fresh in zip(trades, _solved(cutter, trades), strict=True):
        cut = _replaced(cuts[trade.giver], {trade.given: 0, trade.taken: 1}, fresh)
        known = best.get(trade.giver, cuts[trade.giver])
        if cut.seconds < known.seconds * (1 - _GAIN):
            best[trade.giver] = cut
    for at, cut in best.items():
        cuts[at] = cut


def _trades(
    cutter: Cutter,
    cuts: list[Cut],
    pair: tuple[int, int],
    wanted: Sequence[float],
    seed: int,
) -> list[_Trade]:
    """Return trades that fit: those nearest to each of the wanted rank-seconds, and some drawn."""
    giver, taker = pair
    length_K, cost, layout = cutter.length_K, cutter.cost, cutter.layout
    ours, theirs = cuts[giver].parts, cuts[taker].parts
    p_X, k_X = _listed(ours)
    q_Y, k_Y = _listed(theirs)
    # Nothing comes back from any of their micro-batches, or from a new one.
    q_Y = np.concatenate([q_Y, np.arange(len(theirs) + 1)])
    ids = np.concatenate([k_X, k_Y])
    share = shards(length_K[ids], layout.context)
    work = cost.work(length_K[ids], cost.narrowest(length_K[ids], layout.widths))
    none = np.zeros(len(theirs) + 1, dtype=np.int64)
    share_X, share_Y = share[: k_X.size], np.concatenate([share[k_X.size :], none])
    work_X, work_Y = work[: k_X.size], np.concatenate([work[k_X.size :], none])
    held_P = np.bincount(p_X, share_X, len(ours))
    held_Q = np.bincount(q_Y, share_Y, len(theirs) + 1)
    grown_XY = share_X[:, None] - share_Y
    fits_XY = held_Q[q_Y] + grown_XY <= cost.memory_tokens
    fits_XY &= held_P[p_X][:, None] - grown_XY <= cost.memory_tokens
    if giver == taker:
        fits_XY &= p_X[:, None] != q_Y
    flat = np.flatnonzero(fits_XY)
    if not flat.size:
        return []
    work_C = (work_X[:, None] - work_Y).ravel()[flat]
    chosen = [int(np.abs(work_C - goal).argmin()) for goal in wanted]
    if drawn := min(cutter.effort.drawn, flat.size):
        rng = np.random.default_rng(seed)
        chosen += rng.choice(flat.size, drawn, replace=False).tolist()
    found = []
    for at in dict.fromkeys(chosen):
        x, y = divmod(int(flat[at]), q_Y.size)
        p, q = int(p_X[x]), int(q_Y[y])
        come = k_Y[y : y + 1]
        left = theirs[q] if q < len(theirs) else _NOBODY
        seats = cuts[taker].slots[q] if q < len(theirs) else _NOBODY[None]
        less = _changed(ours[p], cuts[giver].slots[p], k_X[x : x + 1], come)
        more = _changed(left, seats, come, k_X[x : x + 1])
        found.append(_Trade(giver, taker, p, q, [less[0], more[0]], [less[1], more[1]]))
    return found


def _changed(part: Ints, slot_SK: Ints, gone: Ints, come: Ints) -> tuple[Ints, Ints]:
    """Return a micro-batch and its slots after one sequence has gone and one come, or none."""
    stay = part != gone[0] if gone.size else np.ones(part.size, dtype=np.bool_)
    ids = np.append(part[stay], come)
    slots = np.append(slot_SK[0, stay], np.full(come.size, -1))
    order = np.argsort(ids)
    return ids[order], slots[None, order]


def _listed(parts: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Return the position of its micro-batch and the id of every sequence of a cut."""
    sizes = [part.size for part in parts]
    return np.repeat(np.arange(len(parts)), sizes), np.concatenate([*parts, _NOBODY])


def _solved(cutter: Cutter, trades: Sequence[_Trade]) -> list[Cut]:
    """Return the two micro-batches of each trade, seated and improved."""
    drafts = [Cut(at, trade.parts, trade.slots, _UNKNOWN) for at, trade in enumerate(trades)]
    return cutter.traded(drafts)


_UNKNOWN = np.full(1, np.inf)
_NOBODY = np.zeros(0, dtype=np.int64)


def _replaced(cut: Cut, by: dict[int, int], fresh: Cut) -> Cut:
    """Return a cut with some micro-batches replaced by those of another; empty ones vanish."""
    rows: list[tuple[Ints, Ints, float]] = []
    old = list(zip(cut.parts, cut.slots, cut.second_M.tolist(), strict=True))
    for at in range(len(old) + 1):
        new = by.get(at)
        if new is None:
            rows += old[at : at + 1]
        elif fresh.parts[new].size:
            rows.append((fresh.parts[new], fresh.slots[new], float(fresh.second_M[new])))
    second_M: Floats = np.array([row[2] for row in rows])
    return Cut(cut.group, [row[0] for row in rows], [row[1] for row in rows], second_M)

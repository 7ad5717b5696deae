"""The widths that a layer may get, and choosing them for a given total cost.

DRC (arXiv 2207.07929, Section 4.1) gives each layer six candidate widths; the search (search.py)
says how good each of them is. What is beyond the candidates is ours: a `Budget`
for the cost of the whole network, the best candidates within it (`fit_budget`), and the same part
of every layer without any search (`uniform_widths`), which a search has to beat.
"""
import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from run import Bar

FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)   # of the width that the ratio leaves


def candidates(width: int, ratio: float, multiple: int = 4) -> list[int]:
    """The six widths that a layer of `width` channels may get, for a pruning ratio in [0, 1).

    (1 − ratio)·width·p for p in FRACTIONS, truncated, rounded to the nearest multiple (a tie goes
    down), within multiple..width. Rounding may leave a little more than the ratio says:
    candidates(16, 0.3) ends with 12. Equal candidates stay separate options, as in the release.
    """
    result = []
    for p in FRACTIONS:
        target = int(width * (1 - ratio) * p)
        rounded = multiple * ((target + (multiple - 1) // 2) // multiple)
        result.append(min(max(rounded, multiple), width))
    return result


# ---- a budget for the whole network -------------------------------------------------------------
class Budget(NamedTuple):
    """The most that a network may cost.

    cost: {pair name: width} -> number: a sum with a term for each pair, whatever the terms are.
    """
    cost: Callable[[dict[str, int]], float]
    limit: float


def budget_ratio(target: float, fixed: float) -> float:
    """The pruning ratio whose candidates lie around a `target` (0..1) of the network's cost.

    Of its cost the part `fixed` (0..1) belongs to no width (evaluate.fixed_part). Of the rest the
    candidates keep 0.75·(1 − ratio), since 0.75 is the mean of FRACTIONS. At most 0.9: candidates
    of a tenth and less of a layer.
    """
    if target <= fixed:
        return 0.9
    kept = (target - fixed) / (0.75 * (1 - fixed))
    return min(max(0.0, 1 - kept), 0.9)


def fit_budget(scores: np.ndarray, sizes: list[list[int]], names: list[str], budget: Budget,
               bins: int = 20_000) -> list[int]:
    """Which candidate k each pair takes, so that Σ scores[pair, k] is largest within the budget.

    Our addition to the paper: a knapsack, solved exactly on a grid of `bins` costs, among the
    choices that cost 99 to 100 % of the limit. scores: (pairs, 6), log softmax(α).
    ValueError: no choice of candidates costs so much or so little.
    """
    costs = cost_table(sizes, names, budget)
    floor = sum(min(row) for row in costs)
    ceiling = sum(max(row) for row in costs)
    grid = budget.limit / bins                                             # cost of one grid step
    room = int((budget.limit - floor) / grid)        # how many the cheapest network leaves to spend
    if room < 0 or ceiling < 0.99 * budget.limit:
        raise ValueError(f"the budget of {budget.limit:,.0f} cannot be met: the candidate widths "
                         f"give {floor:,.0f} to {ceiling:,.0f}; choose another --budget or --prune")
    spent = []                               # (pairs, 6): grid steps above the cheapest candidate
    for row in costs:
        spent.append([int(np.ceil((each - min(row)) / grid)) for each in row])
    # best[c]: the largest score at exactly the cost c, of the pairs so far; picks: how to reach it.
    best = np.full(room + 1, -np.inf)
    best[0] = 0.0
    picks = []
    for row, steps in zip(scores, spent):
        options = np.full((len(steps), room + 1), -np.inf)
        for k, step in enumerate(steps):
            if step <= room:
                options[k, step:] = row[k] + best[:room + 1 - step]
        picks.append(options.argmax(0))
        best = options.max(0)
    lowest = max(0, room - bins // 100)      # bins // 100 grid steps are 1 % of the limit
    at = lowest + int(best[lowest:].argmax())
    if not np.isfinite(best[at]):
        raise ValueError(f"no choice of the candidate widths comes within 1 % of the budget of "
                         f"{budget.limit:,.0f}: choose another --budget or --prune")
    chosen = []
    for pick, steps in zip(reversed(picks), reversed(spent)):              # back along the picks
        chosen.append(int(pick[at]))
        at -= steps[chosen[-1]]
    return chosen[::-1]


def cost_table(sizes: list[list[int]], names: list[str], budget: Budget) -> list[list[float]]:
    """(pairs, 6): what each candidate adds to the cost; the first row bears what is fixed, too."""
    start = {name: options[0] for name, options in zip(names, sizes)}
    base = budget.cost(start)
    table = []
    for name, options in zip(names, sizes):
        table.append([budget.cost({**start, name: n}) - base for n in options])
    table[0] = [base + cost for cost in table[0]]
    return table


# ---- the same part of every layer ---------------------------------------------------------------
GOLDEN = (5 ** 0.5 - 1) / 2              # its multiples modulo 1 are spread evenly over 0..1


def uniform_widths(pairs: list, ratio: float, multiple: int = 4,
                   budget: Budget | None = None) -> dict[str, int]:
    """{pair name: channels to keep}, all heads counted: the same part of every layer, no search.

    Without a budget each layer takes its widest candidate, the part 1 − ratio. With one the part is
    the largest that the budget allows. Rounding makes layers of equal width change all at once, and
    much of the budget may be left; so as many layers as it allows are already rounded up as if the
    part were a little larger, evenly spread over the network (see `widen`). (Ours.)
    ValueError: no such widths come within 1 % below the budget.
    """
    if budget is None:
        return {pair.name: pair.heads * candidates(pair.width, ratio, multiple)[-1]
                for pair in pairs}
    steps = []
    for i, pair in enumerate(pairs):
        for n in widenings(pair, multiple):
            # `candidates` rounds width·part up to n from here on
            part = (n - (multiple - 1) // 2) / pair.width
            steps.append((part, GOLDEN * i % 1, pair, n))
    steps.sort(key=lambda step: step[:2])
    return widen(pairs, [step[2:] for step in steps], multiple, budget)


def widenings(pair, multiple: int) -> range:
    """The multiples above the narrowest, up to the first that holds all channels of the pair."""
    return range(2 * multiple, pair.width + multiple, multiple)


def widen(pairs: list, steps: list[tuple], multiple: int, budget: Budget) -> dict[str, int]:
    """The widths after as many steps as the budget allows, beginning with the narrowest layers.

    Where the next step costs too much, cheaper ones behind it are taken, one for a pair, until the
    network costs 99 % of the budget.
    steps: (pair, its next larger width n, per head), in the order in which they are to be taken.
    ValueError: the narrowest layers cost too much, or more than 1 % of the budget remains.
    """
    bar = Bar(desc="budget", unit="network", leave=False, delay=2)

    def cost_of(widths: dict[str, int]) -> int:
        bar.update()
        return budget.cost(widths)

    def after(count: int) -> dict[str, int]:
        widths = {pair.name: pair.heads * min(multiple, pair.width) for pair in pairs}
        for pair, n in steps[:count]:
            widths[pair.name] = pair.heads * min(n, pair.width)
        return widths

    def cost(count: int) -> int:
        return cost_of(after(count))

    # the cost rises with every step
    count = bisect.bisect_right(range(len(steps) + 1), budget.limit, key=cost) - 1
    if count < 0:
        raise ValueError(f"the budget of {budget.limit:,.0f} cannot be met: layers of {multiple} "
                         f"channels cost {cost(0):,}; choose another --budget")
    widths = after(count)
    spent = cost_of(widths)
    tried = set()
    for pair, n in steps[count:]:
        if spent >= 0.99 * budget.limit:
            break
        if pair.name in tried:
            continue
        tried.add(pair.name)
        wider = {**widths, pair.name: pair.heads * min(n, pair.width)}
        more = cost_of(wider)
        if more <= budget.limit:
            widths = wider
            spent = more
    bar.close()
    if spent < 0.99 * budget.limit:
        raise ValueError(f"no widths of this kind come within 1 % of the budget of "
                         f"{budget.limit:,.0f}, the nearest cost {spent:,}: choose another "
                         f"--budget")
    return widths

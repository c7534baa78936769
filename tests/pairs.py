"""Pairwise covering: few rows in which every two values of two factors occur together."""

import itertools
import random


def _pairs(row):
    return set(itertools.combinations(sorted(row.items(), key=lambda item: item[0]), 2))


def covered(some: list[dict], all: list[dict]) -> float:
    """Returns the share of the pairs of all rows that some of them cover."""
    ours, theirs = (set().union(*map(_pairs, rows)) for rows in (some, all))
    return len(ours) / len(theirs)


def cheapest(rows: list[dict], cost, budget: float) -> list[dict]:
    """Returns rows that cover the most new pairs for their cost, until `budget` is spent.

    Args:
      cost: a function from a row to its cost.
    """
    chosen, seen, left, spent = [], set(), list(rows), 0.0
    while left and spent < budget:
        best = max(left, key=lambda row: len(_pairs(row) - seen) / cost(row))
        left.remove(best)
        chosen.append(best)
        seen |= _pairs(best)
        spent += cost(best)
    return chosen


def rows(factors: dict, allowed, tries: int = 200, seed: int = 0) -> list[dict]:
    """Returns rows that cover every pair of values that `allowed` rows can have.

    Greedy: each row is the best of `tries` random ones.
    """
    rng = random.Random(seed)
    names = sorted(factors)

    def draw():
        while not allowed(row := {name: rng.choice(factors[name]) for name in names}):
            pass
        return row

    missing = set().union(*(_pairs(draw()) for _ in range(20000)))
    chosen = []
    while missing:
        best = max((draw() for _ in range(tries)), key=lambda row: len(_pairs(row) & missing))
        while not _pairs(best) & missing:
            best = draw()
        missing -= _pairs(best)
        chosen.append(best)
    return chosen

"""Pairwise covering: few rows in which every two values of two factors meet."""

import itertools
import random


def _meetings(row):
    return set(itertools.combinations(sorted(row.items(), key=lambda kv: kv[0]), 2))


def rows(factors: dict, allowed, tries: int = 200, seed: int = 0) -> list[dict]:
    """Greedy: each row is the best of `tries` random allowed ones, until no allowed pair is left unmet."""
    rng, names = random.Random(seed), sorted(factors)
    draw = lambda: next(r for r in iter(lambda: {n: rng.choice(factors[n]) for n in names}, None) if allowed(r))
    possible = set().union(*(_meetings(draw()) for _ in range(20000)))
    chosen = []
    while possible:
        best = max((draw() for _ in range(tries)), key=lambda r: len(_meetings(r) & possible))
        if not _meetings(best) & possible:
            best = next(r for r in iter(draw, None) if _meetings(r) & possible)
        possible -= _meetings(best)
        chosen.append(best)
    return chosen

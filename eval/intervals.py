"""How far a score can be trusted: bootstrap intervals, and tests whether two models differ."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES, SEED = 1000, 0
CHUNK = 100  # resamples drawn at a time


def bootstrap(
    rows: np.ndarray,
    records: Sequence[int],
    combine: Callable[[np.ndarray, int], dict[str, float]],
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> dict[str, list[float]]:
    """Return the 95 % percentile interval of each figure (Efron 1979): records are drawn with replacement.

    `rows` fp64[N, C] are sums to be, `records` the record of each row, whose rows are drawn together because they show
    the same images; `combine` makes figures of the sum of the rows drawn and their number (corpus.py).
    """
    _, place = np.unique(np.asarray(records), return_inverse=True)
    num_records = int(place.max()) + 1
    sums = np.zeros((num_records, rows.shape[1] + 1))
    np.add.at(sums, place, np.column_stack([rows, np.ones(len(rows))]))
    rng, found = np.random.default_rng(seed), []
    for start in range(0, resamples, CHUNK):
        number = min(CHUNK, resamples - start)
        times = rng.multinomial(num_records, np.full(num_records, 1 / num_records), size=number)
        found += [combine(drawn[:-1], round(drawn[-1])) for drawn in times @ sums]
    names = dict.fromkeys(name for figures in found for name in figures)
    values = {name: [figures[name] for figures in found if name in figures] for name in names}
    return {name: np.percentile(x, (2.5, 97.5)).tolist() for name, x in values.items()}


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test that two models are right equally often.

    The counts are of questions that only one of them gets right. If both are as good, each of these is a coin toss:
    p = min(1, 2 P(X <= the smaller count)), X binomial with their sum and 1/2 (McNemar 1947).
    """
    number, fewer = only_first + only_second, min(only_first, only_second)
    tail = ways = 1
    for i in range(fewer):
        ways = ways * (number - i) // (i + 1)  # number over i + 1
        tail += ways
    return min(1.0, 2 * tail / 2**number)

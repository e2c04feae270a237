"""The usual ways to lay documents in rows, to compare our packing with.

Each returns lists of document indices, one per row; `pad` says how long the rows become.
"""

from nanovlm.data.packing import pack


def pad_to_longest(lengths, num_tiles, row_length, max_tiles=None):
    """One document a row; every row as long as the longest document of all."""
    return [[i] for i in range(len(lengths))]


def pad_in_batches(lengths, num_tiles, row_length, max_tiles=None):
    """One document a row; every row as long as the longest of its batch (constrained padding)."""
    return [[i] for i in range(len(lengths))]


def pack_in_order(lengths, num_tiles, row_length, max_tiles=None):
    """Naive packing: documents as they come; the first that does not fit begins the next row."""
    rows, tokens, tiles = [], row_length, 0
    for i, (length, more) in enumerate(zip(lengths, num_tiles, strict=True)):
        if tokens + length > row_length or (max_tiles is not None and tiles + more > max_tiles):
            rows.append([])
            tokens = tiles = 0
        rows[-1].append(i)
        tokens, tiles = tokens + length, tiles + more
    return rows


def first_fit_decreasing(lengths, num_tiles, row_length, max_tiles=None):
    """Textbook bin packing: longest first, each into the first row that has room. O(n^2)."""
    rows, tokens, tiles = [], [], []
    limit = sum(num_tiles) if max_tiles is None else max_tiles
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (r for r in range(len(rows)) if tokens[r] >= lengths[i] and tiles[r] >= num_tiles[i])
        row = next(fits, len(rows))
        if row == len(rows):
            rows, tokens, tiles = [*rows, []], [*tokens, row_length], [*tiles, limit]
        rows[row].append(i)
        tokens[row], tiles[row] = tokens[row] - lengths[i], tiles[row] - num_tiles[i]
    return rows


STRATEGIES = {
    "pad to longest": pad_to_longest,
    "constrained padding": pad_in_batches,
    "naive packing": pack_in_order,
    "first-fit decreasing": first_fit_decreasing,
    "ours": pack,
}


def pad(strategy: str, rows: list[list[int]], lengths: list[int], row_length: int, batch_rows: int = 16) -> list[int]:
    """Return the length to which each row of a strategy is padded."""
    if strategy == "pad to longest":
        return [max(lengths)] * len(rows)
    if strategy == "constrained padding":
        batches = [rows[start : start + batch_rows] for start in range(0, len(rows), batch_rows)]
        return [max(lengths[i] for (i,) in batch) for batch in batches for _ in batch]
    return [row_length] * len(rows)

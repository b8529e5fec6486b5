"""The best of many vectors for some queries, exactly, in little memory."""

import mmap

import numpy as np

_BLOCK = 8192  # rows in float32 at once: 25 MB for 768 numbers


def best(vectors, queries, k):
    """The ``k`` rows of ``vectors`` with the largest products for each query.

    Rows are taken in blocks. Once a query has its first ``k`` only scores above the least of them are looked at, which soon
    are few, so that all but the product costs next to nothing. Pages of a mapped file are given back as they are done with.

    Args:
        vectors: ``[n, E]``, float16 or float32; may be mapped from disk.
        queries: ``[q, E]``.
        k: how many; fewer where there are fewer rows.

    Returns:
        (scores ``[q, k]`` float32, descending; rows ``[q, k]`` int64). Of equal scores the earlier row comes first.
    """
    queries = np.ascontiguousarray(queries, "float32")
    k = min(k, len(vectors))
    scores = np.full([len(queries), k], -np.inf, "float32")
    rows = np.full([len(queries), k], len(vectors), "int64")
    if not k or not len(queries):
        return scores, rows
    product = np.empty([len(queries), min(_BLOCK, len(vectors))], "float32")
    for start in range(0, len(vectors), _BLOCK):
        block = np.asarray(vectors[start : start + _BLOCK], "float32")
        found = product[:, : len(block)]
        if found.flags.c_contiguous:
            np.matmul(queries, block.T, out=found)
        else:
            found = queries @ block.T
        _release(vectors)
        for query in np.flatnonzero(found.max(1) > scores[:, -1]):
            columns = np.flatnonzero(found[query] > scores[query, -1])
            _merge(scores[query], rows[query], found[query, columns], columns + start)
    return scores, rows


def _merge(scores, rows, new_scores, new_rows):
    """Put what is better into the sorted lists of one query, in place."""
    both, numbers = np.concatenate([scores, new_scores]), np.concatenate([rows, new_rows])
    if len(both) > 4 * len(scores):  # a first block has thousands
        least = np.partition(both, len(both) - len(scores))[len(both) - len(scores)]
        kept = both >= least
        both, numbers = both[kept], numbers[kept]
    order = np.argsort(-both, kind="stable")[: len(scores)]
    scores[:], rows[:] = both[order], numbers[order]


def _release(array):
    """Let the system take back the pages of a mapped array; they are read again from its cache when needed."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)

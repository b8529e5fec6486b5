"""The one position of each row that is asked for: all that a decoder's last block computes, but for keys and values."""

import math

import numpy as np
import paddle

from .layers import take_rows

__all__ = ["ROWS", "LastPositions", "last_of"]

# Matrix products choose their way of adding by the number of rows, and an answer must not depend on who else is there: rows are
# computed in numbers that are multiples of this.
ROWS = 16


class LastPositions:
    """Positions ``[B]`` among ``tokens`` new ones of each row.

    Each row is there ``copies`` times on the axis of positions, so that their number is a multiple of :data:`ROWS`.
    """

    def __init__(self, positions, tokens):
        self.positions, self.tokens = np.asarray(positions, "int64"), tokens
        rows = len(self.positions)
        self.copies = ROWS // math.gcd(rows, ROWS)
        self._places = np.arange(rows) * tokens + self.positions

    @classmethod
    def of(cls, positions, tokens, batch, mask):
        """Those of ``positions [B]``, -1 for the last of every row; None where all have to be computed.

        That is where there is one new token, and where ``mask`` is one that :meth:`attend` does not know.
        """
        positions = np.full(batch, tokens - 1) if np.ndim(positions) == 0 else np.asarray(positions)
        even = (positions == tokens - 1).all()
        known = mask.segments is None and (even or mask.is_spans)
        return cls(positions, tokens) if tokens > 1 and known else None

    def take(self, x):
        """``x [B, N, ...]`` at these positions, ``[B, copies, ...]``; of tables, ``[1, N, ...]`` too."""
        rows = len(self.positions)
        places = self._places if x.shape[0] == rows else self.positions
        flat = x.reshape([x.shape[0] * self.tokens, -1])
        return take_rows(flat, places.repeat(self.copies)).reshape([rows, self.copies, *x.shape[2:]])

    def copied(self, x):
        """``x [B, 1, ...]`` as often as it is computed."""
        return x if self.copies == 1 else paddle.concat([x] * self.copies, axis=1)

    def attend(self, attention, q, k, v, length, starts):
        """What these positions see, ``[B, 1, H * D]``.

        Args:
            attention: called with queries ``[b, 1, H, D]``, keys and values of the same rows, how many of these positions the
                queries see, and the starts of the rows or None.
            q: ``[B, 1, H, D]``.
            k, v: ``[B, S, K, D]``, of which the last of the first ``length`` are the new ones.
            length: positions in use.
            starts: of the rows, ``[B]``, or None.
        """
        ends = (length - self.tokens + self.positions + 1).tolist()
        if len(set(ends)) == 1:
            return attention(q, k, v, ends[0], starts)
        seen = []
        for row, end in enumerate(ends):
            own = slice(row, row + 1)
            seen.append(attention(q[own], k[own], v[own], end, None if starts is None else starts[own]))
        return paddle.concat(seen)


def last_of(hidden, positions):
    """``hidden [B, N, D]`` at ``positions [B]``, -1 for the last of every row, ``[B, 1, D]``."""
    batch, tokens = hidden.shape[:2]
    if np.ndim(positions) == 0 or (np.asarray(positions) == tokens - 1).all():
        return hidden if tokens == 1 else hidden[:, -1:]
    places = np.arange(batch) * tokens + np.asarray(positions)
    return take_rows(hidden.reshape([batch * tokens, -1]), places).unsqueeze(1)

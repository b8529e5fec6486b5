"""What was made of the last pictures, for questions that are about the same again."""

from collections import OrderedDict

__all__ = ["Kept"]


class Kept:
    """Values by key, the longest unused of which go where all would take more than ``most``.

    Args:
        most: sum of the sizes of the values, in whatever :meth:`put` counts.
    """

    def __init__(self, most):
        self.most, self._taken, self._values = most, 0, OrderedDict()

    def get(self, key):
        """The value of a key, or None."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key, value, size):
        """Keep a value; one that is larger than all may be is not kept."""
        self._taken += size - self._values.pop(key, (None, 0))[1]
        self._values[key] = value, size
        if size > self.most:
            self._taken -= self._values.pop(key)[1]
        while self._taken > self.most:
            self._taken -= self._values.popitem(last=False)[1][1]

"""What an optimiser has to know of a model whose layers are divided over ranks (tensor parallel).

Most parameters are a rank's alone, or whole in each rank with the same gradient. Of two kinds a rank has a part of the gradient
only: what is whole but used for the rank's share (norms of each head, the adapters' sides that are not divided), and key heads
that several ranks have because there are fewer of them than ranks.
"""

import math
import re

import numpy as np
import paddle

from paddlemix.checkpoints.checkpoint import NOTHING
from paddlemix.models.blocks.parallel import whole_array

__all__ = ["DividedParameters"]


class DividedParameters:
    """The learning parameters of a divided model.

    Args:
        model: divided, with a ``group``, and with what does not learn frozen.

    Attributes:
        group: the ranks.
        counts: ``{name: (values of the whole, whether it learns)}`` of all parameters, also of those that are elsewhere.
    """

    def __init__(self, model):
        self.group, self.divisions = model.group, model.division.every()
        self._own = self.divisions[self.group.rank]
        self.shapes = {weight.name: weight.shape for weight in model.config.weight_table()}
        frozen = {name: p.stop_gradient for name, p in model.named_parameters()}
        expert = f".experts.{self._own.experts[0]}."  # those elsewhere learn as those here do
        here = {name: name if name in frozen else re.sub(r"\.experts\.\d+\.", expert, name) for name in self.shapes}
        self.counts = {name: (math.prod(shape), not frozen[here[name]]) for name, shape in self.shapes.items()}

    # ------------------------------------------------------------------ gradients

    def _repeated(self, name):
        """``(axis, places that several ranks have, [(start here, place among those, count, how many ranks)])``, or None."""
        own = self._own.share(name)
        if own in (None, NOTHING) or not self._own.repeats_keys():
            return None
        users = np.zeros(self.shapes[name][own.axis], int)
        for division in self.divisions:
            for start, count in division.share(name).runs:
                users[start : start + count] += 1
        if users.max() == 1:
            return None
        places, runs, at = np.flatnonzero(users > 1), [], 0
        for start, count in own.runs:  # each is of one kind: a rank that shares a key head has no other
            if count and users[start] > 1:
                runs.append((at, int(np.searchsorted(places, start)), count, int(users[start])))
            at += count
        return own.axis, len(places), runs

    def summed(self, gradients):
        """``gradients {name: tensor}``, those made whole of which each rank has a part; every rank calls this."""
        names = [name for name in gradients if self._own.sums_gradient(name)]
        parts = [gradients[name].reshape([-1]) for name in names]
        repeated = {name: found for name in gradients if (found := self._repeated(name)) is not None}
        for name, (axis, length, runs) in repeated.items():
            parts.append(_spread(gradients[name], axis, length, runs).reshape([-1]))
        if not parts:
            return gradients
        whole = iter(self.group.all_reduce(paddle.concat(parts)).split([part.size for part in parts]))
        gradients = dict(gradients)
        for name in names:
            gradients[name] = next(whole).reshape(gradients[name].shape)
        for name, (axis, length, runs) in repeated.items():
            shape = list(gradients[name].shape)
            shape[axis] = length
            gradients[name] = _collected(gradients[name], next(whole).reshape(shape), axis, runs)
        return gradients

    def squares(self, gradients):
        """This rank's part of the sum of squares of whole ``gradients``, a scalar: every value counts in one rank."""
        total = paddle.zeros([], "float32")
        for name, gradient in gradients.items():
            share = self._own.share(name)
            if share is None and ".experts." not in name:
                if self.group.is_first:
                    total = total + gradient.square().sum()
                continue
            total = total + gradient.square().sum()
            if (found := self._repeated(name)) is not None:
                axis, _, runs = found
                for start, _, count, users in runs:
                    part = paddle.slice(gradient, [axis], [start], [start + count])
                    total = total - part.square().sum() * (1 - 1 / users)
        return total

    # ------------------------------------------------------------------ states

    def whole_state(self, name, kind, own):
        """The whole of a state, an array, in the first rank and None elsewhere; all call this.

        Args:
            name: of the parameter.
            kind: of the state; those whose name has ``pow`` are one number, alike in every rank.
            own: this rank's share, a float32 tensor; None where it has none.
        """
        if "pow" not in kind:
            return whole_array(self.group, self.divisions, name, self.shapes[name], own, "float32")
        owner = next(rank for rank, division in enumerate(self.divisions) if division.share(name) is not NOTHING)
        number = self.group.broadcast(paddle.zeros([1]) if own is None else own.reshape([1]).clone(), owner)
        return number.numpy() if self.group.is_first else None

    def own(self, name, array):
        """This rank's share of a whole ``array``; one number stays."""
        share = self._own.share(name)
        return array if share is None or array.shape != tuple(self.shapes[name]) else np.ascontiguousarray(share.take(array))


def _spread(gradient, axis, length, runs):
    """The runs of ``gradient`` that several ranks have, in their places among all such, zeros elsewhere."""
    shape, parts, at = list(gradient.shape), [], 0
    for start, place, count, _ in sorted(runs, key=lambda run: run[1]):
        parts += [_zeros(gradient, shape, axis, place - at), paddle.slice(gradient, [axis], [start], [start + count])]
        at = place + count
    return paddle.concat([p for p in [*parts, _zeros(gradient, shape, axis, length - at)] if p is not None], axis=axis)


def _zeros(like, shape, axis, count):
    return paddle.zeros([*shape[:axis], count, *shape[axis + 1 :]], like.dtype) if count else None


def _collected(gradient, summed, axis, runs):
    """``gradient`` with its runs from ``summed``, where they are whole."""
    parts, at = [], 0
    for start, place, count, _ in runs:
        if start > at:
            parts.append(paddle.slice(gradient, [axis], [at], [start]))
        parts.append(paddle.slice(summed, [axis], [place], [place + count]))
        at = start + count
    if at < gradient.shape[axis]:
        parts.append(paddle.slice(gradient, [axis], [at], [gradient.shape[axis]]))
    return paddle.concat(parts, axis=axis)

"""What a causal language model returns in training, and its loss."""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer
from paddle.nn import functional as F

from paddlemix.arrays import host_array
from paddlemix.errors import PromptError

from .layers import take_rows


@dataclass
class CausalLMOutput:
    """What the ``forward`` of a chat model returns.

    Attributes:
        loss: a scalar, or None without labels.
        hidden: the decoder's last hidden states, ``[B, N, D]``.
        head: the layer that turns them into logits.
        aux_loss: how unevenly a mixture of experts is used, without its coefficient; None for dense models.
    """

    loss: paddle.Tensor | None
    hidden: paddle.Tensor
    head: nn.Layer
    aux_loss: paddle.Tensor | None = None

    @property
    def logits(self):
        """``[B, N, V]``, computed when asked for: training needs the loss alone, and they are larger than all else."""
        return self.head(self.hidden)


def causal_loss(logits, labels):
    """Mean cross entropy of ``logits [B, N, V]`` against the next position's ``labels [B, N]``, -100 ignored."""
    return chunked_causal_loss(lambda x: x, logits, labels)


def chunked_causal_loss(head, hidden, labels, weight=None, chunk=512):
    """Mean cross entropy over the labelled tokens, with no more than a part of the logits in memory.

    Logits are computed for labelled positions alone, and again when gradients are: the answers are a small part of most
    samples, and their logits in float32 would be larger than all else that is kept.

    Args:
        head: a layer that turns ``[M, D]`` into logits ``[M, V]``.
        hidden: ``[B, N, D]``.
        labels: ``[B, N]`` integers, -100 where nothing is learned; position ``n`` is predicted from ``hidden[:, n - 1]``.
        weight: ``[B, N]``, how much each label counts; None for all alike.
        chunk: labelled positions whose logits are in memory at once: 300 MB for a vocabulary of 150,000.

    Returns:
        A float32 scalar: ``sum(weight * loss) / sum(weight)`` over labelled tokens, or 0 where none is labelled. Written
        out because Paddle 3.3's own mean divides by ignored tokens too.
    """
    labels = host_array(labels, "labels")
    if labels.shape != tuple(hidden.shape[:2]):
        raise PromptError(f"labels are {list(labels.shape)}, but the prompt is {list(hidden.shape[:2])}: they must be alike")
    rows, columns = _labelled(labels)
    if weight is None:
        weight = np.ones(len(rows), "float32")
    else:
        weight = host_array(weight, "loss_weight").astype("float32")[rows, columns + 1]
    if not weight.sum():
        return hidden.sum().astype("float32") * 0  # still reaches the parameters, as every rank must
    return _weighted_losses(head, hidden, labels, (weight / weight.sum())[:, None], chunk).squeeze(0)


def label_losses(head, hidden, labels, sequence, count, chunk=512):
    """Sums of the cross entropy over the labels of each of several sequences.

    Args:
        head, hidden, labels, chunk: as of :func:`chunked_causal_loss`.
        sequence: ``[B, N]`` integers, the sequence that a label belongs to.
        count: how many sequences there are.

    Returns:
        ``[count]`` float32, 0 where nothing is labelled.
    """
    rows, columns = _labelled(labels)
    if not len(rows):
        return hidden.sum().astype("float32") * 0 + paddle.zeros([count])
    shares = np.zeros([len(rows), count], "float32")
    shares[np.arange(len(rows)), sequence[rows, columns + 1]] = 1
    return _weighted_losses(head, hidden, labels, shares, chunk)


def _labelled(labels):
    """Rows and columns of the positions that predict a label."""
    places = np.flatnonzero(labels[:, 1:] >= 0)
    return np.divmod(places, labels.shape[1] - 1)


def _weighted_losses(head, hidden, labels, shares, chunk):
    """Sums of the cross entropy of the labels ``M``, weighted by ``shares [M, K]`` -> ``[K]`` float32."""
    rows, columns = _labelled(labels)
    targets = labels[rows, columns + 1].astype("int64")
    places = rows
    flat = take_rows(hidden.reshape([-1, hidden.shape[-1]]), rows * labels.shape[1] + columns)

    def part(x, target, share):
        losses = _cross_entropy(head, x, target).squeeze(-1)
        return (losses.unsqueeze(-1) * share).sum(axis=0)

    share = paddle.to_tensor(shares)
    targets = paddle.to_tensor(targets).unsqueeze(-1)
    # Paddle's kernel for CPU gives a finite cross entropy of logits that are NaN, as if all were alike.
    total = flat.astype("float32").sum() * 0
    for at in range(0, len(places), chunk):
        inputs = flat[at : at + chunk], targets[at : at + chunk], share[at : at + chunk]
        keep = len(places) <= chunk or not paddle.is_grad_enabled()
        total += part(*inputs) if keep else paddle.distributed.fleet.utils.recompute(part, *inputs, use_reentrant=False)
    return total


def _cross_entropy(head, x, targets):
    """Cross entropy ``[M, 1]`` float32 of what ``head`` makes of ``x [M, D]`` against ``targets [M, 1]``.

    Where the vocabulary is divided over ranks, so are the logits.
    """
    ranks = getattr(head, "ranks", None)
    if ranks is None or getattr(head, "is_led", False):
        return F.cross_entropy(head(x).astype("float32"), targets, reduction="none")
    return _DividedCrossEntropy.apply(head.own_logits(ranks.copied(x)).astype("float32"), targets, ranks, head.first)


class _DividedCrossEntropy(PyLayer):
    @staticmethod
    def forward(ctx, logits, targets, ranks, first):
        """``logits [M, own vocabulary]`` float32 from token ``first`` on; two small sums over the ranks."""
        count = logits.shape[1]
        largest = ranks.all_reduce(logits.max(axis=-1, keepdim=True), "MAX")
        powers = paddle.exp(logits - largest)
        own = targets - first
        here = paddle.logical_and(own >= 0, own < count).astype("float32")
        own = own.clip(0, count - 1)
        chosen = paddle.take_along_axis(logits, own, axis=-1) * here
        sums = paddle.concat([powers.sum(-1, keepdim=True), chosen], axis=-1)
        total, chosen = ranks.all_reduce(sums).split(2, axis=-1)
        ctx.save_for_backward(powers / total, own, here)
        return paddle.log(total) + largest - chosen

    @staticmethod
    def backward(ctx, gradient):
        probabilities, own, here = ctx.saved_tensor()
        target = F.one_hot(own.squeeze(-1), probabilities.shape[1]) * here
        return (probabilities - target) * gradient

"""Contrastive and matching losses over the pictures and texts of all processes."""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.nn import functional as F


class _Gather(paddle.autograd.PyLayer):
    """Rows of all processes, in order; gradients of each process's rows come back from all."""

    @staticmethod
    def forward(ctx, x):
        parts = []
        dist.all_gather(parts, x.contiguous())
        return paddle.concat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.split(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """``x [n, ...]`` of all processes, ``[n * processes, ...]``, with gradients; the number of rows must be alike."""
    return _Gather.apply(x) if dist.get_world_size() > 1 else x


def mean_over_processes(loss):
    """The mean of a scalar over all processes, whose gradient in each is that of its own."""
    return gather(loss.reshape([1])).mean() if dist.get_world_size() > 1 else loss


def normalize(x):
    """``x [..., D]`` with length 1 along the last axis, in its dtype; computed in float32."""
    y = x.astype("float32")
    # rsqrt rather than a division, which Ascend lacks in half precision; the bound is F.normalize's.
    return (y * paddle.rsqrt(paddle.square(y).sum(-1, keepdim=True) + 1e-24)).astype(x.dtype)


def contrastive_loss(scores, targets):
    """Mean cross entropy of both directions between pictures and texts.

    Args:
        scores: ``[n, n]``, pictures by texts.
        targets: ``[n, n]`` array: what each row's softmax should be, for both directions; rows of zeros are left out.

    Returns:
        A float32 scalar, 0 where all rows are left out.
    """
    rows = max(int(np.any(targets, axis=1).sum()), 1)
    weights = paddle.to_tensor((targets / rows).astype("float32"))
    scores = scores.astype("float32")
    return (_cross_entropy(scores, weights) + _cross_entropy(scores.transpose([1, 0]), weights)) * 0.5


def _cross_entropy(scores, weights):
    """``-sum(weights * log softmax(scores))``, both ``[n, m]``, from operators that every backend has."""
    first = paddle.zeros([scores.shape[0], 1], "int64")
    logsumexp = F.cross_entropy(scores, first, reduction="none") + scores[:, :1]
    return (weights * (logsumexp + -1.0 * scores)).sum()


def diagonal_targets(valid, smoothing):
    """Targets for pairs: row ``i`` belongs to column ``i``, ``smoothing`` is spread over all; ``valid [n]`` leaves rows out."""
    count = len(valid)
    targets = np.eye(count) * (1 - smoothing) + smoothing / count
    return targets * np.asarray(valid, "float64")[:, None]


def shared_targets(image_ids):
    """Soft targets ``[n, n]``: a picture's texts count alike, whichever row they are in."""
    ids = np.asarray(image_ids)
    same = (ids[:, None] == ids[None]).astype("float64")
    return same / same.sum(1, keepdims=True)


def matching_loss(scores, targets):
    """Mean cross entropy of ``scores [n, 2]`` over the rows whose target, 0 or 1, is not -100; 0 where all are left out."""
    targets = np.asarray(targets)
    kept = targets >= 0
    share = paddle.to_tensor((kept / max(int(kept.sum()), 1)).astype("float32"))
    labels = paddle.to_tensor(np.where(kept, targets, 0)[:, None])
    return (F.cross_entropy(scores.astype("float32"), labels, reduction="none").squeeze(-1) * share).sum()

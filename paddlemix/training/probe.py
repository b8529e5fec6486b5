"""Training a probe on features of a frozen tower: SGD with momentum, warm-up of one epoch, cosine."""

import math

import numpy as np
import paddle
from paddle.nn import functional as F


def train_probe(probe, epoch_features, labels, shape, epochs, batch_size, learning_rate, seed=0):
    """Train ``probe`` in place and leave it in evaluation mode.

    Args:
        probe: a layer from features to scores of classes.
        epoch_features: called with the number of an epoch; features ``[n, ...]``, rows that are not numbers are left out.
        labels: ``[n]``.
        shape: of a batch of features for the probe, -1 first.
        learning_rate: the peak.
    """
    count = len(labels)
    steps = max(1, count // batch_size)
    optimizer = paddle.optimizer.Momentum(learning_rate, 0.9, parameters=probe.parameters())
    probe.train()
    for epoch in range(epochs):
        rows = epoch_features(epoch)
        good = np.flatnonzero(np.isfinite(np.asarray(rows[:, 0])))
        order = good[np.random.default_rng([seed, epoch]).permutation(len(good))]
        for step in range(steps):
            chosen = np.sort(order[step * batch_size : (step + 1) * batch_size])
            if len(chosen) < 2:  # batch norm needs several
                continue
            done = epoch + step / steps
            optimizer.set_lr(learning_rate * (done / 1 if done < 1 < epochs else _cosine(done, epochs)))
            x = paddle.to_tensor(np.asarray(rows[chosen], "float32").reshape(shape))
            loss = F.cross_entropy(probe(x), paddle.to_tensor(labels[chosen][:, None]))
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
    probe.eval()


def _cosine(done, epochs):
    warm = 1 if epochs > 1 else 0
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(epochs - warm, 1)))

"""Choosing the next token of one sequence: penalties, biases, forms, and draws from a random stream of its own.

All in float32 on the host, which costs about a millisecond for a large vocabulary and is the same on every device. What a
sequence draws depends on its seed and its own logits alone, never on who else is in the batch.
"""

import functools
from dataclasses import dataclass

import numpy as np

__all__ = ["Choice", "Chooser"]

_SEEDS = 2**64


@dataclass
class Choice:
    """A chosen token, and where asked for its log probability and ``(id, log probability)`` of the likeliest."""

    token: int
    logprob: float | None = None
    top: list | None = None


class Chooser:
    """Chooses the tokens of one sequence.

    Args:
        config: a :class:`~..generation.GenerationConfig`.
        stream: which of several answers with one seed this is.
    """

    def __init__(self, config, stream=0):
        self.config, self._stream, self._bias = config, stream, None
        if config.logit_bias:
            self._bias = np.array(list(config.logit_bias), "int64"), np.array(list(config.logit_bias.values()), "float32")
        self.matcher = config.form.matcher() if config.form is not None else None

    @functools.cached_property
    def _random(self):
        """Made when first drawn from: its entropy takes longer than a step of a small model does for one row."""
        if self.config.seed is None:
            return np.random.default_rng()
        seed = int(self.config.seed) % _SEEDS  # any integer: negative ones count from the end
        return np.random.default_rng([seed, self._stream] if self._stream else seed)

    def is_plain(self, length):
        """Whether the likeliest token is all that is asked for, after an answer of ``length`` tokens."""
        config = self.config
        return not (
            config.do_sample
            or config.repetition_penalty != 1
            or config.frequency_penalty
            or config.presence_penalty
            or self._bias is not None
            or self.matcher is not None
            or config.logprobs is not None
            or (length < config.min_new_tokens and config.eos_token_ids)
        )

    def __call__(self, scores, answer):
        """``scores [V]`` float32, which are changed, and the ids of the ``answer`` so far -> :class:`Choice`."""
        config = self.config
        if answer and (config.repetition_penalty != 1 or config.frequency_penalty or config.presence_penalty):
            seen, counts = np.unique(answer, return_counts=True)
            old = scores[seen]
            penalty = np.float32(config.repetition_penalty)
            old = np.where(old > 0, old / penalty, old * penalty)
            scores[seen] = old - np.float32(config.presence_penalty) - np.float32(config.frequency_penalty) * counts
        if self._bias is not None:
            scores[self._bias[0]] += self._bias[1]
        if len(answer) < config.min_new_tokens and self.matcher is None:
            scores[config.eos_token_ids] = -np.inf
        if self.matcher is not None:
            scores[~self.matcher.allowed(scores.size)] = -np.inf
        if config.do_sample and config.temperature != 1:
            scores /= np.float32(config.temperature)
        token = self._draw(scores) if config.do_sample else int(scores.argmax())
        if self.matcher is not None:
            self.matcher.accept(token)
        if config.logprobs is None:
            return Choice(token)
        return Choice(token, *_logprobs(scores, token, config.logprobs))

    def _draw(self, scores):
        """A token from the distribution, cut down by top_k, top_p and min_p."""
        config = self.config
        if not np.isfinite(scores.max()):  # logits that overflowed: the likeliest is as good as any
            return int(np.nan_to_num(scores, nan=-np.inf).argmax())
        limit = config.top_k if config.top_k and config.top_k < scores.size else 0
        if not limit and config.top_p == 1 and not config.min_p:
            order = None
            weights = np.exp((scores - scores.max()).astype(np.float64))
        else:
            order = np.arange(scores.size)
            if limit:
                order = np.argpartition(scores, -limit)[-limit:]
            elif config.min_p:
                order = np.flatnonzero(scores >= scores.max() + np.log(config.min_p))
            order = order[np.argsort(-scores[order], kind="stable")]
            weights = np.exp(scores[order].astype(np.float64) - scores[order[0]])
            if config.min_p:
                weights[weights < config.min_p] = 0
        total = np.cumsum(weights)
        if config.top_p < 1:  # the token that reaches top_p belongs to the set
            kept = int(np.searchsorted(total, config.top_p * total[-1])) + 1
            total = total[:kept]
        at = int(np.searchsorted(total / total[-1], self._random.random(), side="right"))
        at = min(at, len(total) - 1)
        return at if order is None else int(order[at])


def _logprobs(scores, token, count):
    """Log probability of ``token``, and of the ``count`` likeliest as a list of (id, log probability)."""
    finite = scores[np.isfinite(scores)].astype(np.float64)
    top = finite.max() if finite.size else 0.0
    logs = scores.astype(np.float64) - (top + np.log(np.exp(finite - top).sum()) if finite.size else 0.0)
    order = []
    if count:
        count = min(count, scores.size)
        order = np.argpartition(-logs, count - 1)[:count]
        order = order[np.lexsort((order, -logs[order]))]
    return float(logs[token]), [(int(i), float(logs[i])) for i in order]

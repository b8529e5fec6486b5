"""What follows attention in a decoder block: a gated MLP, or a router and a number of them (mixture of experts).

``T`` tokens, ``D`` width, ``E`` experts, ``k`` of them at work for a token, ``I`` an MLP's inner width in the shapes below.
Every expert is a :class:`GatedMLP` with weights of its own, so that adapters, packing and saving see ordinary linear layers.
"""

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from .layers import Linear, swiglu, take_rows


def clamped_swiglu(x, limit):
    """gpt-oss's gate (arXiv 2508.10925): ``x [..., 2 I]``, gate and up in turn -> ``[..., I]``."""
    pairs = x.reshape([*x.shape[:-1], -1, 2]).astype("float32")  # Ascend clips nothing else
    gate, up = pairs[..., 0].clip(max=limit), pairs[..., 1].clip(-limit, limit)
    return ((up + 1) * gate * F.sigmoid(1.702 * gate)).astype(x.dtype)


class GatedMLP(nn.Layer):
    """Gated MLP (arXiv 2002.05202), with SiLU or gpt-oss's clamped gate.

    Args:
        config: the language configuration.
        width: ``I``.
        bias: whether both products have one.
    """

    def __init__(self, config, width, bias):
        super().__init__()
        self.limit, self.fused = config.swiglu_limit, config.fused_projections
        if self.fused:
            self.gate_up_proj = Linear(config.hidden_size, 2 * width, bias=bias)
        else:
            self.gate_proj, self.up_proj = (Linear(config.hidden_size, width, bias=bias) for _ in range(2))
        self.down_proj = Linear(width, config.hidden_size, bias=bias)

    def forward(self, x, residual=None):
        """``residual + mlp(x)``, all ``[..., D]``."""
        if not self.fused:
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)), residual=residual)
        x = self.gate_up_proj(x)
        return self.down_proj(swiglu(x) if self.limit is None else clamped_swiglu(x, self.limit), residual=residual)


class Router(Linear):
    """Scores of the experts for each token."""

    def __init__(self, config):
        experts = config.experts
        super().__init__(config.hidden_size, experts.count, bias=experts.bias)
        self.active, self.normalised = experts.active, experts.normalised

    def forward(self, x):
        """``x [T, D]`` -> logits ``[T, E]`` float32, which experts ``[T, k]`` int64, and their weights ``[T, k]`` float32."""
        logits = super().forward(x).astype("float32")
        if self.normalised:  # a softmax over all, divided by its sum over k of them, is the softmax over these
            best, chosen = paddle.topk(logits, self.active, axis=-1)
            return logits, chosen, F.softmax(best, axis=-1)
        weights, chosen = paddle.topk(F.softmax(logits, axis=-1), self.active, axis=-1)
        return logits, chosen, weights


def on_host(chosen):
    """Which experts, ``[T, k]`` integers, where they decide what is computed."""
    return np.asarray(chosen)


class Dispatch:
    """Tokens in the order of the experts that they go to.

    Args:
        chosen: ``[T, k]`` integers on the host.
        count: number of experts.
        all_experts: give an expert that nobody chose one token, whose result is not used: in training each expert gets
            gradients, zeros then, as every process expects them.
        first: number of the first of the ``count`` experts; others are elsewhere.

    Attributes:
        rows: which token is in each place, ``[places]``.
        shares: for each expert at work ``(expert, first place, last place + 1)``, experts counted from ``first``.
        places: place of each token's results, ``[T * k]``; of what is elsewhere, the one behind the last.
        elsewhere: whether some is.
    """

    def __init__(self, chosen, count, all_experts=False, first=0):
        experts = chosen.reshape(-1) - first
        here = (experts >= 0) & (experts < count)
        self.elsewhere = not here.all()
        order = np.argsort(np.where(here, experts, count), kind="stable")[: here.sum()]
        counts = np.bincount(experts[here], minlength=count)
        idle = np.flatnonzero(counts == 0) if all_experts and len(experts) else np.zeros(0, "int64")
        ends = np.cumsum(counts)
        shares = [(int(e), int(ends[e] - counts[e]), int(ends[e])) for e in np.flatnonzero(counts)]
        self.shares = shares + [(int(e), len(order) + i, len(order) + i + 1) for i, e in enumerate(idle)]
        self.rows = np.concatenate([order // chosen.shape[1], np.zeros(len(idle), "int64")])
        self.places = np.full(len(experts), len(self.rows), "int64")
        self.places[order] = np.arange(len(order))


class MixtureOfExperts(nn.Layer):
    """A router and its experts (arXiv 2101.03961): a token goes through ``k`` of them."""

    def __init__(self, config):
        super().__init__()
        experts = config.experts
        self.gate = Router(config)
        self.experts = nn.LayerList([GatedMLP(config, experts.width, experts.bias) for _ in range(experts.count)])

    def forward(self, x, residual, with_router=False):
        """``residual + mixture(x)``, all ``[B, N, D]``; ``with_router`` adds the router's logits ``[B * N, E]`` float32."""
        flat = x.reshape([-1, x.shape[-1]])
        logits, chosen, weights = self.gate(flat)
        y = run_experts(flat, chosen, weights, self.experts, all_experts=self.training and paddle.is_grad_enabled())
        y = residual + y.reshape(x.shape)
        return (y, logits) if with_router else y


def run_experts(x, chosen, weights, experts, all_experts=False, first=0):
    """Weighted sum of what the chosen experts make of each token, each expert computing all of its tokens at once.

    Args:
        x: ``[T, D]``.
        chosen, weights: ``[T, k]``.
        experts: functions of ``[any, D]``, ``E`` of them.
        all_experts, first: as in :class:`Dispatch`.

    Returns:
        ``[T, D]``; where some experts are elsewhere, what those here add to it.
    """
    dispatch = Dispatch(on_host(chosen), len(experts), all_experts, first)
    tokens = take_rows(x, dispatch.rows) if len(dispatch.rows) else x[:0]
    results = [experts[expert](tokens[start:stop]) for expert, start, stop in dispatch.shares]
    if dispatch.elsewhere:
        results.append(paddle.zeros([1, x.shape[-1]], results[0].dtype if results else x.dtype))
    y = take_rows(paddle.concat(results), dispatch.places).reshape([*chosen.shape, -1])
    return (y * weights.astype(y.dtype).unsqueeze(-1)).sum(1)


def balance_loss(router_logits, active, kept=None):
    """How unevenly tokens are spread over experts: 1 or above times ``k``, smaller the more even (arXiv 2101.03961).

    The share of choices that fell on an expert times its mean probability, summed over experts and times their number, over
    all layers together.

    Args:
        router_logits: ``[T, E]`` of each sparse layer.
        active: ``k``.
        kept: which of the ``T`` tokens count, bool array; None for all.

    Returns:
        A float32 scalar.
    """
    if kept is not None and not kept.all():
        rows = np.flatnonzero(kept)
        router_logits = [take_rows(logits, rows) for logits in router_logits]
    probabilities = F.softmax(paddle.concat(router_logits), axis=-1)  # [layers * T, E]
    count = probabilities.shape[1]
    chosen = on_host(paddle.topk(probabilities.detach(), active, axis=-1)[1])
    shares = np.bincount(chosen.reshape(-1), minlength=count).astype("float32") / len(chosen)
    return count * (paddle.to_tensor(shares) * probabilities.mean(0)).sum()

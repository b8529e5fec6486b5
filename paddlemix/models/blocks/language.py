"""One decoder that is InternLM2, InternLM3, Llama, Qwen2, Qwen3, Qwen3-MoE, gpt-oss or Phi-3 by configuration.

All are pre-norm transformers with grouped-query attention, rotary positions and a gated MLP. They differ in biases, in the
scaling of rotary positions, in norms of queries and keys (Qwen3), attention sinks and sliding windows (gpt-oss), mixtures of
experts (Qwen3-MoE, gpt-oss; :mod:`~.experts`), and in how checkpoints name and slice their weights, which is the concern of
the checkpoints' table. Inside, queries, keys and values are one product, and so are gate and up. ``B`` rows, ``N`` new
tokens, ``S`` positions so far, ``D`` hidden width in the shapes below.
"""

import math

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from paddlemix.kernels import gemm

from .experts import GatedMLP, MixtureOfExperts
from .kv_cache import KVCache
from .last import LastPositions, last_of
from .layers import AttentionMask, Linear, RMSNorm, Rotary, attention, count_parameters, rotated


class RotaryTables:
    """Cosines and sines of rotary positions, computed once and looked up by position (arXiv 2104.09864).

    Scalings: ``linear`` divides positions; ``dynamic`` (NTK) raises the base once a sequence is longer than
    ``max_position_embeddings``, by the length reached so far, as InternLM2 does; ``longrope`` divides frequencies by
    Phi-3's short or long factors (arXiv 2402.13753); ``yarn`` (arXiv 2309.00071) divides the slow ones alone, at every length.
    """

    def __init__(self, config):
        self.config = config
        self._tables = {}

    def _frequencies(self, length):
        """Angle for each position step ``[D / 2]`` float32, and the factor on cosines and sines."""
        config, scaling = self.config, self.config.rope_scaling or {}
        width, base = config.head_dim, config.rope_theta
        exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        if config.rope_type == "dynamic" and length > config.max_position_embeddings:
            factor = scaling["factor"]
            stretch = factor * length / config.max_position_embeddings - (factor - 1)
            base = base * stretch ** (width / (width - 2))
        frequencies = 1.0 / np.float32(base) ** exponent
        if config.rope_type == "linear":
            frequencies = frequencies / np.float32(scaling["factor"])
        if config.rope_type == "yarn":
            return _yarn(config, frequencies)
        if config.rope_type != "longrope":
            return frequencies, 1.0
        native = config.original_max_position_embeddings
        divisors = scaling["long_factor" if length > native else "short_factor"]
        growth = config.max_position_embeddings / native
        amplitude = math.sqrt(1 + math.log(growth) / math.log(native)) if growth > 1 else 1.0
        return frequencies / np.asarray(divisors, dtype=np.float32), amplitude

    def variant(self, length):
        """Sequences with the same variant share their tables, so keys cached under one are valid in the other."""
        if self.config.rope_type == "dynamic" and length > self.config.max_position_embeddings:
            return length
        if self.config.rope_type == "longrope":
            return "long" if length > self.config.original_max_position_embeddings else "short"
        return "native"

    def __call__(self, position_ids, length):
        """Tables for some positions of a sequence.

        Args:
            position_ids: ``[B or 1, N]`` int64.
            length: positions in the whole sequence so far, which decides the scaling; or, for rows of several sequences or
                of different lengths, that of each token's own, an array like ``position_ids``.

        Returns:
            :class:`~.layers.Rotary` ``(cos, sin)``, each ``[B or 1, N, 1, D]`` float32; the first half of ``sin`` is negated.
        """
        if self.config.rope_type in ("dynamic", "longrope"):
            cos, sin, position_ids = self._tables_of_lengths(position_ids, length)
        else:
            cos, sin = self._table("native", int(np.max(length)))
        # embedding() is the lookup that every backend has natively.
        return Rotary(F.embedding(position_ids, table).unsqueeze(2) for table in (cos, sin))

    def _tables_of_lengths(self, position_ids, length):
        """Cosines and sines for sequences of several lengths, each with its own scaling, and where each token's are."""
        lengths, which = np.unique(length, return_inverse=True)
        longest = {self.variant(int(length)): int(length) for length in lengths}  # of each variant, as lengths ascend
        tables = [self._table(variant, length) for variant, length in longest.items()]
        if len(tables) == 1:
            return *tables[0], position_ids
        # one table after the other, each token's position counted from the start of its own
        starts = np.cumsum([0, *(len(cos) for cos, _ in tables[:-1])])
        first = np.array([starts[[*longest].index(self.variant(int(length)))] for length in lengths])
        position_ids = position_ids + paddle.to_tensor(first[which].reshape(np.shape(length)))
        cos, sin = (paddle.concat(parts) for parts in zip(*tables))
        return cos, sin, position_ids

    def _table(self, variant, length):
        """Cosines and sines of a variant for ``length`` positions at least, ``[positions, D]`` each."""
        cos, sin = self._tables.get(variant, (None, None))
        if cos is None or cos.shape[0] < length:
            rows = length if isinstance(variant, int) else 1 << max(length - 1, 255).bit_length()
            frequencies, amplitude = self._frequencies(length)
            angles = np.outer(np.arange(rows, dtype=np.float32), frequencies)
            cos_half, sin_half = np.cos(angles) * amplitude, np.sin(angles) * amplitude
            cos = paddle.to_tensor(np.concatenate([cos_half, cos_half], -1).astype("float32"))
            sin = paddle.to_tensor(np.concatenate([-sin_half, sin_half], -1).astype("float32"))
            if isinstance(variant, int):  # one length's tables are of no use to the next
                self._tables = {k: v for k, v in self._tables.items() if not isinstance(k, int)}
            self._tables[variant] = (cos, sin)
        return cos, sin

    def lengths(self, position_ids):
        """For each of ``position_ids [B or 1, N]`` the length of its sequence, an array; a sequence starts where they restart.

        Arrays of NumPy are best: a tensor would have to come from the device.

        N for all where scaling does not depend on it.
        """
        if self.config.rope_type not in ("dynamic", "longrope"):
            return position_ids.shape[1]
        positions = np.asarray(position_ids)
        lengths = np.empty_like(positions)
        for row, found in zip(positions, lengths):
            ends = np.append(np.flatnonzero(np.diff(row) <= 0) + 1, len(row))
            found[:] = np.repeat(row[ends - 1] + 1, np.diff(ends, prepend=0))
        return lengths


def _yarn(config, frequencies):
    """Frequencies that YaRN (arXiv 2309.00071) has in place of ``frequencies [D / 2]``, and the factor on cosines and sines.

    What turns more than ``beta_fast`` times within the original context stays, what turns less than ``beta_slow`` times is
    divided by ``factor``, and between the two it goes over linearly.
    """
    scaling, native = config.rope_scaling, config.original_max_position_embeddings
    factor = scaling.get("factor") or config.max_position_embeddings / native

    def index_of(turns):  # of the frequency that turns so many times
        return config.head_dim * math.log(native / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = index_of(scaling.get("beta_fast") or 32), index_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    slow = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 1e-3), 0, 1).astype("float32")
    amplitude = scaling.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return frequencies * (1 - slow) + frequencies / np.float32(factor) * slow, amplitude


class DecoderAttention(nn.Layer):
    """Causal attention with grouped queries."""

    def __init__(self, config, index):
        super().__init__()
        self.width = width = config.head_dim
        self.index, self.window = index, config.window(index)
        self.split = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.fused = config.fused_projections
        if self.fused:
            self.qkv_proj = Linear(config.hidden_size, sum(self.split) * width, bias=config.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                Linear(config.hidden_size, heads * width, bias=config.qkv_bias) for heads in self.split
            )
        self.o_proj = Linear(config.num_attention_heads * width, config.hidden_size, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(width, config.rms_norm_eps) for _ in "qk")
        self.sinks = None
        if config.sinks:
            normal = nn.initializer.Normal(std=config.initializer_range)
            self.sinks = self.create_parameter([config.num_attention_heads], default_initializer=normal)

    def project(self, x, rope):
        """``x [B, N, D]`` -> rotated queries ``[B, N, H, d]`` and keys, and values, ``[B, N, K, d]``."""
        batch, tokens, _ = x.shape
        if self.fused:
            qkv = self.qkv_proj(x).reshape([batch, tokens, sum(self.split), -1])
        else:
            products = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            qkv = [y.reshape([batch, tokens, heads, -1]) for y, heads in zip(products, self.split)]
        norms = (self.q_norm, self.k_norm) if self.qk_norm else None  # each head by itself
        return rotated(qkv, self.split, rope, norms)

    def forward(self, x, rope, mask, cache, residual=None, last=None):
        """``residual + attention(x)``, all ``[B, N, D]``; with ``last``, :class:`~.last.LastPositions`, of these alone."""
        q, k, v = self.project(x, rope)
        first, length = 0, None
        if cache is not None:
            k, v = cache.append(self.index, k, v)
            first = max(0, cache.length - k.shape[1])
            length = cache.length - first
        if last is None:
            return self.o_proj(attention(q, k, v, mask, self.window, self.sinks, first, length), residual=residual)
        rows = x.shape[0]

        def attend(q, k, v, length, starts):
            own = mask if q.shape[0] == rows else AttentionMask(starts)
            return attention(q, k[:, :length], v[:, :length], own, self.window, self.sinks, first)

        seen = last.attend(attend, last.take(q)[:, :1], k, v, k.shape[1] if length is None else length, mask.starts)
        return self.o_proj(last.copied(seen), residual=None if residual is None else last.take(residual))


class CrossAttention(nn.Layer):
    """What the first positions take from a picture (arXiv 2312.14238, section 3.2): no mask, no positions."""

    def __init__(self, config):
        super().__init__()
        width, picture = config.hidden_size, config.cross_attention_width
        self.heads, self.positions = config.num_attention_heads, config.cross_attention_positions
        self.norm1 = RMSNorm(width, config.rms_norm_eps)
        self.norm2 = RMSNorm(picture, config.rms_norm_eps)
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(picture, width, bias=False)
        self.v_proj = Linear(picture, width, bias=False)
        self.o_proj = Linear(width, width, bias=False)

    def forward(self, x, picture):
        """``x [B, N, D]`` with attention to ``picture [B, P, D_vision]`` added to the first positions."""
        first = x if x.shape[1] == self.positions else x[:, : self.positions]
        split = [0, 0, self.heads, x.shape[-1] // self.heads]
        q, seen = self.q_proj(self.norm1(first)), self.norm2(picture)
        k, v = self.k_proj(seen), self.v_proj(seen)
        first = self.o_proj(attention(q.reshape(split), k.reshape(split), v.reshape(split)), residual=first)
        return first if x.shape[1] == self.positions else paddle.concat([first, x[:, self.positions :]], axis=1)


class DecoderLayer(nn.Layer):
    """Pre-norm block."""

    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_sparse = config.is_sparse(index)
        self.mlp = MixtureOfExperts(config) if self.is_sparse else GatedMLP(config, config.intermediate_size, config.mlp_bias)
        frequency = config.cross_attention_frequency
        self.cross_attn = CrossAttention(config) if frequency and index % frequency == 0 else None

    def queries_and_keys(self, x, rope):
        """What attention compares: rotated queries ``[B, N, H, d]`` and keys ``[B, N, K, d]`` of ``x [B, N, D]``."""
        return self.self_attn.project(self.input_layernorm(x), rope)[:2]

    def forward(self, x, rope, mask, cache=None, picture=None, with_router=False, last=None):
        """``[B, N, D] -> [B, N, D]``; ``with_router`` adds a sparse layer's router logits ``[B * N, experts]``.

        With ``last``, :class:`~.last.LastPositions`, keys and values are of all positions and all else of these,
        ``[B, copies, D]``.
        """
        if picture is not None and self.cross_attn is not None:
            x = self.cross_attn(self.self_attn(self.input_layernorm(x), rope, mask, cache, residual=x), picture)
            normed = self.post_attention_layernorm(x)
        else:
            attended = self.self_attn(self.input_layernorm(x), rope, mask, cache, last=last)
            x, normed = self.post_attention_layernorm.add(x if last is None else last.take(x), attended)
        return self.mlp(normed, residual=x, with_router=True) if with_router else self.mlp(normed, residual=x)


class Decoder(nn.Layer):
    """Token embeddings, the stack of blocks and the final norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            weight_attr=paddle.ParamAttr(initializer=nn.initializer.Normal(std=config.initializer_range)),
        )
        self.layers = nn.LayerList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = RotaryTables(config)
        self.enable_recompute = False
        self.together = None  # the engine's: all blocks in one call, or None where it cannot

    def forward(self, inputs_embeds, position_ids, mask, cache=None, picture=None, router_logits=None, positions=None):
        """``inputs_embeds [B, N, D]``, ``position_ids [B or 1, N]`` -> hidden states ``[B, N, D]``, normalised.

        ``router_logits``, a list, gets those of each sparse layer, ``[B * N, experts]``. ``positions`` are those asked for, as
        of :class:`LanguageModel`.
        """
        tokens = inputs_embeds.shape[1]
        if cache is not None:
            cache.reserve(tokens)
        lengths = self.rope.lengths(position_ids) if cache is None else cache.rotary_lengths
        if isinstance(position_ids, np.ndarray):
            position_ids = paddle.to_tensor(position_ids)
        rope = self.rope(position_ids, lengths)
        if self.together is not None and cache is not None:
            x = self.together(inputs_embeds, rope, mask, cache, picture)
            if x is not None:
                return self.norm(x)
        x, last = inputs_embeds, None
        if positions is not None and picture is None and router_logits is None:
            last = LastPositions.of(positions, tokens, x.shape[0], mask)
        for layer in self.layers if last is None else self.layers[:-1]:
            noted = router_logits is not None and layer.is_sparse
            if self.enable_recompute and self.training:
                x = paddle.distributed.fleet.utils.recompute(layer, x, rope, mask, None, picture, noted, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache, picture, noted) if noted else layer(x, rope, mask, cache, picture)
            if noted:
                x, logits = x
                router_logits.append(logits)
        if last is not None:
            return self.norm(self.layers[-1](x, rope, mask, cache, last=last)[:, :1])
        return self.norm(x if positions is None else last_of(x, positions))


class TiedHead(nn.Layer):
    """Output head whose weight is the token embedding: one parameter, whose gradient is the sum of both uses."""

    def __init__(self, embedding):
        super().__init__()
        # Not as a sublayer: the parameter has one name, the embedding's.
        object.__setattr__(self, "embedding", embedding)

    def forward(self, x):
        """``[..., D] -> [..., V]``."""
        linear = gemm.linear_for(x, self.embedding.weight, turned=True)
        if linear is not None:
            return linear(x, self.embedding.weight, turned=True)
        return paddle.matmul(x, self.embedding.weight.astype(x.dtype), transpose_y=True)


class LanguageModel(nn.Layer):
    """Decoder with its output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.parameter_count = count_parameters(self)  # now: what the engine or few bits take over counts no more

    def new_cache(self, batch, capacity, dtype):
        """An empty :class:`KVCache` in ``dtype``, unless the engine has one of its own."""
        return KVCache(self.config, batch, capacity, getattr(self, "cache_dtype", dtype))

    def embed(self, input_ids):
        """Token ids ``[B, N]`` -> embeddings ``[B, N, D]``."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self, inputs_embeds, position_ids=None, mask=None, cache=None, picture=None, router_logits=None, positions=None
    ):
        """Hidden states ``[B, N, D]`` before the head; :attr:`lm_head` turns the positions that matter into logits.

        Args:
            inputs_embeds: ``[B, N, D]``.
            position_ids: ``[B or 1, N]`` int64, array or tensor; by default the positions that follow what the cache holds.
            mask: :class:`AttentionMask`; None for a plain causal one.
            cache: :class:`KVCache` with the keys and values of earlier positions.
            picture: ``[B, P, D_vision]``, what the first positions look at in the blocks that have cross-attention.
            router_logits: a list that gets the router's logits of each sparse layer.
            positions: the one among the ``N`` of each row that is asked for, ``[B]``, or -1 for the last of all: what comes
                back is then ``[B, 1, D]``, and the last block computes no more than that needs.
        """
        if position_ids is None:
            start = 0 if cache is None else cache.length
            position_ids = np.arange(start, start + inputs_embeds.shape[1], dtype="int64")[None]
        return self.model(inputs_embeds, position_ids, mask or AttentionMask(), cache, picture, router_logits, positions)

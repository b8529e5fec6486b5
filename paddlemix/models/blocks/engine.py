"""The CPU inference engine: the same model with its blocks replaced by fused ones.

Paddle's eager mode has no bfloat16 arithmetic on CPU and computes attention, softmax and GELU slowly. :func:`fuse` packs
the weights of each block for the kernels of ``paddlemix.kernels.cpu``, in bfloat16 or float32, and frees the originals;
activations stay float32 tensors, so that everything around the blocks works as before. A fused model answers, but cannot
be trained, and is saved from the files that it came from.
"""

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from paddlemix import device
from paddlemix.errors import DeviceError
from paddlemix.kernels import cpu as kernels
from paddlemix.kernels import quantised as quantised_kernels
from paddlemix.kernels.decoder import MOST_ROWS, DecoderStack

from .experts import run_experts
from .kv_cache import INT8
from .language import TiedHead
from .layers import Linear
from .quantising import QuantisedEmbedding, QuantisedLinear
from .vision import VisionAttention, VisionLayer

ENGINES = ("auto", "eager", "inference")

# From about this many parameters on, the engine answers noticeably sooner; from the other on, by more than the seconds that
# compiling its kernels takes.
_WORTHWHILE = 1_000_000
_WORTH_COMPILING = 100_000_000


def choose(engine, dtype, parameters):
    """Settle ``auto``: the engine and dtype that answer fastest here, without a wait that the answer does not make up for.

    On CPU the engine is faster for every size. Large models use it, in bfloat16 where the processor has it. Models of less
    than a hundred million parameters, whose first answer is there before the kernels were compiled, use it from when they
    have been compiled for any reason (a larger model, ``engine="inference"``), and in float32, in which their answers do
    not depend on that. Below a million parameters, which only tests have, plain Paddle does.

    Args:
        engine: ``auto``, ``eager`` (plain Paddle) or ``inference`` (fused, CPU only).
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        parameters: size of the model.

    Returns:
        (engine, dtype), neither of them ``auto``.

    Raises:
        DeviceError: what was asked for is not available here.
    """
    if engine not in ENGINES:
        raise DeviceError(f"engine '{engine}' is not known: use one of {', '.join(ENGINES)}")
    if not device.is_cpu():
        if engine == "inference":
            raise DeviceError("--engine inference is for CPU: use --engine eager on other devices")
        return "eager", device.resolve_dtype(dtype)
    if engine == "auto" and dtype != "bfloat16":  # of which only the engine is capable
        if dtype == "float16" or parameters < _WORTHWHILE:
            engine = "eager"
        elif parameters < _WORTH_COMPILING:
            engine, dtype = ("auto", "float32") if kernels.compiled() else ("eager", dtype)
    if engine == "eager":
        return "eager", device.resolve_dtype(dtype)

    fastest = ("bfloat16", "float32") if kernels.has_bfloat16() else ("float32",)
    for candidate in fastest if dtype == "auto" else (dtype,):
        if candidate != "float16" and kernels.available(candidate):
            return "inference", candidate
    if engine == "inference":
        raise DeviceError(
            f"--engine inference is not available in {dtype} on this machine (see the warning): use --engine eager"
        )
    return "eager", device.resolve_dtype(dtype)


def fuse(model, dtype, packs=None):
    """Replace the blocks of an :class:`~.modeling.InternVLChatModel` by fused ones, one at a time.

    Args:
        model: in float32 or bfloat16, on CPU; it is changed.
        dtype: of packed weights and products, ``bfloat16`` or ``float32``.
        packs: :class:`~.packs.Packs` that have the weights packed already, or take them for the next time; None for none.
    """
    pack = _Packer(dtype, packs)
    vision, language = model.vision_model, model.language_model
    embeddings = vision.embeddings
    embeddings.patch_embedding = _PatchEmbedding(embeddings.patch_embedding, dtype)
    embeddings.to(dtype="float32")
    for i, layer in enumerate(vision.encoder.layers):
        vision.encoder.layers[i] = _VisionLayer(layer, pack)
    for i, layer in enumerate(language.model.layers):
        language.model.layers[i] = _DecoderLayer(layer, pack, i == len(language.model.layers) - 1)
    if len(model.mlp1):
        model.mlp1 = _Projector(model.mlp1, pack)
    for name in ("mlp2", "pooling_before_gating", "gating"):  # small, and plain
        if hasattr(model, name):
            getattr(model, name).to(dtype="float32")
    language.lm_head = _Head(language.lm_head, pack)  # may be the embedding, which is then there twice: packed and not
    if not isinstance(language.model.embed_tokens, QuantisedEmbedding):
        rows = None if packs is None else packs.embeddings
        language.model.embed_tokens = _Embedding(language.model.embed_tokens) if rows is None else _MappedEmbedding(rows, dtype)
    language.model.norm = _Norm(language.model.norm)
    if getattr(language, "cache_dtype", None) != INT8:
        language.cache_dtype = dtype  # attention rounds keys and values to it anyway
    language.model.together = _together(language.model.layers)
    language.rows_alone = language.model.together is not None and _computes_rows_alone(language)
    model.engine_dtype = dtype
    model.packed, model.source = True, None  # who knows where the weights came from says so again
    # A large tile's activations fit the cache, and more at a time only cost memory; small ones are not worth a call each.
    tokens = (model.config.image_size // embeddings.patch_embedding.patch) ** 2
    model.vision_batch = max(1, 1024 // tokens)
    model.eval()


def fuse_frozen_tower(model, dtype):
    """Let a large vision tower that does not learn compute as in the engine, in ``dtype``; its own weights stay beside.

    Only where the CPU kernels work, and the tower's blocks are whole and plain.
    """
    encoder = getattr(getattr(model, "vision_model", None), "encoder", None)
    layers = getattr(encoder, "layers", ())
    plain = all(type(layer) is VisionLayer and type(layer.attn) is VisionAttention for layer in layers)
    sizes = [p.size if p.stop_gradient else None for layer in layers for p in layer.parameters()]
    linears = [part for layer in layers for part in layer.sublayers() if hasattr(part, "product")]
    plain = plain and all(type(part) is Linear and part.group is None for part in linears)
    if plain and None not in sizes and sum(sizes) >= _WORTH_COMPILING and kernels.available(dtype):
        pack = _Packer(dtype)
        encoder.fused = [_VisionLayer(layer, pack) for layer in layers]


def _norm(layer):
    bias = getattr(layer, "bias", None)
    eps = layer.eps if bias is None else layer._epsilon
    return kernels.Norm(layer.weight.astype("float32"), None if bias is None else bias.astype("float32"), eps)


class _Packer:
    """Weights of linear layers for the kernels, in ``dtype``."""

    def __init__(self, dtype, packs=None):
        self.dtype, self.packs, self.room = dtype, packs, kernels.Room()

    def __call__(self, layer, scale=None, columns=None):
        """``scale [out]`` is multiplied in; of ``columns``, a slice, alone if given."""
        if isinstance(layer, QuantisedLinear):
            return _pack_quantised(layer, self.dtype, scale, columns)
        if isinstance(layer, TiedHead):
            outputs, inputs = layer.embedding.weight.shape
            return self._linear(
                (inputs, outputs),
                None,
                lambda: kernels.PackedLinear(layer.embedding.weight, None, self.dtype, transposed=True),
            )
        bias, (inputs, outputs) = layer.bias, layer.weight.shape
        if columns is not None:
            bias, outputs = None if bias is None else bias[columns], len(range(*columns.indices(outputs)))
        bias = None if bias is None else bias.astype("float32").contiguous()
        if scale is not None:
            scale = scale.astype("float32")
            bias = None if bias is None else bias * scale

        def make():
            weight = layer.weight if scale is None else layer.weight.astype("float32") * scale
            return kernels.PackedLinear(weight, bias, self.dtype, outputs=columns)

        return self._linear((inputs, outputs), bias, make)

    def release(self, *layers):
        """Give back the memory of layers that have been packed, before others are."""
        for layer in layers:
            weight = getattr(layer, "weight", None)
            if weight is not None and weight._is_initialized():
                weight._clear_data()

    def _linear(self, shape, bias, make):
        return make() if self.packs is None else self.packs.linear(shape, bias, self.dtype, make)


def _pack_quantised(layer, dtype, scale, columns):
    weight, bias = layer.quantised, None if layer.bias is None else layer.bias.astype("float32").numpy()
    if columns is not None:
        weight, bias = weight.rows(columns), None if bias is None else bias[columns]
    if scale is not None:
        scale = scale.astype("float32").numpy()
        weight, bias = weight.scaled(scale), None if bias is None else bias * scale
    return quantised_kernels.QuantisedLinear(weight, bias, dtype, layer.activations)


class _Norm(nn.Layer):
    def __init__(self, layer):
        super().__init__()
        self.norm = _norm(layer)

    def forward(self, x):
        return self.norm(x)


class _Linear(nn.Layer):
    def __init__(self, layer, pack):
        super().__init__()
        self.linear = pack(layer)

    def forward(self, x):
        return self.linear(x)


class _Head(_Linear):
    """An output head, whose rows are few but in training."""

    def __init__(self, layer, pack):
        super().__init__(layer, pack)
        self.linear.few = True


class _PatchEmbedding(nn.Layer):
    """:class:`~.vision.PatchEmbedding` as one product: no two patches share a pixel."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.patch = layer.weight.shape[-1]
        weight = layer.weight.reshape([layer.weight.shape[0], -1])  # [D, channels * patch * patch]
        self.linear = kernels.PackedLinear(weight, layer.bias.astype("float32"), dtype, transposed=True)

    def forward(self, pixel_values):
        tiles, channels, height, width = pixel_values.shape
        rows, columns = height // self.patch, width // self.patch
        pixels = pixel_values.astype("float32").numpy().reshape([tiles, channels, rows, self.patch, columns, self.patch])
        patches = pixels.transpose([0, 2, 4, 1, 3, 5]).reshape([tiles, rows, columns, -1])  # a third of the time of Paddle's
        return self.linear(paddle.from_dlpack(patches))


class _Embedding(nn.Layer):
    """Token embeddings stay as they are stored: only a few rows are looked up at a time."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight

    def forward(self, ids):
        return F.embedding(ids, self.weight).astype("float32")


class _MappedEmbedding(nn.Layer):
    """Token embeddings where they lie in the checkpoint's file, ``[V, D]`` float32 or bits of bfloat16."""

    def __init__(self, rows, dtype):
        super().__init__()
        self.rows, self.dtype = rows, dtype

    def forward(self, ids):
        rows = self.rows[ids.numpy()]
        if rows.dtype == np.uint16:
            return paddle.to_tensor((rows.astype(np.uint32) << 16).view(np.float32))
        rows = paddle.to_tensor(rows)
        return rows.astype(self.dtype).astype("float32") if self.dtype != "float32" else rows


class _Projector(nn.Layer):
    """:class:`~.projector.Projector` and :class:`~.projector.MLPProjector`, fused."""

    def __init__(self, layer, pack):
        super().__init__()
        norms = [part for part in layer if isinstance(part, nn.LayerNorm)]
        self.norm = _norm(norms[0]) if norms else None
        self.linears = [pack(part) for part in layer if part not in norms]

    def forward(self, x):
        if len(self.linears) == 2:
            return kernels.mlp(x, *self.linears, norm=self.norm, activation="gelu")
        for i, linear in enumerate(self.linears):
            last = i == len(self.linears) - 1
            x = linear(x, norm=None if i else self.norm, activation=None if last else "gelu")
        return x


class _VisionLayer(nn.Layer):
    """:class:`~.vision.VisionLayer`, fused; layer scale is part of the weights."""

    def __init__(self, layer, pack):
        super().__init__()
        attn, mlp = layer.attn, layer.mlp
        self.dtype, self.heads, self.room = pack.dtype, attn.heads, pack.room
        self.norm1, self.norm2 = _norm(layer.norm1), _norm(layer.norm2)
        self.qk_norms = (_norm(attn.q_norm), _norm(attn.k_norm)) if attn.qk_normalization else None
        self.qkv, self.proj = pack(attn.qkv), pack(attn.proj, layer.ls1)
        self.rounded = getattr(attn.qkv, "activations", None) == "int8"
        pack.release(attn.qkv, attn.proj)
        self.fc1, self.fc2 = pack(mlp.fc1), pack(mlp.fc2, layer.ls2)
        pack.release(mlp.fc1, mlp.fc2)

    def forward(self, x):
        """The result takes the place of ``x``, as the encoder hands each block what nobody else needs."""
        tiles, tokens, width = x.shape
        qkv = self.qkv(x, norm=self.norm1, out=self.room("qkv", [tiles, tokens, 3 * width]))
        q, k, v = (qkv[:, :, at : at + width] for at in range(0, 3 * width, width))  # views, where split() would copy
        if self.qk_norms:
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        q, k, v = (part.reshape([tiles, tokens, self.heads, width // self.heads]) for part in (q, k, v))
        attended = kernels.attention(
            q, k, v, causal=False, dtype=self.dtype, rounded=self.rounded, out=self.room("attended", x.shape)
        )
        between = self.proj(attended, residual=x, out=self.room("between", x.shape))
        return kernels.mlp(between, self.fc1, self.fc2, norm=self.norm2, activation="gelu", residual=between, out=x)


class _DecoderLayer(nn.Layer):
    """:class:`~.language.DecoderLayer`, fused."""

    def __init__(self, layer, pack, is_last):
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        self.dtype, self.index, (self.heads, self.kv_heads, _) = pack.dtype, attn.index, attn.split
        self.norm1, self.norm2 = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.qkv, self.o = pack(attn.qkv_proj), pack(attn.o_proj)
        # Of the last block's queries only those of the positions that are asked for are computed in a prompt.
        keys = slice(self.heads * attn.width, None)
        self.kv = pack(attn.qkv_proj, columns=keys) if is_last else None
        pack.release(attn.qkv_proj, attn.o_proj)
        self.qk_norms = (_norm(attn.q_norm), _norm(attn.k_norm)) if attn.qk_norm else None
        self.window, self.sinks = attn.window, None if attn.sinks is None else attn.sinks.astype("float32")
        self.is_sparse = layer.is_sparse
        self.mlp = _Experts(mlp, pack) if layer.is_sparse else _GatedMLP(mlp, pack)

    def _stores(self, qkv, heads, dtype="float32"):
        """Room for the keys and values of ``qkv [B, N, ...]`` with so many heads of queries, where there is no cache."""
        width = qkv.shape[-1] // (heads + 2 * self.kv_heads)
        return [paddle.empty([*qkv.shape[:2], self.kv_heads, width], dtype) for _ in range(2)]

    def queries_and_keys(self, x, rope):
        """As :meth:`.language.DecoderLayer.queries_and_keys`."""
        qkv = self.qkv(x, norm=self.norm1)
        keys, values = self._stores(qkv, self.heads)
        return kernels.rotate_and_cache(qkv, *rope, self.heads, keys, values, 0, self.qk_norms), keys

    def forward(self, x, rope, mask, cache=None, picture=None, with_router=False, last=None):
        tokens = x.shape[1]
        if mask.segments is not None or not mask.is_spans or picture is not None:
            raise ValueError("packed rows, a prefix that sees itself and cross-attention are for the eager engine")
        qkv = self.qkv(x, norm=self.norm1) if last is None else self.kv(x, norm=self.norm1)
        heads = self.heads if last is None else 0
        paged = getattr(cache, "is_paged", False)
        # A sliding layer's cache keeps the last positions, which have no fixed place; pages have none either, and 8 bits are
        # not what attention takes.
        appends = paged or (cache is not None and (self.window is not None or cache.dtype == INT8))
        if cache is None or appends:
            # Pages in float32 have numbers that are rounded once, when they come.
            kept = self.dtype if paged and cache.dtype != INT8 else "float32"
            (keys, values), length = self._stores(qkv, heads, kept), tokens
        else:
            (keys, values), length = cache.stores(self.index), cache.length
        q = kernels.rotate_and_cache(qkv, *rope, heads, keys, values, length - tokens, self.qk_norms)
        starts = mask.starts
        if appends:
            keys, values = cache.append(self.index, keys, values)
            length = keys.shape[1]
            starts = starts if starts is None or paged else np.maximum(starts - (cache.length - length), 0)

        def attend(q, keys, values, length, starts):
            seen = {"length": length, "starts": starts, "window": self.window, "sinks": self.sinks}
            return kernels.attention(q, keys, values, causal=True, dtype=self.dtype, **seen)

        if last is None:
            out = attend(q, keys, values, length, starts)
        else:
            x, tables = last.take(x), [last.take(table) for table in rope]
            q = self.queries_and_keys(x, tables)[0][:, :1]
            out = last.copied(last.attend(attend, q, keys, values, length, starts))
        x = self.o(out, residual=x)
        return self.mlp(x, self.norm2, with_router=True) if with_router else self.mlp(x, self.norm2)


def _together(layers):
    """All blocks in one call for one new token a row, which is what a step of decoding has; None where some are of another
    kind. It answers None for what it cannot do, which goes through the blocks one by one."""
    if any(layer.is_sparse or layer.mlp.limit is not None or layer.window is not None for layer in layers):
        return None
    kinds = (kernels.PackedLinear, quantised_kernels.QuantisedLinear)
    parts = []
    for layer in layers:
        mlp = layer.mlp
        if len({type(linear) for linear in (mlp.gate, mlp.up, mlp.down)}) > 1 or type(layer.qkv) not in kinds:
            return None
        names = {"norm1": layer.norm1, "norm2": layer.norm2, "qk_norms": layer.qk_norms, "sinks": layer.sinks}
        parts.append({**names, "qkv": layer.qkv, "o": layer.o, "gate": mlp.gate, "up": mlp.up, "down": mlp.down})
    stack = DecoderStack(parts, layers[0].heads, layers[0].dtype)

    def together(x, rope, mask, cache, picture):
        rows, tokens = x.shape[:2]
        if tokens > 1 or rows > MOST_ROWS or mask.segments is not None or not mask.is_spans or picture is not None:
            return None
        layout = cache.layout()
        return None if layout is None else stack(x, *rope, layout, cache.length, mask.starts)

    return together


def _computes_rows_alone(language):
    """Whether no row of a step of decoding depends on how many there are."""
    linears = [language.lm_head.linear]
    for layer in language.model.layers:
        linears += [layer.qkv, layer.o, layer.mlp.gate, layer.mlp.up, layer.mlp.down]
    return all(linear.alone for linear in linears)


class _GatedMLP:
    """:class:`~.experts.GatedMLP`, fused where its gate is SiLU."""

    def __init__(self, layer, pack):
        product, self.limit = layer.gate_up_proj, layer.limit
        hidden = (product.out_features if isinstance(product, QuantisedLinear) else product.weight.shape[1]) // 2
        # gpt-oss has gate and up in turn.
        gate, up = (slice(0, hidden), slice(hidden, None)) if self.limit is None else (slice(0, None, 2), slice(1, None, 2))
        self.gate, self.up = (pack(product, columns=columns) for columns in (gate, up))
        pack.release(product)
        self.down = pack(layer.down_proj)
        pack.release(layer.down_proj)

    def __call__(self, x, norm):
        """``x + mlp(norm(x))``."""
        return self.run(x, norm, residual=x)

    def run(self, x, norm=None, residual=None):
        """``residual + mlp(norm(x))``, for ``x [..., D]``."""
        if self.limit is None:
            return kernels.mlp(x, self.up, self.down, self.gate, norm, "silu", residual)
        gate, up = self.gate(x, norm).clip(max=self.limit), self.up(x, norm).clip(-self.limit, self.limit)
        return self.down((up + 1) * gate * F.sigmoid(1.702 * gate), residual=residual)


class _Experts:
    """:class:`~.experts.MixtureOfExperts`: all weights packed, and only those read that a token goes through."""

    def __init__(self, layer, pack):
        self.router = layer.gate.float()
        self.experts = [_GatedMLP(expert, pack) for expert in layer.experts]

    def __call__(self, x, norm, with_router=False):
        """``x + mixture(norm(x))``, and the router's logits as :meth:`~.experts.MixtureOfExperts.forward`."""
        flat = norm(x).reshape([-1, x.shape[-1]])
        logits, chosen, weights = self.router(flat)
        x = x + run_experts(flat, chosen, weights, [expert.run for expert in self.experts]).reshape(x.shape)
        return (x, logits) if with_router else x

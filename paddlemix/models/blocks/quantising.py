"""Layers whose weights are in 8 or 4 bits: which of a model's have them, and the plain ones that compute on every device.

Matrices of the parts in question get the bits that were asked for; the output head and the token embeddings 8, since few of
their numbers are read for a token and their errors reach every answer. Activations stay as they are. On CPU the engine
(:mod:`~.engine`) takes these layers into its kernels; the plain ones turn a weight into floating point for each product.
"""

import warnings

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from paddlemix import device, quantised
from paddlemix.checkpoints import cache
from paddlemix.checkpoints.checkpoint import load_checkpoint
from paddlemix.errors import ConfigError
from paddlemix.kernels import cpu

from .language import TiedHead
from .layers import Linear
from .lora import LoRALinear, merge_lora

DEFAULT_PARTS = ("language", "projector")
_WHERE = {"language": "language_model.", "projector": "mlp1.", "vision": "vision_model.encoder."}


class QuantisedLinear(Linear):
    """A linear layer with its weight in few bits, ``[out, in]``; otherwise as :class:`~.layers.Linear`, but not to be trained.

    Args:
        layer: the layer that it stands for; its bias is taken over.
        bits: of a weight that comes in floating point.
    """

    def __init__(self, layer, bits):
        nn.Layer.__init__(self)  # not Linear's, which would allocate a weight
        self.bias, self.name, self.bits = layer.bias, None, bits
        self.in_features, self.out_features = layer.weight.shape
        self.quantised, self._plain = None, None

    def take(self, weight):
        """Hold a weight: a :class:`~paddlemix.quantised.Quantised`, or an array ``[out, in]`` to be rounded."""
        self.quantised, self._plain = rounded(weight, self.bits), None

    def forward(self, x, gelu=False, scale=None, residual=None):
        """As :meth:`~.layers.Linear.forward`."""
        y = self._product(x)
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype)
        if gelu:
            y = F.gelu(y)
        if scale is not None:
            y = y * scale
        return y if residual is None else residual + y

    def _product(self, x):
        if self._plain is None:
            self._plain = _tensors(self.quantised, x.dtype)
        codes, scales, zeros, order = self._plain
        out, groups = scales.shape[:2]
        weight = codes.reshape([out, groups, -1]).astype(x.dtype)
        weight = ((weight if zeros is None else weight - zeros) * scales).reshape([out, -1])
        if weight.shape[1] != self.in_features:
            weight = weight[:, : self.in_features]
        if order is not None:
            x = paddle.index_select(x, order, axis=-1)
        return paddle.matmul(x, weight, transpose_y=True)


class QuantisedHead(QuantisedLinear):
    """An output head whose weight is that of :class:`QuantisedEmbedding`: one set of codes."""

    def __init__(self, embedding):
        nn.Layer.__init__(self)
        object.__setattr__(self, "embedding", embedding)  # not as a sublayer, as in TiedHead
        self.bias, self.name, self._plain = None, None, None
        self.out_features, self.in_features = embedding.out_features, embedding.in_features

    @property
    def quantised(self):
        """The embedding's."""
        return self.embedding.quantised


class QuantisedEmbedding(nn.Layer):
    """Token embeddings in 8 bits; rows become floating point when they are looked up, on the host."""

    def __init__(self, layer):
        super().__init__()
        self.quantised, self.bits = None, 8
        self.out_features, self.in_features = layer.weight.shape

    def take(self, weight):
        """As :meth:`QuantisedLinear.take`."""
        self.quantised = rounded(weight, self.bits)

    def forward(self, ids):
        """``ids [B, N] -> [B, N, D]`` float32."""
        numbers = ids.numpy()
        known, places = np.unique(numbers, return_inverse=True)
        rows = self.quantised.dequantised(known)
        return paddle.to_tensor(rows[places.reshape(-1)].reshape([*numbers.shape, -1]))


def rounded(weight, bits):
    """``weight`` as a :class:`~paddlemix.quantised.Quantised`: one, or an array ``[out, in]``, float32 or bits of bfloat16."""
    if isinstance(weight, quantised.Quantised):
        return weight
    if cpu.compiled() and cpu.available("float32"):
        from paddlemix.kernels.quantised import quantise

        return quantise(weight, bits)
    if weight.dtype == np.uint16:
        weight = (weight.astype(np.uint32) << 16).view(np.float32)
    return quantised.quantise(weight, bits)


def _tensors(weight, dtype):
    """Codes ``[out, in]`` int8, scales and zeros ``[out, groups, 1]`` in ``dtype``, order: what plain operators take."""
    name = str(dtype).removeprefix("paddle.")
    scales = weight.scales.astype("float32") * weight.factors[:, None]

    def tensor(array):
        return paddle.to_tensor(array.astype("float32")[..., None]).astype(name)

    zeros = None if weight.zeros is None else tensor(weight.zeros)
    order = None if weight.order is None else paddle.to_tensor(weight.order.astype("int64"))
    codes = paddle.to_tensor(quantised.unpack(weight.codes, weight.bits).astype("int8"))
    return codes, tensor(scales), zeros, order


def check_choice(weight_dtype, parts):
    """The bits that ``weight_dtype`` stands for, None for as many as in the files, and the parts as a tuple.

    Raises:
        ConfigError: a name is not known.
    """
    parts = tuple(parts.split(",")) if isinstance(parts, str) else tuple(DEFAULT_PARTS if parts is None else parts)
    if weight_dtype is not None and weight_dtype not in quantised.BITS:
        raise ConfigError(
            f"weight_dtype is '{weight_dtype}': it must be {' or '.join(quantised.BITS)}, or None for the files' own"
        )
    unknown = [part for part in parts if part not in _WHERE]
    if unknown or not parts:
        raise ConfigError(
            f"quantize_parts names '{''.join(unknown[:1])}': choose from {', '.join(_WHERE)}, separated by commas"
        )
    return None if weight_dtype is None else quantised.BITS[weight_dtype], parts


def prepare(model, weight_dtype=None, parts=None, packed=()):
    """Put layers without weights in the place of those that will have them in few bits.

    ``model.quantised_layers`` is then what fills them: ``{parameter: layer with take()}``.

    Args:
        model: a chat model without weights of use yet.
        weight_dtype: ``int8``, ``int4``, or None for no others than ``packed``.
        parts: of :data:`~paddlemix.quantised.PARTS`, in a sequence or separated by commas; None for language and projector.
        packed: parameters that are in few bits in the files.
    """
    bits, parts = check_choice(weight_dtype, parts)
    model.quantised_layers = layers = dict(model.quantised_layers)
    for path, owner, name, layer in _candidates(model):
        wanted = bits is not None and any(path.startswith(_WHERE[part]) for part in parts)
        parameter = f"{path}.weight"
        if not (wanted or parameter in packed):
            continue
        if isinstance(layer, nn.Embedding):
            if parameter not in packed and not device.is_cpu():
                continue  # there is room for them there, and looking them up on the host would cost time
            new = QuantisedEmbedding(layer)
            if isinstance(model.language_model.lm_head, TiedHead):
                model.language_model.lm_head = QuantisedHead(new)
        else:
            new = QuantisedLinear(layer, 8 if path.endswith("lm_head") else bits or 8)
        owner._sub_layers[name] = layers[parameter] = new
    model.weight_dtype = weight_dtype or ("as stored" if layers else None)
    if layers and device.is_cpu() and not cpu.compiled() and not cpu.available("float32"):
        warnings.warn(
            "weights in few bits are slow without the CPU kernels: install g++ to make them several times as fast", stacklevel=3
        )


def load_quantised(model, source, dtype, keep=None, weight_dtype=None, parts=None):
    """:func:`~paddlemix.checkpoints.checkpoint.load_checkpoint`, with weights in few bits where user or files want that.

    A weight is rounded as soon as it is read, so that no two of them are in memory in floating point; where there are adapters
    to be added first, they all are.

    Args:
        model, source, dtype, keep: as there.
        weight_dtype, parts: as for :func:`prepare`.
    """
    check_choice(weight_dtype, parts)
    adapted = any(isinstance(layer, LoRALinear) for layer in model.sublayers())
    if adapted and weight_dtype is not None:
        load_checkpoint(model, source, dtype)
        merge_lora(model)
        quantise_model(model, weight_dtype, parts)
        return
    if weight_dtype is not None or source.packed:
        prepare(model, weight_dtype, parts, source.packed)
    layers, key = model.quantised_layers, None
    if layers and not source.packed:
        key = cache.key_of(source, {name: layer.bits for name, layer in layers.items()})
        found = cache.find(key, {name: (layer.out_features, layer.in_features, layer.bits) for name, layer in layers.items()})
        for name, weight in (found or {}).items():
            layers[name].take(weight)
            key = None
    load_checkpoint(model, source, dtype, keep)
    if key is not None:
        cache.store_later(key, {name: layer.quantised for name, layer in layers.items()})
    if layers:
        model.packed, model.source = True, source


def quantise_model(model, weight_dtype, parts=None):
    """Round weights that are there, layer by layer."""
    plain = {f"{path}.weight": layer for path, _, _, layer in _candidates(model)}
    prepare(model, weight_dtype, parts)
    for name, layer in model.quantised_layers.items():
        weight = plain[name].weight.astype("float32").numpy()
        layer.take(weight if isinstance(layer, QuantisedEmbedding) else np.ascontiguousarray(weight.T))
        plain[name].weight._clear_data()


def _candidates(model):
    """``(path, owner, its name there, layer)`` of the layers that can have weights in few bits."""
    found = []
    for owner_path, owner in model.named_sublayers(include_self=True):
        for name, layer in owner._sub_layers.items():
            path = f"{owner_path}.{name}".removeprefix(".")
            if path.startswith(tuple(_WHERE.values())) and type(layer) in (Linear, nn.Linear, nn.Embedding):
                found.append((path, owner, name, layer))
    return found

"""Layers whose weights are in 8 or 4 bits: which of a model's have them, and the plain ones that compute on every device.

Matrices of the parts in question get the bits that were asked for; the output head and the token embeddings 8, since few of
their numbers are read for a token and their errors reach every answer. Activations stay as they are. On CPU the engine
(:mod:`~.engine`) takes these layers into its kernels, on devices that have an operator for them they use that
(:mod:`~paddlemix.kernels.weight_only`); the plain ones turn a weight into floating point for each product.

Weights in few bits do not learn, but adapters on them do (QLoRA, arXiv 2305.14314): then only what adapters lie on is in few
bits.
"""

import contextlib
import logging
import math
import threading
import warnings

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from paddlemix import device, quantised
from paddlemix.checkpoints import cache
from paddlemix.checkpoints.checkpoint import load_checkpoint
from paddlemix.checkpoints.saving import reading
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.kernels import cpu
from paddlemix.kernels.weight_only import DeviceWeight, told

from .adapters import adapted_weights
from .language import TiedHead
from .layers import Linear
from .lora import LoRALinear, locate, merge_lora

DEFAULT_PARTS = ("language", "projector")

_log = logging.getLogger(__name__)


class QuantisedLinear(Linear):
    """A linear layer with its weight in few bits, ``[out, in]``; gradients pass through it, but it does not learn.

    Args:
        layer: the layer that it stands for; its bias is taken over.
        bits, group_size: of a weight that comes in floating point.

    Attributes:
        activations: ``int8`` where the inputs are rounded too, else None; see :func:`round_activations`.
        answers_in: dtype of the activations that the device's own operator is to multiply with, which has no gradients; None
            for plain operators.
    """

    activations, answers_in, _there = None, None, None

    def __init__(self, layer, bits, group_size=quantised.BLOCK):
        nn.Layer.__init__(self)  # not Linear's, which would allocate a weight
        self.weight, self.bias, self.name, self.bits, self.group = None, layer.bias, None, bits, getattr(layer, "group", None)
        self.group_size = group_size
        self.in_features, self.out_features = layer.weight.shape
        self.quantised, self._plain = None, None

    def take(self, weight):
        """Hold a weight: a :class:`~paddlemix.quantised.Quantised`, or an array ``[out, in]`` to be rounded."""
        self.quantised, self._plain, self._there = None, None, None
        if self.answers_in is not None and isinstance(weight, np.ndarray):
            self._there = DeviceWeight.of(as_float32(weight), self.bits, self.answers_in)
        else:
            self.quantised = rounded(weight, self.bits, self.group_size)

    def rows(self, shape):
        """What :meth:`take` takes, for its rows to be put into as they are read: :class:`RoundedRows`; None for an array, of
        which the device's own operator makes what it takes."""
        return RoundedRows(shape, self.bits, self.group_size) if self.answers_in is None else None

    def product(self, x, linear, bias):
        """As :meth:`.layers.Linear.product`."""
        weight = self._of_device()
        if weight is not None:
            return weight.product(x, bias)
        y = _Product.apply(x, self)
        return y if bias is None else y + bias.astype(y.dtype)

    def _of_device(self):
        """The weight as the device's own operator takes it; None where there is none."""
        if self._there is None and self.answers_in is not None:
            # Codes of 4 bits with a zero of their own are no codes of the operator's: what they stand for, in 8 bits.
            bits = self.quantised.bits if self.quantised.zeros is None else 8
            self._there = DeviceWeight.of(self.quantised.dequantised(), bits, self.answers_in)
        return self._there

    @property
    def nbytes(self):
        """Memory of the weight."""
        return (self.quantised if self._there is None else self._there).nbytes

    def plain(self):
        """The weight as :class:`PlainWeight`, which is kept."""
        if self._plain is None:
            self._plain = PlainWeight(self.quantised)
        return self._plain


class _Product(PyLayer):
    """``x @ weight^T``, for whose gradient the weight becomes floating point once more instead of being kept so."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        weight = layer.plain()
        rows = weight.sorted(x)
        if layer.activations is not None:
            rows = weight.rounded(rows)
        return paddle.matmul(rows, weight.dequantised(x.dtype), transpose_y=True)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.layer.plain()
        return weight.unsorted(paddle.matmul(gradient, weight.dequantised(gradient.dtype))).astype(ctx.dtype)


class PlainWeight:
    """A :class:`~paddlemix.quantised.Quantised` in tensors of the device in use, for operators that every device has.

    Two codes of 4 bits are in a byte: those of the first half of a row's inputs low, those of the second half high.
    """

    def __init__(self, weight):
        codes = quantised.unpack(weight.codes, weight.bits)
        self.inputs, self.bits, self.group, self.order = weight.inputs, weight.bits, weight.group, None
        if weight.bits == 4:
            half = codes.shape[1] // 2
            codes = (codes[:, :half] | codes[:, half:] << 4).astype("uint8")
        self.codes = paddle.to_tensor(codes if weight.bits == 4 else codes.astype("int8"))
        self.scales = paddle.to_tensor(weight.scales[..., None])
        self.factors = paddle.to_tensor(weight.factors[:, None, None])
        self.shifts = None if weight.zeros is None else paddle.to_tensor(-weight.zeros[..., None])
        if weight.order is not None:
            self.order = paddle.to_tensor(weight.order.astype("int64"))
            self._back = paddle.to_tensor(np.argsort(weight.order).astype("int64"))

    def dequantised(self, dtype):
        """Values ``[out, in]`` in ``dtype``, inputs in the order of the groups."""
        codes = self.codes.astype("float32")
        if self.bits == 4:
            high = (codes * 0.0625).astype("int32").astype("float32")  # floor is no operator of Ascend's
            codes = paddle.concat([codes + high * -16.0, high], axis=1)
        out, groups = self.scales.shape[:2]
        values = codes.reshape([out, groups, -1])
        if self.shifts is not None:
            values = values + self.shifts.astype("float32")
        values = (values * (self.scales.astype("float32") * self.factors)).reshape([out, -1])
        return (values if values.shape[1] == self.inputs else values[:, : self.inputs]).astype(dtype)

    def rounded(self, x):
        """``x [..., in]``, sorted, as :func:`paddlemix.quantised.rounded_activations` leaves it."""
        if not quantised.rounds_activations(self.bits, self.group):
            return x
        width = quantised.padded(self.inputs, self.group)
        values = x.astype("float32")
        if width != self.inputs:
            filler = paddle.zeros([*x.shape[:-1], width - self.inputs])
            values = paddle.concat([values, filler], axis=-1)
        groups = values.reshape([-1, width // self.group, self.group])
        scale = paddle.max(paddle.abs(groups), axis=-1, keepdim=True) * (1 / 127)
        scale = paddle.maximum(scale, paddle.full([1], 1e-30))
        values = (paddle.round(groups / scale) * scale).reshape([*x.shape[:-1], width])
        return (values if width == self.inputs else values[..., : self.inputs]).astype(x.dtype)

    def sorted(self, x):
        """``x [..., in]`` in the order of the groups."""
        return x if self.order is None else paddle.index_select(x, self.order, axis=-1)

    def unsorted(self, x):
        """What :meth:`sorted` took."""
        return x if self.order is None else paddle.index_select(x, self._back, axis=-1)


class QuantisedHead(QuantisedLinear):
    """An output head whose weight is that of :class:`QuantisedEmbedding`: one set of codes."""

    def __init__(self, embedding):
        nn.Layer.__init__(self)
        object.__setattr__(self, "embedding", embedding)  # not as a sublayer, as in TiedHead
        self.weight, self.bias, self.name, self._plain = None, None, None, None
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

    def rows(self, shape):
        """As :meth:`QuantisedLinear.rows`."""
        return RoundedRows(shape, self.bits)

    @property
    def nbytes(self):
        """Memory of the weight."""
        return self.quantised.nbytes

    def forward(self, ids):
        """``ids [B, N] -> [B, N, D]`` float32."""
        numbers = ids.numpy()
        known, places = np.unique(numbers, return_inverse=True)
        rows = self.quantised.dequantised(known)
        return paddle.to_tensor(rows[places.reshape(-1)].reshape([*numbers.shape, -1]))


class RoundedRows:
    """A weight ``shape``, ``(out, in)``, that is rounded some rows at a time, so that it never is there in floating point.

    Attributes:
        whole: the :class:`~paddlemix.quantised.Quantised`, when all rows were put.
    """

    _one = threading.Lock()  # rounding has threads of its own

    def __init__(self, shape, bits, group_size=quantised.BLOCK):
        (out, inputs), self.bits, self.group_size = shape, bits, group_size
        width = quantised.padded(inputs, group_size)
        groups = [out, width // group_size]
        self.whole = quantised.Quantised(
            bits, inputs, group_size, np.empty([out, width * bits // 8], np.uint8), np.empty(groups, np.float16),
            np.empty(groups, np.float16) if bits == 4 else None, np.empty(out, np.float32),
        )  # fmt: skip

    def put(self, first, rows):
        """Round the rows from ``first`` on, as :func:`rounded` does."""
        with self._one:
            part = rounded(np.ascontiguousarray(rows), self.bits, self.group_size)
        for name, array in part.arrays().items():
            getattr(self.whole, name)[first : first + len(rows)] = array


def rounded(weight, bits, group_size=quantised.BLOCK):
    """``weight`` as a :class:`~paddlemix.quantised.Quantised`: one, or an array ``[out, in]``, float32 or bits of bfloat16."""
    if isinstance(weight, RoundedRows):
        return weight.whole
    if isinstance(weight, quantised.Quantised):
        return weight
    if cpu.compiled() and cpu.available("float32"):
        from paddlemix.kernels.quantised import quantise

        return quantise(weight, bits, group_size)
    return quantised.quantise(as_float32(weight), bits, group_size)


def as_float32(weight):
    """An array, float32 or bits of bfloat16, as float32."""
    return (weight.astype(np.uint32) << 16).view(np.float32) if weight.dtype == np.uint16 else weight


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
    unknown = [part for part in parts if part not in quantised.PARTS]
    if unknown or not parts:
        raise ConfigError(
            f"quantize_parts names '{''.join(unknown[:1])}': choose from {', '.join(quantised.PARTS)}, separated by commas"
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
        wanted = bits is not None and any(path.startswith(quantised.PARTS[part]) for part in parts)
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
            few = 8 if path.endswith("lm_head") else bits or 8
            new = QuantisedLinear(layer, few, quantised.group_size(parameter, layer.weight.shape[0], few))
        owner._sub_layers[name] = layers[parameter] = new
    model.weight_dtype = weight_dtype or ("as stored" if layers else None)
    if layers and device.is_cpu() and not cpu.compiled() and not cpu.available("float32"):
        warnings.warn(
            "weights in few bits are slow without the CPU kernels: install g++ to make them several times as fast", stacklevel=3
        )


def round_activations(model, dtype):
    """Let what meets weights in few bits be rounded too, each group of a token's inputs by itself: ``int8``, or None for not.

    Raises:
        ConfigError: it is not known, or not for this model or device.
    """
    if dtype is None:
        return
    if dtype != "int8":
        raise ConfigError(f"activation_dtype is '{dtype}': it must be int8, or None for activations as they are")
    layers = [layer for layer in model.sublayers() if isinstance(layer, QuantisedLinear)]
    if not layers:
        raise ConfigError("activation_dtype int8 is for weights in few bits: add --load_8bit or --load_4bit (weight_dtype)")
    if not device.is_cpu():
        raise ConfigError("activations in 8 bits are for CPU: leave out --activation_dtype here")
    for layer in layers:
        layer.activations = dtype


def prepare_adapted(model, weight_dtype, dtype, tower="language_model"):
    """As :func:`prepare`, for adapters to learn: of the weights that they lie on in a tower, or will when it is wrapped.

    Args:
        model, weight_dtype: as there.
        dtype: of adapters that are new.
        tower: a name in the model.
    """
    bits, _ = check_choice(weight_dtype, None)
    model.quantised_layers, model.weight_dtype = {}, weight_dtype
    for weight in adapted_weights(model.config.weight_table(), tower):
        owner, name, layer = locate(model, weight.name.removesuffix(".weight"))
        new = QuantisedLinear(layer, bits)
        new.dtype = dtype
        model.quantised_layers[weight.name] = new
        if isinstance(layer, LoRALinear):
            layer.lie_on(new)
        else:
            owner._sub_layers[name] = new


def load_quantised(model, source, dtype, keep=None, weight_dtype=None, parts=None, learning=False, shares=None, packed=None):
    """:func:`~paddlemix.checkpoints.checkpoint.load_checkpoint`, with weights in few bits where user or files want that.

    A weight is rounded as soon as it is read, so that no two of them are in memory in floating point; where there are adapters
    to be added first, they all are.

    Args:
        model, source, dtype, keep, shares: as there.
        weight_dtype, parts: as for :func:`prepare`.
        learning: whether adapters are to learn: then ``weight_dtype`` is of the language model's weights under them.
        packed: ``packed(bits)`` gives the names of parameters that are not read, as they are packed already, where those of
            ``bits``, ``{parameter: 8 or 4}``, are in few bits. Not asked where there are adapters.
    """
    check_choice(weight_dtype, parts)
    if learning and source.packed:
        raise CheckpointError(
            f"{source.directory} is a quantised checkpoint, which can be asked but not trained: take the original one, in "
            "bfloat16 or float16"
        )
    if learning and weight_dtype is not None:
        prepare_adapted(model, weight_dtype, dtype)
        _load(model, source, dtype, keep)
        settle(model)
        return
    adapted = any(isinstance(layer, LoRALinear) for layer in model.sublayers())
    if adapted and weight_dtype is not None:
        load_checkpoint(model, source, dtype, shares=shares)
        merge_lora(model)
        quantise_model(model, weight_dtype, parts, dtype)
        return
    if weight_dtype is not None or source.packed:
        prepare(model, weight_dtype, parts, source.packed)
        _answer_in(model, getattr(paddle, dtype))
    skip = ()
    if packed is not None and not adapted:
        skip = packed({name: layer.bits for name, layer in model.quantised_layers.items()})
    _load(model, source, dtype, keep, shares, skip)
    if model.quantised_layers:
        model.packed, model.source = True, source


def _answer_in(model, dtype):
    """Let the device's own operators compute the products, where it has some for ``dtype``."""
    layers = [layer for layer in model.quantised_layers.values() if isinstance(layer, QuantisedLinear)]
    head = model.language_model.lm_head
    layers += [head] if isinstance(head, QuantisedHead) else []
    for bits in sorted({getattr(layer, "bits", 8) for layer in layers}):
        sentence = told(bits, dtype)
        if sentence is not None:
            _log.warning("%s", sentence)
    for layer in layers:
        # What is in the files in 4 bits goes to the operator in 8.
        if DeviceWeight.bits_for(8, layer.in_features, dtype) is not None:
            layer.answers_in = dtype


def _load(model, source, dtype, keep, shares=None, skip=()):
    """:func:`load_checkpoint`, with what is to be rounded from the cache if it is there."""
    layers, key = model.quantised_layers, None
    rounds = not any(getattr(layer, "answers_in", None) for layer in layers.values())  # and not the device
    if layers and not source.packed and shares is None and rounds:
        key = cache.key_of(source, {name: layer.bits for name, layer in layers.items()})
        found = cache.find(key, {name: (layer.out_features, layer.in_features, layer.bits) for name, layer in layers.items()})
        for name, weight in (found or {}).items():
            layers[name].take(weight)
            key = None
    load_checkpoint(model, source, dtype, keep, shares, skip)
    if key is not None:
        cache.store_later(key, {name: layer.quantised for name, layer in layers.items()})


def settle(model):
    """Let weights under adapters be on the device alone."""
    for layer in model.quantised_layers.values():
        layer.plain()
        layer.quantised = None


@contextlib.contextmanager
def originals(model, dtype):
    """Within the block: ``{parameter: value}`` of the weights under adapters that are in few bits, for saving in ``dtype``.

    They come from the files that the model was loaded from, so that what is saved is what a run with all bits saves. Where
    those have changed meanwhile, they are what the model computes with.
    """
    layers, source = model.quantised_layers, model.source
    if not layers:
        yield {}
    elif source is not None and not source.changed_files():
        with reading(source, layers, dtype) as values:
            yield values
    else:
        warnings.warn(
            "the weights that the run started from have changed or are gone: those in few bits are saved as they were rounded",
            stacklevel=3,
        )
        yield {name: _Rounded(layer, dtype) for name, layer in layers.items()}


class _Rounded:
    """The weight of a layer, as a parameter that is made when it is asked for."""

    def __init__(self, layer, dtype):
        self.layer, self.dtype, self.shape = layer, dtype, (layer.in_features, layer.out_features)

    def detach(self):
        return self

    def numpy(self):
        return self.layer.plain().dequantised(self.dtype).T.contiguous().numpy()


def weight_bytes(table, element, weight_dtype=None, parts=None):
    """Bytes of the weights of ``table``, ``element`` each where they are not in few bits, scales included."""
    bits, parts = check_choice(weight_dtype, parts)
    few = tuple(quantised.PARTS[part] for part in parts) if bits else ()
    total = 0
    for weight in table:
        packed = few and weight.linear and weight.name.startswith(few)
        total += math.prod(weight.shape) * (quantised.bytes_per_value(weight_dtype) if packed else element)
    return total


def quantise_model(model, weight_dtype, parts=None, dtype=None):
    """Round weights that are there, layer by layer; ``dtype`` is that of the activations, for the device's own operators."""
    plain = {f"{path}.weight": layer for path, _, _, layer in _candidates(model)}
    prepare(model, weight_dtype, parts)
    if dtype is not None:
        _answer_in(model, getattr(paddle, dtype))
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
            if path.startswith(tuple(quantised.PARTS.values())) and type(layer) in (Linear, nn.Linear, nn.Embedding):
                found.append((path, owner, name, layer))
    return found

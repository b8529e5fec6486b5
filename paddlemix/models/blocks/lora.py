"""Training with LoRA: adapters in a model, merging them, and exchanging them with PEFT.

:mod:`~.adapters` says which layers have them. A model whose configuration names a rank is built with them, so unmerged
checkpoints of the original are loaded, trained further and saved like any other.
"""

import dataclasses
import json
import os
import re

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.nn.initializer.lazy_init import lazy_init_helper
from safetensors.numpy import save_file

from paddlemix.checkpoints.files import open_weight_file
from paddlemix.checkpoints.tensors import convert_dtype, name_some
from paddlemix.errors import CheckpointError, ConfigError

from .adapters import RANKS, SCALE, adapter_sizes, is_stacked, tower_rank
from .layers import Linear

DROPOUT = 0.05


class LoRALinear(Linear):
    """A linear layer with adapters, each for its own share of the outputs.

    Args:
        base: the layer whose weight and bias are taken over.
        sizes: outputs of each adapter, in order; together they are those of the layer.
        rank: inner width of the adapters.
        dropout: share of the inputs of each adapter that training leaves out.
    """

    def __init__(self, base, sizes, rank, dropout=DROPOUT):
        nn.Layer.__init__(self)  # not Linear's, which would allocate a weight
        self.weight, self.bias, self.name = base.weight, base.bias, None
        self._under = None
        if base.weight is None:
            self.lie_on(base)
            size_in, dtype = base.in_features, base.dtype
        else:
            size_in, dtype = base.weight.shape[0], base.weight.dtype
        bound = (size_in if getattr(base, "inputs", None) is None else base.inputs[2]) ** -0.5
        uniform, zeros = nn.initializer.Uniform(-bound, bound), nn.initializer.Constant(0.0)
        new = self.create_parameter
        self.group, self.inputs = base.group, getattr(base, "inputs", None)

        def new_a():
            if self.inputs is None or lazy_init_helper().state:
                return new([size_in, rank], dtype=dtype, default_initializer=uniform)
            # Drawn whole, so that every rank draws the same numbers, and those of one that has all.
            first, count, whole = self.inputs
            drawn = new([whole, rank], dtype=dtype, default_initializer=uniform)[first : first + count]
            return new([count, rank], dtype=dtype, default_initializer=nn.initializer.Assign(drawn.numpy()))

        self.lora_A = nn.ParameterList([new_a() for _ in sizes])
        self.lora_B = nn.ParameterList([new([rank, size], dtype=dtype, default_initializer=zeros) for size in sizes])
        self.dropout, self.scale = nn.Dropout(dropout), SCALE

    def lie_on(self, base):
        """Take the weight of ``base``, a layer that has it in few bits (:class:`~.quantising.QuantisedLinear`)."""
        self._parameters.pop("weight", None)
        self.weight = None
        object.__setattr__(self, "_under", base)  # not as a sublayer: its bias is the one here

    def product(self, x, linear, bias):
        """As :meth:`Linear.product`, with what the adapters add."""
        added = [F.linear(F.linear(self._dropped(x), a), b) for a, b in zip(self.lora_A, self.lora_B)]
        added = added[0] if len(added) == 1 else paddle.concat(added, axis=-1)
        product = linear(x, self.weight, bias) if self._under is None else self._under.product(x, linear, bias)
        return product + self.scale * added

    def _dropped(self, x):
        """``x`` with a random part left out in training, of the share of the inputs that is here as in the whole."""
        if self.inputs is None or not (self.training and self.dropout.p):
            return self.dropout(x)
        first, count, whole = self.inputs
        kept = self.dropout(paddle.ones([*x.shape[:-1], whole], x.dtype))
        return x * kept[..., first : first + count]

    def delta(self):
        """What the adapters amount to as a weight, ``[in, out]`` float32."""
        products = [a.astype("float32") @ b.astype("float32") for a, b in zip(self.lora_A, self.lora_B)]
        return self.scale * paddle.concat(products, axis=-1)

    def merged(self):
        """A plain layer that computes the same.

        Raises:
            ConfigError: the weight is in few bits.
        """
        if self._under is not None:
            raise ConfigError("adapters on weights in few bits cannot be merged: merge them in the checkpoint that they are in")
        with paddle.LazyGuard():  # allocates nothing: the parameters are replaced at once
            plain = Linear(*self.weight.shape, bias=self.bias is not None)
        with paddle.no_grad():
            self.weight.set_value((self.weight.astype("float32") + self.delta()).astype(self.weight.dtype))
        plain.weight, plain.bias, plain.group = self.weight, self.bias, self.group
        plain.training = self.training
        return plain


def wrap_backbone_lora(model, r, dropout=DROPOUT):
    """Freeze the vision model and give its blocks adapters of rank ``r``; see :func:`wrap_llm_lora`."""
    wrap_tower(model, "vision_model", r, dropout)


def wrap_llm_lora(model, r, dropout=DROPOUT):
    """Freeze the language model, and give every linear layer of its blocks adapters of rank ``r``.

    Only the adapters of that tower learn afterwards; what else shall learn is to be unfrozen after this call. The rank is
    noted in ``model.config``. A model that has adapters of this rank keeps them, trained as they are.

    Raises:
        ConfigError: the rank is not positive, or the model has adapters of another rank.
    """
    wrap_tower(model, "language_model", r, dropout)


def wrap_tower(model, tower, rank, dropout=DROPOUT):
    """As :func:`wrap_llm_lora`, of the tower with this name in the model."""
    key = RANKS[tower]
    present = getattr(model.config, key)
    if rank < 1 or present not in (0, rank):
        raise ConfigError(
            f"{key} is {rank}: it must be positive"
            if rank < 1
            else f"{key} is {rank}, but the model has adapters of rank {present}: use {present} to go on with them, or merge "
            "them first (python -m paddlemix.models.internvl2.merge_lora)"
        )
    if not present:
        setattr(model.config, key, rank)
    add_adapters(model, tower, dropout)
    for name, parameter in getattr(model, tower).named_parameters():
        parameter.stop_gradient = ".lora_" not in name


def add_adapters(model, tower="", dropout=DROPOUT):
    """Put adapters on the layers that the ranks in ``model.config`` ask for and that have none yet.

    Args:
        model: an ``InternVLChatModel``.
        tower: only where parameters' names begin with this.
        dropout: see :class:`LoRALinear`; also set on layers that have adapters.
    """
    division = getattr(model, "division", None)
    for weight in model.config.weight_table():
        rank = tower_rank(model.config, weight.name)
        sizes = adapter_sizes(weight)
        if not (rank and sizes and weight.name.startswith(tower)):
            continue
        if division is not None:
            sizes = division.own_adapter_sizes(weight.name.removesuffix(".weight"))
        if sizes is None:  # the layer is elsewhere: the numbers are drawn all the same
            for _ in adapter_sizes(weight):
                if not lazy_init_helper().state:
                    paddle.uniform([weight.shape[0], rank])
            continue
        parent, name, layer = locate(model, weight.name.removesuffix(".weight"))
        if isinstance(layer, LoRALinear):
            layer.dropout.p = dropout
        else:
            setattr(parent, name, LoRALinear(layer, sizes, rank, dropout))


def locate(model, path):
    """The layer at ``path``, as (its parent, its name there, the layer)."""
    *parents, name = path.split(".")
    for step in parents:
        model = getattr(model, step)
    return model, name, getattr(model, name)


def merge_lora(model):
    """Add all adapters to the weights that they belong to and remove them, in place; the configuration's ranks become 0."""
    paths = [path for path, layer in model.named_sublayers() if isinstance(layer, LoRALinear)]
    for path in paths:
        parent, name, layer = locate(model, path)
        setattr(parent, name, layer.merged())
    for key in RANKS.values():
        if hasattr(model.config, key):
            setattr(model.config, key, 0)


# ---------------------------------------------------------------------- PEFT's directories

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _peft_table(config):
    """``(name, weight, part)`` of the adapters alone, as PEFT names them when it wraps the whole model."""
    for weight in config.weight_table():
        if ".lora_" in weight.name and not is_stacked(weight.parts[0]):
            (part,) = weight.parts
            yield "base_model.model." + part.name.replace(".base_model.model.", ".").replace(".default.", "."), weight, part


def save_adapters(model, directory, base_model=None):
    """Write the adapters alone, as a directory that PEFT reads for the original model.

    Args:
        model: an ``InternVLChatModel`` with adapters.
        directory: is made if it does not exist.
        base_model: name or directory of the model that they belong to, for ``adapter_config.json``.

    Raises:
        ConfigError: the model has no adapters, or has some on stacked experts (gpt-oss), for which PEFT has no plain form.
    """
    parameters = model.state_dict()
    if any(".lora_" in weight.name and is_stacked(weight.parts[0]) for weight in model.config.weight_table()):
        raise ConfigError(
            "adapters on gpt-oss's experts, which are stacked in one tensor, have no form in PEFT's directories: save the "
            "whole checkpoint, or merge them (python -m paddlemix.models.internvl2.merge_lora)"
        )
    tensors, ranks = {}, {}
    for name, weight, part in _peft_table(model.config):
        values = parameters[weight.name].astype("float32").numpy().T
        tensors[name] = np.empty(part.shape, np.float32)
        for row, output, count in part.runs:
            tensors[name][row : row + count] = values[output : output + count]
        target = re.search(r"layers\.\d+\.(.+)\.lora_", name)[1]
        ranks[target] = tower_rank(model.config, weight.name)
    if not tensors:
        raise ConfigError("the model has no LoRA adapters to save: use_llm_lora and use_backbone_lora are 0 in its config")
    rank = max(ranks.values())
    others = {target: r for target, r in ranks.items() if r != rank}
    values = {
        "peft_type": "LORA",
        "task_type": None,  # for PEFT a model like any other, which needs no methods for generating
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "lora_dropout": DROPOUT,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {target: SCALE * r for target, r in others.items()},
        "inference_mode": True,
    }
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, os.path.join(directory, _WEIGHTS), metadata={"format": "pt"})
    with open(os.path.join(directory, _CONFIG), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def load_adapters(model, directory):
    """Put the adapters in a directory, as :func:`save_adapters` or PEFT wrote it, on a model that has none yet.

    Args:
        model: the ``InternVLChatModel`` that they were trained with, without adapters.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: files are missing or damaged, or the tensors do not fit the model.
        ConfigError: the model has adapters already.
    """
    scales = peft_scales(directory)
    path = os.path.join(directory, _WEIGHTS)
    with open_weight_file(path) as stored:
        found = {
            name: convert_dtype(tensor.read(0, tensor.shape[0]), tensor.dtype, "float32") for name, tensor in stored.items()
        }
    ranks = {}
    for name, array in found.items():
        if match := re.fullmatch(r"base_model\.model\.(vision_model|language_model)\..+\.lora_A\.weight", name):
            ranks.setdefault(match[1], array.shape[0])
    if model.config.use_backbone_lora or model.config.use_llm_lora:
        raise ConfigError("the model has LoRA adapters already: merge them (merge_lora) before you load others")
    config = dataclasses.replace(
        model.config, use_backbone_lora=ranks.get("vision_model", 0), use_llm_lora=ranks.get("language_model", 0)
    )
    table = {name: (weight, part) for name, weight, part in _peft_table(config)}
    wrong = sorted(table.keys() ^ found.keys())
    wrong += [name for name, (_, part) in table.items() if name in found and found[name].shape != part.shape]
    if wrong or not table:
        raise CheckpointError(
            f"the adapters in {path} do not fit the model: {len(wrong)} are missing, unexpected or of another shape "
            f"({name_some(wrong)}); adapters must be of every linear layer of the blocks, under the names of the whole model"
        )
    model.config.use_backbone_lora, model.config.use_llm_lora = config.use_backbone_lora, config.use_llm_lora
    add_adapters(model)
    parameters = model.state_dict()
    for name, (weight, part) in table.items():
        outputs = np.empty(weight.shape[::-1], np.float32)
        for row, output, count in part.runs:
            outputs[output : output + count] = found[name][row : row + count]
        if ".lora_B." in weight.name:
            outputs *= scales(name) / SCALE
        parameters[weight.name].set_value(paddle.to_tensor(outputs.T.copy()).astype(parameters[weight.name].dtype))


def peft_scales(directory):
    """A function from an adapter's name to its alpha / rank, as ``adapter_config.json`` has it."""
    path = os.path.join(directory, _CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        kind, r, alpha = values["peft_type"], values["r"], values["lora_alpha"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: pass a directory of adapters as PEFT writes it") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not PEFT's description of LoRA adapters: copy it again") from None
    variants = [name for name in ("use_dora", "use_rslora") if values.get(name)]
    if kind != "LORA" or variants:
        raise CheckpointError(f"{path} describes {', '.join([kind, *variants])}: only plain LoRA is supported")

    def scale(name):
        layer = name.split(".lora_")[0]
        numbers = []
        for key, default in (("alpha_pattern", alpha), ("rank_pattern", r)):
            patterns = values.get(key) or {}
            numbers.append(next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?{k}", layer)), default))
        return numbers[0] / numbers[1]

    return scale

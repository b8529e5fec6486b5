"""Where the weights of a LLaVA are, and how they get into a model and back.

A checkpoint has one of three forms: whole; a projector alone (``mm_projector.bin``), which needs the language model that it
was trained with; or LoRA adapters beside what else was trained (``non_lora_trainables.bin``), which need it as well. The
files tell which. The tower is the copy in a whole checkpoint, or in a folder of its own.
"""

import math
import os
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from paddlemix.checkpoints import names
from paddlemix.checkpoints.checkpoint import load_checkpoint
from paddlemix.checkpoints.files import find_weight_files, open_weight_file
from paddlemix.checkpoints.tensors import convert_dtype, name_some
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.files import read_json
from paddlemix.models.blocks.adapters import with_adapters
from paddlemix.models.blocks.configuration import VisionConfig

PROJECTOR_FILE = "mm_projector.bin"
OTHERS_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What a parameter's name begins with in the model, and in files.
_PUBLISHED = {"vision_model.": "model.vision_tower.vision_tower.", "mlp1": "model.mm_projector", "language_model.": ""}
_LANGUAGE = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_TOWER = _PUBLISHED["vision_model."]


def weight_table(config):
    """Entries of :class:`~paddlemix.checkpoints.names.Weight`, one for each parameter, as a whole checkpoint has them."""
    table = [*names.vision(config.vision_config), *_projector(config), *names.language(config.llm_config)]
    return with_adapters([_renamed(weight, published_name) for weight in table], config)


def published_name(name):
    """What a tensor that the model calls ``name`` is called in files."""
    for own, published in _PUBLISHED.items():
        if name.startswith(own):
            return published + name[len(own) :]
    raise KeyError(name)


def _renamed(weight, rename):
    return weight._replace(parts=tuple(part._replace(name=rename(part.name)) for part in weight.parts))


def _projector(config):
    size_in, size_out = config.vision_config.hidden_size, config.llm_config.hidden_size
    for number, is_norm in config.projector_layers():
        name = "mlp1" if number is None else f"mlp1.{number}"
        if is_norm:
            yield from names.norm(name, size_in, bias=True)
            continue
        yield from (
            w._replace(name=w.name.replace("mlp1.", "mlp1.0.", 1) if number is None else w.name)
            for w in names.linear(name, size_in, size_out, bias=True)
        )
        size_in = size_out


@dataclass(frozen=True)
class Part:
    """A part of a model's weights; :class:`~paddlemix.checkpoints.checkpoint.Checkpoint` takes it for a configuration."""

    has_hf_layout = False

    table: list
    reads_only: tuple
    llm_config: object = None
    extra: dict = field(default_factory=dict)

    def weight_table(self):
        """The entries."""
        return self.table


def part(config, *prefixes):
    """The :class:`Part` of what begins with ``prefixes`` in the model, as a whole checkpoint names it.

    The language model's belongs to every part of a whole checkpoint: a projector may be square, which tells no layout.
    """
    table = [weight for weight in weight_table(config) if weight.name.startswith(prefixes)]
    found = [_LANGUAGE if prefix == "language_model." else (_PUBLISHED[prefix],) for prefix in prefixes]
    return Part(table, sum(found, ()), config.llm_config if "language_model." in prefixes else None, config.extra)


# ---------------------------------------------------------------------- the tower


class Tower(NamedTuple):
    """Where a vision tower is: a directory, what its tensors' names begin with there, and its configuration."""

    directory: str
    prefix: str
    config: VisionConfig

    def part(self, config):
        """The :class:`Part` that is read from there for a model of ``config``."""
        own = part(config, "vision_model.")
        table = [_renamed(weight, lambda name: self.prefix + name.removeprefix(_TOWER)) for weight in own.table]
        return Part(table, (self.prefix,))


def tower_in(directory):
    """The :class:`Tower` in a folder of its own, or of a whole InternVL model.

    Raises:
        ConfigError: it is another kind of model.
    """
    path = os.path.join(directory, "config.json")
    values = read_json(path, absent="a vision tower needs its config.json")
    inner = values.get("vision_config")
    whole = isinstance(inner, dict)
    values = inner if whole else values
    kind = values.get("model_type", "intern_vit_6b")
    if kind != "intern_vit_6b":
        raise ConfigError(f"{path}: model_type is '{kind}': the vision tower must be an InternViT (intern_vit_6b)")
    try:
        config = VisionConfig._pick(values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return Tower(directory, "vision_model." if whole else "", config)


def tower_inside(directory, config):
    """The :class:`Tower` that a whole checkpoint has a copy of, or None where it lacks some of it.

    Args:
        directory: of the checkpoint.
        config: the tower's :class:`VisionConfig` as far as known: its picture size is that of the copy's positions in the
            result, since they were resized.
    """
    shapes = {}
    for path in find_weight_files(directory)[0]:
        with open_weight_file(path) as stored:
            shapes |= {key: tensor.shape for key, tensor in stored.items() if key.startswith(_TOWER)}
    positions = shapes.get(f"{_TOWER}embeddings.position_embedding", ())
    side = math.isqrt(max(math.prod(positions[:-1]) - 1, 0))
    if not side:
        return None
    values = {**config.to_dict(), "image_size": side * config.patch_size}
    config = VisionConfig._pick(values)
    expected = {part.name for weight in names.vision(config) for part in weight.parts}
    if not expected <= {key.replace(_TOWER, "vision_model.", 1) for key in shapes}:
        return None
    return Tower(directory, _TOWER, config)


# ---------------------------------------------------------------------- forms


class Form(NamedTuple):
    """What a checkpoint's directory has: ``projector`` and ``others`` are paths or None, ``adapters`` whether there are any."""

    whole: bool
    projector: str | None
    adapters: bool
    others: str | None


def form_of(directory):
    """The :class:`Form` of a directory."""

    def there(name):
        path = os.path.join(directory, name)
        return path if os.path.isfile(path) else None

    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a directory: pass the directory of a checkpoint")
    adapters = there("adapter_config.json") is not None
    whole = not adapters and any(
        there(n) for f in ("model.safetensors", "pytorch_model.bin", "model_state.pdparams") for n in (f, f + ".index.json")
    )
    return Form(whole, there(PROJECTOR_FILE), adapters, there(OTHERS_FILE))


class _View(NamedTuple):
    """What :func:`load_checkpoint` takes for a model: some of the parameters of one."""

    parameters: dict
    quantised_layers: dict
    config: object = None

    def state_dict(self):
        """The parameters."""
        return self.parameters


def read_part(model, checkpoint, dtype, keep=None):
    """Give a model the weights of a :class:`~paddlemix.checkpoints.checkpoint.Checkpoint` of some of them."""
    load_checkpoint(_View(model.state_dict(), model.quantised_layers), checkpoint, dtype, keep)


def read_file(model, config, path, dtype, prefix=""):
    """Give a model the tensors of one file, such as ``mm_projector.bin``.

    Args:
        model: changed.
        config: its configuration.
        path: of the file; names in it may begin with what PEFT puts before them.
        dtype: of the model.
        prefix: what the model's names of the tensors begin with that must be there.

    Raises:
        CheckpointError: a tensor has no place or another shape, or one is missing.
    """
    import paddle

    table = {part.name: (weight, part) for weight in weight_table(config) for part in weight.parts}
    parameters, seen = model.state_dict(), set()
    with open_weight_file(path) as stored:
        for key, tensor in stored.items():
            name = key.removeprefix("base_model.model.")
            if name not in table and name.startswith("model.vision_tower.") and "position_embedding" not in name:
                continue  # old files have a copy of the frozen tower
            weight, part_ = table.get(name, (None, None))
            if part_ is None or tensor.shape != part_.shape:
                said = (
                    "has no place in this model" if part_ is None else f"is {list(tensor.shape)} instead of {list(part_.shape)}"
                )
                raise CheckpointError(
                    f"{path}: {key} {said}: the file must be of the same vision tower, projector and language model"
                )
            seen.add(weight.name)
            rows = convert_dtype(tensor.read(0, tensor.shape[0]), tensor.dtype, "float32")
            values = np.ascontiguousarray(rows.T if weight.linear else rows)
            value = paddle.to_tensor(values).astype(dtype)
            value._share_buffer_to(parameters[weight.name])
    missing = [
        weight.name for weight in weight_table(config) if weight.name.startswith(prefix or "\0") and weight.name not in seen
    ]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors ({name_some(map(published_name, missing))}): copy it again")


_ADAPTER = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


def read_adapters(directory):
    """The adapters in a directory: ``{published layer: (A [r, in], B [out, r])}``, float32.

    Raises:
        CheckpointError: there is no file of them, or it has something else in it.
    """
    paths = [os.path.join(directory, name) for name in ADAPTER_FILES]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise CheckpointError(f"{directory} has an adapter_config.json but no {' or '.join(ADAPTER_FILES)}: copy it there too")
    found = {}
    with open_weight_file(path) as stored:
        for key, tensor in stored.items():
            match = _ADAPTER.fullmatch(key)
            if match is None or len(tensor.shape) != 2:
                raise CheckpointError(f"{path}: {key} is no LoRA adapter: only plain LoRA of linear layers is supported")
            rows = convert_dtype(tensor.read(0, tensor.shape[0]), tensor.dtype, "float32")
            found.setdefault(match[1], {})[match[2]] = rows
    halves = [layer for layer, pair in found.items() if len(pair) < 2]
    if halves:
        raise CheckpointError(f"{path} lacks one half of {len(halves)} adapters ({name_some(halves)}): copy it again")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def merge_adapters(model, config, directory, scale):
    """Add the adapters in a directory to the weights of a model.

    Args:
        model: in float32, or in half precision, whose sums are rounded once.
        config: its configuration.
        directory: has ``adapter_model.bin`` or the like.
        scale: function from a layer's name to alpha / rank.

    Raises:
        CheckpointError: they are of layers or shapes that this model does not have.
    """
    import paddle

    table = {part.name: (weight, part) for weight in weight_table(config) for part in weight.parts if weight.linear}
    parameters, deltas = model.state_dict(), {}
    for layer, (a, b) in read_adapters(directory).items():
        weight, part_ = table.get(f"{layer}.weight", (None, None))
        if part_ is None or (len(b), a.shape[1]) != part_.shape or len(a) != b.shape[1]:
            raise CheckpointError(
                f"the adapters in {directory} are of another base: {layer} is "
                + (
                    "not a layer of this model"
                    if part_ is None
                    else f"{[len(b), a.shape[1]]} there and {list(part_.shape)} here"
                )
                + "; give the model_base that they were trained with"
            )
        delta = (b @ a).T * scale(layer)  # [in, out]
        for row, output, count in part_.runs:
            deltas.setdefault(weight.name, []).append((output, delta[:, row : row + count]))
    for name, parts in deltas.items():
        parameter = parameters[name]
        values = parameter.astype("float32").numpy().copy()
        for output, delta in parts:
            values[:, output : output + delta.shape[1]] += delta
        parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))

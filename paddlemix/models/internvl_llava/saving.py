"""Writing a LLaVA in the original's forms: whole, a projector alone, or LoRA adapters beside what else learned."""

import dataclasses
import json
import os

import numpy as np

from paddlemix.checkpoints.checkpoint import save_checkpoint
from paddlemix.checkpoints.pickle_files import write_torch_pickle
from paddlemix.checkpoints.tensors import convert_dtype
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.blocks.lora import DROPOUT, SCALE, LoRALinear

from .checkpoint import OTHERS_FILE, PROJECTOR_FILE, read_adapters, weight_table


def _arrays(model, wanted, weights=None):
    """``{published name: float32 array in torch's layout}`` of the parts for whose (weight, part) ``wanted`` is true."""
    parameters, arrays = weights or model.state_dict(), {}
    for weight in weight_table(model.config):
        for part in weight.parts:
            if not wanted(weight, part):
                continue
            values = _float_array(parameters[weight.name])
            outputs = values.T if weight.linear else values
            array = np.empty(part.shape, np.float32)
            for row, output, count in part.runs:
                array[row : row + count] = outputs[output : output + count]
            arrays[part.name] = array
    return arrays


def _float_array(value):
    if isinstance(value, np.ndarray):
        return convert_dtype(value, "bfloat16" if value.dtype == np.uint16 else str(value.dtype), "float32")
    return value.astype("float32").numpy()


def save_whole(model, directory, weights=None):
    """Write configuration and weights; ``weights`` are ``{name: array}`` where the model itself does not have them all."""
    os.makedirs(directory, exist_ok=True)
    save_checkpoint(weights or model, model.config, directory)
    model.config.save(directory)


def projector_arrays(model, positions=False, weights=None):
    """What ``mm_projector.bin`` holds: the projector, and the tower's positions where they learned."""
    return _arrays(
        model,
        lambda weight, part: weight.name.startswith("mlp1") or (positions and weight.name.endswith(".position_embedding")),
        weights,
    )


def save_projector(model, directory, positions=False, weights=None):
    """Write ``mm_projector.bin`` and ``config.json``."""
    os.makedirs(directory, exist_ok=True)
    write_torch_pickle(os.path.join(directory, PROJECTOR_FILE), projector_arrays(model, positions, weights))
    dataclasses.replace(model.config, use_llm_lora=0).save(directory)


def save_lora(model, directory, base_model=None, positions=False, weights=None):
    """Write ``adapter_model.bin``, ``adapter_config.json``, ``non_lora_trainables.bin`` and ``config.json``.

    Raises:
        ConfigError: the model has no adapters.
    """
    layers = [layer for layer in model.sublayers() if isinstance(layer, LoRALinear)]
    if not layers:
        raise ConfigError("the model has no LoRA adapters to save")
    rank = layers[0].lora_A[0].shape[1]
    scale = getattr(layers[0], "scale", SCALE)
    found = _arrays(model, lambda weight, part: ".lora_" in weight.name, weights)
    adapters = {
        "base_model.model." + name.replace("base_model.model.", "").replace(".default.", "."): a for name, a in found.items()
    }
    others = {f"base_model.model.{name}": array for name, array in projector_arrays(model, positions, weights).items()}
    os.makedirs(directory, exist_ok=True)
    write_torch_pickle(os.path.join(directory, "adapter_model.bin"), adapters)
    write_torch_pickle(os.path.join(directory, OTHERS_FILE), others)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": getattr(layers[0].dropout, "p", DROPOUT),
        "bias": "none",
        "target_modules": sorted({name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters}),
        "inference_mode": True,
    }
    path = os.path.join(directory, "adapter_config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
    os.replace(path + ".tmp", path)
    dataclasses.replace(model.config, use_llm_lora=0).save(directory)


def load_lora(model, directory):
    """Give the adapters of a model the values that :func:`save_lora` wrote, to train them further."""
    import paddle

    parameters, found = model.state_dict(), read_adapters(directory)
    for weight in weight_table(model.config):
        if ".lora_" not in weight.name:
            continue
        (part,) = weight.parts
        layer, kind = part.name.replace("base_model.model.", "").split(".lora_")
        if layer not in found:
            raise CheckpointError(f"the adapters in {directory} lack {layer}: they are of another model")
        rows = found[layer]["AB".index(kind[0])]
        values = np.empty(weight.shape[::-1], np.float32)
        for row, output, count in part.runs:
            values[output : output + count] = rows[row : row + count]
        parameters[weight.name].set_value(paddle.to_tensor(values.T.copy()).astype(parameters[weight.name].dtype))

"""Writing a LLaVA in the original's forms: whole, a projector alone, or LoRA adapters beside what else learned."""

import dataclasses
import json
import os

import numpy as np

from paddlemix.checkpoints.pickle_files import write_torch_pickle
from paddlemix.errors import ConfigError
from paddlemix.models.blocks.lora import DROPOUT, SCALE, LoRALinear

from .checkpoint import OTHERS_FILE, PROJECTOR_FILE, weight_table


def _arrays(model, wanted):
    """``{published name: float32 array in torch's layout}`` of the parts for whose (weight, part) ``wanted`` is true."""
    parameters, arrays = model.state_dict(), {}
    for weight in weight_table(model.config):
        for part in weight.parts:
            if not wanted(weight, part):
                continue
            values = parameters[weight.name].astype("float32").numpy()
            outputs = values.T if weight.linear else values
            array = np.empty(part.shape, np.float32)
            for row, output, count in part.runs:
                array[row : row + count] = outputs[output : output + count]
            arrays[part.name] = array
    return arrays


def projector_arrays(model, positions=False):
    """What ``mm_projector.bin`` holds: the projector, and the tower's positions where they learned."""
    return _arrays(
        model,
        lambda weight, part: weight.name.startswith("mlp1") or (positions and weight.name.endswith(".position_embedding")),
    )


def save_projector(model, directory, positions=False):
    """Write ``mm_projector.bin`` and ``config.json``."""
    os.makedirs(directory, exist_ok=True)
    write_torch_pickle(os.path.join(directory, PROJECTOR_FILE), projector_arrays(model, positions))
    dataclasses.replace(model.config, use_llm_lora=0).save(directory)


def save_lora(model, directory, base_model=None, positions=False):
    """Write ``adapter_model.bin``, ``adapter_config.json``, ``non_lora_trainables.bin`` and ``config.json``.

    Raises:
        ConfigError: the model has no adapters.
    """
    layers = [layer for layer in model.sublayers() if isinstance(layer, LoRALinear)]
    if not layers:
        raise ConfigError("the model has no LoRA adapters to save")
    rank = layers[0].lora_A[0].shape[1]
    scale = getattr(layers[0], "scale", SCALE)
    found = _arrays(model, lambda weight, part: ".lora_" in weight.name)
    adapters = {
        "base_model.model." + name.replace("base_model.model.", "").replace(".default.", "."): a for name, a in found.items()
    }
    others = {f"base_model.model.{name}": array for name, array in projector_arrays(model, positions).items()}
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

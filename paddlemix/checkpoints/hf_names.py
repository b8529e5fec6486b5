"""Names of transformers' own layout of chat models (``InternVLForConditionalGeneration``, transformers 4.57).

:func:`renamed` turns the table of the original's names into that of transformers', for the same parameters; :func:`normalised`
brings the names that some programs write, those of the modules in memory, to those of files.
"""

import re

from paddlemix.errors import CheckpointError

from .names import Part

_VISION = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
}
_ENDINGS = {".ls1": ".lambda_1", ".ls2": ".lambda_2"}
_PROJECTOR = {"mlp1.0.": "layer_norm.", "mlp1.1.": "linear_1.", "mlp1.3.": "linear_2."}
_TOWER, _BRIDGE = "vision_tower.", "multi_modal_projector."
_IN_MEMORY = {f"model.{_TOWER}": _TOWER, f"model.{_BRIDGE}": _BRIDGE, "model.language_model.": "language_model.model."}


def renamed(table):
    """The table of names of the same parameters in transformers' files.

    Args:
        table: list of :class:`~.names.Weight` under the original's names, the language model's as Llama has them.
    """
    return [weight._replace(parts=tuple(_parts(weight))) for weight in table]


def _parts(weight):
    for part in weight.parts:
        if part.name.startswith("vision_model."):
            name = _TOWER + part.name.removeprefix("vision_model.")
            if ".attn.qkv." in name:  # thirds
                third = part.shape[0] // 3
                for i, letter in enumerate("qkv"):
                    own = name.replace(".attn.qkv.", f".attention.{letter}_proj.").replace("encoder.layers.", "encoder.layer.")
                    yield Part(own, (third, *part.shape[1:]), ((0, i * third, third),))
                continue
            for old, new in _VISION.items():
                name = name.replace(old, new)
            for old, new in _ENDINGS.items():
                name = name[: -len(old)] + new if name.endswith(old) else name
            yield part._replace(name=name)
        elif part.name.startswith("mlp1."):
            own = next(new + part.name[len(old) :] for old, new in _PROJECTOR.items() if part.name.startswith(old))
            yield part._replace(name=_BRIDGE + own)
        else:
            yield part


def is_hf(names):
    """Whether tensors of these names are of a model in transformers' layout."""
    return any(name.removeprefix("model.").startswith((_TOWER, _BRIDGE)) for name in names)


def normalised(directory, found):
    """The dictionary ``found`` of tensors by name, under the names that transformers' files have.

    Raises:
        CheckpointError: the names are of two layouts.
    """
    original = next((name for name in found if name.startswith(("vision_model.", "mlp1."))), None)
    other = next((name for name in found if name.removeprefix("model.").startswith((_TOWER, _BRIDGE))), None)
    if original is not None:
        raise CheckpointError(
            f"{directory} mixes two layouts: {original} is a name of the original's, {other} one of transformers'; take all "
            "files from the same model"
        )
    old = {name: new + name[len(old) :] for name in found for old, new in _IN_MEMORY.items() if name.startswith(old)}
    if old and any(name.startswith((_TOWER, _BRIDGE, "language_model.")) for name in found):
        of_files = next(name for name in found if name.startswith((_TOWER, _BRIDGE, "language_model.")))
        raise CheckpointError(
            f"{directory} mixes two namings: {next(iter(old))} is as in memory, {of_files} as in files; take all files from "
            "the same model"
        )
    if old and "lm_head.weight" in found:
        old["lm_head.weight"] = "language_model.lm_head.weight"
    return {old.get(name, name): location for name, location in found.items()}


STACKED = re.compile(r"language_model\.model\.layers\.\d+\.mlp\.experts\.gate_up_proj")

"""A chat model from a vision tower and a language model that were published alone, as the first stages of training start."""

import os

import numpy as np
import paddle

from paddlemix.checkpoints import convert_dtype, find_weight_files, name_some
from paddlemix.checkpoints.checkpoint import aligned_empty, take_over
from paddlemix.checkpoints.contents import OpenFiles, Source, fill, locate
from paddlemix.checkpoints.hub import resolve
from paddlemix.checkpoints.tensors import ARRAY_DTYPES
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.files import read_json
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel, load_tokenizer

# What pictures, and places in them, need of a tokenizer.
NEW_TOKENS = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()


def parts_config(vision_path, llm_path, ratio, tokenizer=None, new_tokens=0):
    """Configuration of the chat model that two directories make, and whether the language model's head is its embedding.

    Args:
        vision_path, llm_path: directories of the parts, or of chat models that have them.
        ratio: of the pixel shuffle.
        tokenizer: decides how large the vocabulary is where it got ``new_tokens``; None for the language model's.

    Raises:
        ConfigError: a file cannot be read, or the parts do not fit.
    """
    vision, llm = (read_json(os.path.join(path, "config.json")) for path in (vision_path, llm_path))
    vision, llm = vision.get("vision_config", vision), llm.get("llm_config", llm)
    vocabulary = {"vocab_size": len(tokenizer)} if new_tokens else {}
    values = {
        "vision_config": vision,
        "llm_config": {**llm, **vocabulary, "tie_word_embeddings": False},
        "downsample_ratio": ratio,
    }
    try:
        return InternVLChatConfig.from_dict(values), llm.get("tie_word_embeddings", False) is True
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{vision_path} and {llm_path} cannot be put together: {error}") from None


def assemble(model_args, data_args, dtype="float32", keep=None):
    """A chat model from its parts, whose token embeddings grow by what pictures need.

    Weights are read in the dtype that is asked for, so the peak is the model and a few blocks. New rows of the output head
    are the mean of the others, as in the original; those of the embedding, and without ``--mlp_path`` the projector, are
    random.

    Args:
        model_args, data_args: the trainer's arguments.
        dtype, keep: as for :func:`~.building.build_model`.

    Returns:
        (model, tokenizer).

    Raises:
        CheckpointError, ConfigError, TokenizerError: files are missing or damaged, or do not fit.
    """
    vision_path, llm_path = resolve(model_args.vision_path), resolve(model_args.llm_path)
    tokenizer = load_tokenizer(llm_path)
    new_tokens = tokenizer.add_tokens(NEW_TOKENS)
    config, tied = parts_config(vision_path, llm_path, data_args.down_sample_ratio, tokenizer, new_tokens)
    sources = [(vision_path, "vision_model.", False), (llm_path, "language_model.", tied)]
    if model_args.mlp_path is not None:
        sources.append((model_args.mlp_path, "mlp1.", False))
    with paddle.LazyGuard():
        model = InternVLChatModel(config)
    parameters, kept = model.state_dict(), None if keep is None else keep(config)
    for path, prefix, is_tied in sources:
        for name, array in _arrays(config, path, prefix, is_tied, new_tokens, dtype):
            take_over(parameters[name], array)
            if kept is not None and not kept(name):
                parameters[name]._clear_data()
    if model_args.mlp_path is None:
        for name, parameter in model.mlp1.named_parameters(prefix="mlp1"):
            parameter.initialize()
            values = convert_dtype(parameter.numpy(), "float32", dtype)
            take_over(parameter, np.ascontiguousarray(values))
            if kept is not None and not kept(name):
                parameter._clear_data()
    return model, tokenizer


def _arrays(config, path, prefix, tied, new_tokens, dtype):
    """Yield ``(name, array)`` of each parameter of one part of a chat model, as soon as it is complete.

    Args:
        config: of the chat model.
        path: directory or weight file of that part, or of a whole chat model.
        prefix: what the part's names begin with in a chat model; ``path`` may leave it out.
        tied: whether the checkpoint's token embedding is its output head as well.
        new_tokens: how many of the vocabulary the checkpoint does not know.
        dtype: of the arrays.
    """
    wanted, sources = {}, []
    for weight in config.weight_table():
        for part in weight.parts:
            if part.name.startswith(prefix):
                wanted.setdefault(part.name, []).append((weight, part))
    head = list(wanted)[-1]  # for the language model
    embedding = next((name for name in wanted if "embed" in name and prefix == "language_model."), None)
    found = locate(*(([path], None) if os.path.isfile(path) else find_weight_files(path)))
    whole, unexpected, missing = any(name.startswith(prefix) for name in found), [], dict.fromkeys(wanted)
    for key, location in found.items():
        name = key if whole else prefix + key
        if not name.startswith(prefix) or name.endswith(("inv_freq", "position_ids")):
            continue
        if name not in wanted or location.dtype not in ARRAY_DTYPES:
            unexpected.append(key)
            continue
        for own in [name, head] if tied and name == embedding else [name]:
            missing.pop(own, None)
            for weight, part in wanted[own]:
                _check_shape(location, weight, part)
                sources.append(Source(location, weight, part, False))
    if missing or unexpected:
        raise CheckpointError(
            f"the tensors in {path} do not fit: {len(missing)} are missing ({name_some(list(missing))}), "
            f"{len(unexpected)} unexpected ({name_some(unexpected)}); config.json and weights must be of the same model"
        )
    arrays, unread = {}, {}
    for source in sources:
        unread[source.weight.name] = unread.get(source.weight.name, 0) + 1
    with OpenFiles() as files:
        for source in sources:
            weight = source.weight
            if weight.name not in arrays:
                arrays[weight.name] = aligned_empty(weight.shape, ARRAY_DTYPES[dtype])
            fill(source, files.get(source.location), arrays[weight.name], dtype)
            unread[weight.name] -= 1
            if not unread[weight.name]:
                array = arrays.pop(weight.name)
                if _is_vocabulary(weight):
                    _add_rows(config, weight, array, source.location.shape[0], new_tokens, dtype)
                yield weight.name, array


def _is_vocabulary(weight):
    return weight.name.endswith(("embed_tokens.weight", "lm_head.weight"))


def _check_shape(location, weight, part):
    """Raise CheckpointError unless a tensor fits; a vocabulary may differ in length."""
    shape, wanted = location.shape, part.stored_shape
    if shape[1:] != wanted[1:] or (shape[:1] != wanted[:1] and not _is_vocabulary(weight)):
        raise CheckpointError(f"{location.path}: {part.name} is {list(shape)} instead of {list(wanted)}")


def _add_rows(config, weight, array, known, new_tokens, dtype):
    """Values of those rows of an embedding or a head that the checkpoint does not have."""
    rows = array.T if weight.linear else array  # [V, D]
    first = min(known, len(rows) - new_tokens)
    if weight.name.endswith("lm_head.weight"):
        if first < len(rows):
            mean = sum(_float(part, dtype).sum(0) for part in np.array_split(rows[:first], 1 + first // 4096)) / first
            rows[first:] = convert_dtype(mean.astype(np.float32), "float32", dtype)
    elif known < len(rows):
        shape = [len(rows) - known, rows.shape[1]]
        rows[known:] = convert_dtype(paddle.normal(0.0, config.llm_config.initializer_range, shape).numpy(), "float32", dtype)


def _float(values, dtype):
    return convert_dtype(values, dtype, "float32").astype(np.float64)

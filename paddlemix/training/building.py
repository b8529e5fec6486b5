"""The model that is trained: loaded or put together, with the parts frozen that shall not learn."""

import json
import logging
import os

from paddlemix.checkpoints import convert_dtype, find_weight_files, name_some, open_weight_file
from paddlemix.checkpoints.hub import resolve
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.models.blocks.lora import wrap_backbone_lora, wrap_llm_lora
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel, load_tokenizer

from .plan import learns

_log = logging.getLogger(__name__)

# What pictures, and places in them, need of a tokenizer.
NEW_TOKENS = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>".split()


def build_model(model_args, data_args, dtype, checkpoint=None, keep=None):
    """The model and its tokenizer.

    Args:
        model_args, data_args: the trainer's arguments; what they say about tiles and templates goes into the configuration.
        dtype: of the weights.
        checkpoint: directory of a checkpoint to go on from, instead of the model that the arguments name.
        keep: called with the configuration; what it returns is called with names of parameters, and those for which it is
            False are left without memory. Not for a model that is put together.

    Returns:
        (model, tokenizer, directory that the model came from or None).

    Raises:
        UserError: files are missing or damaged, or arguments and model do not fit together.
    """
    if checkpoint is None and model_args.model_name_or_path is None:
        model, tokenizer = assemble(model_args, data_args)
        model.to(dtype=dtype)
        directory = None
    else:
        directory = resolve(checkpoint or model_args.model_name_or_path)
        tokenizer = load_tokenizer(directory)
        chosen = None if keep is None else keep(InternVLChatConfig.from_pretrained(directory))
        model = InternVLChatModel.from_pretrained(directory, dtype=dtype, engine="eager", keep=chosen)
        new = tokenizer.add_tokens(NEW_TOKENS)
        if new:
            raise ConfigError(
                f"the tokenizer in {directory} lacks {new} tokens that chat models have ({', '.join(NEW_TOKENS)}): "
                "start from a language model with --vision_path and --llm_path instead"
            )
    template = model.config.template
    if data_args.conv_style is None:
        data_args.conv_style = template or "internlm2-chat"  # parts by themselves name none
    _configure(model.config, model_args, data_args)
    if template not in (None, data_args.conv_style):
        _log.warning(
            "--conv_style is %s, but the model was trained with %s: unless you know why, use that",
            data_args.conv_style,
            template,
        )
    model.set_tokenizer(tokenizer)
    return model, tokenizer, directory


def _configure(config, model_args, data_args):
    """Let the configuration say how the model is trained, since it shall be used in the same way."""
    if data_args.multi_scale:
        config.extra["architectures"] = ["MiniMonkeyChatModel"]
    if data_args.down_sample_ratio != config.downsample_ratio:
        raise ConfigError(
            f"--down_sample_ratio is {data_args.down_sample_ratio}, but the model's is {config.downsample_ratio}: "
            "its projector fits no other"
        )
    depth = config.vision_config.num_hidden_layers
    if not -depth - 1 <= model_args.vision_select_layer <= depth:
        raise ConfigError(f"--vision_select_layer is {model_args.vision_select_layer}, but the vision tower has {depth} layers")
    config.select_layer = model_args.vision_select_layer
    config.ps_version = model_args.ps_version
    config.template = data_args.conv_style
    config.vision_config.drop_path_rate = model_args.drop_path_rate
    for name in "force_image_size dynamic_image_size use_thumbnail min_dynamic_patch max_dynamic_patch pad2square".split():
        setattr(config, name, getattr(data_args, name))


# ---------------------------------------------------------------------- what learns


def prepare(model, model_args, recompute):
    """Add adapters, freeze, and set up regularisation and recompute.

    Frozen parameters get no gradients, and frozen parts are in evaluation mode, without stochastic depth.

    Args:
        model: an :class:`InternVLChatModel`; changed.
        model_args: :class:`~.arguments.ModelArguments`.
        recompute: whether blocks compute their activations again in the backward pass.

    Returns:
        ``{name: parameter}`` of what learns.

    Raises:
        ConfigError: nothing does.
    """
    if model_args.use_backbone_lora:
        wrap_backbone_lora(model, model_args.use_backbone_lora)
    if model_args.use_llm_lora:
        wrap_llm_lora(model, model_args.use_llm_lora)
    layers = model.vision_model.encoder.layers
    for i, layer in enumerate(layers):
        layer.drop_path = model_args.drop_path_rate * i / max(len(layers) - 1, 1)
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not learns(name, model_args, len(layers))
    model.vision_model.encoder.enable_recompute = model.language_model.model.enable_recompute = recompute
    train_mode(model)
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    if not trained:
        raise ConfigError("nothing is left to train: set --freeze_llm, --freeze_mlp or --freeze_backbone to False, or use LoRA")
    return trained


def train_mode(model):
    """Training mode where something learns, evaluation mode elsewhere."""
    set_mode(model, True)
    # Gradients pass through a frozen decoder, and its activations are recomputed in training mode only.
    model.language_model.model.training = True


def set_mode(layer, inherited):
    """Training mode for layers in which something learns; those without parameters follow what they are in."""
    parameters = layer.parameters()
    layer.training = any(not p.stop_gradient for p in parameters) if parameters else inherited
    for child in layer.children():
        set_mode(child, layer.training)


# ---------------------------------------------------------------------- from parts


def assemble(model_args, data_args):
    """A chat model from a vision tower and a language model, whose token embeddings grow by what pictures need.

    New rows of the output head are the mean of the others, as in the original; those of the embedding, and without
    ``--mlp_path`` the projector, are random.

    Returns:
        (model in float32, tokenizer).

    Raises:
        CheckpointError, ConfigError, TokenizerError: files are missing or damaged, or do not fit.
    """
    vision_path, llm_path = resolve(model_args.vision_path), resolve(model_args.llm_path)
    tokenizer = load_tokenizer(llm_path)
    new_tokens = tokenizer.add_tokens(NEW_TOKENS)
    vision, llm = _read_config(vision_path), _read_config(llm_path)
    vision, llm = vision.get("vision_config", vision), llm.get("llm_config", llm)
    tied = llm.get("tie_word_embeddings", False)
    values = {
        "vision_config": vision,
        "llm_config": {**llm, "vocab_size": len(tokenizer), "tie_word_embeddings": False},
        "downsample_ratio": data_args.down_sample_ratio,
    }
    try:
        config = InternVLChatConfig.from_dict(values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{vision_path} and {llm_path} cannot be put together: {error}") from None
    model = InternVLChatModel(config)
    table = config.weight_table()
    _fill(model, table, vision_path, "vision_model.")
    _fill(model, table, llm_path, "language_model.", tied)
    if model_args.mlp_path is not None:
        _fill(model, table, model_args.mlp_path, "mlp1.")
    if new_tokens:
        head = model.language_model.lm_head.weight
        values = head.numpy()  # [D, V]
        values[:, -new_tokens:] = values[:, :-new_tokens].mean(1, keepdims=True)
        head.set_value(values)
    return model, tokenizer


def _read_config(directory):
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): the directory of a model needs its config.json") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): download or copy it again") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object: download or copy it again")
    return values


def _fill(model, table, path, prefix, tied=False):
    """Give one part of a chat model the weights of a checkpoint of that part, or of a whole chat model.

    Args:
        model: in float32.
        table: its ``weight_table()``.
        path: directory or weight file.
        prefix: what the part's names begin with in a chat model; ``path`` may leave it out.
        tied: whether the checkpoint's token embedding is its output head as well.
    """
    wanted = {part.name: (weight, part) for weight in table for part in weight.parts if part.name.startswith(prefix)}
    head = list(wanted)[-1]  # for the language model
    missing = dict.fromkeys(wanted)
    parameters = model.state_dict()
    paths = [path] if os.path.isfile(path) else find_weight_files(path)[0]
    embedding = next((name for name in wanted if "embed" in name and prefix == "language_model."), None)
    unexpected = []
    for file in paths:
        with open_weight_file(file) as stored:
            whole = any(name.startswith(prefix) for name in stored)
            for key, tensor in stored.items():
                name = key if whole else prefix + key
                if not name.startswith(prefix) or name.endswith(("inv_freq", "position_ids")):
                    continue
                if name not in wanted:
                    unexpected.append(key)
                    continue
                rows = convert_dtype(tensor.read(0, tensor.shape[0]), tensor.dtype, "float32")
                names = [name, head] if tied and name == embedding else [name]
                for name in names:
                    _place(parameters, *wanted[name], rows, file)
                    missing.pop(name, None)
    if missing or unexpected:
        raise CheckpointError(
            f"the tensors in {path} do not fit: {len(missing)} are missing ({name_some(list(missing))}), "
            f"{len(unexpected)} unexpected ({name_some(unexpected)}); config.json and weights must be of the same model"
        )


def _place(parameters, weight, part, rows, file):
    """Write one published tensor into its share of a parameter; the vocabulary may differ in length."""
    vocabulary = weight.name.endswith(("embed_tokens.weight", "lm_head.weight"))
    if rows.shape[1:] != part.shape[1:] or (len(rows) != part.shape[0] and not vocabulary):
        raise CheckpointError(f"{file}: {part.name} is {list(rows.shape)} instead of {list(part.shape)}")
    values = parameters[weight.name].numpy()
    outputs = values.T if weight.linear else values
    for row, output, count in part.runs:
        known = rows[row : row + count]
        outputs[output : output + len(known)] = known
    parameters[weight.name].set_value(values)

"""The model that is trained: loaded or put together, with the parts frozen that shall not learn."""

import logging

from paddlemix.checkpoints.hub import resolve
from paddlemix.errors import ConfigError
from paddlemix.models.blocks.lora import wrap_backbone_lora, wrap_llm_lora
from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel, load_tokenizer

from .parts import NEW_TOKENS, assemble
from .plan import learns

_log = logging.getLogger(__name__)


def build_model(model_args, data_args, dtype, checkpoint=None, keep=None, ranks=None):
    """The model and its tokenizer.

    Args:
        model_args, data_args: the trainer's arguments; what they say about tiles and templates goes into the configuration.
        dtype: of the weights.
        checkpoint: directory of a checkpoint to go on from, instead of the model that the arguments name.
        keep: called with the configuration; what it returns is called with names of parameters, and those for which it is
            False are left without memory.
        ranks: the :class:`~paddlemix.parallel.groups.Group` that divides each layer; None for this process alone.

    Returns:
        (model, tokenizer, directory that the model came from or None).

    Raises:
        UserError: files are missing or damaged, or arguments and model do not fit together.
    """
    if checkpoint is None and model_args.model_name_or_path is None:
        if ranks is not None:
            raise ConfigError(
                "--tensor_parallel_degree needs a whole model: put it together first (a run of --max_steps 1 without it), "
                "and start from its --output_dir by --model_name_or_path"
            )
        model, tokenizer = assemble(model_args, data_args, dtype, keep)
        directory = None
    else:
        directory = resolve(checkpoint or model_args.model_name_or_path)
        tokenizer = load_tokenizer(directory)
        chosen = None if keep is None else keep(InternVLChatConfig.from_pretrained(directory))
        model = InternVLChatModel.from_pretrained(
            directory, dtype, "eager", chosen, model_args.weight_dtype, tensor_parallel=ranks or 1, learning=True
        )
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
        wrap_backbone_lora(model, model_args.use_backbone_lora, model_args.lora_dropout)
    if model_args.use_llm_lora:
        wrap_llm_lora(model, model_args.use_llm_lora, model_args.lora_dropout)
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

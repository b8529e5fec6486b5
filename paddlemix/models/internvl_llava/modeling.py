"""LlavaForCausalLM: InternViT's features through a projector into Vicuna, without pixel shuffle and without tiles."""

import os

import numpy as np
import paddle

from paddlemix.checkpoints.checkpoint import Checkpoint
from paddlemix.checkpoints.hub import resolve
from paddlemix.errors import CheckpointError, ConfigError, PromptError
from paddlemix.files import read_json
from paddlemix.models.blocks.chat import ChatSession, batch_chat
from paddlemix.models.blocks.chat_model import ChatModel
from paddlemix.models.blocks.configuration import VisionConfig
from paddlemix.models.blocks.engine import choose, fuse
from paddlemix.models.blocks.layers import count_parameters
from paddlemix.models.blocks.lora import merge_lora, peft_scales
from paddlemix.models.blocks.projector import MLPProjector
from paddlemix.models.blocks.quantising import check_choice, quantise_model, round_activations

from . import checkpoint as files
from .configuration import LlavaConfig
from .conversation import build_prompt, get_template
from .saving import save_lora, save_projector
from .tokenization import IMAGE_TOKEN_INDEX, expand, load_tokenizer, tokenize_prompt


class LlavaForCausalLM(ChatModel):
    """A vision tower that is never trained, a projector and a Llama (arXiv 2304.08485).

    A picture's place in token ids is -200. ``n`` pictures, ``P`` tokens of a picture, ``D`` the language model's width.
    """

    def __init__(self, config):
        sizes = config.vision_config.hidden_size, config.llm_config.hidden_size
        super().__init__(config, MLPProjector(*sizes, config.projector_layers()))
        self.img_context_token_id = IMAGE_TOKEN_INDEX

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        model_base=None,
        vision_tower=None,
        dtype="float32",
        engine="auto",
        keep=None,
        merge=True,
        weight_dtype=None,
        quantize_parts=None,
        kv_cache_dtype=None,
        activation_dtype=None,
    ):
        """Load a checkpoint in any of its three forms.

        Args:
            name_or_path: a directory or a name: a whole checkpoint, or a projector or LoRA adapters alone.
            model_base: the language model that a projector or adapters were trained with.
            vision_tower: directory or name of the tower, instead of the one that the checkpoint has or names.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the device in use computes best in.
            engine: ``eager``, ``inference`` or ``auto``; see :mod:`~paddlemix.models.blocks.engine`.
            keep: see :func:`~paddlemix.checkpoints.checkpoint.load_checkpoint`.
            merge: whether adapters become part of the weights.
            weight_dtype, quantize_parts, kv_cache_dtype, activation_dtype: as of
                :meth:`~paddlemix.models.internvl2.InternVLChatModel.from_pretrained`.

        Raises:
            ConfigError, CheckpointError: files are missing or damaged, or do not belong together.
        """
        directory = resolve(name_or_path)
        config = LlavaConfig.from_pretrained(directory)
        check_choice(weight_dtype, quantize_parts)
        form = files.form_of(directory)
        base = None if model_base is None else resolve(model_base)
        if not form.whole and base is None:
            what = (
                "LoRA adapters"
                if form.adapters
                else "a projector alone"
                if form.projector
                else "no weights of a language model"
            )
            raise CheckpointError(f"{directory} has {what}: give the language model that it was trained with as model_base")
        config, tower = find_tower(directory, config, vision_tower, form.whole)
        config, rows = _with_picture_tokens(config, directory, base)
        stored = config if rows is None else _resized(config, rows)
        if base is not None:
            _check_base(base, stored, directory)
        # Before anything is built: a configuration can ask for any size.
        inside = form.whole and tower.directory == directory
        parts = ["language_model."] + ["mlp1"] * form.whole + ["vision_model."] * inside
        sources = [Checkpoint(directory if form.whole else base, files.part(stored, *parts))]
        sources += [] if inside else [Checkpoint(tower.directory, tower.part(stored))]
        with paddle.LazyGuard():
            model = cls(stored)
        engine, dtype = choose(engine, dtype, count_parameters(model))
        model.keep_cache_in(kv_cache_dtype)
        for source in sources:
            files.read_part(model, source, dtype, keep)
        for path in filter(None, (None if form.whole else form.projector, form.others)):
            files.read_file(model, stored, path, dtype, prefix="mlp1")
        if not form.whole and not (form.projector or form.others):
            raise CheckpointError(
                f"{directory} has neither {files.PROJECTOR_FILE} nor {files.OTHERS_FILE}: copy the projector there"
            )
        if form.adapters:
            files.merge_adapters(model, stored, directory, peft_scales(directory))
        if rows is not None:
            grow_vocabulary(model, config.llm_config.vocab_size)
        model.eval()
        if engine == "inference" or weight_dtype is not None:
            merge_lora(model)
        if weight_dtype is not None:
            quantise_model(model, weight_dtype, quantize_parts, dtype)
        round_activations(model, activation_dtype)
        if engine == "inference":
            fuse(model, dtype)
        return model

    def save_projector(self, directory, positions=False):
        """Write ``mm_projector.bin`` and ``config.json`` alone, with the tower's positions if they learned."""
        save_projector(self, directory, positions)

    def save_adapters(self, directory, base_model=None):
        """Write the LoRA adapters, what learned beside them, and ``config.json``, as the original does."""
        save_lora(self, directory, base_model)

    # ------------------------------------------------------------------ pictures

    @property
    def image_size(self):
        """Side of a picture in pixels."""
        return self.config.image_size

    def encode_tower(self, pixels):
        """``pixels [n, 3, S, S]`` -> the tower's features ``[n, P, D_vision]``, without gradients."""
        with paddle.no_grad():
            return self._chosen(self._patches(paddle.to_tensor(self._checked(pixels))))

    @paddle.no_grad()
    def encode_images(self, pixels):
        """``pixels [n, 3, S, S]``, an array or a tensor -> features in the language model's space, ``[n, P, D]``."""
        return self.extract_feature(self._checked(pixels))

    def _extract_feature(self, pixel_values):
        return self.mlp1(self._chosen(self._patches(pixel_values)))

    def _tile_features(self, hidden, shape):
        return self.mlp1(self._chosen(hidden))

    def _chosen(self, hidden):
        return hidden if self.config.mm_vision_select_feature == "cls_patch" else hidden[:, 1:]

    def _checked(self, pixels):
        pixels = pixels.numpy() if isinstance(pixels, paddle.Tensor) else np.asarray(pixels)
        size = self.image_size
        if pixels.ndim != 4 or list(pixels.shape[1:]) != [3, size, size]:
            raise PromptError(
                f"pictures must be [n, 3, {size}, {size}] for this model, not {list(pixels.shape)}: prepare them by "
                f"process_images(pictures, {size})"
            )
        return pixels.astype("float32")

    # ------------------------------------------------------------------ text

    def forward(self, input_ids=None, pixels=None, **batch):
        """Logits of a prompt; with the arguments of a training batch also the loss.

        Args:
            input_ids: ``[B, N]`` integers, -200 for each picture; a list for one row. With ``pixel_values`` in ``batch``,
                every -200 is one token of a picture.
            pixels: ``[n, 3, S, S]`` of all pictures in order, or None.
            batch: see :meth:`~paddlemix.models.blocks.chat_model.ChatModel.forward`.

        Returns:
            :class:`~paddlemix.models.blocks.losses.CausalLMOutput`; ``logits [B, N', V]``, where each picture has its tokens.

        Raises:
            PromptError: there are more or fewer pictures than marks.
        """
        if "pixel_values" in batch or "labels" in batch:
            return super().forward(input_ids=input_ids, **batch)
        ids = np.asarray(input_ids, dtype="int64")
        ids = ids.reshape([1, -1]) if ids.ndim == 1 else ids
        pixels = self._pictures_of(pixels, int((ids == IMAGE_TOKEN_INDEX).sum()))
        rows = [expand(row.tolist(), self.config.num_image_token) for row in ids]
        length = max(map(len, rows))
        rows = np.array([row + [0] * (length - len(row)) for row in rows], dtype="int64")
        return super().forward(pixel_values=pixels, input_ids=rows, **batch)

    def _pictures_of(self, pixels, marks):
        """``pixels``, checked to be as many as ``marks``; None where there are none."""
        pixels = None if pixels is None else self._checked(pixels)
        count = 0 if pixels is None else len(pixels)
        if count != marks:
            raise PromptError(f"the prompt has {marks} <image> mark(s) but {count} picture(s) were given: write one for each")
        return pixels if count else None

    def prompt_ids(self, tokenizer, template, turns, image_token_counts):
        """Token ids of a conversation, -200 as often as its pictures have tokens."""
        messages = [text for turn in turns for text in turn if text is not None]
        ids = tokenize_prompt(build_prompt(template, messages), tokenizer)
        marks = ids.count(IMAGE_TOKEN_INDEX)
        if marks != len(image_token_counts):
            raise PromptError(
                f"the conversation has {marks} <image> mark(s) but {len(image_token_counts)} picture(s): write one for each"
            )
        return expand(ids, self.config.num_image_token)

    def set_tokenizer(self, tokenizer):
        """Check that a tokenizer belongs to the model.

        Raises:
            ConfigError: it has more tokens than the model.
        """
        if len(tokenizer) > self.config.llm_config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens, but the model {self.config.llm_config.vocab_size}: tokenizer "
                "files and weights are of different models"
            )

    def template(self):
        """The template of InternVL's own LLaVA checkpoints."""
        return get_template(self.config.template)

    def chat(self, tokenizer, pixels, messages, generation_config=None, template="vicuna_v1"):
        """Answer the last message of a conversation.

        Args:
            tokenizer: from :func:`~.tokenization.load_tokenizer`.
            pixels: ``[n, 3, S, S]`` of all pictures of the conversation in the order of their marks, or None.
            messages: texts of the user, the assistant, the user, ...; ``<image>`` marks a picture's place.
            generation_config: a :class:`~paddlemix.models.blocks.generation.GenerationConfig` or a dictionary.
            template: name of the template.

        Raises:
            PromptError: pictures and marks differ in number, the user has not the last word, or the prompt is too long.
        """
        return "".join(self.stream(tokenizer, pixels, messages, generation_config, template))

    def stream(self, tokenizer, pixels, messages, generation_config=None, template="vicuna_v1"):
        """The same as :meth:`chat`, piece by piece as the answer is generated."""
        session, question = self.session(tokenizer, messages, template)
        pixels = self._pictures_of(pixels, sum(text.count("<image>") for text in messages))
        yield from session.stream(question, pixels, generation_config, None if pixels is None else [1] * len(pixels))

    def session(self, tokenizer, messages=(), template="vicuna_v1"):
        """A :class:`~paddlemix.models.blocks.chat.ChatSession` after ``messages``, and the user's message that is open."""
        messages = [messages] if isinstance(messages, str) else list(messages)
        if messages and len(messages) % 2 == 0:
            raise PromptError(f"there are {len(messages)} messages, and the last one is the assistant's: end with the user's")
        history = [(messages[i], messages[i + 1]) for i in range(0, len(messages) - 1, 2)]
        template = get_template(template) if isinstance(template, str) else template
        return ChatSession(self, tokenizer, history=history, template=template), messages[-1] if messages else None

    def batch_chat(self, tokenizer, pixels, questions, generation_config=None, num_patches_list=None, template="vicuna_v1"):
        """Ask many questions at once; see :func:`~paddlemix.models.blocks.chat.batch_chat`. A picture is one tile."""
        return batch_chat(
            self, tokenizer, pixels, questions, generation_config, num_patches_list, template=get_template(template)
        )


# ---------------------------------------------------------------------- what a checkpoint leaves to others


def find_tower(directory, config, vision_tower=None, whole=True):
    """Where a model's tower is: what is asked for, the copy in the checkpoint, a folder beside it, or what the name leads to.

    Args:
        directory: of the checkpoint.
        config: its :class:`LlavaConfig`.
        vision_tower: what is asked for, or None.
        whole: whether the checkpoint may have a copy.

    Returns:
        (the configuration with the tower's, :class:`~.checkpoint.Tower`).
    """
    if vision_tower is not None:
        tower = files.tower_in(resolve(vision_tower))
        asked = os.fspath(vision_tower).rstrip("/")
        same = os.path.basename(asked) == os.path.basename((config.mm_vision_tower or "").rstrip("/"))
        return config.with_tower(tower.config, None if same else asked), tower
    name = config.mm_vision_tower or ""
    last = os.path.basename(name.rstrip("/"))
    beside = os.path.join(os.path.dirname(os.path.abspath(directory)), last)
    known = None
    if last and os.path.isfile(os.path.join(beside, "config.json")):
        known = files.tower_in(beside)
    if whole:
        described = config.vision_config or (known and known.config) or published_tower(last)
        inside = described and files.tower_inside(directory, described)
        if inside:
            return config.with_tower(inside.config), inside
    if known is None:
        if not name:
            raise ConfigError(f"{directory}: config.json has no mm_vision_tower: give the vision tower as vision_tower")
        try:
            known = files.tower_in(resolve(name))
        except CheckpointError as error:
            raise CheckpointError(f"the vision tower of {directory}: {error}; or give its folder as vision_tower") from None
    return config.with_tower(known.config), known


def published_tower(name):
    """What is known of a published tower by its name alone; None for others."""
    if "300m" in name.lower():
        return None
    if "internvit" in name.lower() or "intern_vit" in name.lower():
        return VisionConfig(
            num_hidden_layers=45 if "V1-2" in name or "V1-5" in name else 48, image_size=448 if "448" in name else 224
        )
    return None


def _check_base(base, config, directory):
    """Raise unless the language model in ``base`` has the shape that a projector or adapters were trained with."""
    values = read_json(os.path.join(base, "config.json"), absent="a language model needs its config.json")
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        there, here = values.get(name), getattr(config.llm_config, name)
        if there != here:
            raise ConfigError(
                f"the base {base} has {name} {there}, but {directory} was trained with {here}: give the language model that "
                "it was trained with as model_base"
            )


def _with_picture_tokens(config, directory, base):
    """The configuration with room for the tokens that it asks for, and the rows that the files have if these are fewer."""
    if not (config.mm_use_im_patch_token or config.mm_use_im_start_end):
        return config, None
    tokens, rows = len(load_tokenizer(directory, base)), config.llm_config.vocab_size
    if base is not None:
        rows = read_json(os.path.join(base, "config.json")).get("vocab_size", rows)
    if tokens <= rows:
        return config, None
    return _resized(config, tokens), rows


def _resized(config, rows):
    import dataclasses

    return dataclasses.replace(config, llm_config=dataclasses.replace(config.llm_config, vocab_size=rows))


@paddle.no_grad()
def grow_vocabulary(model, rows):
    """Give a model's embedding and head so many rows; new ones are the mean of the others."""
    language = model.language_model
    for layer, linear in ((language.model.embed_tokens, False), (language.lm_head, True)):
        weight = layer.weight.astype("float32").numpy()
        weight = weight.T if linear else weight
        more = np.broadcast_to(weight.mean(0, keepdims=True), (rows - len(weight), weight.shape[1]))
        values = np.concatenate([weight, more])
        value = paddle.to_tensor(np.ascontiguousarray(values.T if linear else values)).astype(layer.weight.dtype)
        parameter = layer.create_parameter(value.shape, dtype=value.dtype)
        parameter.set_value(value)
        layer.weight = parameter
    model.config = _resized(model.config, rows)
    language.config = model.config.llm_config

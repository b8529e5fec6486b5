"""InternVLChatModel: pictures and text in, text or a loss out."""

import numpy as np
import paddle

from paddlemix.checkpoints.checkpoint import Checkpoint
from paddlemix.checkpoints.hub import resolve
from paddlemix.errors import ConfigError, PromptError
from paddlemix.models.blocks.chat import ChatSession, batch_chat
from paddlemix.models.blocks.chat_model import ChatModel
from paddlemix.models.blocks.engine import choose, fuse
from paddlemix.models.blocks.inputs import checked_pixels
from paddlemix.models.blocks.layers import count_parameters
from paddlemix.models.blocks.lora import merge_lora
from paddlemix.models.blocks.losses import CausalLMOutput, causal_loss, chunked_causal_loss
from paddlemix.models.blocks.packs import Packs
from paddlemix.models.blocks.projector import Projector, pixel_shuffle
from paddlemix.models.blocks.quantising import load_quantised, round_activations
from paddlemix.models.blocks.router import CompactProjector, Gate, Pooling, RoutedTiles, decide

from .configuration import InternVLChatConfig
from .conversation import IMG_CONTEXT, get_template, insert_image_tokens

__all__ = [
    "CausalLMOutput",
    "InternVLChatModel",
    "Projector",
    "causal_loss",
    "chunked_causal_loss",
    "count_parameters",
    "pixel_shuffle",
]


class InternVLChatModel(ChatModel):
    """A vision tower, a projector behind pixel shuffle and a language model (arXiv 2404.16821)."""

    def __init__(self, config):
        scale = round(1 / config.downsample_ratio) ** 2
        super().__init__(config, Projector(config.vision_config.hidden_size * scale, config.llm_config.hidden_size))
        if config.has_router:
            width = config.vision_config.hidden_size
            self.mlp2 = CompactProjector(width * scale**2, config.llm_config.hidden_size)
            self.pooling_before_gating, self.gating = Pooling(width), Gate(width)

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        dtype="auto",
        engine="auto",
        keep=None,
        weight_dtype=None,
        quantize_parts=None,
        tensor_parallel=1,
        learning=False,
        kv_cache_dtype=None,
        activation_dtype=None,
    ):
        """Load a published checkpoint, or one that was saved here.

        Args:
            name_or_path: a directory, or a name such as ``OpenGVLab/InternVL2-1B``.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the device in use computes best in.
            engine: ``eager`` for plain Paddle, ``inference`` for the fused CPU kernels of :mod:`~.engine`, or ``auto``.
            keep: see :func:`~.checkpoint.load_checkpoint`.
            weight_dtype: ``int8`` or ``int4`` for weights in fewer bits, None for those of the files.
            quantize_parts: which parts have them, of ``language``, ``projector`` and ``vision``; None for the first two.
            tensor_parallel: over how many devices each layer is divided, this process being the first of as many that it
                starts; ``auto`` for as many as the weights need. Started by a launcher, all its processes call this and what
                follows. :meth:`close` ends the others. Also a :class:`~paddlemix.parallel.groups.Group` of such processes.
            learning: whether the model is to learn: with ``weight_dtype`` adapters alone, and only the language model's weights
                under these are in few bits.
            kv_cache_dtype: ``int8`` to keep keys and values in 8 bits, on CPU; None for the engine's own dtype.
            activation_dtype: ``int8`` to round what meets weights in few bits too, on CPU, token by token; None for not.

        Raises:
            ConfigError, CheckpointError: the directory does not hold a complete checkpoint of a supported model.
            ParallelError: the other processes cannot be started.
        """
        directory = resolve(name_or_path)
        config = InternVLChatConfig.from_pretrained(directory)
        source = Checkpoint(directory, config)  # before anything is built: a configuration can ask for any size
        if tensor_parallel != 1:
            from . import ranks  # nobody else pays for it

            weights = weight_dtype, quantize_parts
            for flag, value in (("kv_cache_dtype", kv_cache_dtype), ("activation_dtype", activation_dtype)):
                if value:
                    raise ConfigError(f"{flag} {value} is for one process: leave out --{flag} or --tensor_parallel")
            if (found := ranks.load(cls, source, dtype, engine, keep, tensor_parallel, weights)) is not None:
                return found
        with paddle.LazyGuard():  # published sizes take minutes to fill with random numbers that nobody needs
            model = cls(config)
        engine, dtype = choose(engine, dtype, count_parameters(model))
        packs = Packs(model, source, dtype) if engine == "inference" and keep is None else None
        packed = None if packs is None else packs.look
        model.keep_cache_in(kv_cache_dtype)
        load_quantised(model, source, dtype, keep, weight_dtype, quantize_parts, learning, packed=packed)
        round_activations(model, activation_dtype)
        model.eval()
        if engine == "inference":
            merge_lora(model)
            fuse(model, dtype, packs)
            if packs is not None:
                packs.store_later()
        model.source = source
        return model

    # ------------------------------------------------------------------ pictures

    @property
    def routes(self):
        """Whether each tile of a prompt may take a coarse form of fewer tokens (the Flash models)."""
        return self.config.flash_mode

    @paddle.no_grad()
    def router_gate(self, pixel_values):
        """How likely the coarse form of each tile is enough, by itself.

        Args:
            pixel_values: as for :meth:`extract_feature`.

        Returns:
            ``[T]`` float32 tensor.

        Raises:
            ConfigError: the checkpoint has no router.
        """
        return paddle.to_tensor(self.routed_tiles(pixel_values, gates_alone=True))

    @paddle.no_grad()
    def routed_tiles(self, pixel_values, gates_alone=False):
        """Tiles in both forms with their gates, a :class:`~paddlemix.models.blocks.router.RoutedTiles`.

        ``gates_alone`` gives the gates, an array ``[T]``.
        """
        if not self.config.has_router:
            raise ConfigError("this checkpoint has no visual resolution router: it is not one of the Flash models")
        pixels, parts = checked_pixels(pixel_values), []
        for at in range(0, len(pixels), self.vision_batch):
            batch = paddle.to_tensor(pixels[at : at + self.vision_batch])
            self._check_sides(batch.shape)
            grid = self._grid(self._patches(batch), batch.shape)
            parts.append(self._gates(grid) if gates_alone else self._routed(grid))
        return np.concatenate(parts) if gates_alone else RoutedTiles.joined(parts)

    def _gates(self, grid):
        flat = grid.reshape([grid.shape[0], -1, grid.shape[-1]])
        return self.gating(self.pooling_before_gating(flat)).numpy().astype("float32")

    def _routed(self, grid):
        """Both forms of tiles ``[T, rows, columns, D_vision]``."""
        ratio, version = self.config.downsample_ratio, self.config.ps_version
        fine, coarse = self.mlp1(_shuffled(grid, ratio, version)), self.mlp2(_shuffled(grid, ratio**2, version))
        return RoutedTiles(fine, coarse, self._gates(grid))

    def decided(self, pictures):
        """Which tiles of each of a prompt's ``pictures`` (:class:`RoutedTiles`) are compact: a list of bool arrays."""
        return decide(pictures, self.config.extra["flash_relative_threshold"], self.config.extra["flash_absolute_threshold"])

    def settled(self, pictures):
        """Features of each of a prompt's ``pictures`` (:class:`RoutedTiles`), and which of all tiles are compact, an array."""
        compact = self.decided(pictures)
        features = [picture.features(own) for picture, own in zip(pictures, compact)]
        return features, np.concatenate(compact) if compact else np.zeros(0, bool)

    def _extract_feature(self, pixel_values):
        self._check_sides(pixel_values.shape)
        return self._project(self._patches(pixel_values), pixel_values.shape)

    def _check_sides(self, shape):
        config = self.config
        multiple = config.vision_config.patch_size * round(1 / config.downsample_ratio)
        height, width = shape[2:]
        if height % multiple or width % multiple:
            raise PromptError(
                f"pixel_values are {width}x{height} pixels: sides must be multiples of {multiple}; this model's tiles are "
                f"{config.image_size}x{config.image_size} (input_size of load_image)"
            )

    def feature_steps(self, pixel_values):
        """As of every chat model; where tiles may take a coarse form, each is a
        :class:`~paddlemix.models.blocks.router.RoutedTiles`."""
        self._check_sides(pixel_values.shape)
        yield from super().feature_steps(pixel_values)

    def _tile_features(self, hidden, shape):
        if self.routes:
            return self._routed(self._grid(hidden, shape)).split([1] * len(hidden))
        return self._project(hidden, shape)

    def _project(self, hidden, shape):
        """The tower's ``[T, 1 + P, D_vision]`` for tiles of ``shape`` -> ``[T, num_image_token, D]``."""
        return self.mlp1(_shuffled(self._grid(hidden, shape), self.config.downsample_ratio, self.config.ps_version))

    def _grid(self, hidden, shape):
        """The tower's ``[T, 1 + P, D_vision]`` without the class token, ``[T, rows, columns, D_vision]``."""
        rows, columns = (side // self.config.vision_config.patch_size for side in shape[2:])
        return hidden[:, 1:].reshape([hidden.shape[0], rows, columns, hidden.shape[-1]])

    # ------------------------------------------------------------------ text

    def prompt_ids(self, tokenizer, template, turns, image_token_counts):
        """Token ids of a conversation, with as many context tokens as its pictures have.

        Args:
            tokenizer: the model's.
            template: a :class:`~paddlemix.models.blocks.conversation.Template`.
            turns: ``[(question, answer), ...]``, the last answer being None.
            image_token_counts: tokens of each picture, in the order of the ``<image>`` marks.

        Raises:
            PromptError: marks and pictures differ in number, or a context token is in the text.
        """
        texts = insert_image_tokens([question for question, _ in turns], image_token_counts)
        rounds = template.rounds(zip(texts, (answer for _, answer in turns)))
        return tokenizer.encode("".join(before + (answer or "") for before, answer in rounds))

    def template(self):
        """The checkpoint's conversation template, with its own system message where it has one.

        Raises:
            ConfigError: the checkpoint names none.
        """
        if self.config.template is None:
            raise ConfigError("config.json has no 'template': add the one that the model was trained with")
        return get_template(self.config.template).with_system_message(self.config.system_message)

    def chat(
        self,
        tokenizer,
        pixel_values,
        question,
        generation_config=None,
        history=None,
        return_history=False,
        num_patches_list=None,
    ):
        """Ask one question, as the original does.

        Args:
            tokenizer: from :func:`~.tokenization.load_tokenizer`.
            pixel_values: ``[T, 3, height, width]`` of all pictures of the conversation, or None.
            question: text; each ``<image>`` marks a picture. Without history and marks, one mark is put in front.
            generation_config: a :class:`GenerationConfig` or a dictionary.
            history: ``[(question, answer), ...]`` of earlier rounds, as returned.
            return_history: return ``(answer, history)`` instead of the answer.
            num_patches_list: tiles of each picture; None for one picture of all tiles.

        Raises:
            PromptError: pictures and marks differ in number, a reserved token is in the text, or the prompt is too long.
        """
        session = ChatSession(self, tokenizer, history=history)
        answer = session.ask(question, pixel_values, generation_config, num_patches_list)
        return (answer, session.history) if return_history else answer

    def batch_chat(
        self,
        tokenizer,
        pixel_values,
        questions,
        generation_config=None,
        num_patches_list=None,
        history=None,
        return_history=False,
    ):
        """Ask many questions at once; see :func:`~.chat.batch_chat`."""
        return batch_chat(
            self, tokenizer, pixel_values, questions, generation_config, num_patches_list, history, return_history
        )

    def set_tokenizer(self, tokenizer):
        """Take the id of the context token from the tokenizer, and check that both belong together.

        Raises:
            TokenizerError: the tokenizer has no context token. ConfigError: it has more tokens than the model.
        """
        self.img_context_token_id = tokenizer.require_token_id(IMG_CONTEXT)
        if self.img_context_token_id >= self.config.llm_config.vocab_size:
            raise ConfigError(
                f"the tokenizer's {IMG_CONTEXT} is {self.img_context_token_id}, beyond the model's vocabulary of "
                f"{self.config.llm_config.vocab_size}: tokenizer files and weights are of different models"
            )


def _shuffled(grid, ratio, version):
    """``[T, rows, columns, D]`` -> ``[T, rows * columns * ratio**2, D / ratio**2]``."""
    x = pixel_shuffle(grid, ratio, version)
    return x.reshape([x.shape[0], -1, x.shape[-1]])

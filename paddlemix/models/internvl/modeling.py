"""InternVLModel: pictures and texts to features of one space, scores, captions and losses (arXiv 2312.14238).

``B`` pictures or texts, ``Q`` queries, ``P`` patches and class token of a picture, ``D`` the width of QLLaMA, ``E`` that of
the common space in the shapes below.
"""

import os
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from paddlemix.arrays import host_array
from paddlemix.checkpoints import load_checkpoint, resolve, save_checkpoint
from paddlemix.errors import PromptError
from paddlemix.models.blocks.engine import choose
from paddlemix.models.blocks.generation import GenerationConfig, generate_tokens, new_cache
from paddlemix.models.blocks.inputs import pixel_tensor
from paddlemix.models.blocks.language import LanguageModel
from paddlemix.models.blocks.layers import AttentionMask, Linear, count_parameters, take_rows
from paddlemix.models.blocks.lora import add_adapters, merge_lora
from paddlemix.models.blocks.losses import chunked_causal_loss
from paddlemix.models.blocks.vision import InternVisionModel

from .configuration import InternVLConfig
from .losses import contrastive_loss, diagonal_targets, gather, matching_loss, mean_over_processes, normalize, shared_targets
from .pooling import AttentionPooling

MODES = ("InternVL-C", "InternVL-G")


@dataclass
class InternVLLoss:
    """Losses of a batch, the means over all processes; ``loss`` is the sum of the others.

    Attributes:
        loss, loss_itm, loss_itc, loss_itg: scalars: of all, of matching, of contrast, of captions (None without).
    """

    loss: paddle.Tensor
    loss_itm: paddle.Tensor
    loss_itc: paddle.Tensor
    loss_itg: paddle.Tensor | None = None


class InternVLModel(nn.Layer):
    """InternViT, QLLaMA with learned queries, and attention pooling over either."""

    # Pictures that go through the model at once without gradients, unless the caller batches them.
    vision_batch = 8

    def __init__(self, config):
        super().__init__()
        self.config = config
        vision, language, size = config.vision_config, config.qllama_config, config.clip_embed_dim
        normal = nn.initializer.Normal(std=config.initializer_range)
        self.vision_model = InternVisionModel(vision)
        self.qllama = LanguageModel(language)
        self.query_tokens = self.create_parameter([1, config.num_query_token, language.hidden_size], default_initializer=normal)
        projection = nn.initializer.Normal(std=language.hidden_size**-0.5)
        self.text_projection = self.create_parameter([language.hidden_size, size], default_initializer=projection)
        self.logit_scale = self.create_parameter([], default_initializer=nn.initializer.Constant(float(np.log(1 / 0.07))))
        self.clip_projector = AttentionPooling(vision.hidden_size, size, config.attn_pool_num_heads)
        self.clip_projector2 = AttentionPooling(language.hidden_size, size, config.attn_pool_num_heads)
        self.itm_head = Linear(language.hidden_size, 2)
        add_adapters(self)  # where the configuration says that the checkpoint has some

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_pretrained(cls, name_or_path, dtype="auto", engine="eager", merge=True):
        """Load a published checkpoint, or one that was saved here; LoRA weights in it are merged.

        Args:
            name_or_path: a directory, or a name such as ``OpenGVLab/InternVL-14B-224px``.
            dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the device in use computes best in.
            engine: ``eager`` for plain Paddle, ``inference`` for the fused CPU kernels in the vision tower, or ``auto``.
            merge: False keeps LoRA weights apart, to train them further.

        Raises:
            ConfigError, CheckpointError: the directory does not hold a complete checkpoint of such a model.
        """
        directory = resolve(name_or_path)
        config = InternVLConfig.from_pretrained(directory)
        with paddle.LazyGuard():  # published sizes take minutes to fill with random numbers that nobody needs
            model = cls(config)
        engine, dtype = choose(engine, dtype, count_parameters(model))
        load_checkpoint(model, directory, dtype)
        if merge:
            merge_lora(model)
        model.eval()
        return model

    def save_pretrained(self, directory, layout="torch", max_shard_size="5GB"):
        """Write configuration and weights; ``layout`` is ``torch`` (readable by the original) or ``paddle``."""
        os.makedirs(directory, exist_ok=True)
        save_checkpoint(self, self.config, directory, layout=layout, max_shard_size=max_shard_size)
        self.config.save(directory)

    # ------------------------------------------------------------------ features

    def encode_image(self, image, mode="InternVL-C"):
        """Features of pictures ``[B, E]``, not normalised.

        Args:
            image: ``[B, 3, height, width]``, normalised pixels; sides are multiples of the patch size.
            mode: ``InternVL-C`` pools the vision tower's output; ``InternVL-G`` adds, both normalised, what the queries
                took from it.
        """
        if mode not in MODES:
            raise PromptError(f"the mode is '{mode}': it must be {' or '.join(MODES)}")
        vision = self.vision_model(_pixels(image))
        features = self.clip_projector(vision)
        if mode == "InternVL-C":
            return features
        return normalize(features) + normalize(self.clip_projector2(self.query(vision)))

    def encode_text(self, text):
        """Features of texts ``[B, E]``, not normalised; the same in both modes.

        Args:
            text: ``[B, N]`` ids from the tokenizer with its prefix; ids above 0 are attended.
        """
        ids = _ids(text)
        return self._text_features(ids, ids > 0)

    def forward(self, image, text, mode="InternVL-C"):
        """Scores of all pairs, scaled, float32: ``(logits_per_image [images, texts], logits_per_text [texts, images])``."""
        scores = self._scores(self.encode_image(image, mode), self.encode_text(text))
        return scores, scores.transpose([1, 0])

    def _scores(self, image_features, text_features):
        return self._scaled(normalize(image_features), normalize(text_features))

    def _scaled(self, images, texts):
        scores = paddle.matmul(images, texts.transpose([1, 0])).astype("float32")
        return scores * paddle.exp(self.logit_scale.astype("float32"))

    def _text_features(self, ids, mask):
        mask = mask.astype(bool)
        if not mask.any(1).all():
            raise PromptError("a text has no ids above 0: give every row its start and end token")
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        length = int(last.max()) + 1
        mask = mask[:, :length]
        # Padding on the right is seen by nothing, as attention is causal; holes are unknown tokens.
        padded_only = (mask == (np.arange(length) <= last[:, None])).all()
        embeds = self.qllama.embed(paddle.to_tensor(ids[:, :length]))
        hidden = self.qllama(embeds, mask=None if padded_only else AttentionMask(visible=mask))
        ends = take_rows(hidden.reshape([-1, hidden.shape[-1]]), np.arange(len(ids)) * length + last)
        return paddle.matmul(ends, self.text_projection)

    def query(self, vision, cache=None):
        """What the queries take from pictures: ``vision [B, P, D_vision]`` -> ``[B, Q, D]``."""
        queries = self.query_tokens.expand([vision.shape[0], -1, -1])
        return self.qllama(queries, mask=AttentionMask(prefix=queries.shape[1]), cache=cache, picture=vision)

    # ------------------------------------------------------------------ captions

    @paddle.no_grad()
    def generate(self, pixel_values, input_ids, attention_mask=None, generation_config=None, **options):
        """Continue a prompt about pictures, such as ``English caption:``.

        Args:
            pixel_values: ``[B, 3, height, width]``.
            input_ids: ``[B, N]`` int64, rows padded on the left.
            attention_mask: ``[B, N]``, 0 for padding; None for none.
            generation_config: a :class:`GenerationConfig` or a dictionary; ``options`` such as ``num_beams``,
                ``min_new_tokens``, ``max_new_tokens`` (30 by default), ``length_penalty`` and ``early_stopping`` replace some
                of its values.

        Returns:
            The new tokens alone, ``[B, M]`` int64, an end token and then 0 where a row is done.

        Raises:
            PromptError: the prompt is too long or padded on the right, or an option cannot be used.
        """
        ids = _ids(input_ids)
        starts = None if attention_mask is None else _left_padding(ids, attention_mask)
        defaults = {"max_new_tokens": 30, "eos_token_id": self.config.qllama_config.eos_token_id, "pad_token_id": 0}
        config = GenerationConfig.of(generation_config, **{**({} if generation_config else defaults), **options})
        vision = self.vision_model(_pixels(pixel_values))
        if len(vision) != len(ids):
            raise PromptError(f"{len(ids)} prompts but {len(vision)} pictures: give each picture its own")
        queries = self.config.num_query_token
        config = config.after(ids.shape[1])
        length = queries + ids.shape[1] + config.max_new_tokens
        room = self.config.qllama_config.context_length
        if length > room:
            raise PromptError(f"queries, prompt and caption have {length} tokens, but the model's context is {room}")
        cache = new_cache(self.qllama, len(ids), length, vision.dtype)
        self.query(vision, cache)
        embeds = self.qllama.embed(paddle.to_tensor(ids)).astype(vision.dtype)
        steps = generate_tokens(self.qllama, embeds, config, starts, cache)
        return paddle.to_tensor(np.stack(list(steps), axis=1))

    # ------------------------------------------------------------------ training

    def loss(
        self,
        pixel_values,
        positive_input_ids,
        positive_attention_mask,
        negative_input_ids,
        negative_attention_mask,
        summarize_input_ids,
        summarize_attention_mask,
        input_ids,
        attention_mask,
        labels,
    ):
        """Stage 2: matching, contrast and captions over the same pictures.

        Args:
            pixel_values: ``[B, 3, height, width]``.
            positive_input_ids, negative_input_ids: ``[B, N]``, texts that belong to the pictures and others; the last half
                of the rows is asked about the first, the others about the second.
            summarize_input_ids: texts behind ``summarize:``.
            input_ids: texts behind the prompt for captions; labels: the same, -100 where nothing is to be learned.
            *_attention_mask: 0 for padding on the right.

        Returns:
            :class:`InternVLLoss`. Matching leaves out rows with an empty text, contrast those with nothing behind
            ``summarize:``.
        """
        vision = self.vision_model(_pixels(pixel_values))
        rows = vision.shape[0]
        negatives = rows - rows // 2
        ids, mask = (
            _joined(a[:negatives], b[negatives:])
            for a, b in (
                (_ids(negative_input_ids), _ids(positive_input_ids)),
                (_ids(negative_attention_mask), _ids(positive_attention_mask)),
            )
        )
        targets = (np.arange(rows) >= negatives).astype("int64")
        loss_itm = self._matching(vision, ids, mask, np.where(mask.sum(1) == 2, -100, targets))

        queries, loss_itg = self._captioning(vision, _ids(input_ids), labels)
        summaries = _ids(summarize_attention_mask)
        texts = gather(normalize(self._text_features(_ids(summarize_input_ids), summaries)))
        valid = _all_rows(summaries.sum(1) != 5)
        pictures = gather(normalize(self.clip_projector2(queries)))
        loss_itc = self._contrast(pictures, texts, diagonal_targets(valid, self.config.label_smoothing))
        loss_itm, loss_itg = mean_over_processes(loss_itm), mean_over_processes(loss_itg)
        return InternVLLoss(loss_itm + loss_itc + loss_itg, loss_itm, loss_itc, loss_itg)

    def retrieval_loss(
        self,
        pixel_values,
        positive_input_ids,
        positive_attention_mask,
        negative_input_ids,
        negative_attention_mask,
        summarize_input_ids,
        summarize_attention_mask,
        image_ids,
    ):
        """Fine-tuning for retrieval: matching of all positives and negatives, contrast of both poolings.

        Args:
            image_ids: ``[B]`` integers; rows with the same picture are targets of each other. Others as in :meth:`loss`.

        Returns:
            :class:`InternVLLoss` without captions.
        """
        vision = self.vision_model(_pixels(pixel_values))
        rows = vision.shape[0]
        ids = _joined(_ids(negative_input_ids), _ids(positive_input_ids))
        mask = _joined(_ids(negative_attention_mask), _ids(positive_attention_mask))
        twice = paddle.concat([vision, vision])
        loss_itm = mean_over_processes(self._matching(twice, ids, mask, np.arange(2 * rows) // rows))

        texts = gather(normalize(self._text_features(_ids(summarize_input_ids), _ids(summarize_attention_mask))))
        targets = shared_targets(_all_rows(np.asarray(image_ids).reshape(-1)))
        loss_itc = 0
        for pooled in (self.clip_projector2(self.query(vision)), self.clip_projector(vision)):
            loss_itc = loss_itc + self._contrast(gather(normalize(pooled)), texts, targets)
        return InternVLLoss(loss_itm + loss_itc, loss_itm, loss_itc)

    def _contrast(self, pictures, texts, targets):
        return contrastive_loss(self._scaled(pictures, texts), targets)

    def _with_text(self, vision, ids, mask):
        """Queries and text in one pass: hidden states of the queries ``[B, Q, D]`` and of the text ``[B, N, D]``."""
        queries = self.query_tokens.expand([vision.shape[0], -1, -1])
        embeds = paddle.concat([queries, self.qllama.embed(paddle.to_tensor(ids)).astype(queries.dtype)], axis=1)
        hidden = self.qllama(embeds, mask=mask, picture=vision)
        return hidden.split([queries.shape[1], ids.shape[1]], axis=1)

    def _matching(self, vision, ids, mask, targets):
        """Whether texts belong to pictures: all positions see all that are attended."""
        mask = np.pad(mask.astype(bool), [(0, 0), (self.config.num_query_token, 0)], constant_values=True)
        everywhere = AttentionMask(prefix=mask.shape[1], visible=mask)
        queries, _ = self._with_text(vision, ids, everywhere)
        return matching_loss(paddle.mean(self.itm_head(queries), axis=1), targets)

    def _captioning(self, vision, ids, labels):
        """Hidden states of the queries, which do not see the text, and the loss of the text."""
        queries, text = self._with_text(vision, ids, AttentionMask(prefix=self.config.num_query_token))
        return queries, chunked_causal_loss(self.qllama.lm_head, text, labels)


def _pixels(image):
    """A tensor of pictures, checked."""
    if not isinstance(image, paddle.Tensor):
        image = host_array(image, "pictures")
    if image.ndim != 4 or image.shape[1] != 3:
        raise PromptError(f"pictures must be [number, 3, height, width], not {list(image.shape)}")
    return pixel_tensor(image, "pictures")


def _ids(values):
    """An int64 array ``[B, N]`` of ids or of a mask, on the host."""
    array = host_array(values, "token ids and masks")
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise PromptError(f"token ids and masks must be whole numbers [rows, tokens], not {array.dtype} {list(array.shape)}")
    return array.astype("int64")


def _left_padding(ids, attention_mask):
    mask = _ids(attention_mask)
    starts = mask.shape[1] - mask.sum(1)
    if mask.shape != ids.shape or (mask != (np.arange(mask.shape[1]) >= starts[:, None])).any():
        raise PromptError("attention_mask must have its zeros at the left: pad prompts on the left to generate")
    return starts


def _joined(first, second):
    """Rows of two arrays of ids, padded on the right with 0 to the longer one."""
    width = max(first.shape[1], second.shape[1])
    return np.concatenate([np.pad(a, [(0, 0), (0, width - a.shape[1])]) for a in (first, second)])


def _all_rows(values):
    """Numbers ``[B]`` of all processes, in order."""
    values = np.asarray(values).astype("int64")
    return gather(paddle.to_tensor(values)).numpy() if paddle.distributed.get_world_size() > 1 else values

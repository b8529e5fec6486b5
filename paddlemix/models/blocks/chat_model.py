"""What every chat model of the family is: a vision tower, a projector and a language model, pictures and text in, text or a
loss out.

A family brings its configuration, which tells ``num_image_token``, ``image_size`` and ``select_layer``, and says how the
tower's output becomes features (``_extract_feature``) and a conversation token ids (``prompt_ids``).
"""

import contextlib
import hashlib
import math

import numpy as np
import paddle
from paddle import nn

from paddlemix import device
from paddlemix.arrays import host_array
from paddlemix.checkpoints.checkpoint import save_checkpoint, save_packed
from paddlemix.errors import ConfigError, PromptError

from .experts import balance_loss
from .generation import GenerationConfig, generate_tokens
from .inputs import checked_pixels, padding_mask, pixel_tensor, token_ids
from .kv_cache import INT8
from .language import LanguageModel
from .layers import AttentionMask, take_rows
from .lora import add_adapters
from .losses import CausalLMOutput, chunked_causal_loss
from .router import kept_tokens
from .vision import InternVisionModel


class ChatModel(nn.Layer):
    """A vision tower, a projector and a language model.

    ``T`` tiles, ``B`` rows, ``N`` tokens, ``D`` the language model's width, ``V`` its vocabulary below.

    Args:
        config: with ``vision_config`` and ``llm_config``.
        projector: a layer from the tower's width to the language model's.
    """

    # Tiles that go through the vision tower at once without gradients; more cost memory and save no time on CPU.
    vision_batch = 4
    system_message = None  # who the model is told to be, in place of what config.json or the template say; '' for nobody
    routes = False  # whether tiles may take a form of fewer tokens, by what else is in the prompt
    packed = False  # whether the weights are in the form of the CPU engine, which cannot be read back
    engine_dtype = None  # of the CPU engine's weights that are not in few bits; None without it
    _remembered = None  # outputs of a frozen tower by the pixels' identity
    quantised_layers = {}  # those with weights in few bits, by parameter
    source = None  # the Checkpoint that the weights were loaded from
    group = division = workers = None  # the ranks that the model is divided over, what is here, and those that this one started

    def __init__(self, config, projector):
        super().__init__()
        self.config = config
        self.vision_model = InternVisionModel(config.vision_config)
        self.mlp1 = projector
        self.language_model = LanguageModel(config.llm_config)
        add_adapters(self)  # where the configuration says that the checkpoint has some
        self.img_context_token_id = None  # what stands for a picture's feature

    def train(self):
        """Go over to training.

        Raises:
            ConfigError: weights are in 8 or 4 bits.
        """
        if self.quantised_layers:
            raise ConfigError("weights in 8 or 4 bits cannot be trained: load the original checkpoint, without weight_dtype")
        super().train()

    def keep_cache_in(self, dtype):
        """Keep keys and values of earlier positions in a dtype: ``int8``, or None for that of the engine.

        Raises:
            ConfigError: it is not known, or not for the device in use.
        """
        if dtype is None:
            return
        if dtype != INT8:
            raise ConfigError(f"kv_cache_dtype is '{dtype}': it must be {INT8}, or None for the engine's own")
        if not device.is_cpu():
            raise ConfigError("keys and values in 8 bits are for CPU: leave out --kv_cache_dtype here")
        self.language_model.cache_dtype = INT8

    def weight_bytes(self):
        """Memory of the weights as they are held here: in tensors, packed for the engine, or in few bits.

        What the engine has twice, such as a head that is the embedding, counts once.
        """
        few = self.quantised_layers
        held = sum(layer.nbytes for layer in few.values())
        if self.engine_dtype is None:
            return held + sum(p.size * p.element_size() for p in self.parameters())
        element = 2 if self.engine_dtype == "bfloat16" else 4
        plain = (weight for weight in self.config.weight_table() if weight.name not in few)
        return held + element * sum(math.prod(weight.shape) for weight in plain)

    def save_pretrained(self, directory, layout="torch", max_shard_size="5GB"):
        """Write configuration and weights, in the dtype that they were loaded from if it holds them exactly.

        A model that is packed for the CPU engine is written from the files that it was loaded from.

        Args:
            directory: is made if it does not exist.
            layout: ``torch`` (readable by every InternVL engine) or ``paddle``.
            max_shard_size: largest file, such as ``"5GB"``.

        Raises:
            CheckpointError: the model is packed and its files have changed or do not hold what it holds; the disk refuses.
        """
        if self.packed:
            save_packed(self.source, self.config, directory, layout, max_shard_size)
        else:
            dtypes = self.source.stored_dtypes if self.source else None
            save_checkpoint(self, self.config, directory, layout=layout, max_shard_size=max_shard_size, stored_dtypes=dtypes)
        self.config.save(directory)

    def close(self):
        """End the processes that a model over several devices has started; without effect on others."""
        if self.workers is not None:
            self.workers.close()

    def end_program_with_ranks(self):
        """Let this program end, with one line, where one of the processes that it has started for the model dies."""
        if self.workers is not None:
            self.workers.ends_program = True

    # ------------------------------------------------------------------ pictures

    def extract_feature(self, pixel_values):
        """Features of tiles, ready to take the place of context tokens.

        Args:
            pixel_values: ``[T, 3, height, width]``, normalised; a tensor or an array of any floating point dtype, one tile, or
                a list of either (see :func:`~paddlemix.models.blocks.inputs.pixel_tiles`).

        Returns:
            ``[T, num_image_token, D]``. Without gradients, equal tiles are computed once, a few tiles at a time.

        Raises:
            PromptError: the pixels have another shape, size or dtype, or are not normalised.
        """
        if paddle.is_grad_enabled() and self.training:
            return self._extract_feature(pixel_tensor(pixel_values))
        pixels = checked_pixels(pixel_values)
        if not len(pixels):
            raise PromptError("pixel_values has no tiles: give None for a prompt without pictures")
        first, places = {}, []  # blank frames and repeated pictures cost nothing
        for i, tile in enumerate(pixels):
            key = hashlib.blake2b(np.ascontiguousarray(tile)).digest()
            places.append(first.setdefault(key, (len(first), i))[0])
        distinct = [i for _, i in first.values()]
        with paddle.no_grad():
            parts = [
                self._extract_feature(paddle.to_tensor(pixels[distinct[at : at + self.vision_batch]]))
                for at in range(0, len(distinct), self.vision_batch)
            ]
            features = paddle.concat(parts)
            return features if len(distinct) == len(places) else take_rows(features, places)

    def feature_steps(self, pixel_values):
        """:meth:`extract_feature` of a few tiles in slices: None after each block of the tower, then each tile's features."""
        hidden = None
        for state in self.vision_model.steps(pixel_values, self.config.select_layer):
            hidden = state
            yield None
        yield self._tile_features(hidden, pixel_values.shape)

    @contextlib.contextmanager
    def remembering_patches(self):
        """Within the block a frozen tower looks at the same tensor of pixels once; only the projector works again."""
        self._remembered = {}
        try:
            yield
        finally:
            self._remembered = None

    def _patches(self, pixel_values):
        if any(not parameter.stop_gradient for parameter in self.vision_model.parameters()) or self._remembered is None:
            return self._computed_patches(pixel_values)
        if id(pixel_values) not in self._remembered:
            self._remembered[id(pixel_values)] = self._computed_patches(pixel_values)
        return self._remembered[id(pixel_values)]

    def _computed_patches(self, pixel_values):
        if self.vision_model.training:
            return self.vision_model(pixel_values, self.config.select_layer)
        # A frozen tower keeps no graph, so its tiles need not be in memory at once even where the rest is trained.
        with paddle.no_grad():
            batches = pixel_values.split(self._batch_sizes(pixel_values.shape[0]))
            return paddle.concat([self.vision_model(batch, self.config.select_layer) for batch in batches])

    def _batch_sizes(self, tiles):
        whole, rest = divmod(tiles, self.vision_batch)
        return [self.vision_batch] * whole + [rest] * (rest > 0)

    def embed(self, input_ids, features=None):
        """Token embeddings with picture features in the places of the context tokens.

        Args:
            input_ids: ``[B, N]`` int64.
            features: ``[number of context tokens, D]`` in reading order, or None.

        Raises:
            PromptError: context tokens and features differ in number, or ids are not of this model.
        """
        ids = self._token_ids(input_ids)
        # What stands for a feature is looked up like any other token, and need not be one.
        known = ids if self.img_context_token_id is None else np.where(ids == self.img_context_token_id, 0, ids)
        embeds = self.language_model.embed(paddle.to_tensor(known))
        places = np.flatnonzero(ids == self.img_context_token_id) if self.img_context_token_id is not None else ids[:0]
        count = 0 if features is None else features.shape[0]
        if count != places.size:
            raise PromptError(
                f"the prompt has {places.size} image context tokens but the pictures have {count} features: "
                "each tile needs exactly its own, so check num_patches_list, and max_seq_length when training"
            )
        if not count:
            return embeds
        flat = embeds.reshape([-1, embeds.shape[-1]])
        flat = paddle.scatter(flat, paddle.to_tensor(places), features.astype(flat.dtype), overwrite=True)
        return flat.reshape(embeds.shape)

    # ------------------------------------------------------------------ training

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_flags=None,
        labels=None,
        loss_weight=None,
        segment_ids=None,
        visual_features=None,
    ):
        """The loss where labels are given, and the logits of every position.

        Args:
            pixel_values: ``[T, 3, height, width]``, or None for text alone.
            input_ids: ``[B, N]`` int64 with a context token for each picture feature.
            attention_mask: ``[B, N]``, 0 for padding on the left or the right; None for no padding.
            position_ids: ``[B, N]`` int64; None for 0, 1, 2, ... in every row.
            image_flags: ``[T]``, 0 for tiles that stand in where a sample has no picture; None for all 1.
            labels: ``[B, N]`` int64, -100 where nothing is to be learned; position ``n`` is predicted from those before it.
            loss_weight: ``[B, N]``, how much each label counts; None for all alike.
            segment_ids: ``[B, N]`` integers for rows that hold several samples: a token sees only its own sample's.
            visual_features: ``[number of context tokens, D]`` in reading order, instead of ``pixel_values``.

        Returns:
            :class:`CausalLMOutput`; the loss is the weighted mean over labelled tokens, for which the logits of all
            positions are never in memory at once.

        Raises:
            PromptError: context tokens and picture features differ in number.
        """
        features, unused = visual_features, None
        if pixel_values is not None:
            features = self.extract_feature(pixel_values)
            if image_flags is not None:
                flags = host_array(image_flags, "image_flags").reshape(-1)
                if len(flags) != features.shape[0]:
                    raise PromptError(f"image_flags has {len(flags)} values but pixel_values {features.shape[0]} tiles")
                used = np.flatnonzero(flags)
                # Keep every rank's graph the same: a batch without pictures still reaches the vision parameters.
                unused = features.sum() * 0 if used.size == 0 else None
                features = take_rows(features, used) if used.size else None
            if features is not None:
                features = features.reshape([-1, features.shape[-1]])
        embeds = self.embed(input_ids, features)
        if unused is not None:
            embeds = embeds + unused
        mask = None if attention_mask is None else AttentionMask.from_padding(attention_mask)
        if segment_ids is not None:
            mask = AttentionMask(None if mask is None else mask.starts, segment_ids)
        llm = self.config.llm_config
        router_logits = None if llm.experts is None else []
        hidden = self.language_model(embeds, position_ids, mask, router_logits=router_logits)
        head = self.language_model.lm_head
        loss = None if labels is None else chunked_causal_loss(head, hidden, labels, loss_weight)
        aux_loss = None
        if router_logits:
            parts = [np.asarray(part) > 0 for part in (attention_mask, segment_ids) if part is not None]  # segment 0 is padding
            kept = np.logical_and.reduce(parts).reshape(-1) if parts else None
            aux_loss = balance_loss(router_logits, llm.experts.active, kept)
            if loss is not None and llm.output_router_logits:
                loss = loss + llm.router_aux_loss_coef * aux_loss
        return CausalLMOutput(loss, hidden, head, aux_loss)

    # ------------------------------------------------------------------ generating

    @paddle.no_grad()
    def generate(
        self, pixel_values=None, input_ids=None, attention_mask=None, visual_features=None, generation_config=None, **options
    ):
        """Continue token ids.

        Args:
            pixel_values: ``[T, 3, height, width]``, or None.
            input_ids: ``[B, N]`` int64, rows padded on the left.
            attention_mask: ``[B, N]``, 0 for padding; None for none.
            visual_features: ``[T, num_image_token, D]`` from :meth:`extract_feature`, instead of ``pixel_values``.
            generation_config: a :class:`GenerationConfig` or a dictionary; ``options`` replace some of its values.

        Returns:
            The new tokens alone, ``[B, M]`` int64, finished rows filled with ``pad_token_id``. With ``num_return_sequences``
            ``[B * num_return_sequences, M]``, best first for each row.

        Raises:
            PromptError: the prompt is too long, or context tokens and features differ in number.
        """
        config = GenerationConfig.of(generation_config, **options)
        ids = self._token_ids(input_ids)
        mask, starts = padding_mask(attention_mask, ids.shape), None
        if self.routes and visual_features is None and pixel_values is not None:
            return self._generate_routed(pixel_values, ids, mask, config)
        if visual_features is None and pixel_values is not None:
            visual_features = self.extract_feature(pixel_values)
        features = None if visual_features is None else self._flat_features(visual_features)
        if mask is not None:
            starts = mask.shape[1] - mask.sum(1)
            if (mask != (np.arange(mask.shape[1]) >= starts[:, None])).any():
                raise PromptError("attention_mask must have its zeros at the left: pad prompts on the left to generate")
        config = self.fit_context(config, ids.shape[1])
        # Where a prompt is ids alone, the original's beam search penalises the repetition of the prompt's too.
        alone = ids if features is None else None
        steps = generate_tokens(self.language_model, self.embed(ids, features), config, starts, prompt_ids=alone)
        return paddle.to_tensor(np.stack(list(steps), axis=1))

    def _generate_routed(self, pixel_values, ids, mask, config):
        """:meth:`generate` where tiles become fewer tokens: each row is a prompt of its own."""
        per_tile = self.config.num_image_token
        kept = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        context = (ids == self.img_context_token_id) & kept
        counts = context.sum(1)
        tiles = self.routed_tiles(pixel_values)
        if (counts % per_tile).any() or counts.sum() != per_tile * len(tiles.gates):
            raise PromptError(
                f"the prompts have {counts.tolist()} image context tokens but pixel_values {len(tiles.gates)} tiles of "
                f"{per_tile}: each tile needs exactly its own"
            )
        rows, features = [], []
        for row, seen, own, picture in zip(ids, kept, context, tiles.split(counts // per_tile)):
            if len(picture.gates):
                (values,), compact = self.settled([picture])
                features.append(values)
                seen = seen.copy()
                seen[own] = kept_tokens(compact, per_tile, picture.coarse.shape[1])
            rows.append(row[seen])
        width = max(map(len, rows))
        starts = np.array([width - len(row) for row in rows])
        padded = np.stack([np.pad(row, (start, 0)) for row, start in zip(rows, starts)])
        config = self.fit_context(config, width)
        embeds = self.embed(padded, paddle.concat(features) if features else None)
        return paddle.to_tensor(np.stack(list(generate_tokens(self.language_model, embeds, config, starts)), axis=1))

    def _flat_features(self, visual_features):
        """``[number of context tokens, D]`` of features ``[..., D]``, a tensor or an array of any floating point dtype."""
        features, width = visual_features, self.config.llm_config.hidden_size
        if not isinstance(features, paddle.Tensor):
            features = paddle.to_tensor(host_array(features, "visual_features"))
        if not features.is_floating_point() or features.ndim < 2 or features.shape[-1] != width:
            raise PromptError(
                f"visual_features must be [tiles, {self.config.num_image_token}, {width}] as extract_feature returns them, not "
                f"{list(features.shape)}"
            )
        return features.reshape([-1, width])

    def fit_context(self, config, prompt_length):
        """``config`` with ``max_new_tokens`` cut to what the context has room for after ``prompt_length`` tokens.

        Raises:
            PromptError: the prompt alone fills the context.
        """
        room = self.config.llm_config.context_length - prompt_length
        if room < 1:
            raise PromptError(
                f"the prompt has {prompt_length} tokens but the model's context is {self.config.llm_config.context_length}: "
                "use fewer tiles (--max_num), fewer pictures, or a shorter text"
            )
        config = config.after(prompt_length)
        return GenerationConfig.of(config, max_new_tokens=min(config.max_new_tokens, room))

    def _token_ids(self, input_ids):
        """``input_ids`` as ``[B, N]`` int64 on the host, checked to be the model's or what stands for a feature."""
        ids, size = host_array(input_ids, "input_ids"), self.config.llm_config.vocab_size
        if self.img_context_token_id is None:
            return token_ids(ids, size)
        context = ids == self.img_context_token_id
        ids = token_ids(np.where(context, 0, ids), size)
        ids[context.reshape(ids.shape)] = self.img_context_token_id
        return ids

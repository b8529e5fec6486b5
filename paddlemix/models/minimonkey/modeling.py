"""MiniMonkeyChatModel: InternVL2, and scale compression (arXiv 2408.02034).

The tiles of two scales show the same twice. Compression lets the second block's attention say which of the first ``n`` picture
tokens the rest of the prompt looks at, and drops the other half before the answer is generated. The dropped tokens depend on
the question, so keys of a compressed prompt are never used again; picture features are.
"""

import numpy as np
import paddle
from paddle.nn import functional as F

from paddlemix.errors import PromptError
from paddlemix.models.blocks.chat import ChatSession
from paddlemix.models.blocks.generation import generate_tokens
from paddlemix.models.blocks.layers import AttentionMask, take_rows
from paddlemix.models.internvl2.modeling import InternVLChatModel

# Scores that are in memory at once, in values: 64 MB in float32.
_SCORES = 1 << 24


class MiniMonkeyChatModel(InternVLChatModel):
    """An :class:`~paddlemix.models.internvl2.modeling.InternVLChatModel` that looks at one picture at two scales.

    Pictures come from :func:`paddlemix.processors.minimonkey.multi_scale_tiles`; ``grid`` below is what it returns.
    """

    def chat(
        self, tokenizer, pixels, grid, question, generation_config=None, use_scm=False, history=None, return_history=False
    ):
        """Ask one question about one picture.

        Args:
            tokenizer: of the checkpoint.
            pixels: ``[T, 3, height, width]``, or None for a question about no picture.
            grid: tiles (across, down) of the finer scale.
            question: text; one ``<image>`` stands for all tiles, and is put in front where it is missing.
            generation_config: as of :meth:`InternVLChatModel.chat`.
            use_scm: compress the prompt.
            history: ``[(question, answer), ...]`` of earlier rounds; the picture's mark is in the first.
            return_history: return ``(answer, history)``.

        Raises:
            PromptError: there is more than one picture, the grid does not fit the tiles, or as the original model's chat.
        """
        session = MiniMonkeySession(self, tokenizer, grid, use_scm, history)
        answer = session.ask(question, pixels, generation_config)
        return (answer, session.history) if return_history else answer

    @paddle.no_grad()
    def scm_dropped(self, pixels, grid, input_ids):
        """Positions of the prompt ``input_ids`` (a list) that compression drops, in order."""
        features = self.extract_feature(pixels)
        return self.dropped_of(input_ids, [features.reshape([-1, features.shape[-1]])], grid)

    @paddle.no_grad()
    def dropped_of(self, input_ids, pictures, grid):
        """The same for the features of the prompt's pictures, ``[tokens, D]`` each."""
        return self.dropped_positions(self.embed(np.asarray([input_ids]), paddle.concat(pictures)), input_ids, grid)

    @paddle.no_grad()
    def dropped_positions(self, embeds, input_ids, grid):
        """The same for the embeddings ``[1, N, D]`` of a prompt with its picture's features.

        Raises:
            PromptError: the grid does not fit the picture's tokens.
        """
        is_picture = np.asarray(input_ids) == self.img_context_token_id
        count = grid[0] * grid[1] * self.config.num_image_token
        first = int(is_picture.argmax())
        end = first + count
        if min(grid) < 1 or is_picture.sum() < count or end >= len(input_ids):
            raise PromptError(
                f"a grid of {grid[0]} x {grid[1]} tiles has {count} tokens, but the prompt has {is_picture.sum()} of it: "
                "take pixels and grid from the same call of multi_scale_tiles"
            )
        weights = self._mean_attention(embeds, first, count)
        kept = np.sort(np.argsort(-weights, kind="stable")[: count // 2])
        # The token behind the first n is lost as well, in the original and in every answer that it published.
        return [*(first + np.setdiff1d(np.arange(count), kept)).tolist(), end]

    def _mean_attention(self, embeds, first, count):
        """How much the tokens behind look at each of ``count`` tokens from ``first`` on, in the second block; ``[count]``."""
        decoder = self.language_model.model
        tokens, end = embeds.shape[1], first + count
        positions = np.arange(tokens)[None]
        rope = decoder.rope(paddle.to_tensor(positions), decoder.rope.lengths(positions))
        hidden = decoder.layers[0](embeds, rope, AttentionMask())
        q, k = (x[0].transpose([1, 0, 2]) for x in decoder.layers[1].queries_and_keys(hidden, rope))  # [H or K, N, d]
        heads, kv_heads, width = q.shape[0], k.shape[0], q.shape[-1]
        group = heads // kv_heads
        total = np.zeros(count, np.float64)
        rows = max(1, _SCORES // (tokens * group))
        for start in range(end, tokens, rows):
            stop = min(start + rows, tokens)
            later = np.arange(stop)[None] > np.arange(start, stop)[:, None]
            hidden_keys = paddle.to_tensor(np.where(later, np.finfo(np.float32).min, np.float32(0)))  # [R, S]
            for head in range(kv_heads):  # queries that share a key head go through one product
                queries = q[head * group : (head + 1) * group, start:stop].reshape([-1, width]) * width**-0.5
                scores = paddle.matmul(queries, k[head, :stop], transpose_y=True).astype("float32")
                scores = scores.reshape([group, stop - start, stop]) + hidden_keys
                shares = F.softmax(scores, axis=-1)[:, :, first:end]
                total += shares.sum(axis=[0, 1]).numpy().astype(np.float64)
        return total / (heads * (tokens - end))


class MiniMonkeySession(ChatSession):
    """A conversation about one picture, whose prompts are compressed if ``use_scm``.

    Args:
        model: a :class:`MiniMonkeyChatModel`.
        tokenizer: of the checkpoint.
        grid: tiles (across, down) of the picture's finer scale; None before there is one.
        use_scm: drop half of the finer scale's tokens from each prompt.
        history, system_message: as of :class:`~paddlemix.models.blocks.chat.ChatSession`.
    """

    def __init__(self, model, tokenizer, grid=None, use_scm=False, history=None, system_message=None):
        super().__init__(model, tokenizer, history, system_message)
        self.grid, self.use_scm = grid, use_scm

    def stream(self, question, pixel_values=None, generation_config=None, num_patches_list=None):
        """As of a session of InternVL2, with at most one picture in the conversation."""
        pictures = len(self._features) + (0 if pixel_values is None else len(num_patches_list or [1]))
        if pictures > 1:
            raise PromptError(
                f"the conversation has {pictures} pictures, but Mini-Monkey looks at one: start another for the next"
            )
        return super().stream(question, pixel_values, generation_config, num_patches_list)

    def _generate(self, ids, features, config):
        if not (self.use_scm and features):
            yield from super()._generate(ids, features, config)
            return
        with paddle.no_grad():
            embeds = self.model.embed(np.asarray([ids]), paddle.concat(features))
            dropped = self.model.dropped_positions(embeds, ids, self.grid)
            kept = np.delete(np.arange(len(ids)), dropped)
            embeds = take_rows(embeds[0], kept).unsqueeze(0)
        steps = generate_tokens(self.model.language_model, embeds, config)
        self.cached_tokens = 0
        while True:
            with paddle.no_grad():  # not around a yield: the caller's code runs there
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens

"""Conversations with a chat model: rounds, pictures, streaming and batches.

A :class:`ChatSession` keeps what it has computed: the features of its pictures, and the keys and values of the tokens
that the next prompt begins with. ``model.chat`` is a session of one question.
"""

import hashlib

import numpy as np
import paddle

from paddlemix.errors import PromptError

from . import thinking
from .conversation import IMAGE_PLACEHOLDER
from .decoding.loop import bytes_per_position, positions_for
from .decoding.scheduler import Picture
from .generation import GenerationConfig, TextStream, generate_tokens, new_cache
from .inputs import host_list, split_pictures
from .many import answer_many


class ChatSession:
    """A conversation of any number of rounds, each with any number of pictures.

    Args:
        model: an :class:`~.modeling.InternVLChatModel`.
        tokenizer: from :func:`~.tokenization.load_tokenizer`.
        history: ``[(question, answer), ...]`` of earlier rounds; the pictures of its ``<image>`` marks come with the first
            question.
        system_message: who the model is told to be; None for ``model.system_message`` or, where that is None, what the
            checkpoint says. Either may be set between rounds.
        template: instead of the model's.
        thinking: tell the model to think before it answers (InternVL3.5), as its card does; sampling is the card's where the
            generation configuration does not say otherwise.

    Attributes:
        history: all rounds so far, an answer being all that the next prompt needs of it: with a thought and channels.
        reasoning: what was thought before the last answer, apart from it; '' where nothing was.
        cached_tokens: how many tokens of the last prompt were not computed again.
        answers: the last answer, and the others that ``num_return_sequences`` asked for, best first.
        marked_answer: the last answer with the ``<ref>`` and ``<box>`` marks that plain text leaves out.
    """

    def __init__(self, model, tokenizer, history=None, system_message=None, template=None, thinking=False):
        model.set_tokenizer(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.system_message, self._template = system_message, template or model.template()
        self.history = [tuple(turn) for turn in history or []]
        self.cached_tokens = 0
        self.answers, self.marked_answer = [], ""
        self.thinking, self.reasoning = thinking, ""
        self._features = []  # of each picture, [tiles * num_image_token, D], or RoutedTiles where tiles may be compact
        self._compact = np.zeros(0, bool)
        self._cache, self._ids = None, []  # keys and values, and the token ids that they belong to

    @property
    def template(self):
        """The template of the next prompt."""
        if self.thinking and not self._template.channels and self.system_message is None:
            return self._template.with_system_message(thinking.SYSTEM_MESSAGE)
        return self._template.with_system_message(self.model.system_message).with_system_message(self.system_message)

    def ask(self, question, pixel_values=None, generation_config=None, num_patches_list=None):
        """Ask and wait for the whole answer; the arguments are those of :meth:`stream`.

        With ``num_return_sequences`` above 1 the answers are a list, best first.
        """
        answer = "".join(self.stream(question, pixel_values, generation_config, num_patches_list))
        return answer if len(self.answers) == 1 else self.answers

    def stream(self, question, pixel_values=None, generation_config=None, num_patches_list=None):
        """Ask, and yield the answer piece by piece as it is generated, or at once where it is the best of several beams.

        The round joins the history when the answer is complete; a stream that is abandoned leaves the session as it was.

        Args:
            question: text; each ``<image>`` marks a picture of this round. In a first round without marks, one is put in
                front.
            pixel_values: ``[T, 3, height, width]`` of this round's pictures, or a list of such arrays, or None.
            generation_config: a :class:`~.generation.GenerationConfig` or a dictionary.
            num_patches_list: tiles of each picture; None for one picture of all tiles, or one for each array of a list.

        Raises:
            PromptError: pictures and marks differ in number, a reserved token is in the text, or the prompt is too long.
        """
        pixel_values, counts = split_pictures(pixel_values, num_patches_list)
        question = _mark_picture(question, self.history, counts)
        per_tile = self.model.config.num_image_token
        if self.model.routes:
            pictures = self._features + self._features_of(pixel_values, counts)
            features, compact = self.model.settled(pictures)
            counted = [f.shape[0] for f in features]
            if not np.array_equal(compact[: len(self._compact)], self._compact):
                self._ids = []  # an earlier tile changes its size: what is cached holds another form of it
        else:
            counted = [f.shape[0] for f in self._features] + [tiles * per_tile for tiles in counts]
        if self.thinking and not isinstance(generation_config, GenerationConfig):
            generation_config = {**thinking.SAMPLING, **(generation_config or {})}
        ids = self.model.prompt_ids(self.tokenizer, self.template, [*self.history, (question, None)], counted)
        config = end_of_answer(generation_config, self.template, self.tokenizer, self.model)
        config = self.model.fit_context(config, len(ids))

        if not self.model.routes:
            pictures = features = self._features + self._features_of(pixel_values, counts)
        if config.num_beams > 1:
            found = self._generate(ids, features, config)
            answers = _beam_answers(self.tokenizer, np.stack(list(found)).T, config, self.template)
            self.answers, tokens = [text for text, _ in answers], answers[0][1]
            yield self.answers[0]
        else:
            splits = thinking.splits(self.template, self.thinking)
            stream = _stream(self.tokenizer, config, self.template, splits)
            pieces, tokens = [], []
            for (token,) in self._generate(ids, features, config):
                if token in config.eos_token_ids:
                    break
                tokens.append(token)
                pieces.append(stream.put(token))
                if pieces[-1]:
                    yield pieces[-1]
                if stream.stopped:
                    break
            pieces.append(stream.close())
            if pieces[-1]:
                yield pieces[-1]
            self.answers = ["".join(pieces)]
            if splits:
                self.reasoning, said = stream.reasoning, stream.said
        self._features = pictures
        if self.model.routes:
            self._compact = compact
        self.history.append((question, said if config.num_beams == 1 and splits else self.answers[0]))
        self.marked_answer = self.tokenizer.decode(tokens)

    def memory(self):
        """What the conversation holds beside the model: bytes of ``features`` and of the ``kv_cache``, and the ``positions``
        that this has room for."""
        cache = self._cache
        return {
            "features": sum(f.nbytes if self.model.routes else _bytes(f) for f in self._features),
            "kv_cache": 0 if cache is None else cache.nbytes,
            "positions": 0 if cache is None else cache.capacity,
        }

    @paddle.no_grad()
    def _features_of(self, pixel_values, counts):
        if not counts:
            return []
        if self.model.routes:
            return self.model.routed_tiles(pixel_values).split(counts)
        features = self.model.extract_feature(pixel_values)
        parts = np.cumsum([0, *counts])
        return [features[a:b].reshape([-1, features.shape[-1]]) for a, b in zip(parts, parts[1:])]

    def _generate(self, ids, features, config):
        """Yield the answer's tokens, of each sequence one, computing only what the cache does not hold."""
        language_model = self.model.language_model
        reused = self._reusable(ids, config.max_new_tokens)
        remaining = np.asarray([ids[reused:]], dtype="int64")
        with paddle.no_grad():
            embeds = self.model.embed(remaining, _without_first(features, ids[:reused].count(self.model.img_context_token_id)))
        # Beams go on in caches of their own.
        capacity = len(ids) + (config.max_new_tokens if config.num_beams == 1 else 0)
        if self._cache is None:
            self._cache = new_cache(language_model, 1, capacity, embeds.dtype)
        self._cache.truncate(reused)
        if capacity > self._cache.capacity:
            # By a quarter at least: each move takes time, and leaves holes that the next, larger cache does not fit into.
            self._cache = self._cache.grown(max(capacity, self._cache.capacity * 5 // 4))
        self.cached_tokens = reused
        self._ids = ids[:reused]
        steps = generate_tokens(language_model, embeds, config, cache=self._cache)
        del embeds  # as large as the prompt, and of no use after the first step
        self._ids = list(ids)
        while True:
            with paddle.no_grad():  # not around a yield: the caller's code runs there
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens.tolist()
            self._ids.append(int(tokens[0]))

    def _reusable(self, ids, max_new_tokens):
        """Length of the cached beginning of ``ids``; at least one token is left to compute."""
        if self._cache is None:
            return 0
        # An abandoned answer may have been cut before its last tokens were computed.
        held = self._ids[: self._cache.length]
        variant = self.model.language_model.model.rope.variant
        # Keys that were rotated under another scaling of the positions are of no use.
        if variant(len(held)) != variant(len(ids)) or isinstance(variant(len(ids)), int):
            return 0
        common = next((i for i, (a, b) in enumerate(zip(held, ids)) if a != b), min(len(held), len(ids)))
        return self._cache.reusable(min(common, len(ids) - 1))


@paddle.no_grad()
def batch_chat(
    model,
    tokenizer,
    pixel_values,
    questions,
    generation_config=None,
    num_patches_list=None,
    history=None,
    return_history=False,
    template=None,
):
    """Ask many questions at once, each with its own pictures and history.

    Args:
        model: an :class:`~.modeling.InternVLChatModel`.
        tokenizer: from :func:`~.tokenization.load_tokenizer`.
        pixel_values: ``[T, 3, height, width]`` of all pictures of all conversations in order, or None; or a list with an
            entry for each conversation: the array of its picture, a list of arrays, or None.
        questions: one text for each conversation.
        generation_config: a :class:`~.generation.GenerationConfig` or a dictionary.
        num_patches_list: for each conversation, the tiles of its picture (a number) or of each of its pictures (a list);
            an empty list for text alone. None: one picture of one tile for each, or what a list of pixels has.
        history: for each conversation, None or ``[(question, answer), ...]``.
        return_history: return ``(answers, histories)`` instead of the answers.
        template: instead of the model's.

    Returns:
        An answer for each conversation; with ``num_return_sequences`` above 1 a list of answers for each, best first.

    Raises:
        PromptError: as :meth:`ChatSession.stream`, naming the question by its number.
    """
    model.set_tokenizer(tokenizer)
    template = (template or model.template()).with_system_message(model.system_message)
    histories = [[tuple(turn) for turn in turns or []] for turns in (history or [None] * len(questions))]
    if isinstance(pixel_values, (list, tuple)) and not len(pixel_values):
        pixel_values = None
    if isinstance(pixel_values, (list, tuple)):
        parts = [split_pictures(part) for part in pixel_values]
        if num_patches_list is None:
            num_patches_list = [tiles for _, tiles in parts]
        pixel_values = [part for part, _ in parts if part is not None]
    if num_patches_list is None:
        num_patches_list = [1 if pixel_values is not None else []] * len(questions)
    if not len(questions) == len(num_patches_list) == len(histories):
        raise PromptError(
            f"{len(questions)} questions, {len(num_patches_list)} entries in num_patches_list and {len(histories)} "
            "histories were given: there must be as many of each"
        )
    if not questions:
        return ([], []) if return_history else []
    counts = [[n] if isinstance(n, (int, np.integer)) else host_list(n) for n in num_patches_list]
    pixel_values, _ = split_pictures(pixel_values, [n for row in counts for n in row])
    counts = [[n for n in row if n] for row in counts]  # what has no tiles is no picture

    questions = list(questions)
    prompts, features, routed = [], None, None
    if model.routes and any(map(any, counts)):
        tiles = model.routed_tiles(pixel_values).split([sum(row) for row in counts])
        routed = [model.settled(picture.split(row))[0] for picture, row in zip(tiles, counts)]  # each row by itself
        features = paddle.concat([part for row in routed for part in row])
    for i, (turns, tiles) in enumerate(zip(histories, counts)):
        questions[i] = _mark_picture(questions[i], turns, tiles)
        try:
            counted = [f.shape[0] for f in routed[i]] if routed else [n * model.config.num_image_token for n in tiles]
            prompts.append(model.prompt_ids(tokenizer, template, [*turns, (questions[i], None)], counted))
        except PromptError as error:
            raise PromptError(f"question {i + 1}: {error}") from None

    config = end_of_answer(generation_config, template, tokenizer, model)
    config = model.fit_context(config, max(map(len, prompts)))
    given = (model, tokenizer, pixel_values, prompts, counts, config, template)
    in_pages = config.num_beams == 1 and not model.routes
    answers = _answers_in_pages(*given) if in_pages else _answers_of_rows(*given, features)
    best = [row[0] for row in answers]
    answers = answers if config.num_return_sequences > 1 else best
    if template.channels and config.num_beams == 1:  # (what is shown, what the next prompt needs)
        answers, best = [answer for answer, _ in best], [said for _, said in best]
    histories = [turns + [(q, a)] for turns, q, a in zip(histories, questions, best)]
    return (answers, histories) if return_history else answers


def _answers_in_pages(model, tokenizer, pixel_values, prompts, counts, config, template):
    """Answers of rows that each have their own length, a list of one for each row."""
    pictures = iter(digested(pixel_values, [n for row in counts for n in row]))
    asked = [
        (row, prompt, place_pictures(prompt, model, [next(pictures) for _ in tiles]), row)
        for row, (prompt, tiles) in enumerate(zip(prompts, counts))
    ]
    asked.sort(key=lambda item: -len(item[1]))  # the first decides how much room there is
    memory = positions_for(len(prompt) + config.max_new_tokens for prompt in prompts) * bytes_per_position(model)
    answers = [None] * len(prompts)
    for ended in answer_many(model, tokenizer, asked, config, template, len(prompts), memory):
        for answer in ended:
            if answer.error is not None:
                raise answer.error
            answers[answer.key] = [(answer.text, answer.said or answer.text) if template.channels else answer.text]
    return answers


def _answers_of_rows(model, tokenizer, pixel_values, prompts, counts, config, template, features=None):
    """Answers of rows that are padded on the left to one length, a list for each row."""
    width = max(map(len, prompts))
    starts = np.array([width - len(p) for p in prompts])
    filler = config.eos_token_ids[0]  # never seen: attention starts behind it
    ids = np.array([[filler] * start + prompt for start, prompt in zip(starts, prompts)], dtype="int64")
    if features is None and any(counts):
        features = model.extract_feature(pixel_values)
    features = None if features is None else features.reshape([-1, features.shape[-1]])

    steps = generate_tokens(model.language_model, model.embed(ids, features), config, starts)
    if config.num_beams == 1:
        return [[answer] for answer in _streamed_answers(tokenizer, steps, len(prompts), config, template)]
    texts = [text for text, _ in _beam_answers(tokenizer, np.stack(list(steps)).T, config, template)]
    several = config.num_return_sequences
    return [texts[at : at + several] for at in range(0, len(texts), several)]


def _streamed_answers(tokenizer, steps, rows, config, template):
    """The text of each row; no more steps are taken than the last of them needs."""
    streams = [_stream(tokenizer, config, template, template.channels) for _ in range(rows)]
    answers = ["" for _ in range(rows)]
    open_rows = set(range(rows))
    for tokens in steps:
        for row in sorted(open_rows):
            if int(tokens[row]) in config.eos_token_ids:
                open_rows.discard(row)
                continue
            answers[row] += streams[row].put(tokens[row])
            if streams[row].stopped:
                open_rows.discard(row)
        if not open_rows:
            break
    answers = [answer + stream.close() for answer, stream in zip(answers, streams)]
    return [(answer, stream.said) for answer, stream in zip(answers, streams)] if template.channels else answers


def _stream(tokenizer, config, template, splits):
    """What turns ids into text, and keeps thoughts apart where answers have two parts."""
    if splits:
        return thinking.AnswerReader(tokenizer, template, config.stop_strings, template.cuts_at_stop)
    return TextStream(tokenizer, config.stop_strings, template.cuts_at_stop)


def _beam_answers(tokenizer, ids, config, template):
    """``(text, its tokens)`` of whole answers ``[rows, M]``."""
    answers = []
    for row in ids.tolist():
        end = next((i for i, token in enumerate(row) if token in config.eos_token_ids), len(row))
        stream = TextStream(tokenizer, config.stop_strings, template.cuts_at_stop)
        answers.append(("".join([stream.put(token) for token in row[:end]] + [stream.close()]), row[:end]))
    return answers


def prompt_and_pictures(model, tokenizer, template, question, pictures):
    """What :func:`~.many.answer_many` takes of one question in a first round.

    Args:
        model: whose tokenizer is set.
        tokenizer: the model's.
        template: of the prompt.
        question: text; without ``<image>`` marks one is put in front where there are pictures.
        pictures: what :func:`digested` returns of its pictures.

    Returns:
        (ids of the prompt, list of :class:`~.decoding.scheduler.Picture`).

    Raises:
        PromptError: as :meth:`ChatSession.stream`.
    """
    tokens = [len(tiles) * model.config.num_image_token for _, tiles in pictures]
    ids = model.prompt_ids(tokenizer, template, [(_mark_picture(question, (), tokens), None)], tokens)
    return ids, place_pictures(ids, model, pictures)


def digested(pixel_values, counts):
    """The digest and the tiles of each picture."""
    parts = np.cumsum([0, *counts])
    found = []
    for a, b in zip(parts, parts[1:]):
        tiles = np.ascontiguousarray(np.asarray(pixel_values[int(a) : int(b)], dtype="float32"))
        found.append((hashlib.blake2b(tiles, digest_size=16).digest(), tiles))
    return found


def place_pictures(ids, model, pictures):
    """Where the pictures of a prompt are.

    Args:
        ids: of the prompt, with as many context tokens as ``pictures`` need.
        model: whose tokenizer is set.
        pictures: ``(digest, tiles [T, 3, H, W])`` in reading order.

    Returns:
        A list of :class:`~.decoding.scheduler.Picture`.
    """
    places = np.flatnonzero(np.asarray(ids) == model.img_context_token_id)
    found, at = [], 0
    for digest, tiles in pictures:
        count = len(tiles) * model.config.num_image_token
        found.append(Picture(digest, int(places[at]), count, tiles))
        at += count
    return found


def _bytes(tensor):
    return tensor.size * tensor.element_size()


def _without_first(features, count):
    """Rows of all ``features`` in one tensor, but not the first ``count``; None where none are left."""
    parts = []
    for part in features:
        if count < part.shape[0]:
            parts.append(part[count:])
        count = max(0, count - part.shape[0])
    return paddle.concat(parts) if parts else None


def _mark_picture(question, history, counts):
    """The question with a mark in front where a first round has pictures but does not say where."""
    if counts and not history and IMAGE_PLACEHOLDER not in question:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    return question


def end_of_answer(generation_config, template, tokenizer, model):
    """The configuration with the template's end of an answer, and its form compiled."""
    config = GenerationConfig.of(generation_config, eos_token_id=tokenizer.require_token_id(template.stop))
    config = GenerationConfig.of(config, stop_strings=(*config.stop_strings, *template.stop_strings))
    if config.form is None:
        return config
    from .decoding.forms import compile_form

    size = model.config.llm_config.vocab_size
    return GenerationConfig.of(config, form=compile_form(config.form, tokenizer, config.eos_token_id, size))

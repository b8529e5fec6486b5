"""Answers to any number of prompts, as many at once as there is room for: who is done makes room for the next."""

from paddlemix.errors import PromptError
from paddlemix.kernels import cpu as kernels

from .decoding.loop import Loop, bytes_per_position, positions_for
from .thinking import AnswerReader

__all__ = ["Answer", "answer_many", "room_for", "suit_threads"]

_SMALL = 20_000_000  # parameters, below which a call has less work than it takes to wake a second thread
_PICTURES = 256 << 20  # bytes of features that wait for another question about the same picture


class Answer:
    """What became of a prompt: its ``key``, the ``text`` and its ``ids``, the ``reason`` of its end (``stop``, ``length`` or
    ``error``), and in the last case the ``error``. Where answers have channels, ``said`` is all that the next prompt needs."""

    __slots__ = ("error", "ids", "key", "reason", "said", "text")

    def __init__(self, key, text, reason, error=None, said=None, ids=()):
        self.key, self.text, self.reason, self.error, self.said, self.ids = key, text, reason, error, said, ids


def suit_threads(model):
    """Let the kernels use one thread where more only wait for each other."""
    if model.language_model.parameter_count < _SMALL:
        kernels.set_num_threads(1)


def room_for(model, positions, memory):
    """How many sequences of so many positions fit into so many bytes of cache, at least 1."""
    return max(1, memory // max(1, positions * bytes_per_position(model)))


def answer_many(model, tokenizer, asked, config, template, max_seqs, memory=None):
    """Answer prompts as they come.

    Args:
        model: a chat model whose tokenizer is set.
        tokenizer: the model's.
        asked: an iterator of (key, ids, pictures, stream), with compress behind them where there is one: ``pictures`` as
            :func:`~.chat.place_pictures` returns them, ``stream`` which of several answers with one seed this is; several of
            one ``ids`` object in a row compute it once; ``compress`` as of :class:`~.decoding.loop.Job`. More are drawn when
            there is room for more; what cannot be answered is (key, an error).
        config: a :class:`~.generation.GenerationConfig` with the end of an answer.
        template: of the prompts.
        max_seqs: how many are answered at once.
        memory: bytes that keys and values may take, if one prompt alone does not take more; None for what ``max_seqs`` prompts
            as long as the first take.

    Yields:
        After each turn that answered some, a list of :class:`Answer`.
    """
    asked, held, loop, keys, texts, first = iter(asked), None, None, {}, {}, None
    while True:
        ended = []
        while len(keys) < max_seqs and (item := held or next(asked, None)) is not None:
            held = None
            if len(item) == 2:
                ended.append(Answer(item[0], "", "error", item[1]))
                continue
            key, ids, pictures, stream, *compress = item
            compress = compress[0] if compress else None
            longest = min(len(ids) + config.max_new_tokens, model.config.llm_config.context_length)
            if loop is None or longest > loop.positions:
                if keys:  # they end in the cache that they began in
                    held = item
                    break
                loop, first = _loop(model, tokenizer, longest, max_seqs, memory), None
            reader = None
            if template.channels and config.form is None:  # an answer in a form has no thought before it
                reader = AnswerReader(tokenizer, template, config.stop_strings, template.cuts_at_stop)
            after = first[1] if first is not None and first[0] is ids else None
            try:
                more = {"reader": reader, "after": after, "compress": compress}
                job = loop.make_job(ids, config, pictures, stream=stream, cuts=template.cuts_at_stop, **more)
            except PromptError as error:
                ended.append(Answer(key, "", "error", error))
                continue
            loop.add(job)
            first = first if after is not None else (ids, job)
            keys[job], texts[job] = key, ""
        for event in loop.step() if keys else ():
            texts[event.job] += event.piece
            if event.reason:
                said = event.job.reader.said if event.job.reader else None
                key, text = keys.pop(event.job), texts.pop(event.job)
                ended.append(Answer(key, text, event.reason, event.error, said, event.job.answer))
        if ended:
            yield ended
        elif not keys:
            return


def _loop(model, tokenizer, longest, max_seqs, memory):
    each = positions_for([longest])
    positions = each * max_seqs
    if memory is not None:
        positions = max(each, min(positions, memory // bytes_per_position(model)))
    return Loop(model, tokenizer, positions, max_seqs, image_cache=_PICTURES, at_once=True)

"""Text generation: choosing tokens, knowing when to stop, and turning tokens into text as they come."""

from dataclasses import dataclass, fields, replace

import numpy as np
import paddle

from paddlemix.errors import PromptError
from paddlemix.validation import Integer, Number, check

from .beams import beam_search
from .decoding.sampling import Chooser
from .layers import AttentionMask
from .validation import GENERATION

# Options of transformers whose values here ask for what happens anyway, or for nothing that changes an answer.
_WITHOUT_EFFECT = {
    "use_cache": (True, False),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "synced_gpus": (False,),
    "bos_token_id": range(-1, 1 << 21),
    "penalty_alpha": (),
    "max_time": (),
    "streamer": (),
}


@dataclass
class GenerationConfig:
    """How an answer is generated; names and meanings are those of ``transformers``.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        min_new_tokens: the end-of-answer tokens are forbidden before this many.
        do_sample: draw tokens at random instead of always taking the likeliest.
        temperature: below 1 sharpens, above 1 flattens the distribution that is drawn from.
        top_k: draw from this many of the likeliest tokens; 0 for all.
        top_p: draw from the smallest set of tokens whose probability reaches this; 1 for all.
        repetition_penalty: divides (multiplies, if negative) the logits of tokens already in the answer; 1 for none.
        eos_token_id: id or ids that end an answer; chat sets it from the template.
        pad_token_id: what fills a finished row of a batch; by default the first end-of-answer token.
        stop_strings: texts that end an answer; they are not part of it.
        seed: of the random draws; None for a different answer each time.
        min_p: draw from tokens that are at least this share as likely as the likeliest; 0 for all.
        max_length: longest prompt and answer together, in tokens, where max_new_tokens is not said; None for no such bound.
        min_length: shortest prompt and answer together, in tokens.
        num_beams: continuations that are followed at once, to find the likeliest whole answer; 1 takes token by token.
        num_return_sequences: how many of the best continuations are returned, at most ``num_beams``.
        length_penalty: with beams: the exponent of its length that the log probability of an answer is divided by.
        early_stopping: with beams: True stops at the first ``num_beams`` whole answers, False when none better is likely,
            ``"never"`` when none better is possible.
        min_p: draw from tokens that are at least this share as likely as the likeliest; 0 for all.
        frequency_penalty, presence_penalty: subtracted from the logit of a token for each time, or once if at all, that it
            is in the answer.
        logit_bias: ``{id: added to its logit}``.
        logprobs: how many of the likeliest tokens to tell with each chosen one, where who asks can be told; None for not.
        form: what the answer has to look like, a :class:`~.decoding.forms.Form` or what :func:`~.decoding.forms.compile_form`
            takes (``{"json_schema": ...}``, ``{"choices": [...]}``, ``{"regex": ...}``); chat compiles it.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    stop_strings: tuple = ()
    seed: int | None = None
    min_p: float = 0.0
    max_length: int | None = None
    min_length: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict | None = None
    logprobs: int | None = None
    form: object = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is None:  # as the original's: None is what is not set
                setattr(self, field.name, field.default)
        if isinstance(self.stop_strings, str):
            self.stop_strings = (self.stop_strings,)
        check(vars(self), GENERATION, error=PromptError)
        for name, valid, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("temperature", self.temperature > 0, "above 0 (use do_sample=False for greedy decoding)"),
            ("top_k", self.top_k is None or self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("max_length", self.max_length is None or self.max_length >= 1, "at least 1"),
            ("min_length", self.min_length >= 0, "at least 0"),
            ("num_beams", Integer(1, 256).accepts(self.num_beams), Integer(1, 256)),
            ("num_return_sequences", Integer(1, 256).accepts(self.num_return_sequences), Integer(1, 256)),
            ("length_penalty", Number(-100, 100).accepts(self.length_penalty), Number(-100, 100)),
            ("early_stopping", self.early_stopping in (True, False, "never"), 'True, False or "never"'),
        ):
            if not valid:
                raise PromptError(f"{name} is {getattr(self, name)}: it must be {rule}")
        if self.num_return_sequences > self.num_beams:
            raise PromptError(
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams ({self.num_beams}): beam search "
                "finds num_beams answers, so raise it"
            )
        if self.num_beams > 1 and self.do_sample:
            raise PromptError(f"num_beams is {self.num_beams} and do_sample is true: use one of them")

    @classmethod
    def of(cls, value=None, **overrides):
        """A configuration from None, a dictionary or another configuration, with some values replaced.

        Options of ``transformers`` that are not here are taken where they ask for what happens anyway.

        Raises:
            PromptError: an option is not known.
        """
        if isinstance(value, cls):
            return replace(value, **overrides)
        options = {**dict(value or {}), **overrides}
        if options.get("max_new_tokens") is not None:
            options.pop("max_length", None)  # the original's order
        known = [f.name for f in fields(cls)]
        for name in sorted(set(options) - set(known)):
            if name not in _WITHOUT_EFFECT:
                raise PromptError(f"generation option '{name}' is not known: use {', '.join(known)}")
            if options[name] is not None and options[name] not in _WITHOUT_EFFECT[name]:
                accepted = " or ".join(map(str, _WITHOUT_EFFECT[name]))
                raise PromptError(f"generation option '{name}' is {options[name]}: only {accepted} is supported")
            del options[name]
        return cls(**options)

    def after(self, prompt_length):
        """The same configuration for a prompt of so many tokens: lengths count the answer alone.

        Raises:
            PromptError: ``max_length`` leaves no room.
        """
        config = replace(self, min_new_tokens=max(self.min_new_tokens, self.min_length - prompt_length), min_length=0)
        if config.max_length is None:
            return config
        room = config.max_length - prompt_length
        if room < 1:
            raise PromptError(
                f"max_length is {config.max_length}, but the prompt alone has {prompt_length} tokens: raise it, or use "
                "max_new_tokens, which counts the answer alone"
            )
        return replace(config, max_new_tokens=min(config.max_new_tokens, room), max_length=None)

    @property
    def eos_token_ids(self):
        """The ids that end an answer, as a list."""
        if self.eos_token_id is None:
            return []
        return list(self.eos_token_id) if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]

    @property
    def filler(self):
        """What fills a row of a batch behind its end."""
        return self.pad_token_id if self.pad_token_id is not None else (self.eos_token_ids or [0])[0]


class Sampler:
    """Chooses the next token of each row of a batch, each by a :class:`~.decoding.sampling.Chooser` of its own."""

    def __init__(self, config):
        self.config = config
        self._choosers = []

    def __call__(self, logits, answers):
        """``logits [B, V]`` and the ``answers`` so far, a list of ids for each row -> next ids ``[B]`` int64."""
        if not self._choosers:
            self._choosers = [Chooser(self.config, row) for row in range(len(answers))]
        if self._choosers[0].is_plain(len(answers[0])):
            return paddle.argmax(logits, axis=-1).numpy()
        scores = logits.astype("float32").numpy().copy()
        return np.array([choose(row, answer).token for choose, row, answer in zip(self._choosers, scores, answers)])

    @property
    def complete(self):
        """For each row whether its answer has all that its form asks for."""
        return np.array([c.matcher is not None and c.matcher.complete for c in self._choosers])


def new_cache(language_model, batch, capacity, dtype):
    """An empty :class:`~.language.KVCache` in ``dtype``, unless the engine keeps keys and values in one of its own."""
    return language_model.new_cache(batch, capacity, dtype)


def generate_tokens(language_model, inputs_embeds, config, starts=None, cache=None, prompt_ids=None):
    """Generate answers token by token.

    Args:
        language_model: a :class:`~.language.LanguageModel`.
        inputs_embeds: ``[B, N, D]``, rows padded on the left. What a given ``cache`` already holds is not repeated here.
        config: a :class:`GenerationConfig`.
        starts: number of padding positions at the left of each row of ``inputs_embeds``, ``[B]``; None for none.
        cache: a :class:`~.language.KVCache` with room for ``N + max_new_tokens`` more positions; made if None.
        prompt_ids: see :func:`~.beams.beam_search`; for beams alone.

    Yields:
        The next token of each row, ``[B]`` int64, until each row has met an end-of-answer id or ``max_new_tokens`` are
        generated. A finished row yields ``pad_token_id``. The last tokens are not fed to the model. With beams, all are
        yielded after the search, for the best ``num_return_sequences`` of each row, ``[B * num_return_sequences]``.
    """
    if config.num_beams > 1:
        yield from beam_search(language_model, inputs_embeds, config, starts, cache, prompt_ids)[0].T
        return
    batch, prompt = inputs_embeds.shape[:2]
    if cache is None:
        cache = new_cache(language_model, batch, prompt + config.max_new_tokens, inputs_embeds.dtype)
    shift = np.zeros([batch, 1], "int64") if starts is None else np.asarray(starts, "int64").reshape([-1, 1])
    # Padding lies between what the cache holds and the prompt.
    mask = AttentionMask(shift[:, 0] + cache.length, prefix=cache.length) if shift.any() else AttentionMask()
    sampler = Sampler(config)
    ends = config.eos_token_ids
    pad = config.filler
    answers = [[] for _ in range(batch)]
    finished = np.zeros(batch, bool)

    for _ in range(config.max_new_tokens):
        positions = np.arange(cache.length, cache.length + inputs_embeds.shape[1])[None] - shift
        positions = paddle.to_tensor(np.maximum(positions, 0))
        hidden = language_model(inputs_embeds, positions, mask, cache, positions=-1)
        logits = language_model.lm_head(hidden[:, -1])
        tokens = np.where(finished, pad, sampler(logits, answers))
        for answer, token in zip(answers, tokens):
            answer.append(int(token))
        finished |= np.isin(tokens, ends)
        yield tokens
        if config.form is not None:
            finished |= sampler.complete
        if finished.all():
            return
        inputs_embeds = language_model.embed(paddle.to_tensor(tokens.reshape([-1, 1]))).astype(inputs_embeds.dtype)


class TextStream:
    """Turns the ids of one answer into text as they come, never splitting a character.

    ``stream.put(id)`` returns the text that became certain; ``stream.close()`` what is left. Together the pieces are
    exactly the decoded answer, cut before the first stop string and, with ``strip``, of white space at both ends. Without
    ``cut`` a stop string is only taken away where the answer ends in it, not where its last token goes on behind it.
    ``stream.stopped`` tells that a stop string was met.
    """

    # Ids that are decoded again with each new one: enough for every tokenizer's rules about spaces.
    _CONTEXT = 4
    _LONGEST = 12  # from so many on fewer are looked for

    def __init__(self, tokenizer, stop_strings=(), cut=True, skip_special_tokens=True, strip=True):
        self._tokenizer, self._cut, self._skip, self._strip = tokenizer, cut, skip_special_tokens, strip
        self._stop_strings = [s for s in stop_strings if s]
        self._window, self._shown = [], 0  # the last ids, and how much of their text is in self._text
        self._text, self._sent = "", 0
        self.stopped = False

    def _decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _advance(self, final=False):
        text = self._decode(self._window)
        stable = len(text) if final else self._tokenizer.stable_length(text)
        self._text += text[self._shown : stable]
        self._shown = max(self._shown, stable)
        if self._shown < len(text) or len(self._window) < self._LONGEST:
            return
        # Where all text is final, the ids long gone have no more say in what follows: the window can move on.
        tail = self._decode(self._window[-self._CONTEXT :])
        if tail and self._tokenizer.stable_length(tail) == len(tail):
            self._window, self._shown = self._window[-self._CONTEXT :], len(tail)

    def _emit(self, final):
        found = [at for at in (self._text.find(s) for s in self._stop_strings) if at >= 0]
        self.stopped = self.stopped or bool(found)
        text = self._text[: min(found)] if found and self._cut else self._text
        text = text.lstrip() if self._strip else text
        ready = text.rstrip() if self._strip else text
        if not final and not found:  # the beginning of a stop string may be what the text ends in
            held = max((k for s in self._stop_strings for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
            ready = text[: len(text) - held]
            ready = ready.rstrip() if self._strip else ready
        if found and not self._cut:
            ready = next((ready.removesuffix(s).rstrip() for s in self._stop_strings if ready.endswith(s)), ready)
        piece, self._sent = ready[self._sent :], max(self._sent, len(ready))
        return piece

    def put(self, token):
        """Add the next id; return the text that became certain, possibly empty."""
        self._window.append(int(token))
        self._advance()
        return self._emit(final=False)

    def close(self):
        """Return the text that was still held back."""
        self._advance(final=True)
        return self._emit(final=True)

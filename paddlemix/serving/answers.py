"""From a request to an answer: the jobs of its choices, and what they give as OpenAI's objects."""

import asyncio
import time
import uuid

from paddlemix.errors import PromptError, TokenizerError

from .prompts import Conversation
from .protocol import RequestError

__all__ = ["Answer", "prepare"]

_THOUGHTS = ("reasoning", "reasoning_content")  # vLLM's name, and what it was before


def prepare(request, engine, adapter):
    """The jobs of a request, one for each choice; slow, for a thread of its own.

    Raises:
        RequestError: the request cannot be answered.
    """
    from paddlemix.models.blocks import thinking
    from paddlemix.models.blocks.chat import end_of_answer, place_pictures
    from paddlemix.models.blocks.generation import GenerationConfig

    model, tokenizer, loop = engine.model, engine.tokenizer, engine.loop
    request.check(model.config.llm_config.vocab_size)
    template = model.template().with_system_message(model.system_message)
    talk = Conversation(request.messages, engine.media, engine.reserved, engine.args.max_images, template)
    thinks = request.thinks(engine.args.thinking)
    if thinks and not template.channels:
        try:
            tokenizer.require_token_id("<think>")
        except TokenizerError:
            raise RequestError("this model does not think: leave enable_thinking out", param="chat_template_kwargs") from None
    ids, compress = talk.ids(model, tokenizer, thinks), engine.family.compress(talk.extras)
    known = not talk.pictures or not (model.routes or compress)  # else the length is known later
    if len(ids) >= loop.longest and known:
        raise RequestError(
            f"the prompt has {len(ids)} tokens but this model's context is {loop.longest}: send less text or fewer pictures",
            param="messages",
            code="context_length_exceeded",
        )
    temperature = request.temperature
    if temperature is None:
        temperature = thinking.SAMPLING["temperature"] if thinks and not template.channels else 1.0

    def given(value, default):
        return default if value is None else value

    limit = given(request.max_completion_tokens, request.max_tokens)
    skip = request.skip_special_tokens is not False
    try:
        config = end_of_answer(
            {
                "max_new_tokens": given(limit, loop.longest),
                "min_new_tokens": request.min_tokens or 0,
                "do_sample": temperature > 0,
                "temperature": temperature or 1.0,
                "top_k": max(request.top_k or 0, 0),
                "top_p": given(request.top_p, 1.0),
                "min_p": request.min_p or 0.0,
                "repetition_penalty": given(request.repetition_penalty, 1.0),
                "frequency_penalty": request.frequency_penalty or 0.0,
                "presence_penalty": request.presence_penalty or 0.0,
                "logit_bias": {int(k): v for k, v in (request.logit_bias or {}).items()} or None,
                "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
                "stop_strings": request.stops,
                "seed": None if request.seed is None else request.seed % 2**63,
                "form": request.form,
            },
            template,
            tokenizer,
            model,
        )
        if request.ignore_eos:
            config = GenerationConfig.of(config, eos_token_id=[])
        jobs = []
        for stream in range(request.n or 1):
            reader = None
            if thinking.splits(template, thinks) and config.form is None:  # an answer in a form has no thought before it
                reader = thinking.AnswerReader(tokenizer, template, config.stop_strings, template.cuts_at_stop, skip)
            job = loop.make_job(
                ids,
                config,
                place_pictures(ids, model, talk.pictures),
                adapter=adapter,
                stream=stream,
                skip_special_tokens=skip,
                reader=reader,
                strip=config.form is None,
                cuts=template.cuts_at_stop,
                after=jobs[0] if jobs else None,
                compress=compress,
            )
            jobs.append(job)
    except PromptError as error:
        raise RequestError(str(error)[:400]) from None
    return jobs


class Answer:
    """Collects what the engine gives for one request, as OpenAI's objects.

    Args:
        request: a :class:`~.protocol.ChatRequest`.
        jobs: of :func:`prepare`.
        model_name: what the answer says.
        tokens: bytes of each id.
        metrics: :class:`~.metrics.Metrics`.
        arrived: when the request came, by ``time.monotonic``.
    """

    def __init__(self, request, jobs, model_name, tokens, metrics, arrived):
        self.request, self.jobs, self.metrics, self.arrived = request, jobs, metrics, arrived
        self.queue = asyncio.Queue()
        self._tokens = tokens
        self._base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        self._index = {job: i for i, job in enumerate(jobs)}
        self._thoughts = ["" for _ in jobs]
        self._text, self._logprobs = ["" for _ in jobs], [[] for _ in jobs]
        self._reasons = [None for _ in jobs]
        self._last = [None for _ in jobs]
        self._first, self._counted = True, False

    def take(self, job, event):
        """Note an event; returns (index, delta, log probabilities, reason), or None where there is nothing to tell.

        Raises:
            RequestError: the answer ended in an error.
        """
        now, metrics = time.monotonic(), self.metrics
        index = self._index[job]
        if event is None:
            metrics.queue_time.observe(now - self.arrived)
            if job is self.jobs[0]:
                metrics.prompt_tokens.inc(job.prompt)
            metrics.prefix_queries.inc(job.prompt)
            metrics.prefix_hits.inc(job.cached)
            return None
        if isinstance(event, Exception):
            raise RequestError("the server could not compute this answer", status=500)
        if event.error is not None:
            raise RequestError(str(event.error)[:400])
        if event.choice is not None:
            metrics.generation_tokens.inc()
            if self._first:
                metrics.first_token.observe(now - self.arrived)
                metrics.image_queries.inc(len(job.pictures))
                metrics.image_hits.inc(self.jobs[0].image_hits or 0)
            elif self._last[index] is not None:
                metrics.inter_token.observe(now - self._last[index])
            self._first, self._last[index] = False, now
        logprobs = self._described(event.choice)
        self._text[index] += event.piece
        self._take_thought(index, job)
        self._logprobs[index] += logprobs or []
        self._reasons[index] = event.reason
        delta = {"content": event.piece} if event.piece or logprobs else {}
        if self.new_thought:
            delta |= dict.fromkeys(_THOUGHTS, self.new_thought)
        return index, delta, logprobs, event.reason

    def _take_thought(self, index, job):
        """Note what was thought since; the engine goes on meanwhile, so that it can be more than up to this event."""
        thought = job.reader.reasoning if job.reader is not None else ""
        self.new_thought, self._thoughts[index] = thought[len(self._thoughts[index]) :], thought

    def _described(self, choice):
        if not self.request.logprobs or choice is None:
            return None

        def entry(token, logprob):
            data = self._tokens[token] if token < len(self._tokens) else b""
            value = logprob if logprob > -9999 else -9999.0
            return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

        top = [entry(token, value) for token, value in choice.top or []]
        return [{**entry(choice.token, choice.logprob), "top_logprobs": top}]

    @property
    def is_over(self):
        """Whether every choice has ended."""
        return all(self._reasons)

    def count(self, reason=None):
        """Count the request as finished, once; ``reason`` by default as its first choice ended."""
        if not self._counted:
            self._counted = True
            self.metrics.finished(reason or self._reasons[0])
            self.metrics.latency.observe(time.monotonic() - self.arrived)

    def usage(self):
        """OpenAI's ``usage``."""
        prompt, made = self.jobs[0].prompt, sum(len(job.answer) for job in self.jobs)
        details = {"cached_tokens": self.jobs[0].cached}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": details,
        }

    def whole(self):
        """The ``chat.completion``."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, **self._thought(i)},
                "logprobs": {"content": logs} if self.request.logprobs else None,
                "finish_reason": reason,
            }
            for i, (text, logs, reason) in enumerate(zip(self._text, self._logprobs, self._reasons))
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _thought(self, index):
        return {} if self.jobs[index].reader is None else dict.fromkeys(_THOUGHTS, self._thoughts[index] or None)

    def chunk(self, index, delta, logprobs=None, reason=None):
        """A ``chat.completion.chunk`` of one choice."""
        logprobs = {"content": logprobs} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._base, "object": "chat.completion.chunk", "choices": [choice]}

    def last_chunk(self):
        """The chunk that tells the usage."""
        return {**self._base, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

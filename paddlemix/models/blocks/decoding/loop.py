"""The loop that decodes many: jobs go in at any time, each turn of :meth:`Loop.step` gives what has come out.

One thread owns a loop. :func:`~..chat.batch_chat` turns it until all is answered, the server for as long as it lives.
"""

import math
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import paddle

from paddlemix import device
from paddlemix.errors import PromptError, UserError

from ..generation import GenerationConfig, TextStream
from ..kv_cache import INT8
from ..layers import take_rows
from ..router import kept_tokens
from .pages import PageTable
from .routing import routed
from .sampling import Choice, Chooser
from .scheduler import Scheduler, Sequence
from .step import PagedCache, Stepper
from .tower import Tower

__all__ = ["Event", "Job", "Loop"]

PATIENCE = 4  # turns that a prompt waits for others at most, where pauses do not matter
HELD_BACK, LONGEST_PAUSE = 40, 1.0  # see Loop._waits_for_company, for each that is to come: times the last step, and seconds


@dataclass(eq=False)
class Job(Sequence):
    """A :class:`~.scheduler.Sequence` with how it is answered.

    Attributes:
        config: a :class:`~..generation.GenerationConfig`; ``max_new_tokens`` is cut to what the context has room for.
        stream: which of several answers with one seed this is.
        skip_special_tokens, strip, cuts: of the text, as :class:`~..generation.TextStream` takes them.
        compress: a function of the prompt's ids and the features of its pictures that tells which positions are left out; None
            where all stay. The keys of such a prompt are of use to nobody else.
        reader: what turns its ids into text in place of a ``TextStream``, such as :class:`~..thinking.AnswerReader`.
        answer: ids of the answer so far, without the one that ends it.
        image_hits: pictures whose features were there already.
    """

    config: GenerationConfig = None
    stream: int = 0
    skip_special_tokens: bool = True
    strip: bool = True
    cuts: bool = True
    compress: object = None
    reader: object = None
    answer: list = field(default_factory=list)
    chooser: Chooser = None
    text: TextStream = None
    image_hits: int | None = None
    started: float | None = None  # the caller's, when it first ran


@dataclass
class Event:
    """What one turn did to a job: ``piece`` of text that became certain, the ``choice`` that was made (None for the end token),
    and why it ended: ``stop``, ``length``, ``error`` with ``error``, or None while it goes on."""

    job: Job
    piece: str
    choice: Choice | None
    reason: str | None = None
    error: UserError | None = None


def chunk_size(language_model):
    """Tokens of a prompt at once: few enough that others do not wait long, many enough that the weights pay."""
    large = language_model.parameter_count > 100_000_000
    return 64 if large and device.is_cpu() else 512


class Loop:
    """Decodes many sequences with one model.

    Args:
        model: an ``InternVLChatModel`` whose tokenizer is set.
        tokenizer: from ``load_tokenizer``.
        positions: of the cache, in all; at least what one job takes.
        max_seqs: how many sequences run at once.
        page_size: positions a page.
        chunk: tokens of a prompt at once, a multiple of the page size; None for :func:`chunk_size`.
        image_cache: bytes of features of pictures to keep for later.
        vision_adapters: attached adapters that are of the vision tower too.
        longest: most positions of a sequence; None for what the model's context and the cache allow.
        at_once: compute pictures and prompts of all that came in before the next token of the others: more answers in all, and
            longer pauses for each.
    """

    def __init__(
        self,
        model,
        tokenizer,
        positions,
        max_seqs=16,
        page_size=16,
        chunk=None,
        image_cache=0,
        vision_adapters=(),
        longest=None,
        at_once=False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.table = PageTable(1 + -(-positions // page_size), page_size)
        chunk = chunk or chunk_size(model.language_model)
        budget = chunk * math.ceil(max_seqs / 8) if at_once and chunk > 64 else chunk
        self.stepper = Stepper(model.language_model, self.table, model.language_model.embed(paddle.to_tensor([0])).dtype)
        self.scheduler = Scheduler(self.table, max_seqs, chunk, budget, self.stepper.short)
        self.tower = Tower(model, image_cache, vision_adapters)
        self.longest = min(longest or self.positions, model.config.llm_config.context_length, self.positions)
        self._turn, self._patience, self.at_once = 0, 0, at_once
        self._stepped, self._pause = 0.0, 0.0  # when the last step ended, and how long answers may wait for each to come
        self._unsettled = deque()  # jobs that do not know yet which of their tiles are compact

    @property
    def positions(self):
        """Positions that the cache holds."""
        return (self.table.pages - 1) * self.table.page_size

    @property
    def is_busy(self):
        """Whether a job waits or runs."""
        return bool(self._unsettled or self.scheduler.waiting or self.scheduler.running)

    @property
    def waiting(self):
        """Jobs that wait for their turn."""
        return [*self.scheduler.waiting, *self._unsettled]

    def routes(self, job):
        """Whether the length of a job's prompt depends on what its pictures show."""
        return bool(job.pictures) and (self.model.routes or job.compress is not None)

    def make_job(self, ids, config, pictures=(), **more):
        """A job for the prompt ``ids``, with ``max_new_tokens`` cut to the room that is left.

        Where tiles may be compact, ``ids`` have all their context tokens, and the room is known later: :meth:`step` tells.

        Raises:
            PromptError: the prompt leaves no room.
        """
        job = Job(list(ids), len(ids), list(pictures), config=config, **more)
        if not self.routes(job):
            self._fit(job)
        return job

    def _fit(self, job):
        """Cut a job's answer to the room that its prompt leaves."""
        count, limit = job.prompt, self.longest
        if count >= limit:
            raise PromptError(
                f"the prompt has {count} tokens but the model's context is {limit}: "
                "use fewer tiles (--max_num), fewer pictures, or a shorter text"
            )
        job.config = GenerationConfig.of(job.config, max_new_tokens=min(job.config.max_new_tokens, limit - count))
        variant = self.model.language_model.model.rope.variant(count)
        job.variant = None if isinstance(variant, int) else str(variant)

    def add(self, job):
        """Let a job wait for its turn."""
        job.chooser = Chooser(job.config, job.stream)
        job.text = job.reader or TextStream(
            self.tokenizer, job.config.stop_strings, job.cuts, job.skip_special_tokens, job.strip
        )
        if self.routes(job):
            self._unsettled.append(job)
        else:
            self.scheduler.add(job)

    def remove(self, job):
        """Forget a job: it was answered, or nobody wants the answer any more."""
        if job in self._unsettled:
            self._unsettled.remove(job)
        self.scheduler.remove(job)
        self.tower.release(job)

    def step(self):
        """One turn; a list of :class:`Event`."""
        events = self._settle() if self._unsettled else []
        plan = self.scheduler.plan()
        for job in plan.admitted:
            try:
                hits = self.tower.want(job)
            except UserError as error:
                events.append(self._fail(job, error))
                continue
            job.image_hits = hits if job.image_hits is None else job.image_hits
        self._turn += 1
        prompts = self._prompts_are_due(plan)
        chunks = self.scheduler.chunks(self.tower.has) if prompts else []
        along = chunks if self._are_short(chunks) else []
        if along or (plan.decode and not self._waits_for_company(plan.decode)):
            began = time.perf_counter()
            events += self._advance([(job, 1) for job in plan.decode] + along, answers=True)
            self._stepped = time.perf_counter()
            self._pause = min(HELD_BACK * (self._stepped - began), LONGEST_PAUSE)
        if chunks and not along:
            events += self._advance(chunks)
        if self.at_once and prompts:
            while more := self.scheduler.chunks(self.tower.has):
                events += self._advance(more)
        elif not chunks and self.tower.is_busy:
            self.tower.slice()
        return events

    def _waits_for_company(self, answering):
        """Whether answers pause, since more about pictures are to come: rows of a step cost little more than one, and a picture
        takes so long that each answer would be over before the next begins. Who asked about text alone waits for no picture.
        """
        if self.at_once or not all(job.pictures for job in answering):
            return False
        left = [job.prompt - job.computed for job in self.scheduler.running if job.pictures]
        coming = sum(count > self.stepper.short for count in left)
        return bool(coming or self.tower.is_busy) and time.perf_counter() < self._stepped + self._pause * max(coming, 1)

    def _prompts_are_due(self, plan):
        """Whether prompts are computed in this turn."""
        if not self.at_once:
            return not (self.tower.is_busy and self._turn % 2)
        if plan.decode and not self._enough_came_in():
            return False
        while self.tower.is_busy:
            self.tower.slice()
        return True

    def _enough_came_in(self):
        """Whether prompts are computed now: a few cost little more than one, so that one waits for others, but not long."""
        came_in = sum(1 for job in self.scheduler.running if job.computed < job.prompt)
        self._patience = self._patience + 1 if came_in else 0
        if 4 * came_in < self.scheduler.max_seqs and self._patience < PATIENCE:
            return False
        self._patience = 0
        return True

    def _settle(self):
        """Let those wait for their turn whose gates are known: tiles have their sizes from then on."""
        events = []
        room = self.scheduler.max_seqs - len(self.scheduler.running) - len(self.scheduler.waiting)
        for job in list(self._unsettled)[: max(0, room)]:  # features of more would only lie there
            try:
                if job.image_hits is None:
                    job.image_hits = self.tower.want(job)
                if not self.tower.has(job):
                    continue
                self._shorten(job)
            except UserError as error:
                events.append(self._fail(job, error))
                continue
            self._unsettled.remove(job)
            self.scheduler.add(job)
        return events

    def _shorten(self, job):
        """Leave out the tokens that a job's compact tiles do not have, or that compression drops."""
        tiles, kept = self.tower.pictures(job), np.ones(job.prompt, bool)
        if job.compress is not None:
            with routed([job.adapter], None):
                kept[job.compress(job.tokens, tiles)] = False
        else:
            for picture, part, compact in zip(job.pictures, tiles, self.model.decided(tiles)):
                own = kept_tokens(compact, part.fine.shape[1], part.coarse.shape[1])
                kept[picture.start : picture.start + picture.count], picture.compact = own, compact
        before = np.cumsum(kept) - kept
        for picture in job.pictures:
            own = kept[picture.start : picture.start + picture.count]
            picture.rows = None if job.compress is None else np.flatnonzero(own)
            picture.start, picture.count = int(before[picture.start]), int(own.sum())
        job.tokens = np.asarray(job.tokens)[kept].tolist()
        job.prompt = len(job.tokens)
        self._fit(job)
        job.variant = job.variant if job.compress is None else None

    def _are_short(self, chunks):
        return bool(chunks) and max(count for _, count in chunks) <= self.stepper.short

    def _advance(self, chunks, answers=False):
        """Compute next tokens, (job, number) each, of prompts or ``answers``; choose what follows where they are the last."""
        pieces = [(job, count, self.tower.features(job, count)) for job, count in chunks]
        if self._are_short(chunks):
            logits = self.stepper.alone(pieces)
        elif answers:
            logits = self.stepper.decode([job for job, _ in chunks])
        else:
            logits = self.stepper.prefill(pieces)
        done = []
        for row, (job, count) in enumerate(chunks):
            self.scheduler.advanced(job, count)
            if job.computed == len(job.tokens):
                self.tower.release(job)
                done.append((row, job))
        if not done:
            return []
        rows, jobs = zip(*done)
        return self._choose(jobs, logits if len(jobs) == len(chunks) else take_rows(logits, rows))

    def _choose(self, jobs, logits):
        """Append the next token to each job, and tell what came of it."""
        plain = [job.chooser.is_plain(len(job.answer)) for job in jobs]
        likeliest = paddle.argmax(logits, axis=-1).numpy() if any(plain) else None
        scores = None if all(plain) else logits.astype("float32").numpy()
        events = []
        for row, job in enumerate(jobs):
            try:
                choice = Choice(int(likeliest[row])) if plain[row] else job.chooser(scores[row].copy(), job.answer)
                events.append(self._take(job, choice))
            except UserError as error:
                events.append(self._fail(job, error))
        return events

    def _fail(self, job, error):
        self.remove(job)
        return Event(job, "", None, "error", error)

    def _take(self, job, choice):
        reason, ends = None, choice.token in job.config.eos_token_ids
        complete = job.chooser.matcher is not None and job.chooser.matcher.complete
        piece = ""
        if not (ends or (complete and choice.token == job.chooser.matcher.stop)):
            job.tokens.append(choice.token)
            job.answer.append(choice.token)
            piece = job.text.put(choice.token)
            if job.text.stopped or complete:
                reason = "stop"
            elif len(job.answer) >= job.config.max_new_tokens:
                reason = "length"
        else:
            reason, choice = "stop", None
        if reason:
            piece += job.text.close()
            self.remove(job)
        return Event(job, piece, choice, reason)


def bytes_per_position(model):
    """Memory of the cache for one position, in bytes."""
    dtype = model.language_model.embed(paddle.to_tensor([0])).dtype
    if getattr(model.language_model, "cache_dtype", None) == INT8:
        return PagedCache.bytes_per_position(model.config.llm_config, None)
    size = 4 if device.is_cpu() else np.dtype("float32").itemsize // (1 if dtype == paddle.float32 else 2)
    return PagedCache.bytes_per_position(model.config.llm_config, size)


def positions_for(lengths, page_size=16):
    """Positions that a cache needs for rows of these lengths at once."""
    return sum(math.ceil(length / page_size) for length in lengths) * page_size

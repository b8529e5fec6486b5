"""What runs next: plain data and a pure decision, apart from the model.

Each turn has two parts. All sequences that have answered at least one token advance by one token together. Then, so that
long prompts hold up nobody, *one* further piece of work is done: a chunk of a prompt with what fits beside it of others, or
a slice of the vision tower. Chunks end at multiples of ``chunk`` positions, whoever else is there, so that a sequence is
computed in the same pieces alone and in company.
"""

from collections import deque
from dataclasses import dataclass, field

from .pages import page_hash

__all__ = ["Picture", "Plan", "Scheduler", "Sequence"]


@dataclass
class Picture:
    """A picture in a prompt: context tokens ``start`` to ``start + count``.

    Attributes:
        digest: of what it looks like to the model, bytes; equal ones have equal features.
        tiles: ``[T, 3, height, width]`` float32, or a function that returns them.
        compact: which tiles are in their coarse form, bool array ``[T]``; None where tiles have one form.
        rows: which of its features are in the prompt, integers ``[count]``; None for all.
    """

    digest: bytes
    start: int
    count: int
    tiles: object = None
    compact: object = None
    rows: object = None

    @property
    def identity(self):
        """Bytes that are equal where the features in the prompt are."""
        return self.digest if self.compact is None else self.digest + self.compact.tobytes()


@dataclass(eq=False)
class Sequence:
    """One answer in the making.

    Attributes:
        tokens: ids of the prompt, then of the answer.
        prompt: length of the prompt.
        pictures: :class:`Picture` in order.
        adapter: name of the LoRA adapter, None for none.
        variant: what of the prompt's length decides how positions are rotated; None: its keys are of use to nobody else.
        after: another sequence with the same prompt, whose pages this one waits for; None for none.
        computed: tokens whose keys and values the cache holds.
        cached: how many of these were there before.
        pages: in order; ``hashes`` of those that are sealed.
    """

    tokens: list
    prompt: int
    pictures: list = field(default_factory=list)
    adapter: str | None = None
    variant: object = ""
    after: object = None
    computed: int = 0
    cached: int = 0
    pages: list = field(default_factory=list)
    hashes: list = field(default_factory=list)
    served: bool = False  # whether it has run at all
    ended: bool = False

    def hash_of(self, index, size):
        """Hash of page ``index`` of ``size`` tokens, all of which are known."""
        while len(self.hashes) <= index:
            at = len(self.hashes) * size
            parent = self.hashes[-1] if self.hashes else repr((self.adapter, self.variant)).encode()
            inside = [p.identity for p in self.pictures if p.start < at + size and at < p.start + p.count]
            self.hashes.append(page_hash(parent, self.tokens[at : at + size], inside))
        return self.hashes[index]


@dataclass
class Plan:
    """One turn: ``decode`` advance by a token each; the pictures of ``admitted`` are needed soon."""

    decode: list
    admitted: list


class Scheduler:
    """Sequences that wait and that run.

    Args:
        table: the :class:`~.pages.PageTable`.
        max_seqs: how many run at once.
        chunk: most tokens of a prompt at once, a multiple of the page size.
        budget: most tokens of several prompts at once; None for ``chunk``.
        short: pieces of at most so many tokens are computed another way, and never beside longer ones.
    """

    def __init__(self, table, max_seqs, chunk, budget=None, short=0):
        self.table, self.max_seqs, self.chunk, self.budget, self.short = table, max_seqs, chunk, budget or chunk, short
        self.waiting, self.running = deque(), []  # both by age
        self._oldest_first = False

    def add(self, sequence):
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence):
        """Forget a sequence, wherever it is."""
        sequence.ended = True
        if sequence in self.running:
            self.running.remove(sequence)
            self._leave(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def advanced(self, sequence, count):
        """Note that ``count`` more tokens are computed."""
        size = self.table.page_size
        before, sequence.computed = sequence.computed, sequence.computed + count
        if sequence.variant is not None:
            for index in range(before // size, sequence.computed // size):
                self.table.seal(sequence.pages[index], sequence.hash_of(index, size))

    def plan(self):
        """Decide who advances in the next turn, and who comes in."""
        decode = []
        for sequence in list(self.running):
            if sequence in self.running and self._decodes(sequence) and self._grow(sequence):
                decode.append(sequence)
        decode = [sequence for sequence in decode if sequence in self.running]  # growing may have cost another its place
        return Plan(decode, self._admit())

    def _decodes(self, sequence):
        return len(sequence.tokens) - sequence.computed == 1

    def _grow(self, sequence):
        """Room for the next token, taken from the youngest where there is none; False if that was ``sequence`` itself."""
        while len(sequence.pages) < self.table.pages_for(sequence.computed + 1):
            page = self.table.take(1)
            if page is not None:
                sequence.pages += page
                continue
            youngest = self.running.pop()
            self._leave(youngest)
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _leave(self, sequence):
        self.table.give_back(sequence.pages)
        sequence.pages, sequence.computed = [], 0

    def _admit(self):
        admitted = []
        while self.waiting and len(self.running) < self.max_seqs:
            sequence = self.waiting[0]
            first = sequence.after
            if first is not None and not first.ended and first.computed < first.prompt and first is not sequence:
                break
            if not self._enter(sequence):
                break
            self.waiting.popleft()
            # by age: one that was sent back is older than those that came while it ran
            self.running.append(sequence)
            sequence.served = True
            admitted.append(sequence)
        return admitted

    def _enter(self, sequence):
        """Pages for all tokens of the sequence so far, with what others have computed of them; False if there are too few."""
        table, size, length = self.table, self.table.page_size, len(sequence.tokens)
        shared = []
        if sequence.variant is not None:  # at least one token is left to compute
            shared = table.share(sequence.hash_of(index, size) for index in range((length - 1) // size))
        more = table.take(table.pages_for(length) - len(shared))
        if more is None:
            table.give_back(shared)
            return False
        sequence.pages = shared + more
        sequence.computed = len(shared) * size
        sequence.cached = sequence.computed if not sequence.served else sequence.cached
        return True

    def chunks(self, ready=lambda sequence: True):
        """What is computed next of prompts: (sequence, number of tokens) each; none where there is nothing to do.

        First a chunk of the prompt with the least left to do and, every other time, of the oldest, so that nobody waits for
        ever. Beside it others, as far as all of them, filled up to the longest, are within the budget.

        Args:
            ready: tells of a sequence whether the features of its pictures are there.
        """
        able = [s for s in self.running if not self._decodes(s) and ready(s)]
        if not able:
            return []
        self._oldest_first = not self._oldest_first
        first = able[0] if self._oldest_first else min(able, key=lambda s: len(s.tokens) - s.computed)
        found = [(first, self._chunk_of(first))]
        width = found[0][1]
        for sequence in able:
            count = self._chunk_of(sequence)
            if (len(found) + 1) * max(width, count) > self.budget or sequence is first:
                continue
            shorter, longer = sorted((width, count))
            if longer <= self.short or (shorter > self.short and 2 * shorter >= longer):  # more filling than work does not pay
                found.append((sequence, count))
                width = max(width, count)
        return found

    def _chunk_of(self, sequence):
        left = len(sequence.tokens) - sequence.computed
        return min(left, self.chunk - sequence.computed % self.chunk)

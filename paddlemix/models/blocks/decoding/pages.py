"""Pages of a KV cache: which are free, which belong to whom, and which hold the beginning of a prompt seen before.

The cache's memory is cut into pages of ``page_size`` positions. A sequence owns a list of pages, not necessarily in a row; a
full page is *sealed* with the hash of (the hash of the page before it, its tokens, the digests of the pictures in it), so that
one hash stands for a whole beginning. Sequences that begin alike share sealed pages. A page that nobody uses any more but that
is sealed stays until its place is needed, the longest unused first. Page 0 is nobody's: what is computed only to fill up a
batch is written there. Plain data, no Paddle. (Kwon et al., arXiv 2309.06180.)
"""

import hashlib
from collections import OrderedDict

import numpy as np

__all__ = ["PageTable", "page_hash"]


def page_hash(parent, tokens, extra=()):
    """Hash of a page, 16 bytes, from its ``parent``'s (bytes; what the first page follows), its tokens and ``extra`` bytes."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(np.asarray(tokens, dtype="int64").tobytes())
    for part in extra:
        digest.update(part)
    return digest.digest()


class PageTable:
    """Who owns the pages of a cache.

    Args:
        pages: how many there are, page 0 included.
        page_size: positions in each.
    """

    def __init__(self, pages, page_size=16):
        self.pages, self.page_size = pages, page_size
        self._free = list(range(pages - 1, 0, -1))
        self._users = [0] * pages
        self._hash = {}  # of each sealed page
        self._sealed = {}  # the page of each hash
        self._idle = OrderedDict()  # sealed pages without a user, the longest unused first

    @property
    def used(self):
        """Pages that a sequence uses."""
        return self.pages - 1 - self.available

    @property
    def available(self):
        """Pages that can be had, idle ones included."""
        return len(self._free) + len(self._idle)

    def pages_for(self, positions):
        """How many pages so many positions take."""
        return -(-positions // self.page_size)

    def take(self, count):
        """``count`` pages for one user, or None where there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                del self._sealed[self._hash.pop(page)]
                self._free.append(page)
            page = self._free.pop()
            self._users[page] = 1
            taken.append(page)
        return taken

    def share(self, hashes):
        """The pages of the longest beginning of ``hashes`` that is there; the caller becomes one more user of each."""
        found = []
        for value in hashes:
            page = self._sealed.get(value)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            found.append(page)
        return found

    def seal(self, page, value):
        """Let later sequences find a full ``page`` by its hash; of equal pages the first stays."""
        if value not in self._sealed and page not in self._hash:
            self._sealed[value], self._hash[page] = page, value

    def give_back(self, pages):
        """One user less for each of ``pages``, in the order of the sequence: its end is forgotten before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._hash:
                self._idle[page] = None
            else:
                self._free.append(page)

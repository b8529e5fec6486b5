"""Conversations without end, with pictures and abandoned streams: answers stay those of fresh runs, and memory stays."""

import itertools
import time

import numpy as np
import pytest

from paddlemix.models.internvl2 import ChatSession
from tests.conftest import FAMILIES, load_reference, tiles

pytestmark = pytest.mark.soak
WORDS = "what is the color of picture star small now, where count all éè 图片 describe".split()
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def converse(reference, rng):
    """One conversation of up to five rounds, each asked in the session and in a fresh run."""
    session = ChatSession(reference.model, reference.tokenizer)
    seen, counts = [], []
    for _ in range(rng.integers(1, 6)):
        question, new = " ".join(rng.choice(WORDS, rng.integers(1, 9))), []
        for _ in range(rng.integers(0, 3)):
            new.append(tiles(int(rng.integers(4)), max_num=int(rng.integers(1, 3))))
            question = f"<image>\n{question}"
        pixels = np.concatenate(new) if new else None
        if rng.random() < 0.2:  # a reader who leaves
            stream = session.stream(question, pixels, OPTIONS, [len(p) for p in new])
            next(stream, None)
            stream.close()
        known = list(session.history)
        answer = session.ask(question, pixels, OPTIONS, [len(p) for p in new])
        seen, counts = seen + new, counts + [len(p) for p in new]
        fresh = reference.model.chat(
            reference.tokenizer,
            np.concatenate(seen) if seen else None,
            question,
            OPTIONS,
            known,
            num_patches_list=counts,
        )
        assert answer == fresh, (reference.name, known, question)


def test_sessions_stay_right_and_memory_stays(soak_seconds):
    end, settled, rounds = time.monotonic() + soak_seconds, None, 0
    for seed in itertools.count():
        converse(load_reference(FAMILIES[seed % len(FAMILIES)]), np.random.default_rng(seed))
        rounds += 1
        if settled is None and (rounds >= 40 or time.monotonic() > end - soak_seconds / 2):
            settled = resident()
        if time.monotonic() > end:
            break
    assert resident() - settled < 100e6, f"{(resident() - settled) / 1e6:.0f} MB more after {rounds} conversations"

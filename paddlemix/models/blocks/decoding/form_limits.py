"""Whether a form can be compiled within limits: tried in a process of its own, since no thread can be stopped or bounded.

Some schemas, counted repetitions and long lists take a grammar library minutes or gigabytes. The child compiles for a
vocabulary of single bytes, which costs what the grammar costs.
"""

import hashlib
import json
import subprocess
import sys

from paddlemix.errors import PromptError

__all__ = ["check_limits"]

_SECONDS, _MEMORY = 2, 200 << 20  # of processor time, and beyond what the library takes by itself
_WAIT = 20  # seconds by the clock, on a machine that has other things to do
_MOST = 2 << 20  # bytes of a form
_HARMLESS = 1 << 14  # of choices, which cost in proportion and need no trial
_MOST_KNOWN = 4096
_known = {}  # what is wrong with forms that were tried, or None, by digest


def check_limits(spec):
    """Compile ``spec`` (see :func:`~.forms.grammar_of`) in a child process.

    Raises:
        PromptError: it takes more than 2 s or 200 MB, or cannot be compiled at all.
    """
    try:
        text = json.dumps(spec)
    except (TypeError, ValueError, RecursionError):
        raise PromptError("the form of the answer is nested too deep, or is no JSON: make it simpler") from None
    if len(text) > _MOST:
        raise PromptError(f"the form of the answer is larger than {_MOST >> 20} MB: make it simpler")
    if isinstance(spec, dict) and list(spec) == ["choices"] and len(text) <= _HARMLESS:
        return
    digest = hashlib.blake2b(text.encode()).digest()
    if digest not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[digest] = _problem(text)
    if _known[digest]:
        raise PromptError(_known[digest])


def _problem(text):
    too_much = f"the form of the answer takes more than {_SECONDS} s or {_MEMORY >> 20} MB to compile: make it simpler"
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=text, capture_output=True, text=True, timeout=_WAIT, close_fds=True
        )
    except subprocess.TimeoutExpired:
        return too_much
    if done.returncode == 0:
        return None
    return done.stdout.strip()[:300] if done.returncode == 3 and done.stdout.strip() else too_much


def _limit():
    import resource

    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    seconds = int(used) + _SECONDS + (used % 1 > 0.5)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main():
    """Compile the form on standard input: exit code 0; 3 with a sentence on standard output; anything else: too much."""
    import llguidance

    from .forms import compile_grammar, grammar_of

    class Bytes:
        """A vocabulary of 256 bytes and an end."""

        tokens = [*(bytes([b]) for b in range(256)), b"<|end|>"]
        eos_token_id, bos_token_id, special_token_ids = 256, None, [256]

        def __call__(self, text):
            return list(text.encode() if isinstance(text, str) else bytes(text))

    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257)
    spec = json.loads(sys.stdin.read())
    try:
        _limit()
        walk = compile_grammar(grammar_of(spec), vocabulary)
        walk.compute_bitmask()
    except PromptError as error:
        print(error)
        raise SystemExit(3) from None


if __name__ == "__main__":
    main()

"""Answers of two parts: what the model thought, and what it says.

gpt-oss writes channels (OpenAI's harmony format): ``<|channel|>analysis<|message|>...<|end|>`` and
``<|channel|>final<|message|>...``. Qwen3 thinks within ``<think>`` and ``</think>``, if it is told to.
"""

from .generation import TextStream

# InternVL3.5's model card.
SYSTEM_MESSAGE = """\
You are an AI assistant that rigorously follows this response protocol:

1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and reason through the \
problem step-by-step. Enclose this entire thinking process within <think> and </think> tags.

2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the answer from \
the think section with a newline.

Ensure that the thinking process is thorough but remains focused on the query. The final answer should be standalone and not \
reference the thinking section."""
# The card's for thinking; what the user asks for goes before.
SAMPLING = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 16384}


def splits(template, thinking):
    """Whether answers under a template have two parts."""
    return template.channels or thinking


def remembered(template, thought, answer):
    """An answer of the history as the next prompt has it, with what was thought before it."""
    if template.channels:
        return template.in_channels(thought, answer)
    return f"<think>\n{thought}\n</think>\n\n{answer}" if thought else answer


class AnswerReader:
    """A :class:`~.generation.TextStream` that shows the answer alone and keeps the thought apart.

    Args:
        tokenizer: the model's.
        template: a :class:`~.conversation.Template`.
        stop_strings, cuts: as of ``TextStream``, for the answer.

    Attributes:
        reasoning: what was thought, as far as it is certain.
        stopped: whether the answer is complete.
    """

    def __init__(self, tokenizer, template, stop_strings=(), cuts=True, skip_special_tokens=True):
        self._tokenizer, self._channels = tokenizer, template.channels
        self._answer = TextStream(tokenizer, stop_strings, cuts, skip_special_tokens)
        self._thought = TextStream(tokenizer)
        self.reasoning, self.stopped = "", False
        self._tokens, self._header = [], []
        names = ("<|channel|>", "<|message|>", "<|end|>") if self._channels else ("<think>", "</think>")
        self._ids = [tokenizer.require_token_id(name) for name in names]
        # Without a channel of its own everything is the answer; without an end of thinking everything is thought.
        self._part = "answer" if self._channels else "thought"

    def put(self, token):
        """Add the next id; return the text of the answer that became certain, possibly empty."""
        token = int(token)
        self._tokens.append(token)
        if self._channels:
            return self._put_in_channel(token)
        begin, end = self._ids
        if token == end:
            self._part = "answer"
            return ""
        return self._show(token) if token != begin or self._part == "answer" else ""

    def _put_in_channel(self, token):
        channel, message, end = self._ids
        if token == channel:
            self._part, self._header = "header", []
        elif self._part == "header" and token == message:
            name = self._tokenizer.decode(self._header).strip()
            self._part = "thought" if name.startswith("analysis") else "final"
        elif self._part == "header":
            self._header.append(token)
        elif token == end:
            # Some models end what they say like what they think.
            self.stopped = self._part == "final"
            self._part = "between"
        elif self._part != "between":
            return self._show(token)
        return ""

    def _show(self, token):
        if self._part == "thought":
            self.reasoning += self._thought.put(token)
            return ""
        piece = self._answer.put(token)
        self.stopped = self.stopped or self._answer.stopped
        return piece

    def close(self):
        """Return the text of the answer that was still held back."""
        self.reasoning += self._thought.close()
        return self._answer.close()

    @property
    def said(self):
        """All that was generated, special tokens included: what the history of the next prompt needs."""
        tokens = self._tokens[:-1] if self._channels and self._tokens[-1:] == self._ids[-1:] else self._tokens
        return self._tokenizer.decode(tokens).strip()

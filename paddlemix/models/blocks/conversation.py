"""Prompt templates. The prompt that the model sees and the labels that it is trained on come from the same code.

A template turns a conversation into rounds; a round is the text up to where the assistant speaks, and what it says.
Chatting ends with an open round; training learns the answers of closed ones. Texts follow the published models, to the
letter: a missing newline silently costs accuracy.
"""

from dataclasses import dataclass, replace

from paddlemix.errors import PromptError

IMAGE_PLACEHOLDER = "<image>"
IMG_START, IMG_CONTEXT, IMG_END = "<img>", "<IMG_CONTEXT>", "</img>"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Template:
    """How a model writes a conversation.

    Attributes:
        name: the name in a checkpoint's ``config.json``.
        system_message: who the model is told to be.
        system: text with ``{}`` for the system message, its end included.
        user: text before and after what the user says.
        assistant: text before what the assistant says; a prompt ends with it.
        end: text after what the assistant says; its first token ends an answer.
        last_end: text after the last answer of a conversation, where it is another: this then ends an answer.
        lead: text that begins what the assistant says.
        strip: whether messages are stripped of white space, as this model was trained.
        again: text before the user's part in every round but the first.
        channels: whether an answer is written in channels (OpenAI's harmony format): an analysis, and what is said in the end.
    """

    # What else than the token ends an answer, and whether the answer is cut there.
    stop_strings = ()
    cuts_at_stop = True

    name: str
    system_message: str
    system: str
    user: tuple
    assistant: str
    end: str
    lead: str = ""
    strip: bool = False
    again: str = ""
    last_end: str | None = None
    channels: bool = False

    @property
    def stop(self):
        """The token that ends an answer."""
        return (self.last_end or self.end).strip()

    def with_system_message(self, message):
        """The same template telling the model to be somebody else; None keeps it as it is."""
        return self if message is None else replace(self, system_message=message)

    def rounds(self, turns):
        """Write ``turns``, a list of (question, answer) whose last answer may be None, as (before answer, answer) texts."""
        clean = str.strip if self.strip else str
        written, before = [], self.system.format(self.system_message)
        turns = list(turns)
        for i, (question, answer) in enumerate(turns):
            before += (self.again if written else "") + self.user[0] + clean(question) + self.user[1] + self.assistant
            end = self.last_end if self.last_end and i == len(turns) - 1 else self.end
            written.append((before, None if answer is None else self.lead + clean(answer) + end))
            before = ""
        return written

    def learned(self, answer):
        """An answer of a training sample as the model shall write it: in channels, where this template has them."""
        if not self.channels or answer.startswith("<|channel|>"):
            return answer
        thought, answer = split_thought(answer) if answer.lstrip().startswith("<think>") else ("", answer)
        return self.in_channels(thought, answer)

    def in_channels(self, thought, answer):
        """An answer, and what was thought before it, as the model writes them."""
        analysis = f"<|channel|>analysis<|message|>{thought}<|end|>{self.assistant}" if thought else ""
        return f"{analysis}<|channel|>final<|message|>{answer}"

    def prompt(self, question, history=()):
        """The text that asks ``question`` after ``history``, a list of (question, answer)."""
        rounds = self.rounds([*history, (question, None)])
        return "".join(before + (answer or "") for before, answer in rounds)


def split_thought(text):
    """``(thought, answer)``, stripped: what stands within ``<think>``, and what follows the last ``</think>``.

    Without that the model was still thinking: all of it is thought.
    """
    thought, end, answer = text.rpartition("</think>")
    if not end:
        thought, answer = answer, ""
    return (thought.partition("<think>")[2] if "<think>" in thought else thought).strip(), answer.strip()


def insert_image_tokens(texts, image_token_counts):
    """Replace the ``<image>`` marks of ``texts``, in order, by as many context tokens as each picture has.

    Args:
        texts: the user's messages of a conversation, first to last.
        image_token_counts: tokens of each picture, in the order of the marks.

    Returns:
        The messages with ``<img><IMG_CONTEXT>...</img>`` in place of the marks.

    Raises:
        PromptError: more or fewer marks than pictures, or a literal context token in a message.
    """
    marks = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if marks != len(image_token_counts):
        raise PromptError(
            f"the conversation has {marks} {IMAGE_PLACEHOLDER} mark(s) but {len(image_token_counts)} picture(s): "
            f"write one {IMAGE_PLACEHOLDER} for each picture"
        )
    if any(IMG_CONTEXT in text for text in texts):
        raise PromptError(
            f"a message contains the reserved token {IMG_CONTEXT}: write {IMAGE_PLACEHOLDER} where a picture goes"
        )
    counts = iter(image_token_counts)
    out = []
    for text in texts:
        head, *rest = text.split(IMAGE_PLACEHOLDER)
        out.append(head + "".join(IMG_START + IMG_CONTEXT * next(counts) + IMG_END + part for part in rest))
    return out


def encode_conversations(conversations, tokenizer, template, image_token_counts=()):
    """Token ids and labels of a training sample.

    Args:
        conversations: ``[{"from": "system" | "human" | "gpt", "value": text}, ...]``: an optional system turn, then
            questions and answers in turn. A ``gpt`` turn before the first question is dropped.
        tokenizer: of the checkpoint that is trained.
        template: a :class:`Template`.
        image_token_counts: tokens of each picture, in the order of the ``<image>`` marks.

    Returns:
        ``(input_ids, labels)``, lists of equal length. Labels are those of the answers and of the token that ends each;
        everything else is -100.

    Raises:
        PromptError: the turns do not alternate, there is no answer, or marks and pictures differ in number.
    """
    turns = list(conversations)
    if turns and turns[0]["from"] == "system":
        template = template.with_system_message(turns.pop(0)["value"])
    while turns and turns[0]["from"] != "human":
        turns.pop(0)
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn["from"] != expected:
            raise PromptError(f"turn {i + 1} of the conversation is from '{turn['from']}' where '{expected}' should speak")
    if len(turns) < 2:
        raise PromptError("the conversation has no answer to learn: it needs a 'human' turn followed by a 'gpt' turn")
    questions = insert_image_tokens([t["value"] for t in turns[0::2]], image_token_counts)
    # A last question without an answer is of no use.
    answers = [template.learned(t["value"]) for t in turns[1::2]]

    def encode(text, start):
        return tokenizer.encode(text, add_special_tokens=start)

    stops = {tokenizer.convert_tokens_to_ids(end.strip()) for end in (template.end, template.last_end) if end}
    return encode_rounds(template, zip(questions, answers), encode, stops)


def encode_rounds(template, turns, encode, stops):
    """Token ids and labels of answered questions, the ids being those of the whole text.

    Args:
        template: a :class:`Template` whose answers end in a token.
        turns: (question, answer) pairs.
        encode: ``encode(text, start)`` gives the ids of a text, with what begins a prompt if ``start``.
        stops: ids of the tokens that end an answer.

    Returns:
        ``(input_ids, labels)``, see :func:`encode_conversations`.
    """
    input_ids, labels = [], []
    # Text is tokenised between special tokens, and every answer ends in one: so a round can be tokenised without those
    # before it. It keeps the token before it, because some tokenizers go by what a text begins with.
    for i, (before, answer) in enumerate(template.rounds(turns)):
        first, held = i == 0, 0
        if not first and template.end.endswith(template.stop):
            before, held = template.stop + before, 1
        ids, header = (encode(text, first)[held:] for text in (before + answer, before))
        start = next((k for k, (a, b) in enumerate(zip(ids, header)) if a != b), len(header))
        end = next(k for k in range(len(ids), 0, -1) if ids[k - 1] in stops)
        input_ids += ids
        labels += [IGNORE_INDEX] * start + ids[start:end] + [IGNORE_INDEX] * (len(ids) - end)
    return input_ids, labels

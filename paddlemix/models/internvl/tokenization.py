"""Texts of InternVL-C and -G: Llama's tokenizer with the multilingual vocabulary, a prefix and rows of one length."""

import numpy as np

from paddlemix.errors import TokenizerError
from paddlemix.tokenizers import load_tokenizer as load_plain_tokenizer

MAX_LENGTH = 80
PREFIX = "summarize:"
CAPTION_PROMPT = "English caption:"


class TextEncoder:
    """Turns texts into rows of ids; see :func:`load_tokenizer`."""

    def __init__(self, tokenizer, max_length=MAX_LENGTH):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if self.bos_token_id is None or self.eos_token_id is None:
            raise TokenizerError("the tokenizer has no <s> or no </s>: take the tokenizer files of InternVL-14B-224px")

    def __call__(self, texts, prefix=PREFIX, max_length=None):
        """Ids of texts, each between start and end token and padded on the right with 0.

        Args:
            texts: list of texts; longer ones are cut so that the end token stays.
            prefix: goes before each, without a blank between.
            max_length: ids of a row, 80 by default.

        Returns:
            int64 array ``[n, max_length]``; ids above 0 are attended.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str: pass a list of texts")
        length = max_length or self.max_length
        rows = np.zeros([len(texts), length], "int64")
        for row, text in zip(rows, texts):
            ids = self._ids(prefix + text)[: length - 2]
            row[: len(ids) + 2] = [self.bos_token_id, *ids, self.eos_token_id]
        return rows

    def _ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_prompt(self, text=CAPTION_PROMPT):
        """Ids of what a caption starts from: the start token, no end token."""
        return [self.bos_token_id, *self._ids(text)]

    def decode(self, ids):
        """Text of generated ids, without special tokens and white space around it."""
        return self.tokenizer.decode([int(i) for i in np.asarray(ids).reshape(-1)], skip_special_tokens=True).strip()

    def save_pretrained(self, directory):
        """Write the tokenizer's files into ``directory``."""
        self.tokenizer.save_pretrained(directory)


def load_tokenizer(directory):
    """The :class:`TextEncoder` of a checkpoint directory.

    Raises:
        TokenizerError: the tokenizer's files are missing or broken.
    """
    return TextEncoder(load_plain_tokenizer(directory))

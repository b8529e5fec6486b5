"""Pieces of prompts."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_OR_SHORT = (
    "Answer with the option's letter from the given choices directly.",
    "Answer the question using a single word or phrase.",
)


def asked(question, instruction):
    """A question with the instruction behind it, if there is one."""
    return f"{question} {instruction}" if instruction else question


def listed(options):
    """Options, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def texts(values):
    """One text or several, as a list."""
    return [values] if isinstance(values, str) else [str(value) for value in values]

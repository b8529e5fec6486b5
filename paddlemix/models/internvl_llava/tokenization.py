"""Text with pictures in it to token ids: a picture's place is the id -200, which no text has."""

from paddlemix.checkpoints.hub import resolve
from paddlemix.files import read_json
from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER
from paddlemix.tokenizers import loading

IMAGE_TOKEN_INDEX = -200
IM_PATCH, IM_START, IM_END = "<im_patch>", "<im_start>", "<im_end>"


def load_tokenizer(name_or_path, model_base=None):
    """The tokenizer of a checkpoint, with the tokens for pictures that its configuration asks for.

    Args:
        name_or_path: directory or name of the checkpoint, or of a plain language model.
        model_base: the language model of a checkpoint that is a projector or adapters alone; its tokenizer is taken.

    Raises:
        TokenizerError, ConfigError: files are missing or broken.
    """
    import os

    directory = resolve(name_or_path)
    own = any(os.path.isfile(os.path.join(directory, name)) for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = loading.load_tokenizer(directory if own or model_base is None else resolve(model_base))
    values = read_json(os.path.join(directory, "config.json"), absent="a checkpoint directory needs its config.json")
    add_picture_tokens(tokenizer, values)
    return tokenizer


def add_picture_tokens(tokenizer, values):
    """Add the tokens that the keys of a LLaVA's ``config.json`` ask for; returns how many are new."""
    if not str(values.get("model_type", "")).startswith("llava"):
        return 0
    tokens = [IM_PATCH] * bool(values.get("mm_use_im_patch_token", True))
    tokens += [IM_START, IM_END] * bool(values.get("mm_use_im_start_end", False))
    return tokenizer.add_tokens(tokens)


def tokenize_prompt(prompt, tokenizer, start=True):
    """Ids of a text, -200 for each ``<image>`` in it.

    Every piece between the marks is tokenised by itself, as the original does, so it begins like a text of its own.

    Args:
        prompt: str.
        tokenizer: from :func:`load_tokenizer`.
        start: whether it is the start of a prompt, which gets ``<s>``.
    """
    first, *rest = prompt.split(IMAGE_PLACEHOLDER)
    ids = tokenizer.encode(first, add_special_tokens=start)
    for piece in rest:
        ids += [IMAGE_TOKEN_INDEX, *tokenizer.encode(piece, add_special_tokens=False)]
    return ids


def expand(ids, tokens):
    """``ids`` with every -200 as often as a picture has ``tokens``."""
    return [i for id_ in ids for i in ([id_] * tokens if id_ == IMAGE_TOKEN_INDEX else [id_])]

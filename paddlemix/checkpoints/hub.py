"""From the name of a published checkpoint to a directory on this machine."""

import os
import re

from paddlemix.errors import CheckpointError

from .files import find_weight_files

# Configuration and tokenizer files. Never *.py: nothing from a checkpoint is run.
_SMALL_FILES = ("*.json", "*.txt", "tokenizer.model")
# The first kind that a repository has is fetched, the others are not.
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "model_state*.pdparams")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve(name_or_path, revision=None):
    """The local directory of a checkpoint.

    A directory is returned as it is. A name such as ``OpenGVLab/InternVL2-1B`` is looked for below ``$PADDLEMIX_HOME``
    (by default ``~/.cache/paddlemix``), then in the cache of Hugging Face, and is downloaded where both lack a complete
    copy: into ``$PADDLEMIX_HOME`` where that is set, else into the cache of Hugging Face. An interrupted download is
    resumed. ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` have their usual meaning.

    Args:
        name_or_path: what looks like a path (starts with ``/``, ``.`` or ``~``, does not have exactly one slash, or
            begins with a directory that exists here) is never downloaded.
        revision: branch, tag or commit of a download.

    Raises:
        CheckpointError: there is no such directory, or the download fails.
    """
    name = os.fspath(name_or_path)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file: pass the directory of the checkpoint that it belongs to")
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{path} does not exist: pass the directory of a checkpoint, or a name such as OpenGVLab/InternVL2-1B"
        )
    home = os.environ.get("PADDLEMIX_HOME")
    own = os.path.join(os.path.expanduser(home or "~/.cache/paddlemix"), name)
    if revision is None and _is_complete(own):
        return own
    cached = _cached(name, revision)
    if cached is not None:
        return cached
    parent = os.path.dirname(name)
    if os.path.isdir(parent):
        raise CheckpointError(
            f"{name} does not exist, though the directory {parent} does, so nothing was downloaded: "
            f"correct the path, or put the checkpoint's files into {own}"
        )
    return _download(name, revision, own, own if home else None)


def _is_complete(directory):
    """Whether configuration and all weight files are there; an interrupted download leaves some of them."""
    try:
        find_weight_files(directory)
    except CheckpointError:
        return False
    return os.path.isfile(os.path.join(directory, "config.json"))


def _cached(name, revision):
    """A complete copy in the cache of Hugging Face, or None."""
    from huggingface_hub import snapshot_download  # slow to import, and not needed for local directories
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        directory = snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return directory if _is_complete(directory) else None


def _download(name, revision, own, local_dir):
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHT_FILES:
            allowed = [*_SMALL_FILES, weights]
            directory = snapshot_download(name, revision=revision, allow_patterns=allowed, local_dir=local_dir)
            if _is_complete(directory):
                return directory
    except (OSError, ValueError, RuntimeError) as error:  # the last is what its transfer library raises
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
    else:
        reason = "what could be reached has no config.json or no complete set of weights"
    raise CheckpointError(
        f"'{name}' is neither a directory nor complete in a cache, and cannot be downloaded ({reason}): where there is a "
        f"network, get its *.json, *.safetensors, *.txt and tokenizer.model, and put them into {own}, or pass the "
        "directory that has them"
    )

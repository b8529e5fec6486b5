"""From the name of a published checkpoint to a directory on this machine."""

import os
import re

from paddlemix.errors import CheckpointError
from paddlemix.extras import missing
from paddlemix.validation import shown

from .files import find_weight_files

# Configuration and tokenizer files. Never *.py: nothing from a checkpoint is run.
_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
# The first kind that a repository has is fetched, the others are not.
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "model_state*.pdparams")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class _HuggingFace:
    """Hugging Face, by its library."""

    name, key = "Hugging Face", "HUGGINGFACE"

    @staticmethod
    def cached(name, revision):
        """Where the library's cache has something of a repository, or None."""
        from huggingface_hub import snapshot_download  # slow to import, and not needed for local directories
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return snapshot_download(name, revision=revision, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            return None

    @staticmethod
    def fetch(name, revision, patterns, local_dir):
        """Download what fits ``patterns``, whole or not at all; what an interrupted run left is gone on with."""
        from huggingface_hub import snapshot_download

        return snapshot_download(name, revision=revision, allow_patterns=patterns, local_dir=local_dir)

    @staticmethod
    def cache():
        """The folder of the library's cache."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return HF_HUB_CACHE


class _ModelScope:
    """ModelScope, by its library, which compares what came with the checksums that the hub lists."""

    name, key = "ModelScope", "MODELSCOPE"

    @staticmethod
    def _library():
        # Else it asks a cloud's address for where this machine stands.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_INTRA_CLOUD", "false")
        try:
            from modelscope.hub.snapshot_download import snapshot_download
        except ModuleNotFoundError as error:
            raise CheckpointError(missing(error, "modelscope")) from None
        return snapshot_download

    @classmethod
    def cached(cls, name, revision):
        """Where the library's cache has something of a repository, or None."""
        try:
            return cls._library()(name, revision=revision, local_files_only=True)
        except CheckpointError:
            raise
        except Exception:  # the library's errors have no class in common
            return None

    @classmethod
    def fetch(cls, name, revision, patterns, local_dir):
        """Download what fits ``patterns``, whole or not at all; what an interrupted run left is gone on with."""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        return cls._library()(name, revision=revision, allow_patterns=patterns, local_dir=local_dir)

    @staticmethod
    def cache():
        """The folder of the library's cache."""
        return os.environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope")


_HUBS = {hub.key: hub for hub in (_HuggingFace, _ModelScope)}


def resolve(name_or_path, revision=None):
    """The local directory of a checkpoint.

    A directory is returned as it is. A name such as ``OpenGVLab/InternVL2-1B`` is looked for below ``$PADDLEMIX_HOME``
    (by default ``~/.cache/paddlemix``), then in the cache of Hugging Face's library, and is downloaded where both lack a
    complete copy: into ``$PADDLEMIX_HOME`` where that is set, else into that cache. An interrupted download is resumed.
    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` have their usual meaning.

    ``modelscope:OpenGVLab/InternVL2-1B`` is the same at ModelScope, through its library (extra ``modelscope``), with
    ``MODELSCOPE_CACHE`` and ``MODELSCOPE_ENDPOINT``. ``FD_MODEL_SOURCE=MODELSCOPE`` (or ``HUGGINGFACE``) chooses for names
    without ``modelscope:`` or ``huggingface:``; then ``$FD_MODEL_CACHE`` is looked at, and downloaded to, after
    ``$PADDLEMIX_HOME``.

    Args:
        name_or_path: what looks like a path (starts with ``/``, ``.`` or ``~``, does not have exactly one slash, or
            begins with a directory that exists here) is never downloaded.
        revision: branch, tag or commit of a download.

    Raises:
        CheckpointError: there is no such directory, or the download fails.
    """
    given = os.fspath(name_or_path)
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file: pass the directory of the checkpoint that it belongs to")
    hub, name, chosen = _hub_of(given)
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{path} does not exist: pass the directory of a checkpoint, or a name such as OpenGVLab/InternVL2-1B"
        )
    home, more = os.environ.get("PADDLEMIX_HOME"), os.environ.get("FD_MODEL_CACHE") if chosen else None
    folders = [os.path.join(os.path.expanduser(folder), name) for folder in (home or "~/.cache/paddlemix", more) if folder]
    if revision is None and (found := next(filter(_is_complete, folders), None)):
        return found
    cached = hub.cached(name, revision)
    if cached is not None and _is_complete(cached):
        return os.fspath(cached)
    parent = os.path.dirname(name)
    if os.path.isdir(parent) and name == given:
        raise CheckpointError(
            f"{name} does not exist, though the directory {parent} does, so nothing was downloaded: "
            f"correct the path, or put the checkpoint's files into {folders[0]}"
        )
    return _download(hub, name, revision, folders, folders[0] if home else folders[-1] if more else None)


def _hub_of(given):
    """(the hub of a name, the name there, whether somebody chose the hub)."""
    for key, hub in _HUBS.items():
        if given.startswith(f"{key.lower()}:"):
            return hub, given.partition(":")[2], True
    key = os.environ.get("FD_MODEL_SOURCE")
    if key and key not in _HUBS:
        raise CheckpointError(f"FD_MODEL_SOURCE is {shown(key)}: only {' and '.join(_HUBS)} are supported")
    return _HUBS[key or "HUGGINGFACE"], given, bool(key)


def _is_complete(directory):
    """Whether configuration and all weight files are there; an interrupted download leaves some of them."""
    try:
        find_weight_files(directory)
    except CheckpointError:
        return False
    return os.path.isfile(os.path.join(directory, "config.json"))


def _download(hub, name, revision, folders, local_dir):
    try:
        for weights in _WEIGHT_FILES:
            directory = hub.fetch(name, revision, [*_SMALL_FILES, weights], local_dir)
            if _is_complete(directory):
                return os.fspath(directory)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a hub's library raises: their errors have no class in common
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
    else:
        reason = "what could be reached has no config.json or no complete set of weights"
    looked = " or ".join([*folders, f"{hub.name}'s cache ({hub.cache()})"])
    raise CheckpointError(
        f"'{name}' is neither a directory nor complete in {looked}, and cannot be downloaded from {hub.name} ({reason}): "
        f"where there is a network, get its *.json, *.safetensors, *.txt and tokenizer.model, and put them into {folders[0]}, "
        "or pass the directory that has them"
    )

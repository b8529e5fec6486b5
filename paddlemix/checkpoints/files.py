"""The weight files of a checkpoint's directory: which there are, and their tensors."""

import contextlib
import json
import os
import re

from paddlemix.errors import CheckpointError

from .pickle_files import read_paddle_pickle, read_torch_pickle
from .safetensors_files import read_safetensors
from .tensors import name_some

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")
INDEX_FILES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
WEIGHT_SUFFIXES = tuple(os.path.splitext(name)[1] for name in SINGLE_FILES)


def find_weight_files(directory):
    """Paths of the weight files of a checkpoint, and what its index says of them.

    Returns:
        ``(paths, index)``; ``index`` maps a tensor's name to its file's, and is None for a single file.

    Raises:
        CheckpointError: there are none, the index is broken, or a file that it lists is missing.
    """
    for single, index in zip(SINGLE_FILES, INDEX_FILES):
        path = os.path.join(directory, single)
        if os.path.isfile(path):
            return [path], None
        index_path = os.path.join(directory, index)
        if not os.path.isfile(index_path):
            continue
        weight_map = _read_index(index_path)
        paths = [os.path.join(directory, name) for name in sorted(set(weight_map.values()))]
        missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of the {len(paths)} files that {index} lists "
                f"({name_some(missing)}): download or copy them again"
            )
        return paths, weight_map
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is not a directory: pass the directory of a checkpoint")
    for name in sorted(os.listdir(directory)):
        if match := re.fullmatch(r"(.+)-\d+-of-\d+(\.\w+)", name):
            index = f"{match[1]}{match[2]}.index.json"
            if index in INDEX_FILES:
                raise CheckpointError(f"{directory} has {name} but no {index}: download or copy the index as well")
    raise CheckpointError(
        f"{directory} has no weights: looked for {', '.join(SINGLE_FILES)} and for shards with an index "
        f"({', '.join(INDEX_FILES)}); download or copy them there"
    )


def _read_index(path):
    try:
        with open(path, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        valid = bool(weight_map) and all(name == os.path.basename(name) for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path} is not an index of weight files: download or copy it again")
    return weight_map


@contextlib.contextmanager
def open_weight_file(path):
    """Context manager: a dictionary of the file's tensors by name, readable until it is left.

    Raises:
        CheckpointError: the file is missing, damaged, cut short, or a pickle with anything but tensors in it.
    """
    readers = {".safetensors": read_safetensors, ".bin": read_torch_pickle, ".pdparams": read_paddle_pickle}
    if os.path.splitext(path)[1] not in readers:
        raise CheckpointError(f"{path} is not a known kind of weight file: {', '.join(readers)} are")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if file.read(24) == b"version https://git-lfs.":
            raise CheckpointError(f"{path} is a Git LFS pointer without the weights: run `git lfs pull` in its directory")
        file.seek(0)
        yield readers[os.path.splitext(path)[1]](file)

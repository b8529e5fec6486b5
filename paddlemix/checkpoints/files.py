"""The weight files of a checkpoint's directory: which there are, and their tensors."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from paddlemix.errors import CheckpointError
from paddlemix.files import check_regular, open_regular, read_json

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
        if _exists(path):
            return [path], None
        index_path = os.path.join(directory, index)
        if not _exists(index_path):
            continue
        weight_map = _read_index(index_path)
        paths = [os.path.join(directory, name) for name in sorted(set(weight_map.values()))]
        missing = [os.path.basename(path) for path in paths if not _exists(path)]
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
    weight_map = read_json(path, CheckpointError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise CheckpointError(f"{path} is not an index of weight files (key weight_map): download or copy it again")
    return weight_map


def _exists(path):
    """Whether there is a file at ``path``; what stands under the name of weights but is no file is an error."""
    try:
        check_regular(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): put the checkpoint's file there") from None
    return True


def fingerprint(path):
    """Digest that tells whether a file is still the same; None if it is gone.

    It takes in what the system knows (times, size, place on the disk), which no program can leave as it was when it
    writes, and samples of the contents. It costs a millisecond, where a digest of all of a large model costs seconds.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            digest.update(repr((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
            for i in range(64):
                digest.update(os.pread(file.fileno(), 1024, i * status.st_size // 64))
    except OSError:
        return None
    return digest.hexdigest()


@contextlib.contextmanager
def open_weight_file(path):
    """Context manager: a dictionary of the file's tensors by name, readable until it is left.

    Raises:
        CheckpointError: the file is missing, damaged, cut short, or a pickle with anything but tensors in it.
    """
    readers = {
        ".safetensors": read_safetensors,
        ".bin": read_torch_pickle,
        ".pth": read_torch_pickle,
        ".pdparams": read_paddle_pickle,
    }
    if os.path.splitext(path)[1] not in readers:
        raise CheckpointError(f"{path} is not a known kind of weight file: {', '.join(readers)} are")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            start = file.read(24)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if start == b"version https://git-lfs.":
            raise CheckpointError(f"{path} is a Git LFS pointer without the weights: run `git lfs pull` in its directory")
        file.seek(0)
        yield readers[os.path.splitext(path)[1]](file)


def model_digest(directory):
    """A digest of a checkpoint: its configuration, and of its weight files names, sizes and the first and last MiB."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(directory).iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".pdparams", ".model") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read(1 << 20))
    return digest.hexdigest()

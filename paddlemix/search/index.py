"""An index of a folder of pictures: their features in float16, their names, and how both came about.

A folder with ``index.json`` (model, its digest, mode, transform), ``names.jsonl`` (a picture's name, size and time of change a
line) and ``features.npy`` (a row a picture). ``index.json`` is written last, so what has it is whole. Above a million pictures
FAISS, where it is installed, adds ``faiss.index``, which finds nearly all of the best in a part of the time.
"""

import json
import os
import shutil
import sys

import numpy as np

from paddlemix.datasets.annotations import find_files
from paddlemix.errors import DataError
from paddlemix.evaluation.features import compute_features, digest, model_digest, open_features, readable, written

from .nearest import best

VERSION = 1
FAISS_ROWS = 1_000_000
_META, _NAMES, _FEATURES, _FAISS = "index.json", "names.jsonl", "features.npy", "faiss.index"


def build_index(embedder, folder, target, processes, progress=None):
    """Write an index of all pictures below ``folder``, or bring one up to date: pictures that did not change keep their rows.

    Args:
        embedder: :class:`~paddlemix.models.internvl.embedder.Embedder`.
        folder: the pictures.
        target: folder of the index; made if it does not exist.
        processes: :class:`~paddlemix.training.processes.Processes` that share the work.
        progress: called with the number of pictures done.

    Returns:
        :class:`Index`.

    Raises:
        DataError: there are no pictures, or ``target`` holds something else.
    """
    there = set(os.listdir(target)) if os.path.isdir(target) else set()
    if _META not in there and there - {"work", _NAMES, _FEATURES}:
        raise DataError(f"{target} is not empty and no index: give another folder to write to")
    paths = find_files(folder)
    entries = [_entry(path, folder) for path in paths]
    how = _how(embedder)
    known = _known_rows(target, how)
    new = [i for i, entry in enumerate(entries) if json.dumps(entry) not in known]
    features = np.zeros([len(paths), embedder.width], "float16")
    if new:
        chosen = [paths[i] for i in new]
        work = os.path.join(target, "work", digest(how, [entries[i] for i in new]))
        features[new] = compute_features(work, len(new), _features(embedder, chosen), processes, "float16", progress=progress)
    for i, entry in enumerate(entries):
        if (row := known.get(json.dumps(entry))) is not None:
            features[i] = row
    good = np.flatnonzero(readable(features))
    if not len(good):
        raise DataError(f"none of the pictures in {folder} can be read")
    processes.wait()
    if processes.is_first:
        _write(
            target, features[good], [entries[i] for i in good], {**how, "model": embedder.name, "root": os.path.abspath(folder)}
        )
        shutil.rmtree(os.path.join(target, "work"), ignore_errors=True)
    processes.wait(everybody=False)
    return Index(target)


def _features(embedder, paths):
    from paddlemix.evaluation.features import PictureFeatures

    return PictureFeatures(paths, embedder.read, embedder.encode, embedder.width, embedder.batch_size)


def _entry(path, folder):
    state = os.stat(path)
    return [os.path.relpath(path, folder), state.st_size, state.st_mtime_ns]


def _how(embedder):
    """What decides the features of a picture."""
    return {
        "version": VERSION,
        "digest": model_digest(embedder.directory),
        "mode": embedder.mode,
        "transform": embedder.task,
        "image_size": embedder.image_size,
    }


def _known_rows(target, how):
    """``{entry: row}`` of an index that is there already and was made alike."""
    try:
        index = Index(target)
    except DataError:
        return {}
    if {name: index.meta.get(name) for name in how} != how:
        return {}
    return {json.dumps(entry): index.features[i] for i, entry in enumerate(index.entries)}


def _write(target, features, entries, meta):
    os.makedirs(target, exist_ok=True)
    for name in (_META, _FAISS):  # from here on the old index is gone
        if os.path.exists(os.path.join(target, name)):
            os.remove(os.path.join(target, name))
    with written(os.path.join(target, _FEATURES)) as file:
        np.save(file, features)
    with written(os.path.join(target, _NAMES)) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode("ascii"))
    meta = {**meta, "pictures": len(entries), "width": features.shape[1]}
    if len(entries) > FAISS_ROWS:
        meta["faiss"] = _write_faiss(os.path.join(target, _FAISS), features)
    with written(os.path.join(target, _META)) as file:
        file.write((json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def _faiss():
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _write_faiss(path, features):
    faiss = _faiss()
    if faiss is None:
        print(
            f"the index has more than {FAISS_ROWS:,} pictures: pip install faiss-cpu and build it again for quicker searches",
            file=sys.stderr,
        )
        return False
    lists = max(1, int(4 * len(features) ** 0.5))
    index = faiss.index_factory(features.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(len(features))[: 40 * lists]
    index.train(np.asarray(features[np.sort(sample)], "float32"))
    for start in range(0, len(features), 65536):
        index.add(np.asarray(features[start : start + 65536], "float32"))
    index.nprobe = max(1, lists // 32)
    faiss.write_index(index, path)
    return True


class Index:
    """An index that is there.

    Attributes:
        meta: what ``index.json`` says.
        entries: ``[name, size, time]`` of each picture.
        features: ``[pictures, E]`` float16, mapped.

    Raises:
        DataError: the folder holds no whole index.
    """

    def __init__(self, folder):
        self.folder = os.fspath(folder)
        path = os.path.join(self.folder, _META)
        try:
            with open(path, encoding="utf-8") as file:
                self.meta = json.load(file)
            with open(os.path.join(self.folder, _NAMES), encoding="ascii") as file:
                self.entries = [json.loads(line) for line in file]
            valid = self.meta["version"] == VERSION and all(isinstance(entry[0], str) for entry in self.entries)
        except OSError as error:
            raise DataError(
                f"{self.folder} holds no index ({error.filename}: {error.strerror}): build one with --index"
            ) from None
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            valid = False
        if not valid:
            raise DataError(f"{path} cannot be understood: build the index again with --index")
        self.features = open_features(os.path.join(self.folder, _FEATURES), len(self.entries))

    def __len__(self):
        return len(self.entries)

    def path(self, row):
        """Where a picture was when it was indexed."""
        return os.path.join(self.meta.get("root", ""), self.entries[row][0])

    def check(self, embedder):
        """Raise DataError where the index is of another model, or of another way of reading pictures."""
        for name, value in _how(embedder).items():
            if self.meta.get(name) != value:
                raise DataError(
                    f"the index {self.folder} was made with {name} {self.meta.get(name)}, not {value}: use the model "
                    f"that it names ({self.meta.get('model')}), or build it again"
                )

    def search(self, queries, k=10, exact=False):
        """The pictures closest to each query.

        Args:
            queries: ``[q, E]``, normalised.
            k: how many.
            exact: look at every picture even if FAISS could spare it.

        Returns:
            (scores ``[q, k]`` float32, descending; rows ``[q, k]`` int64).
        """
        queries = np.asarray(queries, "float32")
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise DataError(f"queries must be [number, {self.features.shape[1]}], not {list(queries.shape)}")
        path = os.path.join(self.folder, _FAISS)
        faiss = None if exact or not os.path.exists(path) else _faiss()
        if faiss is None:
            return best(self.features, queries, k)
        index = faiss.read_index(path)
        scores, rows = index.search(np.ascontiguousarray(queries), min(k, len(self)))
        return scores, rows

"""Questions, and reading the files that they come from: json, jsonl, tsv, csv and parquet, where a broken row is no end."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from paddlemix.errors import DataError
from paddlemix.files import read_regular

MOST_BYTES = 16 << 30  # of a file; MMBench's tables hold their pictures


@dataclass
class Question:
    """A question of a benchmark.

    Attributes:
        id: unique in its data set.
        prompt: the text, without the marks of pictures that chat adds.
        pictures: paths or encoded bytes.
        reference: what the scorer needs, without the id.
        clip: settings of :func:`~.media.frames` where the pictures are those of a clip.
        record: further fields of its line in ``answers.jsonl``.
        error: why it cannot be asked, or None.
    """

    id: object
    prompt: str = ""
    pictures: tuple = ()
    reference: dict = field(default_factory=dict)
    clip: dict | None = None
    record: dict = field(default_factory=dict)
    error: str | None = None


def find(root, *names):
    """The first of some places below the data folder that exists, or else the first; a leading ``data/`` stands for it."""
    places = [Path(root) / name.removeprefix("./").removeprefix("data/") for name in names]
    return next((place for place in places if place.exists()), places[0])


def picture(root, name, folder=""):
    """Where the picture ``name`` of a row is: as named below the data folder, or in ``folder`` of it."""
    if name.removeprefix("./").startswith("data/"):
        return str(find(root, name))
    return str(find(root, f"{folder}/{name}" if folder else name, name, f"{folder}/images/{name}"))


def read_text(path):
    """Text of a file.

    Raises:
        DataError: it is missing, or no text.
    """
    try:
        return read_regular(path, MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: docs/evaluation.md says where it comes from, --data_root where it is") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): get it again") from None


def read_json(path):
    """Contents of a JSON file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): get it again") from None


def read_lines(path):
    """Rows of a JSON-lines file; a broken line is a text that says what is wrong."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append(row if isinstance(row, dict) else f"line {number} of {path} is no JSON object")
            except (ValueError, RecursionError):
                rows.append(f"line {number} of {path} is not valid JSON")
    return rows


def read_table(path, separator="\t"):
    """Rows of a table with a head, as pandas reads them: empty cells are left out."""
    import pandas

    if not Path(path).is_file():
        raise DataError(f"{path} is missing: docs/evaluation.md says where it comes from, --data_root where it is")
    try:
        frame = pandas.read_csv(path, sep=separator)
    except (ValueError, OSError, pandas.errors.ParserError) as error:
        raise DataError(f"{path} is no table ({str(error).splitlines()[0]}): get it again") from None
    return [_without_gaps(row) for row in frame.to_dict("records")]


def _without_gaps(row):
    return {key: value for key, value in row.items() if not (isinstance(value, float) and value != value)}


def read_parquet(root, folder, pattern):
    """Rows of all Parquet files below a folder whose path fits ``pattern``, in the order of their names."""
    import pyarrow.parquet

    paths = sorted(Path(root, folder).rglob(pattern))
    if not paths:
        raise DataError(f"{Path(root, folder)} has no file {pattern}: docs/evaluation.md says where the data comes from")
    rows = []
    for path in paths:
        try:
            rows += [(path, row) for row in pyarrow.parquet.read_table(path).to_pylist()]
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}): get it again") from None
    return rows


def questions(rows, make):
    """``make(row, number)`` for each row; what cannot become a question is one with an ``error``.

    Ids are made unique: the second of the same gets a number behind it.
    """
    made, seen = [], {}
    for number, row in enumerate(rows):
        try:
            question = Question(f"row {number + 1}", error=row) if isinstance(row, str) else make(row, number)
        except DataError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            question = Question(f"row {number + 1}", error=f"row {number + 1} cannot be used: {what}")
        times = seen[str(question.id)] = seen.get(str(question.id), 0) + 1
        if times > 1:
            question.id = f"{question.id}#{times}"
        made.append(question)
    return made

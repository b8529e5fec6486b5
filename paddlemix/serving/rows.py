"""The files of an offline batch: rows of requests in, a line for each out, and what a run that was ended early left.

A request is OpenAI's (``{custom_id, method, url, body}``) or short (``{id, image or images, video or videos, text}`` and any
field of a request). Lines are written as answers come, each whole before it counts; one that a kill cut off is written again.
"""

import hashlib
import json
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from paddlemix.errors import DataError
from paddlemix.files import lock, open_regular, whole_lines, write_whole

__all__ = ["AnswerFile", "Row", "RowError", "pictures_as_rows", "read_row", "read_rows"]

_MOST_LINE = 256 << 20
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_URLS = ("data:", "http:", "https:", "file:")


class RowError(Exception):
    """A row that cannot be answered: what is wrong with it, without its number."""


@dataclass
class Row:
    """A row: its ``number`` from 1 on, ``name`` (``custom_id`` or ``id``), the ``request``, and whether it is in OpenAI's form.

    ``error`` says what is wrong where there is no request. ``key`` tells rows apart across runs.
    """

    number: int
    name: object = None
    request: dict | None = None
    openai: bool = False
    error: str | None = None
    key: str = ""


def _refuse(name):
    raise ValueError(name)


def read_row(number, line, folder, defaults):
    """The :class:`Row` of a line.

    Args:
        number: from 1 on.
        line: bytes.
        folder: that relative paths of pictures start from.
        defaults: fields of a request where a row does not say.
    """
    row = Row(number, number)  # until it says its own name
    try:
        try:
            value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse)
        except (ValueError, RecursionError):
            raise RowError("it is not valid JSON") from None
        if not isinstance(value, dict):
            raise RowError("it is not a JSON object")
        row.openai = "custom_id" in value or "body" in value
        row.name = value.get("custom_id") if row.openai else value.get("id", number)
        if isinstance(row.name, bool) or not isinstance(row.name, str if row.openai else (str, int)):
            row.name = None if row.openai else number
            raise RowError("custom_id must be a text" if row.openai else "id must be a text or a number")
        row.request = {**defaults, **(_openai(value) if row.openai else _short(value, folder))}
    except RowError as error:
        row.error = str(error)
    return row


def _openai(value):
    if value.get("method", "POST") != "POST" or value.get("url", "/v1/chat/completions") != "/v1/chat/completions":
        raise RowError("method and url must be POST and /v1/chat/completions")
    if not isinstance(value.get("body"), dict):
        raise RowError("body must be a request")
    if value["body"].get("stream"):
        raise RowError("stream makes no sense in a file: leave it out")
    return value["body"]


def _short(value, folder):
    value = dict(value)
    value.pop("id", None)
    parts = []
    for kind in ("image", "video"):
        found = [value.pop(name, None) for name in (kind, f"{kind}s")]
        if None not in found:
            raise RowError(f"{kind} and {kind}s are one and the same: give one")
        paths = next((paths for paths in found if paths is not None), [])
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise RowError(f"{kind} must be a path or an address, {kind}s a list of them")
        for path in paths:
            parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": _url(path, folder)}})
    text = value.pop("text", None)
    if not isinstance(text, str):
        raise RowError("text must be the question")
    parts.append({"type": "text", "text": text})
    if "messages" in value or value.get("stream"):
        raise RowError("messages and stream are none of the short form: give text")
    return {"temperature": 0, **value, "messages": [{"role": "user", "content": parts}]}


def _url(path, folder):
    if path[:6].lower().startswith(_URLS):
        return path
    if "\0" in path:
        raise RowError("a path holds a zero byte")
    return "file://" + urllib.parse.quote(os.path.abspath(os.path.join(folder, path)).encode("utf-8", "surrogatepass"))


def read_rows(path, folder, defaults):
    """(digest of the file, a function that gives its rows from the first on).

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            digest = hashlib.blake2b(digest_size=16)
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from None

    def rows():
        number = 0
        with open_regular(path) as file:
            while line := file.readline(_MOST_LINE):
                number += 1
                if len(line) == _MOST_LINE and not line.endswith(b"\n"):
                    while piece := file.readline(_MOST_LINE):
                        if piece.endswith(b"\n"):
                            break
                    yield Row(number, number, error=f"its line is longer than {_MOST_LINE >> 20} MB")
                elif line.strip():
                    yield read_row(number, line, folder, defaults)

    return digest.hexdigest(), lambda: _keyed(rows())


def pictures_as_rows(directory, text, defaults):
    """The same for the pictures below a folder, each with the question ``text``; a row's id is its path from there.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    found = sorted(
        os.path.relpath(os.path.join(where, name), directory)
        for where, _, names in os.walk(directory)
        for name in names
        if name.lower().endswith(_PICTURES)
    )
    if not found:
        raise DataError(f"--images {directory} holds no pictures ({', '.join(_PICTURES)}): check the path")
    digest = hashlib.blake2b("\n".join([text, *found]).encode("utf-8", "surrogatepass"), digest_size=16)

    def rows():
        for number, name in enumerate(found, 1):
            request = {**defaults, **_short({"image": name, "text": text}, directory)}
            yield Row(number, name.encode("utf-8", "replace").decode(), request)

    return digest.hexdigest(), lambda: _keyed(rows())


def _keyed(rows):
    """Rows with their keys; an id that was there before is an error of the later row."""
    seen = {}
    for row in rows:
        if row.error is None:
            first = seen.setdefault((row.openai, row.name), row.number)
            if first != row.number:
                row.error = f"row {first} has the same {'custom_id' if row.openai else 'id'}"
        row.key = f"row {row.number}" if row.error else json.dumps([row.openai, row.name])
        yield row


def line_of(row, status=None, body=None):
    """The line that answers a row; without ``status`` it is the row's own error."""
    if row.error is not None:
        error = {"code": "invalid_row", "message": f"row {row.number}: {row.error}"}
        if row.openai:
            return {"id": _line_id(row), "custom_id": row.name, "response": None, "error": error}
        return {"id": row.name, "error": {**error, "row": row.number}}
    problem = body["error"] if status != 200 else None
    if row.openai:
        error = None if problem is None else {"code": problem["code"] or problem["type"], "message": problem["message"]}
        response = {"status_code": status, "request_id": _line_id(row).replace("batch_req", "req"), "body": body}
        return {"id": _line_id(row), "custom_id": row.name, "response": response, "error": error}
    if problem is not None:
        return {"id": row.name, "error": problem}
    texts = [choice["message"]["content"] for choice in body["choices"]]
    thought = body["choices"][0]["message"].get("reasoning")
    return {"id": row.name, "answer": texts[0] if len(texts) == 1 else texts, **({"reasoning": thought} if thought else {})}


def _line_id(row):
    """OpenAI's name of an answer: the row's number, and a digest of its name."""
    digest = hashlib.blake2b(json.dumps(row.name).encode(), digest_size=8).hexdigest()
    return f"batch_req_{row.number:08d}_{digest}"


def _key_of(line):
    """The key of the row that a line answers."""
    openai, error = "custom_id" in line, line.get("error") or {}
    if error.get("code") == "invalid_row":
        return f"row {int(line['id'].split('_')[2]) if openai else error['row']}"
    return json.dumps([openai, line["custom_id" if openai else "id"]])


class AnswerFile:
    """The file that answers go to, with what they were made with beside it (``NAME.run.json``).

    Args:
        path: of the file.
        settings: what must be alike for answers to belong together.

    Attributes:
        done: keys of the rows that are answered; ``failed`` those of them that are errors.

    Raises:
        DataError: it holds answers of other settings or something else, another run writes to it, or it cannot be written.
    """

    def __init__(self, path, settings):
        self.path, self.done, self.failed = Path(path), set(), set()
        known = self.path.with_name(f"{self.path.name}.run.json")
        try:
            self._file = open(self.path, "ab+")  # noqa: SIM115 - closed by finish
            lock(self._file)
            if os.fstat(self._file.fileno()).st_size:
                self._check(known, settings)
                self._take_over()
            else:
                write_whole(known, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}): make room, or use another") from None

    def _check(self, known, settings):
        try:
            before = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(f"{self.path} exists and {known.name} does not say what made it: use another file") from None
        for name, value in settings.items():
            if before.get(name) != value:
                raise DataError(
                    f"{self.path} holds answers with {name} {before.get(name)!r} instead of {value!r}: use another file"
                )

    def _take_over(self):
        """Note what is answered; a last line that was cut is taken back."""
        for number, line in whole_lines(self._file):
            try:
                value = json.loads(line)
                key = _key_of(value)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                raise DataError(f"{self.path}: line {number} is no answer of this command: use another file") from None
            self.done.add(key)
            if value.get("error") is not None:
                self.failed.add(key)

    def add(self, row, line):
        """Write the line of a row."""
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()  # in the system's hands: a kill loses nothing, a power cut at most the last seconds
        self.done.add(row.key)
        if line.get("error") is not None:
            self.failed.add(row.key)

    def finish(self, rows=None):
        """Close the file; with ``rows`` its lines are put in their order, all at once."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if rows is not None:
            places, at = {}, 0
            self._file.seek(0)
            for line in self._file:
                places[_key_of(json.loads(line))] = (at, len(line))
                at += len(line)
            order = [places[row.key] for row in rows if row.key in places]
            if order != sorted(order):
                self._rewrite(order)
        self._file.close()

    def _rewrite(self, order):
        unfinished = self.path.with_name(f".{self.path.name}.tmp")
        with open(unfinished, "wb") as file:
            for at, count in order:
                self._file.seek(at)
                file.write(self._file.read(count))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

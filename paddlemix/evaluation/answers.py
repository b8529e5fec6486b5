"""The folder of a run: answers as they come, what the run was, and the score. An interrupted run loses no answer written."""

import json
import os
from pathlib import Path

from paddlemix.errors import ConfigError, DataError
from paddlemix.files import naming, read_json, write_whole


def write_json(path, values):
    """Write a JSON file, whole or not at all."""
    write_whole(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def lines_of(rows):
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_answers(path):
    """Lines of an answer file; a last line that was cut is left out.

    Raises:
        DataError: another line is no JSON object.
    """
    if not Path(path).exists():
        return []
    lines = Path(path).read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError
            found.append(row)
        except ValueError:
            if number == len(lines):
                break  # cut off by what ended the run
            raise DataError(f"{path}: line {number} is no JSON object: take it out, or use --no_resume") from None
    return found


def _belongs(row, ids):
    """Whether an answer is that of the question of its index."""
    index = row.get("index")
    if not isinstance(index, int) or not isinstance(row.get("answer"), str):
        return False
    return ids is None or (0 <= index < len(ids) and str(row.get("id")) == ids[index])


class RunFolder:
    """``OUT/T``: opens or resumes a run.

    Args:
        directory: of the task.
        settings: what must be alike for answers to belong together.
        resume: go on with what is there; otherwise it is moved aside.
        told: what ``run.json`` holds beside them.
        ids: of the questions in data order; answers that belong to none go to ``without_question.jsonl``. None: any belongs.

    Attributes:
        done: ``{index: row}`` of what was answered.
        strangers: how many answers belong to no question.

    Raises:
        ConfigError: it holds answers of a run with other settings.
    """

    def __init__(self, directory, settings, resume=True, told=None, ids=None):
        self.directory = Path(directory)
        if not resume and self.directory.exists():
            number = 1
            while self.directory.with_name(f"{self.directory.name}.{number}").exists():
                number += 1
            self.directory.rename(self.directory.with_name(f"{self.directory.name}.{number}"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "answers.jsonl"
        known = self.directory / "run.json"
        if known.exists():
            before = read_json(known, DataError, absent="use --no_resume to begin anew")
            for name, value in settings.items():
                if before.get(name) != value:
                    raise ConfigError(
                        f"{self.directory} holds answers of a run with {name} {before.get(name)!r} instead of {value!r}: use "
                        "another --out_dir, or --no_resume to move them aside"
                    )
        else:
            write_json(known, {**settings, **(told or {})})
        strangers, self.done = [], {}
        for row in read_answers(self.path):
            if not _belongs(row, ids):
                strangers.append(row)
            elif "error" not in row:
                self.done[row["index"]] = row
        self.strangers = len(strangers)
        if strangers:
            with open(self.directory / "without_question.jsonl", "ab") as file:
                file.write(lines_of(strangers).encode("utf-8"))
        self._rewrite(self.done)
        self._file = None

    def _rewrite(self, rows):
        write_whole(self.path, lines_of(rows[index] for index in sorted(rows)))

    def add(self, rows):
        """Write answers; they are on the disk when this returns."""
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by finish; what fails is not tried again
        with naming(self.path):
            left = memoryview(lines_of(rows).encode("utf-8"))
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        self.done |= {row["index"]: row for row in rows}

    def finish(self):
        """Put the answers in the order of the data and return them."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._rewrite(self.done)
        return [self.done[index] for index in sorted(self.done)]

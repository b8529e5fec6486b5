"""The folder of a run: answers as they come, what the run was, and the score. An interrupted run loses no answer written."""

import json
import os
from pathlib import Path

from paddlemix.errors import ConfigError, DataError


def write_json(path, values):
    """Write a JSON file, whole or not at all."""
    unfinished = Path(path).with_name(f".{Path(path).name}.tmp")
    unfinished.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


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


class RunFolder:
    """``OUT/T``: opens or resumes a run.

    Args:
        directory: of the task.
        settings: what must be alike for answers to belong together.
        resume: go on with what is there; otherwise it is moved aside.

    Raises:
        ConfigError: it holds answers of a run with other settings.
    """

    def __init__(self, directory, settings, resume=True):
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
            before = json.loads(known.read_text(encoding="utf-8"))
            for name, value in settings.items():
                if before.get(name) != value:
                    raise ConfigError(
                        f"{self.directory} holds answers of a run with {name} {before.get(name)!r} instead of {value!r}: use "
                        "another --out_dir, or --no_resume to move them aside"
                    )
        else:
            write_json(known, settings)
        self.done = {row["index"]: row for row in read_answers(self.path) if "error" not in row and "index" in row}
        self._rewrite(self.done)
        self._file = None

    def _rewrite(self, rows):
        unfinished = self.path.with_name(".answers.tmp")
        with open(unfinished, "w", encoding="utf-8") as file:
            for index in sorted(rows):
                file.write(json.dumps(rows[index], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def add(self, rows):
        """Write answers; they are on the disk when this returns."""
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by finish
        for row in rows:
            self.done[row["index"]] = row
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self):
        """Put the answers in the order of the data and return them."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._rewrite(self.done)
        return [self.done[index] for index in sorted(self.done)]

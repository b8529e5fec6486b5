"""Files for the servers and judges that score a benchmark."""

import json
import re
from pathlib import Path

from .answers import write_json
from .scorers.choices import choose

_CAMERAS = {
    "CAM_FRONT_LEFT": (0, 0),
    "CAM_FRONT": (1, 0),
    "CAM_FRONT_RIGHT": (2, 0),
    "CAM_BACK_LEFT": (0, 1),
    "CAM_BACK": (1, 1),
    "CAM_BACK_RIGHT": (2, 1),
}
_MARK = re.compile(r"<(c[^,<>]*),\s*([^,<>]*),\s*\[\s*(-?[0-9]*\.?[0-9]+)\s*,\s*(-?[0-9]*\.?[0-9]+)\s*\]\s*>")


def camera_marks(text):
    """DriveLM's answer with ``<c1,CAM,[x,y]>`` in thousandths of the stitched picture as pixels of the 1600 x 900 camera."""

    def pixels(match):
        tag, camera, x, y = match.groups()
        if camera not in _CAMERAS:
            return match[0]
        column, line = _CAMERAS[camera]
        across = (float(x) / 1000 * 3 - column) * 1600
        down = (float(y) / 1000 * 2 - line) * 900
        return f"<{tag},{camera},{round(max(0, min(1600, across)), 1)},{round(max(0, min(900, down)), 1)}>"

    return _MARK.sub(pixels, text.strip())


def _letter(row):
    options = row["reference"].get("options") or {}
    return choose(row["answer"], options) if options else row["answer"]


def write_submission(task, rows, directory):
    """Write the file that ``task.submission`` names; returns its path."""
    directory = Path(directory)
    kind = task.submission
    if kind in ("mmbench", "ccbench"):
        return write_table(kind, rows, directory / "submission.xlsx")
    if kind == "llava":
        from .llava import answer_lines
        from .llava_scores import write_server_file

        path = directory / "llava.jsonl"
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in answer_lines(rows, directory.parent.name)]
        path.write_text("".join(lines), encoding="utf-8")
        return write_server_file(task, rows, directory) or path
    path = directory / "submission.json"
    if kind == "by_id":
        values = {str(row["id"]): _letter(row) for row in rows}
    elif kind == "vizwiz":
        values = [{"image": row["image"].split("/")[-1], "answer": row["answer"]} for row in rows]
    elif kind in ("question_id", "questionId"):
        values = [{kind: row["id"], "answer": row["answer"]} for row in rows]
    elif kind == "mathvista":
        values = {str(row["id"]): {**row["reference"], "pid": row["id"], "response": row["answer"]} for row in rows}
    elif kind == "drivelm":
        values = [
            {
                "question": r.get("question_old"),
                "answer": camera_marks(r["answer"]),
                "gt_answers": r.get("gt_answers"),
                "id": r["id"],
            }
            for r in rows
        ]
    elif kind == "mmhal":
        values = [{**row["reference"], "model_answer": row["answer"]} for row in rows]
    else:  # a line for each answer, as LLaVA-Bench's scripts read them
        path = directory / "submission.jsonl"
        lines = [{"question_id": r["id"], "text": r["answer"]} for r in rows]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return path
    write_json(path, values)
    return path


def write_table(kind, rows, path):
    """MMBench's table without some columns, with the prediction."""
    import openpyxl

    table = [dict(row["table"]) for row in rows if "table" in row]
    predictions = [_letter(row) for row in rows if "table" in row]
    dropped = {"category", "image"}
    if kind == "mmbench":
        dropped |= {"hint", "source", "comment", "l2-category"}
    columns = list(dict.fromkeys(name for row in table for name in row if name not in dropped))
    columns.insert(min(len(columns), 6 if kind == "mmbench" else 8), "prediction")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(columns)
    for row, prediction in zip(table, predictions):
        sheet.append([prediction if name == "prediction" else row.get(name) for name in columns])
    unfinished = path.with_name(".submission.xlsx")
    book.save(unfinished)
    unfinished.replace(path)
    return path

"""The ten results of LLaVA's evaluation: what is true, from the benchmarks' own files below the data folder, and server files.

Where a set's truth is not there, its answers are written all the same, and nothing is scored.
"""

import re
from pathlib import Path

from .answers import write_json
from .rows import find, read_json, read_lines, read_text
from .scorers import mean, scorer
from .scorers.vqa import normalize_answer

# Scorer of each set and the score that is meant; those without one end in a file for a server.
SCORERS = {
    "llava-gqa": ("gqa", "accuracy"),
    "llava-pope": ("pope", "f1"),
    "llava-mme": ("mme", "total"),
    "llava-textvqa": ("vqa", "accuracy"),
    "llava-sqa": ("science", "accuracy"),
    "llava-mmbench": ("letter", "accuracy"),
    "llava-llavabench": ("llava_bench", "all"),
    "llava-mmvet": ("judged", "accuracy"),
}
JUDGES = {"llava-llavabench": "llava_bench", "llava-mmvet": "mmvet"}


def science(references, answers):
    """ScienceQA as LLaVA scores it: a letter, ``X. text``, or ``The answer is X.``; of all, and of those with a picture."""
    each = []
    for reference, answer in zip(references, answers):
        text, letters = answer or "", reference["options"]
        found = re.findall(r"The answer is ([A-Z])\.", text)
        begins = text in letters or text[1:3] == ". "
        said = [text[:1]] if begins else found
        each.append(float(said == [reference["answer"]]))
    pictured = [value for reference, value in zip(references, each) if reference["picture"]]
    return {"accuracy": mean(each), "image_accuracy": mean(pictured)}, each


def score_known(name):
    """A scorer of the set ``name`` that leaves out questions whose truth is not known; None for sets of servers."""
    if name not in SCORERS:
        return None
    kind = SCORERS[name][0]
    if kind in ("llava_bench", "judged"):
        return kind
    function = science if kind == "science" else scorer(kind)

    def score(references, answers):
        known = [(reference, answer) for reference, answer in zip(references, answers) if len(reference) > 1]
        scores, each = function(*map(list, zip(*known))) if known else ({}, [0.0] * len(references))
        return ({**scores, "not_scored": len(references) - len(known)} if len(known) < len(references) else scores), each

    return score


# ---------------------------------------------------------------------- what is true


def _first_line(text):
    return text.split("\n")[0].strip().lower()


def _read(root, reader, *names):
    path = find(root, *names)
    return reader(path) if path.exists() else None


def _gqa(root, rows):
    truths = _read(root, read_json, "gqa/data/testdev_balanced_questions.json", "gqa/testdev_balanced_questions.json") or {}
    found = {str(identity): {"answers": [row["answer"]]} for identity, row in truths.items()}
    return [found.get(str(row["question_id"]), {}) for row in rows]


def _pope(root, rows):
    labels = {}
    for category in ("adversarial", "popular", "random"):
        for row in _read(root, read_lines, f"pope/coco/coco_pope_{category}.json", f"pope/coco_pope_{category}.json") or ():
            if isinstance(row, dict):
                labels[category, row["image"], _first_line(row["text"])] = row["label"]
    keys = [(row.get("category"), row["image"], _first_line(row["text"])) for row in rows]
    return [{"category": key[0], "label": labels[key]} if key in labels else {} for key in keys]


def _mme(root, rows):
    truths, release = {}, "MME/MME_Benchmark_release_version"
    found = []
    for row in rows:
        category, name = row["question_id"].split("/")[0], Path(row["question_id"]).name
        if (category, name) not in truths:
            stem = Path(name).stem
            places = (f"{release}/{category}/{part}{stem}.txt" for part in ("questions_answers_YN/", ""))
            lines = (_read(root, read_text, *places) or "").splitlines()
            truths[category, name] = dict(line.strip().split("\t")[:2] for line in lines if "\t" in line)
        asked = row["text"].replace("Answer the question using a single word or phrase.", "").strip()
        pairs = {key.replace("Please answer yes or no.", "").strip(): value for key, value in truths[category, name].items()}
        answer = pairs.get(asked.replace("Please answer yes or no.", "").strip())
        found.append({"category": category, "image": name, "answer": answer} if answer else {})
    return found


def _textvqa(root, rows):
    truths = _read(root, read_json, "textvqa/TextVQA_0.5.1_val.json") or {"data": []}
    found = {(str(row["image_id"]), _first_line(row["question"])): row["answers"] for row in truths["data"]}
    keys = [(str(row["question_id"]), _first_line(row["text"])) for row in rows]
    return [{"answers": found[key]} if key in found else {} for key in keys]


def _science(root, rows):
    problems = _read(root, read_json, "scienceqa/problems.json") or {}
    found = []
    for row in rows:
        problem = problems.get(str(row["id"]))
        letters = "ABCDE"[: len(problem["choices"])] if problem else ""
        found.append(
            {"options": list(letters), "answer": letters[int(problem["answer"])], "picture": bool(row.get("image"))}
            if problem
            else {}
        )
    return found


def _mmbench(root, rows):
    found = []
    for row in rows:
        options = {letter: row[letter] for letter in "ABCD" if row.get(letter) not in (None, "", "nan")}
        known = {"options": options, "answer": row.get("answer"), "category": row.get("category")}
        found.append(known if row.get("answer") else {})
    return found


def _llavabench(root, rows):
    place = "llava-bench-in-the-wild"
    lines = _read(root, read_lines, f"{place}/context.jsonl") or ()
    contexts = {row["image"]: row["caption"] for row in lines if isinstance(row, dict)}
    lines = _read(root, read_lines, f"{place}/answers_gpt4.jsonl") or ()
    theirs = {str(row["question_id"]): row["text"] for row in lines if isinstance(row, dict)}
    return [
        {
            "category": row.get("category"),
            "question": row["text"],
            "context": contexts.get(row["image"]),
            "answer": theirs.get(str(row["question_id"])),
        }
        for row in rows
    ]


def _mmvet(root, rows):
    truths = _read(root, read_json, "mm-vet/mm-vet.json") or {}
    known = [truths.get(f"v1_{row['question_id']}", {}) for row in rows]
    return [{"question": row["text"], "answer": truth.get("answer")} for row, truth in zip(rows, known)]


_TRUTHS = {
    "llava-gqa": _gqa,
    "llava-pope": _pope,
    "llava-mme": _mme,
    "llava-textvqa": _textvqa,
    "llava-sqa": _science,
    "llava-mmbench": _mmbench,
    "llava-llavabench": _llavabench,
    "llava-mmvet": _mmvet,
}


def truths(name, root, rows):
    """What scoring needs of each of the ``rows`` of a set's question file; empty where it is not known."""
    return _TRUTHS[name](root, rows) if name in _TRUTHS else [{} for _ in rows]


# ---------------------------------------------------------------------- files for servers


def write_server_file(task, rows, directory):
    """The file that a benchmark's server takes, as LLaVA's scripts make it; None for sets that are scored here."""
    known = [(row["llava"], row["answer"]) for row in rows if "llava" in row]
    path = Path(directory) / "submission.json"
    if task.name == "llava-vqav2":
        write_json(path, [{"question_id": row["question_id"], "answer": normalize_answer(text)} for row, text in known])
    elif task.name == "llava-vizwiz":
        pictures = [row["image"] for row in rows if "llava" in row]
        write_json(path, [{"image": name, "answer": normalize_answer(text)} for name, (_, text) in zip(pictures, known)])
    elif task.name == "llava-mmvet":
        write_json(path, {f"v1_{row['question_id']}": text for row, text in known})
    elif task.name == "llava-mmbench":
        from .submissions import write_table

        return write_table("mmbench", rows, path.with_suffix(".xlsx"))
    else:
        return None
    return path

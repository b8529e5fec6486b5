"""Data sets that are drawn in their real layouts: right answers score full, wrong ones do not, and prompts are the original's.

What answers here is a stub in the place of a model, but for the last tests; ``test_runner.py`` asks the demo model.
"""

import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from paddlemix.evaluation.answers import read_answers
from paddlemix.evaluation.local import in_groups
from paddlemix.evaluation.media import encoded, frames
from paddlemix.evaluation.runner import Settings, run_task
from paddlemix.evaluation.scorers.vqa import tables
from paddlemix.evaluation.tasks import LETTER, SHORT, TASKS
from paddlemix.examples.internvl2 import cli, evaluate
from paddlemix.examples.internvl2.demo_model import questions

ROWS = 12
ADAPTATION = "InternVL-Domain-Adaptation-Data"
CAPTION = "Provide a one-sentence caption for the provided image."


class Stub:
    """Answers by a function of the question; opens all pictures, as a model would."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def batch_size(self, task):
        return 5

    def encode(self, task, question):
        if question.error:
            return question, question.error
        for picture in frames(question) if question.clip else question.pictures:
            encoded(picture)
        return question, question.prompt

    def answers(self, task, items):
        return in_groups(self, task, items)

    def answer(self, task, items):
        results = []
        for item in items:
            if isinstance(item[1], str) and item[0].error:
                results.append({"question": item[0].prompt, "answer": "", "error": item[1]})
            else:
                results.append({"question": item[1], "answer": self.reply(item[0])})
        return results


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(5)
    return [questions.shapes(rng)[0][0] for _ in range(ROWS)]


def png(picture, form="PNG"):
    stream = io.BytesIO()
    picture.save(stream, form)
    return stream.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def parquet(path, rows):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as tables_on_disk
    from pyarrow import Table

    path.parent.mkdir(parents=True, exist_ok=True)
    tables_on_disk.write_table(Table.from_pylist(rows), path)


def coco(root, scenes):
    rows = [{"image": f"coco/val2014/COCO_val2014_{i + 1:012d}.jpg", "caption": [f"a shape {i}"]} for i in range(ROWS)]
    put(root / "coco/annotations/coco_karpathy_test.json", rows)
    truth = {
        "images": [{"id": i + 1} for i in range(ROWS)],
        "annotations": [{"image_id": i + 1, "id": i, "caption": f"A drawing of number {i} on grey."} for i in range(ROWS)],
    }
    put(root / "coco/annotations/coco_karpathy_test_gt.json", truth)
    for i, scene in enumerate(scenes):
        put(root / f"coco/val2014/COCO_val2014_{i + 1:012d}.jpg", png(scene, "JPEG"))
    return CAPTION, lambda q: q.reference["captions"][0], "CIDEr", None


def flickr(root, scenes):
    images = [{"id": 7 + i, "image": f"flickr30k/Images/{i}.jpg"} for i in range(ROWS)]
    captions = [{"image_id": 7 + i, "caption": f"A drawing of number {i} on grey."} for i in range(ROWS)]
    put(root / "flickr30k/flickr30k_test_karpathy.json", {"images": images, "annotations": captions})
    for i, scene in enumerate(scenes):
        put(root / f"flickr30k/Images/{i}.jpg", png(scene, "JPEG"))
    return CAPTION, lambda q: q.reference["captions"][0], "CIDEr", None


def nocaps(root, scenes):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(ROWS)]
    captions = [{"image_id": i, "caption": f"A drawing of number {i} on grey."} for i in range(ROWS)]
    put(root / "nocaps/nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    for i, scene in enumerate(scenes):
        put(root / f"nocaps/images/{i}.jpg", png(scene, "JPEG"))
    return CAPTION, lambda q: q.reference["captions"][0], "CIDEr", None


def mme(root, scenes):
    for category in ("existence", "OCR", "code_reasoning"):
        lines = []
        for i in range(4):
            name = f"{i}.png"
            put(root / "mme/MME_Benchmark_release_version" / category / name, png(scenes[i]))
            lines += [f"{name}\tIs it red? Please answer yes or no.\tYes", f"{name}\tIs it blue? Please answer yes or no.\tNo"]
        put(root / f"mme/Your_Results/{category}.txt", "\n".join(lines) + "\n")
    return f"Is it red? Please answer yes or no. {SHORT}", lambda q: q.reference["answer"], "total", 600


def seed(root, scenes):
    rows = [
        {"image": f"SEED-Bench-image/{i}", "text": f"What?\nA. x\n{LETTER}", "question_id": f"v{i}", "answer": "B"}
        for i in range(ROWS)
    ]
    put(root / "SEED/seed.jsonl", rows)
    kinds = [{"question_id": f"v{i}", "question_type_id": i % 9 + 1} for i in range(ROWS)]
    put(root / "SEED/SEED-Bench.json", {"questions": kinds})
    for i, scene in enumerate(scenes):
        put(root / f"SEED/SEED-Bench-image/{i}", png(scene))
    return f"What?\nA. x\n{LETTER}", lambda q: "B", "accuracy", 1


def mmvp(root, scenes):
    lines = ["lndex,Question,Options,Correct Answer"]
    for i in range(1, ROWS + 1):
        lines.append(f"{i},Which way?,(a) left (b) right,({'ab'[i % 2]})")
        put(root / f"MMVP/MMVP Images/{i}.jpg", png(scenes[i - 1], "JPEG"))
    put(root / "MMVP/Questions.csv", "\n".join(lines) + "\n")
    return f"Which way?\nA. left\nB. right\n{LETTER}", lambda q: q.reference["answer"], "pair_accuracy", 1


def mmmu(root, scenes):
    rows = []
    for i, scene in enumerate(scenes):
        kind = "open" if i % 3 == 2 else "multiple-choice"
        rows.append(
            {
                "id": f"validation_Art_{i}",
                "question": "What is <image 1>?",
                "options": "[]" if kind == "open" else "['a circle', 'a star']",
                "question_type": kind,
                "answer": "7" if kind == "open" else "B",
                "image_1": {"bytes": png(scene), "path": "1.png"},
                "image_2": None,
            }
        )
    parquet(root / "MMMU/Art/validation-00000-of-00001.parquet", rows)
    return f"What is <image 1>?\nA. a circle\nB. a star\n{LETTER}", lambda q: q.reference["answer"], "Overall", 1


def mmmu_pro(root, scenes):
    standard, vision = [], []
    for i, scene in enumerate(scenes):
        row = {"id": f"test_Art_{i}", "options": "['one', 'two', 'three']", "answer": "C"}
        picture = {"bytes": png(scene), "path": "1.png"}
        standard.append({**row, "question": "See <image 1>. Which?", "image_1": picture, "image_2": None})
        vision.append({**row, "image": picture})
    parquet(root / "MMMU_Pro/standard (10 options)/test-00000-of-00001.parquet", standard)
    parquet(root / "MMMU_Pro/vision/test-00000-of-00001.parquet", vision)
    return f"See <image>. Which?\nA. one\nB. two\nC. three\n{LETTER}", lambda q: "C", "accuracy", 1


def mathvista(root, scenes):
    rows = []
    for i, scene in enumerate(scenes):
        choice = i % 2 == 0
        rows.append(
            {
                "pid": str(i + 1),
                "query": f"Hint: answer.\nQuestion: {i}?",
                "question_type": "multi_choice" if choice else "free_form",
                "answer_type": "text" if choice else "integer",
                "choices": ["left", "right"] if choice else None,
                "answer": "right" if choice else "4",
                "precision": None if choice else 1.0,
                "decoded_image": {"bytes": png(scene), "path": "1.png"},
            }
        )
    parquet(root / "MathVista/testmini-00000-of-00001.parquet", rows)
    return "Hint: answer.\nQuestion: 0?", lambda q: q.reference["answer"], "accuracy", 1


def mvbench(root, scenes):
    known = tables()["mvbench"].values()
    for values in known:
        folder = root / values["folder"].rstrip("/").removeprefix("./").removeprefix("data/")
        row = {"question": "What happens?", "candidates": ["it goes", "it stays"], "answer": "it stays", "video": "clip.gif"}
        if values["kind"] == "frame":
            row["video"] = "frames"
            for i in range(1, 13):
                put(folder / f"frames/{i:05d}.jpg", png(scenes[i - 1], "JPEG"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            scenes[0].save(folder / "clip.gif", save_all=True, append_images=scenes[1:], duration=300)
        if values["has_bounds"]:
            row |= {"start": 0.5, "end": 3.0}
        put(root / "MVBench/json" / values["file"], [row])
    return None, lambda q: "(B) it stays", "Avg", 100


def tiny_lvlm(root, scenes):
    for group in ("Visual_Perception", "Object_Hallucination"):
        folder = root / "tiny_lvlm/updated_datasets" / group
        rows = [{"image_path": f"{i}.png", "question": "What?", "gt_answers": "star"} for i in range(6)]
        put(folder / "dataset.json", rows)
        for i in range(6):
            put(folder / f"{i}.png", png(scenes[i]))
    return f"What? {SHORT}", lambda q: "a star", "overall", None


def mmiu(root, scenes):
    task = next(iter(tables()["mmiu_tasks"])) if "mmiu_tasks" in tables() else "forensic_detection"
    rows = []
    for i in range(ROWS):
        names = [f"./Low-level-relation/x/{i}.png", f"./Low-level-relation/x/{(i + 1) % ROWS}.png"]
        given = {"input_image_path": names, "question": "Which?", "context": "Select one.\nA: red\nB: blue"}
        rows.append({"task": task, "input": given, "options": "A: red\nB: blue", "output": {"output_text": "B"}})
        put(root / f"mmiu/Low-level-relation/x/{i}.png", png(scenes[i]))
    put(root / "mmiu/mmiu.jsonl", rows)
    return f"Which?\nSelect one.\nA: red\nB: blue\n{LETTER}", lambda q: "B", "accuracy", None


def mirb(root, scenes):
    for name in ("analogy", "attribute", "codeu", "count", "food", "image_jigsaw", "plot_code", "sightseeing", "visual_chain"):
        answer = "2" if name == "count" else "yes"
        put(root / f"MIRB/{name}.json", [{"images": ["images/0.png", "images/1.png"], "questions": "Same?", "answers": answer}])
    for name, answer in (("3d_scene", "3"), ("arxiv", "A title")):
        put(root / f"MIRB/{name}.json", [{"images": ["images/2.png"], "questions": "Which?", "answers": answer}])
    for i in range(3):
        put(root / f"MIRB/images/{i}.png", png(scenes[i]))
    return None, lambda q: q.reference["answer"], "mean", None


def mantis(root, scenes):
    rows = []
    for i in range(ROWS):
        multiple = i % 2 == 0
        rows.append(
            {
                "id": f"q{i}",
                "question_type": "multi-choice" if multiple else "short-answer",
                "question": "Is <image> like <image>?",
                "images": [{"bytes": png(scenes[j % ROWS]), "path": None} for j in (i, i + 1)],
                "options": ["(A) yes", "(B) no"] if multiple else [],
                "answer": "A" if multiple else "three",
            }
        )
    parquet(root / "Mantis-Eval/mantis_eval/test-00000-of-00001.parquet", rows)
    return f"Is Image-1 like Image-2?\n(A) yes\n(B) no\n{LETTER}", lambda q: q.reference["answer"], "overall", None


def rsvqa(root, scenes):
    kinds = [("count", "3"), ("presence", "yes"), ("area", "120m2"), ("comp", "no")]
    rows = []
    for i in range(ROWS):
        kind, answer = kinds[i % 4]
        rows.append({"id": i, "image": f"{i}.tif", "question": "How?", "gt_answer": answer, "type": kind})
        put(root / f"{ADAPTATION}/images/RSVQA_L/Images_LR/{i}.tif", png(scenes[i], "TIFF"))
    put(root / f"{ADAPTATION}/val/rsvqa_l_test_instruct.json", rows)
    return f"How?\n{SHORT}", lambda q: q.reference["answer"].removesuffix("m2"), "useful_accuracy", None


def dior(root, scenes):
    rows = []
    for i, scene in enumerate(scenes):
        rows.append({"image": f"{i}.jpg", "prompt": "the star", "bbox": [10, 20, 60, 70], "size": list(scene.size)})
        put(root / f"{ADAPTATION}/images/dior-rsvg/JPEGImages/{i}.jpg", png(scene, "JPEG"))

    def reply(question):
        reference = question.reference
        sides = [reference["width"], reference["height"]] * 2
        return str([[round(1000 * v / side) for v, side in zip(reference["bbox"], sides)]])

    put(root / f"{ADAPTATION}/val/dior_rsvg_test.json", rows)
    return "Detect the star", reply, "precision@1", None


def realworld(root, scenes):
    rows = []
    for i, scene in enumerate(scenes):
        choices = ["(A) red", "(B) blue", "(C) none"]
        row = {"Question_id": f"q{i}", "Image": f"{i}.jpg", "Text": "Which?", "Answer choices": choices, "Ground truth": "B"}
        subtask = "Autonomous_Driving" if i % 3 else "Remote Sensing"
        rows.append({**row, "Category": "Motion", "Task": "Perception", "Subtask": subtask})
        put(root / f"{ADAPTATION}MME-RealWorld/images/MME-RealWorld/data/{i}.jpg", png(scene, "JPEG"))
    put(root / f"{ADAPTATION}MME-RealWorld/val/MME_RealWorld.json", rows)
    return None, lambda q: "The best answer is B", "accuracy", None


def drivelm(root, scenes):
    rows = []
    for i, scene in enumerate(scenes):
        turns = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "a car"}]
        rows.append({"id": f"s_{i}", "image": f"{i}.jpg", "question_old": "What?", "conversations": turns})
        put(root / f"{ADAPTATION}/images/drivelm/stitch/{i}.jpg", png(scene, "JPEG"))
    put(root / f"{ADAPTATION}/val/drivelm_val.jsonl", rows)
    return "<image>\nWhat moves?", lambda q: "<c1,CAM_BACK,[500.0,750.0]>", None, None


def mmvet(root, scenes):
    rows = [{"image": f"v1_{i}.png", "text": "Why?", "question_id": i} for i in range(ROWS)]
    put(root / "mm-vet/llava-mm-vet.jsonl", rows)
    for i, scene in enumerate(scenes):
        put(root / f"mm-vet/images/v1_{i}.png", png(scene))
    return "Why? ", lambda q: "so", None, None


def mmvetv2(root, scenes):
    rows = {f"v2_{i}": {"question": f"Compare<IMG>v2_{i}.png<IMG>and<IMG>v2_0.png", "answer": "so"} for i in range(ROWS)}
    put(root / "mm-vet-v2/mm-vet-v2.json", rows)
    for i, scene in enumerate(scenes):
        put(root / f"mm-vet-v2/images/v2_{i}.png", png(scene))
    return None, lambda q: "so", None, None


def llava_bench(root, scenes):
    folder = root / "llava-bench-in-the-wild"
    rows = [{"question_id": i, "image": f"{i:03d}.jpg", "text": "What?", "category": "conv"} for i in range(ROWS)]
    put(folder / "questions.jsonl", rows)
    put(folder / "context.jsonl", [{"id": i, "image": f"{i:03d}.jpg", "caption": "a scene"} for i in range(ROWS)])
    put(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": "a star"} for i in range(ROWS)])
    for i, scene in enumerate(scenes):
        put(folder / f"images/{i:03d}.jpg", png(scene, "JPEG"))
    return "What? Please give a detailed answer.", lambda q: "a star", None, None


LAYOUTS = {
    "caption-coco": coco,
    "caption-flickr30k": flickr,
    "caption-nocaps": nocaps,
    "mme": mme,
    "seed": seed,
    "mmvp": mmvp,
    "mmmu-val": mmmu,
    "mmmu-pro": mmmu_pro,
    "mmmu-pro-std10": mmmu_pro,
    "mmmu-pro-vision": mmmu_pro,
    "mathvista-testmini": mathvista,
    "mvbench": mvbench,
    "mmvet": mmvet,
    "mmvetv2": mmvetv2,
    "llava-bench": llava_bench,
    "tiny_lvlm": tiny_lvlm,
    "mmiu": mmiu,
    "mirb": mirb,
    "mantis": mantis,
    "rsvqa-lr": rsvqa,
    "dior-rsvg": dior,
    "mme-realworld": realworld,
    "drivelm": drivelm,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_asked_and_scored(name, tmp_path, scenes):
    task = TASKS[name]
    prompt, right, metric, best = LAYOUTS[name](tmp_path / "data", scenes)
    settings = Settings(model="stub", data_root=str(tmp_path / "data"))
    result = run_task(task, settings, tmp_path / "right", model=Stub(right), progress=False)
    assert result["failed"] == 0, result["failures"]
    rows = read_answers(tmp_path / "right" / name / "answers.jsonl")
    assert len(rows) >= 8 and len({str(row["id"]) for row in rows}) == len(rows)
    if prompt is not None and name != "mmmu-pro-vision":
        assert prompt in {row["question"] for row in rows}
    if task.submission:
        assert (tmp_path / "right" / name / result["submission"]).stat().st_size
    if metric is None:
        return
    wrong = run_task(
        task, settings, tmp_path / "wrong", model=Stub(lambda q: "zebra" if best != 100 else "C zebra"), progress=False
    )
    value = result["score"][metric]
    assert value > wrong["score"][metric], (result["score"], wrong["score"])
    if best is not None:
        assert value == pytest.approx(best)


def test_pictures_in_base64_reach_the_model(tmp_path, scenes):
    row = {"image": base64.b64encode(png(scenes[0])).decode(), "question": "What?", "question_type": "t"}
    put(tmp_path / "mm-halbench/mmhal-bench_with_image.jsonl", [row] * 2)
    settings = Settings(model="stub", data_root=str(tmp_path))
    result = run_task(TASKS["mmhal"], settings, tmp_path / "out", model=Stub(lambda q: "a star"), progress=False)
    assert result["failed"] == 0 and result["questions"] == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes):
    """A data folder with all layouts, whose names do not meet."""
    root = tmp_path_factory.mktemp("whole") / "data"
    for name in ASKED:
        LAYOUTS[name](root, scenes)
    return root


ASKED = (
    "mme",
    "seed",
    "mmmu-val",
    "mmmu-pro-std10",
    "mathvista-testmini",
    "mantis",
    "rsvqa-lr",
    "dior-rsvg",
    "drivelm",
    "tiny_lvlm",
)


def command(root, out, *more, tasks=ASKED):
    asked = ["--task", ",".join(tasks), "--data_root", str(root), "--out_dir", str(out), "--device", "cpu", "--no_report"]
    return [sys.executable, evaluate.__file__, *asked, *more]


def answers_of(out, tasks=ASKED):
    return {name: read_answers(out / name / "answers.jsonl") for name in tasks}


@pytest.mark.slow
def test_answers_do_not_depend_on_batches_processes_or_interruptions(tmp_path, whole):
    """The demo model on small data sets of many layouts, by the command."""
    for out, more in (("eight", ("--batch_size", "8")), ("one", ("--batch_size", "1")), ("memory", ())):
        assert subprocess.run(command(whole, tmp_path / out, *more), timeout=600).returncode == 0
    expected = answers_of(tmp_path / "eight")
    assert all(len(rows) >= 8 and [row["index"] for row in rows] == list(range(len(rows))) for rows in expected.values())
    assert answers_of(tmp_path / "one") == expected and answers_of(tmp_path / "memory") == expected
    some = ("mme", "mantis", "drivelm")
    two = command(whole, tmp_path / "two", "--processes", "2", tasks=some)
    assert subprocess.run(two, timeout=600).returncode == 0
    assert answers_of(tmp_path / "two", some) == {name: expected[name] for name in some}
    for more in (("--batch_size", "1"), ("--batch_size", "1", "--processes", "2")):
        out = tmp_path / f"killed{len(more)}"
        killed = subprocess.Popen(command(whole, out, *more), start_new_session=True, stderr=subprocess.DEVNULL)
        until, path = time.monotonic() + 300, out / "mme" / "answers.jsonl"
        while time.monotonic() < until and killed.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.02)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        before = len(path.read_text(encoding="utf-8").splitlines())
        assert 0 < before < len(expected["mme"]), "it was killed while it answered"
        assert subprocess.run(command(whole, out, tasks=("mme",)), timeout=600).returncode == 0
        assert answers_of(out, ("mme",)) == {"mme": expected["mme"]}


@pytest.mark.medium
def test_the_shell_script_takes_the_spellings_of_the_original(tmp_path, scenes):
    LAYOUTS["seed"](tmp_path / "data", scenes)
    script = str(cli.ROOT / "examples" / "internvl2" / "evaluate.sh")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GPUS": "1",
        "MASTER_PORT": "63669",
    }
    more = ["--dynamic", "--max-num", "2", "--out-dir", "found", "--num-beams", "5", "--auto", "--limit", "3"]
    asked = ["bash", script, str(cli.DEMO_MODEL), "seed", *more, "--device", "cpu"]
    subprocess.run(asked, cwd=tmp_path, env=environment, check=True, timeout=300)
    run = json.loads((tmp_path / "found" / "seed" / "run.json").read_text())
    assert (run["dynamic"], run["max_num"], run["num_beams"], run["rows"]) == (True, 2, 1, 3)
    assert len(read_answers(tmp_path / "found" / "seed" / "answers.jsonl")) == 3
    refused = subprocess.run(["bash", script, str(cli.DEMO_MODEL)], capture_output=True, text=True)
    assert refused.returncode == 2 and "usage" in refused.stderr
    parsed = evaluate.make_parser().parse_args(["--task", "pope", "--load-in-8bit", "--checkpoint", "x", "--out-dir", "y"])
    assert parsed.load_8bit and parsed.model_name_or_path == "x" and parsed.out_dir == "y"

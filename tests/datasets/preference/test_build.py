"""Pairs made of the demo model's own answers: right against wrong, as the answers say; resumed; judged; continued blindly."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from paddlemix.datasets.preference import build, parse_preference
from paddlemix.datasets.preference.grading import final_answer, is_right, pair
from paddlemix.datasets.records import read_meta
from paddlemix.examples.internvl2.demo_model import questions
from paddlemix.models.blocks.conversation import IMAGE_PLACEHOLDER
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer


@pytest.mark.parametrize(
    "truth, answer, right",
    [
        ("Red.", "red", True),
        ("red", "blue", False),
        ("4", "4.0", True),
        ("1,200", "1200", True),
        ("B", "Two of them are.\nFinal answer: (B)", True),
        ("B", "Answer: B, I first thought. No.\nAnswer: C", False),
        ("3", r"So it is \boxed{3}.", True),
        ("at the top", "At the  top", True),
        ("4", "14", False),
        ("是", "答案。Answer：是。", True),
    ],
)
def test_what_counts_as_right(truth, answer, right):
    assert is_right(truth, answer) is right


def test_final_answer_of_a_text_without_one_is_all_of_it():
    assert final_answer(" It is red. ") == "It is red."


@pytest.mark.parametrize("right, wrong", [(3, 5), (6, 2), (1, 1), (4, 4)])
def test_pairs_use_texts_evenly(right, wrong):
    rights, wrongs = [f"r{i}" for i in range(right)], [f"w{i}" for i in range(wrong)]
    longer = max(right, wrong)
    every = pair(rights, wrongs, 100, ["k"])
    assert len(every) == len(set(every)) == right * wrong
    some = pair(rights, wrongs, longer, ["k"])
    assert some == every[:longer] == pair(rights[::-1] * 2, wrongs, longer, ["k"])
    assert {r for r, _ in some} == set(rights) and {w for _, w in some} == set(wrongs)
    assert pair(rights, rights, 9, ["k"]) == [] == pair([], wrongs, 9, ["k"])


def write_scenes(folder, count=6, broken=False):
    """A meta file of drawn scenes with one question each; the last record's picture is missing if ``broken``."""
    rows = []
    for number in range(count):
        rng = random.Random(f"pairs {number}")
        (picture,), prefix, turns = questions.finding(rng)
        picture.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": prefix + turns[0].question}, {"from": "gpt", "value": turns[0].answer}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    if broken:
        rows[-1]["image"] = "nowhere.png"
    (folder / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    entry = {"scenes": {"root": str(folder), "annotation": str(folder / "scenes.jsonl"), "max_dynamic_patch": 1}}
    (folder / "meta.json").write_text(json.dumps(entry), encoding="utf-8")
    return rows


def run(folder, output, *flags):
    given = ["--samples", 8, "--temperature", 2, "--max_new_tokens", 12, "--device", "cpu", "--max_num_seqs", 12, *flags]
    build.main([str(folder / "meta.json"), str(output), *map(str, given)])
    return rows_of(output / "answers.jsonl"), rows_of(output / "pairs-000.jsonl")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_index(rows):
    return {row["index"]: row for row in rows}


def test_right_answers_are_paired_with_wrong_ones_and_a_run_goes_on(tmp_path, capsys):
    rows = write_scenes(tmp_path, broken=True)
    answers, pairs = run(tmp_path, tmp_path / "out")
    assert "nowhere.png" in capsys.readouterr().err
    assert sorted(by_index(answers)) == list(range(6)) and "error" in by_index(answers)[5]
    said = {index: [a["text"] for a in row.get("answers", ())] for index, row in by_index(answers).items()}
    assert all(len(texts) == 8 for index, texts in said.items() if index != 5)
    assert len({text for texts in said.values() for text in texts}) > 6  # they are drawn, not one and the same
    seen = set()
    for row in pairs:
        number = int(row["id"].split("-")[0]) - 1
        truth = rows[number]["conversations"][1]["value"]
        assert is_right(truth, row["chosen"]) and not is_right(truth, row["rejected"])
        assert {row["chosen"], row["rejected"]} <= set(said[number])
        assert row["image"] == [f"{number}.png"] and row["question"] == rows[number]["conversations"][0]["value"]
        seen.add(number)
    expected = {n for n in range(5) if len({is_right(rows[n]["conversations"][1]["value"], text) for text in said[n]}) == 2}
    assert seen == expected and len(expected) >= 2
    (source,) = read_meta(tmp_path / "out/meta.json", parse_preference)  # as preference training reads it
    assert len(source) == len(pairs) and source.read(0).images == (str(tmp_path / pairs[0]["image"][0]),)
    assert source.max_dynamic_patch == 1

    path = tmp_path / "out/answers.jsonl"
    whole = path.read_bytes()
    (tmp_path / "out/pairs-000.jsonl").unlink()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # as a kill leaves it
    again, pairs_again = run(tmp_path, tmp_path / "out")
    assert path.read_bytes().startswith(b"".join(lines[:3]))
    assert by_index(again) == by_index(answers) and pairs_again == pairs

    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", "--temperature", 1)
    told = capsys.readouterr().err
    assert "was made with other settings (temperature)" in told and "Traceback" not in told


@pytest.fixture
def judge():
    """A server that says yes to what has an 'e', and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            asked.append(text)
            answer = text.split("Answer to judge: ")[1].split("\n\nDoes")[0]
            reply = {"choices": [{"message": {"content": "Yes." if "e" in answer else "no"}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_a_judge_says_what_is_right_and_is_asked_once(tmp_path, judge):
    url, asked = judge
    write_scenes(tmp_path, 4)
    answers, pairs = run(tmp_path, tmp_path / "out", "--judge", url, "--judge_model", "j")
    texts = {(row["index"], a["text"]) for row in answers for a in row["answers"] if a["reason"] != "length"}
    assert len(asked) == len(texts) and pairs
    assert all("e" in row["chosen"] and "e" not in row["rejected"] for row in pairs)
    _, fewer = run(tmp_path, tmp_path / "out", "--judge", url, "--judge_model", "j", "--pairs_per_question", 1)
    assert len(asked) == len(texts) and len(fewer) < len(pairs)
    run(tmp_path, tmp_path / "out", "--judge", url, "--judge_model", "k")
    assert len(asked) == 2 * len(texts)


def test_an_answer_continued_without_the_picture(tmp_path):
    """Greedily: the same as the model, alone and without a cache, goes on from the same half."""
    rng = random.Random(3)
    items = []
    for number in range(3):
        (picture,), prefix, turns = questions.shapes(rng, most=2)
        picture.save(tmp_path / f"{number}.png")
        truth = ("a red circle and a blue square", "There is a green star here", "yellow")[number]
        items.append({
            "image": f"{number}.png",
            "conversations": [
                {"from": "system", "value": "Look well."},
                {"from": "human", "value": prefix + "Please describe this picture."},
                {"from": "gpt", "value": truth},
            ],
        })  # fmt: skip
    (tmp_path / "scenes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    entry = {"scenes": {"root": str(tmp_path), "annotation": str(tmp_path / "scenes.jsonl")}}
    (tmp_path / "meta.json").write_text(json.dumps(entry))
    flags = ("--method", "continue", "--samples", 1, "--temperature", 0, "--max_new_tokens", 64)
    answers, pairs = run(tmp_path, tmp_path / "out", *flags)
    model = InternVLChatModel.from_pretrained(build.DEMO_MODEL, dtype="float32", engine="eager")
    tokenizer = load_tokenizer(build.DEMO_MODEL)
    model.set_tokenizer(tokenizer)
    template = model.template().with_system_message("Look well.")
    for number, head in enumerate(("a red circle", "There is a", "yel")):
        ids = tokenizer.encode(template.prompt("Please describe this picture.") + head)
        start = len(tokenizer.encode(template.prompt("Please describe this picture.")))
        end = tokenizer.convert_tokens_to_ids(template.stop)
        while ids[-1] != end and len(ids) < 200:
            logits = model(input_ids=np.array([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
        expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert by_index(answers)[number]["answers"] == [{"text": expected.strip(), "reason": "stop"}]
    for row in pairs:
        number = int(row["id"].split("-")[0]) - 1
        record = parse_preference(json.dumps(row).encode(), str(tmp_path))
        assert record.conversations[-1]["value"] == items[number]["conversations"][2]["value"] != record.rejected
        assert record.conversations[0] == {"from": "system", "value": "Look well."}
        assert IMAGE_PLACEHOLDER in record.conversations[1]["value"] and record.images == (str(tmp_path / f"{number}.png"),)
    assert pairs


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--method", "continue", "--judge", "http://x", "--judge_model", "j"], "--judge is for --method sample"),
        (["--judge", "http://x"], "--judge and --judge_model go together"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--temperature", "0", "--samples", "2"], "no question has both right and wrong answers"),
    ],
)
def test_refused_in_one_sentence(tmp_path, capsys, flags, told):
    write_scenes(tmp_path, 1)
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", *flags)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and told in said[0]
    assert not (tmp_path / "out/meta.json").exists()

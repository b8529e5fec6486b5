"""A judge and a server that answers, against a small HTTP server of the tests."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from paddlemix.errors import DataError
from paddlemix.evaluation.answers import read_answers
from paddlemix.evaluation.judge import complete, review
from paddlemix.evaluation.judge_prompts import JudgePrompt
from paddlemix.evaluation.runner import conclude
from paddlemix.evaluation.tasks import TASKS
from paddlemix.examples.internvl2 import cli, evaluate

IMAGE = (cli.DEMO_IMAGES / "scene_1.png").read_bytes()


@pytest.fixture
def server():
    """(address, requests so far, list of replies to come: texts or status codes; the last is repeated)."""
    requests, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            if isinstance(reply, str):
                self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

        def log_message(self, *_):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", requests, replies
    listening.shutdown()
    listening.server_close()


def test_busy_servers_are_asked_again_and_refusals_are_not(server):
    url, requests, replies = server
    replies += [503, 429, "well"]
    assert complete(url, "m", [], pause=0.01) == "well" and len(requests) == 3
    replies[:] = [401]
    with pytest.raises(DataError, match="401"):
        complete(url, "m", [], pause=0.01)
    assert len(requests) == 4


def test_verdicts_stay_and_only_what_is_missing_is_judged(server, tmp_path):
    url, requests, replies = server
    rows = [{"id": i, "answer": f"a{i}", "reference": {"category": "conv", "question": f"q{i}"}} for i in range(3)]
    replies += ["8 7\nfine", 400, "9 9\nfine"]
    reviewed, problems = review(TASKS["llava-bench"], rows, tmp_path, url, "j", pause=0.01)
    assert [row["id"] for row in reviewed] == [0, 2] and [p["id"] for p in problems] == [1]
    assert "q0" in requests[0]["messages"][0]["content"] and "a0" in requests[0]["messages"][0]["content"]
    reviewed, problems = review(TASKS["llava-bench"], rows, tmp_path, url, "j", pause=0.01)
    assert len(requests) == 4 and not problems and [row["review"][:3] for row in reviewed] == ["8 7", "9 9", "9 9"]
    rows[0]["answer"] = "another"
    review(TASKS["llava-bench"], rows, tmp_path, url, "j", pause=0.01)
    assert len(requests) == 5, "a verdict is of an answer"


def test_a_judge_that_fails_ends_in_an_exit_code_and_is_asked_again_for_the_rest(server, tmp_path, capsys):
    url, requests, replies = server
    replies += ["It is a star."]
    (tmp_path / "mm-halbench").mkdir()
    row = {"image": base64.b64encode(IMAGE).decode(), "question": "What?", "question_type": "t"}
    (tmp_path / "mm-halbench" / "mmhal-bench_with_image.jsonl").write_text((json.dumps(row) + "\n") * 3)
    command = ["--task", "mmhal", "--data_root", str(tmp_path), "--out_dir", str(tmp_path / "out"), "--url", url]
    evaluate.main(command)
    judged = [*command, "--judge_url", url, "--judge_model", "j"]
    replies[:] = ["Rating: 5", 400, 400]
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(judged)
    result = json.loads((tmp_path / "out" / "mmhal" / "score.json").read_text())
    assert result["score"]["average_score"] == 5 and [p["id"] for p in result["not_judged"]] == [1, 2]
    assert "not judged: 2, such as 1" in capsys.readouterr().err
    replies[:], asked = ["Rating: 2"], len(requests)
    evaluate.main(judged)
    result = json.loads((tmp_path / "out" / "mmhal" / "score.json").read_text())
    assert result["score"]["average_score"] == 3 and not result["not_judged"] and len(requests) == asked + 2


def test_prompts_of_benchmarks_are_read_from_their_folders(tmp_path):
    row = {"id": 1, "question": "What {is} it?", "answer": "a {star}", "reference": {"question": "Q", "gt_answer": "G"}}
    for kind in ("llava_bench", "mmhal", "mmvet", "mathvista"):
        prompt = JudgePrompt(kind, tmp_path)
        (message,) = prompt.messages(row)
        assert "a {star}" in message["content"] and "short one" in prompt.told and "https://" in prompt.told

    def save(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    save("llava-bench-in-the-wild/rule.json", json.dumps({"llava_bench_conv": {"role": "Helper", "prompt": "RULE"}}))
    row["reference"] |= {"category": "conv", "context": "C", "answer": "theirs <AND> more", "image_content": ["cat", "dog"]}
    system, user = JudgePrompt("llava_bench", tmp_path).messages(row)
    assert user["content"] == (
        "[Context]\nC\n\n[Question]\nQ\n\n[Helper 1]\ntheirs <AND> more\n\n[End of Helper 1]\n\n[Helper 2]\na {star}\n\n"
        "[End of Helper 2]\n\n[System]\nRULE\n\n"
    )
    with pytest.raises(DataError, match="llava_bench_detail"):
        JudgePrompt("llava_bench", tmp_path).messages({**row, "reference": {"category": "detail"}})
    save("mm-halbench/template.txt", "see {}; asked {}; right {}; said {}!")
    (message,) = JudgePrompt("mmhal", tmp_path).messages(row)
    assert message["content"] == "see cat, dog; asked Q; right G; said a {star}!"
    save("mm-halbench/template.txt", "see {}")
    with pytest.raises(DataError, match="four places"):
        JudgePrompt("mmhal", tmp_path)
    save("mm-vet/prompt.txt", "TABLE")
    (message,) = JudgePrompt("mmvet", tmp_path).messages(row)
    assert message["content"] == "TABLE\nQ | theirs  <AND>  more | a {star} | "
    save("MathVista/prompt.txt", "EXAMPLES\n")
    (message,) = JudgePrompt("mathvista", tmp_path).messages({**row, "reference": {}})
    assert message["content"] == "EXAMPLES\n\nWhat {is} it?\n\nModel response: 'a {star}'\nExtracted Answer: "


def test_a_judge_finds_mathvistas_answers_in_texts(server, tmp_path):
    url, requests, replies = server
    choice = {"question_type": "multi_choice", "answer_type": "text", "choices": ["left", "right"], "answer": "right"}
    number = {"question_type": "free_form", "answer_type": "integer", "choices": None, "answer": "4", "precision": None}
    said = [("right", choice), ("It must be the one on the other side.", choice), ("4", number), ("There are four.", number)]
    rows = [{"id": i, "question": "q", "answer": text, "reference": truth} for i, (text, truth) in enumerate(said)]
    replies += ["B", "4"]
    reviewed, problems = review(TASKS["mathvista-testmini"], rows, tmp_path, url, "j", pause=0.01)
    assert not problems and [(row["id"], row["review"]) for row in reviewed] == [(1, "B"), (3, "4")] and len(requests) == 2
    judge = (url, "j", "a prompt")
    merged = {row["id"]: row for row in reviewed}
    result = conclude(TASKS["mathvista-testmini"], [merged.get(r["id"], r) for r in rows], tmp_path, [], judge)
    assert result["score"] == {"accuracy": 1.0} and result["judge_prompt"] == "a prompt"
    assert conclude(TASKS["mathvista-testmini"], rows, tmp_path)["score"]["accuracy"] < 1
    with open(tmp_path / "reviews.jsonl", "a") as file:  # cut by what ended the run
        file.write('{"id": 1, "ans')
    rows[3]["answer"] = "Four it is."
    review(TASKS["mathvista-testmini"], rows, tmp_path, url, "j", pause=0.01)
    assert len(requests) == 3 and [row["id"] for row in read_answers(tmp_path / "reviews.jsonl")] == [1, 3, 3]


def test_a_server_is_scored_by_the_same_code(server, tmp_path):
    url, requests, replies = server
    replies += ["A"]
    (tmp_path / "mm-halbench").mkdir()
    row = {"image": base64.b64encode(IMAGE).decode(), "question": "What?", "question_type": "t"}
    (tmp_path / "mm-halbench" / "mmhal-bench_with_image.jsonl").write_text(json.dumps(row) + "\n")
    command = ["--task", "mmhal", "--data_root", str(tmp_path), "--out_dir", str(tmp_path / "out"), "--url", url]
    evaluate.main(command)
    sent = requests[0]["messages"][0]["content"]
    assert [part["type"] for part in sent] == ["image_url", "text"] and sent[1]["text"] == "What?"
    assert base64.b64decode(sent[0]["image_url"]["url"].split(",")[1]) == IMAGE
    assert read_answers(tmp_path / "out" / "mmhal" / "answers.jsonl")[0]["answer"] == "A"
    replies[:] = ["Rating: 5"]
    evaluate.main([*command, "--judge_url", url, "--judge_model", "j"])
    result = json.loads((tmp_path / "out" / "mmhal" / "score.json").read_text())
    assert result["score"]["average_score"] == 5 and result["judge"] == "j" and len(requests) == 2

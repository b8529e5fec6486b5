"""A judge and a server that answers, against a small HTTP server of the tests."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from paddlemix.errors import DataError
from paddlemix.evaluation.answers import read_answers
from paddlemix.evaluation.judge import complete, review
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

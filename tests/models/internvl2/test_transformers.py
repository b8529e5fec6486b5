"""transformers itself loads what ``--layout hf`` writes, and computes what we do.

Runs where transformers and torch are: in this environment, or in ``.venv/transformers`` (``make test-transformers``).
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.models.internvl2.convert import convert
from tests.conftest import REFERENCE, assert_close

HERE = Path(__file__).parent
OWN = HERE.parents[2] / ".venv" / "transformers" / "bin" / "python"
FAMILIES = ("qwen2", "internlm2", "llama_vit6b") + tuple(
    f"internvl3/{name}" for name in ("qwen2_vit6b", "qwen3", "qwen3_moe", "gpt_oss", "internlm3")
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And 你好 now?"},
]


@functools.cache
def python():
    """An interpreter that has transformers, or None."""
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        return sys.executable
    return str(OWN) if OWN.exists() else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(python() is None, reason="needs transformers: make test-transformers"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_written_and_computes_the_same(tmp_path, family):
    folder = tmp_path / "hf"
    convert(str(REFERENCE / family / "checkpoint"), str(folder), "hf", max_shard_size="200KB")
    model, tokenizer = InternVLChatModel.from_pretrained(str(folder), dtype="float32"), load_tokenizer(str(folder))
    model.set_tokenizer(tokenizer)
    config, random = model.config, np.random.default_rng(0)
    ids = random.integers(0, min(config.llm_config.vocab_size, 600), [2, 30])
    pixels = random.standard_normal([2, 3, config.image_size, config.image_size]).astype("float32")
    text = "<img>" + "<IMG_CONTEXT>" * (2 * config.num_image_token) + "</img> What is it?"
    prompt = np.array([tokenizer.encode(text)])
    np.savez(tmp_path / "in.npz", input_ids=ids, pixel_values=pixels, prompt=prompt, messages=json.dumps(MESSAGES))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment.pop("PYTHONPATH", None)
    command = [python(), HERE / "in_transformers.py", folder, tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(tmp_path / "out.npz")

    loading = json.loads(str(theirs["loading"]))
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), loading
    with paddle.no_grad():
        assert_close(model(input_ids=ids).logits, theirs["logits"])
        assert_close(model.extract_feature(pixels), theirs["features"])
        assert_close(model(pixels, prompt).logits, theirs["prompt_logits"])
    answer = model.generate(pixels, prompt, max_new_tokens=8, eos_token_id=[]).numpy()
    assert answer.tolist() == theirs["answer"].tolist()
    # The template and the tokenizer's files mean the same to both.
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert rendered == str(theirs["rendered"])
    assert tokenizer.encode(rendered) == theirs["rendered_ids"].tolist()

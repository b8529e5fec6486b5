"""What answers: adapters on a checkpoint, Mini-Monkey's two scales, weights that are not to be had."""

import numpy as np
import paddle
import pytest

from paddlemix.errors import ConfigError
from paddlemix.evaluation.local import TwoScales, load_model
from paddlemix.evaluation.rows import Question
from paddlemix.evaluation.runner import Settings, ask, batches
from paddlemix.evaluation.tasks import TASKS
from paddlemix.examples.internvl2 import cli
from paddlemix.models.blocks.lora import LoRALinear, merge_lora, save_adapters, wrap_llm_lora
from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
from paddlemix.processors.image import load_image
from paddlemix.processors.minimonkey import multi_scale_tiles

pytestmark = pytest.mark.medium
PICTURES = sorted(str(path) for path in cli.DEMO_IMAGES.glob("*.png"))[:3]
ASKED = [f"{text} {path[-5]}" for path in PICTURES for text in ("What color is the star?", "How many shapes are there?")]
QUESTIONS = [Question(i, text, (PICTURES[i // 2],)) for i, text in enumerate(ASKED)]
TASK = TASKS["vqa-gqa-testdev"]


def answers(settings):
    model, rows = load_model(settings), []
    ask(model, TASK, batches(QUESTIONS, {}, model.batch_size(TASK)), rows.extend)
    assert not [row for row in rows if "error" in row]
    return model, [row["answer"] for row in sorted(rows, key=lambda row: row["index"])]


def chat(model, tokenizer, **more):
    size, config = model.config.image_size, {"max_new_tokens": 10, "min_new_tokens": 1}
    pixels = [load_image(q.pictures[0], input_size=size, max_num=1, dynamic=False) for q in QUESTIONS]
    return [model.chat(tokenizer, tiles, q.prompt, config, **more) for tiles, q in zip(pixels, QUESTIONS)]


def test_adapters_are_added_to_the_weights(tmp_path):
    model = InternVLChatModel.from_pretrained(str(cli.DEMO_MODEL), dtype="float32", engine="eager")
    tokenizer = load_tokenizer(str(cli.DEMO_MODEL))
    plain = chat(model, tokenizer)
    paddle.seed(3)
    wrap_llm_lora(model, 2)
    rng = np.random.default_rng(3)
    for layer in model.sublayers():
        if isinstance(layer, LoRALinear):
            for weight in layer.lora_B:
                weight.set_value(paddle.to_tensor(rng.normal(0, 0.3, weight.shape).astype("float32")))
    save_adapters(model, str(tmp_path / "adapter"), str(cli.DEMO_MODEL))
    merge_lora(model)
    expected = chat(model.eval(), tokenizer)
    assert expected != plain, "they change answers"
    settings = Settings(str(cli.DEMO_MODEL), device="cpu", dtype="float32", adapters=(str(tmp_path / "adapter"),))
    assert answers(settings)[1] == expected


def test_mini_monkey_answers_as_its_chat_does():
    for scales, scm in (("scm", True), ("plain", False)):
        settings = Settings(str(cli.DEMO_MODEL), device="cpu", scales=scales, max_num=4)
        local, found = answers(settings)
        assert isinstance(local, TwoScales) and local.batch_size(TASK) > 1
        config, expected = {"max_new_tokens": 10, "min_new_tokens": 1}, []
        for question in QUESTIONS:
            pixels, grid, _ = multi_scale_tiles(question.pictures[0], local.model.config.image_size, max_num=4)
            expected.append(local.model.chat(local.tokenizer, pixels, grid, question.prompt, config, use_scm=scm))
        assert found == expected
    two = Question("two", "Which?", tuple(PICTURES[:2]))
    assert "Mini-Monkey looks at one" in local.encode(TASK, two)[1]


def test_what_does_not_go_together_is_told(tmp_path):
    with pytest.raises(ConfigError, match="--adapter needs plain weights"):
        load_model(Settings(str(cli.DEMO_MODEL), device="cpu", adapters=(str(tmp_path),), weight_dtype="int8"))

"""The CPU engine computes what the eager model computes."""

import functools
import os
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints import find_weight_files, open_weight_file, save_checkpoint
from paddlemix.errors import CheckpointError, DeviceError
from paddlemix.examples.internvl2 import chat_demo
from paddlemix.kernels import cpu as kernels
from paddlemix.models.blocks.engine import choose, fuse
from paddlemix.models.blocks.generation import new_cache
from paddlemix.models.blocks.language import KVCache
from paddlemix.models.blocks.lora import add_adapters
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel
from tests.conftest import FAMILIES, assert_close, load_reference, tiles

pytestmark = pytest.mark.skipif(
    not kernels.available("float32"), reason="the CPU kernels cannot be built here (see the warning)"
)


@functools.cache
def fused(family, dtype):
    """A reference model on the engine, shared between tests."""
    reference = load_reference(family)
    model = InternVLChatModel.from_pretrained(str(reference.path), dtype=dtype, engine="inference")
    model.set_tokenizer(reference.tokenizer)
    return model


@pytest.fixture(params=FAMILIES)
def both(request):
    """A reference and the same model fused in float32."""
    return load_reference(request.param), fused(request.param, "float32")


def needs_bfloat16():
    if not kernels.available("bfloat16"):
        pytest.skip("this processor has no bfloat16 instructions")


def test_float32_equals_the_original(both):
    reference, model = both
    arrays = reference.arrays
    with paddle.no_grad():
        assert_close(model.vision_model(paddle.to_tensor(arrays["pixel_values"])), arrays["vit_last_hidden_state"])
        other = model.vision_model(paddle.to_tensor(arrays["pixel_values_168x140"]))
        assert_close(other, arrays["vit_last_hidden_state_168x140"])
        assert_close(model.extract_feature(arrays["pixel_values"]), arrays["image_features"])
        logits = model(input_ids=arrays["lm_input_ids"]).logits
        assert_close(logits[:, :: reference.expected["lm_logits_stride"]], arrays["lm_logits"])


def test_float32_answers_equal_the_original(both, chat_pixels):
    reference, model = both
    for chat in reference.expected["chats"]:
        pixels, _ = chat_pixels(chat["label"])
        ids = model.generate(pixels, np.array([chat["input_ids"]]), max_new_tokens=len(chat["output_ids"]))
        assert ids.numpy()[0].tolist() == chat["output_ids"], chat["label"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [{}, {"weight_dtype": "int8"}])
def test_sizes_are_those_of_the_plain_model(family, bits):
    """By them servers choose threads and tell users what the weights take: packed ones are no parameters of Paddle's."""
    path = str(load_reference(family).path)
    sizes = []
    for engine in ("eager", "inference"):
        model = InternVLChatModel.from_pretrained(path, dtype="float32", engine=engine, **bits)
        sizes.append((model.language_model.parameter_count, model.weight_bytes()))
    count = sum(np.prod(w.shape) for w in model.config.weight_table() if w.name.startswith("language_model."))
    assert sizes[0] == sizes[1] and sizes[0][0] == count


def test_batches_and_sessions_agree_with_single_fresh_runs(both):
    reference, model = both
    options = {"max_new_tokens": 16}
    tokenizer = reference.tokenizer
    questions = ["Tell me a story.", "<image>\nWhat is in the picture?", "<image>\nWhere?"]
    pixels = [None, tiles(0), tiles(3)]
    alone = [model.chat(tokenizer, p, q, options) for p, q in zip(pixels, questions)]
    assert model.batch_chat(tokenizer, np.concatenate(pixels[1:]), questions, options, [[], [7], [5]]) == alone
    session = ChatSession(model, tokenizer)
    session.ask(questions[1], tiles(0), options)
    answer = session.ask("And now?", None, options)
    assert session.cached_tokens > 0
    assert answer == model.chat(tokenizer, tiles(0), "And now?", options, session.history[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_as_its_precision_allows(family):
    needs_bfloat16()
    reference, model = load_reference(family), fused(family, "bfloat16")
    with paddle.no_grad():
        features = model.extract_feature(reference.arrays["pixel_values"])
        logits = model(input_ids=reference.arrays["lm_input_ids"]).logits
    # Eight bits of mantissa: 2**-8 for a product, a few of them in a row.
    assert_close(features, reference.arrays["image_features"], 0.02)
    assert_close(logits[:, :: reference.expected["lm_logits_stride"]], reference.arrays["lm_logits"], 0.04)


def test_auto_takes_the_engine_where_it_is_faster_and_worth_the_wait(monkeypatch, tmp_path):
    best = "bfloat16" if kernels.available("bfloat16") else "float32"
    assert choose("auto", "auto", 900_000_000) == ("inference", best)
    assert choose("auto", "float32", 900_000_000) == ("inference", "float32")
    assert choose("eager", "auto", 900_000_000) == ("eager", "float32")
    assert choose("inference", "float32", 8_000_000) == ("inference", "float32")
    assert choose("auto", "auto", 400_000) == ("eager", "float32")
    assert choose("auto", "auto", 8_000_000) == ("inference", "float32")  # the kernels are compiled, or no test runs here
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choose("auto", "auto", 8_000_000) == ("eager", "float32")


def test_the_first_answer_of_a_small_model_does_not_wait_for_a_compiler(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, chat_demo.__file__], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_keys_and_values_are_kept_in_the_dtype_that_attention_rounds_them_to():
    needs_bfloat16()
    reference, model = load_reference("qwen2"), fused("qwen2", "bfloat16")
    ids = np.array([reference.expected["chats"][0]["input_ids"]])
    language = model.language_model
    caches = [KVCache(language.config, 1, ids.shape[1] + 1, dtype) for dtype in ("bfloat16", "float32")]
    assert new_cache(language, 1, 4, paddle.float32).stores(0)[0].dtype == paddle.bfloat16
    with paddle.no_grad():
        embeds = language.embed(paddle.to_tensor(ids))
        hidden = [[language(part, cache=cache).numpy() for part in (embeds, embeds[:, :1])] for cache in caches]
    for half, full in zip(*hidden):
        assert np.array_equal(half, full)


def stored(directory):
    """Every tensor of a checkpoint as its own bytes: ``{name: (dtype, shape, bytes)}``."""
    tensors = {}
    for path in find_weight_files(str(directory))[0]:
        with open_weight_file(path) as file:
            for name, tensor in file.items():
                tensors[name] = tensor.dtype, tensor.shape, tensor.read(0, tensor.shape[0]).tobytes()
    return tensors


@pytest.mark.parametrize("engine", ["inference", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_loaded_is_saved_bit_by_bit(family, engine, tmp_path):
    """Whatever the engine holds it in (packed, float32), the files have what came, and as it came: bfloat16."""
    path = load_reference(family).path
    model = InternVLChatModel.from_pretrained(str(path), dtype="float32", engine=engine)
    model.save_pretrained(str(tmp_path / "saved"), max_shard_size="100KB")
    assert stored(tmp_path / "saved") == stored(path)
    again = InternVLChatModel.from_pretrained(str(tmp_path / "saved"), dtype="float32", engine="eager")
    assert again.config == model.config
    model.save_pretrained(str(tmp_path / "saved"))  # one file in place of many
    assert stored(tmp_path / "saved") == stored(path)


@pytest.mark.parametrize("engine", ["inference", "eager"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_come_back_too(dtype, engine, tmp_path):
    path = str(load_reference("qwen2").path)
    model = InternVLChatModel.from_pretrained(path, dtype="float32", engine="eager")
    head = model.language_model.lm_head.weight
    head.set_value(paddle.to_tensor(np.full(head.shape, 1 / 3, "float32").astype(dtype).astype("float32")))
    save_checkpoint(model, model.config, str(tmp_path / "source"), dtype=dtype)
    model.config.save(str(tmp_path / "source"))
    again = InternVLChatModel.from_pretrained(str(tmp_path / "source"), dtype="float32", engine=engine)
    again.save_pretrained(str(tmp_path / "saved"))
    assert {tag for tag, *_ in stored(tmp_path / "saved").values()} == {dtype}
    assert stored(tmp_path / "saved") == stored(tmp_path / "source")


def test_trained_weights_keep_their_precision(tmp_path):
    """A third is no bfloat16: nothing is rounded back to what was loaded, in no parameter."""
    model = InternVLChatModel.from_pretrained(str(load_reference("qwen2").path), dtype="float32", engine="eager")
    head = model.language_model.lm_head.weight
    head.set_value(paddle.full_like(head, 1 / 3))
    model.save_pretrained(str(tmp_path))
    assert {tag for tag, *_ in stored(tmp_path).values()} == {"float32"}
    tag, shape, content = stored(tmp_path)["language_model.lm_head.weight"]
    assert np.all(np.frombuffer(content, "f4") == np.float32(1 / 3))


def test_a_packed_model_whose_files_changed_says_so(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(load_reference("qwen2").path, source)
    model = InternVLChatModel.from_pretrained(str(source), dtype="float32", engine="inference")
    (weights,) = source.glob("*.safetensors")
    before = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time of change are what they were
    with pytest.raises(CheckpointError, match=f"{weights} has changed"):
        model.save_pretrained(str(tmp_path / "saved"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="or is gone"):
        model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_a_packed_model_with_merged_adapters_says_what_to_do(tmp_path):
    reference = load_reference("qwen2")
    model = InternVLChatModel.from_pretrained(str(reference.path), dtype="float32", engine="eager")
    model.config.use_llm_lora = 2
    add_adapters(model)
    model.save_pretrained(str(tmp_path / "source"))
    packed = InternVLChatModel.from_pretrained(str(tmp_path / "source"), dtype="float32", engine="inference")
    with pytest.raises(CheckpointError, match="adapters were merged.*engine='eager'.*merge_lora"):
        packed.save_pretrained(str(tmp_path / "saved"))
    fuse(model, "float32")  # by hand, of who knows what
    with pytest.raises(CheckpointError, match="engine='eager'"):
        model.save_pretrained(str(tmp_path / "saved"))


@pytest.mark.parametrize("engine, dtype, message", [("turbo", "auto", "'turbo'"), ("inference", "float16", "float16")])
def test_engines_that_are_not_there(engine, dtype, message):
    with pytest.raises(DeviceError, match=message):
        choose(engine, dtype, 1)

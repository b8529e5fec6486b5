"""Keys and values in 8 bits in every place that takes a model."""

import numpy as np
import paddle
import pytest

from paddlemix import device
from paddlemix.errors import ConfigError, DeviceError
from paddlemix.evaluation.local import load_model
from paddlemix.evaluation.runner import Settings
from paddlemix.examples.internvl2 import chat_demo
from paddlemix.models.blocks.decoding.loop import bytes_per_position
from paddlemix.models.blocks.kv_cache import INT8, Int8Rows, KVCache
from paddlemix.models.internvl2 import ChatSession, InternVLChatModel
from tests.conftest import FAMILIES, load_reference, tiles

OPTIONS = {"max_new_tokens": 16}
QUESTION = "<image>\nWhat is in the picture?"


@pytest.fixture(scope="module", params=[(family, engine) for family in FAMILIES for engine in ("eager", "inference")], ids=str)
def model(request):
    """A reference whose keys and values are in 8 bits, with its tokenizer."""
    family, engine = request.param
    reference = load_reference(family)
    try:
        model = InternVLChatModel.from_pretrained(str(reference.path), dtype="float32", engine=engine, kv_cache_dtype="int8")
    except DeviceError as error:
        pytest.skip(str(error))
    model.set_tokenizer(reference.tokenizer)
    return model, reference.tokenizer


def test_sessions_pages_and_rows_agree(model):
    model, tokenizer = model
    session = ChatSession(model, tokenizer)
    alone = [session.ask(QUESTION, tiles(0), OPTIONS), session.ask("And now?", None, OPTIONS)]
    assert session.cached_tokens > 0
    assert isinstance(session._cache, KVCache) and session._cache.dtype == INT8
    config = model.config.llm_config
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * Int8Rows.bytes_of(config.head_dim)
    assert session.memory()["kv_cache"] == held * session.memory()["positions"]
    assert bytes_per_position(model) == held
    together = model.batch_chat(tokenizer, tiles(0), [QUESTION, "Tell me a story."], OPTIONS, [[len(tiles(0))], []])
    assert together[0] == alone[0]
    beams = model.chat(tokenizer, tiles(0), QUESTION, {**OPTIONS, "num_beams": 2})
    assert isinstance(beams, str)


def test_logits_stay_close(model):
    model, _ = model
    language, random = model.language_model, np.random.default_rng(0)
    ids = random.integers(1, language.config.vocab_size, [2, 30])

    def last(dtype):
        cache = KVCache(language.config, 2, 30, dtype)
        with paddle.no_grad():
            language(language.embed(paddle.to_tensor(ids[:, :-1])), cache=cache)
            return language.lm_head(language(language.embed(paddle.to_tensor(ids[:, -1:])), cache=cache)).numpy()

    exact, rounded = last("float32"), last("int8")
    assert 0 < np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max()


def test_flags_reach_the_model(capsys, monkeypatch):
    path = str(load_reference("qwen2").path)
    settings = Settings(path, device="cpu", dtype="float32", kv_cache_dtype="int8")
    assert load_model(settings).model.language_model.cache_dtype == INT8
    monkeypatch.setattr("sys.argv", ["chat_demo", "--kv-cache-dtype", "int3"])
    with pytest.raises(SystemExit):
        chat_demo.main()
    assert "kv_cache_dtype" in capsys.readouterr().err


def test_what_cannot_be_is_refused(monkeypatch):
    path = str(load_reference("qwen2").path)
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int2'"):
        InternVLChatModel.from_pretrained(path, kv_cache_dtype="int2")
    with pytest.raises(ConfigError, match="tensor_parallel"):
        InternVLChatModel.from_pretrained(path, kv_cache_dtype="int8", tensor_parallel=2)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    with pytest.raises(ConfigError, match="for CPU"):
        load_reference("qwen2").model.keep_cache_in("int8")

"""All blocks in one call compute what the blocks compute one by one, whatever the cache."""

import numpy as np
import paddle
import pytest

from paddlemix.kernels import cpu as kernels
from paddlemix.kernels.decoder import MOST_ROWS
from paddlemix.models.blocks.decoding.pages import PageTable
from paddlemix.models.blocks.decoding.scheduler import Sequence
from paddlemix.models.blocks.decoding.step import Stepper
from paddlemix.models.blocks.kv_cache import Int8Rows, KVCache
from paddlemix.models.blocks.layers import AttentionMask
from paddlemix.models.internvl2 import InternVLChatModel
from tests.conftest import FAMILIES, load_reference

pytestmark = pytest.mark.skipif(not kernels.available("float32"), reason="the CPU kernels cannot be built here")
ROWS = 3


@pytest.fixture(scope="module", params=[*FAMILIES, "int8", "int4"])
def language(request):
    """The language model of a reference on the engine, with weights in few bits or not."""
    few = request.param if request.param in ("int8", "int4") else None
    path = load_reference("qwen2" if few else request.param).path
    model = InternVLChatModel.from_pretrained(str(path), dtype="float32", engine="inference", weight_dtype=few)
    return model.language_model


def one_by_one(language, run):
    """``run()`` without the call for all blocks."""
    together, language.model.together = language.model.together, None
    try:
        with paddle.no_grad():
            return run()
    finally:
        language.model.together = together


def steps(language, dtype, starts=None, length=11, rows=ROWS):
    """Hidden states of two steps of decoding after a prompt, and the cache."""
    random = np.random.default_rng(1)
    config = language.config
    cache = KVCache(config, rows, length + 2, dtype)
    embeds = paddle.to_tensor(random.standard_normal([rows, length + 2, config.hidden_size]).astype("float32"))
    mask = AttentionMask(starts)
    with paddle.no_grad():
        language(embeds[:, :length], mask=mask, cache=cache)
        return [language(embeds[:, i : i + 1], mask=mask, cache=cache).numpy() for i in (length, length + 1)], cache


@pytest.mark.parametrize("starts", [None, np.array([0, 3, 10])])
def test_a_step_equals_the_blocks_one_by_one(language, starts):
    assert language.model.together is not None
    found, cache = steps(language, "float32", starts)
    expected, other = one_by_one(language, lambda: steps(language, "float32", starts))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    for layer in range(language.config.num_hidden_layers):
        for mine, its in zip(cache.stores(layer), other.stores(layer)):
            np.testing.assert_allclose(mine.numpy(), its.numpy(), rtol=1e-3, atol=1e-3 * np.abs(its.numpy()).max())


def test_long_rows_are_summed_in_segments(language):
    found, _ = steps(language, "float32", np.array([0, 513, 1200]), length=1300)
    expected, _ = one_by_one(language, lambda: steps(language, "float32", np.array([0, 513, 1200]), length=1300))
    np.testing.assert_allclose(found, expected, rtol=5e-4, atol=5e-4 * np.abs(expected).max())


def test_a_row_does_not_depend_on_the_others(language):
    config, random = language.config, np.random.default_rng(2)
    embeds = paddle.to_tensor(random.standard_normal([4, 601, config.hidden_size]).astype("float32"))
    if language.model.layers[0].qkv.__class__.__name__ == "PackedLinear":
        pytest.skip("matrix products of oneDNN choose their way of adding by the number of rows")

    @paddle.no_grad()
    def last(rows):
        cache = KVCache(config, len(rows), 601, "float32")
        for part, stores in enumerate((cache._keys, cache._values)):  # filled without a prompt's products
            for i, store in enumerate(stores):
                content = np.random.default_rng([i, part]).standard_normal([4, 601, *store.shape[1:]]).astype("float32")
                stores[i] = paddle.to_tensor(content[rows].reshape(store.shape))
        cache.length = 600
        return language(embeds[rows][:, :1], cache=cache).numpy()

    together = last([0, 1, 2, 3])
    for row in range(4):
        assert np.array_equal(last([row])[0], together[row])


def test_pages_hold_what_a_cache_of_rows_holds(language):
    random = np.random.default_rng(3)
    prompts = [random.integers(1, language.config.vocab_size, count).tolist() for count in (5, 23, 40)]

    def decoded():
        table = PageTable(20, 16)
        stepper, sequences = Stepper(language, table, "float32"), []
        for prompt in prompts:
            sequence = Sequence(list(prompt), len(prompt))
            sequence.pages = table.take(table.pages_for(len(prompt) + 3))
            stepper.prefill([(sequence, len(prompt), None)])
            sequence.computed = len(prompt)
            sequences.append(sequence)
        logits = []
        for token in (7, 8):
            for sequence in sequences:
                sequence.tokens.append(token)
            logits.append(stepper.decode(sequences).numpy())
        return np.stack(logits)

    found, expected = decoded(), one_by_one(language, decoded)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3e-4 * np.abs(expected).max())


def test_eight_bits_of_keys_and_values_are_read_alike_by_both_ways(language):
    found, cache = steps(language, "int8", np.array([0, 3, 10]))
    expected, other = one_by_one(language, lambda: steps(language, "int8", np.array([0, 3, 10])))
    plain, whole = steps(language, "float32", np.array([0, 3, 10]))
    # A value between two codes may go either way, by the last bit of what comes before it.
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.005 * np.abs(expected).max())
    assert np.abs(np.array(found) - plain).max() < 0.05 * np.abs(plain).max()
    width = language.config.head_dim
    assert cache.nbytes * 4 * width == whole.nbytes * Int8Rows.bytes_of(width)
    differ = np.abs(cache._keys[0].codes.astype(int) - other._keys[0].codes)
    assert differ.max() <= 1 and (differ > 0).mean() < 0.01


def test_rows_of_8_bits_are_within_half_a_step_and_move_and_grow():
    values = np.random.default_rng(4).standard_normal([5, 2, 64]).astype("float32") * 9
    values[2, 1] = 0
    rows = Int8Rows(7, 2, 64)
    rows.put(np.array([1, 2, 3, 4, 6]), paddle.to_tensor(values))
    found = rows.take(np.array([1, 2, 3, 4, 6])).numpy()
    steps_of = np.abs(values.reshape([5, 2, 2, 32])).max(-1) / 127
    assert (np.abs(found - values).reshape([5, 2, 2, 32]) <= steps_of[..., None] * 0.5001).all()
    assert (found[2, 1] == 0).all() and (rows.take(slice(0, 1)).numpy() == 0).all()
    grown = rows.grown(9)
    grown.move(np.array([8, 0]), grown, np.array([1, 6]))
    assert np.array_equal(grown.take(np.array([8, 0])).numpy(), found[[0, 4]])
    assert Int8Rows(3, 2, 20).scales.shape == (3, 2, 1)


def test_what_does_not_fit_is_refused(language):
    stack = language.model.together.__closure__[0].cell_contents
    config = language.config
    x, table = paddle.zeros([1, 1, config.hidden_size]), paddle.zeros([1, 1, 1, config.head_dim])
    layout = KVCache(config, 1, 4, "float32").layout()
    with pytest.raises(ValueError, match="4 positions"):
        stack(x, table, table, layout, 5)
    with pytest.raises(ValueError, match="starts"):
        stack(x, table, table, layout, 2, starts=[2])
    with pytest.raises(ValueError, match="cos"):
        stack(x, table[..., :1], table, layout, 2)
    with pytest.raises(ValueError, match="at most"):
        stack(paddle.zeros([MOST_ROWS + 1, 1, config.hidden_size]), table, table, layout, 2)

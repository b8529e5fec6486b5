"""Choosing tokens, stopping, caching and streaming."""

import numpy as np
import paddle
import pytest

from paddlemix.errors import PromptError
from paddlemix.models.blocks.generation import Sampler, TextStream, generate_tokens
from paddlemix.models.blocks.language import KVCache
from paddlemix.models.blocks.layers import AttentionMask
from paddlemix.models.internvl2 import GenerationConfig
from tests.conftest import assert_close, load_reference


def test_greedy_tokens_equal_the_original(reference, chat_pixels):
    for chat in reference.expected["chats"]:
        pixels, _ = chat_pixels(chat["label"])
        ids = reference.model.generate(pixels, np.array([chat["input_ids"]]), max_new_tokens=len(chat["output_ids"]))
        assert ids.numpy()[0].tolist() == chat["output_ids"], chat["label"]


def test_decoding_with_and_without_the_cache_agrees(reference):
    language = reference.model.language_model
    ids = reference.arrays["lm_input_ids"]
    with paddle.no_grad():
        embeds = language.embed(paddle.to_tensor(ids))
        whole = language(embeds)
        cache = KVCache(language.config, ids.shape[0], ids.shape[1], embeds.dtype)
        # A prompt, single tokens, and a chunk of several at once.
        bounds = [0, 7, 8, 9, 15, ids.shape[1]]
        parts = [language(embeds[:, a:b], cache=cache) for a, b in zip(bounds, bounds[1:])]
    assert_close(paddle.concat(parts, axis=1), whole, 1e-5)


def test_the_cache_does_not_grow_and_refuses_to_overflow():
    language = load_reference("qwen2").model.language_model
    cache = KVCache(language.config, 1, 4, "float32")
    stores = [store.data_ptr() for store in cache._keys]
    with paddle.no_grad():
        language(language.embed(paddle.to_tensor([[1, 2, 3]])), cache=cache)
        language(language.embed(paddle.to_tensor([[4]])), cache=cache)
        with pytest.raises(ValueError, match="holds 4 positions; 5"):
            language(language.embed(paddle.to_tensor([[5]])), cache=cache)
    assert [store.data_ptr() for store in cache._keys] == stores


def test_truncating_and_growing_the_cache_keeps_what_was_before():
    language = load_reference("internlm2").model.language_model
    ids = paddle.to_tensor(load_reference("internlm2").arrays["lm_input_ids"][:1])
    with paddle.no_grad():
        whole = language(language.embed(ids))
        cache = KVCache(language.config, 1, 12, "float32")
        language(language.embed(ids[:, 5:17]), cache=cache)  # something else
        cache.truncate(0)
        language(language.embed(ids[:, :12]), cache=cache)
        cache.truncate(6)
        tail = language(language.embed(ids[:, 6:]), cache=cache.grown(ids.shape[1]))
    assert_close(tail, whole[:, 6:], 1e-5)


def test_a_step_waits_for_the_device_once(monkeypatch):
    """Only the choice of the token comes to the host, which the stop test needs."""
    language = load_reference("qwen2").model.language_model
    waits = []
    for name in ("numpy", "item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__len__"):
        original = getattr(paddle.Tensor, name)
        monkeypatch.setattr(
            paddle.Tensor, name, lambda self, *args, name=name, original=original: waits.append(name) or original(self, *args)
        )
    with paddle.no_grad():
        steps = generate_tokens(language, language.embed(paddle.to_tensor([[1, 2, 3]])), GenerationConfig(max_new_tokens=6))
        counts = [len(waits) for _ in steps]
    assert len(counts) == 6
    assert np.diff(counts).tolist() == [1] * 5, waits


def test_left_padded_rows_generate_what_they_generate_alone(reference):
    prompts = [chat["input_ids"] for chat in reference.expected["chats"] if chat["label"] == "text_only"]
    prompts.append(prompts[0][5:])
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(p)) + p for p in prompts])
    mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    together = reference.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12).numpy()
    for row, prompt in zip(together, prompts):
        alone = reference.model.generate(input_ids=np.array([prompt]), max_new_tokens=12).numpy()[0]
        assert row.tolist() == alone.tolist()


def test_right_padded_prompts_are_refused():
    with pytest.raises(PromptError, match="zeros at the left"):
        load_reference("qwen2").model.generate(input_ids=np.array([[1, 2]]), attention_mask=np.array([[1, 0]]))


def test_end_tokens_stop_a_row_and_pad_the_rest():
    reference = load_reference("qwen2")
    chat = reference.expected["chats"][-1]
    ids = np.array([chat["input_ids"], chat["input_ids"]])
    free = chat["output_ids"]
    end = free[3]
    first = free.index(end)
    out = reference.model.generate(input_ids=ids, max_new_tokens=10, eos_token_id=[end, 10**6]).numpy()
    assert out.shape == (2, first + 1)
    assert out[0].tolist() == free[: first + 1]
    later = reference.model.generate(input_ids=ids, max_new_tokens=10, eos_token_id=end, min_new_tokens=first + 2).numpy()
    assert later.shape[1] >= first + 2
    assert end not in later[0, : first + 2]


def test_the_context_limits_prompt_and_answer():
    reference = load_reference("llama_vit6b")  # context of 4,096
    with pytest.raises(PromptError, match="the prompt has 4096 tokens but the model's context is 4096"):
        reference.model.generate(input_ids=np.ones([1, 4096], "int64"))
    out = reference.model.generate(input_ids=np.ones([1, 4093], "int64"), max_new_tokens=50)
    assert out.shape[1] == 3


LOGITS = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype="float32"))


def draws(count=4000, **options):
    sampler = Sampler(GenerationConfig(do_sample=True, seed=1, **options))
    logits = paddle.to_tensor(LOGITS)
    return np.bincount([int(sampler(logits, [[]])[0]) for _ in range(count)], minlength=5) / count


def test_sampling_follows_the_distribution():
    assert np.abs(draws() - np.exp(LOGITS[0])).max() < 0.03


def test_top_k_and_top_p_cut_the_tail_and_keep_proportions():
    assert np.abs(draws(top_k=2) - np.array([4 / 7, 3 / 7, 0, 0, 0])).max() < 0.03
    # 0.4 + 0.3 does not reach 0.8, so the third token, which does, stays.
    assert np.abs(draws(top_p=0.8) - np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85).max() < 0.03
    assert np.abs(draws(top_p=0.4) - np.array([1, 0, 0, 0, 0])).max() == 0


def test_temperature_sharpens():
    squared = np.exp(2 * LOGITS[0])
    assert np.abs(draws(temperature=0.5) - squared / squared.sum()).max() < 0.03


def test_seeds_repeat_and_differ():
    reference = load_reference("qwen2")
    ids = np.array([reference.expected["chats"][-1]["input_ids"]])

    def run(seed):
        return reference.model.generate(input_ids=ids, max_new_tokens=8, do_sample=True, seed=seed).numpy().tolist()

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    sampler = Sampler(GenerationConfig(repetition_penalty=2.0))
    logits = paddle.to_tensor(np.array([[3.0, 2.0, -1.0]], dtype="float32"))
    assert int(sampler(logits, [[]])[0]) == 0
    assert int(sampler(logits, [[0]])[0]) == 1
    negative = paddle.to_tensor(np.array([[-1.0, -1.5]], dtype="float32"))
    assert int(sampler(negative, [[0, 0]])[0]) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_token": 5}, "'max_new_token' is not known: use max_new_tokens"),
        ({"num_beams": 0}, "num_beams"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(PromptError, match=message):
        GenerationConfig.of(options)


def streamed(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    pieces = []
    for token in ids:
        pieces.append(stream.put(token))
        if stream.stopped:
            break
    return [*pieces, stream.close()]


def test_streamed_text_is_the_decoded_text(reference):
    generator = np.random.default_rng(0)
    vocabulary = reference.model.config.llm_config.vocab_size
    answers = [chat["output_ids"] for chat in reference.expected["chats"]]
    answers += [generator.integers(3, vocabulary, size=40).tolist() for _ in range(30)]
    for ids in answers:
        pieces = streamed(reference.tokenizer, ids)
        assert "".join(pieces) == reference.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_streaming_never_splits_a_character(reference):
    text = "émoji 🐼 and 数字"
    ids = reference.tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(reference.tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5  # it does stream


def test_stop_strings_end_the_answer_and_are_not_part_of_it(reference):
    ids = reference.tokenizer.encode("A red panda. On a tree.", add_special_tokens=False)
    pieces = streamed(reference.tokenizer, ids, stop_strings=("unseen", ". On"))
    assert "".join(pieces) == "A red panda"
    assert "".join(streamed(reference.tokenizer, ids, stop_strings=("tree!",))) == "A red panda. On a tree."


def test_masks_agree_with_their_definition():
    mask = AttentionMask(starts=[0, 2], segments=[[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
    bias = mask.bias(3, 5).numpy()[:, 0]
    for row, start in enumerate([0, 2]):
        for i, query in enumerate(range(2, 5)):
            for key in range(5):
                allowed = key <= query and key >= start and mask.segments[row, key] == mask.segments[row, query]
                assert (bias[row, i, key] == 0) == allowed


def test_none_is_the_default_and_what_happens_anyway_is_accepted():
    given = dict.fromkeys(GenerationConfig.__dataclass_fields__)
    assert GenerationConfig.of(given | {"use_cache": True, "return_dict_in_generate": False}) == GenerationConfig()
    assert GenerationConfig(top_p=None, do_sample=False) == GenerationConfig()
    assert GenerationConfig.of({"max_length": 20, "max_new_tokens": 7}).max_length is None  # as the original
    for name, value in {"return_dict_in_generate": True, "no_repeat_ngram_size": 3, "penalty_alpha": 0.6}.items():
        with pytest.raises(PromptError, match=name):
            GenerationConfig.of({name: value})


def test_lengths_of_prompt_and_answer_together():
    model, ids = load_reference("qwen2").model, np.arange(5, 25)[None]
    assert model.generate(None, ids, max_length=26).shape == [1, 6]
    first = model.generate(None, ids, max_new_tokens=1).numpy()[0, 0]
    stopped = model.generate(None, ids, max_length=30, eos_token_id=int(first))
    assert stopped.shape == [1, 1]
    assert model.generate(None, ids, max_length=30, min_length=24, eos_token_id=int(first)).shape[1] >= 4
    with pytest.raises(PromptError, match="max_length is 20, but the prompt alone has 20"):
        model.generate(None, ids, max_length=20)


def test_min_p_leaves_out_the_unlikely():
    logits = paddle.to_tensor(np.log(np.array([[0.5, 0.3, 0.15, 0.05]], "float32")))
    draw = Sampler(GenerationConfig(do_sample=True, min_p=0.5, seed=1))
    assert {int(draw(logits, [[]])[0]) for _ in range(200)} == {0, 1}

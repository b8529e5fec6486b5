"""Of a prompt the last block computes no more than what is asked for, and the same."""

import numpy as np
import paddle
import pytest

from paddlemix.kernels import cpu as kernels
from paddlemix.models.blocks.decoding.loop import Loop
from paddlemix.models.blocks.generation import GenerationConfig
from paddlemix.models.blocks.last import ROWS, LastPositions
from paddlemix.models.blocks.layers import AttentionMask
from paddlemix.models.internvl2 import InternVLChatModel
from tests.conftest import FAMILIES, load_reference, tiles


@pytest.fixture(params=["eager", "inference"])
def engine(request):
    if request.param == "inference" and not kernels.available("float32"):
        pytest.skip("the CPU kernels cannot be built here (see the warning)")
    return request.param


def opened(family, engine, **more):
    reference = load_reference(family)
    model = InternVLChatModel.from_pretrained(str(reference.path), dtype="float32", engine=engine, **more)
    model.set_tokenizer(reference.tokenizer)
    model.eval()
    return reference, model


class Spy:
    """Notes the rows that go through a block's MLP."""

    def __init__(self, layer, engine):
        self.rows = []
        mlp = layer.mlp

        def counted(x, *more, **named):
            self.rows.append(int(np.prod(x.shape[:-1])))
            return mlp(x, *more, **named)

        if engine == "eager":
            del layer._sub_layers["mlp"]
            object.__setattr__(layer, "mlp", counted)
        else:
            layer.mlp = counted


@pytest.mark.parametrize("family", FAMILIES)
@paddle.no_grad()
def test_it_equals_those_positions_of_all(family, engine):
    _, model = opened(family, engine)
    llm = model.language_model
    ids = np.random.default_rng(0).integers(5, 90, [3, 40])
    embeds = llm.embed(paddle.to_tensor(ids))
    for mask, positions in (
        (None, -1),
        (AttentionMask([0, 7, 39]), -1),
        (None, np.array([12, 39, 0])),
        (AttentionMask([4, 0, 2]), np.array([20, 7, 39])),
        (AttentionMask([3, 3, 3], prefix=2), -1),
        (AttentionMask(segments=np.arange(40)[None].repeat(3, 0) // 20), np.array([12, 39, 20])),
    ):
        if mask is not None and engine == "inference" and (mask.segments is not None or not mask.is_spans):
            continue
        places = np.full(3, 39) if np.ndim(positions) == 0 else positions
        for cached in (0, 16):
            if cached and mask is not None and mask.segments is not None:
                continue
            both = []
            for asked in (None, positions):
                cache = llm.new_cache(3, 56, "float32") if cached else None
                if cached:
                    llm(embeds[:, :cached], cache=cache)
                out = llm(embeds, mask=mask, cache=cache, positions=asked)
                both.append(out.numpy() if asked is not None else out.numpy()[np.arange(3), places][:, None])
                if cached:
                    both.append(np.stack([store.numpy() for i in range(len(llm.model.layers)) for store in stores(cache, i)]))
            assert len(both) in (2, 4)
            for whole, one in zip(both[: len(both) // 2], both[len(both) // 2 :]):
                assert whole.shape == one.shape
                np.testing.assert_allclose(one, whole, atol=2e-5 * np.abs(whole).max())


def stores(cache, layer):
    return [store[:, :56] for store in cache.stores(layer)]


@paddle.no_grad()
def test_a_prompt_of_any_length_goes_through_the_last_mlp_once_a_row(engine):
    reference, model = opened(FAMILIES[0], engine)
    layers = model.language_model.model.layers
    first, last = Spy(layers[0], engine), Spy(layers[-1], engine)
    chat = max((chat for chat in reference.expected["chats"] if "<IMG" not in chat["label"]), key=lambda c: len(c["input_ids"]))
    ids = [number for number in chat["input_ids"] if number != model.img_context_token_id]
    model.generate(None, np.array([ids]), max_new_tokens=1)
    assert first.rows == [len(ids)] and last.rows == [ROWS]
    first.rows.clear(), last.rows.clear()
    model.generate(None, np.array([ids] * 3), max_new_tokens=1)
    assert first.rows == [3 * len(ids)] and last.rows == [3 * ROWS]


@paddle.no_grad()
def test_chunks_and_batches_of_questions_too(engine):
    reference, model = opened(FAMILIES[0], engine)
    layers = model.language_model.model.layers
    first, last = Spy(layers[0], engine), Spy(layers[-1], engine)
    loop = Loop(model, reference.tokenizer, 2048, 4, chunk=64)
    jobs = [loop.make_job(list(range(5, 5 + length)), GenerationConfig(max_new_tokens=1)) for length in (100, 103)]
    for job in jobs:
        loop.add(job)
    while any(event for event in loop.step()) or not all(job.answer for job in jobs):
        pass
    assert sum(first.rows) >= 203 and max(first.rows) >= 64
    assert len(last.rows) == len(first.rows) and set(last.rows) <= {ROWS, 2 * ROWS}
    first.rows.clear(), last.rows.clear()
    questions = ["<image>\nWhat is in the picture?", "Where?"]
    answers = model.batch_chat(reference.tokenizer, tiles(0), questions, {"max_new_tokens": 1}, [[7], []])
    assert len(answers) == 2 and max(first.rows) > 64
    assert max(last.rows) <= 2 * ROWS


def test_copies_fill_up_a_multiple():
    for rows in range(1, 40):
        last = LastPositions(np.zeros(rows, int), 5)
        assert rows * last.copies % ROWS == 0 and last.copies <= ROWS

"""Many sequences at once: each gets, token for token, what it gets alone, whatever happens around it."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddlemix.kernels import cpu as kernels
from paddlemix.models.blocks.chat import digested, end_of_answer, place_pictures
from paddlemix.models.blocks.conversation import insert_image_tokens
from paddlemix.models.blocks.decoding.loop import Loop
from paddlemix.models.blocks.decoding.pages import PageTable
from paddlemix.models.blocks.decoding.sampling import Chooser
from paddlemix.models.blocks.decoding.scheduler import Scheduler, Sequence
from paddlemix.models.blocks.decoding.step import Stepper
from paddlemix.models.blocks.generation import GenerationConfig
from paddlemix.models.internvl2 import InternVLChatModel
from tests.conftest import load_reference, tiles

QUESTIONS = [
    "Describe.",
    "<image>\nWhat is this?",
    "<image>\nand <image>\nCompare them.",
    "你好" * 9,
    "a b " * 40,
]
PICTURES = [[], [0], [0, 1], [], []]


def make(loop, reference, number, **options):
    """A job for question ``number`` of the list."""
    model, tokenizer = reference.model, reference.tokenizer
    pixels = [tiles(i) for i in PICTURES[number]]
    counts = [len(p) for p in pixels]
    (text,) = insert_image_tokens([QUESTIONS[number]], [n * model.config.num_image_token for n in counts])
    ids = tokenizer.encode(model.template().prompt(text))
    config = end_of_answer({"max_new_tokens": 12, **options}, model.template(), tokenizer, model)
    pictures = digested(np.concatenate(pixels), counts) if pixels else []
    return loop.make_job(ids, config, place_pictures(ids, model, pictures))


def run(loop, jobs):
    for job in jobs:
        loop.add(job)
    while loop.is_busy:
        loop.step()
    return [job.answer for job in jobs]


@pytest.fixture(scope="module", params=["eager", "inference"])
def alone(request):
    """Each question by itself in a cache of its own, by either engine."""
    reference = load_reference("qwen2")
    if request.param == "inference":
        if not kernels.available("float32"):
            pytest.skip("the CPU kernels cannot be built here")
        model = InternVLChatModel.from_pretrained(str(reference.path), dtype="float32", engine="inference")
        model.set_tokenizer(reference.tokenizer)
        reference = SimpleNamespace(**{**vars(reference), "model": model})
    options = {"do_sample": True, "seed": 5, "top_k": 0, "temperature": 1.5}
    found = []
    for number in range(len(QUESTIONS)):
        answers = []
        for chosen in ({}, options):
            loop = Loop(reference.model, reference.tokenizer, 2048)
            answers += run(loop, [make(loop, reference, number, **chosen)])
        found.append(answers)
    return reference, options, found


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("kept", [None, "int8"])
def test_a_step_of_the_engine_computes_each_sequence_alone(bits, kept):
    """To the last bit, in whatever number they come; and it is a step of plain Paddle's."""
    if not kernels.available("float32"):
        pytest.skip("the CPU kernels cannot be built here")
    path = str(load_reference("qwen2").path)

    def steps(engine, groups):
        model = InternVLChatModel.from_pretrained(
            path, dtype="float32", engine=engine, weight_dtype=bits, kv_cache_dtype=kept if engine == "inference" else None
        )
        table = PageTable(200)
        stepper, random = Stepper(model.language_model, table), np.random.default_rng(0)
        sequences = [Sequence(random.integers(5, 200, length).tolist(), length) for length in random.integers(2, 60, 41)]
        for sequence in sequences:
            sequence.pages = table.take(-(-len(sequence.tokens) // 16))
            stepper.prefill([(sequence, len(sequence.tokens) - 1, None)])
            sequence.computed = len(sequence.tokens) - 1
        found = {}
        for first, last in groups:
            found[first, last] = stepper.decode(sequences[first:last]).numpy()
            assert paddle.is_grad_enabled()  # again
        return found, getattr(model.language_model, "rows_alone", False)

    groups = [(0, 41), (0, 1), (7, 10), (3, 19), (30, 41)]
    found, alone = steps("inference", groups)
    assert alone == (bits is not None or kernels.PackedLinear(paddle.zeros([64, 64]), dtype="float32").alone)
    for first, last in groups[1:]:
        np.testing.assert_array_equal(found[first, last], found[0, 41][first:last])
    plain = steps("eager", groups[:1])[0][0, 41]
    assert np.abs(found[0, 41] - plain).max() < (1e-4 if bits is kept is None else 0.05) * np.abs(plain).max()


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
def test_short_pieces_of_prompts_go_along_with_answers(bits):
    """Pictures in them too: each to the last bit as alone, and as a prompt is computed otherwise."""
    if not kernels.available("float32"):
        pytest.skip("the CPU kernels cannot be built here")
    path = str(load_reference("qwen2").path)
    model = InternVLChatModel.from_pretrained(path, dtype="float32", engine="inference", weight_dtype=bits)
    random, table = np.random.default_rng(0), PageTable(200)
    stepper = Stepper(model.language_model, table)
    if not stepper.short:
        pytest.skip("this CPU's products of rows depend on how many there are")
    lengths = [32, 1, 9, 20, 31, 2, 17]
    prompts = [random.integers(5, 200, length).tolist() for length in lengths]
    features = paddle.to_tensor(random.standard_normal([4, model.config.llm_config.hidden_size]).astype("float32"))

    def fresh():
        """(sequence, tokens, features): prompts that nothing is computed of, two of them with a picture."""
        pieces = []
        for number, tokens in enumerate(prompts):
            sequence = Sequence(list(tokens), len(tokens), pages=table.take(-(-len(tokens) // 16)))
            pieces.append((sequence, len(tokens), (np.arange(3, 7), features + number) if number in (2, 4) else None))
        return pieces

    answering = Sequence(random.integers(5, 200, 40).tolist(), 40, pages=table.take(3))
    stepper.prefill([(answering, 39, None)])
    answering.computed = 39
    alone = [stepper.alone([piece]).numpy()[0] for piece in fresh()]
    step = stepper.decode([answering]).numpy()[0]
    together = stepper.alone([(answering, 1, None), *fresh()]).numpy()
    np.testing.assert_array_equal(together, [step, *alone])
    for expected, piece in zip(alone, fresh()):
        got = stepper.prefill([piece]).numpy()[0]
        assert np.abs(got - expected).max() < (1e-4 if bits is None else 0.05) * np.abs(expected).max()


def test_greedy_is_what_generate_gives(alone):
    reference, _, found = alone
    for number, (greedy, _) in enumerate(found):
        loop = Loop(reference.model, reference.tokenizer, 2048)
        job = make(loop, reference, number)
        pixels = [p.tiles for p in job.pictures]
        got = reference.model.generate(
            np.concatenate(pixels) if pixels else None,
            np.array([job.tokens]),
            generation_config=GenerationConfig.of(job.config, max_new_tokens=12),
        )
        assert got.numpy()[0].tolist()[: len(greedy)] == greedy


@pytest.mark.parametrize(
    "chunk, max_seqs, positions, at_once",
    [(512, 16, 8192, False), (512, 16, 8192, True), (16, 16, 8192, False), (32, 3, 8192, True), (64, 16, 0, False)],
)
def test_in_company_as_alone(alone, chunk, max_seqs, positions, at_once):
    reference, options, found = alone
    longest = 1 + max(make(Loop(reference.model, reference.tokenizer, 2048), reference, n).prompt for n in range(5)) + 12
    loop = Loop(reference.model, reference.tokenizer, positions or longest + 64, max_seqs, chunk=chunk, at_once=at_once)
    order = [3, 0, 2, 1, 4, 2, 0, 3, 1, 4]
    jobs = [make(loop, reference, n, **(options if i % 2 else {})) for i, n in enumerate(order)]
    expected = [found[n][i % 2] for i, n in enumerate(order)]
    assert run(loop, jobs) == expected
    assert loop.table.used == 0 and not loop.tower._wanted  # nothing is left behind


def test_a_conversation_is_computed_once_and_pictures_too(alone):
    reference, _, found = alone
    loop = Loop(reference.model, reference.tokenizer, 4096, image_cache=1 << 20)
    first, again = make(loop, reference, 2), make(loop, reference, 2)
    assert run(loop, [first]) == run(loop, [again]) == [found[2][0]]
    assert (first.cached, first.image_hits) == (0, 0) and again.image_hits == 2
    assert again.prompt - 16 <= again.cached < again.prompt
    other = make(loop, reference, 1)  # the same picture behind another text
    assert run(loop, [other]) == [found[1][0]] and other.image_hits == 1


def test_pages_of_other_pictures_are_not_taken(alone):
    reference, _, _ = alone
    loop = Loop(reference.model, reference.tokenizer, 4096)
    job, other = make(loop, reference, 1), make(loop, reference, 1)
    other.pictures[0].digest, other.pictures[0].tiles = b"other", tiles(1)[: len(other.pictures[0].tiles)] * 0
    run(loop, [job])
    run(loop, [other])
    assert other.cached < other.pictures[0].start + 16 and other.image_hits == 0


def test_who_leaves_is_gone_at_once(alone):
    reference, _, found = alone
    loop = Loop(reference.model, reference.tokenizer, 4096)
    stays, leaves, waits = (make(loop, reference, n) for n in (0, 2, 1))
    for job in (stays, leaves, waits):
        loop.add(job)
    for _ in range(6):
        loop.step()
    loop.remove(leaves)
    loop.remove(waits)
    while loop.is_busy:
        assert all(event.job is stays for event in loop.step())
    assert stays.answer == found[0][0] and loop.table.used == 0 and not loop.tower.is_busy


def test_pages_are_shared_counted_and_evicted_from_the_end():
    table = PageTable(5, 2)
    hashes = [b"a", b"b"]
    first = table.take(3)
    for page, value in zip(first, hashes):
        table.seal(page, value)
    assert table.used == 3 and table.share(hashes + [b"c"]) == first[:2]
    table.give_back(first)
    assert table.used == 2
    table.give_back(first[:2])
    assert table.used == 0 and table.available == 4
    assert len(table.take(3)) == 3  # two were free: the end of the sealed pages had to go
    assert table.share(hashes) == first[:1] and table.take(1) is None


def test_prompts_wait_for_others_but_not_long(alone):
    """Where pauses do not matter: a quarter of the places, or four turns."""
    reference, _, _ = alone
    loop = Loop(reference.model, reference.tokenizer, 8192, 8, at_once=True)
    first, second, third = (make(loop, reference, 3, max_new_tokens=40, min_new_tokens=40) for _ in range(3))
    loop.add(first)
    for _ in range(3):
        loop.step()
    loop.add(second)
    turns = 0
    while not second.answer:
        loop.step()
        turns += 1
    assert turns == 4 and len(first.answer) == 3 + turns
    loop.add(third)
    loop.add(make(loop, reference, 4))
    loop.step()
    assert len(third.answer) == 1


def test_the_youngest_gives_way_and_comes_back():
    scheduler = Scheduler(PageTable(5, 4), 4, 16)
    old, young = (Sequence([1] * 7 + [n], 8, variant=None) for n in (1, 2))
    scheduler.add(old)
    scheduler.add(young)
    assert scheduler.plan().admitted == [old, young] and scheduler.chunks() == [(old, 8), (young, 8)]
    scheduler.advanced(old, 8)
    old.tokens.append(3)  # takes a third page, of which there is none
    assert scheduler.plan().decode == [old] and list(scheduler.waiting) == [young] and young.computed == 0
    scheduler.remove(old)
    plan = scheduler.plan()
    assert plan.admitted == [young] and scheduler.chunks() == [(young, 8)]


def test_options_of_sampling():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], "float32"))

    def choose(answer=(), **options):
        return Chooser(GenerationConfig.of(options))(logits.copy(), list(answer))

    assert choose(presence_penalty=1.0, answer=[0]).token == 1 and choose(frequency_penalty=0.3, answer=[0, 0]).token == 1
    assert choose(logit_bias={3: 100}).token == 3
    choice = choose(logprobs=2, do_sample=True, temperature=0.5, seed=1)
    sharp = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    assert [i for i, _ in choice.top] == [0, 1] and np.allclose([p for _, p in choice.top], np.log(sharp[:2]), atol=1e-5)

    def drawn(count=99, **options):
        return [choose(do_sample=True, seed=n, top_k=0, **options).token for n in range(count)]

    assert (set(drawn()), set(drawn(min_p=0.4)), set(drawn(top_p=0.85))) == ({0, 1, 2, 3}, {0, 1}, {0, 1, 2})
    assert np.allclose(np.bincount(drawn(4000)) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_answers_in_a_form():
    pytest.importorskip("llguidance")
    reference = load_reference("qwen2")
    model, tokenizer = reference.model, reference.tokenizer
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["n", "b"]}
    schema["additionalProperties"] = False
    import json

    for options in ({}, {"do_sample": True, "seed": 3, "temperature": 2.0, "top_k": 0}):
        answer = json.loads(model.chat(tokenizer, None, "Hi", {"form": {"json_schema": schema}, **options}))
        assert set(answer) == {"n", "b"} and answer["n"] in (1, 2)
        assert model.chat(tokenizer, None, "Hi", {"form": {"choices": ["yes", "no"]}, **options}) in ("yes", "no")
    answers = model.batch_chat(tokenizer, None, ["Hi", "Ho"], {"form": {"regex": "[0-9]{3}-x"}})
    assert all(len(a) == 5 and a[:3].isdigit() and a.endswith("-x") for a in answers)


@pytest.mark.parametrize(
    "spec", [{"json_schema": {"$ref": "http://x/y"}}, {"regex": "("}, {"choices": []}, {"json_schema": 3}, {}]
)
def test_forms_that_are_none(spec):
    pytest.importorskip("llguidance")
    from paddlemix.errors import PromptError

    reference = load_reference("qwen2")
    with pytest.raises(PromptError):
        reference.model.chat(reference.tokenizer, None, "Hi", {"form": spec})


def test_answers_about_pictures_wait_for_each_other_and_nobody_else_does(alone, monkeypatch):
    """While a picture and its prompt are computed; with pauses that never end by themselves."""
    reference, _, found = alone
    monkeypatch.setattr("paddlemix.models.blocks.decoding.loop.HELD_BACK", 1e9)
    monkeypatch.setattr("paddlemix.models.blocks.decoding.loop.LONGEST_PAUSE", 1e9)
    loop = Loop(reference.model, reference.tokenizer, 8192, chunk=16)
    first, second, text = (make(loop, reference, n) for n in (1, 2, 0))
    loop.add(first)
    while len(first.answer) < 2:
        loop.step()
    loop.add(second)
    loop.step()
    said = len(first.answer)
    for _ in range(4):
        loop.step()
    assert second.prompt - second.computed > 64 and len(first.answer) == said < 5
    loop.add(text)
    while not text.ended:
        before = len(text.answer), len(first.answer)
        loop.step()
        if before[0]:  # it goes on at every turn, and takes the other along
            assert len(text.answer) == before[0] + 1 or text.ended
            assert len(first.answer) == before[1] + 1 or first.ended
    run(loop, [])
    assert [first.answer, second.answer, text.answer] == [found[n][0] for n in (1, 2, 0)]

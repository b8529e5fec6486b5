"""InternVL3 and 3.5: checkpoints of every language model of theirs against what the original computes."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddlemix.processors.internvl2.image import load_image
from safetensors.numpy import save_file

from paddlemix.checkpoints.files import open_weight_file
from paddlemix.checkpoints.tensors import convert_dtype
from paddlemix.errors import CheckpointError, ConfigError
from paddlemix.kernels import cpu as kernels
from paddlemix.models.blocks.chat import digested, place_pictures
from paddlemix.models.blocks.decoding.loop import Loop
from paddlemix.models.blocks.experts import Dispatch
from paddlemix.models.blocks.flops import decode_bytes, decoder_flops, parameter_counts
from paddlemix.models.blocks.generation import GenerationConfig
from paddlemix.models.blocks.language import KVCache
from paddlemix.models.blocks.lora import merge_lora, save_adapters, wrap_llm_lora
from paddlemix.models.internvl2 import ChatSession, InternVLChatConfig, InternVLChatModel, get_template, load_tokenizer
from paddlemix.models.internvl2.conversation import encode_conversations
from paddlemix.models.internvl2.merge_lora import merge
from tests.conftest import PICTURE_TOLERANCE, REFERENCE, assert_close

FOLDER = REFERENCE / "internvl3"
FAMILIES = ("qwen2_vit6b", "qwen3", "internlm3", "qwen3_moe", "gpt_oss")
ENGINES = ["eager"] + ["inference"] * kernels.available("float32")


@functools.cache
def load(family, engine="eager"):
    """A reference checkpoint; the model is shared: tests must not change it."""
    path = FOLDER / family / "checkpoint"
    model = InternVLChatModel.from_pretrained(str(path), dtype="float32", engine=engine)
    tokenizer = load_tokenizer(str(path))
    model.set_tokenizer(tokenizer)
    expected = json.loads((FOLDER / family / "expected.json").read_text(encoding="utf-8"))
    arrays = dict(np.load(FOLDER / family / "expected.npz"))
    return SimpleNamespace(name=family, path=path, model=model, tokenizer=tokenizer, expected=expected, arrays=arrays)


def read_tensors(directory):
    """All tensors of the one weight file in a directory, as float32."""
    with open_weight_file(str(directory / "model.safetensors")) as stored:
        return {k: convert_dtype(t.read(0, t.shape[0]), t.dtype, "float32") for k, t in stored.items()}


def pictures(reference, chat):
    """Pixel values of a chat: as many pictures as it has, a clip of single tiles."""
    counts = chat["num_patches_list"] or []
    most = 1 if len(counts) > 2 else reference.expected["max_num"]
    size = reference.model.config.image_size
    parts = [load_image(str(REFERENCE / "images" / f"img{i}.png"), input_size=size, max_num=most) for i in range(len(counts))]
    assert [len(part) for part in parts] == counts
    return np.concatenate(parts) if parts else None


@pytest.fixture(params=FAMILIES)
def reference(request):
    return load(request.param)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_logits_and_answers_equal_the_original(family, engine):
    reference = load(family, engine)
    model, arrays = reference.model, reference.arrays
    with paddle.no_grad():
        assert_close(model.extract_feature(arrays["pixel_values"]), arrays["image_features"])
        assert_close(model(input_ids=arrays["lm_input_ids"]).logits, arrays["lm_logits"])
    for i, chat in enumerate(reference.expected["chats"]):
        pixels, ids = pictures(reference, chat), np.array([chat["input_ids"]])
        with paddle.no_grad():
            assert_close(model(pixels, ids).logits[:, -1], arrays[f"first_logits_{i}"], PICTURE_TOLERANCE)
        tokens = model.generate(pixels, ids, max_new_tokens=len(chat["output_ids"]))
        assert tokens.numpy()[0].tolist() == chat["output_ids"], chat["label"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_answers_to_pixels_of_half_precision_are_those_of_float32(reference, dtype):
    chat = next(chat for chat in reference.expected["chats"] if chat["num_patches_list"])
    half = paddle.to_tensor(pictures(reference, chat)).astype(dtype)
    tokens = reference.model.generate(half, np.array([chat["input_ids"]]), max_new_tokens=len(chat["output_ids"]))
    assert tokens.numpy()[0].tolist() == chat["output_ids"], chat["label"]


def test_prompts_and_responses_equal_the_original(reference):
    model, tokenizer = reference.model, reference.tokenizer
    for chat in reference.expected["chats"]:
        history = chat["history"] and [tuple(turn) for turn in chat["history"]]
        session = ChatSession(model, tokenizer, history=history)
        options = {"max_new_tokens": len(chat["output_ids"])}
        session.ask(chat["question"], pictures(reference, chat), options, chat["num_patches_list"])
        assert session.history[-1][1].strip() == chat["response"]
        assert session._ids[: len(chat["input_ids"])] == chat["input_ids"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "internlm3"])  # no reference for that
def test_batches_equal_the_original_and_single_questions(family):
    reference = load(family)
    batch, model = reference.expected["batch_chat"], reference.model
    parts = [
        load_image(str(REFERENCE / "images" / f"img{i}.png"), input_size=model.config.image_size, max_num=6) for i in range(3)
    ]
    assert [len(part) for part in parts] == batch["num_patches_list"]
    options = {"max_new_tokens": len(batch["output_ids"][0])}
    answers, histories = model.batch_chat(
        reference.tokenizer, np.concatenate(parts), batch["questions"], options, batch["num_patches_list"], return_history=True
    )
    assert [turns[-1][1].strip() for turns in histories] == batch["responses"]
    for part, question, answer in zip(parts, batch["questions"], answers):
        assert model.chat(reference.tokenizer, part, question, options) == answer


def test_losses_gradients_and_steps_equal_the_original(reference):
    train = reference.expected["train"]
    batch = {key: np.array(train[key]) for key in ("input_ids", "attention_mask", "labels")}
    setting = train["adamw"]
    config = InternVLChatConfig.from_pretrained(reference.path)
    # In gpt_oss the balance loss of the reference has a fault and is left out of its steps.
    config.llm_config.output_router_logits = setting["with_balance_loss"]
    model = InternVLChatModel(config)
    model.set_state_dict(reference.model.state_dict())
    model.train()
    language = model.language_model
    optimiser = paddle.optimizer.AdamW(
        setting["lr"], *setting["betas"], setting["eps"], parameters=language.parameters(), weight_decay=setting["weight_decay"]
    )
    losses = []
    for step in range(len(setting["losses"])):
        output = model(**batch)
        losses.append(float(output.loss))
        output.loss.backward()
        if step == 0:
            check_gradients(config, language, train["grad_norms"])
            if "aux_loss" in train:
                assert_close(float(output.aux_loss), train["aux_loss"], 3e-4)
            else:
                assert (output.aux_loss is None) == (config.llm_config.experts is None)
        optimiser.step()
        optimiser.clear_grad()
    assert_close(losses, setting["losses"], 3e-4)
    weights = np.where(batch["labels"] >= 0, (batch["labels"][:, 1:] >= 0).sum(1, keepdims=True) ** -0.5, 0)
    with paddle.no_grad():
        config.llm_config.output_router_logits = False
        fresh = reference.model(**batch, loss_weight=weights).loss
        assert_close(float(fresh), train["loss_square"], 3e-4)
        assert_close(float(reference.model(**batch).loss), train["loss"], 3e-4)


def check_gradients(config, language, expected):
    """Norms of gradients, published tensor by published tensor, of which some share a parameter."""
    gradients = {f"language_model.{name}": p.grad.numpy() for name, p in language.named_parameters() if p.grad is not None}
    squares = {}
    for weight in config.weight_table():
        for part in weight.parts if weight.name in gradients else ():
            outputs = gradients[weight.name].T if weight.linear else gradients[weight.name]
            square = sum((outputs[output : output + count] ** 2).sum() for _, output, count in part.runs)
            squares[part.name] = squares.get(part.name, 0) + square
    assert len(expected) >= 11
    for name, norm in expected.items():
        assert squares[name] ** 0.5 == pytest.approx(norm, rel=3e-4), name


def test_labels_of_gpt_oss_equal_the_original():
    reference = load("gpt_oss")
    template = get_template("internvl3_5_gpt_oss")
    assert template.system_message == reference.expected["system_message"]
    for sample in reference.expected["train_samples"]:
        ids, labels = encode_conversations(sample["conversations"], reference.tokenizer, template, sample["image_token_counts"])
        assert ids == sample["input_ids"]
        assert labels == sample["labels"]


# ---------------------------------------------------------------------- one embedding for both ends


@pytest.mark.parametrize("tied_in", ["llm_config", "top"])
@pytest.mark.parametrize("with_head", [False, True])
def test_tied_heads_are_the_embedding_whatever_the_file_has(tmp_path, tied_in, with_head):
    reference = load("qwen3")
    values = json.loads((reference.path / "config.json").read_text())
    if tied_in == "top":
        values["llm_config"].pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(values))
    reference.model.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = read_tensors(tmp_path)
    assert "language_model.lm_head.weight" not in tensors
    if with_head:
        tensors["language_model.lm_head.weight"] = np.zeros_like(tensors["language_model.model.embed_tokens.weight"])
        save_file(tensors, tmp_path / "model.safetensors")
    model = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32")
    assert "language_model.lm_head.weight" not in model.state_dict()
    with paddle.no_grad():
        assert_close(model(input_ids=reference.arrays["lm_input_ids"]).logits, reference.arrays["lm_logits"])


def test_an_untied_head_that_is_not_there_begins_as_the_embedding(tmp_path):
    reference = load("qwen3")
    reference.model.save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    values["llm_config"]["tie_word_embeddings"] = values["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32")
    assert model.language_model.lm_head.weight.shape == [48, 720]
    with paddle.no_grad():
        assert_close(model(input_ids=reference.arrays["lm_input_ids"]).logits, reference.arrays["lm_logits"])


# ---------------------------------------------------------------------- many at once


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss", "internlm3"])
def test_many_in_pages_are_what_the_original_computes(family, engine):
    reference = load(family, engine)
    model, tokenizer = reference.model, reference.tokenizer
    loop = Loop(model, tokenizer, 8192, 3, chunk=32)  # chunks end within the windows of sliding layers
    jobs = []
    for chat in reference.expected["chats"]:
        ids, pixels = chat["input_ids"], pictures(reference, chat)
        found = digested(pixels, chat["num_patches_list"]) if pixels is not None else []
        config = GenerationConfig(max_new_tokens=len(chat["output_ids"]), eos_token_id=[])
        jobs.append(loop.make_job(ids, config, place_pictures(ids, model, found)))
        loop.add(jobs[-1])
    while loop.is_busy:
        assert all(event.error is None for event in loop.step())
    for job, chat in zip(jobs, reference.expected["chats"]):
        assert job.answer == chat["output_ids"], chat["label"]


# ---------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("engine", ENGINES)
def test_the_cache_of_a_sliding_layer_keeps_its_window(engine, monkeypatch):
    monkeypatch.setattr(KVCache, "SLACK", 5)
    language = load("gpt_oss", engine).model.language_model
    ids = load("gpt_oss").arrays["lm_input_ids"]
    cache = KVCache(language.config, 1, 64, "float32")
    with paddle.no_grad():
        whole = language(language.embed(paddle.to_tensor(ids)))
        pieces = []
        for at in (0, 3, 20, 21, 22, 23, 24, 25, 26, 35):
            stop = {0: 3, 3: 20, 26: 35, 35: 40}.get(at, at + 1)
            pieces.append(language(language.embed(paddle.to_tensor(ids[:, at:stop])), cache=cache))
        assert_close(paddle.concat(pieces, axis=1), whole, 1e-5)
        window = language.config.window(0)
        assert cache.stores(0)[0].shape[1] == window - 1 + 5 and cache.stores(1)[0].shape[1] == 64
        # Back by as much as is kept, and no further.
        assert cache.reusable(35) == 35 and cache.reusable(34) == 0 and cache.reusable(0) == 0
        cache.truncate(36)
        assert_close(language(language.embed(paddle.to_tensor(ids[:, 36:])), cache=cache), whole[:, 36:], 1e-5)


def test_padding_on_the_left_changes_nothing_where_layers_slide():
    reference = load("gpt_oss")
    ids = reference.arrays["lm_input_ids"][:, :24]
    padded = np.concatenate([np.zeros([1, 9], "int64"), ids], 1)
    mask = (np.arange(33) >= 9).astype("int64")[None]
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    with paddle.no_grad():
        plain = reference.model(input_ids=ids).logits
        shifted = reference.model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 9:]
    assert_close(shifted, plain, 1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_packed_rows_compute_what_single_rows_do(family):
    reference = load(family)
    ids = reference.arrays["lm_input_ids"]
    first, second = ids[:, :17], ids[:, 17:40]
    segments = np.repeat([1, 2], [17, 23])[None]
    positions = np.concatenate([np.arange(17), np.arange(23)])[None]
    with paddle.no_grad():
        packed = reference.model(input_ids=ids, position_ids=positions, segment_ids=segments).logits
        assert_close(packed[:, :17], reference.model(input_ids=first).logits, 1e-5)
        assert_close(packed[:, 17:], reference.model(input_ids=second).logits, 1e-5)


# ---------------------------------------------------------------------- experts


def test_tokens_find_their_experts_and_come_back():
    chosen = np.array([[3, 1], [1, 0], [3, 0]])
    dispatch = Dispatch(chosen, 5)
    assert [expert for expert, _, _ in dispatch.shares] == [0, 1, 3]
    for expert, first, last in dispatch.shares:
        assert sorted(dispatch.rows[first:last]) == [token for token, experts in enumerate(chosen) if expert in experts]
    assert dispatch.rows[dispatch.places].tolist() == [0, 0, 1, 1, 2, 2]
    trained = Dispatch(chosen, 5, all_experts=True)
    assert {expert for expert, _, _ in trained.shares} == set(range(5))
    assert trained.places.max() < chosen.size  # the extra rows are not used


@pytest.mark.parametrize("recompute", [False, True])
def test_idle_experts_get_gradients_of_zero(recompute):
    reference = load("qwen3_moe")
    model = InternVLChatModel(reference.model.config)
    model.set_state_dict(reference.model.state_dict())
    model.train()
    model.language_model.model.enable_recompute = recompute
    ids = reference.arrays["lm_input_ids"][:, :2]
    output = model(input_ids=ids, labels=ids)
    (output.loss + output.aux_loss).backward()
    experts = model.language_model.model.layers[0].mlp.experts
    norms = [float(expert.down_proj.weight.grad.norm()) for expert in experts]
    assert any(norm == 0 for norm in norms) and any(norm > 0 for norm in norms)
    assert float(model.language_model.model.layers[0].mlp.gate.weight.grad.norm()) > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_attention_and_experts_learn_and_come_back(tmp_path, family):
    reference = load(family)
    model = InternVLChatModel(InternVLChatConfig.from_pretrained(reference.path))
    model.set_state_dict(reference.model.state_dict())
    wrap_llm_lora(model, 4, dropout=0.0)
    model.train()
    ids = reference.arrays["lm_input_ids"]
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient and ".lora_" in name}
    on_experts = [name for name in trained if ".experts." in name]
    experts = model.config.llm_config.experts.count
    of_an_expert = {"qwen3_moe": 6, "gpt_oss": 4}[family]  # A and B on gate, up and down; gpt-oss has gate and up in one
    assert len(on_experts) == experts * of_an_expert * model.config.llm_config.num_hidden_layers
    optimiser = paddle.optimizer.SGD(0.1, parameters=list(trained.values()))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.clear_grad()
    model.eval()
    with paddle.no_grad():
        learned = model(input_ids=ids).logits
        model.save_pretrained(str(tmp_path))
        again = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32", engine="eager")
        assert_close(again(input_ids=ids).logits, learned, 1e-5)
        assert np.abs(learned.numpy() - reference.arrays["lm_logits"]).max() > 1e-2
        merge_lora(again)
        assert_close(again(input_ids=ids).logits, learned, 1e-4)
        # The same from file to file.
        for path in reference.path.iterdir():
            if path.name != "config.json" and not path.name.startswith("model"):
                shutil.copy(path, tmp_path)
        merge(str(tmp_path), str(tmp_path / "merged"))
        merged = InternVLChatModel.from_pretrained(str(tmp_path / "merged"), dtype="float32", engine="eager")
        assert_close(merged(input_ids=ids).logits, learned, 1e-4)


def test_adapters_on_stacked_experts_have_no_form_of_peft(tmp_path):
    model = InternVLChatModel(InternVLChatConfig.from_pretrained(load("gpt_oss").path))
    wrap_llm_lora(model, 2)
    with pytest.raises(ConfigError, match="gpt-oss's experts.*merge"):
        save_adapters(model, str(tmp_path))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_else_is_in_the_batch_changes_nothing(family, engine):
    """A row's logits are its own, whatever rows are beside it and however many tokens go to its experts."""
    model = load(family, engine).model
    ids = load(family).arrays["lm_input_ids"][:1, :24]
    random = np.random.default_rng(0)
    others = [random.integers(0, 600, ids.shape) for _ in range(7)]
    with paddle.no_grad():
        alone = model(input_ids=ids).logits
        for batch in ([ids, others[0]], [*others[:3], ids], [ids] * 3, [others[0], ids, *others[1:]]):
            place = next(i for i, row in enumerate(batch) if row is ids)
            assert_close(model(input_ids=np.concatenate(batch)).logits[place : place + 1], alone, 1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_answers_do_not_depend_on_the_batch(family):
    reference = load(family)
    size = reference.model.config.image_size
    part = load_image(str(REFERENCE / "images" / "img0.png"), input_size=size, max_num=1)
    questions = ["What?", "Name a colour and two numbers.", "a", "Where is the second of them, and how large is it?"]
    options = {"max_new_tokens": 12}
    single = [reference.model.chat(reference.tokenizer, part, question, options) for question in questions]
    for chosen in (questions, questions[::-1], questions[1:] * 2):
        pixels, counts = np.concatenate([part] * len(chosen)), [len(part)] * len(chosen)
        answers = reference.model.batch_chat(reference.tokenizer, pixels, chosen, options, counts)
        assert answers == [single[questions.index(question)] for question in chosen]


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_model(family):
    model = load(family).model
    language, counts = model.language_model, parameter_counts(model.config)
    assert counts["embedding"] == language.model.embed_tokens.weight.size
    assert counts["decoder"] == sum(
        p.size for layer in (language.model.layers, language.model.norm) for p in layer.parameters()
    )
    assert counts["head"] == sum(p.size for p in language.lm_head.parameters())
    assert decoder_flops(model.config, 5) + decoder_flops(model.config, 40, 5) == decoder_flops(model.config, 45) + (
        decoder_flops(model.config, 0)
    )


def test_a_token_pays_for_its_own_experts_and_a_window():
    config = load("gpt_oss").model.config
    llm = config.llm_config
    expert = 3 * llm.hidden_size * llm.intermediate_size
    attention = 2 * (4 + 2) * 16 * 48
    weights = 4 * (attention + 48 * 4 + 2 * expert) + 48 * 720
    seen = 2 * 16 + 2 * 41  # of 41 positions the sliding layers see 16
    assert decoder_flops(config, 1, 40) == 2 * (weights + 2 * seen * 4 * 16)
    counts = parameter_counts(config)
    idle = 4 * 2 * expert
    assert decode_bytes(config, 40, "bfloat16") == 2 * (
        counts["decoder"] + counts["head"] - idle + 2 * 2 * 16 * (2 * 16 + 2 * 40)
    )


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("qwen3_moe", {"num_experts_per_tok": 9}, "there are 8 experts"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("gpt_oss", {"layer_types": ["global"] * 4}, "layer_types"),
        ("qwen3", {"head_dim": 21}, "head_dim is 21"),
        ("qwen3", {"architectures": ["Qwen9ForCausalLM"]}, "supported are .*Qwen3MoeForCausalLM"),
    ],
)
def test_configurations_that_cannot_be(family, change, message):
    values = json.loads((FOLDER / family / "checkpoint" / "config.json").read_text())
    values["llm_config"].update(change)
    with pytest.raises(ConfigError, match=message):
        InternVLChatConfig.from_dict(values)


@pytest.mark.parametrize("change, message", [("missing", "mlp.gate.weight"), ("narrow", r"mlp.gate.weight is \[8, 40\]")])
def test_a_router_must_be_there_and_fit(tmp_path, change, message):
    reference = load("qwen3_moe")
    reference.model.save_pretrained(str(tmp_path))
    tensors = read_tensors(tmp_path)
    name = "language_model.model.layers.1.mlp.gate.weight"
    if change == "missing":
        tensors.pop(name)
    else:
        tensors[name] = np.ascontiguousarray(tensors[name][:, :40])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss", "internlm3"])
def test_saved_files_are_the_published_ones(tmp_path, family):
    reference = load(family)
    reference.model.save_pretrained(str(tmp_path))
    published, saved = read_tensors(reference.path), read_tensors(tmp_path)
    assert published.keys() == saved.keys()
    for name, values in published.items():
        assert np.array_equal(values, saved[name]), name

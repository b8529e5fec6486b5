"""InternVL-C and -G against what the original computes, and against themselves in other circumstances."""

import json
import pickle
import shutil

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from paddlemix.checkpoints import Checkpoint, convert_dtype, open_weight_file
from paddlemix.checkpoints.tensors import row_count
from paddlemix.errors import CheckpointError, ConfigError, ImageError, PromptError
from paddlemix.models.internvl import InternVisionModel, InternVLConfig, InternVLModel, load_tokenizer, transform
from tests.conftest import PICTURE_TOLERANCE, REFERENCE, assert_close, assert_pixels, load_reference
from tests.models.internvl.helpers import CHECKPOINT, LORA, PICTURES, fresh, gradients, load, loss_inputs, retrieval_inputs

# ---------------------------------------------------------------------- inputs


def test_ids_equal_the_original():
    tokenizer, expected = load().tokenizer, load().expected
    assert tokenizer(expected["texts"]).tolist() == expected["text_ids"]
    assert tokenizer(expected["texts"], prefix="").tolist() == expected["ids_without_prefix"]
    assert tokenizer.encode_prompt("English caption:") == expected["caption_prompt_ids"]
    assert tokenizer(["a"]).dtype == np.int64


@pytest.mark.parametrize("task", ["retrieval", "classification"])
def test_pixels_equal_the_original(task):
    pixels = np.stack([transform(picture, task, 56) for picture in PICTURES])
    assert_pixels(pixels, load().arrays[f"pixels_{task}"], 0.224)


def test_a_crop_is_from_the_middle_and_a_stretch_is_whole():
    picture = np.zeros([40, 100, 3], "uint8")
    picture[:, 30:70] = 255
    from PIL import Image

    white = transform(Image.fromarray(np.full([4, 4, 3], 255, "uint8")), "classification", 8)[:, 4, 4]
    cropped = transform(Image.fromarray(picture), "classification", 40)
    assert np.array_equal(cropped, np.broadcast_to(white[:, None, None], [3, 40, 40]))
    squeezed = transform(Image.fromarray(picture), "retrieval", 40)
    assert np.abs(squeezed[:, 20, 20] - white).max() < 1e-6 and (squeezed[:, 20, 2] < white).all()


@pytest.mark.parametrize(
    "arguments, told",
    [(("segmentation", 56), "it must be one of"), (("retrieval", 0), "from 1"), (("retrieval", 2.5), "from 1")],
)
def test_a_transform_that_makes_no_sense(arguments, told):
    with pytest.raises(ImageError, match=told):
        transform(PICTURES[0], *arguments)


# ---------------------------------------------------------------------- features


@pytest.mark.parametrize("mode", ["c", "g"])
def test_features_and_scores_equal_the_original(mode):
    model, arrays, expected = load().model, load().arrays, load().expected
    pixels, ids = arrays["pixels_retrieval"], np.array(expected["text_ids"])
    name = f"InternVL-{mode.upper()}"
    with paddle.no_grad():
        assert_close(model.encode_image(paddle.to_tensor(pixels), mode=name), arrays[f"image_{mode}"])
        per_image, per_text = model(image=pixels, text=paddle.to_tensor(ids), mode=name)
    assert_close(per_image, arrays[f"logits_{mode}"])
    assert np.array_equal(per_text.numpy(), per_image.numpy().T)


def test_tower_queries_and_texts_equal_the_original():
    model, arrays = load().model, load().arrays
    with paddle.no_grad():
        vision = model.vision_model(paddle.to_tensor(arrays["pixels_retrieval"]))
        assert_close(vision, arrays["vision_last"])
        assert_close(model.query(vision), arrays["query_output"])
        assert_close(model.encode_text(np.array(load().expected["text_ids"])), arrays["text"])


@pytest.mark.parametrize("mode", ["c", "g"])
def test_larger_pictures(mode):
    size = load().expected["large_image_size"]
    pixels = np.stack([transform(picture, "retrieval", size) for picture in PICTURES])
    with paddle.no_grad():
        assert_close(
            load().model.encode_image(pixels, f"InternVL-{mode.upper()}"),
            load().arrays[f"large_image_{mode}"],
            PICTURE_TOLERANCE,
        )


def test_pictures_need_not_be_square_and_a_batch_is_as_each_alone():
    pixels = np.random.default_rng(0).standard_normal([3, 3, 56, 84]).astype("float32")
    with paddle.no_grad():
        together = load().model.encode_image(pixels, "InternVL-G")
        alone = [load().model.encode_image(pixels[i : i + 1], "InternVL-G").numpy()[0] for i in range(3)]
    assert_close(together, np.stack(alone), 1e-5)


def test_an_unknown_token_in_a_text_is_not_attended():
    """Only ids above 0 are seen, also in the middle: what stands at 0 has no say, but positions count it."""
    model = fresh(train=False)
    ids = np.array(load().expected["text_ids"][:1])
    ids[0, 5] = 0
    with paddle.no_grad():
        before = model.encode_text(ids).numpy()
        table = model.qllama.model.embed_tokens.weight
        values = table.numpy()
        values[0] = 3.0
        table.set_value(values)
        after = model.encode_text(ids).numpy()
    assert_close(after, before, 1e-6)
    ids[0, 5] = 7
    with paddle.no_grad():
        assert np.abs(model.encode_text(ids).numpy() - before).max() > 1e-3


def test_bad_inputs_are_refused():
    model = load().model
    pixels = load().arrays["pixels_retrieval"]
    ids = np.array(load().expected["text_ids"])
    for call, told in (
        (lambda: model.encode_image(pixels[0]), "number, 3, height"),
        (lambda: model.encode_image((pixels * 0 + 3).astype("uint8")), "normalised"),
        (lambda: model.encode_image(pixels, "InternVL-X"), "InternVL-C or InternVL-G"),
        (lambda: model.encode_text(ids[0]), "whole numbers"),
        (lambda: model.encode_text(ids * 0), "no ids above 0"),
        (lambda: model.generate(pixels, ids[:2]), "2 prompts but 4 pictures"),
        (lambda: model.generate(pixels[:1], ids[:1, :4], np.array([[1, 1, 0, 0]])), "on the left"),
        (lambda: model.generate(pixels[:1], ids[:1], max_new_tokens=5000), "context"),
    ):
        with pytest.raises(PromptError, match=told):
            call()


# ---------------------------------------------------------------------- captions


@pytest.mark.parametrize("number", range(len(load().expected["captions"])))
def test_captions_equal_the_original(number):
    caption = dict(load().expected["captions"][number])
    ids, texts = caption.pop("ids"), caption.pop("text")
    prompt = np.tile(load().expected["caption_prompt_ids"], [4, 1])
    found = load().model.generate(load().arrays["pixels_retrieval"], prompt, np.ones_like(prompt), **caption)
    assert found.numpy().tolist() == ids
    assert [load().tokenizer.decode(row) for row in found.numpy()] == texts


@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_padded_on_the_left_change_nothing(beams):
    """Also in a batch of prompts of different lengths, each as alone."""
    prompt = load().expected["caption_prompt_ids"]
    pixels = load().arrays["pixels_retrieval"]
    prompts = [prompt, prompt[:6], prompt[:1], prompt[:9]]
    options = dict(num_beams=beams, max_new_tokens=10, min_new_tokens=4)
    padded = np.array([[0] * (17 - len(p)) + p for p in prompts])
    together = load().model.generate(pixels, padded, (padded > 0).astype("int64"), **options).numpy()
    for i, p in enumerate(prompts):
        alone = load().model.generate(pixels[i : i + 1], np.array([p]), **options).numpy()[0]
        assert together[i, : len(alone)].tolist() == alone.tolist()
        assert not together[i, len(alone) :].any()


# ---------------------------------------------------------------------- losses


def test_stage_two_loss_and_gradients_equal_the_original():
    model, expected = fresh(), load().expected
    output = model.loss(**loss_inputs())
    for name, value in expected["loss"].items():
        assert_close(float(getattr(output, name)), value)
    found = gradients(model, output.loss)
    for name, value in expected["grad_norms"].items():
        assert_close(np.linalg.norm(found[name]), value)


@pytest.mark.parametrize("kind", ["distinct", "shared"])
def test_retrieval_loss_and_gradients_equal_the_original(kind):
    model, expected = fresh(), load().expected["retrieval_loss"][kind]
    output = model.retrieval_loss(**retrieval_inputs(expected["image_ids"]))
    for name in ("loss", "loss_itm", "loss_itc"):
        assert_close(float(getattr(output, name)), expected[name])
    found = gradients(model, output.loss)
    for name, value in expected["grad_norms"].items():
        assert_close(np.linalg.norm(found[name]), value)


def test_image_ids_in_any_form_and_wider_padding_change_nothing():
    model, expected = fresh(), load().expected["retrieval_loss"]["shared"]
    inputs = retrieval_inputs(expected["image_ids"])
    for name, value in inputs.items():
        if name.endswith(("_ids", "_mask")) and value.ndim == 2:
            inputs[name] = np.pad(value, [(0, 0), (0, 5)])
    for form in (list, np.array, paddle.to_tensor):
        assert_close(float(model.retrieval_loss(**{**inputs, "image_ids": form(expected["image_ids"])}).loss), expected["loss"])


def test_of_three_rows_two_are_asked_about_negatives():
    """By the rule of the original: the last third row is positive; targets that are left out do not count."""
    model, inputs = fresh(), loss_inputs(slice(0, 3))
    with paddle.no_grad():
        whole = float(model.loss(**inputs).loss_itm)
        parts = []
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            if row == 2:
                one["negative_input_ids"], one["negative_attention_mask"] = (
                    one["positive_input_ids"],
                    one["positive_attention_mask"],
                )
            vision = model.vision_model(paddle.to_tensor(one["pixel_values"]))
            parts.append(
                float(model._matching(vision, one["negative_input_ids"], one["negative_attention_mask"], np.array([row == 2])))
            )
    assert whole == pytest.approx(np.mean(parts), rel=1e-5)


def test_rows_without_texts_are_left_out():
    model, inputs = fresh(), loss_inputs()
    empty = np.zeros_like(inputs["negative_attention_mask"])
    empty[:, :2] = 1
    inputs["negative_attention_mask"] = inputs["positive_attention_mask"] = empty
    nothing = np.zeros_like(inputs["summarize_attention_mask"])
    nothing[:, :5] = 1
    inputs["summarize_attention_mask"] = nothing
    output = model.loss(**inputs)
    assert float(output.loss_itm) == 0 and float(output.loss_itc) == 0
    assert float(output.loss) == pytest.approx(float(output.loss_itg))
    assert np.isfinite(gradients(model, output.loss)["query_tokens"]).all()


def test_label_smoothing_by_hand():
    model = fresh()
    model.config.label_smoothing = 0.2
    with paddle.no_grad():
        vision = model.vision_model(paddle.to_tensor(loss_inputs()["pixel_values"]))
        pictures = model.clip_projector2(model.query(vision)).numpy()
        texts = model.encode_text(loss_inputs()["summarize_input_ids"]).numpy()
        found = float(model.loss(**loss_inputs()).loss_itc)
    pictures, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pictures, texts))
    scores = (pictures @ texts.T * np.exp(model.logit_scale.numpy())).astype("float64")
    losses = []
    for s in (scores, scores.T):
        logs = s - np.log(np.exp(s).sum(1, keepdims=True))
        losses.append(-(0.8 * np.diag(logs) + 0.2 * logs.mean(1)).mean())
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("mode", ["c", "g"])
def test_adapters_in_the_file_are_merged(mode):
    model = InternVLModel.from_pretrained(LORA, dtype="float32")
    assert model.config.use_backbone_lora == model.config.use_qllama_lora == 0
    with paddle.no_grad():
        features = model.encode_image(load().arrays["pixels_retrieval"], f"InternVL-{mode.upper()}")
        assert_close(features, load().arrays[f"lora_image_{mode}"])
        assert_close(model.encode_text(np.array(load().expected["text_ids"])), load().arrays["lora_text"])


def load_file(path):
    """``{name: float32 array}`` of a weight file."""
    with open_weight_file(path) as tensors:
        return {
            name: convert_dtype(tensor.read(0, row_count(tensor.shape)), tensor.dtype, "float32").reshape(tensor.shape)
            for name, tensor in tensors.items()
        }


def copied(source, target, change=None, config=None):
    """A copy of a checkpoint whose tensors are what ``change`` makes of them."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    if change is not None:
        tensors = change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**values, **(config or {})}), encoding="utf-8")
    return target


def test_adapters_of_older_files(tmp_path):
    """Base weights under their own names, as older versions of PEFT wrote them."""
    old = copied(LORA, tmp_path / "old", lambda tensors: {n.replace(".base_layer.", "."): t for n, t in tensors.items()})
    with paddle.no_grad():
        features = InternVLModel.from_pretrained(old, dtype="float32").encode_image(load().arrays["pixels_retrieval"])
    assert_close(features, load().arrays["lora_image_c"])


@pytest.mark.parametrize("tower", ["vision_model", "qllama"])
def test_each_rank_alone(tmp_path, tower):
    other = {"vision_model": "qllama", "qllama": "vision_model"}[tower]
    key = {"vision_model": "use_backbone_lora", "qllama": "use_qllama_lora"}

    def change(tensors):
        kept = {n: t for n, t in tensors.items() if not (n.startswith(other) and ".lora_" in n)}
        strip = {n: n.replace(".base_model.model.", ".", 1).replace(".base_layer.", ".") for n in kept if n.startswith(other)}
        return {strip.get(n, n): t for n, t in kept.items()}

    one = InternVLModel.from_pretrained(copied(LORA, tmp_path / "one", change, {key[other]: 0}), dtype="float32")
    both = InternVLModel.from_pretrained(LORA, dtype="float32").state_dict()
    plain = load().model.state_dict()
    for name, value in one.state_dict().items():
        assert np.array_equal(value.numpy(), (both if name.startswith(tower) else plain)[name].numpy()), name


@pytest.mark.parametrize("layout", ["torch", "paddle"])
def test_saved_files_are_read_again(tmp_path, layout):
    load().model.save_pretrained(tmp_path, layout=layout)
    assert Checkpoint(tmp_path, InternVLConfig.from_pretrained(tmp_path)).layout == layout
    again = InternVLModel.from_pretrained(tmp_path, dtype="float32")
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in load().model.named_parameters()]
    for name, value in load().model.state_dict().items():
        assert np.array_equal(value.numpy(), again.state_dict()[name].numpy()), name
    names = load_file(tmp_path / "model.safetensors")
    assert names["text_projection"].shape == (48, 32) and names["logit_scale"].shape == ()
    assert names["clip_projector.cross_attn.proj.weight"].shape == ((32, 48) if layout == "torch" else (48, 32))


def test_the_torch_layout_is_the_file_that_was_read(tmp_path):
    load().model.save_pretrained(tmp_path)
    original, saved = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    for name, value in original.items():
        assert np.array_equal(value, saved[name]), name


def test_names_of_parameters_are_those_of_the_file():
    assert {n for n, _ in load().model.named_parameters()} == load_file(CHECKPOINT / "model.safetensors").keys()


def test_the_files_of_paddle(tmp_path):
    """A pickle of arrays, in which the scale is a single number."""
    linear = {w.parts[0].name for w in load().model.config.weight_table() if w.linear}
    tensors = {n: v.T if n in linear else v for n, v in load_file(CHECKPOINT / "model.safetensors").items()}
    shutil.copytree(CHECKPOINT, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors"))
    with open(tmp_path / "x" / "model_state.pdparams", "wb") as file:
        pickle.dump(tensors, file, protocol=2)
    model = InternVLModel.from_pretrained(tmp_path / "x", dtype="float32")
    assert float(model.logit_scale) == float(load().model.logit_scale)


def test_the_table_of_a_forced_size_is_in_the_file(tmp_path):
    """A fine-tuned model's ``force_image_size``: its table of positions has that size, whatever the tower's config says."""

    def change(tensors):
        name = "vision_model.embeddings.position_embedding"
        return {**tensors, name: np.repeat(tensors[name][:, :1], 1 + 36, axis=1)}

    large = copied(CHECKPOINT, tmp_path / "large", change, {"force_image_size": 84})
    model = InternVLModel.from_pretrained(large, dtype="float32")
    assert model.config.image_size == 84
    model.save_pretrained(tmp_path / "again")
    again = InternVLModel.from_pretrained(tmp_path / "again", dtype="float32")
    assert again.vision_model.embeddings.native_grid == (6, 6)
    assert InternVisionModel.from_pretrained(large, dtype="float32").embeddings.native_grid == (6, 6)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"num_query_token": 0}, "num_query_token is 0"),
        ({"clip_embed_dim": "768"}, "clip_embed_dim is '768'"),
        ({"attn_pool_num_heads": 5}, "attn_pool_num_heads is 5: both widths"),
        ({"num_query_token": 2**40}, "num_query_token is 1099511627776"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"use_qllama_lora": -1}, "use_qllama_lora is -1"),
        ({"qllama_config": None}, "'qllama_config' is missing"),
        ({"force_image_size": "big"}, "force_image_size is 'big'"),
    ],
)
def test_bad_configurations(changes, told):
    values = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match=told):
        InternVLConfig.from_dict({**values, **changes})


def test_a_chat_model_is_not_one_of_these(tmp_path):
    with pytest.raises(ConfigError, match="'qllama_config' is missing"):
        InternVLModel.from_pretrained(REFERENCE / "qwen2" / "checkpoint", dtype="float32")
    copied(CHECKPOINT, tmp_path / "cut", lambda tensors: {n: t for n, t in tensors.items() if n != "logit_scale"})
    with pytest.raises(CheckpointError, match=r"1 missing \(logit_scale\)"):
        InternVLModel.from_pretrained(tmp_path / "cut", dtype="float32")


# ---------------------------------------------------------------------- towers


@pytest.mark.parametrize("family", ["qwen2", "llama_vit6b"])
def test_towers_of_both_flavours_alone(tmp_path, family):
    reference = load_reference(family)
    tower = InternVisionModel.from_pretrained(reference.path, dtype="float32")
    pixels = paddle.to_tensor(reference.arrays["pixel_values"])
    with paddle.no_grad():
        output = tower(pixels, output_hidden_states=True)
        plain = tower(pixels)
    assert plain.hidden_states is None
    assert_close(plain.last_hidden_state, reference.arrays["vit_last_hidden_state"])
    assert_close(plain.pooler_output, reference.arrays["vit_last_hidden_state"][:, 0])
    assert len(output.hidden_states) == 1 + tower.config.num_hidden_layers
    assert np.array_equal(output.hidden_states[-1].numpy(), plain.last_hidden_state.numpy())
    assert_close(output.hidden_states[reference.model.config.select_layer], reference.arrays["vit_hidden_state_select"])

    tower.save_pretrained(tmp_path, layout="paddle")
    assert "embeddings.class_embedding" in load_file(tmp_path / "model.safetensors")
    again = InternVisionModel.from_pretrained(tmp_path, dtype="float32")
    with paddle.no_grad():
        assert np.array_equal(again(pixels).last_hidden_state.numpy(), plain.last_hidden_state.numpy())


def test_the_tower_of_a_file_with_adapters():
    pixels = paddle.to_tensor(load().arrays["pixels_retrieval"])
    whole = InternVLModel.from_pretrained(LORA, dtype="float32")
    with paddle.no_grad():
        alone = InternVisionModel.from_pretrained(LORA, dtype="float32")(pixels).last_hidden_state
        assert np.array_equal(alone.numpy(), whole.vision_model(pixels).numpy())


def test_any_flavour_of_tower_in_a_whole_model(tmp_path):
    """The 300M flavour, of another width than QLLaMA."""
    values = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    small = {
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "hidden_size": 32,
        "num_attention_heads": 2,
    }
    values["vision_config"] |= {**small, "intermediate_size": 64}
    model = InternVLModel(InternVLConfig.from_dict(values))
    model.eval()
    model.save_pretrained(tmp_path)
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    shutil.copy(CHECKPOINT / "tokenizer_config.json", tmp_path)
    again = InternVLModel.from_pretrained(tmp_path, dtype="float32")
    pixels, ids = load().arrays["pixels_retrieval"], load_tokenizer(tmp_path)(["a dog", "two dogs"])
    with paddle.no_grad():
        assert np.array_equal(again(pixels, ids, "InternVL-G")[0].numpy(), model(pixels, ids, "InternVL-G")[0].numpy())

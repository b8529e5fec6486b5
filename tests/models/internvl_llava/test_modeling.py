"""Features, logits and answers are the original's, whichever form a checkpoint has; what is saved is read back."""

import json
import math
import shutil

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.files import open_weight_file
from paddlemix.errors import CheckpointError, ConfigError, PromptError
from paddlemix.kernels import cpu as kernels
from paddlemix.models.blocks.chat import ChatSession
from paddlemix.models.internvl_llava import LlavaConfig, LlavaForCausalLM, load_tokenizer

from .helpers import (
    BASE,
    CHAT,
    EXPECTED,
    LORA,
    PROJECTOR,
    TOWER,
    arrays,
    assert_near,
    copied,
    model,
    pixels,
    pixels_of,
    tokenizer,
)

CHATS = EXPECTED["chats"]


def options(chat):
    stop = {"stop_strings": [chat["stop"]]} if chat["stop"] else {}
    return {"max_new_tokens": chat["max_new_tokens"], **stop}


def test_features_equal_the_original():
    assert model().image_size == EXPECTED["image_size"]
    given = pixels(0, 3)
    assert_near(model().encode_tower(given).numpy()[:, ::16], arrays()["tower_features"])
    features = model().encode_images(given).numpy()
    assert features.shape[1] == EXPECTED["num_image_token"]
    assert_near(features[:, ::8], arrays()["image_features"])
    assert_near(features.mean(1), arrays()["image_features_mean"])


def test_without_a_folder_the_tower_inside_is_taken():
    own = LlavaForCausalLM.from_pretrained(CHAT)
    assert_near(own.encode_images(pixels(0, 3)).numpy()[:, ::8], arrays()["image_features_inside"])
    for chat in CHATS[:2]:
        assert own.chat(tokenizer(), pixels_of(chat), chat["messages"], options(chat), chat["template"]) == chat["text"]


@pytest.mark.parametrize("number", range(len(CHATS)), ids=[chat["label"].replace(" ", "_") for chat in CHATS])
def test_answers_equal_the_original(number):
    chat = CHATS[number]
    logits = model()(chat["input_ids"], pixels_of(chat)).logits
    assert_near(logits.numpy()[0, -1], arrays()[f"first_logits_{number}"])
    if EXPECTED["logits_of"] == f"chats[{number}]":
        assert_near(logits.numpy()[:, :: EXPECTED["strides"]["logits"]], arrays()["logits"])
        assert_near(logits.numpy()[:, -1], arrays()["logits_last"])
    pieces = list(model().stream(tokenizer(), pixels_of(chat), chat["messages"], options(chat), chat["template"]))
    assert "".join(pieces) == chat["text"]
    assert len(pieces) > 1 or len(chat["text"]) < 4


@pytest.mark.parametrize("form, folder", [("base_and_projector", PROJECTOR), ("lora", LORA)])
def test_forms_that_need_a_base_equal_the_original(form, folder):
    own = LlavaForCausalLM.from_pretrained(folder, model_base=BASE)
    logits = own(CHATS[0]["input_ids"], pixels(0, aspect=EXPECTED[form]["aspect"])).logits.numpy()
    assert_near(logits[:, :: EXPECTED["strides"]["logits"]], arrays()[f"{form}_logits"])
    assert_near(logits[:, -1], arrays()[f"{form}_last"])
    assert load_tokenizer(folder, BASE).encode("hi") == tokenizer().encode("hi")


def test_a_session_goes_on_with_what_it_has_computed():
    session, _ = model().session(tokenizer())
    assert isinstance(session, ChatSession)
    for number, chat in enumerate(CHATS[:3]):
        own = pixels_of(chat) if number == 0 else None
        assert session.ask(chat["messages"][-1], own, options(chat)) == chat["text"]
    assert session.cached_tokens > EXPECTED["num_image_token"]


def test_a_batch_equals_its_members():
    asked = [CHATS[0], CHATS[3], CHATS[4], CHATS[6]]
    together = np.concatenate([pixels_of(chat) for chat in asked if chat["pictures"]])
    counts = [[1] * len(chat["pictures"]) for chat in asked]
    answers = model().batch_chat(tokenizer(), together, [chat["messages"][0] for chat in asked], options(asked[0]), counts)
    assert answers == [chat["text"] for chat in asked]


@pytest.mark.skipif(not kernels.available("float32"), reason="no compiler for the CPU kernels")
def test_the_cpu_engine_answers_alike():
    own = LlavaForCausalLM.from_pretrained(CHAT, vision_tower=TOWER, engine="inference")
    assert_near(own.encode_images(pixels(0, 3)).numpy()[:, ::8], arrays()["image_features"])
    for chat in (CHATS[1], CHATS[4]):
        assert own.chat(tokenizer(), pixels_of(chat), chat["messages"], options(chat)) == chat["text"]


def test_weights_in_few_bits_say_nearly_the_same():
    chat, far = CHATS[0], []
    exact = arrays()["first_logits_0"]
    for bits in ("int8", "int4"):
        own = LlavaForCausalLM.from_pretrained(CHAT, vision_tower=TOWER, weight_dtype=bits, engine="eager")
        logits = own(chat["input_ids"], pixels_of(chat)).logits.numpy()[0, -1]
        far.append(np.abs(logits - exact).max() / np.abs(exact).max())
    assert 0 < far[0] < 0.05 < far[1] < 1


# ---------------------------------------------------------------------- saving


def same_parameters(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].numpy(), two[name].numpy(), err_msg=name)


@pytest.mark.parametrize("layout", ["torch", "paddle"])
def test_what_is_saved_is_read_back_without_its_tower_at_hand(layout, tmp_path):
    model().save_pretrained(tmp_path / "saved", layout=layout)
    again = LlavaForCausalLM.from_pretrained(tmp_path / "saved")
    same_parameters(model(), again)
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    before = json.loads((CHAT / "config.json").read_text())
    assert {key: values.get(key) for key in before} == {**before, "torch_dtype": values["torch_dtype"]}


def test_tensors_have_the_originals_names(tmp_path):
    LlavaForCausalLM.from_pretrained(CHAT).save_pretrained(tmp_path)
    index = json.loads((CHAT / "pytorch_model.bin.index.json").read_text())["weight_map"]
    with open_weight_file(tmp_path / "model.safetensors") as stored:
        assert stored.keys() == {name for name in index if not name.endswith("inv_freq")}


def test_a_projector_alone_is_saved_as_it_was_read(tmp_path):
    own = LlavaForCausalLM.from_pretrained(PROJECTOR, model_base=BASE, vision_tower=TOWER)
    own.save_projector(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "mm_projector.bin"]
    with (
        open_weight_file(tmp_path / "saved" / "mm_projector.bin") as new,
        open_weight_file(PROJECTOR / "mm_projector.bin") as old,
    ):
        assert new.keys() == old.keys()
        assert all(new[name].shape == old[name].shape for name in old)
    same_parameters(own, LlavaForCausalLM.from_pretrained(tmp_path / "saved", model_base=BASE, vision_tower=TOWER))


# ---------------------------------------------------------------------- other sizes and settings


def small(tmp_path, projector="mlp2x_gelu", layer=-1, feature="patch", tower="InternViT-6B-448px-V1-5", **more):
    """A random model with a 448-pixel tower."""
    vision = json.loads((TOWER / "config.json").read_text())
    config = LlavaConfig.from_dict(
        {
            **json.loads((CHAT / "config.json").read_text()),
            "mm_projector_type": projector,
            "mm_vision_select_layer": layer,
            "mm_vision_select_feature": feature,
            "mm_vision_tower": tower,
            "mm_vision_config": {**vision, "image_size": 448},
            **more,
        }
    )
    paddle.seed(0)
    own = LlavaForCausalLM(config)
    own.eval()
    own.save_pretrained(tmp_path)
    return own


@pytest.mark.parametrize(
    "projector, feature",
    [
        ("linear", "patch"),
        ("mlp1x_gelu", "patch"),
        ("mlp3x_gelu", "cls_patch"),
        ("mlp2x_ln_gelu", "patch"),
        ("identity", "patch"),
    ],
)
def test_other_kinds_are_saved_and_read_back(projector, feature, tmp_path):
    own = small(tmp_path, projector, feature=feature)
    assert own.image_size == 448
    tokens = 1024 + (feature == "cls_patch")
    again = LlavaForCausalLM.from_pretrained(tmp_path)
    same_parameters(own, again)
    features = again.encode_images(pixels(0, size=448))
    assert features.shape == [1, tokens, 48]
    names = {part.name for weight in own.config.weight_table() for part in weight.parts if "mm_projector" in part.name}
    expected = {
        "linear": {"model.mm_projector.weight", "model.mm_projector.bias"},
        "mlp1x_gelu": {f"model.mm_projector.0.{kind}" for kind in ("weight", "bias")},
        "mlp3x_gelu": {f"model.mm_projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")},
        "mlp2x_ln_gelu": {f"model.mm_projector.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")},
        "identity": set(),
    }
    assert names == expected[projector]


def test_the_projector_is_the_formula(tmp_path):
    """LayerNorm, linear, GELU, linear, in float64."""
    own = small(tmp_path, "mlp2x_ln_gelu")
    given = pixels(0, size=448)
    x = own.encode_tower(given).numpy().astype("float64")
    state = {name: value.numpy().astype("float64") for name, value in own.mlp1.state_dict().items()}
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * state["0.weight"] + state["0.bias"]
    x = x @ state["1.weight"] + state["1.bias"]
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    assert_near(own.encode_images(given).numpy(), x @ state["3.weight"] + state["3.bias"])


def test_layers_are_counted_from_the_end():
    states = [model().vision_model(paddle.to_tensor(pixels(0)), layer).numpy() for layer in (-4, 3)]
    np.testing.assert_array_equal(*states)
    assert_near(states[0][:, 1::16], arrays()["tower_features"][:1])


def test_tokens_for_pictures_make_the_vocabulary_grow(tmp_path):
    folder = copied(CHAT, tmp_path / "chat", mm_use_im_patch_token=None, mm_use_im_start_end=True)
    own = LlavaForCausalLM.from_pretrained(folder, vision_tower=TOWER)
    tokens = load_tokenizer(folder)
    assert own.config.llm_config.vocab_size == len(tokens) == 563
    logits = own(CHATS[3]["input_ids"]).logits.numpy()
    assert_near(logits[0, -1, :560], arrays()["first_logits_3"])
    assert own.chat(tokens, pixels_of(CHATS[0]), CHATS[0]["messages"], options(CHATS[0])) == CHATS[0]["text"]


def test_the_picture_size_goes_by_name_or_by_what_the_tower_is_made_for():
    values = json.loads((CHAT / "config.json").read_text())
    vision = json.loads((TOWER / "config.json").read_text())

    def size(**changes):
        return LlavaConfig.from_dict({**values, **changes}).image_size

    assert size() == 336
    assert size(mm_vision_tower="/some/448/intern_vit_6b_224px") == 336
    assert size(mm_vision_tower="intern_vit_6b_448px") == 448
    assert size(mm_vision_tower="tower", mm_vision_config={**vision, "image_size": 448}) == 448
    assert size(mm_image_size=168) == 168


# ---------------------------------------------------------------------- what makes no sense


def test_pictures_and_marks_must_agree():
    for given, messages in ((pixels(0, 1), ["<image>\nx"]), (None, ["<image>\nx"]), (pixels(0), ["x"])):
        with pytest.raises(PromptError, match="picture"):
            model().chat(tokenizer(), given, messages)
    with pytest.raises(PromptError, match="picture"):
        model()([1, -200, 5], pixels(0, 1))
    with pytest.raises(PromptError, match="336"):
        model()([1, -200, 5], pixels(0, size=224))
    with pytest.raises(PromptError, match="end with the user's"):
        model().chat(tokenizer(), None, ["a", "b"])


@pytest.mark.parametrize("folder, what", [(PROJECTOR, "a projector alone"), (LORA, "LoRA adapters")])
def test_a_missing_base_is_told(folder, what):
    with pytest.raises(CheckpointError, match=f"{what}.*base"):
        LlavaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("folder", [PROJECTOR, LORA])
def test_another_base_is_told(folder, tmp_path):
    other = copied(BASE, tmp_path / "base", intermediate_size=64)
    with pytest.raises(ConfigError, match="base.*intermediate_size 64"):
        LlavaForCausalLM.from_pretrained(folder, model_base=other, vision_tower=TOWER)


def test_a_tower_of_another_width_is_told(tmp_path):
    other = copied(TOWER, tmp_path / "tower", hidden_size=96)
    with pytest.raises(ConfigError, match="mm_hidden_size is 48.*96 wide"):
        LlavaForCausalLM.from_pretrained(CHAT, vision_tower=other)


def test_other_models_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="clip-vit"):
        LlavaForCausalLM.from_pretrained(copied(CHAT, tmp_path / "a", mm_vision_tower="openai/clip-vit-large-patch14-336"))
    with pytest.raises(ConfigError, match="mm_projector_type"):
        LlavaForCausalLM.from_pretrained(copied(CHAT, tmp_path / "b", mm_projector_type="two_mlp"))
    with pytest.raises(ConfigError, match="model_type"):
        LlavaForCausalLM.from_pretrained(BASE)
    with pytest.raises(ConfigError, match="clip_vision_model"):
        LlavaForCausalLM.from_pretrained(CHAT, vision_tower=copied(TOWER, tmp_path / "c", model_type="clip_vision_model"))


def test_a_file_that_wants_to_run_code_does_not(tmp_path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = copied(PROJECTOR, tmp_path / "model")
    with zipfile.ZipFile(folder / "mm_projector.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model.mm_projector.0.weight": Evil()}))
    with pytest.raises(CheckpointError, match="mm_projector.bin.*nothing in it was run"):
        LlavaForCausalLM.from_pretrained(folder, model_base=BASE, vision_tower=TOWER)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_for_other_shapes_is_told(tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(LORA, folder)
    from paddlemix.checkpoints.pickle_files import write_torch_pickle

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    write_torch_pickle(
        str(folder / "adapter_model.bin"),
        {f"{name}.lora_A.weight": np.zeros((4, 64), "float32"), f"{name}.lora_B.weight": np.zeros((48, 4), "float32")},
    )
    with pytest.raises(CheckpointError, match="another base"):
        LlavaForCausalLM.from_pretrained(folder, model_base=BASE, vision_tower=TOWER)

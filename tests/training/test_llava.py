"""Training LLaVA: losses of both stages are the original's, what learns learns, and what is written is read back."""

import json

import numpy as np
import pytest

from paddlemix.checkpoints.files import open_weight_file
from paddlemix.errors import ConfigError, DataError
from paddlemix.models.internvl_llava import LlavaForCausalLM
from paddlemix.training.llava import parse_llava, print_plan, train, zero_stage
from tests.models.internvl_llava.helpers import BASE, EXPECTED, IMAGES, PROJECTOR, TOWER, arrays, assert_near, copied, pixels

V1 = [sample["record"] for sample in EXPECTED["train_samples"]["v1"]]
PLAIN = [sample["record"] for sample in EXPECTED["train_samples"]["plain"]]


def flags(folder, *more, records=V1, output="out", version="v1"):
    """Flags of a run of a few seconds; ``more`` replace them."""
    (folder / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return [
        *("--model_name_or_path", str(BASE), "--vision_tower", str(TOWER), "--version", version, "--device", "cpu"),
        *("--data_path", str(folder / "data.json"), "--image_folder", str(IMAGES), "--output_dir", str(folder / output)),
        *("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-4", "--mm_use_im_patch_token", "False"),
        *("--mm_use_im_start_end", "False", "--model_max_length", "2048", "--per_device_train_batch_size", "3"),
        *("--lr_scheduler_type", "constant", "--learning_rate", "1e-3", "--max_grad_norm", "0", "--max_steps", "4"),
        *("--pretrain_mm_mlp_adapter", str(PROJECTOR / "mm_projector.bin"), "--save_strategy", "no"),
        *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True", *more),
    ]


def run(folder, *more, **options):
    """Train, and return the rows of the log."""
    arguments = parse_llava(flags(folder, *more, **options))
    train(*arguments)
    path = folder / options.get("output", "out") / "train_log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_stage_is_the_originals(tmp_path):
    stage = EXPECTED["stage1"]
    more = ("--tune_mm_mlp_adapter", "True", "--image_aspect_ratio", stage["aspect"])
    rows = run(tmp_path, *more, records=[PLAIN[i] for i in stage["samples"]], version="plain")
    np.testing.assert_allclose([row["loss"] for row in rows], stage["losses"], rtol=2e-4)
    norm = np.sqrt(sum(value**2 for value in stage["grad_norms"].values()))
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".safetensors")) == [
        "mm_projector.bin"
    ]
    with open_weight_file(tmp_path / "out" / "mm_projector.bin") as stored:
        assert len(stored) == 4
        for name, tensor in stored.items():
            expected = arrays()[f"stage1_projector.{name.removeprefix('model.mm_projector.')}"]
            assert_near(tensor.read(0, tensor.shape[0]), expected, 1e-3)
    own = LlavaForCausalLM.from_pretrained(tmp_path / "out", model_base=BASE, vision_tower=TOWER)
    assert own.config.mm_vision_select_layer == -4 and own.config.image_aspect_ratio == stage["aspect"]


def test_the_second_stage_is_the_originals(tmp_path):
    stage = EXPECTED["stage2"]
    more = ("--image_aspect_ratio", stage["aspect"], "--group_by_modality_length", "True")
    rows = run(tmp_path, *more, records=[V1[i] for i in stage["samples"]])
    np.testing.assert_allclose([row["loss"] for row in rows], stage["losses"], rtol=2e-4)
    own = LlavaForCausalLM.from_pretrained(tmp_path / "out")
    with open_weight_file(tmp_path / "out" / "model.safetensors") as stored:
        for name, expected in stage["parameter_sums_after"].items():
            found = stored[name].read(0, stored[name].shape[0])
            assert np.abs(found.astype("float64")).sum() == pytest.approx(expected, rel=2e-4), name
    before = LlavaForCausalLM.from_pretrained(PROJECTOR, model_base=BASE, vision_tower=TOWER)
    assert_near(own.encode_tower(pixels(0)).numpy(), before.encode_tower(pixels(0)).numpy(), 1e-6)


def changed(folder, more):
    """Which parts of the model a run of one step changed."""
    run(folder, "--max_steps", "1", *more)
    own = LlavaForCausalLM.from_pretrained(folder / "out", model_base=BASE, vision_tower=None)
    before = LlavaForCausalLM.from_pretrained(PROJECTOR, model_base=BASE, vision_tower=TOWER)
    one, two = own.state_dict(), before.state_dict()
    return own, {name.split(".")[0] for name in one if (one[name].numpy() != two[name].numpy()).any()}


def test_adapters_learn_beside_the_projector_and_are_read_back(tmp_path):
    own, moved = changed(tmp_path, ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "1e-4"])
    assert moved == {"mlp1", "language_model"}
    written = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "config.json"} <= written
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"]) == (4, 8)
    before = LlavaForCausalLM.from_pretrained(PROJECTOR, model_base=BASE, vision_tower=TOWER)
    step = max(float((a - b).abs().max()) for a, b in zip(own.mlp1.parameters(), before.mlp1.parameters()))
    assert step == pytest.approx(1e-4, rel=0.05)  # AdamW's first step is the learning rate


def test_positions_of_the_tower_learn_where_that_is_asked_for(tmp_path):
    more = ["--tune_mm_mlp_adapter", "True", "--tune_vit_pos_embedding", "True", "--vit_lr", "1e-4"]
    own, moved = changed(tmp_path, more)
    assert moved == {"mlp1", "vision_model"}
    with open_weight_file(tmp_path / "out" / "mm_projector.bin") as stored:
        assert "model.vision_tower.vision_tower.embeddings.position_embedding" in stored


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["--tune_mm_mlp_adapter", "True"], marks=pytest.mark.slow),
        pytest.param(["--lora_enable", "True", "--lora_r", "2"], marks=pytest.mark.slow),
        [],
    ],
)
def test_a_run_goes_on_from_its_checkpoint(more, tmp_path):
    common = [*more, "--lora_dropout", "0"]
    whole = [row["loss"] for row in run(tmp_path, *common, output="whole")]
    run(tmp_path, *common, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2", output="cut")
    rows = run(tmp_path, *common, "--save_strategy", "steps", "--save_steps", "2", output="cut")
    np.testing.assert_allclose([row["loss"] for row in rows], whole, rtol=1e-5)


def test_batches_are_of_one_kind(tmp_path):
    from paddlemix.datasets.internvl_llava import ModalityOrder

    has_picture = np.random.default_rng(0).random(101) < 0.6
    order = ModalityOrder([101], 3, has_picture, 8)
    for epoch in range(2):
        found = [order[epoch * 101 + i][1] for i in range(101)]
        assert sorted(found) == list(range(101))
        kinds = [set(has_picture[found[i : i + 8]]) for i in range(0, 101, 8)]
        assert all(len(kind) == 1 for kind in kinds[: has_picture.sum() // 8 + (~has_picture).sum() // 8])
    assert [order[i] for i in range(5)] != [order[101 + i] for i in range(5)]


def test_data_of_one_kind_are_sorted_by_length(tmp_path):
    """The original ends in "not enough values to unpack"."""
    records = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b " * n}]} for n in range(1, 7)]
    assert len(run(tmp_path, "--group_by_modality_length", "True", "--max_steps", "1", records=records)) == 1


def test_a_record_that_cannot_be_used_is_named(tmp_path):
    records = [V1[0], V1[2], {**V1[1], "image": "gone.png"}]
    run(tmp_path, "--max_steps", "1", records=records)
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert row["line"] == 3 and "gone.png" in row["reason"]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.json", {"zero_optimization": {"stage": 3}}, "stage3"),
        ("zero2.json", {"zero_optimization": {"stage": 1}}, "stage1"),
        ("zero_stage2_config.json", None, "stage2"),
        ("zero3.json", None, "stage3"),
        ("b.json", {"train_batch_size": 1}, ""),
    ],
)
def test_deepspeed_is_taken_for_its_stage(name, content, expected, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(json.dumps(content))
    assert zero_stage(str(tmp_path / name)) == expected


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match="ZeRO"):
        zero_stage("settings.json")
    with pytest.raises(ConfigError, match="--data_path is missing"):
        parse_llava(["--model_name_or_path", "x", "--output_dir", "y"])
    with pytest.raises(ConfigError, match="gone.bin does not exist"):
        run(tmp_path, "--pretrain_mm_mlp_adapter", str(tmp_path / "gone.bin"))
    with pytest.raises(ConfigError, match="--vision_tower is missing"):
        run(tmp_path, "--vision_tower", "None")
    with pytest.raises(ConfigError, match="nothing is left to train"):
        run(tmp_path, "--freeze_llm", "True", "--freeze_mm_mlp_adapter", "True")
    with pytest.raises(DataError, match="holds no list"):
        run(tmp_path, records={})


def test_a_projector_of_another_model_is_told(tmp_path):
    wide = copied(TOWER, tmp_path / "InternViT-6B-448px", hidden_size=96)
    with pytest.raises(ValueError, match="96"):
        run(tmp_path, "--vision_tower", str(wide))


def test_the_plan(tmp_path, capsys):
    print_plan(flags(tmp_path, "--processes", "8", "--deepspeed", "zero3.json"))
    told = capsys.readouterr().out
    assert "learns: projector, language model" in told and "each of 8 devices" in told and "3 x 1088 tokens" in told
    published = ["--model_name_or_path", "lmsys/vicuna-13b-v1.5", "--vision_tower", "OpenGVLab/InternViT-6B-448px"]
    print_plan([*flags(tmp_path, "--tune_mm_mlp_adapter", "True"), *published])
    told = capsys.readouterr().out
    vicuna = 2 * 32000 * 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    assert f"{vicuna / 1e6:,.1f}" in told


def test_the_checker_names_what_training_would(tmp_path, capsys):
    from paddlemix.datasets.internvl_llava.check import main

    bad = [
        {**V1[0], "image": "gone.png"},
        {**V1[2], "conversations": [{"from": "human", "value": "<image> x"}, {"from": "gpt", "value": "y"}]},
        {**V1[0], "image": ["img0.png", "img1.png"]},
        {**V1[2], "conversations": [{"from": "human", "value": "x"}] * 2},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*V1, *bad]), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--data_path", str(path), "--image_folder", str(IMAGES)])
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"{len(bad)} of {len(bad) + len(V1)} records cannot be used"
    assert [line.split(": ")[0] for line in told[:-1]] == [f"{path}:{len(V1) + i + 1}" for i in range(len(bad))]
    path.write_text("\n".join(map(json.dumps, PLAIN)), encoding="utf-8")
    path = path.rename(tmp_path / "data.jsonl")
    main(["--data_path", str(path), "--image_folder", str(IMAGES), "--version", "plain"])
    assert capsys.readouterr().out.startswith("0 of 3")


def test_the_checker_doubts_what_is_likely_a_mistake(tmp_path, capsys):
    from paddlemix.datasets.internvl_llava.check import main

    def asked(answers):
        path = tmp_path / "data.json"
        turns = [[{"from": "human", "value": f"<image>\n{i}?"}, {"from": "gpt", "value": a}] for i, a in enumerate(answers)]
        records = [{"image": "img0.png", "conversations": pair} for pair in turns]
        path.write_text(json.dumps([*records, records[0]]), encoding="utf-8")
        main(["--data_path", str(path), "--image_folder", str(IMAGES)])
        return capsys.readouterr().out

    fractions = ["[0.1, 0.2, 0.3, 0.4]", "[0.0, 0.2, 1.0, 0.4]"]
    told = asked(fractions)  # as LLaVA's own data have them
    assert "0..1" not in told and "1 record(s) that an earlier one equals" in told and "line 3: equals line 1" in told
    told = asked([*fractions, "[100, 200, 300, 400]"])
    assert "3 box(es) in 0..1" in told  # the repeated one too
    told = asked(["[0.4, 0.2, 0.3, 0.4]"])
    assert "2 box(es) with x1 > x2" in told and "2 answers, all of them equal" in told
    assert told.endswith("0 of 2 records cannot be used\n")

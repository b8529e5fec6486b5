"""The command line keeps the existing port's names and defaults."""

import dataclasses
import re

import pytest

from paddlemix.errors import ConfigError
from paddlemix.training.arguments import CLASSES, parse

MODEL = dict(
    model_name_or_path=None,
    vision_path=None,
    llm_path=None,
    mlp_path=None,
    freeze_llm=False,
    freeze_backbone=False,
    freeze_mlp=False,
    unfreeze_vit_layers=0,
    vision_select_layer=-1,
    use_backbone_lora=0,
    use_llm_lora=0,
    unfreeze_lm_head=False,
    use_custom_trainer=False,
    grad_checkpoint=False,
    drop_path_rate=0.0,
    ps_version="v2",
)
DATA = dict(
    max_seq_length=2048,
    force_image_size=448,
    down_sample_ratio=0.5,
    pad2square=False,
    conv_style=None,
    meta_path=None,
    use_data_resampling=False,
    dynamic_image_size=False,
    use_thumbnail=False,
    min_dynamic_patch=1,
    max_dynamic_patch=12,
    normalize_type="imagenet",
    use_packed_ds=False,
    num_images_expected=40,
    max_packed_tokens=8192,
    max_buffer_size=20,
    log_freq=1000,
    strict_mode=True,
    replacement=False,
    allow_overflow=False,
    loss_reduction="token",
    loss_reduction_all_gather=False,
    min_num_frame=8,
    max_num_frame=32,
)
# The port's own, and what its scripts use of PaddleNLP's, with the defaults of PaddleNLP 3.0.0b4.
TRAINING = dict(
    group_by_length=True,
    save_safetensors=True,
    output_dir=None,
    overwrite_output_dir=False,
    do_train=False,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    learning_rate=5e-5,
    weight_decay=0.0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    num_train_epochs=1.0,
    max_steps=-1,
    lr_scheduler_type="linear",
    warmup_ratio=0.0,
    warmup_steps=0,
    logging_steps=500,
    save_strategy="steps",
    save_steps=500,
    save_total_limit=None,
    seed=42,
    bf16=False,
    fp16=False,
    fp16_opt_level="O1",
    amp_master_grad=False,
    sharding="",
    recompute=False,
    dataloader_num_workers=0,
    optim="adamw",
)

# What the existing port's InternVL2-1B script gives to the trainer.
SCRIPT = """
    --do_train --model_name_or_path OpenGVLab/InternVL2-1B --conv_style Hermes-2 --output_dir work_dirs/x
    --logging_dir work_dirs/x/logs --meta_path shell/data/internvl_1_2_finetune.json --overwrite_output_dir True
    --force_image_size 448 --max_dynamic_patch 6 --down_sample_ratio 0.5 --drop_path_rate 0.1 --freeze_llm False
    --freeze_mlp False --freeze_backbone True --vision_select_layer -1 --dataloader_num_workers 1 --bf16 True --fp16 False
    --fp16_opt_level O2 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --recompute True
    --max_grad_norm 1.0 --evaluation_strategy no --save_strategy epoch --save_steps 200 --save_total_limit 2
    --learning_rate 4e-5 --weight_decay 0.01 --warmup_ratio 0.03 --optim adamw --lr_scheduler_type cosine --logging_steps 1
    --max_seq_length 4096 --grad_checkpoint True --group_by_length True --dynamic_image_size True --use_thumbnail True
    --ps_version v2 --report_to visualdl --tensor_parallel_degree 1 --sharding_parallel_degree 8 --pipeline_parallel_degree 1
    --sep_parallel_degree 1 --sharding stage1 --amp_master_grad 1 --hybrid_parallel_topo_order sharding_first
""".split()


@pytest.mark.parametrize("cls, expected", zip(CLASSES, (MODEL, DATA, TRAINING)))
def test_names_and_defaults_are_the_existing_ports(cls, expected):
    defaults = {item.name: item.default for item in dataclasses.fields(cls)}
    assert expected.items() <= defaults.items()


def test_the_existing_ports_script_runs_unchanged():
    model, data, training = parse(SCRIPT)
    assert (model.freeze_backbone, model.drop_path_rate, data.max_dynamic_patch) == (True, 0.1, 6)
    assert (training.half, training.amp_master_grad, training.sharding, training.learning_rate) == (
        "bfloat16",
        True,
        "stage1",
        4e-5,
    )


@pytest.mark.parametrize(
    "more, message",
    [
        (["--pipeline_parallel_degree", "2"], r"--pipeline_parallel_degree 2 is not supported: .*-1, 0, 1"),
        (
            ["--expert_parallel_degree", "4", "--tensor_parallel_degree", "2"],
            "--expert_parallel_degree is 4: experts are dealt",
        ),
        (["--lora_dropout", "1"], "--lora_dropout is 1.0: it must be from 0 to below 1"),
        (["--load_4bit"], "do not learn: train adapters on them"),
        (["--fp16", "True"], "exclude each other"),
        (["--learning_rates", "1"], "unrecognized arguments: --learning_rates"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--freeze_llm", "perhaps"], "'perhaps' is neither True nor False"),
        (["--sharding", "stage4"], "stage4"),
        (["--warmup_ratio", "3"], "--warmup_ratio is 3.0: it must be from 0 to 1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0"),
        (["--min_dynamic_patch", "9"], "--min_dynamic_patch is 9: it must be 1 to 6"),
        (["--vision_path", "x"], "leave out --vision_path"),
    ],
)
def test_what_is_not_supported_is_said(more, message):
    with pytest.raises(ConfigError, match=message):
        parse([*SCRIPT, *more])


@pytest.mark.parametrize("name, text", [("a.json", "{"), ("a.yaml", "a: [1"), ("b.json", "[1]"), ("a.json", '{"nonsense": 1}')])
def test_broken_files_are_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"not valid|must hold names|unrecognized arguments: --nonsense"):
        parse([str(path)])


def test_help_tells_every_argument_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for cls in CLASSES:
        for item in dataclasses.fields(cls):
            assert len(re.findall(rf"^  --{item.name} ", text, re.MULTILINE)) == 1, item.name

"""Train the demo model from nothing, in about two hours of a CPU.

  python -m paddlemix.examples.internvl2.demo_model.train

draws the data, makes random parts, and trains in two stages with the same trainer as the published models: stage 1 everything,
in parts that begin with pictures of one shape; stage 2 with the vision tower frozen, through the shell script for fine-tuning.
An interrupted run goes on where it was when the command is given again. Results are in ``work_dirs/demo_model``: ``model``, in
bfloat16, ``accuracy.md``, what it can do, and ``loss.png``, how it learned.
"""

import argparse
import sys
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import UserError, command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model import data, scenes
from paddlemix.examples.internvl2.demo_model.evaluate import evaluate, format_table
from paddlemix.examples.internvl2.demo_training import EXAMPLES, draw_losses, run_script, run_training
from paddlemix.models.internvl2.convert import convert

# InternVL2's architecture, small: InternViT as in InternVL2-40B, whose normalised queries and keys are the easier ones to train
# from nothing, and Qwen2 as in InternVL2-1B. With few blocks, all of them count from the start: layer scales of 1 instead of
# 0.1, and larger embeddings of tokens than the usual 0.02.
CONFIG = {
    "vision_config": {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": scenes.SIDE,
        "patch_size": 14,
        "qkv_bias": False,
        "qk_normalization": True,
        "norm_type": "rms_norm",
        "initializer_factor": 1.0,
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 2012,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "eos_token_id": 2000,  # <|im_end|>
        "initializer_range": 0.1,
    },
    "template": "Hermes-2",
    "force_image_size": scenes.SIDE,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 1,
    "dynamic_image_size": True,
    "use_thumbnail": True,
}

# What the stages have in common, where they say nothing else, and what the shell script has otherwise. Samples count alike: by
# tokens, the boxes' many digits would leave nothing for answers of one word.
FLAGS = f"""
    --force_image_size {scenes.SIDE} --max_dynamic_patch 1 --max_seq_length 512 --loss_reduction sample
    --adam_beta2 0.99 --weight_decay 0.05 --drop_path_rate 0 --group_by_length True
    --dataloader_num_workers 0 --report_to none --recompute False
    --save_strategy steps --save_steps 250 --save_total_limit 1 --logging_steps 20
""".split()

# Name, part of the data, steps, learning rate and its schedule. With answers of a word or two a batch says little, and at 1e-3
# the loss rises again; at less than 3e-4 it is slow to find out how one shape is told from the others by its name.
STAGE1 = (
    ("stage1_first", "first", 400, "--learning_rate 5e-4 --warmup_steps 100 --lr_scheduler_type constant_with_warmup"),
    ("stage1_mixed", "mixed", 1174, "--learning_rate 5e-4 --warmup_steps 50 --lr_scheduler_type constant_with_warmup"),
    ("stage1_finding", "finding", 700, "--learning_rate 3e-4 --warmup_steps 30 --lr_scheduler_type constant_with_warmup"),
    ("stage1_more", "mixed", 800, "--learning_rate 3e-4 --warmup_steps 30 --lr_scheduler_type constant_with_warmup"),
    ("stage1", "where", 750, "--learning_rate 3e-4 --warmup_steps 30 --lr_scheduler_type cosine"),
)
# The second word of "top left" is at first guessed from what is in the top row. That the shape has to be looked up by its name
# once more was not found out in a thousand steps on rows, and then within a hundred when the learning rate was lowered to 7e-5.
# Weight decay is large in the last part: early on, a model learns from the words alone which shapes follow which color, and
# this has to be forgotten before it can name a color and a shape that it never saw together. It comes last, because models
# that had it earlier did not find the second word on rows at all.
STAGE2 = (
    ("stage2_where", "where", 300, "--learning_rate 2e-4 --warmup_steps 10 --lr_scheduler_type constant_with_warmup"),
    ("stage2_slowly", "where", 300, "--learning_rate 7e-5 --warmup_steps 5 --lr_scheduler_type constant_with_warmup"),
    ("stage2", "all", 2200, "--learning_rate 4e-4 --warmup_steps 30 --lr_scheduler_type cosine --weight_decay 2"),
)
BATCH, ROWS = 64, 16  # samples of an update, and of those that share one length; short ones are not padded to long ones


def write_parts(directory):
    """A checkpoint of random weights, from which stage 1 takes its vision tower and its language model."""
    import paddle

    from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel, load_tokenizer
    from paddlemix.training.checkpoints import save_model

    paddle.seed(0)
    model = InternVLChatModel(InternVLChatConfig.from_dict(CONFIG))
    save_model(model, load_tokenizer(cli.DEMO_MODEL), directory)


def train(run, name, part, steps, flags, start):
    """Run a part of stage 1, with everything trained, unless its model is there already.

    Args:
        run: the command line of this program.
        name, part, steps, flags: an entry of ``STAGE1``.
        start: flags that say what it begins with.
    """
    directory = run.output_dir / name
    if (directory / "model.safetensors").exists():
        return
    launcher = []
    if run.processes > 1:
        launcher = ["-m", "paddle.distributed.launch", "--run_mode", "collective", "--nproc_per_node", str(run.processes)]
        launcher += ["--log_dir", str(directory / "launch_logs")]
    run_training(
        [
            *(sys.executable, *launcher),
            str(EXAMPLES / "internvl_chat_finetune.py"),
            *"--do_train True --conv_style Hermes-2 --dynamic_image_size True --use_thumbnail True".split(),
            *("--device", run.device, *start, *FLAGS, *flags.split()),
            *("--meta_path", str(run.output_dir / "data" / f"{part}.json"), "--output_dir", str(directory)),
            *("--per_device_train_batch_size", str(ROWS)),
            *("--gradient_accumulation_steps", str(BATCH // ROWS // run.processes)),
            *("--max_steps", str(max(1, round(steps * run.scale)))),
        ],
        run.processes,
    )


def finetune(run, name, part, steps, flags, start):
    """Run a part of stage 2, with the vision tower frozen, through the shell script, unless its model is there already.

    Args:
        run: the command line of this program.
        name, part, steps, flags: an entry of ``STAGE2``.
        start: checkpoint that it begins with.
    """
    directory = run.output_dir / name
    if (directory / "model.safetensors").exists():
        return
    run_script(
        [*FLAGS, *flags.split(), "--max_steps", str(max(1, round(steps * run.scale)))],
        model=start,
        meta=run.output_dir / "data" / f"{part}.json",
        output_dir=directory,
        batch=BATCH,
        rows=ROWS,
        device=run.device,
        processes=run.processes,
    )


@command_main
def main():
    """Parse the command line and run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("work_dirs/demo_model"), help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual data and steps, for trials (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help=f"that share each batch of {BATCH} (default: %(default)s)")
    run = parser.parse_args()
    if BATCH // ROWS % run.processes:
        raise UserError(f"--processes {run.processes} cannot share a batch of {BATCH}: use 1, 2 or 4")

    output = run.output_dir
    for name in data.PARTS:
        if not (output / "data" / f"{name}.json").exists():
            data.write_part(output / "data", name, run.scale)
    start = output / "start"
    if not (start / "model.safetensors").exists():
        write_parts(start)
    begin = ["--vision_path", str(start), "--llm_path", str(start)]
    for stage in STAGE1:
        train(run, *stage, begin)
        start = output / stage[0]
        begin = ["--model_name_or_path", str(start)]
    for stage in STAGE2:
        finetune(run, *stage, start)
        start = output / stage[0]
    model = output / "model"
    convert(start, model, "torch", dtype="bfloat16", overwrite=True)
    logs = [output / name / "train_log.jsonl" for name, *_ in STAGE1 + STAGE2]
    draw_losses(logs, output / "loss.png", "Demo model, trained from nothing")
    parts = ["heldout", "unseen"]
    tables, _ = evaluate(model, [output / "data" / f"{part}.json" for part in parts], device=run.device)
    table = format_table(parts, tables)
    (output / "accuracy.md").write_text(table + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()

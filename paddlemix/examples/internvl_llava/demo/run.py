"""See both stages of LLaVA work, on this machine's CPU in a few minutes.

  python paddlemix/examples/internvl_llava/demo/run.py

draws scenes; makes a Llama of four small blocks, which first learns texts about such scenes without any picture; and puts the
demo model's vision tower before it with a random projector. Then the published scripts train: the projector alone on captions
(stage 1), and projector and language model on conversations (stage 2). Before and after each, the model is asked about held-out
pictures. Results are in ``work_dirs/demo_llava``; ``finetune`` there is a checkpoint like any other, ``loss.png`` the losses.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_training import draw_losses, run_training, write_tokenizer
from paddlemix.examples.internvl_llava.demo.scenes import PARTS, SIDE, write_part
from paddlemix.models.internvl_llava import LlavaForCausalLM
from paddlemix.models.internvl_llava.conversation import get_template

EXAMPLES = Path(__file__).parents[1]
SCRIPTS = EXAMPLES / "scripts_internvl"
TOWER = cli.DEMO_MODEL
SCENES = {"texts": 1920, "captions": 1600, "talk": 2400, "heldout": 200}

# A Llama as small as the demo model's language model; larger embeddings than usual, since it has few blocks.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
# What differs from the published settings: the picture's size and the tower's layer; and steps so short that workers,
# a dashboard and recompute would only be in the way.
FLAGS = f"""
    --mm_image_size {SIDE} --mm_vision_select_layer -1 --adam_beta2 0.99 --gradient_checkpointing False
    --dataloader_num_workers 0 --report_to none --save_strategy no --overwrite_output_dir True --logging_steps 5
""".split()
BATCH = 16


def write_llama(model, directory):
    """The language model of a LLaVA alone, as Vicuna is published."""
    from paddlemix.checkpoints.checkpoint import save_checkpoint
    from paddlemix.models.internvl_llava.checkpoint import part

    weights = {name: value for name, value in model.state_dict().items() if name.startswith("language_model.")}
    save_checkpoint(weights, part(model.config, "language_model."), directory)
    values = {**LLAMA, "vocab_size": model.config.llm_config.vocab_size}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def new_model(vocabulary):
    """A LLaVA with the demo model's tower, and all else random."""
    import paddle

    from paddlemix.models.internvl_llava import LlavaConfig, LlavaForCausalLM
    from paddlemix.models.internvl_llava.checkpoint import tower_in

    paddle.seed(0)
    options = {"mm_vision_tower": str(TOWER), "mm_projector_type": "mlp2x_gelu", "mm_image_size": SIDE}
    options |= {"mm_use_im_patch_token": False, "vision_config": tower_in(str(TOWER)).config}
    return LlavaForCausalLM(LlavaConfig.from_language({**LLAMA, "vocab_size": vocabulary}, **options))


def accuracy(directory, records, folder, device="cpu", batch=50, **options):
    """Share of records whose answer the model in ``directory`` gives exactly; ``options`` are those of loading it."""
    from paddlemix import device as devices
    from paddlemix.models.internvl_llava import LlavaForCausalLM, load_tokenizer, process_images

    devices.set_device(device)
    model = LlavaForCausalLM.from_pretrained(directory, **options)
    tokenizer = load_tokenizer(directory, options.get("model_base"))
    right = 0
    for start in range(0, len(records), batch):
        asked = records[start : start + batch]
        pixels = process_images([folder / record["image"] for record in asked], model.image_size)
        questions, truths = zip(*([turn["value"] for turn in record["conversations"]] for record in asked))
        settings = {"max_new_tokens": 16}
        answers = model.batch_chat(tokenizer, pixels, list(questions), settings, [[1]] * len(asked))
        right += sum(answer == truth for answer, truth in zip(answers, truths))
    return right / len(records)


def train(flags, device, **environment):
    """Run a command that trains, with one process."""
    run_training(flags, DEVICE=device, GPUS="1", PYTHON=sys.executable, BATCH_SIZE=str(BATCH), **environment)


@command_main
def main():
    """Parse the command line and run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_llava", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="how many scenes, as a share of the usual (default: 1)")
    args = parser.parse_args()
    output, start = Path(args.output_dir).resolve(), time.monotonic()
    parts = {part: write_part(output / "data", part, max(BATCH, round(SCENES[part] * args.scale))) for part in PARTS}
    path, folder = parts["heldout"]
    heldout = json.loads(path.read_text(encoding="utf-8"))

    def measure(name, directory, **options):
        share = accuracy(output / directory, heldout, folder, args.device, **options)
        print(f"held-out pictures, {name}: {share:.1%} of {len(heldout)} right", flush=True)
        return share

    def environment(part, directory, **more):
        records, pictures = map(str, parts[part])
        return dict(DATA=records, IMAGES=pictures, OUTPUT_DIR=str(output / directory), PER_DEVICE_BATCH_SIZE=str(BATCH), **more)

    # The language model, from texts.
    texts = json.loads(parts["texts"][0].read_text(encoding="utf-8"))
    lines = [turn["value"] for record in texts for turn in record["conversations"]]
    lines += [f"{get_template('vicuna_v1').system_message} USER: ASSISTANT:"] * 1000
    first, llama = output / "llama_random", output / "llama"
    model = new_model(write_tokenizer(first, lines))
    write_llama(model, first)
    command = [sys.executable, str(EXAMPLES / "train.py"), "--model_name_or_path", str(first), "--vision_tower", str(TOWER)]
    command += "--version v1 --mm_projector_type mlp2x_gelu --mm_use_im_patch_token False --freeze_mm_mlp_adapter True".split()
    command += ["--data_path", str(parts["texts"][0]), "--output_dir", str(output / "texts"), "--device", args.device, *FLAGS]
    command += ["--per_device_train_batch_size", str(BATCH), "--model_max_length", "512", "--group_by_length", "True"]
    command += "--learning_rate 2e-3 --lr_scheduler_type cosine --warmup_ratio 0.03".split()
    run_training(command)
    write_llama(LlavaForCausalLM.from_pretrained(output / "texts", engine="eager"), llama)
    write_tokenizer(llama, lines)
    before = measure("projector random", "texts")

    # Stage 1 and stage 2, by the scripts.
    common = dict(MODEL=str(llama), VISION_TOWER=str(TOWER))
    train(
        ["sh", str(SCRIPTS / "pretrain_internvit6b_224to336_vicuna7b.sh"), *FLAGS, "--learning_rate", "2e-3"],
        args.device,
        **environment("captions", "pretrain", **common),
    )
    measure("after stage 1", "pretrain", model_base=llama)
    train(
        ["sh", str(SCRIPTS / "finetune_internvit6b_224to336_vicuna7b.sh"), *FLAGS, "--learning_rate", "1e-3"],
        args.device,
        **environment("talk", "finetune", PROJECTOR=str(output / "pretrain" / "mm_projector.bin"), **common),
    )
    logs = [output / name / "train_log.jsonl" for name in ("texts", "pretrain", "finetune")]
    draw_losses(logs, output / "loss.png", "A toy LLaVA: texts, captions, conversations")
    after = measure("after stage 2", "finetune")
    minutes = (time.monotonic() - start) / 60
    print(f"held-out pictures before: {before:.1%}, after: {after:.1%}; {minutes:.1f} minutes in all")
    print(f"loss curves: {output / 'loss.png'}; model: {output / 'finetune'}; try it:")
    question = heldout[0]["conversations"][0]["value"].splitlines()[-1]
    print(
        f"  python paddlemix/examples/internvl_llava/chat.py --model-path {output / 'finetune'} "
        f"--image-file {folder / heldout[0]['image']}    # asks USER: {question}"
    )


if __name__ == "__main__":
    main()

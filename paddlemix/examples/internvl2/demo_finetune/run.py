"""Teach the demo model something new on this machine's CPU, and see that it learned it.

  python paddlemix/examples/internvl2/demo_finetune/run.py

draws pictures of road signs, measures how many of the held-out ones the demo model gets right, fine-tunes it with the same
script as the published models (vision tower frozen), measures again, and draws the loss curve. Results are in
``work_dirs/demo_finetune``; ``model`` there is a checkpoint like any other.
"""

import argparse
import time
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_finetune.signs import QUESTION, write_data
from paddlemix.examples.internvl2.demo_training import draw_losses, run_script

# What differs from the script's settings: a model of 84-pixel tiles, so small that it bears a high learning rate; and steps
# so short that workers and a dashboard would only be in the way.
FLAGS = """
    --force_image_size 84 --learning_rate 1.5e-3 --dataloader_num_workers 0 --report_to none
    --recompute False --save_strategy no
""".split()


def accuracy(directory, meta_path, device="cpu", batch=50):
    """Share of pictures whose sign the model in ``directory`` names exactly.

    Args:
        directory: a checkpoint.
        meta_path: meta file of one data set of single pictures.
        device: where to run.
        batch: pictures that are asked about at once.
    """
    import numpy as np

    from paddlemix import device as devices
    from paddlemix.datasets.records import read_meta
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer
    from paddlemix.processors.image import load_image

    devices.set_device(device)
    model, tokenizer = InternVLChatModel.from_pretrained(directory), load_tokenizer(directory)
    (source,) = read_meta(meta_path)
    records = [source.read(i) for i in range(len(source))]
    right = 0
    for start in range(0, len(records), batch):
        asked = records[start : start + batch]
        paths = [path for record in asked for path in record.images]
        pixels = np.concatenate([load_image(path, input_size=model.config.image_size, max_num=1) for path in paths])
        questions = [f"<image>\n{QUESTION}"] * len(asked)
        answers = model.batch_chat(tokenizer, pixels, questions, dict(max_new_tokens=16), num_patches_list=[1] * len(asked))
        right += sum(answer == record.conversations[1]["value"] for answer, record in zip(answers, asked))
    return right / len(records)


@command_main
def main():
    """Parse the command line and run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_finetune", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--train", type=int, default=800, help="pictures to learn from (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=200, help="pictures to measure with (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=5, help="passes over them (default: %(default)s)")
    args, more = parser.parse_known_args()  # further flags are the trainer's

    output = Path(args.output_dir)
    write_data(output / "data", args.train, args.heldout)
    heldout = output / "data" / "heldout.json"
    before = accuracy(str(cli.DEMO_MODEL), heldout, args.device)
    print(f"held-out accuracy before: {before:.1%} of {args.heldout} pictures", flush=True)
    start = time.monotonic()
    run_script(
        [*FLAGS, "--num_train_epochs", str(args.epochs), *more],
        model=cli.DEMO_MODEL,
        meta=output / "data" / "train.json",
        output_dir=output / "model",
        batch=16,
        device=args.device,
    )
    minutes = (time.monotonic() - start) / 60
    draw_losses([output / "model" / "train_log.jsonl"], output / "loss.png", "Demo model learning road signs")
    after = accuracy(str(output / "model"), heldout, args.device)
    print(f"held-out accuracy before: {before:.1%}, after: {after:.1%}; trained for {minutes:.1f} minutes")
    print(f"loss curve: {output / 'loss.png'}; model: {output / 'model'}; try it:")
    print(
        f"  python paddlemix/examples/internvl2/chat_demo.py --model_name_or_path {output / 'model'} "
        f'--image_path {output / "data" / "heldout" / "0000.png"} --text "{QUESTION}"'
    )


if __name__ == "__main__":
    main()

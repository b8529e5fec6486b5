"""Make a small InternVL that finds drawn scenes by words, on this machine's CPU in minutes.

  python paddlemix/examples/internvl/demo/train.py

draws scenes of one or two shapes and writes their captions; puts a random QLLaMA of four blocks, random poolings and
projections behind the demo model's vision tower; and fine-tunes all but the tower for retrieval, by the command for that.
Before and after, a hundred pictures that were not trained on, no two of one caption, are looked for by their captions, and
these by the pictures. Results are in ``work_dirs/demo_retrieval``; ``model`` there is a checkpoint like any other.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.examples.internvl2.demo_model import scenes
from paddlemix.examples.internvl2.demo_training import draw_losses, run_training, write_tokenizer

EXAMPLES = Path(__file__).parents[1]
TOWER = cli.DEMO_MODEL
MODES = ("InternVL-C", "InternVL-G")
SCENES = {"train": 1600, "heldout": 100}
BATCH, EPOCHS = 50, 5

QLLAMA = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIZES = {"clip_embed_dim": 64, "attn_pool_num_heads": 4, "num_query_token": 8, "cross_attention_frequency": 2}


def describe(items):
    """What a picture shows, from the top left to the bottom right."""
    return " and ".join(f"a {item.name} {'in' if item.place == 'middle' else 'at'} the {item.place}" for item in items)


def draw(rng):
    """(caption, picture) of one shape, or in a quarter of the scenes of two, in a grid of three by three."""
    items = scenes.arrange(rng.sample(scenes.SEEN, rng.choice((1, 1, 1, 2))), rng)
    return describe(items), scenes.draw_items(items, rng)


def write_scenes(directory, count, seed, different=False):
    """Write so many scenes, with ``different`` ones of different captions: (path of the annotations, captions)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng, rows, seen = random.Random(f"retrieval {seed}"), [], set()
    while len(rows) < count:
        caption, picture = draw(rng)
        if different and caption in seen:
            continue
        seen.add(caption)
        rows.append({"image": f"{len(rows):05d}.png", "caption": caption, "image_id": len(rows)})
        picture.save(directory / rows[-1]["image"], compress_level=1)
    path = directory / "captions.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path, [row["caption"] for row in rows]


def new_model(directory, captions):
    """Write a checkpoint with the demo model's tower, and all else random."""
    import paddle

    from paddlemix.models.internvl import InternVisionModel, InternVLModel
    from paddlemix.models.internvl.configuration import InternVLConfig

    words = [f"summarize:{caption}" for caption in captions] + ["English caption:"] * 100
    vocabulary = write_tokenizer(Path(directory), words)
    tower = InternVisionModel.from_pretrained(TOWER, dtype="float32")
    paddle.seed(0)
    values = {"vision_config": tower.config.to_dict(), "qllama_config": {**QLLAMA, "vocab_size": vocabulary}, **SIZES}
    model = InternVLModel(InternVLConfig.from_dict(values))
    model.vision_model.set_state_dict(tower.state_dict())
    model.save_pretrained(directory)


def recalls(model, pictures, output, device, mode):
    """Recalls of the held-out scenes, both ways, by the command for that."""
    from paddlemix.examples.internvl import retrieval

    flags = ["--images", str(pictures.parent), "--annotations", str(pictures), "--out", str(output), "--mode", mode]
    retrieval.main(["--model_name_or_path", str(model), "--device", device, "--dtype", "float32", "--engine", "eager", *flags])
    return json.loads((output / "score.json").read_text(encoding="utf-8"))["scores"]


@command_main
def main(argv=None):
    """Parse the command line and run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_retrieval", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="times that all scenes are seen (default: %(default)s)")
    args = parser.parse_args(argv)
    output, start = Path(args.output_dir).resolve(), time.monotonic()

    def measure(model, name):
        return {m: recalls(output / model, heldout, output / name / m, args.device, m) for m in MODES}

    heldout, captions = write_scenes(output / "heldout", SCENES["heldout"], "heldout", different=True)
    train, captions = write_scenes(output / "train", SCENES["train"], "train")
    new_model(output / "random", captions)
    before = measure("random", "before")
    command = [sys.executable, str(EXAMPLES / "finetune_retrieval.py"), "--model_name_or_path", str(output / "random")]
    command += ["--images", str(train.parent), "--annotations", str(train), "--output_dir", str(output / "model")]
    command += ["--device", args.device, "--freeze_vision_model", "True", "--least_part", "1", "--flip", "0"]
    command += ["--per_device_train_batch_size", str(BATCH), "--num_train_epochs", str(args.epochs)]
    command += "--learning_rate 2e-3 --weight_decay 0.05 --lr_scheduler_type cosine --warmup_steps 50".split()
    command += "--logging_steps 10 --report_to none --save_strategy no --overwrite_output_dir True".split()
    run_training(command)
    draw_losses([output / "model" / "train_log.jsonl"], output / "loss.png", "A toy InternVL: fine-tuning for retrieval")
    after = measure("model", "after")
    for mode in MODES:
        for name in ("image_retrieval_recall@1", "text_retrieval_recall@1"):
            print(f"{mode} {name}, before: {before[mode][name]:.1%}, after: {after[mode][name]:.1%}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes in all; loss curve: {output / 'loss.png'}; try it:")
    print(f"  paddlemix search --model_name_or_path {output / 'model'} --index {heldout.parent} --out {output / 'index'}")
    print(f'  paddlemix search {output / "index"} --query "{captions[0]}"')


if __name__ == "__main__":
    main()

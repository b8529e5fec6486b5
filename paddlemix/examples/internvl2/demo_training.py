"""What the programs that train on drawn data share: tokenizers, starting the fine-tuning script, a picture of the losses."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from paddlemix.errors import UserError

EXAMPLES = Path(__file__).parent
SCRIPT = EXAMPLES / "shell" / "internvl2.0" / "2nd_finetune" / "internvl2_1b_qwen2_0_5b_dynamic_res_2nd_finetune_full.sh"


def run_training(command, processes=1, **environment):
    """Run a command that trains; the terminal shows what it says.

    Args:
        command: list of words.
        processes: that it starts.
        environment: variables beside those of this process.

    Raises:
        UserError: it failed.
        KeyboardInterrupt, SystemExit: it was stopped, by Ctrl-C or SIGTERM, and has saved a checkpoint.
    """
    if processes > 1:  # small tensors are no work for several threads
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **environment}
    process = subprocess.Popen(command, env={**os.environ, **environment})
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = process.wait()
    except (KeyboardInterrupt, SystemExit):
        process.terminate()  # it saves a checkpoint before it ends
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise UserError(f"training failed: see above; to run it alone: {' '.join(command)}")


def run_script(flags, *, model, meta, output_dir, batch, device, processes=1, rows=None, script=SCRIPT):
    """Train with a shell script, by default that of fine-tuning InternVL2-1B.

    Args:
        flags: of the trainer, in place of the script's.
        model, meta, output_dir: checkpoint to start from, meta file of the data, and where the result goes.
        batch: samples of an update, which ``processes`` share.
        device: where to run.
        rows: samples that a process takes at once; default: all of its share.
        script: path of the script.
    """
    run_training(
        ["sh", str(script), *flags],
        processes,
        DEVICE=device,
        GPUS=str(processes),
        PYTHON=sys.executable,
        MODEL=str(model),
        META=str(meta),
        OUTPUT_DIR=str(output_dir),
        BATCH_SIZE=str(batch),
        PER_DEVICE_BATCH_SIZE=str(rows or batch // processes),
    )


def write_tokenizer(directory, texts):
    """A tokenizer of Llama's kind for the words of some texts; returns how many tokens it has."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def draw_losses(logs, picture_path, title):
    """Draw the losses in some ``train_log.jsonl``, one run after the other, and their means of ten lines, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    done = 0
    for path in map(Path, logs):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "loss" in row]
        steps, losses = [done + row["step"] for row in rows], [row["loss"] for row in rows]
        recent = [losses[max(0, i - 9) : i + 1] for i in range(len(losses))]
        axes.plot(steps, losses, color="lightsteelblue", linewidth=0.8)
        axes.plot(steps, [sum(row) / len(row) for row in recent], label=path.parent.name)
        done = steps[-1]
    axes.set(xlabel="step", ylabel="loss, and its mean of 10 lines", title=title, yscale="log")
    if len(logs) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(picture_path, dpi=120)

"""Teach a toy of InternVL3.5's kind to think before it answers, and ask it: what it thought comes apart from what it says.

  python paddlemix/examples/internvl2/demo_thinking.py

makes a Qwen3 of less than a million parameters from nothing, trains it to count with the system message of
InternVL3.5's card, in a few minutes of a CPU, and asks it with ``thinking=True``. ``work_dirs/demo_thinking`` is then a
checkpoint that ``paddlemix chat --thinking`` and ``paddlemix serve --thinking`` take.
"""

import argparse
import time
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.files import read_json

QUESTION = "What comes after {}?"
NUMBERS = range(10)
LLM = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def answer_to(number):
    """What the toy is to say: a thought, then the next number."""
    return f"<think>\nI count one on from {number}: {number}, {number + 1}.\n</think>\n\n{number + 1}"


def make():
    """An untrained model and its tokenizer, the demo model's with the two tokens around a thought."""
    from paddlemix.models.internvl2 import InternVLChatConfig, InternVLChatModel, load_tokenizer

    tokenizer = load_tokenizer(str(cli.DEMO_MODEL))
    tokenizer.add_tokens(["<think>", "</think>"], special=False)
    values = read_json(str(cli.DEMO_MODEL / "config.json"))
    vision = {**values["vision_config"], "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    llm = {**LLM, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    config = InternVLChatConfig.from_dict({**values, "vision_config": vision, "llm_config": llm, "template": "internvl2_5"})
    model = InternVLChatModel(config)
    model.set_tokenizer(tokenizer)
    return model, tokenizer


def train(model, tokenizer, steps):
    """``steps`` of AdamW, each on all numbers; returns the losses."""
    import numpy as np
    import paddle

    from paddlemix.datasets.collate import padded
    from paddlemix.models.blocks.conversation import IGNORE_INDEX, encode_conversations
    from paddlemix.models.blocks.thinking import SYSTEM_MESSAGE

    template = model.template().with_system_message(SYSTEM_MESSAGE)
    rows, losses = [], []
    for number in NUMBERS:
        turns = [{"from": "human", "value": QUESTION.format(number)}, {"from": "gpt", "value": answer_to(number)}]
        rows.append(encode_conversations(turns, tokenizer, template, []))
    width = max(len(ids) for ids, _ in rows)
    ids = np.stack([padded(ids, width, 0) for ids, _ in rows])
    labels = np.stack([padded(labels, width, IGNORE_INDEX) for _, labels in rows])
    mask = np.stack([padded(np.ones(len(ids), "int64"), width, 0) for ids, _ in rows])
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(3e-3, steps)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    learned = model.language_model.parameters()
    optimiser = paddle.optimizer.AdamW(schedule, parameters=learned, weight_decay=0.01, grad_clip=clip)
    model.train()
    for step in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.clear_grad()
        schedule.step()
        losses.append(float(loss))
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step + 1:4} of {steps}: loss {losses[-1]:.3f}", flush=True)
    model.eval()
    return losses


def ask(model, tokenizer, question):
    """(answer, thought) of a new conversation."""
    from paddlemix.models.internvl2 import ChatSession

    session = ChatSession(model, tokenizer, thinking=True)
    answer = session.ask(question, None, {"do_sample": False, "max_new_tokens": 48})
    return answer, session.reasoning


@command_main
def main():
    """Parse the command line and run."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_thinking", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="updates (default: %(default)s)")
    args = parser.parse_args()

    import paddle

    from paddlemix import device

    device.set_device(args.device)
    paddle.seed(0)
    model, tokenizer = make()
    start = time.monotonic()
    train(model, tokenizer, args.steps)
    output = Path(args.output_dir)
    model.save_pretrained(str(output))
    tokenizer.save_pretrained(str(output))
    right = sum(ask(model, tokenizer, QUESTION.format(n))[0] == str(n + 1) for n in NUMBERS)
    print(f"trained for {time.monotonic() - start:.0f} s; {right} of {len(NUMBERS)} answers are right")
    question = QUESTION.format(7)
    answer, thought = ask(model, tokenizer, question)
    print(f"{question}\nthought: {thought}\nanswer: {answer}")
    chat = f"{cli.ROOT / 'examples/internvl2/chat_demo.py'} --model_name_or_path {output}"
    print(f'try it:\n  python {chat} --image_path None --thinking --text "What comes after 3?"')


if __name__ == "__main__":
    main()

"""Teach a toy of InternVL3.5's kind to think before it answers, and ask it: what it thought comes apart from what it says.

  python paddlemix/examples/internvl2/demo_thinking.py

makes a Qwen3 of less than a million parameters from nothing, trains it on sums of two digits with the system message of
InternVL3.5's card, in a few minutes of a CPU, and asks it with ``thinking=True``. ``work_dirs/demo_thinking`` is then a
checkpoint that ``paddlemix chat --thinking`` and ``paddlemix serve --thinking`` take.
"""

import argparse
import random
import time
from pathlib import Path

from paddlemix.errors import command_main
from paddlemix.examples.internvl2 import cli
from paddlemix.files import read_json

QUESTION = "What is {} + {}?"
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


def answer_to(a, b):
    """What the toy is to say: a thought, then the sum."""
    return f"<think>\nI add {b} to {a}: that is {a + b}.\n</think>\n\n{a + b}"


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


def train(model, tokenizer, steps, batch, seed=0):
    """``steps`` of AdamW on sums in any order; returns the losses."""
    import numpy as np
    import paddle

    from paddlemix.models.blocks.thinking import SYSTEM_MESSAGE
    from paddlemix.models.internvl2.conversation import encode_conversations

    template = model.template().with_system_message(SYSTEM_MESSAGE)
    samples = {}
    for a in range(10):
        for b in range(10):
            turns = [{"from": "human", "value": QUESTION.format(a, b)}, {"from": "gpt", "value": answer_to(a, b)}]
            samples[a, b] = encode_conversations(turns, tokenizer, template, [])
    drawn, losses = random.Random(seed), []
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(3e-3, steps)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    learned = model.language_model.parameters()
    optimiser = paddle.optimizer.AdamW(schedule, parameters=learned, weight_decay=0.01, grad_clip=clip)
    model.train()
    for step in range(steps):
        rows = [samples[pair] for pair in drawn.sample(list(samples), batch)]
        width = max(len(ids) for ids, _ in rows)
        ids, labels = (np.array([row[i] + [fill] * (width - len(row[i])) for row in rows]) for i, fill in ((0, 0), (1, -100)))
        mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="work_dirs/demo_thinking", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, gpu, npu or another Paddle device (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="updates (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sums of an update (default: %(default)s)")
    args = parser.parse_args()

    import paddle

    from paddlemix import device

    device.set_device(args.device)
    paddle.seed(0)
    model, tokenizer = make()
    start = time.monotonic()
    train(model, tokenizer, args.steps, args.batch)
    output = Path(args.output_dir)
    model.save_pretrained(str(output))
    tokenizer.save_pretrained(str(output))
    pairs = random.Random(1).sample([(a, b) for a in range(10) for b in range(10)], 20)
    right = sum(ask(model, tokenizer, QUESTION.format(a, b))[0] == str(a + b) for a, b in pairs)
    print(f"trained for {time.monotonic() - start:.0f} s; {right} of {len(pairs)} sums are right")
    question = QUESTION.format(7, 5)
    answer, thought = ask(model, tokenizer, question)
    print(f"{question}\nthought: {thought}\nanswer: {answer}")
    chat = f"{cli.ROOT / 'examples/internvl2/chat_demo.py'} --model_name_or_path {output}"
    print(f'try it:\n  python {chat} --image_path None --thinking --text "What is 3 + 4?"')


if __name__ == "__main__":
    main()

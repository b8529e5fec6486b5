"""What transformers computes of a folder in its own layout: `python in_transformers.py FOLDER INPUTS.npz OUTPUTS.npz`.

Imports nothing of this package, so that it runs where transformers and torch are, and Paddle need not be.
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, InternVLForConditionalGeneration


@torch.no_grad()
def main(folder, inputs, outputs):
    torch.set_num_threads(1)
    given = np.load(inputs)
    model, info = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    model.eval()
    ids, pixels = torch.from_numpy(given["input_ids"]), torch.from_numpy(given["pixel_values"])
    features = model.model.get_image_features(pixel_values=pixels)
    prompt = torch.from_numpy(given["prompt"])
    both = model(input_ids=prompt, pixel_values=pixels).logits
    greedy = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    answer = model.generate(input_ids=prompt, pixel_values=pixels, generation_config=greedy)[:, prompt.shape[1] :]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = json.loads(str(given["messages"]))
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    np.savez(
        outputs,
        logits=model(input_ids=ids).logits.numpy(),
        features=features.numpy(),
        prompt_logits=both.numpy(),
        answer=answer.numpy(),
        rendered=rendered,
        rendered_ids=tokenizer(rendered)["input_ids"],
        loading=json.dumps({key: sorted(map(str, value)) for key, value in info.items()}),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

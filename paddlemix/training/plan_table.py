"""Memory of a card for each published model and method, as docs/finetune.md has it: ``plan --table``."""

import re

from paddlemix import device

from .arguments import DataTrainingArguments, ModelArguments, PreTrainingArguments
from .plan import GB, OVERHEAD, plan
from .published import LATER, PUBLISHED, published_config


def memory_table():
    """Markdown table of memory for the published models with the settings of the shell scripts."""
    rows = [
        "| model | method | cards | samples a card | weights | optimizer | gradients | activations | peak of a card |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name in (*PUBLISHED, *LATER):
        size = int(re.search(r"(\d+)B", name)[1])  # in billions, of all experts
        config = published_config(name)
        usual = 1 if size >= 76 else 2 if size >= 26 else 4
        cards = {38: 16, 40: 16, 76: 32, 78: 32, 241: 64}.get(size, 8)
        for method, processes, per_device in (
            ("full", cards, usual),
            ("LoRA 16", 8 if size >= 76 else 2, usual),
            ("LoRA 16", 1, 1),
            ("QLoRA 16, 4 bits", 1, 1),
        ):
            lora = method != "full"
            model_args = ModelArguments(
                model_name_or_path=name,
                freeze_backbone=True,
                freeze_llm=lora,
                freeze_mlp=lora,
                use_llm_lora=16 * lora,
                load_4bit=method.startswith("Q"),
            )
            data_args = DataTrainingArguments(
                max_seq_length=4096 if "2-" in name else 8192, dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=6
            )
            train_args = PreTrainingArguments(
                output_dir=".",
                per_device_train_batch_size=per_device,
                bf16=True,
                fp16_opt_level="O2",
                amp_master_grad=True,
                recompute=True,
                sharding="stage3" if size >= (38 if lora else 26) else "stage2" if size >= (26 if lora else 8) else "stage1",
            )
            _, _, needed = plan(config, model_args, data_args, train_args, processes, device.PUBLISHED)
            values = (needed.weights, needed.optimizer, needed.gradients, needed.activations, needed.peak + OVERHEAD)
            cells = " | ".join(f"{value / GB:.1f}" for value in values)
            rows.append(f"| {name} | {method} | {processes} | {per_device} | {cells} |")
    return "\n".join(rows)

"""Pretrain an InternVL chat model: fine-tuning's flags and trainer over data sets of any size.

  python paddlemix/examples/internvl2/internvl_chat_pretrain.py --vision_path OpenGVLab/InternViT-300M-448px-V2_5 \\
      --llm_path Qwen/Qwen2.5-0.5B-Instruct --conv_style internvl2_5 --meta_path my_data.json --output_dir work_dirs/stage1 \\
      --do_train --freeze_llm True --freeze_backbone True --use_packed_ds True --max_steps 100000

Nothing is read but what is trained on: rows of annotation files by an index, pictures also from tar shards. docs/pretrain.md
explains; the scripts in shell/internvl2.5/stage1, stage1.5 and stage2 hold the published settings.
"""

from paddlemix.errors import command_main
from paddlemix.examples.internvl2.internvl_chat_finetune import run


@command_main
def main(argv=None):
    """Parse the command line and train, or print the plan with --dry_run."""
    return run(argv, __file__, _recipe)


def _recipe(model_args):
    from paddlemix.training.pretraining import PretrainRecipe

    return PretrainRecipe()


if __name__ == "__main__":
    main()

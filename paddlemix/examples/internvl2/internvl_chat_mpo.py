"""Train an InternVL chat model on preferences (MPO): pairs of answers to one question, of which one is chosen.

  python paddlemix/examples/internvl2/internvl_chat_mpo.py --model_name_or_path OpenGVLab/InternVL2-8B \\
      --conv_style internlm2-chat --meta_path MMPR/meta.json --output_dir work_dirs/mpo --do_train --freeze_backbone True

The flags are those of fine-tuning, with --loss_type and its weights beside them; docs/mpo.md explains. ``--devices N``
trains with N processes.
"""

from paddlemix.errors import command_main
from paddlemix.examples.internvl2.internvl_chat_finetune import run
from paddlemix.training.arguments import PreferenceArguments


@command_main
def main(argv=None):
    """Parse the command line and train, or print the plan with --dry_run."""
    return run(argv, __file__, _recipe, extra=(PreferenceArguments,))


def _recipe(model_args, preference):
    from paddlemix.training.preference import PreferenceRecipe

    return PreferenceRecipe(model_args, preference)


if __name__ == "__main__":
    main()

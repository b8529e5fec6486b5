"""Train an InternVL chat model on preferences (MPO): pairs of answers to one question, of which one is chosen.

  python paddlemix/examples/internvl2/internvl_chat_mpo.py --model_name_or_path OpenGVLab/InternVL2-8B \\
      --conv_style internlm2-chat --meta_path MMPR/meta.json --output_dir work_dirs/mpo --do_train --freeze_backbone True

The flags are those of fine-tuning, with --loss_type and its weights beside them; docs/mpo.md explains. ``--devices N``
trains with N processes.
"""

import os
import sys

from paddlemix.errors import ConfigError, command_main
from paddlemix.examples.internvl2.internvl_chat_finetune import start_ranks, take_devices


def parse(argv):
    """(ModelArguments, DataTrainingArguments, PreTrainingArguments, PreferenceArguments)."""
    from paddlemix.training.arguments import PreferenceArguments
    from paddlemix.training.arguments import parse as parse_flags

    return parse_flags(argv, prog="internvl_chat_mpo.py", extra=(PreferenceArguments,))


@command_main
def main(argv=None):
    """Parse the command line and train, or print the plan with --dry_run."""
    argv = sys.argv[1:] if argv is None else argv
    processes, argv = take_devices(argv)
    if "--dry_run" in argv or "--dry-run" in argv:
        from paddlemix.training import plan
        from paddlemix.training.arguments import PreferenceArguments

        return plan.main(argv if processes == 1 else ["--processes", str(processes), *argv], extra=(PreferenceArguments,))
    model_args, data_args, train_args, preference = parse(argv)
    if train_args.sharding == "stage3":
        raise ConfigError("--sharding stage3 is not supported in preference training yet: use stage1 or stage2")
    if processes > 1 and "PADDLE_TRAINER_ID" not in os.environ:
        start_ranks(processes, argv, train_args, __file__)
    from paddlemix.training.preference import PreferenceRecipe
    from paddlemix.training.trainer import finetune

    return finetune(model_args, data_args, train_args, PreferenceRecipe(model_args, preference))


if __name__ == "__main__":
    main()

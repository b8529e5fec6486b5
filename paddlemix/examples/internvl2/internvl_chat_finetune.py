"""Fine-tune an InternVL chat model.

  python paddlemix/examples/internvl2/internvl_chat_finetune.py --model_name_or_path OpenGVLab/InternVL2-1B \\
      --conv_style Hermes-2 --meta_path my_data.json --output_dir work_dirs/mine --do_train --freeze_backbone True
  python paddlemix/examples/internvl2/internvl_chat_finetune.py settings.yaml

--help lists all arguments, docs/finetune.md explains. The scripts in shell/ hold the published settings. With
``python -m paddle.distributed.launch`` before it, the same runs on several devices.
"""

import sys

from paddlemix.errors import command_main


@command_main
def main(argv=None):
    """Parse the command line and train, or print the plan with --dry_run."""
    argv = sys.argv[1:] if argv is None else argv
    if "--dry_run" in argv:
        from paddlemix.training import plan

        return plan.main(argv)
    from paddlemix.training.arguments import parse

    arguments = parse(argv)
    from paddlemix.training.trainer import finetune  # after the arguments are known to be right: Paddle takes seconds to load

    return finetune(*arguments)


if __name__ == "__main__":
    main()

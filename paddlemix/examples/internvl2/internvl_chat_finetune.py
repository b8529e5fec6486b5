"""Fine-tune an InternVL chat model.

  python paddlemix/examples/internvl2/internvl_chat_finetune.py --model_name_or_path OpenGVLab/InternVL2-1B \\
      --conv_style Hermes-2 --meta_path my_data.json --output_dir work_dirs/mine --do_train --freeze_backbone True
  python paddlemix/examples/internvl2/internvl_chat_finetune.py settings.yaml

--help lists all arguments, docs/finetune.md explains. The scripts in shell/ hold the published settings. ``--devices N`` trains
with N processes, one a device, or as many on CPU; so does ``python -m paddle.distributed.launch`` before it.
"""

import os
import sys
from pathlib import Path

import paddlemix
from paddlemix.errors import ConfigError, command_main


def take_devices(argv):
    """``(number, other arguments)``: what ``--devices N`` asks for, and the flags that are the trainer's; 1 without.

    Raises:
        ConfigError: N is no number from 1 to 4,096.
    """
    rest, number = [], "1"
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag != "--devices":
            rest.append(argument)
        else:
            number = value if equals else next(arguments, "")
    if not (number.isdecimal() and 1 <= int(number[:5]) <= 4096):
        raise ConfigError(f"--devices is '{number}': give the number of processes to train with, one a device")
    return int(number), rest


def start_ranks(processes, argv, train_args, script):
    """Become the launcher of ``processes`` processes of ``script`` that train with ``argv``; does not return."""
    from paddlemix import device

    logs = os.path.join(train_args.output_dir, "launch_logs")
    command = [sys.executable, "-m", "paddle.distributed.launch", "--run_mode", "collective", "--log_dir", logs]
    kind = device.set_device(train_args.device)
    if device.is_cpu(kind):
        command += ["--nproc_per_node", str(processes)]
    else:
        command += ["--devices", ",".join(device.launch_numbers(kind, processes))]
    root = str(Path(paddlemix.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execv(sys.executable, [*command, os.path.abspath(script), *argv])


def run(argv, script, recipe=None, extra=()):
    """Train as ``argv`` says, or print the plan with --dry_run: the command of every kind of training.

    Args:
        argv: flags; None for the command line.
        script: path of the command, which its processes run.
        recipe: called with the arguments of ``extra``; the recipe of the trainer. None for fine-tuning's own.
        extra: dataclasses of further flags.
    """
    argv = sys.argv[1:] if argv is None else argv
    processes, argv = take_devices(argv)
    if "--dry_run" in argv or "--dry-run" in argv:
        from paddlemix.training import plan

        return plan.main(argv if processes == 1 else ["--processes", str(processes), *argv], extra=extra)
    from paddlemix.training.arguments import parse

    model_args, data_args, train_args, *others = parse(argv, prog=os.path.basename(script), extra=extra)
    if processes > 1 and "PADDLE_TRAINER_ID" not in os.environ:
        start_ranks(processes, argv, train_args, script)
    from paddlemix.training.trainer import finetune  # after the arguments are known to be right: Paddle takes seconds to load

    recipe = recipe and recipe(model_args, *others)
    return finetune(model_args, data_args, train_args, recipe, task_scorer(data_args, train_args))


def task_scorer(data_args, train_args):
    """What scores ``--eval_tasks`` while training, on pictures cut as those of training are; None without."""
    if not train_args.eval_tasks:
        return None
    from paddlemix.evaluation.runner import Settings
    from paddlemix.evaluation.while_training import TaskScorer

    settings = Settings(
        model=train_args.output_dir,
        data_root=train_args.eval_data_root,
        dynamic=data_args.dynamic_image_size,
        max_num=data_args.max_dynamic_patch if data_args.dynamic_image_size else None,
        limit=train_args.eval_limit,
        shuffle_seed=None if train_args.eval_limit is None else 0,  # the first ones are often of one kind
    )
    return TaskScorer(train_args.eval_tasks, os.path.join(train_args.output_dir, "evaluations"), settings)


@command_main
def main(argv=None):
    """Parse the command line and train, or print the plan with --dry_run."""
    return run(argv, __file__)


if __name__ == "__main__":
    main()

"""Train InternVL-Chat-LLaVA with the original's arguments.

  python paddlemix/examples/internvl_llava/train.py --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain \\
      --vision_tower OpenGVLab/InternViT-6B-224px --mm_vision_select_layer -4 --mm_projector_type mlp2x_gelu \\
      --mm_use_im_patch_token False --tune_mm_mlp_adapter True --data_path records.json --image_folder pictures \\
      --output_dir work_dirs/pretrain --learning_rate 1e-3
  --dry_run prints what a run takes and starts none; --devices N trains with N processes, one a device.
"""

import os
import sys

from paddlemix.errors import command_main
from paddlemix.examples.internvl2.internvl_chat_finetune import start_ranks, take_devices


@command_main
def main(argv=None):
    """Parse the command line and train, or print the plan with --dry_run."""
    from paddlemix.training.llava import parse_llava, print_plan, train

    processes, argv = take_devices(sys.argv[1:] if argv is None else argv)
    if "--dry_run" in argv or "--dry-run" in argv:
        return print_plan(argv if processes == 1 else ["--processes", str(processes), *argv])
    arguments = parse_llava(argv)
    if processes > 1 and "PADDLE_TRAINER_ID" not in os.environ:
        start_ranks(processes, argv, arguments[2], __file__)
    return train(*arguments)


if __name__ == "__main__":
    main()

"""Fine-tune InternVL for retrieval (Flickr30K, Flickr30K-CN, COCO).

  python paddlemix/examples/internvl/finetune_retrieval.py --model_name_or_path OpenGVLab/InternVL-14B-224px \\
      --images flickr30k/Images --annotations flickr30k_train_karpathy.txt --output_dir work_dirs/flickr30k \\
      --force_image_size 364 --learning_rate 1e-6 --vit_layer_decay_rate 0.9 --qllama_layer_decay_rate 0.9

--help lists all arguments. The scripts in shell/ hold the published settings. With ``python -m paddle.distributed.launch``
before it, or --devices N, the same runs on several devices: features of all of them are compared with each other.
"""

import sys

from paddlemix.errors import command_main
from paddlemix.examples.internvl2.internvl_chat_finetune import start_ranks, take_devices


@command_main
def main(argv=None):
    """Parse the command line and train."""
    from paddlemix.training.arguments import parse
    from paddlemix.training.retrieval import CLASSES, finetune

    processes, argv = take_devices(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv, "finetune_retrieval.py", classes=CLASSES, description=__doc__.split("\n")[0])
    if processes > 1:
        start_ranks(processes, argv, arguments[-1], __file__)
    return finetune(*arguments)


if __name__ == "__main__":
    main()

"""Talk about a picture with InternVL-Chat-LLaVA, as the original's command line does.

  python paddlemix/examples/internvl_llava/chat.py --model-path OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B \\
      --image-file photo.jpg
  python paddlemix/examples/internvl_llava/chat.py --model-path work_dirs/pretrain --model-base lmsys/vicuna-7b-v1.5 \\
      --image-file https://example.org/photo.jpg --temperature 0

The picture goes with the first question; an empty line, or the end of the input, ends.
"""

import argparse
import sys

from paddlemix.commands import Parser, add_weight_flags, weight_options
from paddlemix.errors import UserError, command_main
from paddlemix.examples.internvl2 import cli


def make_parser():
    """The flags of the original's ``llava.serve.cli``, and those of the chat commands here for device and dtype."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="a checkpoint directory, or a name")
    parser.add_argument("--model-base", help="the language model of a checkpoint that is a projector or LoRA adapters alone")
    parser.add_argument("--vision-tower", help="the vision tower, instead of the one that the checkpoint has or names")
    parser.add_argument("--image-file", help="a picture: a file, or an https:// or data: address (default: none)")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu, npu or another Paddle device (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of weights and arithmetic (default: auto, the best that the device has)",
    )
    parser.add_argument("--engine", default="auto", choices=["auto", "eager", "inference"], help="as for chat_demo.py")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="conversation template (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.2, help="0, or beams, take the likeliest tokens (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default: %(default)s)")
    cli.add_beam_flags(parser)
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    add_weight_flags(parser)
    parser.add_argument(
        "--image-aspect-ratio",
        default="pad",
        help="pad: all of the picture on a square; otherwise its middle is cut out (default: %(default)s)",
    )
    cli.add_picture_flags(parser)
    parser.add_argument("--debug", action="store_true", help="print every prompt and what was answered")
    return parser


@command_main
def main(argv=None):
    """Parse the command line and talk."""
    args = make_parser().parse_args(argv)

    from paddlemix import device
    from paddlemix.models.internvl_llava import LlavaForCausalLM, load_tokenizer, process_images
    from paddlemix.models.internvl_llava.conversation import get_template
    from paddlemix.processors.image import open_image

    template = get_template(args.conv_mode)
    options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, **cli.beams(args)}
    if args.temperature and args.num_beams == 1:
        options |= {"do_sample": True, "temperature": args.temperature}
    device.set_device(args.device)
    sources = [] if args.image_file is None else cli.sources([args.image_file], "--image-file", interactive=True)
    pictures = [open_image(source, **cli.look(args)) for source in sources]  # before the model takes its time
    model = LlavaForCausalLM.from_pretrained(
        args.model_path, args.model_base, args.vision_tower, dtype=args.dtype, engine=args.engine, **weight_options(args)
    )
    session, _ = model.session(load_tokenizer(args.model_path, args.model_base), template=template)
    pixels = process_images(pictures, model.image_size, args.image_aspect_ratio) if pictures else None

    user, assistant = (name.strip(": ") or default for name, default in zip((template.user[0], template.assistant), _ROLES))
    while True:
        try:
            question = input(f"{user}: ")
        except EOFError:
            question = ""
        if not question:
            print("exit...")
            return
        print(f"{assistant}: ", end="", flush=True)
        mark = "<image>\n" if pixels is not None else ""
        try:
            pieces = []
            for piece in session.stream(mark + question, pixels, options):
                pieces.append(piece)
                print(piece, end="", flush=True)
            print()
            for other in session.answers[1:]:
                print(f"{assistant}: {other}")
        except UserError as error:  # too long a question is no reason to lose the conversation
            print(f"\nerror: {error}", file=sys.stderr)
            continue
        if args.debug:
            asked = session.template.prompt(mark + question, session.history[:-1])
            print("\n", {"prompt": asked, "outputs": "".join(pieces)}, "\n")
        pixels = None


_ROLES = ("USER", "ASSISTANT")

if __name__ == "__main__":
    main()

"""Chat about a picture with Mini-Monkey, which looks at it at two scales.

  python paddlemix/examples/minimonkey/chat_demo_minimonkey.py
      asks the bundled demo model about a bundled picture; it was not trained for two scales
  python paddlemix/examples/minimonkey/chat_demo_minimonkey.py --model_name_or_path mx262/MiniMonkey \\
      --image_path page.png --text "Read the all text in the image."
"""

from paddlemix.commands import weight_options
from paddlemix.errors import PromptError, command_main
from paddlemix.examples.internvl2 import cli

DEMO_IMAGE = cli.DEMO_IMAGES / "scene_1.png"
DEMO_TEXT = "What color is the star?"


@command_main
def main():
    """Parse the command line and chat."""
    parser = cli.make_parser(__doc__)
    parser.set_defaults(max_new_tokens=512)
    parser.add_argument(
        "--image_path",
        default=None,
        help="a picture: a file, an https:// or data: address, - for standard input; None for no picture (default: a bundled "
        "one if --text is not given)",
    )
    parser.add_argument("--text", default=None, help=f"the question (default: {DEMO_TEXT!r})")
    parser.add_argument("--max_num", type=int, default=None, help="most tiles of the finer scale (default: 12)")
    parser.add_argument("--tiling", choices=["chat", "training"], default="chat", help="rule of the tiles (default: chat)")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--scm", action="store_true", default=True, help="drop half of the finer scale's tokens (default)")
    scale.add_argument("--no_scm", action="store_false", dest="scm", help="keep all tokens, as the published demo does")
    cli.add_picture_flags(parser)
    args = parser.parse_args()
    if args.tensor_parallel != 1:
        parser.error("--tensor_parallel is for `paddlemix chat`: Mini-Monkey's 2B fits on one device")

    bundled = args.image_path is None and args.text is None
    paths = [str(DEMO_IMAGE)] if bundled else [path for path in [args.image_path] if path not in (None, "None")]
    paths = cli.sources(paths, "--image_path", args.interactive)
    session = None

    def load(args):
        nonlocal session
        from paddlemix.models.minimonkey import MiniMonkeyChatModel, MiniMonkeySession
        from paddlemix.tokenizers import load_tokenizer

        directory = cli.prepare(args)
        options = weight_options(args)
        model = MiniMonkeyChatModel.from_pretrained(directory, dtype=args.dtype, engine=args.engine, **options)
        session = MiniMonkeySession(model, load_tokenizer(directory), None, args.scm, system_message=args.system_message)
        return session

    def attach(paths, config):
        from paddlemix.processors.image import open_image
        from paddlemix.processors.minimonkey import multi_scale_tiles

        if len(paths) != 1 or session.grid is not None:
            raise PromptError("Mini-Monkey looks at one picture in a conversation: start another for each")
        (source,) = cli.sources(paths, "--image_path", args.interactive)  # an address may come by /add
        picture = open_image(source, **cli.look(args))
        pixels, session.grid, _ = multi_scale_tiles(picture, config.image_size, args.tiling, args.max_num)
        return "<image>\n", pixels, [len(pixels)]

    cli.run(args, DEMO_TEXT if args.text is None else args.text, paths, attach, load=load)


if __name__ == "__main__":
    main()

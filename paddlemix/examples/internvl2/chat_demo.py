"""Chat about pictures with an InternVL model.

  python paddlemix/examples/internvl2/chat_demo.py
      asks the bundled demo model about a bundled picture
  python paddlemix/examples/internvl2/chat_demo.py --model_name_or_path OpenGVLab/InternVL2-8B \\
      --image_path photo.jpg --text "Please describe this picture in detail."
  python paddlemix/examples/internvl2/chat_demo.py --image_path a.png b.png --text "What is different?" --stream --interactive
"""

from pathlib import Path

from paddlemix.errors import PromptError, command_main
from paddlemix.examples.internvl2 import cli

DEMO_IMAGE = cli.DEMO_IMAGES / "scene_1.png"
DEMO_TEXT = "What color is the star?"


def load_pictures(paths, config, max_num=None, exif_orientation=True, background="white"):
    """Pictures as a checkpoint wants them.

    Args:
        paths: picture files, addresses, or bytes of pictures.
        config: the checkpoint's :class:`InternVLChatConfig`.
        max_num: most tiles of a picture, instead of the configuration's.
        exif_orientation: turn pictures as their EXIF data say.
        background: colour that transparent pictures are laid on; None drops their transparency, as the original does.

    Returns:
        (marks that go before a question, pixel_values ``[T, 3, H, W]``, tiles of each picture). A single picture's mark
        is bare, several are numbered.
    """
    import numpy as np

    from paddlemix.processors.image import load_image

    tiles = [
        load_image(path, **config.tiling(max_num), exif_orientation=exif_orientation, background=background) for path in paths
    ]
    marks = "<image>\n" if len(paths) == 1 else "".join(f"Image-{i + 1}: <image>\n" for i in range(len(paths)))
    return marks, np.concatenate(tiles), [len(t) for t in tiles]


def check_drawing(paths, output):
    """Whether boxes can be drawn and saved, asked before the model takes its time.

    Raises:
        PromptError: no, because of the pictures or of the name ``output``.
    """
    from PIL import Image

    output = Path(output)
    if len(paths) != 1:
        raise PromptError(f"--draw_boxes needs exactly one picture, but --image_path names {len(paths)}")
    if not output.absolute().parent.is_dir():
        raise PromptError(f"--draw_boxes {output}: the folder {output.parent} does not exist: make it")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise PromptError(f"--draw_boxes {output}: '{output.suffix}' is no picture format: use a name that ends in .png")


def save_boxes(session, path, output, exif_orientation=True, background="white"):
    """Draw the boxes of the last answer on the picture ``path`` and save it as ``output``, whole or not at all."""
    from paddlemix.boxes import draw_boxes, parse_boxes
    from paddlemix.processors.image import open_image

    picture = open_image(path, exif_orientation, background)
    boxes = parse_boxes(session.marked_answer, *picture.size)
    unfinished = Path(output).with_name(f".{Path(output).name}")  # the name's end is the format
    try:
        draw_boxes(picture, boxes).save(unfinished)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise PromptError(
            f"--draw_boxes {output} cannot be written ({error.strerror or error}): make room, or use another"
        ) from None
    unfinished.replace(output)
    print(f"{len(boxes)} box(es) drawn on {output}")


@command_main
def main():
    """Parse the command line and chat."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--image_path",
        nargs="+",
        default=None,
        help="one picture or several: files, https:// or data: addresses, - for standard input; None for a question about "
        "no picture (default: a bundled picture if --text is not given)",
    )
    parser.add_argument("--text", default=None, help=f"the question; <image> marks a picture's place (default: {DEMO_TEXT!r})")
    parser.add_argument("--max_num", type=int, default=None, help="most tiles of a picture (default: the checkpoint's own)")
    parser.add_argument("--draw_boxes", metavar="OUT.png", help="draw the boxes that the answer names on the picture")
    cli.add_picture_flags(parser)
    args = parser.parse_args()

    bundled = args.image_path is None and args.text is None
    paths = [str(DEMO_IMAGE)] if bundled else [path for path in args.image_path or [] if path != "None"]
    if args.draw_boxes:
        check_drawing(paths, args.draw_boxes)
    paths = cli.sources(paths, "--image_path", args.interactive)
    look = cli.look(args)
    cli.run(
        args,
        DEMO_TEXT if args.text is None else args.text,
        paths,
        lambda paths, config: load_pictures(paths, config, args.max_num, **look),
        (lambda session: save_boxes(session, paths[0], args.draw_boxes, **look)) if args.draw_boxes else None,
    )


if __name__ == "__main__":
    main()

"""Chat about a video with an InternVL model.

  python paddlemix/examples/internvl2/chat_demo_video.py
      asks the bundled demo model about a bundled clip
  python paddlemix/examples/internvl2/chat_demo_video.py --model_name_or_path OpenGVLab/InternVL2-8B \\
      --video_path film.mp4 --start 60 --end 90 --num_segments 16 --text "What happens here?"

A video is a file, an animated GIF, or a folder of frames.
"""

from paddlemix.errors import VideoError, command_main
from paddlemix.examples.internvl2 import cli

DEMO_VIDEO = cli.DEMO_IMAGES / "clip.mp4"
DEMO_TEXT = "Please describe this video."
VIDEO_HELP = (
    "a video: a file, a folder of frames, an https:// or data: address, - for standard input "
    "(default: a bundled clip if --text is not given)"
)


def load_frames(paths, config, args):
    """Frames of videos as a checkpoint wants them.

    Args:
        paths: videos, also addresses and bytes of files; their frames are numbered through.
        config: the checkpoint's :class:`InternVLChatConfig`.
        args: parsed flags of this command.

    Returns:
        (marks that go before a question, pixel_values ``[T, 3, H, W]``, tiles of each frame).
    """
    import numpy as np

    from paddlemix.processors.media import on_disk
    from paddlemix.processors.video import frame_prefix, load_video

    bound = None
    if args.start is not None or args.end is not None:
        bound = (args.start or 0.0, float("inf") if args.end is None else args.end)
        if bound[0] >= bound[1]:
            raise VideoError(f"--start {bound[0]} is not before --end {bound[1]}")
    room, per_tile = config.llm_config.context_length, config.num_image_token
    least = len(paths) * args.num_segments * per_tile  # a frame is one tile at least
    if least >= room:  # before anything is decoded
        raise VideoError(
            f"--num_segments {args.num_segments} are at least {least} tokens, but the model's context is {room}: "
            f"use at most {(room - 1) // (len(paths) * per_tile)}"
        )
    videos = []
    for source in cli.sources(paths, "--video_path", args.interactive, clips=True):
        with on_disk(source) as path:
            videos.append(
                load_video(
                    path,
                    bound,
                    input_size=config.image_size,
                    max_num=args.max_num,
                    num_segments=args.num_segments,
                    use_thumbnail=config.use_thumbnail,
                    **cli.look(args),
                )
            )
    counts = [n for _, per_frame in videos for n in per_frame]
    return frame_prefix(len(counts)), np.concatenate([pixels for pixels, _ in videos]), counts


@command_main
def main():
    """Parse the command line and chat."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--video_path", default=None, help=VIDEO_HELP)
    parser.add_argument("--text", default=None, help=f"the question (default: {DEMO_TEXT!r})")
    parser.add_argument("--num_segments", type=int, help="frames that are looked at (default: 8; 4 for the bundled clip)")
    parser.add_argument("--max_num", type=int, default=1, help="most tiles of a frame (default: 1)")
    parser.add_argument("--start", type=float, default=None, help="look at the video from this second on")
    parser.add_argument("--end", type=float, default=None, help="look at the video up to this second")
    cli.add_picture_flags(parser)
    args = parser.parse_args()

    bundled = args.video_path is None and args.text is None
    if bundled and args.num_segments is None:
        args.num_segments = 4  # what the bundled model was trained on
    args.num_segments = 8 if args.num_segments is None else args.num_segments
    paths = [str(DEMO_VIDEO)] if bundled else [path for path in [args.video_path] if path not in (None, "None")]
    paths = cli.sources(paths, "--video_path", args.interactive, clips=True)  # before the model takes its time
    text = DEMO_TEXT if args.text is None else args.text
    cli.run(args, text, paths, lambda paths, config: load_frames(paths, config, args))


if __name__ == "__main__":
    main()

"""What the chat commands share: their flags, loading a model, and asking. Quick to import."""

import argparse
import sys
from pathlib import Path

import paddlemix
from paddlemix.commands import Parser, add_tensor_parallel, add_weight_flags, weight_options
from paddlemix.errors import PromptError, UserError
from paddlemix.serving.flags import add_form_flags, form_of

ROOT = Path(paddlemix.__file__).parent
DEMO_MODEL = ROOT / "demo_model"
DEMO_IMAGES = ROOT / "demo_images"


def make_parser(description):
    """A parser with the flags that choose the model and how it answers; the description is shown as it is written."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path",
        default=str(DEMO_MODEL),
        help="a checkpoint directory, or a name such as OpenGVLab/InternVL2-1B (default: the bundled demo model)",
    )
    model.add_argument(
        "--device", default="auto", help="auto, cpu, gpu, npu or another Paddle device, or gpu:1 (default: auto)"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of weights and arithmetic (default: auto, the best that the device has)",
    )
    model.add_argument(
        "--engine",
        default="auto",
        choices=["auto", "eager", "inference"],
        help="eager: plain Paddle; inference: fused CPU kernels, compiled on first use (default: auto, the faster one)",
    )
    add_weight_flags(model)
    add_tensor_parallel(model)
    answer = parser.add_argument_group("answer")
    answer.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer in tokens (default: 1024)")
    answer.add_argument("--min_new_tokens", type=int, default=0, help="shortest answer in tokens (default: 0)")
    answer.add_argument("--do_sample", action="store_true", help="draw tokens at random instead of taking the likeliest")
    answer.add_argument("--temperature", type=float, default=1.0, help="with --do_sample (default: 1.0)")
    answer.add_argument("--top_k", type=int, default=50, help="with --do_sample; 0 for all tokens (default: 50)")
    answer.add_argument("--top_p", type=float, default=1.0, help="with --do_sample (default: 1.0)")
    answer.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition (default: 1.0)")
    add_beam_flags(answer)
    answer.add_argument("--stop", nargs="*", default=[], metavar="TEXT", help="texts that end the answer")
    answer.add_argument("--seed", type=int, default=None, help="with --do_sample: the same seed gives the same answer")
    answer.add_argument("--system_message", default=None, help="tell the model who it is (default: the checkpoint's own)")
    answer.add_argument(
        "--thinking", action="store_true", help="let InternVL3.5 think before it answers; the thought is printed apart"
    )
    add_form_flags(answer)
    answer.add_argument("--stream", action="store_true", help="print the answer as it is generated")
    answer.add_argument("--interactive", action="store_true", help="go on asking in the same conversation")
    return parser


def add_beam_flags(parser):
    """Flags of beam search; :func:`beams` reads them."""
    parser.add_argument(
        "--num_beams", type=int, default=1, help="continuations that are followed at once, to find the likeliest (default: 1)"
    )
    parser.add_argument(
        "--num_return_sequences", type=int, default=1, help="with --num_beams: answers to print, best first (default: 1)"
    )
    parser.add_argument(
        "--length_penalty", type=float, default=1.0, help="with --num_beams: above 0 favours long answers (default: 1.0)"
    )
    parser.add_argument(
        "--early_stopping",
        default="false",
        choices=["true", "false", "never"],
        help="with --num_beams: stop at the first whole answers, when no better one is likely, or possible (default: false)",
    )


def beams(args):
    """The options of generation that the flags of :func:`add_beam_flags` stand for."""
    names = ("num_beams", "num_return_sequences", "length_penalty")
    early = {"true": True, "false": False}.get(args.early_stopping, args.early_stopping)
    return {**{name: getattr(args, name) for name in names}, "early_stopping": early}


def add_picture_flags(parser):
    """Flags that say how pictures are taken; :func:`look` reads them."""
    parser.add_argument("--keep_orientation", action="store_true", help="do not turn pictures as their EXIF data say")
    parser.add_argument(
        "--background",
        default="white",
        metavar="keep|COLOR",
        help="what transparent pictures are laid on; keep drops their transparency, as the original does (default: white)",
    )


def look(args):
    """The arguments of ``open_image`` that the flags of :func:`add_picture_flags` stand for."""
    return dict(exif_orientation=not args.keep_orientation, background=None if args.background == "keep" else args.background)


def sources(paths, flag, interactive, clips=False):
    """What a user named by ``flag``: addresses and standard input as bytes, files as they are.

    Raises:
        PromptError: standard input is to be read while questions come from it.
        ImageError: an address cannot be read.
    """
    if "-" in paths and interactive:
        raise PromptError(f"{flag} - reads standard input, where questions are read: save it first, and give the file")
    from paddlemix.processors.media import named_sources

    return named_sources(paths, clips)


def load_session(args):
    """The model that ``args`` name, and a session with it."""
    from paddlemix.models.internvl2 import ChatSession, InternVLChatModel, load_tokenizer

    directory = prepare(args)
    weights = weight_options(args)
    model = InternVLChatModel.from_pretrained(
        directory, dtype=args.dtype, engine=args.engine, tensor_parallel=args.tensor_parallel, **weights
    )
    model.end_program_with_ranks()
    return ChatSession(model, load_tokenizer(directory), system_message=args.system_message, thinking=args.thinking)


def prepare(args):
    """Select the device, and return the directory of the model that ``args`` name."""
    from paddlemix import device
    from paddlemix.checkpoints.hub import resolve

    device.set_device(args.device)
    return resolve(args.model_name_or_path)


def run(args, text, paths, attach, finish=None, load=load_session):
    """Load the model that ``args`` name and ask it.

    Args:
        args: parsed flags of :func:`make_parser`.
        text: the question.
        paths: pictures or videos that it is about, possibly none.
        attach: ``attach(paths, config) -> (marks, pixel_values, tiles of each picture)`` reads them as the checkpoint's
            configuration wants; ``marks`` go before the question unless it says itself where pictures go.
        finish: called with the session after the first answer.
        load: ``load(args) -> session``, for models of other families.
    """
    session = load(args)
    marks, pixels, counts = attach(paths, session.model.config) if paths else ("", None, None)
    _ask(session, args, text if "<image>" in text else marks + text, pixels, counts)
    if finish is not None:
        finish(session)
    if args.interactive:
        _converse(session, args, attach)


def _ask(session, args, question, pixels=None, counts=None):
    names = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed", "repetition_penalty")
    options = {name: getattr(args, name) for name in names} | beams(args) | {"stop_strings": tuple(args.stop)}
    if (form := form_of(args)) is not None:
        options["form"] = form
    thinks = getattr(session, "thinking", False)
    if thinks:  # flags that were left alone take the values of the model's card
        from paddlemix.models.blocks.thinking import SAMPLING

        plain = {"do_sample": False, "temperature": 1.0, "max_new_tokens": 1024}
        options |= {name: value for name, value in SAMPLING.items() if options[name] == plain[name]}
    pieces = session.stream(question, pixels, options, counts)
    if thinks:
        pieces = ["".join(pieces)]  # what was thought comes first
        print(f"<think>\n{session.reasoning}\n</think>\n")
    if not (args.stream or args.interactive):
        pieces = ["".join(pieces)]
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    for answer in session.answers[1:]:
        print(answer)


def _converse(session, args, attach):
    """Read questions until an empty line or the end of the input."""
    print("Ask on. A line `/add FILE ...` adds to your next question, an empty line ends.", file=sys.stderr)
    added = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        try:
            if line.startswith("/add "):
                added += line.split()[1:]
                continue
            marks, pixels, counts = attach(added, session.model.config) if added else ("", None, None)
            _ask(session, args, line if "<image>" in line else marks + line, pixels, counts)
        except UserError as error:  # a wrong path or too long a prompt is no reason to lose the conversation
            print(f"error: {error}", file=sys.stderr)
        added = []

"""Ask a server from the terminal: a question a line, an empty line ends.

python -m paddlemix.serving.cli --url http://127.0.0.1:23333/v1 --image_file photo.jpg
"""

import argparse
import base64
import mimetypes
import os
import sys
from pathlib import Path

from paddlemix.commands import Parser
from paddlemix.errors import PromptError, UserError, command_main


def make_parser():
    """The client's flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:23333/v1", help="of any OpenAI-compatible server (default: %(default)s)")
    add("--image_file", nargs="+", default=[], help="pictures or clips that the first question is about")
    add("--model", default=None, help="(default: the server's first)")
    add("--temperature", type=float, default=0.0, help="0 for the likeliest answer (default: 0)")
    add("--max_new_tokens", type=int, default=None, help="longest answer (default: what the context leaves)")
    return parser


def media_part(path):
    """A picture or clip as a part of a message.

    Raises:
        PromptError: the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}): check the path") from None
    kind = mimetypes.guess_type(path)[0] or "image/png"
    name = "video_url" if kind.startswith("video/") else "image_url"
    kind = kind if kind.startswith(("image/", "video/")) else "image/png"
    return {"type": name, name: {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


@command_main
def main(argv=None):
    """Parse the command line and converse."""
    args = make_parser().parse_args(argv)
    import openai

    url = args.url.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    key = os.environ.get("PADDLEMIX_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
    parts, messages = [media_part(path) for path in args.image_file], []
    try:
        model = args.model or client.models.list().data[0].id
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                return
            content = [*parts, {"type": "text", "text": line}] if parts else line
            messages.append({"role": "user", "content": content})
            parts, answer = [], ""
            more = {"max_tokens": args.max_new_tokens} if args.max_new_tokens else {}
            for chunk in client.chat.completions.create(
                model=model, messages=messages, temperature=args.temperature, stream=True, **more
            ):
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece:
                    answer += piece
                    print(piece, end="", flush=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise UserError(f"the server refused: {body.get('message') or f'status {error.status_code}'}") from None
    except (openai.APIConnectionError, openai.APIError) as error:
        text = getattr(error, "message", None) or "connection failed"
        raise UserError(f"{url} gives no answer ({text.rstrip('.')}): check that a server runs there") from None


if __name__ == "__main__":
    main()

"""A web page that asks an OpenAI-compatible server, in English and Chinese.

python -m paddlemix.serving.web --url http://127.0.0.1:23333/v1
    serves the page at http://127.0.0.1:7860/
"""

import argparse
import os
import secrets
import socket
import sys
import tempfile
import urllib.parse

from paddlemix.commands import Parser
from paddlemix.errors import UserError, command_main


def make_parser():
    """The page's flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:23333/v1", help="of any OpenAI-compatible server (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=7860, help="0 picks a free one (default: 7860)")
    add("--max_body_mb", type=float, default=64, help="largest file that can be uploaded (default: 64)")
    return parser


def _policy(nonce):
    """Content-Security-Policy: only what this server sends, and no script but the page's own."""
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' 'nonce-{nonce}'",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "media-src 'self' data: blob:",
            "font-src 'self' data:",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
        )
    )


class OnlyOurs:
    """ASGI middleware: the browser loads nothing from elsewhere, and runs no script that a text brought along."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        nonce, start, page = secrets.token_urlsafe(16), None, bytearray()

        async def sending(message):
            nonlocal start
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _policy(nonce).encode())]
                headers += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": headers}
                if dict(headers).get(b"content-type", b"").startswith(b"text/html"):
                    start = message  # its scripts are given the nonce first
                    return
            elif start is not None and message["type"] == "http.response.body":
                page.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                body = bytes(page).replace(b"<script", f'<script nonce="{nonce}"'.encode())
                headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
                await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self.app(scope, receive, sending)


def make_app(url, max_file_mb=64):
    """The page as an ASGI application."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is told to anybody
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gradio
    from fastapi import FastAPI

    from .conversation import Server
    from .page import CSS, THEME, make_page

    key = os.environ.pop("PADDLEMIX_API_KEY", None) or os.environ.get("OPENAI_API_KEY")
    inner = FastAPI(openapi_url=None)
    app = gradio.mount_gradio_app(
        inner, make_page(Server(url, key)), "/", theme=THEME, css=CSS, footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, show_error=False, max_file_size=int(max_file_mb * 2**20),
    )  # fmt: skip
    return OnlyOurs(app)


@command_main
def main(argv=None):
    """Parse the command line and serve the page."""
    args = make_parser().parse_args(argv)
    parts = urllib.parse.urlsplit(args.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url {args.url} is no address: use one such as http://127.0.0.1:23333/v1")
    url = args.url.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {args.host}:{args.port} ({reason}): use another --port or --host") from None
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"warning: anybody who reaches {args.host} can use this page, and through it the server", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="paddlemix-web-") as folder:  # uploads are gone afterwards
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = make_app(url, args.max_body_mb)
        import uvicorn

        class Told(uvicorn.Server):
            async def startup(self, sockets=None):
                await super().startup(sockets)
                host, port = listener.getsockname()[:2]
                print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)

        config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1, server_header=False)
        Told(config).run(sockets=[listener])


if __name__ == "__main__":
    main()

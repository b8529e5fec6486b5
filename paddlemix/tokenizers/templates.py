"""Chat templates of a checkpoint's folder: Jinja text from somebody else, rendered where it can do no harm."""

import json
import os
import subprocess
import sys

from paddlemix.errors import PromptError, TokenizerError

SECONDS, MEMORY, OUTPUT = 2, 256 << 20, 1 << 20
# A machine under load may take long to start a process; its processor time is what is limited to SECONDS.
_PATIENCE = 20
_START = "import os, runpy, sys; sys.path[:] = sys.argv[1].split(os.pathsep); runpy.run_path(sys.argv[2], run_name='__main__')"
_CHILD = os.path.join(os.path.dirname(__file__), "jinja_child.py")


def chat_template(files, parse):
    """The Jinja text of a folder: ``chat_template.jinja``, else what tokenizer_config.json or chat_template.json name.

    Args:
        files: bytes of the folder's files by name.
        parse: reads one of them as a JSON object.

    Raises:
        TokenizerError: there is none, or it is no text.
    """
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError:
            raise TokenizerError("chat_template.jinja is not UTF-8 text: copy it again") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = parse(name).get("chat_template") if name in files else None
        if isinstance(found, list):  # several by name
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if named else None
        if isinstance(found, str):
            return found
    raise TokenizerError("the folder has no chat template: convert it with --layout hf, or write prompts by model.chat")


def render(text, messages, add_generation_prompt, tokens, variables):
    """A template's text for ``messages``.

    Args:
        text: Jinja.
        messages: list of dictionaries with ``role`` and ``content``.
        add_generation_prompt: whether it ends where the assistant speaks.
        tokens: special tokens by name.
        variables: what else the template may ask for.

    Raises:
        TokenizerError: the template fails, asks for what it must not have, or exceeds time, memory or size.
        PromptError: messages are not JSON values.
    """
    values = {**tokens, **variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
    request = {"text": text, "values": values, "seconds": SECONDS, "memory": MEMORY, "output": OUTPUT}
    try:
        request = json.dumps(request).encode()
    except (TypeError, ValueError):
        raise PromptError(
            "messages must be lists, dictionaries, texts and numbers, with a 'role' and a 'content' each"
        ) from None
    try:
        # Isolated: no user site, no PYTHON* variables, nothing of the caller's environment.
        path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-s", "-E", "-B", "-c", _START, path, _CHILD]
        done = subprocess.run(command, input=request, capture_output=True, env={}, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise TokenizerError(f"the chat template takes more than {SECONDS} seconds: it may loop for ever") from None
    if done.returncode:
        if b"No module named" in done.stderr:
            raise TokenizerError("chat templates need jinja2, which is not installed: pip install jinja2")
        raise TokenizerError(
            f"the chat template was stopped: it takes more than {SECONDS} seconds, or more than {MEMORY >> 20} MB of memory"
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise TokenizerError(f"the chat template cannot be rendered: {answer['error']}")
    return answer["text"]

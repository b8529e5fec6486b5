"""Renders a Jinja template in a process of its own: the program that :mod:`~.templates` starts, which imports nothing of ours.

A sandbox keeps a template from reaching objects, but not from counting for ever or writing for ever: the limits of this
process do. Reads a JSON object from its input (``text``, ``values``, ``seconds``, ``memory``, ``output`` in bytes) and writes
one: ``{"text": ...}`` or ``{"error": ...}``.
"""

import json
import sys


def main():
    request = json.loads(sys.stdin.buffer.read())
    try:
        import resource

        for kind, limit in (("RLIMIT_CPU", request["seconds"]), ("RLIMIT_AS", request["memory"]), ("RLIMIT_FSIZE", 0)):
            resource.setrlimit(getattr(resource, kind), (limit, limit))
    except ImportError:
        pass  # Windows: the parent's clock remains
    try:
        answer = {"text": render(request["text"], request["values"], request["output"])}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply"}
    except Exception as error:  # whatever a template does
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    sys.stdout.buffer.write(json.dumps(answer).encode())


def render(text, values, limit):
    """The text of a template, as transformers renders chat templates; ``limit`` bytes at most."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"attribute '{attribute}' is not for templates")

    def raise_exception(message):
        raise TemplateError(str(message))

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    pieces, size = [], 0
    for piece in environment.from_string(text).generate(**values):
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > limit:
            raise ValueError(f"it writes more than {limit} bytes")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    main()

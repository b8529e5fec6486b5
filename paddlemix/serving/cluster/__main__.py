"""Serve an InternVL model from several replicas: the server's HTTP interface, with Ray Serve behind it.

python -m paddlemix.serving.cluster --replicas 4 --model_name_or_path OpenGVLab/InternVL2-8B
    one replica an accelerator of this machine; on CPU they share the cores
python -m paddlemix.serving.cluster --replicas 16 --address auto
    on the machines of a Ray cluster that runs already (paddlemix must be installed on each)
"""

import asyncio
import os
import sys

from paddlemix.commands import positive
from paddlemix.errors import ConfigError, command_main
from paddlemix.serving.__main__ import _listen, _serve, make_parser, settle, start_log


def make_cluster_parser():
    """The server's flags, and those of the cluster."""
    parser = make_parser()
    parser.description = __doc__
    add = parser.add_argument
    add("--replicas", type=positive, default=1, help="processes with a model each; with --max_replicas the least (default: 1)")
    add("--max_replicas", type=positive, default=None, help="let Ray Serve start up to so many by the load (default: no)")
    add("--target_ongoing_requests", type=float, default=8, help="of each replica, that scaling aims at (default: 8)")
    add("--address", default=None, help="of a running Ray cluster, or auto (default: a Ray of its own, here)")
    return parser


@command_main
def main(argv=None):
    """Parse the command line and serve."""
    args = make_cluster_parser().parse_args(argv)
    if args.max_replicas and args.max_replicas < args.replicas:
        raise ConfigError("--max_replicas must not be below --replicas")
    finish_log = start_log()
    key = settle(args)
    listener = _listen(args.host, args.port)
    from paddlemix.checkpoints.hub import resolve

    args.model_name_or_path = str(resolve(args.model_name_or_path))
    from .front import Front

    code = asyncio.run(_serve(args, Front(args, key), listener))
    sys.stdout.flush()
    finish_log()
    os._exit(code)


if __name__ == "__main__":
    main()

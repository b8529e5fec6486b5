"""PaddleMIX InternVL2: run and fine-tune the InternVL family in PaddlePaddle.

Importing this package loads no model and no framework; import what you need from its rooms, for example
``from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer``. The environment variable ``PADDLEMIX_LOG``,
such as ``debug``, sets what it tells about its choices on stderr.
"""

import logging
import os

from paddlemix.moved import install as install_moved

__version__ = "0.1.0"

install_moved()

if os.environ.get("PADDLEMIX_LOG", "").upper() in ("DEBUG", "INFO", "WARNING", "ERROR"):
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger(__name__).addHandler(_handler)
    logging.getLogger(__name__).setLevel(os.environ["PADDLEMIX_LOG"].upper())

"""PaddleMIX InternVL2: run and fine-tune the InternVL family in PaddlePaddle.

Importing this package loads no model and no framework; import what you need from its rooms, for example
``from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer``.
"""

__version__ = "0.1.0"

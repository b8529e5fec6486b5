"""Families of checkpoints that answer: how each is loaded, reads pictures, and makes prompts of them."""

import functools
from pathlib import Path

from paddlemix.commands import weight_options
from paddlemix.errors import ConfigError
from paddlemix.files import read_json

from .embeddings import Embeddings, makes_embeddings
from .protocol import RequestError

__all__ = ["InternVL2", "Llava", "MiniMonkey", "family_of"]


class InternVL2:
    """InternVL 1.1 to 3.5, the Flash models among them.

    Args:
        directory: of the checkpoint.
        args: the server's flags.

    Attributes:
        model, tokenizer: after :meth:`load`.
    """

    def __init__(self, directory, args):
        self.directory, self.args = directory, args
        self.model = self.tokenizer = None

    def load(self, engine):
        """Load the model and its tokenizer.

        Raises:
            UserError: they cannot be loaded so.
        """
        model, load_tokenizer = self._parts()
        args, more = self.args, weight_options(self.args)
        if args.tensor_parallel != 1:
            if type(self) is not InternVL2:
                raise ConfigError("--tensor_parallel is for InternVL 1.1 to 3.5: leave it out for this model")
            more["tensor_parallel"] = args.tensor_parallel
        self.model = model.from_pretrained(self.directory, dtype=args.dtype, engine=engine, **more)
        if args.tensor_parallel != 1:
            self.model.end_program_with_ranks()
        self.tokenizer = load_tokenizer(self.directory)
        self.model.set_tokenizer(self.tokenizer)
        self.model.eval()

    def _parts(self):
        from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

        return InternVLChatModel, load_tokenizer

    @property
    def most_tiles(self):
        """Tiles that a picture has at most, where nobody says."""
        return self.model.config.max_dynamic_patch

    def read(self, data, most, low):
        """Tiles ``[T, 3, height, width]`` of a picture, and what else :meth:`compress` needs of it.

        Args:
            data: bytes, or a decoded picture.
            most: tiles that it may have.
            low: whether it is to have one tile.
        """
        from paddlemix.processors.internvl2.image import load_image

        tiling = self.model.config.tiling(1 if low else most)
        tiling["min_num"] = min(tiling["min_num"], tiling["max_num"])
        return load_image(data, **tiling), None

    def read_clip(self, path):
        """(tiles of all frames of a clip, how many each has)."""
        from paddlemix.processors.internvl2.video import load_video

        return load_video(path, input_size=self.model.config.image_size, num_segments=self.args.num_segments)

    def compress(self, extras):
        """A job's ``compress``, by what :meth:`read` told of its pictures beside their tiles; None: as the model does."""
        return None


class MiniMonkey(InternVL2):
    """One picture in a conversation, at two scales, and prompts of which the finer scale's half is dropped."""

    most_tiles = 12  # of the finer scale

    def _parts(self):
        from paddlemix.models.minimonkey import MiniMonkeyChatModel

        return MiniMonkeyChatModel, super()._parts()[1]

    def read(self, data, most, low):
        from paddlemix.processors.minimonkey import multi_scale_tiles

        tiles, grid, _ = multi_scale_tiles(data, self.model.config.image_size, self.args.tiling, 1 if low else most)
        return tiles, grid

    def read_clip(self, path):
        raise RequestError("Mini-Monkey takes no clips: send a picture", param="messages")

    def compress(self, extras):
        if len(extras) > 1:
            raise RequestError(
                f"the conversation has {len(extras)} pictures, but Mini-Monkey looks at one: start another for the next",
                param="messages",
            )
        return functools.partial(self.model.dropped_of, grid=extras[0]) if extras and not self.args.no_scm else None


class Llava(InternVL2):
    """InternVL-Chat-LLaVA: a picture is one tile."""

    most_tiles = 1

    def _parts(self):
        from paddlemix.models.internvl_llava import LlavaForCausalLM, load_tokenizer

        return LlavaForCausalLM, load_tokenizer

    def read(self, data, most, low):
        from paddlemix.processors.clip import process_images

        return process_images([data], self.model.image_size, self.model.config.image_aspect_ratio or "square"), None

    def read_clip(self, path):
        raise RequestError("this model takes no clips: send pictures", param="messages")


def family_of(directory, args):
    """The family of a checkpoint, by its ``config.json`` and the flags; :class:`~.embeddings.Embeddings` for no chat model.

    Raises:
        ConfigError: it cannot be read, or the flags are of another family.
    """
    values = read_json(Path(directory) / "config.json", absent="a checkpoint directory needs its config.json")
    values = values if isinstance(values, dict) else {}
    if makes_embeddings(values):
        return Embeddings(directory, args)
    from paddlemix.models.blocks.configuration import class_names
    from paddlemix.models.internvl_llava.configuration import is_llava

    if is_llava(values):
        if args.minimonkey:
            raise ConfigError(f"{directory} is an InternVL-Chat-LLaVA checkpoint: leave --minimonkey out")
        return Llava(directory, args)
    monkey = args.minimonkey or any("monkey" in name.lower() for name in class_names(values))
    return (MiniMonkey if monkey else InternVL2)(directory, args)

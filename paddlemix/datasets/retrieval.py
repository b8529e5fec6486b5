"""Pictures and captions for fine-tuning retrieval: each with a caption of another picture (arXiv 2312.14238, appendix)."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from paddlemix.errors import DataError
from paddlemix.processors.transforms import augmented

_DROPPED = re.compile(r"[.!\"()*#:;~]")


def clean_caption(text, words=50):
    """A caption in lower case, without ``.!"()*#:;~`` and double blanks, cut to ``words`` words."""
    return " ".join(_DROPPED.sub(" ", text.lower()).split()[:words])


def image_number(name):
    """The number in a picture's name, as Flickr30K has it; None where there is none."""
    digits = re.search(r"\d+", os.path.basename(name))
    return int(digits[0]) if digits else None


class RetrievalPairs:
    """Captions and their pictures, in an order that step, epoch and seed decide.

    Args:
        paths: pictures.
        captions: texts.
        owner: for each text the number of its picture.
        tokenizer: :class:`~paddlemix.models.internvl.tokenization.TextEncoder`.
        image_size: side of a picture in pixels.
        seed: of the order, the parts of pictures and the negatives.
        scale: least and largest share of a picture that is seen.
        flip: share of pictures whose left and right are changed.
        workers: threads that read pictures.

    Raises:
        DataError: there are not two pictures, so no caption is another's.
    """

    def __init__(self, paths, captions, owner, tokenizer, image_size, seed=0, scale=(0.5, 1.0), flip=0.5, workers=2):
        if len(set(owner)) < 2:
            raise DataError("fine-tuning retrieval needs captions of two pictures at least, to tell one from another")
        self.paths, self.captions, self.owner = paths, [clean_caption(text) for text in captions], np.asarray(owner)
        self.tokenizer, self.image_size, self.seed, self.scale, self.flip = tokenizer, image_size, seed, scale, flip
        self._pool = ThreadPoolExecutor(max(1, workers))

    def __len__(self):
        return len(self.captions)

    def batch(self, step, micro_batches, size, rank=0, world=1):
        """This process's batches of a step: a list of arguments of ``retrieval_loss``, with ``names``.

        The captions of a step do not depend on how many processes there are.
        """
        at_once = micro_batches * size * world
        epoch, place = divmod(step, len(self) // at_once)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self))[place * at_once : (place + 1) * at_once]
        batches = order.reshape([micro_batches, world, size])[:, rank]
        return [self._batch(numbers, epoch) for numbers in batches]

    def _batch(self, numbers, epoch):
        samples = list(self._pool.map(lambda number: self._sample(int(number), epoch), numbers))
        positive = [self.captions[number] for number in numbers]
        negative = [text for _, text in samples]
        batch = {"pixel_values": np.stack([pixels for pixels, _ in samples]), "image_ids": self.owner[numbers]}
        for name, ids in (
            ("positive", self.tokenizer(positive, prefix="")),
            ("negative", self.tokenizer(negative, prefix="")),
            ("summarize", self.tokenizer(positive)),
        ):
            used = int((ids > 0).any(0).sum())  # what is behind the longest is the same for all
            batch |= {f"{name}_input_ids": ids[:, :used], f"{name}_attention_mask": (ids[:, :used] > 0).astype("int64")}
        batch["names"] = [self.paths[self.owner[number]] for number in numbers]
        return batch

    def _sample(self, number, epoch):
        rng = np.random.default_rng([self.seed, epoch, number])
        mine = self.owner[number]
        pixels = augmented(self.paths[mine], self.image_size, rng, self.scale, flip=self.flip)
        while True:
            other = int(rng.integers(len(self)))
            if self.owner[other] != mine:
                return pixels, self.captions[other]

"""Retrieval both ways: pictures by text and texts by picture (CLIP benchmark's ``recall@k``)."""

import numpy as np

from paddlemix.arrays import host_array
from paddlemix.errors import DataError

KS = (1, 5, 10)
# Scores that are in memory at once: 64 MB.
_BLOCK = 1 << 24


def retrieval_recalls(similarity, picture_of_text, ks=KS):
    """Shares of texts that find their picture, and of pictures that find one of their texts, among the best ``k``.

    Args:
        similarity: ``[pictures, texts]``, larger is closer.
        picture_of_text: for each text the number of its picture.
        ks: how many of the best count.

    Returns:
        ``{"image_retrieval_recall@k": share of texts, "text_retrieval_recall@k": share of pictures, ...}``. Of equal scores
        the earlier ranks first.

    Raises:
        DataError: the sizes do not fit, or a score is not a number.
    """
    similarity = host_array(similarity, "similarity")
    if similarity.ndim != 2:
        raise DataError(f"similarity must be [pictures, texts], not of shape {list(similarity.shape)}")
    owner = _owners(picture_of_text, *similarity.shape)
    return _recalls(lambda start, stop: similarity[start:stop], *similarity.shape, owner, ks)


def feature_recalls(images, texts, picture_of_text, ks=KS):
    """As :func:`retrieval_recalls`, from normalised features; scores are computed in blocks and never all in memory.

    Args:
        images: ``[pictures, E]``; may be mapped from disk.
        texts: ``[texts, E]``.
    """
    owner = _owners(picture_of_text, len(images), len(texts))
    texts = host_array(texts, "texts").astype("float32")

    def block(start, stop):
        return host_array(images[start:stop], "images").astype("float32") @ texts.T

    return _recalls(block, len(images), len(texts), owner, ks)


def _owners(picture_of_text, pictures, texts):
    owner = host_array(picture_of_text, "picture_of_text")
    if owner.shape != (texts,) or owner.dtype.kind not in "iu":
        raise DataError(f"picture_of_text must be a whole number for each of the {texts} texts")
    if texts == 0 or pictures == 0 or owner.min() < 0 or owner.max() >= pictures:
        raise DataError(
            f"picture_of_text must name pictures from 0 to {pictures - 1}, of which there must be some, as of texts"
        )
    return owner


def _recalls(block, pictures, texts, owner, ks):
    """Ranks from two passes over blocks ``block(start, stop) -> [stop - start, texts]`` of the scores."""
    step = max(1, _BLOCK // texts)
    spans = [(start, min(start + step, pictures)) for start in range(0, pictures, step)]
    number = np.arange(texts)
    texts_of = np.argsort(owner, kind="stable")  # those of picture i are from first[i] to first[i + 1]
    first = np.searchsorted(owner[texts_of], np.arange(pictures + 1))
    own = np.full(texts, np.nan)  # each text's score with its picture
    for start, stop in spans:
        mine = (owner >= start) & (owner < stop)
        if mine.any():
            own[mine] = block(start, stop)[owner[mine] - start, number[mine]]
    rank_of_picture = np.zeros(texts, np.int64)  # of each text
    rank_of_text = np.full(pictures, texts, np.int64)  # the best of each picture's texts; without any, behind all
    for start, stop in spans:
        scores = block(start, stop)
        if not np.isfinite(scores).all():
            raise DataError(f"scores of pictures {start} to {stop - 1} are not all numbers: look at the features")
        before = np.arange(start, stop)[:, None] < owner
        rank_of_picture += ((scores > own) | ((scores == own) & before)).sum(0)
        for row in range(start, stop):
            mine = texts_of[first[row] : first[row + 1]]
            if not len(mine):
                continue
            best = mine[np.argmax(scores[row - start, mine])]
            line = scores[row - start]
            rank_of_text[row] = (line > line[best]).sum() + (line[:best] == line[best]).sum()
    found = {f"image_retrieval_recall@{k}": float((rank_of_picture < k).mean()) for k in ks}
    return {**found, **{f"text_retrieval_recall@{k}": float((rank_of_text < k).mean()) for k in ks}}


def dual_softmax(scores):
    """Scores ``[texts, clips]`` that also ask how well others fit (arXiv 2109.04290).

    Returns:
        (text to clip ``[texts, clips]``: scores times their softmax over texts; clip to text ``[clips, texts]``: the
        transposed scores times their softmax over clips).
    """
    scores = host_array(scores, "scores").astype("float64")
    return scores * _softmax(scores), scores.T * _softmax(scores.T)


def _softmax(scores):
    """Softmax over the first axis."""
    weights = np.exp(scores - scores.max(0, keepdims=True))
    return weights / weights.sum(0, keepdims=True)

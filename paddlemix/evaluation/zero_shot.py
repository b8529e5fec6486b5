"""Classification by texts: class names in templates become the weights of a linear classifier (arXiv 2103.00020)."""

import json

import numpy as np

from paddlemix.arrays import host_array
from paddlemix.errors import DataError
from paddlemix.files import read_regular

# A short set of our own; the public lists are named in docs/internvl.md.
TEMPLATES = ("{c}", "a photo of a {c}.", "a picture of the {c}.", "a drawing of a {c}.")


def filled(template, name):
    """``template`` with the class's name at ``{c}``.

    Raises:
        DataError: the template has no such mark.
    """
    if "{c}" not in template:
        raise DataError(f"the template '{template}' has no {{c}} where the class's name goes")
    return template.replace("{c}", name)


def zero_shot_weights(model, tokenizer, classes, templates=TEMPLATES, batch_size=64):
    """A classifier made of texts.

    Args:
        model: has ``encode_text``.
        tokenizer: turns a list of texts into ids.
        classes: names of the classes.
        templates: texts with ``{c}`` where the name goes; each class's features are averaged over them.

    Returns:
        float32 array ``[E, classes]``, columns of length 1: normalised features of a picture times these are its scores.

    Raises:
        DataError: there are no classes or templates, or a template has no ``{c}``.
    """
    if not len(classes) or not len(templates):
        raise DataError("zero-shot classification needs at least one class and one template")
    from paddlemix.models.internvl.embedder import encode_texts, unit  # here, as scores alone need no model

    texts = [filled(template, name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, texts, batch_size)
    return np.ascontiguousarray(unit(features.reshape([len(classes), len(templates), -1]).mean(1)).T)


def accuracy(scores, labels):
    """``{"acc1", "acc5", "mean_per_class_recall"}`` of ``scores [pictures, classes]`` against ``labels [pictures]``.

    Of equal scores the earlier class ranks first. Classes without pictures do not count in the mean.

    Raises:
        DataError: sizes do not fit, or a score is not a number.
    """
    scores, labels = host_array(scores, "scores"), host_array(labels, "labels")
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise DataError(f"scores {list(scores.shape)} and labels {list(labels.shape)} do not fit each other")
    if not np.isfinite(scores).all():
        raise DataError("scores are not all numbers: look at the features")
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    recalls = [(rank[labels == label] == 0).mean() for label in np.unique(labels)]
    return {
        "acc1": float((rank == 0).mean()),
        "acc5": float((rank < 5).mean()),
        "mean_per_class_recall": float(np.mean(recalls)),
    }


def read_names(path, what):
    """A list of texts from a JSON file: class names, or templates.

    A file may also hold ``{name of a language or data set: list}``; then ``path#name`` chooses.

    Raises:
        DataError: the file cannot be read or holds no list of texts.
    """
    file, _, key = path.partition("#")
    try:
        values = json.loads(read_regular(file, 64 << 20).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({str(error)[:100]})") from None
    if isinstance(values, dict):
        if key not in values:
            raise DataError(f"{file} holds several lists of {what}: choose one as {file}#NAME ({', '.join(list(values)[:8])})")
        values = values[key]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
        raise DataError(f"{path} holds no list of {what}: it must be a JSON list of texts")
    return values

"""Data sets to questions: one function for each layout, ``(task, data_root) -> [Question]``."""

import importlib

# Where each loader is.
_HOME = {
    "vqa": "questions",
    "mpdocvqa": "questions",
    "captions": "questions",
    "refcoco": "questions",
    "mme": "questions",
    "pope": "questions",
    "tiny_lvlm": "questions",
    "mmbench": "choices",
    "numbered_choices": "choices",
    "mmvp": "choices",
    "seed": "choices",
    "mmmu": "choices",
    "mmmu_pro": "choices",
    "mathvista": "choices",
    "mvbench": "several",
    "mmiu": "several",
    "mirb": "several",
    "mantis": "several",
    "mmvet": "judged",
    "mmvet_v2": "judged",
    "llava_bench": "judged",
    "mmhal": "judged",
    "rsvqa": "domains",
    "dior": "domains",
    "mme_realworld": "domains",
    "drivelm": "domains",
}


def load(task, data_root):
    """The questions of a task.

    Raises:
        DataError: a file is missing or cannot be read at all.
    """
    loader = task.loader
    if not callable(loader):
        loader = getattr(importlib.import_module(f"{__name__}.{_HOME[loader]}"), loader)
    return loader(task, data_root)

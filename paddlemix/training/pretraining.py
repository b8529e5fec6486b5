"""Pretraining: the one trainer over a stream that is too long to be in memory, or to be measured before.

What differs from fine-tuning is the reading. Annotation files are read through an index that is mapped into memory, tar shards
take the place of single pictures, the order of a pass is computed place by place, a share of a data set (``repeat_time`` below
1) is drawn at random, and a record that cannot be used is skipped: no other is read twice for it.
"""

from .recipe import ChatRecipe


class PretrainRecipe(ChatRecipe):
    """What differs from fine-tuning, see above."""

    skip, drawn, sized = True, True, False

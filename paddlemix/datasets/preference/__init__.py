"""Pairs of answers to one question, of which one is preferred: records, samples, batches, and how pairs are made."""

from .batches import PairCollator, PreferenceEncoder
from .records import PreferenceRecord, answered, encode_preference, parse_preference, read_preference

__all__ = [
    "PairCollator",
    "PreferenceEncoder",
    "PreferenceRecord",
    "answered",
    "encode_preference",
    "parse_preference",
    "read_preference",
]

"""What values from files and flags may be: a rule says type and range in words, and :func:`check` holds values against it.

Configurations, generation settings, pictures and commands all take their bounds from here, so that a number that a user or
a downloaded file got wrong ends in one sentence before anything is built or allocated for it.
"""

import math
import numbers
from dataclasses import dataclass

from paddlemix.errors import ConfigError


@dataclass(frozen=True)
class Integer:
    """A whole number; neither a bool nor a float counts as one."""

    low: int
    high: int

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self):
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number:
    """A finite number; ``above`` leaves out ``low`` itself, ``below`` leaves out ``high``."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        # NaN compares false with everything; whole numbers may be beyond what a float can hold.
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self):
        low = f"above {self.low:g}" if self.above else f"from {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"{'at most' if self.above else 'to'} {self.high:g}"
        return f"a number {low}{' and ' if self.above or self.below else ' '}{high}"


@dataclass(frozen=True)
class Flag:
    """True or false, and no number in their place."""

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return isinstance(value, bool)

    def __str__(self):
        return "true or false"


@dataclass(frozen=True)
class Text:
    """A text, at most ``most`` characters long."""

    most: int = 100_000

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return isinstance(value, str) and len(value) <= self.most

    def __str__(self):
        return f"a text of at most {self.most} characters"


@dataclass(frozen=True)
class OneOf:
    """One of some texts or numbers."""

    choices: tuple

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return any(type(value) is type(choice) and value == choice for choice in self.choices)

    def __str__(self):
        return f"one of {', '.join(map(str, self.choices))}" if len(self.choices) > 1 else str(self.choices[0])


@dataclass(frozen=True)
class Items:
    """A list of ``least`` to ``most`` values that keep a rule."""

    rule: object
    least: int = 0
    most: int = 4096

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return isinstance(value, (list, tuple)) and self.least <= len(value) <= self.most and all(map(self.rule.accepts, value))

    def __str__(self):
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"a list of {count} values, each {self.rule}"


@dataclass(frozen=True)
class Dictionary:
    """An object of JSON; what it holds is for others to check."""

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return isinstance(value, dict)

    def __str__(self):
        return "an object with keys"


class Either:
    """Any of several rules."""

    def __init__(self, *rules):
        self.rules = rules

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return any(rule.accepts(value) for rule in self.rules)

    def __str__(self):
        return ", or ".join(map(str, self.rules))


@dataclass(frozen=True)
class Null:
    """JSON's null, Python's None."""

    def accepts(self, value):
        """Whether ``value`` keeps the rule."""
        return value is None

    def __str__(self):
        return "null"


def optional(rule):
    """``rule``, or null."""
    return Either(rule, Null())


# Bounds that every model, command and data set shares. They are far above all that is published, and far below what
# makes a machine stop.
LAYERS = Integer(1, 1024)
WIDTH = Integer(1, 1 << 17)
HEADS = Integer(1, 4096)
VOCABULARY = Integer(1, 1 << 21)
POSITIONS = Integer(1, 1 << 27)
TOKEN_ID = Integer(-1, (1 << 21) - 1)  # old configurations have -1 for none
SIDE = Integer(1, 8192)  # of a tile, in pixels
PATCH = Integer(1, 512)
RANK = Integer(0, 1 << 13)  # of LoRA adapters
TILES = Integer(1, 128)  # of a picture
SEGMENTS = Integer(1, 4096)  # frames of a video
SEED = Integer(0, 2**63 - 1)
EPSILON = Number(0, 1, above=True)
DEVIATION = Number(0, 1e4)  # of new weights
SHARE = Number(0, 1)


def shown(value):
    """``value`` for a message: as JSON has it, and cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 10**20:
        return f"a number of {int(math.log10(abs(int(value)))) + 1} digits"
    if isinstance(value, (dict, list, tuple)) and len(value) > 20:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} values"
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:60] + "..."


def check(values, rules, where="", error=ConfigError):
    """Hold values against rules.

    Args:
        values: mapping; names without a rule are not looked at, and rules whose name is missing are kept.
        rules: name to rule.
        where: what stands before a name in the message, such as ``vision_config.``.
        error: the class to raise.

    Raises:
        ConfigError or ``error``: a value breaks its rule; the first one is named.
    """
    for name, rule in rules.items():
        if name in values and not rule.accepts(values[name]):
            raise error(f"{where}{name} is {shown(values[name])}: it must be {rule}")

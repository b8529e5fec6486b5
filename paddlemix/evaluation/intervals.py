"""How sure a score is: bootstrap intervals, alone and of the difference of two runs."""

import numpy as np


def interval(each, draws=2000, seed=0, level=0.95):
    """Percentile interval of the mean of ``each`` under resampling of questions: (low, high)."""
    values = np.asarray(each, "float64")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return tuple(float(x) for x in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def compare(first, second):
    """Two runs of a task, question by question.

    Args:
        first, second: ``{id: (answer, number)}``.

    Returns:
        ``questions`` that both have, the means, the ``difference`` second - first with its paired ``interval``, and the ids of
        questions that ``gained`` or ``lost``, and whose answers ``differ``.
    """
    both = [identity for identity in first if identity in second]
    numbers = np.array([[first[i][1], second[i][1]] for i in both]).reshape(-1, 2)
    differences = numbers[:, 1] - numbers[:, 0]
    return {
        "questions": len(both),
        "means": [float(x) for x in numbers.mean(0)] if both else [0.0, 0.0],
        "difference": float(differences.mean()) if both else 0.0,
        "interval": interval(differences) if both else (0.0, 0.0),
        "gained": [i for i, d in zip(both, differences) if d > 0],
        "lost": [i for i, d in zip(both, differences) if d < 0],
        "differ": [i for i in both if first[i][0] != second[i][0]],
    }

"""How sure a score is: bootstrap intervals, alone and of the difference of two runs."""

import numpy as np

from .scorers import scorer

# How many resamplings: as many as score so many answers, within bounds.
_WORK, _FEWEST, _MOST = 300_000, 100, 1000
_COUNTS = ("unreadable", "not_scored")
# Questions that are scored together are drawn together: fields of the reference that name the unit, the last made new for
# each copy.
_UNITS = {"mmvp": ("pair",), "mme": ("category", "image")}


def interval(each, draws=2000, seed=0, level=0.95):
    """Percentile interval of the mean of ``each`` under resampling of questions: (low, high)."""
    values = np.asarray(each, "float64")
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return tuple(float(x) for x in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))


def intervals(name, references, answers, seed=0, level=0.95):
    """Percentile intervals of all scores under resampling of questions, each time scored anew.

    Args:
        name: of a scorer, or a function like one.
        references, answers: as scorers take them.

    Returns:
        ``{score: (low, high)}``; of captions, whose scorer takes seconds, CIDEr alone, as a mean over captions.
    """
    run = name if callable(name) else scorer(name)
    if name == "captions":
        return {"CIDEr": interval(run(references, answers)[1], seed=seed, level=level)}
    fields = _UNITS.get(name, ())
    fields = fields if all(field in reference for reference in references for field in fields) else ()
    units = {}
    for i, reference in enumerate(references):
        units.setdefault(tuple(str(reference[field]) for field in fields) or i, []).append(i)
    units, found = list(units.values()), {}
    generator = np.random.default_rng(seed)
    for _ in range(max(_FEWEST, min(_MOST, _WORK // len(references)))):
        drawn, texts = [], []
        for copy, unit in enumerate(generator.integers(0, len(units), len(units))):
            for i in units[unit]:
                drawn.append({**references[i], fields[-1]: copy} if fields else references[i])
                texts.append(answers[i])
        for key, value in run(drawn, texts)[0].items():
            found.setdefault(key, []).append(value)
    ends = (1 - level) / 2, (1 + level) / 2
    return {key: tuple(float(x) for x in np.quantile(values, ends)) for key, values in found.items() if key not in _COUNTS}


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

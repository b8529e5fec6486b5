"""Beam search: the likeliest whole answers instead of the likeliest next token (arXiv 1609.08144, section 7, for the penalty).

Which continuations live, when an answer counts as whole and when a search ends follow ``BeamSearchScorer`` of transformers,
so that published settings give the published answers. ``B`` rows, ``K`` beams of each, ``V`` the vocabulary below.
"""

import numpy as np
import paddle

from .layers import AttentionMask

_IMPOSSIBLE = -1e9  # of beams that are still copies of the first


class Hypotheses:
    """The best whole answers of one row, at most ``num_beams``."""

    def __init__(self, config):
        self.config, self.found = config, []  # (score, ids), best first; of equal ones the later

    def add(self, ids, log_probability, length):
        """Keep an answer of ``length`` tokens, its end included, if it is among the best."""
        score = log_probability / length**self.config.length_penalty
        if len(self.found) < self.config.num_beams or score > self.found[-1][0]:
            at = next((i for i, (other, _) in enumerate(self.found) if score >= other), len(self.found))
            self.found.insert(at, (score, ids))
            del self.found[self.config.num_beams :]

    def is_final(self, best, length):
        """Whether nothing that is still open can join: ``best`` is the highest log probability, at ``length`` tokens."""
        config = self.config
        if len(self.found) < config.num_beams:
            return False
        if config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_new_tokens  # a negative log probability weighs least on the longest answer
        return self.found[-1][0] >= best / length**config.length_penalty


def beam_search(language_model, inputs_embeds, config, starts=None, cache=None, prompt_ids=None):
    """Find the likeliest answers.

    Args:
        language_model, inputs_embeds, config, starts, cache: as for :func:`~.generation.generate_tokens`. Of a given ``cache``
            nothing but the prompt's positions is filled, so that room for ``N`` more is enough.
        prompt_ids: ``[B, N]``, ids that ``repetition_penalty`` counts as said already; None for the answer's alone.

    Returns:
        ``(ids, scores)``: int64 ``[B * num_return_sequences, M]``, best first for each row, an end token and then
        ``pad_token_id`` where an answer is over, and the log probability of each divided by its length to the power
        ``length_penalty``, float64.
    """
    batch, tokens = inputs_embeds.shape[:2]
    beams, ends = config.num_beams, config.eos_token_ids
    if cache is None:
        cache = language_model.new_cache(batch, tokens, inputs_embeds.dtype)
    shift = np.zeros([batch], "int64") if starts is None else np.asarray(starts, "int64").reshape(-1)
    held = cache.length
    mask = AttentionMask(shift + held, prefix=held) if shift.any() else AttentionMask()
    positions = np.maximum(np.arange(held, held + tokens)[None] - shift[:, None], 0)
    hidden = language_model(inputs_embeds, paddle.to_tensor(positions), mask, cache, positions=-1)
    logits = language_model.lm_head(hidden[:, -1])

    said = np.zeros([batch, 0], "int64") if prompt_ids is None else np.asarray(prompt_ids).copy()
    if said.size:  # padding is not said: the last token stands in its place
        said = np.where(np.arange(said.shape[1]) < shift[:, None], said[:, -1:], said)
    said = said.repeat(beams, 0)

    # From here on each row is K rows, which share the positions of the prompt.
    prompt = cache.length
    cache = cache.repeated(beams, prompt + config.max_new_tokens)
    shift, first = shift.repeat(beams), np.repeat(np.arange(batch), beams)
    mask = AttentionMask(shift + held, prefix=held) if shift.any() else AttentionMask()
    answers = np.zeros([batch * beams, 0], "int64")
    totals = np.where(np.arange(batch * beams) % beams, _IMPOSSIBLE, 0.0)  # log probabilities [B * K]
    whole = [Hypotheses(config) for _ in range(batch)]
    open_rows = list(range(batch))

    for length in range(1, config.max_new_tokens + 1):
        scores = _log_softmax(logits)[first] if length == 1 else _log_softmax(logits)
        _process(scores, answers, said, config)
        scores += totals[:, None]
        scores = scores.reshape([batch, -1])
        parents, chosen = np.arange(batch * beams), np.full(batch * beams, config.filler)
        for row in list(open_rows):
            # Enough that num_beams are left to go on with, whichever of them end.
            order = _largest(scores[row], max(2, 1 + len(ends)) * beams)
            going_on = []
            for rank, candidate in enumerate(order):
                beam, token = divmod(int(candidate), scores.shape[1] // beams)
                parent, score = row * beams + beam, float(scores[row, candidate])
                if token not in ends:
                    going_on.append((parent, token, score))
                elif rank < beams:
                    whole[row].add([*answers[parent], token], score, length)
                if len(going_on) == beams:
                    break
            own = slice(row * beams, (row + 1) * beams)
            parents[own], chosen[own], totals[own] = zip(*going_on)
            if whole[row].is_final(float(scores[row, order[0]]), length):
                open_rows.remove(row)
        answers = np.concatenate([answers[parents], chosen[:, None]], axis=1)
        if not open_rows or length == config.max_new_tokens:
            break
        cache.reorder(parents, prompt)
        embeds = language_model.embed(paddle.to_tensor(chosen[:, None])).astype(inputs_embeds.dtype)
        positions = np.maximum(cache.length - shift[:, None], 0)
        logits = language_model.lm_head(language_model(embeds, paddle.to_tensor(positions), mask, cache)[:, -1])

    for row in open_rows:
        for beam in range(row * beams, (row + 1) * beams):
            whole[row].add(answers[beam].tolist(), float(totals[beam]), answers.shape[1])
    best = [found for row in whole for found in row.found[: config.num_return_sequences]]
    ids = np.full([len(best), max(len(answer) for _, answer in best)], config.filler, "int64")
    for row, (_, answer) in zip(ids, best):
        row[: len(answer)] = answer
    return ids, np.array([score for score, _ in best])


def _log_softmax(logits):
    """``[M, V]`` float32 on the host."""
    return paddle.nn.functional.log_softmax(logits.astype("float32"), axis=-1).numpy().copy()


def _process(scores, answers, said, config):
    """Penalise repetition and forbid the end, in place; as the original's, after the softmax."""
    if config.repetition_penalty != 1 and answers.shape[1] + said.shape[1]:
        places = np.concatenate([said, answers], axis=1)
        seen = np.take_along_axis(scores, places, axis=1)
        seen = np.where(seen > 0, seen / config.repetition_penalty, seen * config.repetition_penalty)
        np.put_along_axis(scores, places, seen, axis=1)
    if answers.shape[1] < config.min_new_tokens and config.eos_token_ids:
        scores[:, config.eos_token_ids] = -np.inf


def _largest(scores, count):
    """Places of the ``count`` largest, largest first; of equal ones the earlier."""
    count = min(count, scores.size)
    found = np.sort(np.argpartition(scores, -count)[-count:])
    return found[np.argsort(-scores[found], kind="stable")]

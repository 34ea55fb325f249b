# SPDX-License-Identifier: Apache-2.0
"""The beam search of transformers on top of CTranslate2's: the same candidates at every step, another end."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any


# Ids of a target and its score: its log-probability divided by its length to the power of `length_penalty`.
Hypothesis = tuple[list[int], float]


def beam_search(
    decode: Callable[[Sequence[list[str]], int, float], list[list[Hypothesis]]],
    rows: Sequence[list[str]],
    settings: dict[str, Any],
) -> tuple[list[list[int]], list[float]]:
    """The best `num_return_sequences` targets of each source, and their scores.

    CTranslate2 ends the search of a source when `num_beams` targets have ended, which is `early_stopping=True`. With
    `False` transformers searches on until no unfinished target has a better score than the worst of the best
    `num_beams` that have ended. What is unfinished at a step, CTranslate2 tells when that step is its last: so the
    search is made again with that limit.

    Args:
        decode (`Callable`): Of some sources, a limit in tokens and a patience: all targets that ended within the limit
            or were cut off by it, until `num_beams` times the patience were found.
        rows (`Sequence[list[str]]`): Tokens of each source.
        settings (`dict[str, Any]`): `num_beams`, `num_return_sequences`, `early_stopping`, `length_penalty`,
            `eos_token_id` (a list) and `max_new_tokens`.
    """
    found = [_best(hypotheses, settings) for hypotheses in decode(rows, settings["max_new_tokens"], 1)]
    if not settings["early_stopping"]:
        _search_on(decode, rows, found, settings)
    chosen = [hypothesis for best in found for hypothesis in best[: settings["num_return_sequences"]]]
    return [ids for ids, _ in chosen], [score for _, score in chosen]


def _search_on(decode, rows, found, settings):
    """Replaces what was found for each source by what transformers finds."""
    limit = settings["max_new_tokens"]
    # Sources by the step at which the last of their first `num_beams` targets ended. At the limit all is over.
    due = defaultdict(list)
    for index, best in enumerate(found):
        due[max(len(ids) for ids, _ in best)].append(index)
    due.pop(limit, None)
    for step in range(1, limit):
        if not (indices := due.pop(step, [])):
            continue
        # At most `num_beams` end at every step, so that none of this many is missing.
        decoded = decode([rows[index] for index in indices], step, step)
        for index, hypotheses in zip(indices, decoded, strict=True):
            found[index] = _best(_ended(hypotheses, settings), settings)
            if _may_improve(hypotheses, found[index], settings):
                due[step + 1].append(index)
    if indices := due.pop(limit, []):
        decoded = decode([rows[index] for index in indices], limit, limit)
        for index, hypotheses in zip(indices, decoded, strict=True):
            found[index] = _best(hypotheses, settings)


def _best(hypotheses, settings):
    return sorted(hypotheses, key=lambda hypothesis: hypothesis[1], reverse=True)[: settings["num_beams"]]


def _ended(hypotheses, settings):
    return [hypothesis for hypothesis in hypotheses if hypothesis[0][-1] in settings["eos_token_id"]]


def _may_improve(hypotheses, best, settings):
    """Whether transformers would search on after this step."""
    unfinished = [score for ids, score in hypotheses if ids[-1] not in settings["eos_token_id"]]
    # There are none if as many as there are beams have just ended, all of them better than what is left.
    return bool(unfinished) and max(unfinished) > best[-1][1]


__all__ = ["beam_search"]

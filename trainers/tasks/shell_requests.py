# SPDX-License-Identifier: Apache-2.0
"""Choose among requests that a teacher wrote for given commands.

A small teacher often changes what a command does, leaves out a name, or repeats the request that it was given. A
request is kept only if it passes all filters of [`choose_requests`].
"""

from collections.abc import Callable, Iterable, Sequence

from ..evaluation.shell_metrics import command_template
from .shell import LiteralVariation, word_similarity
from .shell_sources import ShellRow


MIN_REQUEST_WORDS, MAX_REQUEST_WORDS = 3, 30


def choose_requests(
    row: ShellRow,
    candidates: Iterable[str],
    variation: LiteralVariation,
    answer: Callable[[str], Sequence[str]],
    max_similarity: float = 0.8,
) -> list[ShellRow]:
    """Keep the requests that are short, name what the command names, are new, and lead back to the command.

    Args:
        row (`ShellRow`): A command, and a request for it by a person.
        candidates (`Iterable[str]`): Other requests for the command.
        variation (`LiteralVariation`): Finds the names, numbers and patterns that the request and the command share;
            each has to be in a candidate.
        answer (`Callable[[str], Sequence[str]]`): Returns commands for a request (the round trip). One of them must
            have the programs and flags of the command.
        max_similarity (`float`, *optional*, defaults to 0.8): Jaccard similarity of the sets of words above which a
            candidate repeats the request, the command, or a candidate that was kept before.
    """
    literals, template = variation.find_literals(row), command_template(row.target)
    known = [row.source, row.target]
    for candidate in (" ".join(text.split()) for text in candidates):
        if (
            MIN_REQUEST_WORDS <= len(candidate.split()) <= MAX_REQUEST_WORDS
            and candidate.isprintable()
            and all(literal in candidate for literal in literals)
            and all(word_similarity(candidate, other) <= max_similarity for other in known)
            and template in map(command_template, answer(candidate))
        ):
            known.append(candidate)
    return [ShellRow(request, row.target, "teacher") for request in known[2:]]

# SPDX-License-Identifier: Apache-2.0
"""How near one text is to its references, from 0 to 1, as the papers of the tasks define it.

`evaluate.load` runs code that it downloads, so nothing here needs it: ROUGE comes from `rouge-score`, and the rest are
short definitions.
"""

import math
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

from .vqa_answers import vqa_accuracy


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
MAX_NGRAM = 4
# What a model that writes text says where SQuAD's systems give no span. An empty text says so too.
NO_ANSWER_TEXTS = frozenset({"", "unanswerable", "no answer"})
RELATIVE_TOLERANCE = 0.05


def text_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F-measures over stemmed words), and whether the texts are equal."""
    return {**summary_scores(prediction, references), "exact": float(prediction.strip() == references[0].strip())}


def summary_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L against the first reference: F-measures over stemmed words."""
    scores = _rouge_scorer().score(references[0], prediction)
    return {name: scores[name].fmeasure for name in ROUGE_TYPES}


@cache
def _rouge_scorer():
    return RougeScorer(list(ROUGE_TYPES), use_stemmer=True)


def docstring_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """[`text_scores`] and [`smoothed_bleu`]: a docstring is what CodeXGLUE has a model write for code."""
    return {**text_scores(prediction, references), "bleu": smoothed_bleu(prediction, references[0])}


def code_summary_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """The one metric of CodeXGLUE's code-to-text task."""
    return {"bleu": smoothed_bleu(prediction, references[0])}


def smoothed_bleu(prediction: str, reference: str) -> float:
    """CodeXGLUE's smoothed BLEU-4 of one text; the task's score is its mean over texts.

    Counts of n-grams longer than a word are raised by one (Lin and Och, 2004), and so are both lengths in the brevity
    penalty. Words and single marks are tokens, in lower case.
    """
    written, expected = _code_tokens(prediction), _code_tokens(reference)
    log_precisions = 0.0
    for order in range(1, MAX_NGRAM + 1):
        found, known = _ngrams(written, order), _ngrams(expected, order)
        # The smallest float keeps an empty text from dividing by 0.
        smoothing = sys.float_info.min + (order > 1)
        log_precisions += math.log((found & known).total() + smoothing) - math.log(found.total() + smoothing)
    brevity_penalty = min(0.0, 1 - (len(expected) + 1) / (len(written) + 1))
    return math.exp(log_precisions / MAX_NGRAM + brevity_penalty)


def _code_tokens(text):
    return re.findall(r"[^\W_]+|[^\s\w]|_", text.lower())


def _ngrams(tokens, order):
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def squad_scores(prediction: str, references: Sequence[str]) -> dict[str, float | None]:
    """SQuAD 2.0's exact match and F1, best over the answers, and both apart for questions with and without answer.

    Args:
        prediction (`str`): What a model answered; empty, "unanswerable" or "no answer" where it finds no answer.
        references (`Sequence[str]`): Right answers; none where the text does not answer the question.

    Returns:
        `dict`: `None` in those of the names that begin with `HasAns_` and `NoAns_` that the question does not concern.
    """
    prediction = normalised_span(prediction)
    prediction = "" if prediction in NO_ANSWER_TEXTS else prediction
    answers = [answer for answer in map(normalised_span, references) if answer] or [""]
    scores = {
        "exact": max(float(prediction == answer) for answer in answers),
        "f1": max(_word_f1(prediction, answer) for answer in answers),
    }
    has_answer = answers != [""]
    return (
        scores
        | {f"HasAns_{name}": value if has_answer else None for name, value in scores.items()}
        | {f"NoAns_{name}": None if has_answer else value for name, value in scores.items()}
    )


def normalised_span(text: str) -> str:
    """A text in lower case without punctuation, articles and double spaces, as SQuAD compares answers."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(prediction, answer):
    written, expected = Counter(prediction.split()), Counter(answer.split())
    if not written or not expected:
        return float(written == expected)
    num_common = (written & expected).total()
    return 2 * num_common / (written.total() + expected.total())


def vqa_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """VQA accuracy; see [`~encdec_slm.trainers.evaluation.vqa_answers.vqa_accuracy`]."""
    return {"vqa_accuracy": vqa_accuracy(prediction, references)}


def chart_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """ChartQA's relaxed accuracy, best over the answers."""
    return {"relaxed_accuracy": max(float(is_relaxed_match(prediction, answer)) for answer in references)}


def is_relaxed_match(prediction: str, answer: str) -> bool:
    """Whether a number is at most 5 % of the answer away from it, or a text equals it but for its case.

    "12%" is the number 0.12, and an answer of 0 has to be written as it is, as in the published evaluations.
    """
    prediction, answer = prediction.strip(), answer.strip()
    written, expected = _number(prediction), _number(answer)
    if written is None or not expected:
        return prediction.lower() == answer.lower()
    # A little more, so that rounding does not refuse 1.05 for 1.
    return abs(written - expected) <= (RELATIVE_TOLERANCE + 1e-9) * abs(expected)


def _number(text):
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def exact_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Whether the text is the first reference."""
    return {"exact": float(prediction.strip() == references[0].strip())}

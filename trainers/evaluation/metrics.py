# SPDX-License-Identifier: Apache-2.0
"""Metrics of an answer and its references, from 0 to 1, as the papers of the tasks define them.

The package `evaluate` is not used because it runs code that it downloads.
"""

import math
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from .vqa_answers import vqa_accuracy


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
MAX_NGRAM = 4
# How a generative model says that SQuAD's text has no answer.
NO_ANSWER_TEXTS = frozenset({"", "unanswerable", "no answer"})
RELATIVE_TOLERANCE = 0.05


def text_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute ROUGE-1, ROUGE-2, ROUGE-L (F-measures over stemmed words) and exact match."""
    return {**summary_scores(prediction, references), "exact": float(prediction.strip() == references[0].strip())}


def summary_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute ROUGE-1, ROUGE-2 and ROUGE-L against the first reference (F-measures over stemmed words)."""
    scores = _rouge_scorer().score(references[0], prediction)
    return {name: scores[name].fmeasure for name in ROUGE_TYPES}


@cache
def _rouge_scorer():
    # With its default tokenizer, rouge-score adds a handler to the root logger, which prints every log line again.
    return RougeScorer(list(ROUGE_TYPES), tokenizer=DefaultTokenizer(use_stemmer=True))


def docstring_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute [`text_scores`] and the metric of CodeXGLUE's code-to-text task, [`smoothed_bleu`]."""
    return {**text_scores(prediction, references), "bleu": smoothed_bleu(prediction, references[0])}


def code_summary_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute the metric of CodeXGLUE's code-to-text task."""
    return {"bleu": smoothed_bleu(prediction, references[0])}


def smoothed_bleu(prediction: str, reference: str) -> float:
    """Compute the smoothed BLEU-4 of one text, as CodeXGLUE does (arXiv 2102.04664); a task's score is the mean.

    One is added to the counts of n-grams longer than a word (Lin and Och, 2004), and to both lengths in the brevity
    penalty. Tokens are lower-cased words and single punctuation marks.
    """
    predicted, expected = _code_tokens(prediction), _code_tokens(reference)
    log_precisions = 0.0
    for order in range(1, MAX_NGRAM + 1):
        found, known = _ngrams(predicted, order), _ngrams(expected, order)
        # The smallest float prevents log(0) for an empty text.
        smoothing = sys.float_info.min + (order > 1)
        log_precisions += math.log((found & known).total() + smoothing) - math.log(found.total() + smoothing)
    brevity_penalty = min(0.0, 1 - (len(expected) + 1) / (len(predicted) + 1))
    return math.exp(log_precisions / MAX_NGRAM + brevity_penalty)


def _code_tokens(text):
    return re.findall(r"[^\W_]+|[^\s\w]|_", text.lower())


def _ngrams(tokens, order):
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def squad_scores(prediction: str, references: Sequence[str]) -> dict[str, float | None]:
    """Compute the exact match and F1 of SQuAD 2.0 (arXiv 1806.03822), best over the answers.

    Args:
        prediction (`str`): Answer; empty, "unanswerable" or "no answer" if the model finds none.
        references (`Sequence[str]`): Right answers; empty if the text has no answer.

    Returns:
        `dict`: `exact` and `f1`, and the same with the prefix `HasAns_` for questions with an answer and `NoAns_` for
        others; `None` for the prefix that does not apply.
    """
    prediction = normalize_span(prediction)
    prediction = "" if prediction in NO_ANSWER_TEXTS else prediction
    answers = [answer for answer in map(normalize_span, references) if answer] or [""]
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


def normalize_span(text: str) -> str:
    """Lower-case a text and remove punctuation, articles and extra spaces, as SQuAD's evaluation does."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(prediction, answer):
    predicted, expected = Counter(prediction.split()), Counter(answer.split())
    if not predicted or not expected:
        return float(predicted == expected)
    num_common = (predicted & expected).total()
    return 2 * num_common / (predicted.total() + expected.total())


def vqa_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute the [`~encdec_slm.trainers.evaluation.vqa_answers.vqa_accuracy`]."""
    return {"vqa_accuracy": vqa_accuracy(prediction, references)}


def chart_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute the relaxed accuracy of ChartQA (arXiv 2203.10244), best over the answers."""
    return {"relaxed_accuracy": max(float(is_relaxed_match(prediction, answer)) for answer in references)}


def is_relaxed_match(prediction: str, answer: str) -> bool:
    """Return whether a number deviates from the answer by at most 5 %, or a text equals it except for its case.

    "12%" is the number 0.12, and an answer of 0 must be matched exactly, as in the published evaluations.
    """
    prediction, answer = prediction.strip(), answer.strip()
    number, expected = _parse_number(prediction), _parse_number(answer)
    if number is None or not expected:
        return prediction.lower() == answer.lower()
    # Slightly more than 5 %, so that rounding does not exclude 1.05 for 1.
    return abs(number - expected) <= (RELATIVE_TOLERANCE + 1e-9) * abs(expected)


def _parse_number(text):
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def exact_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Compute the exact match with the first reference."""
    return {"exact": float(prediction.strip() == references[0].strip())}

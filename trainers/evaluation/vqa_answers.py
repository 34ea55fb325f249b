# SPDX-License-Identifier: Apache-2.0
"""VQA accuracy (arXiv 1505.00468), and the normalization of answers in the VQA challenge."""

import re
from collections.abc import Sequence


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {**{word: str(value) for value, word in enumerate(NUMBERS)}, "none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
# The challenge's list, which has no colon and no apostrophe. Periods are handled separately.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that are often written without an apostrophe. As in the challenge's list, those that are other words without it
# are missing, such as "it's", "she'd" and "we'll".
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
PERIOD_OUTSIDE_NUMBER = re.compile(r"\.(?!\d)")


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Compute the VQA accuracy of an answer, from 0 to 1.

    It is a third for each person who gave this answer, at most 1, averaged over all ways to leave one person out.

    Args:
        prediction (`str`): Answer of the model.
        answers (`Sequence[str]`): Answers of people, 10 in VQAv2 and TextVQA; at least 2.

    Raises:
        ValueError: There are fewer than 2 answers.
    """
    if len(answers) < 2:
        raise ValueError(
            f"VQA accuracy requires the answers of at least 2 people, got {len(answers)}. Give a list with the answer "
            "of each person."
        )
    prediction = normalize_answer(prediction)
    agrees = [normalize_answer(answer) == prediction for answer in answers]
    return sum(min(1.0, (sum(agrees) - left_out) / 3) for left_out in agrees) / len(answers)


def normalize_answer(text: str) -> str:
    """Lower-case an answer, remove articles and punctuation, write numbers as digits and restore apostrophes."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [DIGITS.get(word, word) for word in _remove_punctuation(text).lower().split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def _remove_punctuation(text):
    """Remove punctuation at the edge of words; within words replace it by a space, if no number is like 1,000."""
    has_number_with_comma = NUMBER_WITH_COMMA.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        is_at_edge = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if is_at_edge or has_number_with_comma else " ")
    return PERIOD_OUTSIDE_NUMBER.sub("", stripped)

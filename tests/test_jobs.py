# SPDX-License-Identifier: Apache-2.0
"""Metrics of completions."""

import numpy as np

from conftest import build_byte_tokenizer
from encdec_slm.trainers.jobs import decode, text_metrics


def test_text_metrics_are_percentages():
    references = ["Return the size.", "Close the file."]
    metrics = text_metrics(references, references)
    assert [metrics[name].value for name in ("rougeL", "rougeL_shuffled", "exact")] == [100.0, 33.33, 100.0]
    # Two of three words, in order: precision 2/2 and recall 2/3 make 80.
    assert text_metrics(["returns size", ""], references)["rougeL"].value == 40.0


def test_padding_and_repeated_rows_are_not_decoded():
    tokenizer = build_byte_tokenizer()
    ids = tokenizer(" a b")["input_ids"]
    assert decode(tokenizer, np.array([[1, *ids, -100, 0]] * 2), 1) == ["a b"]

# SPDX-License-Identifier: Apache-2.0
"""Figures of training runs: loss curves, and images with questions and answers."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


COLUMNS = 5


def draw_losses(log_history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw training and validation losses over optimizer steps, from the log of a Trainer."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    if axes.lines:
        axes.legend(title="rows")
    axes.grid(alpha=0.3)
    return figure


def draw_contact_sheet(rows: Sequence[Mapping[str, str]], images: Sequence[Sequence[Any]]) -> Figure:
    """Draw images with their questions, answers and predictions, five per line.

    Args:
        rows (`Sequence[Mapping]`): With `question`, `answer` and `prediction`; at least one.
        images (`Sequence[Sequence]`): PIL images of each row, of which the first is drawn.
    """
    num_lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 4.2 * num_lines), dpi=100)
    all_axes = figure.subplots(num_lines, COLUMNS, squeeze=False).ravel()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.14 / num_lines * 2, wspace=0.1, hspace=0.4)
    for axes in all_axes:
        axes.axis("off")
    for axes, row, row_images in zip(all_axes, rows, images, strict=False):
        _draw_row(axes, row, row_images)
    return figure


def _draw_row(axes, row, images):
    if images:
        axes.imshow(images[0], interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.axis("on")  # a frame, because most images have a white background
    is_correct = row["prediction"].strip() == row["answer"].strip()
    prediction = f"model: {row['prediction']!r} ({'correct' if is_correct else 'wrong'})"
    texts = [_wrap(row["question"], 2), _wrap(f"answer: {row['answer']!r}", 1), _wrap(prediction, 2)]
    options = {"transform": axes.transAxes, "fontsize": 11, "va": "top", "parse_math": False}
    axes.text(0, -0.04, texts[0], **options)
    axes.text(0, -0.24, texts[1], color="dimgrey", **options)
    axes.text(0, -0.34, texts[2], color="green" if is_correct else "firebrick", **options)


def _wrap(text, max_lines):
    return "\n".join(textwrap.wrap(text, 34, max_lines=max_lines, placeholder=" ..."))

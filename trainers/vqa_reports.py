# SPDX-License-Identifier: Apache-2.0
"""How well questions about images were answered: a table by task, and a sheet to look at."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure


COLUMNS_OF_SHEET = 5


def task_table(
    rows: Dataset, before: Sequence[str], after: Sequence[str], other_images: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each task how many of its rows are answered exactly right, in percent, and what is earned without looking.

    Args:
        rows ([`~datasets.Dataset`]): With columns `answer` and `task`.
        before (`Sequence[str]`): What the model said before training, in the order of the rows.
        after (`Sequence[str]`): What it said after training.
        other_images (`Sequence[str]`): What it then said to the same questions about the images of other rows.
    """
    said = {"before": before, "after": after, "other_images": other_images}
    answers, tasks = [answer.strip() for answer in rows["answer"]], rows["task"]
    table = {}
    for task in dict.fromkeys(tasks):
        places = [index for index, of_row in enumerate(tasks) if of_row == task]
        num_most_frequent = Counter(answers[index] for index in places).most_common(1)[0][1]
        num_right = {
            "most_frequent": num_most_frequent,
            **{when: sum(texts[index] == answers[index] for index in places) for when, texts in said.items()},
        }
        shares = {name: round(100 * count / len(places), 1) for name, count in num_right.items()}
        table[task] = {"rows": len(places), **shares}
    return table


def shown_places(tasks: Sequence[str], num_shown: int) -> list[int]:
    """Up to `num_shown` places of rows to show: the tasks in turn, and of each of them rows that are far apart."""
    places = {}
    for index, task in enumerate(tasks):
        places.setdefault(task, []).append(index)
    num_of_task = -(-num_shown // len(places))
    spread = [of_task[k * len(of_task) // num_of_task] for k in range(num_of_task) for of_task in places.values()]
    return list(dict.fromkeys(spread))[:num_shown]


def contact_sheet(rows: Sequence[dict[str, Any]]) -> Figure:
    """Images with their questions, answers and predictions, five in a line.

    Args:
        rows (`Sequence[dict]`): With `image` (a list of PIL images, of which the first is shown), `question`,
            `answer` and `prediction`; at least one.
    """
    num_lines = -(-len(rows) // COLUMNS_OF_SHEET)
    figure = Figure(figsize=(3 * COLUMNS_OF_SHEET, 4.2 * num_lines), dpi=100)
    all_axes = figure.subplots(num_lines, COLUMNS_OF_SHEET, squeeze=False).ravel()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.14 / num_lines * 2, wspace=0.1, hspace=0.4)
    for axes in all_axes:
        axes.axis("off")
    for axes, row in zip(all_axes, rows, strict=False):
        _show(axes, row)
    return figure


def _show(axes, row):
    if row["image"]:
        axes.imshow(row["image"][0], interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.axis("on")  # a frame: the paper of most images is white
    is_right = row["prediction"].strip() == row["answer"].strip()
    said = f"model: {row['prediction']!r} ({'right' if is_right else 'wrong'})"
    lines = [_wrapped(row["question"], 2), _wrapped(f"answer: {row['answer']!r}", 1), _wrapped(said, 2)]
    options = {"transform": axes.transAxes, "fontsize": 11, "va": "top", "parse_math": False}
    axes.text(0, -0.04, lines[0], **options)
    axes.text(0, -0.24, lines[1], color="dimgrey", **options)
    axes.text(0, -0.34, lines[2], color="green" if is_right else "firebrick", **options)


def _wrapped(text, max_lines):
    return "\n".join(textwrap.wrap(text, 34, max_lines=max_lines, placeholder=" ..."))


def report(results: dict[str, Any], folder: str) -> str:
    """For a screen: exact match per task, before and after, beside what is earned without looking; and answers.

    Args:
        results (`dict`): Of [`~encdec_slm.trainers.vqa.train_vqa`].
        folder (`str`): Where the run has saved them.
    """
    lines = [
        "",
        f"{'exact match (%)':16} {'rows':>5} {'before':>8} {'after':>8} {'other images':>14} {'one answer':>12}",
    ]
    for task, row in results["tasks"].items():
        lines.append(
            f"{task:16.16} {row['rows']:5} {row['before']:8.1f} {row['after']:8.1f} {row['other_images']:14.1f} "
            f"{row['most_frequent']:12.1f}"
        )
    lines += ["  other images: the trained model, shown the image of another row of the task"]
    lines += ["  one answer: the most frequent answer to all questions of the task", ""]
    for sample in results["samples"]:
        lines.append(f"{sample['question']:60.60} {sample['answer']!r:20.20} model: {sample['prediction']!r:.40}")
    lines += [
        "",
        f"The model has {results['num_parameters'] / 1e6:.1f}M parameters and was trained for "
        f"{results['train_seconds']:.0f} s on {results['rows']['train']:,} questions on {results['device']}.",
        f"Saved to {folder}: model and processor, contact_sheet.png, results.json, predictions.jsonl and loss.png.",
    ]
    return "\n".join(lines)

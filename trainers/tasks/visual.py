# SPDX-License-Identifier: Apache-2.0
"""Visual tasks: questions about images of handwritten digits, charts and lines of text, with computed answers."""

import itertools
import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from .docstrings import SPLITS, build_docstring_task


# Pixels of a tile. Charts are drawn at twice this size, to be readable, and resized by the processor.
TILE_SIZE = 72
FEATURES = Features(
    {"image": Image(), "question": Value("string"), "answer": Value("string"), "task": Value("string")}
    | {"origin": Value("string")}
)

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NEIGHBORS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

# Names of the groups of each table, and the columns that no training chart shows.
GROUP_KINDS = {"wine": "class", "iris": "species", "diabetes": "age group"}
HELD_OUT_COLUMNS = {
    "validation": frozenset({"ash", "total phenols", "sepal width", "s4"}),
    "test": frozenset({"alcohol", "flavanoids", "sepal length", "s5"}),
}
COLORS = ("red", "green", "blue", "orange", "purple")
CHART_KINDS = {"bar": "bar", "line": "point", "pie": "slice"}
ROWS_PER_GROUP = 2
MAX_DRAWS = 100
# Visible difference between the requested value and the next one, relative to the highest.
MIN_GAP = 0.1

# Pillow's bitmap font has glyphs of 6 x 11 pixels.
MAX_LINE_CHARACTERS = 8
MAX_LINES = TILE_SIZE // 12


def build_visual_tasks(
    num_train_rows: int | Sequence[int], num_held_out_rows: int, seed: int = 0, tasks: Sequence[str] | None = None
) -> DatasetDict:
    """Draw images and build a question about each, with its answer.

    - `digits`: handwritten digits of scikit-learn in a grid. Held-out images use samples that no training image uses.
    - `charts`: bar, line and pie charts of scikit-learn's tables. Held-out charts show other columns.
    - `lines`: docstrings of the standard library as text. Held-out images quote other modules.

    Args:
        num_train_rows (`int` or `Sequence[int]`): Training rows of all tasks, or of each task; at least 1.
        num_held_out_rows (`int`): Rows of each task in `validation`, and in `test`; at least 1.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same rows in the same order.
        tasks (`Sequence[str]`, *optional*): Some of `TASKS`. `None` means all.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train`, `validation` and `test` with the columns `image` (RGB), `question`,
        `answer`, `task` and `origin` (the digit samples, column or function in the image). Training rows are shuffled;
        held-out rows alternate between the tasks.

    Raises:
        ValueError: There is no such task, or a number of rows is less than 1.
    """
    tasks = tuple(TASKS) if tasks is None else tuple(tasks)
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"`tasks` has {', '.join(map(repr, unknown))}, but must only have {', '.join(TASKS)}.")
    counts = [num_train_rows] * len(tasks) if isinstance(num_train_rows, int) else list(num_train_rows)
    if not tasks or len(counts) != len(tasks) or min(*counts, num_held_out_rows) < 1:
        raise ValueError(
            f"`tasks` has {len(tasks)} entries, `num_train_rows` is {num_train_rows} and `num_held_out_rows` is "
            f"{num_held_out_rows}. Give at least one task, and numbers of at least 1: one for all tasks, or one for "
            "each task."
        )
    splits = {}
    for split in SPLITS:
        num_rows = counts if split == "train" else [num_held_out_rows] * len(tasks)
        task_rows = [_draw_rows(task, split, number, seed) for task, number in zip(tasks, num_rows, strict=True)]
        alternating = itertools.chain.from_iterable(itertools.zip_longest(*task_rows))
        rows = [row for row in alternating if row is not None]
        if split == "train":
            random.Random(seed).shuffle(rows)
        splits[split] = Dataset.from_list(rows, features=FEATURES)
    return DatasetDict(splits)


def _draw_rows(task, split, num_rows, seed):
    rows = TASKS[task](split, random.Random(f"{task} {split} {seed}"))
    return [{**row, "task": task} for row in itertools.islice(rows, num_rows)]


def _row(image: PILImage.Image, question: str, answer: str, origin: str) -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer, "origin": origin}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Load pixels of shape (1797, 8, 8) from 0 to 255, and the digits that they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * 255 / 16).astype(np.uint8), digits.target


def digit_samples(split: str) -> list[int]:
    """Return the indices of a split's digits: a fixed 80, 10 and 10 % of scikit-learn's."""
    indices = list(range(len(_digits()[1])))
    random.Random(0).shuffle(indices)
    first, last = len(indices) * 8 // 10, len(indices) * 9 // 10
    return {"train": indices[:first], "validation": indices[first:last], "test": indices[last:]}[split]


def _digit_rows(split: str, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Yield grids of one to nine digits: small grids teach to read a digit, large grids to find it."""
    samples = digit_samples(split)
    pixels, values = _digits()
    while True:
        shape = (generator.randint(1, 3), generator.randint(1, 3))
        chosen = np.array(generator.sample(samples, shape[0] * shape[1])).reshape(shape)
        question, answer = _digit_question(values[chosen], generator)
        yield _row(_digit_grid(pixels[chosen]), question, answer, f"samples {chosen.tolist()}")


def _digit_grid(pixels):
    """Draw digits of 20 x 20 pixels in cells of 24 x 24 pixels, from the top left."""
    cell = TILE_SIZE // 3
    image = PILImage.new("RGB", (TILE_SIZE, TILE_SIZE), "white")
    for row, column in np.ndindex(pixels.shape[:2]):
        digit = PILImage.fromarray(255 - pixels[row, column]).resize((cell - 4, cell - 4), PILImage.Resampling.BOX)
        image.paste(digit, (column * cell + 2, row * cell + 2))
    return image


def _digit_question(grid, generator):
    """Ask about a row, a place by row and column, or the neighbor of a digit that occurs once."""
    row, column = (generator.randrange(size) for size in grid.shape)
    kind = generator.choice(("row", "place", "beside"))
    beside = _digits_beside(grid) if kind == "beside" else []
    if beside:
        return generator.choice(beside)
    if kind == "row":
        return f"what digits are in the {ORDINALS[row]} row?", "".join(map(str, grid[row]))
    return f"what digit is in the {ORDINALS[row]} row, {ORDINALS[column]} column?", str(grid[row, column])


def _digits_beside(grid):
    num_rows, num_columns = grid.shape
    return [
        (f"what digit is {name} the {grid[row, column]}?", str(grid[row + down, column + right]))
        for (row, column), (name, (down, right)) in itertools.product(np.ndindex(grid.shape), NEIGHBORS.items())
        if 0 <= row + down < num_rows and 0 <= column + right < num_columns and (grid == grid[row, column]).sum() == 1
    ]


@cache
def _tables() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Load the tables: table -> column -> group -> values."""
    from sklearn.datasets import load_diabetes, load_iris, load_wine

    tables = {}
    for name, table in (("wine", load_wine()), ("iris", load_iris())):
        groups = [str(table.target_names[target]).replace("_", " ") for target in table.target]
        tables[name] = _grouped(table.data, table.feature_names, groups)
    diabetes = load_diabetes(scaled=False)
    groups = ["under 40" if row[0] < 40 else "40 to 59" if row[0] < 60 else "over 59" for row in diabetes.data]
    tables["diabetes"] = _grouped(diabetes.data[:, 2:], diabetes.feature_names[2:], groups)
    return tables


def _grouped(data, names, groups):
    words = {"bmi": "body mass index", "bp": "blood pressure"}
    columns = {}
    for name, values in zip(names, data.T, strict=True):
        column = columns[words.get(name, str(name).removesuffix(" (cm)").replace("_", " "))] = {}
        for group, value in zip(groups, values, strict=True):
            column.setdefault(group, []).append(float(value))
    return columns


def chart_columns(split: str) -> list[tuple[str, str]]:
    """Return the tables and columns that the charts of a split show."""
    held_out = frozenset().union(*HELD_OUT_COLUMNS.values())
    return [
        (table, column)
        for table, columns in _tables().items()
        for column in columns
        if (column not in held_out if split == "train" else column in HELD_OUT_COLUMNS[split])
    ]


def _chart_rows(split: str, generator: random.Random) -> Iterator[dict[str, Any]]:
    """Yield three questions about each chart, which shows means over a few rows of each group."""
    columns = chart_columns(split)
    while True:
        table, column = generator.choice(columns)
        word, pick = generator.choice((("highest", max), ("lowest", min)))
        groups = list(_tables()[table][column].items())
        generator.shuffle(groups)
        means = _means_with(groups, generator.choice(groups)[0], pick, generator)
        if means is None:
            continue
        kind = generator.choice(tuple(CHART_KINDS))
        colors = dict(zip(means, generator.sample(COLORS, len(means)), strict=True))
        image, extreme = _chart(kind, means, colors), pick(means, key=means.get)
        origin = f"{table}: {column}"
        yield _row(image, f"which {GROUP_KINDS[table]} has the {word} mean {column}?", extreme, origin)
        size = {"highest": "largest", "lowest": "smallest"}[word] if kind == "pie" else word
        yield _row(image, f"what colour is the {size} {CHART_KINDS[kind]}?", colors[extreme], origin)
        yield _row(image, *_list_question(kind, GROUP_KINDS[table], colors, generator), origin)


def _means_with(groups, wanted, pick, generator):
    """Draw means of a few rows each until the wanted group is picked; `None` after too many attempts.

    With the means of all rows, one group would mostly be the highest, and the question would reveal the answer.
    """
    for _ in range(MAX_DRAWS):
        means = {group: sum(generator.sample(values, ROWS_PER_GROUP)) / ROWS_PER_GROUP for group, values in groups}
        ordered = sorted(means.values(), reverse=pick is max)
        if pick(means, key=means.get) == wanted and abs(ordered[0] - ordered[1]) >= MIN_GAP * max(ordered):
            return means
    return None


def _list_question(kind, group_kind, colors, generator):
    """Ask for all groups or colors in order; long answers teach faster than the other questions."""
    order = "clockwise from the top" if kind == "pie" else "from the left"
    if generator.random() < 0.5:
        return f"which {group_kind} is each {CHART_KINDS[kind]}, {order}?", ", ".join(colors)
    return f"what colour is each {CHART_KINDS[kind]}, {order}?", ", ".join(colors.values())


def _chart(kind, means, colors):
    """Draw a chart without a frame and the names of its groups below."""
    size = 2 * TILE_SIZE
    figure = Figure(figsize=(size / 100, size / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0.12, 1, 0.86))
    axes.set_axis_off()
    shades, places = [colors[group] for group in means], range(len(means))
    if kind == "pie":
        axes.pie(list(means.values()), colors=shades, startangle=90, counterclock=False, radius=1.2)
    else:
        axes.set_xlim(-0.5, len(means) - 0.5)
        axes.set_ylim(0, 1.1 * max(means.values()))
    if kind == "bar":
        axes.bar(places, list(means.values()), color=shades, width=0.8)
    elif kind == "line":
        axes.plot(places, list(means.values()), color="black", linewidth=1)
        axes.scatter(places, list(means.values()), color=shades, s=120, zorder=2)
    for place, group in enumerate(means):
        where = ((place + 0.5) / len(means), 0.02)
        figure.text(*where, group, ha="center", fontsize=6.5, color=colors[group] if kind == "pie" else "black")
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


@cache
def _sentences() -> dict[str, list[tuple[str, list[str]]]]:
    """Return names of functions of each split, and first sentences of their docstrings in lines that fit."""
    return {
        split: [
            (name, textwrap.wrap(text, MAX_LINE_CHARACTERS)[:MAX_LINES])
            for name, text in zip(rows["name"], rows["target"], strict=True)
            if text.isascii() and text.isprintable()
        ]
        for split, rows in build_docstring_task().items()
    }


def _line_rows(split: str, generator: random.Random) -> Iterator[dict[str, Any]]:
    sentences = _sentences()[split]
    while True:
        name, lines = generator.choice(sentences)
        lines = lines[: generator.randint(1, MAX_LINES)]
        place = generator.randrange(len(lines))
        yield _row(_page(lines), f"what does the {ORDINALS[place]} line say?", lines[place], name)


def _page(lines):
    image = PILImage.new("RGB", (TILE_SIZE, TILE_SIZE), "white")
    draw = ImageDraw.Draw(image)
    for place, line in enumerate(lines):
        draw.text((0, 12 * place), line, fill="black", font=ImageFont.load_default_imagefont())
    return image


TASKS: dict[str, Callable[[str, random.Random], Iterator[dict[str, Any]]]] = {
    "digits": _digit_rows,
    "charts": _chart_rows,
    "lines": _line_rows,
}

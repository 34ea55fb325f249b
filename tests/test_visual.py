# SPDX-License-Identifier: Apache-2.0
"""The visual tasks: answers are checked against the origin of an image, or its pixels."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from encdec_slm.trainers.tasks import visual
from encdec_slm.trainers.tasks.docstrings import SPLITS
from encdec_slm.trainers.tasks.visual import (
    COLORS,
    MAX_LINE_CHARACTERS,
    ORDINALS,
    TASKS,
    TILE_SIZE,
    build_visual_tasks,
    chart_columns,
    digit_samples,
)


DIGITS = load_digits()


@pytest.fixture(autouse=True)
def docstrings(monkeypatch):
    """Three sentences per split instead of the standard library, which takes seconds to read."""
    sentences = ("Return the number of rows in use.", "Close the file.", "Say é.")
    rows = {s: [{"name": f"{s}.f{i}", "target": text} for i, text in enumerate(sentences)] for s in SPLITS}
    fake = DatasetDict({split: Dataset.from_list(split_rows) for split, split_rows in rows.items()})
    monkeypatch.setattr(visual, "build_docstring_task", lambda: fake)
    visual._sentences.cache_clear()
    yield
    visual._sentences.cache_clear()


@pytest.fixture(scope="module")
def digits():
    return build_visual_tasks(200, 20, tasks=["digits"])["train"]


@pytest.fixture(scope="module")
def charts():
    return build_visual_tasks(120, 10, tasks=["charts"])["train"]


def find_grid(row):
    return DIGITS.target[np.array(json.loads(row["origin"].removeprefix("samples ")))]


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again, other = (build_visual_tasks(4, 2, seed=seed) for seed in (1, 1, 2))
    for split in SPLITS:
        assert first[split][:]["question"] == again[split][:]["question"] != other[split][:]["question"]
        for image, same in zip(first[split]["image"], again[split]["image"], strict=True):
            assert image.tobytes() == same.tobytes()


def test_tasks_have_the_given_numbers_of_rows_and_alternate_in_held_out_splits():
    splits = build_visual_tasks([5, 4, 2], 3)
    assert [splits["train"]["task"].count(task) for task in TASKS] == [5, 4, 2]
    assert build_visual_tasks(2, 1)["train"].num_rows == 2 * len(TASKS)
    assert splits["test"]["task"] == list(TASKS) * 3
    assert all(image.mode == "RGB" for image in splits["train"]["image"])


def test_answers_about_digits_match_their_places(digits):
    num_places = num_neighbors = num_rows = 0
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for row in digits:
        grid = find_grid(row)
        if match := re.fullmatch(r"what digit is in the (\w+) row, (\w+) column\?", row["question"]):
            place = tuple(ORDINALS.index(word) for word in match.groups())
            num_places += 1
            assert row["answer"] == str(grid[place])
        elif match := re.fullmatch(r"what digits are in the (\w+) row\?", row["question"]):
            num_rows += 1
            assert list(row["answer"]) == [str(digit) for digit in grid[ORDINALS.index(match[1])]]
        else:
            name, digit = re.fullmatch(r"what digit is (.+) the (\d)\?", row["question"]).groups()
            (place,) = np.argwhere(grid == int(digit))
            num_neighbors += 1
            assert (place + steps[name] >= 0).all()
            assert row["answer"] == str(grid[tuple(place + steps[name])])
    assert min(num_places, num_neighbors, num_rows) > 20


def test_the_pixels_of_a_grid_are_those_of_its_samples(digits):
    row = next(row for row in digits if find_grid(row).shape == (3, 3))
    samples = np.array(json.loads(row["origin"].removeprefix("samples ")))
    cell = np.asarray(row["image"])[26:46, 50:70, 0]  # second row, third column
    expected = 255 - DIGITS.images[samples[1, 2]] * 255 / 16
    shrunk = np.asarray(Image.fromarray(cell).resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(shrunk.ravel(), expected.ravel())[0, 1] > 0.9  # 20 pixels are no multiple of 8


def test_the_color_of_the_extreme_matches_the_pixels(charts):
    checked = set()
    for row in charts:
        if not (match := re.fullmatch(r"what colour is the (\w+) (bar|point|slice)\?", row["question"])):
            continue
        pixels = np.asarray(row["image"], dtype=int)
        masks = {c: (abs(pixels - np.array(to_rgb(c)) * 255).max(-1) < 2) for c in COLORS}
        masks = {color: mask for color, mask in masks.items() if mask[: 2 * TILE_SIZE * 7 // 8].sum() > 20}
        word, kind = match.groups()
        # Bars are equally wide, and images count from the top.
        height = {c: -np.argwhere(m)[:, 0].mean() if kind == "point" else m.sum() for c, m in masks.items()}
        pick = max if word in ("highest", "largest") else min
        assert pick(height, key=height.get) == row["answer"]
        checked |= {kind, pick}
    assert checked == {"bar", "point", "slice", max, min}


def test_three_questions_of_one_chart_agree():
    rows = build_visual_tasks(1, 150, tasks=["charts"])["test"]
    num_checked = 0
    for which, color, listed in (rows.select(range(start, start + 3)) for start in range(0, 150, 3)):
        assert which["image"].tobytes() == color["image"].tobytes() == listed["image"].tobytes()
        known = which if listed["question"].startswith("which ") else color
        assert known["answer"] in listed["answer"].split(", ")
        if known is color and " bar, " in listed["question"]:
            pixels = np.asarray(listed["image"], dtype=int)[: 2 * TILE_SIZE * 7 // 8]
            left = {c: np.argwhere(abs(pixels - np.array(to_rgb(c)) * 255).max(-1) < 2)[:, 1] for c in COLORS}
            left = {c: places.min() for c, places in left.items() if len(places)}
            assert listed["answer"].split(", ") == sorted(left, key=left.get)
            num_checked += 1
    assert num_checked


def test_questions_alone_do_not_reveal_the_highest_group(charts):
    answers = {}
    for row in charts:
        if row["question"].startswith("which "):
            answers.setdefault(row["question"], []).append(row["answer"])
    repeated = [answers_to_one for answers_to_one in answers.values() if len(answers_to_one) > 1]
    assert sum(len(set(answers_to_one)) > 1 for answers_to_one in repeated) > len(repeated) / 2 > 3


def test_lines_show_their_answers():
    for row in build_visual_tasks(20, 1, tasks=["lines"])["train"]:
        place = ORDINALS.index(re.fullmatch(r"what does the (\w+) line say\?", row["question"])[1])
        expected = Image.new("RGB", (TILE_SIZE, 12), "white")
        ImageDraw.Draw(expected).text((0, 0), row["answer"], fill="black", font=ImageFont.load_default_imagefont())
        shown = row["image"].crop((0, 12 * place, TILE_SIZE, 12 * place + 12))
        assert np.asarray(expected)[:11].tobytes() == np.asarray(shown)[:11].tobytes()
        assert 0 < len(row["answer"]) <= MAX_LINE_CHARACTERS and row["answer"].isascii()


def test_held_out_images_share_no_origin_with_training_images():
    for split_rows in (digit_samples, chart_columns):
        parts = [set(split_rows(split)) for split in SPLITS]
        assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    assert sum(len(digit_samples(split)) for split in SPLITS) == 1797
    splits = build_visual_tasks(30, 30)
    origins = {split: set(splits[split].filter(lambda row: row["task"] != "digits")["origin"]) for split in SPLITS}
    assert not origins["train"] & (origins["validation"] | origins["test"])
    for split in SPLITS:
        rows = [row["origin"] for row in splits[split] if row["task"] == "digits"]
        used = {sample for origin in rows for sample in map(int, re.findall(r"\d+", origin))}
        assert used <= set(digit_samples(split))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["digits", "maps"]}, "'maps'.*digits, charts, lines"),
        ({"tasks": []}, "`tasks` has 0 entries"),
        ({"num_train_rows": 0}, "`num_train_rows` is 0"),
        ({"num_train_rows": [1, 1]}, r"`tasks` has 3 entries, `num_train_rows` is \[1, 1\]"),
    ],
)
def test_unknown_tasks_and_no_rows_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_visual_tasks(**{"num_train_rows": 1, "num_held_out_rows": 1, **options})

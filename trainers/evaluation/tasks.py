# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint can be scored on: where the rows come from, what the model reads of them, and the metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...conversion import question_answering_prompt
from ..data_files import check_text
from ..distillation_images import image_list
from ..tasks.docstrings import build_docstring_task
from ..tasks.visual import TASKS as VISUAL_TASKS
from ..tasks.visual import build_visual_tasks
from .metrics import (
    chart_scores,
    code_summary_scores,
    docstring_scores,
    exact_scores,
    squad_scores,
    summary_scores,
    text_scores,
    vqa_scores,
)


DEFAULT_VISUAL_ROWS = 200


@dataclass(frozen=True)
class Example:
    """What a model reads of a row, and what is right.

    Args:
        text (`str`): The part that is cut where the whole is too long.
        references (`tuple[str, ...]`): What the metric compares with.
        before (`str`, *optional*, defaults to `""`): What the model reads before `text`.
        after (`str`, *optional*, defaults to `""`): What it reads behind it.
        images (`Callable`, *optional*): Gives what it sees, as [`~encdec_slm.image_processing_encdec_vlm.load_images`]
            takes it.
    """

    text: str
    references: tuple[str, ...]
    before: str = ""
    after: str = ""
    images: Callable[[], list[Any]] = list

    @property
    def source(self) -> str:
        """All that the model reads, images aside."""
        return self.before + self.text + self.after


@dataclass(frozen=True)
class EvaluationTask:
    """A task that [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`] knows.

    Args:
        about (`str`): One line that says what is measured.
        columns (`tuple[tuple[str, ...], ...]`): Those that a row needs; of several names of one the first that it has.
        read (`Callable`): From the values of `columns` and the words "row 3" to an [`Example`].
        score (`Callable`): From a text and its references to metrics from 0 to 1.
        max_new_tokens (`int`): What an answer may have, unless the caller says otherwise.
        needs_images (`bool`, *optional*, defaults to `False`): Whether it is for vision-text models.
        build (`Callable`, *optional*): Makes rows of a split on the spot, from its name, a number and a seed.
        dataset_name (`str`, *optional*): A data set on the Hub.
        dataset_config (`str`, *optional*): Its configuration.
        dataset_revision (`str`, *optional*): Its branch, tag or commit.
        dataset_split (`str`, *optional*, defaults to `"test"`): The split that has answers and is not trained on.
        columns_can_be_named (`bool`, *optional*, defaults to `False`): Whether `source_column` and `target_column` of
            the caller name its columns.
    """

    about: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Sequence[Any], str], Example]
    score: Callable[[str, Sequence[str]], Mapping[str, float | None]]
    max_new_tokens: int
    needs_images: bool = False
    build: Callable[[str, int | None, int], Sequence[Mapping[str, Any]]] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "test"
    columns_can_be_named: bool = False


def list_tasks() -> list[str]:
    """Names of the tasks that [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`] takes."""
    return list(TASKS)


def find_task(name: str) -> EvaluationTask:
    """A task by its name.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in TASKS:
        raise ValueError(f"`task` is {name!r}, but the tasks are {', '.join(TASKS)}. Name one of them.")
    return TASKS[name]


def _build_docstrings(split, num_rows, seed):
    splits = build_docstring_task()
    if split not in splits:
        raise ValueError(f"`dataset_split` is {split!r}, but docstrings have {', '.join(splits)}. Name one of them.")
    return splits[split]


def _visual_builder(task):
    def build(split, num_rows, seed):
        num_rows = DEFAULT_VISUAL_ROWS if num_rows is None else num_rows
        splits = build_visual_tasks(num_rows if split == "train" else 1, num_rows, seed, [task])
        if split not in splits:
            raise ValueError(f"`dataset_split` is {split!r}, but {task} has {', '.join(splits)}. Name one of them.")
        return splits[split]

    return build


def _read_text(values, where):
    source, target = values
    check_text(source, "source", where)
    check_text(target, "target", where)
    return Example(source, (target,))


def _read_code(values, where):
    code, docstring = (" ".join(value) if _is_text_list(value) else value for value in values)
    check_text(code, "code_tokens", where)
    check_text(docstring, "docstring_tokens", where)
    # CodeXGLUE's baselines read the function on one line.
    return Example(code.replace("\n", " "), (docstring.replace("\n", " "),))


def _read_squad(values, where):
    question, context, answers = values
    check_text(question, "question", where)
    check_text(context, "context", where)
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    # A mark where the context goes, so that a long one can be cut without losing what stands behind it.
    before, _, after = question_answering_prompt(question, "\0").partition("\0")
    return Example(context, _checked_texts(texts, "answers", where), before, after)


def _read_visual(values, where):
    image, question, answers = values
    check_text(question, "question", where)
    references = _checked_texts(_answer_texts(answers), "answer", where)
    if not references:
        raise ValueError(
            f"{where} has no answer, but it is compared with one. Name a split whose answers are not withheld."
        )
    return Example(question, references, images=image if callable(image) else partial(image_list, image))


def _read_many_answers(values, where):
    example = _read_visual(values, where)
    if len(example.references) < 2:
        raise ValueError(
            f"{where} has 1 answer, but VQA accuracy compares with those of several people. Give `answers` as a list, "
            "of 10 in VQAv2 and TextVQA; or take the task 'chartqa' for data with one answer."
        )
    return example


def _answer_texts(answers):
    """Texts of a cell: a text, a list of them, or as in VQAv2 of dicts (or a dict of lists) with `answer`."""
    if isinstance(answers, Mapping):
        answers = answers.get("answer")
    if answers is None or isinstance(answers, str):
        return [answers] if answers else []
    if not isinstance(answers, (list, tuple)):
        return [answers]
    return [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]


def _checked_texts(texts, column, where):
    for text in texts:
        check_text(text, column, where)
    return tuple(texts)


def _is_text_list(value):
    return isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)


IMAGE_COLUMNS = (("image", "images"), ("question", "query"))
ONE_ANSWER_COLUMNS = (*IMAGE_COLUMNS, ("answer", "label", "answers"))
MANY_ANSWERS_COLUMNS = (*IMAGE_COLUMNS, ("answers", "answer"))
TASKS = {
    "text": EvaluationTask(
        about="rows of your own: ROUGE and equal texts",
        columns=(("source",), ("target",)),
        read=_read_text,
        score=text_scores,
        max_new_tokens=128,
        columns_can_be_named=True,
    ),
    "docstrings": EvaluationTask(
        about="first docstring sentences of Python's standard library: ROUGE, equal texts and smoothed BLEU",
        columns=(("source",), ("target",)),
        read=_read_text,
        score=docstring_scores,
        max_new_tokens=48,
        build=_build_docstrings,
        columns_can_be_named=True,
    ),
    "squad_v2": EvaluationTask(
        about="SQuAD 2.0, questions about a text that may not answer them: exact match and F1",
        columns=(("question",), ("context",), ("answers",)),
        read=_read_squad,
        score=squad_scores,
        max_new_tokens=32,
        dataset_name="rajpurkar/squad_v2",
        dataset_split="validation",
    ),
    "xsum": EvaluationTask(
        about="XSum, one-sentence summaries of news: ROUGE",
        columns=(("document",), ("summary",)),
        read=_read_text,
        score=summary_scores,
        max_new_tokens=64,
        dataset_name="EdinburghNLP/xsum",
        # The Hub's copy without a loading script, which `datasets` no longer runs.
        dataset_revision="refs/convert/parquet",
    ),
    "code_x_glue_ct_code_to_text": EvaluationTask(
        about="CodeXGLUE, docstrings for functions in six languages: smoothed BLEU-4",
        # `code` has the docstring in it where the language keeps it inside, as Python does; its tokens have not.
        columns=(("code_tokens", "code"), ("docstring_tokens", "docstring")),
        read=_read_code,
        score=code_summary_scores,
        max_new_tokens=128,
        dataset_name="google/code_x_glue_ct_code_to_text",
        dataset_config="python",
    ),
    "vqav2": EvaluationTask(
        about="VQAv2, questions about photographs: VQA accuracy",
        columns=MANY_ANSWERS_COLUMNS,
        read=_read_many_answers,
        score=vqa_scores,
        max_new_tokens=16,
        needs_images=True,
        dataset_name="lmms-lab/VQAv2",
        dataset_split="validation",
    ),
    "textvqa": EvaluationTask(
        about="TextVQA, questions about text in photographs: VQA accuracy",
        columns=MANY_ANSWERS_COLUMNS,
        read=_read_many_answers,
        score=vqa_scores,
        max_new_tokens=16,
        needs_images=True,
        dataset_name="lmms-lab/textvqa",
        dataset_split="validation",
    ),
    "chartqa": EvaluationTask(
        about="ChartQA, questions about charts: relaxed accuracy (numbers within 5 %)",
        columns=ONE_ANSWER_COLUMNS,
        read=_read_visual,
        score=chart_scores,
        max_new_tokens=24,
        needs_images=True,
        dataset_name="HuggingFaceM4/ChartQA",
    ),
    **{
        name: EvaluationTask(
            about=f"{name} drawn on the spot, with computed answers: equal texts",
            columns=ONE_ANSWER_COLUMNS,
            read=_read_visual,
            score=exact_scores,
            max_new_tokens=24,
            needs_images=True,
            build=_visual_builder(name),
        )
        for name in VISUAL_TASKS
    },
}

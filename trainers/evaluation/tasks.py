# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks: where their rows come from, what the model reads, and the metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...conversion import question_answering_prompt
from ..data_files import check_text
from ..image_rows import as_image_list
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
from .shell_metrics import parse_command, shell_metrics


DEFAULT_VISUAL_ROWS = 200


@dataclass(frozen=True)
class Example:
    """The input of a model and the right answers.

    Args:
        text (`str`): The part of the source that is truncated if the source is too long.
        references (`tuple[str, ...]`): Right answers that the metric compares with.
        before (`str`, *optional*, defaults to `""`): Text of the source before `text`.
        after (`str`, *optional*, defaults to `""`): Text of the source after `text`.
        images (`Callable`, *optional*): Returns the images of the source, as
            [`~encdec_slm.image_processing_encdec_vlm.load_images`] reads them.
    """

    text: str
    references: tuple[str, ...]
    before: str = ""
    after: str = ""
    images: Callable[[], list[Any]] = list

    @property
    def source(self) -> str:
        """The text of the source."""
        return self.before + self.text + self.after


@dataclass(frozen=True)
class EvaluationTask:
    """A task of [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`].

    Args:
        about (`str`): One line about the task and its metrics.
        columns (`tuple[tuple[str, ...], ...]`): Required columns; of several names, the first that a row has is read.
        read (`Callable`): Builds an [`Example`] from the values of `columns` and a name of the row for messages.
        score (`Callable`): Computes metrics from 0 to 1 from an answer and its references.
        max_new_tokens (`int`): Longest answer if neither the caller nor the checkpoint has a limit.
        needs_images (`bool`, *optional*, defaults to `False`): Whether the task is for vision-text models.
        num_answers (`int`, *optional*, defaults to 1): Answers to each row, the best first. Several answers are joined
            by line ends.
        parse_answer (`Callable`, *optional*): Extracts the answer from the text of a model. Must return one line if
            there are several answers.
        build (`Callable`, *optional*): Builds rows from the name of a split, a number of rows and a seed.
        dataset_name (`str`, *optional*): Data set on the Hub.
        dataset_config (`str`, *optional*): Configuration of the data set.
        dataset_revision (`str`, *optional*): Branch, tag or commit of the data set.
        dataset_split (`str`, *optional*, defaults to `"test"`): Split that has answers and is not trained on.
        columns_can_be_named (`bool`, *optional*, defaults to `False`): Whether the caller can name the columns by
            `source_column` and `target_column`.
    """

    about: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Sequence[Any], str], Example]
    score: Callable[[str, Sequence[str]], Mapping[str, float | None]]
    max_new_tokens: int
    needs_images: bool = False
    num_answers: int = 1
    parse_answer: Callable[[str], str] = str.strip
    build: Callable[[str, int | None, int], Sequence[Mapping[str, Any]]] | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "test"
    columns_can_be_named: bool = False


def list_tasks() -> list[str]:
    """Return the names of the tasks of [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`]."""
    return list(TASKS)


def find_task(name: str) -> EvaluationTask:
    """Return a task by its name.

    Raises:
        ValueError: There is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"`task` is {name!r}, but must be one of {', '.join(TASKS)}.")
    return TASKS[name]


def _build_docstrings(split, num_rows, seed):
    return _find_split(build_docstring_task(), split)


def _visual_builder(task):
    def build(split, num_rows, seed):
        num_rows = DEFAULT_VISUAL_ROWS if num_rows is None else num_rows
        return _find_split(build_visual_tasks(num_rows if split == "train" else 1, num_rows, seed, [task]), split)

    return build


def _find_split(splits, split):
    if split not in splits:
        raise ValueError(f"`dataset_split` is {split!r}, but must be one of {', '.join(splits)}.")
    return splits[split]


def _read_text(values, where):
    source, target = values
    check_text(source, "source", where)
    check_text(target, "target", where)
    return Example(source, (target,))


def _read_commands(values, where):
    source, targets = values
    check_text(source, "source", where)
    targets = _check_texts(targets if isinstance(targets, (list, tuple)) else [targets], "target", where)
    if not targets:
        raise ValueError(f"{where} has no `target`, but at least one command is required.")
    return Example(source, targets)


def _shell_scores(prediction, references):
    return shell_metrics(prediction.splitlines(), references)


def _read_code(values, where):
    code, docstring = (" ".join(value) if _is_text_list(value) else value for value in values)
    check_text(code, "code_tokens", where)
    check_text(docstring, "docstring_tokens", where)
    # The baselines of CodeXGLUE read a function as one line.
    return Example(code.replace("\n", " "), (docstring.replace("\n", " "),))


def _read_squad(values, where):
    question, context, answers = values
    check_text(question, "question", where)
    check_text(context, "context", where)
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
    # Split the prompt at the context, so that a long context can be truncated without losing what follows it.
    before, _, after = question_answering_prompt(question, "\0").partition("\0")
    return Example(context, _check_texts(texts, "answers", where), before, after)


def _read_visual(values, where):
    image, question, answers = values
    check_text(question, "question", where)
    references = _check_texts(_answer_texts(answers), "answer", where)
    if not references:
        raise ValueError(f"{where} has no answer, but at least one is required. Use a split that has answers.")
    return Example(question, references, images=image if callable(image) else partial(as_image_list, image))


def _read_many_answers(values, where):
    example = _read_visual(values, where)
    if len(example.references) < 2:
        raise ValueError(
            f"{where} has 1 answer, but VQA accuracy requires those of several people (10 in VQAv2 and TextVQA). Give "
            "`answers` as a list, or use the task 'chartqa' for data with one answer."
        )
    return example


def _answer_texts(answers):
    """Return the answers of a cell: a text, texts, or as in VQAv2 dicts (or a dict of lists) with `answer`."""
    if isinstance(answers, Mapping):
        answers = answers.get("answer")
    if answers is None or isinstance(answers, str):
        return [answers] if answers else []
    if not isinstance(answers, (list, tuple)):
        return [answers]
    return [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]


def _check_texts(texts, column, where):
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
        about="other rows of text: ROUGE and exact match",
        columns=(("source",), ("target",)),
        read=_read_text,
        score=text_scores,
        max_new_tokens=128,
        columns_can_be_named=True,
    ),
    "docstrings": EvaluationTask(
        about="first docstring sentences of Python's standard library: ROUGE, exact match and smoothed BLEU",
        columns=(("source",), ("target",)),
        read=_read_text,
        score=docstring_scores,
        max_new_tokens=48,
        build=_build_docstrings,
        columns_can_be_named=True,
    ),
    "shell": EvaluationTask(
        about="shell commands for requests: NLC2CMD score, template and exact match, first utility, valid Bash",
        columns=(("source",), ("target",)),
        read=_read_commands,
        score=_shell_scores,
        max_new_tokens=96,
        num_answers=5,
        parse_answer=parse_command,
        columns_can_be_named=True,
    ),
    "squad_v2": EvaluationTask(
        about="SQuAD 2.0, questions about a text, some without an answer: exact match and F1",
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
        # Converted by the Hub, because `datasets` no longer runs loading scripts.
        dataset_revision="refs/convert/parquet",
    ),
    "code_x_glue_ct_code_to_text": EvaluationTask(
        about="CodeXGLUE, docstrings for functions in six languages: smoothed BLEU-4",
        # `code` contains the docstring in languages such as Python; `code_tokens` do not.
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
            about=f"generated images of {name} with computed answers: exact match",
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

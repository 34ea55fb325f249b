# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a vision-text model on questions about images, and measure each task on held-out images."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments, set_seed

from ..checkpoints import find_source_folders, has_vision, load_checkpoint
from ..run_results import Metric, ModelResults, RunResults
from .evaluation.results import mean_with_interval
from .figures import draw_contact_sheet
from .image_rows import find_images, read_images
from .jobs import (
    AFTER,
    BEFORE,
    CONFIDENCE,
    before_training,
    build_trainer,
    decode,
    describe_training,
    loss_metric,
    predict,
    save_run,
    train,
)
from .new_models import build_vision_model
from .resuming import prepare_output_dir
from .row_encoding import build_row_encoder
from .seq2seq_data import DatasetArguments
from .tasks.visual import TASKS
from .vision_data import load_vision_splits, shuffle_images


OTHER_IMAGES, MOST_FREQUENT = "images of other rows", "most frequent answer"
NUM_SHOWN = 10


@dataclass
class VisionArguments(DatasetArguments):
    """Data and size of a vision-text fine-tuning run.

    Args: those of [`~encdec_slm.trainers.seq2seq_data.DatasetArguments`], and
        tasks (`list[str]`, *optional*): Tasks of [`~encdec_slm.trainers.tasks.visual.build_visual_tasks`]. `None`,
            without a `dataset_name`, means all.
        num_train_rows (`list[int]`, *optional*, defaults to `[5000]`): Training rows of each task, or one number for
            all of them.
        image_column (`str`, *optional*, defaults to `"image"`): Column with an image, or a list of images.
        question_column (`str`, *optional*, defaults to `"question"`): Column with text.
        answer_column (`str`, *optional*, defaults to `"answer"`): Column with text, or a list of answers, as text or
            as a `dict` with `answer`; the most frequent answer of a list is used.
        preset (`str`, *optional*, defaults to `"tiny-vlm"`): Size of a new model, without `model_name_or_path`; see
            [`~encdec_slm.configuration.list_presets`].
        vocab_size (`int`, *optional*, defaults to 320): Upper bound for the tokenizer of a new model.
        model_name_or_path (`str`, *optional*): A vision-text checkpoint of this family. `None` builds a new model.
        model_revision (`str`, *optional*): Branch, tag or commit of the checkpoint on the Hub.
        frozen_parts (`list[str]`, *optional*): Parts that are not trained: `vision_tower`, `multi_modal_projector`,
            `text_model` (the encoder with the embeddings) and `decoder`.
        max_target_length (`int`, *optional*, defaults to 24): Longest answer, in tokens; also the longest completion
            of the saved model.

    Raises:
        ValueError: Both `tasks` and `dataset_name` are given.
    """

    tasks: list[str] | None = field(default=None, metadata={"help": "Built-in visual tasks."})
    num_train_rows: list[int] = field(
        default_factory=lambda: [5000], metadata={"help": "Training rows of each task, or of all of them."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with an image or several."})
    question_column: str = field(default="question", metadata={"help": "Column that the encoder reads."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answer or several."})
    max_eval_samples: int = field(default=600, metadata={"help": "Rows of each held-out split, all tasks together."})
    preset: str = field(default="tiny-vlm", metadata={"help": "Size of a new model."})
    vocab_size: int = field(default=320, metadata={"help": "Upper bound for a newly trained tokenizer."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Vision-text checkpoint of this family."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    frozen_parts: list[str] | None = field(default=None, metadata={"help": "Parts that are not trained."})
    max_target_length: int = field(default=24, metadata={"help": "Longest answer, in tokens."})

    def __post_init__(self):
        if self.tasks is not None and self.dataset_name is not None:
            raise ValueError(
                f"`tasks` is {self.tasks} and `dataset_name` is {self.dataset_name!r}, but rows come from one source. "
                "Set one of them."
            )


def finetune_vision(args: VisionArguments, training_args: Seq2SeqTrainingArguments) -> RunResults:
    """Fine-tune a vision-text model, and save it with its processor and the results to `training_args.output_dir`.

    Args:
        args ([`VisionArguments`]): Data and size.
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): The run; see
            [`~encdec_slm.trainers.finetune_job.finetune`].

    Returns:
        [`~encdec_slm.run_results.RunResults`]: Exact answers of each task `"before training"`, `"after training"`,
        with `"images of other rows"` (what the trained model answers from the question alone), and with the
        `"most frequent answer"` of the task.

    Raises:
        ValueError: Data, model, sizes or output folder do not fit.
        TypeError: A question or an answer is not text.
    """
    name = args.model_name_or_path
    checkpoint = prepare_output_dir(training_args, "fine-tuning", [*find_source_folders(name), args.dataset_name])
    set_seed(training_args.seed)

    splits = load_vision_splits(args, training_args.seed)
    if name is None:
        model, processor = build_vision_model(args.preset, splits["train"], args.vocab_size)
    else:
        model, processor = _load_model(args)
    _freeze(model, args.frozen_parts or ())
    encoder = build_row_encoder(
        processor,
        max_target_length=args.max_target_length,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
    )
    trainer = build_trainer(
        model,
        training_args,
        args.max_target_length,
        inherited_from=name,
        data_collator=encoder.collate,
        train_dataset=encoder.prepare_dataset(splits["train"]),
        eval_dataset=encoder.prepare_dataset(splits["validation"]),
        processing_class=processor,
    )

    test = encoder.prepare_dataset(splits["test"])
    with before_training(trainer):
        before, _ = _measure(trainer, test)
    train_seconds = train(trainer, checkpoint)
    after, completions = _measure(trainer, test)
    other_images, _ = _measure(trainer, shuffle_images(test))

    rows = test.remove_columns("image")
    predictions = [
        {"task": row["task"], "question": row["question"], "answer": row["answer"], "prediction": completion}
        for row, completion in zip(rows, completions, strict=True)
    ]
    shown = choose_rows(rows["task"], NUM_SHOWN)
    num_parameters = model.num_parameters()
    results = RunResults(
        kind="fine-tuning",
        task="vqa",
        models=[
            ModelResults(BEFORE, before, num_parameters),
            ModelResults(AFTER, after, num_parameters, train_seconds),
            ModelResults(OTHER_IMAGES, other_images, num_parameters),
            ModelResults(MOST_FREQUENT, score_answers(rows, most_frequent_answers(rows))),
        ],
        saved_model=AFTER,
        dataset=args.describe_source(", ".join(args.tasks or TASKS)),
        base_model=name or args.preset,
        samples=[predictions[index] for index in shown],
        **describe_training(trainer, splits, max_target_length=args.max_target_length),
    )
    images = [read_images(find_images(test[index]), f"row {index}") for index in shown]
    save_run(
        trainer,
        trainer.args.generation_config,
        results,
        predictions,
        contact_sheet=draw_contact_sheet(results.samples, images),
    )
    return results


def _load_model(args):
    name = args.model_name_or_path
    # Half-precision weights would lose most updates to rounding; `bf16` computes with float32 weights.
    model, processor = load_checkpoint(
        name, revision=args.model_revision, dtype=torch.float32, adapter="train", family_only=True
    )
    if not has_vision(model):
        raise ValueError(f"{name!r} is a text model, but rows have images. Give a vision-text model of this family.")
    if processor is None:
        raise ValueError(f"{name!r} has no processor. Save the processor of the model into the same folder.")
    return model, processor


def _freeze(model, names):
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    encoder = model.model.encoder
    parts = {name: getattr(encoder, name) for name in ("vision_tower", "multi_modal_projector", "text_model")}
    parts["decoder"] = model.model.decoder
    for name in names:
        if name not in parts:
            raise ValueError(f"`frozen_parts` has {name!r}, but must only have {', '.join(parts)}.")
        parts[name].requires_grad_(False)


def _measure(trainer, rows):
    """Return the loss and the exact answers of each task in percent, and the completions."""
    output = predict(trainer, rows)
    completions = decode(trainer.processing_class.tokenizer, output.predictions, len(rows))
    return {"loss": loss_metric(output.metrics["test_loss"]), **score_answers(rows, completions)}, completions


def score_answers(rows: Dataset, completions: Sequence[str]) -> dict[str, Metric]:
    """Return the share of exact answers of each task, in percent.

    Args:
        rows ([`~datasets.Dataset`]): With the columns `task` and `answer`.
        completions (`Sequence[str]`): One for each row.
    """
    tasks, answers = rows["task"], rows["answer"]
    names = {task: f"exact, {task}" for task in dict.fromkeys(tasks)}
    scores = [
        {**dict.fromkeys(names.values()), names[task]: float(completion.strip() == answer.strip())}
        for task, answer, completion in zip(tasks, answers, completions, strict=True)
    ]
    return mean_with_interval(scores, confidence=CONFIDENCE)


def most_frequent_answers(rows: Dataset) -> list[str]:
    """Return for each row the most frequent answer of its task."""
    counts = {}
    for task, answer in zip(rows["task"], rows["answer"], strict=True):
        counts.setdefault(task, Counter())[answer.strip()] += 1
    return [counts[task].most_common(1)[0][0] for task in rows["task"]]


def choose_rows(tasks: Sequence[str], num_rows: int) -> list[int]:
    """Return up to `num_rows` indices that alternate between tasks and are evenly spaced within each task."""
    indices: Mapping[str, list[int]] = {}
    for index, task in enumerate(tasks):
        indices.setdefault(task, []).append(index)
    rows_per_task = -(-num_rows // len(indices))
    spread = [task[k * len(task) // rows_per_task] for k in range(rows_per_task) for task in indices.values()]
    return list(dict.fromkeys(spread))[:num_rows]

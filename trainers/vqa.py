# SPDX-License-Identifier: Apache-2.0
"""Trains a vision-text model to answer questions about images, and measures each task on held-out images."""

import copy
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from ..checkpoint_folders import first_line
from ..configuration import load_preset
from ..configuration_encdec_vlm import EncDecVLMConfig
from ..image_processing_encdec_vlm import EncDecVLMImageProcessor
from ..modeling_encdec_vlm import EncDecVLMForConditionalGeneration
from ..processing_encdec_vlm import IMAGE_TOKEN, EncDecVLMProcessor
from .run_reports import (
    checkpoint_to_resume,
    show_losses,
    validation_losses,
    versions,
    write_file,
    write_run_files,
)
from .seq2seq_data import TOKENIZER_ROWS, train_tokenizer
from .vision_data import VisionTextCollator, load_vqa_splits, row_images, with_other_images
from .vqa_reports import contact_sheet, shown_places, task_table


logger = logging.getLogger(__name__)

# Images and text in the order they have in a message, as in training: images first, then the question.
CHAT_TEMPLATE = """\
{%- for message in messages if message['role'] == 'user' -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for block in message['content'] -%}
            {{- '<image>' if block['type'] == 'image' else block['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}"""
MAX_QUESTION_TOKENS = 512
STATISTICS_ROWS = 200
NUM_SHOWN = 10


@dataclass
class VqaArguments:
    """What [`train_vqa`] asks about, and what model it begins with.

    Args:
        tasks (`list[str]`, *optional*): Of [`~encdec_slm.trainers.tasks.visual.build_visual_tasks`], made on the spot.
            `None`, without a `dataset_name`, means all.
        num_train_rows (`list[int]`, *optional*, defaults to 5000 each): Of each of `tasks`; one number for them all.
        dataset_name (`str`, *optional*): A dataset of the Hub or a local folder, as `datasets.load_dataset` takes it,
            instead of `tasks`.
        dataset_config (`str`, *optional*): Its configuration.
        dataset_revision (`str`, *optional*): Its branch, tag or commit on the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Name of a split of `dataset_name`.
        dataset_validation_split (`str`, *optional*, defaults to `"validation"`): Held out of training if missing.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Held out of training if missing, or if its
            answers are withheld (`None`).
        image_column (`str`, *optional*, defaults to `"image"`): Column with an image, or a list of images.
        question_column (`str`, *optional*, defaults to `"question"`): Column with text.
        answer_column (`str`, *optional*, defaults to `"answer"`): Column with text, or a list of answers, as text or
            as a `dict` with `answer`; of a list the most frequent one counts.
        max_eval_samples (`int`, *optional*, defaults to 600): Rows of each held-out split, all tasks together.
        preset (`str`, *optional*, defaults to `"tiny-vlm"`): Size of a new model with vision; see
            [`~encdec_slm.configuration.list_presets`]. Not read when there is a `model_name_or_path`.
        vocab_size (`int`, *optional*, defaults to 320): Upper bound for the tokenizer of a new model.
        model_name_or_path (`str`, *optional*): A checkpoint of this family to begin with. `None` begins with new
            weights and a tokenizer trained on the training questions and answers.
        model_revision (`str`, *optional*): Its branch, tag or commit on the Hub.
        frozen_parts (`list[str]`, *optional*): Parts whose weights stay: `vision_tower`, `multi_modal_projector`,
            `text_model` (the encoder with the embeddings) and `decoder`. `None` trains all.
        max_target_length (`int`, *optional*, defaults to 24): Of answers, in tokens; also bounds what is generated.

    Raises:
        ValueError: Tasks and a dataset are both named.
    """

    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks that are made on the spot."})
    num_train_rows: list[int] = field(
        default_factory=lambda: [5000], metadata={"help": "Training rows of each of the tasks, or of every task."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset or local folder of data files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_validation_split: str = field(default="validation", metadata={"help": "Split for the loss curve."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split for the final numbers."})
    image_column: str = field(default="image", metadata={"help": "Column with an image or several."})
    question_column: str = field(default="question", metadata={"help": "Column that the encoder reads."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the answer or several."})
    max_eval_samples: int = field(default=600, metadata={"help": "Rows of each held-out split, all tasks together."})
    preset: str = field(default="tiny-vlm", metadata={"help": "Size of a new model."})
    vocab_size: int = field(default=320, metadata={"help": "Upper bound for a newly trained tokenizer."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint of this family."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    frozen_parts: list[str] | None = field(default=None, metadata={"help": "Parts whose weights stay."})
    max_target_length: int = field(default=24, metadata={"help": "Longest answer, in tokens."})

    def __post_init__(self):
        if self.tasks is not None and self.dataset_name is not None:
            raise ValueError(
                f"`tasks` is {self.tasks} and `dataset_name` is {self.dataset_name!r}, but rows come from one place. "
                "Leave one of them out."
            )


def train_vqa(args: VqaArguments, training_args: Seq2SeqTrainingArguments) -> dict[str, Any]:
    """Trains, saves model and processor to `training_args.output_dir`, and measures held-out rows before and after.

    Beside them are written `results.json` (what is returned), `predictions.jsonl`, `loss.png` and
    `contact_sheet.png`: ten held-out images with their questions, answers and what the model says.

    Args:
        args ([`VqaArguments`]): Data and size.
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): The run. `predict_with_generate` is on,
            `remove_unused_columns` off, and `generation_max_length` follows `max_target_length` in any case.
            `resume_from_checkpoint: "true"` goes on from the last checkpoint in the folder.

    Returns:
        `dict`: `tasks`: for each of them `rows`, and in percent `before` and `after` (answers that are exactly
        right), `most_frequent` (what the one best answer to all questions would earn) and `other_images` (what the
        trained model earns when it sees the images of other rows: what questions alone give away). Also losses,
        sizes, seconds, versions and `samples`.

    Raises:
        ValueError: The data or the sizes do not fit; the message says what to change.
        TypeError: A question or an answer is no text.
    """
    set_seed(training_args.seed)
    splits = load_vqa_splits(args, training_args.seed)
    processor, model = _load_checkpoint(args) if args.model_name_or_path else _new_model(args, splits["train"])
    _freeze(model, args.frozen_parts or [])
    trainer = _make_trainer(args, training_args, model, processor, splits)
    logger.info(f"{model.num_parameters():,} parameters, {len(splits['train']):,} training rows.")

    before = _measure(trainer, splits["test"], "before training")
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    train_seconds = time.perf_counter() - started
    after = _measure(trainer, splits["test"], "after training")
    other_images = _measure(trainer, with_other_images(splits["test"]), "about images of other rows")

    predictions = [
        {"task": row["task"], "question": row["question"], "answer": row["answer"], "prediction": prediction}
        for row, prediction in zip(splits["test"].remove_columns("image"), after[1], strict=True)
    ]
    shown = shown_places(splits["test"]["task"], NUM_SHOWN)
    results = {
        "model": args.model_name_or_path or args.preset,
        "num_parameters": model.num_parameters(),
        "vocab_size": len(processor.tokenizer),
        "tasks": task_table(splits["test"], before[1], after[1], other_images[1]),
        "loss": {"before": before[0], "after": after[0]},
        "validation": validation_losses(trainer.state.log_history),
        "train_steps": trainer.state.global_step,
        "train_seconds": round(train_seconds, 1),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "device": str(trainer.args.device),
        "versions": versions(),
        "samples": [predictions[place] for place in shown],
    }
    _save(trainer, results, predictions, splits["test"].select(shown))
    return results


def _freeze(model, names):
    encoder = model.model.encoder
    parts = {name: getattr(encoder, name) for name in ("vision_tower", "multi_modal_projector", "text_model")}
    parts["decoder"] = model.model.decoder
    for name in names:
        if name not in parts:
            raise ValueError(f"`frozen_parts` has {name!r}, but the parts are {', '.join(parts)}. Name some of these.")
        parts[name].requires_grad_(False)


def _new_model(args, rows):
    """A tokenizer trained on the training questions and answers, and random weights that fit it."""
    preset = load_preset(args.preset)
    if not isinstance(preset, EncDecVLMConfig):
        raise ValueError(
            f"`preset` {args.preset!r} is a text model, but images need a vision tower. Take one with `vlm` in its "
            "name, such as 'tiny-vlm'."
        )
    tokenizer = train_tokenizer(_texts(rows), args.vocab_size, MAX_QUESTION_TOKENS)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    config = _fitted(preset, tokenizer)
    processor = new_processor(config, tokenizer, **_pixel_statistics(rows))
    return processor, EncDecVLMForConditionalGeneration(config)


def _pixel_statistics(rows):
    """Mean and deviation of each colour in training images: by those of photographs, white paper is far from 0."""
    rows = rows.select_columns(["image", "question"]).take(STATISTICS_ROWS)
    pixels = [_some_pixels(image) for row in rows for image in row_images(row)]
    if not pixels:
        return {}
    mean = np.mean([image.mean(0) for image in pixels], axis=0)
    deviation = np.mean([((image - mean) ** 2).mean(0) for image in pixels], axis=0) ** 0.5
    return {"image_mean": mean.tolist(), "image_std": np.maximum(deviation, 0.01).tolist()}


def _some_pixels(image):
    """Colours from 0 to 1 of an even choice of pixels: photographs have millions."""
    step = max(1, min(image.size) // 64)
    return np.asarray(image)[::step, ::step].reshape(-1, 3) / 255


def _texts(rows: Dataset) -> Iterable[str]:
    for row in rows.select_columns(["question", "answer"]).take(TOKENIZER_ROWS):
        yield from (row["question"], row["answer"])


def _fitted(preset, tokenizer):
    fields = preset.to_dict()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.bos_token_id}
    fields["text_config"] |= {**ids, "vocab_size": len(tokenizer)}
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return EncDecVLMConfig.from_dict(fields)


def new_processor(
    config: EncDecVLMConfig, tokenizer: PreTrainedTokenizerBase, **kwargs: list[float]
) -> EncDecVLMProcessor:
    """The processor of a model: tiles and patches as its config has them, and questions without any prompt around.

    Args:
        config ([`EncDecVLMConfig`]): Of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Has `<image>` as an added token.
        **kwargs: `image_mean` and `image_std`, three numbers each; CLIP's where they are left out.
    """
    image_processor = EncDecVLMImageProcessor.from_config(config, **kwargs)
    return EncDecVLMProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def _load_checkpoint(args):
    name, options = args.model_name_or_path, {"revision": args.model_revision}
    try:
        processor = EncDecVLMProcessor.from_pretrained(name, **options)
        return processor, EncDecVLMForConditionalGeneration.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path` {name!r} could not be loaded ({first_line(error)}). Give a folder with a "
            "vision-text model of this family, or the name of one on the Hub."
        ) from error


def _make_trainer(args, training_args, model, processor, splits):
    training_args = copy.copy(training_args)
    training_args.predict_with_generate = True
    training_args.remove_unused_columns = False
    # The start token counts; without a bound, an untrained model would write on to its longest position.
    training_args.generation_max_length = args.max_target_length + 1
    start = model.generation_config.decoder_start_token_id
    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        data_collator=VisionTextCollator(processor, args.max_target_length, decoder_start_token_id=start),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
    )
    show_losses(trainer)
    return trainer


def _measure(trainer, rows, when):
    """Loss in nats per token on held-out rows, and what the model answers to each of them."""
    logger.info(f"Answering {len(rows)} held-out questions, {when}:")
    output = trainer.predict(rows)
    tokenizer = trainer.processing_class.tokenizer
    predicted_ids = np.where(output.predictions < 0, tokenizer.pad_token_id, output.predictions)
    texts = tokenizer.batch_decode(predicted_ids, skip_special_tokens=True)
    return round(float(output.metrics["test_loss"]), 4), [text.strip() for text in texts]


def _save(trainer, results, predictions, shown):
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    rows = [{"image": row_images(row), **said} for row, said in zip(shown, results["samples"], strict=True)]
    figure = contact_sheet(rows)
    write_file(folder / "contact_sheet.png", lambda path: figure.savefig(path, format="png"))
    write_run_files(folder, trainer.state.log_history, results, predictions)

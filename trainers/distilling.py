# SPDX-License-Identifier: Apache-2.0
"""The whole story of a distillation: a teacher, a student that learns from it, and one that learns from data alone."""

import copy
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from ..adaptation import from_decoder_only
from ..generation_speed import compare_speed
from ..modeling_encdec_slm import EncDecSLMForConditionalGeneration
from .decoder_only_training import train_decoder_only, train_seconds_of
from .distillation_config import Seq2SeqDistillationConfig
from .distillation_data import as_prompts, collate
from .distillation_models import load_teacher, load_teacher_processing_class
from .distillation_trainer import Seq2SeqDistillationTrainer
from .new_models import preset_config
from .resuming import last_complete_checkpoint
from .row_encoding import encode_rows
from .run_reports import (
    first_lines,
    held_out_texts,
    score_beside_other_rows,
    show_losses,
    versions,
    write_run_files,
)
from .seq2seq_data import DataArguments, load_splits


logger = logging.getLogger(__name__)

# Batch-1 runs per model for the two speeds, and tokens of each.
NUM_TIMED_SOURCES, NUM_TIMED_TOKENS = 20, 32
SETTINGS_OF_THE_TEACHER = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "adam_beta2", "max_grad_norm", "label_smoothing_factor", "logging_steps", "seed", "bf16"),
    *("use_cpu", "disable_tqdm", "dataloader_pin_memory"),
    *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
)


@dataclass
class DistillArguments(DataArguments):
    """What [`distill`] trains on, and what models it begins with.

    Args: those of [`~encdec_slm.trainers.seq2seq_data.DataArguments`], and
        model_name_or_path (`str`, *optional*): A student to begin with. `None` begins with new weights.
        preset (`str`, *optional*, defaults to `"1m"`): Size of a new student; see
            [`~encdec_slm.configuration.list_presets`].
        student_from_teacher (`bool`, *optional*, defaults to `False`): Begin a new student with two thirds of the
            teacher's layers in the encoder and one third in the decoder, by
            [`~encdec_slm.adaptation.from_decoder_only`]; `preset` is not read then.
        vocab_size (`int`, *optional*, defaults to 4096): Upper bound for the tokenizer of a new teacher.
        teacher_preset (`str`, *optional*): Train a new teacher first, the decoder-only twin of this preset. Not read
            when the recipe has `teacher_model_name_or_path`, whose tokenizer a new student gets too.
        teacher_num_train_epochs (`float`, *optional*, defaults to 3.0): Of a new teacher.
        teacher_learning_rate (`float`, *optional*, defaults to 1e-3): Of a new teacher.
        use_chat_template (`bool`, *optional*, defaults to `True`): Give the teacher each source as a message of the
            user, in its chat template if it has one. `False` gives it the plain text.
        compare_with_cross_entropy (`bool`, *optional*, defaults to `True`): Train the same student without its
            teacher too, for as many steps on the same rows.

    Raises:
        ValueError: Two sources of data are named.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student to begin with."})
    preset: str = field(default="1m", metadata={"help": "Size of a new student."})
    student_from_teacher: bool = field(default=False, metadata={"help": "Cut a new student from its teacher."})
    vocab_size: int = field(default=4096, metadata={"help": "Upper bound for a newly trained tokenizer."})
    teacher_preset: str | None = field(default=None, metadata={"help": "Train a new teacher, the twin of a preset."})
    teacher_num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs of a new teacher."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of a new teacher."})
    use_chat_template: bool = field(default=True, metadata={"help": "Give the teacher messages, if it takes them."})
    compare_with_cross_entropy: bool = field(default=True, metadata={"help": "Train a student without teacher too."})


def distill(args: DistillArguments, training_args: Seq2SeqDistillationConfig) -> dict[str, Any]:
    """Trains and saves a student, and compares it on held-out rows with its teacher and with one without a teacher.

    The student, its tokenizer, card, `results.json` (what is returned), `predictions.jsonl` and `loss.png` are written
    to `training_args.output_dir`; a new teacher and the student without a teacher to folders of the same name with
    `_teacher` and `_cross_entropy` behind it. `resume_from_checkpoint: "true"` goes on where a run was stopped.

    Args:
        args ([`DistillArguments`]): Data and models.
        training_args ([`Seq2SeqDistillationConfig`]): The distillation; `predict_with_generate` is on in any case.

    Returns:
        `dict`: `models` (a list of `name`, `num_parameters`, `loss` in nats per token, `rougeL`, `rougeL_other_rows`,
        `exact` and `teacher_agreement` in percent, `first_token_seconds`, `tokens_per_second`, `train_seconds`),
        `samples`, versions and settings.

    Raises:
        ValueError: The data or the models do not fit; the message says what to change.
    """
    training_args = copy.copy(training_args)
    training_args.predict_with_generate = True
    resumes = str(training_args.resume_from_checkpoint).lower() == "true"
    splits = load_splits(args, training_args.seed)
    teacher, teacher_tokenizer, teacher_seconds = _teacher(args, training_args, splits, resumes)
    tokenizer = _student_tokenizer(args, teacher_tokenizer)
    is_chat = args.use_chat_template and teacher_tokenizer.chat_template is not None
    splits = {split: as_prompts(dataset, is_chat) for split, dataset in splits.items()}

    def student(name, **settings):
        trainer = _trainer(args, training_args, settings, teacher, tokenizer, teacher_tokenizer, splits)
        seconds = _train(trainer, name, resumes)
        scores, predictions = _student_scores(trainer, splits["test"])
        return trainer, {"name": name, **scores, "train_seconds": seconds}, predictions

    trainer, scores, predictions = student("distilled student")
    rows = [{"name": "teacher", **_teacher_scores(trainer, splits["test"]), "train_seconds": teacher_seconds}, scores]
    models = [trainer.teacher_model, trainer.model]
    if args.compare_with_cross_entropy:
        folder = f"{training_args.output_dir}_cross_entropy"
        alone, scores, _ = student("student without teacher", output_dir=folder, kd_ratio=0.0, seq_kd=False)
        alone.save_model()
        models.append(alone.model)
        rows.append(scores)
    _add_speeds(rows, models, trainer, splits["test"])
    results = {
        "models": rows,
        "train_steps": trainer.state.global_step,
        "train_rows": None if isinstance(splits["train"], IterableDataset) else len(splits["train"]),
        "device": str(trainer.args.device),
        "versions": versions(),
        "samples": predictions[:3],
    }
    _save(trainer, results, predictions, args.dataset_name)
    return results


# The teacher


def _teacher(args, training_args, splits, resumes):
    """A teacher, its tokenizer, and the seconds of its training, which is `None` for one that is not ours."""
    if args.teacher_preset is None or training_args.teacher_model_name_or_path is not None:
        teacher, location = load_teacher(None, training_args)
        return teacher, load_teacher_processing_class(teacher, location, training_args), None
    folder = f"{training_args.output_dir}_teacher"
    seconds = train_seconds_of(folder) if resumes else None
    if seconds is None:
        teacher_args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.teacher_num_train_epochs,
            learning_rate=args.teacher_learning_rate,
            report_to=[],
            **{name: getattr(training_args, name) for name in SETTINGS_OF_THE_TEACHER},
        )
        bounds = (training_args.max_source_length, training_args.max_completion_length)
        seconds = train_decoder_only(args.teacher_preset, args.vocab_size, splits["train"], teacher_args, *bounds)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), seconds


# The students


def _student_tokenizer(args, teacher_tokenizer):
    if args.model_name_or_path is not None:
        return AutoTokenizer.from_pretrained(args.model_name_or_path)
    tokenizer = copy.deepcopy(teacher_tokenizer)
    tokenizer.chat_template = None  # the student reads plain text
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _trainer(args, training_args, settings, teacher, tokenizer, teacher_tokenizer, splits):
    # The teacher is loaded already.
    loaded = dict.fromkeys(name for name in vars(training_args) if name.startswith("teacher_model_"))
    training_args = replace(training_args, **loaded, **settings)
    set_seed(training_args.seed)
    if args.model_name_or_path is None and args.student_from_teacher:
        student = from_decoder_only(teacher, tokenizer=tokenizer)
    elif args.model_name_or_path is None:
        student = EncDecSLMForConditionalGeneration(preset_config(args.preset, tokenizer))
    else:
        # Half-precision weights would lose most updates in rounding; `bf16` computes in it over weights that do not.
        student = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    # Whoever loads the student finds it writing as it was evaluated; the start token counts.
    writing = {"max_length": training_args.max_completion_length + 1, **(training_args.generation_kwargs or {})}
    student.generation_config.update(**writing)
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )
    show_losses(trainer)
    return trainer


def _train(trainer, name, resumes):
    """Seconds of the training."""
    num_trained = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    logger.info(f"Training the {name}: {num_trained:,} parameters.")
    checkpoint = last_complete_checkpoint(trainer.args.output_dir) if resumes else None
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return round(time.perf_counter() - started, 1)


# Held-out rows


def _student_scores(trainer, test):
    """Numbers on held-out rows, and what the student wrote for each of them."""
    output = trainer.predict(test)
    sources = [prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in test["prompt"]]
    text_scores, rows = held_out_texts(trainer.processing_class, output.predictions, sources, test["completion"])
    scores = {"num_parameters": trainer.model.num_parameters(), "loss": output.metrics["test_ce_loss"]}
    return {**scores, "teacher_agreement": 100 * output.metrics["test_teacher_agreement"], **text_scores}, rows


@torch.no_grad()
def _teacher_scores(trainer, test):
    """The same numbers of the teacher, which agrees with itself."""
    teacher, tokenizer = trainer.teacher_model, trainer.teacher_processing_class
    encoded = encode_rows(test, trainer.row_encoder, "test data")
    total_loss, num_tokens, predictions = 0.0, 0, []
    for start in range(0, len(encoded), trainer.args.eval_batch_size):
        rows = encoded.select(range(start, min(start + trainer.args.eval_batch_size, len(encoded)))).to_list()
        targets = [row["target_ids"] for row in rows]
        pad_token_id, teacher_token_ids = trainer.processing_class.pad_token_id, trainer.teacher_token_ids
        batch = collate(rows, targets, None, pad_token_id, teacher_token_ids=teacher_token_ids)
        batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        ids, mask = batch["teacher_ids"], batch["teacher_mask"]
        is_source = torch.arange(ids.shape[1], device=ids.device) < batch["teacher_source_lengths"][:, None]
        labels = ids.masked_fill(is_source | (mask == 0), -100)
        count = int(batch["target_mask"].sum())
        total_loss += count * teacher(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        num_tokens += count
        predictions += tokenizer.batch_decode(trainer.generate_as_teacher(rows), skip_special_tokens=True)
    scores = {"num_parameters": teacher.num_parameters(), "loss": total_loss / num_tokens, "teacher_agreement": 100.0}
    return {**scores, **score_beside_other_rows([text.strip() for text in predictions], test["completion"])}


def _add_speeds(rows, models, trainer, test):
    encoded = encode_rows(test.select(range(min(NUM_TIMED_SOURCES, len(test)))), trainer.row_encoder, "timed rows")
    sources = [encoded["teacher_source_ids"][:], *[encoded["source_ids"][:]] * (len(models) - 1)]
    models = [trainer.accelerator.unwrap_model(model).eval() for model in models]
    for row, speed in zip(rows, compare_speed(list(zip(models, sources, strict=True)), NUM_TIMED_TOKENS), strict=True):
        row.update(speed)


def _save(trainer, results, predictions, dataset_name):
    trainer.save_model()
    trainer.create_model_card(dataset_name=dataset_name)
    if trainer.is_world_process_zero():
        write_run_files(Path(trainer.args.output_dir), trainer.state.log_history, results, predictions)


def report(results: dict[str, Any], folder: str) -> str:
    """For a screen: one table, what it says about the teacher's worth, and three samples.

    Args:
        results (`dict`): Of [`distill`].
        folder (`str`): Where the run has saved them.
    """
    models = results["models"]
    columns = {
        "loss (nats)": lambda row: f"{row['loss']:.3f}",
        "ROUGE-L": lambda row: f"{row['rougeL']:.1f} ({row['rougeL_other_rows']:.1f})",
        "agreement": lambda row: f"{row['teacher_agreement']:.1f} %",
        "parameters": lambda row: f"{row['num_parameters'] / 1e6:.2f}M",
        "first token": lambda row: f"{1e3 * row['first_token_seconds']:.1f} ms",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        "training": lambda row: "-" if row["train_seconds"] is None else f"{row['train_seconds']:.0f} s",
    }
    lines = ["", f"{'held-out rows':24}" + "".join(f"{name:>14}" for name in columns)]
    lines += [f"{row['name']:24}" + "".join(f"{show(row):>14}" for show in columns.values()) for row in models]
    lines += [
        "",
        "In brackets: ROUGE-L of the same texts beside other rows' references, which form alone earns.",
    ]
    if len(models) == 3:
        lines.append(_verdict(models[1], models[2], results["train_steps"]))
    for sample in results["samples"]:
        lines += ["", first_lines(sample["source"]), f"  reference: {sample['reference']}"]
        lines += [f"  distilled: {sample['prediction']}"]
    lines += ["", f"Saved to {folder}: the distilled student, results.json, predictions.jsonl and loss.png."]
    return "\n".join(lines)


def _verdict(distilled, alone, num_steps):
    """Whether the teacher was worth it, number by number."""
    better = {
        "loss": distilled["loss"] < alone["loss"],
        "ROUGE-L": distilled["rougeL"] > alone["rougeL"],
        "agreement with the teacher": distilled["teacher_agreement"] > alone["teacher_agreement"],
    }
    won = [name for name, is_better in better.items() if is_better]
    lost = [name for name, is_better in better.items() if not is_better]
    text = f"After {num_steps:,} steps each on the same rows, distillation "
    if won:
        text += f"wins in {', '.join(won)}"
    if lost:
        text += f"{' and ' if won else ''}does NOT win in {', '.join(lost)}"
    return text + "."

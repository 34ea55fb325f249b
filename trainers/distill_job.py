# SPDX-License-Identifier: Apache-2.0
"""Train a teacher, a distilled student and a cross-entropy baseline, and compare them on held-out rows."""

import copy
import itertools
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from ..adaptation import from_decoder_only
from ..checkpoints import find_source_folders, load_checkpoint
from ..generation_speed import compare_speed
from ..run_results import Metric, ModelResults, RunResults
from ..vocabulary import describe_embeddings, report_trim
from .cached_labels import CachedTeacher
from .decoder_only_job import KIND as TEACHER_KIND
from .decoder_only_job import train_decoder_only
from .distillation_config import Seq2SeqDistillationConfig
from .distillation_data import as_prompts, collate
from .distillation_models import load_teacher, load_teacher_cache, load_teacher_processing_class
from .distillation_trainer import Seq2SeqDistillationTrainer
from .jobs import (
    decode,
    describe_training,
    loss_metric,
    save_run,
    set_generation_config,
    show_losses,
    text_metrics,
    train,
)
from .muon import build_optimizer, check_optimizer
from .new_models import TOKENIZER_ROWS, build_model, train_tokenizer
from .resuming import (
    check_output_dir,
    contains_checkpoint,
    find_checkpoint,
    has_unfinished_run,
    is_resumed,
    last_complete_checkpoint,
    load_results,
)
from .row_encoding import LABELS_PADDING, encode_rows, iterate_texts
from .seq2seq_data import DataArguments, load_splits
from .vocabulary import trim_to_rows


logger = logging.getLogger(__name__)

TEACHER, STUDENT, BASELINE = "teacher", "distilled student", "student without teacher"


class Stage(NamedTuple):
    """Kind of a run in its results, and what is appended to the output folder."""

    kind: str
    suffix: str


STAGES = {
    TEACHER: Stage(TEACHER_KIND, "_teacher"),
    STUDENT: Stage("distillation", ""),
    BASELINE: Stage("cross-entropy baseline", "_cross_entropy"),
}
# Batch-1 generations per model for the two speeds, and new tokens of each.
NUM_TIMED_SOURCES, NUM_TIMED_TOKENS = 20, 32
# Of a new tokenizer, if `max_source_length` is not set.
MAX_SOURCE_LENGTH = 512
TEACHER_SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "adam_beta2", "max_grad_norm", "label_smoothing_factor", "logging_steps", "seed", "bf16"),
    *("use_cpu", "disable_tqdm", "dataloader_pin_memory", "save_strategy", "save_steps", "save_total_limit"),
)


@dataclass
class DistillArguments(DataArguments):
    """Data and models of a distillation run.

    Args: those of [`~encdec_slm.trainers.seq2seq_data.DataArguments`], and
        model_name_or_path (`str`, *optional*): Student to start from, which may be a LoRA adapter. `None` builds a new
            model.
        preset (`str`, *optional*, defaults to `"1m"`): Size of a new student; see
            [`~encdec_slm.configuration.list_presets`].
        student_architecture (`str`, *optional*, defaults to `"encdec_slm"`): Of a new student; `"t5"` builds a T5 of
            the preset's sizes, for llama.cpp.
        student_from_teacher (`bool`, *optional*, defaults to `False`): Initialize a new student with the teacher's
            layers, two thirds in the encoder and one third in the decoder, by
            [`~encdec_slm.adaptation.from_decoder_only`], instead of `preset`.
        trim_vocabulary (`bool`, *optional*, defaults to `False`): Give a new student only the teacher's tokens that
            the training rows use, by [`~encdec_slm.vocabulary.trim_tokenizer`].
        trimmed_vocabulary_size (`int`, *optional*): Keep only the most frequent of them.
        vocab_size (`int`, *optional*, defaults to 4096): Upper bound for a new tokenizer: that of a new teacher, or of
            a new student if a teacher cache has none.
        teacher_preset (`str`, *optional*): Train a new teacher first, the decoder-only baseline of this preset. Not
            used with `teacher_model_name_or_path` or `teacher_cache`, whose tokenizer a new student gets too.
        teacher_num_train_epochs (`float`, *optional*, defaults to 3.0): Of a new teacher.
        teacher_learning_rate (`float`, *optional*, defaults to 1e-3): Of a new teacher.
        use_chat_template (`bool`, *optional*, defaults to `True`): Give the teacher each source as a message of the
            user, if it has a chat template. `False` gives it the plain text.
        teacher_prompt_template (`str`, *optional*): Jinja template of what the teacher reads instead of the source: a
            text with `{{`, or the path of a file. Its fields are the columns of the data, as in
            [`~encdec_slm.trainers.prompt_templates.load_prompt_template`].
        optimizer (`str`, *optional*, defaults to `"adamw"`): Of the student; or `"muon"`, see
            [`~encdec_slm.trainers.muon.MuonWithAdamW`].
        compare_with_cross_entropy (`bool`, *optional*, defaults to `True`): Also train the same student without the
            teacher, for the same steps and rows.

    Raises:
        ValueError: The vocabulary of a student that is not new would be trimmed, or `trimmed_vocabulary_size` is given
            without `trim_vocabulary`.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student to start from."})
    preset: str = field(default="1m", metadata={"help": "Size of a new student."})
    student_architecture: str = field(default="encdec_slm", metadata={"help": "Of a new student, or t5."})
    student_from_teacher: bool = field(default=False, metadata={"help": "Initialize a new student from its teacher."})
    trim_vocabulary: bool = field(default=False, metadata={"help": "Keep only the teacher's tokens that rows use."})
    trimmed_vocabulary_size: int | None = field(default=None, metadata={"help": "Most tokens to keep then."})
    vocab_size: int = field(default=4096, metadata={"help": "Upper bound for a newly trained tokenizer."})
    teacher_preset: str | None = field(default=None, metadata={"help": "Train a new teacher of this preset's size."})
    teacher_num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs of a new teacher."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of a new teacher."})
    use_chat_template: bool = field(default=True, metadata={"help": "Use the teacher's chat template, if it has one."})
    teacher_prompt_template: str | None = field(default=None, metadata={"help": "Jinja text or file, with columns."})
    optimizer: str = field(default="adamw", metadata={"help": "Of the student: adamw or muon."})
    compare_with_cross_entropy: bool = field(default=True, metadata={"help": "Also train a student without teacher."})

    def __post_init__(self):
        super().__post_init__()
        check_optimizer(self.optimizer)
        if self.trim_vocabulary and self.model_name_or_path is not None:
            raise ValueError(
                "`trim_vocabulary` is for a new student, but `model_name_or_path` is given. Trim its vocabulary by "
                "`encdec-slm adapt --trim-vocabulary` when it is made."
            )
        if self.trimmed_vocabulary_size is not None and not self.trim_vocabulary:
            raise ValueError("`trimmed_vocabulary_size` requires `trim_vocabulary=True`.")


def distill(args: DistillArguments, training_args: Seq2SeqDistillationConfig) -> RunResults:
    """Train and save a student, and compare it with its teacher and with a student that was trained without it.

    The student, its tokenizer and the results are saved to `training_args.output_dir`; a new teacher and the baseline
    to folders of the same name with `_teacher` and `_cross_entropy` appended.

    Args:
        args ([`DistillArguments`]): Data and models.
        training_args ([`Seq2SeqDistillationConfig`]): The distillation. `resume_from_checkpoint` is `"true"` to
            continue each of the three trainings from its last complete checkpoint, or the path of a checkpoint in one
            of the three folders, to continue that training from there and the others likewise.

    Returns:
        [`~encdec_slm.run_results.RunResults`]: `"teacher"`, `"distilled student"` and `"student without teacher"`,
        each with loss, ROUGE-L, exact matches, agreement with the teacher, speeds and training time. With a
        `teacher_cache`, no teacher is loaded or measured.

    Raises:
        ValueError: Data, models or output folders do not fit, or there is no checkpoint to continue from.
    """
    checkpoints = _prepare_stages(args, training_args)
    training_args = copy.copy(training_args)
    training_args.predict_with_generate = True
    cache = load_teacher_cache(None, None, training_args)
    if cache is not None:
        _check_cache_settings(args)
    splits = load_splits(args, training_args.seed, args.teacher_prompt_template, cache)
    teacher = _load_or_train_teacher(args, training_args, splits, checkpoints, cache)
    is_chat = teacher.model is not None and args.use_chat_template and teacher.tokenizer.chat_template is not None
    splits = {split: as_prompts(rows, is_chat) for split, rows in splits.items()}
    tokenizer = None
    if args.model_name_or_path is None:
        tokenizer = _build_student_tokenizer(args, training_args, teacher.tokenizer, splits)

    runs = {STUDENT: (training_args, splits["train"])}
    if args.compare_with_cross_entropy:
        settings = {"kd_ratio": 0.0, "seq_kd": False, "teacher_cache": None}
        run_args = replace(training_args, output_dir=_stage_folder(training_args, BASELINE), **settings)
        runs[BASELINE] = run_args, splits["train"] if cache is None else _load_gold_rows(args, training_args)
    students = []
    for name, (run_args, rows) in runs.items():
        trainer, generation_config = _build_trainer(args, run_args, teacher, tokenizer, {**splits, "train": rows})
        seconds = train(trainer, checkpoints[name])
        metrics, predictions = _measure_student(trainer, splits["test"])
        entry = ModelResults(name, metrics, trainer.model.num_parameters(), seconds)
        students.append(_Student(trainer, generation_config, entry, predictions))
    trainer = students[0].trainer
    entries, models = [student.entry for student in students], [student.trainer.model for student in students]
    if teacher.model is not None:
        metrics = _measure_teacher(trainer, splits["test"])
        entries.insert(0, ModelResults(TEACHER, metrics, teacher.model.num_parameters(), teacher.train_seconds))
        models.insert(0, trainer.teacher_model)
    _measure_speeds(entries, models, trainer, splits["test"])
    all_results = [_build_results(args, student, entries, splits, teacher.name) for student in students]
    for student, results in zip(students, all_results, strict=True):
        save_run(student.trainer, student.generation_config, results, student.predictions)
    return all_results[0]


# Folders and checkpoints


def _prepare_stages(args, training_args):
    """Check the output folders of all stages; return the checkpoint that each of them continues from, or `None`."""
    names, teacher_cache = [STUDENT], training_args.teacher_cache
    has_teacher = training_args.teacher_model_name_or_path is not None or teacher_cache is not None
    if args.teacher_preset is not None and not has_teacher:
        names.append(TEACHER)
    if args.compare_with_cross_entropy:
        names.append(BASELINE)
    folders = {name: _stage_folder(training_args, name) for name in names}
    checkpoints = _find_checkpoints(folders, training_args.resume_from_checkpoint)
    sources = find_source_folders(args.model_name_or_path)
    sources += find_source_folders(training_args.teacher_model_name_or_path)
    for name, folder in folders.items():
        read = [*sources, args.dataset_name, teacher_cache]
        check_output_dir(folder, STAGES[name].kind, checkpoints[name], read, args.data_files)
    return checkpoints


def _stage_folder(training_args, name):
    return f"{Path(training_args.output_dir)}{STAGES[name].suffix}"


def _find_checkpoints(folders, resume_from_checkpoint):
    if not is_resumed(resume_from_checkpoint):
        return dict.fromkeys(folders)
    checkpoints = {name: last_complete_checkpoint(folder) for name, folder in folders.items()}
    has_teacher = TEACHER in folders and _find_teacher(folders[TEACHER]) is not None
    if str(resume_from_checkpoint).lower() not in ("true", "auto"):
        checkpoint = find_checkpoint(folders[STUDENT], resume_from_checkpoint)
        owners = [name for name, folder in folders.items() if contains_checkpoint(folder, checkpoint)]
        checkpoints[owners[0] if owners else STUDENT] = checkpoint
    elif not has_teacher and not any(checkpoints.values()):
        find_checkpoint(folders[STUDENT], resume_from_checkpoint)  # raises for true
    if TEACHER in folders and not has_teacher and checkpoints[STUDENT] is not None:
        raise ValueError(
            f"The student would continue from {checkpoints[STUDENT]!r}, but there is no trained teacher in "
            f"{folders[TEACHER]!r}. Set `teacher_model_name_or_path` to the teacher that it was trained with."
        )
    for name, checkpoint in checkpoints.items():
        if checkpoint is None and not (name == TEACHER and has_teacher):
            logger.warning(f"There is no checkpoint of the {name} in {folders[name]}: its training starts anew.")
    return checkpoints


def _find_teacher(folder):
    """Return the results of a teacher that is trained to the end; `None` if there is none."""
    return None if has_unfinished_run(folder) else load_results(folder)


# Teacher


class _Teacher(NamedTuple):
    """A teacher and its tokenizer; without a model if there is a cache of its labels."""

    name: str
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    train_seconds: float | None = None


def _check_cache_settings(args):
    for name in ("student_from_teacher", "teacher_prompt_template"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}` needs the teacher itself, but `teacher_cache` has only its labels. Remove one of them."
            )


def _load_gold_rows(args, training_args):
    """Load the training rows without labels, for the baseline."""
    return as_prompts(load_splits(args, training_args.seed)["train"], is_chat=False)


def _load_or_train_teacher(args, training_args, splits, checkpoints, cache):
    if cache is not None:
        return _Teacher(cache.header.teacher, None, cache.load_tokenizer())
    if TEACHER not in checkpoints:
        teacher, location = load_teacher(None, training_args)
        if teacher is None:
            raise ValueError(
                "A teacher is required. Set `teacher_model_name_or_path`, `teacher_preset` or `teacher_cache`."
            )
        tokenizer = load_teacher_processing_class(teacher, location, training_args)
        return _Teacher(teacher.config._name_or_path, teacher, tokenizer)
    folder = _stage_folder(training_args, TEACHER)
    results = _find_teacher(folder) if is_resumed(training_args.resume_from_checkpoint) else None
    if results is None:
        teacher_args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.teacher_num_train_epochs,
            learning_rate=args.teacher_learning_rate,
            report_to=[],
            **{name: getattr(training_args, name) for name in TEACHER_SETTINGS},
        )
        lengths = (training_args.max_source_length, training_args.max_completion_length)
        results = train_decoder_only(
            args.teacher_preset, args.vocab_size, splits["train"], teacher_args, *lengths, checkpoints[TEACHER]
        )
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return _Teacher(teacher.config._name_or_path, teacher, tokenizer, results.saved.train_seconds)


@torch.no_grad()
def _measure_teacher(trainer, test):
    """Return the metrics of the teacher; without loss and agreement if it has another vocabulary than the student."""
    encoded = encode_rows(test, trainer.row_encoder, "test rows of the teacher")
    total_loss, num_tokens, ids = 0.0, 0, []
    for start in range(0, len(encoded), trainer.args.eval_batch_size):
        rows = encoded.select(range(start, min(start + trainer.args.eval_batch_size, len(encoded)))).to_list()
        ids += trainer.generate_as_teacher(rows)
        if trainer.num_common_tokens is not None:
            loss, count = _compute_teacher_loss(trainer, rows)
            total_loss, num_tokens = total_loss + loss * count, num_tokens + count
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    metrics = text_metrics([text.strip() for text in texts], test["completion"])
    if num_tokens == 0:
        return metrics
    loss, agreement = loss_metric(total_loss / num_tokens), Metric(100.0, unit="percent")
    return {"loss": loss, **metrics, "teacher_agreement": agreement}


def _compute_teacher_loss(trainer, rows):
    """Return the mean cross-entropy of the teacher on the targets of encoded rows, and their number of tokens."""
    targets, pad_token_id = [row["target_ids"] for row in rows], trainer.processing_class.pad_token_id
    batch = collate(rows, targets, None, pad_token_id, teacher_token_ids=trainer.teacher_token_ids)
    batch = {name: tensor.to(trainer.teacher_model.device) for name, tensor in batch.items()}
    input_ids, mask = batch["teacher_ids"], batch["teacher_mask"]
    is_source = torch.arange(input_ids.shape[1], device=mask.device) < batch["teacher_source_lengths"][:, None]
    labels = input_ids.masked_fill(is_source | (mask == 0), LABELS_PADDING)
    loss = trainer.teacher_model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.item()
    return loss, int(batch["target_mask"].sum())


# Students


class _Student(NamedTuple):
    trainer: Seq2SeqDistillationTrainer
    generation_config: GenerationConfig
    entry: ModelResults
    predictions: list[dict[str, str]]


def _build_trainer(args, training_args, teacher, tokenizer, splits):
    """Return the trainer of a student, and the generation config that is saved with it."""
    set_seed(training_args.seed)
    name = args.model_name_or_path
    if name is None:
        if args.student_from_teacher:
            student = from_decoder_only(teacher.model, tokenizer=tokenizer)
        else:
            student = build_model(args.preset, tokenizer, args.student_architecture)
    else:
        # Half-precision weights would lose most updates to rounding; `bf16` computes with float32 weights.
        student, tokenizer = load_checkpoint(name, dtype=torch.float32, adapter="train")
    settings = {"repetition_penalty": training_args.repetition_penalty, **(training_args.generation_kwargs or {})}
    length = training_args.max_completion_length
    generation_config = set_generation_config(student, length, settings, inherited_from=name)
    # The teacher is loaded already.
    loaded = dict.fromkeys(field for field in vars(training_args) if field.startswith("teacher_model_"))
    trainer = Seq2SeqDistillationTrainer(
        model=student,
        teacher_model=teacher.model,
        args=replace(training_args, **loaded),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        teacher_processing_class=teacher.tokenizer,
        optimizers=(build_optimizer(args.optimizer, student, training_args), None),
    )
    measured = trainer.greedy_generation_config
    ends = measured.eos_token_id
    generation_config.suppress_tokens = measured.suppress_tokens
    generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    show_losses(trainer)
    logger.info(f"Training a student with {student.num_parameters():,} parameters in {training_args.output_dir}.")
    if args.trim_vocabulary:
        logger.info(describe_embeddings(student, tokenizer))
    return trainer, generation_config


def _build_student_tokenizer(args, training_args, teacher_tokenizer, splits):
    """Copy the teacher's tokenizer for a new student; trim it to the training rows. Train one if there is none."""
    rows = splits["train"]
    if teacher_tokenizer is None:
        return _train_tokenizer(args, training_args, rows)
    tokenizer = copy.deepcopy(teacher_tokenizer)
    tokenizer.chat_template = None  # the student reads plain text
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not args.trim_vocabulary:
        return tokenizer
    if isinstance(rows, IterableDataset):  # as many as the run reads
        batch_size = training_args.train_batch_size * training_args.gradient_accumulation_steps
        rows = rows.take(training_args.max_steps * batch_size * training_args.world_size)
    names = ("the training text", "`trimmed_vocabulary_size`")
    trimmed = trim_to_rows(tokenizer, rows, args.trimmed_vocabulary_size, names)
    logger.info(f"Trimmed vocabulary: {report_trim(trimmed, tokenizer, iterate_texts(splits['test']))}")
    return trimmed


def _train_tokenizer(args, training_args, rows):
    if args.trim_vocabulary or training_args.kd_ratio > 0:
        name = "trim_vocabulary" if args.trim_vocabulary else "kd_ratio"
        raise ValueError(
            f"The teacher cache {training_args.teacher_cache!r} has no tokenizer, which `{name}` requires. Label with "
            "`--tokenizer`, or give a student with the teacher's tokenizer as `model_name_or_path`."
        )
    texts = iterate_texts(itertools.islice(rows, TOKENIZER_ROWS))
    return train_tokenizer(texts, args.vocab_size, training_args.max_source_length or MAX_SOURCE_LENGTH)


def _measure_student(trainer, test):
    """Return the metrics of a student on held-out rows, and its completions."""
    output = trainer.predict(test)
    completions = decode(trainer.processing_class, output.predictions, len(test))
    metrics = {"loss": loss_metric(output.metrics["test_ce_loss"]), **text_metrics(completions, test["completion"])}
    if (agreement := output.metrics.get("test_teacher_agreement")) is not None:
        metrics["teacher_agreement"] = Metric(round(100 * agreement, 2), unit="percent")
    sources = [prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in test["prompt"]]
    predictions = [
        {"source": source, "reference": reference, "prediction": completion}
        for source, reference, completion in zip(sources, test["completion"], completions, strict=True)
    ]
    return metrics, predictions


def _measure_speeds(entries, models, trainer, test):
    rows = test.select(range(min(NUM_TIMED_SOURCES, len(test))))
    encoded = encode_rows(rows, trainer.row_encoder, "timed rows")
    columns = ["teacher_source_ids" if entry.name == TEACHER else "source_ids" for entry in entries]
    sources = [encoded[column][:] for column in columns]
    models = [trainer.accelerator.unwrap_model(model).eval() for model in models]
    models = [model.get_base_model() if hasattr(model, "get_base_model") else model for model in models]
    speeds = compare_speed(list(zip(models, sources, strict=True)), NUM_TIMED_TOKENS)
    for entry, speed in zip(entries, speeds, strict=True):
        entry.first_token_seconds, entry.tokens_per_second = speed["first_token_seconds"], speed["tokens_per_second"]


# Results


def _build_results(args, student, entries, splits, teacher_name):
    trainer = student.trainer
    training_args = trainer.args
    return RunResults(
        kind=STAGES[student.entry.name].kind,
        task="docstrings" if args.is_docstring_task else "text",
        models=entries,
        saved_model=student.entry.name,
        dataset=args.describe_source(args.test_file or args.train_file or "docstrings"),
        base_model=args.model_name_or_path or ("layers of the teacher" if args.student_from_teacher else args.preset),
        teacher=teacher_name,
        objective=describe_objective(training_args),
        targets=describe_targets(training_args, trainer.cached_teacher),
        samples=student.predictions[:3],
        **describe_training(
            trainer,
            splits,
            max_source_length=training_args.max_source_length,
            max_completion_length=training_args.max_completion_length,
            optimizer=args.optimizer,
        ),
    )


def describe_targets(args: Seq2SeqDistillationConfig, cached_teacher: CachedTeacher | None = None) -> str:
    """Describe where the training targets come from, in a few words."""
    if cached_teacher is not None:
        is_given = cached_teacher.cache.header.completions is None
        return "from the data" if is_given else "generated by the teacher once, before the training"
    others = "generated by the teacher" if args.seq_kd else "from the data"
    if args.lmbda == 0 or args.kd_ratio == 0:
        return others
    student = f"generated by the student (temperature {args.temperature}, top-k {args.top_k or 'off'})"
    return student if args.lmbda == 1 else f"{student} in {args.lmbda:.0%} of the batches, otherwise {others}"


def describe_objective(args: Seq2SeqDistillationConfig) -> str:
    """Describe the training loss, such as "0.9 x forward KL at temperature 1 + 0.1 x cross-entropy"."""
    divergence = {0.0: "forward KL", 1.0: "reverse KL"}.get(args.beta, f"generalized JSD (beta {args.beta})")
    parts = []
    if args.kd_ratio > 0:
        parts.append(f"{args.kd_ratio:g} x {divergence} at temperature {args.kd_temperature:g}, times its square")
    if args.kd_ratio < 1:
        smoothing = f" with label smoothing {args.label_smoothing_factor:g}" if args.label_smoothing_factor else ""
        parts.append(f"{1 - args.kd_ratio:g} x cross-entropy on gold targets{smoothing}")
    return " + ".join(parts)

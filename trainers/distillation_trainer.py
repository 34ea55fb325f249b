# SPDX-License-Identifier: Apache-2.0
"""Distillation of a decoder-only teacher into an encoder-decoder student.

Private methods and attributes of TRL that are used here are listed in tests/test_trl_hooks.py, with a test for each.

B batch, S source, T target, N target tokens of a batch, D width, V vocabulary.
"""

import random
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import (
    EvalPrediction,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import EvalLoopOutput
from trl import DistillationTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from .cached_labels import LABEL_COLUMNS, CachedTeacher
from .distillation_config import Seq2SeqDistillationConfig
from .distillation_data import (
    ENCODED_COLUMNS,
    build_encoder,
    check_row_length,
    check_teacher_context,
    collate,
    to_lists,
    trim_padding,
)
from .distillation_logs import complete_card, describe_lengths, describe_rows, log_completion_table
from .distillation_losses import (
    COMPARISON_SUMS,
    ROW_SUMS,
    ObjectiveSettings,
    add_to_rows,
    distillation_objective,
    reduce_row_sums,
)
from .distillation_models import (
    build_generation_configs,
    check_args,
    check_roles,
    compare_vocabularies,
    get_tokenizer,
    load_processing_classes,
    load_student,
    load_teacher,
    load_teacher_cache,
)
from .output_heads import HeadReader
from .packing import assign_rows, check_packing, locate_rows, pack_ids
from .resuming import STATE_NAME, find_checkpoint, last_complete_checkpoint, refuse_non_finite_weights
from .row_encoding import LABELS_PADDING, encode_rows, pad_ids
from .teacher_cache import TeacherCache
from .token_alignment import NOT_COMPARED, AlignedTeacher, compute_aligned_ratio


NUM_LOGGED_COMPLETIONS = 8


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order depends on the epoch alone, so that a resumed run continues with the right rows."""

    def set_epoch(self, epoch: int) -> None:
        """Seed the order of an epoch."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class Seq2SeqDistillationTrainer(DistillationTrainer):
    """Distill a decoder-only teacher into an encoder-decoder student.

    The teacher reads source and target in one row; the student reads the source in its encoder and the target in its
    decoder. Distributions that predict the same target token are compared, including the end-of-text token. Targets
    come from the data, the teacher or the student: see [`Seq2SeqDistillationConfig`].

    Inherited from TRL's [`~trl.DistillationTrainer`]: one generation per optimizer step, batch buffering, distributed
    routing, PEFT and logging.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student. A string is a model or a
            LoRA adapter, whose training continues; it is loaded with `args.model_init_kwargs`, in float32 by default.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): A causal language
            model, or a decoder-only one that reads images such as LLaVA; it is neither trained nor saved. A string is
            a model or a LoRA adapter and is loaded with `args.teacher_model_init_kwargs`. `None` uses
            `args.teacher_model_name_or_path`; `kd_ratio=0` without `seq_kd` needs no teacher.
        args ([`Seq2SeqDistillationConfig`], *optional*): Settings of the run.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): Rows of `prompt` and
            `completion`, or of `source` and `target`, as text or as lists of messages. Messages are rendered by the
            chat template for the teacher and are plain text for a text student. Targets are required if the data
            provides them and if `kd_ratio < 1`. Rows may have a `teacher_prompt`, which the teacher reads instead of
            the prompt, and for a student with a processor `images` (a list) or `image`.
        eval_dataset (the same, or a `dict` of them, *optional*): Evaluated on the gold targets if there are any.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the student. `None` loads it from the folder of the student.
        callbacks (`list[TrainerCallback]`, *optional*): Added to those of the Trainer.
        optimizers (`tuple`, *optional*): Optimizer and scheduler, instead of those of `args`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): For a student given as a string.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapters to train instead of the student's weights.
        teacher_processing_class (the same as `processing_class`, *optional*): Of the teacher. `None` loads it from the
            folder of the teacher, or uses the student's tokenizer if there is none.
        teacher_cache ([`~encdec_slm.trainers.teacher_cache.TeacherCache`] or `str`, *optional*): Labels of the
            training data, in the place of a teacher. `None` uses `args.teacher_cache`, if that is set.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): Scores token ids that the student generates
            (`predictions`) against gold ones (`label_ids`, -100 for padding); requires `args.predict_with_generate`.

    Raises:
        TypeError: `args`, a tokenizer or a processor is of another kind.
        ValueError: The student is not an encoder-decoder, the teacher is not a causal language model, their
            vocabularies differ, the teacher's context is too short, the cache is of other data or another tokenizer,
            or the data lacks what `args` requires.
    """

    _tag_names = ["trl", "distillation"]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        teacher_model: "str | PreTrainedModel | PeftModel | None" = None,  # noqa: F821
        args: Seq2SeqDistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,  # noqa: F821
        peft_config: "PeftConfig | None" = None,  # noqa: F821
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        teacher_cache: TeacherCache | str | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    ):
        args = check_args(args, model, compute_metrics)
        student, saved_processing_class = load_student(model, args, quantization_config, peft_config)
        cache = load_teacher_cache(teacher_cache, teacher_model, args)
        teacher, teacher_location = (None, {}) if cache is not None else load_teacher(teacher_model, args)
        check_roles(student, teacher)
        if args.packing:
            check_packing(student)
        processing_class, self.teacher_processing_class = load_processing_classes(
            student,
            teacher,
            saved_processing_class if processing_class is None else processing_class,
            teacher_processing_class,
            teacher_location,
            args,
        )
        self.cached_teacher, self.num_common_tokens, self.teacher_token_ids = None, None, None
        self.alignment, self.teacher_context = None, None
        if cache is not None:
            vocab_size = student.config.get_text_config().vocab_size
            self.cached_teacher = CachedTeacher(cache, get_tokenizer(processing_class), vocab_size)
        elif teacher is not None:
            self.num_common_tokens, self.teacher_token_ids, self.alignment = compare_vocabularies(
                student, teacher, processing_class, self.teacher_processing_class, args
            )
            self.teacher_context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
        self.row_encoder = build_encoder(processing_class, self.teacher_processing_class, args, self.cached_teacher)
        # Completions of the student are used by the divergence alone, and need a teacher to read them.
        self._lmbda = args.lmbda if args.kd_ratio > 0 and cache is None else 0.0
        if train_dataset is not None:
            train_dataset = self._encode_training_data(train_dataset, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._encode(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._encode(eval_dataset, "evaluation data")
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.compute_metrics = compute_metrics
        self.teacher_model = None if teacher is None else self._prepare_teacher(teacher)
        if self.alignment is not None:
            self.alignment.to(self.accelerator.device)
        self._student_reader, self._teacher_reader = HeadReader("student"), HeadReader("teacher")
        self._generation_configs = build_generation_configs(
            self.generation_config,
            student,
            teacher,
            processing_class,
            self.teacher_processing_class,
            self.num_common_tokens if self.teacher_token_ids is None else None,
            args.generation_kwargs or {},
        )
        self._student_token_ids = {old_id: new_id for new_id, old_id in enumerate(self.teacher_token_ids or ())}
        self._eval_sums, self._logged_rows = [], []

    def _prepare_teacher(self, teacher):
        """Freeze the teacher and wrap it for inference."""
        teacher.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    # Data

    def _encode_training_data(self, dataset, args):
        if self.cached_teacher is not None:
            dataset = self.cached_teacher.attach(dataset)
        dataset = encode_rows(dataset, self.row_encoder, "training data")
        has_targets = "target_ids" in next(iter(dataset))
        if not has_targets and self._lmbda < 1 and not args.seq_kd:
            raise ValueError(
                f"`lmbda={self._lmbda}` and `seq_kd=False` use the targets of the training data, which has none. Add "
                "`completion` (or `target`) to each row, or set `seq_kd=True` or `lmbda=1`."
            )
        if not has_targets and args.kd_ratio < 1 and self._lmbda > 0:
            raise ValueError(
                f"`kd_ratio={args.kd_ratio}` uses the targets of the training data for the cross-entropy, but it has "
                "none. Add a `completion` (or `target`) to each row, or set `kd_ratio=1`."
            )
        is_generated = self._lmbda > 0 or args.seq_kd
        self._check_teacher_context(dataset, args.max_completion_length if is_generated else None)
        return dataset

    def _encode(self, dataset, name):
        dataset = encode_rows(dataset, self.row_encoder, name)
        self._check_teacher_context(dataset, None)
        return dataset

    @property
    def _context_is_limited(self):
        return self._is_comparable and self.teacher_context is not None

    @property
    def _is_comparable(self):
        return self.num_common_tokens is not None or self.alignment is not None

    def _check_teacher_context(self, dataset, max_target_length):
        if isinstance(dataset, Dataset) and self._context_is_limited:
            check_teacher_context(dataset, max_target_length, self.teacher_context, self.alignment)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*ENCODED_COLUMNS, "num_images", *self.row_encoder.kept_columns]

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if len(sampler) == 0:
            raise ValueError(
                f"An optimizer step needs {sampler.batch_size} rows (batch size x accumulation steps x processes), "
                f"but the training data has {sampler.num_samples}. Lower `per_device_train_batch_size` or "
                "`gradient_accumulation_steps`, or add rows."
            )
        return EpochSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # TRL shuffles, but predictions must be in the order of the rows

    def get_eval_dataloader(self, eval_dataset=None):
        """As [`~transformers.Trainer.get_eval_dataloader`], after encoding the rows."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)):
            eval_dataset = self._encode(eval_dataset, "evaluation data")
        rows = self.eval_dataset.get(eval_dataset) if isinstance(eval_dataset, str) else eval_dataset
        if not isinstance(self.eval_dataset if rows is None else rows, IterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        self.accelerator.dataloader_config.dispatch_batches = False  # lists cannot be sent to other processes
        return Trainer.get_eval_dataloader(self, eval_dataset)  # TRL shuffles streams

    def get_test_dataloader(self, test_dataset):
        """As [`~transformers.Trainer.get_test_dataloader`], after encoding the rows."""
        if isinstance(test_dataset, IterableDataset):
            self.accelerator.dataloader_config.dispatch_batches = False
        return super().get_test_dataloader(self._encode(test_dataset, "test data"))

    # A step, from top to bottom: rows -> batch -> loss. `Trainer.training_step` calls TRL's `_prepare_inputs`, which
    # calls `_generate_and_score_completions` once per optimizer step, shuffles the batch and splits it by the
    # accumulation steps; then it calls `compute_loss` for each part.

    def _generate_and_score_completions(self, inputs):
        return self.make_batch(inputs)

    def make_batch(self, rows: list[dict]) -> dict[str, torch.Tensor | list]:
        """Make a batch of encoded rows: choose or generate the targets, and pad everything.

        Returns:
            `dict`: Tensors of [`~encdec_slm.trainers.distillation_data.collate`], with numbers of tokens of all
            processes; and for rows with images a list of image inputs per model.
        """
        mode = "train" if self.model.training else "eval"
        rows = self.row_encoder.read_images(rows)
        origin = self._choose_origin(mode, has_targets="target_ids" in rows[0])
        if origin == "student":
            targets = self.generate_as_student(rows, self._generation_configs.student)
        elif origin == "teacher":
            targets = self.generate_as_teacher(rows, self._generation_configs.teacher)
        else:
            targets = [row["target_ids"] for row in rows]
        aligned_targets = None
        if self.alignment is not None and self._is_compared:
            aligned_targets = [
                self.alignment.encode_target(ids, None if origin == "data" else self._teacher_room(row))
                for row, ids in zip(rows, targets, strict=True)
            ]
        self._log_batch(mode, origin, rows, targets, aligned_targets)
        if self._context_is_limited:
            teacher_targets = targets if aligned_targets is None else [each.teacher_ids for each in aligned_targets]
            for row, target in zip(rows, teacher_targets, strict=True):
                check_row_length(row["row"], len(row["teacher_source_ids"]), len(target), self.teacher_context)
        gold = targets if origin != "student" else None
        if origin == "student" and "target_ids" in rows[0] and (self.args.kd_ratio < 1 or mode == "eval"):
            gold = [row["target_ids"] for row in rows]
        padding = (self._tokenizer.pad_token_id, self.pad_to_multiple_of)
        batch = collate(rows, targets, gold, *padding, self.teacher_token_ids, aligned_targets)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        for name in ("num_target_tokens", "num_gold_tokens"):
            batch[name] = self.accelerator.gather(batch[name]).sum()
        names = [name for name in ("student_images", "teacher_images") if name in rows[0]]
        batch |= {name: [row[name] for row in rows] for name in names}
        if self._is_compared and self.cached_teacher is not None:
            batch["cached_labels"] = [{name: row[name] for name in LABEL_COLUMNS if name in row} for row in rows]
        return batch

    def _teacher_room(self, row):
        """How many tokens of a generated target the teacher can read, which may be more than the student's."""
        return None if self.teacher_context is None else self.teacher_context - len(row["teacher_source_ids"])

    def _choose_origin(self, mode, has_targets):
        """Choose where the targets of a batch come from; all processes and a resumed run choose the same."""
        if mode == "eval":
            return "data" if has_targets else "teacher" if self.args.seq_kd else "student"
        draw = random.Random(f"{self.args.seed}-{self.state.global_step}").random()
        if draw < self._lmbda:
            return "student"
        return "teacher" if self.args.seq_kd else "data"

    def generate_as_student(self, rows: list[dict], config: GenerationConfig) -> list[list[int]]:
        """Generate a completion for each encoded row, with the end-of-text token if it is complete."""
        images = [row.get("student_images") for row in rows]
        return self._generate_ids(self.model_wrapped, [row["source_ids"] for row in rows], images, config)

    def generate_as_teacher(self, rows: list[dict], config: GenerationConfig | None = None) -> list[list[int]]:
        """Generate a completion of the teacher for each encoded row, in token ids of the student.

        Args:
            rows (`list[dict]`): Encoded rows.
            config ([`~transformers.GenerationConfig`], *optional*): Defaults to greedy generation.
        """
        config = self._generation_configs.greedy_teacher if config is None else config
        images = [row.get("teacher_images") for row in rows]
        prompts = [row["teacher_source_ids"] for row in rows]
        targets = []
        for ids in self._generate_ids(self.teacher_model, prompts, images, config):
            is_complete = ids[-1] in config.eos_token_id
            ids = ids[:-1] if is_complete else ids
            if self._student_token_ids.keys() >= set(ids):
                ids = [self._student_token_ids[token_id] for token_id in ids]
            elif self.num_common_tokens is None or self.teacher_token_ids is not None:
                text = get_tokenizer(self.teacher_processing_class).decode(ids, skip_special_tokens=True)
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_completion_length - 1]
            targets.append([*ids, self._tokenizer.eos_token_id] if is_complete or not ids else ids)
        return targets

    @property
    def greedy_generation_config(self) -> GenerationConfig:
        """Generation config of the student in evaluation."""
        return self._generation_configs.greedy_student

    def _generate_ids(self, model, prompts, images, config):
        """Generate token ids for prompts of token ids, in eval mode, so that caches are used and dropout is not."""
        unwrapped = self.accelerator.unwrap_model(model)
        is_decoder_only = not unwrapped.config.is_encoder_decoder
        side = "left" if is_decoder_only else "right"
        ids, mask = pad_ids(prompts, config.pad_token_id, self.pad_to_multiple_of, side)
        inputs = Trainer._prepare_inputs(self, {"input_ids": ids, "attention_mask": mask})
        was_training = unwrapped.training
        unwrapped.eval()
        try:
            with (
                _ignore_deprecated_names(),
                unwrap_model_for_generation(
                    model,
                    self.accelerator,
                    gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                    gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                ) as generator,
                torch.no_grad(),
                self.accelerator.autocast(),
                self._dist.summon_full_params(model, recurse=False),
            ):
                output = generator.generate(
                    **inputs,
                    **self._image_inputs(images),
                    generation_config=config,
                    # Processes that share sharded weights must make equally many steps; transformers knows FSDP1 only.
                    synced_gpus=True if self.is_fsdp_enabled else None,
                )
        finally:
            unwrapped.train(was_training)
        # The output of an encoder-decoder begins with its start token, that of a decoder-only model with the prompt.
        start = ids.shape[1] if is_decoder_only else 1
        return [_cut_behind_end(row, config.eos_token_id) for row in output[:, start:].tolist()]

    def _image_inputs(self, images):
        """Concatenate the image inputs of rows on the model's device; empty for text."""
        images = [inputs for inputs in images or () if inputs]
        if not images:
            return {}
        from .image_rows import concatenate_inputs

        return self._prepare_input(concatenate_inputs(images))

    def _log_batch(self, mode, origin, rows, targets, aligned_targets):
        """Log the numbers of tokens, lengths, and where the targets come from."""
        device, metrics = self.accelerator.device, self._metrics[mode]
        lengths = self.accelerator.gather(torch.tensor([len(ids) for ids in targets], device=device))
        num_source_tokens = torch.tensor(sum(len(row["source_ids"]) for row in rows), device=device)
        if mode == "train":
            num_tokens = self.accelerator.gather(num_source_tokens).sum() + lengths.sum()
            self.state.num_input_tokens_seen += num_tokens.item()
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        values = {}
        if origin == "student":
            eos_token_ids = self._generation_configs.student.eos_token_id
            is_complete = torch.tensor([ids[-1] in eos_token_ids for ids in targets], device=device)
            values |= describe_lengths(lengths, self.accelerator.gather(is_complete))
        if mode == "train":
            values |= {f"targets/from_{name}_ratio": float(origin == name) for name in ("student", "teacher")}
            values |= describe_rows(rows, "source", self.args.max_source_length)
            if aligned_targets is not None:
                values["targets/aligned_ratio"] = compute_aligned_ratio(aligned_targets)
            if origin == "data":
                values |= describe_rows(rows, "target", self.max_completion_length)
            self._logged_rows = rows[: self.num_completions_to_print or NUM_LOGGED_COMPLETIONS]
        for name, value in values.items():
            metrics[name].append(value)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of a batch; in training its share of the mean over the tokens of an optimizer step.

        Raises:
            FloatingPointError: The loss of a training batch is not finite. The message names the rows.
        """
        loss, row_sums = self._call_wrapped(model, self._compute_row_sums, inputs)
        gather = self.accelerator.gather if self.model.training else self.accelerator.gather_for_metrics
        row_sums, rows = gather(row_sums), gather(inputs["row"])
        if self.model.training:
            self._check_finite(row_sums, rows)
            for name, value in self._reduce(row_sums).items():
                if name != "loss":
                    self._metrics["train"][name].append(value)
        else:
            self._eval_sums.append(row_sums.double())
        return (loss, None) if return_outputs else loss

    def _reduce(self, row_sums):
        kd_ratio = 0.0 if self.teacher_model is None and not self.model.training else self.args.kd_ratio
        means = reduce_row_sums(row_sums, kd_ratio, self.args.kd_temperature)
        kept_mass = means.pop("kept_mass", None)
        is_restricted = self.teacher_token_ids is not None or self.cached_teacher is not None
        return {**means, "teacher/kept_mass": kept_mass} if is_restricted and kept_mass is not None else means

    def _call_wrapped(self, wrapped, function, *args, **kwargs):
        """Call `function(unwrapped, ...)` inside the forward of the wrapped model, as DDP, FSDP and ZeRO need."""
        unwrapped = self.accelerator.unwrap_model(wrapped)
        # The redirection replaces the forward that accelerate has wrapped in autocast.
        with self.accelerator.autocast():
            return self._forward_redirection(wrapped, unwrapped, function, unwrapped, *args, **kwargs)

    def _compute_row_sums(self, student, inputs):
        """Return the loss of shape (), and the sums `ROW_SUMS` of each row, of shape (B, 7)."""
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        positions = self._run_student(student, inputs)
        head, (kd_weight, ce_weight) = self._student_reader.head(student), self._loss_weights(inputs)
        hidden, labels, rows, indices = positions["target"]
        row_sums = torch.zeros(len(inputs["row"]), len(ROW_SUMS), device=hidden.device)
        teacher = (None, None) if kd_weight is None else self._run_teacher(inputs, rows, indices)
        targets_are_gold = "gold" not in positions and bool(inputs["num_gold_tokens"] > 0)
        settings = self._objective_settings(kd_weight or 0.0, ce_weight if targets_are_gold else 0.0)
        objective = distillation_objective(hidden, head, *teacher, labels, settings)
        loss = objective.loss
        if kd_weight is not None:
            parts = (rows, objective.divergence, objective.entropy, objective.agreement, objective.kept_mass)
            if self.alignment is not None:
                is_compared = inputs["position_kinds"][rows, indices] != NOT_COMPARED
                parts = (part[is_compared] for part in parts)
            add_to_rows(row_sums[:, : len(COMPARISON_SUMS)], *parts)
        if "gold" in positions:
            hidden, labels, rows, _ = positions["gold"]
            objective = distillation_objective(
                hidden, head, None, None, labels, self._objective_settings(0.0, ce_weight)
            )
            loss = loss + objective.loss
        if "gold" in positions or targets_are_gold:
            add_to_rows(row_sums[:, len(COMPARISON_SUMS) :], rows, objective.cross_entropy)
        return loss, row_sums

    def _run_student(self, student, inputs):
        """Run the student on the targets and, if there are others, on the gold targets of a batch.

        Both are rows of one forward pass, so that the source is encoded once and DDP sees each weight used once.

        Returns:
            `dict`: For `target` and `gold`: hidden states of shape (N, D) that predict tokens, these tokens, their
            rows, and their indices in the target.
        """
        if self.args.packing and self.model.training:
            return self._run_packed_student(student, inputs)
        source_ids, source_mask = trim_padding(inputs["source_ids"], inputs["source_mask"])
        images = self._image_inputs(inputs.get("student_images"))
        encoded = student.get_encoder()(input_ids=source_ids, attention_mask=source_mask, **images).last_hidden_state
        names = [name for name in ("target", "gold") if f"{name}_ids" in inputs]
        ids = [trim_padding(inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name in names]
        width = max(each.shape[1] for each, _ in ids)
        ids, mask = (
            torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in kind])
            for kind in zip(*ids, strict=True)
        )  # (B or 2B, T)
        start_ids = torch.full_like(ids[:, :1], self._generation_configs.student.decoder_start_token_id)
        hidden = self._student_reader(
            student,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.repeat(len(names), 1, 1)),
            attention_mask=source_mask.repeat(len(names), 1),
            decoder_input_ids=torch.cat((start_ids, ids[:, :-1]), 1),
            use_cache=False,
        )  # (B or 2B, T, D)
        positions, num_rows = {}, len(source_ids)
        for number, name in enumerate(names):
            part = slice(number * num_rows, (number + 1) * num_rows)
            rows, indices = mask[part].nonzero(as_tuple=True)
            positions[name] = (hidden[part][rows, indices], ids[part][rows, indices], rows, indices)
        return positions

    def _run_packed_student(self, student, inputs):
        """As [`_run_student`], with several rows in one sequence."""
        names = [name for name in ("target", "gold") if f"{name}_ids" in inputs]
        ids = {name: to_lists(inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name in ("source", *names)}
        target_lengths = [max(map(len, targets)) for targets in zip(*(ids[name] for name in names), strict=True)]
        packs = assign_rows([len(source) for source in ids["source"]], target_lengths)
        width = max(sum(target_lengths[row] for row in pack) for pack in packs)
        start_id, padding = self._generation_configs.student.decoder_start_token_id, self._tokenizer.pad_token_id
        shifted = {name: [[start_id, *target][: len(target)] for target in ids[name]] for name in names}
        packed = [pack_ids(ids["source"], packs, padding)]
        packed += [pack_ids(shifted[name], packs, padding, width) for name in names]
        (source_ids, segment_ids), *targets = ((each.to(self.accelerator.device) for each in pair) for pair in packed)
        encoded = student.get_encoder()(input_ids=source_ids, segment_ids=segment_ids).last_hidden_state
        decoder_input_ids, decoder_segment_ids = (torch.cat(parts) for parts in zip(*targets, strict=True))
        hidden = self._student_reader(
            student,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.repeat(len(names), 1, 1)),
            segment_ids=segment_ids.repeat(len(names), 1),
            decoder_input_ids=decoder_input_ids,
            decoder_segment_ids=decoder_segment_ids,
            use_cache=False,
        )
        positions = {}
        for number, name in enumerate(names):
            mask = inputs[f"{name}_mask"]
            rows, indices = mask.nonzero(as_tuple=True)
            pack_numbers, starts = (each.to(mask.device) for each in locate_rows(packs, mask.sum(-1).tolist()))
            found = hidden[number * len(packs) + pack_numbers[rows], starts[rows] + indices]
            positions[name] = (found, inputs[f"{name}_ids"][rows, indices], rows, indices)
        return positions

    def _run_teacher(self, inputs, rows, indices):
        """Return the teacher's hidden states that predict target tokens, of shape (N, D), and its head.

        With a teacher cache or another tokenizer, what is compared with the student at these positions, and `None`.
        """
        if self.cached_teacher is not None:
            lengths = inputs["target_mask"].sum(-1).tolist()
            labels = self.cached_teacher.build_labels(inputs["cached_labels"], lengths)
            return labels.to(self.accelerator.device), None
        teacher_ids, teacher_mask = trim_padding(inputs["teacher_ids"], inputs["teacher_mask"])
        self.teacher_model.eval()
        with torch.no_grad():
            hidden = self._call_wrapped(
                self.teacher_model,
                self._teacher_reader,
                input_ids=teacher_ids,
                attention_mask=teacher_mask,
                use_cache=False,
                **self._image_inputs(inputs.get("teacher_images")),
            )
            head = self._teacher_reader.head(self.accelerator.unwrap_model(self.teacher_model))
        starts = inputs["teacher_source_lengths"][rows] - 1  # the token at index i is predicted at i - 1
        if self.alignment is None:
            return hidden[rows, starts + indices], head
        hidden = hidden[rows, starts + inputs["teacher_indices"][rows, indices]]
        kinds = inputs["position_kinds"][rows, indices]
        return AlignedTeacher(self.alignment, hidden, head, kinds, self.args.kd_temperature), None

    def _loss_weights(self, inputs):
        """Return the weights of the summed divergence (`None` without teacher) and of the summed cross-entropy."""
        num_processes, args = 1, self.args
        num_target, num_gold = inputs["target_mask"].sum(), inputs.get("gold_mask", inputs["target_mask"]).sum()
        if self.model.training:
            # DDP averages gradients over processes, but counts are those of all processes.
            num_processes = self.accelerator.num_processes
            num_target, num_gold = inputs["num_target_tokens"], inputs["num_gold_tokens"]
        kd_weight = args.kd_ratio * args.kd_temperature**2 * num_processes / num_target.clamp(min=1)
        ce_weight = (1 - args.kd_ratio) * num_processes / num_gold.clamp(min=1)
        return kd_weight if self._is_compared else None, ce_weight

    @property
    def _is_compared(self):
        """Whether student and teacher are compared: in training if the loss needs it, in evaluation if possible."""
        if self.cached_teacher is not None:
            return self.model.training and self.args.kd_ratio > 0
        return self._is_comparable and (self.args.kd_ratio > 0 or not self.model.training)

    def _objective_settings(self, kd_weight, ce_weight):
        teacher_token_ids = self.teacher_token_ids
        if teacher_token_ids is not None:
            teacher_token_ids = torch.tensor(teacher_token_ids, device=self.accelerator.device)
        return ObjectiveSettings(
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            beta=self.beta,
            temperature=self.args.kd_temperature,
            label_smoothing=self.args.label_smoothing_factor if self.model.training else 0.0,
            num_common_tokens=self.num_common_tokens,
            teacher_token_ids=teacher_token_ids,
        )

    def _check_finite(self, row_sums, rows):
        is_finite = row_sums[:, [ROW_SUMS.index("kd_loss"), ROW_SUMS.index("ce_loss")]].isfinite().all(-1)
        if is_finite.all():
            return
        names = ", ".join(map(str, sorted(rows[~is_finite].tolist())[:20]))
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        cause = "Check the weights and the learning rate" if not is_finite.any() else "Check these rows"
        raise FloatingPointError(
            f"The loss after step {self.state.global_step} is not finite for rows {names} of the training data "
            f"(counted from 0). {cause}. Training stops before this update; "
            f"{'nothing was saved' if checkpoint is None else f'the last checkpoint is {checkpoint}'}."
        )

    # Evaluation

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`], with means over all target tokens instead of over batches.

        Metrics: `loss` (without label smoothing), `kd_loss` (the divergence at `kd_temperature`), `ce_loss` and
        `entropy` of the student, in nats per token, and `teacher_agreement`, the share of positions at which the most
        probable token of both models is the same. With a trimmed vocabulary the models are compared over its tokens,
        and `teacher/kept_mass` is the probability that the teacher gives to them.
        """
        self._eval_sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._reduce(torch.cat(self._eval_sums))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss of a batch and, with `predict_with_generate`, generated ids and gold ids."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        sources = to_lists(inputs["source_ids"], inputs["source_mask"])
        generated = self._generate_ids(
            self.model_wrapped, sources, inputs.get("student_images"), self._generation_configs.greedy_student
        )
        generated, _ = pad_ids(generated, self._tokenizer.pad_token_id)
        labels = None
        if inputs["num_gold_tokens"] > 0:
            gold = "gold" if "gold_ids" in inputs else "target"
            labels = inputs[f"{gold}_ids"].masked_fill(inputs[f"{gold}_mask"] == 0, LABELS_PADDING)
        return loss, generated.to(loss.device), labels

    # Logs and files

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's; `log_completions` logs greedy completions of student and teacher beside the gold targets."""
        log_completions, self.log_completions = self.log_completions, False
        super().log(logs, start_time)
        self.log_completions = log_completions
        if not log_completions or not self.model.training or not self._logged_rows:
            return
        rows, decode = self._logged_rows, self._tokenizer.batch_decode
        columns = {
            "prompt": [row["source_ids"] for row in rows],
            "completion": self.generate_as_student(rows, self._generation_configs.greedy_student),
            "teacher": [[]] * len(rows) if self.teacher_model is None else self.generate_as_teacher(rows),
            "gold": [row.get("target_ids", []) for row in rows],
        }
        if self.accelerator.is_main_process:
            texts = {name: decode(ids, skip_special_tokens=True) for name, ids in columns.items()}
            log_completion_table(texts, self.state.global_step, self.args)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` ignores incomplete checkpoints."""
        checkpoint = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student.

        Raises:
            FloatingPointError: A weight is not finite. Earlier files are not changed.
        """
        refuse_non_finite_weights(self.model, self.state.global_step, self.args.output_dir)
        if output_dir is not None and self.args.should_save:
            # A checkpoint of an earlier run that is overwritten is complete once its state is written again.
            (Path(output_dir) / STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write TRL's model card, with a code example for an encoder-decoder and the settings of the run."""
        super().create_model_card(model_name or Path(self.args.output_dir).name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_card(self)


@contextmanager
def _ignore_deprecated_names():
    """Ignore that TRL 1.16 uses names of gradient checkpointing that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing", FutureWarning)
        yield


def _cut_behind_end(ids, eos_token_ids):
    """Return ids up to the first end-of-text token."""
    return next((ids[: index + 1] for index, token_id in enumerate(ids) if token_id in eos_token_ids), ids)


__all__ = ["Seq2SeqDistillationTrainer"]

# SPDX-License-Identifier: Apache-2.0
"""A decoder-only teacher teaches an encoder-decoder student: the trainer.

B batch, S source, T target, N target tokens of a batch, D width, V vocabulary.
"""

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import EvalPrediction, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import EvalLoopOutput

from ..hub_cards.cards import distillation_card
from .distillation_config import Seq2SeqDistillationConfig
from .distillation_data import collate, encode_rows, padded, refuse_long_rows, stacked, trimmed, unpadded
from .distillation_images import image_lists, image_token_ids, image_tokens_of, row_encoder
from .distillation_losses import ObjectiveSettings, distillation_objective
from .distillation_models import (
    check_roles,
    checked_args,
    common_tokens,
    decoder_start_token_id,
    load_processing_classes,
    load_student,
    load_teacher,
)
from .output_heads import HeadReader
from .resuming import STATE_NAME, last_complete_checkpoint, refuse_non_finite_weights
from .trl_hooks import EncoderDecoderHooks


# Sums over the tokens of each row, in the order of the last axis of what `_objective` returns.
ROW_SUMS = ("kd_loss", "entropy", "teacher_agreement", "num_target_tokens", "ce_loss", "num_gold_tokens")
NUM_LOGGED_COMPLETIONS = 8


class Seq2SeqDistillationTrainer(EncoderDecoderHooks):
    """TRL's [`~trl.DistillationTrainer`] for an encoder-decoder student and a decoder-only teacher.

    The teacher reads source and target in one row; the student reads the source in its encoder and the target in its
    decoder. Positions that predict the same target token are compared, end-of-text token included, padding never.
    Targets come from the data, from the teacher or from the student: see [`Seq2SeqDistillationConfig`].

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The student. A string is loaded with
            `AutoModelForSeq2SeqLM`, `args.model_init_kwargs` and, unless these say otherwise, float32 weights.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): A causal language
            model, or a decoder-only one that reads images (LLaVA and the like); it is never trained nor saved. A
            string (a model or a LoRA adapter) is loaded with `args.teacher_model_init_kwargs`. `None` takes
            `args.teacher_model_name_or_path`.
        args ([`Seq2SeqDistillationConfig`], *optional*): The run.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*): Rows of `prompt` and
            `completion`, or of `source` and `target`; text, or lists of messages. Messages are rendered by the chat
            template of the teacher for the teacher, and are plain text for the student. The target is needed where
            targets come from the data and where `kd_ratio < 1`. For a student with a processor, rows may have
            `images` (a list) or `image`, and a `teacher_prompt`, which the teacher reads instead of the prompt: see
            [`~encdec_slm.trainers.distillation_images.ImageRowEncoder`].
        eval_dataset (the same, or a `dict` of them, *optional*): Evaluated on the gold targets where there are any.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            The student's tokenizer, or the processor of one that reads images. `None` loads it from where the student
            comes from.
        callbacks (`list[TrainerCallback]`, *optional*): Added to those of the Trainer.
        optimizers (`tuple`, *optional*): Optimizer and scheduler, instead of those that `args` describes.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): For a student given as a string.
        peft_config ([`~peft.PeftConfig`], *optional*): Adapters to train instead of the student's weights.
        teacher_processing_class (the same, *optional*): Of the teacher, with its own image tokens and tiles. `None`
            loads it from where the teacher comes from, or takes the student's tokenizer if there is none.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): Scores token ids that the student wrote
            (`predictions`) beside gold ones (`label_ids`, -100 for padding); needs `args.predict_with_generate`.

    Raises:
        TypeError: `args`, a tokenizer or a processor is of another kind.
        ValueError: The student is no encoder-decoder or the teacher no causal language model; their token ids mean
            different tokens; the teacher's context is too short; the data lacks what `args` asks for.
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
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    ):
        args = checked_args(args, model, compute_metrics)
        student = load_student(model, args, quantization_config)
        teacher = load_teacher(teacher_model, args)
        check_roles(student, teacher)
        processing_class, teacher_processing_class = load_processing_classes(
            processing_class, teacher_processing_class, student, teacher, args
        )
        self.encoder = row_encoder(
            processing_class,
            teacher_processing_class,
            args.max_source_length,
            args.max_completion_length,
            args.chat_template_kwargs or {},
        )
        self.teacher_tokenizer = self.encoder.teacher_tokenizer
        self._image_tokens = image_tokens_of(processing_class, teacher_processing_class)
        self.num_common_tokens = common_tokens(
            self.encoder.tokenizer, self.teacher_tokenizer, student, teacher, args, self._image_tokens
        )
        self.teacher_context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
        # Texts of the student are for the divergence alone.
        self._lmbda = args.lmbda if args.kd_ratio > 0 else 0.0
        train_dataset, eval_dataset = self._encoded_datasets(args, train_dataset, eval_dataset)
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
        self.teacher_model = self.prepared_teacher(teacher)
        self._set_generation_configs(student, teacher)
        self._read_student, self._read_teacher = HeadReader("student"), HeadReader("teacher")
        self._eval_sums, self._logged_rows = [], []

    def _encoded_datasets(self, args, train_dataset, eval_dataset):
        """Token ids of all rows, after a look at what the run needs of them."""
        if train_dataset is not None:
            train_dataset = encode_rows(train_dataset, self.encoder, "training data")
            has_targets = "target_ids" in next(iter(train_dataset))
            if not has_targets and (self._lmbda < 1 and not args.seq_kd):
                raise ValueError(
                    f"`lmbda` is {self._lmbda} and `seq_kd` is false, so batches have the targets of the training "
                    "data, which has none. Add a `completion` (or `target`) to each row, or set `seq_kd=True` or "
                    "`lmbda=1`."
                )
            if not has_targets and (args.kd_ratio < 1 and self._lmbda > 0):
                raise ValueError(
                    f"`kd_ratio` is {args.kd_ratio}, which asks for cross-entropy on gold targets beside texts of the "
                    "student, but the training data has none. Add a `completion` (or `target`) to each row, or set "
                    "`kd_ratio=1`."
                )
            targets_are_given = self._lmbda == 0 and not args.seq_kd
            self._check_teacher_context(train_dataset, None if targets_are_given else args.max_completion_length)
        if isinstance(eval_dataset, dict):
            return train_dataset, {name: self._encoded(rows, name) for name, rows in eval_dataset.items()}
        if eval_dataset is not None:
            eval_dataset = self._encoded(eval_dataset, "evaluation data")
        return train_dataset, eval_dataset

    def _encoded(self, dataset, name):
        encoded = encode_rows(dataset, self.encoder, name)
        self._check_teacher_context(encoded, None)
        return encoded

    def _check_teacher_context(self, dataset, max_target_length):
        if isinstance(dataset, Dataset) and self.num_common_tokens is not None and self.teacher_context is not None:
            refuse_long_rows(dataset, max_target_length, self.teacher_context)

    def _set_generation_configs(self, student, teacher):
        """How the student and the teacher sample in training, and how they write in evaluation."""
        tokenizer, teacher_tokenizer = self.encoder.tokenizer, self.teacher_tokenizer
        # Rows that only pad the student's table are no tokens, whatever untrained logits they have; an image's token
        # that is written would be one without an image to whoever reads it.
        num_tokens = self.num_common_tokens or len(tokenizer)
        padding_rows = list(range(num_tokens, student.config.get_text_config().vocab_size))
        image_ids = image_token_ids(tokenizer, self._image_tokens)
        student_ids = {
            "decoder_start_token_id": decoder_start_token_id(student),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "suppress_tokens": sorted({*padding_rows, *image_ids}) or None,
        }
        ends = teacher.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        teacher_ids = {
            "decoder_start_token_id": None,
            "pad_token_id": tokenizer.pad_token_id if self.num_common_tokens else teacher_tokenizer.pad_token_id or 0,
            "bos_token_id": teacher_tokenizer.bos_token_id,
            "eos_token_id": sorted({teacher_tokenizer.eos_token_id, *ends} - {None}),
        }
        greedy = {"max_new_tokens": self.max_completion_length, "do_sample": False}
        self.generation_config.update(**student_ids)
        asked = {"repetition_penalty": self.repetition_penalty, **(self.args.generation_kwargs or {})}
        self._greedy_config = GenerationConfig(**{**student_ids, **asked, **greedy})
        self._teacher_generation_config = copy.deepcopy(self.generation_config)
        teacher_ids["suppress_tokens"] = image_token_ids(teacher_tokenizer, self._image_tokens) or None
        self._teacher_generation_config.update(**teacher_ids)
        self._teacher_greedy_config = GenerationConfig(**teacher_ids, **greedy)

    # Batches

    def make_batch(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Tensors of a generation batch: what is read, the targets that are compared and, beside these, gold ones.

        Args:
            rows (`list[dict]`): From the encoded data set; a whole optimizer step in training.

        Raises:
            ValueError: A source and its target are longer than the teacher's context.
        """
        mode = "train" if self.model.training else "eval"
        rows = self.encoder.finished(rows)
        origin = self._origin(mode, has_targets="target_ids" in rows[0])
        images = image_lists(rows)
        if origin == "student":
            sources = [row["source_ids"] for row in rows]
            targets = self.student_texts(sources, images["student_images"]) if images else self.student_texts(sources)
        else:
            targets = self.teacher_texts(rows) if origin == "teacher" else [row["target_ids"] for row in rows]
            self.count_tokens(
                mode, sum(len(row["source_ids"]) + len(ids) for row, ids in zip(rows, targets, strict=True))
            )
        pad_token_id, multiple = self.encoder.tokenizer.pad_token_id, self.pad_to_multiple_of
        batch = collate(rows, targets, pad_token_id, multiple)
        if origin == "student" and "target_ids" in rows[0] and (self.args.kd_ratio < 1 or mode == "eval"):
            gold = [row["target_ids"] for row in rows]
            batch["gold_ids"], batch["gold_mask"] = padded(gold, pad_token_id, multiple)
        if mode == "train":
            self._log_origin(origin, rows)
        self._refuse_long_batch(batch)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        gold_mask = batch.get("gold_mask", batch["target_mask"] if origin != "student" else torch.zeros(0))
        for name, mask in (("target", batch["target_mask"]), ("gold", gold_mask)):
            num_tokens = mask.sum().to(self.accelerator.device)
            batch[f"num_{name}_tokens"] = self.accelerator.gather(num_tokens).sum()
        return batch | images

    def _origin(self, mode, has_targets):
        """Who wrote this batch's targets; the same on all processes and in a resumed run."""
        if mode == "eval":
            return "data" if has_targets else "teacher" if self.args.seq_kd else "student"
        draw = random.Random(f"{self.args.seed}-{self.state.global_step}").random()
        if draw < self._lmbda:
            return "student"
        return "teacher" if self.args.seq_kd else "data"

    def teacher_texts(self, rows: list[dict], do_sample: bool = True) -> list[list[int]]:
        """What the teacher writes for encoded rows, in ids of the student, and ended as the student ends its texts."""
        config = self._teacher_generation_config if do_sample else self._teacher_greedy_config
        sources, images = [row["teacher_source_ids"] for row in rows], image_lists(rows).get("teacher_images")
        texts = self.write(self.teacher_model, sources, config, images)
        targets = []
        for ids in texts:
            is_whole = ids[-1] in config.eos_token_id
            ids = ids[:-1] if is_whole else ids
            if self.num_common_tokens is None:
                text = self.teacher_tokenizer.decode(ids, skip_special_tokens=True)
                ids = self.encoder.target_ids(text)[: self.max_completion_length - 1]
            targets.append([*ids, self.encoder.tokenizer.eos_token_id] if is_whole or not ids else ids)
        return targets

    def _log_origin(self, origin, rows):
        self._logged_rows = rows[: self.num_completions_to_print or NUM_LOGGED_COMPLETIONS]
        for name in ("student", "teacher"):
            self.log_metric("train", f"targets/from_{name}_ratio", float(origin == name))
        bounds = {"source": self.args.max_source_length, "target": self.max_completion_length}
        for kind, bound in bounds.items():
            lengths = [row[f"num_{kind}_tokens"] for row in rows if f"num_{kind}_tokens" in row]
            if lengths and (kind == "source" or origin == "data"):
                self.log_metric("train", f"{kind}s/mean_length", sum(lengths) / len(lengths))
                self.log_metric("train", f"{kind}s/max_length", max(lengths))
                num_cut = sum(bound is not None and length > bound for length in lengths)
                self.log_metric("train", f"{kind}s/cut_ratio", num_cut / len(lengths))

    def _refuse_long_batch(self, batch):
        length, row = batch["teacher_mask"].sum(-1).max(0)
        if self.teacher_context is not None and self.num_common_tokens is not None and length > self.teacher_context:
            source_length = int(batch["teacher_source_lengths"][row])
            raise ValueError(
                f"Row {int(batch['row'][row])} has {source_length} source tokens for the teacher and "
                f"{int(length) - source_length} target tokens, {int(length)} together, but the teacher's context is "
                f"{self.teacher_context}. Lower `max_source_length` or `max_completion_length`."
            )

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective of one batch from [`make_batch`]; in training a share of the optimizer step's mean.

        Raises:
            FloatingPointError: The loss of a training batch is not finite; names the rows.
        """
        loss, row_sums = self.routed(model, self._objective, inputs)
        gather = self.accelerator.gather if self.model.training else self.accelerator.gather_for_metrics
        row_sums, rows = gather(row_sums), gather(inputs["row"])
        if self.model.training:
            self._refuse_non_finite_loss(row_sums, rows)
            means = _means(row_sums.sum(0), self.args)
            for name in means.keys() - {"loss"}:
                self.log_metric("train", name, means[name])
        else:
            self._eval_sums.append(row_sums.double().sum(0))
        return (loss, None) if return_outputs else loss

    def _objective(self, student, inputs):
        """Loss of shape () and sums of shape (B, 6) over the tokens of each row; runs inside the student's wrapper."""
        base = student.get_base_model() if hasattr(student, "get_base_model") else student
        hidden, labels, rows, positions = self._student_at(base, inputs)
        head, num_rows = self._read_student.head(base), len(inputs["source_ids"])
        kd_weight, ce_weight = self._weights(inputs)
        has_own_gold = "gold_ids" in inputs
        target_is_gold = not has_own_gold and bool(inputs["num_gold_tokens"] > 0)
        row_sums = torch.zeros(num_rows, len(ROW_SUMS), device=hidden.device)

        of_target = rows < num_rows
        teacher = (
            (None, None) if kd_weight is None else self._teacher_at(inputs, rows[of_target], positions[of_target])
        )
        settings = self._settings(0.0 if kd_weight is None else kd_weight, ce_weight if target_is_gold else 0.0)
        objective = distillation_objective(hidden[of_target], head, *teacher, labels[of_target], settings)
        loss = objective.loss
        if kd_weight is not None:
            parts = (objective.divergence, objective.entropy, objective.agreement)
            _add_per_row(row_sums[:, :4], rows[of_target], *parts)
        if target_is_gold:
            _add_per_row(row_sums[:, 4:], rows, objective.cross_entropy)
        if has_own_gold:
            settings = self._settings(0.0, ce_weight)
            objective = distillation_objective(hidden[~of_target], head, None, None, labels[~of_target], settings)
            loss = loss + objective.loss
            _add_per_row(row_sums[:, 4:], rows[~of_target] - num_rows, objective.cross_entropy)
        return loss, row_sums

    def _student_at(self, student, inputs):
        """Hidden states of shape (N, D) that predict the target tokens, those tokens, their rows and positions.

        Where texts of the student are compared and gold ones are learnt, these follow in rows of their own: the source
        is encoded once, and no weight is used twice.
        """
        source_ids, source_mask = trimmed(inputs["source_ids"], inputs["source_mask"])
        images = self.image_inputs(inputs.get("student_images"))
        encoded = student.get_encoder()(input_ids=source_ids, attention_mask=source_mask, **images).last_hidden_state
        kinds = [kind for kind in ("target", "gold") if f"{kind}_ids" in inputs]
        ids, mask = trimmed(
            *stacked(*((inputs[f"{kind}_ids"], inputs[f"{kind}_mask"]) for kind in kinds))
        )  # (B or 2B, T)
        start_ids = torch.full_like(ids[:, :1], self.generation_config.decoder_start_token_id)
        hidden = self._read_student(
            student,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.repeat(len(kinds), 1, 1)),
            attention_mask=source_mask.repeat(len(kinds), 1),
            decoder_input_ids=torch.cat((start_ids, ids[:, :-1]), 1),
            use_cache=False,
        )
        rows, positions = mask.nonzero(as_tuple=True)
        return hidden[rows, positions], ids[rows, positions], rows, positions

    def _teacher_at(self, inputs, rows, positions):
        """The teacher's hidden states that predict the same target tokens, of shape (N, D), and its head."""
        teacher_ids, teacher_mask = trimmed(inputs["teacher_ids"], inputs["teacher_mask"])
        self.teacher_model.eval()
        with torch.no_grad():
            hidden = self.routed(
                self.teacher_model,
                self._read_teacher,
                input_ids=teacher_ids,
                attention_mask=teacher_mask,
                use_cache=False,
                **self.image_inputs(inputs.get("teacher_images")),
            )
            # The token at index i of a row is predicted at i - 1; the target begins behind the source.
            hidden = hidden[rows, inputs["teacher_source_lengths"][rows] - 1 + positions]
            return hidden, self._read_teacher.head(self.accelerator.unwrap_model(self.teacher_model))

    def _weights(self, inputs):
        """Factors of the summed divergence (`None` leaves the teacher out) and of the summed cross-entropy."""
        num_processes, args = 1, self.args
        num_target, num_gold = inputs["target_mask"].sum(), inputs.get("gold_mask", inputs["target_mask"]).sum()
        if self.model.training:
            # DDP averages gradients over processes; counts are those of all of them.
            num_processes = self.accelerator.num_processes
            num_target, num_gold = inputs["num_target_tokens"], inputs["num_gold_tokens"]
        is_compared = self.num_common_tokens is not None and (args.kd_ratio > 0 or not self.model.training)
        kd_weight = args.kd_ratio * args.kd_temperature**2 * num_processes / num_target.clamp(min=1)
        ce_weight = (1 - args.kd_ratio) * num_processes / num_gold.clamp(min=1)
        return kd_weight if is_compared else None, ce_weight

    def _settings(self, kd_weight, ce_weight):
        return ObjectiveSettings(
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            beta=self.beta,
            temperature=self.args.kd_temperature,
            label_smoothing=self.args.label_smoothing_factor if self.model.training else 0.0,
            num_common_tokens=self.num_common_tokens,
        )

    def _refuse_non_finite_loss(self, row_sums, rows):
        losses = row_sums[:, [ROW_SUMS.index("kd_loss"), ROW_SUMS.index("ce_loss")]]
        is_finite = losses.isfinite().all(-1)  # the agreement is not a number where it was not measured
        if is_finite.all():
            return
        bad = sorted(rows[~is_finite].tolist())
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        cause = "These rows" if len(bad) < len(rows) else "All rows of the batch: the weights or the learning rate"
        raise FloatingPointError(
            f"The loss after step {self.state.global_step} is not finite for row(s) {', '.join(map(str, bad[:20]))} "
            f"of the training data (counted from 0). {cause} are the cause. Training stops before an update is made "
            f"of it; {'nothing has been saved' if checkpoint is None else f'the last checkpoint is {checkpoint}'}."
        )

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        """As of the Trainer; rows of text are encoded first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._encoded(eval_dataset, "evaluation data")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As of the Trainer; rows of text are encoded first."""
        return super().get_test_dataloader(self._encoded(test_dataset, "test data"))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As of the Trainer, with means over all target tokens instead of over batches.

        Metrics: `loss` (the objective without label smoothing), `kd_loss` (the divergence at `kd_temperature`),
        `ce_loss`, `entropy` of the student in nats per token, and `teacher_agreement`, the share of positions at
        which both models' likeliest tokens are the same.
        """
        self._eval_sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = _means(torch.stack(self._eval_sums).sum(0), self.args)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of a batch of rows and, with `predict_with_generate`, the ids that the student writes and gold ones."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        sources = list(unpadded(inputs["source_ids"], inputs["source_mask"]))
        written = self.write(self.model_wrapped, sources, self._greedy_config, inputs.get("student_images"))
        written, _ = padded(written, self.encoder.tokenizer.pad_token_id, None)
        labels = None
        if inputs["num_gold_tokens"] > 0:
            gold = "gold" if "gold_ids" in inputs else "target"
            labels = inputs[f"{gold}_ids"].masked_fill(inputs[f"{gold}_mask"] == 0, -100)
        return loss, written.to(loss.device), labels

    # Logs and files

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of TRL; with `log_completions`, what the student writes beside the teacher's text and the gold target."""
        log_completions, self.log_completions = self.log_completions, False
        super().log(logs, start_time)
        self.log_completions = log_completions
        if log_completions and self.model.training and self._logged_rows:
            self.log_texts(*self._texts_side_by_side())

    def _texts_side_by_side(self):
        rows, decode = self._logged_rows, self.encoder.tokenizer.batch_decode
        sources = [row["source_ids"] for row in rows]
        student = self.write(self.model_wrapped, sources, self._greedy_config, image_lists(rows).get("student_images"))
        gold = [row.get("target_ids", []) for row in rows]
        teacher = self.teacher_texts(rows, do_sample=False)
        return [decode(ids, skip_special_tokens=True) for ids in (sources, student, teacher, gold)]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As of the Trainer; `resume_from_checkpoint=True` passes over a checkpoint that was being written."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint` is true, but {self.args.output_dir} holds no complete checkpoint. "
                    "Leave it out to begin anew."
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student, never the teacher.

        Raises:
            FloatingPointError: A weight is not finite; what was saved before stays.
        """
        refuse_non_finite_weights(self.model, self.state.global_step, self.args.output_dir)
        if output_dir is not None and self.args.should_save:
            # A checkpoint of an earlier run that is written anew is complete once its state is there again.
            (Path(output_dir) / STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes a card that names teacher, data, objective and the last evaluation, with TRL's tags."""
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if "eval_ce_loss" in entry or "eval_kd_loss" in entry]
        card = distillation_card(
            model_name or Path(self.args.output_dir).name,
            student=self.accelerator.unwrap_model(self.model).config,
            teacher=self.accelerator.unwrap_model(self.teacher_model).config,
            args=self.args,
            dataset_name=dataset_name,
            num_rows=len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            train_steps=self.state.global_step,
            evaluation=evaluations[-1] if evaluations else None,
        )
        card.save(Path(self.args.output_dir) / "README.md")


def _add_per_row(row_sums, rows, *parts):
    """Adds parts of shape (N,), and their number, to the last axis of the rows that they belong to."""
    row_sums.index_add_(0, rows, torch.stack((*parts, torch.ones_like(parts[0])), 1))


def _means(sums, args) -> dict[str, float]:
    """Means per token of what `_objective` summed, and the loss that they make."""
    kd_loss, entropy, agreement, num_target, ce_loss, num_gold = sums.tolist()
    means = {"loss": 0.0}
    if num_target:
        means |= {"kd_loss": kd_loss / num_target, "entropy": entropy / num_target}
        means["loss"] += args.kd_ratio * args.kd_temperature**2 * means["kd_loss"]
        if not math.isnan(agreement):  # not measured by the kernel
            means["teacher_agreement"] = agreement / num_target
    if num_gold:
        means["ce_loss"] = ce_loss / num_gold
        means["loss"] += (1 - args.kd_ratio) * means["ce_loss"]
    return means


__all__ = ["Seq2SeqDistillationTrainer"]

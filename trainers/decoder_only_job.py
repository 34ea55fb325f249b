# SPDX-License-Identifier: Apache-2.0
"""Train a small decoder-only model: a teacher to distill from, or a checkpoint to adapt."""

import logging

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..configuration import decoder_only_twin
from ..run_results import ModelResults, RunResults
from .distillation_data import DistillationRowEncoder, as_prompts
from .jobs import describe_training, save_run, show_losses, train
from .muon import build_optimizer
from .new_models import first_texts, preset_config, train_tokenizer
from .row_encoding import LABELS_PADDING, RowEncoder, encode_rows


logger = logging.getLogger(__name__)

# The model reads a source and this token, and then generates.
CHAT_TEMPLATE = "{{ messages[0]['content'] }}{{ bos_token }}"
KIND = "decoder-only training"


def train_decoder_only(
    preset: str,
    vocab_size: int,
    dataset: Dataset,
    training_args: TrainingArguments,
    max_source_length: int,
    max_target_length: int,
    checkpoint: str | None = None,
) -> RunResults:
    """Train the decoder-only baseline of a preset on source and target in one row, and save it with its tokenizer.

    Args:
        preset (`str`): See [`~encdec_slm.configuration.list_presets`].
        vocab_size (`int`): Upper bound for the tokenizer, which is trained on the same rows.
        dataset ([`~datasets.Dataset`]): With the text columns `source` and `target`.
        training_args ([`~transformers.TrainingArguments`]): The run.
        max_source_length (`int`): In tokens.
        max_target_length (`int`): In tokens, with the end-of-text token.
        checkpoint (`str`, *optional*): Checkpoint to continue from.

    Returns:
        [`~encdec_slm.run_results.RunResults`]: Without metrics; `kind` is `"decoder-only training"`.
    """
    set_seed(training_args.seed)
    tokenizer = train_tokenizer(first_texts(dataset, ("source", "target")), vocab_size, max_source_length)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_config(decoder_only_twin(preset_config(preset, tokenizer)))
    lengths = max_source_length, max_target_length
    return train_causal_model(model, tokenizer, dataset, training_args, *lengths, checkpoint, base_model=preset)


def train_causal_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    training_args: TrainingArguments,
    max_source_length: int,
    max_target_length: int,
    checkpoint: str | None = None,
    *,
    base_model: str | None = None,
    supervise_source: bool = True,
    optimizer: str = "adamw",
) -> RunResults:
    """Train a decoder-only model on source and target in one row, and save it with its tokenizer.

    Args:
        model ([`~transformers.PreTrainedModel`]): Is trained.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Has the chat template of the source.
        base_model (`str`, *optional*): Name of the start of the model in the results.
        supervise_source (`bool`, *optional*, defaults to `True`): See [`encode_joined_rows`].
        optimizer (`str`, *optional*, defaults to `"adamw"`): Or `"muon"`.

    Other arguments and the result are those of [`train_decoder_only`].
    """
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=encode_joined_rows(dataset, tokenizer, max_source_length, max_target_length, supervise_source),
        processing_class=tokenizer,
        optimizers=(build_optimizer(optimizer, model, training_args), None),
    )
    show_losses(trainer)
    logger.info(f"Training a decoder-only model with {model.num_parameters():,} parameters.")
    seconds = train(trainer, checkpoint)
    results = RunResults(
        kind=KIND,
        task="text",
        models=[ModelResults("teacher", {}, model.num_parameters(), seconds)],
        saved_model="teacher",
        base_model=base_model,
        **describe_training(
            trainer,
            {"train": dataset},
            max_source_length=max_source_length,
            max_target_length=max_target_length,
        ),
    )
    save_run(trainer, model.generation_config, results)
    return results


def encode_joined_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
    supervise_source: bool = True,
) -> Dataset:
    """Encode source and target of each row as the columns `input_ids` and `labels` of a decoder-only model.

    Args:
        dataset ([`~datasets.Dataset`]): With the text columns `source` and `target`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Has the chat template of the source.
        max_source_length (`int`): In tokens.
        max_target_length (`int`): In tokens, with the end-of-text token.
        supervise_source (`bool`, *optional*, defaults to `True`): Learn to predict the source as well, because
            modeling the source helps to generate the target. `False` sets its labels to -100.
    """
    encoder = DistillationRowEncoder(
        RowEncoder(tokenizer, max_source_length, max_target_length), RowEncoder(tokenizer)
    )
    encoded = encode_rows(as_prompts(dataset, is_chat=True), encoder, "rows of the decoder-only model")

    def join_row(row):
        source, target = row["teacher_source_ids"], row["target_ids"]
        labels = source if supervise_source else [LABELS_PADDING] * len(source)
        return {"input_ids": source + target, "labels": labels + target}

    return encoded.map(join_row, remove_columns=encoded.column_names)

# SPDX-License-Identifier: Apache-2.0
"""Train a small decoder-only model: a teacher to distill from, or a checkpoint to adapt."""

import logging

from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from ..configuration import decoder_only_twin
from ..run_results import ModelResults, RunResults
from .distillation_data import DistillationRowEncoder, as_prompts
from .jobs import describe_training, save_run, show_losses, train
from .new_models import first_texts, preset_config, train_tokenizer
from .row_encoding import RowEncoder, encode_rows


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
    encoder = DistillationRowEncoder(
        RowEncoder(tokenizer, max_source_length, max_target_length), RowEncoder(tokenizer)
    )
    encoded = encode_rows(as_prompts(dataset, is_chat=True), encoder, "rows of the decoder-only model")
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=encoded.map(_join_row, remove_columns=encoded.column_names),
        processing_class=tokenizer,
    )
    show_losses(trainer)
    logger.info(f"Training a decoder-only model with {model.num_parameters():,} parameters.")
    seconds = train(trainer, checkpoint)
    results = RunResults(
        kind=KIND,
        task="text",
        models=[ModelResults("teacher", {}, model.num_parameters(), seconds)],
        saved_model="teacher",
        base_model=preset,
        **describe_training(
            trainer,
            {"train": dataset},
            max_source_length=max_source_length,
            max_target_length=max_target_length,
        ),
    )
    save_run(trainer, model.generation_config, results)
    return results


def _join_row(row):
    """Join source and target. Both are learned, because modeling the source helps to generate the target."""
    ids = row["teacher_source_ids"] + row["target_ids"]
    return {"input_ids": ids, "labels": list(ids)}

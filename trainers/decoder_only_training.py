# SPDX-License-Identifier: Apache-2.0
"""A small decoder-only model, trained on the spot: a teacher to distil from, a checkpoint to adapt."""

import json
import logging
import time
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from ..configuration import decoder_only_twin
from .distillation_data import DistillationRowEncoder, as_prompts
from .new_models import first_texts, preset_config, train_tokenizer
from .resuming import last_complete_checkpoint
from .row_encoding import RowEncoder, encode_rows
from .run_reports import show_losses, write_file


logger = logging.getLogger(__name__)

# It reads a source, this token, and writes: its template says so to whoever loads it.
CHAT_TEMPLATE = "{{ messages[0]['content'] }}{{ bos_token }}"
FINISHED = "trained.json"


def train_decoder_only(
    preset: str,
    vocab_size: int,
    dataset: Dataset,
    training_args: TrainingArguments,
    max_source_length: int,
    max_target_length: int,
) -> float:
    """Trains the decoder-only twin of a preset on whole rows; model and tokenizer are saved to the output folder.

    Args:
        preset (`str`): See [`~encdec_slm.configuration.list_presets`].
        vocab_size (`int`): Upper bound for its tokenizer, which is trained on the same rows.
        dataset ([`~datasets.Dataset`]): With string columns `source` and `target`.
        training_args ([`~transformers.TrainingArguments`]): The run. With `resume_from_checkpoint: "true"` it goes on
            from its last complete checkpoint, if there is one.
        max_source_length (`int`): In tokens.
        max_target_length (`int`): In tokens, with the end-of-text token.

    Returns:
        `float`: Seconds of the training, of a resumed one those since then.
    """
    set_seed(training_args.seed)
    tokenizer = train_tokenizer(first_texts(dataset, ("source", "target")), vocab_size, max_source_length)
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_config(decoder_only_twin(preset_config(preset, tokenizer)))
    lengths = (max_source_length, max_target_length)
    encoder = DistillationRowEncoder(RowEncoder(tokenizer, *lengths), RowEncoder(tokenizer))
    encoded = encode_rows(as_prompts(dataset, is_chat=True), encoder, "decoder-only model's data")
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=encoded.map(_causal_row, remove_columns=encoded.column_names),
    )
    show_losses(trainer)
    logger.info(f"Training a decoder-only model of {model.num_parameters():,} parameters.")
    resumes = str(training_args.resume_from_checkpoint).lower() == "true"
    checkpoint = last_complete_checkpoint(training_args.output_dir) if resumes else None
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = round(time.perf_counter() - started, 1)
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(training_args.output_dir)
        finished = Path(training_args.output_dir) / FINISHED
        write_file(finished, lambda path: path.write_text(json.dumps({"train_seconds": seconds}), encoding="utf-8"))
    trainer.accelerator.wait_for_everyone()  # other processes read what this one has saved
    return seconds


def train_seconds_of(folder: str | Path) -> float | None:
    """Seconds that the model in a folder of [`train_decoder_only`] took, or `None` where none was finished."""
    finished = Path(folder) / FINISHED
    return json.loads(finished.read_text(encoding="utf-8"))["train_seconds"] if finished.is_file() else None


def _causal_row(row):
    """Source and target in one row, both of which are learnt: knowing code helps to speak of it."""
    ids = row["teacher_source_ids"] + row["target_ids"]
    return {"input_ids": ids, "labels": list(ids)}

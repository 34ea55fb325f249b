# SPDX-License-Identifier: Apache-2.0
"""The visual task of examples/evidence.py: questions about images, for a vision-text model and a LLaVA-NeXT."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evidence_measures import sum_losses
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import LlavaNextForConditionalGeneration, Seq2SeqTrainingArguments, Trainer

from encdec_slm import EncDecVLMConfig, EncDecVLMForConditionalGeneration
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.trainers.image_rows import ImageRowEncoder
from encdec_slm.trainers.new_models import build_vision_model
from encdec_slm.trainers.row_encoding import LABELS_PADDING, build_row_encoder
from encdec_slm.trainers.tasks.visual import build_visual_tasks


PRESET = "360k-vlm"
NUM_ROWS, NUM_HELD_OUT_ROWS = 1_500, 100  # of each kind of question
EVALUATION_BATCH_SIZE = 50


class Images(NamedTuple):
    """What reads the rows: the config of the vision-text model, and the encoder of rows with its processor."""

    config: EncDecVLMConfig
    encoder: ImageRowEncoder


def load_rows(task: Any, layers: Mapping[str, int]) -> tuple[dict[str, list[dict]], Images]:
    """Draw the rows of a task by split, and make the processor for its training rows.

    Args:
        task (`Task`): Limits of lengths and vocabulary.
        layers (`Mapping`): Numbers of encoder and decoder layers.
    """
    datasets = build_visual_tasks(NUM_ROWS, NUM_HELD_OUT_ROWS)
    model, processor = build_vision_model(PRESET, datasets["train"], task.vocab_size)
    fields = model.config.to_dict()
    fields["text_config"] |= layers
    config = EncDecVLMConfig.from_dict(fields)
    options = {"max_target_length": task.max_target_length}
    encoder = build_row_encoder(processor, **options, decoder_start_token_id=config.text_config.decoder_start_token_id)
    splits = {split: [_build_row(row, encoder) for row in rows] for split, rows in datasets.items()}
    random.Random(0).shuffle(splits["train"])
    return splits, Images(config, encoder)


def _build_row(row, encoder):
    lengths = (
        len(encoder.encode_source(row["question"], row["image"]).input_ids),
        len(encoder.encode_target(row["answer"])[0]),
    )
    return {**{name: row[name] for name in ("image", "question", "answer")}, "lengths": lengths}


def build_config(images: Images, is_encoder_decoder: bool) -> Any:
    """Return the config of one of the two models, which have equal parameters within 1 %."""
    return images.config if is_encoder_decoder else decoder_only_twin(images.config)


class RowCollator:
    """Make batches of rows: for a decoder-only model, source and target in one row.

    Args:
        encoder ([`~encdec_slm.trainers.image_rows.ImageRowEncoder`]): Of the rows.
        is_encoder_decoder (`bool`): Of the model.
        has_target (`bool`, *optional*, defaults to `True`): Without it, a decoder-only model is asked to generate it.
    """

    def __init__(self, encoder: ImageRowEncoder, is_encoder_decoder: bool, has_target: bool = True):
        self.encoder, self.is_encoder_decoder, self.has_target = encoder, is_encoder_decoder, has_target

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Return the inputs of the model."""
        names = ("image", "question", "answer") if self.has_target else ("image", "question")
        batch = self.encoder.collate([{name: row[name] for name in names} for row in rows])
        if self.is_encoder_decoder:
            return batch
        input_ids, labels = [], []
        targets = batch.get("labels", torch.empty(len(rows), 0, dtype=torch.long))
        for ids, mask, target in zip(batch["input_ids"], batch["attention_mask"], targets, strict=True):
            # As in the text tasks, the end of the source is the token that starts the target.
            source = torch.cat((ids[mask.bool()][:-1], ids.new_tensor([self.encoder.decoder_start_token_id])))
            target = target[target != LABELS_PADDING]
            input_ids.append(torch.cat((source, target)))
            labels.append(torch.cat((torch.full_like(source, LABELS_PADDING), target)))
        side = "right" if self.has_target else "left"
        pad_id = self.encoder.tokenizer.pad_token_id
        joined = {
            "input_ids": pad_sequence(input_ids, True, pad_id, side),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], True, 0, side),
            "pixel_values": batch["pixel_values"].unflatten(0, (len(rows), -1)),
            "image_sizes": batch["image_sizes"],
        }
        return {**joined, "labels": pad_sequence(labels, True, LABELS_PADDING)} if self.has_target else joined


def train_model(model: Any, images: Images, rows: Sequence[dict], settings: Mapping[str, Any]) -> None:
    """Train a model on the rows in their order, and save it."""
    collate = RowCollator(images.encoder, model.config.is_encoder_decoder)
    training_args = Seq2SeqTrainingArguments(**settings, remove_unused_columns=False)
    trainer = Trainer(model, training_args, collate, rows)
    trainer.train()
    trainer.save_model()


def row_losses(model: Any, images: Images, rows: Sequence[dict]) -> tuple[list[float], list[int]]:
    """Return what [`sum_losses`] does."""
    return sum_losses(model, _build_batches(model, images, rows))


@torch.no_grad()
def score_answers(model: Any, images: Images, rows: Sequence[dict], max_new_tokens: int) -> list[float]:
    """Return for each row 1 if the greedy answer is exact, else 0."""
    tokenizer, completions = images.encoder.tokenizer, []
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for batch in _build_batches(model, images, rows, has_target=False):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        output = model.generate(**batch, **ids, do_sample=False, max_new_tokens=max_new_tokens)
        start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        completions += tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    return [float(text.strip() == row["answer"].strip()) for text, row in zip(completions, rows, strict=True)]


def _build_batches(model, images, rows, has_target=True):
    collate = RowCollator(images.encoder, model.config.is_encoder_decoder, has_target)
    return DataLoader(rows, EVALUATION_BATCH_SIZE, collate_fn=collate)


def load_model(folder: Path, is_encoder_decoder: bool, device: str) -> Any:
    """Load a trained model to measure it."""
    kind = EncDecVLMForConditionalGeneration if is_encoder_decoder else LlavaNextForConditionalGeneration
    return kind.from_pretrained(folder).to(device).eval()

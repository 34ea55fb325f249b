# SPDX-License-Identifier: Apache-2.0
"""Model cards, filled in from what a run has measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig


TEMPLATE = Path(__file__).parent / "model_card.md"


def model_card(name: str, config: PreTrainedConfig, results: dict[str, Any]) -> ModelCard:
    """The card of a fine-tuned model; `.save(path)` writes it.

    Args:
        name (`str`): Heading of the card.
        config ([`EncDecSLMConfig`]): Of the model.
        results (`dict`): What [`~encdec_slm.trainers.finetuning.finetune`] returned.
    """
    counts = results["rows"]["train"]
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text2text-generation", tags=[config.model_type]),
        template_path=str(TEMPLATE),
        **results,
        model_name=name,
        encoder_layers=config.encoder_num_hidden_layers,
        decoder_layers=config.decoder_num_hidden_layers,
        train_rows=f"{counts['rows']:,}",
        cut_sources=counts.get("source", 0),
        cut_targets=counts.get("target", 0),
    )

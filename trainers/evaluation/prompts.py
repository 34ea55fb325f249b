# SPDX-License-Identifier: Apache-2.0
"""Prompts of decoder-only models in an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..prompt_templates import load_prompt_template
from ..row_encoding import EncodedSource, Messages, RowEncoder, pad_ids


@dataclass
class PromptEncoder(RowEncoder):
    """Encode sources as prompts of a decoder-only model.

    Args:
        prompt_template (`str` or `Path`, *optional*): Jinja template with the field `source`, see
            [`~encdec_slm.trainers.prompt_templates.load_prompt_template`]. The tokenizer's chat template, if it has
            one, renders the result as a message of the user.
    """

    prompt_template: str | Path | None = None

    def encode_source(
        self, source: str | Messages, *, before: str = "", after: str = "", where: str = "source"
    ) -> EncodedSource:
        """Encode one prompt; a prompt that is longer than `max_source_length` loses its first tokens."""
        text = before + source + after
        if self.prompt_template is not None:
            text = load_prompt_template(self.prompt_template)({"source": text})
        is_chat = self.tokenizer.chat_template is not None
        encoded = self.encode_prompt([{"role": "user", "content": text}] if is_chat else text, where=where)
        if self._is_too_long(encoded.input_ids):
            encoded = encoded._replace(input_ids=encoded.input_ids[-self.max_source_length :])
        return encoded

    def collate_sources(self, sources: Sequence[EncodedSource]) -> Mapping[str, torch.Tensor]:
        """Pad prompts on the left; return `input_ids` and `attention_mask` of shape `(batch_size, length)`."""
        input_ids, attention_mask = pad_ids(
            [source.input_ids for source in sources], self._pad_token_id, padding_side="left"
        )
        return {"input_ids": input_ids, "attention_mask": attention_mask}

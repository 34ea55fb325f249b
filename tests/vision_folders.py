# SPDX-License-Identifier: Apache-2.0
"""A folder with a tiny vision-text model and its processor, for tests that publish one."""

from pathlib import Path

from encdec_slm import EncDecVLMConfig, EncDecVLMForConditionalGeneration
from encdec_slm.configuration import load_preset
from encdec_slm.trainers.new_models import build_processor, train_tokenizer


def save_tiny_vision_model(folder: Path) -> EncDecVLMForConditionalGeneration:
    """The model that was saved."""
    tokenizer = train_tokenizer(["what is in the picture?", "a red square"], 300, 512)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    fields = load_preset("tiny-vlm").to_dict()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "decoder_start_token_id": tokenizer.bos_token_id}
    fields["text_config"] |= {**ids, "vocab_size": len(tokenizer)}
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    config = EncDecVLMConfig.from_dict(fields)
    model = EncDecVLMForConditionalGeneration(config)
    model.save_pretrained(folder)
    build_processor(config, tokenizer).save_pretrained(folder)
    return model

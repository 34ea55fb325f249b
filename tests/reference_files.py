# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and tokenizers in the format of microsoft/encoder-decoder-slm, as a pytest plugin."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from conftest import TEXT_CODE_FILES
from encdec_slm.conversion import convert_reference_checkpoint


MU_CONFIG = {
    **{"n_encoder_layer": 2, "n_decoder_layer": 1, "n_embd": 16, "qkv_embd": 48, "is_interleaved": False},
    **{"hidden_dim": 24, "n_head": 4, "n_kv_head": 2, "block_size": 512, "dropout": 0.1, "rope_theta": 10000},
    **{"rope_factor": 1.0, "pad_token_id": 0, "vocab_size": 400},
}
HEADS = {"n_head": 4, "n_kv_head": 2}
MODEL_FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *TEXT_CODE_FILES,
}
TOKENIZER_CONFIG = {
    **{"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_eos_token": False},
    **{"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "model_max_length": 8192},
    **{"pad_token": "<|endoftext|>", "padding_side": "left", "clean_up_tokenization_spaces": False},
}


def make_weights(dtype=torch.float32, vocab_size=400, width=16, query=48, key_value=24, inner=24, depths=(2, 1)):
    """Build an original state dict."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"transformer.wte": [(vocab_size, width)], "transformer.ln_e": [(width,)], "transformer.ln_f": [(width,)]}
    for stack, depth, attentions in (("e", depths[0], ["attn"]), ("h", depths[1], ["causal_attn", "cross_attn"])):
        for block in (f"transformer.{stack}.{index}" for index in range(depth)):
            shapes |= {f"{block}.ln{index + 1}": [(width,)] for index in range(len(attentions) + 1)}
            shapes |= {f"{block}.mlp.fc1": [(inner, width), (inner,)], f"{block}.mlp.fc2": [(width, inner), (width,)]}
            for name in attentions:
                for projection, rows in {"q": query, "k": key_value, "v": key_value}.items():
                    shapes[f"{block}.{name}.{projection}_linear"] = [(rows, width), (rows,)]
                shapes[f"{block}.{name}.out_linear"] = [(width, query), (width,)]
    weights = {
        f"{name}.{part}": torch.randn(shape, generator=generator).to(dtype)
        for name, parts in shapes.items()
        for part, shape in zip(("weight", "bias"), parts, strict=False)
    }
    return {**weights, "lm_head.weight": weights["transformer.wte.weight"]}


@pytest.fixture
def save(tmp_path):
    def save(weights=None, **others):
        content = {"model_state_dict": make_weights() if weights is None else weights, **others}
        torch.save(content, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return save


@pytest.fixture
def checkpoint(save):
    return save(model_config=MU_CONFIG, global_step=7, score=torch.tensor(-1.0))


@pytest.fixture
def refused(tmp_path):
    """A function that converts what must be refused, and returns the message."""

    def refused(path, **kwargs):
        with pytest.raises(ValueError) as caught:
            convert_reference_checkpoint(path, tmp_path / "output", **kwargs)
        assert not (tmp_path / "output").exists()
        return str(caught.value)

    return refused


@pytest.fixture(scope="module")
def original():
    """A BPE with byte fallback like the original tokenizer, trained on few texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["hello world, hi there user, leading bar Denver  two"] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    content["added_tokens"][2] |= {"special": False, "rstrip": True}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<|user|>", rstrip=True)])
    return tokenizer


@pytest.fixture
def tokenizer_folder(original, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    original.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|endoftext|>"}}))
    return folder

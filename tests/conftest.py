# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration


pytest_plugins = ("reference_files",)
# Matrices this small gain nothing from a second thread and lose much when cores are busy; nor do those of scripts.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def tiny_config():
    """Under 1M parameters, two layers per stack, dropout off; what differs in width differs in number."""
    return EncDecSLMConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=56,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


@pytest.fixture
def tiny_model(tiny_config):
    """Fresh weights of a fixed seed, in eval mode."""
    return randomised(EncDecSLMForConditionalGeneration(tiny_config)).eval()


@pytest.fixture
def source():
    """Ids of shape (3, 9) and their mask: rows of 9, 5 and 7 real tokens, padded on the right."""
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


@pytest.fixture
def target_ids():
    """Decoder input of shape (3, 6) that begins with the start token."""
    ids = torch.randint(3, 97, (3, 6), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 1
    return ids


def randomised(model, seed=0):
    """`model` with every tensor drawn anew, norms and biases too, so that none of them is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = name.endswith("norm.weight")
            parameter.normal_(mean=float(is_gain), std=0.2, generator=generator)
    return model

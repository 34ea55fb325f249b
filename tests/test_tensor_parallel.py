# SPDX-License-Identifier: Apache-2.0
"""Two processes that share a model by its tensor-parallel plan compute what one process does."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSeq2SeqLM
from transformers.distributed import DistributedConfig

from conftest import (
    build_config,
    build_model,
    build_source,
    build_target_ids,
    build_vision_config,
    build_vision_inputs,
    build_vision_model,
)


# Sharded by columns, by rows, and not at all.
GRADIENTS = (
    *("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight", "encoder.norm.weight"),
    *("self_attn.q_norm.weight", "cross_attn.k_norm.weight"),
)


def run_step(model, inputs):
    """Loss, logits and a few gradients of one training step, and the tokens that are generated."""
    outputs = model(**inputs, labels=build_target_ids(len(inputs["input_ids"]), 6))
    outputs.loss.backward()
    gradients = {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
        if name.endswith(GRADIENTS)
    }
    tokens = model.generate(**inputs, max_new_tokens=4)
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), "tokens": tokens, "grads": gradients}


def run_rank(rank, port, folder, inputs):
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    dist.init_process_group("gloo")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    num_sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    result = {**run_step(model, inputs), "num_sharded": num_sharded}
    torch.save(result, folder / f"result_{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def build(kind):
    """A model and its inputs."""
    if kind == "vision":
        model = build_vision_model(build_vision_config(build_config(vocab_size=98)))
        return model, build_vision_inputs(model.config, [[(11, 16)], []])
    fields = {}
    if kind == "untied":
        fields = {"tie_word_embeddings": False, "gated_mlp": False, "attention_bias": True, "mlp_bias": True}
    if kind == "qk_norm":
        fields = {"qk_norm": True}
    return build_model(vocab_size=98, **fields), build_source(9, 5, 7)


@pytest.mark.parametrize("kind", ["text", "untied", "qk_norm", "vision"])
def test_two_processes_compute_what_one_does(kind, tmp_path):
    model, inputs = build(kind)
    model.save_pretrained(tmp_path)
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [context.Process(target=run_rank, args=(rank, port, tmp_path, inputs)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    expected = run_step(model, inputs)
    for rank in range(2):
        result = torch.load(tmp_path / f"result_{rank}.pt")
        # q, k, v and o of an attention and the matrices of an MLP, each with its weight and perhaps its bias.
        assert result.pop("num_sharded") >= 2 * 6 + 2 * 10
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)  # sums in another order

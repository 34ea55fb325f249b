# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from encdec_slm.benchmarks.contenders import BASELINE, Contender
from encdec_slm.benchmarks.decoder_only import (
    build_decoder_only_spec,
    export_decoder_only,
    time_decoder_only_tokens,
)
from encdec_slm.export.onnx_graphs import cache_names
from encdec_slm.export.onnx_runtime import check_providers, open_onnxruntime_graph


ctranslate2 = pytest.importorskip("ctranslate2")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def baseline():
    return Contender(BASELINE, "transformers", "float32", "cpu", "tiny").build_model(torch.float32)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph(baseline, prompt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    export_decoder_only(baseline, folder, "model.onnx")
    baseline.set_attn_implementation("sdpa")
    return open_onnxruntime_graph(folder / "model.onnx", providers=check_providers(None))


def test_the_graph_gives_the_logits_of_the_baseline_at_once_and_in_pieces(graph, baseline, prompt):
    config = baseline.config
    names = cache_names(config.num_hidden_layers, "present", "decoder")

    def run(ids, cache):
        shape = (1, config.num_key_value_heads, cache[0].shape[2] + ids.shape[1], config.head_dim)
        past = {name.replace("present", "past_key_values"): tensor for name, tensor in zip(names, cache, strict=True)}
        shapes = {"logits": (1, 1, config.vocab_size), **dict.fromkeys(names, shape)}
        outputs = graph({"input_ids": ids, **past}, shapes)
        return outputs["logits"][0, 0], [outputs[name] for name in names]

    empty = [torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)] * len(names)
    with torch.no_grad():
        expected = baseline(prompt).logits[0, -1]
    torch.testing.assert_close(run(prompt, empty)[0], expected, atol=1e-5, rtol=1e-5)
    _, cache = run(prompt[:, :4], empty)
    torch.testing.assert_close(run(prompt[:, 4:], cache)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_timed_loop_generates_what_greedy_search_generates(graph, baseline, prompt):
    seconds, token_ids = time_decoder_only_tokens(graph, baseline.config, prompt[0].tolist(), 5)
    expected = baseline.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert token_ids == expected[0, 9:].tolist()
    assert len(seconds) == 5 and seconds == sorted(seconds)


@pytest.mark.parametrize("preset", ["tiny", "330m"])
def test_ctranslate2_gives_the_logits_of_the_baseline(preset, prompt, tmp_path):
    # The baseline of 330m is a Qwen3 without norms of queries and keys; here with fewer and smaller layers.
    contender = Contender(BASELINE, "ctranslate2", "float32", "cpu", preset)
    if preset == "330m":
        config = contender.config
        config.num_hidden_layers, config.intermediate_size, config.vocab_size = 2, 64, 320
        config.layer_types = config.layer_types[:2]
        contender = _with_config(contender, config)
    model = contender.build_model(torch.float32)
    spec = build_decoder_only_spec(model)
    spec.validate()
    spec.save(str(tmp_path))
    tokens = [f"<id_{token_id}>" for token_id in prompt[0].tolist()]
    found = np.array(ctranslate2.Generator(str(tmp_path), intra_threads=1).forward_batch([tokens]))[0, -1]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(prompt).logits[0, -1].numpy(), atol=1e-4)


def _with_config(contender, config):
    class Shrunk(Contender):
        @property
        def config(self):
            return config

    return Shrunk(*(getattr(contender, name) for name in ("model", "engine", "precision", "device", "preset")))

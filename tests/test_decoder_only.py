# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from encdec_slm.benchmarks.contenders import BASELINE, Contender
from encdec_slm.benchmarks.decoder_only import decoder_only_spec, decoder_only_token_seconds, export_decoder_only
from encdec_slm.export.onnx_runtime import Graph


ctranslate2 = pytest.importorskip("ctranslate2")
onnxruntime = pytest.importorskip("onnxruntime")

# torch 2.13's exporter warns of what it calls itself.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def twin():
    return Contender(BASELINE, "transformers", "float32", "cpu", "tiny").build_model(torch.float32)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def logits(twin, prompt):
    with torch.no_grad():
        return twin(prompt).logits[0, -1].numpy()


@pytest.fixture(scope="module")
def session(twin, logits, tmp_path_factory):
    path = tmp_path_factory.mktemp("twin") / "model.onnx"
    export_decoder_only(twin, path)
    return onnxruntime.InferenceSession(path)


def empty_past(session):
    return {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in session.get_inputs()[1:]}


def test_the_graph_gives_the_twins_logits_at_once_and_in_pieces(session, prompt, logits):
    past, ids = empty_past(session), prompt.numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ids, **past})[0][0], logits, atol=1e-5)
    first = session.run(None, {"input_ids": ids[:, :4], **past})
    second = session.run(None, {"input_ids": ids[:, 4:], **dict(zip(past, first[1:], strict=True))})
    np.testing.assert_allclose(second[0][0], logits, atol=1e-5)


def test_the_timed_loop_writes_what_greedy_search_writes(session, twin, prompt):
    seconds, written = decoder_only_token_seconds(Graph(session), twin.config, prompt[0].tolist(), 5)
    expected = twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert written == expected[0, 9:].tolist()
    assert len(seconds) == 5 and seconds == sorted(seconds)


@pytest.mark.parametrize("preset", ["tiny", "330m"])
def test_ctranslate2_gives_the_twins_logits(preset, prompt, tmp_path):
    # The twin of 330m is a Qwen3 without norms of queries and keys, and narrow heads: here with fewer, smaller layers.
    one = Contender(BASELINE, "ctranslate2", "float32", "cpu", preset)
    if preset == "330m":
        config = one.config
        config.num_hidden_layers, config.intermediate_size, config.vocab_size = 2, 64, 320
        config.layer_types = config.layer_types[:2]
        one = _with_config(one, config)
    model = one.build_model(torch.float32)
    spec = decoder_only_spec(model)
    spec.validate()
    spec.save(str(tmp_path))
    tokens = [f"<id_{token_id}>" for token_id in prompt[0].tolist()]
    given = np.array(ctranslate2.Generator(str(tmp_path), intra_threads=1).forward_batch([tokens]))[0, -1]
    with torch.no_grad():
        np.testing.assert_allclose(given, model(prompt).logits[0, -1].numpy(), atol=1e-4)


def _with_config(contender, config):
    class Shrunk(Contender):
        @property
        def config(self):
            return config

    return Shrunk(*(getattr(contender, name) for name in ("model", "engine", "precision", "device", "preset")))

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from encdec_slm.benchmarks.contenders import (
    BASELINE,
    FLAN_T5,
    OURS,
    T5GEMMA2,
    Contender,
    list_contenders,
    load_config,
)
from encdec_slm.configuration.sizes import num_parameters


def contender(model=OURS, precision="float32", preset="tiny"):
    return Contender(model, "transformers", precision, "cpu", preset)


def test_every_engine_times_this_family_beside_its_baseline():
    listed = list_contenders("tiny", ["cpu"])
    names = [one.name for one in listed]
    for one in listed:
        if one.model == OURS:
            assert one.name.replace(OURS, BASELINE) in names
    assert {one.model for one in listed} == {OURS, BASELINE, T5GEMMA2, FLAN_T5}
    assert len(set(names)) == len(names)


def test_patterns_select_contenders_and_an_unknown_one_is_refused_with_the_names():
    listed = list_contenders("tiny", ["cpu"], ["decoder-only/transformers/float32/*"])
    assert [one.name for one in listed] == ["decoder-only/transformers/float32/cpu"]
    with pytest.raises(ValueError, match=r"nothing.*decoder-only/transformers/float32/cpu"):
        list_contenders("tiny", ["cpu"], ["nothing"])


def test_peers_have_their_published_sizes():
    # T5Gemma 2 270M-270M shares one table of 262,144 x 640. FLAN-T5-large has 783M with a head of its own, which
    # transformers 5 ties; both read it once per token.
    assert num_parameters(load_config(T5GEMMA2, "tiny")) == pytest.approx(370e6, rel=0.01)
    assert num_parameters(load_config(FLAN_T5, "tiny")) == pytest.approx(783e6 - 32_128 * 1024, rel=0.01)


def test_the_bytes_of_a_step_are_those_of_weights_and_caches():
    assert contender().step_bytes(20) == 4 * (174_528 + 20 * 128)
    assert contender(precision="int8").step_bytes(20) == 174_528 + 4 * 20 * 128
    int4 = Contender(OURS, "onnxruntime_genai", "int4", "cpu", "tiny")
    assert int4.step_bytes(20) == (174_528 - 1024 * 64) * 9 / 16 + 1024 * 64 * 9 / 8 + 4 * 20 * 128
    assert contender(precision="bfloat16", preset="330m").step_bytes(0) == 273_121_792


@pytest.mark.parametrize("model", [OURS, BASELINE])
def test_a_random_model_has_the_shape_and_never_ends_a_text(model):
    built = contender(model).build_model(torch.float32)
    assert built.num_parameters() == num_parameters(load_config(model, "tiny"))
    assert built.generation_config.eos_token_id is None and not built.training
    ids = torch.tensor([[5, 6, 7]])
    generated = built.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert generated.shape[1] == 9 + (1 if model == OURS else 3)

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from encdec_slm.benchmarks.contenders import (
    FLAN_T5,
    OURS,
    T5GEMMA2,
    TWIN,
    Contender,
    config_of,
    list_contenders,
    needs_of,
    random_model,
)
from encdec_slm.configuration import load_preset
from encdec_slm.configuration.sizes import num_parameters


def contender(model=OURS, precision="float32", preset="tiny"):
    return Contender(model, "transformers", precision, "cpu", preset)


def test_every_engine_has_ours_beside_the_twin():
    listed = list_contenders("tiny", ["cpu"])
    for one in listed:
        if one.model == OURS:
            opponents = {(two.engine, two.precision) for two in listed if two.model == TWIN}
            assert (one.engine, one.precision) in opponents, one.name
    assert {one.model for one in listed} == {OURS, TWIN, T5GEMMA2, FLAN_T5}
    assert len({one.name for one in listed}) == len(listed)


def test_patterns_choose_and_an_unknown_one_is_answered_with_the_names():
    assert [one.name for one in list_contenders("tiny", ["cpu"], ["twin/transformers/float32/*"])] == [
        "twin/transformers/float32/cpu"
    ]
    with pytest.raises(ValueError, match=r"No contender fits nothing.*twin/transformers/float32/cpu"):
        list_contenders("tiny", ["cpu"], ["nothing"])


def test_peers_have_the_sizes_that_were_published():
    # T5Gemma 2 270M-270M shares one table of 262,144 x 640. FLAN-T5-large has 783M with a head of its own, which
    # transformers 5 ties; both read it once per token.
    assert needs_of(config_of(T5GEMMA2, "tiny")).num_parameters == pytest.approx(370e6, rel=0.01)
    assert needs_of(config_of(FLAN_T5, "tiny")).num_parameters == pytest.approx(783e6 - 32_128 * 1024, rel=0.01)


def test_needs_follow_from_the_shape_of_the_predecessors_model():
    needs = needs_of(load_preset("330m"))
    assert needs.num_parameters == 332_042_240
    assert needs.source_weights == pytest.approx(195.5e6, rel=0.001)
    assert needs.step_weights == pytest.approx(136.6e6, rel=0.001)
    assert 2 * needs.cached_values == 7_680  # bytes per token in bfloat16
    twin = needs_of(config_of(TWIN, "330m"))
    assert twin.num_parameters == pytest.approx(needs.num_parameters, rel=0.01)
    assert twin.source_weights == pytest.approx(299.1e6, rel=0.01)
    assert twin.step_weights == twin.num_parameters


def test_bytes_and_operations_follow_from_the_definition():
    needs = needs_of(load_preset("tiny"))
    assert needs.step_bytes(contender(), 20) == 4 * (174_528 + 20 * 128)
    assert needs.step_bytes(contender(precision="int8"), 20) == 174_528 + 4 * 20 * 128
    # 4 layers with 64 wide heads: queries by keys and probabilities by values, 2 operations each.
    expected = 2 * (16 * needs.source_weights + needs.step_weights) + 2 * 2 * 4 * 64 * 16**2
    assert needs.first_token_flops(16) == expected


@pytest.mark.parametrize("model", [OURS, TWIN])
def test_a_random_model_has_the_shape_and_never_ends_a_text(model):
    built = random_model(contender(model), torch.float32)
    assert built.num_parameters() == num_parameters(config_of(model, "tiny"))
    assert built.generation_config.eos_token_id is None and not built.training
    ids = torch.tensor([[5, 6, 7]])
    written = built.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert written.shape[1] == 9 + (1 if model == OURS else 3)

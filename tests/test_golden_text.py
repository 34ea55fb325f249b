# SPDX-License-Identifier: Apache-2.0
"""Converted checkpoints compared with what microsoft/encoder-decoder-slm computes, in fp32."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import encdec_slm  # noqa: F401 (registers the classes)
from encdec_slm.conversion import convert_reference_checkpoint, convert_reference_state_dict


GOLDEN = Path(__file__).parent / "golden"
# The original scales scores after the product and writes GELU out: sums round differently, by far less than any
# wrong convention (3.5e-4) moves them.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def cases():
    return load_file(GOLDEN / "text_a.cases.safetensors")


def load_converted(folder, attn_implementation="sdpa", **changes):
    """What the converter makes of a checkpoint with the golden weights, loaded as anybody loads it."""
    with safe_open(GOLDEN / "text_a.weights.safetensors", "pt") as file:
        model_config = json.loads(file.metadata()["config"]) | changes
    weights = load_file(GOLDEN / "text_a.weights.safetensors")
    torch.save({"model_state_dict": weights, "model_config": model_config}, folder / "model.pt")
    words = {"<unk>": 0, "<s>": 1, "<|endoftext|>": 79}
    words |= {f"w{index}": index for index in range(97) if index not in words.values()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")))
    convert_reference_checkpoint(folder / "model.pt", folder / "converted", tokenizer=tokenizer)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        folder / "converted", attn_implementation=attn_implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


# Scaling changes nothing up to its block size; 16 is the longest input of any case.
SCALED = {"rope_factor": 4.0, "block_size": 16}


@pytest.fixture(scope="module", params=[("eager", {}), ("sdpa", {}), ("eager", SCALED), ("sdpa", SCALED)], ids=str)
def model(request, tmp_path_factory):
    attn_implementation, changes = request.param
    model = load_converted(tmp_path_factory.mktemp("golden"), attn_implementation, **changes)
    assert model.config.rope_parameters["rope_type"] == ("dynamic" if changes else "default")
    return model


def inputs_of(cases, case):
    source, target = cases[f"{case}.encoder_input_ids"], cases[f"{case}.decoder_input_ids"]
    return {
        "input_ids": source,
        "attention_mask": (source != 0).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": (target != 0).long(),
    }


def labels_of(cases):
    targets = cases["main.targets"]
    return targets.masked_fill(targets == 0, -100)


def test_every_block_equals_the_reference(model, cases):
    inputs = inputs_of(cases, "main")
    outputs = model(**inputs, output_hidden_states=True)
    source_is_real, target_is_real = inputs["attention_mask"].bool(), inputs["decoder_attention_mask"].bool()
    for index in range(2):  # the last entry is the normed one
        torch.testing.assert_close(
            outputs.encoder_hidden_states[index + 1][source_is_real],
            cases[f"main.enc_block_{index}"][source_is_real],
            **CLOSE,
        )
    torch.testing.assert_close(
        outputs.decoder_hidden_states[1][target_is_real], cases["main.dec_block_0"][target_is_real], **CLOSE
    )
    encoded = outputs.encoder_last_hidden_state
    torch.testing.assert_close(encoded[source_is_real], cases["main.encoder_hidden"][source_is_real], **CLOSE)
    torch.testing.assert_close(outputs.logits[target_is_real], cases["main.logits"][target_is_real], **CLOSE)


@pytest.mark.parametrize("case", ["main", "row2_unpadded", "edge_dec_leading_pad"])
def test_logits_equal_the_reference(model, cases, case):
    inputs = inputs_of(cases, case)
    is_real = inputs["decoder_attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[is_real], cases[f"{case}.logits"][is_real], **CLOSE)


def test_loss_and_gradients_equal_the_reference(model, cases):
    model.zero_grad()
    loss = model(**inputs_of(cases, "main"), labels=labels_of(cases)).loss
    torch.testing.assert_close(loss, cases["main.loss"], **CLOSE)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = {key.removeprefix("main.grad."): value for key, value in cases.items() if key.startswith("main.grad.")}
    assert len(expected) == 8
    for key, value in convert_reference_state_dict(expected, model.config).items():
        torch.testing.assert_close(gradients[key], value, **CLOSE)


def test_greedy_ids_equal_the_reference(model, cases):
    inputs = inputs_of(cases, "main")
    expected = cases["main.greedy_ids"]
    ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=17, do_sample=False)
    ended = (expected[:, :-1] == 79).cumsum(1).bool()  # the original repeats eos, transformers pads
    assert torch.equal(ids[:, 0], expected[:, 0])
    assert torch.equal(
        ids[:, 1:][~ended[:, : ids.shape[1] - 1]], expected[:, 1 : ids.shape[1]][~ended[:, : ids.shape[1] - 1]]
    )


def test_interleaved_heads_need_no_reordering(cases, tmp_path):
    model = load_converted(tmp_path, is_interleaved=True)
    inputs = inputs_of(cases, "main")
    is_real = inputs["decoder_attention_mask"].bool()
    outputs = model(**inputs, labels=labels_of(cases))
    torch.testing.assert_close(outputs.logits[is_real], cases["interleaved.logits"][is_real], **CLOSE)
    torch.testing.assert_close(outputs.loss, cases["interleaved.loss"], **CLOSE)


@pytest.mark.parametrize(("stack", "length"), [("enc", 7), ("enc", 8), ("dec", 7), ("dec", 8)])
def test_rotary_tables_equal_the_reference(model, cases, stack, length):
    first = -((length - 1) // 2) if stack == "enc" else 0  # the original centers encoder positions
    cos, sin = model.model.encoder.rotary_emb(torch.zeros(1), torch.arange(first, first + length)[None])
    torch.testing.assert_close(cos[0], cases[f"rope.{stack}{length}.cos"])
    torch.testing.assert_close(sin[0], cases[f"rope.{stack}{length}.sin"])


@pytest.mark.parametrize("case", ["edge_all_pad", "edge_dec_leading_pad"])
def test_rows_of_only_padding_are_finite_where_the_reference_attends_evenly(model, cases, case):
    logits = model(**inputs_of(cases, case)).logits
    assert logits.isfinite().all()
    if model.config._attn_implementation == "eager":
        torch.testing.assert_close(logits, cases[f"{case}.logits"], **CLOSE)


def test_sampling_filters_keep_ties_as_the_reference_does(cases):
    scores = TopKLogitsWarper(3)(None, TemperatureLogitsWarper(0.9)(None, cases["sampling.logits"]))
    torch.testing.assert_close(scores.softmax(-1), cases["sampling.probs_t0.9_topk3"])

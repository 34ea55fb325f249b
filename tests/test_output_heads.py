# SPDX-License-Identifier: Apache-2.0
"""What enters an output head, read from a model's own forward, and what becomes of it there."""

import logging

import pytest
import torch
import transformers

from conftest import randomised
from encdec_slm.trainers.output_heads import HeadReader, OutputHead


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER_ONLY = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}
ENCODER_DECODERS = ("tiny", "T5", "BART")


@pytest.fixture
def build(tiny_model):
    def build(family):
        if family == "tiny":
            return tiny_model
        if family == "T5":
            sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
            # From v5 on, this and not tied embeddings decides about d_model**-0.5 in front of the head.
            config = transformers.T5Config(**sizes, decoder_start_token_id=0, scale_decoder_outputs=True)
            return randomised(transformers.T5ForConditionalGeneration(config)).eval()
        if family == "BART":
            stack = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}
            stacks = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in stack.items()}
            config = transformers.BartConfig(vocab_size=61, d_model=16, max_position_embeddings=32, **stacks)
            return randomised(transformers.BartForConditionalGeneration(config)).eval()
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **DECODER_ONLY[family]})
        return randomised(getattr(transformers, f"{family}ForCausalLM")(config)).eval()

    return build


def inputs_of(model):
    """Two rows of five tokens, the second padded on the right by two."""
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 61, (2, 4), generator=torch.Generator().manual_seed(2))
    return inputs


def positions_that_pass(head):
    """A list to which each call of `head` adds how many positions it was given."""
    passed = []
    head.register_forward_hook(lambda module, args, output: passed.append(args[0].shape[:-1].numel()))
    return passed


@pytest.mark.parametrize("family", [*ENCODER_DECODERS, *DECODER_ONLY])
@torch.no_grad()
def test_the_head_turns_what_was_read_into_the_model_s_logits(build, family, caplog):
    model, reader = build(family), HeadReader("teacher")
    inputs = inputs_of(model)
    expected = model(**inputs).logits
    for _ in range(2):  # the first call looks whether the head is known, the others trust it
        hidden = reader(model, **inputs)
        width = model.get_output_embeddings().weight.shape[1]
        assert hidden.shape == (*expected.shape[:2], width)
        torch.testing.assert_close(reader.head(model).logits(hidden), expected)
    assert reader.head_is_known and not caplog.records


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
@torch.no_grad()
def test_what_lies_behind_the_head_is_not_forgotten(build, family):
    model, reader = build(family), HeadReader("teacher")
    inputs = inputs_of(model)
    hidden = reader(model, **inputs)
    bare = OutputHead(model.get_output_embeddings().weight).logits(hidden)
    assert not torch.allclose(bare, model(**inputs).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["tiny", "T5", "BART", "Llama"])
@torch.no_grad()
def test_only_one_position_passes_the_head(build, family):
    model, reader = build(family), HeadReader("student")
    passed = positions_that_pass(model.get_output_embeddings())
    for _ in range(3):
        reader(model, **inputs_of(model))
    assert passed == [1, 1, 1]


@pytest.mark.parametrize("family", ["tiny", "T5", "BART", "Llama"])
def test_gradients_flow_back_from_what_was_read(build, family):
    model, reader = build(family), HeadReader("student")
    inputs = inputs_of(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    hidden = reader(model, **inputs)
    weight = draw_like(hidden)
    gradients = torch.autograd.grad((hidden * weight).sum(), parameters, allow_unused=True)
    whole = model(**inputs, output_hidden_states=True)
    last = whole.decoder_hidden_states[-1] if model.config.is_encoder_decoder else whole.hidden_states[-1]
    factor = 16**-0.5 if family == "T5" else 1
    expected = torch.autograd.grad((factor * last * weight).sum(), parameters, allow_unused=True)
    for name, gradient, value in zip(names, gradients, expected, strict=True):
        assert (gradient is None) == (value is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, value)


def draw_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_bias_that_bart_adds_behind_its_head_makes_it_fall_back_to_logits(build, caplog):
    model, reader = build("BART"), HeadReader("student")
    model.final_logits_bias += draw_like(model.final_logits_bias)
    inputs = inputs_of(model)
    with caplog.at_level(logging.WARNING):
        results = [reader(model, **inputs) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "The logits of the student, a BartForConditionalGeneration, are not those of its output head, so they are "
        "computed whole: expect more memory than chunks of them take."
    ]
    expected = model(**inputs).logits
    for logits in results:
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(reader.head(model).logits(logits), expected)
    assert reader.head(model).weight is None


@torch.no_grad()
def test_a_model_that_transforms_logits_by_itself_falls_back_to_them(build, caplog):
    model, reader = build("Llama"), HeadReader("teacher")
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output.clamp(max=0.1))
    inputs = inputs_of(model)
    torch.testing.assert_close(reader(model, **inputs), model(**inputs).logits)
    assert reader.head(model).weight is None and len(caplog.records) == 1


@pytest.mark.parametrize("head_is_known", [None, True])
def test_no_hook_stays_behind_when_forward_raises(build, head_is_known):
    model, reader = build("Llama"), HeadReader("teacher")
    reader.head_is_known = head_is_known

    def fail(module, args, output):
        raise RuntimeError("out of memory")

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        reader(model, **inputs_of(model))
    handle.remove()
    assert not head._forward_pre_hooks
    assert model(**inputs_of(model)).logits.shape == (2, 5, 61)


def test_no_hook_stays_behind_a_call(build):
    model, reader = build("tiny"), HeadReader("student")
    reader(model, **inputs_of(model))
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(**inputs_of(model)).logits.shape == (2, 4, 97)


@torch.no_grad()
def test_a_head_in_half_precision_is_known(build, caplog):
    model, reader = build("Llama").bfloat16(), HeadReader("teacher")
    inputs = inputs_of(model)
    hidden = reader(model, **inputs)
    logits = reader.head(model).logits(hidden)
    assert not caplog.records and logits.dtype == torch.float32
    # Eight bits of mantissa.
    torch.testing.assert_close(logits, model(**inputs).logits.float(), rtol=1e-2, atol=1e-2)


def test_a_head_without_weight_gives_logits_back_as_they_are():
    logits = draw_like(torch.empty(3, 7))
    assert torch.equal(OutputHead(None, scale=2.0, softcap=1.0).logits(logits), logits)
    assert OutputHead(None).vocab_size(logits) == 7


def test_a_head_scales_before_it_caps():
    hidden, weight, bias = draw_like(torch.empty(3, 5)), draw_like(torch.empty(7, 5)), draw_like(torch.empty(7))
    head = OutputHead(weight, bias, scale=0.5, softcap=2.0)
    expected = 2.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2.0)
    torch.testing.assert_close(head.logits(hidden), expected)
    assert head.vocab_size(hidden) == 7


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 2.0), (3.0, 1.5)])
def test_a_gradient_for_logits_is_pulled_back_behind_the_head(scale, softcap):
    hidden, weight, gradient = (draw_like(torch.empty(*shape)) for shape in ((3, 5), (7, 5), (3, 7)))
    head = OutputHead(weight, scale=scale, softcap=softcap)
    projected = (hidden @ weight.T).requires_grad_()
    logits = scale * projected if softcap is None else softcap * torch.tanh(scale * projected / softcap)
    (expected,) = torch.autograd.grad(logits, projected, gradient)
    torch.testing.assert_close(head.pulled_back(gradient, head.logits(hidden)), expected)

# SPDX-License-Identifier: Apache-2.0
"""Rows that are packed into one sequence give the loss and the gradients that they give one by one."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import build_model, build_vision_inputs, build_vision_model
from encdec_slm import EncDecSLMEncoderModel


# Ids of sources and labels: one-token targets, one-token and empty sources, lengths that differ on both sides.
ROWS = [
    ([5, 6, 7, 8, 9, 10, 2], [11, 12, 2]),
    ([13, 2], [2]),
    ([], [14, 15, 2]),
    ([16], [17, 18, 19, 20, 21, 2]),
    ([22, 23, 24, 25], [26]),
]
# A batch of two packed rows: numbers of `ROWS`. The second row has a padding tail on both sides, the first on neither.
PACKS = [[0, 1, 2], [3, 4]]


def pack(packs=PACKS, rows=ROWS, source_length=None, target_length=None):
    """Inputs of packed rows; padding gets the number behind the last segment."""
    batch = {name: [] for name in ("input_ids", "segment_ids", "labels", "decoder_segment_ids")}
    for numbers in packs:
        for kind, (ids, segments) in enumerate((("input_ids", "segment_ids"), ("labels", "decoder_segment_ids"))):
            parts = [rows[number][kind] for number in numbers]
            batch[ids].append(torch.tensor([token_id for part in parts for token_id in part]))
            batch[segments].append(torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts])))
    padding = {"input_ids": 0, "labels": -100, "segment_ids": -1, "decoder_segment_ids": -1}
    batch = {name: pad_sequence(values, True, padding[name]).long() for name, values in batch.items()}
    for names, length in (("input_ids segment_ids", source_length), ("labels decoder_segment_ids", target_length)):
        for name in names.split():
            missing = max(0, (length or 0) - batch[name].shape[1])
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=padding[name])
    behind_last = torch.tensor([len(numbers) for numbers in packs])[:, None]
    for name in ("segment_ids", "decoder_segment_ids"):
        batch[name] = torch.where(batch[name] < 0, behind_last, batch[name])
    return batch


def run(model, **inputs):
    """The share of a batch in the mean loss over all tokens of `ROWS`, and its gradients."""
    model.zero_grad()
    loss = model(**inputs, num_items_in_batch=sum(len(labels) for _, labels in ROWS)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def run_one_by_one(model, rows=ROWS):
    """Sums over rows of what [`run`] returns."""
    total, gradients = torch.tensor(0.0), {}
    for source, labels in rows:
        # An empty source is one token that is not read.
        inputs = {"input_ids": torch.tensor([source or [0]]), "labels": torch.tensor([labels])}
        inputs["attention_mask"] = torch.full_like(inputs["input_ids"], bool(source))
        loss, row_gradients = run(model, **inputs)
        total += loss
        gradients = {name: gradients.get(name, 0) + gradient for name, gradient in row_gradients.items()}
    return total, gradients


def check_equal(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name} {m}"
        )


@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": True, "gated_mlp": False, "attention_bias": True}], ids=["llama", "qwen"]
)
@pytest.mark.parametrize("lengths", [(None, None), (16, 15)], ids=["full pack", "padding"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_rows_give_the_loss_and_gradients_of_single_rows(backend, lengths, fields):
    model = build_model(**fields).train()
    expected = run_one_by_one(model)  # by sdpa, for which an empty source has no keys
    model.set_attn_implementation(backend)
    check_equal(run(model, **pack(source_length=lengths[0], target_length=lengths[1])), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, which warns that this is slow
def test_flex_attention_gives_the_loss_and_gradients_of_single_rows(monkeypatch):
    model = build_model(head_dim=16).train()
    expected = run_one_by_one(model)
    model.set_attn_implementation("flex_attention")

    # torch has no gradient for compiled flex attention on a CPU, but for its definition in plain operators.
    def attend(query, key, value, training=False, **kwargs):
        return flex_attention.flex_attention(query, key, value, **kwargs)

    def build_mask(*args, _compile=False, **kwargs):
        return flex_attention.create_block_mask(*args, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", attend)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", build_mask)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    check_equal(run(model, **pack(source_length=16, target_length=15)), expected)


# What transformers 5.23 calls on the way is deprecated in torch itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_compiled_flex_attention_gives_the_loss_of_single_rows():
    model = build_model(head_dim=16)
    # torch 2.13 compiles no mask of segments on a CPU for lengths that differ, since it makes them variables.
    inputs = pack(source_length=16, target_length=16)
    expected = model(**inputs).loss
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_is_given_the_segments_of_each_attention(monkeypatch):
    """Stands in for the kernel, which needs a GPU: sequences are those of the boundaries that it is given."""
    model = build_model().train()
    expected = run_one_by_one(model)
    model.config._attn_implementation = register_flash_attention(monkeypatch)
    check_equal(run(model, **pack(source_length=16, target_length=15)), expected)


def register_flash_attention(monkeypatch):
    """Register attention over the sequences of `cu_seq_lens_q` and `cu_seq_lens_k`; return its name."""
    name = "flash_attention_by_boundaries"

    def attend(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs):
        assert attention_mask is None and max(kwargs["max_length_q"], kwargs["max_length_k"]) <= 16
        query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (B * T, H, d)
        lengths = [kwargs[f"cu_seq_lens_{side}"].diff().tolist() for side in "qkk"]
        parts = zip(
            *(states.split(sizes) for states, sizes in zip((query, key, value), lengths, strict=True)), strict=True
        )
        outputs = []
        for part in parts:
            q, k, v = (states.transpose(0, 1)[None] for states in part)
            outputs.append(
                F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scaling, enable_gqa=True)
            )
        output = torch.cat([each[0].transpose(0, 1) for each in outputs])
        return output.view(len(PACKS), -1, *output.shape[1:]), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, flash_attention_mask)
    return name


def test_a_packed_encoder_encodes_each_source_by_itself():
    encoder, batch = build_model(EncDecSLMEncoderModel), pack()
    encoded = encoder(batch["input_ids"], segment_ids=batch["segment_ids"]).last_hidden_state
    for row, numbers in enumerate(PACKS):
        for segment, number in enumerate(numbers):
            if source := ROWS[number][0]:
                actual = encoded[row, batch["segment_ids"][row] == segment]
                expected = encoder(torch.tensor([source])).last_hidden_state[0]
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_packed_targets_begin_with_the_start_token():
    batch = pack([[0, 1]])
    shifted = build_model().prepare_decoder_input_ids_from_labels(batch["labels"], batch["decoder_segment_ids"])
    assert shifted.tolist() == [[1, 11, 12, 1]]


def test_positions_alone_do_not_separate_rows(tiny_model, source, target_ids):
    jumps = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(3, -1)
    rope = tiny_model(**source, decoder_input_ids=target_ids, decoder_position_ids=jumps).logits
    masked = tiny_model(
        **source,
        decoder_input_ids=target_ids,
        decoder_position_ids=jumps,
        decoder_attention_mask=torch.ones_like(target_ids),
    ).logits
    torch.testing.assert_close(rope, masked)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"decoder_segment_ids": None}, "decoder_segment_ids"),
        ({"segment_ids": None}, "segment_ids"),
        ({"attention_mask": torch.ones(1, 9)}, "segment_ids"),
        ({"segment_ids": torch.zeros(1, 3, dtype=torch.long)}, r"\(1, 3\)"),
        ({"segment_ids": torch.tensor([[1] * 5 + [0] * 4])}, "segment_ids"),
        ({"decoder_segment_ids": torch.tensor([[-1, 0, 0, 1]])}, "decoder_segment_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 9])}, "cu_seq_lens_q"),
    ],
)
def test_segments_that_cannot_be_kept_apart_are_refused(tiny_model, changes, name):
    with pytest.raises(ValueError, match=name):
        tiny_model(**{**pack([[0, 1]]), **changes})


def test_generation_from_packed_rows_is_refused(tiny_model):
    batch = pack([[0, 1]])
    with pytest.raises(ValueError, match="segment_ids"):
        tiny_model.generate(batch["input_ids"], segment_ids=batch["segment_ids"], max_new_tokens=2)


def test_packed_rows_have_no_cache(tiny_model):
    batch = pack([[0, 1]])
    del batch["labels"]
    outputs = tiny_model(**batch, decoder_input_ids=torch.tensor([[1, 11, 12, 1]]), use_cache=True)
    assert outputs.past_key_values is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_packed_rows_compile_without_graph_breaks():
    model, batch = build_model(), pack(source_length=16, target_length=15)
    expected = model(**batch).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).loss, expected)


def test_packed_sources_may_have_images():
    model = build_vision_model()
    inputs = build_vision_inputs(model.config, [[(11, 16)], [(8, 8)]])
    labels = torch.tensor([[11, 12, 2], [13, 14, 2]])
    expected = model(**inputs, labels=labels).loss
    is_read = inputs["attention_mask"].bool()
    packed = {
        **{"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]},
        **{"input_ids": inputs["input_ids"][is_read][None], "labels": labels.reshape(1, -1)},
        "segment_ids": torch.arange(2).repeat_interleave(is_read.sum(1))[None],
        "decoder_segment_ids": torch.arange(2).repeat_interleave(3)[None],
    }
    torch.testing.assert_close(model(**packed).loss, expected, rtol=1e-5, atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Denoising objectives by their definitions."""

import numpy as np
import pytest
import torch

from conftest import build_byte_tokenizer, build_tokenizer
from encdec_slm.trainers.denoising import (
    OBJECTIVES,
    DataCollatorForDenoising,
    Denoiser,
    add_sentinel_tokens,
    corrupt_spans,
    denoise,
    draw_noise_mask,
    split_prefix,
)


SENTINELS = list(range(1000, 1200))
DENOISERS = sorted({denoiser for objective in OBJECTIVES.values() for denoiser in objective}, key=str)


def restore(source, target):
    """The tokens that a source and a target were made of."""
    spans, found = {}, None
    for token_id in target:
        if token_id in SENTINELS:
            found = spans.setdefault(token_id, [])
        else:
            found.append(token_id)
    return [each for token_id in source for each in spans.get(token_id, [token_id])]


def test_spans_are_replaced_by_sentinels_in_order():
    # The example of T5's figure 2, without the last sentinel of its target, which T5's code does not generate either.
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    mask = np.array([word in ("for", "inviting", "last") for word in words])
    source, target = corrupt_spans(words, mask, ["<X>", "<Y>", "<Z>"])
    assert " ".join(source) == "Thank you <X> me to your party <Y> week ."
    assert " ".join(target) == "<X> for inviting <Y> last"


@pytest.mark.parametrize("length", [2, 3, 5, 64, 511])
@pytest.mark.parametrize("denoiser", DENOISERS, ids=str)
def test_source_and_target_restore_the_tokens(denoiser, length):
    ids = list(range(length))
    source, target = denoise(ids, denoiser, SENTINELS, np.random.default_rng(0))
    assert source and target
    if denoiser.mean_span_length is None:
        assert source + target == ids
    else:
        assert restore(source, target) == ids


@pytest.mark.parametrize(("density", "span_length"), [(0.15, 3.0), (0.5, 8.0), (0.15, 64.0)])
def test_masks_have_the_share_and_the_spans_that_are_asked_for(density, span_length):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = draw_noise_mask(512, density, span_length, rng)
        assert mask.shape == (512,) and mask.sum() == round(512 * density)
        num_spans = (mask & ~np.concatenate(([False], mask[:-1]))).sum()
        assert num_spans == max(1, round(round(512 * density) / span_length))
        assert not mask[0] and mask[-1]


def test_all_divisions_into_spans_are_equally_probable():
    rng = np.random.default_rng(0)
    masks = ["".join(map(str, draw_noise_mask(7, 3 / 7, 1.5, rng).astype(int))) for _ in range(2000)]
    found = {mask: masks.count(mask) / len(masks) for mask in set(masks)}
    assert len(found) == 3 * 2  # 4 kept tokens in 2 spans, 3 noise tokens in 2 spans
    assert all(share == pytest.approx(1 / 6, abs=0.04) for share in found.values())


@pytest.mark.parametrize(("density", "longest"), [(0.5, 99), (0.25, 49)])
def test_prefixes_are_split_uniformly(density, longest):
    rng, ids = np.random.default_rng(0), list(range(100))
    lengths = [len(split_prefix(ids, density, rng)[1]) for _ in range(4000)]
    assert (min(lengths), max(lengths)) == (1, longest)
    assert np.mean(lengths) == pytest.approx(100 * density, abs=1.5)


def test_ul2_mixes_its_seven_denoisers():
    assert [denoiser.mode for denoiser in OBJECTIVES["ul2"]] == list("RRSXXXX")


@pytest.mark.parametrize("build", [build_tokenizer, build_byte_tokenizer])
def test_sentinels_are_added_once_to_any_tokenizer(build):
    tokenizer = build()
    size = len(tokenizer)
    ids = add_sentinel_tokens(tokenizer, 3)
    assert ids == [size, size + 1, size + 2] == add_sentinel_tokens(tokenizer, 3)
    assert tokenizer("<extra_id_1>", add_special_tokens=False)["input_ids"] == [size + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("denoiser", "ids", "name"),
    [
        (Denoiser("R", 0.0, 3.0), [1, 2, 3], "noise_density"),
        (Denoiser("R", 1.0, 3.0), [1, 2, 3], "noise_density"),
        (Denoiser("R", float("nan"), 3.0), [1, 2, 3], "noise_density"),
        (Denoiser("R", 0.15, 0.5), [1, 2, 3], "mean_span_length"),
        (Denoiser("R", 0.15, float("nan")), [1, 2, 3], "mean_span_length"),
        (Denoiser("R", 0.15, 3.0), [1], "got 1"),
        (Denoiser("R", 0.5, 1.0), list(range(500)), "250 spans"),
    ],
)
def test_what_cannot_be_denoised_is_refused(denoiser, ids, name):
    with pytest.raises(ValueError, match=name):
        denoise(ids, denoiser, SENTINELS, np.random.default_rng(0))


def test_a_batch_of_texts_has_every_token_once_and_depends_on_the_seed_only():
    collate = DataCollatorForDenoising(build_byte_tokenizer(), OBJECTIVES["prefix"], 16, decoder_start_token_id=1)
    rows = [{"text": "abcdefghijklmnopqrstuvwxyz", "seed": (0, 0, n)} for n in range(3)] + [{"text": "", "seed": 0}]
    batch = collate(rows)
    again = collate(rows)
    assert batch.keys() == again.keys() and all(torch.equal(batch[name], again[name]) for name in batch)
    assert "decoder_input_ids" in batch and not torch.equal(batch["labels"], collate(rows[1:])["labels"])
    counts = torch.bincount(torch.cat([batch[name][batch[name] > 2] for name in ("input_ids", "labels")]))
    assert sorted(counts[counts > 0].tolist()) == [3] * 26
    parts = collate.denoise_text(rows[0]["text"], rows[0]["seed"])
    assert [len(part["input_ids"]) + len(part["labels"]) - 2 for part in parts] == [16, 10]
    assert collate([rows[3]])["labels"].tolist() == [[-100]]


def test_a_collator_checks_its_numbers():
    for denoisers, length, name in (([Denoiser("S", 1.5)], 8, "noise_density"), (OBJECTIVES["span"], 1, "max_length")):
        with pytest.raises(ValueError, match=name):
            DataCollatorForDenoising(build_byte_tokenizer(), denoisers, length)

# SPDX-License-Identifier: Apache-2.0
"""Sources and targets of rows as token ids, for text and for images, and batches of them."""

import io
import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from conftest import build_byte_tokenizer, build_config, build_processor, build_tokenizer, build_vision_config
from encdec_slm.trainers.row_encoding import RowEncoder, build_row_encoder, encode_rows, iterate_texts, pad_ids


EOS = 2
MESSAGES = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w11"}]


def words(template=None, **options):
    """Words w4, w5, ... with their numbers as ids; `template` adds special tokens, as in `<s> $A </s>`."""
    tokenizer = build_tokenizer(ends_sources=False, **options)
    if template is not None:
        specials = [("<s>", 1), ("</s>", EOS)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


# Text


@pytest.mark.parametrize("columns", [("source", "target"), ("prompt", "completion"), ("question", "answer")])
def test_a_row_of_text_becomes_ids_and_labels(columns):
    rows = Dataset.from_list([dict(zip((*columns, "id"), ("w10 w11", "w20", 7), strict=True))])
    (row,) = encode_rows(rows, RowEncoder(words("$A </s>")), "training data")
    assert row == {
        **{"input_ids": [10, 11, EOS], "num_source_tokens": 3},
        **{"labels": [20, EOS], "num_target_tokens": 2, "length": 3},
    }


@pytest.mark.parametrize("tokenizer", [build_byte_tokenizer(), ByT5Tokenizer()], ids=["fast", "slow"])
def test_long_rows_are_truncated_before_their_end_and_counted(tokenizer):
    texts = ["w" * 20, "v", "é" * 6]
    rows = Dataset.from_dict({"source": texts, "target": texts[::-1]})
    encoder, counts = RowEncoder(tokenizer, max_source_length=8, max_target_length=12), Counter()
    encoded = encode_rows(rows, encoder, "training data", counts)
    assert [len(ids) for ids in encoded["input_ids"]] == [8, 2, 8]
    assert [len(ids) for ids in encoded["labels"]] == [12, 2, 12]
    assert all(ids[-1] == tokenizer.eos_token_id for name in ("input_ids", "labels") for ids in encoded[name])
    assert encoded["num_source_tokens"][:] == [21, 2, 13]
    assert counts == {"rows": 3, "source": 2, "target": 2}


@pytest.mark.parametrize("tokenizer", [build_byte_tokenizer(), ByT5Tokenizer()], ids=["fast", "slow"])
def test_text_around_a_source_is_never_truncated(tokenizer):
    encoder = RowEncoder(tokenizer, max_source_length=30)
    source = encoder.encode_source("x é🙂" * 20, before="before ", after=" after")
    text = tokenizer.decode(source.input_ids, skip_special_tokens=True)
    assert source.is_cut and len(source.input_ids) <= 30
    assert text.startswith("before x é") and text.endswith(" after") and source.source == text
    assert not encoder.encode_source("x", before="before ", after=" after").is_cut
    with pytest.raises(ValueError, match="`max_source_length` is 30"):
        encoder.encode_source("x", before="w" * 40)


@pytest.mark.parametrize("template", [None, "$A </s>", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(("target", "ids"), [("w20", [20]), ("w20 </s>", [20]), ("", [])])
def test_a_target_ends_once_and_leaves_out_the_decoder_start_token(template, target, ids):
    encoder = RowEncoder(words(template), decoder_start_token_id=1)
    assert encoder.encode_target(target) == ([*ids, EOS], len(ids) + 1)
    assert encoder.encode_target(target, as_continuation=True) == ([*ids, EOS], len(ids) + 1)


@pytest.mark.parametrize(("limit", "ids"), [(3, [20, 21, EOS]), (2, [20, 21]), (1, [20])])
def test_a_continuation_ends_only_if_it_is_whole(limit, ids):
    encoder = RowEncoder(words(), max_target_length=limit)
    assert encoder.encode_target("w20 w21", as_continuation=True) == (ids, 3)
    assert encoder.encode_target("w20 w21")[0] == [*[20, 21][: limit - 1], EOS]


def test_messages_are_plain_text_for_an_encoder_and_rendered_for_a_decoder_only_model():
    tokenizer = words(words=["user:", "assistant:", *(f"w{number}" for number in range(6, 40))])
    tokenizer.chat_template = (
        "{{ bos_token }} {% for message in messages %}{{ message['content'] }} {% endfor %}{{ opening }}"
    )
    encoder = RowEncoder(tokenizer)
    assert encoder.encode_source(MESSAGES[:1]).input_ids == [10]
    assert encoder.encode_source(MESSAGES).input_ids == [4, 10, 5, 11]
    assert encoder.encode_prompt(MESSAGES, chat_template_kwargs={"opening": "w30"}).input_ids == [1, 10, 11, 30]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"`prompt`.* no chat template"):
        encoder.encode_prompt(MESSAGES, where="`prompt`")


def test_a_truncated_source_is_returned_with_the_text_that_is_left():
    encoder = RowEncoder(words("$A </s>"), max_source_length=3)
    assert encoder.encode_source("w10 w11 w12").source == "w10 w11"
    message = encoder.encode_source([{"role": "user", "content": "w10 w11 w12"}]).source
    assert message == [{"role": "user", "content": "w10 w11"}]


def test_a_source_without_tokens_becomes_an_end_of_text_token():
    source = RowEncoder(words()).encode_source("")
    assert (source.input_ids, source.num_tokens, source.is_cut) == ([EOS], 0, False)


def test_a_stream_is_encoded_and_counted_while_it_is_read():
    rows, counts = Dataset.from_dict({"source": ["w10 w11", "w12"], "target": ["w20", "w21"]}), Counter()
    encoder = RowEncoder(words(), max_source_length=1)
    streamed = encode_rows(rows.to_iterable_dataset(), encoder, "training data", counts)
    assert isinstance(streamed, IterableDataset) and not counts
    assert list(streamed) == encode_rows(rows, encoder, "training data").to_list()
    assert counts == {"rows": 2, "source": 1, "target": 0}
    assert encode_rows(streamed, encoder, "training data") is streamed


def test_a_batch_is_padded_whether_its_rows_are_encoded_or_not():
    rows = [{"source": "w10 w11", "target": "w20"}, {"source": "w12", "target": "w21 w22"}]
    encoder = RowEncoder(words(), decoder_start_token_id=1)
    batch = encoder.collate(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11], [12, 0]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[20, EOS, -100], [21, 22, EOS]],
        "decoder_input_ids": [[1, 20, 0], [1, 21, 22]],
    }
    again = encoder.collate(encode_rows(Dataset.from_list(rows), encoder, "training data").to_list())
    torch.testing.assert_close(batch, again)
    assert encoder.collate([{"source": "w10"}]).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [("left", [9, 9, 9, 10], [0, 0, 0, 1]), ("right", [10, 9, 9, 9], [1, 0, 0, 0])],
)
def test_ids_are_padded_to_a_multiple_on_either_side(side, ids, mask):
    padded_ids, padded_mask = pad_ids([[10], [11, 12, 13]], 9, 4, side)
    assert padded_ids[0].tolist() == ids and padded_mask[0].tolist() == mask
    assert padded_mask[1].sum() == 3


@pytest.mark.parametrize(
    ("rows", "kind", "match"),
    [
        ([], ValueError, "training data"),
        ([{"text": "w10"}], ValueError, "training data.*text"),
        ([{"source": "w10"}, {"source": None}], TypeError, "`source` of row 1"),
        ([{"source": "w10", "target": 5}], TypeError, "`target` of row 0 .*5"),
        ([{"source": [{"role": "user", "content": None}]}], TypeError, "`source` of row 0"),
    ],
)
def test_rows_that_cannot_be_encoded_are_refused_by_name(rows, kind, match):
    with pytest.raises(kind, match=match):
        encode_rows(Dataset.from_list(rows), RowEncoder(words()), "training data")
    if kind is TypeError:
        streamed = encode_rows(Dataset.from_list(rows).to_iterable_dataset(), RowEncoder(words()), "training data")
        with pytest.raises(kind, match=match):
            list(streamed)


def test_a_batch_with_some_targets_and_a_tokenizer_without_an_end_are_refused():
    with pytest.raises(ValueError, match="1 of 2 rows"):
        RowEncoder(words()).collate([{"source": "w10", "target": "w20"}, {"source": "w10"}])
    with pytest.raises(ValueError, match="eos_token"):
        RowEncoder(words(eos_token=None)).encode_target("w20")
    with pytest.raises(ValueError, match=r"max_target_length.* 0"):
        RowEncoder(words(), max_target_length=0)


def test_images_that_a_text_model_does_not_read_are_warned_of(caplog):
    rows = [{"source": "w10", "image": "a.png"}]
    encode_rows(Dataset.from_list(rows), RowEncoder(words()), "training data")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "`image`" in warnings[0]


def test_text_is_encoded_without_the_code_for_images(monkeypatch):
    monkeypatch.setitem(sys.modules, "encdec_slm.trainers.image_rows", None)
    assert build_row_encoder(words(), max_source_length=4).collate([{"source": "w10", "target": "w20"}])


# Images

TILE = 8


@pytest.fixture(scope="module")
def processor():
    tokenizer = build_byte_tokenizer(image_token="<image>")
    return build_processor(build_vision_config(build_config(vocab_size=261), image_token_id=260), tokenizer)


def draw(shade, size=(TILE, TILE)):
    return Image.new("RGB", size, (shade, 255 - shade, shade))


def to_bytes(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


IMAGE_ROWS = [
    {"images": [draw(1), draw(2, (20, 9))], "source": "what?", "target": "a"},
    {"images": [draw(3)], "source": "is <image> grey?", "target": "bc"},
    {"images": [], "source": "why?", "target": "d"},
]
FEATURES = Features({"images": List(ImageFeature()), "source": Value("string"), "target": Value("string")})


def test_a_batch_of_images_equals_that_of_the_processor(processor):
    batch = build_row_encoder(processor).collate(IMAGE_ROWS)
    images, texts = ([row[name] for row in IMAGE_ROWS] for name in ("images", "source"))
    expected = dict(processor(images, texts, padding=True, return_tensors="pt"))
    labels = batch.pop("labels")
    torch.testing.assert_close(batch, expected)
    assert [row[row != -100].tolist()[-1] for row in labels] == [EOS] * 3


def test_rows_without_images_make_a_batch_of_text(processor):
    rows = [{"source": "what?", "image": None}, {"source": "why?", "image": None}]
    assert build_row_encoder(processor).collate(rows).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_dataset_keeps_its_images_until_a_batch_is_made(processor, as_stream):
    rows = Dataset.from_list(IMAGE_ROWS, features=FEATURES)
    encoder = build_row_encoder(processor, decoder_start_token_id=1)
    encoded = encode_rows(rows.to_iterable_dataset() if as_stream else rows, encoder, "training data")
    assert [row["num_images"] for row in encoded] == [2, 1, 0]
    torch.testing.assert_close(encoder.collate(list(encoded)), encoder.collate(IMAGE_ROWS))
    assert encode_rows(encoded, encoder, "training data").column_names == encoded.column_names


def test_messages_are_rendered_by_the_chat_template_and_so_are_questions(processor, monkeypatch):
    template = "Q: {% for part in messages[0]['content'] %}{{ part['text'] or '<image>' }}{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", template)
    encoder = build_row_encoder(processor)
    expected = encoder.encode_source("Q: <image>what?", draw(1))
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    for content in (parts, parts[1:], "what?", "<image>what?"):
        source = encoder.encode_source([{"role": "user", "content": content}], draw(1))
        assert source.input_ids == expected.input_ids
    batch = encoder.collate([{"question": "what?", "image": draw(1)}])
    assert batch["input_ids"][0].tolist() == expected.input_ids
    # One image, so that the second token of the text is not a place.
    assert encoder.encode_source(encoder.ask("<image> or <image>?", 1), draw(1)).input_ids.count(260) == (
        encoder.encode_source("<image>", draw(1)).input_ids.count(260)
    )


def test_a_long_source_loses_text_and_never_an_image(processor):
    whole = build_row_encoder(processor).encode_source("what is it?", draw(1))
    encoder = build_row_encoder(processor, max_source_length=len(whole.input_ids) - 4)
    source = encoder.encode_source("what is it?", draw(1))
    assert source.is_cut and source.source == "<image>what is"
    assert source.input_ids[:-5] == whole.input_ids[:-5][: len(source.input_ids) - 5]
    assert source.input_ids.count(260) == whole.input_ids.count(260)
    with pytest.raises(ValueError, match="`max_source_length` is 3"):
        build_row_encoder(processor, max_source_length=3).encode_source("what is it?", draw(1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"source": "<image> and <image>"}, "`source` of row 0 .*2 .*1"),
        ({"images": [], "source": "<image>?"}, "`source` of row 0 .*1 .*0"),
        ({"target": "an <image>"}, "`target` of row 0 .*<image>"),
        ({"images": [{"bytes": to_bytes(draw(9))[:50], "path": None}]}, "`source` of row 0"),
    ],
)
def test_rows_with_images_that_do_not_fit_are_refused_by_name(processor, change, match):
    row = {**IMAGE_ROWS[0], "images": [draw(1)], **change}
    with pytest.raises(ValueError, match=match):
        build_row_encoder(processor).collate([row])
    if "images" not in change:
        with pytest.raises(ValueError, match=match):
            encode_rows(Dataset.from_list([row], features=FEATURES), build_row_encoder(processor), "training data")


def test_texts_of_rows_are_what_the_student_reads_and_generates():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rows = [{"prompt": messages, "completion": "So.", "id": "x"}, {"source": "a", "target": None}]
    assert list(iterate_texts(rows)) == ["system: Be brief.\nuser: Why?", "So.", "a"]
    with pytest.raises(ValueError, match=r"Row 1 .*id"):
        list(iterate_texts([{"id": "x"}]))

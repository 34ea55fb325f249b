# SPDX-License-Identifier: Apache-2.0
"""Comparison of a student with a teacher that has another tokenizer; training is in test_span_distillation.py."""

import pytest
import torch
from test_distillation_losses import LargestTensor, build_settings, draw, plain_divergence
from test_trim_tokenizer import STRANGE, character_bpe, llama2_like, llama3_like, qwen_like, t5, word_level, word_piece
from transformers import ByT5Tokenizer

from conftest import build_byte_tokenizer
from encdec_slm.trainers.distillation_losses import distillation_objective
from encdec_slm.trainers.output_heads import OutputHead
from encdec_slm.trainers.token_alignment import FIRST, START, AlignedTeacher, TokenAlignment, align_tokens
from encdec_slm.trainers.token_bytes import CHARACTERS, TokenBytes
from encdec_slm.trainers.token_projection import build_projections


SIZE = 540
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SMILE = "".join(CHARACTERS[byte] for byte in "🙂".encode())
TEXT = "Return naïve 🙂 parts of the lines."


def byte_level(*words):
    return build_byte_tokenizer(ends_sources=False, words=words)


def build_alignment(student, teacher, size=SIZE):
    return TokenAlignment(student, teacher, size, size)


def encode(tokenizer, text, is_complete=True):
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * is_complete


# Bytes


@pytest.mark.parametrize("build", [qwen_like, llama3_like, llama2_like])
def test_the_bytes_of_tokens_make_up_any_text(build):
    tokens = TokenBytes(build(), "student")
    space = b" " * tokens.adds_space
    assert tokens.adds_space == (build is llama2_like)
    for text in (TEXT, *STRANGE):
        if text and not any(name in text for name in tokens.special_tokens.values()):
            assert tokens.join(tokens.encode(text)) == space + text.encode()


def test_any_bytes_are_split_into_tokens_of_another_tokenizer():
    for build in (qwen_like, llama2_like):
        tokens = TokenBytes(build(), "student")
        for text in ("🙂".encode()[:2], b" lines", " naïve".encode()[:5], b"\xff", b"():\n\n"):
            assert tokens.join(tokens.split(text)) == text
    assert TokenBytes(t5(), "student").split("🙂".encode()) == []


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (ByT5Tokenizer, "ByT5Tokenizer.* slow"),
        (word_level, "WordLevel"),
        (word_piece, "WordPiece"),
        (lambda: character_bpe(end_of_word_suffix="</w>"), "BPE"),
    ],
)
def test_tokenizers_whose_tokens_are_not_the_text_are_refused_by_name(build, name):
    with pytest.raises(ValueError, match=f"`token_alignment='byte_spans'`.*teacher.*{name}"):
        build_alignment(qwen_like(), build())


def test_a_table_with_too_few_rows_and_a_missing_end_are_refused():
    with pytest.raises(ValueError, match="embedding table of the teacher has 300 rows"):
        TokenAlignment(qwen_like(), llama3_like(), SIZE, 300)
    teacher = llama3_like()
    teacher.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        build_alignment(qwen_like(), teacher)


# Positions


@pytest.mark.parametrize(
    ("student", "teacher", "found"),
    [
        ("ab c", "ab c", [(0, 0), (1, 0)]),
        ("a b c", "ab c", [(0, 0), (0, 1), (1, 0)]),  # the teacher merges
        ("ab c", "a b c", [(0, 0), (2, 0)]),  # the teacher splits
        ("ab cd", "abc d", [(0, 0), (0, 2)]),  # a token crosses the border
        ("a b c d", "x b c d", [(-1, 0), (1, 0), (2, 0), (3, 0)]),  # the first differs
        ("a b c d", "a b xy d", [(0, 0), (1, 0), (-1, 0), (3, 0)]),  # one is changed
        ("a bc d", "a xbc d", [(0, 0), (-1, 0), (2, 0)]),  # equal bytes inside a changed token
        ("a b", "a b c", [(0, 0), (1, 0)]),
        ("a b c", "a", [(0, 0), (-1, 0), (-1, 0)]),
    ],
)
def test_tokens_are_aligned_by_the_bytes_that_they_begin_with(student, teacher, found):
    assert align_tokens(*([token.encode() for token in text.split()] for text in (student, teacher))) == found


def test_tokens_that_are_no_text_and_parts_of_characters_are_aligned():
    smile = "🙂".encode()
    assert align_tokens([smile[:2], b"", smile[2:], b"a"], [smile, b"", b"a"]) == [(0, 0), (-1, 0), (0, 2), (2, 0)]
    assert align_tokens([], [b"a"]) == []


def test_a_target_is_read_by_the_teacher_with_its_own_tokens_and_end():
    student, teacher = byte_level("Ġreturns", "lines"), byte_level("Ġre", "turns")
    alignment = build_alignment(student, teacher)
    target = alignment.encode_target(encode(student, "a returns"))
    assert target.teacher_ids == encode(teacher, "a returns")
    assert target.teacher_indices == [0, 1, 3] and target.kinds == [START] * 3
    cut = alignment.encode_target(encode(student, "a returns", is_complete=False))
    assert cut.teacher_ids == target.teacher_ids[:-1] and cut.kinds == [START] * 2
    shortened = alignment.encode_target(encode(student, "a returns"), max_length=3)
    assert shortened.teacher_ids == target.teacher_ids[:3] and shortened.kinds == [START, START, -1]
    # The other way round, "turns" begins inside " returns", and is what follows " re" there.
    inside = build_alignment(teacher, student).encode_target(encode(teacher, "a returns"))
    assert inside.teacher_indices == [0, 1, 1, 2] and inside.kinds[0] == inside.kinds[1] == inside.kinds[3] == START
    assert inside.kinds[2] > FIRST


def test_where_the_students_tokens_are_not_those_of_the_teachers_token_nothing_is_compared():
    student, teacher = byte_level("Ġre", "tu"), byte_level("Ġreturns")
    tokens = ["Ġ", "r", "e", "tu", "r", "n", "s"]  # the tokenizer would begin with "Ġre"
    target = build_alignment(student, teacher).encode_target(student.convert_tokens_to_ids(tokens))
    assert [kind != -1 for kind in target.kinds] == [True, False, False, True, True, True, True]


def test_a_generated_target_that_is_not_utf8_is_compared_up_to_there():
    student, teacher = byte_level(), byte_level("ab")
    ids = [*encode(student, "ab", False), *encode(student, "🙂", False)[:2], *encode(student, "ab")]
    target = build_alignment(student, teacher).encode_target(ids)
    assert [kind != -1 for kind in target.kinds] == [True, True, False, False, True, True, True]


@pytest.mark.parametrize("is_student", [True, False])
def test_the_space_that_one_tokenizer_puts_before_a_text_is_ignored(is_student):
    builds = (llama2_like, qwen_like) if is_student else (qwen_like, llama2_like)
    tokenizers = [build() for build in builds]
    alignment = build_alignment(*tokenizers)
    target = alignment.encode_target(encode(tokenizers[0], "for part"))
    assert target.kinds[0] == FIRST and FIRST not in target.kinds[1:] and target.kinds[-1] == START
    spaces = (b" ", b"") if is_student else (b"", b" ")
    assert find_event(events_of(*tokenizers), b" for") == ((b" for",), (b" for",))
    student, teacher = find_event(events_of(*tokenizers, *spaces), b" for" if is_student else b"for")
    assert (b"for" if is_student else b" for") in teacher and student[0].strip() == b"for"


# Events


def dense(projection, size):
    """The projection as a matrix of shape (size, E)."""
    matrix = torch.zeros(size, projection.num_events)
    matrix[projection.token_ids, projection.events] = 1.0
    return matrix


def events_of(student, teacher, *spaces):
    """Names of the tokens of each event, sorted."""
    tables = [TokenBytes(student, "student"), TokenBytes(teacher, "teacher")]
    projections = build_projections(*tables, *spaces)
    events = {}
    for table, projection in zip(tables, projections, strict=True):
        for token_id, event in zip(projection.token_ids.tolist(), projection.events.tolist(), strict=True):
            name = table.texts.get(token_id, table.special_tokens.get(token_id))
            events.setdefault(event, ([], []))[table is tables[1]].append(name)
    return [tuple(map(tuple, event)) for event in events.values()]


def find_event(events, name):
    """The event of a token of the student."""
    return next(event for event in events if name in event[0])


def test_tokens_become_events_by_their_bytes():
    events = events_of(byte_level("lines", "abc", "Ġx"), byte_level("lines", "abd", "xy"))
    assert ((b"lines",), (b"lines",)) in events
    assert ((b"ab", b"abc"), (b"ab", b"abd")) in events  # "abd" is split into "ab" and "d"
    assert ((b" ", b" x"), (b" ",)) in events
    assert ((b"x",), (b"x", b"xy")) in events
    for name in ("<pad>", "<s>", "</s>", "<unk>"):
        assert ((name,), (name,)) in events


def test_special_tokens_of_one_model_are_one_event_and_ends_are_aligned():
    events = events_of(byte_level(), qwen_like())
    special = [event for event in events if any(isinstance(name, str) for side in event for name in side)]
    assert (("</s>",), ("<|end|>",)) in special
    assert (("<pad>", "<s>", "<unk>"), ("<|pad|>", "<|user|>", "<|vision|>", "<|fim|>")) in [
        (student, tuple(sorted(teacher, key=["<|pad|>", "<|user|>", "<|vision|>", "<|fim|>"].index)))
        for student, teacher in special
        if len(teacher) > 1
    ]


@pytest.mark.parametrize("builds", [(qwen_like, llama2_like), (llama2_like, llama3_like), (t5, qwen_like)])
def test_every_token_has_one_event_and_every_event_a_token_of_both(builds):
    alignment = build_alignment(*(build() for build in builds))
    for student, teacher in alignment.projections.values():
        assert student.num_events == teacher.num_events
        for projection, table in ((student, alignment.student), (teacher, alignment.teacher)):
            assert sorted(projection.token_ids.tolist()) == sorted([*table.texts, *table.special_tokens])
            assert set(projection.events.tolist()) == set(range(projection.num_events))


def test_a_character_and_its_byte_are_two_tokens_for_equal_tokenizers():
    table = TokenBytes(llama2_like(), "student")
    assert len(table.find(b"a")) == 2
    for projection in build_projections(table, table):
        assert projection.token_ids.tolist() == projection.events.tolist() == list(range(table.num_ids))


# Divergence


class Pair:
    """Random heads and hidden states of both models at the positions of a target."""

    def __init__(self, alignment, text, size=SIZE, scale=0.7):
        target = alignment.encode_target(encode(alignment.student.tokenizer, text))
        self.alignment, self.target = alignment, target
        self.labels = torch.tensor(encode(alignment.student.tokenizer, text))
        self.hidden = draw(len(self.labels), 4, seed=1).requires_grad_()
        self.weight = draw(size, 4, seed=2, scale=scale).requires_grad_()
        self.teacher_hidden = draw(len(self.labels), 4, seed=3)
        self.teacher_head = OutputHead(draw(size, 4, seed=4, scale=scale))
        self.kinds = torch.tensor(target.kinds)

    def objective(self, is_aligned=True, **changes):
        settings = build_settings(**{"num_common_tokens": SIZE, "logits_budget_bytes": 4 * 4 * SIZE, **changes})
        teacher = (self.teacher_hidden, self.teacher_head)
        if is_aligned:
            teacher = (AlignedTeacher(self.alignment, *teacher, self.kinds, settings.temperature), None)
        return distillation_objective(self.hidden, OutputHead(self.weight), *teacher, self.labels, settings)

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight))


@pytest.mark.parametrize("build", [qwen_like, llama2_like, t5])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_equal_tokenizers_give_the_plain_divergence_and_gradient(build, beta, temperature):
    tokenizer = build()
    size = len(tokenizer)
    pair = Pair(build_alignment(tokenizer, tokenizer, size), "parts of each line", size)
    assert set(pair.target.kinds) == {START}
    options = {"beta": beta, "temperature": temperature, "num_common_tokens": size}
    aligned, plain = (pair.objective(is_aligned, **options) for is_aligned in (True, False))
    for name in ("loss", "divergence", "cross_entropy", "entropy", "agreement"):
        torch.testing.assert_close(getattr(aligned, name), getattr(plain, name), **CLOSE)
    torch.testing.assert_close(pair.gradients(aligned.loss), pair.gradients(plain.loss), **CLOSE)


def plain_span_divergence(pair, beta, temperature):
    """The divergence of each position by its definition, with dense matrices and loops over tokens."""
    alignment, values = pair.alignment, []
    logits, teacher_logits = pair.hidden @ pair.weight.T, pair.teacher_hidden @ pair.teacher_head.weight.T
    ids, tables = pair.labels.tolist(), (alignment.student, alignment.teacher)
    spaces = [b" " * (table.adds_space and FIRST in alignment.projections) for table in tables]
    for position, kind in enumerate(pair.target.kinds):
        q, p = ((each[position] / temperature).softmax(-1) for each in (logits, teacher_logits))
        if kind in (START, FIRST):
            q, p = (each @ dense(one, SIZE) for each, one in zip((q, p), alignment.projections[kind], strict=True))
            values.append(plain_divergence((q / q.sum()).log(), (p / p.sum()).log(), beta, 1.0))
        elif kind > FIRST:
            start = len(alignment.student.join(ids[:position]).removeprefix(spaces[0]))
            index = pair.target.teacher_indices[position]
            start -= len(alignment.teacher.join(pair.target.teacher_ids[:index]).removeprefix(spaces[1]))
            read = alignment.teacher.texts[pair.target.teacher_ids[index]][:start]
            expected, tail = torch.zeros(SIZE), 0.0
            for token_id, text in alignment.teacher.texts.items():
                pieces = alignment.student.split(text)
                starts = [len(alignment.student.join(pieces[:number])) for number in range(len(pieces))]
                if text == read:
                    tail += p[token_id]
                elif text.startswith(read) and len(read) in starts:
                    expected[pieces[starts.index(len(read))]] += p[token_id]
            kept = expected > 0
            p = torch.cat((expected[kept], torch.as_tensor(tail).view(1)))
            q = torch.cat((q[kept], q[~kept].sum().view(1)))
            if not tail:
                p, q = p[:-1], q[:-1]
            values.append(plain_divergence((q / q.sum()).log(), (p / p.sum()).log(), beta, 1.0))
        else:
            values.append(logits.sum() * 0)
    return torch.stack(values)


PAIRS = {
    "bytes and words": lambda: (
        byte_level("Ġre", "li"),
        byte_level("Ġreturns", "Ġreads", "lines", "line", SMILE + "a"),
    ),
    "byte-level and ▁": lambda: (qwen_like(), llama2_like()),
    "▁ and byte-level": lambda: (t5(), qwen_like()),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_other_tokenizers_give_the_divergence_of_common_events(name, beta, temperature):
    pair = Pair(build_alignment(*PAIRS[name]()), "a returns lines reads 🙂a")
    assert START in pair.target.kinds and (name != "bytes and words" or max(pair.target.kinds) > FIRST)
    expected = plain_span_divergence(pair, beta, temperature)
    result = pair.objective(beta=beta, temperature=temperature, kd_weight=1.0, ce_weight=0.0)
    torch.testing.assert_close(result.divergence, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pair.gradients(result.loss), pair.gradients(expected.sum()), rtol=1e-5, atol=1e-5)


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    pair = Pair(build_alignment(*PAIRS["bytes and words"]()), "a returns lines reads " * 20)
    with LargestTensor() as largest:
        pair.objective().loss.backward()
    assert largest.num_elements <= 4 * (SIZE + 1)

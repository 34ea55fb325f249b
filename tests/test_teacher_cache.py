# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from encdec_slm.trainers.teacher_cache import (
    LABEL_COLUMNS,
    CacheHeader,
    DistributionSpec,
    Example,
    TeacherCache,
    row_fingerprint,
    write_shard,
)


HEADER = CacheHeader(
    teacher="tiny",
    teacher_fingerprint="a",
    tokenizer_fingerprint="b",
    template_fingerprint="c",
    vocab_size=50,
    distributions="topk:4",
    completions=None,
    rows_per_shard=4,
)
ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(10)]


def label(row, num_tokens=3, k=4, generated=False):
    generator = np.random.default_rng(row)
    log_probs = [np.sort(np.log(generator.dirichlet(np.ones(50))))[::-1][:k] for _ in range(num_tokens)]
    ids = [generator.permutation(50)[:k] for _ in range(num_tokens)]
    prompt, completion = ROWS[row]["prompt"], ROWS[row]["completion"]
    return Example(
        row=row,
        row_fingerprint=row_fingerprint(prompt, None if generated else completion),
        target_ids=generator.integers(0, 50, num_tokens),
        completion=f"generated {row}" if generated else None,
        ids=ids,
        log_probs=log_probs,
    )


@pytest.fixture
def folder(tmp_path):
    for start in range(0, 10, 4):
        stop = min(start + 4, 10)
        write_shard(tmp_path, HEADER, start, stop, [label(row) for row in range(start, stop)])
    return tmp_path


@pytest.mark.parametrize("streams", [False, True])
def test_labels_are_attached_to_their_rows(folder, streams):
    dataset = Dataset.from_list(ROWS)
    dataset = dataset.to_iterable_dataset() if streams else dataset
    labeled = list(TeacherCache(folder).attach(dataset, "prompt", "completion"))
    assert [row["prompt"] for row in labeled] == [row["prompt"] for row in ROWS]
    for number, row in enumerate(labeled):
        expected = label(number)
        assert row["label_target_ids"] == expected.target_ids.tolist()
        assert row["label_ids"] == np.concatenate(expected.ids).tolist()
        assert row["label_num_ids"] == [4, 4, 4]
        np.testing.assert_allclose(row["label_log_probs"], np.concatenate(expected.log_probs), rtol=1e-3)
        mass = [1 - np.exp(values).sum() for values in expected.log_probs]
        np.testing.assert_allclose(row["label_tail"], mass, atol=1e-3)


@pytest.mark.parametrize("streams", [False, True])
def test_generated_targets_replace_those_of_the_data_and_rows_are_repeated_for_each_sample(tmp_path, streams):
    header = CacheHeader(**{**HEADER.__dict__, "completions": "{}"})
    examples = [label(row, generated=True) for row in (0, 0, 1, 1)]
    examples[1].sample = examples[3].sample = 1
    write_shard(tmp_path, header, 0, 2, examples)
    dataset = Dataset.from_list(ROWS[:2])
    dataset = dataset.to_iterable_dataset() if streams else dataset
    labeled = list(TeacherCache(tmp_path).attach(dataset, "prompt", "completion"))
    assert [row["completion"] for row in labeled] == ["generated 0", "generated 0", "generated 1", "generated 1"]
    assert [row["prompt"] for row in labeled] == ["question 0", "question 0", "question 1", "question 1"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("change", [{"prompt": "another"}, {"completion": "another"}])
def test_a_row_that_was_edited_is_named(folder, change, streams):
    rows = [dict(row) for row in ROWS]
    rows[7] |= change
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streams else dataset
    with pytest.raises(ValueError, match="7"):
        list(TeacherCache(folder).attach(dataset, "prompt", "completion"))


@pytest.mark.parametrize("streams", [False, True])
def test_rows_without_labels_are_refused(folder, streams):
    dataset = Dataset.from_list([*ROWS, ROWS[0]])
    dataset = dataset.to_iterable_dataset() if streams else dataset
    with pytest.raises(ValueError, match="10"):
        list(TeacherCache(folder).attach(dataset, "prompt", "completion"))


def test_fewer_rows_than_labels_are_the_first_ones(folder):
    labeled = TeacherCache(folder).attach(Dataset.from_list(ROWS[:6]), "prompt", "completion")
    assert len(labeled) == 6
    assert set(LABEL_COLUMNS) <= set(labeled.column_names)


def test_a_missing_shard_is_named(folder):
    (folder / "labels-0000000004-0000000008.parquet").unlink()
    with pytest.raises(ValueError, match="4 to 7"):
        TeacherCache(folder)


def test_a_shard_of_another_teacher_is_refused_by_name(folder):
    write_shard(folder, CacheHeader(**{**HEADER.__dict__, "teacher_fingerprint": "z"}), 10, 12, [label(0)])
    with pytest.raises(ValueError, match=r"labels-0000000010.*teacher_fingerprint"):
        TeacherCache(folder)


@pytest.mark.parametrize("size", [0, 10, -10])
def test_a_truncated_shard_is_named(folder, size):
    path = folder / "labels-0000000004-0000000008.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=path.name):
        TeacherCache(folder)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("damage", ["pages", "nan"])
def test_a_damaged_shard_is_named_when_its_rows_are_read(folder, damage, streams):
    path = folder / "labels-0000000004-0000000008.parquet"
    if damage == "pages":
        content = bytearray(path.read_bytes())
        content[100:300] = bytes(200)
        path.write_bytes(content)
    else:
        table, values = pq.read_table(path), np.full(12, np.nan, np.float16)
        lists = pa.ListArray.from_arrays(pa.array(range(0, 13, 3), pa.int32()), pa.array(values))
        index = table.schema.get_field_index("label_log_probs")
        pq.write_table(table.set_column(index, table.schema.field(index), lists), path)
    dataset = Dataset.from_list(ROWS)
    dataset = dataset.to_iterable_dataset() if streams else dataset
    with pytest.raises(ValueError, match=path.name):
        list(TeacherCache(folder).attach(dataset, "prompt", "completion"))


def test_an_empty_folder_and_a_foreign_file_are_no_cache(tmp_path):
    with pytest.raises(ValueError, match="encdec-slm label"):
        TeacherCache(tmp_path)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "labels-0000000000-0000000010.parquet")
    with pytest.raises(ValueError, match="not a shard"):
        TeacherCache(tmp_path)


def test_nan_is_never_written(tmp_path):
    example = label(3)
    example.log_probs[1][0] = np.nan
    with pytest.raises(ValueError, match="row 3"):
        write_shard(tmp_path, HEADER, 3, 4, [example])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["topk", "topk:0", "topk:-1", "best:5", "sampled:x", "topk:70000"])
def test_an_unknown_distribution_is_refused(text):
    with pytest.raises(ValueError, match="topk:K"):
        DistributionSpec.parse(text)


@pytest.mark.parametrize(("spec", "limit"), [("topk:32", 120), ("sampled:12", 50)])
def test_a_label_takes_few_bytes(tmp_path, spec, limit):
    # Ids of a vocabulary of 151,936 tokens, the first of which are frequent as in every BPE vocabulary.
    kind, size = DistributionSpec.parse(spec).kind, DistributionSpec.parse(spec).size
    generator, examples, num_tokens = np.random.default_rng(0), [], 30
    for row in range(64):
        ids = [151_936 ** generator.random(size) for _ in range(num_tokens)]
        values = np.sort(-generator.exponential(4, (num_tokens, size)).cumsum(axis=1) - 0.1)[:, ::-1]
        stored = {"log_probs": list(values)} if kind == "topk" else {"counts": [np.ones(size)] * num_tokens}
        examples.append(Example(row, "0" * 16, generator.integers(0, 151_936, num_tokens), ids=ids, **stored))
    path = write_shard(tmp_path, HEADER, 0, 64, examples)
    assert path.stat().st_size / (64 * num_tokens) < limit
    assert pq.read_table(path).num_rows == 64

# SPDX-License-Identifier: Apache-2.0
"""Rows from data files: what is read, and how messages name the file, row and column of what is not."""

import csv
import gzip
import json
import os

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from encdec_slm.trainers.data_files import load_data_file, read_data_file


COLUMNS = {"source": "source", "target": "target"}
ROWS = [{"source": f"x = {number}", "target": text} for number, text in enumerate(("007", "NA", "2020-01-01", "é→😀"))]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def save_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(COLUMNS))
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(LINES),
    "blank_lines.jsonl": lambda path: path.write_text("\n" + LINES.replace("\n", "\r\n\n")),
    "lines.json": lambda path: path.write_text(LINES),
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "list_in.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "rows.csv": save_csv,
    "rows[1].parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
}


def load(path, **options):
    return list(load_data_file(path, COLUMNS, "train_file", **options))


@pytest.mark.parametrize("is_compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_give_the_same_rows(name, is_compressed, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    if is_compressed:
        compressed = tmp_path / f"{name}.gz"
        compressed.write_bytes(gzip.compress(path.read_bytes()))
        path = compressed
    assert load(path) == load(path, streaming=True) == ROWS


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.endswith("parquet")])
def test_a_byte_order_mark_is_not_part_of_the_text(name, tmp_path):
    WRITERS[name](tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert load(tmp_path / name) == ROWS


def test_line_ends_within_cells_are_normalized(tmp_path):
    for ending in ("\n", "\r\n"):
        (tmp_path / "rows.csv").write_bytes(f'source,target{ending}"a{ending}b",c{ending}'.encode())
        assert load(tmp_path / "rows.csv") == [{"source": "a\nb", "target": "c"}]


def test_an_edited_file_is_read_anew_even_with_its_old_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"source": "a", "target": "b"}')
    time = path.stat().st_mtime_ns
    assert load(path) == [{"source": "a", "target": "b"}]
    path.write_text('{"source": "c", "target": "b"}')
    os.utime(path, ns=(time, time))
    assert load(path) == load(path, streaming=True) == [{"source": "c", "target": "b"}]


def test_images_of_a_parquet_file_stay_undecoded(tmp_path):
    rows = Dataset.from_dict({"image": [PILImage.new("RGB", (2, 2))]}).cast_column("image", Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    (row,) = read_data_file(tmp_path / "rows.parquet")
    assert row["image"]["bytes"].startswith(b"\x89PNG")


START = '{"source": "a", "target": "b"}\n'
PARQUET_ROWS = [{"source": "a", "target": "b"}, {"source": None, "target": "b"}]
REFUSED = [
    ("latin.jsonl", (START + '{"source": "é", "target": "b"}').encode("latin-1"), ["line 2", "UTF-8"]),
    ("latin.csv", "source,target\na,b\né,b\n".encode("latin-1"), ["line 3", "UTF-8"]),
    ("utf16.csv", "source,target\na,b\n".encode("utf-16"), ["line 1", "UTF-8"]),
    ("surrogate.jsonl", START + '{"source": "\\ud83d", "target": "b"}', ["line 2", "`source`"]),
    ("surrogate.json", '[{"source": "a", "target": ["\\udc00"]}]', ["row 1", "`target`"]),
    ("empty_cell.csv", "source,target\na,b\nc,\n", ["Row 2", "`target`"]),
    ("short_row.csv", "source,target\na,b\nc\n", ["Row 2", "`target`"]),
    ("long_row.csv", "source,target\na,b\nc,d,e\n", ["line 3", "3 cells"]),
    ("trailing_commas.csv", "source,target\na,b,\n", ["line 2", "3 cells"]),
    ("open_quote.csv", 'source,target\n"a,b\n', ["unexpected end"]),
    ("null.jsonl", START + '{"source": "a", "target": null}', ["Row 2", "`target`"]),
    ("null.json", '[{"source": null, "target": "b"}]', ["Row 1", "`source`"]),
    ("null.parquet", PARQUET_ROWS, ["Row 2", "`source`"]),
    ("number.jsonl", START + '\n{"source": 3, "target": "b"}', ["Row 2", "`source`", "int"]),
    ("number.json", '[{"source": "a", "target": "b"}, {"source": 3, "target": "b"}]', ["Row 2", "`source`", "int"]),
    ("missing.jsonl", START + '{"text": "a", "target": "b"}', ["Row 2", "text, target", "`source_column`"]),
    ("header.csv", "source;target\na;b\n", ["source;target", "`source_column`"]),
    ("truncated.jsonl", START + START[:-9], ["line 2", "JSON"]),
    ("truncated.json", "[\n" + START + "," + START[:-9], ["line 3", "JSON"]),
    ("truncated.parquet", PARQUET_ROWS, ["Parquet"]),
    ("truncated.jsonl.gz", gzip.compress(START.encode() * 1000)[:-20], ["ended"]),
    ("plain.csv.gz", "source,target\na,b\n", ["gzip"]),
    ("text.jsonl", START + "\nsource: a\n", ["line 3", "JSON"]),
    ("lists.jsonl", START + '["a", "b"]', ["line 2", "list"]),
    ("strings.json", '["a", "b"]', ["row 1", "str"]),
    ("rows.txt", START, [".jsonl"]),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("name", "content", "words"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_a_bad_file_is_refused_with_its_row_and_column(name, content, words, streaming, tmp_path):
    path = tmp_path / name
    if isinstance(content, list):
        Dataset.from_list(content).to_parquet(path)
        content = path.read_bytes()[: -9 if "truncated" in name else None]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((TypeError, ValueError)) as error:
        load(path, streaming=streaming)
    for word in (name, *words):
        assert word in str(error.value)


def test_a_missing_file_is_refused_by_the_name_of_its_option(tmp_path):
    with pytest.raises(ValueError, match=r"`train_file`.*nowhere"):
        load_data_file(tmp_path / "nowhere.jsonl", COLUMNS, "train_file", streaming=True)

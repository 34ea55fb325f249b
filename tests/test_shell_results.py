# SPDX-License-Identifier: Apache-2.0
"""The tables about the shell model in README.md and docs/shell.md, and the file that they are written from."""

import json
import sys
from pathlib import Path

import pytest

from encdec_slm.trainers.evaluation import evaluate_checkpoint


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import nearest_request  # noqa: E402
import shell_results  # noqa: E402


@pytest.mark.parametrize("name", shell_results.BLOCKS)
def test_the_pages_state_what_the_results_file_says(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert shell_results.update_blocks(text, shell_results.BLOCKS[name], shell_results.load_results()) == text


def test_measurements_are_collected_and_shown(tmp_path, monkeypatch):
    """The nearest training request is a baseline that evaluation scores as a function."""
    rows = [("list all files", "ls -a"), ("count the lines of a", "wc -l a"), ("show the disk", "df")]
    lines = [json.dumps({"source": source, "target": target}) + "\n" for source, target in rows]
    (tmp_path / "train.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "test_random.jsonl").write_text("".join(lines))
    answer = nearest_request.build_nearest(tmp_path / "train.jsonl")
    assert answer(["Count lines"])[0] == ["wc -l a", "ls -a"]
    options = {"dataset_name": tmp_path / "test_random.jsonl", "output_dir": tmp_path / "out", "num_bootstrap": 10}
    evaluate_checkpoint(answer, "shell", **options, show_progress=False)
    pages = {"README.md": shell_results.BLOCKS["README.md"]}
    start = "<!-- {}: written by examples/shell_results.py -->\n<!-- end -->\n"
    blocks = "".join(map(start.format, pages["README.md"]))
    (tmp_path / "README.md").write_text(blocks)
    (tmp_path / "results.json").write_text(shell_results.RESULTS.read_text(encoding="utf-8"))
    for name, value in {"ROOT": tmp_path, "BLOCKS": pages, "RESULTS": tmp_path / "results.json"}.items():
        monkeypatch.setattr(shell_results, name, value)
    monkeypatch.setattr(shell_results, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(sys, "argv", ["shell_results.py", "--evaluation", f"shell={tmp_path / 'out'}"])
    shell_results.main()
    results = shell_results.load_results()
    assert results["evaluations"]["shell"]["test_random"]["metrics"]["exact"][0] == pytest.approx(66.67, abs=0.01)
    assert results["mistakes"]["kinds"] == {"same command": 2, "another first program": 1}
    assert results["mistakes"]["examples"][0]["expected"] == "df"
    assert "33.3 [" in (tmp_path / "README.md").read_text() and (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "first", "other"),
    [("differences", "encoder-decoder", "decoder-only"), ("distillation", "distilled", "same-steps")],
)
def test_seeds_are_averaged_and_compared_on_the_same_rows(kind, first, other, tmp_path):
    """Two of three seeds of a system are right; the other system never is."""
    lines = [json.dumps({"source": f"list {number // 2}", "target": "ls -a"}) + "\n" for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    options = {"dataset_name": tmp_path / "rows.jsonl", "num_bootstrap": 10, "show_progress": False}
    folders = {(first, "rows"): [], (other, "rows"): []}
    for number, command in enumerate(("ls -a", "df", "ls -a", "df", "df", "df")):
        evaluate_checkpoint(
            lambda sources, command=command: [[command]] * len(sources),
            "shell",
            output_dir=tmp_path / str(number),
            **options,
        )
        folders[first if number < 3 else other, "rows"].append(tmp_path / str(number))
    results = {"evaluations": {}, kind: {}}
    shell_results.collect_evaluations(results, folders)
    if first in shell_results.SYSTEMS:
        evaluation = results["evaluations"][first]["rows"]
        assert evaluation["metrics"]["exact"] == pytest.approx([66.67] * 3, abs=0.01)
        assert shell_results.label_scores(first, evaluation) == "encoder-decoder, 3 seeds"
    else:
        assert not results["evaluations"]
    compared = results[kind]["rows"][other]["template"]
    assert compared["means"] == [[100, 0, 100], [0, 0, 0]]
    # Student's t with two degrees of freedom: 4.303 * 57.74 / 3 ** 0.5
    assert compared["seeds"] == pytest.approx([66.67 - 143.4, 66.67 + 143.4], abs=0.1)
    assert compared["rows"] == pytest.approx([66.67, 66.67], abs=0.01) and compared["difference"] > 66
    assert "66.7 ± 33.3" in shell_results.difference_table(results, kind)
    (tmp_path / "5" / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match="rows"):
        shell_results.collect_evaluations(results, folders)


def test_a_teacher_is_compared_on_its_rows(tmp_path):
    """The teacher answers 5 of 20 rows, with another flag; of these, this model is right in 2."""
    lines = [json.dumps({"source": f"list {number // 2}", "target": "ls -a"}) + "\n" for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    options = {"dataset_name": tmp_path / "rows.jsonl", "num_bootstrap": 10, "show_progress": False}

    def answer(sources):
        return [["ls -a" if source in ("list 0", "list 9") else "df"] for source in sources]

    evaluate_checkpoint(answer, "shell", output_dir=tmp_path / "ours", **options)
    evaluate_checkpoint(lambda sources: [["ls -l"]] * len(sources), "shell", output_dir=tmp_path / "one", **options)
    predictions = (tmp_path / "one" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one" / "predictions.jsonl").write_text("".join(predictions[:5]))
    folders = {("teacher", "rows"): [tmp_path / "one"], ("shell", "rows"): [tmp_path / "ours"]}
    results = {"evaluations": {}, "teachers": {}}
    shell_results.collect_evaluations(results, folders)
    found = results["teachers"]["rows"]["teacher"]
    assert found["num_rows"] == 5 and found["template"]["means"] == [40, 0]
    assert found["nlc2cmd"]["means"] == [-20, -50]  # another program counts -1, and another flag -1/2
    assert "+40.0 [" in shell_results.teacher_table(results)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("ls -a x", "same command"),
        ("ls 'x", "not valid Bash"),
        ("ls -a y", "same programs and flags, other arguments"),
        ("ls -l x", "same first program, other flags or programs"),
        ("du x", "another first program"),
    ],
)
def test_mistakes_have_kinds(answer, kind):
    assert shell_results.classify(answer, "ls -a x") == kind

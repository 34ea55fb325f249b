# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest

from encdec_slm.trainers.new_models import preset_config
from encdec_slm.trainers.run_reports import first_lines, run_script, score_texts, write_file, write_run_files


def test_scores_are_percentages_of_overlap_and_equality():
    references = ["Return the size.", "Close the file."]
    assert score_texts(references, references) == {"rougeL": 100.0, "exact": 100.0}
    # Two of three words, in order: precision 2/2 and recall 2/3 make 80.
    assert score_texts(["returns size", ""], references) == {"rougeL": 40.0, "exact": 0.0}


def test_a_file_is_never_half_written(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old", encoding="utf-8")

    def fail_halfway(temporary):
        temporary.write_text("ne", encoding="utf-8")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_file(path, fail_halfway)
    assert path.read_text(encoding="utf-8") == "old"


def test_a_run_leaves_results_predictions_and_a_plot(tmp_path):
    write_run_files(tmp_path, [{"step": 1, "loss": 2.0}], {"rougeL": 3.0}, [{"prediction": "é"}, {"prediction": "b"}])
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == {"rougeL": 3.0}
    assert (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()[0] == '{"prediction": "é"}'
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_long_text_is_shown_by_its_first_lines():
    assert first_lines("a\nb", 2) == "a\nb"
    assert first_lines("a\nb\nc", 2) == "a\nb\n    ..."


def test_a_script_ends_with_a_sentence_on_wrong_input_and_with_a_trace_on_a_bug(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/distill.py"])
    with pytest.raises(SystemExit, match=r"distill\.py: .*Available presets"):
        run_script(lambda: preset_config("unknown", FakeTokenizer()))
    with pytest.raises(ValueError, match="a bug"):
        run_script(fail)


class FakeTokenizer:
    pad_token_id = bos_token_id = eos_token_id = 0

    def __len__(self):
        return 10


def fail():
    raise ValueError("a bug")

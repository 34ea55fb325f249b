# SPDX-License-Identifier: Apache-2.0
"""Puts the docstring writer into `checkpoints/docstring-writer`, measured, with its card.

python examples/publish_docstring_writer.py RUN ROWS    after a training: its output folder, and that of its rows
python examples/publish_docstring_writer.py             the same weights again, with the code files of this checkout

What the card states lies in `checkpoints/docstring-writer.json`: the first form writes it, the second reads it.
"""

import json
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.benchmarks.machine import machine
from encdec_slm.hub_cards import publish
from encdec_slm.trainers.evaluation import evaluate_checkpoint
from encdec_slm.trainers.run_reports import first_lines, run_script, score_texts


CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "docstring-writer"
STATED = CHECKPOINT.with_suffix(".json")
NUM_SAMPLES = 8
RECIPE = "distill_docstring_writer"
EXAMPLE = "def size(self):\n    return len(self.rows)"
DESCRIPTION = """\
Reads the source of a Python function and writes the first sentence of its docstring. It was trained for {minutes:.0f}
minutes on two CPU cores, its teacher included, and is a demonstration: its sentences have the form of docstrings and
often their verb, and seldom say what the function does. On functions that it has not seen, ROUGE-L is {rouge} %; the
same sentences beside docstrings of other modules earn {form} %, by their form alone.

## What it writes

Functions of standard-library modules that neither it nor its teacher has seen, at even distances in the test split,
none of them selected:

"""
LIMITS = """\
- It reads the first {num_tokens} tokens of a function, which {percent_cut:.0f} % of the test split's go beyond, and
  knows nothing of the class or module around it. Give the pipeline `truncation=True` for longer ones.
- It writes English, one sentence, in the manner of Python's libraries. Names of a function's own domain that it has
  not seen often come out as other words.
- Its sentences look right more often than they are: treat them as a draft.
- Do not use it for code whose documentation has to be right, nor to judge code.
"""


def main():
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / CHECKPOINT.name
        if len(sys.argv) == 3:
            convert(Path(sys.argv[1]), source)
            stated = state(source, *map(Path, sys.argv[1:]), Path(folder))
            STATED.write_text(json.dumps(stated, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copytree(CHECKPOINT, source)
        stated = json.loads(STATED.read_text(encoding="utf-8"))
        (source / "results.json").write_text(json.dumps(stated["run"]), encoding="utf-8")
        published = Path(folder) / "published" / CHECKPOINT.name
        publish(source, output_dir=published, results=stated["results"], facts=stated["facts"])
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(published, CHECKPOINT)
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    print(f"{CHECKPOINT}: {sum(path.stat().st_size for path in files):,} bytes.")


def convert(run, folder):
    """The student of a run in half the bytes, with the run's card, which tells what it began with."""
    AutoModelForSeq2SeqLM.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run).save_pretrained(folder)
    shutil.copyfile(run / "README.md", folder / "README.md")


def state(source, run, rows, workplace):
    """What the card says: measured results, provenance of the rows, and unselected samples."""
    held_out = {"dataset_name": rows / "held_out_distributions.jsonl", "max_samples": 500}
    results = [
        evaluate_checkpoint(source, "docstrings", output_dir=workplace / name, **data)
        for name, data in (("standard_library", {}), ("held_out", held_out))
    ]
    trained = json.loads((run / "results.json").read_text(encoding="utf-8"))
    provenance = json.loads((rows / "provenance.json").read_text(encoding="utf-8"))
    lines = (workplace / "standard_library" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    return {"facts": facts(trained, provenance, results[0], samples), "results": results, "run": trained}


def facts(trained, provenance, result, samples):
    """The card's texts."""
    student = next(row for row in trained["models"] if row["name"] == "distilled student")
    teacher = next(row for row in trained["models"] if row["name"] == "teacher")
    limits = LIMITS.format(
        num_tokens=result["settings"]["max_source_length"],
        percent_cut=100 * result["num_cut_rows"] / result["num_rows"],
    )
    description = DESCRIPTION.format(
        minutes=(teacher["train_seconds"] + student["train_seconds"]) / 60,
        rouge=result["metrics"]["rougeL"]["value"],
        form=form_alone(samples),
    )
    return {
        "name": "Docstring writer",
        "license": "apache-2.0",
        "description": description + _samples_table(samples),
        "training_data": _training_data(trained, provenance),
        "teacher": f"a decoder-only model of {teacher['num_parameters'] / 1e6:.1f}M parameters (Llama), trained on "
        f"the same rows in {teacher['train_seconds']:,.0f} s; ROUGE-L {teacher['rougeL']:.1f} % (greedy)",
        "objective": f"half forward KL divergence to the teacher, half cross-entropy on the gold sentence; "
        f"{trained['train_steps']:,} steps in {student['train_seconds']:,.0f} s, from layers of the teacher "
        f"(`from_decoder_only`); recipe `{RECIPE}` of encdec-slm",
        "hardware": hardware(),
        "energy": "not measured",
        "example": EXAMPLE,
        "limits": limits + _distributions_table(provenance),
        "tags": ["code", "docstring", "distillation"],
    }


def form_alone(samples):
    """ROUGE-L, in percent, of all sentences beside references from the other half of the modules."""
    references = [sample["references"][0] for sample in samples]
    half = len(references) // 2
    return score_texts([sample["prediction"] for sample in samples], references[half:] + references[:half])["rougeL"]


def _samples_table(samples):
    chosen = samples[:: max(1, len(samples) // NUM_SAMPLES)][:NUM_SAMPLES]
    parts = []
    for sample in chosen:
        # Indented: between fences, formatters would rewrite what the model was given.
        parts.append(textwrap.indent(first_lines(sample["source"], 5), "    ") + "\n")
        parts.append(f"- its author: {sample['references'][0]}\n- the model: {sample['prediction']}\n")
    return "\n".join(parts)


def _training_data(trained, provenance):
    files = [entry for entry in provenance["read"] if entry["file"] == "train.jsonl"]
    total = sum(entry["functions"] for entry in files)
    return (
        f"{trained['train_rows']:,} drawn from {total:,} functions and their first docstring sentences: "
        f"{files[0]['functions']:,} of the standard library "
        f"of Python {files[0]['version']} (PSF-2.0), {total - files[0]['functions']:,} of {len(files) - 1} installed "
        "distributions with permissive licences, listed below; none is nearly a held-out function"
    )


def _distributions_table(provenance):
    files = [entry for entry in provenance["read"] if entry["file"] == "train.jsonl"]
    lines = ["", "<details><summary>Where the training rows come from</summary>", ""]
    lines += ["Licences are as each distribution's metadata states them; other distributions were not read.", ""]
    lines += ["| distribution | version | licence | functions |", "| --- | --- | --- | ---: |"]
    lines += [
        f"| {entry['distribution']} | {entry['version']} | {entry['licence']} | {entry['functions']:,} |"
        for entry in sorted(files, key=lambda entry: -entry["functions"])
    ]
    held_out = sorted(
        {entry["distribution"] for entry in provenance["read"] if entry["file"] == "held_out_distributions.jsonl"}
    )
    lines += ["", f"Held out as a whole, for the second data set under Results: {', '.join(held_out)}.", ""]
    return "\n".join([*lines, "</details>", ""])


def hardware():
    about = machine("cpu")
    return f"{about['cores']} shared cores of {about['cpu']}, one process on each, float32"


if __name__ == "__main__":
    run_script(main)

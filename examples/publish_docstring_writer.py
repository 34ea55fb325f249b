# SPDX-License-Identifier: Apache-2.0
"""Evaluate the docstring writer and publish it to `checkpoints/docstring-writer`.

python examples/publish_docstring_writer.py RUN ROWS    after a training: its output folder, and the folder of its rows
python examples/publish_docstring_writer.py             the same weights with the current code files and card template

`checkpoints/docstring-writer.json` holds the facts and results of the card: the first form writes it, the second reads
it.
"""

import json
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.benchmarks.machine import describe_machine
from encdec_slm.hub_cards import publish
from encdec_slm.run_results import RunResults
from encdec_slm.trainers.evaluation import evaluate_checkpoint
from encdec_slm.trainers.evaluation.metrics import text_scores


CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "docstring-writer"
CONTENT = CHECKPOINT.with_suffix(".json")
NUM_SAMPLES = 8
RECIPE = "distill_docstring_writer"
EXAMPLE = "def size(self):\n    return len(self.rows)"
DESCRIPTION = """\
Generates the first sentence of a docstring from the source of a Python function. It is a demonstration, trained for
{minutes:.0f} minutes on two CPU cores, including its teacher: its sentences look like docstrings and often have the
right verb, but seldom describe what the function does. On unseen functions ROUGE-L is {rouge} %; against the
docstrings of other modules, as a baseline, the same sentences reach {baseline} %.

## Samples

Functions of standard-library modules that neither the model nor its teacher was trained on, at even distances in the
test split and not selected:

"""
LIMITS = """\
- It reads the first {num_tokens} tokens of a function, without the class or module around it. In the test split,
  {percent_cut:.0f} % are longer. Pass `truncation=True` to the pipeline for longer functions.
- It generates one English sentence in the style of Python's libraries. Unseen names from the domain of a function
  often come out as other words.
- Its sentences look right more often than they are: treat them as a draft.
- Do not use it for code whose documentation must be right, nor to judge code.
"""


def main():
    if len(sys.argv) not in (1, 3):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / CHECKPOINT.name
        if len(sys.argv) == 3:
            convert(Path(sys.argv[1]), source)
            content = collect(source, *map(Path, sys.argv[1:]), Path(folder))
            CONTENT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copytree(CHECKPOINT, source)
        content = json.loads(CONTENT.read_text(encoding="utf-8"))
        RunResults.from_dict(content["training"]).save(source / "results.json")
        published = Path(folder) / "published" / CHECKPOINT.name
        publish(source, output_dir=published, results=content["evaluations"], facts=content["facts"])
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(published, CHECKPOINT)
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    print(f"{CHECKPOINT}: {sum(path.stat().st_size for path in files):,} bytes.")


def convert(run, folder):
    """Save the student in bfloat16."""
    AutoModelForSeq2SeqLM.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run).save_pretrained(folder)


def collect(source, run, rows, workplace):
    """Collect the content of the card: facts, evaluations, and the results of the training."""
    held_out = {"dataset_name": rows / "held_out_distributions.jsonl", "max_samples": 500}
    evaluations = [
        evaluate_checkpoint(source, "docstrings", output_dir=workplace / name, **data)
        for name, data in (("standard_library", {}), ("held_out", held_out))
    ]
    training = RunResults.load(run / "results.json")
    provenance = json.loads((rows / "provenance.json").read_text(encoding="utf-8"))
    lines = (workplace / "standard_library" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    facts = build_facts(training, provenance, evaluations[0], [json.loads(line) for line in lines])
    return {
        "facts": facts,
        "evaluations": [evaluation.to_dict() for evaluation in evaluations],
        "training": training.to_dict(),
    }


def build_facts(training, provenance, evaluation, samples):
    """Build the texts of the card."""
    student, teacher = training.saved, training["teacher"]
    limits = LIMITS.format(
        num_tokens=evaluation.settings["max_source_length"],
        percent_cut=100 * evaluation.num_cut_rows["test"] / evaluation.num_rows["test"],
    )
    description = DESCRIPTION.format(
        minutes=(teacher.train_seconds + student.train_seconds) / 60,
        rouge=evaluation.saved.metrics["rougeL"].value,
        baseline=score_shuffled(samples),
    )
    about = describe_machine("cpu")
    return {
        "name": "Docstring writer",
        "license": "apache-2.0",
        "description": description + _format_samples(samples),
        "training_data": _describe_data(training, provenance),
        "teacher": f"a decoder-only model with {teacher.num_parameters / 1e6:.1f}M parameters (Llama), trained on "
        f"the same rows in {teacher.train_seconds:,.0f} s; ROUGE-L {teacher.metrics['rougeL'].value:.1f} % (greedy)",
        "objective": f"half forward KL divergence from the teacher, half cross-entropy; {training.train_steps:,} "
        f"steps in {student.train_seconds:,.0f} s, from layers of the teacher (`from_decoder_only`); recipe "
        f"`{RECIPE}`",
        "hardware": f"{about['cores']} shared cores of {about['cpu']}, one process on each, float32",
        "energy": "not measured",
        "example": EXAMPLE,
        "limits": limits + _format_distributions(provenance),
        "tags": ["code", "docstring", "distillation"],
    }


def score_shuffled(samples):
    """Return ROUGE-L, in percent, against references from the other half of the modules."""
    references = [sample["references"][0] for sample in samples]
    half = len(references) // 2
    pairs = zip(samples, references[half:] + references[:half], strict=True)
    scores = [text_scores(sample["prediction"], [reference])["rougeL"] for sample, reference in pairs]
    return round(100 * sum(scores) / len(scores), 2)


def _format_samples(samples):
    chosen = samples[:: max(1, len(samples) // NUM_SAMPLES)][:NUM_SAMPLES]
    parts = []
    for sample in chosen:
        # Indented, because formatters rewrite code between fences.
        lines = sample["source"].splitlines()
        source = "\n".join([*lines[:5], "    ..."] if len(lines) > 5 else lines)
        parts.append(textwrap.indent(source, "    ") + "\n")
        parts.append(f"- Author: {sample['references'][0]}\n- Model: {sample['prediction']}\n")
    return "\n".join(parts)


def _describe_data(training, provenance):
    files = [entry for entry in provenance["read"] if entry["file"] == "train.jsonl"]
    total = sum(entry["functions"] for entry in files)
    return (
        f"{training.num_rows['train']:,} drawn from {total:,} functions and their first docstring sentences: "
        f"{files[0]['functions']:,} of the standard library "
        f"of Python {files[0]['version']} (PSF-2.0), {total - files[0]['functions']:,} of {len(files) - 1} installed "
        "distributions with permissive licenses, listed below; near-duplicates of held-out functions were removed"
    )


def _format_distributions(provenance):
    files = [entry for entry in provenance["read"] if entry["file"] == "train.jsonl"]
    lines = ["", "<details><summary>Where the training rows come from</summary>", ""]
    lines += ["Licenses are those in the metadata of each distribution; other distributions were not read.", ""]
    lines += ["| distribution | version | license | functions |", "| --- | --- | --- | ---: |"]
    lines += [
        f"| {entry['distribution']} | {entry['version']} | {entry['license']} | {entry['functions']:,} |"
        for entry in sorted(files, key=lambda entry: -entry["functions"])
    ]
    held_out = sorted(
        {entry["distribution"] for entry in provenance["read"] if entry["file"] == "held_out_distributions.jsonl"}
    )
    lines += ["", f"Held out completely, for the second data set under Results: {', '.join(held_out)}.", ""]
    return "\n".join([*lines, "</details>", ""])


if __name__ == "__main__":
    main()

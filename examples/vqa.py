# SPDX-License-Identifier: Apache-2.0
"""Trains a vision-text model to answer questions about images, and shows how often it is right on held-out ones.

python examples/vqa.py --config configuration/recipes/vqa_synthetic.yaml [--key value ...]

`--config` takes the path of a YAML file or the name of a recipe in `configuration/recipes`; every key of a recipe can
also be given on the command line, which wins. `--help` lists the keys.
"""

from transformers import Seq2SeqTrainingArguments

from encdec_slm.configuration.recipe_files import parse_recipe
from encdec_slm.trainers.run_reports import run_script
from encdec_slm.trainers.vqa import VqaArguments, train_vqa


def main():
    args, training_args = parse_recipe((VqaArguments, Seq2SeqTrainingArguments))
    results = train_vqa(args, training_args)
    if training_args.process_index == 0:
        print(report(results, training_args.output_dir))


def report(results, folder):
    """Exact match per task, before and after, beside what is earned without looking; and some answers."""
    lines = [
        "",
        f"{'exact match (%)':16} {'rows':>5} {'before':>8} {'after':>8} {'other images':>14} {'one answer':>12}",
    ]
    for task, row in results["tasks"].items():
        lines.append(
            f"{task:16.16} {row['rows']:5} {row['before']:8.1f} {row['after']:8.1f} {row['other_images']:14.1f} "
            f"{row['most_frequent']:12.1f}"
        )
    lines += ["  other images: the trained model, shown the image of another row of the task"]
    lines += ["  one answer: the most frequent answer to all questions of the task", ""]
    for sample in results["samples"]:
        lines.append(f"{sample['question']:60.60} {sample['answer']!r:20.20} model: {sample['prediction']!r:.40}")
    lines += [
        "",
        f"The model has {results['num_parameters'] / 1e6:.1f}M parameters and was trained for "
        f"{results['train_seconds']:.0f} s on {results['rows']['train']:,} questions on {results['device']}.",
        f"Saved to {folder}: model and processor, contact_sheet.png, results.json, predictions.jsonl and loss.png.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)

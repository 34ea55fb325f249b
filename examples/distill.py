# SPDX-License-Identifier: Apache-2.0
"""Teaches an encoder-decoder student by a decoder-only teacher, and compares it with a student without one.

python examples/distill.py --config configuration/recipes/distill_docstrings.yaml [--key value ...]

`--config` takes the path of a YAML file or the name of a recipe in `configuration/recipes`; every key of a recipe can
also be given on the command line, which wins: `--teacher_model_name_or_path` takes any decoder-only model and
`--dataset_name` any data set of the Hub. `--help` lists the keys.
"""

from encdec_slm.configuration.recipe_files import parse_recipe
from encdec_slm.trainers import Seq2SeqDistillationConfig
from encdec_slm.trainers.distilling import DistillArguments, distill
from encdec_slm.trainers.run_reports import first_lines, run_script


def main():
    args, training_args = parse_recipe((DistillArguments, Seq2SeqDistillationConfig))
    results = distill(args, training_args)
    if training_args.process_index == 0:
        print(report(results, training_args.output_dir))


def report(results, folder):
    """One table, what it says about the teacher's worth, and three samples."""
    models = results["models"]
    columns = {
        "loss (nats)": lambda row: f"{row['loss']:.3f}",
        "ROUGE-L": lambda row: f"{row['rougeL']:.1f} ({row['rougeL_other_rows']:.1f})",
        "agreement": lambda row: f"{row['teacher_agreement']:.1f} %",
        "parameters": lambda row: f"{row['num_parameters'] / 1e6:.2f}M",
        "first token": lambda row: f"{1e3 * row['first_token_seconds']:.1f} ms",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
        "training": lambda row: "-" if row["train_seconds"] is None else f"{row['train_seconds']:.0f} s",
    }
    lines = ["", f"{'held-out rows':24}" + "".join(f"{name:>14}" for name in columns)]
    lines += [f"{row['name']:24}" + "".join(f"{show(row):>14}" for show in columns.values()) for row in models]
    lines += [
        "",
        "In brackets: ROUGE-L of the same texts beside other rows' references, which form alone earns.",
    ]
    if len(models) == 3:
        lines.append(verdict(models[1], models[2], results["train_steps"]))
    for sample in results["samples"]:
        lines += ["", first_lines(sample["source"]), f"  reference: {sample['reference']}"]
        lines += [f"  distilled: {sample['prediction']}"]
    lines += ["", f"Saved to {folder}: the distilled student, results.json, predictions.jsonl and loss.png."]
    return "\n".join(lines)


def verdict(distilled, alone, num_steps):
    """Whether the teacher was worth it, number by number."""
    better = {
        "loss": distilled["loss"] < alone["loss"],
        "ROUGE-L": distilled["rougeL"] > alone["rougeL"],
        "agreement with the teacher": distilled["teacher_agreement"] > alone["teacher_agreement"],
    }
    won = [name for name, is_better in better.items() if is_better]
    lost = [name for name, is_better in better.items() if not is_better]
    text = f"After {num_steps:,} steps each on the same rows, distillation "
    if won:
        text += f"wins in {', '.join(won)}"
    if lost:
        text += f"{' and ' if won else ''}does NOT win in {', '.join(lost)}"
    return text + "."


if __name__ == "__main__":
    run_script(main)

# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes an encoder-decoder as a recipe says, and shows what that changed on held-out rows.

python examples/finetune.py --config configuration/recipes/finetune_docstrings.yaml [--key value ...]

`--config` takes the path of a YAML file or the name of a recipe in `configuration/recipes`; every key of a recipe can
also be given on the command line, which wins. `--help` lists the keys.
"""

from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig

from encdec_slm.configuration.recipe_files import parse_recipe
from encdec_slm.trainers.finetuning import FinetuneArguments, finetune
from encdec_slm.trainers.run_reports import first_lines, run_script


def main():
    args, training_args, model_args = parse_recipe((FinetuneArguments, Seq2SeqTrainingArguments, ModelConfig))
    results = finetune(args, training_args, model_args)
    if training_args.process_index == 0:
        print(report(results, training_args.output_dir))


def report(results, folder):
    """The numbers before and after, three samples, and what size of model to expect them from."""
    lines = ["", f"{'held-out rows':26} {'before':>9} {'after':>9}"]
    names = {
        "loss": "loss (nats per token)",
        "rougeL": "ROUGE-L (0 to 100)",
        "rougeL_other_rows": "  beside wrong references",
        "exact": "exact matches (%)",
    }
    for key, name in names.items():
        lines.append(f"{name:26} {results['before'][key]:9.2f} {results['after'][key]:9.2f}")
    for sample in results["samples"]:
        lines += ["", first_lines(sample["source"]), f"  reference: {sample['reference']}"]
        lines += [f"  model:     {sample['prediction']}"]
    lines += [
        "",
        f"{results['after']['rows']} held-out rows were written for. The model has "
        f"{results['num_parameters'] / 1e6:.1f}M parameters and was trained for {results['train_seconds']:.0f} s on "
        f"{results['rows']['train']['rows']:,} rows on {results['device']}.",
        f"Saved to {folder}: the model, results.json, predictions.jsonl and loss.png.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)

# SPDX-License-Identifier: Apache-2.0
"""Put measurements of the shell model into shell_results.json, and write the tables of README.md and docs/shell.md.

    python examples/shell_results.py [--evaluation SYSTEM=FOLDER ...] [--benchmark FILE] [--answers]

FOLDER is the output of `encdec-slm evaluate --task shell --output-dir FOLDER`, whose data file names its rows (such as
test_random.jsonl); that of this model is a folder in the `--output-dir` of examples/calibrate_shell.py. SYSTEM is one
of shell, encoder-decoder, decoder-only, teacher, teacher-examples, teacher-tuned, nearest, distilled, same-steps and
not-distilled. Several folders of one system and the same rows are seeds, of which the means are shown. If there are at
least three, encoder-decoder is compared with decoder-only, and distilled with the last two. A teacher is compared with
shell on its own rows. FILE was written by examples/benchmark_shell.py. --answers asks the model the requests of the
demo again.
Without options, the tables and the plot are written again from shell_results.json.
"""

import argparse
import json
import random
import re
import statistics
import textwrap
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from evidence_statistics import compare, format_mean

from encdec_slm.checkpoints import write_file
from encdec_slm.run_results import RunResults, format_table


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "shell_results.json"
PLOT = ROOT / "docs" / "shell.png"
# Name in the tables, and model in the benchmark.
SYSTEMS = {
    "shell": ("this model", "encoder-decoder"),
    "encoder-decoder": ("encoder-decoder", None),
    "decoder-only": ("decoder-only baseline of the same size", "decoder-only"),
    "teacher": ("Qwen2.5-Coder-0.5B-Instruct", "teacher"),
    "teacher-examples": ("Qwen2.5-Coder-0.5B-Instruct, five examples in the prompt", "teacher"),
    "teacher-tuned": ("Qwen2.5-Coder-0.5B-Instruct, tuned by LoRA", None),
    "nearest": ("commands of the nearest training requests", None),
}
METRICS = {
    "nlc2cmd": "NLC2CMD, first answer",
    "nlc2cmd_top5": "NLC2CMD, five answers",
    "template": "template",
    "exact": "exact",
    "first_utility": "first program",
    "valid_bash": "valid Bash",
}
COMPARED = ("nlc2cmd", "nlc2cmd_top5", "template")
# Systems whose seeds are compared with those of others, and their names in the table.
PAIRS = {
    "differences": ("encoder-decoder", {"decoder-only": "decoder-only"}),
    "distillation": ("distilled", {"same-steps": "without labels", "not-distilled": "second training"}),
}
COMPARED_SYSTEMS = {name for first, others in PAIRS.values() for name in (first, *others)}
TEACHERS = ("teacher", "teacher-examples", "teacher-tuned")
NUM_MISTAKES, LONGEST_MISTAKE = 10, 120
MISSING = "not measured"
PLOT_LABEL_WIDTH = 28


def load_results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


# Collect


def read_evaluations(folders):
    """Return the name of the rows, their number, and the metrics of an evaluation: of several, the means over seeds.

    Of greedy search, these are the metrics of one answer.
    """
    from encdec_slm.trainers.evaluation.results import mean_with_interval

    results = RunResults.load(Path(folders[0], "evaluation.json"))
    metrics = {name: [metric.value, metric.low, metric.high] for name, metric in results.saved.metrics.items()}
    if len(folders) > 1:
        means = [
            {name: statistics.mean(row[name] for row in rows) for name in METRICS}
            for rows in zip(*read_rows(folders), strict=True)
        ]
        for name, metric in mean_with_interval(means).items():
            # Not rounded twice, so that all tables say the same.
            metrics[name] = [100 * statistics.mean(row[name] for row in means), metric.low, metric.high]
    if results.settings.get("num_beams") == 1:
        metrics.pop("nlc2cmd_top5", None)
    counts = {"num_rows": results.num_rows["test"], "num_seeds": len(folders)}
    return Path(results.dataset.name).stem, {**counts, "metrics": metrics}


def read_rows(folders):
    """Return for each folder the metrics of all rows, from 0 to 1, in the same order."""
    by_folder = [read_by_row(folder) for folder in folders]
    if len({tuple(sorted(rows)) for rows in by_folder}) > 1:
        raise ValueError(f"{' and '.join(map(str, folders))} have different rows, but these are compared in pairs.")
    return [[rows[key] for key in by_folder[0]] for rows in by_folder]


def read_by_row(folder):
    """Return the metrics of all rows, from 0 to 1, by the text of the row and how often it came before."""
    from encdec_slm.trainers.evaluation.shell_metrics import shell_metrics

    found, counts = {}, Counter()
    for row in map(json.loads, Path(folder, "predictions.jsonl").read_text(encoding="utf-8").splitlines()):
        if "prediction" in row:
            text = json.dumps([row["source"], row["references"]])
            found[text, counts[text]] = shell_metrics(row["prediction"].splitlines(), row["references"])
            counts[text] += 1
    return found


def compare_on_common_rows(folder, other):
    """Compare this model with a system that was measured on some of its rows.

    Returns:
        `dict`: `num_rows`, and by metric the mean of both, their difference and its interval over rows, in percent.
    """
    from encdec_slm.trainers.evaluation.results import mean_with_interval

    ours, theirs = read_by_row(folder), read_by_row(other)
    pairs = [(ours[key], theirs[key]) for key in theirs]
    names = [name for name in COMPARED if name != "nlc2cmd_top5"]
    differences = mean_with_interval([{name: one[name] - two[name] for name in names} for one, two in pairs])
    return {"num_rows": len(pairs)} | {
        name: {
            "means": [100 * statistics.mean(pair[number][name] for pair in pairs) for number in (0, 1)],
            "difference": [differences[name].value, differences[name].low, differences[name].high],
        }
        for name in names
    }


def compare_seeds(firsts, seconds):
    """Compare two systems by the evaluations of their seeds, in the order of the folders.

    Returns:
        `dict`: By metric what `evidence_statistics.compare` returns, in percent, and `means` of the seeds.
    """
    rows = read_rows([*firsts, *seconds])
    arms = rows[: len(firsts)], rows[len(firsts) :]
    differences = {}
    for name in COMPARED:
        runs = [
            {
                seed: {"rows": {name: [100 * row[name] for row in one], "num_tokens": [1] * len(one)}}
                for seed, one in enumerate(arm)
            }
            for arm in arms
        ]
        means = [[sum(run["rows"][name]) / len(run["rows"][name]) for run in arm.values()] for arm in runs]
        differences[name] = {"means": means, **compare(*runs, name)}
    return differences


def collect_evaluations(results, folders):
    """Put evaluations into the results: `folders` are those of the seeds, by system and name of the rows."""
    for (system, name), seeds in folders.items():
        if system in SYSTEMS:
            results["evaluations"].setdefault(system, {})[name] = read_evaluations(seeds)[1]
        if (system, name) == ("shell", "test_random"):
            results["mistakes"] = find_mistakes(seeds[0])
        for kind, (first, others) in PAIRS.items():
            if system in others and len(firsts := folders.get((first, name), [])) == len(seeds) > 2:
                results[kind].setdefault(name, {})[system] = compare_seeds(firsts, seeds)
        if system in TEACHERS and (ours := folders.get(("shell", name))):
            results["teachers"].setdefault(name, {})[system] = compare_on_common_rows(ours[0], seeds[0])


def label_scores(system, evaluation):
    """Return the name of a system in the tables of scores, with the number of seeds if there are several."""
    label = SYSTEMS[system][0]
    return f"{label}, {evaluation['num_seeds']} seeds" if evaluation and evaluation["num_seeds"] > 1 else label


def find_mistakes(folder):
    """Count the kinds of answers, and draw ten of the wrong ones that are short enough to read."""
    lines = Path(folder, "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "prediction" in row]
    answers = [
        {
            "request": row["source"],
            "expected": row["references"][0],
            "answer": (row["prediction"].splitlines() or [""])[0],
        }
        for row in rows
    ]
    for answer in answers:
        answer["kind"] = classify(answer["answer"], answer["expected"])
    wrong = [one for one in answers if one["kind"] != "same command"]
    short = [one for one in wrong if max(map(len, one.values())) <= LONGEST_MISTAKE]
    kinds = Counter(one["kind"] for one in answers)
    drawn = random.Random(0).sample(short, min(NUM_MISTAKES, len(short)))
    return {"kinds": dict(kinds.most_common()), "examples": drawn}


def classify(answer, expected):
    from encdec_slm.trainers.evaluation.shell_metrics import shell_metrics

    metrics = shell_metrics([answer], [expected])
    if metrics["exact"]:
        return "same command"
    if not metrics["valid_bash"]:
        return "not valid Bash"
    if metrics["template"]:
        return "same programs and flags, other arguments"
    return "same first program, other flags or programs" if metrics["first_utility"] else "another first program"


def answer_requests():
    from encdec_slm_cli.shell_model import load_shell_model
    from shell_demo import REQUESTS

    model = load_shell_model()
    return {request: model.answer(request)[0].command for request in REQUESTS}


# Tables


def readme_demo(results):
    request, command = next(iter(results["answers"].items()))
    return f'```\n$ encdec-slm shell "{request}"\n{command}\n```'


def readme_table(results):
    """Return the table of all systems on test_random, with the fastest engine of each."""
    header = (
        "system",
        "parameters",
        "weights",
        "NLC2CMD, first answer",
        "five answers",
        "everyday requests, right",
        "InterCode-ALFA",
        "ms per answer",
    )
    rows = [header]
    for key, (_, model) in SYSTEMS.items():
        if key == "nearest":  # docs/shell.md has it
            continue
        evaluations = results["evaluations"][key]
        scores = [format_metric(evaluations.get("test_random"), name) for name in ("nlc2cmd", "nlc2cmd_top5")]
        scores.append(format_metric(evaluations.get("everyday_blind"), "template"))
        parameters, size, speed = "-", "-", "-" if model is None else MISSING
        if entries := find_fastest(results, model):
            parameters, size = f"{entries[0]['num_parameters'] / 1e6:,.3g}M", f"{entries[0]['bytes'] / 1e6:,.0f} MB"
            speed = "; ".join(f"{one['milliseconds']:,.0f} ({format_engine(one)})" for one in entries)
        label = label_scores(key, evaluations.get("test_random"))
        rows.append((label, parameters, size, *scores, results["published"].get(key, "-"), speed))
    rows += [tuple(row) for row in results["published"]["rows"]]
    table = format_table([list(row) for row in rows], markdown=True)
    counts = sorted(
        {one["test_random"]["num_rows"] for one in results["evaluations"].values() if "test_random" in one}
    )
    latency = results["latency"]
    note = (
        f"Scores are in percent, with 95 % intervals, on {' to '.join(map(str, counts))} held-out requests of NL2Bash "
        "(`test_random`), and on 100 to 300 everyday ones (`everyday_blind`), with right programs and flags. This "
        "model answers as `encdec-slm shell` does. The models with several seeds had less training. They search with "
        "five beams and Qwen greedily, which favors this model (docs/shell.md). Times are medians for "
        f"{latency['num_tokens']} tokens on an {latency['cpu']}, in the fastest engine: Qwen with "
        f"{latency['threads']} threads and no examples, the small models with one thread. InterCode-ALFA and the last "
        "row are published."
    )
    return f"{table}\n\n{textwrap.fill(note, 119, break_on_hyphens=False)}"


def score_table(results):
    tables = []
    for name in ("test_random", "test", "everyday_blind"):
        rows = [[f"`{name}`", "rows", *METRICS.values()]]
        for key in SYSTEMS:
            evaluation = results["evaluations"].get(key, {}).get(name)
            num_rows = f"{evaluation['num_rows']:,}" if evaluation else "-"
            metrics = (format_metric(evaluation, metric) for metric in METRICS)
            rows.append([label_scores(key, evaluation), num_rows, *metrics])
        tables.append(format_table(rows, markdown=True))
    return "\n\n".join(tables)


def difference_table(results, kind="differences"):
    first, others = PAIRS[kind]
    rows = [["rows", "metric", first, "compared with", "its score", "difference", "over rows", "over seeds"]]
    for name, systems in results[kind].items():
        for system, found in systems.items():
            for metric, one in found.items():
                intervals = ("[{:+.1f}, {:+.1f}]".format(*one[over]) for over in ("rows", "seeds"))
                mean, other = (format_mean(values, metric) for values in one["means"])
                cells = [f"`{name}`", METRICS[metric], mean, others[system], other, f"{one['difference']:+.1f}"]
                rows.append([*cells, *intervals])
    return format_table(rows, markdown=True)


def teacher_table(results):
    columns = ("the system", "difference")
    rows = [["rows", "number", "system", "NLC2CMD, first answer: this model", *columns]]
    rows[0] += ["right programs and flags: this model", *columns]
    for name, systems in results["teachers"].items():
        for system, found in systems.items():
            cells = [f"`{name}`", str(found["num_rows"]), SYSTEMS[system][0]]
            for metric in ("nlc2cmd", "template"):
                value, low, high = found[metric]["difference"]
                cells += [f"{mean:.1f}" for mean in found[metric]["means"]]
                cells.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]")
            rows.append(cells)
    return format_table(rows, markdown=True)


def latency_table(results):
    rows = [["model", "engine", "weights", "ms per answer"]]
    for one in results["latency"]["entries"]:
        label = next(label for label, model in SYSTEMS.values() if model == one["model"])
        rows.append([label, format_engine(one), f"{one['bytes'] / 1e6:,.1f} MB", f"{one['milliseconds']:,.1f}"])
    return format_table(rows, markdown=True)


def mistakes_table(results):
    kinds, examples = results["mistakes"]["kinds"], results["mistakes"]["examples"]
    total = sum(kinds.values())
    shares = "\n".join(f"- {kind}: {count / total:.1%}" for kind, count in kinds.items())
    rows = [["request", "expected", "answer"]]
    rows += [[one["request"], *(format_code(one[key]) for key in ("expected", "answer"))] for one in examples]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return f"{shares}\n\n{format_table(rows, markdown=True).replace('---:', '---')}"


def format_metric(evaluation, name):
    if evaluation is None:
        return MISSING
    if name not in evaluation["metrics"]:
        return "one answer"
    value, low, high = evaluation["metrics"][name]
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def format_engine(entry):
    return f"{entry['engine'].replace('ctranslate2', 'CTranslate2')}, {entry['precision']}"


def format_code(text):
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def find_fastest(results, model):
    """Find the fastest engine of a model in greedy search, and in the search of `encdec-slm shell` if it has that."""
    entries = [one for one in results["latency"]["entries"] if one["model"] == model]
    by_search = ([one for one in entries if ("beams" in one["engine"]) == has_beams] for has_beams in (False, True))
    return [min(found, key=lambda one: one["milliseconds"]) for found in by_search if found]


BLOCKS = {
    "README.md": {"answer": readme_demo, "results": readme_table},
    "docs/shell.md": {
        **{"scores": score_table, "differences": difference_table, "teachers": teacher_table},
        **{"latency": latency_table, "mistakes": mistakes_table},
        "distillation": partial(difference_table, kind="distillation"),
    },
}


def update_blocks(text, blocks, results):
    """Replace what is between `<!-- NAME: written by examples/SCRIPT.py -->` and `<!-- end -->`."""
    for name, build in blocks.items():
        pattern = re.compile(rf"(<!-- {name}: written by examples/\w+\.py -->\n).*?\n?<!-- end -->", re.DOTALL)
        content = f"{build(results)}\n<!-- end -->"
        text, count = pattern.subn(lambda match, content=content: match[1] + content, text)
        if count != 1:
            raise ValueError(f"{count} blocks {name!r} were found, but 1 is required.")
    return text


def draw_plot(results):
    """Draw the milliseconds of an answer, and the scores of first answers with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    times, *scores = figure.subplots(1, 3)
    # One bar for each model; the first label of the teacher names it.
    labels = {model: label for label, model in reversed(SYSTEMS.values()) if model is not None}
    for model, label in labels.items():
        for entry in find_fastest(results, model):
            name = f"{textwrap.fill(label, PLOT_LABEL_WIDTH)}\n{format_engine(entry)}"
            bars = times.barh(name, entry["milliseconds"], color="tab:blue")
            times.bar_label(bars, [f"{entry['milliseconds']:,.0f}"], padding=3)
    times.set_xscale("log")
    times.set_xlim(1, 3 * times.get_xlim()[1])
    times.set_title(f"ms per answer of {results['latency']['num_tokens']} tokens")
    shown = [
        ("test_random", "nlc2cmd", "NLC2CMD, first answer"),
        ("everyday_blind", "template", "everyday, right (%)"),
    ]
    for axes, (name, metric, title) in zip(scores, shown, strict=True):
        for key in reversed(SYSTEMS):
            if evaluation := results["evaluations"].get(key, {}).get(name):
                value, low, high = evaluation["metrics"][metric]
                label = textwrap.fill(label_scores(key, evaluation), PLOT_LABEL_WIDTH)
                axes.errorbar(value, label, xerr=[[value - low], [high - value]], fmt="o", color="tab:blue", capsize=3)
        axes.margins(y=0.1)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(title)
    scores[1].tick_params(labelleft=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", nargs="*", default=[], metavar="SYSTEM=FOLDER")
    parser.add_argument("--benchmark", type=Path, metavar="FILE")
    parser.add_argument("--answers", action="store_true")
    arguments = parser.parse_args()
    results = load_results()
    folders = defaultdict(list)
    for item in arguments.evaluation:
        system, _, folder = item.partition("=")
        if system not in (known := {*SYSTEMS, *COMPARED_SYSTEMS}):
            parser.error(f"{item!r} must begin with one of {', '.join(sorted(known))} and =")
        folders[system, read_evaluations([folder])[0]].append(folder)
    collect_evaluations(results, folders)
    if arguments.benchmark is not None:
        report = json.loads(arguments.benchmark.read_text(encoding="utf-8"))
        entries = [{key: value for key, value in one.items() if key != "seconds"} for one in report["entries"]]
        results["latency"] = {key: report[key] for key in ("threads", "num_tokens")}
        results["latency"] |= {"cpu": report["machine"]["cpu"], "entries": entries}
    if arguments.answers:
        results["answers"] = answer_requests()
    write_file(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for name, blocks in BLOCKS.items():
        write_file(ROOT / name, update_blocks((ROOT / name).read_text(encoding="utf-8"), blocks, results))
    figure = draw_plot(results)
    write_file(PLOT, lambda path: figure.savefig(path, format="png", dpi=120))


if __name__ == "__main__":
    main()

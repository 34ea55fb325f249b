# SPDX-License-Identifier: Apache-2.0
"""Tables, a figure and the verdict of a benchmark."""

from collections.abc import Iterator
from typing import Any

from .contenders import BASELINE, FLAN_T5, OURS


COLUMNS = (
    *("model", "engine", "precision", "first token", "decode", "end to end", "peak memory", "of it the model"),
    *("files", "read per token", "of bandwidth"),
)
# Bars as ratios to the decoder-only baseline. Against the baseline in transformers: the paper's claims (first
# token -47 %, throughput 4.7 x, memory -11 %). In the same engine: what the shape alone promises.
BEST_ENGINE_BARS = {"first_token_seconds": 0.53, "decode_tokens_per_second": 4.7}
SAME_ENGINE_BARS = {"first_token_seconds": 0.75, "decode_tokens_per_second": 2.4, "added_memory": 0.89}
BANDWIDTH_BAR = 0.7
WORDS = {"first_token_seconds": "first token", "decode_tokens_per_second": "decode", "added_memory": "memory"}


def build_tables(report: dict[str, Any]) -> str:
    """Format one Markdown table per setting, with a row per contender.

    Args:
        report (`dict`): From [`~encdec_slm.benchmarks.measuring.run_benchmark`].
    """
    parts = []
    for place, (source_length, num_new_tokens) in enumerate(report["settings"]):
        rows = [_format_cells(row, row["settings"][place]) for row in report["rows"]]
        lines = [COLUMNS, ("---",) * 3 + ("---:",) * (len(COLUMNS) - 3), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{source_length:,} source tokens, {num_new_tokens} new tokens\n\n{table}")
    return "\n\n".join(parts)


def _format_cells(row, result):
    return (
        row["model"],
        row["engine"],
        row["precision"] + ("" if row["device"] == "cpu" else f" ({row['device']})"),
        f"{_format_spread(result['first_token_seconds'], 1e3, ',.0f')} ms",
        f"{_format_spread(result['decode_tokens_per_second'], 1, '.1f')}/s",
        f"{_format_spread(result['end_to_end_seconds'], 1, '.2f')} s",
        f"{result['peak_bytes'] / 1e6:,.0f} MB",
        f"{(result['peak_bytes'] - row['bytes_before']) / 1e6:,.0f} MB",
        f"{row['file_bytes'] / 1e6:,.0f} MB",
        f"{result['bytes_read_per_token'] / 1e6:,.1f} MB",
        f"{result['share_of_memory_bandwidth']:.0%}",
    )


def _format_spread(values, factor, form):
    median, lower, upper = (
        format(values[key] * factor, form) for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} ({lower} to {upper})"


def check_claims(report: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield what is claimed, what was measured, and whether the claim held, for all claims that were measured.

    Args:
        report (`dict`): From [`~encdec_slm.benchmarks.measuring.run_benchmark`].
    """
    usual = [pair for pair in report["pairs"] if "/transformers/" in pair["opponent"]]
    for measure, bar in BEST_ENGINE_BARS.items() if usual else ():
        best = sorted(usual, key=lambda pair: _ratio(pair, 0, measure))[0 if bar < 1 else -1]
        claim = f"{_format_setting(report, 0)}, best engine: {{}} of {best['opponent']}"
        yield _check_ratio(claim, measure, _ratio(best, 0, measure), bar, f" with {best['ours']}")
    for pair in report["pairs"]:
        if pair["ours"].partition("/")[2] == pair["opponent"].partition("/")[2]:
            for measure, bar in SAME_ENGINE_BARS.items():
                place = -1 if measure == "added_memory" else 0
                claim = f"{_format_setting(report, place)}, {pair['ours']}: {{}} of the baseline in the same engine"
                yield _check_ratio(claim, measure, _ratio(pair, place, measure), bar)
    rates = {}
    for row in report["rows"]:
        rates[row["name"]] = row["weights_per_token"] * row["settings"][0]["decode_tokens_per_second"]["median"]
        if row["model"] == OURS and row["precision"].startswith("int8"):
            share = max(result["share_of_memory_bandwidth"] for result in row["settings"])
            yield f"{row['name']}: {BANDWIDTH_BAR:.0%} of bandwidth", f"{share:.0%}", share >= BANDWIDTH_BAR
    for name, rate in rates.items():
        ours = rates.get(name.replace(FLAN_T5, OURS))
        if name.startswith(FLAN_T5) and ours:
            measured = f"{ours / 1e9:.1f} and {rate / 1e9:.1f} billion"
            yield f"weights decoded per second at least those of {name}", measured, ours >= rate


def _ratio(pair, place, measure):
    value = pair["settings"][place][measure]
    return value["median"] if isinstance(value, dict) else value


def _format_setting(report, place):
    return "{} -> {}".format(*report["settings"][place])


def _check_ratio(claim, measure, ratio, bar, suffix=""):
    bound = f"{WORDS[measure]} at {'most' if bar < 1 else 'least'} {bar} x that"
    return claim.format(bound), f"{ratio:.2f} x{suffix}", ratio <= bar if bar < 1 else ratio >= bar


def build_verdict(report: dict[str, Any]) -> str:
    """Format the claims, with what was measured, as a list.

    Args:
        report (`dict`): From [`~encdec_slm.benchmarks.measuring.run_benchmark`].
    """
    machine, claims = report["machine"], list(check_claims(report))
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [f"On {where}, {sum(held for *_, held in claims)} of {len(claims)} claims held:"]
    lines += [f"- {'held' if held else 'NOT held'}: {claim}; measured {measured}." for claim, measured, held in claims]
    return "\n".join(lines)


def build_figure(report: dict[str, Any]):
    """Draw first token and decode rate of every contender as bars, two panels per setting.

    Args:
        report (`dict`): From [`~encdec_slm.benchmarks.measuring.run_benchmark`].
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = report["rows"][::-1]
    figure = Figure(figsize=(12, (1.2 + 0.28 * len(rows)) * len(report["settings"])), layout="constrained")
    all_axes = figure.subplots(len(report["settings"]), 2, squeeze=False)
    colors = {OURS: "tab:blue", BASELINE: "tab:orange"}
    labels = [" ".join((row["model"], row["engine"], row["precision"], row["device"])) for row in rows]
    panels = (("first_token_seconds", 1e3, "first token, ms"), ("decode_tokens_per_second", 1, "decode, tokens/s"))
    for place, (setting_axes, setting) in enumerate(zip(all_axes, report["settings"], strict=True)):
        for axes, (key, factor, label) in zip(setting_axes, panels, strict=True):
            medians = [factor * row["settings"][place][key]["median"] for row in rows]
            axes.barh(range(len(rows)), medians, color=[colors.get(row["model"], "tab:gray") for row in rows])
            axes.bar_label(axes.containers[0], [f"{value:,.0f}" for value in medians], padding=3, fontsize=8)
            axes.set_yticks(range(len(rows)), labels, fontsize=8)
            axes.set_title(f"{setting[0]:,} source, {setting[1]:,} new tokens: {label}", fontsize=10)
            axes.set_xlim(0, 1.2 * max(medians))
            axes.margins(y=0.02)
            axes.grid(axis="x", alpha=0.3)
    legend = [Patch(color=color, label=name) for name, color in {**colors, "peers": "tab:gray"}.items()]
    figure.legend(handles=legend, loc="outside upper center", ncols=3)
    return figure


__all__ = ["build_figure", "build_tables", "build_verdict", "check_claims"]

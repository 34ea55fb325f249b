# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's numbers say: tables, a picture, and which of the predecessor's claims held on this machine."""

from collections.abc import Iterator
from typing import Any

from .contenders import FLAN_T5, OURS, TWIN


COLUMNS = (
    *("model", "engine", "precision", "first token", "decode", "end to end", "peak memory", "of it the model"),
    *("files", "read per token", "of bandwidth", "of matmul rate"),
)
# The predecessor's claims, as shares of the decoder-only model's (first token -47 %, throughput 4.7 x, memory -11 %).
CLAIMED_FIRST_TOKEN, CLAIMED_DECODE, CLAIMED_MEMORY = 0.53, 4.7, 0.89
# What structure alone promises where both sides run in one engine.
SAME_ENGINE_FIRST_TOKEN, SAME_ENGINE_DECODE = 0.75, 2.4
BANDWIDTH_SHARE = 0.7


def tables(report: dict[str, Any]) -> str:
    """One Markdown table per setting, a row per contender."""
    parts = []
    for place, (source_length, num_new_tokens) in enumerate(report["settings"]):
        rows = [_cells(row, row["settings"][place]) for row in report["rows"]]
        lines = [COLUMNS, ("---",) * 3 + ("---:",) * (len(COLUMNS) - 3), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{source_length:,} source tokens, {num_new_tokens} new ones\n\n{table}")
    return "\n\n".join(parts)


def _cells(row, result):
    return (
        row["model"],
        row["engine"],
        row["precision"] + ("" if row["device"] == "cpu" else f" ({row['device']})"),
        f"{_text(result['first_token_seconds'], 1e3, ',.0f')} ms",
        f"{_text(result['decode_tokens_per_second'], 1, '.1f')}/s",
        f"{_text(result['end_to_end_seconds'], 1, '.2f')} s",
        f"{result['peak_bytes'] / 1e6:,.0f} MB",
        f"{(result['peak_bytes'] - row['bytes_before']) / 1e6:,.0f} MB",
        f"{row['file_bytes'] / 1e6:,.0f} MB",
        f"{result['bytes_read_per_token'] / 1e6:,.1f} MB",
        f"{result['share_of_memory_bandwidth']:.0%}",
        f"{result['share_of_matmul_rate']:.0%}",
    )


def _text(summary, factor, form):
    median, lower, upper = (
        format(summary[key] * factor, form) for key in ("median", "lower_quartile", "upper_quartile")
    )
    return f"{median} ({lower} to {upper})"


def claims(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The claims that can be checked with what was timed: what is claimed, what was measured, and whether it held.

    Returns:
        `Iterator[dict]`: `claim` and `measured`, texts, and `held`, `True` or `False`.
    """
    setting = report["settings"][0]
    yield from _claims_of_best_engine(report, f"{setting[0]} -> {setting[1]}")
    for pair in report["pairs"]:
        if _engine(pair["ours"]) == _engine(pair["opponent"]):
            yield from _claims_of_pair(pair, report["settings"])
    for row in report["rows"]:
        if row["model"] == OURS and row["precision"].startswith("int8"):
            share = max(result["share_of_memory_bandwidth"] for result in row["settings"])
            yield _claim(f"{_title(row)} decodes at {BANDWIDTH_SHARE:.0%} of bandwidth", f"{share:.0%}", share >= 0.7)
    yield from _claims_beside_peer(report)


def _claims_of_best_engine(report, setting):
    usual = [pair for pair in report["pairs"] if "/transformers/" in pair["opponent"]]
    bars = (
        ("first_token_seconds", min, CLAIMED_FIRST_TOKEN, "first token in at most"),
        ("decode_tokens_per_second", max, CLAIMED_DECODE, "decode at least"),
    )
    for measure, pick, bar, words in bars if usual else ():
        best = pick(usual, key=lambda pair: pair["settings"][0][measure]["median"])
        ratio = best["settings"][0][measure]["median"]
        claim = f"{setting}: {words} {bar} x the twin's in transformers ({best['opponent']})"
        yield _claim(claim, f"{ratio:.2f} x with {best['ours']}", ratio <= bar if pick is min else ratio >= bar)


def _claims_of_pair(pair, settings):
    where = f"{pair['ours']} beside the twin in the same engine"
    first, last = pair["settings"][0], pair["settings"][-1]
    words = f"{settings[0][0]} -> {settings[0][1]}"
    decode, latency = first["decode_tokens_per_second"]["median"], first["first_token_seconds"]["median"]
    yield _claim(f"{where}, {words}: decode at least 2.4 x", f"{decode:.2f} x", decode >= SAME_ENGINE_DECODE)
    yield _claim(
        f"{where}, {words}: first token at most 0.75 x", f"{latency:.2f} x", latency <= SAME_ENGINE_FIRST_TOKEN
    )
    memory = last["added_memory"]
    words = f"{settings[-1][0]} source tokens: memory at most {CLAIMED_MEMORY} x"
    yield _claim(f"{where}, {words}", f"{memory:.2f} x", memory <= CLAIMED_MEMORY)


def _claims_beside_peer(report):
    rates = {
        (row["model"], row["engine"], row["precision"]): row["weights_per_token"]
        * row["settings"][0]["decode_tokens_per_second"]["median"]
        for row in report["rows"]
    }
    for (model, engine, precision), rate in rates.items():
        ours = rates.get((OURS, engine, precision))
        if model == FLAN_T5 and ours:
            claim = f"{engine} {precision}: weights decoded per second at least those of {FLAN_T5}'s shape"
            yield _claim(claim, f"{ours / 1e9:.1f} to {rate / 1e9:.1f} billion", ours >= rate)


def _claim(claim, measured, held):
    return {"claim": claim, "measured": measured, "held": bool(held)}


def _engine(name):
    return name.split("/")[1:]


def _title(row):
    return f"{row['model']}/{row['engine']}/{row['precision']}"


def verdict(report: dict[str, Any]) -> str:
    """A paragraph: the machine, and every claim with what was measured."""
    machine = report["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    checked = list(claims(report))
    lines = [f"On {where}, {sum(claim['held'] for claim in checked)} of {len(checked)} claims held:"]
    lines += [
        f"- {'held' if one['held'] else 'NOT held'}: {one['claim']}; measured {one['measured']}." for one in checked
    ]
    return "\n".join(lines)


def figure(report: dict[str, Any]):
    """First token and decode rate of every contender as bars, a line of two panels for every setting."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = report["rows"][::-1]
    height = 1.2 + 0.28 * len(rows)
    picture = Figure(figsize=(12, height * len(report["settings"])), layout="constrained")
    all_axes = picture.subplots(len(report["settings"]), 2, squeeze=False)
    colours = {OURS: "tab:blue", TWIN: "tab:orange"}
    panels = (("first_token_seconds", 1e3, "first token, ms"), ("decode_tokens_per_second", 1, "decode, tokens/s"))
    for place, (axes_of_setting, setting) in enumerate(zip(all_axes, report["settings"], strict=True)):
        for axes, (key, factor, label) in zip(axes_of_setting, panels, strict=True):
            middles = [factor * row["settings"][place][key]["median"] for row in rows]
            axes.barh(range(len(rows)), middles, color=[colours.get(row["model"], "tab:gray") for row in rows])
            axes.bar_label(axes.containers[0], [f"{value:,.0f}" for value in middles], padding=3, fontsize=8)
            axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
            axes.set_title(f"{setting[0]:,} source, {setting[1]:,} new tokens: {label}", fontsize=10)
            axes.set_xlim(0, 1.2 * max(middles))
            axes.margins(y=0.02)
            axes.grid(axis="x", alpha=0.3)
    legend = [Patch(color=colour, label=name) for name, colour in colours.items()] + [
        Patch(color="tab:gray", label="peers")
    ]
    picture.legend(handles=legend, loc="outside upper center", ncols=3)
    return picture


def _label(row):
    device = "" if row["device"] == "cpu" else f" {row['device']}"
    return f"{row['model']}  {row['engine']} {row['precision']}{device}"

"""Compose report.html: the figures of a run, its curves, its plan and accounting, its configuration and environment.

Everything that comes from a run, its name, sources or paths, is text: it is escaped where it enters the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from typing import Any

from chunkflow_cli.console import human_bytes, human_seconds, percent
from chunkflow_cli.training.report.charts import Chart, Series, draw

Row = Mapping[str, Any]
BUCKET = re.compile(r"[<>≤≥]?=? ?\d[\d,.]*[KM]?( ?(-|–|to) ?\d[\d,.]*[KM]?)?\+?")
"""Names of ranges of lengths."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a page."""

    name: str
    outcome: str
    """How the run ended: `finished`, or the reason why it did not finish."""
    rows: Sequence[Row]
    """The rows of metrics.jsonl."""
    report: Mapping[str, Any]
    """The content of report.json; of a run that is not finished, what is known of it."""
    set_keys: Mapping[str, Any]
    """The configuration keys that differ from their defaults."""
    keys: Mapping[str, Any]
    """All of them."""


def page(run: RunRecord) -> str:
    """Return the page as HTML."""
    is_finished = run.outcome == "finished"
    charts = "".join(map(draw, charts_of(run)))
    none = '<p class="note">There are no rows of metrics: log.backends has no jsonl, or no step was done.</p>'
    report = run.report
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(run.name)}</title><style>{style}</style></head><body>'
        f'<header><h1>{escape(run.name)}</h1><p class="outcome {"good" if is_finished else "bad"}">'
        f"{escape(run.outcome)}</p></header><main>"
        f'<section class="figures">{"".join(_figures(run))}</section>'
        f'<section class="charts">{charts or none}</section>'
        '<section class="tables">'
        + _table("Plan", _plan(report["plan"]))
        + _table("Planned and measured", _as_planned(run), head=("", "planned", "measured"))
        + _table("Accounting", _accounting(report))
        + _table("Keys that differ from the defaults", ((name, as_text(value)) for name, value in run.set_keys.items()))
        + _table("Environment", ((name, as_text(value)) for name, value in report.get("environment", {}).items()))
        + "</section><details><summary>All configuration keys</summary>"
        + _table("", ((name, as_text(value)) for name, value in run.keys.items()))
        + f"</details></main><script>{script}</script></body></html>\n"
    )


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


def charts_of(run: RunRecord) -> list[Chart]:
    """Return the charts for which a run has values."""
    rows = run.rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    parts = {kind: [name for name in names if name.startswith(f"{kind}/")] for kind in ("loss", "eval_loss")}
    buckets = [name for name in parts["eval_loss"] if is_bucket(name.partition("/")[2])]
    held_out = _series(rows, "eval_loss", "held-out loss", are_points=True)
    before = run.report.get("eval_loss_start")
    if held_out and before is not None:
        (series,) = held_out
        held_out = [Series(series.name, [0, *series.steps], [before, *series.values], are_points=True)]
    by_source = [name for name in parts["eval_loss"] if name not in buckets]
    start = {f"eval_loss/{name}": loss for name, loss in run.report.get("eval_parts_start", {}).items()}
    evaluated = [{"step": 0} | start, *rows]
    charts = [
        Chart("Loss", [*_series(rows, "loss", "training loss"), *held_out]),
        Chart("Training loss by source", _parts(rows, parts["loss"])),
        Chart("Held-out loss by length", _parts(evaluated, buckets, are_points=True), "By tokens in the sample."),
        Chart("Held-out loss by source", _parts(evaluated, by_source, are_points=True)),
        Chart(
            "Rewards",
            [*_parts(rows, REWARDS), *_series(evaluated, "eval_rewards/margins", "held-out margins", are_points=True)],
            "Means of a batch. A margin is the reward of the chosen answer minus that of the rejected one.",
        ),
        Chart(
            "Accuracy",
            [
                *_series(rows, "rewards/accuracies", "training pairs"),
                *_series(evaluated, "eval_rewards/accuracies", "held-out pairs", are_points=True),
            ],
            "Share of pairs whose chosen answer has the higher reward.", show=percent, from_zero=True,
        ),
        Chart("Distance from the reference model", _series(rows, "kl", "kl")),
        Chart("Learning rate", _series(rows, "lr", "learning rate"), show=lambda value: f"{value:.3g}", from_zero=True),
        Chart("Gradient norm", _series(rows, "grad_norm", "norm before clipping"), from_zero=True),
        Chart("Speed", _series(rows, "tokens_per_second", "tokens per second"), show=_whole, from_zero=True),
        Chart(
            "Seconds per step",
            [*_series(rows, "step_seconds", "measured"), *_series(rows, "predicted_seconds", "predicted")],
            f"Prediction from: {run.report.get('plan', {}).get('cost_model', '')}.", from_zero=True,
        ),
        _memory(run),
        Chart(
            "Chunks per step",
            [*_series(rows, "chunks", "chunks"), *_series(rows, "recomputed_chunks", "recomputed")],
            "A recomputed chunk runs forward twice.", show=_whole, from_zero=True,
        ),
        Chart("How full the chunks are", _series(rows, "fill", "tokens / room"),
              show=lambda value: f"{100 * value:.3g} %", from_zero=True),
    ]  # fmt: skip
    return [chart for chart in charts if chart.series]


def is_bucket(name: str) -> bool:
    """Return whether a part of a loss is a range of lengths, such as `<1K` or `1K-4K`, and not a source."""
    return BUCKET.fullmatch(name) is not None


def as_text(value: Any) -> str:
    """Return a value of the configuration as a person would write it, without empty entries of mappings."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    if isinstance(value, dict):
        set_ones = {name: each for name, each in value.items() if each not in (None, "", {}, [])}
        return f"{{{', '.join(f'{name}: {as_text(each)}' for name, each in set_ones.items())}}}"
    return str(value)


def _series(rows: Sequence[Row], name: str, shown: str, *, are_points: bool = False) -> list[Series]:
    """Return the values of a metric as a list of one series, or of none."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not found:
        return []
    steps, values = zip(*found, strict=True)
    return [Series(shown, steps, values, are_points)]


def _parts(rows: Sequence[Row], names: Sequence[str], *, are_points: bool = False) -> list[Series]:
    return [series for name in names for series in _series(rows, name, name.partition("/")[2], are_points=are_points)]


def _memory(run: RunRecord) -> Chart:
    series = _series(run.rows, "peak_memory_bytes", "peak so far")
    unit, name = (2**30, "GiB") if max((s.values[-1] for s in series), default=0) >= 2**30 else (2**20, "MiB")
    scaled = [replace(each, values=[value / unit for value in each.values]) for each in series]
    return Chart("Memory", scaled, _of_what(run), show=lambda value: f"{value:,.4g} {name}", from_zero=True)


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) or value >= 10 else f"{value:.2g}"


def _of_what(run: RunRecord) -> str:
    return (
        "Memory of the whole process, with libraries."
        if run.report.get("environment", {}).get("device") == "cpu"
        else ""
    )


def _figures(run: RunRecord) -> Iterable[str]:
    """Yield the figures that matter most, as cards."""
    report = run.report
    first, last = report.get("loss_first"), report.get("loss_last")
    before, after = report.get("eval_loss_start"), report.get("eval_loss_end")
    seconds = report["train_seconds"]
    cards = [("steps", f"{_steps(report):,}", f"of {report['plan']['steps']:,}")]
    if last is not None:
        cards.append(("training loss", f"{last:.4f}", f"{first:.4f} in the first step"))
    if after is not None and before is not None:
        cards.append(("held-out loss", f"{after:.4f}", f"{before:.4f} before training"))
    if seconds:
        speed = f"{report['tokens_trained'] / seconds:,.0f}"
        cards.append(("tokens per second", speed, f"{human_seconds(seconds)} of training"))
    peak = max((row["peak_memory_bytes"] for row in run.rows), default=report.get("peak_memory_bytes"))
    if peak:
        whole = report.get("whole_sequence_peak_bytes_predicted")
        cards.append(
            ("peak memory", human_bytes(peak), f"whole sequences: about {human_bytes(whole)}" if whole else "")
        )
    chunks = report["chunks"]
    if chunks:
        share = percent(report["recomputed_chunks"] / chunks)
        cards.append(("chunks", f"{chunks:,}", f"{share} recomputed"))
    for name, value, detail in cards:
        yield f"<div><span>{escape(name)}</span><strong>{escape(value)}</strong><small>{escape(detail)}</small></div>"


def _plan(plan: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    """Yield the plan of the run."""
    yield "samples", f"{plan['samples']:,} per epoch; the longest has {plan['longest_sample']:,} tokens"
    yield "tokens", f"{plan['tokens']:,} per epoch, {plan['target_tokens']:,} of them targets"
    yield "steps", f"{plan['steps']:,}; an epoch has {plan['steps_per_epoch']:,}"
    yield "chunks", f"at most {plan['chunk_size']:,} tokens, K = {plan['k']}"
    yield "layout", plan["layout"] if plan["schedule"] is None else f"{plan['layout']}, {plan['schedule']}"


def _as_planned(run: RunRecord) -> Iterable[Sequence[str]]:
    """Yield the planned and the measured figures."""
    report, plan, rows = run.report, run.report["plan"], run.rows
    yield "steps", f"{plan['steps']:,}", f"{_steps(report):,}"
    yield "targets", f"{report['target_tokens_planned']:,}", f"{report['target_tokens_trained']:,}"
    predicted = [row["predicted_seconds"] for row in rows if row.get("predicted_seconds") is not None]
    if predicted and len(predicted) == len(rows):
        of_rows = "" if len(rows) == _steps(report) else f" of {len(rows):,} logged steps"
        measured = sum(row["step_seconds"] for row in rows)
        yield f"time{of_rows}", human_seconds(sum(predicted)), human_seconds(measured)
    if plan["predicted_memory_bytes"] is not None and rows:
        peak = human_bytes(max(row["peak_memory_bytes"] for row in rows))
        whole = " of the process" if _of_what(run) else ""
        yield "memory", f"{human_bytes(plan['predicted_memory_bytes'])} of tensors", peak + whole


def _steps(report: Mapping[str, Any]) -> int:
    """Return the steps that were done: report.json calls them `steps`, and the progress of a run `step`."""
    return int(report["step" if "step" in report else "steps"])


def _accounting(report: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    """Yield what became of every row that was read."""
    names = {
        "rows_read": "rows read", "samples_read": "samples read", "samples_rejected": "rejected",
        "samples_dropped": "dropped", "samples_truncated": "truncated", "samples_duplicate": "duplicates",
        "samples_beyond_limit": "beyond the limit of their source", "samples_held_out": "held out",
        "samples_to_train": "to train on", "samples_trained": "trained on, in all epochs",
        "target_tokens_planned": "targets planned", "target_tokens_trained": "targets trained on",
    }  # fmt: skip
    for name, shown in names.items():
        if name in report:
            yield shown, f"{report[name]:,}"


def _table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    body = "".join(
        "<tr>"
        + "".join(f"<{tag}>{escape(text)}</{tag}>" for tag, text in zip(("th", "td", "td"), row, strict=False))
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in head)}</tr></thead>" if head else ""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<div>{heading}<table>{top}<tbody>{body}</tbody></table></div>"

"""report.html: it draws the numbers of metrics.jsonl, needs nothing but a browser, and takes no text for markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chunkflow_cli.training.report.charts import MOST_POINTS, Chart, Series, draw, nice_ticks, thinned
from chunkflow_cli.training.report.page import RunRecord, charts_of, is_bucket, page

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COUNTS = {"samples_read": 9, "samples_rejected": 1, "samples_held_out": 2, "samples_to_train": 6, "samples_trained": 6}
PLAN = {
    "steps": 4, "steps_per_epoch": 4, "samples": 6, "tokens": 600, "target_tokens": 500, "longest_sample": 300,
    "chunk_size": 64, "k": 1, "layout": "one process", "schedule": None, "cost_model": "profile of H100",
    "predicted_memory_bytes": 2**31,
}  # fmt: skip


def record(*, steps: int = 4, evil: str = EVIL, outcome: str = "finished", **more: Any) -> RunRecord:
    rows = [
        {"step": step, "loss": 4.0 / step, "grad_norm": 1.0, "lr": 1e-5, "tokens_per_second": 1000.0 + step, "chunks": 3,
         "recomputed_chunks": 1, "step_seconds": 0.5, "predicted_seconds": 0.25, "peak_memory_bytes": 2**30 + step,
         "fill": 0.75, f"loss/{evil}": 2.0, "loss/chats": 3.0}
        | ({"eval_loss": 5.0 / step, "eval_loss/<1K": 1.5, f"eval_loss/{evil}": 2.5} if step % 2 == 0 else {})
        for step in range(1, steps + 1)
    ]  # fmt: skip
    report = {
        **COUNTS, "steps": steps, "loss_first": 4.0, "loss_last": 4.0 / steps, "eval_loss_start": 6.0,
        "eval_loss_end": 5.0 / steps, "eval_parts_start": {"<1K": 1.75}, "train_seconds": 2.0, "tokens_trained": 600, "chunks": 12, "recomputed_chunks": 4,
        "target_tokens_planned": 500, "target_tokens_trained": 500, "plan": PLAN, "environment": {"device": evil},
    }  # fmt: skip
    keys = {"data.path": evil, "optim.lr": 1e-5}
    return RunRecord(f"runs/{evil}", outcome, rows, report | more, keys, keys)


class Read(HTMLParser):
    """What a browser makes of a page: its elements, texts and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.texts).append(data)


def test_the_charts_hold_the_numbers_of_the_rows_and_texts_stay_texts() -> None:
    run = record(outcome=f"failed after step 4 of 9: {EVIL}")
    html = Read(page(run))
    titles = [chart.title for chart in charts_of(run)]
    assert titles == [
        "Loss", "Training loss by source", "Held-out loss by length", "Held-out loss by source", "Learning rate",
        "Gradient norm", "Speed", "Seconds per step", "Memory", "Chunks per step", "How full the chunks are",
    ]  # fmt: skip
    *charts, script = html.scripts
    assert "pointermove" in script
    data = [json.loads(text) for text in charts]
    assert len(data) == len(titles)
    assert data[0] == {
        "first": 0, "last": 4, "series": [
            {"name": "training loss", "steps": [1, 2, 3, 4], "values": ["4", "2", "1.333", "1"]},
            {"name": "held-out loss", "steps": [0, 2, 4], "values": ["6", "2.5", "1.25"]},
        ],
    }  # fmt: skip
    assert [each["name"] for each in data[1]["series"]] == [EVIL, "chats"]
    assert data[2]["series"] == [{"name": "<1K", "steps": [0, 2, 4], "values": ["1.75", "1.5", "1.5"]}]
    assert data[8]["series"][0]["values"][0] == "1 GiB"
    tags = {tag for tag, _ in html.elements}
    assert "img" not in tags
    assert sum(tag == "script" for tag, _ in html.elements) == len(titles) + 1
    assert sum(EVIL in text for text in html.texts) >= 6, "name, outcome, sources, key and environment"
    assert not {name for _, attributes in html.elements for name in attributes} & {"src", "href", "onerror"}
    assert not re.search(r"@import|url\(|https?:", re.sub(r"<svg[^>]*>", "", page(record(evil="plain"))))


def test_curves_are_where_the_values_are() -> None:
    """At the corners of the square: the first step and lowest tick, the last step and highest tick."""
    html = draw(Chart("T", [Series("a", [10, 20, 30], [0.0, 2.0, 4.0])]))
    assert 'd="M0.0 1000.0L500.0 500.0L1000.0 0.0"' in html
    assert re.findall(r"<span style=\"top:([\d.]+)%\">([^<]+)", html) == [
        ("100.00", "0"), ("75.00", "1"), ("50.00", "2"), ("25.00", "3"), ("0.00", "4"),
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1e-12, 3e-6, 0.07, 1.0, 41.0, 9.9e11])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.93, 1.0), (5.0, 5.000001)])
def test_ticks_are_few_and_span_the_range(low: float, high: float, scale: float) -> None:
    ticks = nice_ticks(low * scale, high * scale)
    assert 3 <= len(ticks) <= 7
    slack = 1e-6 * (high - low) * scale
    assert ticks[0] <= low * scale + slack
    assert ticks[-1] >= high * scale - slack


@pytest.mark.parametrize("values", [[0.0], [3.0], [0.0, 0.0], [-2.0, -2.0], [1e-300, 2e-300]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_curve_without_a_range_is_drawn_too(values: list[float], from_zero: bool) -> None:
    html = draw(Chart("T", [Series("a", range(1, len(values) + 1), values)], from_zero=from_zero))
    assert "nan" not in html
    assert "inf" not in html


def test_long_curves_are_means_that_say_so() -> None:
    series = thinned(Series("loss", range(1, 1202), [float(step % 3) for step in range(1, 1202)]))
    assert len(series.steps) <= MOST_POINTS
    assert series.name == "loss (means of 3 rows)"
    assert (series.steps[0], series.steps[-1]) == (3, 1201)
    assert series.values[:2] == [1.0, 1.0]
    assert series.values[-1] == 1.0  # the last group has one row, 1201 % 3


def test_buckets_are_told_from_sources() -> None:
    assert all(map(is_bucket, ["<1K", "1K-4K", ">=16K", "≥16K", "4096-8191", "16K+", "<512"]))
    assert not any(map(is_bucket, ["chats", "2024 papers", "code", "K-pop", "v1.5-chat"]))


def test_a_run_without_a_step_has_a_page() -> None:
    progress = {"step": 0, "loss_first": None, "loss_last": None, "eval_loss_start": None, "eval_loss_end": None,
                "samples_trained": 0, "target_tokens_planned": 0, "target_tokens_trained": 0, "tokens_trained": 0,
                "chunks": 0, "recomputed_chunks": 0, "train_seconds": 0.0}  # fmt: skip
    report = {**COUNTS, **progress, "plan": {**PLAN, "predicted_memory_bytes": None}, "environment": {}}
    text = page(RunRecord("run", "stopped after step 0 of 4", [], report, {}, {"data.path": None}))
    assert "There are no rows of metrics" in text
    assert "<th>data.path</th><td>null</td>" in text


PROBE = """<script>
  const errors = [];
  addEventListener("error", (event) => errors.push(event.message));
  addEventListener("load", () => {
    const tips = [...document.querySelectorAll(".plot")].map((plot) => {
      const box = plot.getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 1, clientY: box.top + 9 }));
      return plot.querySelector(".tip").innerText.replaceAll("\\n", " ");
    });
    const drawn = [...document.querySelectorAll(".line")].map((line) => line.getBoundingClientRect().width);
    const small = [...document.querySelectorAll("body *")].filter((each) => parseFloat(getComputedStyle(each).fontSize) < 12);
    const said = { errors, tips, drawn, small: small.length, width: innerWidth, content: document.documentElement.scrollWidth };
    parent.postMessage(JSON.stringify(said), "*");
  });
</script>"""
FRAME = """<!doctype html><iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe><script>
  addEventListener("message", (event) => {{ document.body.innerText = "FOUND" + event.data + "END"; }});
</script>"""
"""A window of Chromium has at least 500 pixels; a frame may have fewer."""


@pytest.mark.processes
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_real_browser_shows_it(width: int, tmp_path: Path) -> None:
    """No script fails, every curve has a width, the pointer is answered, and nothing is wider than the window."""
    name = "a-long-name-of-a-run-" * 4
    text = page(record(evil=EVIL, outcome=f"failed: {name}"))
    (tmp_path / "page.html").write_text(text.replace("<head>", "<head>" + PROBE, 1))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shown = subprocess.run(
        [*command, "--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"FOUND(\{.*\})END", shown)
    assert found is not None, shown[-2000:]
    said = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert said["errors"] == []
    assert said["small"] == 0
    assert said["content"] <= said["width"] == width
    assert len(said["tips"]) == 11
    assert said["tips"][0] == "step 4 training loss 1 held-out loss 1.25"
    assert EVIL in said["tips"][1]
    assert min(said["drawn"]) > 100

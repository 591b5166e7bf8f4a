"""Records of benchmarks: one JSON file a run, and the table and the plot that are drawn from it.

A record holds raw readings and nothing derived, so a table printed later says the same as the one printed by the run:

    {"benchmark": "step", "environment": {...}, "settings": {...},
     "rows": [{"name": "ddp", "note": "", "metrics": {"tokens_per_s": [reading, ...], "peak_rss_bytes": [...]}}, ...],
     "checks": [{"name": "zero3 / ddp, tokens_per_s", "values": [one a round, ...], "at_least": 0.85}, ...]}

A metric's name ends in its unit: `_per_s`, `_s`, `_bytes`, `_share` (0 to 1), `_numel` (a count of elements). Readings
are shown as median and range.

    python -m megalith.bench.report RECORD.json --plot OUT.png
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
from pathlib import Path

import psutil
import torch

VERSIONED = ("torch", "triton", "transformers", "numpy")


def environment(device: str) -> dict:
    """What a reading depends on: machine, versions, date (UTC)."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONED},
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def render(record: dict) -> str:
    """The whole record as text: environment, settings, one line a row, one line a check."""
    facts = [f"{label(key)}: {number(key, value)}" for key, value in record["environment"].items()]
    settings = [f"{key}: {value}" for key, value in record["settings"].items()]
    parts = [f"{record['benchmark']} | " + " | ".join(facts), " | ".join(settings), rows_table(record["rows"])]
    if record["checks"]:
        parts.append(checks_table(record["checks"]))
    return "\n\n".join(parts)


def rows_table(rows: list[dict]) -> str:
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    lines = [
        [row["name"], *(spread(m, row["metrics"][m]) if m in row["metrics"] else "-" for m in metrics), row["note"]]
        for row in rows
    ]
    return table(["", *(label(m) for m in metrics), "note"], lines)


def checks_table(checks: list[dict]) -> str:
    lines = [
        [check["name"], spread("", check["values"]), bound(check), "pass" if passes(check) else "MISS"]
        for check in checks
    ]
    return table(["ratio", "median (range)", "bar", ""], lines)


def passes(check: dict) -> bool:
    median = statistics.median(check["values"])
    return median >= check.get("at_least", median) and median <= check.get("at_most", median)


def bound(check: dict) -> str:
    return f">= {check['at_least']:g}" if "at_least" in check else f"<= {check['at_most']:g}"


def table(headers: list[str], lines: list[list[str]]) -> str:
    """Columns padded to their widest cell, in Markdown's form so that it can be pasted."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *lines, strict=True)]
    rows = [headers, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def label(metric: str) -> str:
    """`tokens_per_s` -> `tokens/s`, `peak_rss_bytes` -> `peak rss [MiB]`."""
    stem, _, unit = unit_of(metric)
    return stem.replace("_per_", "/").replace("_", " ") + unit


def spread(metric: str, values: list[float]) -> str:
    """`median (lowest-highest)`, or the one value where all are the same."""
    median, low, high = (number(metric, value) for value in (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low}-{high})"


def number(metric: str, value) -> str:
    """A value in the unit that `label` shows; what is no number stays as it is."""
    if not isinstance(value, (int, float)):
        return str(value)
    value = value / unit_of(metric)[1]
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def unit_of(metric: str) -> tuple[str, float, str]:
    """The name without its unit, what to divide readings by, and the unit as shown."""
    for suffix, scale, unit in (("_bytes", 2**20, " [MiB]"), ("_share", 0.01, " [%]"), ("_numel", 10**6, " [million]")):
        if metric.endswith(suffix):
            return metric.removesuffix(suffix), scale, unit
    return metric, 1.0, ""


def save(record: dict, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def plot(record: dict, path: str | Path, metrics: list[str]) -> None:
    """One panel a metric, one bar a row that has it: the median, with the range as a whisker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(metrics), figsize=(6 * len(metrics), 4.5), squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        rows = [row for row in record["rows"] if metric in row["metrics"]]
        scale = unit_of(metric)[1]
        for row in rows:
            values = [value / scale for value in row["metrics"][metric]]
            median = statistics.median(values)
            whisker = [[median - min(values)], [max(values) - median]]
            color = "tab:orange" if row["name"].startswith("megalith") else "tab:blue"
            panel.bar(row["name"], median, yerr=whisker, capsize=3, color=color)
        panel.set_title(label(metric))
        panel.tick_params(axis="x", rotation=60)
    facts = record["environment"]
    figure.suptitle(
        f"{record['benchmark']}: {facts['device']}, {facts['cpu']}, torch {facts['torch']}, {facts['date']}"
    )
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print, and plot, a record of a benchmark.")
    parser.add_argument("record", type=Path)
    parser.add_argument("--plot", type=Path, help="a .png")
    parser.add_argument("--metrics", nargs="+", help="those to plot; all by default")
    args = parser.parse_args(argv)
    record = json.loads(args.record.read_text())
    print(render(record))
    if args.plot:
        names = list(dict.fromkeys(metric for row in record["rows"] for metric in row["metrics"]))
        plot(record, args.plot, args.metrics or names)


if __name__ == "__main__":
    main()

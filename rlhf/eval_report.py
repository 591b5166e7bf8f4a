"""An evaluation as a table in the terminal, and as one HTML page that needs no other file."""

import html
import textwrap

_ROWS = (
    ("reward", "mean reward", "{:.3f}"),
    ("kl", "KL from the baseline, nats an answer", "{:.3f}"),
    ("length", "tokens an answer", "{:.1f}"),
    ("truncated", "answers cut off", "{:.1%}"),
)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>megalith eval</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100%; margin-bottom: 2rem; table-layout: fixed }}
th, td {{ border: 1px solid #ccc; padding: .5rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }}
td.text {{ white-space: pre-wrap }} td.win {{ background: #e6f4e6 }} small {{ color: #666 }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #181818; color: #ddd }} th, td {{ border-color: #444 }} td.win {{ background: #1f3a1f }}
}}
</style>
<h1>Evaluation over {prompts} prompts</h1>
<p>Win rate of the model: <b>{win_rate}</b></p>
<table><tr><th></th><th>model</th><th>baseline</th></tr>
{numbers}</table>
<table><tr><th>prompt</th><th>model</th><th>baseline</th></tr>
{samples}</table>
"""


def _with_error(report, name):
    return f"{report[name]:.1%} ± {report[f'{name}_error']:.1%}"


def _number_rows(report):
    """(label, text of the model, text of the baseline) of every number; errors are standard errors."""
    for name, label, pattern in _ROWS:
        texts = []
        for side in ("model", "baseline"):
            error = report[side].get(f"{name}_error")
            texts.append(pattern.format(report[side][name]) + (f" ± {pattern.format(error)}" if error else ""))
        yield label, *texts


def text_table(report, samples, width=36, lines=6):
    """The numbers, and the answers in columns of `width` characters and at most `lines` lines."""
    parts = [f"{'':<40}{'model':>20}{'baseline':>20}"]
    parts += [f"{label:<40}{model:>20}{baseline:>20}" for label, model, baseline in _number_rows(report)]
    parts += [f"{'win rate against the baseline':<40}{_with_error(report, 'win_rate'):>20}", ""]
    parts.append(f"{'prompt':<{width}}  {'model':<{width}}  {'baseline':<{width}}")
    for sample in samples:
        columns = [_cell(sample["prompt"], None, width, lines)]
        columns += [_cell(sample[s]["answer"], sample[s]["score"], width, lines) for s in ("model", "baseline")]
        parts.append("-" * (3 * width + 4))
        for row in range(max(map(len, columns))):
            cells = [column[row] if row < len(column) else "" for column in columns]
            parts.append("  ".join(f"{cell:<{width}}" for cell in cells).rstrip())
    return "\n".join(parts)


def _cell(text, score, width, lines):
    printable = "".join(character if character.isprintable() else " " for character in text)
    wrapped = textwrap.wrap(printable, width) or ["(empty)"]
    if len(wrapped) > lines:
        wrapped = [*wrapped[:lines], "…"]
    return wrapped if score is None else [f"[{score:.3f}]", *wrapped]


def html_page(report, samples):
    numbers = "".join(
        f"<tr><th>{label}</th><td>{model}</td><td>{baseline}</td></tr>\n"
        for label, model, baseline in _number_rows(report)
    )
    rows = []
    for sample in samples:
        cells = [f'<td class="text">{html.escape(sample["prompt"])}</td>']
        for side, other in (("model", "baseline"), ("baseline", "model")):
            given = sample[side]
            win = " win" if given["score"] > sample[other]["score"] else ""
            small = f"<small>reward {given['score']:.3f}, KL {given['kl']:.3f}</small>"
            cells.append(f'<td class="text{win}">{html.escape(given["answer"])}<br>{small}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    return _PAGE.format(
        prompts=report["prompts"], win_rate=_with_error(report, "win_rate"), numbers=numbers, samples="".join(rows)
    )

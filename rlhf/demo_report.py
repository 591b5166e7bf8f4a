"""What the demo ends with: a table of the stages, dialogues, and a plot of the curves."""

import json
from collections import Counter

from .demo_data import LANGUAGES, TASKS
from .eval import mean_and_error

STAGES = ("random", "pretrained", "SFT", "PPO")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sampled(folder):
    """{stage: its answers to the held-out problems, each {"answer", "score", "kl"}}, as the evaluations wrote them.
    SFT is every evaluation's baseline."""
    found = {name: read_jsonl(folder / "eval" / name / "samples.jsonl") for name in STAGES if name != "SFT"}
    answers = {name: [row["model"] for row in rows] for name, rows in found.items()}
    return answers | {"SFT": [row["baseline"] for row in found["PPO"]]}


def right(rows, answers):
    return [float(answer.strip() == row["output"]) for row, answer in zip(rows, answers, strict=True)]


def with_error(values, pattern):
    mean, error = mean_and_error(values)
    return f"{pattern.format(mean)} ± {pattern.format(error)}"


def stage_table(rows, greedy, answers):
    """One line a stage. `rows`: the held-out problems; `greedy` {stage: texts}; `answers` as `sampled` gives them."""
    lines = [f"{'after':<12}{'exact, greedy':>18}{'exact, sampled':>18}{'reward':>18}{'KL from SFT':>18}"]
    for name in STAGES:
        columns = [
            with_error(right(rows, greedy[name]), "{:.1%}"),
            with_error(right(rows, [answer["answer"] for answer in answers[name]]), "{:.1%}"),
            with_error([answer["score"] for answer in answers[name]], "{:.3f}"),
            with_error([answer["kl"] for answer in answers[name]], "{:.3f}"),
        ]
        lines.append(f"{name:<12}" + "".join(f"{column:>18}" for column in columns))
    return "\n".join(lines)


def task_table(rows, greedy):
    """Share of the held-out problems of every kind that are answered exactly, greedily."""
    lines = [f"{'exact, greedy':<20}" + "".join(f"{name:>12}" for name in STAGES)]
    total = Counter((row["task"], row["language"]) for row in rows)
    for task in TASKS:
        for language in LANGUAGES:
            shares = []
            for name in STAGES:
                points = right(rows, greedy[name])
                hits = sum(
                    p for p, row in zip(points, rows, strict=True) if (row["task"], row["language"]) == (task, language)
                )
                shares.append(f"{hits / max(total[task, language], 1):>12.1%}")
            lines.append(f"{task + ' ' + language:<20}" + "".join(shares))
    return "\n".join(lines)


def dialogues(rows, greedy, count=3):
    """Problems of different tasks, those first where SFT and PPO differ."""
    order = sorted(range(len(rows)), key=lambda index: greedy["SFT"][index] == greedy["PPO"][index])
    seen, lines = set(), []
    for index in order:
        row = rows[index]
        if row["task"] in seen or len(seen) == count:
            continue
        seen.add(row["task"])
        lines.append(f"  user: {row['instruction']}")
        for name in ("SFT", "PPO"):
            answer = greedy[name][index]
            verdict = "right" if answer == row["output"] else f"wrong: {row['output']}"
            lines.append(f"    {name}: {answer}  ({verdict})")
    return "\n".join(lines)


def print_report(folder, rows, greedy):
    answers = sampled(folder)
    print("\nDialogues (greedy answers; problems first on which SFT and PPO differ)")
    print(dialogues(rows, greedy))
    print(f"\n{task_table(rows, greedy)}")
    print(f"\n{len(rows)} held-out problems, mean ± standard error; reward, KL (nats an answer) and 'sampled' at")
    print("temperature 1, judged by the reward model, which has never seen the problems nor their solutions:")
    print(stage_table(rows, greedy, answers))
    accuracy = [row["eval_accuracy"] for row in read_jsonl(folder / "rm" / "metrics.jsonl") if "eval_accuracy" in row]
    print(
        f"\nReward model: {accuracy[0]:.1%} of the held-out pairs in the right order before, {accuracy[-1]:.1%} after."
    )
    gains = [ppo["score"] - sft["score"] for ppo, sft in zip(answers["PPO"], answers["SFT"], strict=True)]
    gain, error = mean_and_error(gains)
    print(
        f"PPO raises the held-out reward by {gain:.3f} ± {error:.3f} ({gain / max(error, 1e-9):.1f} standard errors) "
        f"at a KL of {mean_and_error([answer['kl'] for answer in answers['PPO']])[0]:.3f} nats an answer."
    )


def write_curves(folder, path):
    """Plot metrics.jsonl of every stage: losses, the reward model's accuracy, PPO's score and KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("pretraining", "pretrained", {"loss": "loss, nats a token"}),
        ("supervised fine-tuning", "sft", {"loss": "loss", "eval_loss": "held-out loss"}),
        ("reward model", "rm", {"accuracy": "pairs in order", "eval_accuracy": "held-out pairs in order"}),
        ("PPO: score", "ppo", {"objective/scores": "mean score"}),
        ("PPO: KL from SFT", "ppo", {"objective/kl": "nats an answer"}),
        ("PPO: pretraining loss (PTX)", "ppo", {"loss/ptx": "nats a token"}),
    )
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    for axis, (title, stage, curves) in zip(axes.flat, panels, strict=True):
        rows = read_jsonl(folder / stage / "metrics.jsonl")
        for name, label in curves.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), marker=".", label=label)
        axis.set(title=title, xlabel="iteration" if stage == "ppo" else "step")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""Over-optimisation: what a policy gains by the reward model that pays it, and by the true reward, while it strays.

Gao et al., "Scaling Laws for Reward Model Overoptimization" (2023): against √KL from the start, the score of the reward
model goes on rising where the true reward has turned. The doctor's pipeline knows both; `megalith doctor` leaves the
curve of two runs as a table, `over_optimisation.json` and `over_optimisation.png`: one at the price of KL that is
checked, and one where KL costs next to nothing.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from .eval import mean_and_error

NAME = "over_optimisation"
TABLE_ROWS = 6  # of each run


@dataclass(frozen=True)
class Point:
    """The rollout of one iteration: means over its answers and their standard errors, rewards in the true one's unit.

    The preferences that a reward model learns from tell differences alone, so `proxy` is moved to `gold` at the first
    iteration.
    """

    iteration: int
    sqrt_kl: float  # √nats an answer
    gold: float
    gold_error: float
    proxy: float
    proxy_error: float
    truncated: float  # share of the answers


def read_curve(path, gold_of, proxy_of):
    """[Point] of a run's samples.jsonl, which holds whole rollouts. `gold_of(row)`, `proxy_of(row)`: of an answer."""
    rollouts = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rollouts.setdefault(row["step"], []).append(row)
    points, shift = [], None
    for step, rows in sorted(rollouts.items()):
        gold, gold_error = mean_and_error([gold_of(row) for row in rows])
        proxy, proxy_error = mean_and_error([proxy_of(row) for row in rows])
        shift = gold - proxy if shift is None else shift
        kl = mean_and_error([row["kl"] for row in rows])[0]  # of samples: may fall below 0 by chance
        truncated = mean_and_error([float(row["truncated"]) for row in rows])[0]
        points.append(Point(step, math.sqrt(max(kl, 0.0)), gold, gold_error, proxy + shift, proxy_error, truncated))
    return points


def leave(curves, folder):
    """Write what is told above into `folder`; returns the table. `curves`: of each seed, {price of KL: [Point]}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{str(price): [asdict(point) for point in run] for price, run in of_seed.items()} for of_seed in curves]
    record = {"unit": "rewards in nats of preference, KL in nats an answer", "seeds": runs}
    (folder / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(curves, folder / f"{NAME}.png")
    return _table(curves)


def _table(curves):
    """Means over the seeds of some iterations; the last line of a run tells where the true reward was best."""
    heads = ("price of KL", "iteration", "√KL", "true reward", "reward model's", "difference")
    lines = ["".join(f"{head:>16}" for head in heads)]
    for price in curves[0]:
        runs = [of_seed[price] for of_seed in curves]
        means = [tuple(_mean(at, name) for name in ("sqrt_kl", "gold", "proxy")) for at in zip(*runs, strict=True)]
        last = len(means) - 1
        shown = sorted({round(index * last / (TABLE_ROWS - 1)) for index in range(TABLE_ROWS)})
        for index in shown:
            root, gold, proxy = means[index]
            numbers = "".join(f"{value:>16.3f}" for value in (root, gold, proxy, proxy - gold))
            lines.append(f"{price:>16g}{runs[0][index].iteration:>16}{numbers}")
        best = max(range(len(means)), key=lambda index: means[index][1])
        lines.append(f"{'':>16}best true reward {means[best][1]:.3f} at √KL {means[best][0]:.3f}")
    return "\n".join(lines)


def _mean(points, name):
    return mean_and_error([getattr(point, name) for point in points])[0]


def _plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves[0]), figsize=(6 * len(curves[0]), 5), sharey=True, squeeze=False)
    for axis, price in zip(axes[0], curves[0], strict=True):
        for seed, of_seed in enumerate(curves):
            roots = [point.sqrt_kl for point in of_seed[price]]
            for name, style, label in (("gold", "-", "true reward"), ("proxy", "--", "reward model's")):
                values = [getattr(point, name) for point in of_seed[price]]
                errors = [getattr(point, f"{name}_error") for point in of_seed[price]]
                given = {"color": f"C{seed}", "linestyle": style, "label": f"{label}, run {seed + 1}"}
                axis.errorbar(roots, values, errors, **given, linewidth=1, elinewidth=0.5)
        axis.set(title=f"price of KL {price:g}", xlabel="√KL from the start, √nats an answer", ylabel="reward")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""The picture of a run: four panels over optimizer steps."""

from __future__ import annotations

from pathlib import Path


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """Draws accuracy, hard samples, entropy with completion length, and learning rate with gradient norm.

    Without matplotlib, which a source tree may lack, one line says so: a run must not fail at its last step.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path.name} was not drawn: `pip install matplotlib` brings what draws it.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    probes = [r for r in records if r["event"] == "probe"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    accuracy, hard, text, optimizer = axes.flat

    def line(axis, of: list[dict], key: str, label: str, **style):
        points = [(r["step"], r[key]) for r in of if r.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    smooth = _moving_average([r["accuracy"] for r in steps], 10)
    accuracy.plot([r["step"] for r in steps], [r["accuracy"] for r in steps], color="C0", alpha=0.25, linewidth=0.8)
    accuracy.plot([r["step"] for r in steps], smooth, color="C0", label="rollouts (mean of 10 steps)")
    line(accuracy, evals, "accuracy", "held-out, greedy", color="C1", marker="o")
    accuracy.set(title="accuracy", ylim=(0, 1))
    line(hard, probes, "hard", "hard rows (0 solved rollouts)", color="C3", marker="o")
    line(hard, probes, "replaced", "shown with demonstrations", color="C4", marker="s", linestyle="--")
    hard.set(title="hard samples, of the training rows", ylim=(0, None))
    line(text, steps, "entropy", "entropy (nats per token)", color="C2")
    text.set(title="entropy and completion length")
    length = text.twinx()
    line(length, steps, "completion_length", "completion length (tokens, right)", color="C5", alpha=0.6)
    line(optimizer, steps, "grad_norm", "gradient norm, before clipping", color="C6", alpha=0.6)
    optimizer.set(title="gradient norm and learning rate")
    rate = optimizer.twinx()
    line(rate, steps, "learning_rate", "learning rate (right)", color="C7")
    for axis in (text, length, optimizer, rate):  # room for the legend above the lines
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    for axis in (accuracy, hard, text, optimizer):
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    for left, right in ((accuracy, None), (hard, None), (text, length), (optimizer, rate)):
        handles = [
            pair for axis in (left, right) if axis for pair in zip(*axis.get_legend_handles_labels(), strict=True)
        ]
        if handles:
            where = "upper right" if right else "best"
            (right or left).legend(*zip(*handles, strict=True), fontsize=8, loc=where)
    figure.suptitle(title)
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, dpi=110, format="png")
    plt.close(figure)
    beside.replace(path)


def _moving_average(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]

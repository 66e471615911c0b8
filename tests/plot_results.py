"""The figures of README, from the committed numbers in `tests/results/`.

    python tests/plot_results.py

A figure whose numbers are not there yet is named, with the command that makes them. Where
`tests/reproduce.py` has trained an agent here, its videos become an animated image.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
# In the order of the first paper's table, with its success rates (ViT-bigG-14).
PAPER = {
    "kneeling": 100, "lotus": 100, "standing": 100, "arms_raised": 100, "splits": 100,
    "hands_on_hips": 64, "arms_crossed": 0, "one_leg": 0,
}  # fmt: skip
LOOKS = ("default", "plain", "track")  # of the humanoid in the frames
FAMILIES = {"find": "tab:blue", "lift": "tab:orange", "place": "tab:green"}


@dataclass
class Args:
    results: Path = HERE / "results"
    """where the JSON files are, and the figures go"""
    runs: Path = HERE.parent / "runs" / "reproduce"
    """where agents were trained"""


def over_seeds(axis, runs: list[dict], name: str, scale: float = 1, minutes: bool = False, **style):
    """Mean over the runs of a logged value, and the band from the lowest to the highest."""
    steps = np.array(runs[0]["curve"]["step"])
    values = scale * np.array([run["curve"][name] for run in runs])  # [seeds, evaluations]
    x = steps / 1000
    if minutes:
        x = np.mean([run["minutes"] for run in runs]) * steps / steps[-1]
    (line,) = axis.plot(x, values.mean(0), **style)
    if len(runs) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, lw=0)


def both_axes(figure_axes, name: str, runs: list[dict], value: str, scale: float = 1, **style):
    for axis, minutes in zip(figure_axes, (False, True), strict=True):
        over_seeds(axis, runs, value, scale, minutes, **style)
        axis.set_xlabel("minutes" if minutes else "thousand env steps")
        axis.grid(alpha=0.3)
    figure_axes[0].set_ylabel(name)


def title(runs: list[dict], what: str) -> str:
    return f"{what}, {len(runs)} seed" + ("s: mean, lowest to highest" if len(runs) > 1 else "")


def kneeling(load: Callable[[str], dict]) -> plt.Figure:
    """What CLIP pays and what the predicate sees, over env steps and over time."""
    runs, without = load("kneeling")["runs"], load("no_layer_norm")["runs"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex="col", sharey="row")
    label = f"--no-layer-norm, seeds: {len(without)}"
    plain = {"color": "lightgray", "zorder": 1, "label": label}
    for experiment, style in ((without, plain), (runs, {"label": "default"})):
        green, purple = ({"color": f"tab:{name}"} | style for name in ("green", "purple"))
        both_axes(axes[0], "success rate / %", experiment, "success_rate", 100, **green)
        both_axes(axes[1], "CLIP return", experiment, "clip_return", **purple)
    for axis in axes[:, 1]:
        axis.legend(loc="lower right")
    figure.suptitle(title(runs, "Kneeling, from its sentence"))
    return figure


def pose_bars(groups: dict[str, list[list[float]]], first: str) -> plt.Figure:
    """For each label the success rates in % of each pose's seeds: their mean, and dots; the bars of
    the `first` label are gray."""
    figure, axis = plt.subplots(figsize=(9, 3.5))
    x, width = np.arange(len(PAPER)), 0.8 / len(groups)
    for i, (label, rates) in enumerate(groups.items()):
        color = "lightgray" if label == first else f"C{i - 1}"
        at = x + (i - (len(groups) - 1) / 2) * width
        axis.bar(at, [np.mean(each) for each in rates], 0.95 * width, color=color, label=label)
        for position, each in zip(at, rates, strict=True):
            if len(each) > 1:
                axis.plot([position] * len(each), each, "k.", ms=4)
    axis.set_xticks(x, [task.replace("_", "\n") for task in PAPER])
    axis.set_ylabel("success rate / %")
    axis.legend()
    return figure


def best_of_own(load: Callable[[str], dict]) -> list[list[float]]:
    """Success in % of the best checkpoint of each seed, for the agents of each pose alone."""
    return [
        [100 * run["report"]["best"]["success_rate"] for run in load(task)["runs"]]
        for task in PAPER
    ]


def poses(load: Callable[[str], dict]) -> plt.Figure:
    """Success of the best checkpoint in each pose, beside the paper's."""
    paper = "paper (ViT-bigG-14)"
    groups = {paper: [[rate] for rate in PAPER.values()], "ours (tiny CLIP)": best_of_own(load)}
    return pose_bars(groups, paper)


def all_tasks(load: Callable[[str], dict]) -> plt.Figure:
    """One agent for eight sentences, beside eight that have one each."""
    own = "eight agents, best"
    groups = {own: best_of_own(load)}
    for agent in ("best", "last"):
        groups[f"--task all, {agent}"] = [
            [
                100 * run["report"][agent][f"success_rate_{task}"]
                for run in load("all_tasks")["runs"]
            ]
            for task in PAPER
        ]
    return pose_bars(groups, own)


def learning(load: Callable[[str], dict]) -> plt.Figure:
    """In each pose what CLIP pays and what the predicate sees: apart where CLIP is exploited."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5), sharex=True, sharey=True)
    for axis, task in zip(axes.flat, PAPER, strict=True):
        runs, other = load(task)["runs"], axis.twinx()
        over_seeds(axis, runs, "success_rate", 100, color="tab:green")
        over_seeds(other, runs, "clip_return", color="tab:purple")
        axis.set(title=task.replace("_", " "), ylim=(-3, 103))
        other.set_ylim(-20, 50)
        if axis in axes[:, -1]:
            other.set_ylabel("CLIP return", color="tab:purple")
        else:
            other.tick_params(labelright=False)
        axis.grid(alpha=0.3)
    figure.supxlabel("thousand env steps", fontsize="medium")
    figure.supylabel("success rate / %", color="tab:green", fontsize="medium")
    return figure


def playhouse(load: Callable[[str], dict]) -> plt.Figure:
    """Of each family's goals, in unseen homes: where the toy is, and what CLIP says of it; and what
    relabelling half of the samples changes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    runs, relabelled = load("playhouse")["runs"], load("playhouse_relabel")["runs"]
    for axis, judge in zip(axes, ("success_rate", "clip_success"), strict=True):
        for family, color in FAMILIES.items():
            over_seeds(axis, runs, f"{judge}_{family}", 100, color=color, label=family)
        axis.set_xlabel("thousand env steps")
        axis.grid(alpha=0.3)
    for family, color in FAMILIES.items():
        over_seeds(axes[0], relabelled, f"success_rate_{family}", 100, color=color, ls=":")
    axes[0].plot([], [], ":", color="black", label="half relabelled")
    axes[0].set(title="by the simulator's state", ylabel="success rate / %")
    axes[1].set(title="by CLIP")
    axes[0].legend(loc="lower right")
    figure.suptitle(title(runs, "The playhouse, from CLIP alone"))
    return figure


def precision_recall(load: Callable[[str], dict]) -> plt.Figure:
    """Of the softmax score over beta, among the goals whose toy is in view for the recall."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, (split, families) in zip(
        axes, load("home_accuracy")["alphas"]["0"].items(), strict=True
    ):
        for family, numbers in families.items():
            points = [p for p in numbers["over_beta"].values() if p["precision"] is not None]
            label = f"{family}, AP in view {numbers['average_precision_in_view']:.2f}"
            recall, precision = ([p[k] for p in points] for k in ("recall_in_view", "precision"))
            axis.plot(recall, precision, "o-", ms=3, color=FAMILIES[family], label=label)
        axis.set(xlabel="recall, of what is in view", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.set_title({"train": "training goals", "heldout": "held-out goals"}[split])
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left")
    axes[0].set_ylabel("precision")
    return figure


def epic(load: Callable[[str], dict]) -> plt.Figure:
    """EPIC distance of the reward from the predicate, per task and alpha; lower is better."""
    result = load("clip_accuracy")
    figure, axis = plt.subplots(figsize=(9, 3.5))
    alphas = list(result["mean"])
    for i, alpha in enumerate(alphas):
        heights = [result["tasks"][task][alpha]["epic"] for task in PAPER]
        heights.append(result["mean"][alpha]["epic"])
        x = np.arange(len(heights)) + 0.8 * (i - (len(alphas) - 1) / 2) / len(alphas)
        color = plt.get_cmap("viridis")(i / len(alphas))
        axis.bar(x, heights, 0.8 / len(alphas), color=color, label=f"alpha = {alpha}")
    names = [*(task.replace("_", "\n") for task in PAPER), "mean"]
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("EPIC distance")
    axis.legend(ncols=len(alphas), loc="upper left", fontsize="small")
    axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    return figure


def scaling(load: Callable[[str], dict]) -> plt.Figure:
    """Does a larger CLIP give a better reward, and a better reward a better agent?"""
    results = {width: load(f"w{width}_on_default") for width in (4, 8, 12, 16)}
    parameters = {width: result["image_parameters"] for width, result in results.items()}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5))
    for axis, measure, name in zip(axes, ("auc", "epic"), ("AUC", "EPIC distance"), strict=False):
        for alpha in results[16]["mean"]:
            y = [result["mean"][alpha][measure] for result in results.values()]
            axis.plot(parameters.values(), y, "o-", ms=3, label=f"alpha = {alpha}")
        axis.set_ylabel(f"{name}, mean of eight tasks")
    axes[0].legend(fontsize="small")
    trained = {width: load(f"kneeling_w{width}")["runs"] for width in (4, 8, 16)}
    for agent in ("best", "last"):
        rates = {
            width: [100 * run["report"][agent]["success_rate"] for run in runs]
            for width, runs in trained.items()
        }
        x = [parameters[width] for width in rates]
        (line,) = axes[2].plot(x, [np.mean(each) for each in rates.values()], "-", label=agent)
        for width, each in rates.items():  # each seed
            axes[2].plot([parameters[width]] * len(each), each, "o", ms=4, color=line.get_color())
    axes[2].set(ylabel="success rate of kneeling / %", ylim=(-3, 103))
    axes[2].legend()
    for axis in axes:
        axis.set(xscale="log", xlabel="parameters of the image tower")
        axis.grid(alpha=0.3)
    return figure


def looks(load: Callable[[str], dict]) -> plt.Figure:
    """AUC of CLIPs trained on one look of the humanoid and tested on another."""
    results = [[load(f"{clip}_on_{look}") for look in LOOKS] for clip in ("w16", *LOOKS[1:])]
    mean = np.array([[result["mean"]["0"]["auc"] for result in row] for row in results])
    figure, axis = plt.subplots(figsize=(4.5, 3.5))
    axis.imshow(mean, vmin=0.5, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(mean):
        color = "black" if value > 0.8 else "white"  # on yellow, or on blue
        axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=color)
    axis.set_xticks(range(3), LOOKS)
    axis.set_yticks(range(3), LOOKS)
    axis.set(xlabel="tested on", ylabel="trained on")
    return figure


def animation(videos: list[Path], path: Path, every: int) -> None:
    """Some frames of a script's videos, side by side at half their size."""
    films = [imageio.mimread(video, memtest=False)[::every] for video in videos]
    frames = [np.concatenate(row, 1)[::2, ::2] for row in zip(*films, strict=True)]
    imageio.mimwrite(path, frames, duration=120, loop=0)  # ms


FIGURES = [kneeling, poses, learning, all_tasks, playhouse, precision_recall, epic, scaling, looks]


def main(args: Args) -> None:
    def load(name: str) -> dict:
        return json.loads((args.results / f"{name}.json").read_text())

    for draw in FIGURES:
        path = args.results / f"{draw.__name__}.png"
        try:
            figure = draw(load)
        except FileNotFoundError as error:
            name = Path(error.filename).stem
            print(f"{path.name}: not drawn; first python tests/reproduce.py {name}")
            continue
        figure.tight_layout()
        figure.savefig(path, dpi=100)
        plt.close(figure)
        print(path)
    # Steps of 0.015 s, at half speed; and of 0.1 s, a little faster than they are.
    for name, every in (*((task, 4) for task in PAPER), ("playhouse", 2)):
        videos = sorted(args.runs.glob(f"{name}/*/runs/*/videos/best*.mp4"))
        if name == "playhouse":  # of one agent, which has one for each family
            videos = [video for video in videos if video.parent == videos[0].parent]
        if videos:
            path = args.results / f"{name}.gif"
            animation(videos, path, every)
            print(path)


if __name__ == "__main__":
    main(tyro.cli(Args))

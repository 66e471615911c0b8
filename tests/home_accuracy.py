"""How good is a CLIP as a success detector in homes that its training never saw?

    python tests/home_accuracy.py                                        # the bundled CLIP
    python tests/home_accuracy.py --clip-model ViT-B-32/laion2b_s34b_b79k --device cuda

Frames come from walks in new homes: half of them random, half by the scripted solver of a random
goal with random actions in between, so that they show successes, near misses and bare walls. For
each family all pairs of a frame and a goal are pooled, and the score of the script's reward is
compared with the simulator's truth: average precision, and precision and recall over beta. A toy
may lie on the bed while the agent looks elsewhere, where no image can tell; so the recall of
`place` is also given among the pairs whose toy is in view.
"""

# ruff: noqa: E402, I001

import json
import multiprocessing
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from dqn_clip_playhouse import (  # first: it tells MuJoCo how to render
    ACTIONS,
    COLUMNS,
    FAMILIES,
    GOALS,
    HELDOUT_GOALS,
    MAX_STEPS,
    TRAIN_GOALS,
    Goal,
    NoRoom,
    PlayhouseEnv,
    evenly,
    family_scores,
    scripted,
)

import numpy as np
import torch
import tyro
from clip_reward import CLIPReward, goal_baseline_reward
from reproduce import digest


@dataclass
class Args:
    clip_model: str = str(HERE / "tiny_clip")
    """a model folder, ARCH/TAG, ARCH/FILE or hf-hub:ID"""
    homes: int = 240
    """one walk in each"""
    seed: int = 54321
    """of homes and walks"""
    temperature: float | None = None
    """of the softmax over the goals of a family; unset, the CLIP's own"""
    baseline: str = "a room"
    """the baseline prompt"""
    output: Path = HERE / "results" / "home_accuracy.json"
    """file for the numbers; the table goes beside it as .md"""
    device: str = "cpu"
    """where CLIP runs"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of CLIP's image tower"""
    workers: int = 2
    """rendering processes"""


ALPHAS = (0.0, 0.25, 0.5)
BETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
EVERY = 3  # steps of a walk between two frames


def walk(job: tuple[int, np.random.SeedSequence]):
    """frames [n, H, W, 3] uint8, what is reached [n, 240], whose toy is in view [n, 240]."""
    size, seed = job
    rng = np.random.default_rng(seed)
    env = PlayhouseEnv("rgb_array", all_goals=True, width=size, height=size)
    goals = TRAIN_GOALS if rng.random() < 0.6 else HELDOUT_GOALS
    env.reset(seed=int(rng.integers(2**31)), options={"goals": evenly(goals)})
    solver = scripted(env, env.goal) if rng.random() < 0.5 else iter(())
    noise, frames, reached, in_view = rng.uniform(0, 0.3), [], [], []
    for step in range(MAX_STEPS):
        action = None
        if rng.random() > noise:
            try:
                action = next(solver, None)
            except NoRoom:  # no way from here
                solver = iter(())
        if action is None:
            action = int(rng.integers(len(ACTIONS)))
        frame, *_, info = env.step(action)
        if step % EVERY == 0:
            frames.append(frame)
            reached.append(info["reached"])
            renderer = env._draw()
            renderer.enable_segmentation_rendering()
            geoms = renderer.render()[..., 0]
            renderer.disable_segmentation_rendering()
            seen = set(env.model.geom_bodyid[geoms[geoms >= 0]].tolist())
            toys = {toy for toy, body in zip(env.toys, env._toy_bodies, strict=True)
                    if body.id in seen}  # fmt: skip
            in_view.append([(goal.colour, goal.kind) in toys for goal in GOALS])
    env.close()
    return np.stack(frames), np.stack(reached), np.array(in_view)


def average_precision(score: np.ndarray, label: np.ndarray) -> float:
    """Mean over the true ones of the precision at their rank."""
    label = label[np.argsort(-score, kind="stable")]
    precision = np.cumsum(label) / np.arange(1, len(label) + 1)
    return float(precision[label].mean())


def measure(score: np.ndarray, reached: np.ndarray, in_view: np.ndarray) -> dict:
    """Of one family's pairs, [M] each."""
    result = {
        "pairs": len(score),
        "true": int(reached.sum()),
        "average_precision": average_precision(score, reached),
        "average_precision_in_view": average_precision(score[in_view], reached[in_view]),
        "over_beta": {},
    }
    for beta in BETAS:
        r = score > beta
        result["over_beta"][f"{beta:g}"] = {
            "precision": float(reached[r].mean()) if r.any() else None,
            "recall": float(r[reached].mean()),
            "recall_in_view": float(r[reached & in_view].mean()),
            "false_positive_rate": float(r[~reached].mean()),
        }
    return result


def verb(goal: Goal) -> str:
    """The goal as a command, instead of the state that a frame shows; in words that our trainer
    does not teach."""
    if goal.family == "place":
        return f"put {goal.prompt}"
    return f"{goal.family} a {goal.colour} {goal.kind}"


def table(result: dict) -> str:
    columns = [*(f"alpha = {a:g}" for a in ALPHAS), "as a verb, alpha = 0"]
    lines = [
        f"# `{result['model']}` as a success detector",
        "",
        f"{result['frames']} frames of {result['homes']} homes; temperature "
        f"{result['temperature']:g}. Average precision, and among the goals whose toy is in view:",
        "",
        "| goals | family | true pairs | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    first = f"{ALPHAS[0]:g}"
    for split, families in result["alphas"][first].items():
        for family, numbers in families.items():
            cells = [result["alphas"][f"{a:g}"][split][family] for a in ALPHAS]
            cells.append(result["verbs"][split][family])
            cells = [
                f"{c['average_precision']:.3f} / {c['average_precision_in_view']:.3f}"
                for c in cells
            ]
            lines.append(f"| {split} | {family} | {numbers['true']} | {' | '.join(cells)} |")
    lines += ["", f"Precision / recall (in view) over beta, at alpha = {first}:", ""]
    lines += ["| goals | family | " + " | ".join(f"{beta:g}" for beta in BETAS) + " |"]
    lines += ["|---" * (len(BETAS) + 2) + "|"]
    for split, families in result["alphas"][first].items():
        for family, numbers in families.items():
            cells = [
                ("-" if c["precision"] is None else f"{c['precision']:.2f}")
                + f" / {c['recall']:.2f} ({c['recall_in_view']:.2f})"
                for c in numbers["over_beta"].values()
            ]
            lines.append(f"| {split} | {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Made by", "", f"    {result['command']}", ""])


def main(args: Args) -> None:
    clip = CLIPReward(
        args.clip_model, [goal.prompt for goal in GOALS], args.baseline,
        device=args.device, precision=args.precision,
    )  # fmt: skip
    size = clip.preprocessing["size"]
    size = size if isinstance(size, int) else size[0]
    seeds = np.random.SeedSequence(args.seed).spawn(args.homes)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        walks = pool.map(walk, [(size, seed) for seed in seeds], 4)
    frames, reached, in_view = map(np.concatenate, zip(*walks, strict=True))
    s = clip.encode_frames(frames)  # [M, D]
    temperature = args.temperature or clip.temperature

    def measured(goals: torch.Tensor, alpha: float) -> dict:
        """By split and family, with the embeddings [240, D] of the goals."""
        rewards = goal_baseline_reward(s, goals, clip.baseline, alpha)
        scores = family_scores(rewards, temperature).cpu().numpy()
        return {
            split: {
                family: measure(*(x[:, COLUMNS[split][family]].ravel()
                                  for x in (scores, reached, in_view)))
                for family in FAMILIES
            }
            for split in COLUMNS
        }  # fmt: skip

    with warnings.catch_warnings():  # of words that the bundled CLIP was never taught
        warnings.simplefilter("ignore")
        verbs = clip.encode_text([verb(goal) for goal in GOALS])
    command = shlex.join(["python", "tests/home_accuracy.py", *sys.argv[1:]])
    result = {
        "model": args.clip_model.removeprefix(f"{HERE.parent}/"),
        "clip": digest(args.clip_model),
        "image_parameters": sum(p.numel() for p in clip.clip.visual.parameters()),
        "command": command.replace(f"{HERE.parent}/", ""),
        "homes": args.homes,
        "frames": len(frames),
        "seed": args.seed,
        "temperature": temperature,
        "alphas": {f"{alpha:g}": measured(clip.goal, alpha) for alpha in ALPHAS},
        "verbs": measured(verbs, 0.0),
    }
    result = json.loads(json.dumps(result), parse_float=lambda x: round(float(x), 4))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main(tyro.cli(Args))

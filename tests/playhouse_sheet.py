"""A contact sheet of the playhouse: homes, every toy, and frames in which each family succeeds.

python tests/playhouse_sheet.py        # writes tests/results/playhouse.jpg
"""

# ruff: noqa: E402, I001

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from dqn_clip_playhouse import (  # first: it tells MuJoCo how to render
    COLOURS,
    FAMILIES,
    GRAB_FROM,
    KINDS,
    TRAIN_GOALS,
    Goal,
    PlayhouseEnv,
    route,
    scripted,
)

import mujoco
import numpy as np
import tyro
from PIL import Image, ImageDraw


@dataclass
class Args:
    output: Path = HERE / "results" / "playhouse.jpg"
    """file to write"""
    size: int = 144
    """width and height of a frame in pixels"""
    columns: int = 8
    """frames in a row"""
    seed: int = 1
    """of the homes"""


def success_frame(env: PlayhouseEnv, goal: Goal, seed: int) -> np.ndarray | None:
    """The last frame of a scripted walk, if it ends in the goal state."""
    frame, _ = env.reset(seed=seed, options={"goal": goal})
    for action in scripted(env, goal):
        frame, _, _, _, info = env.step(action)
    return frame if info["success"] else None


def home_frame(env: PlayhouseEnv, seed: int) -> np.ndarray:
    """The view from the start, in the direction where most is to be seen."""
    env.reset(seed=seed)
    frames = []
    for _ in range(6):
        env.data.qpos[env._agent_qpos[2]] += np.pi / 3
        mujoco.mj_forward(env.model, env.data)
        frames.append(env.render())
    return max(frames, key=np.std)


def toy_frame(env: PlayhouseEnv, goal: Goal, seed: int) -> np.ndarray:
    """From where an agent would grab the goal's toy."""
    env.reset(seed=seed, options={"goal": goal})
    *way, toy = route(env, env.toy_position(0)[None, :2], *GRAB_FROM)
    dx, dy = toy - way[-1]
    env.data.qpos[env._agent_qpos] = *way[-1], np.arctan2(dy, dx)
    mujoco.mj_forward(env.model, env.data)
    env._tilt = 0 if env.toy_position(0)[2] < 0.3 else 1
    return env.render()


def main(args: Args) -> None:
    env = PlayhouseEnv("rgb_array", width=args.size, height=args.size)
    rng = np.random.default_rng(args.seed)
    seeds = iter(range(1000 * args.seed, 1000 * args.seed + 999))
    rows = [[(home_frame(env, next(seeds)), "a home") for _ in range(args.columns)]]
    colours = [list(COLOURS)[i % len(COLOURS)] for i in range(len(KINDS))]
    toys = [Goal("find", *toy) for toy in zip(colours, KINDS, strict=True)]
    rows.append([(toy_frame(env, toy, next(seeds)), toy.prompt) for toy in toys])
    for family in FAMILIES:
        goals = [goal for goal in TRAIN_GOALS if goal.family == family]
        row = []
        while len(row) < args.columns:
            goal = goals[rng.integers(len(goals))]
            frame = success_frame(env, goal, next(seeds))
            if frame is not None:
                row.append((frame, goal.prompt))
        rows.append(row)
    env.close()
    width, height = args.size + 2, args.size + 14
    sheet = Image.new("RGB", (args.columns * width, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (frame, text) in enumerate(row):
            sheet.paste(Image.fromarray(frame), (x * width, y * height))
            pen.text((x * width + 2, y * height + args.size), text, fill="black")
    sheet.save(args.output, quality=88)
    print(args.output)


if __name__ == "__main__":
    main(tyro.cli(Args))

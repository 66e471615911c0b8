"""Train a first-person agent to do in a home what a sentence says: DQN on a CLIP reward.

    python dqn_clip_playhouse.py                             # find, lift and place toys, on a CPU
    python dqn_clip_playhouse.py --reward env --family find  # true rewards: is the DQN sound?
    python dqn_clip_playhouse.py --tour                      # a video of a walk that does all three

CLIP compares each frame with the prompt of every goal. A goal's reward is 1 where its probability
among the goals of its family exceeds a threshold, else 0. A frame is scored for all goals at once:
with --relabel-fraction a walk that fails at its own goal teaches those that it happened to reach.

Paper: Baumli et al., "Vision-Language Models as a Source of Rewards", arXiv 2312.09187. Their home
is not public; this one is built in code, a new one for each episode.
"""

import copy
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa: each worker renders on its own core
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() starts no CUDA
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# before mujoco: it imports torch, which must be loaded before GL
from clip_reward import CLIPReward, auto_precision, contrastive_reward, goal_baseline_reward


def check(condition: object, message: str) -> None:
    """Unless the condition holds, stop with one line that names flag, value and remedy."""
    if not condition:
        print(message, file=sys.stderr)
        raise SystemExit(2)


GL_REMEDY = (
    "On Debian or Ubuntu: apt-get install libegl1 libgl1, or apt-get install libosmesa6 and set "
    "MUJOCO_GL=osmesa"
)
try:
    import mujoco
except ModuleNotFoundError:  # no renderer's fault: it says what to install
    raise
except Exception as error:  # mujoco raises whatever its GL loader raised
    gl = os.environ.get("MUJOCO_GL", "")
    check(False, f"MUJOCO_GL={gl}: mujoco cannot load this renderer ({error}). {GL_REMEDY}")

# fork spares each worker the import of torch, but is safe on Linux only
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
# Set by torchrun; a script that was started alone is rank 0 of 1.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine
FAMILIES = ("find", "lift", "place")
MAX_STEPS = 100  # of an episode
VIDEO_SIZE = 320  # pixels
LAYOUT = 3  # of checkpoints and replay files; one more whenever they change


@dataclass
class Args:
    tour: bool = False
    """write a video of a scripted walk that finds, lifts and places a toy, instead of training"""
    output: Path = Path("tour.mp4")  # file for the video of the tour

    # ---- Run

    exp_name: str = "dqn_clip_playhouse"  # name of the experiment, part of the run's folder
    seed: int = 1  # of networks, exploration, replay and every home
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of CLIP, networks, replay; auto: CUDA if any
    total_timesteps: int = 280_000  # environment steps, over all environments of all ranks
    num_envs: int = 16  # worker processes of each rank, one home in each
    eval_every: int = 40_000  # env steps between evaluations; running episodes are cut short there
    eval_episodes: int = 96  # episodes of each evaluation during training
    final_episodes: int = 200
    """episodes for each row of the report at the end, in homes that selected nothing"""
    checkpoint_every: int = 20_000  # env steps between checkpoints; they cut episodes short too
    capture_video: bool = True  # record an episode at each evaluation, at 320 pixels
    resume: Path | None = None  # a run's folder to continue, with the arguments it was started with
    evaluate: Path | None = None
    """a run's folder whose agents to replay, beside a random one, instead of training"""
    track: bool = False  # log to Weights and Biases too (pip install wandb)
    wandb_project_name: str = "clip-rl"  # project in Weights and Biases
    wandb_entity: str | None = None  # team in Weights and Biases
    worker_timeout: float = 60.0  # seconds after which a worker that does not answer ends the run

    # ---- Environment

    family: Literal["all", "find", "lift", "place"] = "all"  # of the goals to train for
    frame_size: int = 144  # width and height in pixels of the frames that CLIP sees

    # ---- CLIP reward

    reward: Literal["contrastive", "projection", "env"] = "contrastive"
    """what is thresholded: the softmax over the family, the goal-baseline reward alone, or the
    truth from the simulator, to check the algorithm"""
    baseline: str = "a room"  # the baseline prompt; without effect at alpha 0
    alpha: float = 0.0  # strength of the goal-baseline regularisation, from 0 (the paper) to 1
    temperature: float | None = None
    """of the softmax over the goals of a family; unset, the CLIP's own"""
    beta: float | None = None
    """score above which a goal counts as reached; unset, calibrated on random play, and for the
    contrastive reward at least 0.5: more likely than all others of its family together"""
    calibration_episodes: int = 64  # of random play, at least, before the run
    false_positive_rate: float = 0.001
    """share of the scores of random play that the calibrated beta lets pass, in each family"""
    calibrate_with_labels: bool = False
    """let the simulator's truth keep the frames that do reach a goal out of the calibration"""
    place_after_lift: bool = True
    """place in two stages: the goal is to lift the toy until CLIP sees it in the hand, then to
    place it, which counts once it is in the hand no longer; --no-place-after-lift (the paper) has
    one stage"""
    in_hand: float = 0.5
    """share of the training episodes with a place goal that begin on the way to the place, with the
    toy in the hand; 0 is the paper"""
    clip_model: str = str(Path(__file__).resolve().parent / "tests" / "tiny_clip")
    """folder, ARCH/TAG or ARCH/FILE of open_clip, or hf-hub:ID"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of CLIP; bf16 lets the network's convolutions multiply below float32 too (TF32 on CUDA); auto
    is bf16 on CUDA (older than Ampere: take fp32) and on CPUs that are fast at it"""
    compile: bool = False
    """torch.compile CLIP's image tower and the updates (it takes a C++ compiler), which on CUDA
    become one CUDA graph"""
    score_every: int = 4
    """steps of all environments in a block: only at its end do episodes end, or turn from lifting
    to placing; where the policy sees pixels, CLIP scores a block at once"""

    # ---- Algorithm

    buffer_size: int = 150_000
    """transitions in the replay of each rank: 3 GiB, and up to 4 in the run's folder"""
    learning_starts: int = 10_000  # env steps of random actions before the first update
    updates_per_step: float = 0.125  # gradient updates per environment step of all ranks
    batch_size: int = 64  # transitions per update and rank
    learning_rate: float = 5e-4  # of AdamW
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 at --total-timesteps; a resume with a larger one jumps
    back up, to the line of the longer run"""
    weight_decay: float = 0.5
    """of AdamW: an update shrinks the weights by it times the learning rate; at 0 (Adam) the
    network learns more of its replay by heart"""
    gamma: float = 0.95  # discount factor
    n_step: int = 5  # steps of a target before it bootstraps
    target_every: int = 250  # updates between copies of the network into its target
    double_q: bool = True  # the network chooses the next actions, its target values them
    epsilon_end: float = 0.05  # share of random actions after --epsilon-steps; from 1 linearly
    epsilon_steps: int = 60_000  # env steps after learning starts
    explore_steps: float = 4.0
    """steps, on average, for which a random action is kept while exploring: single ones would not
    leave the room (1 makes it a single one)"""
    policy_temperature: float = 0.05
    """of the softmax over log Q that draws the actions, in evaluations too: who cannot see all and
    always takes the best would repeat itself for ever (towards 0 it becomes the argmax)"""
    target_temperature: float = 0.1
    """of the same softmax in the targets; higher than that of the actions, it makes a detour cost
    more, so that errors of Q matter less"""
    relabel_fraction: float = 0.0
    """share of the sampled transitions that are drawn from the way to what an episode reached, of
    each family alike, and trained for that; 0 is the paper, 0.5 learns faster at first and ends
    lower"""
    mirror: bool = True
    """train half of each batch as if it was seen in a mirror, with left and right exchanged"""
    policy_input: Literal["clip", "pixels"] = "clip"
    """what the network sees of a frame: CLIP's embeddings of up to 8 x 8 cells of it, or small
    pixels (the paper's)"""
    frame_stack: int = 1  # frames that the network sees
    policy_size: int = 48  # width and height in pixels of the frames, where it sees pixels

    def __post_init__(self):
        if os.path.isdir(self.clip_model):  # a resume from elsewhere finds it too
            self.clip_model = os.path.abspath(self.clip_model)


def check_args(args: Args) -> None:
    def require(name: str, condition: object, remedy: str) -> None:
        check(condition, f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")

    for name in ("total_timesteps", "num_envs", "eval_every", "eval_episodes", "final_episodes",
                 "checkpoint_every", "frame_size", "score_every", "buffer_size", "batch_size",
                 "updates_per_step", "learning_rate", "target_every", "policy_temperature",
                 "target_temperature", "epsilon_steps", "n_step", "calibration_episodes",
                 "frame_stack", "policy_size", "worker_timeout", "temperature"):  # fmt: skip
        value = getattr(args, name)
        require(name, value is None or 0 < value < math.inf, "must be finite and greater than 0")
    for name in ("alpha", "false_positive_rate", "epsilon_end", "relabel_fraction", "in_hand"):
        require(name, 0 <= getattr(args, name) <= 1, "must lie between 0 and 1")
    require("worker_timeout", args.worker_timeout < 2e6, "must be below 2e6 seconds")  # 2**31 ms
    require("seed", 0 <= args.seed < 2**63, "must be at least 0 and less than 2**63")
    require("gamma", 0 <= args.gamma < 1, "must be at least 0 and less than 1")
    require("explore_steps", args.explore_steps >= 1, "must be at least 1")
    for name in ("learning_starts", "weight_decay"):
        require(name, 0 <= getattr(args, name) < math.inf, "must be finite and at least 0")
    check(args.baseline.strip(), f"--baseline {args.baseline!r}: write a sentence")
    remedy = "leaves no step to learn from; make it less than --total-timesteps"
    require("learning_starts", args.evaluate or args.learning_starts < args.total_timesteps, remedy)
    low = 0 if args.reward == "contrastive" else -1  # of the scores; none is more than 1
    remedy = f"must be more than {low} and less than 1, and not together with --reward env"
    require("beta", args.beta is None or args.reward != "env" and low < args.beta < 1, remedy)
    calibrates = args.beta is None and args.reward != "env"
    remedy = "not together with --beta or --reward env"
    require("calibrate_with_labels", calibrates or not args.calibrate_with_labels, remedy)
    divides = MAX_STEPS % args.score_every == 0
    require("score_every", divides, f"must divide the {MAX_STEPS} steps of an episode")
    require("policy_size", args.policy_size % 8 == 0, "must be a multiple of 8")
    episode = 0 if args.evaluate else MAX_STEPS * args.num_envs
    remedy = f"holds fewer than two episodes of each environment; raise it to {2 * episode}"
    require("buffer_size", args.buffer_size >= 2 * episode, remedy)
    least = episode * WORLD_SIZE
    for name in ("eval_every", "checkpoint_every"):
        remedy = f"cuts every episode of {MAX_STEPS} steps short; raise it to {least}"
        require(name, getattr(args, name) >= least, remedy)
    # W&B leaves a folder of its name behind, which Python takes for a package without an origin.
    wandb = getattr(importlib.util.find_spec("wandb"), "origin", None)
    require("track", wandb or args.evaluate or not args.track, "no wandb here; pip install wandb")
    alone = WORLD_SIZE == 1 or not (args.evaluate or args.tour)
    check(alone, "--evaluate, --tour: start them without torchrun")
    require("output", not args.tour or args.output.suffix == ".mp4", "must end in .mp4")
    require("output", not args.tour or os.path.isdir(args.output.parent), "make its folder first")


COLOURS = {
    "red": (0.80, 0.08, 0.08),
    "yellow": (0.95, 0.80, 0.08),
    "green": (0.08, 0.55, 0.15),
    "blue": (0.08, 0.22, 0.80),
    "purple": (0.52, 0.12, 0.62),
    "black": (0.07, 0.07, 0.08),
}
KINDS = ("ball", "block", "duck", "mug", "car", "bear", "plane", "mushroom")
PLACES = {"bed": "on the bed", "table": "on the table", "toy box": "in the toy box"}


class Goal(NamedTuple):
    """What to do with which toy. The prompt describes the frame that shows it done."""

    family: Literal["find", "lift", "place"]
    colour: str
    kind: str
    place: str | None = None

    @property
    def prompt(self) -> str:
        where = {"find": "", "lift": " in the hand", "place": f" {PLACES.get(self.place)}"}
        return f"a {self.colour} {self.kind}{where[self.family]}"


TOY_NAMES = [(colour, kind) for colour in COLOURS for kind in KINDS]
# One toy in five is never named in training, by any family; every colour and kind is.
HELDOUT_TOYS = [
    (colour, kind)
    for i, colour in enumerate(COLOURS)
    for j, kind in enumerate(KINDS)
    if (i + j) % 5 == 0
]


def goals_of(toys: Iterable[tuple[str, str]]) -> tuple[Goal, ...]:
    what = [("find", None), ("lift", None), *(("place", place) for place in PLACES)]
    return tuple(Goal(family, *toy, place) for family, place in what for toy in toys)


TRAIN_GOALS = goals_of([toy for toy in TOY_NAMES if toy not in HELDOUT_TOYS])  # 190
HELDOUT_GOALS = goals_of(HELDOUT_TOYS)  # 50
GOALS = TRAIN_GOALS + HELDOUT_GOALS
COLUMNS = {  # of each family in GOALS
    split: {f: [GOALS.index(goal) for goal in goals if goal.family == f] for f in FAMILIES}
    for split, goals in (("train", TRAIN_GOALS), ("heldout", HELDOUT_GOALS))
}
STAGE_ONE = [  # of each goal: a toy that is to be placed must be lifted first
    GOALS.index(Goal("lift", goal.colour, goal.kind) if goal.family == "place" else goal)
    for goal in GOALS
]


def part(shape, size, pos=(0, 0, 0), rgb=None, quat=(1, 0, 0, 0)):
    """One geom of a toy: half sizes and place in metres, a colour of its own, a turn."""
    return getattr(mujoco.mjtGeom, f"mjGEOM_{shape}"), size, pos, rgb, quat


SIDEWAYS, FORWARD = (0.7071, 0.7071, 0, 0), (0.7071, 0, 0.7071, 0)  # z turned to y and to x
WHITE, DARK, ORANGE, TAN = (0.93, 0.92, 0.88), (0.2, 0.2, 0.2), (0.95, 0.45, 0.05), (0.85, 0.7, 0.5)
GLASS = (0.65, 0.80, 0.90)
TOYS = {  # the height of a toy's origin over what it stands on, and its parts; forwards is +x
    "ball": (0.12, [part("SPHERE", (0.12, 0, 0))]),
    "block": (0.10, [part("BOX", (0.1, 0.1, 0.1))]),
    "duck": (0.10, [
        part("ELLIPSOID", (0.14, 0.1, 0.09)),
        part("BOX", (0.09, 0.08, 0.02), (0, 0, -0.08)),
        part("SPHERE", (0.07, 0, 0), (0.08, 0, 0.12)),
        part("BOX", (0.035, 0.03, 0.012), (0.16, 0, 0.115), ORANGE),
        part("BOX", (0.04, 0.05, 0.015), (-0.14, 0, 0.04)),
    ]),
    "mug": (0.10, [
        part("CYLINDER", (0.09, 0.1, 0)),
        part("CYLINDER", (0.075, 0.003, 0), (0, 0, 0.1), DARK),
        part("BOX", (0.05, 0.015, 0.015), (0.13, 0, 0.05)),
        part("BOX", (0.05, 0.015, 0.015), (0.13, 0, -0.05)),
        part("BOX", (0.015, 0.015, 0.06), (0.17, 0, 0)),
    ]),
    "car": (0.085, [
        part("BOX", (0.17, 0.09, 0.04)),
        part("BOX", (0.09, 0.075, 0.04), (-0.02, 0, 0.08), GLASS),
        part("BOX", (0.085, 0.08, 0.008), (-0.02, 0, 0.125)),
        *(part("CYLINDER", (0.05, 0.02, 0), (x, y, -0.035), DARK, SIDEWAYS)
          for x in (-0.1, 0.1) for y in (-0.09, 0.09)),
    ]),
    "bear": (0.11, [
        part("ELLIPSOID", (0.085, 0.1, 0.1)),
        part("BOX", (0.085, 0.095, 0.03), (0.01, 0, -0.08)),
        part("SPHERE", (0.085, 0, 0), (0, 0, 0.15)),
        part("SPHERE", (0.035, 0, 0), (0, -0.07, 0.22)),
        part("SPHERE", (0.035, 0, 0), (0, 0.07, 0.22)),
        part("SPHERE", (0.035, 0, 0), (0.07, 0, 0.135), TAN),
    ]),
    "plane": (0.045, [
        part("CAPSULE", (0.045, 0.14, 0), quat=FORWARD),
        part("BOX", (0.05, 0.22, 0.012), (0.02, 0, 0.01)),
        part("BOX", (0.03, 0.09, 0.01), (-0.15, 0, 0.01)),
        part("BOX", (0.03, 0.01, 0.05), (-0.15, 0, 0.06)),
        part("BOX", (0.012, 0.08, 0.02), (0.195, 0, 0), WHITE),
    ]),
    "mushroom": (0.08, [
        part("CYLINDER", (0.05, 0.08, 0), rgb=WHITE),
        part("ELLIPSOID", (0.14, 0.14, 0.08), (0, 0, 0.09)),
    ]),
}  # fmt: skip

# Half width and half depth of the footprint, and boxes: half sizes, place, colour (a number shades
# the piece's own). The back is at +y. Boxes are cheap to render.
FURNITURE = {
    "bed": (0.5, 0.8, [
        ((0.5, 0.8, 0.1), (0, 0, 0.1), 0.6),
        ((0.47, 0.76, 0.06), (0, -0.02, 0.26), WHITE),
        ((0.475, 0.45, 0.02), (0, -0.34, 0.31), 1.0),
        ((0.3, 0.15, 0.04), (0, 0.55, 0.36), WHITE),
        ((0.5, 0.04, 0.35), (0, 0.78, 0.35), 0.6),
    ]),
    "table": (0.5, 0.4, [
        ((0.5, 0.4, 0.025), (0, 0, 0.4), 1.0),
        *(((0.03, 0.03, 0.19), (x, y, 0.19), 0.7) for x in (-0.45, 0.45) for y in (-0.35, 0.35)),
    ]),
    "toy box": (0.38, 0.38, [
        ((0.38, 0.38, 0.02), (0, 0, 0.02), 0.6),
        *(((0.38, 0.025, 0.13), (0, y, 0.13), 1.0) for y in (-0.355, 0.355)),
        *(((0.025, 0.38, 0.13), (x, 0, 0.13), 1.0) for x in (-0.355, 0.355)),
    ]),
    "sofa": (0.7, 0.35, [
        ((0.7, 0.35, 0.14), (0, 0, 0.14), 1.0),
        ((0.7, 0.1, 0.2), (0, 0.25, 0.48), 0.85),
        *(((0.1, 0.35, 0.24), (x, 0, 0.24), 0.85) for x in (-0.6, 0.6)),
    ]),
    "shelf": (0.45, 0.15, [
        ((0.45, 0.02, 0.55), (0, 0.13, 0.55), 0.6),
        *(((0.02, 0.15, 0.55), (x, 0, 0.55), 1.0) for x in (-0.43, 0.43)),
        *(((0.43, 0.14, 0.015), (0, 0, z), 1.0) for z in (0.05, 0.4, 0.75, 1.08)),
        ((0.06, 0.1, 0.12), (-0.26, 0, 0.53), (0.55, 0.35, 0.28)),
        ((0.05, 0.1, 0.11), (0.1, 0, 0.88), (0.42, 0.44, 0.36)),
    ]),
    "wardrobe": (0.45, 0.25, [
        ((0.45, 0.24, 0.7), (0, 0.01, 0.7), 1.0),
        ((0.008, 0.25, 0.65), (0, 0, 0.7), 0.4),
        *(((0.012, 0.25, 0.05), (x, 0, 0.7), 0.3) for x in (-0.06, 0.06)),
    ]),
    "chair": (0.2, 0.2, [
        ((0.2, 0.2, 0.02), (0, 0, 0.26), 1.0),
        ((0.2, 0.02, 0.2), (0, 0.18, 0.46), 1.0),
        *(((0.02, 0.02, 0.12), (x, y, 0.12), 0.7) for x in (-0.17, 0.17) for y in (-0.17, 0.17)),
    ]),
}  # fmt: skip
# Where toys lie on it: height, half the width, and how far behind its middle (< 0: in front).
SURFACES = {"bed": (0.33, 0.3, -0.34), "table": (0.425, 0.3, 0.0), "sofa": (0.28, 0.27, -0.12)}


EYE, RADIUS = 0.75, 0.2  # m: height of the eye; radius of the body
HAND_AHEAD, HAND_HEIGHT = 0.5, 0.55  # m, from the middle of the body, and over the floor
STRIDE, TURN = 0.2, math.radians(25)  # of one step
APART = 1.5  # m, at least, from the start to the goal's toy, or a random walk finds it
TILTS = tuple(math.radians(degrees) for degrees in (-50, -25, 0))  # of the view
GRAB_FROM, RELEASE_FROM = (0.4, 0.9), (0.42, 0.58)  # m on the floor: where scripted() does it
TOY_GROUP = 1  # of the geoms of toys and the agent, which rays ignore
REACH = 1.2  # m from the eye: what can be grabbed
NEAR, SEEN, CENTRAL = 1.2, 0.006, 0.2  # found: m from the eye, share of the frame, off its middle
AT_REST = 0.3  # m/s, at most, of a toy that is placed
MAX_SPIN = 30.0  # rad/s of a toy, after each step
ACTIONS = ("forward", "back", "left", "right", "up", "down", "grab", "release", "stay")


def about_z(angle: float) -> tuple[float, float, float, float]:
    """Quaternion of a turn by `angle` (radians)."""
    return math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)


class NoRoom(Exception):
    """What was drawn does not fit into this home."""


@contextmanager
def plain_errors():
    """Keeps an OpenGL error's words alone: it holds pointers, which no worker can send."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(" ".join(str(error).split())) from error


class PlayhouseEnv(gym.Env):
    """A home with toys, seen through the eyes of someone who walks in it.

    ## Description
    Two rooms joined by a doorway, with furniture, and four to six toys on the floor and on the
    furniture. Everything is drawn anew in each episode: sizes, places, colours, light and toys. One
    of the toys has the goal's kind and another colour, and one its colour and another kind.

    ## Action Space
    `Discrete(9)`, a tenth of a second each, but half a second to let a toy go.

    | Num | Action                      | Num | Action                                         |
    | --- | --------------------------- | --- | ---------------------------------------------- |
    | 0   | walk 0.2 m forward          | 5   | look 25 degrees lower (down to -50)            |
    | 1   | walk 0.2 m back             | 6   | grab the nearest toy in reach that is central  |
    | 2   | turn 25 degrees to the left | 7   | release it, where there is room, and step back |
    | 3   | turn 25 degrees to the right|     | (and look no higher than -25 degrees)          |
    | 4   | look 25 degrees higher      | 8   | stay                                           |

    Contact stops the body at walls and furniture; toys obey physics. A toy in the hand is carried
    in front of the body, and falls onto what is below when it is released.

    ## Observation Space
    `Box(0, 255, (height, width, 3), uint8)`: the frame, from an eye height of 0.75 m.

    ## Rewards
    1 in a goal state, else 0. The CLIP reward of a frame is computed outside, in batches.

    ## Starting State
    On a free spot of the floor in the room of the goal's toy, at least 1.5 m from it, in any
    direction, looking 25 degrees down. The place where the toy shall lie is in that room too.

    ## Episode End
    Never by itself; `gym.make` truncates after `max_episode_steps` (100).

    ## Arguments
    | Parameter         | Default       | Description                                          |
    | ----------------- | ------------- | ---------------------------------------------------- |
    | `goals`           | `TRAIN_GOALS` | what an episode's goal is drawn from                 |
    | `all_goals`       | `False`       | report the truth of every goal, in `info["reached"]` |
    | `width`, `height` | 144           | size of the frame in pixels                          |

    `reset(options={"goal": goal})` sets the goal, `options={"goals": goals}` what it is drawn from
    this once. With `options={"in_hand": p}` an episode with a place goal begins, with probability
    `p`, somewhere on the way to the place, with the toy in the hand.

    `info["goal"]` is the goal's index in `GOALS`, and `info["success"]` says whether the
    simulator's state is one of the goal: a toy is *lifted* when it is in the hand. Out of it, the
    toy is *found* when it is within 1.2 m, in the middle of the view and not hidden, and *placed*
    when it rests on the bed or the table, or in the toy box.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        render_mode: str | None = None,
        goals: Sequence[Goal] = TRAIN_GOALS,
        all_goals: bool = False,
        width: int = 144,
        height: int = 144,
    ):
        self.render_mode, self.width, self.height = render_mode, width, height
        self.goals, self.all_goals = goals, all_goals
        self.observation_space = gym.spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._renderer = None

    # ---- The home

    def _home(self) -> mujoco.MjModel:
        rng = self.np_random
        spec = mujoco.MjSpec()
        spec.option.timestep = 0.01
        look, quality = spec.visual, spec.visual.quality
        quality.numslices, quality.numstacks, quality.offsamples = 10, 6, 0
        quality.shadowsize = 0  # with shadows a renderer takes 0.1 s to make, and 64 MB
        look.global_.offwidth, look.global_.offheight = self.width, self.height
        look.map.znear, spec.stat.extent = 0.02, 1  # m: znear counts in extents
        look.headlight.ambient, look.headlight.diffuse = (0.35,) * 3, (0.3,) * 3
        spec.worldbody.add_light(
            type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
            pos=(0, 0, 4),
            dir=(*rng.uniform(-0.5, 0.5, 2), -1),
            diffuse=(rng.uniform(0.35, 0.6),) * 3,
        )
        self._rooms(spec)
        self._furniture(spec)
        self._spots, self._used = [], set()  # on the floor and on furniture, that are taken
        for i, (colour, kind) in enumerate(self.toys):
            self._toy(spec, f"toy{i}", colour, kind)
        place = self.furniture.get(self.goal.place)
        if place is not None and place[0] * spec.body("toy0").pos[0] < 0:  # in different rooms
            raise NoRoom
        self._agent(spec)
        return spec.compile()

    def _tone(self, low: float, high: float) -> np.ndarray:
        """A pale or dull colour: what is bright in a home is a toy."""
        rng = self.np_random
        return np.clip(rng.uniform(low, high) + rng.uniform(-0.08, 0.08, 3), 0, 1)

    def _rooms(self, spec: mujoco.MjSpec) -> None:
        rng = self.np_random
        self.west, self.east = -rng.uniform(2.6, 3.2), rng.uniform(2.6, 3.2)
        self.south, self.north = np.array([-0.5, 0.5]) * rng.uniform(2.8, 3.4)
        door = rng.uniform(self.south + 0.9, self.north - 0.9)
        self._doorway = 0.0, door, 0.75, 0.6  # x, y and half sizes of what stays free
        self.obstacles = []  # likewise, of walls and furniture

        def box(x0, x1, y0, y1, z0, z1, rgb, solid=True):
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX, rgba=(*rgb, 1), contype=solid, conaffinity=solid,
                size=((x1 - x0) / 2, (y1 - y0) / 2, (z1 - z0) / 2),
                pos=((x0 + x1) / 2, (y0 + y1) / 2, (z0 + z1) / 2),
            )  # fmt: skip

        for x0, x1 in ((self.west, 0), (0, self.east)):
            box(x0, x1, self.south, self.north, -0.2, 0, self._tone(0.45, 0.75))
            x, y, w, d = (x0 + x1) / 2, rng.uniform(-0.5, 0.5), *rng.uniform(0.3, 0.6, 2)
            box(x - w, x + w, y - d, y + d, 0, 0.004, self._tone(0.3, 0.8), solid=False)  # a rug
            wall = self._tone(0.6, 0.9)
            box(x0, x1, self.south - 0.1, self.south, 0, 3, wall)
            box(x0, x1, self.north, self.north + 0.1, 0, 3, wall)
            outer = x0 - 0.1 if x0 else x1
            box(outer, outer + 0.1, self.south, self.north, 0, 3, 0.95 * wall)
        box(self.west, self.east, self.south, self.north, 3, 3.1, (0.9, 0.9, 0.9), solid=False)
        wall = self._tone(0.6, 0.9)
        for y0, y1 in ((self.south, door - 0.5), (door + 0.5, self.north)):
            box(-0.05, 0.05, y0, y1, 0, 3, wall)
            self.obstacles.append((0.0, (y0 + y1) / 2, 0.05, (y1 - y0) / 2))

    def _furniture(self, spec: mujoco.MjSpec) -> None:
        self.furniture = {}  # name -> (x, y, angle)
        for name, (w, d, parts) in FURNITURE.items():
            x, y, angle, half = self._against_a_wall(w, d)
            self.obstacles.append((x, y, *half))
            self.furniture[name] = x, y, angle
            body = spec.worldbody.add_body(name=name, pos=(x, y, 0), quat=about_z(angle))
            tone = self._tone(0.35, 0.6) * (1.0, 0.85, 0.7)
            for size, pos, shade in parts:
                rgb = tone * shade if isinstance(shade, float) else shade
                body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=pos, rgba=(*rgb, 1))

    def _against_a_wall(self, w: float, d: float):
        """A free place for a piece: x, y, angle, and half sizes along x and y, turned by it."""
        rng = self.np_random
        for _ in range(200):
            quarter = int(rng.integers(4))
            hx, hy = (w, d) if quarter % 2 == 0 else (d, w)
            low, high = (self.west, -0.14) if rng.random() < 0.5 else (0.14, self.east)
            low, high = np.array([[low, self.south], [high, self.north]])
            low, high = low + (hx, hy) + 0.02, high - (hx, hy) - 0.02
            x, y = rng.uniform(low, high)
            # Its back is at +y: after 0 to 3 quarters it stands in the north, west, south or east.
            x, y = ((x, high[1]), (low[0], y), (x, low[1]), (high[0], y))[quarter]
            if self._is_free(x, y, hx + 0.1, hy + 0.1):
                return x, y, quarter * math.pi / 2, (hx, hy)
        raise NoRoom

    def _is_free(self, x: float, y: float, hx: float, hy: float) -> bool:
        rectangles = [self._doorway, *self.obstacles]
        return all(abs(x - X) > hx + w or abs(y - Y) > hy + d for X, Y, w, d in rectangles)

    def _free_floor(self, margin: float) -> tuple[float, float]:
        for _ in range(300):
            x = self.np_random.uniform(self.west + margin, self.east - margin)
            y = self.np_random.uniform(self.south + margin, self.north - margin)
            apart = all(math.hypot(x - X, y - Y) > margin + 0.2 for X, Y in self._spots)
            if apart and abs(x) > margin + 0.1 and self._is_free(x, y, margin, margin):
                self._spots.append((x, y))
                return x, y
        raise NoRoom

    def _toy(self, spec: mujoco.MjSpec, name: str, colour: str, kind: str) -> None:
        rng = self.np_random
        surfaces = [s for s in SURFACES if s not in self._used]
        if name == "toy0" and self.goal.place in surfaces:
            surfaces.remove(self.goal.place)  # nothing is placed from the start
        if rng.random() < 0.35 and surfaces:
            surface = str(rng.choice(surfaces))
            self._used.add(surface)
            height, u, v = SURFACES[surface]
            x, y, angle = self.furniture[surface]
            u, v = u * rng.uniform(-1, 1), v + rng.uniform(-0.1, 0.1)
            x += math.cos(angle) * u - math.sin(angle) * v
            y += math.sin(angle) * u + math.cos(angle) * v
        else:
            height = 0.0
            x, y = self._free_floor(0.25)
        rest, parts = TOYS[kind]
        turn = about_z(rng.uniform(-math.pi, math.pi))
        body = spec.worldbody.add_body(name=name, pos=(x, y, height + rest + 0.01), quat=turn)
        body.add_freejoint()
        for type_, size, pos, rgb, quat in parts:
            rgba = (*(rgb or COLOURS[colour]), 1)
            body.add_geom(
                type=type_, size=size, pos=pos, quat=quat, rgba=rgba, density=200,
                friction=(1, 0.02, 0.01), condim=6, group=TOY_GROUP,
            )  # fmt: skip

    def _agent(self, spec: mujoco.MjSpec) -> None:
        x, y = self._free_floor(0.3)
        X, Y, _ = spec.body("toy0").pos
        while x * X < 0 or math.hypot(x - X, y - Y) < APART:  # each try leaves less free floor
            x, y = self._free_floor(0.3)
        agent = spec.worldbody.add_body(name="agent")
        for name, axis in (("x", (1, 0, 0)), ("y", (0, 1, 0))):
            agent.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis)
        agent.add_joint(name="yaw", type=mujoco.mjtJoint.mjJNT_HINGE, axis=(0, 0, 1))
        self._start = x, y, self.np_random.uniform(-math.pi, math.pi)
        agent.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=(RADIUS, 0.35, 0), pos=(0, 0, 0.4),
            rgba=(0, 0, 0, 0), density=2000, group=TOY_GROUP, condim=1, priority=1,  # slides
        )  # fmt: skip
        skin = {"type": mujoco.mjtGeom.mjGEOM_BOX, "contype": 0, "conaffinity": 0}
        skin |= {"rgba": (0.85, 0.62, 0.48, 1), "group": TOY_GROUP}
        agent.add_geom(size=(0.09, 0.02, 0.016), pos=(0.32, -0.16, 0.42), **skin)
        agent.add_geom(size=(0.045, 0.03, 0.01), pos=(0.44, -0.14, 0.43), **skin)
        for i, tilt in enumerate(TILTS):  # a camera looks along its -z, with y up
            agent.add_camera(
                name=f"eye{i}", pos=(0.05, 0, EYE), fovy=65,
                xyaxes=(0, -1, 0, -math.sin(tilt), 0, math.cos(tilt)),
            )  # fmt: skip

    # ---- Episodes

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng, options = self.np_random, options or {}
        goals = options.get("goals", self.goals)
        drawn = goals[int(rng.integers(len(goals)))]  # even if it is given: a seed is a home
        self.goal = options.get("goal", drawn)
        if self.goal not in GOALS:
            raise ValueError(f"goal {self.goal}: not one of GOALS")
        toy = self.goal.colour, self.goal.kind
        others = [other for other in TOY_NAMES if other != toy]
        rng.shuffle(others)
        same_kind = next(other for other in others if other[1] == toy[1])
        same_colour = next(other for other in others if other[0] == toy[0])
        kin = [same_kind, same_colour]
        strangers = [other for other in others if other not in kin]
        self.toys = [toy, *kin, *strangers[: int(rng.integers(1, 4))]]
        while True:
            with suppress(NoRoom):  # where something has no place, or there is no way to it
                self.model = model = self._home()
                self.data = mujoco.MjData(model)
                self.held, self._tilt = None, 1
                self._agent_qpos = [model.joint(name).qposadr[0] for name in ("x", "y", "yaw")]
                self._agent_qvel = [model.joint(name).dofadr[0] for name in ("x", "y", "yaw")]
                self._toy_bodies = [model.body(f"toy{i}") for i in range(len(self.toys))]
                self.data.qpos[self._agent_qpos] = self._start
                mujoco.mj_step(model, self.data, nstep=30)  # till the toys lie
                mujoco.mj_forward(model, self.data)
                route(self, self.toy_position(0)[None, :2], *GRAB_FROM)
                if self.goal.place is not None:
                    way = route(self, self.points_on(self.goal.place), *RELEASE_FROM)
                break
        if self.goal.place is not None and rng.random() < options.get("in_hand", 0):
            clear = self._apart(np.array(way[:-1]), RADIUS + 0.25)  # not inside a toy
            start = clear[rng.integers(len(clear))] if len(clear) else way[0]
            self.data.qpos[self._agent_qpos[:2]] = start
            self._hold(0)
            self._carry()
            mujoco.mj_forward(self.model, self.data)
        self.close()
        return self._frame(), self._info()

    def step(self, action):
        name, data = ACTIONS[action], self.data
        if name == "grab" and self.held is None:
            self._grab()
        let_go = name == "release" and self.held is not None and self._release()
        # It steps back from what it let go, and does not look over it: close by, a toy on the table
        # looks held, and straight ahead one does not see into the toy box.
        highest = 1 if let_go else len(TILTS) - 1
        self._tilt = min(max(self._tilt + {"up": 1, "down": -1}.get(name, 0), 0), highest)
        stride = STRIDE * ((name == "forward") - (name == "back" or let_go))
        turn = {"left": TURN, "right": -TURN}.get(name, 0.0)
        x, y, yaw = data.qpos[self._agent_qpos]
        velocity = stride * math.cos(yaw), stride * math.sin(yaw), turn
        data.qvel[self._agent_qvel] = np.array(velocity) / 0.1
        mujoco.mj_step(self.model, data, nstep=10)  # a tenth of a second: only contact stops it
        data.qvel[self._agent_qvel] = 0
        if let_go:
            mujoco.mj_step(self.model, data, nstep=40)  # till it lies: in the air it looks placed
        # The integrator makes what spins fast spin faster still: a toy kicked into a corner would.
        spins = data.qvel[: 6 * len(self.toys)].reshape(-1, 6)[:, 3:]  # rad/s; a view
        np.clip(spins, -MAX_SPIN, MAX_SPIN, out=spins)
        data.qpos[self._agent_qpos[2]] = yaw + turn  # no contact turns it
        if self._gap() < RADIUS - 0.04:  # contact is soft, and thin boards are no obstacle to it
            data.qpos[self._agent_qpos[:2]] = x, y
        if self.held is not None:
            self._carry()
        mujoco.mj_forward(self.model, data)
        info = self._info()
        return self._frame(), float(info["success"]), False, False, info

    def _grab(self) -> None:
        eye = self.data.camera(f"eye{self._tilt}").xpos
        for toy in sorted(range(len(self.toys)), key=self._view):  # the nearest first
            distance, angle = self._view(toy)
            central = distance < REACH and angle < math.radians(22)
            if central and self._free_way(eye, self.toy_position(toy) - eye) > 1:
                self._hold(toy)
                return

    def _hold(self, toy: int) -> None:
        self.held = toy
        self._solid(toy, False)

    def _free_way(self, start: np.ndarray, ray: np.ndarray) -> float:
        """How far the first wall or piece of furniture is, in lengths of the ray, or infinite."""
        group, hit = np.array([1, 0, 0, 0, 0, 0], np.uint8), np.zeros(1, np.int32)  # not TOY_GROUP
        free = mujoco.mj_ray(self.model, self.data, start, ray, group, True, -1, hit)
        return math.inf if free < 0 else free

    def _release(self) -> bool:
        self._solid(self.held, True)
        mujoco.mj_collision(self.model, self.data)
        contact = self.data.contact
        own = (self.model.geom_bodyid[contact.geom] == self._toy_bodies[self.held].id).any(1)
        if (contact.dist[own] < -0.02).any():
            self._solid(self.held, False)  # no room for it: it stays in the hand
            return False
        self.held = None
        return True

    def _carry(self) -> None:
        """The held toy goes where the hand is: ahead of the body, on this side of a wall."""
        x, y, yaw = self.data.qpos[self._agent_qpos]
        hand, ahead = np.array([x, y, HAND_HEIGHT]), np.array([math.cos(yaw), math.sin(yaw), 0])
        reach = min(HAND_AHEAD, max(self._free_way(hand, ahead) - 0.15, RADIUS))
        joint = self.model.joint(self._toy_bodies[self.held].jntadr[0])
        # Turned half aside, so that one sees what it is.
        self.data.qpos[joint.qposadr[0] :][:7] = *(hand + reach * ahead), *about_z(yaw + 1)
        self.data.qvel[joint.dofadr[0] :][:6] = 0

    def _solid(self, toy: int, solid: bool) -> None:
        body = self._toy_bodies[toy]
        geoms = slice(body.geomadr[0], body.geomadr[0] + body.geomnum[0])
        self.model.geom_contype[geoms] = self.model.geom_conaffinity[geoms] = solid

    @property
    def position(self) -> np.ndarray:
        """Where the agent stands on the floor, [2]."""
        return self.data.qpos[self._agent_qpos[:2]]

    def _gap(self) -> float:
        """Metres from the agent's axis to the nearest wall or piece of furniture."""
        x, y = self.position
        X, Y, w, d = np.transpose(self.obstacles)
        pieces = np.hypot(np.maximum(abs(x - X) - w, 0), np.maximum(abs(y - Y) - d, 0))
        return min(x - self.west, self.east - x, y - self.south, self.north - y, *pieces)

    def bearing(self, point: np.ndarray) -> float:
        """The turn to the left (radians) after which the agent faces a point."""
        dx, dy = point - self.position
        angle = math.atan2(dy, dx) - self.data.qpos[self._agent_qpos[2]]
        return math.remainder(angle, 2 * math.pi)

    def toy_position(self, toy: int) -> np.ndarray:
        return self.data.xpos[self._toy_bodies[toy].id]

    def points_on(self, place: str) -> np.ndarray:
        """Where the goal's toy can lie there, apart from the others: [K, 2]."""
        w, d, _ = FURNITURE[place]
        x, y, angle = self.furniture[place]
        c, s = math.cos(angle), math.sin(angle)
        inner = np.linspace(-1, 1, 9)[:, None] * (w - 0.28, d - 0.28)
        local = np.stack(np.meshgrid(*inner.T), -1).reshape(-1, 2)
        points = local @ np.array([[c, s], [-s, c]]) + (x, y)
        return self._apart(points, 0.35)

    def _apart(self, points: np.ndarray, distance: float) -> np.ndarray:
        """Those of points [K, 2] that are farther than that from all toys but the goal's."""
        others = np.array([self.toy_position(toy)[:2] for toy in range(1, len(self.toys))])
        return points[np.linalg.norm(points[:, None] - others, axis=-1).min(1) > distance]

    # ---- Truth

    def _view(self, toy: int) -> tuple[float, float]:
        """A toy's distance from the eye (m) and angle from the middle of the view (radians)."""
        eye = self.data.camera(f"eye{self._tilt}")
        to_toy = self.toy_position(toy) - eye.xpos
        distance = float(np.linalg.norm(to_toy))
        cosine = -eye.xmat[2::3] @ to_toy / distance
        return distance, math.acos(min(max(cosine, -1), 1))

    def in_goal_state(self, goal: Goal) -> bool:
        """Whether the simulator's state is one of the goal."""
        if (goal.colour, goal.kind) not in self.toys:
            return False
        toy = self.toys.index((goal.colour, goal.kind))
        if goal.family == "lift":
            return self.held == toy
        if toy == self.held:
            return False
        return self._found(toy) if goal.family == "find" else self._placed(toy, goal.place)

    @plain_errors()
    def _found(self, toy: int) -> bool:
        distance, angle = self._view(toy)
        if distance > NEAR or angle > math.radians(40):
            return False  # and nothing to draw
        renderer = self._draw()
        renderer.enable_segmentation_rendering()
        geoms = renderer.render()[..., 0]  # [H, W], -1 where there is none
        renderer.disable_segmentation_rendering()
        own = self.model.geom_bodyid[geoms] == self._toy_bodies[toy].id
        seen = np.argwhere(own & (geoms >= 0))
        if len(seen) < SEEN * self.width * self.height:
            return False
        middle = seen.mean(0) / (self.height, self.width)
        return bool((np.abs(middle - 0.5) < CENTRAL).all())

    def _placed(self, toy: int, place: str) -> bool:
        body = self._toy_bodies[toy]
        speed = self.data.qvel[self.model.joint(body.jntadr[0]).dofadr[0] :][:3]
        if np.linalg.norm(speed) > AT_REST:
            return False  # it still falls or rolls
        x, y, z = self.toy_position(toy)
        if place == "toy box":
            X, Y, _ = self.furniture[place]
            return bool(max(abs(x - X), abs(y - Y)) < 0.33 and z < 0.4)
        contact, below = self.data.contact, self.model.body(place).id
        bodies = self.model.geom_bodyid[contact.geom]  # [C, 2]
        up = contact.frame[:, 2]  # z of the normal, from the first body to the second
        rests = (bodies == (below, body.id)).all(1) & (up > 0.7)
        rests |= (bodies == (body.id, below)).all(1) & (up < -0.7)
        return bool(rests.any())

    def _info(self) -> dict:
        info = {"goal": GOALS.index(self.goal), "success": self.in_goal_state(self.goal)}
        if self.all_goals:
            info["reached"] = np.array([self.in_goal_state(goal) for goal in GOALS])
        return info

    # ---- Frames

    def _draw(self) -> mujoco.Renderer:
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self.model, self.height, self.width)
        self._renderer.update_scene(self.data, f"eye{self._tilt}")
        return self._renderer

    @plain_errors()
    def _frame(self) -> np.ndarray:
        return self._draw().render()

    def render(self) -> np.ndarray | None:
        return self._frame() if self.render_mode is not None else None

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def route(env: PlayhouseEnv, targets: np.ndarray, near: float, far: float) -> list[np.ndarray]:
    """Way points on free floor to a place `near` to `far` (m) from one of the targets [K, 2], and
    that target as the last of them."""
    cell, margin = 0.1, RADIUS + 0.06
    x = np.arange(env.west + margin, env.east - margin, cell)
    y = np.arange(env.south + margin, env.north - margin, cell)
    grid = np.stack(np.meshgrid(x, y, indexing="ij"), -1)  # [X, Y, 2]
    free = np.ones(grid.shape[:2], bool)
    for *centre, w, d in env.obstacles:
        free &= ~(np.abs(grid - centre) < (w + margin, d + margin)).all(-1)
    from_agent = np.linalg.norm(grid - env.position, axis=-1)
    start = np.unravel_index(np.where(free, from_agent, np.inf).argmin(), free.shape)
    distance = np.linalg.norm(grid[:, :, None] - targets, axis=-1)  # [X, Y, K]
    arrived = (near < distance) & (distance < far)
    arrived &= np.sign(grid[..., :1]) == np.sign(targets[:, 0])  # not through the wall
    came_from, queue, ends = {start: None}, deque([start]), arrived.any(-1)
    while queue:
        i, j = here = queue.popleft()
        if ends[here]:
            way = [targets[arrived[here].argmax()]]
            while here is not None:
                way.append(grid[here])
                here = came_from[here]
            return way[::-1]
        for there in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            inside = 0 <= there[0] < len(x) and 0 <= there[1] < len(y)
            if inside and free[there] and there not in came_from:
                came_from[there] = here
                queue.append(there)
    raise NoRoom


def scripted(env: PlayhouseEnv, goal: Goal) -> Iterator[int]:
    """The actions of someone who knows the state and the plan of the home."""
    act = ACTIONS.index

    def face(target: np.ndarray) -> Iterator[int]:
        while abs(angle := env.bearing(target)) > TURN / 2:
            yield act("left" if angle > 0 else "right")

    def walk(targets: np.ndarray, distance: tuple[float, float]) -> Iterator[int]:
        *way, target = route(env, targets, *distance)
        for point in way:
            for _ in range(6):
                if np.linalg.norm(point - env.position) < 0.12:
                    break
                yield from face(point)
                yield act("forward")
        yield from face(target)

    toy = env.toys.index((goal.colour, goal.kind))
    yield from walk(env.toy_position(toy)[None, :2], GRAB_FROM)
    for tilt in ("stay", "down", "up", "up"):
        yield act(tilt)
        if goal.family != "find":
            yield act("grab")
        if env.held == toy or goal.family == "find" and env.in_goal_state(goal):
            break
    if goal.family == "place":
        yield from walk(env.points_on(goal.place), RELEASE_FROM)
        yield act("release")
        yield from [act("stay")] * 10  # until it lies still


gym.register("PlayhouseCLIP-v0", PlayhouseEnv, max_episode_steps=MAX_STEPS)


def tour(path: Path, seed: int) -> list[str]:
    """A video of a walk that finds a toy, lifts it and places it; returns what it missed."""
    goals = [goal for goal in TRAIN_GOALS if goal.family == "place"]
    goal = goals[seed % len(goals)]
    env = PlayhouseEnv("rgb_array", width=VIDEO_SIZE, height=VIDEO_SIZE)
    try:
        film, missed = [env.reset(seed=seed, options={"goal": goal})[0]], []
    except Exception as error:  # whatever the GL library raises
        gl = os.environ.get("MUJOCO_GL")
        check(False, f"MUJOCO_GL={gl}: --tour cannot render here ({error}). {GL_REMEDY}")
    for stage in (*(Goal(family, goal.colour, goal.kind) for family in ("find", "lift")), goal):
        film += [env.step(action)[0] for action in scripted(env, stage)]
        if not env.in_goal_state(stage):
            missed.append(stage.prompt)
        film += film[-1:] * 10  # a second to look at it
    env.close()
    imageio.mimwrite(path, film, fps=10, macro_block_size=1)
    return missed


def evenly(goals: Sequence[Goal]) -> list[Goal]:
    """The goals, those of smaller families repeated, so that families are drawn alike."""
    sizes = Counter(goal.family for goal in goals)
    most = max(sizes.values())
    return [goal for goal in goals for _ in range(most // sizes[goal.family])]


def goals_for(args: Args, goals: Sequence[Goal]) -> list[Goal]:
    return [goal for goal in goals if args.family in ("all", goal.family)]


def make_envs(args: Args, num_envs: int, size: int) -> gym.vector.AsyncVectorEnv:
    """One home in each worker process; frames come back through shared memory."""
    main_process = os.getpid()

    def make_env():
        if os.getpid() != main_process:  # AsyncVectorEnv makes one there too, for its spaces
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.nice(10)  # on few cores workers would keep the main process from its updates
            parent = multiprocessing.parent_process()  # when it is gone, so is the worker
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        return gym.make(
            "PlayhouseCLIP-v0",
            disable_env_checker=True,
            goals=goals_for(args, TRAIN_GOALS),
            all_goals=args.reward == "env" or args.calibrate_with_labels,
            width=size,
            height=size,
        )

    try:
        return gym.vector.AsyncVectorEnv(
            [make_env] * num_envs,
            context=START_METHOD,
            autoreset_mode=gym.vector.AutoresetMode.DISABLED,
        )
    except (OSError, EOFError) as error:  # too many files or processes, or one was killed
        check(False, f"--num-envs {args.num_envs}: workers do not start ({error!r}); lower it")


@contextmanager
def worker_failures(envs: gym.vector.AsyncVectorEnv, stage: str):
    """A worker that dies, hangs or raises ends the run in one line, after the traceback that
    gymnasium prints of what it raised; no process is left behind."""
    try:
        yield
    except Exception as error:
        time.sleep(0.5)  # a pipe breaks a little before its process is gone
        # gymnasium sets the pipe of a worker that raised to None and stops it: dead, but no cause.
        raised = [i for i, pipe in enumerate(envs.parent_pipes) if pipe is None]
        silent = [i for i, pipe in enumerate(envs.parent_pipes) if pipe and not pipe.poll()]
        dead = [] if raised else [i for i, p in enumerate(envs.processes) if not p.is_alive()]
        for process in envs.processes:
            process.kill()  # one that hangs in the driver ignores SIGTERM
        envs.closed = True  # its own close() would wait for them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        who, what = (dead, "died") if dead else (raised or silent, "failed")
        raise SystemExit(
            f"{stage}: worker {who} of {envs.num_envs} {what} ({reason}). MUJOCO_GL is "
            f"{os.environ.get('MUJOCO_GL')}: try a lower --num-envs, MUJOCO_GL=osmesa, or a longer "
            f"--worker-timeout. {GL_REMEDY}"
        ) from None


def family_scores(rewards: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of each goal among its family's training goals: rewards [..., 240] -> same shape.

    A held-out goal competes with all of them, and they never with it: the negatives stay fixed.
    """
    p = torch.empty_like(rewards)
    for train, heldout in zip(COLUMNS["train"].values(), COLUMNS["heldout"].values(), strict=True):
        p[..., train] = contrastive_reward(rewards[..., train], temperature)
        others = torch.logsumexp(rewards[..., train] / temperature, -1, keepdim=True)
        p[..., heldout] = torch.sigmoid(rewards[..., heldout] / temperature - others)
    return p


TRAINING, SELECTION, REPORT, CALIBRATION, NOISE = range(5)  # uses of --seed, each a stream


def stream_seed(*key: int) -> int:
    """32 bits from --seed, the use, and what counts within it: a stream of its own for each."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def random_play(envs, judge, key: tuple, args: Args):
    """Scores [M, 240] of the frames of random episodes and, if the environments tell, whether the
    goals are reached in them [M, 240], else None. It grabs nothing: a toy that it happened to hold
    for a while would be half of all that scores high, and count as a mistake."""
    rng, scores, reached = np.random.default_rng(key), [], []
    harmless = [i for i, action in enumerate(ACTIONS) if action != "grab"]
    for first in range(0, args.calibration_episodes, envs.num_envs):
        seeds = [stream_seed(*key, first + i) for i in range(envs.num_envs)]
        with worker_failures(envs, "calibration"):
            envs.reset_async(seed=seeds)
            envs.reset_wait(timeout=args.worker_timeout)
        for _ in range(MAX_STEPS):
            with worker_failures(envs, "calibration"):
                envs.step_async(rng.choice(harmless, size=envs.num_envs))
                frames, *_, info = envs.step_wait(timeout=args.worker_timeout)
            scores.append(judge([frames], [None], [info])[0])
            if "reached" in info:
                reached.append(torch.from_numpy(info["reached"]))
    return torch.cat(scores), torch.cat(reached).to(scores[0].device) if reached else None


def calibrate(scores: torch.Tensor, reached: torch.Tensor | None, rate: float) -> torch.Tensor:
    """beta [240]: for each family, what a share `rate` of the scores [M, 240] of its training goals
    exceeds. `reached` [M, 240], if known, keeps the frames of a goal out of its negatives."""
    beta = torch.zeros(len(GOALS))
    for family in FAMILIES:
        train = COLUMNS["train"][family]
        negatives = scores[:, train] if reached is None else scores[:, train][~reached[:, train]]
        value = np.quantile(negatives.cpu().numpy(), 1 - rate, method="higher")
        beta[train + COLUMNS["heldout"][family]] = float(value)
    return beta


def after_stage_one(reached: torch.Tensor, carried: torch.Tensor, stage_one: torch.Tensor):
    """What of `reached` [T, N, 240] counts: a place goal only where CLIP saw the toy in the hand
    before, in the same episode, and does not see it there now. Also returns the new `carried`.

    `stage_one` [240] is the lift goal of each place goal, and every other goal itself. `carried`
    [N, 240]: was stage one reached before these steps?
    """
    in_hand = reached[..., stage_one]  # [T, N, 240]
    carried = torch.cat([carried[None], in_hand]).cumsum(0) > 0  # [T + 1, N, 240]
    one_stage = stage_one == torch.arange(len(GOALS), device=stage_one.device)
    return reached & (carried[:-1] & ~in_hand | one_stage), carried[-1]


# What the network knows of the past: how often each action was taken of late, as running averages
# over the last step, the last 5 or so, and the last 20. Without it an agent that sees no toy turns
# left and right for ever.
RATES = (1.0, 0.2, 0.05)
TRACES = len(RATES) * len(ACTIONS)


def remember(traces: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """The traces [N, 27] after one more action [N]."""
    rates = torch.tensor(RATES, device=traces.device)[:, None]
    taken = F.one_hot(action, len(ACTIONS))[:, None]  # [N, 1, 9]
    return traces.unflatten(1, (len(RATES), -1)).lerp(taken.float(), rates).flatten(1)


# Each action in a mirror
MIRRORED = [ACTIONS.index({"left": "right", "right": "left"}.get(a, a)) for a in ACTIONS]


def mirror(seen: torch.Tensor, traces: torch.Tensor, mirrored: torch.Tensor):
    """States, what is seen [B, h, w, C k] and traces [B, 27], with left and right exchanged;
    `mirrored` is MIRRORED on their device."""
    by_rate = traces.unflatten(1, (len(RATES), -1))  # [B, 3, 9]
    return seen.flip(2), by_rate[..., mirrored].flatten(1)


def atomic_save(state: dict, path: Path) -> None:
    """A kill at any moment leaves the old file or the new one, never half of one."""
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


class Replay:
    """A ring of blocks: K steps of all N environments, and the frames that follow the last of them.

    Environments are reset only between blocks, so that within one s' is simply the next frame, and
    goal and episode are constant. Each step keeps which of all training goals it reached. Step t,
    counted from the run's first, is row t % K of block t // K, which lies at slot t // K % M.
    """

    def __init__(
        self, capacity: int, steps: int, seen: torch.Tensor, stage_one: torch.Tensor, device: str
    ):
        """`seen` [N, h, w, C k]: like what the network sees of N environments; `stage_one` [240]:
        the goals that come first."""
        K, N = steps, len(seen)
        self.stage_one = stage_one
        self.slots = M = capacity // (N * K)
        self.num_envs, self.steps, self.device = N, K, device
        self.head = 0  # the next block
        columns = COLUMNS["train"].values()  # of each family's goals
        self.columns = [torch.tensor(goals, device=device) for goals in columns]
        rings = {
            "seen": ((M, K + 1, *seen.shape), seen.dtype),
            "traces": ((M, K + 1, N, TRACES), torch.float16),  # of the actions before
            "action": ((M, K, N), torch.uint8),
            "reached": ((M, K, N, len(TRAIN_GOALS)), torch.bool),
            "goal": ((M, N), torch.int64),
            "age": ((M, N), torch.int64),  # steps of the episode before the block
            "last": ((M, N), torch.int64),  # the last block of the same episode, so far
            # of each family: 0, or 1 + a goal that this step newly reaches
            "arrival": ((M, K, N, len(FAMILIES)), torch.int64),
        }
        need = sum(math.prod(shape) * dtype.itemsize for shape, dtype in rings.values())  # bytes
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // LOCAL_WORLD_SIZE
        if device == "cuda":
            memory = torch.cuda.mem_get_info()[0]
        check(
            need < memory,
            f"--buffer-size {capacity}: takes {need / 2**30:.1f} GiB, and the {device} has "
            f"{memory / 2**30:.1f} GiB; lower it",
        )
        self.data = {k: torch.zeros(s, dtype=t, device=device) for k, (s, t) in rings.items()}

    def add(self, generator: torch.Generator, **block: torch.Tensor) -> None:
        """seen [K + 1, N, h, w, C k], traces [K + 1, N, 27], action [K, N], reached [K, N, 190],
        goal [N], age [N]."""
        d, slot = self.data, self.head % self.slots
        for name, value in block.items():
            d[name][slot] = value
        # Running episodes began age / K blocks ago: all blocks since then have this as their last.
        ago = (self.head - torch.arange(self.slots, device=self.device)) % self.slots  # [M]
        d["last"][ago[:, None] * self.steps <= block["age"]] = self.head
        # A goal is arrived at where it holds and did not a step before. The frame of a reset is not
        # scored, the next one stands in for it: what holds at once was not arrived at.
        begins, reached = block["age"][:, None] == 0, block["reached"]  # [N, 1], [K, N, 190]
        before = torch.where(begins, reached[0], d["reached"][slot - 1, -1])  # [N, 190]
        arrives = reached & ~torch.cat([before[None], reached[:-1]])
        # One for each family is kept, by lot: two at once are rare, and with a softmax never.
        lots = arrives * torch.rand(arrives.shape, generator=generator, device=self.device)
        for family, columns in enumerate(self.columns):
            best, which = lots[..., columns].max(-1)  # [K, N]
            d["arrival"][slot, ..., family] = (best > 0) * (1 + columns[which])
        self.head += 1
        self._list_arrivals()

    def _list_arrivals(self) -> None:
        """Of all arrivals slot, step in its block, environment and family [E, 4]; and the chance of
        each to be drawn, by which families are drawn alike."""
        there = self.data["arrival"] > 0
        there[self.head % self.slots] = False  # the oldest block is not sampled
        self.arrivals = there.nonzero()
        family = self.arrivals[:, 3]
        self.chances = (1 / family.bincount())[family]

    def sample(self, batch_size: int, relabel: float, n_step: int, generator):
        """Transitions of `n_step` steps, fewer where the goal is reached or the episode ends.

        Returns s; a [B], the first action; r [B] in {0, 1}, whether the goal is reached at s'; s';
        the number of steps from s to s' [B]; the goal [B]. A state is what is seen [B, h, w, C k]
        and the traces of the actions before it [B, 27].
        """
        d, M, K = self.data, self.slots, self.steps
        random = {"generator": generator, "device": self.device}
        oldest = max(0, self.head - M + 1)  # the block before it is only looked back into
        t = oldest * K + torch.randint((self.head - oldest) * K, (batch_size,), **random)
        env = torch.randint(self.num_envs, (batch_size,), **random)
        goal = d["goal"][t // K % M, env]
        if relabel > 0 and len(self.arrivals):
            # Hindsight: draw a family (most toys are only found), a step at which one of its goals
            # was reached, and a step of the same episode on the way to it.
            drawn = self.chances.multinomial(batch_size, replacement=True, generator=generator)
            slot, k, its_env, family = self.arrivals[drawn].unbind(1)
            its_goal = d["arrival"][slot, k, its_env, family] - 1
            block = self.head - 1 - (self.head - 1 - slot) % M  # number of the block in that slot
            begin, arrival = block * K - d["age"][slot, its_env], block * K + k  # of the episode
            earliest = begin.clamp(min=oldest * K)  # the first of its steps that is still here
            lots = torch.rand(batch_size, 4, **random) * (arrival - earliest + 1)[:, None]
            ways = earliest[:, None] + lots.long()  # [B, 4]
            # One of four where the goal does not hold yet: an episode for it would have ended.
            before = (ways - 1).maximum(begin[:, None])
            held = self._at("reached", before, its_env[:, None], its_goal[:, None])
            way = ways.gather(1, held.int().argmin(1, keepdim=True))[:, 0]
            # Who is to place a toy and has it not in the hand goes for that first. As with the
            # goals that were pursued, half of those steps are trained for the place all the same.
            stage = self.stage_one[its_goal]
            empty = ~self._at("reached", (way - 1).maximum(begin), its_env, stage)
            lifts = empty & (torch.rand(batch_size, **random) < 0.5)
            its_goal = torch.where(lifts, stage, its_goal)
            use = ~held.all(1) & (torch.rand(batch_size, **random) < relabel)
            t = torch.where(use, way, t)
            env = torch.where(use, its_env, env)
            goal = torch.where(use, its_goal, goal)
        # Up to n_step steps, none past the end of the episode: there its last one is repeated.
        left = (d["last"][t // K % M, env] + 1) * K - t  # [B]
        ahead = torch.arange(n_step, device=self.device)
        times = t[:, None] + torch.minimum(ahead, left[:, None] - 1)
        reached = self._at("reached", times, env[:, None], goal[:, None])  # [B, n_step]
        r, first = reached.any(1), reached.int().argmax(1, keepdim=True)
        end = torch.where(r, times.gather(1, first)[:, 0], times[:, -1])  # the step to s'
        s = self._at("seen", t, env), self._at("traces", t, env).float()
        s_next = self._at("seen", end, env, row=1), self._at("traces", end, env, row=1).float()
        return s, self._at("action", t, env).long(), r.float(), s_next, end + 1 - t, goal

    def _at(self, name: str, t: torch.Tensor, *index: torch.Tensor, row: int = 0) -> torch.Tensor:
        """What the ring `name` has of step t; `seen` and `traces` of what follows it with row=1."""
        return self.data[name][(t // self.steps % self.slots, t % self.steps + row, *index)]

    def save(self, folder: Path, first: int) -> None:
        """Append blocks [first, head) as one file; what is on disk already is not written again."""
        blocks = torch.arange(max(first, self.head - self.slots), self.head) % self.slots
        chunk = {name: ring[blocks].cpu() for name, ring in self.data.items()}
        atomic_save(chunk, folder / f"{first}-{self.head}.pt")
        for path in folder.glob("*-*.pt"):
            if int(path.stem.split("-")[1]) <= first - self.slots:  # no use to the old last.pt
                path.unlink()

    def load(self, folder: Path, head: int) -> None:
        self.head, filled = head, 0
        ends = {int(path.stem.split("-")[1]): path for path in folder.glob("*-*.pt")}
        for end in sorted(ends):
            if end > head:  # its checkpoint was never finished
                ends[end].unlink()
                continue
            try:
                chunk = torch.load(ends[end], map_location=self.device, weights_only=True)
            except Exception as error:
                remedy = f"cannot load {ends[end]} ({error!r}); restore it"
                check(False, f"--resume {folder.parents[1]}: {remedy}")
            blocks = torch.arange(end - len(chunk["action"]), end)
            for name, ring in self.data.items():
                ring[blocks % self.slots] = chunk[name]
            filled += int((blocks >= head - self.slots).sum())
        self._list_arrivals()
        remedy = "files are missing in its replay/; restore them"
        check(filled >= min(head, self.slots), f"--resume {folder.parents[1]}: {remedy}")


class QNetwork(nn.Module):
    """Q(s, g, a) of what is seen [B, h, w, C k], the traces of the actions before [B, 27] and the
    texts of the goal [B, 4, C], as `goal_texts` has them -> [B, 9]. Entries are of about 1.

    Of CLIP's cells two maps say where the goal's toy and its place are: the products of each cell
    with their names. What else it knows of the goal is what to do with them, which is common to all
    toys: so it cannot learn by heart how one of them was reached in one home.
    """

    def __init__(self, seen: torch.Tensor, text_dim: int):
        super().__init__()
        _, height, width, channels = seen.shape
        self.stem, maps = None, 2 * channels // text_dim
        if seen.dtype == torch.uint8:  # pixels, [B, H, W, 3 k]
            self.stem = nn.Sequential(
                nn.Conv2d(channels, 32, 4, stride=4), nn.ReLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            )  # fmt: skip
            height, width, channels, maps = height // 8, width // 8, 64, 0
        self.cells = nn.Linear(channels, 8)
        self.convolution = nn.Conv2d(8 + maps, 16, 3, padding=1)
        self.hidden = nn.Linear(16 * height * width, 256)
        self.traces = nn.Linear(TRACES, 256)
        self.gate = nn.Linear(text_dim, 256)
        self.head = nn.Linear(256, len(ACTIONS))

    def forward(self, seen: torch.Tensor, traces: torch.Tensor, texts: torch.Tensor):
        goal, what, x = texts[:, 0], texts[:, 1], seen.float()
        if self.stem is not None:  # which shows no toy's name: the gate has to know it
            x, what = self.stem(x.permute(0, 3, 1, 2) / 255 - 0.5).permute(0, 2, 3, 1), goal
        maps = [F.relu(self.cells(x))]
        if self.stem is None:
            cells = x.reshape(len(x), -1, texts.shape[-1])  # [B, h w k, C]
            names = texts[:, 2:] / texts.shape[-1] ** 0.5  # the products are cosines times its root
            maps.append((cells @ names.mT).view(*x.shape[:3], -1))  # [B, h, w, 2 k]
        x = F.relu(self.convolution(torch.cat(maps, -1).permute(0, 3, 1, 2)))
        x = F.relu(self.hidden(x.flatten(1)) + self.traces(traces))
        return self.head(x * torch.sigmoid(self.gate(what)))


def goal_texts(clip: CLIPReward) -> torch.Tensor:
    """Embeddings [240, 4, D] of each goal: of its prompt; of what to do, the mean of the training
    prompts of that family and place; of its toy's name; of its place's name, 0 if it has none. All
    of them less the mean of all training prompts.

    The prompt alone would not say where the toy is: "a red ball in the hand" is far from the cells
    that show a red ball.
    """
    prompts = clip.goal[: len(TRAIN_GOALS)]
    shared = prompts.mean(0)
    kinds = [(goal.family, goal.place) for goal in GOALS]  # the training goals come first
    alike = [[i for i in range(len(prompts)) if kinds[i] == kind] for kind in kinds]
    what = torch.stack([prompts[columns].mean(0) for columns in alike])
    toy = clip.goal[[GOALS.index(Goal("find", goal.colour, goal.kind)) for goal in GOALS]]
    names = clip.encode_text([f"a {place}" for place in PLACES])
    texts = F.normalize(torch.stack([clip.goal, what, toy], 1) - shared, dim=-1)
    places = F.pad(F.normalize(names - shared, dim=-1), (0, 0, 0, 1))  # [4, D]
    place = places[[[*PLACES, None].index(goal.place) for goal in GOALS]]
    return torch.cat([texts, place[:, None]], 1)


def shrink(frames: np.ndarray, size: int, device) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> uint8 [N, size, size, 3], the mean of each square of pixels."""
    x = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(x, size).permute(0, 2, 3, 1).byte()


def collective(call: Callable, *args) -> None:
    """A call that every rank makes. If another one died gloo raises, and this one ends in one line;
    with NCCL it is torchrun that ends it."""
    try:
        call(*args)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(
            f"rank {RANK} of {WORLD_SIZE}: cannot reach the others ({reason}); --resume continues "
            "a run from its last checkpoint"
        ) from None


@torch.compiler.disable
def average(*tensors: torch.Tensor) -> None:
    """Replaces each tensor by its mean over all ranks."""
    if WORLD_SIZE > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        collective(dist.all_reduce, flat)
        parts = (flat / WORLD_SIZE).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def gather(value) -> list:
    """The values of all ranks, in their order."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        collective(dist.all_gather_object, values, value)
    return values


class CUDAGraph:
    """A function of tensors, of the same shapes at each call, whose kernels are launched as one.

    Three calls run as they are, to make what is made once (Adam's state, workspaces); the fourth is
    captured, and from then on replayed. The next call overwrites the outputs of the last.
    """

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: torch.Tensor):
        self.calls += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls <= 3:
                self.outputs = self.function(*inputs)
            else:
                if self.calls == 4:  # capturing alone runs nothing
                    self.inputs = [x.clone() for x in inputs]
                    options = {"stream": self.stream, "capture_error_mode": "thread_local"}
                    with torch.cuda.graph(self.graph, **options):  # while other threads go on
                        self.outputs = self.function(*self.inputs)
                torch._foreach_copy_(self.inputs, inputs)
                self.graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)
        return self.outputs


def evaluate(
    envs, play, episodes: int, key: tuple, goals: Sequence[Goal],
    see, judge, clip_success, args: Args, device: str,
):  # fmt: skip
    """Play `episodes` to the time limit: `play(stack, traces, goal, scores, generator) -> action`.
    Its scores [N, 240] are what `judge(frames, embeddings, infos)` made of the last frames of the
    block before, -inf in the first: as in training, a goal's stage changes between blocks alone.

    An episode succeeds if the simulator's state is ever one of its goal; `clip_success(scores
    [T, N, 240], goal)`, if given, says whether CLIP thinks so. Returns the means over the episodes,
    also by family, and the frames of the first episode [T, H, W, 3].
    """
    results, film = defaultdict(list), None
    generator = torch.Generator(device).manual_seed(stream_seed(*key))
    for first in range(0, episodes, envs.num_envs):
        seeds = [stream_seed(*key, first + i) for i in range(envs.num_envs)]
        with worker_failures(envs, "evaluation"):
            envs.reset_async(seed=seeds, options={"goals": evenly(goals)})
            frame, info = envs.reset_wait(timeout=args.worker_timeout)
        goal, success = torch.from_numpy(info["goal"]).to(device), np.zeros(envs.num_envs, bool)
        seen, _ = see(frame)
        stack = seen.repeat(1, 1, 1, args.frame_stack)
        traces = torch.zeros(envs.num_envs, TRACES, device=device)
        frames, scores = [frame[0].copy()], []
        judged = torch.full((envs.num_envs, len(GOALS)), -math.inf, device=device)
        for t in range(1, MAX_STEPS + 1):
            a = play(stack, traces, goal, judged, generator)
            action = a.cpu().numpy()
            with worker_failures(envs, "evaluation"):
                envs.step_async(action)
                frame, *_, info = envs.step_wait(timeout=args.worker_timeout)
            frames.append(frame[0].copy())
            seen, s = see(frame)
            scores.append(judge([frame], [s], [info])[0])
            if t % args.score_every == 0:  # the block is over
                judged = scores[-1]
            stack = torch.cat([stack[..., seen.shape[-1] :], seen], -1)
            traces = remember(traces, a)
            success |= info["success"]
        film = np.stack(frames) if film is None else film
        by = {"success_rate": success}
        if clip_success is not None:
            by["clip_success"] = clip_success(torch.stack(scores), goal)
        for i in range(min(envs.num_envs, episodes - first)):
            for name, values in by.items():
                results[name].append(values[i])
                results[f"{name}_{GOALS[goal[i]].family}"].append(values[i])
    means = {name: float(np.mean(results[name])) for name in sorted(results)}
    return means, film


def write_video(film: np.ndarray, path: Path, writer: SummaryWriter | None, step: int) -> None:
    """An mp4, and in TensorBoard a small animation (torch's own needs moviepy 1)."""
    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, film, fps=10, macro_block_size=1)
    if writer is not None:
        small = film[::2, ::2, ::2]
        gif = imageio.mimwrite("<bytes>", small, format="gif", duration=200, loop=0)
        image = Summary.Image(
            height=small.shape[1], width=small.shape[2], colorspace=3, encoded_image_string=gif
        )
        value = Summary.Value(tag="eval/video", image=image)
        writer.file_writer.add_summary(Summary(value=[value]), step)


def load_checkpoint(run: Path, name: str, option: str) -> dict:
    try:
        state = torch.load(run / name, map_location="cpu", weights_only=True)
        same = state["args"].keys() == asdict(Args()).keys() and state.get("layout") == LAYOUT
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        check(False, f"{option} {run}: cannot load its {name} ({reason}); name a run that has one")
    check(same, f"{option} {run}: another version of this script made its {name}; take that one")
    return state


def parse_args() -> Args:
    """The command line; for a run that exists, on top of the arguments it was started with."""
    args = tyro.cli(Args, description=__doc__)
    both = args.resume and args.evaluate
    check(not both, f"--evaluate {args.evaluate}: not together with --resume; one after the other")
    run = args.resume or args.evaluate
    if run is None:
        return args
    # What may differ from the run's own arguments; the rest would make it another run.
    # The CLIP may lie elsewhere by now; load_agent checks that it is the same one.
    may_differ = {"resume", "evaluate", "device", "worker_timeout", "clip_model", "compile"}
    if args.resume:
        state = load_checkpoint(run, "last.pt", "--resume")
        may_differ |= {"total_timesteps", "capture_video", "track"}
        ranks = len(state["ranks"])
        remedy = "start as many with torchrun"
        check(ranks == WORLD_SIZE, f"--resume {run}: has {ranks} rank(s); {remedy}")
    else:
        state = load_checkpoint(run, "best.pt", "--evaluate")
        may_differ |= {"final_episodes", "num_envs", "precision", "policy_temperature"}
    saved = Args(**state["args"])
    saved.output = Path(saved.output)
    args = tyro.cli(Args, default=saved, description=__doc__)
    for name, old in asdict(saved).items():
        new = getattr(args, name)
        check(
            old == new or name in may_differ,
            f"--{name.replace('_', '-')} {new}: {run} was started with {old}; leave it out",
        )
    return args


def main() -> None:
    args = parse_args()
    check_args(args)
    if args.tour:
        missed = tour(args.output, args.seed)
        print(f"video: {args.output}")
        if missed:
            raise SystemExit(f"--tour: not reached in this home: {', '.join(missed)}")
        return

    # ---- Devices, workers and ranks
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = args.device if args.device != "auto" else "cuda" if gpus else "cpu"
    remedy = "take cpu, install a CUDA build of torch, or lower --nproc-per-node"
    check(device == "cpu" or gpus > LOCAL_RANK, f"--device {device}: {gpus} GPU(s) here; {remedy}")
    if args.precision == "auto":  # settled here, so that a resumed run keeps it
        args.precision = auto_precision(device)
    # The workers are forked before this process touches CUDA, and never touch it themselves.
    envs = make_envs(args, args.num_envs, args.frame_size)
    record = RANK == 0 and (args.capture_video or args.evaluate is not None)
    video_envs = make_envs(args, 1, VIDEO_SIZE) if record else None
    for workers in filter(None, (envs, video_envs)):  # can all of them draw here?
        with worker_failures(workers, "first frame"):
            workers.reset_async()
            workers.reset_wait(timeout=args.worker_timeout)
    if device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # they wait for evaluations

    # ---- CLIP, and the networks
    try:  # with --reward env for the prompts' embeddings, and for what the policy sees
        clip = CLIPReward(
            args.clip_model, [goal.prompt for goal in GOALS], args.baseline, args.alpha,
            device=device, precision=args.precision, compile=args.compile,
        )  # fmt: skip
        blank = np.zeros((args.num_envs, args.frame_size, args.frame_size, 3), np.uint8)
        if args.policy_input == "clip":
            clip.encode_maps(blank)
    except ValueError as error:
        check(False, str(error))
    text = goal_texts(clip)  # [240, 4, D]
    train_goals, heldout_goals = goals_for(args, TRAIN_GOALS), goals_for(args, HELDOUT_GOALS)

    torch.backends.cudnn.allow_tf32 = args.precision == "bf16"  # in convolutions, on CUDA
    torch.manual_seed(args.seed)
    # The network sees CLIP's embeddings along the (at most 128) directions that the texts span.
    named = text[: len(TRAIN_GOALS)].flatten(0, 1)
    axes = torch.linalg.svd(named, full_matrices=False).Vh[:128]  # [C, D], orthonormal
    axes *= len(axes) ** 0.5  # entries of about 1 are learned from faster
    # The signs of singular vectors are arbitrary, so all ranks take those of the first.
    projection = gather(axes.T.cpu())[0].to(device)  # [D, C]

    def see(frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the network sees of frames [N, H, W, 3]: [N, h, w, C], and CLIP's embeddings [N, D]
        if they come with it."""
        if args.policy_input == "pixels":
            return shrink(frames, args.policy_size, device), None
        s, maps = clip.encode_maps(frames)
        return (maps @ projection).half(), s

    example, _ = see(blank)
    stack = example.repeat(1, 1, 1, args.frame_stack)  # [N, h, w, C k], what the network sees
    q_network = QNetwork(stack, projection.shape[1]).to(device)
    target = copy.deepcopy(q_network).requires_grad_(False)
    # The learning rate is a tensor, as --compile would make a number a constant; capturable lets
    # AdamW step inside a CUDA graph.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    adamw = {"lr": learning_rate, "fused": True, "capturable": device == "cuda"}
    adamw["weight_decay"] = args.weight_decay
    optimizer = torch.optim.AdamW(q_network.parameters(), **adamw)
    # What a score has to exceed: the truth is 0 or 1, and what is unset is calibrated or loaded.
    threshold = 0.5 if args.reward == "env" else args.beta or 0.0
    beta = torch.full((len(GOALS),), threshold, device=device)
    generator = torch.Generator(device).manual_seed(stream_seed(args.seed, NOISE, RANK))

    # ---- Scores of frames, goals to pursue, actions
    temperature = args.temperature or clip.temperature
    stages = STAGE_ONE if args.place_after_lift else range(len(GOALS))
    stage_one = torch.tensor(stages, device=device)
    trained = torch.tensor([args.family in ("all", goal.family) for goal in GOALS], device=device)
    trained[stage_one[trained]] = True

    def judge(frames, embeddings, infos) -> torch.Tensor:
        """CLIP's scores of T steps for all goals, [T, N, 240], or with --reward env the truth. The
        frames' embeddings may be known, T of [N, D] or None."""
        if args.reward == "env":
            return torch.from_numpy(np.stack([i["reached"] for i in infos])).to(device).float()
        if embeddings[0] is None:
            s = clip.encode_frames(np.concatenate(frames)).unflatten(0, (len(frames), -1))
        else:
            s = torch.stack(embeddings)  # [T, N, D]
        rewards = goal_baseline_reward(s, clip.goal, clip.baseline, args.alpha)
        return family_scores(rewards, temperature) if args.reward == "contrastive" else rewards

    def probabilities(q: torch.Tensor, temperature: float) -> torch.Tensor:
        """Probabilities of the actions, [B, 9]. Q falls by gamma with each step to the goal; its
        logarithm makes a detour cost the same from afar, where all Q are small."""
        return F.softmax(q.clamp(min=0.01).log() / temperature, -1)

    def pursued(goal: torch.Tensor, reached: torch.Tensor) -> torch.Tensor:
        """What to go for [N] on the way to goals [N], when those [N, 240] are reached: the first
        stage until that is."""
        stage = stage_one[goal]
        return torch.where(reached.gather(1, stage[:, None])[:, 0], goal, stage)

    @torch.no_grad()
    def policy(stack, traces, goal, generator: torch.Generator) -> torch.Tensor:
        """Actions [N], drawn from the softmax over log Q."""
        q = q_network(stack, traces, text[goal] @ projection)
        p = probabilities(q, args.policy_temperature)
        # The method of torch.multinomial, but NaN passes through it, for stop_if_nan to report.
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)

    def play(stack, traces, goal, scores, generator: torch.Generator) -> torch.Tensor:
        return policy(stack, traces, pursued(goal, scores > beta), generator)

    def play_randomly(stack, traces, goal, scores, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(ACTIONS), goal.shape, generator=generator, device=device)

    def clip_success(scores: torch.Tensor, goal: torch.Tensor) -> np.ndarray:
        """Whether CLIP's reward was ever 1 in N episodes with scores [T, N, 240]."""
        nothing_carried = torch.zeros_like(scores[0], dtype=torch.bool)
        reached, _ = after_stage_one(scores > beta, nothing_carried, stage_one)
        return reached[:, torch.arange(len(goal)), goal].any(0).cpu().numpy()

    # ---- Evaluation
    by_clip = clip_success if args.reward != "env" else None
    assess = partial(evaluate, see=see, judge=judge, clip_success=by_clip, args=args, device=device)

    def load_agent(state: dict, run: Path) -> None:
        """Network, projection and beta of a checkpoint, which must be of this CLIP."""
        saved = state["prompts"].to(device)
        same = saved.shape == clip.goal.shape and (saved * clip.goal).sum(-1).min() > 0.9999
        check(same, f"--clip-model {args.clip_model}: not the CLIP of {run}; name that one")
        q_network.load_state_dict(state["q_network"])
        projection.copy_(state["projection"])
        beta.copy_(state["beta"])

    def final_report(run: Path) -> None:
        """The best and the last agent, beside a random one, in unseen homes."""
        report, key = defaultdict(dict), (args.seed, REPORT)
        # Of best.pt the random one needs only beta. Best comes last: the videos show it.
        for name, player in (("random", play_randomly), ("last", play), ("best", play)):
            file = "last.pt" if name == "last" else "best.pt"
            if not (run / file).exists():
                continue  # killed between its first evaluation and its first checkpoint
            load_agent(load_checkpoint(run, file, "--evaluate"), run)
            for split, goals in (("train", train_goals), ("heldout", heldout_goals)):
                report[name][split], _ = assess(envs, player, args.final_episodes, key, goals)
                numbers = ", ".join(f"{k} {v:.3f}" for k, v in report[name][split].items())
                print(f"{name:>6}, {split:>7} goals: {numbers}")
        if args.evaluate is None:  # a replay, perhaps of fewer episodes, leaves the run's report
            (run / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if video_envs is not None:
            first_of_each = {goal.family: goal for goal in reversed(train_goals)}
            for goal in first_of_each.values():
                video = run / "videos" / f"best_{goal.prompt.replace(' ', '_')}.mp4"
                _, film = assess(video_envs, play, 1, key, [goal])
                write_video(film, video, None, 0)
                print(f"video: {video}")

    if args.evaluate is not None:
        final_report(args.evaluate)
        envs.close(terminate=True)
        video_envs.close(terminate=True)
        return

    # ---- A new run, or one that goes on
    replay = Replay(args.buffer_size, args.score_every, stack, stage_one, device)
    run_name = f"PlayhouseCLIP-v0__{args.exp_name}__{args.seed}__{int(1000 * time.time())}"
    run = args.resume or Path("runs") / gather(run_name)[0]
    replay_folder = run / "replay" / str(RANK)
    replay_folder.mkdir(parents=True, exist_ok=args.resume is not None)
    step, updates, saved_block, best_success = 0, 0, 0, -math.inf
    episode = np.zeros(args.num_envs, np.int64)  # how often each environment was reset
    if args.resume is not None:
        state = load_checkpoint(run, "last.pt", "--resume")
        load_agent(state, run)
        target.load_state_dict(state["target"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0] |= adamw  # the loop's own learning_rate, not the copy of it
        if state["device"] == device:  # else the noise starts anew
            generator.set_state(state["ranks"][RANK]["generator"])
        step, updates, saved_block = state["step"], state["updates"], state["replay_blocks"]
        episode[:] = state["ranks"][RANK]["episode"]
        if (run / "best.pt").exists():  # which may be newer than last.pt
            best_success = load_checkpoint(run, "best.pt", "--resume")["best_success"]
        replay.load(replay_folder, saved_block)
    elif args.reward != "env" and args.beta is None:
        scores, truth = random_play(envs, judge, (args.seed, CALIBRATION), args)
        least = 0.5 if args.reward == "contrastive" else -math.inf
        beta.copy_(calibrate(scores, truth, args.false_positive_rate).clamp(min=least))
        average(beta)  # all ranks played in the same homes: alike but for rounding
        if RANK == 0:
            print("beta:", {f: beta[columns[0]].item() for f, columns in COLUMNS["train"].items()})
    beta[~trained] = math.inf  # not reached by anything
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    if RANK == 0:
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity,
                name=run.resolve().name, id=run.resolve().name, resume="allow",
                config=arguments, sync_tensorboard=True, save_code=True,
            )  # fmt: skip
        writer = SummaryWriter(run, purge_step=step + 1 if args.resume else None)
        table = "\n".join(f"|{key}|{value}|" for key, value in arguments.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", step)
        (run / "args.json").write_text(json.dumps(arguments, indent=2) + "\n")

    # ---- What the loop calls

    def save_checkpoint(name: str, ranks: list[dict]) -> None:
        state = {
            "layout": LAYOUT,
            "args": {**arguments, "resume": None},
            "q_network": q_network.state_dict(),
            "target": target.state_dict(),
            "optimizer": optimizer.state_dict(),
            "prompts": clip.goal,  # their embeddings tell one CLIP from another
            "projection": projection,
            "beta": beta,
            "device": device,
            "ranks": ranks,
            "step": step,
            "updates": updates,
            "replay_blocks": saved_block,
            "best_success": best_success,
        }
        atomic_save(state, run / name)

    def stop_if_nan(stage: str, values: Iterable[torch.Tensor]) -> None:
        if not all(value.isfinite().all() for value in values):
            raise SystemExit(
                f"step {step}: {stage} is not finite; checkpoints in {run} are from before it. "
                "Start anew with a lower --learning-rate or --precision fp32"
            )

    def lap(stage: str) -> None:
        nonlocal clock
        seconds[stage] += time.time() - clock
        clock = time.time()

    def update(seen, traces, a_t, r_t, seen_next, traces_next, n, g) -> dict[str, torch.Tensor]:
        """One gradient step on a batch, with the texts g [B, 4, C] of the goals; returns the
        losses. Its inputs are single tensors, as those of a CUDA graph have to be."""
        s_t, s_next = (seen, traces), (seen_next, traces_next)
        with torch.no_grad():
            q_next = target(*s_next, g)  # [B, 9]
            choice = q_network(*s_next, g) if args.double_q else q_next
            p_next = probabilities(choice, args.target_temperature)
            v_next = (p_next * q_next).sum(-1).clamp(0, 1)  # as a return is
            # A reward of 1 comes with the last of the n steps, and ends the episode.
            y = args.gamma ** (n - 1) * torch.where(r_t == 1, 1, args.gamma * v_next)
        q = q_network(*s_t, g).gather(1, a_t[:, None])[:, 0]
        td_loss = F.huber_loss(q, y)
        optimizer.zero_grad()
        td_loss.backward()
        average(*(weight.grad for weight in q_network.parameters()))
        optimizer.step()
        return {"td_loss": td_loss.detach(), "q_values": q.detach().mean()}

    if args.compile:
        update = torch.compile(update)
        update = CUDAGraph(update) if device == "cuda" else update

    # ---- Train
    mirrored = torch.tensor(MIRRORED, device=device)  # of each action
    threads, random = torch.get_num_threads(), {"generator": generator, "device": device}
    ended = np.ones(args.num_envs, bool)  # whose episode is over: all are to begin
    goal = torch.zeros(args.num_envs, dtype=torch.int64, device=device)  # of the running episodes
    pursuit = goal  # what the policy goes for now: the goal, or its first stage
    wander, exploring = goal, goal.bool()  # a random action, and whether it is taken
    traces = torch.zeros(args.num_envs, TRACES, device=device)  # of the actions before
    age = np.zeros(args.num_envs, np.int64)  # steps of the running episodes
    # Of each goal: was its first stage reached, in this episode?
    carried = torch.zeros(args.num_envs, len(GOALS), dtype=torch.bool, device=device)
    pending = []  # steps of the running block
    losses, finished = {}, defaultdict(list)  # of the last update; episodes since the last log
    seconds = dict.fromkeys(("act", "update", "env", "clip", "evaluate", "checkpoint"), 0.0)
    started = clock = time.time()
    first_step, stride = step, args.num_envs * WORLD_SIZE  # env steps per vector step of all ranks
    bar = tqdm(
        total=args.total_timesteps, initial=step, unit="step", mininterval=1, disable=RANK > 0
    )
    while step < args.total_timesteps or pending:
        # ---- Reset
        new = torch.from_numpy(ended).to(device)  # [N], whose episode begins with this step
        if ended.any():
            numbered = enumerate(episode, RANK * args.num_envs)  # over all ranks
            seeds = [stream_seed(args.seed, TRAINING, i, int(n)) for i, n in numbered]
            episode[ended] += 1
            options = {"reset_mask": ended, "in_hand": args.in_hand}
            with worker_failures(envs, f"step {step}: reset"):
                envs.reset_async(seed=seeds, options=options)
                new_frame, info = envs.reset_wait(timeout=args.worker_timeout)
            stack[new] = see(new_frame[ended])[0].repeat(1, 1, 1, args.frame_stack)
            goal = torch.where(new, torch.from_numpy(info["goal"]).to(device), goal)
            pursuit = torch.where(new, stage_one[goal], pursuit)
            traces[new], carried[new], age[ended] = 0, False, 0
            lap("env")

        # ---- Act
        progress = (step - args.learning_starts) / args.epsilon_steps
        epsilon = 1 - (1 - args.epsilon_end) * min(max(progress, 0), 1)
        redraw = new | (torch.rand(args.num_envs, **random) < 1 / args.explore_steps)
        explores = torch.rand(args.num_envs, **random) < epsilon
        exploring = torch.where(redraw, explores, exploring)
        uniform = torch.randint(len(ACTIONS), (args.num_envs,), **random)
        wander = torch.where(redraw, uniform, wander)
        a = torch.where(exploring, wander, policy(stack, traces, pursuit, generator))  # [N]
        action = a.cpu().numpy()  # here, as what CUDA raises is no worker's fault
        with worker_failures(envs, f"step {step}"):
            envs.step_async(action)
        lap("act")

        # ---- Update on one core, while the workers step and render on the others
        torch.set_num_threads(1)
        ready = step >= args.learning_starts and replay.head > 0
        due = int((step + stride) * args.updates_per_step) - int(step * args.updates_per_step)
        # The last block may end past --total-timesteps.
        remaining = max(1 - step / args.total_timesteps, 0) if args.anneal_lr else 1
        learning_rate.fill_(args.learning_rate * remaining)
        for _ in range(due if ready else 0):
            s_t, a_t, r_t, s_next, n, g = replay.sample(
                args.batch_size, args.relabel_fraction, args.n_step, generator
            )
            if args.mirror:
                half = args.batch_size // 2
                for seen, traces_t in (s_t, s_next):
                    seen[:half], traces_t[:half] = mirror(seen[:half], traces_t[:half], mirrored)
                a_t[:half] = mirrored[a_t[:half]]
            losses = update(*s_t, a_t, r_t, *s_next, n, text[g] @ projection)
            updates += 1
            if updates % args.target_every == 0:
                target.load_state_dict(q_network.state_dict())
        torch.set_num_threads(threads)
        lap("update")

        # ---- Step
        with worker_failures(envs, f"step {step}"):
            frame, _, _, truncated, info = envs.step_wait(timeout=args.worker_timeout)
        lap("env")
        step += stride
        seen, s = see(frame)
        lap("clip")
        pending.append((stack, traces, a, frame, s, info))
        stack = torch.cat([stack[..., seen.shape[-1] :], seen], -1)
        traces = remember(traces, a)
        ended = np.zeros_like(ended)
        bar.update(stride)
        if len(pending) < args.score_every:
            continue

        # ---- Score the frames of a block, and store it
        stacks, all_traces, actions, frames, embeddings, infos = zip(*pending, strict=True)
        pending.clear()
        scores = judge(frames, embeddings, infos)
        stop_if_nan("the CLIP reward", [scores])
        reached, carried = after_stage_one(scores > beta, carried, stage_one)  # [K, N, 240]
        # A block is stored for what was pursued in it. But half of those that pursued the first
        # stage of a goal are stored for the goal itself: else Q(place) would never be trained while
        # the hand is empty, and to drop the toy would seem to cost nothing.
        for_goal = torch.rand(args.num_envs, **random) < 0.5
        replay.add(
            generator,
            seen=torch.stack([*stacks, stack]),
            traces=torch.stack([*all_traces, traces]),
            action=torch.stack(actions),
            reached=reached[..., : len(TRAIN_GOALS)],
            goal=torch.where(for_goal, goal, pursuit),
            age=torch.from_numpy(age).to(device),
        )
        success = np.stack([info["success"] for info in infos])  # [K, N]
        age += args.score_every
        r = reached[:, torch.arange(args.num_envs), goal].cpu().numpy()  # [K, N]
        pursuit = pursued(goal, reached[-1])
        last = step >= args.total_timesteps
        # The first block at or past each multiple
        boundary = stride * args.score_every
        evaluate_now = last or step % args.eval_every < boundary
        save_now = last or step % args.checkpoint_every < boundary
        done = r.any(0) | truncated
        # Both cut the running episodes short: an evaluation needs the environments, and a resume
        # starts with new episodes, as no simulator's state is saved.
        ended = done | evaluate_now | save_now
        finished["charts/episodic_return"] += r.any(0)[done].tolist()
        finished["charts/episodic_length"] += age[done].tolist()
        finished["charts/precision"] += success[r].tolist()  # is it done where r = 1?
        lap("clip")

        # ---- Evaluate, log, save
        log_now = save_now or step // boundary % 50 == 0
        if evaluate_now or log_now:
            stop_if_nan("a network or loss", (*q_network.parameters(), *losses.values()))
        if evaluate_now and RANK == 0:  # the others wait in the next average or gather
            key = args.seed, SELECTION
            summary, _ = assess(envs, play, args.eval_episodes, key, train_goals)
            if video_envs is not None:
                _, film = assess(video_envs, play, 1, key, train_goals)
                write_video(film, run / "videos" / f"{step}.mp4", writer, step)
            for name, value in summary.items():
                writer.add_scalar(f"eval/{name}", value, step)
            bar.set_postfix({name: f"{value:.2f}" for name, value in summary.items()})
            selected = summary["success_rate" if args.reward == "env" else "clip_success"]
            if selected > best_success:
                best_success = selected
                save_checkpoint("best.pt", ranks=[])
            lap("evaluate")
        if log_now:
            if RANK == 0:
                scalars = {
                    "charts/epsilon": epsilon,
                    "charts/SPS": (step - first_step) / (time.time() - started),
                    **{name: np.mean(values) for name, values in finished.items() if values},
                    **{f"losses/{name}": value.item() for name, value in losses.items()},
                    **{f"time/{k}": v / (step - first_step) for k, v in seconds.items()},
                }
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
            finished.clear()
        if save_now:
            replay.save(replay_folder, saved_block)
            saved_block = replay.head
            ranks = gather({"generator": generator.get_state(), "episode": episode.tolist()})
            if RANK == 0:  # now all have their replay on disk
                writer.flush()  # before last.pt: a resume logs again only what is after that
                save_checkpoint("last.pt", ranks)
            lap("checkpoint")
    bar.close()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        writer.close()
        final_report(run)
        print(f"run: {run} ({(time.time() - started) / 60:.1f} minutes)")
    envs.close(terminate=True)
    if video_envs is not None:
        video_envs.close(terminate=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume continues a run from its last checkpoint") from None

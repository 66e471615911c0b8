"""Train a tiny CLIP like the bundled one, on renders of our worlds and captions of their states.

    python tests/train_tiny_clip.py --output FOLDER            # under an hour on 2 CPU cores
    python tests/train_tiny_clip.py --output FOLDER --homes 60000    # one that knows homes too
    python tests/train_tiny_clip.py --output FOLDER --width 8  # smaller, for the scaling trend

States come from scripted poses with noise, from stiff settling on the floor, from physics after
that, and from random falls. An agent visits what nobody scripted: whatever the CLIP overrates. So,
several times during the training, a hill climb over poses looks for states that the CLIP of that
moment misjudges, and what it visits is added to the training states; so is what agents reach that
are trained on the CLIP of that moment (`--adversaries`), or were on an earlier one (`--agents`).
Some of what agents reached is kept with the CLIP, for a training that goes on from it. Every image
gets a graded truth in [0, 1] for each attribute (a stance, or what the arms do), measured on the
body's geometry in this file and never with the `TASKS` predicates, which mark the agents; and the
progress towards it, as a truth is 0 nearly everywhere. A caption is a conjunction of attributes in
random words, and its truth the smallest of theirs, so the loss knows for every image of a batch and
every caption of it whether they match. The cosine, which an agent will climb, is to follow the
progress in proportion, and near the goal above all.
"""

import json
import math
import multiprocessing.pool
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
# First: it puts torch before the first GL context.
from sac_clip_humanoid import HumanoidEnv
from clip_reward import auto_precision

import home_states
import mujoco
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent


@dataclass
class Args:
    output: Path
    """folder to write, in open_clip's own format"""
    start: Path | None = None
    """folder of a CLIP to train further, instead of a new one, with what agents reached in its
    training (reached.npy), lest that is forgotten; a resnet may have more blocks, which begin as
    the identity; any other image tower starts anew, and at first imitates that CLIP's on frames of
    the humanoid"""
    minutes: float = 42.0
    """length of the training itself, after the rendering and without the adversaries; the learning
    rate decays to its end"""
    steps: int | None = None
    """its length in steps instead, so that it is the same on every machine"""
    states: int = 90_000
    """rendered states of the humanoid, rounded up to thousands"""
    homes: int = 0
    """states of the playhouse, likewise; 0 leaves them out"""
    home_share: float = 2 / 3
    """of each batch, three eighths of it close-ups, where there are states of the playhouse"""
    agents: tuple[Path, ...] = ()
    """runs of sac_clip_humanoid.py: what their agents reach is trained on too"""
    searches: int = 7
    """searches for states that the CLIP misjudges, spread over the training; 0 for none"""
    adversaries: tuple[str, ...] = ()
    """tasks of sac_clip_humanoid.py: before each search, an agent is trained for each on the CLIP
    of that moment, and what it reaches is trained on too"""
    adversary_steps: int = 80_000
    """environment steps of each of these agents"""
    batch_size: int = 128
    """images per step"""
    captions: int = 128
    """random captions per step, shared by the worlds, up to half of them true of an image of the
    batch; the choices of a home come on top"""
    learning_rate: float = 1e-3
    """peak of the cosine schedule"""
    fixed_statistics: float = 0.5
    """share of the training, at its end, in which a resnet's norms keep the running statistics that
    it will be used with: what it says of a frame wavers with those of the batch around it"""
    tower: Literal["resnet", "vit"] = "resnet"
    """for images: a toy is smaller than a patch that a vision transformer could afford"""
    width: int = 16
    """of the image tower: channels after a resnet's stem (it ends with 32 times as many), or a
    vision transformer's, a multiple of 64"""
    layers: tuple[int, ...] = (1, 2, 4, 2)
    """of the image tower: blocks in each of a resnet's four stages; a vision transformer has as
    many as the first number says"""
    resolution: int = 144
    """of the frames in pixels"""
    patch: int = 24
    """in pixels, of a vision transformer"""
    textured: bool = True
    """the look of the humanoid in the frames"""
    camera: Literal["fixed", "track"] = "fixed"
    """the view of the frames"""
    compile: bool = False
    """torch.compile the image tower: a third faster for a resnet; needs a C++ compiler"""
    seed: int = 1
    """of states, captions and initial weights"""


# ---- Captions -----------------------------------------------------------------------------------

SUBJECTS = ["a humanoid robot", "a humanoid robot", "a robot", "a humanoid", "the humanoid robot"]
PREFIXES = ["", "", "", "a photo of ", "an image of ", "a picture of "]

STANCES = {
    "standing": [
        "standing up", "standing", "standing upright", "standing on both feet", "on its feet",
        "standing up straight", "standing still", "that stands up", "standing with both feet down",
    ],
    "one_leg": [
        "standing on one leg", "standing on one foot", "balancing on one leg",
        "standing up with one leg raised", "on one foot", "standing up with one foot raised",
        "that stands on one leg", "standing up straight on one foot",
    ],
    "kneeling": [
        "kneeling down", "kneeling on both knees", "kneeling on the floor", "on its knees",
        "that kneels", "kneeling upright", "kneeling with both knees on the floor", "kneeling",
        "that kneels on the floor",
    ],
    "lotus": [
        "in the lotus position", "meditating", "seated in the lotus position",
        "sitting in the lotus position", "seated down, meditating", "meditating in the lotus pose",
        "sitting down and meditating", "sitting cross-legged", "sitting with legs crossed",
        "seated down in the lotus pose", "that meditates in the lotus position",
        "seated on the floor, meditating in the lotus position",
    ],
    "splits": [
        "doing the side splits", "doing the splits", "practicing gymnastics, doing the splits",
        "in the side splits", "doing a side split", "practicing gymnastics",
        "seated with its legs stretched out to the sides", "doing gymnastics, in the splits",
        "that does the side splits", "seated on the floor, doing the side splits",
    ],
    "half_kneeling": ["kneeling on one knee", "on one knee", "with one knee on the floor"],
    "crouching": ["crouching", "squatting", "crouching on both feet", "with bent knees"],
    "sitting": ["sitting down with its legs stretched out to the front", "sitting, legs in front"],
    "seated": ["seated", "sitting on the floor", "seated down", "sitting down"],
    "all_fours": ["on all fours", "on its hands and knees", "crawling"],
    "lying": ["lying down", "lying on the floor", "lying flat", "that has fallen down"],
    "lying_on_back": ["lying on its back"],
    "lying_on_front": ["lying on its front", "lying face down"],
    "falling": ["falling", "falling over", "losing its balance"],
    "in_the_air": ["in the air", "above the floor", "jumping"],
}  # fmt: skip

ARMS = {
    "raised": [
        "with both arms raised", "with its arms raised", "with both arms up", "raising both arms",
        "with both hands above its head", "with its arms up in the air", "with arms raised",
        "with both hands up",
    ],
    "one_raised": ["with one arm raised", "raising one arm", "with one hand above its head"],
    "on_hips": [
        "with hands on hips", "with its hands on its hips", "with both hands on its hips",
        "with both hands at its hips", "resting its hands on its hips", "with hands at the hips",
    ],
    "crossed": [
        "with its arms crossed", "with arms crossed", "crossing its arms", "with crossed arms",
        "with both arms crossed", "with its arms crossed in front of its chest",
    ],
    "spread": ["with its arms stretched out to the sides", "with both arms out to the sides"],
    "in_front": ["with both arms in front", "with its arms stretched out to the front"],
    "hanging": ["with its arms down", "with both arms hanging down", "with arms at its sides"],
}  # fmt: skip

# Never trained on, word for word: the eight prompts, these paraphrases, and the combination of
# kneeling with raised arms in any words.
PROMPTS = {
    "kneeling": "a humanoid robot kneeling",
    "lotus": "a humanoid robot seated down, meditating in the lotus position",
    "standing": "a humanoid robot standing up",
    "arms_raised": "a humanoid robot standing up, with both arms raised",
    "splits": "a humanoid robot practicing gymnastics, doing the side splits",
    "hands_on_hips": "a humanoid robot standing up with hands on hips",
    "arms_crossed": "a humanoid robot standing up, with its arms crossed",
    "one_leg": "a humanoid robot standing up on one leg",
}
PARAPHRASES = {
    "kneeling": ["a robot on both knees", "a humanoid kneeling on its knees"],
    "lotus": ["a robot meditating cross-legged", "a humanoid seated in the lotus pose"],
    "standing": ["a humanoid robot upright on both feet", "a robot that stands on its feet"],
    "arms_raised": [
        "a robot standing with its hands up in the air",
        "a humanoid on its feet, raising both hands above its head",
    ],
    "splits": ["a robot practicing the side splits", "a humanoid seated in a side split"],
    "hands_on_hips": [
        "a robot standing straight, resting both hands on hips",
        "a humanoid standing up, its hands at its hips",
    ],
    "arms_crossed": [
        "a robot standing with both arms crossed in front of its chest",
        "a humanoid on its feet, crossing both arms",
    ],
    "one_leg": ["a robot balancing on one foot", "a humanoid with one foot raised, on one leg"],
}
HELD_OUT = {*PROMPTS.values(), *(p for group in PARAPHRASES.values() for p in group)}
ATTRIBUTES = [*STANCES, *ARMS]
COMMON = [
    "standing",
    "one_leg",
    "kneeling",
    "lotus",
    "splits",
] * 2  # mentioned three times as often


def caption(attributes: tuple[str, ...], rng: np.random.Generator) -> str:
    """A random wording of a conjunction of attributes, none of the held-out sentences."""
    while True:
        phrases = [rng.choice((STANCES | ARMS)[attribute]) for attribute in attributes]
        joiner = rng.choice([" ", ", "])
        text = f"{rng.choice(PREFIXES)}{rng.choice(SUBJECTS)} {joiner.join(phrases)}".strip()
        if text not in HELD_OUT:
            return text


# ---- States -------------------------------------------------------------------------------------

# Joint targets in degrees, right side; the left shoulders mirror the sign. "right:" is one side
# alone, "pitch" how far a straight trunk leans forwards when the pose rests on the floor.
STANCE_POSES = {
    "stand": {},
    "stand_wide": {"hip_x": -12},
    "stand_bent": {"hip_y": -20, "knee": -30},
    "stand_staggered": {"right:hip_y": -18, "left:hip_y": 12, "right:knee": -8},
    "stand_one_bent": {"right:hip_y": -25, "right:knee": -40, "right:hip_x": -10},
    "crouch": {"hip_y": -75, "knee": -100, "pitch": 15},
    "kneel": {"hip_y": 0, "knee": -95},
    "kneel_low": {"hip_y": -50, "knee": -150, "pitch": 15},
    "kneel_wide": {"hip_x": -20, "hip_y": -15, "knee": -105},
    "kneel_turned_out": {"right:hip_z": -40, "knee": -95},
    "kneel_turned_in": {"right:hip_z": 25, "knee": -95},
    "one_knee_just_off": {"right:hip_y": -18, "right:knee": -110, "left:knee": -98},
    "one_knee_off": {"right:hip_y": -40, "right:knee": -115, "left:knee": -95},
    "half_kneel": {"right:hip_y": -85, "right:knee": -90, "left:knee": -95},
    "splits": {"hip_x": -25, "hip_z": -60, "hip_y": -80, "knee": -2, "pitch": 18},
    "half_splits": {"hip_x": -25, "hip_z": -60, "hip_y": -80, "right:knee": -110, "pitch": 18},
    "near_splits": {"hip_x": -20, "hip_z": -30, "hip_y": -85, "knee": -15, "pitch": 10},
    "lotus": {"hip_x": -25, "hip_z": -55, "hip_y": -62, "knee": -160, "pitch": 28},
    "lotus_narrow": {"hip_x": -8, "hip_z": -40, "hip_y": -62, "knee": -160, "pitch": 28},
    "near_lotus": {"hip_x": -15, "hip_z": -30, "hip_y": -75, "knee": -130, "pitch": 20},
    "sit": {"hip_y": -90, "knee": -10},
    "one_leg": {"right:hip_y": -60, "right:knee": -90},
    "one_leg_back": {"right:hip_y": 5, "right:knee": -80},
    "one_leg_side": {"right:hip_x": -25, "right:hip_y": -30, "right:knee": -40},
    "one_leg_low": {"right:hip_y": -30, "right:knee": -58},
    "one_leg_low_back": {"right:hip_y": 5, "right:knee": -35},
}
STANCE_WEIGHTS = {
    "stand": 5, "stand_bent": 2, "stand_staggered": 2, "stand_wide": 2, "kneel": 3, "splits": 10,
    "kneel_low": 2, "one_knee_just_off": 2, "one_knee_off": 2, "half_kneel": 2,
    "lotus": 4, "one_leg": 2, "one_leg_back": 2, "one_leg_low": 3, "one_leg_low_back": 2,
}  # fmt: skip
ARM_WEIGHTS = {"raised": 2, "hips": 3, "crossed": 3}
ARM_POSES = {
    "rest": {},
    "raised": {"shoulder1": -80, "shoulder2": 0, "elbow": -80},
    "one_raised": {"right:shoulder1": -80, "right:shoulder2": 0, "right:elbow": -80},
    "hips": {"shoulder1": 50, "shoulder2": -80, "elbow": 0},
    "one_hip": {"right:shoulder1": 50, "right:shoulder2": -80, "right:elbow": 0},
    "crossed": {"shoulder1": 50, "shoulder2": 50, "elbow": -80},
    "nearly_crossed": {"shoulder1": 45, "shoulder2": 35, "elbow": -55},
    "chest": {"shoulder1": 40, "shoulder2": -20, "elbow": 40},
    "forward": {"shoulder1": 10, "shoulder2": 20, "elbow": -60},
    "spread": {"shoulder1": -20, "shoulder2": -50, "elbow": -80},
    "down": {"shoulder1": 50, "shoulder2": -60, "elbow": -70},
}
LIMBS = np.repeat(range(5), [3, 4, 4, 3, 3])  # of each joint: the trunk, the legs, the arms


def joint_targets(env: HumanoidEnv, pose: dict[str, float], mirrored: bool) -> np.ndarray:
    """Joint angles [17] in radians."""
    angles = np.zeros(17)
    for name, degrees in pose.items():
        if name == "pitch":
            continue
        side, _, joint = name.rpartition(":")
        for s in [side] if side else ["right", "left"]:
            s = {"right": "left", "left": "right"}[s] if mirrored else s
            sign = -1 if s == "left" and "shoulder" in joint else 1
            angles[env.model.joint(f"{s}_{joint}").qposadr[0] - 7] = sign * np.deg2rad(degrees)
    return angles


def lowest_point(env: HumanoidEnv) -> float:
    """Height of the lowest point of the body above the floor, in metres."""
    model, data = env.model, env.data
    tilt = np.abs(data.geom_xmat[1:, 8])  # of the capsules' axes; spheres have no length
    length = np.where(
        model.geom_type[1:] == mujoco.mjtGeom.mjGEOM_CAPSULE, model.geom_size[1:, 1], 0
    )
    return float((data.geom_xpos[1:, 2] - model.geom_size[1:, 0] - length * tilt).min())


def yaw_tilt(yaw: float, roll: float, pitch: float) -> np.ndarray:
    """Quaternion [4] that leans the body by roll and pitch, then turns it by yaw (radians)."""
    quaternion, turn = np.zeros(4), np.zeros(4)
    mujoco.mju_euler2Quat(quaternion, np.array([roll, pitch, 0.0]), "XYZ")
    mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0.0, 1.0]), yaw)
    result = np.zeros(4)
    mujoco.mju_mulQuat(result, turn, quaternion)
    return result


def scripted_state(env: HumanoidEnv, stiff: mujoco.MjModel, rng: np.random.Generator) -> None:
    """Put the humanoid into a noisy scripted pose on (or over) the floor."""
    low, high = env.model.jnt_range[1:].T
    mirrored = bool(rng.random() < 0.5)
    stances, arms = list(STANCE_POSES), list(ARM_POSES)

    def weighted_choice(names: list[str], weights: dict[str, int]) -> str:
        p = np.array([weights.get(name, 1) for name in names], float)
        return rng.choice(names, p=p / p.sum())

    stance, arm = weighted_choice(stances, STANCE_WEIGHTS), weighted_choice(arms, ARM_WEIGHTS)
    angles = joint_targets(env, STANCE_POSES[stance], mirrored)
    angles = angles + joint_targets(env, ARM_POSES[arm], mirrored)
    swung = stance == "splits" and rng.random() < 0.5  # the legs swing to the front, more or less
    if swung or rng.random() < 0.25:  # part of the way to another pose, each limb for itself
        other = joint_targets(env, STANCE_POSES["sit" if swung else rng.choice(stances)], mirrored)
        other = other + joint_targets(env, ARM_POSES[rng.choice(arms)], mirrored)
        angles = angles + rng.random(5)[LIMBS] * (other - angles)
    elif rng.random() < 0.05:
        angles = rng.uniform(low, high)
    angles = angles + rng.normal(0, np.deg2rad(rng.choice([2, 5, 12])), 17)
    if rng.random() < 0.2:  # a trunk that bends as far as it goes, which agents find out
        angles[:3] = rng.uniform(low[:3], high[:3])
    angles[:3] += rng.normal(0, np.deg2rad(8), 3)
    pitch, roll = np.deg2rad(STANCE_POSES[stance].get("pitch", 0)), 0.0
    if pitch:  # seated or low: an arched back brings the trunk upright, over a pelvis that stays
        arch = np.deg2rad(rng.uniform(-10, 35))
        angles[1] += arch
        pitch -= arch
    if stance.startswith("one_leg"):  # the standing foot comes under the centre of mass
        roll = np.deg2rad(rng.uniform(0, 10)) * (1 if mirrored else -1)
    lean = np.deg2rad(rng.choice([3, 8, 20, 40, 90], p=[0.5, 0.25, 0.12, 0.08, 0.05]))
    qpos = env.init_qpos.copy()
    qpos[:2] = rng.uniform(-0.35, 0.35, 2)
    turn = np.deg2rad(45) if rng.random() < 0.85 else np.pi
    yaw = rng.uniform(-turn, turn)
    qpos[3:7] = yaw_tilt(yaw, rng.normal(roll, lean), rng.normal(pitch, lean))
    qpos[7:] = np.clip(angles, low, high)
    settles = bool(rng.random() < 0.6)
    put_down(env, stiff, qpos, rng.uniform(0.04, 0.5) if rng.random() < 0.12 else 0, settles, rng)


def put_down(
    env: HumanoidEnv, stiff: mujoco.MjModel, qpos: np.ndarray, height: float, settles: bool,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Take a pose [24] at a height over the floor; it may settle there, with its joints held."""
    env.set_state(qpos, np.zeros(env.model.nv))
    qpos[2] += height - lowest_point(env)
    env.set_state(qpos, np.zeros(env.model.nv))
    if settles:
        stiff.qpos_spring[:] = qpos
        data = mujoco.MjData(stiff)
        data.qpos[:] = qpos
        mujoco.mj_step(stiff, data, nstep=5 * int(rng.integers(5, 40)))
        env.set_state(data.qpos, data.qvel)


def vary(qpos: np.ndarray, model: mujoco.MjModel, rng: np.random.Generator) -> np.ndarray:
    """A neighbour [24] of a pose: some joints or all of them turned, the body tilted."""
    qpos = qpos.copy()
    some = rng.random(17) < rng.choice([0.15, 0.4, 1.0])
    qpos[7:] += some * rng.normal(0, np.deg2rad(rng.choice([4, 12, 30])), 17)
    qpos[7:] = np.clip(qpos[7:], *model.jnt_range[1:].T)
    mujoco.mju_quatIntegrate(qpos[3:7], rng.normal(0, np.deg2rad(rng.choice([2, 8])), 3), 1.0)
    return qpos


def random_walk(env: HumanoidEnv, steps: int, rng: np.random.Generator):
    """Step with random torques that change slowly, fast or never; yields after each step."""
    keep = rng.choice([0.0, 0.8, 0.95, 1.0])
    action = rng.uniform(-0.4, 0.4, 17) * rng.choice([0.3, 1.0])
    for _ in range(steps):
        env.step(action)
        action = keep * action + (1 - keep) * rng.uniform(-1.2, 1.2, 17)
        action = np.clip(action, -0.4, 0.4)
        yield


class Ramp(NamedTuple):
    """Of a number x: 0 where it is `zero` or beyond, 1 where it is `one` or beyond."""

    x: float
    zero: float
    one: float


WIDTHS = np.array([[1], [4], [16]])  # of the ramps that progress averages, as multiples


def graded(ramps: list[Ramp]) -> tuple[float, float]:
    """The truth of an attribute in [0, 1], the lowest of its ramps, and the progress towards it.

    The truth is 0 nearly everywhere, and shows an agent no way. So progress has ramps that begin
    farther out too, and credits each of them; it is 1 where the truth is, and there alone.
    """
    x, zero, one = np.array(ramps).T
    levels = np.clip(1 + (x - one) / ((one - zero) * WIDTHS), 0, 1)  # [3, R]
    way = levels.mean(0)
    return float(levels[0].min()), float(way.min() + way.mean()) / 2


def conditions(env: HumanoidEnv) -> dict[str, list[Ramp]]:
    """What every attribute asks of the body's geometry.

    The ramps go on rising well inside each attribute. A truth that were full at the first touch
    would give an agent nothing to hold on to there, and noise would carry it out again.
    """
    p = env.pose()
    seat, knees, feet = (float(np.max(p.clearance[name])) for name in ("seat", "knees", "feet"))
    chest_up = env.data.xmat[env.model.body("torso").id][6]  # its forward axis along the vertical
    hands = env.data.geom_xpos[[env.model.geom(f"{s}_hand").id for s in ("right", "left")], 2]

    def lies_outside(supports: np.ndarray) -> float:  # metres, of the centre of mass
        low, high = supports[:, :2].min(0), supports[:, :2].max(0)
        return float(np.max([low - p.com[:2], p.com[:2] - high]))

    tall = [Ramp(p.upright, 0.75, 0.95), Ramp(p.chest_height, 1.02, 1.2)]
    lying = [Ramp(abs(p.upright), 0.6, 0.4), Ramp(p.chest_height, 0.4, 0.3)]
    standing_foot = p.feet[np.argmin(p.clearance["feet"])][None]
    shins = p.feet - p.knees
    knee_gap, foot_gap = np.abs(p.knees[1, 1] - p.knees[0, 1]), np.abs(p.feet[1, 1] - p.feet[0, 1])
    knee_order = np.argsort(p.clearance["knees"])  # lower one first
    flexion = np.rad2deg(p.knee_flexion)
    from_hips = np.linalg.norm(p.hands - [[0, -0.17, -0.33], [0, 0.17, -0.33]], axis=1)
    return {
        "standing": [*tall, Ramp(feet, 0.05, 0.012), Ramp(lies_outside(p.feet), 0.16, 0.05)],
        "one_leg": [
            *tall,
            Ramp(np.min(p.clearance["feet"]), 0.05, 0.012),
            Ramp(feet, 0.02, 0.1),
            Ramp(lies_outside(standing_foot), 0.16, 0.05),
        ],
        "kneeling": [
            Ramp(knees, 0.05, 0.012),
            Ramp(flexion.min(), 45, 75),
            Ramp((-shins[:, 0] - np.abs(shins[:, 1])).min(), -0.08, 0.16),
            Ramp(p.knees[1, 1] - p.knees[0, 1], 0.6, 0.4),
            Ramp(p.upright, 0.6, 0.85),
            Ramp(lies_outside(np.concatenate([p.knees, p.feet])), 0.16, 0.05),
        ],
        "lotus": [
            Ramp(seat, 0.25, 0.16),
            Ramp(knees, 0.05, 0.012),
            Ramp(flexion.min(), 85, 115),
            Ramp(p.knees[1, 1] - p.knees[0, 1], 0.4, 0.58),
            Ramp(foot_gap / max(knee_gap, 0.01), 0.7, 0.5),
            Ramp(p.upright, 0.4, 0.65),
        ],
        "splits": [
            Ramp(max(seat, feet), 0.06, 0.012),
            Ramp(flexion.max(), 40, 18),
            Ramp(p.feet[1, 1] - p.feet[0, 1], 1.05, 1.3),
            Ramp((np.abs(p.feet[:, 1]) - np.abs(p.feet[:, 0])).min(), -0.1, 0.15),
            Ramp(p.upright, 0.4, 0.65),
        ],
        "half_kneeling": [
            Ramp(p.clearance["knees"][knee_order[0]], 0.06, 0.03),
            Ramp(p.clearance["feet"][knee_order[1]], 0.06, 0.03),
            Ramp(p.clearance["knees"][knee_order[1]], 0.08, 0.15),
            Ramp(p.upright, 0.6, 0.75),
            Ramp(p.chest_height, 0.6, 0.75),
        ],
        "crouching": [
            Ramp(feet, 0.06, 0.03),
            Ramp(np.min(p.clearance["knees"]), 0.06, 0.12),
            Ramp(p.chest_height, 1.12, 1.0),
            Ramp(seat, 0.04, 0.1),
            Ramp(p.upright, 0.4, 0.6),
        ],
        "sitting": [
            Ramp(seat, 0.08, 0.04),
            Ramp(p.feet[:, 0].min(), 0.35, 0.5),
            Ramp(flexion.max(), 60, 40),
            Ramp(p.upright, 0.4, 0.55),
            Ramp(foot_gap, 1.1, 0.9),
        ],
        "seated": [Ramp(seat, 0.25, 0.18), Ramp(p.upright, 0.4, 0.55)],
        "all_fours": [
            Ramp(knees, 0.08, 0.04),
            Ramp(hands.max(), 0.2, 0.1),
            Ramp(abs(p.upright - 0.1), 0.6, 0.4),
            Ramp(seat, 0.1, 0.2),
        ],
        "lying": lying,
        "lying_on_back": [*lying, Ramp(chest_up, 0.2, 0.5)],
        "lying_on_front": [*lying, Ramp(chest_up, -0.2, -0.5)],
        "in_the_air": [Ramp(lowest_point(env), 0.05, 0.1)],
        "falling": [
            Ramp(p.upright, 0.75, 0.6),
            Ramp(p.chest_height, 0.5, 0.65),
            Ramp(min(knees, seat), 0.03, 0.08),
        ],
        "raised": [Ramp(p.hands_above_head.min(), -0.05, 0.07)],
        "one_raised": [
            Ramp(p.hands_above_head.max(), -0.05, 0.07),
            Ramp(p.hands_above_head.min(), -0.02, -0.09),
        ],
        "on_hips": [
            Ramp(from_hips.max(), 0.18, 0.1),
            Ramp((np.abs(p.elbows[:, 1]) - np.abs(p.hands[:, 1])).min(), -0.02, 0.04),
        ],
        "crossed": [
            Ramp(p.hands[0, 1] - p.hands[1, 1], 0.05, 0.17),
            Ramp(p.elbows[1, 1] - p.elbows[0, 1], -0.04, 0.06),
            Ramp(p.hands[:, 0].min(), 0.05, 0.15),
            Ramp(np.abs(p.hands[:, 2]).max(), 0.34, 0.22),
        ],
        "spread": [
            Ramp(np.abs(p.hands[:, 1]).min(), 0.4, 0.5),
            Ramp(np.abs(p.hands[:, 2]).max(), 0.4, 0.25),
        ],
        "in_front": [
            Ramp(p.hands[:, 0].min(), 0.2, 0.3),
            Ramp(np.abs(p.hands[:, 2]).max(), 0.4, 0.25),
            Ramp(p.hands[1, 1] - p.hands[0, 1], 0.06, 0.12),
        ],
        "hanging": [
            Ramp(p.hands[:, 2].max(), -0.1, -0.25),
            Ramp(from_hips.min(), 0.12, 0.18),
        ],
    }


def geometry(env: HumanoidEnv) -> np.ndarray:
    """What the auxiliary head regresses: in metres where the body's parts are, and the gaps under
    knees, feet and seat; and how upright it is. As it is, and as a mirror shows it: [2, K]."""
    names = [env.model.geom(i).name for i in range(1, env.model.ngeom)]
    other = [
        names.index(name.replace("right", "*").replace("left", "right").replace("*", "left"))
        for name in names
    ]
    # From where the camera looks; a mirrored frame turns the axis that runs across it around.
    if env.camera == "fixed":
        points, mirror = env.data.geom_xpos[1:] - [0, 0, 1], [1, -1, 1]
    else:  # it follows the centre of mass, and sees the body from its right
        points, mirror = env.data.geom_xpos[1:] - env.data.subtree_com[1], [-1, 1, 1]
    p = env.pose()
    gaps = np.array([*p.clearance["knees"], *p.clearance["feet"], p.clearance["seat"]])
    gaps = np.clip(gaps, 0, 0.15)
    sides = points, points[other] * mirror
    gaps = gaps, gaps[[1, 0, 3, 2, 4]]
    return np.float32([[*x.ravel(), *gap, p.upright] for x, gap in zip(sides, gaps, strict=True)])


class States(NamedTuple):
    """n states of the humanoid, and what is known of them."""

    qpos: np.ndarray  # [n, 24]
    frames: np.ndarray  # [n, H, W, 3] uint8
    truths: np.ndarray  # [n, A] float32, of each attribute
    progress: np.ndarray  # [n, A] float32, towards each attribute
    points: np.ndarray  # [n, 2, K] float32, as `geometry` returns them


class Studio:
    """A humanoid in front of a camera; `shots` holds what was photographed."""

    def __init__(self, args: Args):
        size = args.resolution
        self.env = HumanoidEnv(
            None, "rgb_array", textured=args.textured, camera=args.camera, width=size, height=size,
            full_observation=True,
        )  # fmt: skip
        self.stiff = HumanoidEnv(None).model  # the same body, with springs that hold its joints
        self.stiff.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        self.stiff.jnt_stiffness[1:], self.stiff.dof_damping[6:] = 300, 20
        self.env.reset(seed=0)
        self.shots = []

    def shoot(self) -> None:
        ramps = conditions(self.env)
        truth, progress = np.float32([graded(ramps[name]) for name in ATTRIBUTES]).T
        qpos = self.env.data.qpos.copy()
        self.shots.append((qpos, self.env.render(), truth, progress, geometry(self.env)))

    def develop(self, count: int) -> States:
        states = States(*map(np.stack, zip(*self.shots[:count], strict=True)))
        self.shots.clear()
        return states


def open_studio(args: Args) -> None:
    """One per process, kept open: a renderer is slow to make."""
    global studio
    studio = Studio(args)
    torch.set_num_threads(1)


def new_states(job: tuple[int, int]) -> States:
    """Scripted poses, settled bodies and falls: a count of them, by a seed."""
    count, seed = job
    rng, env = np.random.default_rng(seed), studio.env
    env.reset(seed=seed)
    while len(studio.shots) < count:
        if rng.random() < 0.12:  # an untrained agent: from the start, into a fall
            env.reset()
            for step, _ in enumerate(random_walk(env, int(rng.integers(20, 100)), rng)):
                if step % 20 == 10:
                    studio.shoot()
        else:
            scripted_state(env, studio.stiff, rng)
            studio.shoot()
            if rng.random() < 0.35:
                for _ in random_walk(env, int(rng.integers(2, 30)), rng):
                    pass
                studio.shoot()
    return studio.develop(count)


PER_AGENT = 4000  # poses of each run
KEPT = 20_000  # of all that agents reached, for the trainings that go on from a CLIP


def reached_poses(run: Path, rng: np.random.Generator) -> np.ndarray:
    """Poses [n, 24] that the agent of a run was in, in the last two thirds of its training, from
    its replay. That does not tell where on the floor, so the place is random."""
    files = sorted(run.glob("replay/*/*-*.pt"), key=lambda path: int(path.stem.split("-")[0]))
    parts = [torch.load(path, weights_only=True) for path in files[len(files) // 3 :]]
    visited = torch.cat([part["data"][0].flatten(0, 1) for part in parts]).numpy()
    some = visited[rng.integers(len(visited), size=PER_AGENT)]
    return np.hstack([rng.uniform(-0.35, 0.35, (PER_AGENT, 2)), some[:, :22]])


def photographs(poses: np.ndarray) -> States:
    for qpos in poses:  # [24]
        studio.env.set_state(qpos, np.zeros(studio.env.model.nv))
        studio.shoot()
    return studio.develop(len(poses))


def adversary_poses(args: Args, rng: np.random.Generator) -> np.ndarray:
    """What agents reach that learn from the CLIP in the output folder, one for each task."""
    line = [
        sys.executable, HERE.parent / "sac_clip_humanoid.py", "--no-capture-video",
        "--clip-model", args.output.resolve(), "--seed", rng.integers(2**31),
        "--textured" if args.textured else "--no-textured", "--camera", args.camera,
        "--frame-size", args.resolution, "--total-timesteps", args.adversary_steps,
        "--final-episodes", 16,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        agents = [
            subprocess.Popen([*map(str, line), "--task", task, "--exp-name", task], cwd=folder)
            for task in args.adversaries
        ]
        try:
            failed = any([agent.wait() for agent in agents])
        finally:  # none goes on when this program is stopped
            for agent in agents:
                agent.terminate()
            for agent in agents:
                agent.wait()
        if failed:
            sys.exit("--adversaries: an agent's training failed; it says why above")
        runs = sorted(Path(folder).glob("runs/*"))
        for run in runs:
            print(run.name, json.loads((run / "report.json").read_text())["best"], flush=True)
        return np.concatenate([reached_poses(run, rng) for run in runs])


def varied_states(job: tuple[np.ndarray, int]) -> States:
    """One neighbour of each pose [n, 24], on the floor, by a seed."""
    poses, seed = job
    rng = np.random.default_rng(seed)
    for qpos in poses:
        qpos = vary(qpos, studio.env.model, rng)
        put_down(studio.env, studio.stiff, qpos, 0, bool(rng.random() < 0.6), rng)
        studio.shoot()
    return studio.develop(len(poses))


# ---- Training -----------------------------------------------------------------------------------

SCRIPTED, REACHED, MISJUDGED = range(3)  # where a state comes from: scripts, an agent, a search


def chances(origin: np.ndarray) -> np.ndarray:
    """Of each state [n] to be drawn: a quarter for all that are scripted, and three eighths each
    for what agents reached and what CLIP misjudged, however many they are; a kind of which there
    are none leaves its share to the others."""
    count = np.bincount(origin, minlength=3)
    share = np.where(count > 0, (2, 3, 3), 0)
    return (share / count.clip(1) / share.sum())[origin]


def least(values: np.ndarray, meaning: tuple[str, ...]) -> np.ndarray:
    """Of the attributes of a conjunction, from [n, A]: [n], 1 if it has none."""
    return values[:, [ATTRIBUTES.index(a) for a in meaning]].min(1, initial=1)


def sample_meanings(truth: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple]:
    """Conjunctions of attributes: half of them true of one of the batch's images, half random."""
    stances, arms = np.array([*STANCES, *COMMON]), np.array(list(ARMS))
    columns = [ATTRIBUTES.index(stance) for stance in stances]
    meanings = []
    for i in range(count):
        if i % 2 == 0:
            t = truth[rng.integers(len(truth))] > 0.5
            stance_pool, arm_pool = stances[t[columns]], arms[t[len(STANCES) :]]
        else:
            stance_pool, arm_pool = stances, arms
        kind = rng.choice(4, p=[0.38, 0.2, 0.38, 0.04])  # stance, arms, both, a bare caption
        meaning = ()
        if kind in (0, 2) and len(stance_pool):
            meaning += (str(rng.choice(stance_pool)),)
        if kind in (1, 2) and len(arm_pool):
            meaning += (str(rng.choice(arm_pool)),)
        if meaning == ("kneeling", "raised"):
            meaning = ("kneeling",)
        meanings.append(meaning)
    return meanings


def new_homes(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    resolution, count, seed = job
    return home_states.HomeStudio(resolution, seed).states(count)


def run_jobs(pool: multiprocessing.pool.Pool, function, jobs: list) -> Iterable[np.ndarray]:
    """Runs them on every core, and joins what they return, part by part."""
    return map(np.concatenate, zip(*pool.map(function, jobs, 1), strict=True))


# What an agent may be asked for, and what the search looks for: states that are overrated (1) or
# underrated (-1) as that.
ASKED = [*((s,) for s in dict.fromkeys(COMMON)), *(("standing", a) for a in ARMS)]
SOUGHT = [(meaning, sign) for meaning in ASKED for sign in (1, -1)]
LINEAGES, GENERATIONS = 40, 8  # of the hill climb, for each of these


def misjudged_states(
    score: Callable[[np.ndarray, list[str]], np.ndarray],
    pool: multiprocessing.pool.Pool,
    known: States,
    rng: np.random.Generator,
) -> States:
    """What a hill climb from the `known` states visits on its way to those that CLIP misjudges.

    `score(frames [n, H, W, 3], captions [c])` is the cosine [n, c]. A line through the known states
    puts it on the scale of the progress, and each lineage keeps of parent and child the one whose
    rating is farther above its progress, or below it. A rating below 0 counts as 0: that something
    far off is rated as farther still misleads nobody.
    """
    captions = [caption(meaning, rng) for meaning, _ in SOUGHT]
    poses, errors, lines = [], [], []
    for (meaning, sign), s in zip(SOUGHT, score(known.frames, captions).T, strict=True):
        progress = least(known.progress, meaning)
        lines.append(np.polyfit(s, progress, 1))
        e = sign * (np.maximum(np.polyval(lines[-1], s), 0) - progress)
        parents = rng.choice(np.argsort(-e)[: 6 * LINEAGES], LINEAGES, replace=False)
        poses.append(known.qpos[parents])
        errors.append(e[parents])
    poses, errors = np.concatenate(poses), np.concatenate(errors)
    before = errors.reshape(len(SOUGHT), -1).mean(1)
    visited = []
    for _ in range(GENERATIONS):
        jobs = [(part, int(rng.integers(2**31))) for part in np.array_split(poses, 8)]
        children = States(*run_jobs(pool, varied_states, jobs))
        scores = score(children.frames, captions)
        for i, ((meaning, sign), line) in enumerate(zip(SOUGHT, lines, strict=True)):
            own = slice(i * LINEAGES, (i + 1) * LINEAGES)
            ratings = np.maximum(np.polyval(line, scores[own, i]), 0)
            e = sign * (ratings - least(children.progress, meaning)[own])
            better = e > errors[own]
            errors[own] = np.where(better, e, errors[own])
            poses[own] = np.where(better[:, None], children.qpos[own], poses[own])
        visited.append(children)
    after = errors.reshape(len(SOUGHT), -1).mean(1)
    print("misjudged by, before and after the climb:", ", ".join(
        f"{' '.join(meaning)} {sign * b:.2f} {sign * a:.2f}"
        for (meaning, sign), b, a in zip(SOUGHT, before, after, strict=True)
    ), flush=True)  # fmt: skip
    return States(*map(np.concatenate, zip(*visited, strict=True)))


NEAR = 0.65  # of the progress, from where on an agent may take what it has for the goal


def telling_states(states: States) -> list[np.ndarray]:
    """Indices of the states that match each stance, alone and with each thing that arms do, and of
    the near misses of what agents are asked for, where they are not a rarity."""
    postures = [(s,) for s in STANCES] + [(s, a) for s in STANCES for a in ARMS]
    groups = [least(states.truths, posture) > 0.5 for posture in postures]
    for meaning in ASKED:
        near = least(states.progress, meaning) > NEAR
        groups.append(near & (least(states.truths, meaning) < 0.5))
    return [index for index in map(np.flatnonzero, groups) if len(index) >= 20]


def start_from(folder: Path, model: torch.nn.Module) -> torch.nn.Module | None:
    """Copy into the model what fits of the CLIP in the folder; returns that CLIP, as a teacher, if
    some of it did not fit, or left a new layer that is not the identity.

    The blocks that a deeper resnet adds are: open_clip starts the last norm of each at 0.
    """
    known, weights = load_file(folder / "open_clip_model.safetensors"), model.state_dict()
    fits = {k: w for k, w in known.items() if k in weights and w.shape == weights[k].shape}
    model.load_state_dict(weights | fits)
    print(f"{len(fits)} of {len(weights)} parts of it are those of {folder}")
    resnet = isinstance(model.visual, ModifiedResNet)
    if len(fits) == len(known) and (resnet or len(fits) == len(weights)):
        return None
    return open_clip.create_model(f"local-dir:{folder}").eval()


def main(args: Args) -> None:
    if args.homes and args.resolution % home_states.CELLS:
        sys.exit(f"--resolution {args.resolution}: with --homes take a multiple of 9, as 144")
    if args.tower == "vit" and args.width % 64:
        sys.exit(f"--width {args.width}: with --tower vit take a multiple of 64, such as 192")
    if args.steps is not None and args.steps < 1:
        sys.exit(f"--steps {args.steps}: must be at least 1")
    if not 0 < args.home_share < 1:
        sys.exit(f"--home-share {args.home_share}: must lie between 0 and 1")
    if unknown := [task for task in args.adversaries if task not in PROMPTS]:
        sys.exit(f"--adversaries {unknown[0]}: choose from {', '.join(PROMPTS)}")
    for run in args.agents:
        if not any(run.glob("replay/*/*-*.pt")):
            sys.exit(f"--agents {run}: has no replay; name a run of sac_clip_humanoid.py")
    if not 0 <= args.fixed_statistics <= 1:
        sys.exit(f"--fixed-statistics {args.fixed_statistics}: must lie between 0 and 1")
    if args.adversaries and not args.searches:
        sys.exit("--searches 0: adversaries come with a search; take 1 or more")
    if args.adversaries and args.adversary_steps <= 5000:  # the script's --learning-starts
        sys.exit(f"--adversary-steps {args.adversary_steps}: learning starts at 5000; take more")
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    start = time.time()
    pool = multiprocessing.get_context("spawn").Pool(initializer=open_studio, initargs=(args,))

    def jobs(count: int) -> list[tuple[int, int]]:
        chunk = min(1000, count)
        return [(chunk, 1000 * args.seed + i) for i in range(math.ceil(count / chunk))]

    states = States(*run_jobs(pool, new_states, jobs(args.states)))
    scripted = len(states.frames)
    origin = np.full(scripted, SCRIPTED)

    def add(new: States, kind: int) -> None:
        nonlocal states, origin
        states = States(*map(np.concatenate, zip(states, new, strict=True)))
        origin = np.append(origin, np.full(len(new.frames), kind))

    def add_reached(poses: np.ndarray) -> None:
        add(States(*run_jobs(pool, photographs, np.array_split(poses, 8))), REACHED)

    reached = [reached_poses(run, rng) for run in args.agents]
    if args.start is not None and (args.start / "reached.npy").exists():
        reached.append(np.load(args.start / "reached.npy").astype(float))
    if reached:
        add_reached(np.concatenate(reached))
    center, spread = states.points.mean((0, 1)), states.points.std((0, 1)) + 1e-3
    print(f"{scripted} states in {time.time() - start:.0f} s; mean truth of each attribute:")
    print({a: round(float(m), 3) for a, m in zip(ATTRIBUTES, states.truths.mean(0), strict=True)})
    if args.homes:
        home_jobs = [(args.resolution, *job) for job in jobs(args.homes)]
        home_frames, home_truths, shares = run_jobs(pool, new_homes, home_jobs)
        print(f"{len(home_frames)} states of homes after {time.time() - start:.0f} s")
        near = closeups(torch.from_numpy(shares))
        roots = np.sqrt(shares)  # a toy's share of a cell is mostly small, or nothing
        over = {"axis": (0, 2, 3), "keepdims": True}
        share_center, share_spread = roots.mean(**over)[0], roots.std(**over)[0] + 1e-3
        del roots
        # Of which something can be said, by relation
        told = [np.flatnonzero(truth.any((1, 2))) for truth in np.moveaxis(home_truths > 0.5, 1, 0)]
        told = [index for index in [told[0], told[0], *told] if len(index)]  # find is the hardest

    fast_bf16 = auto_precision("cpu") == "bf16"
    config = {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": args.resolution,
            "width": args.width,
            "layers": args.layers if args.tower == "resnet" else args.layers[0],
            "head_width": 64,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }
    if args.tower == "vit":
        config["vision_cfg"]["patch_size"] = args.patch
    model = open_clip.CLIP(**config)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
    teacher = start_from(args.start, model) if args.start is not None else None
    bias = torch.nn.Parameter(torch.tensor(-4.0))
    # Besides the captions' losses, heads that are not kept read from the features before the
    # embedding where the body's points are, and from the map before that, where a home's toys are.
    # And a resnet's cells, embedded one by one as `encode_maps` does it, are to tell their toys.
    features, visual = {}, model.visual
    if args.tower == "vit":

        def keep(module, inputs, output):  # tokens [B, 1 + L, W], the first for the whole image
            side = math.isqrt(output.shape[1] - 1)
            features["image"] = output[:, 0]
            features["map"] = output[:, 1:].transpose(1, 2).unflatten(2, (side, side))

        visual.ln_post.register_forward_hook(keep)
    else:
        visual.layer3.register_forward_hook(lambda *call: features.update(map=call[2]))
        visual.layer4.register_forward_hook(
            lambda *call: features.update(cells=call[2], image=call[2].flatten(1))
        )
    with torch.no_grad():
        model.eval()  # these zeros are no statistics
        model.encode_image(torch.zeros(1, 3, args.resolution, args.resolution))
        model.train()
    heads = [torch.nn.Linear(features["image"].shape[1], len(center))]
    if args.homes:
        heads.append(torch.nn.Conv2d(features["map"].shape[1], shares.shape[1], 1))
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *(p for head in heads for p in head.parameters()), bias],
        lr=args.learning_rate,
        weight_decay=0.05,
    )

    def prepare(images: np.ndarray) -> torch.Tensor:  # [B, H, W, 3] to [B, 3, H, W]
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std

    @torch.no_grad()
    def score(images: np.ndarray, texts: list[str]) -> np.ndarray:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16):
            text = F.normalize(model.encode_text(tokenizer(texts)).float(), dim=-1)
            parts = [
                F.normalize(model.encode_image(prepare(images[i : i + 256])).float(), dim=-1)
                for i in range(0, len(images), 256)
            ]
        model.train()
        return (torch.cat(parts) @ text.T).numpy()

    # A world's part of a batch: images [B, 3, H, W], what the head regresses, captions, and how
    # true each caption is of each image, and how much progress it shows [B, C].

    def humanoid_part(size: int, count: int):
        index = rng.choice(len(origin), size, p=chances(origin))
        for i in range(0, size, 2):  # half of it: a balanced choice of matches and near misses
            index[i] = rng.choice(telling[rng.integers(len(telling))])
        image = prepare(states.frames[index])
        mirrored = int(rng.integers(2))  # the body is symmetric, and no caption says left or right
        image = image.flip(-1) if mirrored else image
        target = (states.points[index, mirrored] - center) / spread
        truth = states.truths[index]  # [B, A]
        meanings = sample_meanings(truth, count, rng)
        captions = [caption(meaning, rng) for meaning in meanings]
        match, aim = (
            np.stack([least(values, meaning) for meaning in meanings], 1)
            for values in (truth, states.progress[index])
        )
        return image, target, captions, match, aim

    def home_part(size: int, count: int):
        index = rng.integers(len(home_frames), size=size)
        for i in range(0, size, 2):  # half of it: a balanced choice of relations
            index[i] = rng.choice(told[rng.integers(len(told))])
        meanings = home_states.sample_meanings(home_truths[index], count, rng)
        meanings += [meaning for choice in home_states.CHOICES for meaning in choice]
        captions = [home_states.caption(meaning, rng) for meaning in meanings]
        captions += [home_states.landmark_caption(name, rng) for name in home_states.LANDMARKS]
        match = np.stack([home_states.truth_of(m, home_truths[index]) for m in meanings], 1)
        unnamed = np.zeros((size, len(home_states.CHOICES)), np.float32)
        for i, family in enumerate(home_states.UNNAMED):
            truths = [home_states.truth_of(m, home_truths[index]) for m in family]
            unnamed[:, i] = np.max(truths, 0)
        part = prepare(home_frames[index]), shares[index], captions, match, match
        return part, torch.from_numpy(unnamed)

    def mosaic_part(size: int):
        """Nine close-ups of toys in each image, at the size that they have in their frames: most
        of a frame is walls, and the head learns from a toy in any place."""
        block, shown = args.resolution * 3 // home_states.CELLS, []
        images = np.empty((size, 3, block, 3, block, 3), np.uint8)
        for i, row, column in np.ndindex(size, 3, 3):
            kind = near[rng.integers(len(near))]
            shot, y, x = kind[rng.integers(len(kind))]
            top, left = y * block // 3, x * block // 3
            images[i, row, :, column] = home_frames[shot, top : top + block, left : left + block]
            shown.append(shares[shot, :, y : y + 3, x : x + 3])
        grid = np.stack(shown).reshape(size, 3, 3, -1, 3, 3).transpose(0, 3, 1, 4, 2, 5)
        grid = grid.reshape(size, -1, home_states.CELLS, home_states.CELLS)
        return prepare(images.reshape(size, 3 * block, 3 * block, 3)), grid

    def loss_of(
        cosine: torch.Tensor, match: torch.Tensor, aim: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """From [B, C]: the sigmoid loss, how far the cosine is off the progress' course, and the
        share of the clear matches and mismatches that are told right."""
        logits = model.logit_scale.exp() * cosine + bias
        # Each caption weighs its matches as much as its mismatches, however rare they are.
        miss = 1 - match
        positive, negative = match / match.sum(0).clamp(min=4), miss / miss.sum(0).clamp(min=4)
        loss = -(positive * F.logsigmoid(logits) + negative * F.logsigmoid(-logits)).sum(0).mean()
        right = ((logits > 0) == (match > 0.5))[(match < 0.2) | (match > 0.8)].float().mean()
        return loss, off_course(cosine, aim, match, miss), right

    def cell_losses(
        texts: Sequence[torch.Tensor], shown: np.ndarray, homes: int
    ) -> list[torch.Tensor]:
        """Of the toys' names, colours and kinds, and of the landmarks: what each cell of the homes
        is told by, from the embeddings of all choices and the shares [B, S, 9, 9]. Close-ups tear
        a landmark into pieces, so those are told in the `homes` first images alone."""
        pool, x = visual.attnpool, features["cells"][-len(shown) :].float()
        x = F.normalize(pool.c_proj(pool.v_proj(x.movedim(1, -1))), dim=-1)  # [B, h, w, D]
        # The last stage halves an odd map without its last row and column.
        seen = home_states.CELLS * 2 * x.shape[1] // features["map"].shape[-1]
        shares = F.adaptive_avg_pool2d(torch.from_numpy(shown)[..., :seen, :seen], x.shape[1:3])
        shares, count = shares.movedim(1, -1).flatten(0, 2), homes * x[0, ..., 0].numel()
        x = x.flatten(0, 2)  # [B h w, D]
        losses = [
            softmax_loss(model.logit_scale.exp() * x @ texts[choice].T, *truth)
            for choice, truth in home_states.cell_truths(shares.numpy()).items()
        ]
        some = shares[:count, -len(home_states.LANDMARKS) :].sqrt()  # far away it is a small one
        loss, off, _ = loss_of(x[:count] @ texts[-1].T, some, some)
        return [*losses, loss + off]

    mean, std = torch.tensor([OPENAI_DATASET_MEAN, OPENAI_DATASET_STD]).view(2, 1, 3, 1, 1)
    encode_image = torch.compile(model.encode_image) if args.compile else model.encode_image
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    telling, start, step, searches = telling_states(states), time.time(), 0, 0
    words = set((args.start / "vocabulary.txt").read_text().split()) if args.start else set()

    def progress_by_now() -> float:
        if args.steps is not None:
            return step / args.steps
        return (time.time() - start) / (60 * args.minutes)

    while (progress := progress_by_now()) < 1:
        rate = min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        if searches < args.searches and progress > 0.15 + 0.7 * searches / args.searches:
            if args.adversaries:
                paused = time.time()
                save(args.output, model, config, words)
                add_reached(adversary_poses(args, rng))
                start += time.time() - paused
            some = rng.integers(scripted, size=3000)
            recent = len(SOUGHT) * LINEAGES * GENERATIONS // 2
            known = np.append(some, np.arange(scripted, len(states.frames))[-recent:])
            add(misjudged_states(score, pool, States(*(v[known] for v in states)), rng), MISJUDGED)
            telling, searches = telling_states(states), searches + 1
        for norm in norms:
            norm.train(progress < 1 - args.fixed_statistics)
        # One batch of both, so that a resnet's statistics are those it will be used with.
        homes = round(args.home_share * args.batch_size) if args.homes else 0
        mosaic, count = 3 * homes // 8, args.captions // len(heads)
        parts = [humanoid_part(args.batch_size - homes, count)]
        images, targets = [parts[0][0]], [parts[0][1]]
        if args.homes:
            part, unnamed = home_part(homes - mosaic, count)
            parts.append(part)
            mosaics, shown = mosaic_part(mosaic)
            images += [parts[1][0], mosaics]
            shown = np.concatenate([parts[1][1], shown])
            targets.append((np.sqrt(shown) - share_center) / share_spread)
        sizes = [len(part) for part in images]
        captions = [text for part in parts for text in part[2]]
        words.update(re.findall(r"[a-z]+", " ".join(captions).lower()))
        # The flash kernel's backward pass is 4 times slower on a CPU at this few tokens.
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16), sdpa_kernel(SDPBackend.MATH):
            image_features = encode_image(torch.cat(images)).float()
            text_features = model.encode_text(tokenizer(captions)).float()
        image_features = F.normalize(image_features, dim=-1).split(sizes)
        text_features = F.normalize(text_features, dim=-1).split([len(part[2]) for part in parts])
        below = [features["image"][: sizes[0]].float()]
        if args.homes:
            cells = (home_states.CELLS, home_states.CELLS)
            below.append(F.interpolate(features["map"][sizes[0] :].float(), cells))
        total, log = 0, []
        for i, (*_, match, aim) in enumerate(parts):
            cosine = image_features[i] @ text_features[i].T  # [B, C]
            match, aim = torch.from_numpy(match), torch.from_numpy(aim)
            loss, off, right = loss_of(cosine[:, :count], match[:, :count], aim[:, :count])
            target = torch.from_numpy(targets[i]).float()
            fit = F.mse_loss(heads[i](below[i]), target) / target.square().mean()
            total = total + (loss + off + fit) / len(parts)
            log.append(f"loss {loss:.3f}, right {right:.3f}, off {off:.3f}, head {fit:.3f}")
            if i == 0:  # of the humanoid: near the goal the way is short, and counts most
                close = aim > NEAR
                off = off_course(cosine, aim, match * close, (1 - match) * close)
                total = total + off / len(parts)
                log.append(f"near the goal off {off:.3f}")
            if i == 1:  # of homes: the choices follow the random captions
                choices = [count, *map(len, home_states.CHOICES)]
                logits = model.logit_scale.exp() * cosine[:, : match.shape[1]]
                logits = logits.split(choices, 1)[1:]
                of_each = zip(logits, match.split(choices, 1)[1:], unnamed.T, strict=True)
                losses = [softmax_loss(*each) for each in of_each]
                families = losses[: len(home_states.UNNAMED)]
                rest = losses[len(families) :]
                total = total + (sum(families) + 3 * sum(rest) / len(rest)) / len(parts)
                log.append("softmax " + ", ".join(f"{loss:.3f}" for loss in [*families, sum(rest)]))
                if "cells" in features:
                    texts = text_features[1].split([*choices, len(home_states.LANDMARKS)])[1:]
                    losses = cell_losses(texts, shown, sizes[1])
                    total = total + sum(losses) / len(parts)
                    log.append("cells " + ", ".join(f"{loss:.3f}" for loss in losses))
        if teacher is not None:
            with torch.no_grad():
                frames = F.interpolate(parts[0][0], teacher.visual.image_size, mode="bilinear")
                seen = F.normalize(teacher.encode_image(frames), dim=-1)
            total = total + (1 - progress) * (1 - (image_features[0] * seen).sum(1).mean())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            scale = model.logit_scale.exp()
            print(f"step {step}, {progress:.0%}, scale {scale:.1f}, bias {bias.item():.1f}")
            print(*(f"  {part}" for part in log), sep="\n", flush=True)
        if step % 1000 == 0:
            save(args.output, model, config, words)
    save(args.output, model, config, words)
    if REACHED in origin:
        poses = rng.permutation(states.qpos[origin == REACHED])[:KEPT]
        np.save(args.output / "reached.npy", np.float16(poses))
    pool.terminate()


def off_course(
    cosine: torch.Tensor, aim: torch.Tensor, match: torch.Tensor, miss: torch.Tensor
) -> torch.Tensor:
    """An agent climbs the cosine [B, C], which should follow the aim in proportion: 1 less their
    correlation, in which each caption weighs its matches as much as its misses; 0 without both."""
    both = (match.sum(0) > 1) & (miss.sum(0) > 1)
    weight = (match / match.sum(0) + miss / miss.sum(0))[:, both] / 2
    x, y = (v[:, both] - (weight * v[:, both]).sum(0) for v in (cosine, aim))
    variances = (weight * x**2).sum(0) * (weight * y**2).sum(0)
    rho = (weight * x * y).sum(0) * variances.clamp(min=1e-12).rsqrt()
    return (1 - rho).sum() / both.sum().clamp(min=1)


def softmax_loss(logits: torch.Tensor, match: torch.Tensor, unnamed: torch.Tensor) -> torch.Tensor:
    """CLIP's own loss, from image to text, over a choice of captions [B, C].

    Where none of them is true all are as likely, so that a toy far away does not count as found.
    Images with a true one weigh as much as the others. Where a toy is shown that none may name
    (`unnamed` [B] is 1) an image weighs nothing, lest the CLIP learns that this toy is none.
    """
    some = match.amax(1)  # [B]
    truth = match + (1 - some)[:, None] / match.shape[1]
    truth = truth / truth.sum(1, keepdim=True)
    loss = F.cross_entropy(logits, truth, reduction="none")
    yes, no = (weight * (1 - unnamed) for weight in (some, 1 - some))
    return ((yes / yes.sum().clamp(min=4) + no / no.sum().clamp(min=4)) * loss).sum() / 2


def closeups(shares: torch.Tensor) -> list[np.ndarray]:
    """Where each kind of toy is seen well: state, row and column of the 3 x 3 cells that show the
    most of it [n, 3]; from shares [n, S, 9, 9] of colours, kinds and landmarks."""
    kinds = shares[:, len(home_states.COLOURS) :][:, : len(home_states.KINDS)]
    seen = F.avg_pool2d(kinds, 3, 1)  # [n, K, 7, 7]
    best, cell = seen.flatten(2).max(-1)
    found = []
    for kind in range(len(home_states.KINDS)):
        states = torch.where(best[:, kind] > 0.05)[0]  # half a cell: about what counts as found
        place, side = cell[states, kind], seen.shape[-1]
        found.append(torch.stack([states, place // side, place % side], 1).numpy())
    return [rows for rows in found if len(rows)]


def save(folder: Path, model: torch.nn.Module, config: dict, words: set[str]) -> None:
    """Half-precision weights in open_clip's folder format, and the words the captions used."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.half().contiguous() if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    preprocess = {
        "mean": OPENAI_DATASET_MEAN,
        "std": OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=2) + "\n")
    (folder / "vocabulary.txt").write_text("\n".join(sorted(words)) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: agents end too
    main(tyro.cli(Args))

"""Train the bundled tiny CLIP from scratch, on renders of the humanoid and captions of its pose.

    python tests/train_tiny_clip.py                        # under an hour on 2 CPU cores
    python tests/train_tiny_clip.py --width 96 --layers 4  # a smaller one, for the scaling trend

States come from scripted poses with noise, from stiff settling on the floor, from physics after
that, and from random falls: an agent visits what nobody scripted. Every image gets a graded truth
in [0, 1] for each attribute (a stance, or what the arms do), measured on the body's geometry in
this file and never with the `TASKS` predicates, which mark the agents. A caption is a conjunction
of attributes in random words, and its truth the smallest of theirs, so the loss knows for every
image of a batch and every caption of it whether they match.
"""

import json
import math
import multiprocessing
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from sac_clip_humanoid import HumanoidEnv  # first: it puts torch before the first GL context

import mujoco
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file

HERE = Path(__file__).parent


@dataclass
class Args:
    output: Path = HERE / "tiny_clip"
    """folder to write, in open_clip's own format"""
    minutes: float = 42.0
    """length of the training itself, after the rendering; the learning rate decays to its end"""
    states: int = 90_000
    """rendered states"""
    batch_size: int = 128
    """images per step"""
    captions: int = 128
    """captions per step, half of them true of an image of the batch"""
    learning_rate: float = 1e-3
    """peak of the cosine schedule"""
    width: int = 192
    """of the image tower"""
    layers: int = 6
    """of the image tower"""
    resolution: int = 96
    """of the frames in pixels"""
    patch: int = 16
    """in pixels; the number of patches sets the speed"""
    textured: bool = True
    """the look of the humanoid in the frames"""
    camera: str = "fixed"
    """the view of the frames"""
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
# alone, "pitch" how far the pelvis leans forwards when the pose rests on the floor.
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
    "half_kneel": {"right:hip_y": -85, "right:knee": -90, "left:knee": -95},
    "splits": {"hip_x": -25, "hip_z": -60, "hip_y": -80, "knee": -2, "pitch": 18},
    "near_splits": {"hip_x": -20, "hip_z": -30, "hip_y": -85, "knee": -15, "pitch": 10},
    "lotus": {"hip_x": -25, "hip_z": -55, "hip_y": -62, "knee": -160, "pitch": 28},
    "near_lotus": {"hip_x": -15, "hip_z": -30, "hip_y": -75, "knee": -130, "pitch": 20},
    "sit": {"hip_y": -90, "knee": -10},
    "one_leg": {"right:hip_y": -60, "right:knee": -90},
    "one_leg_back": {"right:hip_y": 5, "right:knee": -80},
    "one_leg_side": {"right:hip_x": -25, "right:hip_y": -30, "right:knee": -40},
    "one_leg_low": {"right:hip_y": -30, "right:knee": -58},
    "one_leg_low_back": {"right:hip_y": 5, "right:knee": -35},
}
STANCE_WEIGHTS = {
    "stand": 5, "stand_bent": 2, "stand_staggered": 2, "stand_wide": 2, "kneel": 3, "splits": 4,
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
    if rng.random() < 0.25:  # part of the way to another pose
        other = joint_targets(env, STANCE_POSES[rng.choice(stances)], mirrored)
        other = other + joint_targets(env, ARM_POSES[rng.choice(arms)], mirrored)
        angles = angles + rng.random() * (other - angles)
    elif rng.random() < 0.05:
        angles = rng.uniform(low, high)
    angles = angles + rng.normal(0, np.deg2rad(rng.choice([2, 5, 12])), 17)
    angles[:3] += rng.normal(0, np.deg2rad(8), 3)  # the trunk
    pitch, roll = np.deg2rad(STANCE_POSES[stance].get("pitch", 0)), 0.0
    if pitch:  # seated or low: a back that is arched brings the trunk upright
        angles[1] += np.deg2rad(rng.uniform(-10, 35))
    if stance.startswith("one_leg"):  # the standing foot comes under the centre of mass
        roll = np.deg2rad(rng.uniform(0, 10)) * (1 if mirrored else -1)
    lean = np.deg2rad(rng.choice([3, 8, 20, 40, 90], p=[0.5, 0.25, 0.12, 0.08, 0.05]))
    qpos = env.init_qpos.copy()
    qpos[:2] = rng.uniform(-0.35, 0.35, 2)
    turn = np.deg2rad(45) if rng.random() < 0.85 else np.pi
    yaw = rng.uniform(-turn, turn)
    qpos[3:7] = yaw_tilt(yaw, rng.normal(roll, lean), rng.normal(pitch, lean))
    qpos[7:] = np.clip(angles, low, high)
    env.set_state(qpos, np.zeros(env.model.nv))
    qpos[2] -= lowest_point(env)
    if rng.random() < 0.12:
        qpos[2] += rng.uniform(0.04, 0.5)
    env.set_state(qpos, np.zeros(env.model.nv))
    if rng.random() < 0.6:  # hold the joints and let the body settle
        stiff.qpos_spring[:] = qpos
        data = mujoco.MjData(stiff)
        data.qpos[:] = qpos
        mujoco.mj_step(stiff, data, nstep=5 * int(rng.integers(5, 40)))
        env.set_state(data.qpos, data.qvel)


def random_walk(env: HumanoidEnv, steps: int, rng: np.random.Generator):
    """Step with random torques that change slowly, fast or never; yields after each step."""
    keep = rng.choice([0.0, 0.8, 0.95, 1.0])
    action = rng.uniform(-0.4, 0.4, 17) * rng.choice([0.3, 1.0])
    for _ in range(steps):
        env.step(action)
        action = keep * action + (1 - keep) * rng.uniform(-1.2, 1.2, 17)
        action = np.clip(action, -0.4, 0.4)
        yield


def soft(x: float, zero: float, one: float) -> float:
    """A ramp from 0 at `zero` to 1 at `one`."""
    return float(np.clip((x - zero) / (one - zero), 0, 1))


def describe(env: HumanoidEnv) -> dict[str, float]:
    """The truth in [0, 1] of every attribute, by the body's geometry."""
    p = env.pose()
    seat, knees, feet = (float(np.max(p.clearance[name])) for name in ("seat", "knees", "feet"))
    chest_up = env.data.xmat[env.model.body("torso").id][6]  # its forward axis along the vertical
    hands = env.data.geom_xpos[[env.model.geom(f"{s}_hand").id for s in ("right", "left")], 2]

    def lies_outside(supports: np.ndarray) -> float:  # metres, of the centre of mass
        low, high = supports[:, :2].min(0), supports[:, :2].max(0)
        return float(np.max([low - p.com[:2], p.com[:2] - high]))

    tall = min(soft(p.upright, 0.72, 0.88), soft(p.chest_height, 1.04, 1.16))
    standing_foot = p.feet[np.argmin(p.clearance["feet"])][None]
    shins = p.feet - p.knees
    knee_gap, foot_gap = np.abs(p.knees[1, 1] - p.knees[0, 1]), np.abs(p.feet[1, 1] - p.feet[0, 1])
    knee_order = np.argsort(p.clearance["knees"])  # lower one first
    flexion = np.rad2deg(p.knee_flexion)
    from_hips = np.linalg.norm(p.hands - [[0, -0.17, -0.33], [0, 0.17, -0.33]], axis=1)
    truth = {
        "standing": min(tall, soft(feet, 0.05, 0.025), soft(lies_outside(p.feet), 0.16, 0.1)),
        "one_leg": min(
            tall,
            soft(float(np.min(p.clearance["feet"])), 0.05, 0.025),
            soft(feet, 0.02, 0.06),
            soft(lies_outside(standing_foot), 0.16, 0.1),
        ),
        "kneeling": min(
            soft(knees, 0.05, 0.025),
            soft(flexion.min(), 45, 65),
            soft(float((-shins[:, 0] - np.abs(shins[:, 1])).min()), -0.06, 0.02),
            soft(p.upright, 0.6, 0.75),
            soft(lies_outside(np.concatenate([p.knees, p.feet])), 0.16, 0.1),
        ),
        "lotus": min(
            soft(seat, 0.25, 0.18),
            soft(knees, 0.05, 0.025),
            soft(flexion.min(), 85, 105),
            soft(p.knees[1, 1] - p.knees[0, 1], 0.4, 0.52),
            soft(foot_gap / max(knee_gap, 0.01), 0.7, 0.58),
            soft(p.upright, 0.4, 0.55),
        ),
        "splits": min(
            soft(max(seat, feet), 0.06, 0.025),
            soft(flexion.max(), 40, 27),
            soft(p.feet[1, 1] - p.feet[0, 1], 1.05, 1.25),
            soft(float((np.abs(p.feet[:, 1]) - np.abs(p.feet[:, 0])).min()), -0.1, 0.05),
            soft(p.upright, 0.4, 0.55),
        ),
        "half_kneeling": min(
            soft(float(p.clearance["knees"][knee_order[0]]), 0.06, 0.03),
            soft(float(p.clearance["feet"][knee_order[1]]), 0.06, 0.03),
            soft(float(p.clearance["knees"][knee_order[1]]), 0.08, 0.15),
            soft(p.upright, 0.6, 0.75),
            soft(p.chest_height, 0.6, 0.75),
        ),
        "crouching": min(
            soft(feet, 0.06, 0.03),
            soft(float(np.min(p.clearance["knees"])), 0.06, 0.12),
            soft(p.chest_height, 1.12, 1.0),
            soft(seat, 0.04, 0.1),
            soft(p.upright, 0.4, 0.6),
        ),
        "sitting": min(
            soft(seat, 0.08, 0.04),
            soft(float(p.feet[:, 0].min()), 0.35, 0.5),
            soft(flexion.max(), 60, 40),
            soft(p.upright, 0.4, 0.55),
            soft(foot_gap, 1.1, 0.9),
        ),
        "seated": min(soft(seat, 0.25, 0.18), soft(p.upright, 0.4, 0.55)),
        "all_fours": min(
            soft(knees, 0.08, 0.04),
            soft(float(hands.max()), 0.2, 0.1),
            soft(abs(p.upright - 0.1), 0.6, 0.4),
            soft(seat, 0.1, 0.2),
        ),
        "lying": min(soft(abs(p.upright), 0.6, 0.4), soft(p.chest_height, 0.4, 0.3)),
        "in_the_air": soft(lowest_point(env), 0.05, 0.1),
        "falling": min(
            soft(p.upright, 0.75, 0.6),
            soft(p.chest_height, 0.5, 0.65),
            soft(min(knees, seat), 0.03, 0.08),
        ),
        "raised": soft(float(p.hands_above_head.min()), -0.05, 0.02),
        "one_raised": min(
            soft(float(p.hands_above_head.max()), -0.05, 0.02),
            soft(float(p.hands_above_head.min()), -0.02, -0.09),
        ),
        "on_hips": min(
            soft(float(from_hips.max()), 0.18, 0.13),
            soft(float((np.abs(p.elbows[:, 1]) - np.abs(p.hands[:, 1])).min()), -0.02, 0.02),
        ),
        "crossed": min(
            soft(p.hands[0, 1] - p.hands[1, 1], 0.06, 0.12),
            soft(p.elbows[1, 1] - p.elbows[0, 1], -0.04, 0.02),
            soft(float(p.hands[:, 0].min()), 0.05, 0.12),
            soft(float(np.abs(p.hands[:, 2]).max()), 0.34, 0.27),
        ),
        "spread": min(
            soft(float(np.abs(p.hands[:, 1]).min()), 0.4, 0.5),
            soft(float(np.abs(p.hands[:, 2]).max()), 0.4, 0.25),
        ),
        "in_front": min(
            soft(float(p.hands[:, 0].min()), 0.2, 0.3),
            soft(float(np.abs(p.hands[:, 2]).max()), 0.4, 0.25),
            soft(p.hands[1, 1] - p.hands[0, 1], 0.06, 0.12),
        ),
        "hanging": min(
            soft(float(p.hands[:, 2].max()), -0.1, -0.25),
            soft(float(from_hips.min()), 0.12, 0.18),
        ),
    }  # fmt: skip
    truth["lying_on_back"] = min(truth["lying"], soft(chest_up, 0.2, 0.5))
    truth["lying_on_front"] = min(truth["lying"], soft(chest_up, -0.2, -0.5))
    return truth


def geometry(env: HumanoidEnv) -> np.ndarray:
    """What the auxiliary head regresses, in metres: where the body's parts are, and the gaps under
    knees, feet and seat. As it is, and as a mirror would show it: [2, K]."""
    names = [env.model.geom(i).name for i in range(1, env.model.ngeom)]
    other = [
        names.index(name.replace("right", "*").replace("left", "right").replace("*", "left"))
        for name in names
    ]
    points = env.data.geom_xpos[1:] - [0, 0, 1]  # from where the camera looks
    p = env.pose()
    gaps = np.array([*p.clearance["knees"], *p.clearance["feet"], p.clearance["seat"]])
    gaps = np.clip(gaps, 0, 0.15)
    sides = points, points[other] * [1, -1, 1]
    gaps = gaps, gaps[[1, 0, 3, 2, 4]]
    return np.float32([[*x.ravel(), *gap, p.upright] for x, gap in zip(sides, gaps, strict=True)])


def render_states(job: tuple[Args, int, int]):
    """frames [n, H, W, 3] uint8, truths [n, A] float32, geometry [n, 2, K] float32."""
    args, count, seed = job
    rng = np.random.default_rng(seed)
    size = args.resolution
    env = HumanoidEnv(
        None, "rgb_array", textured=args.textured, camera=args.camera, width=size, height=size
    )
    stiff = HumanoidEnv(None).model  # the same body, with springs that hold its joints
    stiff.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    stiff.jnt_stiffness[1:], stiff.dof_damping[6:] = 300, 20
    env.reset(seed=seed)
    frames, truths, points = [], [], []

    def snapshot():
        frames.append(env.render())
        truth = describe(env)
        truths.append([truth[attribute] for attribute in ATTRIBUTES])
        points.append(geometry(env))

    while len(frames) < count:
        if rng.random() < 0.12:  # an untrained agent: from the start, into a fall
            env.reset()
            for step, _ in enumerate(random_walk(env, int(rng.integers(20, 100)), rng)):
                if step % 20 == 10:
                    snapshot()
        else:
            scripted_state(env, stiff, rng)
            snapshot()
            if rng.random() < 0.35:
                for _ in random_walk(env, int(rng.integers(2, 30)), rng):
                    pass
                snapshot()
    env.close()
    return np.stack(frames[:count]), np.float32(truths[:count]), np.stack(points[:count])


# ---- Training -----------------------------------------------------------------------------------


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


def render_all(args: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All the training states, as `render_states` returns them, on every core."""
    chunk = 1000
    jobs = [(args, chunk, 1000 * args.seed + i) for i in range(math.ceil(args.states / chunk))]
    with multiprocessing.get_context("spawn").Pool() as pool:
        parts = pool.map(render_states, jobs, 1)
    frames, truths, points = map(np.concatenate, zip(*parts, strict=True))
    return frames, truths, points


def main(args: Args) -> None:
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    start = time.time()
    frames, truths, points = render_all(args)
    print(f"{len(frames)} states in {time.time() - start:.0f} s; mean truth of each attribute:")
    print({a: round(float(m), 3) for a, m in zip(ATTRIBUTES, truths.mean(0), strict=True)})
    points = (points - points.mean((0, 1))) / (points.std((0, 1)) + 1e-3)

    config = {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": args.resolution,
            "patch_size": args.patch,
            "width": args.width,
            "layers": args.layers,
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
    model = open_clip.CLIP(**config)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
    bias = torch.nn.Parameter(torch.tensor(-4.0))
    head = torch.nn.Linear(args.width, points.shape[-1])
    pooled = {}
    model.visual.ln_post.register_forward_hook(
        lambda module, inputs, output: pooled.update(x=output[:, 0] if output.ndim == 3 else output)
    )
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters(), bias], lr=args.learning_rate, weight_decay=0.05
    )
    pairs = [(s,) for s in STANCES] + [(s, a) for s in STANCES for a in ARMS]
    true_of = [
        np.flatnonzero((truths[:, [ATTRIBUTES.index(a) for a in pair]] > 0.5).all(1))
        for pair in pairs
    ]
    true_of = [indices for indices in true_of if len(indices) >= 20]
    frames, truths, points = map(torch.from_numpy, (frames, truths, points))
    mean, std = torch.tensor([OPENAI_DATASET_MEAN, OPENAI_DATASET_STD]).view(2, 1, 3, 1, 1)
    words, start, step = set(), time.time(), 0
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        rate = min(1, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        index = rng.integers(len(frames), size=args.batch_size)
        for i in range(0, args.batch_size, 2):  # every second image: a balanced choice of meanings
            index[i] = rng.choice(true_of[rng.integers(len(true_of))])
        index = torch.from_numpy(index)
        image = frames[index].permute(0, 3, 1, 2).float() / 255
        mirrored = int(rng.integers(2))  # the body is symmetric, and no caption says left or right
        image, target = image.flip(-1) if mirrored else image, points[index, mirrored]
        truth = truths[index]  # [B, A]
        meanings = sample_meanings(truth.numpy(), args.captions, rng)
        captions = [caption(meaning, rng) for meaning in meanings]
        words.update(re.findall(r"[a-z]+", " ".join(captions).lower()))
        match = torch.stack(
            [
                truth[:, [ATTRIBUTES.index(a) for a in meaning]].amin(1)
                if meaning
                else torch.ones(len(truth))
                for meaning in meanings
            ],
            1,
        )  # [B, C]
        # The flash kernel's backward pass is 4 times slower on a CPU at this few tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image_features = F.normalize(model.encode_image((image - mean) / std).float(), dim=-1)
            text_features = F.normalize(model.encode_text(tokenizer(captions)).float(), dim=-1)
        cosine = image_features @ text_features.T  # [B, C]
        logits = model.logit_scale.exp() * cosine + bias
        # Each caption weighs its matches as much as its mismatches, however rare they are.
        miss = 1 - match
        positive, negative = match / match.sum(0).clamp(min=4), miss / miss.sum(0).clamp(min=4)
        loss = -(positive * F.logsigmoid(logits) + negative * F.logsigmoid(-logits)).sum(0).mean()
        # An agent climbs the cosine, so that should follow the truth in proportion: EPIC's 1 - rho.
        both = (match.sum(0) > 1) & (miss.sum(0) > 1)
        weight = (match / match.sum(0) + miss / miss.sum(0))[:, both] / 2
        x, y = (v[:, both] - (weight * v[:, both]).sum(0) for v in (cosine, match))
        rho = (weight * x * y).sum(0) * ((weight * x**2).sum(0) * (weight * y**2).sum(0)).rsqrt()
        fit = F.mse_loss(head(pooled["x"].float()), target)
        total = loss + (1 - rho).mean() + 0.5 * fit
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            right = ((logits > 0) == (match > 0.5))[(match < 0.2) | (match > 0.8)].float().mean()
            print(
                f"step {step}, {progress:.0%}: loss {loss.item():.3f}, right {right:.3f}, "
                f"rho {rho.mean():.3f}, geometry {fit.item():.3f}, "
                f"scale {model.logit_scale.exp():.1f}, bias {bias.item():.1f}",
                flush=True,
            )
        if step % 1000 == 0:
            save(args.output, model, config, words)
    save(args.output, model, config, words)


def save(folder: Path, model: torch.nn.Module, config: dict, words: set[str]) -> None:
    """Half-precision weights in open_clip's folder format, and the words the captions used."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
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
    main(tyro.cli(Args))

r"""Train a MuJoCo humanoid to take a pose described by one sentence: SAC on a CLIP reward.

    python sac_clip_humanoid.py                                      # kneeling, on a laptop CPU
    python sac_clip_humanoid.py --goal "a humanoid robot meditating in the lotus pose"
    python sac_clip_humanoid.py --task all --total-timesteps 2_000_000 \
        --eval-every 64_000 --eval-episodes 4                            # one agent, eight poses
    python sac_clip_humanoid.py --clip-model ViT-bigG-14/laion2b_s39b_b160k --frame-size 224 \
        --total-timesteps 10_000_000 --eval-every 250_000 --checkpoint-every 250_000 \
        --learning-starts 50_000 --batch-size 512 --updates-per-step 0.03 --actor-tau 1 \
        --full-observation --action-repeat 1 --greedy-envs 0 --no-anneal-lr --reward-scale 1 \
        --initial-ent-coef 1 --no-layer-norm                             # the paper's settings
    torchrun --standalone --nproc-per-node=4 sac_clip_humanoid.py        # on several GPUs

CLIP looks at a frame and says how well it fits the goal prompt ("a humanoid robot kneeling"); with
--alpha, what tells that prompt from the baseline ("a humanoid robot") counts more. That number is
the whole reward: no state, no demonstration, no hand-written term. Whether the agent succeeds is
judged apart from it, by predicates on the simulator's state.

Paper: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement
Learning", ICLR 2024, https://arxiv.org/abs/2310.12921
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
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
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

# Before mujoco: torch must load ahead of the first GL context
from clip_reward import CLIPReward, auto_precision


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
    from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv as MujocoHumanoid
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
MAX_STEPS = 100  # of an episode
VIDEO_SIZE = 320  # pixels
LAYOUT = 2  # of checkpoints and replay files; one more whenever they change
ACTION_SCALE = 0.4  # control limit of Humanoid-v5; policies act in [-1, 1]


@dataclass
class Args:
    # ---- Run

    exp_name: str = "sac_clip_humanoid"  # name of the experiment, part of the run's folder
    seed: int = 1  # of networks, action noise, replay and every reset
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of CLIP, networks, replay; auto: CUDA if any
    total_timesteps: int = 496_000  # environment steps, over all environments of all ranks
    num_envs: int = 16  # worker processes of each rank, one humanoid in each
    eval_every: int = 16_000  # env steps between evaluations; running episodes are cut short there
    eval_episodes: int = 16  # episodes of each task in each evaluation during training
    final_episodes: int = 100  # of each task in the report at the end; its seeds selected nothing
    checkpoint_every: int = 16_000  # env steps between checkpoints; they cut episodes short too
    capture_video: bool = True  # record an episode at each evaluation, at 320 pixels
    resume: Path | None = None  # a run's folder to continue, with the arguments it was started with
    evaluate: Path | None = None
    """a run's folder whose agents to replay, beside random and zero, instead of training"""
    track: bool = False  # log to Weights and Biases too (pip install wandb)
    wandb_project_name: str = "clip-rl"  # project in Weights and Biases
    wandb_entity: str | None = None  # team in Weights and Biases
    worker_timeout: float = 60.0  # seconds after which a worker that does not answer ends the run

    # ---- Environment

    task: str = "kneeling"
    """a name in TASKS: its goal prompt and its success predicate; or all: one agent for all of
    them, which is told its goal by the embedding of the prompt"""
    textured: bool = True  # coloured limbs, sky and floor, or the plain body (the paper's ablation)
    camera: Literal["fixed", "track"] = "fixed"  # track: the body's own (the paper's ablation)
    full_observation: bool = False
    """the policy sees all 348 numbers of Humanoid-v5 (the paper's), not the 45 of positions and
    velocities alone"""
    action_repeat: int = 2
    """steps for which an action is kept; the frame after the last one is scored for them all"""
    frame_size: int = 144  # width and height in pixels of the frames that CLIP sees

    # ---- CLIP reward

    reward: Literal["clip", "env"] = "clip"
    """env: gymnasium's own running reward, with its termination, to check the algorithm"""
    goal: str | None = None
    """any sentence in place of the task's goal prompt; there is no success rate then"""
    baseline: str | None = None  # any sentence in place of "a humanoid robot"
    alpha: float = 0.0  # strength of the goal-baseline regularisation, from 0 (plain cosine) to 1
    clip_model: str = str(Path(__file__).resolve().parent / "tests" / "tiny_clip")
    """folder, ARCH/TAG or ARCH/FILE of open_clip, or hf-hub:ID"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of CLIP; bf16 lets the networks multiply below float32 too (TF32 on CUDA, bf16 on a CPU);
    auto is bf16 on CUDA (older than Ampere: take fp32) and on CPUs that are fast at it"""
    compile: bool = False
    """torch.compile CLIP's image tower and the updates (it takes a C++ compiler), which on CUDA
    become one CUDA graph"""
    score_every: int = 8  # frames of every environment that make one CLIP batch

    # ---- Algorithm

    buffer_size: int = 1_000_000  # transitions in the replay of each rank
    learning_starts: int = 5_000  # env steps of uniformly random actions before the first update
    greedy_envs: float = 0.5
    """share of the environments that act without noise, as evaluation does; else the replay lacks
    the states that the noise-free policy drifts into"""
    updates_per_step: float = 0.25  # gradient updates per environment step of all ranks
    batch_size: int = 128  # transitions per update and rank
    learning_rate: float = 6e-4  # of actor, critics and temperature
    anneal_lr: bool = True
    """lower the learning rates linearly to 0 at --total-timesteps; a resume with a larger one jumps
    back up, to the line of the longer run"""
    gamma: float = 0.95  # discount factor, per action
    tau: float = 0.005  # fraction of the critics that enters their targets per update
    actor_tau: float = 0.0003
    """fraction of the actor that enters, per update, the running average which is evaluated and
    saved; 1 evaluates the actor itself"""
    ent_coef: float | None = None
    """SAC's temperature; unset, it is learned so that the entropy meets -dim(action)"""
    initial_ent_coef: float = 0.05
    """where learning it starts; the usual 1 pays for entropy alone in the first tenth of the run"""
    reward_scale: float = 5.0  # factor on the reward before it is learned from
    relabel_fraction: float = 0.5
    """with --task all: share of the sampled transitions whose goal is drawn anew, from all"""
    hidden: int = 256  # units in each of the two hidden layers
    layer_norm: bool = True  # in the critics, against overestimated values

    def __post_init__(self):
        if os.path.isdir(self.clip_model):  # a resume from elsewhere finds it too
            self.clip_model = os.path.abspath(self.clip_model)


def check_args(args: Args) -> None:
    def require(name: str, condition: object, remedy: str) -> None:
        check(condition, f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")

    for name in ("total_timesteps", "num_envs", "eval_every", "eval_episodes", "final_episodes",
                 "checkpoint_every", "frame_size", "score_every", "buffer_size", "batch_size",
                 "updates_per_step", "learning_rate", "tau", "reward_scale", "hidden",
                 "initial_ent_coef", "worker_timeout", "action_repeat", "actor_tau"):  # fmt: skip
        require(name, 0 < getattr(args, name) < math.inf, "must be finite and greater than 0")
    require("worker_timeout", args.worker_timeout < 2e6, "must be below 2e6 seconds")  # 2**31 ms
    require("seed", 0 <= args.seed < 2**63, "must be at least 0 and less than 2**63")
    divides = MAX_STEPS % args.action_repeat == 0
    require("action_repeat", divides, f"must divide the {MAX_STEPS} steps of an episode")
    remedy = "must be finite and greater than 0; leave it out to learn it"
    require("ent_coef", args.ent_coef is None or 0 < args.ent_coef < math.inf, remedy)
    require("learning_starts", args.learning_starts >= 0, "must be at least 0")
    remedy = "leaves no step to learn from; make it less than --total-timesteps"
    require("learning_starts", args.evaluate or args.learning_starts < args.total_timesteps, remedy)
    for name in ("alpha", "greedy_envs", "tau", "actor_tau", "relabel_fraction"):
        require(name, 0 <= getattr(args, name) <= 1, "must lie between 0 and 1")
    require("gamma", 0 <= args.gamma < 1, "must be at least 0 and less than 1")
    require("task", args.task in (*TASKS, "all"), f"choose one of {', '.join(TASKS)}, or all")
    from_clip = args.reward == "clip" and args.goal is None
    require("task", args.task != "all" or from_clip, "not together with --goal or --reward env")
    require("goal", args.goal is None or args.reward == "clip", "not together with --reward env")
    for name in ("goal", "baseline"):
        sentence = getattr(args, name)
        check(sentence is None or sentence.strip(), f"--{name} {sentence!r}: write a sentence")
    least = 3 * args.num_envs  # the replay's shortest ring: s, s' and a next s
    remedy = f"holds fewer than three steps of each environment; raise it to {least}"
    require("buffer_size", args.evaluate or args.buffer_size >= least, remedy)
    least = MAX_STEPS * args.num_envs * WORLD_SIZE
    remedy = f"cuts every episode of {MAX_STEPS} steps short; raise it to {least}"
    for name in ("eval_every", "checkpoint_every"):
        require(name, args.evaluate or getattr(args, name) >= least, remedy)
    # W&B leaves a folder of its name behind, which Python takes for a package without an origin.
    wandb = getattr(importlib.util.find_spec("wandb"), "origin", None)
    require("track", wandb or args.evaluate or not args.track, "no wandb here; pip install wandb")
    require("evaluate", WORLD_SIZE == 1 or args.evaluate is None, "start it without torchrun")


class Pose(NamedTuple):
    """Where the body is, from the kinematics of qpos alone: metres and radians, right side first.

    Legs, seat and centre of mass are in the heading frame of the pelvis (origin on the floor under
    the seat; x forward, y left, z up), hands and elbows in the frame of the trunk (origin in the
    chest; x forward, y left, z to the head), so a predicate reads the same wherever the humanoid
    stands, faces and leans.
    """

    upright: float  # cosine of the angle between the trunk and the vertical
    chest_height: float
    knee_flexion: np.ndarray  # [2], 0 is straight
    clearance: dict[str, np.ndarray]  # of seat [], knees [2] and feet [2] above the floor
    com: np.ndarray  # [3]
    knees: np.ndarray  # [2, 3]
    feet: np.ndarray  # [2, 3]
    elbows: np.ndarray  # [2, 3]
    hands: np.ndarray  # [2, 3]
    hands_above_head: np.ndarray  # [2], centre of the hand over the top of the head


TOUCH = 0.03  # m of clearance that still counts as touching the floor
BALANCE = 0.1  # m that the centre of mass may lie outside the box around its supports


def balanced(p: Pose, supports: np.ndarray) -> bool:
    low, high = supports[:, :2].min(0) - BALANCE, supports[:, :2].max(0) + BALANCE
    return bool(((low <= p.com[:2]) & (p.com[:2] <= high)).all())


def kneeling(p: Pose) -> bool:
    shins = p.feet - p.knees
    supports = np.concatenate([p.knees, p.feet[p.clearance["feet"] <= TOUCH]])
    return bool(
        (p.clearance["knees"] <= TOUCH).all()
        and (p.knee_flexion > np.deg2rad(60)).all()
        and (-shins[:, 0] > np.abs(shins[:, 1])).all()  # point backwards ...
        and p.knees[1, 1] - p.knees[0, 1] <= 0.5  # ... from knees side by side: not the lotus
        and p.upright > 0.7
        and balanced(p, supports)
    )


def lotus(p: Pose) -> bool:
    return bool(
        p.clearance["seat"] <= 0.2  # this body rests on its heels: its shins cannot turn flat
        and (p.clearance["knees"] <= TOUCH).all()
        and (p.knee_flexion > np.deg2rad(100)).all()
        and p.knees[1, 1] - p.knees[0, 1] > 0.5  # knees face outwards ...
        and abs(p.feet[1, 1] - p.feet[0, 1]) < 0.6 * (p.knees[1, 1] - p.knees[0, 1])  # ... feet in
        and p.upright > 0.5
    )


def upright_on(p: Pose, standing_feet: list[bool]) -> bool:
    return bool(
        ((p.clearance["feet"] <= TOUCH) == standing_feet).all()
        and p.upright > 0.85
        and p.chest_height > 1.1  # 1.29 with straight legs
        and balanced(p, p.feet[standing_feet])
    )


def standing(p: Pose) -> bool:
    return upright_on(p, [True, True])


def arms_raised(p: Pose) -> bool:
    return standing(p) and bool((p.hands_above_head > 0).all())


def splits(p: Pose) -> bool:
    return bool(
        p.clearance["seat"] <= TOUCH
        and (p.clearance["feet"] <= TOUCH).all()
        and (p.knee_flexion < np.deg2rad(30)).all()
        and p.feet[1, 1] - p.feet[0, 1] > 1.2
        and (np.abs(p.feet[:, 1]) > np.abs(p.feet[:, 0])).all()  # to the sides more than forwards
        and p.upright > 0.5
    )


def hands_on_hips(p: Pose) -> bool:
    hips = np.array([[0.0, -0.17, -0.33], [0.0, 0.17, -0.33]])  # the sides of the pelvis
    return standing(p) and bool(
        (np.linalg.norm(p.hands - hips, axis=1) < 0.15).all()
        and (np.abs(p.elbows[:, 1]) > np.abs(p.hands[:, 1])).all()
    )


def crossed(p: Pose) -> bool:
    overlap = p.hands[0, 1] - p.hands[1, 1]  # the right hand is this far to the left of the left
    return bool(
        overlap > 0.1  # hands have a radius of 0.04: two that only touch stay under this
        and p.elbows[0, 1] < p.elbows[1, 1]
        and (p.hands[:, 0] > 0.1).all()
        and (np.abs(p.hands[:, 2]) < 0.3).all()  # at the height of the chest
    )


def arms_crossed(p: Pose) -> bool:
    return standing(p) and crossed(p)


def one_leg(p: Pose) -> bool:
    return upright_on(p, [True, False]) or upright_on(p, [False, True])


class Task(NamedTuple):
    goal: str
    in_goal_state: Callable[[Pose], bool]


BASELINE = "a humanoid robot"
TASKS = {
    "kneeling": Task("a humanoid robot kneeling", kneeling),
    "lotus": Task("a humanoid robot seated down, meditating in the lotus position", lotus),
    "standing": Task("a humanoid robot standing up", standing),
    "arms_raised": Task("a humanoid robot standing up, with both arms raised", arms_raised),
    "splits": Task("a humanoid robot practicing gymnastics, doing the side splits", splits),
    "hands_on_hips": Task("a humanoid robot standing up with hands on hips", hands_on_hips),
    "arms_crossed": Task("a humanoid robot standing up, with its arms crossed", arms_crossed),
    "one_leg": Task("a humanoid robot standing up on one leg", one_leg),
}

# Limbs that can be told apart at 144 pixels; each colour tints the body's procedural texture.
COLOURS = {
    "head": (0.95, 0.95, 0.97),
    "hand": (0.95, 0.85, 0.20),
    "larm": (0.90, 0.45, 0.15),
    "uarm": (0.75, 0.30, 0.12),
    "thigh": (0.20, 0.50, 0.45),
    "shin": (0.35, 0.70, 0.60),
    "foot": (0.12, 0.12, 0.14),
}


class HumanoidEnv(MujocoHumanoid):
    """A 3D humanoid that is to take a pose, seen by a fixed camera.

    ## Description
    Gymnasium's Humanoid-v5 body (17 joints, 1.6 m tall, facing the camera) in the setting of
    "Vision-Language Models are Zero-Shot Reward Models for RL" (arXiv 2310.12921): short episodes
    of fixed length, nothing ends them early, and the frame, not the state, is what gets rewarded.

    ## Action Space
    `Box(-0.4, 0.4, (17,), float32)`: torques at the joints, as in Humanoid-v5.

    | Num   | Action                                         |
    | ----- | ---------------------------------------------- |
    | 0-2   | abdomen: y, z, x                               |
    | 3-6   | right leg: hip x, hip z, hip y, knee           |
    | 7-10  | left leg: hip x, hip z, hip y, knee            |
    | 11-13 | right arm: shoulder 1, shoulder 2, elbow       |
    | 14-16 | left arm: shoulder 1, shoulder 2, elbow        |

    ## Observation Space
    `Box(-inf, inf, (45,), float32)`, the first 45 of Humanoid-v5's 348 numbers: the others follow
    from these, but for the contacts and the last action's torques. With `full_observation` all.

    | Num     | Observation                                               | Unit          |
    | ------- | --------------------------------------------------------- | ------------- |
    | 0-21    | positions: height, orientation (quaternion), joint angles | m, rad        |
    | 22-44   | velocities of the same                                    | m/s, rad/s    |
    | 45-174  | mass and inertia of the bodies, relative to the centre    | kg, kg m^2    |
    | 175-252 | velocities of the bodies about the centre of mass         | rad/s, m/s    |
    | 253-269 | torques of the actuators                                  | N m           |
    | 270-347 | external forces on the bodies                             | N m, N        |

    ## Rewards
    Humanoid-v5's own running reward, to within 0.01, as `step` moves the bodies to where the state
    says they are. The CLIP reward of a frame is computed outside, in batches.

    ## Starting State
    Standing, with uniform noise of 0.01 on every position and velocity.

    ## Episode End
    Truncation after `max_episode_steps` (100 steps of 0.015 s). With `terminate_when_unhealthy`,
    as Humanoid-v5 has it, also termination when the chest leaves 1.0 to 2.0 m.

    ## Arguments
    | Parameter                  | Default      | Description                                      |
    | -------------------------- | ------------ | ------------------------------------------------ |
    | `task`                     | `"kneeling"` | a name in `TASKS`, `"all"`, or None (no goal)    |
    | `textured`                 | `True`       | coloured limbs, sky and floor, or the plain body |
    | `camera`                   | `"fixed"`    | the paper's, or `"track"`, the body's own        |
    | `terminate_when_unhealthy` | `False`      | end the episode at a fall                        |
    | `full_observation`         | `False`      | observe all 348 numbers of Humanoid-v5           |
    | `width`, `height`          | 144          | size of the frame in pixels                      |

    `info["goal_state"]` is `in_goal_state()` after the step; evaluation counts it, no reward does.
    With `"all"` both are an array [8], one entry for each of `TASKS`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 67}

    def __init__(
        self,
        task: str | None = "kneeling",
        render_mode: str | None = None,
        textured: bool = True,
        camera: Literal["fixed", "track"] = "fixed",
        terminate_when_unhealthy: bool = False,
        full_observation: bool = False,
        width: int = 144,
        height: int = 144,
    ):
        if task not in (None, "all", *TASKS):
            raise ValueError(f"task {task!r}: choose one of {', '.join(TASKS)}, or all")
        self.task, self.textured, self.camera = task, textured, camera
        self._renderer = None
        super().__init__(
            render_mode=render_mode,
            terminate_when_unhealthy=terminate_when_unhealthy,
            include_cinert_in_observation=full_observation,
            include_cvel_in_observation=full_observation,
            include_qfrc_actuator_in_observation=full_observation,
            include_cfrc_ext_in_observation=full_observation,
            width=width,
            height=height,
        )
        gym.utils.EzPickle.__init__(  # copies are made from these; the parent noted its own
            self, task, render_mode, textured, camera, terminate_when_unhealthy, full_observation,
            width, height,
        )  # fmt: skip
        self.metadata = HumanoidEnv.metadata
        shape = self.observation_space.shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)

    def _initialize_simulation(self):
        spec = mujoco.MjSpec.from_file(self.fullpath)
        if self.textured:
            textures = {texture.name: texture for texture in spec.textures}
            textures[""].rgb1, textures[""].rgb2 = (0.75, 0.83, 0.92), (0.55, 0.65, 0.78)  # sky
            textures["texplane"].rgb1, textures["texplane"].rgb2 = (0.55,) * 3, (0.42,) * 3
            textures["texgeom"].rgb1 = textures["texgeom"].rgb2 = (1, 1, 1)
            spec.material("MatPlane").texrepeat = (40, 40)
            for geom in spec.geoms:
                part = geom.name.split("_")[-1].rstrip("1")
                geom.rgba = (*COLOURS.get(part, (0.25, 0.30, 0.50)), 1)
            spec.geom("floor").rgba = (1.0, 0.97, 0.9, 1)
        # CLIP sees a small frame: what it cannot resolve is not worth rendering.
        quality = spec.visual.quality
        quality.numslices, quality.numstacks = 8, 4
        quality.offsamples = quality.shadowsize = 0  # of multisampling, and of shadow maps
        spec.geom("floor").size[2] = 20  # of its squares: the usual 0.125 draws 40,000 of them
        spec.visual.global_.offwidth, spec.visual.global_.offheight = self.width, self.height
        model = spec.compile()
        return model, mujoco.MjData(model)

    def _get_obs(self):
        return super()._get_obs().astype(np.float32)

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        # After mj_step positions of bodies are those of RK4's last stage, not those of qpos.
        mujoco.mj_kinematics(self.model, self.data)
        info = {} if self.task is None else {"goal_state": self.in_goal_state()}
        return observation, float(reward), terminated, truncated, info

    def render(self):
        if self.render_mode is None:
            return None
        try:
            if self._renderer is None:  # the GL context belongs to the process that first draws
                self._renderer = mujoco.Renderer(self.model, self.height, self.width)
                self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
                self._view = mujoco.MjvCamera()
                self._view.lookat, self._view.distance = (0.0, 0.0, 1.0), 3.5
                self._view.azimuth, self._view.elevation = 180, -10
            view = self._view if self.camera == "fixed" else "track"
            self._renderer.update_scene(self.data, view)
            return self._renderer.render()
        except Exception as error:  # OpenGL's holds pointers, which no worker can send
            raise RuntimeError(" ".join(str(error).split())) from error

    def close(self):
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def pose(self) -> Pose:
        data, sides = self.data, ("right", "left")
        geoms = lambda name: np.stack([data.geom(f"{side}_{name}").xpos for side in sides])
        bodies = lambda name: np.stack([data.body(f"{side}_{name}").xpos for side in sides])
        chest, trunk = data.body("torso").xpos, data.body("torso").xmat.reshape(3, 3)
        pelvis = data.body("pelvis").xmat.reshape(3, 3)
        y = pelvis[:, 1] * (1, 1, 0)  # its left, laid on the floor
        y /= np.linalg.norm(y) + 1e-9
        heading = np.stack([[y[1], -y[0], 0.0], y, [0.0, 0.0, 1.0]], 1)  # columns x, y, z
        seat = data.geom("butt").xpos
        seat_tilt = abs(data.geom("butt").xmat[8])  # cosine of its axis to the vertical
        under_seat = seat * (1, 1, 0)
        com = self.model.body_mass @ data.xipos / self.model.body_mass.sum()
        knees, feet, hands = bodies("shin"), geoms("foot"), geoms("hand")
        # The numbers are radii of humanoid.xml's shapes: of the seat 0.09, and 0.07 along its axis;
        # of the shins 0.049, of the feet 0.075, of the head 0.09.
        return Pose(
            upright=float(trunk[2, 2]),
            chest_height=float(chest[2]),
            knee_flexion=-np.array([data.joint(f"{side}_knee").qpos[0] for side in sides]),
            clearance={
                "seat": seat[2] - 0.09 - 0.07 * seat_tilt,
                "knees": knees[:, 2] - 0.049,
                "feet": feet[:, 2] - 0.075,
            },
            com=(com - under_seat) @ heading,
            knees=(knees - under_seat) @ heading,
            feet=(feet - under_seat) @ heading,
            elbows=(bodies("lower_arm") - chest) @ trunk,
            hands=(hands - chest) @ trunk,
            hands_above_head=hands[:, 2] - data.geom("head").xpos[2] - 0.09,
        )

    def in_goal_state(self) -> bool | np.ndarray:
        """Whether the state, after `mj_kinematics`, is one of the goal; [8] of `"all"` goals."""
        pose = self.pose()
        if self.task == "all":
            return np.array([task.in_goal_state(pose) for task in TASKS.values()])
        return TASKS[self.task].in_goal_state(pose)


gym.register("HumanoidCLIP-v0", HumanoidEnv, max_episode_steps=MAX_STEPS)


class ActionRepeat(gym.Wrapper):
    """Keeps each action for some steps; rewards add up, and so do the steps in the goal state."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total, goal_states = 0.0, []
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            goal_states.append(info.get("goal_state"))
            if terminated or truncated:
                break
        info["steps"] = len(goal_states)
        if "goal_state" in info:  # a free goal has none
            info["goal_state"] = sum(goal_states)
        return observation, total, terminated, truncated, info


def make_envs(args: Args, num_envs: int, size: int) -> gym.vector.AsyncVectorEnv:
    """One humanoid in each worker process; frames come back through shared memory."""
    main_process = os.getpid()

    def make_env():
        if os.getpid() != main_process:  # AsyncVectorEnv makes one there too, for its spaces
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.nice(10)  # on few cores workers would keep the main process from its updates
            parent = multiprocessing.parent_process()  # when it is gone, so is the worker
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        env = gym.make(
            "HumanoidCLIP-v0",
            disable_env_checker=True,
            render_mode="rgb_array",
            task=args.task if args.goal is None else None,
            textured=args.textured,
            camera=args.camera,
            terminate_when_unhealthy=args.reward == "env",
            full_observation=args.full_observation,
            width=size,
            height=size,
        )
        env = ActionRepeat(env, args.action_repeat)
        frames = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        # Drawn at each step, so that the last state of an episode is seen before the reset; a size
        # of 0 means that nobody looks.
        draw = env.render if size else lambda: np.zeros(frames.shape, np.uint8)
        return gym.wrappers.TransformObservation(
            env,
            lambda state: {"state": state, "frame": draw()},
            gym.spaces.Dict(state=env.observation_space, frame=frames),
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


def atomic_save(state: dict, path: Path) -> None:
    """A kill at any moment leaves the old file or the new one, never half of one."""
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


class Replay:
    """A ring of rows on the device: (s, a, r, terminated, goal) of all N environments at a step,
    with the rewards r for all G goals. An s' is the next row's s; where an episode ended, a row
    without a transition comes between to hold it.
    """

    def __init__(
        self, capacity: int, num_envs: int, obs_dim: int, act_dim: int, num_goals: int, device
    ):
        self.rows, self.num_envs, self.device = capacity // num_envs, num_envs, device
        self.head = 0  # the next row to write; row t lies at t % rows
        parts = (obs_dim,), (act_dim,), (num_goals,), (), ()
        shapes = [(self.rows, num_envs, *part) for part in parts]
        need = 4 * sum(map(math.prod, shapes))  # bytes
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // LOCAL_WORLD_SIZE
        if device == "cuda":
            memory = torch.cuda.mem_get_info()[0]
        check(
            need < memory,
            f"--buffer-size {capacity}: takes {need / 2**30:.1f} GiB, and the {device} has "
            f"{memory / 2**30:.1f} GiB; lower it",
        )
        self.data = [torch.zeros(shape, device=device) for shape in shapes]
        self.has_transition = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.sampled_rows = None  # those that have one; None: to be listed anew by sample()

    def add(self, s, a, r, s_next, terminated, goal, ended: bool) -> None:
        """s [N, O], a [N, A], r [N, G], s' [N, O], terminated [N], goal [N]; whether any episode
        ended."""
        row, following = self.head % self.rows, (self.head + 1) % self.rows
        for ring, value in zip(self.data, (s, a, r, terminated, goal), strict=True):
            ring[row] = torch.as_tensor(value)
        self.data[0][following] = s_next
        self.has_transition[row], self.has_transition[following] = True, False
        self.sampled_rows = None
        self.head += 2 if ended else 1

    def sample(self, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
        """s [B, O], a [B, A], r [B, G], s' [B, O], terminated [B], goal [B]."""
        options = {"size": (batch_size,), "generator": generator, "device": self.device}
        if self.sampled_rows is None:
            self.sampled_rows = self.has_transition.nonzero()[:, 0]
        row = self.sampled_rows[torch.randint(len(self.sampled_rows), **options)]
        env = torch.randint(self.num_envs, **options)
        s, a, r, terminated, goal = (ring[row, env] for ring in self.data)
        return [s, a, r, self.data[0][(row + 1) % self.rows, env], terminated, goal.long()]

    def save(self, folder: Path, first: int) -> None:
        """Write the rows since the last checkpoint, [first, head), as one file. All episodes have
        ended, so the last s' has its row before the head."""
        start = max(first, self.head - self.rows)
        slots = torch.arange(start, self.head) % self.rows
        part = {
            "data": [ring[slots].cpu() for ring in self.data],
            "has_transition": self.has_transition[slots].cpu(),
        }
        atomic_save(part, folder / f"{start}-{self.head}.pt")
        for path in folder.glob("*-*.pt"):
            if int(path.stem.split("-")[1]) <= first - self.rows:  # no use to the old last.pt
                path.unlink()

    def load(self, folder: Path, head: int) -> None:
        self.head, filled = head, 0
        ends = {int(path.stem.split("-")[1]): path for path in folder.glob("*-*.pt")}
        for end in sorted(ends):
            if end > head:  # its checkpoint was never finished
                ends[end].unlink()
                continue
            try:
                part = torch.load(ends[end], map_location=self.device, weights_only=True)
            except Exception as error:
                remedy = f"cannot load {ends[end]} ({error!r}); restore it"
                check(False, f"--resume {folder.parents[1]}: {remedy}")
            rows = torch.arange(end - len(part["data"][0]), end)
            for ring, value in zip(self.data, part["data"], strict=True):
                ring[rows % self.rows] = value
            self.has_transition[rows % self.rows] = part["has_transition"]
            filled += int((rows >= head - self.rows).sum())
        remedy = "files are missing in its replay/; restore them"
        check(filled >= min(head, self.rows), f"--resume {folder.parents[1]}: {remedy}")


class Normaliser(nn.Module):
    """Standardises observations by the running mean and variance of every s'."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.tensor(1e-4))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    def update(self, x: torch.Tensor) -> None:  # [M, O]
        """Merges its mean and variance with those of x over all ranks (Chan et al., 1979)."""
        n, mean = len(x) * WORLD_SIZE, x.mean(0)
        average(mean)
        var = ((x - mean) ** 2).mean(0)
        average(var)
        self.count += n
        share = n / self.count  # of x in all that was seen
        self.var.lerp_(var, share).add_(share * (1 - share) * (mean - self.mean) ** 2)
        self.mean.lerp_(mean, share)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) * (self.var + 1e-8).rsqrt()).clamp(-10, 10)


class TwinQ(nn.Module):
    """Both critics as one batch of two, for half as many kernels: Q(s, a) [2, B]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, layer_norm: bool):
        super().__init__()
        self.layer_norm = layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, out in ((obs_dim + act_dim, hidden), (hidden, hidden), (hidden, 1)):
            bound = 1 / math.sqrt(fan_in)  # as nn.Linear does
            self.weights.append(nn.Parameter(torch.empty(2, fan_in, out).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(2, 1, out).uniform_(-bound, bound)))

    def forward(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        x = torch.cat([s, a], -1).expand(2, -1, -1)  # [2, B, O + A]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = F.relu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
            x = torch.baddbmm(bias, x, weight)
        return x.squeeze(-1)


class Actor(nn.Module):
    """A Gaussian squashed by tanh into [-1, 1]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(obs_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, 2 * act_dim)

    def forward(self, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.head(self.trunk(s)).chunk(2, -1)
        return mean, -5 + 3.5 * (torch.tanh(log_std) + 1)  # log_std in [-5, 2]

    def sample(self, s: torch.Tensor, noise: torch.Tensor):
        """a [B, A] and log pi(a | s) [B], from standard normal noise [B, A]."""
        mean, log_std = self(s)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2), in a form that neither overflows nor cancels
        log_jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_jacobian).sum(-1)


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


class Row(NamedTuple):
    """One step of all N environments, on its way to the replay."""

    s: torch.Tensor  # [N, O]
    a: torch.Tensor  # [N, A]
    reward: np.ndarray  # [N], the environment's own
    s_next: torch.Tensor  # [N, O]
    terminated: np.ndarray  # [N]
    goal: np.ndarray  # [N], index of the one that is pursued
    frame: np.ndarray  # [N, H, W, 3], of s_next
    done: np.ndarray  # [N], terminated or truncated
    ended: np.ndarray  # [N], done or cut short
    steps: np.ndarray  # [N], for which the action was kept


TRAINING, SELECTION, REPORT, NOISE = range(4)  # uses of --seed, each with a stream of its own


def stream_seed(*key: int) -> int:
    """32 bits from --seed, the use, and what counts within it: a stream of its own for each."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def evaluate(envs, policy, score, tasks: list[str], episodes: int, key: tuple, args: Args):
    """Play `episodes` of each task; returns the mean of their results, and a video.

    `policy(state [N, O], goal [N])` gives actions in [-1, 1]; `score(frames [1, N, H, W, 3])` the
    Future of their CLIP rewards [1, N, G], or it is None. Episode i starts from
    `stream_seed(*key, i)` and pursues task i % len(tasks).

    Success is the paper's: the goal state for at least half of the steps; a free goal has none. Of
    several tasks each has a success rate too. The video is of environment 0, until each task was
    begun once.
    """
    results, film, env_index = defaultdict(list), [], np.arange(envs.num_envs)
    for first in range(0, episodes * len(tasks), envs.num_envs):
        goal = (first + env_index) % len(tasks)  # [N]
        seeds = [stream_seed(*key, first + i) for i in range(envs.num_envs)]
        frames, played, rewards, scores, steps, goal_states = [], [], [], [], [], []
        running = np.ones(envs.num_envs, bool)
        with worker_failures(envs, "evaluation"):
            envs.reset_async(seed=seeds)
            observation, _ = envs.reset_wait(timeout=args.worker_timeout)
        while running.any():
            action = ACTION_SCALE * policy(observation["state"], goal)
            with worker_failures(envs, "evaluation"):
                envs.step_async(action)
                observation, reward, *ends, info = envs.step_wait(args.worker_timeout)
            frames.append(observation["frame"][0].copy())
            if score is not None:
                scores.append(score(observation["frame"][None]))
            played.append(running)
            rewards.append(reward)
            steps.append(info["steps"])
            if "goal_state" in info:  # a free goal has none
                goal_states.append(info["goal_state"].reshape(envs.num_envs, -1)[env_index, goal])
            running = running & ~np.logical_or(*ends)
        if first < len(tasks):
            film.append(np.stack(frames).repeat(args.action_repeat, 0))
        played = np.stack(played)  # [T, N]
        results["episodic_return"] += (played * rewards).sum(0).tolist()
        if score is not None:
            scores = np.concatenate([future.result() for future in scores])[:, env_index, goal]
            results["clip_return"] += (played * scores).sum(0).tolist()
        if goal_states:
            goal_state = (played * goal_states).sum(0) / (played * steps).sum(0)
            results["success_rate"] += (goal_state >= 0.5).tolist()
            results["goal_state"] += goal_state.tolist()
    total = episodes * len(tasks)
    means = {name: float(np.mean(values[:total])) for name, values in results.items()}
    if len(tasks) > 1:
        success = np.reshape(results["success_rate"][:total], (episodes, -1)).mean(0)
        means |= {f"success_rate_{task}": float(x) for task, x in zip(tasks, success, strict=True)}
    return means, np.concatenate(film)


def write_video(film: np.ndarray, path: Path, writer: SummaryWriter | None, step: int) -> None:
    """An mp4 at half speed, and in TensorBoard a small animation (torch's own needs moviepy 1)."""
    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, film, fps=30, macro_block_size=1)
    if writer is not None:
        small = film[::3, ::2, ::2]
        gif = imageio.mimwrite("<bytes>", small, format="gif", duration=100, loop=0)
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
    # The CLIP may lie elsewhere by now; a resume checks that it is the same one.
    may_differ = {"resume", "evaluate", "device", "worker_timeout", "clip_model", "compile"}
    if args.resume:
        state = load_checkpoint(run, "last.pt", "--resume")
        may_differ |= {"total_timesteps", "capture_video", "track"}
        ranks = len(state["ranks"])
        remedy = "start as many with torchrun"
        check(ranks == WORLD_SIZE, f"--resume {run}: has {ranks} rank(s); {remedy}")
    else:
        state = load_checkpoint(run, "best.pt", "--evaluate")
        may_differ |= {"final_episodes", "num_envs", "precision", "frame_size"}
    saved = Args(**state["args"])
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
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = args.device if args.device != "auto" else "cuda" if gpus else "cpu"
    remedy = "take cpu, install a CUDA build of torch, or lower --nproc-per-node"
    check(device == "cpu" or gpus > LOCAL_RANK, f"--device {device}: {gpus} GPU(s) here; {remedy}")
    if args.precision == "auto":  # settled here, so that a resumed run keeps it
        args.precision = auto_precision(device)
    # The workers are forked before this process touches CUDA or loads CLIP.
    envs = make_envs(args, args.num_envs, args.frame_size if args.reward == "clip" else 0)
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
    tasks = list(TASKS) if args.task == "all" else [args.task]
    clip = None
    if args.reward == "clip":
        goals = [args.goal] if args.goal else [TASKS[task].goal for task in tasks]
        try:
            clip = CLIPReward(
                args.clip_model, goals, args.baseline or BASELINE, args.alpha,
                device=device, precision=args.precision, compile=args.compile,
            )  # fmt: skip
        except ValueError as error:
            check(False, str(error))
    obs_dim = envs.single_observation_space["state"].shape[0]
    act_dim = envs.single_action_space.shape[0]
    goal_input = torch.zeros(1, 0, device=device)  # [G, E], tells the goal; nothing of a single one
    if args.evaluate is not None:  # another CLIP may judge the agent, but not tell it its goal
        state = load_checkpoint(args.evaluate, "best.pt", "--evaluate")
        goal_input = state["goal_input"].to(device)
    elif len(tasks) > 1:  # all prompts lie close together: what tells them apart is where they lie
        direction = F.normalize(clip.goal - clip.baseline, dim=-1)
        goal_input = direction * direction.shape[1] ** 0.5  # mean square 1, as of the state

    torch.set_float32_matmul_precision("medium" if args.precision == "bf16" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "bf16"  # in convolutions, on CUDA
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # enough for the networks; the other cores are CLIP's and the workers'
    torch.manual_seed(args.seed)
    normaliser = Normaliser(obs_dim).to(device)
    input_dim = obs_dim + goal_input.shape[1]
    actor = Actor(input_dim, act_dim, args.hidden).to(device)
    critic = TwinQ(input_dim, act_dim, args.hidden, args.layer_norm).to(device)
    target = copy.deepcopy(critic).requires_grad_(False)
    agent = copy.deepcopy(actor).requires_grad_(False)  # the actor's average: what is evaluated
    log_ent_coef = torch.tensor(math.log(args.ent_coef or args.initial_ent_coef), device=device)
    target_entropy = -float(act_dim)
    # The learning rate is a tensor, as --compile would make a number a constant; capturable lets
    # Adam step inside a CUDA graph.
    learning_rate = torch.tensor(args.learning_rate, device=device)
    adam = {"lr": learning_rate, "fused": True, "capturable": device == "cuda"}
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    actor_weights = [*actor.parameters()]
    if args.ent_coef is None:  # its loss and the actor's share no gradient: one pass serves both
        actor_weights.append(log_ent_coef.requires_grad_())
    actor_optimizer = torch.optim.Adam(actor_weights, **adam)
    generator = torch.Generator(device).manual_seed(stream_seed(args.seed, NOISE, RANK))
    random = {"generator": generator, "device": device}
    learned = {
        "normaliser": normaliser, "actor": actor, "agent": agent, "critic": critic,
        "target": target, "critic_optimizer": critic_optimizer, "actor_optimizer": actor_optimizer,
    }  # fmt: skip

    def start_clip() -> None:
        torch.set_num_threads(max(1, threads - 1))  # of CLIP's thread alone
        if device == "cuda":  # in the default stream its kernels would queue behind the updates'
            torch.cuda.set_device(LOCAL_RANK)
            torch.cuda.set_stream(torch.cuda.Stream())

    clip_thread = ThreadPoolExecutor(1, initializer=start_clip)

    def clip_rewards(frames: np.ndarray | torch.Tensor) -> np.ndarray:
        """CLIP's rewards [T, N, G] of frames [T, N, H, W, 3], times the steps each stands for."""
        rewards = clip(frames.reshape(-1, *frames.shape[2:])).unflatten(0, frames.shape[:2])
        return args.action_repeat * rewards.cpu().numpy()

    score = (lambda frames: clip_thread.submit(clip_rewards, frames)) if clip is not None else None

    def network_input(s: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """What the networks see of states [B, O] on the way to goals [B]: [B, O + E]."""
        return torch.cat([normaliser(s), goal_input[goal]], -1)

    @torch.no_grad()
    def policy(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The deterministic action."""
        s = network_input(torch.from_numpy(state).to(device), torch.from_numpy(goal).to(device))
        return torch.tanh(agent(s)[0]).cpu().numpy()

    def final_report(run: Path) -> None:
        """The best and the last agent, beside a random one and no torque, on unseen seeds."""
        rng = np.random.default_rng(args.seed)
        players = {
            "random": lambda s, goal: rng.uniform(-1, 1, (len(s), act_dim)).astype(np.float32),
            "zero": lambda s, goal: np.zeros((len(s), act_dim), np.float32),
            "last": policy,
            "best": policy,
        }
        report, key = {}, (args.seed, REPORT)
        for name, play in players.items():
            if name == "last" and not (run / "last.pt").exists():
                continue  # killed between its first evaluation and its first checkpoint
            if play is policy:  # with the agent that was loaded last: best, in the video
                state = load_checkpoint(run, f"{name}.pt", "--evaluate")
                agent.load_state_dict(state["agent"])
                normaliser.load_state_dict(state["normaliser"])
            report[name], _ = evaluate(envs, play, score, tasks, args.final_episodes, key, args)
            print(f"{name:>6}:", ", ".join(f"{k} {v:.3f}" for k, v in report[name].items()))
        if args.evaluate is None:  # a replay, perhaps of fewer episodes, leaves the run's report
            (run / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if video_envs is not None:
            video = run / "videos" / "best.mp4"
            _, film = evaluate(video_envs, policy, None, tasks, 1, key, args)
            write_video(film, video, None, 0)
            print(f"video: {video}")
            video_envs.close(terminate=True)
        envs.close(terminate=True)

    if args.evaluate is not None:
        final_report(args.evaluate)
        return

    replay = Replay(args.buffer_size, args.num_envs, obs_dim, act_dim, len(tasks), device)
    run_name = f"HumanoidCLIP-v0__{args.exp_name}__{args.seed}__{int(1000 * time.time())}"
    run = args.resume or Path("runs") / gather(run_name)[0]
    replay_folder = run / "replay" / str(RANK)
    replay_folder.mkdir(parents=True, exist_ok=args.resume is not None)
    step, saved_head, best_return = 0, 0, -math.inf
    episode = np.zeros(args.num_envs, np.int64)  # how often each environment was reset
    if args.resume is not None:
        state = load_checkpoint(run, "last.pt", "--resume")
        rank_state = state["ranks"][RANK]
        if clip is not None:
            saved = state["prompts"].to(device)
            same = saved.shape == clip.goal.shape and (saved * clip.goal).sum(-1).min() > 0.9999
            check(same, f"--clip-model {args.clip_model}: not the CLIP of {run}; name that one")
        for name, part in learned.items():
            part.load_state_dict(state[name])
        for optimizer in (critic_optimizer, actor_optimizer):
            # The loop's own learning_rate, not the copy of it that was saved
            optimizer.param_groups[0] |= adam
        log_ent_coef.data.copy_(state["log_ent_coef"])
        if state["device"] == device:  # else the noise starts anew
            generator.set_state(rank_state["generator"])
        step = state["step"]
        if (run / "best.pt").exists():  # which may be newer than last.pt
            best_return = load_checkpoint(run, "best.pt", "--resume")["best_return"]
        saved_head, episode[:] = rank_state["replay_head"], rank_state["episode"]
        replay.load(replay_folder, saved_head)
    arguments = asdict(args) | {"resume": None, "evaluate": None}  # of the run, not of this start
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

    def save_checkpoint(name: str, ranks: list[dict]) -> None:
        state = {key: part.state_dict() for key, part in learned.items()}
        state |= {
            "layout": LAYOUT,
            "args": arguments,
            "log_ent_coef": log_ent_coef.detach(),
            "goal_input": goal_input,
            "prompts": clip.goal if clip is not None else None,  # tell one CLIP from another
            "device": device,
            "ranks": ranks,
            "step": step,
            "best_return": best_return,
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

    def reset(ended: np.ndarray) -> dict[str, np.ndarray]:
        """Start the next episode of the environments that ended, seeded by its number."""
        first = RANK * args.num_envs
        seeds = [stream_seed(args.seed, TRAINING, first + i, int(n)) for i, n in enumerate(episode)]
        episode[ended] += 1
        with worker_failures(envs, f"step {step}: reset"):
            envs.reset_async(seed=seeds, options={"reset_mask": ended})
            return envs.reset_wait(timeout=args.worker_timeout)[0]

    def update(x_t, a_t, r_t, x_next, terminated_t, noise) -> dict[str, torch.Tensor]:
        """One gradient step of critics, actor and temperature on a batch; returns the losses.
        x_t, x_next [B, O + E] are what the networks see of the states."""
        ent_coef = log_ent_coef.detach().exp()
        with torch.no_grad():
            a_next, log_pi_next = actor.sample(x_next, noise[0])
            v_next = target(x_next, a_next).amin(0) - ent_coef * log_pi_next  # [B]
            y = args.reward_scale * r_t + args.gamma * (1 - terminated_t) * v_next
        q = critic(x_t, a_t)  # [2, B]
        qf_loss = F.mse_loss(q, y.expand_as(q)) * 2  # the sum over both critics
        critic_optimizer.zero_grad()
        qf_loss.backward()
        average(*(weight.grad for weight in critic.parameters()))
        critic_optimizer.step()

        a_pi, log_pi = actor.sample(x_t, noise[1])
        actor_loss = (ent_coef * log_pi - critic(x_t, a_pi).amin(0)).mean()
        ent_coef_loss = -(log_ent_coef.exp() * (log_pi.detach() + target_entropy)).mean()
        actor_optimizer.zero_grad()
        (actor_loss + ent_coef_loss).backward(inputs=actor_weights)
        average(*(weight.grad for weight in actor_weights))
        actor_optimizer.step()

        with torch.no_grad():
            for slow, fast, tau in ((target, critic, args.tau), (agent, actor, args.actor_tau)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)
            return {
                "qf_loss": qf_loss.detach(), "actor_loss": actor_loss.detach(),
                "qf_values": q.mean(), "entropy": -log_pi.mean(), "ent_coef": ent_coef,
            }  # fmt: skip

    if args.compile:
        update = torch.compile(update)
        update = CUDAGraph(update) if device == "cuda" else update

    greedy = round(args.greedy_envs * args.num_envs)  # environments that act without noise
    env_index = np.arange(args.num_envs)
    obs = reset(np.ones(args.num_envs, bool))
    pending = []  # rows that CLIP's thread does not have yet
    scoring = []  # batches of rows that it has, each with its rewards to come
    totals = defaultdict(lambda: np.zeros(args.num_envs))  # of the running episodes
    losses, finished = {}, defaultdict(list)  # of the last update; episodes since the last log
    seconds = dict.fromkeys(("act", "update", "env", "clip", "evaluate", "checkpoint"), 0.0)
    started = clock = time.time()

    first_step = step
    stride = args.num_envs * args.action_repeat * WORLD_SIZE  # env steps per action of all ranks
    bar = tqdm(
        total=args.total_timesteps, initial=step, unit="step", mininterval=1, disable=RANK > 0
    )
    while step < args.total_timesteps:
        # ---- Act; at each reset an environment moves on to the next goal
        s = torch.from_numpy(obs["state"]).to(device)  # [N, O]
        goal = (RANK * args.num_envs + env_index + episode) % len(tasks)  # [N]
        if step < args.learning_starts:
            a = 2 * torch.rand(args.num_envs, act_dim, **random) - 1  # [N, A]
        else:
            noise = torch.randn(args.num_envs, act_dim, **random)
            noise[:greedy] = 0
            with torch.no_grad():
                a, _ = actor.sample(network_input(s, torch.from_numpy(goal).to(device)), noise)
        action = ACTION_SCALE * a.cpu().numpy()
        with worker_failures(envs, f"step {step}"):
            envs.step_async(action)
        lap("act")

        # ---- Update, while the workers step and render and CLIP scores
        updates = int((step + stride) * args.updates_per_step) - int(step * args.updates_per_step)
        if step < args.learning_starts or replay.head == 0:  # the first scores come late
            updates = 0
        remaining = 1 - step / args.total_timesteps if args.anneal_lr else 1
        learning_rate.fill_(args.learning_rate * remaining)
        for _ in range(updates):
            s_t, a_t, r_t, s_next, terminated_t, g = replay.sample(args.batch_size, generator)
            if len(tasks) > 1:  # hindsight: every frame was scored for every goal
                relabel = torch.rand(len(g), **random) < args.relabel_fraction
                g = torch.where(relabel, torch.randint(len(tasks), g.shape, **random), g)  # [B]
            r_t = r_t.gather(1, g[:, None])[:, 0]  # [B, G] -> [B]
            x_t, x_next = network_input(s_t, g), network_input(s_next, g)  # [B, O + E]
            noise = torch.randn(2, *a_t.shape, **random)
            losses = update(x_t, a_t, r_t, x_next, terminated_t, noise)
        lap("update")

        # ---- Step
        with worker_failures(envs, f"step {step}"):
            next_obs, reward, terminated, truncated, info = envs.step_wait(args.worker_timeout)
        lap("env")
        step += stride
        last = step >= args.total_timesteps
        # The first step at or past each multiple, whatever --num-envs is
        evaluate_now = last or step % args.eval_every < stride
        save_now = last or step % args.checkpoint_every < stride
        # Both cut the running episodes short: an evaluation needs the environments, and a resume
        # starts with new episodes, as no simulator's state is saved.
        cut = evaluate_now or save_now
        done = terminated | truncated
        ended = done | cut
        s_next = torch.from_numpy(next_obs["state"]).to(device)
        frame = next_obs["frame"]
        steps = info["steps"]
        pending.append(Row(s, a, reward, s_next, terminated, goal, frame, done, ended, steps))

        # ---- Hand the frames of several steps to CLIP's thread as one batch, and store the batch
        # before it, which was scored meanwhile.
        if len(pending) == args.score_every or cut:
            shape = len(pending), *frame.shape  # [T, N, H, W, 3]
            frames = torch.empty(shape, dtype=torch.uint8, pin_memory=device == "cuda")
            np.stack([row.frame for row in pending], out=frames.numpy())
            scoring.append((pending, score(frames) if score else None))
            pending = []
        # A checkpoint has nothing that is pending, so the last batch is waited for.
        while len(scoring) > (0 if cut else 1):
            rows, future = scoring.pop(0)
            if future is not None:
                rewards = future.result()  # [T, N, G]
            else:  # --reward env
                rewards = np.stack([row.reward for row in rows])[..., None]  # [T, N, 1]
            stop_if_nan("the reward", [torch.from_numpy(rewards)])
            for row, r in zip(rows, rewards, strict=True):  # r [N, G], of one step
                replay.add(row.s, row.a, r, row.s_next, row.terminated, row.goal, row.ended.any())
                gained = {"episodic_return": row.reward, "episodic_length": row.steps}
                if score:
                    gained["clip_return"] = r[env_index, row.goal]  # [N]
                for name, value in gained.items():
                    totals[name] += value
                    finished[f"charts/{name}"] += totals[name][row.done].tolist()
                    totals[name][row.ended] = 0
            normaliser.update(torch.cat([row.s_next for row in rows]))
        lap("clip")

        # ---- Evaluate, log, save, reset
        if cut:
            networks = (*actor.parameters(), *critic.parameters(), *normaliser.buffers())
            stop_if_nan("a network", (*networks, log_ent_coef))
        if evaluate_now and RANK == 0:  # the others wait in the next average or gather
            key = args.seed, SELECTION
            summary, _ = evaluate(envs, policy, score, tasks, args.eval_episodes, key, args)
            if video_envs is not None:
                _, film = evaluate(video_envs, policy, None, tasks, 1, key, args)
                write_video(film, run / "videos" / f"{step}.mp4", writer, step)
            for name, value in summary.items():
                writer.add_scalar(f"eval/{name}", value, step)
            # The bar has no room for those of eight tasks.
            bar.set_postfix({k: v for k, v in summary.items() if not k.startswith("success_rate_")})
            selected = summary["clip_return" if score else "episodic_return"]
            if selected > best_return:
                best_return = selected
                save_checkpoint("best.pt", ranks=[])
            lap("evaluate")
        if save_now or step // stride % 100 == 0:
            stop_if_nan("a loss", losses.values())
            if RANK == 0:
                scalars = {f"losses/{name}": value.item() for name, value in losses.items()}
                scalars |= {name: np.mean(values) for name, values in finished.items() if values}
                scalars |= {f"time/{k}": v / (step - first_step) for k, v in seconds.items()}
                scalars["charts/SPS"] = (step - first_step) / (time.time() - started)
                for name, value in scalars.items():
                    writer.add_scalar(name, value, step)
            finished.clear()
        if save_now:
            replay.save(replay_folder, saved_head)
            saved_head = replay.head
            rank_state = {"generator": generator.get_state(), "episode": episode.tolist()}
            ranks = gather(rank_state | {"replay_head": saved_head})
            if RANK == 0:  # now all have their replay on disk
                writer.flush()  # before last.pt: a resume logs again only what is after that
                save_checkpoint("last.pt", ranks)
            lap("checkpoint")
        obs = reset(ended) if ended.any() else next_obs
        lap("env")
        bar.update(stride)
    bar.close()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        writer.close()
        final_report(run)
        print(f"run: {run} ({(time.time() - started) / 60:.1f} minutes)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume continues a run from its last checkpoint") from None

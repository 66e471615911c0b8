"""How accurate is a CLIP as a reward function? Measured on states that its training never saw.

    python tests/clip_accuracy.py                                        # the bundled CLIP
    python tests/clip_accuracy.py --clip-model ViT-B-32/laion2b_s34b_b79k --device cuda
    python tests/clip_accuracy.py --states 2500 --sheet mistakes.png     # and look at its errors

Per task and alpha: the AUC of the reward, goal states against all other states (0.5 is chance),
and the EPIC distance (arXiv 2310.12921) of the reward to the goal-state label, with goal and other
states weighted half and half (0 is perfect, 0.707 no relation). The label is the task's predicate.

The states share no code with `train_tiny_clip.py`: joint angles come from uniform boxes, goal and
near-goal poses settle on the floor, and a PD controller drives the real motors into, out of and
between them, with pushes, from the environment's own start as well.
"""

# ruff: noqa: E402, I001

import json
import multiprocessing
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from sac_clip_humanoid import BASELINE, TASKS, HumanoidEnv, Pose  # first: it sets up MuJoCo

import mujoco
import numpy as np
import tyro
from clip_reward import CLIPReward, goal_baseline_reward
from PIL import Image, ImageDraw
from reproduce import digest
from train_tiny_clip import PARAPHRASES


@dataclass
class Args:
    clip_model: str = str(HERE / "tiny_clip")
    """a model folder, ARCH/TAG, ARCH/FILE or hf-hub:ID"""
    states: int = 6000
    """how many to measure on; one in 40 or more is a goal state of each task"""
    seed: int = 12345
    """of the states; the same seed gives the same states, however many workers"""
    output: Path = HERE / "results" / "clip_accuracy.json"
    """file for the numbers; the table goes beside it as .md"""
    sheet: Path | None = None
    """file for a contact sheet of the worst mistakes (.png)"""
    textured: bool = True
    """look of the humanoid in the frames"""
    camera: Literal["fixed", "track"] = "fixed"
    """view of the frames"""
    device: str = "cpu"
    """where CLIP runs"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of CLIP's image tower"""
    workers: int = 2
    """rendering processes"""


ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
COMBINATION = "a humanoid robot kneeling with both arms raised"  # in no training caption
# What is done, told and commanded, instead of the state that a frame shows. The first of each has
# only words that our trainer teaches, and may itself have been a caption; the second has others.
VERBS = {
    "kneeling": ["a humanoid robot that kneels", "kneel"],
    "lotus": ["a humanoid robot that meditates in the lotus position", "sit down and meditate"],
    "standing": ["a humanoid robot that stands up", "stand up"],
    "arms_raised": ["a humanoid robot raising both arms", "stand up and raise both arms"],
    "splits": ["a humanoid robot that does the side splits", "do the side splits"],
    "hands_on_hips": [
        "a humanoid robot resting its hands on its hips",
        "stand up and put both hands on the hips",
    ],
    "arms_crossed": ["a humanoid robot crossing its arms", "stand up and cross both arms"],
    "one_leg": ["a humanoid robot that stands on one leg", "stand on one leg"],
}


def kneeling_with_arms_raised(p: Pose) -> bool:
    return TASKS["kneeling"].in_goal_state(p) and bool((p.hands_above_head > 0).all())


LABELS = {name: task.in_goal_state for name, task in TASKS.items()}
LABELS["combination"] = kneeling_with_arms_raised

# ---- States -------------------------------------------------------------------------------------

# Boxes of joint angles in degrees, right side; the left shoulders mirror the sign. "right." and
# "left." are one side alone, and such a pose is mirrored half of the time. Joints that are not
# named stay within 6 degrees of zero, the abdomen within 12. "pitch" and "roll" lean the pelvis;
# with an arched back (abdomen_y > 0) the lotus and the splits rest on the floor with the trunk up.
LEGS = {
    "upright": {"pitch": (-4, 4), "hip_x": (-9, 3), "hip_y": (-14, 4), "knee": (-22, -2)},
    "crouch": {"pitch": (0, 35), "hip_y": (-105, -40), "knee": (-135, -60)},
    "kneel": {"pitch": (-8, 10), "hip_x": (-15, 3), "hip_y": (-22, 10), "knee": (-115, -86)},
    "kneel_low": {"pitch": (-5, 22), "hip_x": (-12, 3), "hip_y": (-70, -32), "knee": (-158, -130)},
    "half_kneel": {
        "right.hip_y": (-105, -65), "right.knee": (-110, -70),
        "left.hip_y": (-12, 12), "left.knee": (-112, -85),
    },
    "splits": {
        "pitch": (15, 46), "hip_x": (-25, -17), "hip_z": (-60, -47), "hip_y": (-95, -68),
        "knee": (-15, -2), "abdomen_y": (-12, 30),
    },
    "half_splits": {
        "pitch": (5, 40), "hip_x": (-25, -5), "hip_z": (-40, -8), "hip_y": (-98, -68),
        "knee": (-28, -2),
    },
    "bent_splits": {
        "pitch": (15, 42), "hip_x": (-25, -14), "hip_z": (-60, -40), "hip_y": (-90, -68),
        "right.knee": (-120, -38), "left.knee": (-40, -2),
    },
    "lotus": {
        "pitch": (26, 50), "hip_x": (-25, -16), "hip_z": (-60, -46), "hip_y": (-74, -48),
        "knee": (-160, -146), "abdomen_y": (0, 30),
    },
    "narrow_lotus": {
        "pitch": (10, 45), "hip_x": (-14, 3), "hip_z": (-32, 8), "hip_y": (-88, -58),
        "knee": (-160, -115),
    },
    "half_lotus": {
        "pitch": (10, 45), "hip_x": (-25, -14), "hip_z": (-60, -40), "hip_y": (-85, -55),
        "right.knee": (-160, -140), "left.knee": (-75, -2),
    },
    "sit": {"pitch": (-18, 15), "hip_z": (-18, 12), "hip_y": (-108, -75), "knee": (-50, -2)},
    "knee_up": {"roll": (-8, 0), "right.hip_y": (-85, -25), "right.knee": (-115, -40)},
    "heel_up": {"roll": (-8, 0), "right.hip_y": (-6, 18), "right.knee": (-115, -45)},
    "leg_aside": {
        "roll": (-9, -2), "right.hip_x": (-25, -14), "right.hip_y": (-50, -5),
        "right.knee": (-50, -5),
    },
    "foot_just_off": {"roll": (-7, 2), "right.hip_y": (-26, -5), "right.knee": (-42, -14)},
}  # fmt: skip
ARMS = {
    "loose": {"shoulder1": (-35, 35), "shoulder2": (-45, 35), "elbow": (-75, 35)},
    "hang": {"shoulder1": (35, 60), "shoulder2": (-75, -45), "elbow": (-90, -50)},
    "raised": {"shoulder1": (-85, -64), "shoulder2": (-18, 18), "elbow": (-90, -58)},
    "half_raised": {"shoulder1": (-62, -30), "shoulder2": (-25, 25), "elbow": (-90, -35)},
    "one_raised": {
        "right.shoulder1": (-85, -64), "right.shoulder2": (-18, 18), "right.elbow": (-90, -58),
        "left.shoulder1": (-45, 60), "left.shoulder2": (-60, 30), "left.elbow": (-90, 30),
    },
    "hips": {"shoulder1": (40, 60), "shoulder2": (-85, -68), "elbow": (-14, 14)},
    "one_hip": {
        "right.shoulder1": (40, 60), "right.shoulder2": (-85, -68), "right.elbow": (-14, 14),
        "left.shoulder1": (-60, 60), "left.shoulder2": (-50, 40), "left.elbow": (-90, 30),
    },
    "chest": {"shoulder1": (28, 52), "shoulder2": (-48, 0), "elbow": (10, 50)},
    "crossed": {"shoulder1": (40, 60), "shoulder2": (38, 60), "elbow": (-90, -62)},
    "touching": {"shoulder1": (30, 52), "shoulder2": (14, 40), "elbow": (-70, -30)},
    "forward": {"shoulder1": (-5, 28), "shoulder2": (5, 42), "elbow": (-80, -35)},
    "spread": {"shoulder1": (-40, 0), "shoulder2": (-68, -32), "elbow": (-90, -62)},
}  # fmt: skip

# Legs and arms (None: any) of the poses that should reach each goal, and of those that just miss.
GOALS = {
    "kneeling": [("kneel", None), ("kneel_low", None)],
    "lotus": [("lotus", None)],
    "standing": [("upright", None)],
    "arms_raised": [("upright", "raised")],
    "splits": [("splits", None)],
    "hands_on_hips": [("upright", "hips")],
    "arms_crossed": [("upright", "crossed")],
    "one_leg": [("knee_up", None), ("heel_up", None), ("leg_aside", None)],
    "combination": [("kneel", "raised"), ("kneel_low", "raised")],
}
NEAR_MISSES = {
    "kneeling": [("half_kneel", None), ("crouch", None), ("narrow_lotus", None)],
    "lotus": [("narrow_lotus", None), ("half_lotus", None), ("kneel_low", None)],
    "standing": [("crouch", None), ("foot_just_off", None), ("half_kneel", None)],
    "arms_raised": [("upright", "one_raised"), ("upright", "half_raised"), ("crouch", "raised")],
    "splits": [("half_splits", None), ("bent_splits", None), ("sit", None)],
    "hands_on_hips": [("upright", "one_hip"), ("upright", "chest"), ("upright", "hang"),
                      ("kneel", "hips"), ("crouch", "hips")],
    "arms_crossed": [("upright", "touching"), ("upright", "forward"), ("kneel", "crossed"),
                     ("crouch", "crossed")],
    "one_leg": [("foot_just_off", None), ("half_kneel", None), ("half_lotus", None)],
}  # fmt: skip


class Generator:
    """Puts the humanoid of an env into one state after another, all drawn from one rng."""

    def __init__(self, env: HumanoidEnv, seed: int | np.random.SeedSequence):
        self.env, self.rng = env, np.random.default_rng(seed)
        self.model = env.model
        self.low, self.high = self.model.jnt_range[1:].T  # [17], in the order of qpos[7:]
        self.joints = {self.model.joint(j + 1).name: j for j in range(17)}
        self.motors = self.model.actuator_trnid[:, 0] - 1  # the joint that each motor turns
        self.gear = self.model.actuator_gear[:, 0]
        # The same body, which springs can hold in a pose while it settles on the floor.
        self.held = HumanoidEnv(None).model
        self.held.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        self.held.dof_damping[6:] = 15

    def draw(self, legs: str | None, arms: str | None) -> tuple[np.ndarray, float, float]:
        """Joint angles [17], pitch and roll of the trunk (radians), uniform in the poses' boxes."""
        rng = self.rng
        box = LEGS[legs or rng.choice(list(LEGS))] | ARMS[arms or rng.choice(list(ARMS))]
        degrees = rng.uniform(-6, 6, 17)
        degrees[:3] = rng.uniform(-12, 12, 3)  # the abdomen
        sides = ["right", "left"] if rng.random() < 0.5 else ["left", "right"]
        for name, (low, high) in box.items():
            side, _, joint = name.rpartition(".")
            value = rng.uniform(low, high)
            if joint == "abdomen_y":
                degrees[self.joints[joint]] = value
            elif joint not in ("pitch", "roll"):
                for s in [side] if side else ["right", "left"]:
                    s = sides[s == "left"]
                    if rng.random() < 0.5:  # else both sides alike
                        value = rng.uniform(low, high)
                    sign = -1 if s == "left" and "shoulder" in joint else 1
                    degrees[self.joints[f"{s}_{joint}"]] = sign * value
        pitch, roll = (rng.uniform(*box.get(name, (-3, 3))) for name in ("pitch", "roll"))
        pitch -= degrees[self.joints["abdomen_y"]]
        roll = roll if sides[0] == "right" else -roll
        return np.clip(np.deg2rad(degrees), self.low, self.high), *np.deg2rad([pitch, roll])

    def place(self, angles: np.ndarray, pitch: float, roll: float) -> None:
        """At rest, with the lowest point of the body on the floor."""
        env, rng = self.env, self.rng
        yaw = rng.uniform(-0.8, 0.8) if rng.random() < 0.9 else rng.uniform(-np.pi, np.pi)
        qpos = env.init_qpos.copy()
        qpos[:2] = rng.uniform(-0.35, 0.35, 2)
        mujoco.mju_euler2Quat(qpos[3:7], np.array([roll, pitch, yaw]), "XYZ")
        qpos[7:] = angles
        mujoco.mj_resetData(self.model, env.data)
        env.set_state(qpos, np.zeros(self.model.nv))
        self.lift(-self.gap())

    def gap(self) -> float:
        """Between the floor, geom 0, and the body."""
        data, geoms = self.env.data, range(1, self.model.ngeom)
        return min(mujoco.mj_geomDistance(self.model, data, 0, g, 5.0, None) for g in geoms)

    def lift(self, height: float) -> None:
        qpos = self.env.data.qpos.copy()
        qpos[2] += height
        self.env.set_state(qpos, self.env.data.qvel.copy())

    def settle(self) -> None:
        """Hold the joints with springs, stiff or less so, while the body comes to the floor."""
        data = mujoco.MjData(self.held)
        data.qpos[:] = self.held.qpos_spring[:] = self.env.data.qpos
        self.held.jnt_stiffness[1:] = self.rng.uniform(120, 600)
        mujoco.mj_step(self.held, data, nstep=int(self.rng.integers(0, 220)))
        self.env.set_state(data.qpos, data.qvel)

    def drive(self, target: np.ndarray, steps: int) -> None:
        """Step the environment under PD control to joint angles [17], and sometimes push it."""
        env, rng = self.env, self.rng
        stiffness = 0.4 * self.gear / rng.uniform(0.1, 0.6)  # full torque at this error in radians
        if rng.random() < 0.4:
            env.data.xfrc_applied[1, :3] = rng.uniform(-150, 150, 3) * (1, 1, 0.3)  # N, the chest
        for step in range(steps):
            if step == 8:
                env.data.xfrc_applied[:] = 0
            error = (target - env.data.qpos[7:])[self.motors]
            torque = stiffness * (error - 0.04 * env.data.qvel[6:][self.motors])
            env.step(np.clip(torque / self.gear, -0.4, 0.4))
        env.data.xfrc_applied[:] = 0

    # Each source of states yields whenever the env holds one.

    def goal(self, name: str) -> Iterator[None]:
        for _ in range(25):  # most poses reach the goal within a few draws
            legs, arms = GOALS[name][self.rng.integers(len(GOALS[name]))]
            angles, pitch, roll = self.draw(legs, arms)
            self.place(angles, pitch, roll)
            self.settle()
            if self.rng.random() < 0.5:
                self.drive(angles, int(self.rng.integers(1, 25)))
            if LABELS[name](self.env.pose()):
                break
        yield
        if self.rng.random() < 0.5:  # and out of it again
            self.drive(self.draw(None, None)[0], int(self.rng.integers(3, 45)))
            yield

    def near_miss(self, name: str) -> Iterator[None]:
        options = NEAR_MISSES[name] + GOALS[name]
        legs, arms = options[self.rng.integers(len(options))]
        angles, pitch, roll = self.draw(legs, arms)
        tipped = self.rng.random() < 0.25
        if tipped:
            pitch, roll = pitch + self.rng.uniform(-1.2, 1.2), roll + self.rng.uniform(-1.2, 1.2)
        self.place(angles, pitch, roll)
        if not tipped or self.rng.random() < 0.5:
            self.settle()
        if (legs, arms) in GOALS[name] and not tipped:
            self.lift(self.rng.uniform(0.035, 0.3))  # the pose is right, but hovers
        yield

    def between(self) -> Iterator[None]:
        first, second = (np.hstack(self.draw(None, None)) for _ in range(2))  # [19]
        mixed = first + self.rng.random() * (second - first)
        self.place(mixed[:17], *mixed[17:])
        if self.rng.random() < 0.5:
            self.settle()
        yield

    def anything(self) -> Iterator[None]:
        angles = self.rng.uniform(self.low, self.high)
        self.place(angles, *self.rng.uniform(-0.7, 0.7, 2) * self.rng.choice([1, 4]))
        if self.rng.random() < 0.5:
            self.settle()
        yield

    def episode(self) -> Iterator[None]:
        """From the environment's own start, as an agent that changes its mind."""
        self.env.reset(seed=int(self.rng.integers(2**31)))
        steps = 0
        while steps < 100:
            target = self.draw(None, None)[0]
            if self.rng.random() < 0.4:  # legs as they are: stays up for longer
                target[3:11] = self.rng.uniform(-0.15, 0.05, 8)
            length = int(self.rng.integers(6, 36))
            self.drive(target, length)
            steps += length
            yield

    def fall(self) -> Iterator[None]:
        """Out of a pose, limp or tense, at all phases until it lies."""
        angles, pitch, roll = self.draw(self.rng.choice(["upright", "knee_up", "kneel"]), None)
        self.place(angles, pitch, roll)
        qvel = np.zeros(self.model.nv)
        qvel[:6] = self.rng.uniform(-1.5, 1.5, 6)
        self.env.set_state(self.env.data.qpos.copy(), qvel)
        tense = self.rng.random() < 0.5
        for _ in range(4):
            target = angles if tense else self.env.data.qpos[7:].copy()
            self.drive(target, int(self.rng.integers(2, 30)))
            yield

    def states(self, count: int) -> Iterator[str]:
        """Yields the name of the source `count` times; the env holds the state."""
        sources = [(self.goal, name) for name in GOALS]
        sources += [(self.near_miss, name) for name in NEAR_MISSES]
        sources += [(self.between,)] * 4 + [(self.anything,)] * 2
        sources += [(self.episode,), (self.fall,)]
        made = 0
        while True:
            for i in self.rng.permutation(len(sources)):
                source, *name = sources[i]
                for j, _ in enumerate(source(*name)):
                    left = source == self.goal and j > 0
                    yield "leaving" if left else " ".join([source.__name__, *name])
                    made += 1
                    if made == count:
                        return


def render_states(job: tuple[Args, tuple[int, int], int, np.random.SeedSequence]):
    """frames [n, H, W, 3] uint8, labels [n, len(LABELS)] bool, the source of each [n]."""
    args, (height, width), count, seed = job
    env = HumanoidEnv(None, "rgb_array", args.textured, args.camera, width=width, height=height)
    frames, labels, sources = [], [], []
    for source in Generator(env, seed).states(count):
        pose = env.pose()
        frames.append(env.render())
        labels.append([in_goal_state(pose) for in_goal_state in LABELS.values()])
        sources.append(source)
    env.close()
    return np.stack(frames), np.array(labels), sources


# ---- Measures -----------------------------------------------------------------------------------


def auc(reward: np.ndarray, goal: np.ndarray) -> float:
    """Probability that a goal state has more reward than another state; ties count half."""
    _, place, ties = np.unique(reward, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]  # from 1, the mean rank among equals
    n, m = goal.sum(), (~goal).sum()
    return float((rank[goal].sum() - n * (n + 1) / 2) / (n * m))


def epic(reward: np.ndarray, goal: np.ndarray) -> float:
    """EPIC distance to the goal label, goal and other states weighted half and half."""
    weight = np.where(goal, 0.5 / goal.sum(), 0.5 / (~goal).sum())
    reward, goal = reward - weight @ reward, goal - 0.5
    rho = weight @ (reward * goal) / np.sqrt((weight @ reward**2) * (weight @ goal**2))
    return float(np.sqrt(max(0, 1 - rho) / 2))


def mistakes(frames, rewards, labels, sources, columns: int = 8) -> Image.Image:
    """Per task a row: the other states of highest reward, then the goal states of lowest."""
    height, width = frames.shape[1:3]
    sheet = Image.new("RGB", (2 * columns * (width + 2) + 12, len(TASKS) * (height + 30)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(TASKS):
        order, y = np.argsort(rewards[:, row]), row * (height + 30)
        goal = labels[order, row]
        pen.text((2, y), f"{name}: no goal state, but high reward", fill="red")
        pen.text((columns * (width + 2) + 12, y), "goal state, but low reward", fill="blue")
        picks = [*enumerate(order[~goal][::-1][:columns])]
        picks += enumerate(order[goal][:columns], columns)
        for column, i in picks:
            x = column * (width + 2) + (12 if column >= columns else 0)
            sheet.paste(Image.fromarray(frames[i]), (x, y + 12))
            pen.text((x, y + height + 12), f"{rewards[i, row]:.2f} {sources[i]}"[:17], fill="black")
    return sheet


def table(result: dict) -> str:
    """The result as markdown."""
    lines = [
        f"# Accuracy of `{result['model']}` as a reward",
        "",
        f"AUC / EPIC distance on {result['states']} held-out states (seed {result['seed']}), per "
        "task and alpha. Made by",
        "",
        f"    {result['command']}",
        "",
        "| task | goal states | " + " | ".join(f"alpha = {alpha:g}" for alpha in ALPHAS) + " |",
        "|---" * (len(ALPHAS) + 2) + "|",
    ]
    for name, by_alpha in [*result["tasks"].items(), ("mean", result["mean"])]:
        cells = [f"{cell['auc']:.3f} / {cell['epic']:.3f}" for cell in by_alpha.values()]
        lines.append(f"| {name} | {result['goal_states'].get(name, '')} | {' | '.join(cells)} |")
    lines.append(
        "| worst | | "
        + " | ".join(f"{w['auc']:.3f} / {w['epic']:.3f}" for w in result["worst"].values())
        + " |"
    )
    for what, key in (
        ("Other words for the goals", "paraphrases"),
        ("As verbs, told and commanded", "verbs"),
    ):
        lines += ["", f"{what}, at alpha = 0:", "", "| prompt | AUC | change |", "|---|---|---|"]
        for prompt, p in result[key].items():
            lines.append(f"| {prompt} | {p['auc']:.3f} | {p['change']:+.3f} |")
    lines += ["", "Two at once:", "", "| prompt | AUC |", "|---|---|"]
    c = result["combination"]
    lines.append(f"| {c['prompt']} (both, {c['goal_states']} states) | {c['auc']:.3f} |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    reward = CLIPReward(
        args.clip_model,
        [task.goal for task in TASKS.values()],
        BASELINE,
        device=args.device,
        precision=args.precision,
    )
    size = reward.preprocessing["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)

    chunk = 250
    counts = [min(chunk, args.states - start) for start in range(0, args.states, chunk)]
    seeds = np.random.SeedSequence(args.seed).spawn(len(counts))
    jobs = [(args, size, count, seed) for count, seed in zip(counts, seeds, strict=True)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        frames, labels, sources = zip(*pool.imap(render_states, jobs), strict=True)
    frames, labels, sources = map(np.concatenate, (frames, labels, sources))
    goals = dict(zip(LABELS, labels.T, strict=True))  # [B] bool each
    for name, goal in goals.items():
        if not 0 < goal.sum() < len(goal):
            sys.exit(f"--states {args.states}: {goal.sum()} goal states of {name}; take more")

    s = reward.encode_frames(frames)  # [B, D]
    tasks = {name: {} for name in TASKS}
    for alpha in ALPHAS:
        rewards = goal_baseline_reward(s, reward.goal, reward.baseline, alpha).cpu().numpy()
        for name, r in zip(TASKS, rewards.T.astype(np.float64), strict=True):
            tasks[name][f"{alpha:g}"] = {"auc": auc(r, goals[name]), "epic": epic(r, goals[name])}

    def over_tasks(auc_of, epic_of) -> dict:
        return {
            f"{alpha:g}": {
                "auc": float(auc_of([tasks[name][f"{alpha:g}"]["auc"] for name in TASKS])),
                "epic": float(epic_of([tasks[name][f"{alpha:g}"]["epic"] for name in TASKS])),
            }
            for alpha in ALPHAS
        }

    def cosine(prompt: str) -> np.ndarray:  # [B]
        return (s @ reward.encode_text(prompt)[0]).double().cpu().numpy()

    def in_other_words(prompts_of: dict[str, list[str]]) -> dict:
        found = {}
        for name, prompts in prompts_of.items():
            for prompt in prompts:
                a = auc(cosine(prompt), goals[name])
                change = a - tasks[name]["0"]["auc"]
                found[prompt] = {"task": name, "auc": a, "change": change}
        return found

    with warnings.catch_warnings():  # of words that the bundled CLIP was never taught
        warnings.simplefilter("ignore")
        verbs = in_other_words(VERBS)
    command = shlex.join(["python", "tests/clip_accuracy.py", *sys.argv[1:]])
    result = {
        "model": args.clip_model.removeprefix(f"{HERE.parent}/"),
        "clip": digest(args.clip_model),
        "image_parameters": sum(p.numel() for p in reward.clip.visual.parameters()),
        "command": command.replace(f"{HERE.parent}/", ""),
        "states": len(frames),
        "seed": args.seed,
        "goal_states": {name: int(goals[name].sum()) for name in TASKS},
        "sources": Counter(str(source).split()[0] for source in sources),
        "tasks": tasks,
        "mean": over_tasks(np.mean, np.mean),
        "worst": over_tasks(np.min, np.max),
        "paraphrases": in_other_words(PARAPHRASES),
        "verbs": verbs,
        "combination": {
            "prompt": COMBINATION,
            "goal_states": int(goals["combination"].sum()),
            "auc": auc(cosine(COMBINATION), goals["combination"]),
        },
    }
    result = json.loads(json.dumps(result), parse_float=lambda x: round(float(x), 4))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(result))
    print(table(result))
    if args.sheet:
        cosines = (s @ reward.goal.T).cpu().numpy()  # [B, T], the reward at alpha = 0
        mistakes(frames, cosines, labels, sources).save(args.sheet)


if __name__ == "__main__":
    main(tyro.cli(Args))

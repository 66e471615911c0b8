"""Training states of the playhouse for the bundled CLIP: frames, and what is true of each.

Agent and toys are put where an episode could take them, and often nearly so: a toy before the eye,
or half out of view, in the hand, on a piece of furniture, beside it or in the air above it. The
truth in [0, 1] of each goal is measured here, on the geometry and on what the frame shows of it,
and never with `PlayhouseEnv.in_goal_state`, which marks the agents.
"""

# ruff: noqa: E402, I001

import math
from typing import NamedTuple

from dqn_clip_playhouse import (  # first: it tells MuJoCo how to render
    COLOURS,
    EYE,
    FAMILIES,
    FURNITURE,
    GOALS,
    HELDOUT_GOALS,
    HELDOUT_TOYS,
    KINDS,
    PLACES,
    TOYS,
    TRAIN_GOALS,
    Goal,
    PlayhouseEnv,
    about_z,
)

import mujoco
import numpy as np
import torch

SUBJECTS = ["", "", "", "a photo of ", "an image of ", "a picture of "]
WORDINGS = {
    "find": ["{toy}", "{toy}", "{toy} close by", "{toy} right ahead", "{toy} in the middle"],
    "lift": ["{toy} in the hand", "{toy} held in the hand", "a hand that holds {toy}",
             "{toy} in a hand", "holding {toy}"],
    "bed": ["{toy} on the bed", "{toy} lying on the bed", "a bed with {toy} on it"],
    "table": ["{toy} on the table", "{toy} lying on the table", "a table with {toy} on it"],
    "toy box": ["{toy} in the toy box", "{toy} inside the toy box", "a toy box with {toy} in it"],
}  # fmt: skip
ROOMS = ["a room", "a room with toys", "inside a home", "a home", "a photo of a room"]
RELATIONS = list(WORDINGS)
CELLS = 9  # of a frame, in each direction


class Meaning(NamedTuple):
    """What a caption says of a home: any toy (None), or one of a colour, of a kind, or of both."""

    relation: str
    colour: str | None
    kind: str | None


def goals_of(family: str, goals: tuple[Goal, ...]) -> list[Meaning]:
    return [Meaning(g.place or family, g.colour, g.kind) for g in goals if g.family == family]


# Captions that a frame is to be told by: the goals of a family; and of each relation the colours
# and the kinds, which speak of the held-out toys too without naming them.
CHOICES = [goals_of(family, TRAIN_GOALS) for family in FAMILIES]
for relation in RELATIONS:
    CHOICES.append([Meaning(relation, colour, None) for colour in COLOURS])
    CHOICES.append([Meaning(relation, None, kind) for kind in KINDS])
UNNAMED = [goals_of(family, HELDOUT_GOALS) for family in FAMILIES]
# Those that a single cell is to be told by: the names, colours and kinds of "find"
CELL_CHOICES = [0, len(FAMILIES), len(FAMILIES) + 1]
LANDMARKS = list(FURNITURE)  # what else a cell is to be told by


def caption(meaning: Meaning | None, rng: np.random.Generator) -> str:
    """A random wording; None is a bare room."""
    if meaning is None:
        return str(rng.choice(ROOMS))
    words = [word for word in (meaning.colour, meaning.kind or "toy") if word]
    wording = str(rng.choice(WORDINGS[meaning.relation]))
    return rng.choice(SUBJECTS) + wording.format(toy=" ".join(["a", *words]))


def landmark_caption(name: str, rng: np.random.Generator) -> str:
    return f"{rng.choice(SUBJECTS)}a {name}"


def truth_of(meaning: Meaning | None, truths: np.ndarray) -> np.ndarray:
    """Of a caption for each state: truths [n, relations, colours, kinds] -> [n]."""
    if meaning is None:
        return np.ones(len(truths), np.float32)
    t = truths[:, RELATIONS.index(meaning.relation)]
    colours = slice(None) if meaning.colour is None else [list(COLOURS).index(meaning.colour)]
    kinds = slice(None) if meaning.kind is None else [KINDS.index(meaning.kind)]
    return t[:, colours][:, :, kinds].max((1, 2))


def cell_truths(shares: np.ndarray) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What cells show, from the share of each toy colour, toy kind and landmark in them [n, S].

    For each of `CELL_CHOICES`: which of its captions is true of a cell, [n, C], and 1 [n] for a
    cell of which nothing is to be learned, as it shows several toys, the rim of one, or one that
    the captions may not name.
    """
    colours, kinds = np.split(shares, [len(COLOURS), len(COLOURS) + len(KINDS)], axis=1)[:2]
    toys, colour, kind = kinds.sum(1), colours.argmax(1), kinds.argmax(1)
    some = toys > 0.005
    unclear = some & (np.minimum(colours.max(1), kinds.max(1)) < np.maximum(0.03, 0.7 * toys))
    truths = {}
    for choice in CELL_CHOICES:
        names = [(m.colour, m.kind) for m in CHOICES[choice]]
        match = np.array([
            some
            & (c is None or colour == list(COLOURS).index(c))
            & (k is None or kind == KINDS.index(k))
            for c, k in names
        ]).T  # fmt: skip
        unnamed = unclear | (some & ~match.any(1))
        truths[choice] = torch.from_numpy(np.float32(match)), torch.from_numpy(np.float32(unnamed))
    return truths


def sample_meanings(truths: np.ndarray, count: int, rng: np.random.Generator) -> list:
    """Half of them true of one of the batch's images, half random; never of a held-out toy."""
    meanings = []
    for i in range(count):
        relation, colour, kind = (int(rng.integers(n)) for n in truths.shape[1:])
        if i % 2 == 0:
            true = np.argwhere(truths[rng.integers(len(truths))] > 0.5)
            if len(true):
                relation, colour, kind = true[rng.integers(len(true))]
        colour, kind = list(COLOURS)[colour], KINDS[kind]
        said = rng.choice(4, p=[0.75, 0.1, 0.1, 0.05])  # both, the colour, the kind, neither
        meaning = Meaning(
            RELATIONS[relation],
            colour if said in (0, 1) else None,
            kind if said in (0, 2) else None,
        )
        meanings.append(None if (meaning.colour, meaning.kind) in HELDOUT_TOYS else meaning)
    return meanings


def soft(x: float, zero: float, one: float) -> float:
    """A ramp from 0 at `zero` to 1 at `one`."""
    return float(np.clip((x - zero) / (one - zero), 0, 1))


class HomeStudio:
    """Random homes, and an agent and toys that are moved about in them."""

    def __init__(self, size: int, seed: int):
        self.env = PlayhouseEnv("rgb_array", goals=GOALS, width=size, height=size)
        self.rng = np.random.default_rng(seed)
        rows, columns = np.indices((size, size)) * CELLS // size
        self.cells = rows * CELLS + columns  # [H, W], which one a pixel lies in

    def states(self, count: int, per_home: int = 25):
        """frames [n, H, W, 3] uint8, truths [n, R, C, K] float32, shares [n, S, 9, 9] float32: of
        each cell's pixels, of each toy colour, toy kind and landmark."""
        shots = []
        while len(shots) < count:
            self.env.reset(seed=int(self.rng.integers(2**31)))
            for _ in range(per_home):
                self._arrange()
                shots.append(self._shoot())
        frames, truths, shares = zip(*shots[:count], strict=True)
        self.env.close()
        return np.stack(frames), np.stack(truths), np.stack(shares)

    # ---- Where things are

    def _arrange(self) -> None:
        env, rng = self.env, self.rng
        if env.held is not None:
            env._solid(env.held, True)
            env.held = None
        toy = int(rng.integers(len(env.toys)))
        kind = rng.choice(
            ["free", "seen", "held", "placed", "beside"], p=[0.15, 0.3, 0.2, 0.25, 0.1]
        )
        place = str(rng.choice(["bed", "table", "toy box"], p=[0.28, 0.28, 0.44]))
        if kind in ("placed", "beside"):
            self._lay(toy, place, on_it=kind == "placed")
        if kind == "free" or not self._stand_before(env.toy_position(toy)[:2]):
            x, y = rng.uniform((env.west, env.south), (env.east, env.north)) * 0.85
            self._stand(x, y, rng.uniform(-math.pi, math.pi))
        env._tilt = int(rng.choice([0, 1, 2], p=[0.35, 0.45, 0.2]))
        if kind == "held":
            if rng.random() < 0.7:  # on the way to a place, as often before the release
                x, y, _ = env.furniture[place]
                self._stand_before(np.array([x, y]), far=rng.choice([1.7, 4.0]))
            env.held = toy
            env._solid(toy, False)
            env._carry()
        tenths = int(rng.choice([0, 1, 6], p=[0.2, 0.2, 0.6]))  # of a second, without moving
        mujoco.mj_step(env.model, env.data, nstep=10 * tenths)  # what was laid down comes to rest
        if env.held is not None:
            env._carry()
        mujoco.mj_forward(env.model, env.data)

    def _stand(self, x: float, y: float, yaw: float) -> None:
        self.env.data.qpos[self.env._agent_qpos] = x, y, yaw
        self.env.data.qvel[:] = 0
        mujoco.mj_forward(self.env.model, self.env.data)

    def _stand_before(self, target: np.ndarray, far: float = 1.7) -> bool:
        """At a free spot near the target, more or less facing it."""
        env, rng = self.env, self.rng
        for _ in range(20):
            distance, angle = rng.uniform(0.35, far), rng.uniform(-math.pi, math.pi)
            x, y = target + distance * np.array([math.cos(angle), math.sin(angle)])
            inside = env.west + 0.2 < x < env.east - 0.2 and env.south + 0.2 < y < env.north - 0.2
            if inside and all(
                abs(x - X) > w + 0.2 or abs(y - Y) > d + 0.2 for X, Y, w, d in env.obstacles
            ):
                turn = rng.normal(0, 0.3) if rng.random() < 0.8 else rng.uniform(-1, 1)
                self._stand(x, y, math.atan2(*(target - (x, y))[::-1]) + turn)
                return True
        return False

    def _lay(self, toy: int, place: str, on_it: bool) -> None:
        """On the place, or on the floor beside it."""
        env, rng = self.env, self.rng
        (w, d, _), (x, y, angle) = FURNITURE[place], env.furniture[place]
        scale = rng.uniform(-0.7, 0.7, 2)
        if not on_it:
            axis = int(rng.integers(2))
            scale[axis] = rng.choice([-1, 1]) * rng.uniform(1.4, 1.9)
        u, v = scale * (w, d)
        c, s = math.cos(angle), math.sin(angle)
        height = {"bed": 0.35, "table": 0.45, "toy box": 0.1}[place] if on_it else 0.02
        height += TOYS[env.toys[toy][1]][0] + (rng.uniform(0.1, 0.4) if rng.random() < 0.2 else 0)
        joint = env.model.joint(env._toy_bodies[toy].jntadr[0])
        env.data.qpos[joint.qposadr[0] :][:7] = (
            *(x + c * u - s * v, y + s * u + c * v, height),
            *about_z(rng.uniform(-math.pi, math.pi)),
        )
        env.data.qvel[joint.dofadr[0] :][:6] = 0
        mujoco.mj_forward(env.model, env.data)

    # ---- What is true

    def _shoot(self):
        env = self.env
        renderer = env._draw()
        frame = renderer.render()
        renderer.enable_segmentation_rendering()
        geoms = renderer.render()[..., 0]  # [H, W], -1 where there is none
        renderer.disable_segmentation_rendering()
        bodies = np.where(geoms >= 0, env.model.geom_bodyid[geoms], -1)
        truth = np.zeros((len(RELATIONS), len(COLOURS), len(KINDS)), np.float32)
        pixels = np.zeros((len(COLOURS) + len(KINDS) + len(LANDMARKS), CELLS**2))
        for toy, (colour, kind) in enumerate(env.toys):
            c, k = list(COLOURS).index(colour), KINDS.index(kind)
            its = bodies == env._toy_bodies[toy].id
            seen = np.argwhere(its) / bodies.shape  # [P, 2] in [0, 1]
            share = len(seen) / bodies.size
            pixels[[c, len(COLOURS) + k]] += self._in_cells(its)
            if share == 0:
                continue
            position = env.toy_position(toy)
            eye = np.array([*env.position, EYE])
            if toy == env.held:
                truth[RELATIONS.index("lift"), c, k] = soft(share, 0.002, 0.006)
                continue
            truth[RELATIONS.index("find"), c, k] = min(
                soft(float(np.linalg.norm(position - eye)), 1.35, 1.12),
                soft(float(np.abs(seen.mean(0) - 0.5).max()), 0.23, 0.17),
                soft(share, 0.004, 0.008),
            )
            for place in PLACES:
                truth[RELATIONS.index(place), c, k] = min(
                    self._lies(toy, place), soft(share, 0.001, 0.003)
                )
        for i, name in enumerate(LANDMARKS):
            its = bodies == env.model.body(name).id
            pixels[len(COLOURS) + len(KINDS) + i] = self._in_cells(its)
        shares = pixels / np.bincount(self.cells.ravel())
        return frame, truth, shares.reshape(-1, CELLS, CELLS).astype(np.float32)

    def _in_cells(self, mask: np.ndarray) -> np.ndarray:
        """How many pixels of a mask [H, W] lie in each cell: [81]."""
        return np.bincount(self.cells[mask], minlength=CELLS**2)

    def _lies(self, toy: int, place: str) -> float:
        """By where the toy is over the place's footprint, and how high."""
        env = self.env
        (w, d, _), (x, y, angle) = FURNITURE[place], env.furniture[place]
        px, py, pz = env.toy_position(toy)
        c, s = math.cos(angle), math.sin(angle)
        u, v = c * (px - x) + s * (py - y), -s * (px - x) + c * (py - y)
        inside = soft(max(abs(u) - w, abs(v) - d), 0.0, -0.05)
        if place == "toy box":
            return min(inside, soft(pz, 0.42, 0.32))
        top = {"bed": 0.33, "table": 0.425}[place]
        return min(inside, soft(pz, top - 0.02, top + 0.03), soft(pz, top + 0.3, top + 0.22))

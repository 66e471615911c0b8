"""A home in which a first-person agent is to find, lift and place toys, each goal a sentence.

    python dqn_clip_playhouse.py --tour          # writes tour.mp4: a walk that finds, lifts, places

The setting of Baumli et al., "Vision-Language Models as a Source of Rewards", arXiv 2312.09187.
Their home is not public; this one is built in code, a new one for each episode.
"""

import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa: each worker renders on its own core
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium as gym
import imageio
import numpy as np
import torch  # noqa: F401  before mujoco: torch must load ahead of the first GL context
import tyro

try:
    import mujoco
except Exception as error:  # mujoco raises whatever its GL loader raised
    print(
        f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: mujoco cannot load this renderer ({error}). "
        "On Debian or Ubuntu: apt-get install libegl1 libgl1, or apt-get install libosmesa6 and "
        "set MUJOCO_GL=osmesa",
        file=sys.stderr,
    )
    raise SystemExit(2) from None


@dataclass
class Args:
    tour: bool = False
    """write a video of a scripted walk that finds, lifts and places a toy"""
    seed: int = 1
    """of the homes"""
    output: Path = Path("tour.mp4")
    """file for the video"""


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
# Where toys lie on it: height, half the width, and the middle towards the back.
SURFACES = {"bed": (0.33, 0.3, -0.34), "table": (0.425, 0.3, 0.0), "sofa": (0.28, 0.27, -0.12)}


EYE, HAND, RADIUS = 0.75, (0.5, 0.6), 0.2  # m: height of the eye; hand: ahead, height; body
STRIDE, TURN = 0.2, math.radians(20)  # of one step
TILTS = tuple(math.radians(degrees) for degrees in (-50, -25, 0))  # of the view
GRAB_FROM, RELEASE_FROM = (0.4, 0.9), (0.42, 0.58)  # m on the floor, for a sure success
TOY_GROUP = 1  # of the geoms that a carried toy passes through
REACH, NEAR = 1.2, 1.2  # m from the eye: what can be grabbed, and what counts as found
ACTIONS = ("forward", "back", "left", "right", "up", "down", "grab", "release", "stay")


def about_z(angle: float) -> tuple[float, float, float, float]:
    """Quaternion of a turn by `angle` (radians)."""
    return math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)


class NoRoom(Exception):
    """What was drawn does not fit into this home."""


class PlayhouseEnv(gym.Env):
    """A home with toys, seen through the eyes of someone who walks in it.

    ## Description
    Two rooms joined by a doorway, with furniture, and four to six toys on the floor and on the
    furniture. Everything is drawn anew in each episode: sizes, places, colours, light and toys. One
    of the toys has the goal's kind and another colour, and one its colour and another kind.

    ## Action Space
    `Discrete(9)`, a tenth of a second each.

    | Num | Action                      | Num | Action                                         |
    | --- | --------------------------- | --- | ---------------------------------------------- |
    | 0   | walk 0.2 m forward          | 5   | look 25 degrees lower (down to -50)            |
    | 1   | walk 0.2 m back             | 6   | grab the nearest toy in reach that is central  |
    | 2   | turn 20 degrees to the left | 7   | release it, where there is room                |
    | 3   | turn 20 degrees to the right| 8   | stay                                           |
    | 4   | look 25 degrees higher      |     |                                                |

    Contact stops the body at walls and furniture; toys obey physics. A toy in the hand is carried
    in front of the body, and falls onto what is below when it is released.

    ## Observation Space
    `Box(0, 255, (height, width, 3), uint8)`: the frame, from an eye height of 0.75 m.

    ## Rewards
    1 in a goal state, else 0. The CLIP reward of a frame is computed outside, in batches.

    ## Starting State
    On a free spot of the floor, in any direction, looking 25 degrees down.

    ## Episode End
    Truncation after `max_episode_steps` (100).

    ## Arguments
    | Parameter         | Default       | Description                                          |
    | ----------------- | ------------- | ---------------------------------------------------- |
    | `goals`           | `TRAIN_GOALS` | what the goal of an episode is drawn from            |
    | `width`, `height` | 96            | size of the frame in pixels                          |

    `reset(options={"goal": goal})` sets the goal. `info["goal"]` is its index in `GOALS`, and
    `info["success"]` says whether the simulator's state is one of the goal: a toy is *found* when
    it is within 1.2 m, in the middle of the view and not hidden, *lifted* when it is in the hand,
    and *placed* when it is not in the hand and rests on the bed or the table, or in the toy box.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        render_mode: str | None = None,
        goals: Sequence[Goal] = TRAIN_GOALS,
        width: int = 96,
        height: int = 96,
    ):
        self.render_mode, self.goals, self.width, self.height = render_mode, goals, width, height
        self.observation_space = gym.spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._renderer = None

    # ---- The home

    def _home(self) -> mujoco.MjModel:
        rng = self.np_random
        spec = mujoco.MjSpec()
        spec.option.timestep = 0.01
        quality, look = spec.visual.quality, spec.visual
        quality.numslices, quality.numstacks, quality.offsamples = 10, 6, 0
        look.global_.offwidth, look.global_.offheight = self.width, self.height
        look.map.znear, spec.stat.extent = 0.02, 1  # m: znear counts in extents
        look.headlight.ambient, look.headlight.diffuse = (0.35,) * 3, (0.3,) * 3
        spec.worldbody.add_light(
            type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
            pos=(0, 0, 4),
            dir=(*rng.uniform(-0.5, 0.5, 2), -1),
            diffuse=(rng.uniform(0.35, 0.6),) * 3,
            castshadow=False,
        )
        self._rooms(spec)
        self._furniture(spec)
        self._spots = []  # on the floor, taken by toys and the agent
        for i, (colour, kind) in enumerate(self.toys):
            self._toy(spec, f"toy{i}", colour, kind)
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
        self._doorway = 0.0, door, 0.75, 0.6  # a rectangle: centre and half sizes
        self.obstacles = []  # and more of them

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
        wall = self._tone(0.6, 0.9)
        for y0, y1 in ((self.south, door - 0.5), (door + 0.5, self.north)):
            box(-0.05, 0.05, y0, y1, 0, 3, wall)
            self.obstacles.append((0.0, (y0 + y1) / 2, 0.05, (y1 - y0) / 2))

    def _furniture(self, spec: mujoco.MjSpec) -> None:
        self.furniture = {}  # name -> (x, y, angle)
        for name, (w, d, parts) in FURNITURE.items():
            x, y, quarter, half = self._against_a_wall(w, d)
            self.obstacles.append((x, y, *half))
            angle = quarter * math.pi / 2
            self.furniture[name] = x, y, angle
            body = spec.worldbody.add_body(name=name, pos=(x, y, 0), quat=about_z(angle))
            tone = self._tone(0.35, 0.6) * (1.0, 0.85, 0.7)
            for size, pos, shade in parts:
                rgb = tone * shade if isinstance(shade, float) else shade
                body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=pos, rgba=(*rgb, 1))

    def _against_a_wall(self, w: float, d: float):
        """A free place for a piece: x, y, quarter turns, half sizes along x and y after them."""
        rng = self.np_random
        for _ in range(200):
            quarter = int(rng.integers(4))
            hx, hy = (w, d) if quarter % 2 == 0 else (d, w)
            low, high = (self.west, -0.05) if rng.random() < 0.5 else (0.05, self.east)
            low, high = np.array([[low, self.south], [high, self.north]])
            low, high = low + (hx, hy) + 0.02, high - (hx, hy) - 0.02
            x, y = rng.uniform(low, high)
            x = (x, low[0], x, high[0])[quarter]
            y = (high[1], y, low[1], y)[quarter]
            if self._is_free(x, y, hx + 0.1, hy + 0.1):
                return x, y, quarter, (hx, hy)
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
        if (colour, kind) == self.toys[0] and self.goal.place in surfaces:
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
        quat = about_z(rng.uniform(-math.pi, math.pi))
        body = spec.worldbody.add_body(name=name, pos=(x, y, height + rest + 0.01), quat=quat)
        body.add_freejoint()
        for type_, size, pos, rgb, quat in parts:
            rgba = (*(rgb or COLOURS[colour]), 1)
            body.add_geom(
                type=type_, size=size, pos=pos, quat=quat, rgba=rgba, density=200,
                friction=(1, 0.02, 0.01), condim=6, group=TOY_GROUP,
            )  # fmt: skip

    def _agent(self, spec: mujoco.MjSpec) -> None:
        x, y = self._free_floor(0.3)
        agent = spec.worldbody.add_body(name="agent")
        for name, axis in (("x", (1, 0, 0)), ("y", (0, 1, 0))):
            agent.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis)
        agent.add_joint(name="yaw", type=mujoco.mjtJoint.mjJNT_HINGE, axis=(0, 0, 1))
        self._start = x, y, self.np_random.uniform(-math.pi, math.pi)
        shapes = mujoco.mjtGeom
        agent.add_geom(
            type=shapes.mjGEOM_CYLINDER, size=(RADIUS, 0.35, 0), pos=(0, 0, 0.4),
            rgba=(0, 0, 0, 0), density=2000, group=TOY_GROUP, condim=1, priority=1,  # slides
        )  # fmt: skip
        skin = {"type": shapes.mjGEOM_BOX, "contype": 0, "conaffinity": 0}
        skin |= {"rgba": (0.85, 0.62, 0.48, 1)}
        agent.add_geom(size=(0.09, 0.02, 0.016), pos=(0.32, -0.16, 0.47), **skin)
        agent.add_geom(size=(0.045, 0.03, 0.01), pos=(0.44, -0.14, 0.48), **skin)
        for i, tilt in enumerate(TILTS):  # a camera looks along its -z, with y up
            agent.add_camera(
                name=f"eye{i}", pos=(0.05, 0, EYE), fovy=80,
                xyaxes=(0, -1, 0, -math.sin(tilt), 0, math.cos(tilt)),
            )  # fmt: skip

    # ---- Episodes

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng = self.np_random
        drawn = self.goals[int(rng.integers(len(self.goals)))]  # always: a seed is a home
        self.goal = (options or {}).get("goal", drawn)
        if self.goal not in GOALS:
            raise ValueError(f"goal {self.goal}: not one of GOALS")
        toy = self.goal.colour, self.goal.kind
        others = [other for other in TOY_NAMES if other != toy]
        rng.shuffle(others)
        kin = [next(o for o in others if o[i] == toy[i]) for i in (1, 0)]
        strangers = [other for other in others if other not in kin]
        self.toys = [toy, *kin, *strangers[: int(rng.integers(1, 4))]]
        while True:
            try:
                self._used = set()
                self.model = self._home()
                self.data = mujoco.MjData(self.model)
                self._settle()
                route(self, self.toy_position(0)[None, :2], *GRAB_FROM)
                if self.goal.place is not None:
                    route(self, self.points_on(self.goal.place), *RELEASE_FROM)
                break
            except NoRoom:  # or no way
                continue
        self.close()
        return self._frame(), self._info()

    def _settle(self) -> None:
        """The agent goes to its start, and toys come to rest."""
        self.held, self._tilt = None, 1
        model = self.model
        self._place = [model.joint(name).qposadr[0] for name in ("x", "y", "yaw")]
        self._speed = [model.joint(name).dofadr[0] for name in ("x", "y", "yaw")]
        self._toys = [model.body(f"toy{i}") for i in range(len(self.toys))]
        self.data.qpos[self._place] = self._start
        mujoco.mj_step(model, self.data, nstep=30)
        mujoco.mj_forward(model, self.data)

    def step(self, action):
        name, data = ACTIONS[action], self.data
        if name == "grab" and self.held is None:
            self._grab()
        elif name == "release" and self.held is not None:
            self._release()
        self._tilt = min(max(self._tilt + {"up": 1, "down": -1}.get(name, 0), 0), len(TILTS) - 1)
        stride = {"forward": STRIDE, "back": -STRIDE}.get(name, 0.0)
        turn = {"left": TURN, "right": -TURN}.get(name, 0.0)
        yaw = data.qpos[self._place[2]]
        for _ in range(10):  # a tenth of a second, in which only contact stops the walk
            velocity = stride * math.cos(yaw), stride * math.sin(yaw), turn
            data.qvel[self._speed] = np.array(velocity) / 0.1
            mujoco.mj_step(self.model, data)
        data.qvel[self._speed] = 0
        if self.held is not None:
            self._carry()
        mujoco.mj_forward(self.model, data)
        info = self._info()
        return self._frame(), float(info["success"]), False, False, info

    def _grab(self) -> None:
        views = [(*self._view(toy), toy) for toy in range(len(self.toys))]
        reachable = [
            (distance, toy)
            for distance, angle, toy in views
            if distance < REACH and angle < math.radians(22) and self._in_sight(toy)
        ]
        if reachable:
            self.held = min(reachable)[1]
            self._solid(self.held, False)

    def _in_sight(self, toy: int) -> bool:
        """No wall or furniture stands between the eye and the toy."""
        eye = self.data.camera(f"eye{self._tilt}").xpos
        hit, home = np.zeros(1, np.int32), np.array([1, 0, 0, 0, 0, 0], np.uint8)
        agent = self.model.body("agent").id  # the hand does not hide it
        to_toy = self.toy_position(toy) - eye
        free = mujoco.mj_ray(self.model, self.data, eye, to_toy, home, True, agent, hit)
        return free < 0 or free > 1  # in units of the ray

    def _release(self) -> None:
        self._solid(self.held, True)
        mujoco.mj_collision(self.model, self.data)
        contact = self.data.contact
        own = (self.model.geom_bodyid[contact.geom] == self._toys[self.held].id).any(1)
        if (contact.dist[own] < -0.02).any():
            self._solid(self.held, False)  # no room for it: it stays in the hand
        else:
            self.held = None

    def _carry(self) -> None:
        """The held toy goes where the hand is: ahead of the body, on this side of a wall."""
        x, y, yaw = self.data.qpos[self._place]
        hand, ahead = np.array([x, y, HAND[1]]), np.array([math.cos(yaw), math.sin(yaw), 0])
        hit, group = np.zeros(1, np.int32), np.array([1, 0, 0, 0, 0, 0], np.uint8)
        free = mujoco.mj_ray(self.model, self.data, hand, ahead, group, True, -1, hit)
        reach = HAND[0] if free < 0 else min(HAND[0], max(free - 0.15, RADIUS))
        joint = self.model.joint(self._toys[self.held].jntadr[0])
        # Turned half aside, so that one sees what it is.
        self.data.qpos[joint.qposadr[0] :][:7] = *(hand + reach * ahead), *about_z(yaw + 1)
        self.data.qvel[joint.dofadr[0] :][:6] = 0

    def _solid(self, toy: int, solid: bool) -> None:
        body = self._toys[toy]
        geoms = slice(body.geomadr[0], body.geomadr[0] + body.geomnum[0])
        self.model.geom_contype[geoms] = self.model.geom_conaffinity[geoms] = solid

    @property
    def position(self) -> np.ndarray:
        """Of the agent on the floor, [2]."""
        return self.data.qpos[self._place[:2]]

    def bearing(self, point: np.ndarray) -> float:
        """The turn to the left (radians) after which the agent faces a point."""
        dx, dy = point - self.position
        angle = math.atan2(dy, dx) - self.data.qpos[self._place[2]]
        return math.remainder(angle, 2 * math.pi)

    def toy_position(self, toy: int) -> np.ndarray:
        return self.data.xpos[self._toys[toy].id]

    def points_on(self, place: str) -> np.ndarray:
        """Where the goal's toy can lie there, apart from the others: [K, 2]."""
        w, d, _ = FURNITURE[place]
        x, y, angle = self.furniture[place]
        c, s = math.cos(angle), math.sin(angle)
        inner = np.linspace(-1, 1, 9)[:, None] * (w - 0.28, d - 0.28)
        local = np.stack(np.meshgrid(*inner.T), -1).reshape(-1, 2)
        points = local @ np.array([[c, s], [-s, c]]) + (x, y)
        others = np.array([self.toy_position(toy)[:2] for toy in range(1, len(self.toys))])
        apart = np.linalg.norm(points[:, None] - others, axis=-1).min(1)
        return points[apart > 0.35]

    # ---- Truth

    def _view(self, toy: int) -> tuple[float, float]:
        """A toy's distance from the eye (m) and angle from the middle of the view (radians)."""
        eye = self.data.camera(f"eye{self._tilt}")
        to_toy = self.data.xpos[self._toys[toy].id] - eye.xpos
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

    def _found(self, toy: int) -> bool:
        distance, angle = self._view(toy)
        if distance > NEAR or angle > math.radians(40):
            return False  # and nothing to draw
        renderer = self._draw()
        renderer.enable_segmentation_rendering()
        geoms = renderer.render()[..., 0]  # [H, W], -1 where there is none
        renderer.disable_segmentation_rendering()
        seen = np.argwhere((self.model.geom_bodyid[geoms] == self._toys[toy].id) & (geoms >= 0))
        if len(seen) < 0.006 * self.width * self.height:
            return False
        middle = seen.mean(0) / (self.height, self.width)
        return bool((np.abs(middle - 0.5) < 0.2).all())

    def _placed(self, toy: int, place: str) -> bool:
        body = self._toys[toy]
        speed = self.data.qvel[self.model.joint(body.jntadr[0]).dofadr[0] :][:3]
        if np.linalg.norm(speed) > 0.3:
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
        return {"goal": GOALS.index(self.goal), "success": self.in_goal_state(self.goal)}

    # ---- Frames

    def _draw(self) -> mujoco.Renderer:
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self.model, self.height, self.width)
            flags = self._renderer.scene.flags
            for flag in ("SHADOW", "REFLECTION", "SKYBOX"):
                flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._renderer.update_scene(self.data, f"eye{self._tilt}")
        return self._renderer

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
    came_from, queue = {start: None}, deque([start])
    while queue:
        i, j = here = queue.popleft()
        if arrived[here].any():
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


gym.register("PlayhouseCLIP-v0", PlayhouseEnv, max_episode_steps=100)


def tour(path: Path, seed: int) -> list[str]:
    """A video of a walk that finds a toy, lifts it and places it; returns what it missed."""
    goals = [goal for goal in TRAIN_GOALS if goal.family == "place"]
    goal = goals[seed % len(goals)]
    env = PlayhouseEnv("rgb_array", width=320, height=320)
    film = [env.reset(seed=seed, options={"goal": goal})[0]]
    missed = []
    for stage in (*(Goal(family, goal.colour, goal.kind) for family in ("find", "lift")), goal):
        film += [env.step(action)[0] for action in scripted(env, stage)]
        if not env.in_goal_state(stage):
            missed.append(stage.prompt)
        film += film[-1:] * 10  # a second to look at it
    env.close()
    imageio.mimwrite(path, film, fps=10, macro_block_size=1)
    return missed


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not args.tour:
        print("--tour: nothing to do without it", file=sys.stderr)
        raise SystemExit(2)
    for condition, message in (
        (args.seed >= 0, f"--seed {args.seed}: must be at least 0"),
        (args.output.suffix == ".mp4", f"--output {args.output}: must end in .mp4"),
        (
            args.output.parent.is_dir(),
            f"--output {args.output}: its folder does not exist; make it",
        ),
    ):
        if not condition:
            print(message, file=sys.stderr)
            raise SystemExit(2)
    missed = tour(args.output, args.seed)
    print(f"video: {args.output}")
    if missed:
        raise SystemExit(f"not reached: {', '.join(missed)}")


if __name__ == "__main__":
    main()

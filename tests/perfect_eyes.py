"""The playhouse's agent with perfect eyes in CLIP's place: what is the algorithm alone able to?

    python tests/perfect_eyes.py --total-timesteps 160000 --epsilon-steps 60000

A frame here says of each pixel which toy or piece of furniture it shows, and the embedding of a
cell is the mean of theirs, with some noise. The reward is the simulator's truth. So what the agent
learns is told apart from what CLIP sees, at less cost. The flags are those of
dqn_clip_playhouse.py. It compares settings with each other: its success rates are not the script's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dqn_clip_playhouse as dqn

import numpy as np
import torch
import torch.nn.functional as F

SIZE, SIDE = 48, 8  # pixels of a frame, and cells
DIM, NOISE = 24, 0.4  # of an embedding: its size, and the length of its noise beside its own of 1
FLAGS = ["--reward", "env", "--frame-size", str(SIZE), "--no-capture-video"]


def directions(names) -> dict[str, torch.Tensor]:
    """A random unit vector for each name."""
    vectors = F.normalize(torch.randn(len(names), DIM, generator=generator), dim=-1)
    return dict(zip(names, vectors, strict=True))


generator = torch.Generator().manual_seed(0)
COLOURS, KINDS, PLACES = map(directions, (dqn.COLOURS, dqn.KINDS, dqn.PLACES))
OTHERS = directions(["agent", "furniture", "floor", "wall"])
TOYS = [F.normalize(COLOURS[colour] + KINDS[kind], dim=-1) for colour, kind in dqn.TOY_NAMES]
# What a pixel adds to its cell; toys stand out, as they do for a CLIP.
WEIGHTS = [3.0] * len(TOYS) + [1.5] * len(PLACES) + [1.0, 1.0, 0.7, 0.7]
PIXELS = torch.stack([*TOYS, *PLACES.values(), *OTHERS.values()]) * torch.tensor(WEIGHTS)[:, None]
NAMES = [*dqn.TOY_NAMES, *PLACES, *OTHERS]  # of the rows of PIXELS


def code(env: dqn.PlayhouseEnv, geom: int) -> int:
    """The row of PIXELS that a geom is."""
    name = env.model.body(env.model.geom_bodyid[geom]).name
    if name in PLACES or name == "agent":
        return NAMES.index(name)
    if name.startswith("toy"):
        return NAMES.index(env.toys[int(name.removeprefix("toy"))])
    if name == "world":
        return NAMES.index("floor" if env.model.geom_pos[geom, 2] < 0.1 else "wall")
    return NAMES.index("furniture")


def frame(env: dqn.PlayhouseEnv) -> np.ndarray:
    """In place of colours the code of what each pixel shows, uint8 [H, W, 3]."""
    renderer = env._draw()
    renderer.enable_segmentation_rendering()
    ids = renderer.render()[..., 0]  # [H, W], -1 where there is no geom
    renderer.disable_segmentation_rendering()
    geoms, where = np.unique(ids, return_inverse=True)
    codes = [code(env, geom) if geom >= 0 else NAMES.index("wall") for geom in geoms]
    pixels = np.array(codes, np.uint8)[where.reshape(ids.shape)]  # [H, W]
    return np.repeat(pixels[..., None], 3, -1)


class PerfectEyes(torch.nn.Module):
    """What the script asks of CLIPReward: embeddings of prompts and of the cells of frames."""

    temperature = 0.01

    def __init__(self, *args, **kwargs):
        super().__init__()
        goals = [TOYS[dqn.TOY_NAMES.index((goal.colour, goal.kind))] for goal in dqn.GOALS]
        for i, goal in enumerate(dqn.GOALS):
            if goal.family != "find":
                where = OTHERS["agent"] if goal.family == "lift" else PLACES[goal.place]
                goals[i] = goals[i] + 0.7 * where
        self.goal = F.normalize(torch.stack(goals), dim=-1)
        self.baseline = OTHERS["wall"]

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([PLACES[prompt.removeprefix("a ")] for prompt in prompts])

    def encode_maps(self, frames: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = PIXELS[torch.from_numpy(frames[..., 0].copy()).long()]  # [N, H, W, D]
        cells = pixels.unflatten(1, (SIDE, -1)).unflatten(3, (SIDE, -1)).mean((2, 4))
        cells = F.normalize(cells, dim=-1)
        cells = F.normalize(cells + NOISE * torch.randn_like(cells) / DIM**0.5, dim=-1)
        return F.normalize(cells.mean((1, 2)), dim=-1), cells


def main(flags: list[str]) -> None:
    dqn.CLIPReward, dqn.PlayhouseEnv._frame = PerfectEyes, frame
    sys.argv = ["dqn_clip_playhouse.py", *FLAGS, *flags]
    dqn.main()


if __name__ == "__main__":
    main(sys.argv[1:])

"""What does the agent of `--task all` make of sentences that it was never trained for?

    python tests/unseen_prompts.py runs/NAME

It is told each sentence as it was told its own: by the embedding of the prompt. The sentences are
paraphrases of its eight prompts, and combinations of which it knew the parts: a stance, and what
arms do. Success is decided by predicates on the simulator's state, as in the training script.
"""

# ruff: noqa: E402, I001

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import sac_clip_humanoid as sac  # first: it puts torch before the first GL context

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from clip_reward import CLIPReward
from reproduce import digest
from train_tiny_clip import PARAPHRASES


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """a run's folder, trained with --task all"""
    episodes: int = 100
    """of each sentence"""
    num_envs: int = 16
    """worker processes"""
    seed: int = 4321
    """of the episodes' starts"""
    clip_model: str | None = None
    """where the CLIP is that the run was trained with, if no longer there"""
    output: Path | None = None
    """JSON file for the numbers"""


def raised(p: sac.Pose) -> bool:
    return bool((p.hands_above_head > 0).all())


def both(*predicates):
    return lambda p: all(predicate(p) for predicate in predicates)


COMBINATIONS = {
    "kneeling, arms raised": sac.Task(
        "a humanoid robot kneeling, with both arms raised", both(sac.kneeling, raised)
    ),
    "kneeling, arms crossed": sac.Task(
        "a humanoid robot kneeling, with its arms crossed", both(sac.kneeling, sac.crossed)
    ),
    "lotus, arms raised": sac.Task(
        "a humanoid robot in the lotus position, with both arms raised", both(sac.lotus, raised)
    ),
    "splits, arms raised": sac.Task(
        "a humanoid robot doing the side splits, with both arms raised", both(sac.splits, raised)
    ),
    "one leg, arms raised": sac.Task(
        "a humanoid robot standing up on one leg, with both arms raised", both(sac.one_leg, raised)
    ),
}


def unseen_tasks() -> dict[str, sac.Task]:
    paraphrases = {
        f"{name}, paraphrase {i + 1}": sac.Task(prompt, sac.TASKS[name].in_goal_state)
        for name, prompts in PARAPHRASES.items()
        for i, prompt in enumerate(prompts)
    }
    return paraphrases | COMBINATIONS


def main(args: Args) -> dict:
    state = sac.load_checkpoint(args.run, "best.pt", "RUN")
    settings = sac.Args(**state["args"])
    sac.check(settings.task == "all", f"RUN {args.run}: was trained for {settings.task} alone")
    sac.check(
        sac.START_METHOD == "fork", "the workers would not know the new predicates: take Linux"
    )
    for name, least in (("episodes", 1), ("num_envs", 1), ("seed", 0)):
        value = getattr(args, name)
        sac.check(value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    tasks = unseen_tasks()
    prompts = [task.goal for task in tasks.values()]
    model = args.clip_model or settings.clip_model
    baseline = settings.baseline or sac.BASELINE
    try:
        clip = CLIPReward(model, prompts, baseline)
    except ValueError as error:
        sac.check(False, str(error))
    direction = F.normalize(clip.goal - clip.baseline, dim=-1)
    goal_input = direction * direction.shape[1] ** 0.5  # as the script tells its own goals
    own, known = clip.encode_text([task.goal for task in sac.TASKS.values()]), state["prompts"]
    same = own.shape == known.shape and (own * known).sum(-1).min() > 0.9999
    sac.check(same, f"--clip-model {model}: not the CLIP of {args.run}; name that one")

    sac.TASKS.clear()  # the environments judge what stands there
    sac.TASKS.update(tasks)
    envs = sac.make_envs(settings, args.num_envs, 0)  # no frames: the reward plays no part
    obs_dim = envs.single_observation_space["state"].shape[0]
    act_dim = envs.single_action_space.shape[0]
    normaliser = sac.Normaliser(obs_dim)
    agent = sac.Actor(obs_dim + goal_input.shape[1], act_dim, settings.hidden)
    normaliser.load_state_dict(state["normaliser"])
    agent.load_state_dict(state["agent"])

    @torch.no_grad()
    def policy(s: np.ndarray, goal: np.ndarray) -> np.ndarray:
        seen = torch.cat([normaliser(torch.from_numpy(s)), goal_input[torch.from_numpy(goal)]], -1)
        return torch.tanh(agent(seen)[0]).numpy()

    means, _ = sac.evaluate(envs, policy, None, list(tasks), args.episodes, (args.seed,), settings)
    envs.close()
    command = shlex.join(["python", "tests/unseen_prompts.py", *sys.argv[1:]])
    result = {
        "command": command.replace(f"{HERE.parent}/", ""),
        "clip": digest(model),
        "episodes": args.episodes,
        "step": state["step"],
        "success_rate": {
            name: {"prompt": task.goal, "success_rate": round(means[f"success_rate_{name}"], 4)}
            for name, task in tasks.items()
        },
    }
    for name, row in result["success_rate"].items():
        print(f"{row['success_rate']:5.0%}  {name}: {row['prompt']}")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args))

"""The stand-in for CLIP's eyes: it shows a toy where it is, and trains the script's own agent."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import perfect_eyes

import torch
from dqn_clip_playhouse import GOALS, PlayhouseEnv
from test_dqn_clip_playhouse import play
from whole_runs import only_run, train


def test_a_toy_is_seen_where_it_is():
    env, eyes = PlayhouseEnv(width=48, height=48), perfect_eyes.PerfectEyes()
    right = 0
    for seed, goal in enumerate(GOALS[:12]):
        assert goal.family == "find" and play(env, goal, seed=seed)[-1]
        _, cells = eyes.encode_maps(perfect_eyes.frame(env)[None])  # [1, 8, 8, 24]
        best = (cells[0] @ eyes.goal[GOALS.index(goal)]).flatten().argmax()
        right += bool(2 <= best // 8 <= 5 and 2 <= best % 8 <= 5)  # in the middle, as it is found
    env.close()
    assert right >= 10


def test_it_trains_the_scripts_own_agent(tmp_path):
    flags = ["--total-timesteps", "800", "--num-envs", "4", "--learning-starts", "200"]
    flags += ["--eval-episodes", "4", "--final-episodes", "4", "--buffer-size", "1200"]
    flags += ["--eval-every", "400", "--checkpoint-every", "400", "--batch-size", "16"]
    result = train("tests/perfect_eyes.py", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    report = json.loads((run / "report.json").read_text())
    assert report.keys() == {"random", "last", "best"}
    assert 0 <= report["last"]["train"]["success_rate"] <= 1
    network = torch.load(run / "last.pt", weights_only=True)["q_network"]
    assert network["gate.weight"].shape[1] == 24

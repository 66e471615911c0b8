"""The humanoid, its predicates, the parts of SAC against slow references, and whole runs."""

import copy
import ctypes
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from sac_clip_humanoid import (  # first: it puts torch before the first GL context
    BASELINE,
    TASKS,
    ActionRepeat,
    Actor,
    Args,
    HumanoidEnv,
    Normaliser,
    Replay,
    TwinQ,
    main,
    make_envs,
    parse_args,
    worker_failures,
)

import gymnasium as gym
import imageio
import mujoco
import numpy as np
import torch
from clip_reward import CLIPReward
from gymnasium.utils.env_checker import check_env
from reproduce import digest
from whole_runs import command, kill_after_a_checkpoint, only_run, scalars, start, train

# ---- Environment --------------------------------------------------------------------------------

# Joint angles in degrees, right side; the left shoulders mirror the sign. "right:" is one side.
LOTUS = {"hip_x": -25, "hip_z": -55, "hip_y": -62, "knee": -160}
SPLITS = {"hip_x": -25, "hip_z": -60, "hip_y": -80, "knee": -2}
RAISED = {"shoulder1": -80, "shoulder2": 0, "elbow": -80}
HIPS = {"shoulder1": 50, "shoulder2": -80, "elbow": 0}
CROSSED = {"shoulder1": 50, "shoulder2": 50, "elbow": -80}
ONE_LEG = {"right:hip_y": -60, "right:knee": -90, "left:hip_y": -3}


def pose(env: HumanoidEnv, joints: dict, pitch: float = 0, roll: float = 0, lift: float = 0):
    """Put the joints (degrees) and the lean of the pelvis, and lower the body to the floor."""
    qpos = env.init_qpos.copy()
    mujoco.mju_euler2Quat(qpos[3:7], np.deg2rad([roll, pitch, 0]), "XYZ")
    for name, degrees in joints.items():
        side, _, joint = name.rpartition(":")
        for s in [side] if side else ["right", "left"]:
            sign = -1 if s == "left" and "shoulder" in joint else 1
            qpos[env.model.joint(f"{s}_{joint}").qposadr[0]] = sign * np.deg2rad(degrees)
    env.set_state(qpos, np.zeros(env.model.nv))
    model, data = env.model, env.data
    tilt = np.abs(data.geom_xmat[1:, 8]) * (model.geom_type[1:] == mujoco.mjtGeom.mjGEOM_CAPSULE)
    lowest = data.geom_xpos[1:, 2] - model.geom_size[1:, 0] - tilt * model.geom_size[1:, 1]
    qpos[2] += lift - lowest.min()
    env.set_state(qpos, np.zeros(env.model.nv))


def true_tasks(env: HumanoidEnv) -> set[str]:
    return {name for name, task in TASKS.items() if task.in_goal_state(env.pose())}


@pytest.fixture(scope="module")
def env():
    env = HumanoidEnv(render_mode="rgb_array")
    env.reset(seed=0)
    yield env
    env.close()


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_gymnasium_accepts_the_environment():
    env = gym.make("HumanoidCLIP-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_episodes_are_seeded_and_end_in_truncation_alone():
    streams = []
    for _ in range(2):
        env = gym.make("HumanoidCLIP-v0")
        env.reset(seed=3)
        env.action_space.seed(3)
        steps = [env.step(env.action_space.sample()) for _ in range(100)]
        assert [s[3] for s in steps] == [False] * 99 + [True]
        assert not any(s[2] for s in steps)
        streams.append(np.stack([s[0] for s in steps]))
    np.testing.assert_array_equal(*streams)
    assert streams[0][-1, 0] < 1.0  # it fell, and the episode went on


def test_a_fall_ends_the_episode_when_asked():
    env = gym.make("HumanoidCLIP-v0", terminate_when_unhealthy=True)
    env.reset(seed=3)
    env.action_space.seed(3)
    assert any(env.step(env.action_space.sample())[2] for _ in range(100))


def test_frame_follows_the_state_and_the_look_its_flags(env):
    pose(env, {})
    stands = env.render()
    assert stands.shape == (144, 144, 3) and stands.dtype == np.uint8
    pose(env, {}, lift=0.4)
    assert (env.render() != stands).any()
    for flags in ({"textured": False}, {"camera": "track"}):
        other = HumanoidEnv(render_mode="rgb_array", **flags)
        other.reset(seed=0)
        pose(other, {})
        assert np.abs(other.render().astype(int) - stands).mean() > 5, flags
        other.close()


def test_all_tasks_have_a_goal_state_each():
    env = HumanoidEnv(task="all")
    env.reset(seed=0)
    pose(env, {"knee": -95})
    assert env.in_goal_state().tolist() == [name == "kneeling" for name in TASKS]
    goal_state = env.step(np.zeros(17))[-1]["goal_state"]
    assert goal_state.any()
    assert goal_state.tolist() == [task.in_goal_state(env.pose()) for task in TASKS.values()]


def test_a_repeated_action_adds_rewards_and_steps_in_the_goal_state():
    repeated, single = (
        gym.make("HumanoidCLIP-v0", task="standing", terminate_when_unhealthy=True)
        for _ in range(2)
    )
    repeated, shares = ActionRepeat(repeated, 4), []
    repeated.reset(seed=3), single.reset(seed=3)
    repeated.action_space.seed(3)
    ended = False
    while not ended:
        action = repeated.action_space.sample()
        observation, total, *ends, info = repeated.step(action)
        steps = []
        while len(steps) < 4 and not ended:
            steps.append(single.step(action))
            ended = any(steps[-1][2:4])
        np.testing.assert_array_equal(observation, steps[-1][0])
        assert total == pytest.approx(sum(step[1] for step in steps))
        assert info["goal_state"] == sum(step[4]["goal_state"] for step in steps)
        assert any(ends) == ended
        assert info["steps"] == len(steps)
        shares.append(info["goal_state"] / len(steps))
    assert len(steps) < 4  # it fell amid an action
    assert 0 < np.mean(shares) < 1 and not {0.25, 0.5, 0.75}.isdisjoint(shares)


@pytest.mark.parametrize(
    ("joints", "lean", "expected"),
    [
        ({}, {}, {"standing"}),
        ({"knee": -95}, {}, {"kneeling"}),
        (LOTUS, {"pitch": 28}, {"lotus"}),
        (SPLITS, {"pitch": 17}, {"splits"}),
        (RAISED, {}, {"standing", "arms_raised"}),
        (HIPS, {}, {"standing", "hands_on_hips"}),
        (CROSSED, {}, {"standing", "arms_crossed"}),
        (ONE_LEG, {"roll": -7, "pitch": -5}, {"one_leg"}),
    ],
    ids=["standing", "kneeling", "lotus", "splits", "raised", "hips", "crossed", "one leg"],
)
def test_each_pose_is_the_goal_state_of_its_tasks_alone(env, joints, lean, expected):
    pose(env, joints, **lean)
    assert true_tasks(env) == expected
    pose(env, joints, **lean, lift=0.01)  # a little clearance is still a touch
    assert true_tasks(env) == expected
    pose(env, joints, **lean, lift=0.25)
    assert true_tasks(env) == set()


@pytest.mark.parametrize(
    ("task", "joints", "lean"),
    [
        ("standing", {"hip_y": -80, "knee": -120}, {"pitch": 10}),  # squats
        ("standing", {}, {"pitch": 25}),  # tips over
        ("kneeling", {"right:hip_y": -90, "right:knee": -90, "left:knee": -95}, {}),  # one knee
        ("kneeling", {"knee": -95}, {"pitch": 60}),  # falls forwards
        ("kneeling", LOTUS, {"pitch": 28}),
        ("arms_raised", {f"right:{k}": v for k, v in RAISED.items()}, {}),  # one hand is low
        ("arms_raised", RAISED | {"knee": -95}, {}),  # kneels
        ("hands_on_hips", {f"left:{k}": v for k, v in HIPS.items()}, {}),  # one hand
        ("hands_on_hips", {"shoulder1": 40, "shoulder2": -20, "elbow": 40}, {}),  # on the chest
        ("arms_crossed", CROSSED | {"shoulder2": 12, "elbow": -55}, {}),  # hands only touch
        ("splits", {"hip_y": -90, "knee": -2}, {}),  # sits, legs to the front
        ("splits", SPLITS | {"knee": -60}, {"pitch": 17}),  # bent knees
        ("lotus", {"hip_y": -50, "knee": -150}, {"pitch": 10}),  # sits on its heels
        ("one_leg", {}, {}),
    ],
)
def test_near_misses_are_no_goal_states(env, task, joints, lean):
    pose(env, joints, **lean)
    assert task not in true_tasks(env)


def test_predicates_do_not_depend_on_place_and_heading(env):
    for joints, lean in (({"knee": -95}, 0), (LOTUS, 28), (SPLITS, 17)):
        pose(env, joints, pitch=lean)
        expected, qpos = true_tasks(env), env.data.qpos.copy()
        turn, turned = np.zeros(4), qpos.copy()
        mujoco.mju_axisAngle2Quat(turn, np.array([0, 0, 1.0]), 2.0)
        mujoco.mju_mulQuat(turned[3:7], turn, qpos[3:7])
        turned[:2] = 3, -2
        env.set_state(turned, np.zeros(env.model.nv))
        assert true_tasks(env) == expected != set()


# ---- Parts of SAC -------------------------------------------------------------------------------


def test_log_density_equals_the_transformed_distribution():
    torch.manual_seed(0)
    actor = Actor(5, 3, 16).double()
    s = 3 * torch.randn(64, 5, dtype=torch.float64)
    a, log_pi = actor.sample(s, torch.randn(64, 3, dtype=torch.float64))
    mean, log_std = actor(s)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(
        normal, torch.distributions.TanhTransform()
    )
    inside = a.abs().amax(1) < 0.999  # beyond, atanh in the reference loses its digits
    assert inside.sum() > 10
    torch.testing.assert_close(
        log_pi[inside], squashed.log_prob(a).sum(-1)[inside], atol=1e-6, rtol=1e-6
    )


def test_log_density_is_finite_where_tanh_saturates():
    actor = Actor(5, 3, 16)
    torch.nn.init.constant_(actor.head.bias[:3], 40.0)
    a, log_pi = actor.sample(torch.zeros(8, 5), torch.randn(8, 3))
    assert (a == 1).all() and torch.isfinite(log_pi).all()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_twin_q_equals_two_separate_networks(layer_norm):
    torch.manual_seed(0)
    critic = TwinQ(4, 2, 8, layer_norm)
    s, a = torch.randn(6, 4), torch.randn(6, 2)
    q = critic(s, a)
    for k in range(2):
        x = torch.cat([s, a], 1)
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            if i > 0 and layer_norm:
                x = (x - x.mean(1, keepdim=True)) / (
                    x.var(1, keepdim=True, correction=0) + 1e-5
                ).sqrt()
            x = torch.relu(x) if i else x
            x = torch.nn.functional.linear(x, weight[k].T, bias[k, 0])
        torch.testing.assert_close(q[k], x[:, 0])
    assert not torch.allclose(q[0], q[1])


def test_normaliser_equals_numpy():
    x = np.random.default_rng(0).normal(5, 3, (1000, 4)).astype(np.float32)
    normaliser = Normaliser(4)
    for part in np.split(x, [16, 17, 500]):
        normaliser.update(torch.from_numpy(part))
    np.testing.assert_allclose(normaliser.mean, x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(normaliser.var, x.var(0), rtol=1e-4)
    y = normaliser(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), atol=1e-3)


def fill(replay: Replay, steps: int, seed: int = 0) -> list[tuple]:
    """Random episodes, which the last step ends; every transition as plain numbers, in order."""
    rng = np.random.default_rng(seed)
    n, transitions = replay.num_envs, []
    observation = rng.normal(size=(n, 2)).astype(np.float32)
    for step in range(steps):
        action = rng.normal(size=(n, 1)).astype(np.float32)
        reward = rng.normal(size=(n, 2)).astype(np.float32)
        goal = rng.integers(2, size=n)
        terminated, truncated = rng.random(n) < 0.02, rng.random(n) < 0.02
        truncated |= step == steps - 1
        ended = terminated | truncated
        following = rng.normal(size=(n, 2)).astype(np.float32)
        parts = (observation, action, reward, following, terminated, goal)
        replay.add(*map(torch.from_numpy, parts), ended.any())
        for i in range(n):
            numbers = *observation[i], *action[i], *reward[i], *following[i], terminated[i], goal[i]
            transitions.append(tuple(map(float, numbers)))
        restart = rng.normal(size=(n, 2)).astype(np.float32)
        observation = np.where(ended[:, None], restart, following)
    return transitions


def sampled(replay: Replay, count: int) -> np.ndarray:
    s, a, r, s_next, *marks = replay.sample(count, torch.Generator().manual_seed(0))
    return torch.cat([s, a, r, s_next, *(mark[:, None] for mark in marks)], 1).numpy()


def test_replay_samples_every_stored_transition_equally_and_no_other():
    replay = Replay(400, 4, 2, 1, 2, "cpu")
    transitions = fill(replay, 60)
    draws, counts = np.unique(sampled(replay, 100_000), axis=0, return_counts=True)
    assert {tuple(d) for d in draws} == {tuple(np.float32(t)) for t in transitions}
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


def test_replay_wraps_and_keeps_the_latest():
    replay = Replay(120, 4, 2, 1, 2, "cpu")
    transitions = fill(replay, 200)
    known = {tuple(np.float32(t)): i for i, t in enumerate(transitions)}
    ages = {200 - known[tuple(d)] // 4 for d in sampled(replay, 5_000)}
    assert ages == set(range(1, max(ages) + 1))
    assert 22 <= max(ages) < 30  # of 30 rows some hold the last s' of an episode


def test_the_shortest_replay_that_is_allowed():
    replay = Replay(12, 4, 2, 1, 2, "cpu")  # three rows
    transitions = fill(replay, 50)
    draws = {tuple(d) for d in sampled(replay, 100)}
    # After an end one of the rows has no transition; the other one's is of the step before.
    assert draws <= {tuple(np.float32(t)) for t in transitions[-8:]}
    assert draws >= {tuple(np.float32(t)) for t in transitions[-4:]}


def test_replay_keeps_each_observation_once():
    """A million transitions of the paper's 348 numbers in 1.6 GB."""
    replay = Replay(10_000, 16, 348, 17, 1, "cpu")
    tensors = [*replay.data, replay.has_transition]
    assert sum(x.numel() * x.element_size() for x in tensors) < 1.6e9 / 100
    for episode in range(6):  # in lockstep, as the humanoid's
        for step in range(100):
            value = torch.full((16, 348), 1000.0 * episode + step)
            zero = torch.zeros(16)
            replay.add(value, value[:, :17], value[:, :1], value + 1, zero, zero, step == 99)
    s, _, r, s_next, *_ = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(s_next, s + 1) and torch.equal(r, s[:, :1])
    assert len(r.unique()) == 600


def test_a_replay_that_was_filled_anew_keeps_what_last_pt_needs(tmp_path):
    """Killed after it saved its replay and before it wrote last.pt."""
    replay, restored = (Replay(40, 4, 2, 1, 2, "cpu") for _ in range(2))  # ten rows
    fill(replay, 9)
    replay.save(tmp_path, 0)
    head, expected = replay.head, sampled(replay, 100)
    fill(replay, 25)
    replay.save(tmp_path, head)
    restored.load(tmp_path, head)
    np.testing.assert_array_equal(sampled(restored, 100), expected)


def test_replay_comes_back_from_its_files(tmp_path, capsys):
    replay, saved = Replay(200, 4, 2, 1, 2, "cpu"), 0
    for part in range(5):
        fill(replay, 18, seed=part)
        replay.save(tmp_path, saved)
        saved = replay.head
    restored = Replay(200, 4, 2, 1, 2, "cpu")
    restored.load(tmp_path, saved)
    np.testing.assert_array_equal(sampled(restored, 2000), sampled(replay, 2000))
    assert len(list(tmp_path.iterdir())) < 5  # what the ring has overwritten is gone
    file = next(tmp_path.glob(f"*-{saved}.pt"))
    file.write_bytes(b"")  # as a power cut leaves it
    with pytest.raises(SystemExit):
        Replay(200, 4, 2, 1, 2, "cpu").load(tmp_path, saved)
    errors = capsys.readouterr().err
    assert str(file) in errors and errors.count("\n") == 1
    file.unlink()
    with pytest.raises(SystemExit):
        Replay(200, 4, 2, 1, 2, "cpu").load(tmp_path, saved)


# ---- Whole runs ---------------------------------------------------------------------------------

SCRIPT = "sac_clip_humanoid.py"
SMALL = [
    "--total-timesteps", "1600", "--num-envs", "4", "--learning-starts", "200",
    "--eval-every", "800", "--checkpoint-every", "800", "--eval-episodes", "4",
    "--final-episodes", "4", "--hidden", "32", "--batch-size", "64", "--device", "cpu",
    "--frame-size", "48", "--updates-per-step", "0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, random_clip):
    """A short run to its end, uninterrupted."""
    folder = tmp_path_factory.mktemp("finished")
    result = train(SCRIPT, folder, *SMALL, "--clip-model", random_clip)
    assert result.returncode == 0, result.stderr
    return only_run(folder), result


def networks(run: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    state = torch.load(run / name, weights_only=True)
    parts = ("actor", "agent", "critic", "target")
    return {f"{part}.{name}": value for part in parts for name, value in state[part].items()}


def test_a_run_leaves_everything_it_promises(finished):
    run, result = finished
    for name in ("last.pt", "best.pt", "args.json", "report.json", "videos/800.mp4"):
        assert (run / name).stat().st_size > 100, name
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"random", "zero", "last", "best"}
    assert all(0 <= r["success_rate"] <= 1 for r in report.values())
    assert all(math.isfinite(r["clip_return"]) for r in report.values())
    assert "video:" in result.stdout and "best:" in result.stdout
    logged = scalars(run)
    for tag in (
        "charts/episodic_return", "charts/episodic_length", "charts/clip_return", "charts/SPS",
        "losses/qf_loss", "losses/actor_loss", "losses/ent_coef", "eval/success_rate",
        "eval/clip_return", "time/env", "time/clip", "time/update",
    ):  # fmt: skip
        assert all(math.isfinite(e.value) for e in logged[tag]), tag
    assert [e.step for e in logged["eval/clip_return"]] == [800, 1600]
    assert all(e.value == 100 for e in logged["charts/episodic_length"])


def test_training_moves_every_parameter(finished):
    torch.manual_seed(1)
    initial = {
        "actor": Actor(45, 17, 32).state_dict(),
        "critic": TwinQ(45, 17, 32, True).state_dict(),
    }
    end = torch.load(finished[0] / "last.pt", weights_only=True)
    for part, weights in initial.items():
        for name, value in weights.items():
            assert not torch.equal(value, end[part][name]), name
    start, now = initial["actor"]["trunk.0.weight"], end["actor"]["trunk.0.weight"]
    assert torch.nn.functional.cosine_similarity(start, now).mean() > 0.7  # it did start there


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path, random_clip):
    flags = [*SMALL, "--clip-model", random_clip]
    run = kill_after_a_checkpoint(SCRIPT, tmp_path, *flags)
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 800
    result = train(SCRIPT, tmp_path, "--resume", run)
    assert result.returncode == 0, result.stderr
    expected, resumed = networks(finished[0]), networks(run)
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    # The log is whole as well: what was written up to the checkpoint, and what came after it.
    assert [e.step for e in scalars(run)["eval/clip_return"]] == [800, 1600]


def test_one_agent_for_all_tasks(tmp_path, random_clip):
    flags = ["--clip-model", random_clip, "--task", "all", "--eval-episodes", "1"]
    flags += ["--final-episodes", "1", "--no-anneal-lr"]
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    runs = ["--total-timesteps", "1600"], ["--total-timesteps", "800", "--no-capture-video"]
    for folder, more in zip(folders, runs, strict=True):
        folder.mkdir()
        result = train(SCRIPT, folder, *SMALL, *flags, *more)
        assert result.returncode == 0, result.stderr
    whole, resumed = map(only_run, folders)
    result = train(SCRIPT, folders[1], "--resume", resumed, "--total-timesteps", "1600")
    assert result.returncode == 0, result.stderr
    expected, now = networks(whole), networks(resumed)
    assert all(torch.equal(value, now[name]) for name, value in expected.items())
    # It is told a goal by the direction to it from the baseline, in numbers of about 1.
    clip = CLIPReward(str(random_clip), [task.goal for task in TASKS.values()], BASELINE)
    direction = torch.nn.functional.normalize(clip.goal - clip.baseline, dim=-1)
    told = torch.load(whole / "last.pt", weights_only=True)["goal_input"]  # [8, 64]
    torch.testing.assert_close(told, 8 * direction)
    of_each = {f"success_rate_{task}" for task in TASKS}
    assert of_each < json.loads((whole / "report.json").read_text())["best"].keys()
    assert {f"eval/{name}" for name in of_each} < scalars(whole).keys()
    with imageio.get_reader(whole / "videos" / "best.mp4") as film:
        assert film.count_frames() == 800
    (first, _) = sorted((whole / "replay" / "0").iterdir())
    part = torch.load(first, weights_only=True)
    *_, r, _, goal = (ring[part["has_transition"]] for ring in part["data"])  # [100, 4, ...]
    assert r.shape[-1] == 8 and (r.std((0, 1)) > 0).all()
    episodes = goal[::50].long()  # 50 actions of an episode
    assert torch.equal(goal.long(), episodes.repeat_interleave(50, 0))
    assert torch.equal(episodes, torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]]))
    tiny_clip = ROOT / "tests" / "tiny_clip"  # of other embeddings: it judges, but tells no goal
    flags = ["--evaluate", whole, "--clip-model", tiny_clip, "--final-episodes", "1"]
    result = train(SCRIPT, folders[0], *flags)
    assert result.returncode == 0 and "best:" in result.stdout, result.stderr
    script, output = Path(__file__).parent / "unseen_prompts.py", tmp_path / "unseen.json"
    flags = ["--episodes", "1", "--num-envs", "4", "--output", output]
    line = [sys.executable, script, whole, *flags]
    other = [*line, "--clip-model", tiny_clip]
    result = subprocess.run(other, capture_output=True, text=True)
    assert result.returncode == 2 and "not the CLIP of" in result.stderr and not output.exists()
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    result = json.loads(output.read_text())
    assert result["clip"] == digest(random_clip)
    rows = result["success_rate"]
    assert len(rows) == 21 and all(row["success_rate"] in (0, 1) for row in rows.values())
    assert not {row["prompt"] for row in rows.values()} & {task.goal for task in TASKS.values()}


class Numbered(torch.nn.Module):
    """In CLIP's place a reward of i for goal i, and an embedding that shows which goal it is."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.goal, self.baseline = torch.eye(8), torch.zeros(8)

    def forward(self, frames: np.ndarray) -> torch.Tensor:
        return torch.arange(8.0).expand(len(frames), 8)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_a_relabelled_transition_has_the_reward_of_its_new_goal(fraction, tmp_path, monkeypatch):
    flags = [*SMALL, "--total-timesteps", "800", "--eval-episodes", "1", "--final-episodes", "1"]
    flags += ["--task", "all", "--gamma", "0", "--relabel-fraction", str(fraction)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags, "--no-capture-video"])
    monkeypatch.setattr("sac_clip_humanoid.CLIPReward", Numbered)
    pursued, trained, targets = [], [], []
    sample, forward = Replay.sample, TwinQ.forward
    mse_loss = torch.nn.functional.mse_loss

    def recorded_sample(*arguments):
        batch = sample(*arguments)
        pursued.append(batch[-1])
        return batch

    def recorded_forward(self, s, a):
        recorded_forward.goal = s[:, -8:].argmax(1)
        return forward(self, s, a)

    def recorded_loss(q, y):
        trained.append(recorded_forward.goal)
        targets.append(y[0])
        return mse_loss(q, y)

    monkeypatch.setattr(Replay, "sample", recorded_sample)
    monkeypatch.setattr(TwinQ, "forward", recorded_forward)
    monkeypatch.setattr(torch.nn.functional, "mse_loss", recorded_loss)
    main()
    pursued, trained, targets = map(torch.cat, (pursued, trained, targets))
    assert len(targets) > 1000 and torch.allclose(targets, 2 * 5.0 * trained)
    changed = (pursued != trained).float().mean().item()
    assert changed == pytest.approx(fraction * 7 / 8, abs=0.05)


class HighArms(torch.nn.Module):
    """In CLIP's place a reward that is easy to learn: how high up the arms' colours appear."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.goal = torch.eye(1)

    def forward(self, frames: np.ndarray) -> torch.Tensor:
        red, green, blue = torch.as_tensor(frames).float().unbind(-1)  # [B, H, W] each
        arms = ((red > 1.5 * green) & (red > 2 * blue) & (red > 60)).float()
        height = torch.linspace(0.6, -0.4, frames.shape[1])[:, None]
        return ((arms * height).sum((1, 2)) / arms.sum((1, 2)).clamp(min=1))[:, None]


def test_the_running_reward_trains_as_well(tmp_path):
    """It ends episodes early, one environment at a time, and renders nothing."""
    flags = ["--reward", "env", "--no-capture-video"]
    result = train(SCRIPT, tmp_path, *SMALL, *flags)
    assert result.returncode == 0, result.stderr
    logged = scalars(only_run(tmp_path))
    assert 5 < logged["charts/episodic_length"][-1].value < 100  # it falls
    assert not any("clip_return" in tag for tag in logged)
    report = json.loads((only_run(tmp_path) / "report.json").read_text())
    assert report["zero"]["episodic_return"] > 50  # it is paid for staying up, until it falls
    assert "clip_return" not in report["zero"]


def test_an_easy_reward_is_learned(tmp_path, monkeypatch):
    flags = {
        "--total-timesteps": 12800, "--num-envs": 8, "--learning-starts": 800, "--hidden": 64,
        "--batch-size": 128, "--updates-per-step": 0.5, "--eval-every": 6400,
        "--eval-episodes": 8, "--final-episodes": 8, "--device": "cpu",
        "--ent-coef": 0.02,  # a learned one would first have to find its level
        "--greedy-envs": 0, "--action-repeat": 1,  # 12,000 actions are few to explore with
        "--actor-tau": 0.01,  # and 6,000 updates for the average
    }  # fmt: skip
    arguments = [str(word) for flag in flags.items() for word in flag]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sac_clip_humanoid.py", *arguments, "--no-capture-video"])
    monkeypatch.setattr("sac_clip_humanoid.CLIPReward", HighArms)
    origins, forward = set(), TwinQ.forward

    def recorded(self, s, a):
        origins.update(p.grad_fn for p in self.parameters())
        return forward(self, s, a)

    monkeypatch.setattr(TwinQ, "forward", recorded)
    main()
    assert origins == {None}  # target networks whose graph grows would fill the memory
    report = json.loads((only_run(tmp_path) / "report.json").read_text())
    others = max(report["random"]["clip_return"], report["zero"]["clip_return"])
    # Seeds 1, 2 and 3 by 8, 5 and 7.
    assert report["last"]["clip_return"] > others + 3


class Content(torch.nn.Module):
    """In CLIP's place a reward of 1 for any frame."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.goal = torch.eye(1)

    def forward(self, frames: np.ndarray) -> torch.Tensor:
        return torch.ones(len(frames), 1)


def test_half_act_without_noise_and_a_frame_counts_for_its_steps(tmp_path, monkeypatch):
    flags = [*SMALL, "--total-timesteps", "800", "--updates-per-step", "1e-9"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags, "--no-capture-video"])
    monkeypatch.setattr("sac_clip_humanoid.CLIPReward", Content)

    def sample(self, s, noise):
        return torch.where(noise == 0, torch.tanh(self(s)[0]), 0.9), torch.zeros(len(s))

    monkeypatch.setattr(Actor, "sample", sample)
    main()
    run = only_run(tmp_path)
    assert json.loads((run / "report.json").read_text())["last"]["clip_return"] == 100
    (file,) = (run / "replay" / "0").iterdir()
    part = torch.load(file, weights_only=True)
    _, a, r, *_ = (ring[part["has_transition"]] for ring in part["data"])  # [100, 4, ...]
    assert (r == 2).all()
    learned = a[25:]  # after 200 steps: two for each action of 4 environments
    assert (learned[:, 2:] == 0.9).all() and not (learned[:, :2] == 0.9).any()
    assert learned[:, :2].abs().max() < 0.9  # what the new network means, not a random action


def test_workers_that_do_not_start_are_one_line(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("gymnasium.vector.AsyncVectorEnv", refuse)
    with pytest.raises(SystemExit) as exit_:
        make_envs(Args(num_envs=400), 400, 0)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert "--num-envs 400" in error and "Too many open files" in error


def test_compiled_updates_are_the_same(tmp_path, monkeypatch):
    """With a backend that needs no C++ compiler."""
    compiled, compile_with = [], torch.compile

    def count(function, mode=None):
        compiled.append(function.__name__)
        faster = compile_with(function, backend="aot_eager")

        def call(*inputs, **options):  # a CUDA graph would take a step's inputs one by one
            assert function.__name__ != "update" or all(isinstance(x, torch.Tensor) for x in inputs)
            return faster(*inputs, **options)

        return call

    monkeypatch.setattr(torch, "compile", count)
    monkeypatch.setattr("sac_clip_humanoid.CLIPReward", HighArms)
    for folder, extra in (("plain", []), ("compiled", ["--compile"])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *SMALL, "--no-capture-video", *extra])
        main()
    assert compiled == ["update"]
    plain, same = (networks(only_run(tmp_path / folder)) for folder in ("plain", "compiled"))
    torch.manual_seed(1)
    start = Actor(45, 17, 32).state_dict()
    for name, value in plain.items():
        # By their norms: Adam makes a step of the rounding where an element's gradient is zero.
        assert (same[name] - value).norm() < 1e-3 * value.norm(), name
    for name, value in start.items():
        change = plain[f"actor.{name}"] - value
        assert 0.1 * value.norm() < change.norm() < 0.5 * value.norm()  # it did start there


def test_an_agent_can_be_replayed(finished):
    run, _ = finished
    before = (run / "report.json").read_text()
    result = train(SCRIPT, run.parents[1], "--evaluate", run, "--final-episodes", "4")
    assert result.returncode == 0, result.stderr
    for name, row in json.loads(before).items():  # same seeds, same episodes
        assert ", ".join(f"{k} {v:.3f}" for k, v in row.items()) in result.stdout, name
    result = train(SCRIPT, run.parents[1], "--evaluate", run, "--final-episodes", "2")
    assert result.returncode == 0, result.stderr
    assert (run / "report.json").read_text() == before


def test_of_a_copied_run_its_best_agent_is_enough(finished, tmp_path, random_clip):
    """On another machine, where the folder of the CLIP has another path."""
    state = torch.load(finished[0] / "best.pt", weights_only=True)
    state["args"]["clip_model"] = str(tmp_path / "elsewhere")
    torch.save(state, tmp_path / "best.pt")
    flags = ["--evaluate", tmp_path, "--final-episodes", "2", "--num-envs", "10"]
    result = train(SCRIPT, tmp_path, *flags, "--clip-model", random_clip)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "videos" / "best.mp4").exists()


def test_a_run_resumes_with_a_clip_that_was_moved(finished, tmp_path, monkeypatch, capsys):
    state = torch.load(finished[0] / "last.pt", weights_only=True)
    state["args"]["clip_model"] = str(tmp_path / "elsewhere")
    torch.save(state, tmp_path / "last.pt")
    flags = ["--resume", str(tmp_path), "--clip-model", "here", "--worker-timeout", "300"]
    flags += ["--compile", "--no-capture-video"]  # how it runs, not what
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
    args = parse_args()
    assert args.clip_model == "here" and args.worker_timeout == 300
    assert args.compile and not args.capture_video
    flags = ["--resume", str(tmp_path), "--clip-model", str(ROOT / "tests" / "tiny_clip")]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
    with pytest.raises(SystemExit) as exit_:  # it was not moved there: this is another one
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1 and "not the CLIP" in errors


def test_a_clip_folder_is_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Args(clip_model="clip").clip_model == str(tmp_path / "clip")
    assert Args(clip_model="ViT-B-32/openai").clip_model == "ViT-B-32/openai"


def children(pid: int) -> list[int]:
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listing.split()]


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and nobody asked yet how


@pytest.mark.parametrize(
    ("worker", "blow", "what"),
    [(0, signal.SIGKILL, "died"), (1, signal.SIGKILL, "died"), (1, signal.SIGSTOP, "failed")],
)
def test_a_dead_or_hanging_worker_ends_the_run_in_one_line(
    worker, blow, what, tmp_path, random_clip
):
    flags = [*SMALL, "--clip-model", random_clip, "--total-timesteps", "100000"]
    flags += ["--worker-timeout", "10", "--no-capture-video"]
    process = start(SCRIPT, tmp_path, *flags)
    workers = children(process.pid)
    os.kill(workers[worker], blow)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert f"worker [{worker}] of 4 {what}" in errors and "--num-envs" in errors
    assert "Traceback" not in errors
    deadline = time.time() + 30
    while any(map(lives, workers)):
        assert time.time() < deadline
        time.sleep(0.1)
    assert networks(only_run(tmp_path))


@pytest.mark.parametrize("script", ["sac_clip_humanoid", "dqn_clip_playhouse"])
def test_workers_that_cannot_draw_end_the_run_before_it_begins(script, tmp_path, monkeypatch):
    def broken(*args):
        error = RuntimeError("EGLError(\n  no display)")
        error.context = ctypes.pointer(ctypes.c_int())  # as OpenGL's: it cannot be pickled
        raise error

    monkeypatch.setattr("mujoco.Renderer", broken)  # the workers are forked
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--num-envs", "2", "--frame-size", "48"])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(script).main()
    what = r"first frame: worker .* of 2 failed \(EGLError\( no display\)\).*libegl1"
    assert re.match(what, exit_.value.code)
    assert not (tmp_path / "runs").exists()


def test_a_copy_of_the_environment_is_like_it():
    env = copy.deepcopy(HumanoidEnv("lotus", camera="track", full_observation=True, width=48))
    assert (env.task, env.camera, env.width, env.textured) == ("lotus", "track", 48, True)
    assert env.reset(seed=0)[0].shape == (348,)


def test_a_repeated_action_tells_how_often_it_was_taken():
    repeated = ActionRepeat(HumanoidEnv(terminate_when_unhealthy=True), 100)
    repeated.reset(seed=0)
    _, _, terminated, _, info = repeated.step(np.zeros(17, np.float32))
    assert terminated and 10 < info["steps"] < 100  # it falls


class Broken(gym.Env):
    observation_space, action_space = gym.spaces.Box(0, 1), gym.spaces.Box(0, 1)

    def reset(self, *, seed=None, options=None):
        raise RuntimeError("no renderer")


def test_a_worker_that_raises_is_named():
    envs = gym.vector.AsyncVectorEnv([Broken] * 2, context="fork")
    with pytest.raises(SystemExit) as exit_, worker_failures(envs, "step 0: reset"):
        envs.reset()
    assert "step 0: reset: worker [0, 1] of 2" in exit_.value.code  # printed, and exits with 1
    for process in envs.processes:
        process.join(10)
        assert not process.is_alive()


def test_nan_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, random_clip):
    flags = [*SMALL, "--clip-model", random_clip, "--learning-starts", "1000"]
    result = train(SCRIPT, tmp_path, *flags, "--learning-rate", "1e30")
    assert result.returncode == 1
    assert re.search(r"step \d+: .* is not finite", result.stderr)
    assert "Traceback" not in result.stderr
    assert all(torch.isfinite(v).all() for v in networks(only_run(tmp_path)).values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1.5"], ["--alpha 1.5", "between 0 and 1"]),
        (["--goal", " "], ["--goal", "sentence"]),
        (["--task", "waving"], ["--task waving", "kneeling"]),
        (["--clip-model", "no/such"], ["--clip-model no/such"]),
        (["--num-envs", "0"], ["--num-envs 0"]),
        (["--eval-every", "800"], ["--eval-every 800", "raise it to 1600"]),
        (["--track"], ["--track", "pip install wandb"]),
        (["--batch-size", "-1"], ["--batch-size -1"]),
        (["--total-timesteps", "0"], ["--total-timesteps 0"]),
        (["--reward", "env", "--goal", "a cat"], ["--goal a cat", "--reward env"]),
        (["--batch-size", "8", "--buffer-size", "32"], ["--buffer-size 32", "raise it to 48"]),
        (["--learning-starts", "-1"], ["--learning-starts -1"]),
        (["--total-timesteps", "5000"], ["--learning-starts 5000", "less than --total"]),
        (["--task", "all", "--goal", "a robot"], ["--task all", "not together with --goal"]),
        (["--relabel-fraction", "2"], ["--relabel-fraction 2.0", "between 0 and 1"]),
        (["--ent-coef", "0"], ["--ent-coef 0", "greater than 0", "learn it"]),
        (["--updates-per-step", "inf"], ["--updates-per-step inf", "finite"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--action-repeat", "3"], ["--action-repeat 3", "divide the 100 steps"]),
        (["--greedy-envs", "2"], ["--greedy-envs 2.0", "between 0 and 1"]),
        (["--actor-tau", "0"], ["--actor-tau 0.0", "greater than 0"]),
        (["--resume", "a", "--evaluate", "b"], ["--evaluate b", "--resume"]),
        (["--resume", "nowhere"], ["--resume nowhere"]),
        (["--evaluate", "nowhere"], ["--evaluate nowhere"]),
        (
            ["--baseline", "a humanoid robot kneeling", "--alpha", "0.5"],
            ["--baseline 'a humanoid robot kneeling'", "the goal", "take alpha 0"],
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, random_clip, flags, words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--clip-model", str(random_clip), *flags])
    monkeypatch.setattr("sac_clip_humanoid.Replay", lambda *_: pytest.fail("the run begins"))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # a machine without wandb
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2
    assert errors.count("\n") == 1 and all(word in errors for word in words), errors
    assert not (tmp_path / "runs").exists()


def test_a_replay_that_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit):
        Replay(10**12, 16, 45, 17, 1, "cpu")
    errors = capsys.readouterr().err
    assert errors.startswith("--buffer-size 1000000000000: takes 24")
    assert errors.count("\n") == 1 and errors.endswith("lower it\n")


def test_ranks_share_the_memory_of_their_machine(monkeypatch):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr("sac_clip_humanoid.LOCAL_WORLD_SIZE", memory // 2**20)  # 1 MiB each
    Replay(1600, 16, 45, 17, 1, "cpu")
    with pytest.raises(SystemExit):
        Replay(16000, 16, 45, 17, 1, "cpu")


def test_cuda_asked_for_and_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["sac_clip_humanoid.py", "--device", "cuda"])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.startswith("--device cuda")
    assert errors.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [SCRIPT, "dqn_clip_playhouse.py"])
def test_no_gl_library_names_the_packages(script, tmp_path):
    for end in ("", *(f".{i}" for i in range(10))):  # found before one that works
        (tmp_path / f"libOSMesa.so{end}").write_bytes(b"no library")
    result = subprocess.run(
        command(script), cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa",
             "LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "libegl1" in result.stderr and "MUJOCO_GL=osmesa" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "old"),
    [("--gamma", "0.9", "0.95"), ("--frame-size", "64", "48"), ("--num-envs", "9", "4")],
)
def test_a_resumed_run_keeps_its_arguments(finished, option, value, old, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--resume", str(finished[0]), option, value])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert f"{option} {value}" in errors and old in errors


@pytest.mark.parametrize("content", [None, {"weights": 1}, {"args": {"an_old_flag": 1}}])
def test_a_checkpoint_that_is_damaged_or_of_another_version_is_named(
    content, tmp_path, monkeypatch, capsys
):
    (tmp_path / "last.pt").write_bytes(b"broken")
    if content:
        torch.save(content, tmp_path / "last.pt")
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--resume", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert f"--resume {tmp_path}" in errors and ("version" in errors) == ("args" in (content or {}))

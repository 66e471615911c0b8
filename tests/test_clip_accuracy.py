"""The measures against slow references, and the held-out states: seeded, and with goal states."""

import json

import clip_accuracy
import numpy as np
import pytest
from reproduce import digest


def slow_auc(reward, goal):
    pairs = [(r > o) + 0.5 * (r == o) for r in reward[goal] for o in reward[~goal]]
    return np.mean(pairs)


def slow_epic(reward, goal):
    # Half and half, by repeating each side as often as the other has members.
    n, m = goal.sum(), (~goal).sum()
    reward = np.concatenate([np.repeat(reward[goal], m), np.repeat(reward[~goal], n)])
    goal = np.repeat([1.0, 0.0], n * m)
    return np.sqrt(1 - np.corrcoef(reward, goal)[0, 1]) / np.sqrt(2)


@pytest.mark.parametrize("levels", [3, 10, 10**6])  # 3: nearly all rewards are tied
def test_measures_equal_slow_references(levels):
    rng = np.random.default_rng(levels)
    goal = rng.random(200) < 0.2
    reward = np.round(rng.random(200) * levels + 0.3 * levels * goal)
    assert clip_accuracy.auc(reward, goal) == pytest.approx(slow_auc(reward, goal), abs=1e-12)
    assert clip_accuracy.epic(reward, goal) == pytest.approx(slow_epic(reward, goal), abs=1e-9)


def test_measures_of_perfect_reversed_and_constant_rewards():
    goal = np.array([False, True, False, True, False])
    assert clip_accuracy.auc(goal * 1.0, goal) == 1 and clip_accuracy.auc(-1.0 * goal, goal) == 0
    assert clip_accuracy.epic(goal * 3.0, goal) == pytest.approx(0, abs=1e-6)
    assert clip_accuracy.epic(-1.0 * goal, goal) == pytest.approx(1, abs=1e-6)
    assert clip_accuracy.auc(np.ones(5), goal) == 0.5


def held_out(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """qpos [count, 24] and labels [count, tasks] of the first states, nothing rendered."""
    env = clip_accuracy.HumanoidEnv(None)
    qpos, labels = [], []
    for _ in clip_accuracy.Generator(env, seed).states(count):
        qpos.append(env.data.qpos.copy())
        labels.append([label(env.pose()) for label in clip_accuracy.LABELS.values()])
    return np.array(qpos), np.array(labels)


def test_held_out_states_are_seeded_and_reach_every_goal():
    qpos, labels = held_out(seed=0, count=400)
    assert np.isfinite(qpos).all() and (qpos[:, 2] > 0).all()
    goal_states = dict(zip(clip_accuracy.LABELS, labels.sum(0).tolist(), strict=True))
    assert min(goal_states.values()) >= 7, goal_states  # as many per state as 105 in 6000
    assert labels[:, 2:7].any(0).all() and not labels.all(1).any()
    assert (held_out(seed=0, count=60)[0] == qpos[:60]).all()
    assert (held_out(seed=1, count=60)[0] != qpos[:60]).any()


def test_report_and_sheet(tmp_path, random_clip):
    clip_accuracy.main(
        clip_accuracy.Args(
            clip_model=str(random_clip),
            states=300,
            output=tmp_path / "accuracy.json",
            sheet=tmp_path / "mistakes.png",
            workers=1,
        )
    )
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert result["clip"] == digest(random_clip)
    assert result["states"] == 300 and result["tasks"].keys() == clip_accuracy.TASKS.keys()
    assert all(0 <= result["mean"][alpha]["auc"] <= 1 for alpha in ("0", "0.25", "0.5", "1"))
    assert len(result["paraphrases"]) == len(result["verbs"]) == 16
    assert {p["task"] for p in result["verbs"].values()} == clip_accuracy.TASKS.keys()
    assert "| stand on one leg |" in (tmp_path / "accuracy.md").read_text()
    assert "| one_leg |" in (tmp_path / "accuracy.md").read_text()
    assert (tmp_path / "mistakes.png").stat().st_size > 1000

"""The DQN: its reward, ring and relabelling against slow references, and whole runs."""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from dqn_clip_playhouse import (  # first: it puts torch before the first GL context
    ACTIONS,
    FAMILIES,
    GOALS,
    HELDOUT_GOALS,
    MIRRORED,
    STAGE_ONE,
    TRAIN_GOALS,
    TRACES,
    Args,
    Goal,
    PlayhouseEnv,
    QNetwork,
    Replay,
    after_stage_one,
    calibrate,
    evaluate,
    family_scores,
    goal_texts,
    main,
    mirror,
    random_play,
    remember,
    shrink,
)

import numpy as np
import torch
from clip_reward import CLIPReward
from whole_runs import kill_after_a_checkpoint, only_run, scalars, train

TRAIN, ALL = len(TRAIN_GOALS), len(GOALS)

# ---- Reward -------------------------------------------------------------------------------------


def test_scores_equal_a_slow_softmax_over_the_familys_training_goals():
    rewards = torch.rand(3, 2, ALL, generator=torch.Generator().manual_seed(0))
    p = family_scores(rewards, 0.1)
    for i, goal in enumerate(GOALS):
        rivals = [j for j, g in enumerate(TRAIN_GOALS) if g.family == goal.family and j != i]
        e = torch.exp(rewards / 0.1)
        expected = e[..., i] / (e[..., i] + e[..., rivals].sum(-1))
        torch.testing.assert_close(p[..., i], expected)
    for family in FAMILIES:
        columns = [i for i, goal in enumerate(TRAIN_GOALS) if goal.family == family]
        torch.testing.assert_close(p[..., columns].sum(-1), torch.ones(3, 2))


def test_placing_counts_once_the_toy_was_in_the_hand_and_no_longer_is():
    rng = torch.Generator().manual_seed(0)
    reached = torch.rand(12, 5, ALL, generator=rng) > 0.8
    carried, stage_one = torch.zeros(5, ALL, dtype=torch.bool), torch.tensor(STAGE_ONE)
    parts = []
    for block in reached.split(4):  # as in training: what was carried goes on to the next block
        part, carried = after_stage_one(block, carried, stage_one)
        parts.append(part)
    counted = torch.cat(parts)
    for i, goal in enumerate(GOALS):
        lift = GOALS.index(Goal("lift", goal.colour, goal.kind))
        for n in range(5):
            for t in range(12):
                held = reached[: t + 1, n, lift]
                counts = goal.family != "place" or bool(held[:t].any() and not held[t])
                assert counted[t, n, i] == (reached[t, n, i] and counts)
    assert carried.any() and not carried.all()
    same, _ = after_stage_one(reached, carried, torch.arange(ALL))  # one stage each
    assert torch.equal(same, reached)


def test_beta_lets_the_stated_share_of_negatives_pass():
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(2000, ALL, generator=rng)
    scores[:, TRAIN // 2 :] *= 0.1  # place: another scale
    reached = torch.rand(2000, ALL, generator=rng) < 0.05
    scores[reached] += 1
    for labels in (None, reached):
        beta = calibrate(scores, labels, 0.01)
        for family in FAMILIES:
            columns = [i for i, goal in enumerate(TRAIN_GOALS) if goal.family == family]
            passed = scores[:, columns] > beta[columns]
            negatives = torch.ones_like(passed) if labels is None else ~reached[:, columns]
            assert passed[negatives].float().mean() == pytest.approx(0.01, abs=0.001)
    own = {goal.family: beta[i] for i, goal in enumerate(TRAIN_GOALS)}
    assert all(beta[GOALS.index(goal)] == own[goal.family] for goal in HELDOUT_GOALS)


class Recorder:
    """Stands for two environments with episodes of 100 steps: frame t shows the number t."""

    num_envs = 2

    def __init__(self):
        self.actions = []

    def reset_async(self, seed, options=None):
        self.t = 0

    def reset_wait(self, timeout):
        return self._frames(), {"goal": np.array([0, TRAIN - 1])}

    def step_async(self, action):
        self.actions.append(action)
        self.t += 1

    def step_wait(self, timeout):
        info = {"success": np.array([self.t == 50, False])}
        return self._frames(), None, None, np.full(2, self.t == 100), info

    def _frames(self):
        return np.full((2, 4, 4, 3), self.t, np.uint8)


def frame_numbers(frames, embeddings, infos) -> torch.Tensor:
    """[T, N, 240] of what the recorder's frames show."""
    return torch.from_numpy(np.stack(frames)[:, :, 0, 0, :1]).float().expand(-1, -1, ALL)


def test_random_play_does_all_but_grab():
    envs = Recorder()
    scores, reached = random_play(envs, frame_numbers, (1,), Args(calibration_episodes=4))
    assert scores[:, 0].tolist() == [t for t in range(1, 101) for _ in "ab"] * 2
    assert reached is None
    actions = {ACTIONS[a] for a in np.concatenate(envs.actions)}
    assert actions == set(ACTIONS) - {"grab"}


def test_an_evaluation_acts_on_what_was_judged_of_the_block_before():
    asked = []

    def play(stack, traces, goal, scores, generator):
        t = len(asked)
        assert goal.tolist() == [0, TRAIN - 1]
        assert stack[0, 0, 0].tolist() == [max(t - 1, 0)] * 3 + [t] * 3
        expected = traces_of([3 + i % 2 for i in range(t)])  # what it knows of its own actions
        torch.testing.assert_close(traces[0], expected)
        asked.append((t, scores[0, 0].item()))
        return torch.tensor([3 + t % 2, 8])

    def by_clip(scores, goal):
        assert scores[:, 1, 7].tolist() == list(range(1, 101))
        return np.array([True, True])

    def see(frames):
        return torch.from_numpy(frames), None

    goals, args = TRAIN_GOALS, Args(frame_stack=2)
    means, film = evaluate(
        Recorder(), play, 2, (1,), goals, see, frame_numbers, by_clip, args, "cpu"
    )
    assert asked == [(t, t // 4 * 4 if t >= 4 else -math.inf) for t in range(100)]
    first, second = TRAIN_GOALS[0].family, TRAIN_GOALS[-1].family
    assert means["success_rate"] == 0.5 and means["clip_success"] == 1
    assert means[f"success_rate_{first}"] == 1 and means[f"success_rate_{second}"] == 0
    assert film[:, 0, 0, 0].tolist() == list(range(101))


# ---- Replay -------------------------------------------------------------------------------------

STEPS, ENVS = 4, 3


def fill(replay: Replay, blocks: int, seed: int = 0, first: int = 0):
    """Random episodes of whole blocks. Returns {first pixel: (episode key, step of it, env)} of
    every frame, and for each episode its goal and its steps: (action, reached [G])."""
    rng = np.random.default_rng(seed)
    # Each frame is told by its pixels: a running number, in base 256.
    numbers, steps, counter = {}, {}, first * 1000

    def photograph(env: int, key: tuple, at: int) -> torch.Tensor:
        nonlocal counter
        counter += 1
        numbers[counter] = key, at
        digits = torch.tensor([counter // 65536, counter // 256 % 256, counter % 256])
        return digits.to(torch.uint8).expand(8, 8, 3)

    episode, age = np.full(ENVS, first), np.zeros(ENVS, np.int64)
    goal = rng.integers(TRAIN, size=ENVS)
    frame = [photograph(n, (n, episode[n]), 0) for n in range(ENVS)]
    taken, generator = torch.zeros(ENVS, TRACES), torch.Generator().manual_seed(seed)
    for _ in range(blocks):
        frames, actions, traces, reached = [torch.stack(frame)], [], [taken], []
        for k in range(STEPS):
            actions.append(torch.from_numpy(rng.integers(len(ACTIONS), size=ENVS)).byte())
            taken = remember(taken, actions[-1].long())
            traces.append(taken)
            reached.append(torch.from_numpy(rng.random((ENVS, TRAIN)) > 0.995))
            for n in range(ENVS):
                key = n, int(episode[n])
                steps.setdefault(key, (int(goal[n]), []))[1].append(
                    (actions[-1][n], reached[-1][n])
                )
                frame[n] = photograph(n, (n, episode[n]), int(age[n]) + k + 1)
            frames.append(torch.stack(frame))
        replay.add(
            generator, seen=torch.stack(frames), action=torch.stack(actions),
            traces=torch.stack(traces), reached=torch.stack(reached),
            goal=torch.from_numpy(goal.copy()), age=torch.from_numpy(age.copy()),
        )  # fmt: skip
        age += STEPS
        for n in np.flatnonzero(rng.random(ENVS) < 0.3):
            episode[n], age[n], goal[n] = episode[n] + 1, 0, rng.integers(TRAIN)
            taken = taken.index_fill(0, torch.tensor(n), 0)
            frame[n] = photograph(n, (n, episode[n]), 0)
    return numbers, steps


PHOTOGRAPHS = torch.zeros(ENVS, 8, 8, 3, dtype=torch.uint8)
ONE_STAGE = torch.arange(ALL)


def traces_of(actions: Sequence) -> torch.Tensor:
    """Running averages over one step, five and twenty, one action at a time: [27]."""
    traces = torch.zeros(3, len(ACTIONS))
    for action in actions:
        for row, rate in enumerate((1, 1 / 5, 1 / 20)):
            traces[row] *= 1 - rate
            traces[row, int(action)] += rate
    return traces.flatten()


def number(pixel: torch.Tensor) -> int:
    return int(pixel[0]) * 65536 + int(pixel[1]) * 256 + int(pixel[2])


@pytest.mark.parametrize("blocks", [20, 200])
@pytest.mark.parametrize("n_step", [1, 5])
def test_replay_returns_true_transitions_of_its_latest_blocks(blocks, n_step):
    replay = Replay(50 * STEPS * ENVS, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu")
    numbers, steps = fill(replay, blocks)
    generator = torch.Generator().manual_seed(0)
    B = 12_000
    s, a, r, s_next, n, goal = replay.sample(B, 0.5, n_step, generator)
    assert s[0].shape == (B, 8, 8, 3) and s[0].dtype == torch.uint8
    own, reached_later, lengths, seen = 0, 0, set(), set()
    for i in range(B):
        key, at = numbers[number(s[0][i, 0, 0])]
        own_goal, episode = steps[key]
        seen.add((key, at))
        reached = [bool(goals[goal[i]]) for _, goals in episode]
        length = min(n_step, len(episode) - at)
        if any(reached[at : at + length]):
            length = reached.index(True, at) + 1 - at
        lengths.add(length)
        assert n[i] == length
        assert r[i] == float(reached[at + length - 1])
        assert a[i] == episode[at][0]
        actions = [action for action, _ in episode]
        for traces, end in ((s[1][i], at), (s_next[1][i], at + length)):
            assert (traces - traces_of(actions[:end])).abs().max() < 2e-3  # kept in float16
        assert numbers[number(s_next[0][i, 0, 0])] == (key, at + length)
        if goal[i] == own_goal:
            own += 1
        else:  # hindsight: it is reached now or later in this episode
            assert any(reached[at:])
            assert not reached[max(at - 1, 0)]  # and did not hold already
            reached_later += 1
    assert lengths == set(range(1, n_step + 1))
    assert 0.4 < own / B < 0.6 and own + reached_later == B
    everything = [(key, at) for key, (_, episode) in steps.items() for at in range(len(episode))]
    if blocks < 50:
        assert seen == set(everything)
    else:
        assert len(seen) == 49 * STEPS * ENVS  # but for the oldest block


def test_hindsight_draws_a_family_and_then_one_of_its_goals():
    replay = Replay(STEPS * ENVS * 2, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu")
    families = [goal.family for goal in TRAIN_GOALS]
    reached = [families.index("find") + i for i in range(20)] + [families.index("place")]
    generator = torch.Generator().manual_seed(0)
    for block in range(2):
        now = torch.zeros(STEPS, ENVS, TRAIN, dtype=torch.bool)
        for n in range(ENVS):  # all at once, in the second block; but in only one home it is placed
            now[..., n, reached if n == 1 else reached[n:-1]] = block == 1
        replay.add(
            generator, seen=PHOTOGRAPHS.expand(STEPS + 1, -1, -1, -1, -1),
            action=torch.zeros(STEPS, ENVS, dtype=torch.uint8),
            traces=torch.zeros(STEPS + 1, ENVS, TRACES),
            reached=now, goal=torch.full((ENVS,), 30), age=torch.full((ENVS,), STEPS * block),
        )  # fmt: skip
    *_, goal = replay.sample(6000, 1.0, 1, generator)
    goal = goal[goal != 30]
    places = (goal == reached[-1]).float().mean()
    assert len(goal) > 500 and 0.45 < places < 0.55 and set(goal.tolist()) <= set(reached)
    assert len(set(goal.tolist())) >= 4  # one of each home's at random, not the first


def test_what_holds_from_the_start_was_not_arrived_at():
    """Else most of what hindsight draws for lifting would be toys that were in the hand already."""
    replay, generator = (
        Replay(STEPS * ENVS * 3, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu"),
        torch.Generator(),
    )
    for block in range(2):
        now = torch.zeros(STEPS, ENVS, TRAIN, dtype=torch.bool)
        now[:, 0, 5] = True  # from the first frame to the last
        now[2:, 1, 6] = block == 1
        replay.add(
            generator, seen=PHOTOGRAPHS.expand(STEPS + 1, -1, -1, -1, -1),
            action=torch.zeros(STEPS, ENVS, dtype=torch.uint8),
            traces=torch.zeros(STEPS + 1, ENVS, TRACES), reached=now,
            goal=torch.full((ENVS,), 30), age=torch.full((ENVS,), STEPS * block),
        )  # fmt: skip
    assert replay.arrivals.tolist() == [[1, 2, 1, FAMILIES.index(TRAIN_GOALS[6].family)]]


def test_on_the_way_to_a_place_hindsight_is_for_lifting_too():
    """An episode of 40 steps in which the toy is lifted, dropped, lifted again and placed."""
    lift = next(i for i, goal in enumerate(TRAIN_GOALS) if goal.family == "lift")
    place = STAGE_ONE.index(lift, lift + 1)
    replay = Replay(40 * ENVS * 2, 40, PHOTOGRAPHS, torch.tensor(STAGE_ONE), "cpu")
    held, frames = torch.zeros(40, ENVS, TRAIN, dtype=torch.bool), torch.zeros(41, ENVS, 8, 8, 3)
    held[5:25, 0, lift] = held[26:30, 0, lift] = held[30:, 0, place] = True  # of s', the next frame
    frames += torch.arange(41)[:, None, None, None, None]
    generator = torch.Generator().manual_seed(0)
    replay.add(
        generator, seen=frames.byte(), action=torch.zeros(40, ENVS, dtype=torch.uint8),
        traces=torch.zeros(41, ENVS, TRACES), reached=held, goal=torch.full((ENVS,), 30),
        age=torch.zeros(ENVS, dtype=torch.int64),
    )  # fmt: skip
    s, *_, goal = replay.sample(30_000, 1.0, 1, generator)
    step = s[0][:, 0, 0, 0].long()
    in_hand = (step >= 6) & (step <= 25) | (step >= 27) & (step <= 30)
    assert not (in_hand & (goal == lift)).any()  # there an episode for it would have ended
    # Of the draws a quarter is for the second lift, and has 20 of 27 steps in the hand, four times.
    own = (goal == 30).float().mean()
    assert own == pytest.approx((20 / 27) ** 4 / 4, abs=0.01)
    counts = torch.bincount(step[goal == place], minlength=31).float()
    empty = counts[[*range(6), 26]].mean() / counts[6:26].mean()
    assert empty == pytest.approx(0.5, abs=0.06)  # the other half is for lifting


def test_no_relabelling_leaves_every_goal_its_own():
    replay = Replay(50 * STEPS * ENVS, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu")
    numbers, steps = fill(replay, 20)
    generator = torch.Generator().manual_seed(0)
    s, *_, goal = replay.sample(500, 0.0, 3, generator)
    for i in range(500):
        assert goal[i] == steps[numbers[number(s[0][i, 0, 0])][0]][0]


def test_replay_comes_back_from_its_files(tmp_path):
    def empty():
        return Replay(20 * STEPS * ENVS, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu")

    def draw(replay):
        generator = torch.Generator().manual_seed(0)
        s, a, r, s_next, n, goal = replay.sample(500, 0.5, 3, generator)
        return *s, a, r, *s_next, n, goal

    replay, saved = empty(), 0
    for part in range(5):
        fill(replay, 9, seed=part, first=20 * part)
        replay.save(tmp_path, saved)
        saved = replay.head
    restored = empty()
    restored.load(tmp_path, saved)
    assert all(torch.equal(x, y) for x, y in zip(draw(restored), draw(replay), strict=True))
    assert len(list(tmp_path.iterdir())) < 5  # what the ring has overwritten is gone
    next(tmp_path.glob(f"*-{saved}.pt")).unlink()
    with pytest.raises(SystemExit):
        empty().load(tmp_path, saved)


def test_a_kill_between_replay_and_checkpoint_loses_nothing(tmp_path):
    """All blocks anew since last.pt: its own are still on disk, and what came later is dropped."""
    replay = Replay(4 * STEPS * ENVS, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu")
    fill(replay, 4)
    replay.save(tmp_path, 0)
    expected = {name: ring.clone() for name, ring in replay.data.items()}
    fill(replay, 6, seed=1, first=20)
    replay.save(tmp_path, 4)  # and the checkpoint of block 10 is never written
    replay = Replay(4 * STEPS * ENVS, STEPS, PHOTOGRAPHS, ONE_STAGE, "cpu")
    replay.load(tmp_path, 4)
    assert all(torch.equal(ring, expected[name]) for name, ring in replay.data.items())
    assert [path.name for path in tmp_path.iterdir()] == ["0-4.pt"]


def test_in_a_mirror_left_is_right():
    assert [ACTIONS[i] for i in MIRRORED[:5]] == ["forward", "back", "right", "left", "up"]
    assert MIRRORED[5:] == [5, 6, 7, 8]
    traces = mirrored = torch.zeros(2, TRACES)
    for action in torch.randint(9, (30, 2), generator=torch.Generator().manual_seed(0)):
        traces = remember(traces, action)
        mirrored = remember(mirrored, torch.tensor(MIRRORED)[action])
    seen = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    flipped, exchanged = mirror(seen, traces, torch.tensor(MIRRORED))
    assert torch.equal(exchanged, mirrored) and not torch.equal(traces, mirrored)
    assert all(torch.equal(flipped[:, :, i], seen[:, :, 3 - i]) for i in range(4))


def test_shrink_is_the_mean_of_squares():
    frames = np.random.default_rng(0).integers(256, size=(2, 12, 12, 3), dtype=np.uint8)
    expected = frames.reshape(2, 4, 3, 4, 3, 3).mean((2, 4)).astype(np.uint8)
    np.testing.assert_array_equal(shrink(frames, 4, "cpu").numpy(), expected)
    assert shrink(frames, 8, "cpu").shape == (2, 8, 8, 3)  # 12 is no multiple of 8


@pytest.mark.parametrize(
    "seen",
    [torch.randint(256, (3, 16, 16, 6), dtype=torch.uint8), torch.randn(3, 5, 4, 6).half()],
    ids=["pixels", "maps"],
)
def test_the_network_depends_on_goal_traces_and_everything_seen(seen):
    torch.manual_seed(0)
    pixels = seen.dtype == torch.uint8
    network = QNetwork(seen, 3)  # two frames
    traces = torch.rand(3, TRACES)
    texts = torch.nn.functional.normalize(torch.randn(3, 4, 3), dim=-1)
    q = network(seen, traces, texts)
    assert q.shape == (3, len(ACTIONS))
    # Cells tell where toy and place are, pixels do not: so there the prompt itself is known.
    for i, counts in enumerate([pixels, not pixels, not pixels, not pixels]):
        other = texts.clone()
        other[:, i] = texts[:, i].flip(0)
        assert torch.equal(q, network(seen, traces, other)) == (not counts)
    assert (q != network(seen, traces + 0.1, texts)).any(1).all()
    for channel in range(6):
        other = seen.clone()
        other[..., channel] = 255 - other[..., channel]
        assert (q != network(other, traces, texts)).any(1).all()


def test_the_network_knows_without_training_where_the_goal_is():
    """All that it makes of a cell, but for its filters, is the products with the two names."""
    torch.manual_seed(0)
    seen, traces = torch.randn(3, 5, 4, 6), torch.rand(3, TRACES)
    texts = torch.nn.functional.normalize(torch.randn(3, 4, 3), dim=-1)
    network, names = QNetwork(seen, 3), texts[:, 2:]
    torch.nn.init.zeros_(network.cells.weight)
    torch.nn.init.zeros_(network.cells.bias)
    span = torch.linalg.pinv(names) @ names  # [3, 3, 3], onto what the two names span
    along = seen.unflatten(-1, (2, 3)) @ span[:, None, None]
    assert torch.allclose(network(seen, traces, texts), network(along.flatten(-2), traces, texts))
    exchanged = torch.cat([texts[:, :2], names.flip(1)], 1)
    assert (network(seen, traces, texts) != network(seen, traces, exchanged)).any(1).all()


def test_each_goal_comes_with_what_to_do_and_the_names_of_its_toy_and_place():
    clip = CLIPReward(ROOT / "tests/tiny_clip", [goal.prompt for goal in GOALS], "a room", 0.0)
    texts = goal_texts(clip)
    assert texts.shape == (ALL, 4, clip.goal.shape[1])
    shared = clip.encode_text([goal.prompt for goal in TRAIN_GOALS]).mean(0)

    def direction(*prompts: str) -> torch.Tensor:
        e = clip.encode_text(list(prompts)).mean(0) - shared
        return e / e.norm()

    for goal, (prompt, what, toy, place) in zip(GOALS, texts, strict=True):
        alike = [g for g in TRAIN_GOALS if (g.family, g.place) == (goal.family, goal.place)]
        assert len(alike) == 38
        for own, expected in (
            (prompt, direction(goal.prompt)),
            (what, direction(*(g.prompt for g in alike))),
            (toy, direction(f"a {goal.colour} {goal.kind}")),
            (place, direction(f"a {goal.place}") if goal.place else torch.zeros_like(place)),
        ):
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


# ---- Whole runs ---------------------------------------------------------------------------------

SCRIPT = "dqn_clip_playhouse.py"
SMALL = [
    "--total-timesteps", "1600", "--num-envs", "4", "--learning-starts", "400",
    "--eval-every", "800", "--checkpoint-every", "800", "--eval-episodes", "4",
    "--final-episodes", "4", "--batch-size", "16", "--buffer-size", "1200", "--frame-size", "48",
    "--calibration-episodes", "4", "--epsilon-steps", "800", "--target-every", "40",
    "--updates-per-step", "0.25", "--relabel-fraction", "0.5", "--device", "cpu",
    "--temperature", "0.003",  # at which a random CLIP pays
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
    parts = {f"{k}.{n}": v for k in ("q_network", "target") for n, v in state[k].items()}
    return {**parts, "beta": state["beta"]}


def test_a_run_leaves_everything_it_promises(finished):
    run, result = finished
    for name in ("last.pt", "best.pt", "args.json", "report.json", "videos/800.mp4"):
        assert (run / name).stat().st_size > 100, name
    report = json.loads((run / "report.json").read_text())
    assert set(report) == {"random", "last", "best"}
    for row in report.values():
        assert all(0 <= row[split]["success_rate"] <= 1 for split in ("train", "heldout"))
        assert all(math.isfinite(row[split]["clip_success"]) for split in ("train", "heldout"))
    assert "video:" in result.stdout and "best" in result.stdout
    films = {path.name for path in (run / "videos").glob("best*.mp4")}
    red_block = "best_a_red_block"  # the first training goal of each family
    assert films == {f"{red_block}{end}.mp4" for end in ("", "_in_the_hand", "_on_the_bed")}
    logged = scalars(run)
    for tag in (
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon",
        "losses/td_loss", "losses/q_values", "eval/success_rate", "eval/clip_success",
        "time/env", "time/clip", "time/update",
    ):  # fmt: skip
        assert all(math.isfinite(e.value) for e in logged[tag][1:]), tag
    assert [e.step for e in logged["eval/clip_success"]] == [800, 1600]
    assert logged["charts/epsilon"][-1].value == pytest.approx(0.05)
    optimizer = torch.load(run / "last.pt", weights_only=True)["optimizer"]
    last_step = 1600 - 4  # before it; the learning rate falls to 0 at 1600
    rate = optimizer["param_groups"][0]["lr"].item()
    assert rate == pytest.approx(Args().learning_rate * (1 - last_step / 1600))


def test_a_clip_folder_is_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Args(clip_model="clip").clip_model == str(tmp_path / "clip")
    assert Args(clip_model="ViT-B-32/openai").clip_model == "ViT-B-32/openai"


def test_training_moves_every_parameter(finished, random_clip):
    torch.manual_seed(1)
    start = QNetwork(torch.zeros(4, 2, 2, 64).half(), 64).state_dict()
    end = torch.load(finished[0] / "last.pt", weights_only=True)
    for name, value in end["q_network"].items():
        assert not torch.equal(start[name], value), name
    optimizer = end["optimizer"]  # weights that only decayed have had no gradient
    assert all(state["exp_avg_sq"].any() for state in optimizer["state"].values())
    assert optimizer["param_groups"][0]["weight_decay"] == Args().weight_decay > 0
    # 300 updates, and the last copy to the target after 280
    assert end["updates"] == 300
    assert not torch.equal(end["target"]["head.weight"], end["q_network"]["head.weight"])


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path, random_clip):
    run = kill_after_a_checkpoint(SCRIPT, tmp_path, *SMALL, "--clip-model", random_clip)
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 800
    result = train(SCRIPT, tmp_path, "--resume", run)
    assert result.returncode == 0, result.stderr
    expected, resumed = networks(finished[0]), networks(run)
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_the_other_reward_calibration_and_stack_train_as_well(tmp_path, random_clip):
    flags = ["--reward", "projection", "--alpha", "0.5", "--calibrate-with-labels"]
    flags += ["--frame-stack", "2", "--family", "find", "--no-capture-video"]
    flags += ["--policy-input", "pixels", "--no-mirror", "--total-timesteps", "1604"]
    result = train(SCRIPT, tmp_path, *SMALL, *flags, "--clip-model", random_clip)
    assert result.returncode == 0, result.stderr
    state = torch.load(only_run(tmp_path) / "last.pt", weights_only=True)
    assert state["q_network"]["stem.0.weight"].shape[1] == 6  # channels of two frames
    # It ends with a whole block, at 1616, and learns no more after 1604.
    assert state["step"] == 1616 and state["optimizer"]["param_groups"][0]["lr"] == 0
    of_find = torch.tensor([goal.family == "find" for goal in GOALS])
    replay = torch.load(only_run(tmp_path) / "replay" / "0" / "50-100.pt", weights_only=True)
    assert not replay["reached"][..., ~of_find[:TRAIN]].any()  # as they are not trained
    assert replay["seen"].shape[-1] == 6
    (beta,) = state["beta"][of_find].unique()
    assert 0 < beta < 1
    report = json.loads((only_run(tmp_path) / "report.json").read_text())
    assert "success_rate_find" in report["last"]["heldout"]
    assert "success_rate_lift" not in report["last"]["heldout"]


def test_to_place_a_toy_is_to_lift_it_first(tmp_path, random_clip):
    """With a beta that about half of the scores for lifting exceed, and none for placing."""
    flags = ["--family", "place", "--temperature", "1", "--beta", str(1 / 38), "--no-capture-video"]
    result = train(SCRIPT, tmp_path, *SMALL, *flags, "--clip-model", random_clip)
    assert result.returncode == 0, result.stderr
    folder = only_run(tmp_path) / "replay" / "0"
    parts = [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("0-50", "50-100")]
    reached, goal, age = (
        torch.cat([part[k] for part in parts]) for k in ("reached", "goal", "age")
    )
    assert age.max() == 96  # an episode has 100 steps, though a checkpoint comes after 200
    families = {True: [], False: []}
    for block in range(1, 100):
        for n in range(4):
            now = GOALS[goal[block, n]]
            lift = now._replace(family="lift", place=None)
            in_hand = reached[block - 1, -1, n, GOALS.index(lift)]
            families[bool(age[block, n] > 0 and in_hand)].append(now.family)
    assert len(families[True]) > 40 and set(families[True]) == {"place"}
    # Before it is in the hand, half of the blocks are trained for the goal itself all the same.
    ahead = families[False].count("place") / len(families[False])
    assert len(families[False]) > 40 and 0.3 < ahead < 0.7
    report = json.loads((only_run(tmp_path) / "report.json").read_text())
    assert "success_rate_lift" not in report["last"]["train"]  # pursued on the way, but not asked


def test_compiled_updates_are_the_same(tmp_path, random_clip, monkeypatch):
    """With a backend that needs no C++ compiler, and temperatures that make little of roundings."""
    compiled, compile_with = [], torch.compile

    def count(function, mode=None):
        compiled.append(function.__name__)
        faster = compile_with(function, backend="aot_eager")

        def call(*inputs, **options):  # a CUDA graph would take a step's inputs one by one
            assert function.__name__ != "update" or all(isinstance(x, torch.Tensor) for x in inputs)
            return faster(*inputs, **options)

        return call

    monkeypatch.setattr(torch, "compile", count)
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--clip-model", str(random_clip), "--no-capture-video"]
    flags += ["--temperature", "1", "--policy-temperature", "1", "--updates-per-step", "0.05"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags, "--compile"])
    main()
    assert compiled[-1] == "update"
    (tmp_path / "eager").mkdir()
    result = train(SCRIPT, tmp_path / "eager", *flags)
    assert result.returncode == 0, result.stderr
    same, expected = networks(only_run(tmp_path)), networks(only_run(tmp_path / "eager"))
    assert (expected["beta"] == 0.5).all()  # at this temperature the quantile is far below
    torch.manual_seed(1)
    start = QNetwork(torch.zeros(4, 2, 2, 64).half(), 64).state_dict()
    for name, value in start.items():
        # By their norms: Adam makes a step of the rounding where an element's gradient is zero.
        change = expected[f"q_network.{name}"] - value
        error = same[f"q_network.{name}"] - expected[f"q_network.{name}"]
        assert 1e3 * error.norm() < change.norm() < 0.5 * value.norm()  # it did start there


def test_nan_stops_the_run_in_one_line(tmp_path, random_clip):
    flags = [*SMALL, "--clip-model", random_clip, "--no-capture-video", "--learning-rate", "1e30"]
    result = train(SCRIPT, tmp_path, *flags)
    assert result.returncode == 1
    assert re.search(r"step \d+: .* is not finite", result.stderr)
    assert "Traceback" not in result.stderr


def test_an_agent_can_be_replayed(finished):
    run, _ = finished
    before = (run / "report.json").read_text()
    result = train(SCRIPT, run.parents[1], "--evaluate", run, "--final-episodes", "4")
    assert result.returncode == 0, result.stderr
    for name, splits in json.loads(before).items():  # same seeds, same episodes
        for split, row in splits.items():
            numbers = ", ".join(f"{k} {v:.3f}" for k, v in row.items())
            assert f"{name:>6}, {split:>7} goals: {numbers}" in result.stdout
    flags = ["--final-episodes", "2", "--policy-temperature", "1"]
    result = train(SCRIPT, run.parents[1], "--evaluate", run, *flags)
    assert result.returncode == 0, result.stderr
    assert (run / "report.json").read_text() == before
    other = Path(__file__).parent / "tiny_clip"
    result = train(SCRIPT, run.parents[1], "--evaluate", run, "--clip-model", other)
    assert result.returncode == 2 and "--clip-model" in result.stderr.splitlines()[-1]


def test_goals_are_told_apart_and_learned(tmp_path, monkeypatch, random_clip):
    """In place of the home's goals two that are easy to see: to look up, and to look down."""
    find, lift = (next(g for g in TRAIN_GOALS if g.family == f) for f in ("find", "lift"))

    def looks(env: PlayhouseEnv, goal) -> bool:
        return env._tilt == (2 if goal.family == "find" else 0)

    monkeypatch.setattr(PlayhouseEnv, "in_goal_state", looks)
    monkeypatch.setattr("dqn_clip_playhouse.goals_for", lambda args, goals: [find, lift])
    monkeypatch.chdir(tmp_path)
    flags = [
        "--reward", "env", "--total-timesteps", "4800", "--num-envs", "8",
        "--learning-starts", "800", "--epsilon-steps", "3000", "--updates-per-step", "0.4",
        "--batch-size", "32", "--target-every", "50", "--learning-rate", "1e-3", "--frame-size",
        "48", "--eval-every", "4800", "--eval-episodes", "2", "--final-episodes", "2",
        "--buffer-size", "6400", "--score-every", "20", "--gamma", "0.5",
        "--no-capture-video", "--clip-model", str(random_clip), "--device", "cpu",
        "--policy-input", "pixels",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["dqn_clip_playhouse.py", *flags])
    main()
    from clip_reward import CLIPReward

    state = torch.load(only_run(tmp_path) / "last.pt", weights_only=True)
    network = QNetwork(torch.zeros(1, 48, 48, 3, dtype=torch.uint8), 64)
    network.load_state_dict(state["q_network"])
    text = goal_texts(CLIPReward(str(random_clip), [goal.prompt for goal in GOALS], "a room"))
    text = text[[GOALS.index(find), GOALS.index(lift)]] @ state["projection"]
    env, right = PlayhouseEnv("rgb_array", width=48, height=48), 0
    for seed in range(20):
        frame, _ = env.reset(seed=10_000 + seed)
        nothing = torch.zeros(2, TRACES)
        q = network(shrink(frame[None], 48, "cpu").repeat(2, 1, 1, 1), nothing, text)
        right += (q.argmax(-1) == torch.tensor([ACTIONS.index("up"), ACTIONS.index("down")])).sum()
    env.close()
    assert right >= 36  # of 40


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1.5"], ["--alpha 1.5", "between 0 and 1"]),
        (["--baseline", " "], ["--baseline", "sentence"]),
        (["--clip-model", "no/such"], ["--clip-model no/such"]),
        (["--num-envs", "0"], ["--num-envs 0"]),
        (["--eval-every", "800"], ["--eval-every 800", "raise it to 1600"]),
        (["--track"], ["--track", "pip install wandb"]),
        (["--score-every", "7"], ["--score-every 7", "divide"]),
        (
            ["--policy-size", "36", "--policy-input", "pixels"],
            ["--policy-size 36", "multiple of 8"],
        ),
        (["--relabel-fraction", "-0.5"], ["--relabel-fraction -0.5"]),
        (["--in-hand", "2"], ["--in-hand 2"]),
        (["--buffer-size", "500"], ["--buffer-size 500", "3200"]),
        (["--beta", "nan"], ["--beta nan", "more than 0 and less than 1"]),
        (["--beta", "50"], ["--beta 50", "less than 1"]),
        (["--beta", "-1", "--reward", "projection"], ["--beta -1", "more than -1"]),
        (["--beta", "0.5", "--reward", "env"], ["--beta 0.5", "--reward env"]),
        (["--total-timesteps", "9000"], ["--learning-starts 10000", "less than --total"]),
        (["--calibrate-with-labels", "--beta", "0.5"], ["--calibrate-with-labels", "--beta"]),
        (["--temperature", "inf"], ["--temperature inf", "finite"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--resume", "nowhere"], ["--resume nowhere"]),
        (["--evaluate", "nowhere"], ["--evaluate nowhere"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, random_clip, flags, words, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--clip-model", str(random_clip), *flags])
    monkeypatch.setattr("dqn_clip_playhouse.Replay", lambda *_: pytest.fail("the run begins"))
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # a machine without wandb
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2
    assert errors.count("\n") == 1 and all(word in errors for word in words), errors
    assert not (tmp_path / "runs").exists()


def test_a_replay_that_does_not_fit_is_refused(capsys):
    with pytest.raises(SystemExit):
        Replay(10**10, 4, torch.zeros(16, 48, 48, 3, dtype=torch.uint8), ONE_STAGE, "cpu")
    errors = capsys.readouterr().err
    assert errors.startswith("--buffer-size 10000000000: takes 83") and errors.count("\n") == 1


def test_a_resumed_run_keeps_its_arguments(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--resume", str(finished[0]), "--gamma", "0.9"])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert re.search(r"--gamma 0.9: .* was started with 0.95", errors)


@pytest.mark.parametrize(("option", "name"), [("--resume", "last.pt"), ("--evaluate", "best.pt")])
def test_a_checkpoint_of_another_layout_is_one_line(
    option, name, finished, tmp_path, monkeypatch, capsys
):
    state = torch.load(finished[0] / name, weights_only=True)
    del state["layout"]  # as before there was one
    torch.save(state, tmp_path / name)
    monkeypatch.setattr(sys, "argv", [SCRIPT, option, str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert f"{option} {tmp_path}: another version of this script made its {name}" in errors


def test_a_tour_that_cannot_render_is_one_line(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no display")

    monkeypatch.setattr("mujoco.Renderer", broken)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--tour"])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and errors.count("\n") == 1
    assert "MUJOCO_GL" in errors and "no display" in errors and "libegl1" in errors

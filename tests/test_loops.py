"""The main loops of both scripts in a world of numbers, against slow references.

Two environments without a simulator, in this process, and a CLIP that reads digits: what is stored,
trained on, evaluated and saved can be told exactly.
"""

import copy
import functools
import inspect
import math
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dqn_clip_playhouse as dqn  # first: it puts torch before the first GL context
import sac_clip_humanoid as sac

import numpy as np
import torch
import torch.nn.functional as F
from whole_runs import only_run, scalars

close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

FLAGS = ["--num-envs", 2, "--frame-size", 8, "--batch-size", 16, "--device", "cpu"]
FLAGS += ["--precision", "fp32", "--no-capture-video"]
SAC_FLAGS = ["--hidden", 8, "--buffer-size", 1000, "--learning-starts", 100]
DQN_FLAGS = ["--reward", "env", "--policy-input", "pixels", "--policy-size", 8]
DQN_FLAGS += ["--buffer-size", 2000]


class Bodies:
    """Two environments whose state, [N, 3], and frame show step, environment and episode."""

    num_envs, limit = 2, 50
    single_observation_space = {"state": np.zeros(3)}
    single_action_space = np.zeros(3)

    def __init__(self):
        self.step, self.episode = np.zeros(2, int), np.zeros(2, int)
        self.resets, self.actions = [], []

    def observe(self):
        numbers = np.stack([self.step, np.arange(2), self.episode], 1)
        frame = np.tile(numbers[:, None, None].astype(np.uint8), (1, 8, 8, 1))
        return {"state": numbers.astype(np.float32), "frame": frame}

    def reset_async(self, seed=None, options=None):
        self.resets.append((seed, options))
        begins = (options or {}).get("reset_mask", np.ones(2, bool))
        self.step[begins], self.episode = 0, self.episode + begins

    def reset_wait(self, timeout):
        return self.observe(), {}

    def step_async(self, action):
        self.actions.append(action)
        self.step += 1

    def step_wait(self, timeout):
        info = {"steps": np.full(2, 2)}
        return self.observe(), np.zeros(2), np.zeros(2, bool), self.step >= self.limit, info

    def close(self, terminate):
        pass


class Homes(Bodies):
    """Goal 0 is reached at step 6, in every second episode."""

    limit = 100

    def reset_wait(self, timeout):
        return self.observe()["frame"], {"goal": np.zeros(2, int)}

    def step_wait(self, timeout):
        reached = np.zeros((2, len(dqn.GOALS)), bool)
        reached[:, 0] = (self.step == 6) & (self.episode % 2 == 0)
        info = {"reached": reached, "success": reached[:, 0]}
        return self.observe()["frame"], None, None, self.step >= self.limit, info


class Digits(torch.nn.Module):
    """In CLIP's place: a frame's reward is its step, and 1000 in environment 1."""

    temperature = 1.0

    def __init__(self, model, goals, *args, **kwargs):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.goal = F.normalize(torch.randn(len(goals), 8, generator=rng), dim=-1)
        self.baseline = self.goal[0]

    def encode_text(self, prompts):
        return self.goal[: len(prompts)]

    def forward(self, frames):
        return torch.as_tensor(frames)[:, 0, 0, :2].float() @ torch.tensor([[1.0], [1000.0]])


TOYS = [goal for goal in dqn.TRAIN_GOALS if goal.place == "table"][:2]  # what each is to place
PLACE = torch.tensor([dqn.GOALS.index(goal) for goal in TOYS])
LIFT = torch.tensor([dqn.STAGE_ONE[i] for i in PLACE])
END = torch.tensor([12, 20])


def shown(numbers: torch.Tensor) -> torch.Tensor:
    """What a frame of these numbers [..., 3] shows, [..., 240]. In even episodes the toy is in the
    hand from step 6 to 10, and in its place at step 3 and from step 12 or 20 on, by environment; in
    odd ones it lies there from step 3 on, and was never in the hand."""
    step, env, episode = numbers.long().unbind(-1)
    even = episode % 2 == 0
    goals = torch.arange(len(dqn.GOALS))
    lifted = even & (step >= 6) & (step <= 10)
    placed = (step == 3) | (step >= torch.where(even, END[env], 3))
    return torch.where(
        goals == LIFT[env][..., None],
        lifted[..., None],
        (goals == PLACE[env][..., None]) & placed[..., None],
    )


class Toys(Bodies):
    """One toy to place in each. Who is not reset has goal 0, as in a masked reset of gymnasium."""

    limit = 40

    def reset_async(self, seed=None, options=None):
        super().reset_async(seed, options)
        self.goal = PLACE.numpy() * (self.step == 0)

    def reset_wait(self, timeout):
        return self.observe()["frame"], {"goal": self.goal}

    def step_wait(self, timeout):
        frame = self.observe()["frame"]
        info = {"reached": shown(torch.from_numpy(frame[:, 0, 0])).numpy()}
        info["success"] = np.zeros(2, bool)  # the simulator disagrees
        return frame, None, None, self.step >= self.limit, info


class Sights(Digits):
    """CLIP's embedding of a frame says which goals it shows."""

    def __init__(self, model, goals, *args, **kwargs):
        super().__init__(model, goals)
        self.goal = torch.eye(len(goals))
        self.baseline = self.goal[-1]

    def encode_frames(self, frames):
        return shown(torch.from_numpy(frames[:, 0, 0])).float()

    def encode_maps(self, frames):
        numbers = torch.from_numpy(frames[:, :1, :1]).float()  # [N, 1, 1, 3]
        return self.encode_frames(frames), F.pad(numbers, (0, len(dqn.GOALS) - 3))


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Puts a script there; returns the environments that it makes, and what starts it."""
    monkeypatch.chdir(tmp_path)

    def enter(script: ModuleType, kind: type, clip: type = Digits):
        made = []
        monkeypatch.setattr(script, "make_envs", lambda *args: made.append(kind()) or made[-1])
        monkeypatch.setattr(script, "CLIPReward", clip)

        def start(*flags):
            monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
            script.main()

        return made, start

    return enter


class Found(Exception):
    pass


def update_of(start, monkeypatch, *flags):
    """A script's closure `update`, and what that closes over, by name."""

    def stop(function):
        raise Found(function)

    monkeypatch.setattr(torch, "compile", stop)
    with pytest.raises(Found) as found:
        start(*flags, "--compile")
    (update,) = found.value.args
    return update, inspect.getclosurevars(update).nonlocals


def shake(module: torch.nn.Module, rng: torch.Generator, size: float) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight += size * torch.randn(weight.shape, generator=rng)


# ---- Updates ------------------------------------------------------------------------------------


def test_dqn_targets_equal_a_slow_reference(world, monkeypatch):
    _, start = world(dqn, Homes)
    flags = ["--gamma", 0.8, "--policy-temperature", 0.3, "--target-temperature", 0.7]
    update, own = update_of(start, monkeypatch, *FLAGS, *DQN_FLAGS, *flags)
    network, target, rng = own["q_network"], own["target"], torch.Generator().manual_seed(0)
    for part, first, last in ((network, 1, 0), (target, -1, 1.5)):  # which actions look good to it
        shake(part, rng, 0.1)
        with torch.no_grad():
            part.head.bias += torch.linspace(first, last, 9)
    B = 64
    s, s_next = (
        (
            torch.randint(256, (B, 8, 8, 3), generator=rng, dtype=torch.uint8),
            torch.rand(B, dqn.TRACES, generator=rng),
        )
        for _ in range(2)
    )
    a, n = torch.randint(9, (B,), generator=rng), torch.randint(1, 6, (B,), generator=rng)
    r = (torch.rand(B, generator=rng) < 0.3).float()
    goal = torch.randn(B, 4, network.gate.in_features, generator=rng)
    values = []
    for double_q in (True, False):
        own["args"].double_q = double_q
        with torch.no_grad():
            q, chosen, valued = (
                network(*s, goal), network(*s_next, goal), target(*s_next, goal)
            )  # fmt: skip
        y = []
        for i in range(B):
            weight = (chosen if double_q else valued)[i].clamp(min=0.01) ** (1 / 0.7)
            values.append(float(weight / weight.sum() @ valued[i]))
            later = 0.8 ** int(n[i]) * min(max(values[-1], 0), 1)
            y.append(0.8 ** (int(n[i]) - 1) if r[i] else later)
        error = (q[range(B), a] - torch.tensor(y)).abs()
        huber = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
        before = copy.deepcopy(target.state_dict())
        close(update(*s, a, r, *s_next, n, goal)["td_loss"], huber)
        assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())
    beyond = [value < 0 or value > 1 for value in values]
    assert 20 < sum(beyond) < 2 * B - 20  # so that limits count, and what lies between them


def test_sac_updates_equal_a_slow_reference(world, monkeypatch):
    _, start = world(sac, Bodies)
    flags = ["--reward", "env", "--gamma", 0.8, "--tau", 0.3, "--actor-tau", 0.1]
    flags += ["--reward-scale", 5, "--initial-ent-coef", 0.2, "--learning-rate", 0.01]
    update, own = update_of(start, monkeypatch, *FLAGS, *SAC_FLAGS, *flags)
    critic, target, actor, agent = (own[name] for name in ("critic", "target", "actor", "agent"))
    rng, B = torch.Generator().manual_seed(0), 64
    for part in (critic, target, agent):
        shake(part, rng, 0.3)
    s, s_next, a, noise = (
        torch.randn(*shape, generator=rng) for shape in ((B, 3), (B, 3), (B, 3), (2, B, 3))
    )
    r, terminated = torch.randn(B, generator=rng), (torch.rand(B, generator=rng) < 0.5).float()
    with torch.no_grad():
        a_next, log_pi = actor.sample(s_next, noise[0])
        v_next = torch.minimum(*target(s_next, a_next)) - 0.2 * log_pi
        y = 5 * r + 0.8 * torch.where(terminated == 1, 0, v_next)
        qf_loss = sum(((q - y) ** 2).mean() for q in critic(s, a))
    slow = {name: copy.deepcopy(own[name]) for name in ("target", "agent", "actor")}
    losses = update(s, a, r, s_next, terminated, noise)
    close(losses["qf_loss"], qf_loss)
    # The actor climbs the critics as they are by now.
    a_pi, log_pi = slow["actor"].sample(s, noise[1])
    (0.2 * log_pi - torch.minimum(*critic(s, a_pi))).mean().backward()
    for weight, expected in zip(actor.parameters(), slow["actor"].parameters(), strict=True):
        close(weight.grad, expected.grad)
    # d/dx of -exp(x) * (log pi + the target entropy of -3), at exp(x) = 0.2
    expected = -0.2 * (log_pi.detach().mean() - 3)
    close(own["log_ent_coef"].grad, expected)
    # A first step of Adam is as long as the learning rate.
    close(own["log_ent_coef"].detach(), torch.tensor(math.log(0.2)) - 0.01 * expected.sign())
    for name, fast, tau in (("target", critic, 0.3), ("agent", actor, 0.1)):
        for now, old, new in zip(
            own[name].parameters(), slow[name].parameters(), fast.parameters(), strict=True
        ):
            close(now, old + tau * (new - old))


def test_a_temperature_that_is_set_is_not_learned(world, monkeypatch):
    _, start = world(sac, Bodies)
    flags = ["--reward", "env", "--ent-coef", 0.2]
    update, own = update_of(start, monkeypatch, *FLAGS, *SAC_FLAGS, *flags)
    x, a, zero = torch.randn(4, 3), torch.zeros(4, 3), torch.zeros(4)
    for _ in range(2):
        losses = update(x, a, zero, x, zero, torch.stack([a, a]))
    close(losses["ent_coef"], torch.tensor(0.2))
    assert not own["log_ent_coef"].requires_grad


@pytest.mark.parametrize("script", [sac, dqn])
def test_gradients_are_averaged_over_the_ranks(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD_SIZE", 2)
    monkeypatch.setattr(script.dist, "all_reduce", lambda x: x.add_(4))  # another one's, all 4
    x, y = torch.randn(2, 3), torch.randn(())
    expected = (x + 4) / 2, (y + 4) / 2
    script.average(x, y)
    torch.testing.assert_close((x, y), expected)


# ---- Evaluations --------------------------------------------------------------------------------


class Falling(Bodies):
    """Body 0 ends after 4 actions, 2 of them in the goal state of task 0; body 1 after 10, 4 of
    them in that of task 1. Each always is in that of the other's, and never in that of task 2."""

    def step_wait(self, timeout):
        t = self.step[0]
        # What comes after an episode's end is not its own.
        goal_state = np.array([[t <= 2 or t > 4, True, False], [True, t <= 4, False]])
        terminated, truncated = np.array([t == 4, False]), np.array([False, t == 10])
        steps = np.array([1 if t == 4 else 2, 2])  # it fell amid its last action
        info = {"goal_state": goal_state * steps[:, None], "steps": steps}
        return self.observe(), np.ones(2), terminated, truncated, info


def test_an_evaluation_of_bodies_counts_each_episode_to_its_end():
    goals = []

    def score(frames):
        future = Future()
        task = np.arange(3) * 1000  # of a frame's reward
        future.set_result(frames[..., 0, 0, :1] + 100 * frames[..., 0, 0, 1:2] + task)
        return future

    def policy(state, goal):
        goals.append(goal.tolist())
        return np.full((2, 1), 0.5)

    envs, args, tasks = Falling(), sac.Args(action_repeat=2), ["first", "second", "third"]
    means, film = sac.evaluate(envs, policy, score, tasks, 2, (7, 1), args)
    # Six episodes, two of each task: body 0 has tasks 0, 2, 1 and body 1 tasks 1, 0, 2.
    assert [goals[i] for i in (0, 10, 20)] == [[0, 1], [2, 0], [1, 2]] and len(goals) == 30
    assert means["success_rate_first"] == 1 and means["success_rate_second"] == 0.5
    assert means["success_rate_third"] == 0 and means["success_rate"] == 0.5
    assert means["goal_state"] == pytest.approx((4 / 7 + 4 / 10 + 0 + 1 + 1 + 0) / 6)
    assert means["episodic_return"] == (4 + 10) / 2
    steps = 1 + 2 + 3 + 4, sum(range(1, 11)) + 10 * 100
    tasks_return = 1000 * 4 * (0 + 2 + 1) + 1000 * 10 * (1 + 0 + 2)
    assert means["clip_return"] == pytest.approx((3 * sum(steps) + tasks_return) / 6)
    seeds = [seed for seeds, _ in envs.resets for seed in seeds]
    assert seeds == [sac.stream_seed(7, 1, i) for i in range(6)]
    assert (np.stack(envs.actions) == 0.5 * sac.ACTION_SCALE).all()
    assert film[:10, 0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_an_evaluation_of_homes_draws_their_goals_and_counts_the_episodes_asked_for():
    envs = Homes()
    see = lambda frames: (torch.from_numpy(frames), None)
    judge = lambda frames, embeddings, infos: torch.zeros(1, 2, len(dqn.GOALS))
    play = lambda *args: torch.tensor([0, 1])
    goals, args = dqn.HELDOUT_GOALS, dqn.Args()
    means, _ = dqn.evaluate(envs, play, 3, (7, 2), goals, see, judge, None, args, "cpu")
    seeds = [[dqn.stream_seed(7, 2, i) for i in pair] for pair in ((0, 1), (2, 3))]
    assert envs.resets == [(pair, {"goals": dqn.evenly(goals)}) for pair in seeds]
    assert means["success_rate"] == pytest.approx(1 / 3)  # the fourth succeeds, and is not counted


# ---- Loops --------------------------------------------------------------------------------------


def whole_replay(run: Path) -> list[dict]:
    files = sorted((run / "replay/0").glob("*.pt"), key=lambda file: int(file.stem.split("-")[0]))
    return [torch.load(file, weights_only=True) for file in files]


def test_the_sac_loop_stores_each_frame_and_keeps_the_best(world, monkeypatch):
    made, start = world(sac, Bodies)
    clip_returns, keys, reported = iter([1.0, 3.0, 2.0, 3.5, 2.5]), [], []

    def evaluate(envs, policy, score, tasks, episodes, key, args):
        keys.append(key)
        if key[1] == sac.REPORT:
            reported.append(policy(np.ones((2, 3), np.float32), np.zeros(2, int)))
            return {"clip_return": 0.0}, None
        value = next(clip_returns)
        return {"clip_return": value, "success_rate": -value}, None  # it must not select

    monkeypatch.setattr(sac, "evaluate", evaluate)
    forward, batches = Digits.forward, []

    def recorded(clip, frames):
        batches.append(len(frames))
        return forward(clip, frames)

    monkeypatch.setattr(Digits, "forward", recorded)
    flags = ["--total-timesteps", 600, "--eval-every", 200, "--checkpoint-every", 200]
    start(*FLAGS, *SAC_FLAGS, *flags, "--updates-per-step", 0.1)
    assert batches == 3 * [16, 16, 16, 16, 16, 16, 4]  # of 8 steps; an evaluation cuts one short
    run = only_run(Path())
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert (last["step"], best["step"]) == (600, 400)
    assert {e.value for e in scalars(run)["charts/clip_return"]} == {52550}  # as s' goes to 50
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    assert keys == [(1, sac.SELECTION)] * 3 + [(1, sac.REPORT)] * 4
    for state, action in zip((last, best), reported[2:], strict=True):
        agent, normaliser = sac.Actor(3, 3, 8), sac.Normaliser(3)
        agent.load_state_dict(state["agent"])
        normaliser.load_state_dict(state["normaliser"])
        expected = torch.tanh(agent(normaliser(torch.ones(2, 3)))[0])
        np.testing.assert_allclose(action, expected.detach().numpy(), atol=1e-6)
    assert not np.allclose(reported[2], reported[3])
    assert last["critic_optimizer"]["state"][0]["step"] == 50  # (600 - 100) * 0.1
    assert last["normaliser"]["count"] == pytest.approx(300, abs=1e-2)  # frames
    rate = last["actor_optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(sac.Args().learning_rate * (1 - 596 / 600))

    parts = whole_replay(run)
    s, a, r, terminated, _ = (
        torch.cat(ring) for ring in zip(*(p["data"] for p in parts), strict=True)
    )
    rows = torch.cat([part["has_transition"] for part in parts]).nonzero()[:, 0]
    s_next = s[rows + 1]
    assert len(rows) == 150 and s_next[..., 0].max() == 50
    assert torch.equal(s_next, s[rows] + torch.tensor([1.0, 0, 0]))  # never that of a reset
    assert torch.equal(r[rows, :, 0], 2 * (s_next[..., 0] + 1000 * s_next[..., 1]))
    assert not terminated.any()  # a time limit is no terminal state
    taken = torch.from_numpy(np.stack(made[0].actions))
    torch.testing.assert_close(taken, sac.ACTION_SCALE * a[rows])
    drawn = [(seeds, options["reset_mask"]) for seeds, options in made[0].resets[1:]]
    for env in range(2):  # each episode has a start of its own
        own = [seeds[env] for seeds, begins in drawn if begins[env]]
        assert own == [sac.stream_seed(1, sac.TRAINING, env, k) for k in range(len(own))]

    best = torch.load(run / "best.pt", weights_only=True) | {"best_return": 4.0}
    torch.save(best, run / "best.pt")  # as if it were from after the last checkpoint
    start("--resume", run, "--total-timesteps", 800)  # its evaluation is not the best
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert (last["step"], best["step"]) == (800, 400)
    (run / "best.pt").unlink()  # of a copy
    start("--resume", run, "--total-timesteps", 1000)
    assert torch.load(run / "best.pt", weights_only=True)["step"] == 1000


class Runners(Bodies):
    """Paid what the step counts; the first one falls at step 20."""

    def step_wait(self, timeout):
        observation, _, _, truncated, info = super().step_wait(timeout)
        return observation, self.step * 1.0, self.step == [20, 0], truncated, info


def test_the_sac_loop_learns_from_the_environments_own_reward(world, monkeypatch):
    _, start = world(sac, Runners)
    returns = iter([1.0, 3.0, 2.0])

    def evaluate(envs, policy, score, tasks, episodes, key, args):
        value = next(returns) if key[1] == sac.SELECTION else 0.0
        return {"episodic_return": value, "success_rate": -value}, None  # it must not select

    monkeypatch.setattr(sac, "evaluate", evaluate)
    flags = ["--reward", "env", "--total-timesteps", 600, "--updates-per-step", 1e-9]
    start(*FLAGS, *SAC_FLAGS, *flags, "--eval-every", 200, "--checkpoint-every", 200)
    run = only_run(Path())
    assert torch.load(run / "best.pt", weights_only=True)["step"] == 400
    parts = whole_replay(run)
    s, _, r, terminated, _ = (
        torch.cat(ring) for ring in zip(*(p["data"] for p in parts), strict=True)
    )
    rows = torch.cat([part["has_transition"] for part in parts]).nonzero()[:, 0]
    step, env, _ = s[rows + 1].unbind(-1)
    assert torch.equal(r[rows, :, 0], step)
    fell = (step == 20) & (env == 0)
    assert fell.any() and torch.equal(terminated[rows] > 0, fell)


def test_the_dqn_loop_stores_blocks_mirrors_half_and_copies_its_target(world, monkeypatch):
    made, start = world(dqn, Homes)
    success = iter([1.0, 3.0, 2.0])

    def evaluate(envs, play, episodes, key, goals, **options):
        return {"success_rate": next(success) if key[1] == dqn.SELECTION else 0.0}, None

    sampled, trained, heads = [], [], []
    sample = dqn.Replay.sample

    def recorded_sample(*args):
        assert args[1:4] == (16, 0.3, 7)
        batch = s, a, r, s_next, n, goal = sample(*args)
        sampled.append([x.clone() for x in (*s, a, r, *s_next, n)])
        return batch

    def recorded_update(update):
        network = inspect.getclosurevars(update).nonlocals["q_network"]

        def call(*inputs):
            trained.append([x.clone() for x in inputs[:7]])
            losses = update(*inputs)
            heads.append(network.head.weight.detach().clone())
            return losses

        return call

    monkeypatch.setattr(dqn, "evaluate", evaluate)
    monkeypatch.setattr(dqn.Replay, "sample", recorded_sample)
    monkeypatch.setattr(torch, "compile", recorded_update)
    flags = ["--total-timesteps", 1200, "--eval-every", 400, "--checkpoint-every", 400]
    flags += ["--learning-starts", 400, "--updates-per-step", 0.1, "--target-every", 30]
    flags += ["--relabel-fraction", 0.3, "--n-step", 7]
    start(*FLAGS, *DQN_FLAGS, *flags, "--frame-stack", 2, "--compile")
    run = only_run(Path())
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert (last["step"], best["step"], last["updates"], len(heads)) == (1200, 800, 80, 80)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.equal(last["target"]["head.weight"], heads[59])
    assert not torch.equal(heads[59], heads[79])

    mirrored = torch.tensor(dqn.MIRRORED)
    for before, now in zip(sampled, trained, strict=True):
        for i in (0, 4):  # s and s': what is seen, and the traces
            seen, traces = dqn.mirror(before[i][:8], before[i + 1][:8], mirrored)
            assert torch.equal(now[i], torch.cat([seen, before[i][8:]]))
            assert torch.equal(now[i + 1], torch.cat([traces, before[i + 1][8:]]))
        assert torch.equal(now[2], torch.cat([mirrored[before[2][:8]], before[2][8:]]))
        assert torch.equal(now[3], before[3]) and torch.equal(now[6], before[6])

    parts = whole_replay(run)
    blocks = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # [150, ...]
    before, now = blocks["seen"][..., 0, 0, :].long().chunk(2, -1)  # [150, 5, N, 3], two frames
    step = blocks["age"][:, None] + torch.arange(5)[:, None]
    assert torch.equal(now[..., 0], step) and torch.equal(before[..., 0], (step - 1).clamp(min=0))
    assert torch.equal(before[..., 1:], now[..., 1:])  # of the same environment and episode
    reached = blocks["reached"][..., 0]
    assert torch.equal(reached, (now[:, 1:, :, 0] == 6) & (now[:, 1:, :, 2] % 2 == 0))
    ends = reached.any(1) | (blocks["age"] == 96)
    ends[49::50] = True  # evaluations
    assert reached.any() and torch.equal(blocks["age"][1:] == 0, ends[:-1])
    traces, actions = torch.zeros(2, dqn.TRACES), blocks["action"].long()
    for block in range(150):
        traces[blocks["age"][block] == 0] = 0
        for k in range(4):
            torch.testing.assert_close(
                blocks["traces"][block, k].float(), traces, atol=2e-3, rtol=0
            )
            traces = dqn.remember(traces, actions[block, k])
    assert np.array_equal(np.stack(made[0].actions), actions.flatten(0, 1))
    assert all(options["in_hand"] == 0.5 for _, options in made[0].resets[1:])


@pytest.mark.parametrize("policy_input", ["pixels", "clip"])
def test_the_dqn_loop_scores_its_frames_and_lifts_before_it_places(
    policy_input, world, monkeypatch
):
    made, start = world(dqn, Toys, Sights)
    forward, asked, reports = dqn.QNetwork.forward, [], []
    success = iter([1.0, 3.0, 2.0, 3.5])

    def recorded_forward(network, seen, traces, texts):
        asked.append((network.head.weight.detach().clone(), texts))
        return forward(network, seen, traces, texts)

    def evaluate(envs, play, episodes, key, goals, clip_success, **options):
        before = len(asked)
        held = torch.zeros(2, 240).index_fill_(1, LIFT[0], 0.6)
        held[1] *= 0.8  # below beta
        state = torch.zeros(2, *example), torch.zeros(2, dqn.TRACES)
        play(*state, PLACE[[0, 0]], held, torch.Generator())
        used = asked[before:]
        del asked[before:]
        reports.append((key[1], goals, used))
        scores = torch.zeros(4, 3, 240)  # all place the toy; one lifted it before
        scores[3, :, PLACE[0]] = scores[1, 0, LIFT[0]] = 0.6
        scores[1, 1, LIFT[0]] = 0.4  # of one CLIP does not say so
        assert clip_success(scores, PLACE[[0, 0, 0]]).tolist() == [True, False, False]
        if key[1] != dqn.SELECTION:
            return {"clip_success": 0.0}, None
        value = next(success)
        return {"clip_success": value, "success_rate": -value}, None  # it must not select

    example = (8, 8, 3) if policy_input == "pixels" else (1, 1, 128)
    monkeypatch.setattr(dqn, "evaluate", evaluate)
    monkeypatch.setattr(dqn.QNetwork, "forward", recorded_forward)
    flags = ["--reward", "projection", "--beta", 0.5, "--policy-input", policy_input]
    flags += ["--total-timesteps", 1200, "--eval-every", 400, "--checkpoint-every", 400]
    flags += ["--policy-size", 8, "--buffer-size", 2000, "--learning-starts", 400, "--no-mirror"]
    monkeypatch.setattr(dqn, "mirror", None)
    start(*FLAGS, *flags, "--updates-per-step", 0.1)
    run = only_run(Path())
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert (last["step"], best["step"]) == (1200, 800)
    heads = last["q_network"]["head.weight"], best["q_network"]["head.weight"]
    assert not torch.equal(*heads)
    text = dqn.goal_texts(Sights("", dqn.GOALS)) @ last["projection"]  # [240, 4, C]

    # Training goals select; the report is of both, and of the agents that it names.
    train, heldout = list(dqn.TRAIN_GOALS), list(dqn.HELDOUT_GOALS)
    rows = [(dqn.SELECTION, train)] * 3 + [(dqn.REPORT, train), (dqn.REPORT, heldout)] * 3
    assert [(use, goals) for use, goals, _ in reports] == rows
    assert not reports[3][2] and not reports[4][2]  # the random agent asks no network
    for (_, _, [(head, texts)]), expected in zip(reports[5:], np.repeat([0, 1], 2), strict=True):
        assert torch.equal(head, heads[expected])
        close(texts, text[[int(PLACE[0]), int(LIFT[0])]])  # the toy is in the hand, and is not

    parts = whole_replay(run)
    blocks = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # [150, ...]
    numbers = torch.zeros(150, 5, 2, 3)
    age, episode = blocks["age"], (blocks["age"] == 0).cumsum(0)
    numbers[..., 0] = age[:, None] + torch.arange(5)[:, None]
    numbers[..., 1], numbers[..., 2] = torch.arange(2), 1 + episode[:, None]  # 1: the first frame
    if policy_input == "pixels":
        assert torch.equal(blocks["seen"][..., 0, 0, :].float(), numbers)
    counts = shown(numbers[:, 1:])[..., : len(train)]
    after_lifting = (numbers[:, 1:, :, 2] % 2 == 0) & (numbers[:, 1:, :, 0] > 10)  # [150, K, N]
    for env in range(2):
        counts[:, :, env, PLACE[env]] &= after_lifting[:, :, env]
    assert torch.equal(blocks["reached"], counts)
    cut = torch.arange(150) % 50 == 49  # evaluations
    ends = (age + 4 == torch.where(episode % 2 == 1, END, 40)) | cut[:, None]
    assert torch.equal(age[1:] == 0, ends[:-1]) and (ends & ~cut[:, None]).sum(0).min() > 5

    # The policy is asked for the place while the toy is in the hand at the end of a block.
    holds = shown(numbers[:, 0])[:, torch.arange(2), LIFT] & (age > 0)  # [150, N]
    pursued = torch.where(holds, PLACE, LIFT)
    acted = [texts for _, texts in asked if len(texts) == 2]
    close(torch.stack(acted), text[pursued].repeat_interleave(4, 0))
    assert ((blocks["goal"] == pursued) | (blocks["goal"] == PLACE)).all()
    for_place = (blocks["goal"] == PLACE)[~holds].float().mean()
    assert 0.35 < for_place < 0.65

    # Each environment and episode has a home of its own.
    drawn = [(seeds, options["reset_mask"]) for seeds, options in made[0].resets[1:]]
    for env in range(2):
        own = [seeds[env] for seeds, begins in drawn if begins[env]]
        assert own == [dqn.stream_seed(1, dqn.TRAINING, env, k) for k in range(len(own))]

    best = torch.load(run / "best.pt", weights_only=True) | {"best_success": 4.0}
    torch.save(best, run / "best.pt")  # as if it were from after the last checkpoint
    start("--resume", run, "--total-timesteps", 1600)  # its evaluation is not the best
    last, best = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "best"))
    assert (last["step"], best["step"]) == (1600, 800)


@pytest.mark.parametrize("labels", [False, True])
def test_beta_is_calibrated_on_the_frames_of_random_play(labels, world, monkeypatch):
    class Random(Toys):
        def step_wait(self, timeout):
            frame, *rest, info = super().step_wait(timeout)
            return frame, *rest, info if labels else {"success": info["success"]}

    def calibrate(scores, reached, rate):
        raise Found(scores, reached, rate)

    _, start = world(dqn, Random, Sights)
    monkeypatch.setattr(dqn, "calibrate", calibrate)
    flags = ["--reward", "projection", "--false-positive-rate", 0.02, "--calibration-episodes", 3]
    flags += ["--calibrate-with-labels"] * labels
    with pytest.raises(Found) as found:
        start(*FLAGS, "--policy-size", 8, "--policy-input", "pixels", *flags)
    scores, reached, rate = found.value.args
    numbers = torch.zeros(2, dqn.MAX_STEPS, 2, 3)  # two episodes in each, the second and the third
    numbers[..., 0] = 1 + torch.arange(dqn.MAX_STEPS)[:, None]
    numbers[..., 1], numbers[..., 2] = torch.arange(2), torch.tensor([2, 3])[:, None, None]
    expected = shown(numbers.flatten(0, 2))
    assert torch.equal(scores, expected.float()) and rate == 0.02
    assert torch.equal(reached, expected) if labels else reached is None


def test_exploration_falls_keeps_its_actions_and_leaves_the_rest_to_the_policy(world, monkeypatch):
    made, start = world(dqn, Homes)
    monkeypatch.setattr(dqn, "evaluate", lambda *args, **options: ({"success_rate": 0.0}, None))
    q = torch.zeros(2, 9).index_fill_(1, torch.tensor([0, 1]), 0.8)
    q[:, 1] /= 2
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda *args: q)
    flags = ["--total-timesteps", 3000, "--eval-every", 3000, "--checkpoint-every", 3000]
    flags += ["--learning-starts", 1000, "--epsilon-steps", 1000, "--epsilon-end", 0.1]
    flags += ["--policy-temperature", 0.5, "--target-temperature", 5]
    start(*FLAGS, *DQN_FLAGS, *flags, "--updates-per-step", 1e-9, "--explore-steps", 4)
    actions = np.stack(made[0].actions)  # [1500, N]
    phases = np.split(actions, 3)
    shares = [(phase > 1).mean() * 9 / 7 for phase in phases]  # of random actions
    assert shares == pytest.approx([1, 0.55, 0.1], abs=0.08)
    second = (phases[2] == 1).sum() / (phases[2] <= 1).sum()
    assert second == pytest.approx(0.2, abs=0.05)  # its Q is half as high, and squared at 0.5
    kept = (phases[0][1:] == phases[0][:-1]).mean()
    assert kept == pytest.approx(3 / 4 + 1 / 4 / 9, abs=0.04)


# ---- Both scripts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (sac, ["--compile"], ([sac.TASKS["kneeling"].goal], sac.BASELINE, 0.0)),
        (sac, ["--task", "all"], ([task.goal for task in sac.TASKS.values()], sac.BASELINE, 0.0)),
        (
            sac,
            ["--goal", "a robot that waves", "--baseline", "a robot", "--alpha", 0.3],
            (["a robot that waves"], "a robot", 0.3),
        ),
        (
            dqn,
            ["--baseline", "a home", "--alpha", 0.3, "--family", "find", "--compile"],
            ([goal.prompt for goal in dqn.GOALS], "a home", 0.3),
        ),
    ],
)
def test_clip_is_asked_for_the_sentence_that_was_written(
    script, flags, expected, world, monkeypatch
):
    def ask(model, goals, baseline, alpha, **options):
        raise Found((goals, baseline, alpha), options)

    _, start = world(script, Bodies if script is sac else Toys)
    monkeypatch.setattr(script, "CLIPReward", ask)
    with pytest.raises(Found) as found:
        start(*FLAGS, "--precision", "bf16", *flags)
    asked, options = found.value.args
    compiles = "--compile" in flags
    assert asked == expected
    assert options == {"device": "cpu", "precision": "bf16", "compile": compiles}


@pytest.mark.parametrize("flags", [(), ("--alpha", 0.4, "--temperature", 0.3)])
def test_the_softmax_is_of_the_reward_and_at_the_temperature_that_were_asked_for(
    flags, world, monkeypatch
):
    _, start = world(dqn, Toys, Sights)
    reward, alphas = dqn.goal_baseline_reward, []

    def recorded(s, goal, baseline, alpha):
        alphas.append(alpha)
        return reward(s, goal, baseline, alpha)

    def scores(rewards, temperature):
        raise Found(alphas, temperature)

    monkeypatch.setattr(Sights, "temperature", 0.02)
    monkeypatch.setattr(dqn, "goal_baseline_reward", recorded)
    monkeypatch.setattr(dqn, "family_scores", scores)
    with pytest.raises(Found) as found:
        start(*FLAGS, "--policy-size", 8, "--policy-input", "pixels", *flags)
    assert found.value.args == (([0.4], 0.3) if flags else ([0.0], 0.02))


@pytest.mark.parametrize("flags", [(), ("--no-place-after-lift",)])
def test_to_place_is_first_to_lift_unless_it_is_not_wanted(flags, world, monkeypatch):
    def replay(capacity, steps, seen, stage_one, device):
        raise Found(stage_one.tolist())

    _, start = world(dqn, Homes)
    monkeypatch.setattr(dqn, "Replay", replay)
    with pytest.raises(Found) as found:
        start(*FLAGS, *DQN_FLAGS, *flags)
    assert found.value.args == (list(range(240) if flags else dqn.STAGE_ONE),)


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (sac, {"task": "splits"}, {"task": "splits", "terminate_when_unhealthy": False}),
        (sac, {"goal": "a robot that waves"}, {"task": None}),  # no predicate, no success rate
        (
            sac,
            {"textured": False, "camera": "track", "full_observation": True, "reward": "env"},
            {"textured": False, "camera": "track", "full_observation": True}
            | {"terminate_when_unhealthy": True, "width": 48, "height": 48},
        ),
        (dqn, {}, {"goals": list(dqn.TRAIN_GOALS), "all_goals": False, "width": 48, "height": 48}),
        (
            dqn,
            {"family": "lift", "reward": "env"},
            {"goals": [g for g in dqn.TRAIN_GOALS if g.family == "lift"], "all_goals": True},
        ),
    ],
)
def test_flags_reach_the_environments(script, arguments, expected, monkeypatch):
    def make(name, **options):
        raise Found(options)

    monkeypatch.setattr(script.gym, "make", make)
    with pytest.raises(Found) as found:
        script.make_envs(script.Args(**arguments), 1, 48)
    assert expected.items() <= found.value.args[0].items()


POSITIVE = [
    "total_timesteps", "num_envs", "eval_every", "eval_episodes", "final_episodes",
    "checkpoint_every", "frame_size", "score_every", "buffer_size", "batch_size",
    "updates_per_step", "learning_rate", "worker_timeout",
]  # fmt: skip
SAC_POSITIVE = [
    "tau", "reward_scale", "hidden", "initial_ent_coef", "action_repeat", "actor_tau", "ent_coef",
]  # fmt: skip
DQN_POSITIVE = [
    "target_every", "policy_temperature", "target_temperature", "epsilon_steps", "n_step",
    "calibration_episodes", "frame_stack", "policy_size", "temperature",
]  # fmt: skip
SAC_SHARES = ["alpha", "greedy_envs", "tau", "actor_tau", "relabel_fraction"]
DQN_SHARES = ["alpha", "false_positive_rate", "epsilon_end", "relabel_fraction", "in_hand"]
OUT_OF_RANGE = [
    *((sac, name, bad) for name in POSITIVE + SAC_POSITIVE for bad in (0, -1, math.nan)),
    *((dqn, name, bad) for name in POSITIVE + DQN_POSITIVE for bad in (0, -1, math.nan)),
    *((sac, name, bad) for name in SAC_SHARES for bad in (-0.1, 1.1)),
    *((dqn, name, bad) for name in DQN_SHARES for bad in (-0.1, 1.1)),
    *((script, "gamma", bad) for script in (sac, dqn) for bad in (-0.1, 1.0)),
    *((script, "worker_timeout", 1e9) for script in (sac, dqn)),
    *((script, "learning_starts", -1) for script in (sac, dqn)),
    *((dqn, "weight_decay", bad) for bad in (-0.1, math.inf, math.nan)),
    (dqn, "explore_steps", 0.5),
]


def test_every_number_out_of_range_is_named_in_one_line(capsys):
    for script, name, bad in OUT_OF_RANGE:
        with pytest.raises(SystemExit):
            script.check_args(script.Args(**{name: bad}))
        error = capsys.readouterr().err
        assert error.startswith(f"--{name.replace('_', '-')} {bad}: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["check", "worker_failures", "atomic_save", "stream_seed", "collective", "average", "gather",
     "CUDAGraph", "load_checkpoint"],
)  # fmt: skip
def test_what_both_scripts_write_out_is_the_same(name):
    """What was mended in one of them was mended in the other."""
    assert inspect.getsource(getattr(sac, name)) == inspect.getsource(getattr(dqn, name))

"""The home: seeds, walls, grab and release, each goal on both sides, and a way to reach it."""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from dqn_clip_playhouse import (  # first: it puts torch before the first GL context
    ACTIONS,
    COLOURS,
    FURNITURE,
    GOALS,
    HELDOUT_GOALS,
    KINDS,
    PLACES,
    TOYS,
    TRAIN_GOALS,
    Goal,
    PlayhouseEnv,
    about_z,
    evenly,
    main,
    scripted,
    tour,
)

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.utils.env_checker import check_env

act = ACTIONS.index


@pytest.fixture(scope="module")
def env():
    env = PlayhouseEnv("rgb_array")
    yield env
    env.close()


def play(env: PlayhouseEnv, goal: Goal, seed: int) -> list[bool]:
    """Success after each step of the scripted walk."""
    env.reset(seed=seed, options={"goal": goal})
    return [env.step(action)[4]["success"] for action in scripted(env, goal)]


def put(env: PlayhouseEnv, toy: int, position) -> None:
    """Lay a toy down somewhere, and let it come to rest."""
    joint = env.model.joint(env.model.body(f"toy{toy}").jntadr[0])
    env.data.qpos[joint.qposadr[0] :][:7] = *position, *about_z(0)
    env.data.qvel[joint.dofadr[0] :][:6] = 0
    for _ in range(8):
        env.step(act("stay"))


def test_gymnasium_accepts_the_home():
    env = gym.make("PlayhouseCLIP-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_goals_are_many_and_one_toy_in_five_is_held_out():
    assert len(GOALS) == len(set(GOALS)) == 240 and len({goal.prompt for goal in GOALS}) == 240
    assert len(HELDOUT_GOALS) >= 0.2 * len(GOALS)
    for family in ("find", "lift", "place"):
        goals = [goal for goal in TRAIN_GOALS if goal.family == family]
        assert {goal.colour for goal in goals} == set(COLOURS)
        assert {goal.kind for goal in goals} == set(KINDS) == set(TOYS)
        assert family != "place" or {goal.place for goal in goals} == set(PLACES)
    named = {(goal.colour, goal.kind) for goal in TRAIN_GOALS}
    assert not named & {(goal.colour, goal.kind) for goal in HELDOUT_GOALS}
    assert Goal("place", "red", "mug", "toy box").prompt == "a red mug in the toy box"


def test_a_seed_is_a_home(env):
    homes = []
    for seed in (3, 3, 4):
        frame, info = env.reset(seed=seed)
        frames = [frame] + [env.step(i % 9)[0] for i in range(20)]
        homes.append((info["goal"], env.toys, env.model.geom_pos.copy(), np.stack(frames)))
    first, again, other = homes
    assert first[:2] == again[:2] and (first[2] == again[2]).all() and (first[3] == again[3]).all()
    assert first[2].shape != other[2].shape or (first[2] != other[2]).any()


def test_each_home_has_what_its_goal_needs(env):
    for seed in range(20):
        _, info = env.reset(seed=seed)
        goal = GOALS[info["goal"]]
        assert goal in TRAIN_GOALS and goal == env.goal and not info["success"]
        assert (goal.colour, goal.kind) == env.toys[0] and len(set(env.toys)) == len(env.toys)
        assert 4 <= len(env.toys) <= 6 and set(PLACES) <= set(env.furniture)
        toy = env.toy_position(0)[:2]
        assert np.linalg.norm(env.position - toy) > 1.4 and env.position[0] * toy[0] > 0
        if goal.place is not None:
            assert env.furniture[goal.place][0] * toy[0] > 0  # in one room
        # Both words matter: another toy of this kind, and another of this colour.
        assert sum(kind == goal.kind for _, kind in env.toys) >= 2
        assert sum(colour == goal.colour for colour, _ in env.toys) >= 2
        for i, (x, y, w, d) in enumerate(env.obstacles):
            for X, Y, W, D in env.obstacles[:i]:
                assert abs(x - X) >= w + W or abs(y - Y) >= d + D


def test_walls_and_furniture_stop_the_agent(env):
    rng, touched = np.random.default_rng(0), set()
    for seed in range(3):
        env.reset(seed=seed)
        for _ in range(200):
            action = "forward" if rng.random() < 0.7 else str(rng.choice(ACTIONS[1:4]))
            env.step(act(action))
            x, y = env.position
            assert env.west < x - 0.16 and x + 0.16 < env.east
            assert env.south < y - 0.16 and y + 0.16 < env.north
            for i, (X, Y, w, d) in enumerate(env.obstacles):
                gap = np.hypot(max(abs(x - X) - w, 0), max(abs(y - Y) - d, 0))
                assert gap > 0.16  # of a radius of 0.2
                if gap < 0.22:
                    touched.add((seed, i))
    assert len(touched) >= 3  # else nothing was shown


def test_walking_turning_and_looking(env):
    env.reset(seed=1)
    env.data.qpos[env._agent_qpos] = 0, env._doorway[1], 0  # nothing stands in a doorway
    yaw = lambda: env.data.qpos[env._agent_qpos[2]]
    start, angle = env.position.copy(), yaw()
    env.step(act("left"))
    assert yaw() - angle == pytest.approx(np.deg2rad(25), abs=0.03)
    env.step(act("right"))
    assert yaw() == pytest.approx(angle, abs=0.03) and np.allclose(env.position, start, atol=0.02)
    steps = []
    for action in ("forward", "back"):
        before = env.position.copy()
        env.step(act(action))
        steps.append(env.position - before)
    heading = np.array([np.cos(yaw()), np.sin(yaw())])
    assert steps[0] @ heading == pytest.approx(0.2, abs=0.03)
    assert steps[1] @ heading == pytest.approx(-0.2, abs=0.03)
    low = env.step(act("down"))[0]
    assert (low != env.step(act("up"))[0]).any()
    assert (env.step(act("down"))[0] == low).mean() > 0.9


@pytest.mark.parametrize("family", ["find", "lift", "place"])
def test_every_family_can_be_reached(env, family):
    goals = [goal for goal in GOALS if goal.family == family]
    reached = [play(env, goal, seed=i)[-1] for i, goal in enumerate(goals[:: len(goals) // 10])]
    assert np.mean(reached) >= 0.9, reached


def test_a_toy_is_lifted_by_the_hand_alone_and_falls_when_released(env):
    goal = Goal("lift", "red", "ball")
    assert play(env, goal, seed=3)[-1] and env.held == 0
    other = Goal("lift", *env.toys[1])
    assert not env.in_goal_state(other) and not env.in_goal_state(Goal("find", "red", "ball"))
    height = env.toy_position(0)[2]
    env.step(act("left"))
    assert env.in_goal_state(goal) and env.toy_position(0)[2] == pytest.approx(height, abs=1e-3)
    for action in ("release", *["stay"] * 8):
        env.step(act(action))
    assert env.held is None and not env.in_goal_state(goal)
    assert env.toy_position(0)[2] < height - 0.1


def test_who_lets_go_steps_back(env):
    assert play(env, Goal("lift", "red", "ball"), seed=3)[-1]
    for _ in range(2):
        env.step(act("up"))
    x, y, yaw = env.data.qpos[env._agent_qpos]
    env.step(act("release"))
    assert env.held is None and env._tilt == 1  # and does not look over it
    back = [x - 0.2 * np.cos(yaw), y - 0.2 * np.sin(yaw)]
    assert env.position == pytest.approx(back, abs=0.01)
    env.step(act("release"))  # there is nothing left to let go
    assert env.position == pytest.approx(back, abs=0.01)


def test_what_is_let_go_lies_in_the_next_frame(env):
    assert play(env, Goal("lift", "red", "ball"), seed=3)[-1]
    held = env.toy_position(0)[2]
    env.step(act("release"))
    fallen = env.toy_position(0)[2]
    for _ in range(8):
        env.step(act("stay"))
    assert fallen == pytest.approx(env.toy_position(0)[2], abs=0.03) and fallen < held - 0.1


def test_an_episode_can_begin_on_the_way_with_the_toy_in_the_hand(env):
    place, lift = Goal("place", "blue", "block", "table"), Goal("lift", "blue", "block")

    def far() -> float:
        return np.linalg.norm(env.points_on("table") - env.position, axis=1).min()

    usual, begun = [], []
    for seed in range(12):
        env.reset(seed=seed, options={"goal": place})
        usual.append(far())
        assert env.held is None
        toys = np.array([env.toy_position(i) for i in range(1, 4)])
        _, info = env.reset(seed=seed, options={"goal": place, "in_hand": 1})
        begun.append(far())
        assert env.in_goal_state(lift) and not info["success"] and env._gap() > 0
        # In the same home: the others lie where they lay.
        assert np.array([env.toy_position(i) for i in range(1, 4)]) == pytest.approx(toys)
    nearer = np.array(usual) - begun
    assert (nearer > -0.1).all() and (nearer > 0.5).sum() > 2
    env.reset(seed=3, options={"goal": lift, "in_hand": 1})
    assert env.held is None  # no goal with a place
    held = 0
    for seed in range(40):
        env.reset(seed=seed, options={"goal": place, "in_hand": 0.5})
        held += env.held == 0
        toys = np.array([env.toy_position(i)[:2] for i in range(1, len(env.toys))])
        assert np.linalg.norm(toys - env.position, axis=1).min() > 0.4  # it stands in none
    assert 8 < held < 32


def test_nothing_in_reach_is_nothing_in_the_hand(env):
    env.reset(seed=2, options={"goal": Goal("lift", "red", "ball")})
    for i in range(len(env.toys)):
        put(env, i, (env.west + 0.3 * (i + 1), env.north + 3, 0.3))  # outside
    env.step(act("grab"))
    assert env.held is None


@pytest.mark.parametrize("place", PLACES)
def test_a_toy_is_placed_where_it_lies_and_nowhere_else(env, place):
    goals = [Goal("place", "blue", "block", where) for where in PLACES]
    goal = goals[list(PLACES).index(place)]
    env.reset(seed=5, options={"goal": goal})
    others = [Goal("place", *toy, place) for toy in env.toys[1:]]
    before = [env.in_goal_state(other) for other in others]
    assert not env.in_goal_state(goal)
    x, y, _ = env.furniture[place]
    put(env, 0, (x, y, 0.6))
    assert [g.place for g in goals if env.in_goal_state(g)] == [place]
    assert [env.in_goal_state(other) for other in others] == before
    x, y = env._free_floor(0.2)
    put(env, 0, (x, y, 0.2))
    assert not any(map(env.in_goal_state, goals))


@pytest.mark.parametrize("place", ["bed", "table"])
def test_a_toy_that_leans_lies_under_or_flies_over_is_not_placed(env, place):
    goal = Goal("place", "blue", "block", place)
    env.reset(seed=5, options={"goal": goal})
    w, d, _ = FURNITURE[place]
    x, y, angle = env.furniture[place]
    forward = np.array([np.sin(angle), -np.cos(angle)])  # away from its back
    beside = np.array([x, y]) + forward * (d + 0.09)
    put(env, 0, (*beside, 0.2))  # touches its side
    assert not env.in_goal_state(goal)
    if place == "table":
        put(env, 0, (x, y, 0.12))
        assert not env.in_goal_state(goal)
    joint = env.model.joint(env.model.body("toy0").jntadr[0])
    env.data.qpos[joint.qposadr[0] :][:3] = x, y, 0.9
    mujoco.mj_forward(env.model, env.data)
    assert not env.in_goal_state(goal)
    env.held = 0  # on it, and yet in the hand
    put(env, 0, (x, y, 0.5))
    assert not env.in_goal_state(goal)
    env.held = None


def test_a_toy_above_or_beside_the_toy_box_is_not_in_it(env):
    goal = Goal("place", "blue", "ball", "toy box")
    env.reset(seed=5, options={"goal": goal})
    x, y, angle = env.furniture["toy box"]
    put(env, 0, (x, y, 0.3))
    assert env.in_goal_state(goal)
    put(env, 0, (x + 0.55 * np.sin(angle), y - 0.55 * np.cos(angle), 0.15))
    assert not env.in_goal_state(goal)
    joint = env.model.joint(env.model.body("toy0").jntadr[0])
    env.data.qpos[joint.qposadr[0] :][:3] = x, y, 0.6
    mujoco.mj_forward(env.model, env.data)
    assert not env.in_goal_state(goal)


def test_goals_are_drawn_from_the_options_and_all_are_reported():
    env = PlayhouseEnv("rgb_array", all_goals=True)
    families = set()
    for seed in range(12):
        frame, info = env.reset(seed=seed, options={"goals": evenly(HELDOUT_GOALS)})
        assert GOALS[info["goal"]] in HELDOUT_GOALS
        families.add(GOALS[info["goal"]].family)
    assert families == {"find", "lift", "place"}
    goal = Goal("place", "blue", "block", "table")
    env.reset(seed=5, options={"goal": goal})
    put(env, 0, (*env.furniture["table"][:2], 0.6))
    info = env.step(act("stay"))[4]
    assert info["success"] and info["reached"][GOALS.index(goal)]
    assert [env.in_goal_state(g) for g in GOALS] == info["reached"].tolist()
    env.close()


@pytest.mark.parametrize("goals", [TRAIN_GOALS, HELDOUT_GOALS])
def test_families_are_drawn_evenly_and_every_goal_is(goals):
    drawn = evenly(goals)
    assert set(drawn) == set(goals)
    counts = Counter(goal.family for goal in drawn)
    assert len(counts) == 3 and len(set(counts.values())) == 1, counts
    repeats = Counter(drawn)
    for family in counts:
        assert len({repeats[goal] for goal in goals if goal.family == family}) == 1
    assert evenly([goal for goal in goals if goal.family == "find"]) == [
        goal for goal in goals if goal.family == "find"
    ]


def test_found_is_near_central_and_in_sight(env):
    goal = Goal("find", "purple", "car")
    for seed in range(3):
        assert play(env, goal, seed)[-1]
        for _ in range(3):
            env.step(act("left"))
        assert not env.in_goal_state(goal)  # not in the middle of the view
        for _ in range(3):
            env.step(act("right"))
        assert env.in_goal_state(goal)
        x, y = env.position
        put(env, 0, (x, y + 2.0, 0.1))
        assert not env.in_goal_state(goal)  # gone


def lay_ahead(
    env: PlayhouseEnv, distance: float, height: float, turn: float = 0, x: float = 0.6, beside=0.0
) -> None:
    """The agent x (m) before the doorway or the wall beside it, which it faces, and the goal's toy
    at that distance and `turn` (radians) from its middle; nothing moves."""
    env.reset(seed=1, options={"goal": Goal("find", "red", "ball")})
    env.data.qpos[env._agent_qpos] = x, env._doorway[1] + beside, np.pi
    address = env.model.joint(env.model.body("toy0").jntadr[0]).qposadr[0]
    aside = distance * np.array([-np.cos(turn), -np.sin(turn)])
    env.data.qpos[address : address + 3] = *(env.position + aside), height
    mujoco.mj_forward(env.model, env.data)


@pytest.mark.parametrize(("distance", "near"), [(0.96, True), (1.19, False)])  # 1.1 m, 1.3 m away
def test_what_is_farther_than_the_arm_is_neither_found_nor_lifted(env, distance, near):
    lay_ahead(env, distance, 0.13)
    assert env._view(0)[0] == pytest.approx(1.1 if near else 1.3, abs=0.02)
    assert env.in_goal_state(Goal("find", "red", "ball")) == near
    env._grab()
    assert (env.held == 0) == near


@pytest.mark.parametrize(("degrees", "central"), [(12, True), (20, False)])
def test_found_is_in_the_middle_of_the_view(env, degrees, central):
    for turn in (degrees, -degrees):
        lay_ahead(env, 1.06, 0.3, np.deg2rad(turn))
        assert env.in_goal_state(Goal("find", "red", "ball")) == central


@pytest.mark.parametrize(("size", "enough"), [(0.8, True), (0.5, False)])  # 1% and 0.4%
def test_found_is_at_least_a_little_of_the_view(env, size, enough):
    lay_ahead(env, 1.06, 0.3)
    body = env.model.body("toy0")
    env.model.geom_size[body.geomadr[0] :][: body.geomnum[0]] *= size
    assert env.in_goal_state(Goal("find", "red", "ball")) == enough


def test_a_toy_in_the_hand_stays_on_this_side_of_a_wall(env):
    lay_ahead(env, 0.9, 0.13, x=0.3, beside=0.7)
    env._hold(0)
    env._carry()
    mujoco.mj_forward(env.model, env.data)
    assert env.position[0] > env.toy_position(0)[0] > 0.05  # where the wall begins
    before = env.position.copy()
    env.step(act("release"))
    assert env.held == 0 and env.position == pytest.approx(before, abs=0.01)  # there is no room


@pytest.mark.parametrize(("beside", "seen"), [(0.0, True), (0.7, False)])  # doorway, wall
def test_a_wall_hides_a_toy_from_eye_and_hand(env, beside, seen):
    for x in (0.3, 0.25):  # the second touches the wall
        lay_ahead(env, 0.65, 0.13, x=x, beside=beside)
        env._tilt = 0
        assert env.in_goal_state(Goal("find", "red", "ball")) == seen
        env._grab()
        assert (env.held == 0) == seen


def test_walking_along_a_wall_does_not_turn_the_agent(env):
    env.reset(seed=0)
    env.data.qpos[env._agent_qpos] = env.west + 0.25, env._doorway[1], np.deg2rad(135)
    mujoco.mj_forward(env.model, env.data)
    for _ in range(4):
        env.step(act("forward"))
    assert env.data.qpos[env._agent_qpos[2]] == pytest.approx(np.deg2rad(135), abs=0.05)


def test_a_toy_that_spins_fast_comes_to_rest(env):
    """Left alone, one of this home's spins faster and faster, until MuJoCo starts it anew."""
    env.reset(seed=1)
    velocity = env.data.qvel[: 6 * len(env.toys)].reshape(-1, 6)
    velocity[:, 2:] = 2, 60, 0, 60  # m/s upwards, and rad/s
    for _ in range(40):
        env.step(act("stay"))
    assert env.data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number == 0
    assert np.abs(velocity).max() < 1


def test_the_tour_is_a_video(tmp_path):
    assert tour(tmp_path / "tour.mp4", seed=1) == []  # nothing was missed
    assert (tmp_path / "tour.mp4").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--seed", "-1"], "--seed -1"), (["--output", "no/such.mp4"], "--output no/such.mp4")],
)
def test_a_bad_tour_is_one_line(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqn_clip_playhouse.py", "--tour", *flags])
    with pytest.raises(SystemExit) as exit_:
        main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2 and words in errors and errors.count("\n") == 1

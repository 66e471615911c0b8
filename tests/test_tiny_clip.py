"""The bundled CLIP: what it promises, and that its captions keep the held-out sentences out."""

import itertools
import json
import math
import re
import signal
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent
from sac_clip_humanoid import (  # first: it puts torch before any GL context
    TASKS,
    HumanoidEnv,
    Replay,
)

import numpy as np
import train_tiny_clip
from clip_accuracy import Generator, auc
from clip_reward import CLIPReward
import open_clip
import torch
from safetensors.torch import load_file
import home_states
from home_states import (
    CELLS,
    CHOICES,
    COLOURS,
    HELDOUT_TOYS,
    KINDS,
    LANDMARKS,
    RELATIONS,
    UNNAMED,
    HomeStudio,
)
from train_tiny_clip import (
    ARMS,
    ATTRIBUTES,
    HELD_OUT,
    PROMPTS,
    STANCES,
    caption,
    geometry,
    joint_targets,
    sample_meanings,
)

FOLDER = HERE / "tiny_clip"


@pytest.fixture(scope="module")
def reward():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it knows every word of the eight prompts
        goals = [task.goal for task in TASKS.values()]
        return CLIPReward(str(FOLDER), goals, "a humanoid robot", precision="bf16")


def test_it_is_small_and_has_a_card():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16e6
    assert "zero-shot" in (FOLDER / "README.md").read_text()


def test_it_warns_about_words_it_was_never_taught(reward):
    with pytest.warns(UserWarning, match="'waving'"):
        reward.encode_text(["a humanoid robot waving"])


def test_the_script_and_the_trainer_agree_on_the_prompts():
    assert {name: task.goal for name, task in TASKS.items()} == PROMPTS


def test_captions_never_use_a_held_out_sentence():
    rng = np.random.default_rng(0)
    meanings = [(s,) for s in STANCES] + [(s, a) for s in STANCES for a in ARMS]
    captions = {caption(meaning, rng) for meaning in meanings for _ in range(60)}
    assert len(captions) > 2000 and not captions & HELD_OUT
    everything = np.ones((4, len(ATTRIBUTES)), np.float32)
    for _ in range(20):
        assert ("kneeling", "raised") not in sample_meanings(everything, 200, rng)


def describe(env):
    """The truth in [0, 1] of every attribute."""
    ramps = train_tiny_clip.conditions(env)
    return {name: train_tiny_clip.graded(ramps[name])[0] for name in ATTRIBUTES}


def test_captions_come_from_the_geometry():
    env = HumanoidEnv(None)
    env.reset(seed=0)
    qpos = env.init_qpos.copy()
    qpos[2] -= 0.1  # from 11 cm above the floor down to 1 cm
    env.set_state(qpos, np.zeros(env.model.nv))
    truth = describe(env)
    assert truth["standing"] == 1 and truth["in_front"] == 1
    assert not any(truth[name] for name in ("kneeling", "lotus", "splits", "one_leg", "raised"))
    qpos[2] += 0.2
    env.set_state(qpos, np.zeros(env.model.nv))
    truth = describe(env)
    assert truth["standing"] == 0 and truth["in_the_air"] == 1


def test_progress_shows_the_way_to_a_truth():
    Ramp, graded = train_tiny_clip.Ramp, train_tiny_clip.graded
    done = [Ramp(0.01, 0.06, 0.01), Ramp(1.4, 1.05, 1.3)]
    assert graded(done) == (1, 1)
    # Seat and feet come down from 0.6 m, then the legs go apart: no truth until both are there.
    way = [(0.6, 0.2), (0.3, 0.2), (0.01, 0.2), (0.01, 0.9), (0.01, 1.1), (0.01, 1.29)]
    truth, progress = np.transpose(
        [graded([Ramp(height, 0.06, 0.01), Ramp(gap, 1.05, 1.3)]) for height, gap in way]
    )
    np.testing.assert_allclose(truth, [0, 0, 0, 0, 0.2, 0.96])
    assert (np.diff(progress) > 0).all() and progress[0] > 0 and progress[-1] < 1
    # Worked out by hand: at widths 1, 4 and 16, half of the one and all of the other is missing.
    assert graded([Ramp(0.5, 0, 1), Ramp(-20, 0, 1)])[1] == pytest.approx(
        (0 + (np.mean([0.5, 0.875, 0.96875]) + 0) / 2) / 2
    )


@pytest.mark.parametrize("camera", ["fixed", "track"])
def test_a_mirrored_body_has_the_mirrored_frame_and_geometry(camera):
    env = HumanoidEnv(None, "rgb_array", camera=camera)
    env.reset(seed=0)
    frames, points = [], []
    for mirrored in (False, True):
        qpos = env.init_qpos.copy()
        qpos[1] = -0.2 if mirrored else 0.2
        if mirrored and camera == "track":  # which sees the side: there it faces the other way
            qpos[3:7] = 0, 0, 0, 1
        joints = {"right:hip_y": -60, "right:knee": -90, "left:shoulder1": -80, "left:elbow": -80}
        qpos[7:] = joint_targets(env, joints, mirrored)
        env.set_state(qpos, np.zeros(env.model.nv))
        rows = slice(60) if camera == "fixed" else slice(None)  # above the checkered floor, or all
        frames.append(env.render()[rows].astype(float))
        points.append(geometry(env))
    env.close()
    np.testing.assert_allclose(points[0], points[1][::-1], atol=1e-6)
    assert np.abs(points[0][0] - points[1][0]).max() > 0.3
    same, other = (np.abs(frames[0] - frame).mean() for frame in (frames[1][:, ::-1], frames[1]))
    assert same < other / 2


def test_its_reward_tells_goal_states_from_others(reward):
    env = HumanoidEnv(None, "rgb_array")
    frames, labels = [], []
    for _ in Generator(env, seed=7).states(400):
        frames.append(env.render())
        labels.append([task.in_goal_state(env.pose()) for task in TASKS.values()])
    env.close()
    rewards, labels = reward(np.stack(frames)).numpy(), np.array(labels)
    for i, name in enumerate(TASKS):
        assert labels[:, i].sum() >= 5, name
        assert auc(rewards[:, i].astype(float), labels[:, i]) > 0.9, name


def test_training_makes_a_clip_that_loads(tmp_path, capsys, monkeypatch):
    """Both worlds; then another tower, which starts anew and has the first as its teacher."""
    few = {"states": 300, "homes": 100, "searches": 0, "batch_size": 12, "steps": 4}
    precisions = iter(["bf16", "fp32"])
    monkeypatch.setattr(train_tiny_clip, "auto_precision", lambda device: next(precisions))
    vit = {"start": tmp_path / "resnet", "width": 64, "layers": (1,), "patch": 16}
    for tower, size, flags in (("resnet", 72, {"width": 8}), ("vit", 144, vit)):
        flags = {"output": tmp_path / tower, "tower": tower, "resolution": size, **flags, **few}
        args = train_tiny_clip.Args(**flags)
        train_tiny_clip.main(args)
        reward = CLIPReward(str(args.output), ["a humanoid robot kneeling", "a red ball"], "a room")
        frames = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
        assert reward(frames).isfinite().all()
        assert reward.preprocessing["size"] in (size, (size, size))
        assert {"kneeling", "ball"} <= reward.vocabulary
    assert re.search(r"\d+ of \d+ parts of it are those of", capsys.readouterr().out)


def test_statistics_are_fixed_at_the_end_of_a_training(tmp_path):
    few = {"states": 300, "searches": 0, "batch_size": 12, "resolution": 72, "width": 4, "steps": 2}
    ran = {}
    for share in (1, 0.5, 0):
        args = train_tiny_clip.Args(output=tmp_path / str(share), fixed_statistics=share, **few)
        train_tiny_clip.main(args)
        weights = load_file(args.output / "open_clip_model.safetensors")
        ran[share] = weights["visual.bn1.num_batches_tracked"].item()
    assert ran == {1: 0, 0.5: 1, 0: 2}


def test_a_deeper_resnet_starts_as_the_one_that_it_goes_on_from():
    config = json.loads((FOLDER / "open_clip_config.json").read_text())["model_cfg"]
    known = open_clip.create_model(f"local-dir:{FOLDER}").eval()
    frames = torch.randn(2, 3, 144, 144, generator=torch.Generator().manual_seed(0))
    embedding = known.encode_image(frames)
    config["vision_cfg"]["layers"] = [n + 1 for n in config["vision_cfg"]["layers"]]
    deeper = open_clip.CLIP(**config).eval()
    assert (deeper.encode_image(frames) - embedding).abs().max() > 0.1
    assert train_tiny_clip.start_from(FOLDER, deeper) is None
    torch.testing.assert_close(deeper.encode_image(frames), embedding)
    config["vision_cfg"]["width"] = 8
    assert train_tiny_clip.start_from(FOLDER, open_clip.CLIP(**config)) is not None


def test_cells_say_where_toys_are():
    studio = HomeStudio(144, seed=1)
    mask = np.zeros((144, 144), bool)
    mask[16:32, 120:144] = True
    counts = studio._in_cells(mask).reshape(CELLS, CELLS)
    assert counts[1, 8] == 256 and counts[1, 7] == 128 and counts.sum() == mask.sum()
    _, truths, shares = studio.states(20, per_home=5)
    colours, kinds = shares[:, : len(COLOURS)], shares[:, len(COLOURS) :][:, : len(KINDS)]
    np.testing.assert_allclose(colours.sum(1), kinds.sum(1), atol=1e-6)  # each toy has both
    assert shares.min() >= 0 and 0.5 < shares.max() <= 1
    found = truths[:, RELATIONS.index("find")].max((1, 2)) > 0.5
    assert found.any() and (colours[found][..., 2:7, 2:7].sum((1, 2, 3)) > 0).all()  # central


def test_cells_say_where_landmarks_are():
    studio = HomeStudio(144, seed=1)
    for name in LANDMARKS:
        studio.env.reset(seed=2)
        x, y, _ = studio.env.furniture[name]
        assert studio._stand_before(np.array([x, y]))
        X, Y = studio.env.position
        studio._stand(X, Y, math.atan2(y - Y, x - X))  # it is right ahead
        share = studio._shoot()[2][-len(LANDMARKS) :][LANDMARKS.index(name)]
        assert share[:, CELLS // 2].max() > 0.3
        studio._stand(X, Y, math.atan2(Y - y, X - x))  # and behind the back
        assert studio._shoot()[2][-len(LANDMARKS) :][LANDMARKS.index(name)].max() == 0
    studio.env.close()


def test_frames_that_do_not_divide_into_cells_are_refused_in_one_line():
    with pytest.raises(SystemExit, match="--resolution 100: .* multiple of 9"):
        train_tiny_clip.main(train_tiny_clip.Args(Path("x"), homes=100, resolution=100))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"home_share": 1.0}, "--home-share 1.0"),
        ({"fixed_statistics": 1.5}, "--fixed-statistics 1.5"),
        ({"tower": "vit"}, "--width 16: with --tower vit take a multiple of 64"),
        ({"adversaries": ("splits", "split")}, "--adversaries split: choose from kneeling"),
        ({"adversaries": ("splits",), "searches": 0}, "--searches 0"),
        ({"adversaries": ("splits",), "adversary_steps": 5000}, "--adversary-steps 5000"),
        ({"agents": (HERE / "frames",)}, "--agents .*frames: has no replay; name a run of"),
    ],
)
def test_bad_flags_are_refused_in_one_line_before_any_rendering(flags, message):
    with pytest.raises(SystemExit, match=message):
        train_tiny_clip.main(train_tiny_clip.Args(Path("x"), **flags))


def test_close_ups_show_their_toy():
    shares = np.zeros((2, len(COLOURS) + len(KINDS) + 3, CELLS, CELLS), np.float32)
    shares[1, len(COLOURS) + 2, 4:6, 6:9] = 0.5  # a duck at the right edge
    shares[0, len(COLOURS) + 2, 0, 0] = 0.3  # too little of one
    ((duck,),) = train_tiny_clip.closeups(torch.from_numpy(shares))
    assert duck[0] == 1 and duck[1] in (3, 4) and duck[2] == 6


def test_choices_never_name_a_held_out_toy():
    named = {(m.colour, m.kind) for choice in CHOICES for m in choice}
    hidden = {(m.colour, m.kind) for family in UNNAMED for m in family}
    assert hidden == set(HELDOUT_TOYS) and not named & hidden
    assert {colour for colour, _ in named} >= set(COLOURS)
    assert {kind for _, kind in named} >= set(KINDS)


def test_captions_never_name_a_held_out_toy():
    everything = np.ones((3, len(RELATIONS), len(COLOURS), len(KINDS)))
    meanings = home_states.sample_meanings(everything, 4000, np.random.default_rng(0))
    named = {(m.colour, m.kind) for m in meanings if m is not None}
    toys = {(colour, kind) for colour, kind in named if colour and kind}
    assert toys == {*itertools.product(COLOURS, KINDS)} - {*HELDOUT_TOYS}
    assert {m.relation for m in meanings if m is not None} == set(RELATIONS)


def test_a_cell_is_told_by_the_one_toy_that_it_shows():
    colours, kinds = list(COLOURS), list(KINDS)

    def cell(*toys):  # (colour, kind, share)
        shares = np.zeros(len(colours) + len(kinds) + 3, np.float32)
        for colour, kind, share in toys:
            shares[[colours.index(colour), len(colours) + kinds.index(kind)]] += share
        return shares

    hidden = HELDOUT_TOYS[0]
    shares = np.stack([
        cell(("green", "duck", 0.3)),
        cell(),
        cell(("green", "duck", 0.2), ("blue", "mug", 0.2)),  # which of the two?
        cell(("green", "duck", 0.02)),  # its rim
        cell((*hidden, 0.3)),
    ])  # fmt: skip
    truths = home_states.cell_truths(shares)
    of = [[(m.colour, m.kind) for m in CHOICES[choice]] for choice in truths]
    named, by_colour, by_kind = truths.values()
    assert all({m.relation for m in CHOICES[choice]} == {"find"} for choice in truths)
    expected = ("green", "duck"), ("green", None), (None, "duck")
    for (match, unnamed), names, name in zip(truths.values(), of, expected, strict=True):
        assert match[0].tolist() == [float(n == name) for n in names] and match[0].sum() == 1
        assert not match[1].any() and unnamed[:4].tolist() == [0, 0, 1, 1]
    assert not named[0][4].any() and named[1][4] == 1  # its name is never taught,
    assert by_colour[0][4].sum() == by_kind[0][4].sum() == 1  # but its colour is, and its kind
    assert by_colour[1][4] == by_kind[1][4] == 0


def test_the_softmax_loss_follows_the_truth_and_leaves_unnamed_toys_alone():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [5.0, 0.0]], requires_grad=True)
    match = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])  # the third shows an unnamed toy
    loss = train_tiny_clip.softmax_loss(logits, match, torch.tensor([0.0, 0.0, 1.0]))
    true = -torch.log_softmax(logits[0], 0)[0]
    neither = -torch.log_softmax(logits[1], 0).mean()
    assert loss.item() == pytest.approx((true / 4 + neither / 4).item() / 2)
    loss.backward()
    assert logits.grad[0, 0] < 0 < logits.grad[1, 1] and not logits.grad[2].any()


class HerePool:
    """Runs a pool's jobs in this process."""

    def map(self, function, jobs, chunk):
        return [function(job) for job in jobs]


def write_replay(run: Path, env: HumanoidEnv) -> list[np.ndarray]:
    """Three files of five steps each; returns the states in them, in their order."""
    replay, states, zeros = Replay(60, 2, 45, 1, 1, "cpu"), [], np.zeros((2, 1))
    (run / "replay" / "0").mkdir(parents=True)
    for _ in range(3):
        first = replay.head
        for _ in range(5):
            s, s_next = env.observation_space.sample()[:45], env.observation_space.sample()[:45]
            states += [s, s_next]
            replay.add(np.stack([s, s]), zeros, zeros, torch.from_numpy(s_next), 0, 0, True)
        replay.save(run / "replay" / "0", first)
    return states


def test_what_an_agent_reached_is_photographed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny_clip, "PER_AGENT", 30)
    train_tiny_clip.open_studio(train_tiny_clip.Args(FOLDER))
    env = train_tiny_clip.studio.env
    states = write_replay(tmp_path, env)
    poses = train_tiny_clip.reached_poses(tmp_path, np.random.default_rng(0))
    assert poses.shape == (30, 24) and 0.1 < np.abs(poses[:, :2]).max() < 0.35
    late = {state[:22].tobytes() for state in states[10:]}  # the last two of three files
    reached = {pose[2:].astype(np.float32).tobytes() for pose in poses}
    assert reached <= late and len(reached) > 10

    env.reset(seed=0)
    upright = env.data.qpos.copy()
    shown = train_tiny_clip.photographs(np.stack([upright, upright + 0.1]))
    np.testing.assert_array_equal(shown.qpos[0], upright)
    assert shown.truths[0][ATTRIBUTES.index("hanging")] == describe(env)["hanging"]
    assert (shown.frames[0] != shown.frames[1]).any()
    env.close()


def test_what_agents_reached_goes_on_to_the_next_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny_clip, "PER_AGENT", 30)
    monkeypatch.setattr(train_tiny_clip, "KEPT", 20)
    env = HumanoidEnv(None, full_observation=True)
    late = np.float16([state[:22] for state in write_replay(tmp_path / "run", env)[10:]])
    few = {"states": 100, "searches": 0, "batch_size": 12, "resolution": 72, "width": 4, "steps": 1}
    args = train_tiny_clip.Args(output=tmp_path / "first", agents=(tmp_path / "run",), **few)
    train_tiny_clip.main(args)
    first = np.load(tmp_path / "first" / "reached.npy")
    assert first.shape == (20, 24)
    assert {pose[2:].tobytes() for pose in first} <= {pose.tobytes() for pose in late}
    train_tiny_clip.main(
        train_tiny_clip.Args(output=tmp_path / "second", start=tmp_path / "first", **few)
    )
    second = np.load(tmp_path / "second" / "reached.npy")
    np.testing.assert_array_equal(np.unique(second, axis=0), np.unique(first, axis=0))


def test_the_cosine_is_held_to_the_course_of_the_progress():
    """As in a slow reference: matches weigh as much as misses; a caption without both does not."""
    rng = np.random.default_rng(0)
    cosine, aim = rng.normal(size=(2, 30, 4)).astype(np.float32)
    match = rng.random((30, 4)).astype(np.float32)
    match[:, 2] = 0  # of which nothing is true
    off = []
    for column in (0, 1, 3):
        m = match[:, column]
        weight = m / m.sum() + (1 - m) / (1 - m).sum()
        covariance = np.cov(cosine[:, column], aim[:, column], aweights=weight)
        off.append(1 - covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1]))
    tensors = map(torch.from_numpy, (cosine, aim, match, 1 - match))
    assert train_tiny_clip.off_course(*tensors).item() == pytest.approx(np.mean(off), abs=1e-5)
    aim, nothing = torch.from_numpy(aim), torch.zeros(30, 4)
    some = torch.from_numpy(match)
    assert train_tiny_clip.off_course(2 * aim - 1, aim, some, 1 - some).item() < 1e-5
    assert train_tiny_clip.off_course(aim, aim, nothing, nothing).item() == 0


def test_the_humanoid_alone_is_held_to_it_near_the_goal_once_more(tmp_path, monkeypatch):
    off_course, calls = train_tiny_clip.off_course, []
    monkeypatch.setattr(
        train_tiny_clip, "off_course", lambda *call: calls.append(call) or off_course(*call)
    )
    few = {"states": 100, "homes": 50, "searches": 0, "batch_size": 60, "steps": 1, "width": 4}
    train_tiny_clip.main(train_tiny_clip.Args(output=tmp_path, resolution=72, **few))
    (cosine, aim, match, miss), (near_cosine, near_aim, near_match, near_miss) = calls[:2]
    close = aim > train_tiny_clip.NEAR
    assert close.any() and not close.all()
    assert (near_cosine == cosine).all() and (near_aim == aim).all()
    assert (near_match == match * close).all() and (near_miss == miss * close).all()
    assert len(calls) == 4  # and once each for homes and their landmarks


def test_adversaries_learn_from_the_clip_and_show_what_they_reach(tmp_path, monkeypatch, capsys):
    few = "--num-envs 2 --learning-starts 0 --eval-every 200 --checkpoint-every 200"
    popen = train_tiny_clip.subprocess.Popen
    monkeypatch.setattr(train_tiny_clip, "PER_AGENT", 50)
    monkeypatch.setattr(
        train_tiny_clip.subprocess,
        "Popen",
        lambda line, **options: popen([*line, *few.split()], **options),
    )
    args = train_tiny_clip.Args(output=FOLDER, adversaries=("splits",))
    args.adversary_steps = 400
    rng = np.random.default_rng(0)
    poses = train_tiny_clip.adversary_poses(args, rng)
    assert poses.shape == (50, 24) and len(np.unique(poses, axis=0)) > 40
    printed = capsys.readouterr().out
    assert printed.count("clip_return") == 1 and "__splits__" in printed
    args.adversary_steps = 0
    with pytest.raises(SystemExit, match="--adversaries"):
        train_tiny_clip.adversary_poses(args, rng)


def test_no_adversary_outlives_the_program(monkeypatch):
    popen, agents = train_tiny_clip.subprocess.Popen, []

    class Agent(popen):
        def __init__(self, line, **options):
            super().__init__([*line, "--num-envs", "2"], **options)
            agents.append(self)
            self.wait, self.end = self.stop, self.wait

        def stop(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(train_tiny_clip.subprocess, "Popen", Agent)
    args = train_tiny_clip.Args(output=FOLDER, adversaries=("splits", "lotus"))
    with pytest.raises(KeyboardInterrupt):
        train_tiny_clip.adversary_poses(args, np.random.default_rng(0))
    assert len(agents) == 2 and all(agent.end(timeout=60) == -signal.SIGTERM for agent in agents)


def test_what_is_visited_is_drawn_more_often_however_rare_it_is():
    p = train_tiny_clip.chances(np.repeat([0, 1, 2], [800, 10, 190]))
    np.testing.assert_allclose(
        [p[:800].sum(), p[800:810].sum(), p[810:].sum()], [0.25, 0.375, 0.375]
    )
    np.testing.assert_allclose(train_tiny_clip.chances(np.repeat([0, 2], [6, 4])).sum(), 1)
    np.testing.assert_allclose(train_tiny_clip.chances(np.zeros(4, int)), 0.25)


def test_matches_and_near_misses_are_drawn_alike():
    progress = np.full((200, len(ATTRIBUTES)), 0.3, np.float32)
    splits, lotus = ATTRIBUTES.index("splits"), ATTRIBUTES.index("lotus")
    progress[:30, splits], progress[30:70, splits], progress[70:80, lotus] = 1, 0.8, 0.8
    states = train_tiny_clip.States(*[None] * 2, np.float32(progress == 1), progress, None)
    groups = train_tiny_clip.telling_states(states)
    assert [list(group) for group in groups] == [[*range(30)], [*range(30, 70)]]  # 10 are too few


def test_legs_of_scripted_splits_swing_to_the_front_each_for_itself(monkeypatch):
    monkeypatch.setattr(train_tiny_clip, "STANCE_WEIGHTS", {"splits": 10**6})
    studio, rng = train_tiny_clip.Studio(train_tiny_clip.Args(FOLDER)), np.random.default_rng(0)
    turns = []
    for _ in range(60):
        train_tiny_clip.scripted_state(studio.env, studio.stiff, rng)
        turns.append([studio.env.data.joint(f"{s}_hip_z").qpos[0] for s in ("right", "left")])
    apart = np.abs(np.diff(np.rad2deg(turns), axis=1))
    assert 0.2 < (apart > 20).mean() < 0.6
    studio.env.close()


def test_the_search_climbs_towards_states_that_are_misjudged(monkeypatch, capsys):
    monkeypatch.setattr(train_tiny_clip, "LINEAGES", 8)
    monkeypatch.setattr(train_tiny_clip, "GENERATIONS", 6)
    train_tiny_clip.open_studio(train_tiny_clip.Args(FOLDER))
    known = train_tiny_clip.new_states((600, 0))

    def score(frames, captions):  # a CLIP that rates whatever is low in its view
        rows = np.linspace(-1, 1, frames.shape[1])[:, None]
        teal = (frames[..., 1] > frames[..., 0] + 20).astype(np.float32)  # the legs
        low = (teal * rows).sum((1, 2)) / (teal.sum((1, 2)) + 1)
        return np.repeat(low[:, None], len(captions), 1)

    found = train_tiny_clip.misjudged_states(score, HerePool(), known, np.random.default_rng(0))
    numbers = [float(word) for word in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    signs = [sign for _, sign in train_tiny_clip.SOUGHT]
    before, after = signs * np.array(numbers).reshape(-1, 2).T
    assert (after >= before).all() and (after > before + 0.02).mean() > 0.5
    assert len(found.frames) == len(train_tiny_clip.SOUGHT) * 8 * 6

    def of_both_signs(values):  # overrated [12] and underrated [12], the mean of what was sought
        values = values.reshape(6, -1, 8, len(ATTRIBUTES))  # [generation, sought, lineage, A]
        mean = [values[:, i, :, [ATTRIBUTES.index(a) for a in meaning]].min(0).mean()
                for i, (meaning, _) in enumerate(train_tiny_clip.SOUGHT)]  # fmt: skip
        return np.reshape(mean, (-1, 2)).T

    overrated, underrated = of_both_signs(found.progress)
    assert (underrated > overrated).all()
    overrated, underrated = of_both_signs(found.truths)
    assert underrated.sum() > 3 * overrated.sum()  # true ones, and false ones
    env = train_tiny_clip.studio.env
    for i in range(0, len(found.frames), 40):  # what it says of a state is true of it
        env.set_state(found.qpos[i], np.zeros(env.model.nv))
        ramps = train_tiny_clip.conditions(env)
        true_of_it = [train_tiny_clip.graded(ramps[name]) for name in ATTRIBUTES]
        seen = np.stack([found.truths[i], found.progress[i]], 1)
        np.testing.assert_allclose(seen, true_of_it, atol=1e-5)
    env.close()

"""README's commands: each is run, shortened by flags; what needs a hub or a GPU is only parsed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sac_clip_humanoid

import numpy as np
import plot_results
import tyro

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("&&")[-1].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.strip().splitlines()
]
TABLE = re.findall(r"`(python sac_clip_humanoid\.py --clip-model [^`]+)`", README)
assert len(TABLE) == 3
SHORT = [
    "--total-timesteps", "400", "--num-envs", "2", "--learning-starts", "100",
    "--eval-episodes", "1", "--final-episodes", "1", "--hidden", "32", "--batch-size", "32",
]  # fmt: skip
SHORT_DQN = [
    "--total-timesteps", "400", "--num-envs", "2", "--learning-starts", "100",
    "--eval-episodes", "1", "--final-episodes", "1", "--batch-size", "16",
    "--calibration-episodes", "2",
]  # fmt: skip


def run(command: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    program, *arguments = shlex.split(command)
    assert program in ("python", "torchrun")
    arguments = ["-m", "torch.distributed.run"] * (program == "torchrun") + arguments
    result = subprocess.run(
        [sys.executable, *arguments, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place to run in that has what the commands name: the scripts and tests/."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("sac_clip_humanoid.py", "dqn_clip_playhouse.py", "clip_reward.py", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def first_run(folder):
    run("python sac_clip_humanoid.py", folder, *SHORT)
    (path,) = (folder / "runs").iterdir()
    return path


def test_install_and_first_command(first_run):
    assert "pip install -r requirements.txt && python sac_clip_humanoid.py" in README
    assert (first_run / "videos" / "best.mp4").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, first_run):
    command = command.replace("runs/NAME", str(first_run))
    if command.startswith("tensorboard"):
        assert first_run.parent.name == command.split()[-1] and list(first_run.glob("events*"))
    elif command.startswith("python -m pytest"):
        assert "tests/test_readme.py" in run(command, ROOT, "--collect-only").stdout
    elif "clip_accuracy" in command:
        run(command, folder, "--states", "500", "--output", str(folder / "accuracy.json"))
        accuracy = json.loads((folder / "accuracy.json").read_text())
        assert accuracy["mean"]["0"]["auc"] > 0.97  # of 6,000 states 0.992
    elif "home_accuracy" in command:
        run(command, folder, "--homes", "8", "--output", str(folder / "homes.json"))
        in_view = json.loads((folder / "homes.json").read_text())["alphas"]["0"]["train"]
        precision = [in_view[family]["average_precision_in_view"] for family in in_view]
        assert len(precision) == 3 and min(precision) > 0.75  # of 240 homes 0.92, 1.00, 0.82
    elif command == "python sac_clip_humanoid.py":
        assert json.loads((first_run / "report.json").read_text())  # this one it was
    elif "benchmark" in command:
        few = ("--num-envs", "4", "--frame-size", "48", "--steps", "80", "--seconds", "0.1")
        run(command, folder, *few)
    elif "imageio" in command:
        run(command, folder)
        images = [folder / f"{i:03}.png" for i in range(0, 100, 20)]
        assert sorted(folder.glob("[0-9]*.png")) == images
    elif "--resume" in command:
        run(command, folder)
    elif "--evaluate" in command:
        run(command, folder, "--final-episodes", "2")
    elif "plot_results" in command:
        results = shutil.copytree(ROOT / "tests" / "results", folder / "results")
        (results / "epic.png").unlink()
        run(command, folder, "--results", str(results))
        assert (results / "epic.png").exists()
    elif "playhouse_sheet" in command:
        run(command, folder, "--columns", "8", "--size", "48", "--output", str(folder / "s.jpg"))
    elif "--tour" in command or "reproduce" in command:
        run(command, folder)
    elif "dqn_clip_playhouse" in command:
        run(command, folder, *SHORT_DQN)
    elif "sac_clip_humanoid" in command:
        run(command, folder, *SHORT)
    else:
        files = sorted(str(path) for path in (ROOT / "tests" / "frames").glob("*.png"))
        table = run(command.split(" tests/frames")[0], folder, *files).stdout.splitlines()
        assert "kneeling" in table[2]  # the best image


@pytest.mark.parametrize("command", TABLE)
def test_commands_for_larger_clips_parse(command):
    args = tyro.cli(sac_clip_humanoid.Args, args=shlex.split(command)[2:])
    sac_clip_humanoid.check_args(args)
    assert args.frame_size == 224


def test_python_block():
    (code,) = [block for language, block in BLOCKS if language == "python"]
    code = code.replace("tests/tiny_clip", str(ROOT / "tests" / "tiny_clip"))
    frames = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    scope = {"frames": frames}
    exec(code, scope)
    assert scope["rewards"].shape == (3, 1)


def reports(experiment: str) -> list[dict]:
    result = json.loads((ROOT / "tests" / "results" / f"{experiment}.json").read_text())
    return [run["report"] for run in result["runs"]]


def percents(rates: list[float]) -> str:
    return ", ".join(f"{int(100 * rate + 0.5)}" for rate in rates) + "%"


def test_the_tables_of_poses_say_what_the_results_say():
    names = {
        "kneeling": "kneeling", "lotus": "lotus", "standing": "standing",
        "both arms raised": "arms_raised", "side splits": "splits",
        "hands on hips": "hands_on_hips", "arms crossed": "arms_crossed", "one leg": "one_leg",
    }  # fmt: skip
    short = {}
    for name, task in names.items():
        best, last = ([report[agent] for report in reports(task)] for agent in ("best", "last"))
        short[name] = percents([agent["success_rate"] for agent in best])
        returns = [int(10 * agent["clip_return"] + 0.5) / 10 for agent in best]
        cells = [
            short[name],
            percents([agent["success_rate"] for agent in last]),
            percents([agent["goal_state"] for agent in best]),
            ", ".join(map(str, returns)),
            f"{plot_results.PAPER[task]}%",
        ]
        rows = re.findall(rf"^\| {name}(?:, seeds [\d, ]+)? \| (.*) \|$", README, re.MULTILINE)
        assert cells in [row.split(" | ") for row in rows], (name, cells)
    head, _, cells = README.split("| kneeling | ")[1].split("\n")[:3]
    columns = ["kneeling", *head.removesuffix(" |").split(" | ")]
    shown = dict(zip(columns, cells.strip("| ").split(" | "), strict=True))
    shown["both arms raised"] = shown.pop("arms raised")
    assert shown == short


def test_the_table_of_kneeling_says_what_the_results_say():
    (report,), (without,) = reports("kneeling"), reports("no_layer_norm")
    for agent in ("best", "last", "random", "zero"):
        (row,) = re.findall(rf"^\| {agent} \| (\d+% \| .*) \|$", README, re.MULTILINE)
        numbers = report[agent]
        assert row.split(" | ") == [
            percents([numbers["success_rate"]]),
            percents([numbers["goal_state"]]),
            f"{numbers['clip_return']:.1f}",
            percents([without[agent]["success_rate"]]),
        ]


def test_the_table_of_the_playhouse_says_what_the_results_say():
    for experiment, agent, row in (
        ("playhouse", "last", "the last"),
        ("playhouse", "best", "the best in the eyes of CLIP, of 280,000 and 240,000 steps"),
        ("playhouse_relabel", "last", "the last of `--relabel-fraction 0.5`"),
        ("playhouse_env", "last", "the last of `--reward env`, seed 1"),
        ("playhouse", "random", "random"),
    ):
        rows = README.split("## The playhouse")[1].split(f"\n| {row} | ")[1]
        for split, line in zip(("train", "heldout"), rows.split("\n")[:2], strict=True):
            names = [f"success_rate_{family}" for family in ("find", "lift", "place")]
            names.append("success_rate")
            expected = [
                percents([report[agent][split][name] for report in reports(experiment)])
                for name in names
            ]
            assert line.strip("| ").split(" | ")[1:] == expected, (row, split)

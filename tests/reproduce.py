"""Every experiment behind README: its command, its hours on two CPU cores, and its file.

    python tests/reproduce.py                       # the list, and what is there already
    python tests/reproduce.py kneeling lotus        # these, one after the other
    python tests/reproduce.py --all                 # what is missing

A result is a small JSON file in `tests/results/`; what it has is not run again, and of several
seeds those are run that it lacks. What had other flags or another bundled CLIP does not count.
Runs go to `runs/reproduce/`, where one that was interrupted is resumed, and one of other flags or
another CLIP is in the way. The CLIPs that some experiments are about are trained first, each in one
go, and kept in `runs/reproduce/clips/`.
"""

# ruff: noqa: E402, I001

import hashlib
import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import tyro
from whole_runs import scalars


class Experiment(NamedTuple):
    what: str
    command: str
    hours: float  # on two cores, all seeds together
    seeds: int = 0  # runs of a training script; 0: a program that prints or writes its result


def pose(task: str, seeds: int = 1) -> Experiment:
    command = f"python sac_clip_humanoid.py --task {task}"
    return Experiment(f"{task.replace('_', ' ')}, from its sentence", command, 1.2 * seeds, seeds)


SAC, DQN = "python sac_clip_humanoid.py", "python dqn_clip_playhouse.py"
RUNS = "runs/reproduce"
# What `tests/train_tiny_clip.py` makes of these flags (it takes a C++ compiler): sizes of the image
# tower, trained alike, and the default one on other looks of the humanoid.
ALIKE = "--states 40000 --steps 3000 --searches 3 --compile"
CLIPS = {f"w{width}": f"--width {width} {ALIKE}" for width in (4, 8, 12, 16)}
CLIPS |= {"plain": f"--no-textured {ALIKE}", "track": f"--camera track {ALIKE}"}
LOOKS = {"default": "", "plain": " --no-textured", "track": " --camera track"}


def accuracy(clip: str, look: str, hours: float = 0.1) -> Experiment:
    command = f"python tests/clip_accuracy.py --clip-model {RUNS}/clips/{clip}{LOOKS[look]}"
    return Experiment(f"the CLIP {clip} as a reward, on the {look} look", command, hours)


EXPERIMENTS = {
    "benchmark": Experiment(
        "speed of each stage and of the loop", "python tests/benchmark.py --json", 0.02
    ),
    "clip_accuracy": Experiment(
        "the bundled CLIP as a reward for poses", "python tests/clip_accuracy.py", 0.1
    ),
    "home_accuracy": Experiment(
        "the bundled CLIP as a success detector", "python tests/home_accuracy.py", 0.1
    ),
    "kneeling": pose("kneeling", seeds=3),
    "lotus": pose("lotus"),
    "standing": pose("standing"),
    "arms_raised": pose("arms_raised"),
    "splits": pose("splits"),
    "hands_on_hips": pose("hands_on_hips"),
    "arms_crossed": pose("arms_crossed"),
    "one_leg": pose("one_leg"),
    "all_tasks": Experiment(
        "one humanoid, eight sentences",
        f"{SAC} --task all --total-timesteps 2000000 --eval-every 64000 --eval-episodes 4",
        4.5,
        1,
    ),
    "no_layer_norm": Experiment(
        "kneeling without layer norm in the critics", f"{SAC} --no-layer-norm", 1.2, 1
    ),
    "alpha_half": Experiment(
        "kneeling with half of the regularisation", f"{SAC} --alpha 0.5", 1.2, 1
    ),
    # The hours of the first of each CLIP are with those of its training, as estimated.
    **{
        f"{clip}_on_default": accuracy(clip, "default", hours)
        for clip, hours in zip(CLIPS, (0.5, 0.7, 1.0, 1.3, 1.3, 1.3), strict=True)
    },
    **{
        f"{clip}_on_{look}": accuracy(clip, look)
        for clip in ("w16", "plain", "track")
        for look in ("plain", "track")
    },
    **{
        f"kneeling_w{width}": Experiment(
            f"kneeling, from the CLIP w{width}", f"{SAC} --clip-model {RUNS}/clips/w{width}", 2.4, 2
        )
        for width in (4, 8, 16)
    },
    "untextured": Experiment(
        "kneeling with the plain body, from a CLIP that knows it",
        f"{SAC} --no-textured --clip-model {RUNS}/clips/plain",
        1.2,
        1,
    ),
    "running": Experiment(
        "SAC alone, on gymnasium's running reward",
        f"{SAC} --reward env --reward-scale 1 --batch-size 256 --total-timesteps 150000 "
        "--full-observation --action-repeat 1 --greedy-envs 0 --actor-tau 1 --no-anneal-lr "
        "--initial-ent-coef 1 --no-layer-norm",
        1.0,
        2,
    ),
    "find_env": Experiment(
        "DQN alone: find, on the simulator's truth", f"{DQN} --reward env --family find", 1.6, 1
    ),
    "playhouse": Experiment("all families, from CLIP", DQN, 2.8, 2),
    "playhouse_env": Experiment("all families, on the truth", f"{DQN} --reward env", 1.6, 1),
    "playhouse_relabel": Experiment(
        "all families, from CLIP, half relabelled", f"{DQN} --relabel-fraction 0.5", 2.8, 2
    ),
    # Last, as it ends `--all` where the run that it is about is not there.
    "unseen_prompts": Experiment(
        "the agent of --task all, told sentences that it was not trained for",
        f"python tests/unseen_prompts.py {RUNS}/all_tasks/1/runs/*",
        0.1,
    ),
}


@dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """experiments to run; none: list them"""
    all: bool = False
    """run all that have no result yet"""
    results: Path = HERE / "results"
    """where the JSON files are"""
    runs: Path = HERE.parent / "runs" / "reproduce"
    """where agents are trained"""


def command_line(command: str, runs: Path) -> list[str | Path]:
    """What to start for a command; the CLIPs that it names are trained first, and a run that it
    names must be there."""
    _, script, *words = shlex.split(command)
    for i, word in enumerate(words):
        if word.startswith(f"{RUNS}/clips/"):
            folder = runs / "clips" / Path(word).name
            words[i] = str(folder)
            if not folder.exists():
                part = folder.with_suffix(".part")
                line = [HERE / "train_tiny_clip.py", *shlex.split(CLIPS[folder.name])]
                subprocess.run([sys.executable, *line, "--output", part], check=True)
                part.rename(folder)
        elif word.startswith(f"{RUNS}/"):
            name = word.removeprefix(f"{RUNS}/")
            found = sorted(runs.glob(name))
            if not found:
                first = f"python tests/reproduce.py {Path(name).parts[0]}"
                sys.exit(f"{word}: no such run, which {script} is about; first {first}")
            words[i] = str(found[-1])
    return [sys.executable, HERE.parent / script, *words]


def digest(clip_model: str | Path) -> str | None:
    """Tells the weights in a CLIP's folder from others."""
    path = Path(clip_model) / "open_clip_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None


def summary(run: Path, command: str) -> dict:
    """What is kept of a finished run: its report, and its evaluations over training."""
    args = json.loads((run / "args.json").read_text())
    logged = {k: v for k, v in scalars(run).items() if k.startswith("eval/")}
    events = next(iter(logged.values()))
    pauses = [b.wall_time - a.wall_time for a, b in zip(events, events[1:], strict=False)]
    return {
        "command": command,
        "clip": digest(args["clip_model"]),
        "precision": args["precision"],
        # An interrupted run stood still for a while; the median does not know.
        "minutes": round(statistics.median(pauses) * len(events) / 60, 1) if pauses else None,
        "report": json.loads((run / "report.json").read_text()),
        "curve": {
            "step": [event.step for event in events],
            **{tag.removeprefix("eval/"): [e.value for e in logged[tag]] for tag in sorted(logged)},
        },
    }


def train(command: str, folder: Path, runs: Path) -> dict:
    """Start the run in the folder, or go on with the one that is there, and summarise it."""
    line = command_line(command, runs)
    clip = line[line.index("--clip-model") + 1] if "--clip-model" in line else HERE / "tiny_clip"
    started, known = {"command": command, "clip": digest(clip)}, folder / "experiment.json"
    checkpoints = sorted(folder.glob("runs/*/last.pt"))
    reports = sorted(folder.glob("runs/*/report.json"))
    if checkpoints and (not known.exists() or json.loads(known.read_text()) != started):
        sys.exit(f"{folder}: has a run of other flags or of another CLIP; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(started))
    if not reports:
        if checkpoints:
            line[2:] = "--resume", str(checkpoints[-1].parent)
        subprocess.run(line, cwd=folder, check=True)
        reports = sorted(folder.glob("runs/*/report.json"))
    return summary(reports[-1].parent, command)


def missing(experiment: Experiment, path: Path) -> list[int]:
    """The seeds of which its file lacks a run; [0] if it has no seeds, and no file of this CLIP."""
    result = json.loads(path.read_text()) if path.exists() else None
    today, named = digest(HERE / "tiny_clip"), "--clip-model" in experiment.command
    if not experiment.seeds:
        same = result is not None and result["command"] == experiment.command
        return [0] * (not (same and (named or result.get("clip", today) == today)))
    runs = result["runs"] if result else []
    made = {run["command"] for run in runs if named or run.get("clip") == today}
    commands = [f"{experiment.command} --seed {seed}" for seed in range(1, experiment.seeds + 1)]
    return [seed for seed, command in enumerate(commands, 1) if command not in made]


def train_seeds(name: str, path: Path, runs: Path) -> None:
    """Add the seeds that the file lacks, each as soon as its run has ended."""
    what, command, *_ = experiment = EXPERIMENTS[name]
    result = json.loads(path.read_text()) if path.exists() else {"what": what, "runs": []}
    for seed in missing(experiment, path):
        seeded = f"{command} --seed {seed}"
        new = train(seeded, runs / name / str(seed), runs)
        # Runs of other flags give way; of an earlier CLIP, once their seed has run again.
        ours = re.compile(re.escape(command) + r" --seed \d+")
        others = [run for run in result["runs"] if ours.fullmatch(run["command"])]
        own = [new, *(run for run in others if run["command"] != seeded)]
        result["runs"] = sorted(own, key=lambda run: int(run["command"].split()[-1]))
        path.write_text(dump(result))


def measure(name: str, path: Path, runs: Path) -> None:
    """Run a program that writes its file itself, or prints its numbers as the last line."""
    what, command, *_ = EXPERIMENTS[name]
    line = command_line(command, runs)
    if "--json" not in line:
        subprocess.run([*line, "--output", path], cwd=HERE.parent, check=True)
        path.write_text(dump(json.loads(path.read_text()) | {"command": command}))
        return
    output = subprocess.run(line, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True)
    print(output.stdout)
    numbers = json.loads(output.stdout.splitlines()[-1])
    path.write_text(dump({"what": what, "command": command, **numbers}))


def dump(result: dict) -> str:
    """JSON with four digits, and each list of numbers on a line of its own."""
    rounded = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.4g}"))
    text = json.dumps(rounded, indent=1)
    return re.sub(r"\[[-\d.,e\s]+\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


def main(args: Args) -> None:
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        sys.exit(f"{unknown[0]}: no such experiment; choose from {', '.join(EXPERIMENTS)}")
    if not args.names and not args.all:
        for name, experiment in EXPERIMENTS.items():
            what, command, hours, seeds = experiment
            lacks = missing(experiment, args.results / f"{name}.json")
            state = "not run" if lacks else "there"
            if 0 < len(lacks) < seeds:
                state = f"{seeds - len(lacks)} of {seeds}"
            print(f"{name:20} {state:8} {hours:5.2f} h  {what}\n{'':38}{command}")
        for name, flags in CLIPS.items():
            folder = f"{RUNS}/clips/{name}"
            print(f"{folder}\n{'':38}python tests/train_tiny_clip.py {flags} --output {folder}")
        return
    for name in EXPERIMENTS if args.all else args.names:
        path = args.results.resolve() / f"{name}.json"
        if not missing(EXPERIMENTS[name], path):
            print(f"{name}: {path} is there; delete it to run the experiment again")
            continue
        if EXPERIMENTS[name].seeds:
            train_seeds(name, path, args.runs.resolve())
        else:
            measure(name, path, args.runs.resolve())
        print(f"{name}: {path}")


if __name__ == "__main__":
    # As Ctrl-C, which ends the run that was started too: two of them would share one folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None

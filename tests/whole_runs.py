"""Start either script as a user does, kill it, and read what it leaves."""

import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def train(script: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    line = command(script, *flags)
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=600)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def start(script: str, folder: Path, *flags: str) -> subprocess.Popen:
    """A run in the background that has written its first checkpoint."""
    process = subprocess.Popen(
        command(script, *flags), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.time() + 300
    while not list(folder.glob("runs/*/last.pt")):
        if process.poll() is not None or time.time() > deadline:
            process.kill()
            raise AssertionError(f"no checkpoint: {process.communicate()[1][-2000:]}")
        time.sleep(0.05)
    return process


def kill_after_a_checkpoint(script: str, folder: Path, *flags: str) -> Path:
    """A run's folder after SIGKILL, between two checkpoints; none of its workers lives on."""
    name = f"{folder.name}-{script}"  # two scripts may be tested at a time
    process = start(script, folder, *flags, "--exp-name", name)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.time() + 30  # for the workers to see that their parent is gone
    while subprocess.run(["pgrep", "-f", f"exp-name {name}"]).returncode == 0:
        assert time.time() < deadline
        time.sleep(0.2)
    return only_run(folder)


def scalars(run: Path) -> dict[str, list]:
    """What TensorBoard shows, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}

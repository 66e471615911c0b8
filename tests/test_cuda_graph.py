"""The update as one CUDA graph against the plain one; on a CPU with a graph that is only played."""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import sac_clip_humanoid  # first: it puts torch before the first GL context
import dqn_clip_playhouse

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Update:
    """A step of Adam on a batch, as the scripts make it."""

    def __init__(self):
        torch.manual_seed(0)
        self.weights = torch.nn.Linear(4, 3).to(DEVICE)
        options = {"lr": 0.01, "fused": True, "capturable": DEVICE == "cuda"}
        self.optimizer = torch.optim.Adam(self.weights.parameters(), **options)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (self.weights(x) - y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


class PlayedGraph:
    """Calls the function at each replay, with what lies in the captured inputs by then."""

    wrapper = None

    def replay(self) -> None:
        own = self.wrapper
        for name, value in own.function(*own.inputs).items():
            own.outputs[name].copy_(value)


@contextmanager
def played(update: Update, graph: PlayedGraph, stream, capture_error_mode: str):
    """To capture launches nothing."""
    assert capture_error_mode == "thread_local"
    before = [w.detach().clone() for w in update.weights.parameters()]
    state = update.optimizer.state_dict()
    state["state"] = {
        key: {name: value.clone() for name, value in own.items()}
        for key, own in state["state"].items()
    }
    yield
    update.optimizer.load_state_dict(state)
    with torch.no_grad():
        for weight, value in zip(update.weights.parameters(), before, strict=True):
            weight.copy_(value)


@pytest.mark.parametrize("script", [sac_clip_humanoid, dqn_clip_playhouse])
def test_it_does_what_the_function_does(script, monkeypatch):
    plain, captured = Update(), Update()
    if DEVICE == "cpu":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kw: played(captured, *args, **kw))
    graph = script.CUDAGraph(captured)
    PlayedGraph.wrapper = graph
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        batch = [torch.randn(16, n, generator=generator).to(DEVICE) for n in (4, 3)]
        torch.testing.assert_close(graph(*batch), plain(*batch))
    for mine, others in zip(captured.weights.parameters(), plain.weights.parameters(), strict=True):
        torch.testing.assert_close(mine, others)
    assert graph.inputs[0] is not batch[0] and torch.equal(graph.inputs[0], batch[0])

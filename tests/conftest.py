import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two modules are tested at a time

import open_clip
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def torch_settings():
    """What a script that runs in this process sets, for itself alone."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    allow_tf32 = torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = allow_tf32


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory) -> Path:
    """A model folder that loads in a moment: open_clip's format, random weights, 32 x 32 pixels."""
    config = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "layers": 2,
            "width": 64,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "layers": 2,
            "width": 64,
            "heads": 2,
        },
    }
    folder = tmp_path_factory.mktemp("random_clip")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}})
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder

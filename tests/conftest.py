"""Shared by all tests: one thread per process, no hub, and real data where there is any."""

import os
from datetime import datetime
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed  # noqa: E402

from nanopost import batch  # noqa: E402

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is long is slow too."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


@pytest.fixture
def few(monkeypatch):
    """Sequences share even the few tokens that small tests have in common."""
    monkeypatch.setattr(batch, "FEW", 0)


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data next to the repository; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """name (chats.REAL) -> (Tokenizer, folder), read once."""
    from chats import unpacked

    from nanopost.tokenizer import Tokenizer

    cache = {}

    def load(name):
        if name not in cache:
            folder = unpacked(shared, name, tmp_path_factory.mktemp(name))
            cache[name] = Tokenizer.load(folder), folder
        return cache[name]

    return load


@pytest.fixture(scope="module")
def auto(real):
    """name -> transformers' tokenizer of the same folder."""
    transformers = pytest.importorskip("transformers")
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = transformers.AutoTokenizer.from_pretrained(real(name)[1])
        return cache[name]

    return load


@pytest.fixture
def frozen_clock(monkeypatch):
    """Templates that write the date write the same one, here and in transformers."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    monkeypatch.setattr("nanopost.template.datetime", Clock)
    monkeypatch.setattr(theirs, "datetime", Clock)

"""Fixtures that several test folders share."""

import os
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

# Tiny tensors: threads would only get in each other's way, in the tools' processes too.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from mmengine.registry import DefaultScope

# A Swin small enough for unit tests that still has the published depths.
TINY_SWIN = dict(embed_dims=24, depths=(2, 2, 6, 2), num_heads=(2, 3, 6, 6))


def pytest_collection_modifyitems(items: list) -> None:
    """Run tests that fork first: autograd refuses a fork after something was compiled."""
    items.sort(key=lambda item: 'test_engine' not in item.nodeid)


@pytest.fixture(scope='session')
def recorded() -> Path:
    """Folder with recorded reference outputs, real data and dense checkpoints."""
    folder = os.environ.get('MMDYNSPARSE_SHARED')
    if not folder:
        pytest.skip('MMDYNSPARSE_SHARED does not name the folder of recorded data')
    return Path(folder)


@pytest.fixture
def tiny_swin() -> dict:
    """Arguments of a small Swin for our class and for those of mmseg and mmdet."""
    return dict(TINY_SWIN)


@pytest.fixture
def randomize():
    """Function that gives all parameters of a module random values of a useful size."""

    def fill(module: torch.nn.Module, std: float = 0.2, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.data.normal_(0, std, generator=generator)
        return module

    return fill


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A folder and the address under which a server offers it; torch keeps its copies elsewhere."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    server = HTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    torch.manual_seed(0)
    DefaultScope._instance_dict.clear()

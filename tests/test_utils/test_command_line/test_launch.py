import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdynsparse.utils.command_line.launch import set_resume

# A wrapped model in a cycle, as a runner that is done leaves it, and the names of all threads.
SCRIPT = """
from pathlib import Path
import torch
from torch import distributed, nn
from mmdynsparse.utils.command_line.launch import leave_process_group

def threads():
    return [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]

distributed.init_process_group('gloo', store=distributed.HashStore(), rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
model.cycle = [model]
del model
print(sum('gloo' in name for name in threads()))
leave_process_group()
print(sum('gloo' in name for name in threads()))
"""


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='lists threads by /proc')
def test_no_thread_of_the_process_group_is_left():
    """Else it may abort the process while the interpreter ends."""
    run = subprocess.run([sys.executable, '-c', SCRIPT], capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert before > 0 and after == 0, run.stderr


@pytest.mark.parametrize('setting', ['option', 'config'])
def test_resume_without_checkpoint_starts_from_load_from(tmp_path: Path, setting: str) -> None:
    load_from = 'dense.pth' if setting == 'option' else None
    cfg = Config(dict(work_dir=str(tmp_path), load_from=load_from, resume=setting == 'config'))
    set_resume(cfg, 'auto' if setting == 'option' else None)
    assert cfg.load_from == load_from and not cfg.resume


def test_resume_prefers_the_latest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / 'last_checkpoint').write_text('runs/iter_8.pth')
    cfg = Config(dict(work_dir=str(tmp_path), load_from='dense.pth'))
    set_resume(cfg, 'auto')
    assert cfg.load_from == 'runs/iter_8.pth' and cfg.resume
    set_resume(cfg, 'other.pth')
    assert cfg.load_from == 'other.pth' and cfg.resume


def test_no_resume_keeps_the_config(tmp_path: Path) -> None:
    cfg = Config(dict(work_dir=str(tmp_path), load_from='dense.pth'))
    set_resume(cfg, None)
    assert cfg.load_from == 'dense.pth' and not cfg.get('resume')

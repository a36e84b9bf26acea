import subprocess
import sys
from pathlib import Path

import pytest

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

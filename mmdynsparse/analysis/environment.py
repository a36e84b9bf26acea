"""What a measurement was made on: the device, its threads and the versions of the libraries."""

import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

LIBRARIES = ('mmengine', 'mmcv', 'mmseg', 'mmdet', 'timm')


def environment(device: torch.device) -> dict[str, str | int]:
    """Describe the device, the threads and the versions of this process."""
    imported = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        **{name: module.__version__ for name, module in imported.items()},
        date=datetime.now(timezone.utc).strftime('%Y-%m-%d'),
    )


def cpu_name() -> str:
    """Return the model name of the CPU and the instruction set that torch uses."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    name = names[0] if names else platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'

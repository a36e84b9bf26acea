"""``python -m mmdynsparse`` says what is installed, and what is missing for what."""

from importlib import import_module

from .version import __version__

# Library, what it is for, and what installs it.
LIBRARIES = (
    ('torch', 'everything but exported models', 'torch'),
    ('mmengine', 'configs and tools', 'mmdynsparse[seg] or mmdynsparse[det]'),
    ('mmcv', 'configs and tools', 'mmdynsparse[seg] or mmdynsparse[det]'),
    ('mmcv.ops', 'detectors', '--no-build-isolation mmdynsparse[det], after torch'),
    ('mmseg', 'segmentors', 'mmdynsparse[seg]'),
    ('mmdet', 'detectors', 'mmdynsparse[det]'),
    ('onnx', 'export', 'mmdynsparse[export]'),
    ('onnxruntime', 'exported models', 'mmdynsparse[export]'),
    ('openvino', 'exported models in OpenVINO', 'mmdynsparse[openvino]'),
)


def describe(library: str, purpose: str, remedy: str) -> str:
    """Return the library's version, or what it is missing for and what installs it."""
    try:
        module = import_module(library)
    # mmseg and mmdet assert that mmcv and mmengine have versions that they know.
    except (ImportError, AssertionError) as error:
        return f'{library:<12} missing for {purpose}: pip install {remedy}  ({error})'
    return f'{library:<12} {getattr(module, "__version__", "found")}'


def main() -> None:
    """Print one line for each library."""
    print(f'mmdynsparse  {__version__}')
    for entry in LIBRARIES:
        print(describe(*entry))


if __name__ == '__main__':
    main()

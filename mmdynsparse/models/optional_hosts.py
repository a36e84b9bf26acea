"""Necks and heads that subclass those of mmsegmentation or mmdetection.

The registry imports this module. A library that is not there, or does not import, takes only its
own parts with it, and the registry says why to whoever asks for one of them.
``mmdynsparse.models`` does not import it.
"""

from importlib import import_module

from ..registry import MODELS

# Package here, library, extra that installs it, and the parts in the package.
HOSTS = (
    ('decode_heads', 'mmseg', 'seg', ('SparseUPerHead',)),
    (
        'dense_heads',
        'mmdet',
        'det',
        ('SparseATSSHead', 'SparseFCOSHead', 'SparseGFLHead', 'SparseRPNHead', 'SparseRetinaHead'),
    ),
    ('necks', 'mmdet', 'det', ('SimpleFeaturePyramid', 'SparseFPN')),
    (
        'roi_heads',
        'mmdet',
        'det',
        ('SparseCascadeRoIHead', 'SparseFCNMaskHead', 'SparseStandardRoIHead'),
    ),
)

for package, library, extra, parts in HOSTS:
    try:
        import_module(f'{__package__}.{package}')
    # Both assert that the versions of mmcv and mmengine are among those they know.
    except (ImportError, AssertionError) as error:
        reason = (
            f'{library} could not be imported ({type(error).__name__}: {error}): '
            f'pip install mmdynsparse[{extra}]'
        )
        MODELS.absent.update(dict.fromkeys(parts, reason))

"""Necks and heads that subclass those of mmsegmentation or mmdetection.

The registry imports this module; a library that is not there, or does not import, takes only its
own parts with it. ``mmdynsparse.models`` does not import it.
"""

from contextlib import suppress

# Both assert that the versions of mmcv and mmengine are among those they know.
FAILURES = (ImportError, AssertionError)

with suppress(*FAILURES):
    from . import decode_heads  # noqa: F401

with suppress(*FAILURES):
    from . import dense_heads, necks  # noqa: F401

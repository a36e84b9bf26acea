"""Model parts that OpenMMLab's registries build."""

from .backbones import *  # noqa: F403

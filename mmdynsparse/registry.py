"""Child registries of mmengine with the scope ``mmdynsparse``.

mmengine imports this module by itself when a config names a type with the scope, for example
``mmdynsparse.SparseSwinTransformer``, and ``locations`` tells it where the types are defined, so
a config needs no ``custom_imports``.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    scope='mmdynsparse',
    parent=MMENGINE_MODELS,
    locations=['mmdynsparse.layers', 'mmdynsparse.models', 'mmdynsparse.models.hosted'],
)
HOOKS = Registry(
    'hook', scope='mmdynsparse', parent=MMENGINE_HOOKS, locations=['mmdynsparse.engine']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    scope='mmdynsparse',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    locations=['mmdynsparse.engine'],
)
STRATEGIES = Registry(
    'strategy', scope='mmdynsparse', parent=MMENGINE_STRATEGIES, locations=['mmdynsparse.engine']
)

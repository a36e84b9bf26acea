"""Child registries of mmengine with the scope ``mmdynsparse``.

mmengine imports this module by itself when a config names a type with the scope, for example
``mmdynsparse.SparseSwinTransformer``, and ``locations`` tells it where the types are defined, so
a config needs no ``custom_imports``.
"""

from mmengine import registry
from mmengine.registry import Registry


class ModelRegistry(Registry):
    """Registry that knows why a part is not there.

    Attributes:
        absent: The reasons, by the names of parts whose library is missing or does not import.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.absent: dict[str, str] = {}

    def get(self, key: str) -> type | None:
        """Return what has this name, or raise a ValueError with the reason if it is absent."""
        self.import_from_location()
        if reason := self.absent.get(key.removeprefix(f'{self.scope}.')):
            raise ValueError(f'{key} must have its library, but {reason}')
        return super().get(key)


MODELS = ModelRegistry(
    'model',
    scope='mmdynsparse',
    parent=registry.MODELS,
    locations=['mmdynsparse.layers', 'mmdynsparse.models', 'mmdynsparse.models.optional_hosts'],
)
ENGINE = dict(scope='mmdynsparse', locations=['mmdynsparse.engine'])
HOOKS = Registry('hook', parent=registry.HOOKS, **ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor', parent=registry.OPTIM_WRAPPER_CONSTRUCTORS, **ENGINE
)
LOOPS = Registry('loop', parent=registry.LOOPS, **ENGINE)
STRATEGIES = Registry('strategy', parent=registry.STRATEGIES, **ENGINE)

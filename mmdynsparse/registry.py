"""Child registries of mmengine with the scope ``mmdynsparse``.

mmengine imports this module by itself when a config names a type with the scope, for example
``mmdynsparse.SparseSwinTransformer``, and ``locations`` tells it where the types are defined, so
a config needs no ``custom_imports``.

Importing it also tells mmengine where ``_base_ = 'mmdynsparse::...'`` is found. What is read so
has this package's scope, while most of its types are those of mmsegmentation or mmdetection.
Hence every registry of mmengine has a child here, which looks for them there.
"""

import contextlib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from mmengine import registry
from mmengine.config import utils as config_utils
from mmengine.registry import DefaultScope, Registry

SCOPE = 'mmdynsparse'


class GuestRegistry(Registry):
    """Registry that finds what it lacks in that of the library whose model is built."""

    def get(self, key: str) -> type | None:
        """Return what has this name here, in the library of the default scope or in mmengine."""
        self.import_from_location()
        if '.' not in key and key not in self._module_dict:
            # A config of this scope is built within the default scope of its run.
            scopes = [scope.scope_name for scope in DefaultScope._instance_dict.values()]
            host = next((name for name in reversed(scopes) if name != SCOPE), 'mmengine')
            with contextlib.suppress(ImportError):
                # Nothing else has to have asked for a type of the library before.
                import_module(f'{host}.registry')
            library = self._get_root_registry()._search_child(host)
            if library is not None:
                return library.get(key)
        return super().get(key)


class ModelRegistry(GuestRegistry):
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
    scope=SCOPE,
    parent=registry.MODELS,
    locations=['mmdynsparse.layers', 'mmdynsparse.models', 'mmdynsparse.models.optional_hosts'],
)
ENGINE = dict(scope=SCOPE, locations=['mmdynsparse.engine'])
HOOKS = GuestRegistry('hook', parent=registry.HOOKS, **ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = GuestRegistry(
    'optimizer wrapper constructor', parent=registry.OPTIM_WRAPPER_CONSTRUCTORS, **ENGINE
)
LOOPS = GuestRegistry('loop', parent=registry.LOOPS, **ENGINE)
STRATEGIES = GuestRegistry('strategy', parent=registry.STRATEGIES, **ENGINE)

for parent in [item for item in vars(registry).values() if isinstance(item, Registry)]:
    if SCOPE not in parent.children:
        # It has nothing of its own; without a location mmengine asks for register_all_modules.
        GuestRegistry(parent.name, scope=SCOPE, parent=parent, locations=['mmdynsparse.version'])


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


# mmengine resolves `package::config` by this table alone, and has no other way to add to it.
config_utils.MODULE2PACKAGE[SCOPE] = SCOPE
# Where the onedl fork provides mmseg, mmengine's helpers would install the original over it.
if not _is_installed('mmsegmentation') and _is_installed('onedl-mmsegmentation'):
    config_utils.MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'

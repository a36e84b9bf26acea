"""The text of a config that inherits from another one."""

import os
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

from mmengine.config import Config

WIDTH = 100  # characters of a line


def child_config(base: str, out: str, cfg: Mapping, changes: Mapping) -> str:
    """Return the text of a config that is another one with changes.

    A config of mmengine's lazy style (``read_base``) gets a child of that style.

    Args:
        base: Path of the config that is inherited from.
        out: Path that the text is meant for.
        cfg: What is in ``base``.
        changes: Entries that are merged into it.

    Raises:
        ValueError: If the path from ``out`` to a config of the lazy style cannot be imported.
    """
    marked = _over(changes, cfg)
    if not Config._is_lazy_import(base):
        lines = [f'_base_ = {_base_path(base, out)!r}\n']
        lines += [f'{key} = {_code(value)}' for key, value in marked.items()]
        return '\n'.join(lines) + '\n'
    module = _module(base, out)
    lines = ['from mmengine.config import read_base\n', 'with read_base():']
    lines += [f'    from {module} import *\n']
    for key, value in changes.items():
        merges = isinstance(value, Mapping) and isinstance(cfg.get(key), Mapping)
        code = _code(marked[key] if merges else value)
        lines.append(f'{key}.merge({code})' if merges else f'{key} = {code}')
    return '\n'.join(lines) + '\n'


def _code(value: object) -> str:
    return pformat(value, width=WIDTH, sort_dicts=False)


def _over(value: object, base: object) -> object:
    """Mark dicts that replace something else than a dict, as mmengine asks for."""
    if not isinstance(value, Mapping):
        return value
    if not isinstance(base, Mapping):
        return dict(_delete_=True, **value)
    return {k: _over(item, base[k]) if k in base else item for k, item in value.items()}


def _base_path(base: str, out: str) -> str:
    """Relative within a project; absolute into an installed package, which does not move along."""
    path = Path(base).resolve()
    if '.mim' in path.parts or 'site-packages' in path.parts:
        return str(path)
    return Path(os.path.relpath(path, Path(out).resolve().parent)).as_posix()


def _module(base: str, out: str) -> str:
    """Return a config's name for an import relative to another file."""
    path = os.path.relpath(Path(base).resolve().with_suffix(''), Path(out).resolve().parent)
    *parts, name = Path(path).parts
    up = parts.count('..')
    names = [*parts[up:], name]
    if not all(part.isidentifier() for part in names):
        raise ValueError(
            '--out must be a place from which the config can be imported by read_base (write it '
            f'beside the config, whose name must be that of a Python module), got {out!r} and '
            f'{base!r}'
        )
    return '.' * (up + 1) + '.'.join(names)

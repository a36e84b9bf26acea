"""What each part of a dense config is replaced by, and how sparse it becomes.

The table below is the only place with these values. Each row names where its value was found.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from ..analysis.dense import SCOPE, resolve_type
from ..models.backbones.sparse_backbone import SparseBackbone
from ..models.backbones.vit import SparseVisionTransformer
from ..registry import MODELS as SPARSE_MODELS

# Names on the command line, and the parts of a model that they stand for.
MASK_HEAD = 'roi_head.mask_head'  # a part within a part
HEADS = (
    *('decode_head', 'rpn_head', 'roi_head', MASK_HEAD),
    *('bbox_head', 'mask_head', 'panoptic_head'),
)
PARTS = {'backbone': ('backbone',), 'neck': ('neck',), 'head': HEADS}
LIGHT = dict(type='mmdynsparse.LowRankFastPath')
PROPOSALS = dict(keep_ratio=0.3)
MASKS = dict(keep_ratio=0.5)


class Row(NamedTuple):
    """Sparsity of one type.

    Attributes:
        type: Name of the sparse class.
        training: Whether the sparsity has to be trained.
        sparsity: The argument of the class; None is its faster dense form.
        source: Where the value was found.
        scope: Default scope of the configs that the row is for, None for any.
    """

    type: str
    training: bool
    sparsity: dict | None
    source: str
    scope: str | None = None


PUBLISHED = 'Rao et al., arXiv 2207.01580'
ROI = 'no training: docs/whole-model.md, RoI heads'
COARSE = 'by coarser levels: docs/whole-model.md, heads of one-stage detectors'
ENTROPY = 'by entropy: docs/study.md, claim 5'
FASTER = 'a faster dense backbone: docs/whole-model.md, accuracy without training'
TABLE = (
    Row('SparseSwinTransformer', True, dict(keep_ratio=0.7), 'docs/study.md, claims 1 and 8'),
    Row('SparseConvNeXt', True, dict(keep_ratio=0.7), PUBLISHED),
    Row(
        'SparseResNet',
        True,
        dict(keep_ratio=0.7, fast_path=LIGHT),
        'docs/study.md, claim 7 and trials',
        scope='mmdet',
    ),
    Row('SparseResNet', True, dict(keep_ratio=0.7), 'docs/study.md, claim 1'),
    Row('SparseResNetV1c', True, dict(keep_ratio=0.7), 'docs/study.md, claim 1'),
    Row('SparseResNetV1d', True, dict(keep_ratio=0.7), 'as SparseResNetV1c'),
    Row('SparseVisionTransformer', True, dict(keep_ratio=0.7), PUBLISHED),
    *(Row('SparseUPerHead', training, dict(keep_ratio=0.3), ENTROPY) for training in (True, False)),
    Row('SparseFPN', True, dict(keep_ratio=0.6), 'docs/study.md, claim 10'),
    Row('SparseRPNHead', True, dict(), 'follows the neck: docs/study.md, claim 10'),
    *(Row('SparseStandardRoIHead', training, PROPOSALS, ROI) for training in (True, False)),
    *(Row('SparseCascadeRoIHead', training, PROPOSALS, ROI) for training in (True, False)),
    *(Row('SparseFCNMaskHead', training, MASKS, ROI) for training in (True, False)),
    Row('SparseRetinaHead', True, dict(keep_ratio=0.3), COARSE),
    Row('SparseFCOSHead', True, dict(keep_ratio=0.3), COARSE),
    Row('SparseATSSHead', True, dict(keep_ratio=0.3), COARSE),
    Row('SparseGFLHead', True, dict(keep_ratio=0.3), COARSE),
    Row('SparseSwinTransformer', False, None, FASTER),
    Row('SparseConvNeXt', False, None, FASTER),
    Row('SparseResNet', False, None, FASTER),
    Row('SparseResNetV1c', False, None, FASTER),
    Row('SparseResNetV1d', False, None, FASTER),
    Row('SparseVisionTransformer', False, None, FASTER),
    Row('SparseRPNHead', False, None, 'a faster NMS: docs/whole-model.md, SparseFPN'),
    Row('SparseRetinaHead', False, dict(keep_ratio=0.3), COARSE),
)


class Part(NamedTuple):
    """What becomes of one part of a model.

    Attributes:
        key: Its key in the model's config, with a dot where it is within another part.
        before: Its type.
        after: The type that replaces it, or None if it stays.
        sparsity: The new ``sparsity``, or None for the dense form of the new type.
        note: Source of the value, or why the part stays.
    """

    key: str
    before: str
    after: str | None
    sparsity: dict | None
    note: str

    @property
    def changes(self) -> dict:
        """The entries of the part's config that change."""
        sparsity = {} if self.sparsity is None else dict(sparsity=deepcopy(self.sparsity))
        return dict(type=self.after, **sparsity)


def swap_parts(
    model_cfg: Mapping, scope: str, parts: Sequence[str] = tuple(PARTS), training: bool = True
) -> list[Part]:
    """Look for the sparse counterpart of each part of a model.

    A part is built to see whether its arguments go with the sparsity. A backbone that does not
    take it becomes the faster dense one; any other part stays.

    Args:
        model_cfg: The ``model`` of a config, with types as strings. It is not changed.
        scope: Default scope of the config, which is also mmengine's current one.
        parts: Some of ``PARTS``. Defaults to all.
        training: Whether what has to be trained is wanted. Defaults to True.

    Returns:
        One entry for each part of ``PARTS`` that the model has, those that stay included.

    Raises:
        ValueError: If no part has a counterpart.
    """
    if not isinstance(model_cfg.get('backbone'), Mapping):
        raise ValueError(
            'config must have a model with a backbone, got one of type '
            f'{model_cfg.get("type")!r} with the parts {_dicts(model_cfg)}'
        )
    found = []
    for name, keys in PARTS.items():
        for key in keys:
            if find_part(model_cfg, key) is not None:
                wanted = name in parts
                found.append(_swap(key, model_cfg, scope, training, wanted, found))
    if not any(part.after for part in found):
        types = sorted(name for name, cls in _sparse_classes().items() if cls.original)
        stays = '; '.join(f'{part.key} {part.before}: {part.note}' for part in found)
        raise ValueError(
            f'config must have a part with a sparse counterpart ({", ".join(types)}), got {stays}'
        )
    return found


def _swap(
    key: str,
    model_cfg: Mapping,
    scope: str,
    training: bool,
    wanted: bool,
    before: Sequence[Part],
) -> Part:
    """Decide about one part; ``before`` are the parts that were decided before."""
    node = find_part(model_cfg, key)
    if not isinstance(node, Mapping):
        types = ' + '.join(_short(item['type']) for item in node)
        return Part(key, types, None, None, 'stays: only a single module is replaced')
    kind = _short(node['type'])
    stays = Part(key, kind, None, None, '')
    if not wanted:
        return stays._replace(note='stays: not among --parts')
    cls = counterpart(node['type'])
    if cls is None:
        return stays._replace(note=_why_unknown(node['type']))
    if key == 'decode_head' and not model_cfg.get('neck') and _is_plain_vit(model_cfg):
        return stays._replace(note='stays: all maps of the backbone have one size')
    row = _row(cls.__name__, scope, training)
    if row is None:
        return stays._replace(note='stays: its sparsity has to be trained')
    if row.sparsity == {} and not any(p.key == 'neck' and p.sparsity for p in before):
        row = _row(cls.__name__, scope, training=False)  # there is no sparse neck to follow
    if key == MASK_HEAD and not any(p.key == 'roi_head' and p.after for p in before):
        return stays._replace(note='stays: its RoI head is none that chooses regions')
    note = row.source
    for sparsity in (row.sparsity, None) if key == 'backbone' else (row.sparsity,):
        part = Part(key, kind, f'{SCOPE}{cls.__name__}', sparsity, note)
        reason = _fault(node, part)
        if reason is None:
            return part
        note = f'without sparsity: {reason}'
    return stays._replace(note=f'stays: {reason}')


def find_part(cfg: Mapping, key: str) -> object:
    """Return what a config has under a key with dots, None if there is nothing."""
    for name in key.split('.'):
        cfg = cfg.get(name) if isinstance(cfg, Mapping) else None
    return cfg


def changes_of(parts: Sequence[Part]) -> dict:
    """Return the changes of a model's config, those of parts within parts included."""
    changes = {}
    for part in parts:
        if part.after:
            *outer, last = part.key.split('.')
            node = changes
            for name in outer:
                node = node.setdefault(name, {})
            node.setdefault(last, {}).update(part.changes)
    return changes


def counterpart(kind: str) -> type | None:
    """Return the sparse class that stands for a dense type, None if there is none.

    Args:
        kind: The dense type, as a config under mmengine's current default scope names it.
    """
    dense = resolve_type(kind)
    for cls in _sparse_classes().values():
        original = resolve_type(cls.original)
        same = cls.original == kind if dense is None or original is None else original is dense
        # Heads and necks subclass their original: another library's of that name has other weights.
        if same and (issubclass(cls, SparseBackbone) or original in cls.__mro__):
            return cls
    return None


def _sparse_classes() -> dict[str, type]:
    SPARSE_MODELS.import_from_location()
    classes = SPARSE_MODELS.module_dict
    return {name: cls for name, cls in classes.items() if hasattr(cls, 'original')}


def _row(name: str, scope: str, training: bool) -> Row | None:
    rows = (row for row in TABLE if (row.type, row.training) == (name, training))
    return next((row for row in rows if row.scope in (None, scope)), None)


def _is_plain_vit(model_cfg: Mapping) -> bool:
    cls = counterpart(model_cfg['backbone']['type'])
    return cls is not None and issubclass(cls, SparseVisionTransformer)


def _why_unknown(kind: str) -> str:
    name = kind.removeprefix(SCOPE)
    if name not in _sparse_classes():
        return 'stays: no sparse counterpart'
    if kind.startswith(SCOPE):
        return 'stays: is a sparse type already'
    return f'stays: no such type, write {SCOPE}{name}'


def _fault(node: Mapping, part: Part) -> str | None:
    """Build a part as it will be; return in one line why that fails."""
    cfg = ConfigDict(deepcopy(dict(node)))
    cfg.merge(part.changes)
    for key in ('init_cfg', 'pretrained'):  # nothing is downloaded
        cfg.pop(key, None)
    try:
        MODELS.build(cfg)
    except Exception as error:  # whatever a constructor says about its arguments
        return ' '.join(str(error).split())[:160]
    return None


def _dicts(cfg: Mapping) -> list[str]:
    return [key for key, value in cfg.items() if isinstance(value, Mapping)]


def _short(kind: str) -> str:
    """Name a type without the modules that a lazy config puts before it."""
    return kind if kind.count('.') < 2 else kind.rsplit('.', 1)[1]

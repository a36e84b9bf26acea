"""Which parts of stock configs are replaced, and by what."""

import sys
from pathlib import Path

import pytest
from mmengine.registry import init_default_scope

sys.path.insert(0, str(Path(__file__).parent))
from stock import DET, SEG, stock_path

from mmdynsparse.models.decider import keep_ratios
from mmdynsparse.sparsify import PARTS, TABLE, draft_config, swap_parts
from mmdynsparse.sparsify.build import build_models, set_budget
from mmdynsparse.sparsify.counterparts import _sparse_classes, counterpart

STOCK = [*(('mmseg', name) for name in SEG), *(('mmdet', name) for name in DET)]
# Of each library one with a sparse head or neck, one without, and one where nothing is.
FAST = {
    'fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py',
    'upernet/upernet_r18_4xb2-80k_cityscapes-512x1024.py',
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    'atss/atss_r50_fpn_1x_coco.py',
    'convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
}


@pytest.mark.parametrize(
    ('library', 'name'),
    [pytest.param(*x, marks=() if x[1] in FAST else pytest.mark.slow) for x in STOCK],
    ids=[name.split('/')[1] for _, name in STOCK],
)
def test_stock_config(library: str, name: str) -> None:
    """The parts that have a counterpart are replaced; the others stay and say why."""
    expected = {**SEG, **DET}[name].split()
    path = str(stock_path(library, name))
    if not expected:
        with pytest.raises(ValueError, match='no sparse counterpart'):
            draft_config(path)
        return
    draft = draft_config(path)
    replaced = {part.key for part in draft.parts if part.after}
    assert expected == [part for part, keys in PARTS.items() if replaced & set(keys)]
    for part in draft.parts:
        assert part.note.startswith('stays: ') == (part.after is None)
    assert set(draft.changes['model']) == {key.split('.')[0] for key in replaced}
    # RoI heads have nothing to learn.
    learns = any(part.sparsity and not part.key.startswith('roi_head') for part in draft.parts)
    assert learns == ('custom_hooks' in draft.changes)


def test_mask_head_goes_with_its_roi_head() -> None:
    path = stock_path('mmdet', 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py')
    draft = draft_config(str(path), training=False)
    roi_head = draft.changes['model']['roi_head']
    assert roi_head['type'] == 'mmdynsparse.SparseCascadeRoIHead'
    assert roi_head['mask_head']['type'] == 'mmdynsparse.SparseFCNMaskHead'
    model, _ = build_models(draft)
    set_budget(draft, model, 0.5, lambda: 0.1 + keep_ratios(model)[0])
    assert (
        roi_head['mask_head']['sparsity']['keep_ratio']
        == model.roi_head.mask_head[0].decider.keep_ratios[0]
    )
    model_cfg = dict(draft.cfg['model'])
    model_cfg['roi_head'] = dict(model_cfg['roi_head'], type='PISARoIHead')
    notes = {part.key: part.note for part in swap_parts(model_cfg, 'mmdet', training=False)}
    assert notes['roi_head'] == 'stays: no sparse counterpart'
    assert notes['roi_head.mask_head'] == 'stays: its RoI head is none that chooses regions'


def test_a_one_stage_head_without_training() -> None:
    """Coarser levels choose the cells of RetinaNet; group norms have to be trained."""
    for name, after in (('retinanet_r50', 'SparseRetinaHead'), ('atss_r50', None)):
        path = stock_path('mmdet', f'{name.split("_")[0]}/{name}_fpn_1x_coco.py')
        parts = {part.key: part for part in draft_config(str(path), training=False).parts}
        assert parts['bbox_head'].after == (after and f'mmdynsparse.{after}')
        assert parts['neck'].after is None
    assert parts['bbox_head'].note == 'stays: its sparsity has to be trained'


def test_enough_stock_configs_have_a_counterpart() -> None:
    assert sum(map(bool, SEG.values())) >= 20
    assert sum(map(bool, DET.values())) >= 20


def test_table_has_each_type_once() -> None:
    keys = [(row.type, row.training, row.scope) for row in TABLE]
    assert len(keys) == len(set(keys))
    types = {row.type for row in TABLE if row.training}
    # No library has an original of LV-ViT.
    assert types == set(_sparse_classes()) - {'SparseLVViT'}
    assert all(row.source for row in TABLE)


def test_same_name_in_another_library_is_no_counterpart() -> None:
    init_default_scope('mmdet')
    assert counterpart('FPN').__name__ == 'SparseFPN'
    assert counterpart('mmdet.FPN').__name__ == 'SparseFPN'
    init_default_scope('mmseg')
    assert counterpart('FPN') is None
    assert counterpart('mmseg.UPerHead').__name__ == 'SparseUPerHead'
    assert counterpart('mmpretrain.ConvNeXt').__name__ == 'SparseConvNeXt'


def test_backbone_without_its_scope() -> None:
    init_default_scope('mmseg')
    model = dict(type='EncoderDecoder', backbone=dict(type='SparseSwinTransformer'))
    with pytest.raises(ValueError, match=r'write mmdynsparse\.SparseSwinTransformer'):
        swap_parts(model, 'mmseg')
    model['backbone']['type'] = 'mmdynsparse.SparseSwinTransformer'
    with pytest.raises(ValueError, match='is a sparse type already'):
        swap_parts(model, 'mmseg')
    with pytest.raises(ValueError, match='must have a model with a backbone'):
        swap_parts(dict(type='SoftTeacher', detector={}), 'mmdet')

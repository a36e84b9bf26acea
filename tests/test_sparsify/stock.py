"""Stock configs of the installed libraries, and which of their parts are replaced."""

import importlib.util
from pathlib import Path

SEG = {
    'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': 'backbone head',
    'swin/swin-base-patch4-window12-in22k-384x384-pre_upernet_8xb2-160k_ade20k-512x512.py': (
        'backbone head'
    ),
    'convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': 'backbone head',
    'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py': 'backbone head',
    'upernet/upernet_r18_4xb2-80k_cityscapes-512x1024.py': 'backbone head',
    'vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py': 'backbone head',
    'vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py': 'backbone',
    'segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512.py': 'backbone',
    'setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512.py': 'backbone',
    'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py': 'backbone',
    'fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py': 'backbone',
    'pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py': 'backbone',
    'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py': 'backbone',
    'deeplabv3/deeplabv3_r18b-d8_4xb2-80k_cityscapes-512x1024.py': 'backbone',
    'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': 'backbone',
    'point_rend/pointrend_r50_4xb4-160k_ade20k-512x512.py': 'backbone',
    'ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py': 'backbone',
    'knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py': 'backbone',
    'mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py': 'backbone',
    'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': 'backbone',
    'encnet/encnet_r50-d8_4xb4-160k_ade20k-512x512.py': 'backbone',
    'icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py': '',
    'twins/twins_svt-s_uperhead_8xb2-160k_ade20k-512x512.py': 'head',
    'beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py': 'head',
    'poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py': '',
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': '',
}
DET = {
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': 'backbone neck head',
    'mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py': 'backbone neck head',
    'faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py': 'backbone neck head',
    'faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py': 'backbone head',
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': 'backbone neck head',
    'swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py': 'backbone neck head',
    'convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py': 'backbone neck head',
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': 'backbone neck head',
    'htc/htc-without-semantic_r50_fpn_1x_coco.py': 'backbone neck head',
    'retinanet/retinanet_r50_fpn_1x_coco.py': 'backbone neck head',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 'backbone neck head',
    'atss/atss_r50_fpn_1x_coco.py': 'backbone neck head',
    'gfl/gfl_r50_fpn_1x_coco.py': 'backbone neck head',
    'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py': 'backbone neck head',
    'gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py': 'backbone head',
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': 'backbone neck head',
    'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py': 'backbone head',
    'detr/detr_r50_8xb2-150e_coco.py': 'backbone',
    'dino/dino-4scale_r50_8xb2-12e_coco.py': 'backbone',
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py': 'backbone',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': 'backbone',
    'solov2/solov2_r50_fpn_1x_coco.py': 'backbone neck',
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py': 'backbone neck',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py': '',
    'yolox/yolox_s_8xb8-300e_coco.py': '',
    'hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py': 'head',
}


def stock_path(library: str, name: str) -> Path:
    """Return the path of a config that an installed library ships."""
    package = Path(importlib.util.find_spec(library).origin).parent
    return package / '.mim' / 'configs' / name

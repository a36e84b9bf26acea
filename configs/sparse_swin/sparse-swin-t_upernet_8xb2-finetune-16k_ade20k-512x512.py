# Fine-tuning of mmsegmentation's dense model.
_base_ = [
    '../_base_/models/upernet_swin.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/seg_sparse-16k.py',
    '../_base_/seg_runtime.py',
]
model = dict(backbone=dict(type='mmdynsparse.SparseSwinTransformer', sparsity=dict(keep_ratio=0.7)))
load_from = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/swin/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth'

# Dense UperNet + Swin-N on CamVid, for accuracy_study.py. Batches of 4 in bfloat16, for a CPU.
_base_ = '../../configs/sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py'
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)

# Dense UperNet + Swin-N on CamVid, for headline_study.py. Batches of 4, for a CPU.
_base_ = '../../configs/sparse_swin/swin-n_upernet_1xb8-2k_camvid-256x256.py'
train_dataloader = dict(batch_size=4)

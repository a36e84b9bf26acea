# mmsegmentation's default schedule: SGD with weight decay, ten times the rate of Segmenter's.
_base_ = './seg_sgd-160k.py'
optim_wrapper = dict(optimizer=dict(lr=0.01, weight_decay=0.0005))

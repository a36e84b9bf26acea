"""Two gloo processes and one process are the same training."""

import multiprocessing as mp

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel

from mmdynsparse.engine.hooks.sparsity_hook import sparsity_losses
from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.ops import select


class Model(BaseModel):
    def __init__(self, keep_ratio=0.7, **swin):
        super().__init__()
        self.backbone = SparseSwinTransformer(
            **swin, drop_path_rate=0.0, sparsity=dict(keep_ratio=keep_ratio)
        )

    def forward(self, inputs, mode='loss'):
        outs = self.backbone(inputs)
        task = sum((out - inputs.mean()).square().mean() for out in outs)
        return dict(loss_task=task, **sparsity_losses(self.backbone.decisions, 10.0))


def losses_and_grads(model, images):
    """Do two training steps, so that a parameter left unused by DDP would raise."""
    for _ in range(2):
        model.zero_grad()
        losses = model(images)
        (losses['loss_task'] + losses['loss_keep_ratio']).backward()
    named = model.named_parameters()
    return {name.removeprefix('module.'): p.grad for name, p in named if p.requires_grad}


def worker(rank, model, images, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/init', rank=rank, world_size=2)
    wrapped = MMDistributedDataParallel(model)
    grads = losses_and_grads(wrapped, images.chunk(2)[rank])
    torch.save(grads, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(keep_ratio=1.0),
        dict(with_cp=True),
        dict(frozen_stages=3),
        dict(out_indices=(1, 2)),
    ],
)
def test_two_processes_give_the_gradients_of_one(
    kwargs, tmp_path, tiny_swin, randomize, monkeypatch
):
    # Each process draws its own noise, so the comparison is without it.
    monkeypatch.setattr(select.F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))
    model = randomize(Model(**tiny_swin, **kwargs), std=0.05).train()
    model.backbone.has_ratio_loss = True
    images = torch.randn(4, 3, 64, 64)
    images -= images.mean((1, 2, 3), keepdim=True)
    context = mp.get_context('fork')
    processes = [
        context.Process(target=worker, args=(rank, model, images, tmp_path)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = losses_and_grads(model, images)
    for rank in range(2):
        grads = torch.load(tmp_path / f'{rank}.pth')
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-3, msg=name)

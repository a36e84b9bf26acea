"""A tiny model and a runner for it, which the tests of hooks share."""

import json
import logging
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdynsparse.models import SparseSwinTransformer


class Model(BaseModel):
    """The smallest model with a sparse backbone: it learns the mean brightness."""

    def __init__(self, **sparsity):
        super().__init__()
        self.backbone = SparseSwinTransformer(
            embed_dims=8,
            depths=(1, 1, 3, 1),
            num_heads=(1, 2, 2, 2),
            out_indices=(3,),
            drop_path_rate=0.0,
            sparsity=dict(keep_ratio=0.7, locations={2: (0, 1, 2)}) | sparsity,
        )

    def forward(self, inputs, mode='tensor'):
        error = self.backbone(inputs)[-1].mean((1, 2, 3)) - inputs.mean((1, 2, 3))
        return dict(loss_task=error.square().mean()) if mode == 'loss' else error


class Count(BaseMetric):
    """Metric that any model passes."""

    def process(self, data_batch, data_samples):
        self.results.append(len(data_samples))

    def compute_metrics(self, results):
        return dict(images=sum(results))


def _images(count):
    return [
        torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)
    ]


def _loader(images, batch):
    return DataLoader(images, batch, collate_fn=lambda items: dict(inputs=torch.stack(items)))


class Training:
    """A training of the tiny model that logs every iteration."""

    def __init__(self, folder, hooks=(), iters=4, model=None, **kwargs):
        torch.manual_seed(0)
        arguments = dict(
            model=model or Model(),
            work_dir=str(folder),
            # mmengine sleeps between epochs.
            train_dataloader=_loader(_images(8) * iters, 2),
            val_dataloader=_loader(_images(2), 2),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.002)),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters),
            val_cfg={},
            val_evaluator=Evaluator(Count()),
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False),
            ),
            log_processor=dict(window_size=1, by_epoch=False),
            visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
            custom_hooks=[dict(type='mmdynsparse.SparsityHook'), *hooks],
            randomness=dict(seed=0),
            experiment_name=f'{folder}_{iters}_{kwargs.get("resume")}'.replace('/', '_'),
        )
        self.runner = Runner(**arguments | kwargs)

    def run(self):
        self.runner.train()
        return self

    @property
    def model(self):
        return self.runner.model

    @property
    def log(self):
        """Lines of the training log of this run as dicts."""
        path = next(Path(self.runner.log_dir).glob('vis_data/scalars.json'))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if 'loss' in line]


@pytest.fixture
def training(tmp_path):
    """Function that trains the tiny model with some hooks."""

    def train(*hooks, folder='run', **kwargs):
        return Training(tmp_path / folder, hooks, **kwargs).run()

    return train


@pytest.fixture
def warnings_of(monkeypatch):
    """Function that collects the warnings of a module of hooks."""

    def collect(module):
        texts = []

        def note(text, logger=None, level=logging.INFO):
            if level == logging.WARNING:
                texts.append(text)

        monkeypatch.setattr(module, 'print_log', note)
        return texts

    return collect

"""One model evaluated at several budgets and keep ratios."""

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdynsparse.models import SparseSwinTransformer
from mmdynsparse.models.budgets import add_budgets


class Model(BaseModel):
    def __init__(self, tiny_swin):
        super().__init__()
        sparsity = dict(keep_ratio=0.8, schedule='power')
        self.backbone = SparseSwinTransformer(**tiny_swin, sparsity=sparsity)

    def forward(self, inputs, mode='tensor'):
        self.backbone(inputs)
        kept = self.backbone.decisions[0].mask.mean(1)
        return [dict(kept=round(rate, 3)) for rate in kept.tolist()]


class Kept(BaseMetric):
    """The mean share that the first predictor keeps."""

    def process(self, data_batch, data_samples):
        self.results += [sample['kept'] for sample in data_samples]

    def compute_metrics(self, results):
        if any(rate < 0.1 for rate in results):
            raise RuntimeError('too little')
        return dict(kept=sum(results) / len(results))


@pytest.fixture
def evaluate(tmp_path, tiny_swin):
    def run(**cfg):
        model = Model(tiny_swin)
        add_budgets(model, {'0.6': {'backbone': [0.4, 0.3, 0.2]}})
        images = [torch.randn(3, 160, 160) for _ in range(3)]
        loader = DataLoader(images, 2, collate_fn=lambda b: dict(inputs=torch.stack(b)))
        runner = Runner(
            model,
            str(tmp_path),
            test_dataloader=loader,
            test_cfg=dict(type='mmdynsparse.MultiBudgetTestLoop', **cfg),
            test_evaluator=Evaluator(Kept()),
            custom_hooks=[dict(type='mmdynsparse.SparsityHook')],
            experiment_name=str(tmp_path).replace('/', '_') + str(len(cfg)),
        )
        return runner

    return run


def test_metrics_of_each_budget_and_of_the_model_as_it_is(evaluate):
    runner = evaluate(budgets=['0.6', '1.0'], keep_ratios=[0.5])
    metrics = runner.test()
    # Of 100 locations.
    kept = {'budget=0.6/kept': 0.4, 'budget=1.0/kept': 1.0, 'r=0.5/kept': 0.5, 'kept': 0.8}
    assert metrics == pytest.approx(kept)
    assert runner.model.backbone.keep_ratios == [0.8, 0.64, 0.512]
    rate = runner.message_hub.get_scalar('test/eval_keep_rate_0').current()
    assert rate == pytest.approx(0.8)


def test_the_keep_ratios_come_back_after_an_error(evaluate):
    runner = evaluate(keep_ratios=[0.05])
    with pytest.raises(RuntimeError, match='too little'):
        runner.test()
    assert runner.model.backbone.keep_ratios == [0.8, 0.64, 0.512]


def test_bad_arguments(evaluate):
    with pytest.raises(ValueError, match='needs budgets or keep_ratios'):
        evaluate().test()
    with pytest.raises(ValueError, match=r'keep_ratio must be a number in \(0, 1\], got 1.5'):
        evaluate(keep_ratios=[1.5]).test()
    with pytest.raises(ValueError, match=r'one that the model has \(0.6\), got 0.3'):
        evaluate(budgets=['0.3']).test()

import pytest
import torch

from mmdynsparse.engine import runs
from mmdynsparse.engine.runs import seed_each_process


@pytest.fixture
def draw(monkeypatch):
    """Function that draws a number in a process and an iteration that training starts from."""

    def number(rank, iteration, seed=0):
        monkeypatch.setattr(runs, 'get_dist_info', lambda: (rank, 2))
        torch.manual_seed(seed)
        seed_each_process(iteration)
        return torch.rand(()).item()

    return number


def test_numbers_depend_on_seed_rank_and_iteration(draw):
    settings = [(0, 0), (1, 0), (0, 4), (1, 4), (0, 0, 1), (1, 0, 1)]
    numbers = [draw(*setting) for setting in settings]
    assert len(set(numbers)) == len(settings)
    assert numbers == [draw(*setting) for setting in settings]


def test_the_first_process_of_a_new_training_keeps_its_seed(draw):
    torch.manual_seed(0)
    assert torch.rand(()).item() == draw(0, 0)

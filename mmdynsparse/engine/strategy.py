"""Sharded training."""

from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from ..registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's ``FSDPStrategy`` that can resume.

    mmengine 0.10 passes the arguments of ``optim_state_dict_to_load`` in the order of torch 2.0.
    """

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the state of the optimizer, which ``optim_state_dict`` returned."""
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                model=self.model, optim=self.optim_wrapper, optim_state_dict=state_dict
            )
        )

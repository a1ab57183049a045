"""FSDP: the plain engine with every weight, gradient and moment spread over the processes.

For encoders that fill a device; one of DistilBERT's size gains nothing. Between steps a weight is a DTensor, of which a
process holds its rows. Whatever leaves the engine (checkpoints, the best weights, the saved model) is whole.
"""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import models
from engine import PlainEngine
from models import encoder_blocks, full_tensor, shard_like


class ShardedAdamW(torch.optim.AdamW):
    """AdamW over shards, whose state is saved and loaded whole. All processes take part in both."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with whole tensors."""
        state = super().state_dict()
        moments = {
            number: {name: full_tensor(value) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave, in any process."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        moments = {
            number: {
                name: shard_like(parameters[number], value) if value.ndim else value for name, value in entry.items()
            }
            for number, entry in state["state"].items()
        }
        super().load_state_dict({**state, "state": moments})


class ShardedEngine(PlainEngine):
    """PlainEngine over FSDP2 (torch's `fully_shard`): a block's weights are whole only while it computes."""

    def __init__(self, model: nn.Module, accelerator: Accelerator, **settings: Any) -> None:
        self.to_save = copy.deepcopy(model.cpu()) if accelerator.is_main_process else None
        model.to(accelerator.device)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for module in (*encoder_blocks(base)[1], model):
            fully_shard(module, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sums: the loss is divided by the whole batch already
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        super().__init__(model, accelerator, "FSDP", **settings)
        self.distributed = False  # the backward pass itself sums up the gradients

    def make_optimizer(self, groups: list[dict[str, Any]], lr: float, fused: bool) -> torch.optim.Optimizer:
        return ShardedAdamW(groups, lr=lr, fused=fused)

    def model_to_save(self) -> nn.Module | None:
        trained = models.trained_state(self.model)
        if self.to_save is not None:
            models.load_trained_state(self.to_save, trained)
        return self.to_save

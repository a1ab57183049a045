"""How a model computes and learns: on the fast path, or on transformers' own modules, behind one interface."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

import fast
from data import Batch, TokenSplit, sorted_batches
from device import tokens_at_once
from models import encoder_blocks, full_tensor
from optim import adamw_for

EVAL_BATCH_SIZE = 64


class Engine(Protocol):
    """What the training loop needs of a model: logits, and the step that follows a backward pass."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def forward(self, batch: Batch) -> Tensor:
        """A batch on the device -> logits [B, classes] in fp32."""
        ...

    def step(self) -> None:
        """Sum up the gradients of all processes, clip their global norm, update, and forget them.

        Nothing is updated if the gradient is not finite. A GPU may still be computing when this returns.
        """
        ...

    def stepped(self) -> bool:
        """Whether the last step updated anything; waits for a GPU."""
        ...

    def train_mode(self) -> None:
        """Turn dropout on, except in frozen layers."""
        ...

    def settle(self) -> None:
        """Bring every weight of the module up to date, for whoever reads it next."""
        ...

    def model_to_save(self) -> nn.Module | None:
        """The module with all its weights, for the main process to save; all processes take part."""
        ...


def make_engine(
    model: nn.Module,
    accelerator: Accelerator,
    *,
    precision: str,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
    frozen_prefix: int = 0,
    plain: bool = False,
) -> Engine:
    """The fast path where it can run this model (it gives the same answer to rounding), else the plain one.

    frozen_prefix: this many of the lowest layers, and the embeddings, run without dropout.
    """
    reason = "--plain" if plain else fast.supports(model)
    settings = (precision, lr, weight_decay, max_grad_norm or None, frozen_prefix)
    return PlainEngine(model, accelerator, reason, *settings) if reason else FastEngine(model, accelerator, *settings)


class FastEngine:
    """fast.py and optim.py: hand-written forward and backward, one flat gradient, lazy embedding rows.

    On CPU what lies between the matrix products is compiled (kernels.py) where there is a compiler, and the products
    too (tiles.py): those in fp32, and those in bf16 where the processor has instructions for them, AMX or AVX512-BF16.
    On a GPU a step is three captured graphs (graphs.py).
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        precision: str,
        lr: float,
        weight_decay: float,
        max_grad_norm: float | None,
        frozen_prefix: int,
    ) -> None:
        self.model, self.frozen_prefix = model, frozen_prefix
        self.distributed = accelerator.num_processes > 1
        self.classifier = fast.FastClassifier(model, precision, frozen_prefix, self.distributed)
        self.optimizer = adamw_for(self.classifier, lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        compiled, products, graphed = self.classifier.compiled, self.classifier.recordable, self.classifier.graphed
        self.name = "fast" + ", compiled kernels" * compiled + " and products" * products + ", graphs" * graphed
        self.name += " and Triton" * (graphed and self.optimizer.kernel is not None)

    def forward(self, batch: Batch) -> Tensor:
        if batch.hidden is not None:
            return self.classifier.suffix(batch.hidden, batch.lengths, batch.first, batch.whole)
        return self.classifier(batch.input_ids, batch.lengths, batch.first, batch.whole)

    def train_mode(self) -> None:
        self.model.train()

    def step(self) -> None:
        if self.distributed:
            self.optimizer.all_reduce()
        self.norm = self.optimizer.step()
        self.optimizer.zero_grad()

    def stepped(self) -> bool:
        return math.isfinite(self.norm)

    def settle(self) -> None:
        self.optimizer.flush()

    def model_to_save(self) -> nn.Module | None:
        return self.model


def plain_logits(model: nn.Module, batch: Batch, precision: str) -> Tensor:
    """[B, classes] fp32 from the module's own forward pass, under autocast for bf16."""
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()


def state_reader(model: nn.Module, precision: str, pooling: str) -> Callable[[Batch], Tensor]:
    """batch -> [B, width] fp32: `pooled_states`, on the fast path where it can run this model."""
    if pooling == "cls" and fast.supports(model) is None:
        classifier = fast.FastClassifier(model, precision)
        return lambda batch: classifier.states(batch.input_ids, batch.lengths)
    return partial(pooled_states, model.base_model, precision=precision, pooling=pooling)


def pooled_states(encoder: nn.Module, batch: Batch, precision: str, pooling: str) -> Tensor:
    """[B, width] fp32: the last layer's state at CLS, or ("mean") its mean over the tokens."""
    mask = batch.attention_mask
    with torch.autocast(mask.device.type, torch.bfloat16, enabled=precision == "bf16"):
        states = encoder(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state.float()  # [B, L, width]
    if pooling == "cls":
        return states[:, 0]
    return (states * mask[:, :, None]).sum(dim=1) / batch.lengths[:, None]


class PlainEngine:
    """The module as transformers and PEFT wrote it, under autocast, with torch's AdamW: the reference."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        reason: str,
        precision: str,
        lr: float,
        weight_decay: float,
        max_grad_norm: float | None,
        frozen_prefix: int,
    ) -> None:
        self.name = f"plain ({reason})"
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.frozen_prefix = frozen_prefix
        self.model, self.max_grad_norm, self.precision = model, max_grad_norm, precision
        self.distributed = accelerator.num_processes > 1
        if accelerator.process_index:  # the weights are drawn; the dropout of each process is to be its own
            torch.manual_seed(torch.initial_seed() + accelerator.process_index)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        groups = [  # no decay for biases and layer norms, whatever their names
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = self.make_optimizer(groups, lr, fused=self.trained[0].device.type in ("cpu", "cuda"))

    def make_optimizer(self, groups: list[dict[str, Any]], lr: float, fused: bool) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, fused=fused)

    def forward(self, batch: Batch) -> Tensor:
        return plain_logits(self.model, batch, self.precision)

    def train_mode(self) -> None:
        self.model.train()
        if self.frozen_prefix:
            self.base.base_model.eval()
            encoder_blocks(self.base)[1][self.frozen_prefix :].train()

    def step(self) -> None:
        if self.distributed:
            for parameter in self.trained:
                if parameter.grad is not None:  # one that the forward pass does not use, in any process
                    dist.all_reduce(parameter.grad)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm or math.inf))
        self.finite = math.isfinite(norm)
        if self.finite:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def stepped(self) -> bool:
        return self.finite

    def settle(self) -> None:
        pass

    def model_to_save(self) -> nn.Module | None:
        return self.model


@torch.inference_mode()
def predict_probabilities(engine: Engine, split: TokenSplit, accelerator: Accelerator) -> np.ndarray:
    """[n, classes] float64, in the order of the rows. Each row counts once, from one of the processes."""
    engine.model.eval()
    engine.settle()
    world = accelerator.num_processes
    parts, batches = [], list(sorted_batches(split.lengths, EVAL_BATCH_SIZE, tokens_at_once(accelerator.device)))
    for number in range(accelerator.process_index, -(-len(batches) // world) * world, world):
        indices = batches[min(number, len(batches) - 1)]  # in a last, short round all take part, for FSDP's sake
        logits = engine.forward(split.batch(indices).to(accelerator.device))
        if number < len(batches):
            parts.append((indices, logits.cpu().double().softmax(dim=-1).numpy()))
    if world > 1:
        parts = gather_object(parts)
    rows = np.concatenate([indices for indices, _ in parts])
    values = np.concatenate([probabilities for _, probabilities in parts])
    ordered = np.empty_like(values)
    ordered[rows] = values
    return ordered

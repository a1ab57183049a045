"""DistilBERT for sequence classification, written out by hand: forward, backward, bf16, LoRA.

The parameters stay those of the Hugging Face (or PEFT) module; this file only computes with them. Shapes:
B sequences, L tokens each (padded on the right), N = B * L, D width, H heads, d = D / H, C classes, r rank.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import kernels
from dropout import Draw, random_seeds
from fused import FusedHead, FusedLayer
from graphs import Passes, Pool
from layers import DeviceAttention, DeviceLayer, Embedding, Head, Layer, Shape, Stream, total
from linear import Arena, base_layer
from tape import Tape, Workspace, empty, within
from tiles import own_floats

SITES = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")


def _classifier(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def supports(model: nn.Module) -> str | None:  # noqa: PLR0911
    """None if `FastClassifier` can run this model, else the reason in words."""
    inner = _classifier(model)
    if next(inner.parameters()).device.type not in ("cpu", "cuda"):
        return "it is written for cpu and cuda"
    if type(inner).__name__ != "DistilBertForSequenceClassification":
        return f"{type(inner).__name__} is not DistilBertForSequenceClassification"
    if inner.config.activation != "gelu":
        return f"activation {inner.config.activation!r} is not 'gelu'"
    if any(p.dtype != torch.float32 for p in model.parameters()):
        return "parameters are not all float32"
    for block in inner.distilbert.transformer.layer:
        modules = [block.get_submodule(name) for name in SITES]
        for name, module in zip(SITES, modules):
            if type(module) is not nn.Linear and (reason := _unsupported_lora(module)):
                return f"{name}: {reason}"
        for group in (modules[:3], modules[3:4], modules[4:5], modules[5:]):
            if len({p.requires_grad for m in group for p in base_layer(m).parameters()}) > 1:
                return "a linear layer is trainable in part"
            if len({m.r[m.active_adapters[0]] for m in group if hasattr(m, "lora_A")}) > 1:
                return "q_lin, k_lin and v_lin have different LoRA ranks"
    allowed = {id(p) for part in _read_parameters(inner) for p in part} | {
        id(inner.distilbert.embeddings.word_embeddings.weight)
    }
    strangers = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in allowed]
    return f"{strangers[0]} is trainable but unknown to the fast path" if strangers else None


def _unsupported_lora(module: nn.Module) -> str | None:
    """Why this adapted linear layer is more than base(x) + scaling * B(A(dropout(x)))."""
    if type(module).__name__ != "Linear" or not hasattr(module, "lora_A"):
        return f"{type(module).__name__} is neither nn.Linear nor a LoRA linear layer"
    if len(module.lora_A) != 1 or list(module.active_adapters) != list(module.lora_A):
        return "not exactly one active LoRA adapter"
    if module.lora_variant or module.merged or module.disable_adapters or any(module.lora_bias.values()):
        return "a LoRA variant (DoRA, bias, merged or disabled adapter)"
    if any(p.requires_grad for p in module.base_layer.parameters()):
        return "both the base layer and its adapter are trainable"
    return None


def _read_parameters(inner: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What the fast path reads but the word embeddings: the layers' matrices, and the rest.

    The parameters of one fused product stand side by side.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for block in inner.distilbert.transformer.layer:
        modules = [block.get_submodule(name) for name in SITES]
        matrices += [base_layer(m).weight for m in modules]
        for kind in ("lora_A", "lora_B"):
            matrices += [p for m in modules if hasattr(m, kind) for p in getattr(m, kind).parameters()]
        others += [base_layer(m).bias for m in modules]
        others += [*block.sa_layer_norm.parameters(), *block.output_layer_norm.parameters()]
    embeddings = inner.distilbert.embeddings
    others += [embeddings.position_embeddings.weight, *embeddings.LayerNorm.parameters()]
    others += [p for module in _head_modules(inner) for p in module.parameters()]
    return matrices, others


def _head_modules(inner: nn.Module) -> list[nn.Linear]:
    heads = (inner.pre_classifier, inner.classifier)
    return [h.modules_to_save[h.active_adapters[0]] if hasattr(h, "modules_to_save") else h for h in heads]


@dataclass
class Kept:
    """What backward needs of a forward pass."""

    embedding: tuple | None  # None: it has no gradient
    layers: list | None  # of those that ran, None where there is no gradient
    head: tuple
    shape: Shape
    replay: "Replay | None" = None  # the layers' memory is that of a recording


class Replay:
    """The layers on batches of one shape: recorded with the first (see tape.py), run again with the others.

    What is computed is the same to the bit: a step of 16 x 27 tokens takes 43 instead of 50 ms.
    """

    SEEDS = 512  # dropout masks of one pass at most
    MOST = 512  # recordings that are kept, of 10 to 40 kB each; other shapes are computed without

    def __init__(self, fast: "FastClassifier", b: int, length: int, start: int, training: bool, save: bool):
        self.fast, self.shape, self.start = fast, Shape(b, length, torch.empty(b, dtype=torch.int64)), start
        self.draw, self.save = Draw(training, b, seeds=fast.seeds), save
        self.space, self.tape, self.tape_back = Workspace(fast.chunks), None, None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.shape.lengths.copy_(lengths)
        if self.tape is not None:
            self.x.copy_(x)
            random_seeds(self.fast.seeds[: self.draw.drawn])
            self.tape.replay()
            return self.cls.clone()
        tape = Tape()
        with within(self.space), tape.recording():
            self.x, self.dy = empty(*x.shape).copy_(x), empty(self.shape.b, x.shape[1])
            self.cls, self.layers = self.fast._forward(self.x, self.shape, self.start, self.draw, self.save)
        self.tape = tape
        return self.cls.clone()

    def backward(self, dy: Tensor) -> Stream:
        self.dy.copy_(dy)
        if self.tape_back is not None:
            self.tape_back.replay()
            return self.stream
        tape = Tape()
        with within(self.space), tape.recording():
            self.stream = self.fast._backward(self.dy, self.layers, self.shape)
        self.tape_back, self.layers = tape, None  # the addresses are on the tape
        return self.stream


class _Classify(torch.autograd.Function):
    """The model as one autograd node: its backward writes the gradients where the optimiser reads them."""

    @staticmethod
    def forward(ctx, anchor: Tensor, fast: "FastClassifier", source: Tensor, shape: Shape, draw: Draw) -> Tensor:
        logits, ctx.kept = fast.compute(source, shape, draw, save=True)
        ctx.fast = fast
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        with ctx.fast.arena.adding():
            ctx.fast.gradients(dy, ctx.kept)
        ctx.kept = None
        return None, None, None, None, None


class FastClassifier:
    """`fast(input_ids [B, L], lengths [B]) -> logits [B, C] fp32`, differentiable through `loss.backward()`.

    model: anything `supports` accepts, fp32, on its device; train/eval follows `model.training`.
    precision: "bf16" (fp32 masters, bf16 products, fp32 residual stream and norms) or "fp32".
    frozen_prefix: this many layers, and the embeddings, run as in evaluation (no dropout, no gradient).
    shared: whether several processes share each batch.
    """

    GRAPHED = ("cuda",)  # kinds of device whose steps are captured

    def __init__(self, model: nn.Module, precision: str = "bf16", frozen_prefix: int = 0, shared: bool = False):
        if reason := supports(model):
            raise ValueError(f"the fast path cannot run this model: {reason}")
        if precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, not {precision!r}")
        self.model, self.inner = model, _classifier(model)
        config, encoder = self.inner.config, self.inner.distilbert
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.table = encoder.embeddings.word_embeddings.weight
        kind_of_device = self.table.device.type
        self.graphed = kind_of_device in self.GRAPHED
        matrices, others = _read_parameters(self.inner)
        # A GPU updates the whole table in 0.1 ms; to find out which rows a batch has, it would have to be waited for.
        dense = self.graphed and self.table.requires_grad
        self.arena = Arena(matrices, [self.table, *others] if dense else others, self.dtype)
        self.embedding = Embedding(self.arena, encoder.embeddings, config.dropout)
        blocks = encoder.transformer.layer
        self.compiled = kind_of_device == "cpu" and not self.graphed and kernels.library() is not None
        heads = _head_modules(self.inner)
        kind_of_head = FusedHead if self.compiled and own_floats(heads[0].weight) else Head
        self.head = kind_of_head(self.arena, heads, config.seq_classif_dropout)
        width = config.dim // config.n_heads
        fused = self.graphed and not shared and DeviceAttention.runs(self.table.device, self.dtype, width)
        kind = DeviceLayer if fused else FusedLayer if self.compiled else Layer
        self.layers = [kind(self.arena, b, config, last=i + 1 == len(blocks)) for i, b in enumerate(blocks)]
        for layer, successor in pairwise(self.layers):
            layer.successor = successor
        self.recordable = self.compiled and all(linear.recordable for layer in self.layers for linear in layer.linears)
        self.replays: dict[tuple[int, int, int, bool, bool], Replay] = {}
        self.chunks: list[Tensor] = []  # the memory of all recordings, of which one is in use at a time
        self.seeds = torch.empty(Replay.SEEDS, 1, dtype=torch.int64)
        self.pending: Callable[[], Kept | None] = lambda: None  # whose memory is in use
        self.frozen_prefix = frozen_prefix
        self.lowest_trained = self._lowest_trained(blocks)
        self.lazy, self.table_grads = None, []
        self.anchor = torch.zeros((), requires_grad=True)
        if self.graphed:
            self.pool, self.passes = Pool(self.table.device, self.dtype), Passes(self, len(self.embedding.position))

    def _lowest_trained(self, blocks: nn.ModuleList) -> int:
        """The lowest layer with a gradient: -1 for the embeddings, len(blocks) for none. ValueError in the prefix."""
        trained = [i for i, b in enumerate(blocks) if any(p.requires_grad for p in b.parameters())]
        lowest = -1 if self.embedding.trained else min(trained, default=len(blocks))
        if self.frozen_prefix and lowest < self.frozen_prefix:
            raise ValueError(f"layer {lowest} is trainable but frozen_prefix is {self.frozen_prefix}")
        return lowest

    def attach(self, lazy) -> None:
        """Let a LazyTable bring rows up to date before they are read."""
        self.lazy = lazy

    def _shape(self, lengths: Tensor, b: int, length: int) -> Shape:
        return Shape(b, length, lengths.long().contiguous(), self.dtype if self.graphed else torch.float32)

    def compute(self, source: Tensor, shape: Shape, draw: Draw, save: bool) -> tuple[Tensor, Kept]:
        """As `_run`, to the logits [B, C]."""
        cls, kept = self._run(source, shape, draw, save)
        logits, kept.head = self.head.forward(cls, draw)
        return logits, kept

    def _run(self, source: Tensor, shape: Shape, draw: Draw, save: bool) -> tuple[Tensor, Kept]:
        """ids [B, L] or prefix output [B, L, D] -> CLS state [B, D] and what backward needs."""
        embedded, from_ids = None, source.ndim == 2
        if from_ids:
            x, embedded = self.embedding.forward(source, draw)
        else:
            x = source.flatten(0, 1)
        kept = Kept(embedded if save and self.embedding.trained else None, None, (), shape)
        start = 0 if from_ids else self.frozen_prefix
        if replay := self._replay(shape, start, draw, save):
            kept.replay, self.pending = replay, weakref.ref(kept)
            return replay.forward(x, shape.lengths), kept
        cls, kept.layers = self._forward(x.float(), shape, start, draw, save)
        return cls, kept

    def _replay(self, shape: Shape, start: int, draw: Draw, save: bool) -> Replay | None:
        """The recording for this pass, where it can be one, and no pass before still needs the memory."""
        if not self.recordable or draw.whole != draw.rows or self.pending() is not None:
            return None
        key = shape.b, shape.length, start, draw.training, save
        if key not in self.replays and len(self.replays) < Replay.MOST:
            self.replays[key] = Replay(self, shape.b, shape.length, start, draw.training, save)
        return self.replays.get(key)

    def _forward(
        self, x: Tensor, shape: Shape, start: int, draw: Draw, save: bool, stop: int | None = None
    ) -> tuple[Tensor, list]:
        """The layers from `start` to `stop`: [N, D] -> [N, D], or the CLS state [B, D] from the last one; and what
        their backward needs, if it is to be saved."""
        stream, layers = (x, None), []
        for i, layer in enumerate(self.layers[start:stop], start):
            stream, kept = layer.forward(stream, shape, draw)
            layers.append(kept if save and i >= self.lowest_trained else None)
            del kept  # its memory is the next layer's, where it is not saved
        return stream[0], layers

    def gradients(self, dy: Tensor, kept: Kept) -> None:
        """The gradient of the logits -> those of the parameters, to their places."""
        grads = None
        dy = self.head.backward(dy, kept.head)
        stream = kept.replay.backward(dy) if kept.replay else self._backward(dy, kept.layers, kept.shape)
        if kept.embedding is not None:
            grads = self.embedding.backward(total(stream), kept.embedding)
        if grads and self.lazy:
            self.table_grads.append(grads)
        elif grads:
            self.table.grad = torch.zeros_like(self.table) if self.table.grad is None else self.table.grad
            self.table.grad.index_add_(0, *grads)

    def _backward(self, dy: Tensor, layers: list, shape: Shape) -> Stream | None:
        """The gradient of the CLS state -> that of the input."""
        stream = (dy, None)
        for layer, kept in zip(reversed(self.layers), reversed(layers)):
            if kept is None:
                break
            lowest = self.lowest_trained >= 0 and layer is self.layers[self.lowest_trained]
            stream = layer.backward(stream, kept, shape, need_dx=not lowest)
        return stream

    def prefix(self, ids: Tensor, lengths: Tensor, space: Workspace | None = None) -> Tensor:
        """ids [B, L] -> output of the embeddings and the frozen layers [B, L, D], without dropout, cacheable.

        space: the layers' memory, where many batches follow each other.
        """
        with torch.inference_mode(), within(space):
            self.arena.sync_if_changed()
            shape, draw = self._shape(lengths, *ids.shape), Draw(False)
            x, _ = self.embedding.forward(ids, draw)
            x, _ = self._forward(x, shape, 0, draw, save=False, stop=self.frozen_prefix)
            return x.to(self.dtype).view(*ids.shape, -1)

    def suffix(self, hidden: Tensor, lengths: Tensor, first: int = 0, whole: int | None = None) -> Tensor:
        """`prefix`'s output [B, L, D] -> logits [B, C]."""
        return self._logits(hidden, lengths, Draw(self.model.training, len(hidden), first, whole))

    def states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids [B, L] -> state of the last layer at CLS [B, D] fp32, as in evaluation."""
        with torch.inference_mode():
            self.arena.sync_if_changed()
            return self._run(ids, self._shape(lengths, *ids.shape), Draw(False), save=False)[0]

    def __call__(self, ids: Tensor, lengths: Tensor, first: int = 0, whole: int | None = None) -> Tensor:
        """Where processes share a batch of `whole` rows, `ids` are the rows from `first` on: see Draw."""
        if self.frozen_prefix:
            return self.suffix(self.prefix(ids, lengths), lengths, first, whole)
        if self.lazy:
            self.lazy.catch_up(torch.unique(ids))
        return self._logits(ids, lengths, Draw(self.model.training, len(ids), first, whole))

    def _logits(self, source: Tensor, lengths: Tensor, draw: Draw) -> Tensor:
        self.arena.sync_if_changed()
        if self.graphed:
            return self.passes.logits(source, lengths, draw)
        shape = self._shape(lengths, source.shape[0], source.shape[1])
        if torch.is_grad_enabled():
            return _Classify.apply(self.anchor, self, source, shape, draw)
        return self.compute(source, shape, draw, save=False)[0]

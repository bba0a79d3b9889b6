"""A training step: what takes its time, other ways to compile it, and kernels for its attention.

benchmarks/gpu.py measures them. Each step takes the same batch, which lies on the device.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.training import Stopwatch, Task, step_on_one_batch
from stages.networks.classifier import logits_of
from stages.networks.inference import autocast, place, scale
from stages.training.augmentation import Change
from stages.training.engine import Trainer
from stages.training.epochs import EpochPlan
from stages.training.losses import training_loss

# The steps that are profiled, and the kernels that are shown.
STEPS, SHOWN = 8, 20
# Names of compiled kernels may have hundreds of characters.
NAME_LENGTH = 80


@dataclass(frozen=True)
class Kernel:
    """Its calls in a step, and the seconds that all of them take."""

    name: str
    calls: float
    seconds: float


def profile_steps(task: Task, stopwatch: Stopwatch) -> str:
    """The time of the engine's step, without the profiler, and its kernels, the slowest first."""
    step = step_on_one_batch(task.trainer())
    while not stopwatch.step():
        step()
    kernels = kernels_of(step, task.device)
    computing = sum(kernel.seconds for kernel in kernels)
    rows = [
        [
            f"`{kernel.name[:NAME_LENGTH]}`",
            f"{kernel.calls:g}",
            common.rounded(1000 * kernel.seconds),
            f"{kernel.seconds / computing:.1%}",
        ]
        for kernel in kernels[:SHOWN]
    ]
    text = (
        f"{task.model}, batch {task.settings.batch_size}: a step takes"
        f" {1000 * stopwatch.seconds_a_step:.2f} ms, in which the device computes for"
        f" {1000 * computing:.2f} ms, in {sum(kernel.calls for kernel in kernels):.0f} kernels."
    )
    return f"{text}\n\n{common.table(['kernel', 'calls a step', 'ms a step', 'share'], rows)}"


def kernels_of(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of a step on a GPU, or torch's functions on a CPU, the slowest first."""
    on_gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as profiler:
        for _ in range(STEPS):
            step()
    kernels = [
        Kernel(
            event.key,
            event.count / STEPS,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / STEPS,
        )
        for event in profiler.key_averages()
        # With a GPU there are also the calls that start kernels, and ranges around several kernels.
        if event.device_type.name == device.type.upper() and not event.is_user_annotation
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


class WholeTrainer(Trainer):
    """Computes losses from loaded images in one function, so that all of it can be compiled.

    Trainer compiles the network alone. The results are the same, except for rounding and, once
    compiled for a GPU, for what dropout draws.
    """

    def add_gradients(
        self,
        forward: Callable[..., Any],
        plan: EpochPlan,
        part: slice,
        images: Tensor,
        size: int,
    ) -> None:
        # Trainer names the network alone for batches other than those that were compiled for.
        losses_of = self.losses if forward is self.module else forward
        values = [of_all[part] for of_all in plan.changes.values()]
        in_bfloat16 = common.computes_in_bfloat16(images.device, self.params.precision)
        loss, entropy, right = losses_of(
            images, plan.targets[part], list(plan.changes), values, in_bfloat16
        )
        loss = loss * (self.processes.size / size)
        loss.backward()
        totals = self.state.totals
        with torch.no_grad():
            totals[0] += entropy
            totals[1] += right
            first_bad = totals[2].clamp(max=self.state.step)
            totals[2] = torch.where(loss.isfinite(), totals[2], first_bad)

    def losses(
        self,
        images: Tensor,
        targets: Tensor,
        changes: list[Change],
        values: list[Tensor],
        in_bfloat16: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of the losses, of the cross-entropies and of the correct predictions of a part.

        `changes` and the `values` of each are those of an EpochPlan. `in_bfloat16` is an argument,
        because a compiled function cannot ask for the hardware's capabilities.
        """
        params = self.params
        images = scale(images / 255, self.classifier.size)
        for change, of_part in zip(changes, values, strict=True):
            images = change(images, of_part)
        images = self.normalize(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=in_bfloat16):
            logits = logits_of(self.module(images)).float()
        losses = training_loss(logits, targets, params.label_smoothing, params.ordinal_share)
        with torch.no_grad():
            entropy = cross_entropy(logits, targets, reduction="sum")
            right = (logits.argmax(1) == targets).sum()
        return losses.sum(), entropy, right


@dataclass(frozen=True)
class Way:
    """A way to compile a step: by a Trainer, how much of it; and a mode of torch.compile."""

    name: str
    kind: type[Trainer]
    mode: str

    def trainer(self, task: Task) -> Trainer:
        """A trainer that compiles in this way. The task's own setting of it should be false."""
        trainer = task.trainer(kind=self.kind)
        function: Any = trainer.losses if isinstance(trainer, WholeTrainer) else trainer.module
        trainer.compiled = torch.compile(
            function,
            dynamic=False,
            fullgraph=self.kind is WholeTrainer,
            mode=self.mode,
            # Compiling for a CPU takes minutes. This only finds out whether it could be compiled.
            backend="inductor" if task.device.type == "cuda" else "eager",
        )
        return trainer


# The first is the engine's own. Autotuning comes last, since it may take minutes.
WAYS = [
    Way("network compiled, as the engine does", Trainer, "default"),
    Way("network, CUDA graphs", Trainer, "reduce-overhead"),
    Way("images to loss, CUDA graphs", WholeTrainer, "reduce-overhead"),
    Way("images to loss", WholeTrainer, "default"),
    Way("network, autotuned", Trainer, "max-autotune-no-cudagraphs"),
]

# What torch chooses from to compute attention; None lets it choose.
ATTENTION = {
    "torch's choice": None,
    "fused, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "fused, flash": SDPBackend.FLASH_ATTENTION,
    "fused, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "products and softmax": SDPBackend.MATH,
}


class _AttentionCalls(TorchFunctionMode):
    """Remembers the arguments of torch's attention function in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            self.arguments.append((args, kwargs or {}))
        return func(*args, **kwargs or {})


def time_attention(task: Task, seconds: float) -> str:
    """The times of the network's first attention, forward and backward, with each kernel."""
    classifier, device = task.classifier(), task.device
    place(classifier, device)
    images = torch.zeros(task.settings.batch_size, 3, task.size, task.size, device=device)
    with _AttentionCalls() as calls, autocast(device, task.settings.precision):
        classifier.network.train()(images)
    if not calls.arguments:
        return f"{task.model} does not call torch's function for attention."
    tensors, options = calls.arguments[0]
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors)
    attend = partial(scaled_dot_product_attention, query, key, value, **options)
    rows = []
    for name, kernel in ATTENTION.items():
        stopwatch = Stopwatch(device, skip=3, seconds=seconds)
        try:
            with sdpa_kernel(kernel) if kernel else nullcontext():
                while not stopwatch.step():
                    output = attend()
                    torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
            rows.append([name, common.rounded(1000 * stopwatch.seconds_a_step)])
        except RuntimeError as error:
            rows.append([name, f"does not run: {error}".partition(".")[0]])
    return (
        f"{task.model} calls it {len(calls.arguments)} times a step, with {list(query.shape)} of"
        f" {query.dtype}.\n\n{common.table(['attention', 'ms forward and backward'], rows)}"
    )

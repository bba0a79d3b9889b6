"""torch.compile, if it is wanted and works on this machine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.networks.model_files import reason_of
from stages.runtime.errors import UserError
from stages.runtime.params import ModelParams

NEEDS = (
    "it needs a C++ compiler and Python's headers (on Debian and Ubuntu: apt install g++"
    " python3-dev), and a cache folder that it can write to (TORCHINDUCTOR_CACHE_DIR)"
)


def compile_for(
    module: nn.Module, device: torch.device, params: ModelParams
) -> tuple[Callable[[Tensor], Any], str | None]:
    """The module, compiled if that is wanted, and the reason if compiling does not work.

    `auto` compiles on a GPU only, since compiling makes ResNet34 slower on a CPU. Raises UserError
    if the model's `compile` is true and this machine cannot compile.
    """
    wanted = device.type == "cuda" if params.compile == "auto" else params.compile
    if not wanted:
        return module, None
    problem = compiling_problem(device)
    if problem is None:
        return torch.compile(module, dynamic=False), None
    if params.compile == "auto":
        return module, problem
    raise UserError(
        f"this model's compile is true, but torch.compile fails on this machine ({problem}):"
        f" {NEEDS}; or set compile to false"
    )


def compiling_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work on this machine, or None if it does.

    This compiles a function so small that only the machine can make it fail. The network itself is
    no test, because it is compiled during its first step, which already changes its statistics.
    """
    try:
        torch.compile(lambda values: values + 1, dynamic=False)(torch.zeros(1, device=device))
    # A missing compiler, header or cache folder, or an old GPU: each raises another exception.
    except Exception as error:  # noqa: BLE001
        return reason_of(getattr(error, "inner_exception", error))
    return None

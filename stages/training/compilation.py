"""torch.compile, where it is wanted and this machine is able to."""

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
    """The module, compiled where that is wanted, or as it is; and why it could not be compiled.

    By default it is wanted on a GPU only, since compiling makes ResNet34 slower on a CPU. Raises
    UserError where the model's `compile` is true, and this machine cannot compile.
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
    """Why torch.compile does not work on this machine; None where it does.

    A network is compiled during its first step, which has changed its statistics by then; so a
    function is compiled here that is too small to fail for any reason of its own.
    """
    try:
        torch.compile(lambda values: values + 1, dynamic=False)(torch.zeros(1, device=device))
    # No compiler, headers, cache folder or Triton, an old GPU: each has an exception of its own.
    except Exception as error:  # noqa: BLE001
        return reason_of(getattr(error, "inner_exception", error))
    return None

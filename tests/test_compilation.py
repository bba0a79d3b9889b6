"""torch.compile on machines that cannot compile: one line, and training continues with auto."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stages.runtime.errors import UserError
from stages.training.compilation import compile_for
from tests.builders import REPOSITORY, model_params

GPU, CPU = torch.device("cuda"), torch.device("cpu")
NETWORK = nn.Linear(2, 2)
FAILURES = [
    RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')"),
    RuntimeError("C++ compile error\n\nOutput:\nfatal error: Python.h: No such file or directory"),
    PermissionError(13, "Permission denied", "/home/me/torchinductor_me"),
    ImportError("Cannot find a working triton installation"),
]


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*_: Any, **__: Any) -> Callable[..., Any]:
        raise error

    monkeypatch.setattr("torch.compile", compile_)


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_auto_trains_without_compiling_and_says_why(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(error, monkeypatch)

    forward, problem = compile_for(NETWORK, GPU, model_params("vit", compile="auto"))

    assert forward is NETWORK
    assert problem == " ".join(str(error).split())


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
def test_true_stops_with_one_line_that_says_what_to_install(
    device: torch.device, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(error, monkeypatch)

    with pytest.raises(UserError, match=r"compile is true, but torch\.compile fails") as caught:
        compile_for(NETWORK, device, model_params("vit", compile=True))

    for part in (" ".join(str(error).split()), "apt install g++ python3-dev", "set compile to"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("device", "wanted"), [(GPU, False), (CPU, False), (CPU, "auto")])
def test_nothing_is_compiled_unless_wanted(
    device: torch.device, wanted: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(AssertionError("tried"), monkeypatch)

    assert compile_for(NETWORK, device, model_params("vit", compile=wanted)) == (NETWORK, None)


@pytest.mark.slow
def test_torch_itself_reports_a_missing_compiler() -> None:
    code = """
import torch
from stages.training.compilation import compiling_problem
print(compiling_problem(torch.device("cpu")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={"PATH": "", "CXX": "/nonexistent", "CC": "/nonexistent"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "compiler" in done.stdout
    assert done.stdout.count("\n") == 1

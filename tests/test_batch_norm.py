"""Batch normalization over processes, against torch's on the whole batch."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.training.batch_norm import SyncBatchNorm, synchronize_batch_norm
from stages.training.launch import run_processes
from stages.training.processes import Processes, joined_processes
from tests.made import close, equal, one_torch_thread, weights_of

#: Some of the numbers are near 100.
TOLERANCE = 1e-4
LAYERS: dict[str, Callable[[], _BatchNorm]] = {
    "usual": lambda: nn.BatchNorm2d(3),
    "other numbers": lambda: nn.BatchNorm2d(3, eps=0.1, momentum=0.4),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "unmoved": lambda: nn.BatchNorm2d(3, momentum=0.0),
    "not affine": lambda: nn.BatchNorm2d(3, affine=False),
    "untracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "of vectors": lambda: nn.BatchNorm1d(3),
    "of rows": lambda: nn.BatchNorm1d(3),
    "of films": lambda: nn.BatchNorm3d(3),
}
SHAPES = {"of vectors": (3,), "of rows": (3, 7), "of films": (3, 2, 4, 5)}
#: How many of six images each of two processes has.
SHARES = [(3, 3), (5, 1), (0, 6)]


def batch(name: str, number: int) -> Tensor:
    """Six images whose channels are far from mean 0 and deviation 1."""
    random = torch.Generator().manual_seed(number)
    shape = SHAPES.get(name, (3, 4, 5))
    scale = torch.tensor([1.0, 5.0, 0.1]).view(-1, *[1] * (len(shape) - 1))
    return scale * torch.randn((6, *shape), generator=random) + 2 * scale


def made_layer(name: str) -> _BatchNorm:
    """With weights that are not all 1 or 0."""
    layer = LAYERS[name]()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def steps(layer: nn.Module, name: str, share: slice) -> dict[str, Tensor]:
    """What three batches give, forward and backward, of which the layer gets a share."""
    found: dict[str, Tensor] = {}
    for number in range(3):
        images = batch(name, number)[share].requires_grad_()
        pulls = torch.randn(batch(name, 0).shape, generator=torch.Generator().manual_seed(99))
        outputs = layer(images)
        layer.zero_grad()
        (outputs * pulls[share]).sum().backward()
        assert images.grad is not None
        found |= {f"outputs {number}": outputs.detach(), f"images {number}": images.grad}
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None
            found[f"gradient {key} {number}"] = parameter.grad.clone()
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", LAYERS)
def test_on_its_own_a_process_gets_what_torch_gives(name: str) -> None:
    plain = made_layer(name)
    synchronized = SyncBatchNorm(deepcopy(plain))

    expected = steps(plain, name, slice(None))
    found = steps(synchronized, name, slice(None))

    assert close(found, expected, TOLERANCE)
    assert close(weights_of(synchronized), weights_of(plain), TOLERANCE)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", LAYERS)
def test_in_evaluation_it_is_torchs_layer(name: str) -> None:
    plain = made_layer(name)
    steps(plain, name, slice(None))
    synchronized = SyncBatchNorm(deepcopy(plain)).eval()
    before = weights_of(synchronized)

    outputs = synchronized(batch(name, 5))

    assert torch.equal(outputs, plain.eval()(batch(name, 5)))
    assert equal(weights_of(synchronized), before)


def test_it_takes_over_the_tensors_of_the_layer() -> None:
    layer = made_layer("usual")

    synchronized = SyncBatchNorm(layer)

    assert list(synchronized.state_dict()) == list(layer.state_dict())
    assert synchronized.weight is layer.weight
    assert synchronized.running_mean is layer.running_mean


def kinds(network: nn.Module) -> list[type]:
    return [type(module) for module in network.modules() if isinstance(module, _BatchNorm)]


def test_all_such_layers_of_a_network_are_replaced_under_their_names() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.BatchNorm2d(3))
    before, parameters = weights_of(network), list(network.parameters())

    synchronize_batch_norm(network, Processes(1, 2))

    assert kinds(network) == [SyncBatchNorm, SyncBatchNorm]
    assert equal(weights_of(network), before)
    assert list(weights_of(network)) == list(before)
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))


def test_a_process_on_its_own_keeps_torchs_layers() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3))

    synchronize_batch_norm(network, Processes())

    assert kinds(network) == [nn.BatchNorm2d, nn.BatchNorm1d]


def work_on_shares(folder: str) -> str:
    """In each process: what all the layers give for its shares, in a file each."""
    with joined_processes() as processes:
        for shares in SHARES:
            start = sum(shares[: processes.rank])
            share = slice(start, start + shares[processes.rank])
            for name in LAYERS:
                layer = SyncBatchNorm(made_layer(name))
                found = steps(layer, name, share) | weights_of(layer)
                save_file(found, Path(folder, f"{name} {shares} {processes.rank}"))
    return "done"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    run_processes(2, work_on_shares, str(folder))
    return folder


def joined(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of what the processes found, for the whole batch."""
    together: dict[str, Tensor] = {}
    for key, value in found[0].items():
        others = [each[key] for each in found]
        if key.startswith(("outputs", "images")):
            together[key] = torch.cat(others)
        elif key.startswith("gradient"):
            # Whoever trains in several processes adds up the gradients of weights.
            together[key] = torch.stack(others).sum(0)
        else:
            assert torch.equal(value, others[1])
            together[key] = value
    return together


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_get_what_one_gets_for_the_whole_batch(
    name: str, shares: tuple[int, int], shared: Path
) -> None:
    plain = made_layer(name)
    expected = steps(plain, name, slice(None)) | weights_of(plain)

    found = [load_file(shared / f"{name} {shares} {rank}") for rank in range(2)]

    assert [len(each["outputs 0"]) for each in found] == list(shares)
    assert close(joined(found), expected, TOLERANCE)

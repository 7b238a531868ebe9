"""Weights shared out among the processes (FSDP2): each holds a slice of every weight, and all of it while it is used.

A module that is not sharded passes through all that is here as it is, so whoever saves or steps need not ask.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn

from proteus.errors import InputError

# torch.distributed.fsdp and .tensor are imported where they are used: half a second that a plain run need not spend.

State = dict[str, Tensor]


def shards(accelerator: Accelerator) -> bool:
    """Whether Accelerate is set to FSDP. On a CPU it takes no notice of that but in its environment."""
    on_cpu = accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP")
    return on_cpu or accelerator.distributed_type == DistributedType.FSDP


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device, methods: Sequence[str] = ()) -> None:
    """Share out a module's weights among all processes, in place; collective, as every call of it is from here on.

    Each block is gathered by itself and let go after its use; the rest, of the module itself, stays gathered from its
    call to the end of its backward. Weights may lie on a CPU before: only one block at a time comes to `device` whole.

    methods: of the module, other than forward, through which it is called.

    InputError where a weight cannot be sliced.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    try:
        for part in (*blocks, module):
            fully_shard(part, mesh=mesh)
    except (ValueError, AssertionError, NotImplementedError) as error:  # a scalar, say, or weights of two precisions
        raise InputError(f"weights cannot be shared out: {' '.join(str(error).split())[:300]}") from None
    for name in methods:
        register_fsdp_forward_method(module, name)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been at this module."""
    return hasattr(module, "set_requires_gradient_sync")


@contextlib.contextmanager
def no_sync(accelerator: Accelerator, model: Any) -> Iterator[None]:
    """Inside, a backward's gradients stay with the process."""
    if not is_sharded(model):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def replication() -> contextlib.AbstractContextManager[object]:
    """Inside, an operator takes plain tensors beside sharded ones: they are the same on every process."""
    if "torch.distributed.tensor" not in sys.modules:  # then nothing is sharded
        return contextlib.nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every process; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_share(tensor: Tensor) -> Tensor:
    """The slice of a sharded tensor that this process holds; what is written to it is written to the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def share_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, shared out as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_state(module: nn.Module, keep: bool = True) -> State:
    """The state dict, whole and copied to the CPU; collective where the module is sharded.

    keep: false on a process that only takes its part in bringing it together, and gets nothing.
    """
    gathered = ((key, whole(value.detach())) for key, value in module.state_dict().items())
    return {key: value.to("cpu", copy=True).contiguous() for key, value in gathered if keep}


def load_full(module: nn.Module, state: State) -> None:
    """Load a whole state dict, strictly; each process takes its own slice of it."""
    own = module.state_dict()
    module.load_state_dict({key: share_like(value, own[key]) if key in own else value for key, value in state.items()})


def full_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """As `full_state`, of an optimiser: {"state": by number of the parameter, "param_groups"}."""
    found = optimizer.state_dict()
    state: dict[int, State] = {}
    for number, moments in found["state"].items():
        gathered = ((name, whole(value)) for name, value in moments.items())
        state[number] = {name: value.to("cpu", copy=True) for name, value in gathered if keep}
    return found | {"state": state}


def load_full_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `full_optimizer_state` gave, whoever gave it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared = {
        number: {
            name: share_like(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shared})

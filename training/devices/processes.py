"""The processes of one run: one, or one per GPU over several GPUs and nodes.

Lightning Fabric starts them or detects the launcher (torchrun, SLURM, MPI); it is imported only for more than one
process. Every process takes its share of each batch. It holds either the whole network, whose gradients torch's
DistributedDataParallel averages, or a shard of it (`sharding.py`). Sums over the batch are one reduction per step.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import MissingExtraError, UsageError
from dinokit.runtime.torch import pick_device

__all__ = ["Processes"]

_HOW_TO_START = "Start it as a script or by `dinokit train`, under torchrun or srun, or use devices=1"


class Processes:
    """This process as one of the processes of the run.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: of this process.
        strategy: ddp (each process has the whole network) or fsdp (each has a shard, `sharding.py`).
    """

    def __init__(
        self, device: torch.device, *, rank: int = 0, world_size: int = 1, strategy: str = "ddp"
    ) -> None:
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.strategy = strategy
        self._started: Sequence[subprocess.Popen[bytes]] = ()

    @classmethod
    def start(cls, device: str, devices: int = 1, num_nodes: int = 1, *, strategy: str = "ddp") -> Processes:
        """Starts the missing processes of this node, and joins all processes to a group.

        Under torchrun or srun the launcher has started them and decides their number. Otherwise the running command
        is run again, once per additional device.

        Args:
            device: auto, cpu, cuda or mps; with several processes without a number.
            devices: processes on each node.
            num_nodes: number of nodes; more than 1 needs a launcher that starts the other nodes' processes.
            strategy: ddp or fsdp.

        Raises:
            UsageError: the device does not fit the number of processes, fsdp has one process only, or a SLURM job of
                several tasks runs this without srun.
            MissingExtraError: lightning-fabric is not installed.
        """
        launched = _count_launched()
        if devices * num_nodes == 1 and launched == 1:
            if strategy == "fsdp":
                raise UsageError(
                    "strategy=fsdp shards a network over several processes, and there is one; use devices=2 or "
                    "more (or torchrun), or strategy=ddp. A run's checkpoints can resume with either"
                )
            alone = cls(pick_device(device))
            if alone.device.type == "cuda":
                # Otherwise torch's threads that page-lock batches take memory of the first GPU too.
                torch.cuda.set_device(alone.device)
            return alone
        kind = pick_device(device).type
        if ":" in device or kind not in ("cpu", "cuda"):
            raise UsageError(
                f"device={device} is one device, and {max(devices * num_nodes, launched)} processes were asked for; "
                "use device=cuda or device=cpu"
            )
        if kind == "cuda" and devices > torch.cuda.device_count():
            raise UsageError(
                f"devices={devices}, and there are {torch.cuda.device_count()} GPUs here; use devices=1 or at most the "
                "number of GPUs"
            )
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise MissingExtraError("several processes", extra="train", package="lightning-fabric") from error
        # The number that torchrun or srun started here.
        if devices == 1 and (
            here_too := os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE"))
        ):
            devices = int(here_too)
            num_nodes = launched // devices
        try:
            fabric = Fabric(accelerator=kind, devices=devices, num_nodes=num_nodes, strategy="ddp")
            _must_be_a_script(fabric.strategy.launcher)
            fabric.launch()
        except torch.distributed.DistError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, UsageError | torch.OutOfMemoryError):
                raise
            # Lightning's message, or the name of a missing SLURM variable.
            reason = f"{error} is not set" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise UsageError(
                f"several processes cannot be started here: {reason}. {_HOW_TO_START}"
            ) from error
        here = cls(fabric.device, rank=fabric.global_rank, world_size=fabric.world_size, strategy=strategy)
        here._started = getattr(fabric.strategy.launcher, "procs", ())  # empty if a launcher started them
        return here

    @staticmethod
    def will_be_first() -> bool:
        """Whether this process will be the first; known before :meth:`start`, so that it alone checks inputs."""
        return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    @property
    def shares_weights(self) -> bool:
        """Whether each process has only a shard of the weights."""
        return self.strategy == "fsdp" and self.world_size > 1

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module to call in the forward pass, so that gradients are averaged over the processes."""
        if self.world_size == 1 or self.shares_weights:  # sharded modules average gradients themselves
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def without_sync(self, module: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """A context in which a backward pass does not exchange gradients, since more are still to be added."""
        if enabled and isinstance(module, nn.parallel.DistributedDataParallel):
            context: AbstractContextManager[Any] = module.no_sync()
            return context
        if enabled and self.shares_weights:
            return _gradients_kept_here(module)
        return contextlib.nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum of a tensor over the processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def gather_here(self, tensor: Tensor) -> Tensor:
        """(M, …) of each process, where M may differ, to all of them (sum of M, …) on the device, by rank."""
        if self.world_size == 1:
            return tensor
        counts = [int(n) for n in self.gather(torch.tensor(len(tensor)))]
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Per flag whether it is set in any process, so that all processes act on it at the same step."""
        if self.world_size == 1:
            return flags
        counts = self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device))
        return tuple(bool(count) for count in counts.tolist())

    def gather(self, tensor: Tensor) -> Tensor:
        """(…) of each process to (world_size, …) on the CPU, in all of them."""
        if self.world_size == 1:
            return tensor.cpu()[None]
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.to(self.device))
        return torch.stack(parts).cpu()

    def end_with_this_one(self) -> None:
        """Kills the processes that this one started when it exits: after an error here they would wait for it in the
        next sum, under NCCL for half an hour. Not before: Fabric ends this process five seconds after one of them."""

        def end() -> None:
            for process in self._started:
                if process.poll() is None:
                    process.kill()  # a process that hangs in a collective operation ignores SIGTERM

        atexit.register(end)

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.world_size > 1:
            torch.distributed.barrier()


def _count_launched() -> int:
    """How many processes torchrun or srun has started; 1 without either."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if tasks == 1 or "SLURM_STEP_NUM_TASKS" in os.environ:  # set by srun alone
        return tasks
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # a shell inside a job
        return 1
    raise UsageError(
        f"this SLURM job has {tasks} tasks, but srun did not start this process, so it would wait for the others for "
        "ever. Put srun before the command, or request one task (--ntasks=1)"
    )


def _must_be_a_script(launcher: Any) -> None:
    """Additional processes run the same command again, which is impossible for code typed or piped in."""
    import __main__

    environment = getattr(launcher, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally:
        return
    if getattr(__main__, "__spec__", None) is None and not os.path.isfile(sys.argv[0]):  # noqa: PTH113 - may be "-"
        raise UsageError(
            f"several processes run the same command again, and this one ({sys.argv[0] or 'Python itself'}) is not "
            f"a file. {_HOW_TO_START}"
        )


@contextlib.contextmanager
def _gradients_kept_here(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)

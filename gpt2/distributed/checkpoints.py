"""Checkpoints of several processes, by torch.distributed.checkpoint (DCP), and resumption with another number of them.

    checkpoints/<fingerprint>/step-000250/gpt_model_checkpoint.pt              training state, without tensors
                                          shard-00001-model-....safetensors    what the first process wrote
                                          shard-00002-model-....safetensors
                                          manifest.json                        SHA-256 of all files, written last

Each process writes its part at once. The shards are safetensors rather than DCP's own format, whose metadata is a
pickle. All processes see the same folder: on several nodes, it is on a shared file system.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import async_save, load  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, distribute_tensor

from gpt2.errors import FileError, GPT2Error, one_line
from gpt2.files import TEMPORARY, delete_folder, sha256_of, write_folder
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training.checkpoints import CHECKPOINT_FILE, CheckpointStore
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.state import TrainState, checkpoint_content, restore_state
from gpt2.world import World

TENSORS = ("model_state_dict", "best_model_state_dict", "optimizer_state_dict")
"""Keys of a checkpoint of one process that hold tensors."""
Result = TypeVar("Result")


def named_tensors(content: dict[str, Any], optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint's content, by names that do not depend on the number of processes."""
    groups = {
        "model": {name: t for name, t in content["model_state_dict"].items() if name != "lm_head.weight"},  # tied
        "best": content["best_model_state_dict"],
        "optimizer": optimizer.names_of(content["optimizer_state_dict"]),
    }
    # safetensors are read in slices, which a scalar does not have
    return {
        f"{group}.{name}": tensor if tensor.dim() else tensor.view(1)
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


class ShardedWriter:
    """Saves checkpoints of several processes in a thread, from a copy, while training goes on."""

    def __init__(self, store: CheckpointStore, optimizer: Optimizer, world: World, device: torch.device) -> None:
        self.store, self.optimizer, self.world = store, optimizer, world
        self._names = world.gather(world.name)
        self._group = dist.new_group(backend="gloo")  # not that of training, which communicates at the same time
        on_gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._pending_step = -1

    def save(self, step: int, content: dict[str, Any], *, last: bool = False) -> None:
        """Copies the content and begins to write it. last: also waits for the end.

        A step that is being written is not written again, unless that fails. Raises FileError in all processes if this
        save, or the one before, failed in one of them.
        """
        is_pending = self._pending is not None and step == self._pending_step
        failure = self._wait()
        if is_pending:
            if failure is None:
                return
            failure = None
        shards = self.store.path(step).with_name(f"{self.store.path(step).name}.shards{TEMPORARY}")
        written = async_save(
            named_tensors(content, self.optimizer),
            storage_writer=HuggingFaceStorageWriter(path=str(shards), save_distributed=True),
            process_group=self._group,
            async_stager=self._stager,
        )
        plain = {
            **{key: value for key, value in content.items() if key not in TENSORS},
            "has_best": bool(content["best_model_state_dict"]),
        }
        assert isinstance(written, Future)
        self._pending_step = step
        self._pending = self._thread.submit(self._publish, step, shards, plain, written)
        if last:
            failure = self._wait() or failure
        if failure is not None:
            raise failure

    def _wait(self) -> FileError | None:
        """Waits for the save before. Returns its error."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except FileError as error:
            return error
        return None

    def _publish(self, step: int, shards: Path, plain: dict[str, Any], written: "Future[Any]") -> None:
        """In the thread: when all parts are written, makes them a checkpoint."""
        target = self.store.path(step)
        self._together(target, written.result)
        mine = f"shard-{self.world.rank + 1:05d}-*"
        sums = self._together(target, lambda: {path: sha256_of(path) for path in sorted(shards.glob(mine))})

        def publish() -> None:
            if self.store.is_valid(step):
                return
            delete_folder(target)
            ready = {path: digest for part in sums for path, digest in part.items()}
            write_folder(target, {CHECKPOINT_FILE: lambda file: torch.save(plain, file)}, {"step": step}, ready)

        try:
            self._together(target, publish if self.world.rank == 0 else lambda: None)
        finally:
            if self.world.rank == 0:
                with suppress(OSError):
                    delete_folder(shards)
                self.store.prune()

    def _together(self, target: Path, action: Callable[[], Result]) -> list[Result]:
        """The results of an action of all processes. Raises FileError in all of them if it fails in one."""
        result: Any = None
        failure = None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # DCP wraps what writing raises
            rank = min(getattr(error, "failures", None) or {self.world.rank: error})
            failure = f"{self._names[rank]}: {one_line(_cause(error), 200)}"
        outcomes: list[Any] = [None] * self.world.size
        dist.all_gather_object(outcomes, (result, failure), group=self._group)
        for _, failed in outcomes:
            if failed is not None:
                shared = FileError(
                    f"cannot write the checkpoint {target} ({failed}); free disk space, and run again to continue"
                )
                shared.is_shared = True
                raise shared
        return [result for result, _ in outcomes]


def _cause(error: BaseException) -> BaseException:
    """What DCP's CheckpointException reports of the first process that failed."""
    failures = getattr(error, "failures", None) or {0: error}
    first: Any = failures[min(failures)]
    cause: BaseException = first[0] if isinstance(first, tuple) else first
    return cause


def restore(
    content: dict[str, Any], folder: Path, model: MixedPrecisionModel, optimizer: Optimizer, world: World
) -> TrainState:
    """Loads a checkpoint, of any number of processes, in any number of processes. Returns the state to continue from.

    content: what `CheckpointStore.load` returned for this folder. Raises FileError if the tensors cannot be read.
    """
    state = restore_state(content, model.device)
    optimizer.initialize_state()
    has_best = content["has_best"] if "has_best" in content else bool(content["best_model_state_dict"])
    if has_best:
        state.best_weights = model.copy_weights()
    targets = named_tensors(checkpoint_content(model.master, optimizer, state), optimizer)
    if "model_state_dict" in content:
        whole = named_tensors(content, optimizer)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(_divided_like(target, whole[name]))
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of DCP, in one process, that it is one process
                load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)
        except GPT2Error:
            raise
        except (Exception, CheckpointException) as error:  # safetensors and DCP raise many types of errors
            raise FileError(f"cannot read the checkpoint {folder}: {one_line(_cause(error))}") from None
    if state.best_step and not has_best:
        state.best_weights = model.copy_weights()
    return state


def _divided_like(target: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, which all processes have, divided like another."""
    if not isinstance(target, DTensor):
        return whole
    whole = whole.to(target.device)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)

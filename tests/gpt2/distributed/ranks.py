"""What each process of a distributed test does; rank 0 writes the outcome as JSON.

    python -m tests.gpt2.distributed.ranks '[[PROCESSES, SCENARIO, OUTCOME, TOKENS, FOLDER, STEPS], ...]'

starts the processes of each scenario as torchrun does, one scenario after the other, but as forks of a process that has
imported everything: that takes longer than what they do. The tests of the train stage start processes in torch's way.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from gpt2.data.sampler import Sampler
from gpt2.data.token_files import open_tokens
from gpt2.distributed import checkpoints, models, muon, parts  # noqa: F401 - imported before the forks
from gpt2.errors import DivergedError, MicroBatchError
from gpt2.model.transformer import GPT
from gpt2.training.checkpoints import CheckpointStore
from gpt2.training.state import TrainState
from gpt2.training.trainer import Trainer
from gpt2.training.validation import validation_loss
from gpt2.training.vocabulary import text_vocabulary
from gpt2.world import ALONE, World, full_tensor, join, local_part
from tests.conftest import TINY, TINY_TRAIN
from tests.gpt2.training.small_run import Recorder


def recipe(max_steps=100, **changes):
    """That of the preset laptop. With the high rates of other tests, losses differ by 2e-3 after 100 steps: rounding
    errors grow, in whatever order sums are taken."""
    return dataclasses.replace(
        TINY_TRAIN,
        batch_size=4,
        gradient_accumulation_steps=2,
        sequence_length=16,
        learning_rate=6e-3,
        muon_learning_rate=2e-2,
        min_learning_rate=0.0,
        schedule="linear",
        max_steps=max_steps,
        warmup_steps=min(20, max_steps // 3),
        **{"eval_interval": 10**6, **changes},
    )


class Run:
    """A small run in one of any number of processes."""

    def __init__(self, tokens, config, world=ALONE, strategy="ddp", precision=torch.float32, checkpointing=False):
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        self.tokens, self.config, self.world = tokens, config, world
        vocabulary = text_vocabulary(open_tokens(tokens, "train"), config, TINY.vocab_size)
        master = GPT(TINY if vocabulary is None else vocabulary.config(TINY))
        master.mask_documents, master.dropout = config.mask_documents, config.dropout
        master.freeze(config.freeze_layers)
        self.model = parts.make_model(
            master, precision, world, strategy, gradient_checkpointing=checkpointing, vocabulary=vocabulary
        )
        self.optimizer = parts.make_optimizer(self.model, config, world)
        self.state = TrainState.initial(precision, config.share(world.size).batch_size)

    def validate(self, batch_size, progress):
        tokens = open_tokens(self.tokens, "val")[:205]
        options = {"sequence_length": 16, "batch_size": batch_size, "progress": progress, "world": self.world}
        return validation_loss(self.model, tokens, **options)

    def go(self, callbacks=None, **options):
        """Returns the losses by step."""
        callbacks = callbacks or Recorder()
        sampler = Sampler(
            open_tokens(self.tokens, "train"), self.config, rank=self.world.rank, processes=self.world.size
        )
        self.model.warm_up(self.state.micro_batch_size, self.config.sequence_length)
        trainer = Trainer(
            self.model,
            self.optimizer,
            sampler,
            self.validate,
            self.config,
            self.state,
            callbacks,
            log_interval=1,
            world=self.world,
            **options,
        )
        trainer.train()
        return [row["train_loss"] for row in self.state.history]

    def weights(self):
        return [full_tensor(p.detach()).clone() for p in self.model.master.parameters()]


def curves(world, tokens, folder, steps):
    """Losses of each strategy and optimizer."""
    return {
        f"{strategy} {optimizer}": Run(tokens, recipe(optimizer=optimizer, max_steps=steps), world, strategy).go()
        for strategy in ("ddp", "fsdp")
        for optimizer in ("adamw", "muon")
    }


class Saver(Recorder):
    """Saves checkpoints for real."""

    def __init__(self, run, store, stop_after=None):
        super().__init__(stop_after)
        self.writer = parts.make_writer(store, run.optimizer, run.world, run.model.device)

    def save(self, step, content, last):
        super().save(step, content, last)
        self.writer.save(step, content, last=last)


def resumption(world, tokens, folder, steps):
    """Whether a run that stops and resumes has the bits of one that does not, and what its checkpoints are."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        config = recipe(optimizer="muon", max_steps=8, eval_interval=3, dropout=0.2)
        whole = Run(tokens, config, world, strategy)
        whole.go()
        store = CheckpointStore(folder / strategy, world)
        stopped = Run(tokens, config, world, strategy)
        stopped.go(Saver(stopped, store, stop_after=5), checkpoint_interval=2)
        content = store.load_newest()
        resumed = Run(tokens, config, world, strategy)
        step = content["state"]["step"]
        resumed.state = parts.restore(content, store.path(step), resumed.model, resumed.optimizer, world)
        resumed.go(Saver(resumed, store))
        found[strategy] = {
            "step": step,
            "same": all(map(torch.equal, whole.weights(), resumed.weights())),
            "best": [resumed.state.best_step, whole.state.best_step],
            "same best": all(
                torch.equal(full_tensor(resumed.state.best_weights[name]), full_tensor(weight))
                for name, weight in whole.state.best_weights.items()
            ),
            "history": [row["train_loss"] for row in resumed.state.history]
            == [row["train_loss"] for row in whole.state.history],
            "files": sorted(path.name for path in store.path(8).iterdir()),
            "left": sorted(path.name for path in (folder / strategy).iterdir()),
        }
    return found


def transition(world, tokens, folder, steps):
    """Goes on from the newest checkpoint, if there is one, for 5 steps. STEPS names the strategy."""
    config = recipe(max_steps=100, optimizer="muon")
    run = Run(tokens, config, world, steps)
    store = CheckpointStore(folder, world)
    content = store.load_newest()
    if content is not None:
        path = store.path(content["state"]["step"])
        run.state = parts.restore(content, path, run.model, run.optimizer, world)
        run.state.micro_batch_size = config.share(world.size).batch_size
    run.go(Saver(run, store, stop_after=run.state.step + 5))
    return [row["train_loss"] for row in run.state.history]


def local_bytes(tensors):
    return sum(local_part(tensor).nbytes for tensor in tensors)


def parts_of(world, tokens, folder, steps):
    """The properties that need no long runs."""
    found = {"sum": world.sum(world.rank + 1.0), "any": world.any(world.rank == 1), "none": world.any(False)}
    found["gather"] = world.gather(world.rank)
    found["max"], found["first"] = world.max(world.rank), world.from_first(world.rank)
    for strategy in ("ddp", "fsdp"):
        run = Run(tokens, recipe(optimizer="adamw"), world, strategy)
        steps_of_progress = []
        found[f"{strategy} val"] = run.validate(3, steps_of_progress.append)
        found[f"{strategy} progress"] = [len(steps_of_progress), sum(steps_of_progress)]
        dtypes = {p.dtype for p in run.model.master.parameters()}
        found[f"{strategy} dtypes"] = sorted(map(str, dtypes))
        for precision, checkpointing in ((torch.bfloat16, False), (torch.bfloat16, True)):
            small = recipe(max_steps=6, optimizer="muon", label_smoothing=0.1, mask_documents=True)
            name = f"{strategy} bf16{' checkpointing' if checkpointing else ''}"
            found[name] = Run(tokens, small, world, strategy, precision, checkpointing).go()
        tied = recipe(max_steps=6, optimizer="muon", min_token_count=2)
        found[f"{strategy} tied"] = Run(tokens, tied, world, strategy).go()
        frozen = recipe(max_steps=6, optimizer="muon", init_from="elsewhere", freeze_layers=1)
        found[f"{strategy} frozen"] = Run(tokens, frozen, world, strategy, torch.bfloat16).go()
    run = Run(tokens, recipe(optimizer="adamw"), world, "fsdp")
    run.optimizer.initialize_state()
    inputs = torch.zeros(2, 16, dtype=torch.long)
    run.model.loss(inputs, inputs).backward()
    parameters = list(run.model.master.parameters())
    held = local_bytes(parameters) + local_bytes(p.grad for p in parameters) + local_bytes(run.optimizer.tensors())
    found["fsdp share"] = held / (4 * 4 * TINY.num_parameters())
    found["non-finite"] = non_finite(world, tokens)
    found["out of memory"] = out_of_memory(world, tokens)
    found["early stop"] = early_stop(world, tokens)
    return found


def non_finite(world, tokens):
    """NaN in the last process alone: the step at which each process stops."""
    run = Run(tokens, recipe(), world, "ddp")
    original = run.model.loss

    def loss(*arguments, **options):
        factor = math.nan if run.state.step == 3 and world.rank == world.size - 1 else 1.0
        return original(*arguments, **options) * factor

    run.model.loss = loss
    try:
        run.model.warm_up = lambda *_: None
        run.go()
    except DivergedError as error:
        return world.gather(error.good_steps)
    return None


def early_stop(world, tokens):
    """A validation loss that rises from the second evaluation on: the step at which each process ends."""
    run = Run(tokens, recipe(eval_interval=2, patience=2), world, "ddp")
    run.validate = lambda *_: 5.0 + abs(run.state.step - 4)
    run.go()
    return world.gather(run.state.step)


def out_of_memory(world, tokens):
    """Too little memory for a step in each process: what it asks for."""
    run = Run(tokens, recipe(), world, "fsdp")

    def loss(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    run.model.loss, run.model.warm_up = loss, lambda *_: None
    try:
        run.go()
    except MicroBatchError as error:
        return error.micro_batch_size
    return None


SCENARIOS = {"curves": curves, "resumption": resumption, "transition": transition, "parts": parts_of}


def work(environment, scenario, outcome, tokens, folder, steps):
    """What one process does."""
    os.environ.update(environment)
    world: World = join("cpu") if environment["WORLD_SIZE"] != "1" else ALONE
    found = SCENARIOS[scenario](world, Path(tokens), Path(folder), steps)
    if world.rank == 0:
        Path(outcome).write_text(json.dumps(found))


def serve(port):
    """Holds the store in which the processes meet, as torchrun does; sends its port."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    signal.pause()


def start(processes, *arguments):
    """Forks the processes of a scenario, and waits for them. Ends them all, and this one, if one fails."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    # the store's thread looks up the names of who connects: a fork at that moment would have glibc's lock for good
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    theirs.close()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ours.recv()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank makes a store
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    ranks = [
        context.Process(target=work, args=({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *arguments))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    waiting = {rank.sentinel: rank for rank in ranks}
    while waiting:
        for sentinel in wait(waiting):
            if waiting.pop(sentinel).exitcode:
                for rank in waiting.values():
                    rank.kill()
                sys.exit(f"a process of {arguments[0]} failed")
    server.kill()


if __name__ == "__main__":
    import torch._dynamo  # the optimizers import it

    for group in json.loads(sys.argv[1]):
        start(*group)

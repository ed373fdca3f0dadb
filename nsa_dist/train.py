"""The training loop: batch, loss, backward, step, metrics, checkpoint; in each process of a run.

torch.distributed must be initialised. Loss and gradients are means over all tokens of the global batch that
carry a label, whatever the number of ranks.
"""

import json
import math
import socket
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nsa_dist.agree import check_data, check_same, check_step
from nsa_dist.checkpoint import Checkpointer, NotWrittenError, restore_random, training_state
from nsa_dist.config import Config, ConfigError, nsa_spec
from nsa_dist.cuts import Cutter
from nsa_dist.data import IGNORED, Corpus, Packed, prepare_all
from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.metrics import MetricsWriter, memory_bytes, progress
from nsa_dist.model import Decoder
from nsa_dist.parallel.balance import imbalance
from nsa_dist.parallel.exchange import all_gather, all_reduce
from nsa_dist.parallel.ledger import as_table, summarise
from nsa_dist.parallel.mesh import Mesh, make_mesh
from nsa_dist.parallel.parameters import clip_gradients, shard_parameters
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.process import is_collective_error
from nsa_dist.rivals import DTYPES, RIVALS, grad_dtype, rival_tables
from nsa_dist.rundir import Resume, event, fitting, load_resume, store_of

Report = Callable[[dict[str, Any]], bool | None]


class TrainingError(RuntimeError):
    """Training can't go on; the message is one line, the checkpoints are as they were.

    not_finite: the step whose batch made the loss or the gradient so; 0 where it is something else.
    """

    def __init__(self, text: str, not_finite: int = 0) -> None:
        super().__init__(text)
        self.not_finite = not_finite


def train(config: Config, resume: Resume, report: Report, skip: Collection[int] = ()) -> bool:
    """Trains to `train.steps`, or until it is asked to stop; ends with a checkpoint either way. True: to the end.

    launch.device must be `cpu` or `cuda` by now. skip: steps whose batches are left out. report: called on every
    rank with {"kind": "beat", "step": n} after a step, where it may return True: stop, all ranks together; with
    {"kind": "busy", "what": …} before what takes longer than a step; on rank 0 also with {"kind": "step",
    "line": …} and {"kind": "say", "text": …}.

    Raises TrainingError for a loss or gradient that is not finite, ConfigError for a checkpoint that doesn't fit.
    """
    device = torch.device(config.launch.device)
    check_same(config)
    mesh = make_mesh(config.parallel.dp, config.parallel.cp, config.parallel.shard, device.type)
    first = mesh.world.rank == 0

    def say(text: str) -> None:
        if first:
            report({"kind": "say", "text": text})

    def written() -> None:
        """Waits for the checkpoint under way. One that could not be written is told: the next one is due anyway."""
        try:
            saver.wait()
        except NotWrittenError as error:
            if is_collective_error(error):  # a rank is gone
                raise
            say(f"warning: {error}; training goes on")
            if first:
                with suppress(OSError):  # the same full disk, perhaps
                    event(config.run.dir, "checkpoint_failed", reason=str(error))

    def save(step: int) -> None:
        report({"kind": "busy", "what": "checkpoint"})
        if any_rank(mesh, not all_finite(state), device):
            saver.wait()
            raise TrainingError(f"parameters after step {step}: must be finite; no checkpoint of them is written")
        written()
        saver.save(step, state, numbers)

    corpus, held_out = prepare_all(config.data, say)  # on a node that the launcher isn't on
    check_data(corpus.meta["sha256"], corpus.vocab_size)
    reader = Reader(config, mesh, device)
    model, optimizer = build(config, corpus.vocab_size, mesh, device)
    state = training_state(model, optimizer)
    saver = Checkpointer(store_of(config), config.train.keep_checkpoints)

    loaded = load_resume(resume, config.run.dir, state, say=say)
    start = 0
    if loaded:
        start = int(loaded["step"])
        restore_random(loaded)
        if resume.same_run and loaded["corpus"] != corpus.meta["sha256"]:
            raise ConfigError(f"data.source: its tokens are not those of step {start}; must be, or another run.dir")
    # Sequences follow from the step, so the step is the data's position too.
    numbers = {"config": fitting(config), "corpus": corpus.meta["sha256"]}
    steps, saved = last_step(config, corpus), start
    if first:
        event(config.run.dir, "training", step=start, steps=steps, ranks=mesh.world.size, corpus=corpus.meta)
        say(summary(config, model, corpus, start, steps))
    writer = MetricsWriter(config.run.dir, start, say) if first else None
    mesh.ledger.take()
    asked, done, waited = False, start, 0.0

    def one_step(step: int) -> dict[str, Any]:
        """Takes a step; its line of metrics."""
        nonlocal waited
        began, worked = time.perf_counter(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batches = reader.training(corpus, step)
        check_step(mesh, step, [batch.sequence for batch in batches])
        loss, rivals = forward_backward(config, model, batches, mesh)
        norm = clip_gradients(model.parameters(), mesh, config.train.clip)
        if problem := not_finite(config, step, loss, norm, saved):
            keep_evidence(config, step, loss, norm, model, mesh)
            written()  # what is under way is whole, and stays
            raise TrainingError(problem, step)
        optimizer.step()
        optimizer.zero_grad()

        worked = time.process_time() - worked
        comm, waited = traffic_record(mesh, rivals)
        balance = balance_record(mesh, reader.costs(batches), worked)
        seconds = time.perf_counter() - began
        tokens = sum(batch.sequence.packing.tokens for batch in batches) * mesh.dp.size
        record: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": norm, "tokens": tokens}
        record |= {"lr": learning_rate(config, step), "step_s": seconds, "tokens_per_s": tokens / seconds}
        return record | {"memory_bytes": memory_bytes(), "balance": balance, "comm": comm}

    report({"kind": "busy", "what": "first step", "step": start})
    for step in range(start + 1, steps + 1):
        if any_rank(mesh, asked, device):
            say(f"stopping after step {step - 1}, as asked")
            break
        if step in skip:
            say(f"step {step}: its batch is skipped, the loss wasn't finite with it")
        else:
            record = one_step(step)
            if held_out and config.train.validation_sequences and due(step, config.train.validate_every, steps):
                report({"kind": "busy", "what": "validation"})
                record["validation"] = validate(config, model, reader.validation(held_out), mesh)
            if writer:  # before the checkpoint: a run that goes on from it then lacks no line
                writer.step(record)
                if due(step, config.train.log_every, steps):
                    report({"kind": "step", "line": progress(record, steps, mesh.world.size)})
        done = step
        if due(step, config.train.checkpoint_every, steps):
            save(step)
            saved = step
        asked = bool(report({"kind": "beat", "step": step, "waited_s": waited}))

    if done > saved:  # stopped between two checkpoints
        save(done)
    report({"kind": "busy", "what": "checkpoint"})
    saver.wait()
    if writer:
        writer.close()
    return done == steps


def build(config: Config, vocab_size: int, mesh: Mesh, device: torch.device) -> tuple[Decoder, torch.optim.AdamW]:
    """The model, the same on any number of ranks, its parameters sharded; and its optimiser."""
    compute = DTYPES[config.train.dtype]
    torch.manual_seed(config.run.seed)
    model = Decoder(config, config.model.vocab_size or vocab_size)
    model.to(device=device, dtype=torch.promote_types(compute, torch.float32))
    shard_parameters(model, model.layers, mesh, compute)
    # Norms and biases don't decay.
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decays, "weight_decay": config.train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    train = config.train
    return model, torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps)


@dataclass(frozen=True)
class Batch:
    """This rank's part of one packed sequence. `counts` False: a stand-in, so that all ranks take part."""

    tokens_S: Tensor
    labels_S: Tensor
    sequence: ShardedSequence
    counts: bool = True

    @property
    def labelled(self) -> int:
        return int((self.labels_S != IGNORED).sum()) if self.counts else 0


class Reader:
    """Reads this rank's part of sequences."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.spec, self.grad_dtype = nsa_spec(config.nsa), grad_dtype(config)
        self._cutters: dict[int, Cutter] = {}  # by the vocabulary

    def cutter(self, corpus: Corpus) -> Cutter:
        vocabulary = self.config.model.vocab_size or corpus.vocab_size
        if vocabulary not in self._cutters:
            self._cutters[vocabulary] = Cutter(self.config, vocabulary)
        return self._cutters[vocabulary]

    def costs(self, batches: list[Batch]) -> float:
        """This rank's operations in the batches, by the cost model."""
        (cutter,) = self._cutters.values()
        cuts = [(batch.sequence.packing, batch.sequence.layout) for batch in batches]
        return sum(float(cutter.work(*cut)[self.mesh.cp.rank]) for cut in cuts)

    def training(self, corpus: Corpus, step: int) -> list[Batch]:
        """The sequences of one step that this rank's place on the dp axis works on, one after the other."""
        size, dp = self.config.data.batch_size, self.mesh.dp
        first = (step - 1) * size
        return [self._batch(corpus, corpus.sequence(i)) for i in range(first + dp.rank, first + size, dp.size)]

    def validation(self, corpus: Corpus) -> list[Batch]:
        """`train.validation_sequences` spread over the held-out text, dealt over the dp axis; where they run out,
        stand-ins."""
        assert corpus.count is not None  # held-out text ends
        number, dp = min(self.config.train.validation_sequences, corpus.count), self.mesh.dp
        rounds = -(-number // dp.size)
        indices = [i * dp.size + dp.rank for i in range(rounds)]
        chosen = [i * corpus.count // number if i < number else 0 for i in indices]
        return [self._batch(corpus, corpus.sequence(j), i < number) for i, j in zip(indices, chosen, strict=True)]

    def _batch(self, corpus: Corpus, packed: Packed, counts: bool = True) -> Batch:
        packing, axis = Packing(packed.cu_seqlens, self.spec), self.mesh.cp
        layout = self.cutter(corpus).layout(packing)
        sequence = ShardedSequence(packing, layout, axis, self.device, self.grad_dtype)
        ranges = [(int(a), int(b)) for a, b in layout.segments(axis.rank)]
        tokens, labels = corpus.read(packed, ranges)
        on_device = [torch.from_numpy(x).to(self.device) for x in (tokens, labels)]
        return Batch(on_device[0], on_device[1], sequence, counts)


def forward_backward(config: Config, model: Decoder, batches: list[Batch], mesh: Mesh) -> tuple[float, Ints]:
    """The step's mean loss, gradients left in the parameters; and this rank's bytes under each rival."""
    labels = torch.tensor([sum(b.labelled for b in batches)], dtype=torch.float64, device=home(mesh))
    total = float(all_reduce(mesh.world, labels)) or 1.0  # a global batch without a label has loss 0
    loss, rivals = torch.zeros_like(labels), []
    for batch in batches:
        token_losses = model(batch.tokens_S, batch.labels_S, batch.sequence)
        loss += token_losses.detach().sum(dtype=torch.float64)
        # FSDP2 takes the mean over ranks; wanted is the sum over ranks, over the labels of all.
        (token_losses.sum() * (mesh.world.size / total)).backward()
        rivals.append(rival_tables(config, batch.sequence))
    return float(all_reduce(mesh.world, loss)) / total, np.sum(rivals, axis=0)


@torch.no_grad()
def validate(config: Config, model: Decoder, batches: list[Batch], mesh: Mesh) -> dict[str, Any]:
    """Mean loss over the held-out sequences, and by position in the document: up to 64 tokens, 128, 256 …"""
    edges = [64 << i for i in range(max(1, math.ceil(math.log2(config.data.seq_len / 64)) + 1))]
    sums = torch.zeros(len(edges), 2, dtype=torch.float64, device=home(mesh))
    for batch in batches:
        losses = model(batch.tokens_S, batch.labels_S, batch.sequence).double()
        counted = (batch.labels_S != IGNORED).double() * batch.counts
        bucket = torch.bucketize(
            batch.sequence.position_S, torch.tensor(edges[:-1], device=losses.device), right=True
        )
        sums.index_add_(0, bucket, torch.stack([losses * counted, counted], dim=-1))
    all_reduce(mesh.world, sums)
    mesh.ledger.take()  # a step's traffic is that of training
    total, count = sums.sum(0).tolist()
    by_position = {f"<{edge}": s / n for edge, (s, n) in zip(edges, sums.tolist(), strict=True) if n}
    return {"loss": total / max(count, 1.0), "tokens": int(count), "by_position": by_position}


def traffic_record(mesh: Mesh, rivals: Ints) -> tuple[dict[str, Any], float]:
    """The step's `comm`: mean and maximum over ranks of what was sent and received, and would have been; and for how
    long this rank stood still in collectives (s, measured on CPUs only)."""
    taken = mesh.ledger.take()
    own = as_table(taken)
    tables = torch.from_numpy(np.concatenate([own[None], rivals])).to(home(mesh))
    every = all_gather(mesh.world, tables, "control", "forward").wait().cpu().numpy()
    mesh.ledger.take()  # this gathering is no part of any step
    comm: dict[str, Any] = summarise(every[:, 0])
    possible = {name: every[:, i + 1] for i, name in enumerate(RIVALS) if (every[:, i + 1] >= 0).all()}
    comm["rivals"] = {name: summarise(table) for name, table in possible.items()}
    return comm, sum(totals.exposed_s for totals in taken.values())


def balance_record(mesh: Mesh, predicted: float, worked_s: float) -> dict[str, float]:
    """The busiest rank's work over the mean: by the cost model, and where ranks compute on CPUs as it was."""
    own = torch.tensor([predicted, worked_s], dtype=torch.float64, device=home(mesh))
    every = all_gather(mesh.world, own, "control", "forward").wait().cpu().numpy()
    mesh.ledger.take()  # this gathering is no part of any step
    found = {"predicted_imbalance": imbalance(every[:, 0])}
    return found if own.is_cuda else found | {"measured_imbalance": imbalance(every[:, 1])}


def any_rank(mesh: Mesh, flag: bool, device: torch.device) -> bool:
    """True on every rank where the flag is up on one."""
    return bool(all_reduce(mesh.world, torch.tensor([float(flag)], device=device)))


def all_finite(state: dict[str, Tensor]) -> bool:
    """Whether this rank's part of parameters and optimiser state is finite: a step can overflow after its check."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in state.values())
    return all(bool(x.isfinite().all()) for x in local)


def not_finite(config: Config, step: int, loss: float, norm: float, saved: int) -> str:
    """What is wrong with loss or gradient, or "". Asked before the step is taken, so that neither the parameters
    nor a checkpoint ever hold the damage."""
    for name, value in (("loss", loss), ("grad_norm", norm)):
        if not math.isfinite(value):
            kept = f"the last checkpoint, of step {saved}, is untouched" if saved else "there is no checkpoint yet"
            advice = f"try a train.lr below {config.train.lr:g}, or train.clip"
            if saved:  # auto refuses another learning rate
                advice += f", in a new run.dir with run.resume={store_of(config)}/checkpoints/step-{saved}"
            return f"{name}={value} at step {step}: must be finite; {kept} ({advice})"
    return ""


def keep_evidence(config: Config, step: int, loss: float, norm: float, model: Decoder, mesh: Mesh) -> None:
    """Writes what this rank knows of a loss that isn't finite: `<run>/not-finite/step-N-rank-R.json`."""
    local = ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    parts = ((n, g.to_local() if isinstance(g, DTensor) else g) for n, g in local)
    first = (step - 1) * config.data.batch_size
    facts = {
        "step": step,
        "rank": mesh.world.rank,
        "host": socket.gethostname(),
        "loss": str(loss),
        "grad_norm": str(norm),
        "sequences": list(range(first + mesh.dp.rank, first + config.data.batch_size, mesh.dp.size)),
        "gradients_not_finite": [n for n, g in parts if not bool(g.isfinite().all())],
    }
    folder = Path(config.run.dir) / "not-finite"
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        (folder / f"step-{step}-rank-{mesh.world.rank}.json").write_text(json.dumps(facts, indent=1))


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1, 2, …: linear warm-up, then a cosine, or constant with a linear decay at the end."""
    train = config.train
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "cosine":
        done = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
        return train.lr * (train.min_lr + (1 - train.min_lr) * (1 + math.cos(math.pi * done)) / 2)
    decay = train.decay_steps or max(train.steps // 5, 1)
    left = min(1.0, (train.steps - step) / decay)
    return train.lr * (train.min_lr + (1 - train.min_lr) * left)


def last_step(config: Config, corpus: Corpus) -> int:
    """`train.steps`, or where `data.epochs` end before, but one step at least."""
    if not config.data.epochs:
        return config.train.steps
    return min(config.train.steps, max(corpus.sequences_in(config.data.epochs) // config.data.batch_size, 1))


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def summary(config: Config, model: Decoder, corpus: Corpus, start: int, steps: int) -> str:
    """What is about to be trained, in one line."""
    if start >= steps:
        return f"nothing to do: step {start} of {steps} is reached; a larger train.steps goes on"
    parallel, parameters = config.parallel, sum(p.numel() for p in model.parameters())
    begin = f"from step {start}" if start else "from the start"
    return (
        f"{parameters:,} parameters, {steps} steps {begin}, {config.data.batch_size} sequences of "
        f"{config.data.seq_len:,} tokens a step, {corpus.tokens_per_epoch:,} tokens an epoch; "
        f"dp {parallel.dp} x cp {parallel.cp}, {parallel.layout}, exchange {parallel.exchange}"
    )


def home(mesh: Mesh) -> torch.device:
    """Where this rank computes."""
    return torch.device(mesh.parameters.device_type)

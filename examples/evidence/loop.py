"""One training run: a model, its batches and a folder to resume from.

In: a model (or a rewritten one), a corpus, a `Plan`. Out: a `Record` with every loss, and the trained model. After
each validation the folder holds model, optimizer, random states and record, so that a run that was stopped goes on as
if it had not been: bit for bit on a CPU. A loss that is not finite ends the run; what was recorded stays.
"""

import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from model import INIT_STD
from settings import Preset
from text import Corpus
from torch import Tensor, nn
from torch.nn import functional as F

import attnres_rewrite as ar

Say = Callable[[int, float, float | None], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how fast, and from which draw of batches; `read_lr` times `lr` is the rate of queries and gains.

    `started_at` is the validation loss of the checkpoint that is trained on, None from the start, where embeddings are
    drawn with the standard deviation `embedding_std`.
    """

    steps: int
    warmup: int
    lr: float
    batch_seed: int
    read_lr: float = 1.0
    started_at: float | None = None
    embedding_std: float = INIT_STD


@dataclass(slots=True)
class Record:
    """What a run left: a training loss a step, [step, loss] of each validation, in nats a byte.

    `ended` says why a run stopped early, and is None otherwise.
    """

    train_loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    final_validation: float | None = None
    seconds: float = 0.0
    ended: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; a loss that is not finite becomes None."""
        facts = asdict(self)
        facts["train_loss"] = [_plain(loss) for loss in self.train_loss]
        facts["validation"] = [[step, _plain(loss)] for step, loss in self.validation]
        return facts


def _plain(loss: float) -> float | None:
    return round(loss, 6) if math.isfinite(loss) else None


def train(
    model: nn.Module,
    corpus: Corpus,
    preset: Preset,
    plan: Plan,
    folder: Path,
    say: Say = lambda step, train, validation: None,
    stop_at: int | None = None,
) -> Record:
    """Train `model` in place, from the checkpoint in `folder` if there is one, and return what happened.

    Args:
        model: On the preset's device.
        corpus: What it reads.
        preset: Sizes of batches and validations, and the optimizer's constants.
        plan: Steps, learning rate and batches.
        folder: Where the checkpoint is; it is made if need be.
        say: Called after each step with step, training loss and, where there was one, validation loss.
        stop_at: Leave after the first validation at or behind this step, as if the machine had been switched off.

    Raises:
        ValueError: The checkpoint is of a run with another preset, plan, text, read, machine or release.
    """
    optimizer = optimizer_for(model, plan.lr, preset, plan.read_lr)
    batches = torch.Generator().manual_seed(plan.batch_seed)
    record, path = Record(), folder / "checkpoint.pt"
    settings = {**preset.facts(), **asdict(plan), "text": corpus.sha256, "read": read_of(model), **machine(preset)}
    if path.exists():
        record = restore(path, settings, model, optimizer, batches)
    if record.final_validation is not None or record.ended:
        return record
    run = torch.compile(model) if preset.compile else model
    start = time.perf_counter() - record.seconds
    for step in range(len(record.train_loss) + 1, plan.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan) * group["scale"]
        loss = training_step(run, draw(corpus.train, preset, batches), optimizer, preset)
        record.train_loss.append(loss)
        if not math.isfinite(loss):
            record.ended = f"the loss is {loss} at step {step}"
        found = None
        if step % preset.validate_every == 0 or step == plan.steps or record.ended:
            found = validate(run, corpus.validation, preset, preset.validation_windows)
            record.validation.append((step, found))
            if step == plan.steps and not record.ended:
                end(record, validate(run, corpus.validation, preset, preset.final_windows))
            record.seconds = time.perf_counter() - start
            save(path, settings, model, optimizer, batches, record)
        say(step, loss, found)
        if record.ended or (found is not None and stop_at is not None and step >= stop_at):
            break
    return record


def end(record: Record, loss: float) -> None:
    """Note the final validation loss; one that is not finite is no result."""
    if math.isfinite(loss):
        record.final_validation = loss
    else:
        record.ended = f"the final validation loss is {loss}"


def read_of(model: nn.Module) -> str:
    """Return the config of a rewritten model as text; "" of the original."""
    return str(model.config) if isinstance(model, ar.RewrittenModule) else ""


def machine(preset: Preset) -> dict[str, Any]:
    """Return the versions and, in general words, the machine: with others a run would not end with the same figures."""
    on_gpu = preset.device.startswith("cuda")
    return {
        "torch": str(torch.__version__),
        "attnres_rewrite": ar.__version__,
        "device_name": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def training_step(run: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer, preset: Preset) -> float:
    """Make one step on bytes [batch, context + 1] and return the loss before it."""
    with precision(preset):
        loss = loss_of(run, ids)
    # the weights that gave such a loss are kept as they are
    if not math.isfinite(found := loss.item()):
        return found
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, preset.clip)
    optimizer.step()
    return found


def optimizer_for(model: nn.Module, lr: float, preset: Preset, read_lr: float = 1.0) -> torch.optim.AdamW:
    """Return AdamW over three groups: matrices, with weight decay; vectors; parameters of reads, if any.

    The last group learns at `read_lr` times the rate of the others: its `scale`.
    """
    try:
        reads = ar.attnres_parameters(model)
    except ar.NotAttachedError:
        reads = []
    of_reads = {id(parameter) for parameter in reads}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in of_reads]
    matrices = [parameter for parameter in rest if parameter.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": preset.weight_decay, "scale": 1.0},
        {"params": [parameter for parameter in rest if parameter.ndim == 1], "scale": 1.0},
    ]
    if reads:
        groups.append({"params": reads, "lr": lr * read_lr, "scale": read_lr})
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def learning_rate(step: int, plan: Plan) -> float:
    """Return a linear warm-up, then half a cosine down to a tenth; steps count from 1."""
    if step <= plan.warmup:
        return plan.lr * step / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def draw(text: Tensor, preset: Preset, batches: torch.Generator) -> Tensor:
    """Return bytes [batch, context + 1] from anywhere in `text`."""
    starts = torch.randint(0, len(text) - preset.context, (preset.batch,), generator=batches)
    return windows(text, starts, preset)


def windows(text: Tensor, starts: Tensor, preset: Preset) -> Tensor:
    """Return bytes [starts, context + 1], int64, on the preset's device."""
    return text[starts[:, None] + torch.arange(preset.context + 1)].long().to(preset.device)


def loss_of(run: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next byte, in nats, of bytes [batch, context + 1]."""
    return F.cross_entropy(run(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validate(run: nn.Module, text: Tensor, preset: Preset, count: int) -> float:
    """Return the mean loss over `count` windows, evenly spread over `text`: the same ones for every model."""
    starts = torch.linspace(0, len(text) - preset.context - 1, count).long()
    # as many windows at a time as in training, so that a compiled model is compiled once
    losses: list[float] = []
    for part in starts.split(preset.batch):
        with precision(preset):
            losses.append(loss_of(run, windows(text, part, preset)).item() * len(part))
    return sum(losses) / count


def precision(preset: Preset) -> AbstractContextManager[object]:
    """Return the context that a forward pass runs in."""
    return torch.autocast(preset.device, torch.bfloat16) if preset.autocast else nullcontext()


def save(
    path: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: torch.Generator,
    record: Record,
) -> None:
    """Write a checkpoint; a machine that stops meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "batches": batches.get_state(),
        "rng": torch.get_rng_state(),
        "record": asdict(record),
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def restore(
    path: Path,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: torch.Generator,
) -> Record:
    """Load what `save` wrote into the model, the optimizer and the generators, and return the record."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if other := [name for name, value in settings.items() if state["settings"].get(name) != value]:
        spelled = "; ".join(f"{name} {state['settings'].get(name)} there, {settings[name]} now" for name in other)
        raise ValueError(f"{path} is of another run ({spelled}): give another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    batches.set_state(state["batches"])
    torch.set_rng_state(state["rng"])
    return Record(**state["record"])

"""The options that commands share, and what they become: a config, and a loaded model.

Each is an annotated type, so that it is called and explained alike wherever a command takes it.
"""

import functools
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

import attnres_rewrite as ar
from attnres_rewrite.cli import load, render
from attnres_rewrite.cli.device import device_from, on_device

MODEL_HELP = (
    "FILE.py[:factory], package.module:factory, a Hugging Face folder (one that was trained with reads keeps them), "
    "X.pt2, or a saved rewrite. "
    "A factory takes no arguments and returns a module, or (module, args), or (module, args, kwargs)."
)
WARNING = (
    "Naming a FILE.py or a module runs its code. Loading a .pt2 can run code as well: torch unpickles what "
    "the file holds. Use only files that you trust. Hugging Face folders and saved rewrites are data: "
    "their code is never run and nothing is unpickled."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Blocks = Annotated[
    str | None,
    typer.Option(metavar="N|full", help="Blocks of each stream; full is one update a block. Default 8."),
]
BlockSize = Annotated[int | None, typer.Option(metavar="S", help="Updates a block, instead of --blocks.")]
BlockLayers = Annotated[int | None, typer.Option(metavar="N", help="Layers a block, instead of --blocks.")]
Output = Annotated[
    str,
    typer.Option(
        metavar="sum|mean",
        help="sum: at zero queries exactly the original. mean: the paper to the letter.",
    ),
]
Schedule = Annotated[str, typer.Option(metavar="auto|direct|two_phase", help="The order in which reads are computed.")]
NoKeyNorm = Annotated[bool, typer.Option("--no-key-norm", help="No learned gain on the normalised keys.")]
Heads = Annotated[int, typer.Option(metavar="H", help="Heads of each read, groups of channels that mix alone.")]
KeyRank = Annotated[int | None, typer.Option(metavar="R", help="Keys are the last R channels. Not with --heads.")]
Gate = Annotated[bool, typer.Option("--gate", help="Add reads to the running sum, through gates that start at zero.")]
RecencyBias = Annotated[
    float, typer.Option(metavar="B", help="On the logit of the newest source. Starts as another network unless gated.")
]
Meta = Annotated[
    bool,
    typer.Option("--meta", help="Build a Hugging Face folder from its config.json, with no weights at all."),
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help=f"Batch of a Hugging Face model's example inputs. Default {load.BATCH}."),
]
Seq = Annotated[
    int | None,
    typer.Option(min=1, help=f"Sequence length of those inputs. Default {load.SEQ}."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda[:N]", help="Move the model there first, and its inputs. Default: where it is."),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print facts as JSON on stdout, and nothing else. A figure that was not taken is null, one that is not "
        'finite is text: "NaN", "Infinity" or "-Infinity".',
    ),
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Run no proof: the result is unproven.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a rewrite that is there already.")]


def epilog(*examples: str) -> str:
    """Return what stands below the help of a command: examples, and the warning."""
    return "\n\n".join(["Examples:", *(f"  attnres-rewrite {line}" for line in examples), WARNING])


def config_from(
    blocks: Blocks = None,
    block_size: BlockSize = None,
    block_layers: BlockLayers = None,
    output: Output = "sum",
    schedule: Schedule = "auto",
    no_key_norm: NoKeyNorm = False,
    heads: Heads = 1,
    key_rank: KeyRank = None,
    gate: Gate = False,
    recency_bias: RecencyBias = 0.0,
) -> "ar.AttnResConfig":
    """Return the config that the options of a command say."""
    return ar.AttnResConfig(
        num_blocks=_count_or_full(blocks),
        block_size=block_size,
        block_layers=block_layers,
        output=output,  # pyright: ignore[reportArgumentType]  # AttnResConfig checks it
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        key_norm=not no_key_norm,
        num_heads=heads,
        key_rank=key_rank,
        gate=gate,
        recency_bias=recency_bias,
    )


def plans(*, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `config_from`, but for some, in the place of its parameter `config`.

    def inspect(model: Model, config: "ar.AttnResConfig", meta: Meta = False)
    ->  inspect(model, blocks, block_size, ..., recency_bias, meta), as typer sees it
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        options = [option for name, option in signature(config_from).parameters.items() if name not in without]
        parameters: list[Parameter] = []
        for parameter in signature(command).parameters.values():
            parameters += options if parameter.name == "config" else [parameter]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {option.name: given.pop(option.name) for option in options}
            command(config=config_from(**chosen), **given)

        # typer reads both
        run.__dict__["__signature__"] = signature(command).replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return with_options


def _count_or_full(blocks: str | None) -> int | str | None:
    if blocks is None or blocks == "full":
        return blocks
    try:
        return int(blocks)
    except ValueError:
        raise ValueError(f"--blocks {blocks} must be a count or full") from None


def load_model(
    model: str, config: "ar.AttnResConfig", meta: bool, batch: int | None, seq: int | None, device: str | None
) -> load.Loaded:
    """Load the model that MODEL names, move it if so asked, and print the loader's notes.

    Raises:
        ValueError: It is a saved rewrite, and the options plan another one; or there is no such device.
    """
    where = device_from(device, meta)
    is_planned = config != ar.AttnResConfig()
    if is_planned and load.is_artifact(model):
        raise ValueError(f"{model} is a rewrite already: the options that plan one do not apply to it")
    with render.working("load the model"):
        found = load.load(model, meta=meta, batch=batch, seq=seq, device=where)
        if where is not None:
            found = on_device(found, where)
    if is_planned and found.kind in ("rewrite", "attached"):
        raise ValueError(f"{model} gives a model with reads: the options that plan some do not apply to it")
    for text in found.notes:
        render.warning(text)
    return found


def refuse_meta(meta: bool, command: str) -> None:
    """Refuse --meta where `command` runs the model, with a ValueError."""
    if meta:
        raise ValueError(
            f"--meta builds tensors without data, so {command} could neither prove nor save anything: "
            "inspect, partition and report take it"
        )

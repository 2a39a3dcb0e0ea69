"""What every result file says: the machine it was measured on, settings and rows; and how to wait for a GPU."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def machine_facts() -> dict[str, Any]:
    """Return device, versions and commit."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores, {_processor()}",
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    """Return the architecture, and with which of the instructions that matrix products are made of."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return platform.machine()
    return ", ".join([platform.machine(), *(name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags)])


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_as_they_come(options: argparse.Namespace, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the results after each row: a run that is cut short keeps what it has."""
    found: list[Mapping[str, Any]] = []
    for row in rows:
        found.append(row)
        write_results(options, found)


def write_results(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to the file of --json, if one is given, with the other options."""
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "compile_only")}
        facts = {"machine": machine_facts(), "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


def synchronize(device: str) -> None:
    """Wait for what was launched on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()

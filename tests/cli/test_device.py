"""Mirrors attnres_rewrite/cli/device.py. Meta is a device that every machine has."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import attnres_rewrite as ar
from attnres_rewrite.cli.device import device_from, moved, on_device
from attnres_rewrite.cli.load import Loaded
from tests.networks import ids
from tests.test_moving import Masked, masked

EXAMPLES = Path(__file__).parents[2] / "examples"
META = torch.device("meta")


def test_a_device_is_read():
    assert device_from("cpu", meta=False) == torch.device("cpu")
    assert device_from(None, meta=True) is None


@pytest.mark.parametrize(
    ("text", "meta", "message"),
    [
        ("gpu", False, "--device gpu is no device of torch, such as cpu, cuda or cuda:1"),
        ("", False, "is no device of torch"),
        ("cuda:99", False, "--device cuda:99: this machine has no such device ("),
        ("meta", False, "--device meta holds no numbers"),
        ("cpu", True, "leave out --device cpu"),
    ],
)
def test_what_is_no_device_here_is_refused(cli, text, meta, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        device_from(text, meta)
    done = cli("inspect", EXAMPLES / "qwen3_small", "--device", text, *(["--meta"] if meta else []))
    assert done.code == 2
    assert message in done.err


def test_a_module_moves_with_its_inputs():
    found = on_device(Loaded(nn.Linear(2, 3), (torch.ones(2),), {"flag": True, "more": [torch.ones(1)]}), META)
    assert found.model.weight.is_meta
    assert found.args[0].is_meta
    assert found.kwargs["more"][0].is_meta
    assert found.kwargs["flag"] is True


@pytest.mark.parametrize("shapes", [None, {"ids": {0: Dim.AUTO, 1: Dim.AUTO}}])
def test_an_exported_program_moves_with_what_it_makes_and_stays_tied(shapes):
    model = Masked().eval()
    model.gpt.head.weight = model.gpt.embed.weight
    program = torch.export.export(model, (ids(),), dynamic_shapes=shapes)
    found = on_device(Loaded(program, *program.example_inputs), META)
    new = ar.rewrite(found.model, found.args, found.kwargs, verify=False)
    assert new(*found.args).is_meta
    assert new.get_parameter("gpt.head.weight") is new.get_parameter("gpt.embed.weight")


def test_a_batch_moves_in_its_own_way():
    class Encoding(dict):
        def to(self, device):
            return f"moved to {device}"

    assert moved(Encoding(), META) == "moved to meta"
    assert moved(torch.ones(2), META).is_meta
    batch = moved({"ids": torch.ones(2), "names": ["a"]}, META)
    assert batch["ids"].is_meta
    assert batch["names"] == ["a"]


def test_every_command_takes_a_device(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_cpu = ("--device", "cpu")
    ar.save(masked()[1], tmp_path / "masked.attnres")
    for command in ("inspect", "verify", "report", "partition"):
        ranks = ("--ranks", 2) if command == "partition" else ()
        done = cli(command, "masked.attnres", *ranks, *on_cpu)
        assert done.code == 0, done.out + done.err
    done = cli("diagnose", "masked.attnres", "--no-plots", *on_cpu)
    assert done.code == 0, done.out + done.err
    done = cli("rewrite", EXAMPLES / "gpt.py", "--no-verify", *on_cpu)
    assert done.code == 0, done.out + done.err

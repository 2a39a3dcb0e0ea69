"""The options that plan a rewrite, which every command has from one place."""

import inspect

import pytest

import attnres_rewrite as ar
from attnres_rewrite.cli import options
from attnres_rewrite.cli.diagnose import diagnose
from attnres_rewrite.cli.inspect import inspect as inspect_command
from attnres_rewrite.cli.partition import partition
from attnres_rewrite.cli.report import report
from attnres_rewrite.cli.rewrite import rewrite
from attnres_rewrite.cli.verify import verify

PLANNING = list(inspect.signature(options.config_from).parameters)


@pytest.mark.parametrize("command", [inspect_command, rewrite, verify, report, diagnose, partition])
def test_every_command_has_them_with_the_same_help(command):
    names = list(inspect.signature(command).parameters)
    # a pipeline has a schedule of its own, and a diagnosis does not depend on that of the reads
    wanted = [name for name in PLANNING if name != "schedule" or command not in (diagnose, partition)]
    assert [name for name in names if name in PLANNING] == wanted
    assert "config" not in names
    assert command.__annotations__.keys() == set(names)


def test_a_command_is_given_their_config():
    seen = []

    @options.plans(without=("gate",))
    def command(model: str, config: ar.AttnResConfig, meta: bool = False) -> None:
        seen.append((model, config, meta))

    names = list(inspect.signature(command).parameters)
    assert names == ["model", *(name for name in PLANNING if name != "gate"), "meta"]
    given = {name: option.default for name, option in inspect.signature(command).parameters.items()}
    command(**given | {"model": "m", "blocks": "full", "no_key_norm": True, "meta": True})
    assert seen == [("m", ar.AttnResConfig(num_blocks="full", key_norm=False), True)]

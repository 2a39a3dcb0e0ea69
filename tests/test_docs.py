"""The pages say everything there is to say: every public name, every command, every result.

`make docs` builds the site and fails on a warning; what is here needs no mkdocs.
"""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import attnres_rewrite as ar
from attnres_rewrite import errors, functional
from tests import networks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "hooks"))

import commands  # noqa: E402
import measurements  # noqa: E402
import self_contained  # noqa: E402


def page(name):
    return (DOCS / name).read_text()


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    for name in set(ar.__all__) - {"__version__"}:
        value = getattr(ar, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            continue  # the page of errors shows the whole module
        assert re.search(rf"^::: attnres_rewrite\.(\w+\.)*{name}$", text, re.MULTILINE), name
    assert "::: attnres_rewrite.errors" in text
    for name in functional.__all__:
        assert re.search(rf"members: \[.*\b{name}\b", page("reference/functional.md")), name


def test_page_of_examples_includes_every_example():
    included = re.findall(r'^    --8<-- "examples/(\w+\.py)"$', page("examples.md"), re.MULTILINE)
    assert included == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_tree_of_errors_has_every_error_at_its_depth():
    found = re.findall(r"^    ( *)(\w+Error) ", errors.__doc__, re.MULTILINE)
    depths = {name: len(spaces) // 2 for spaces, name in found}
    real = {
        name: len(value.__mro__) - len(errors.RewriteError.__mro__)
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.RewriteError)
    }
    assert depths == real


def test_page_of_commands_has_every_option_of_the_help():
    text = commands.on_page_markdown(page("reference/commands.md"))
    group = commands.typer.main.get_command(commands.app)
    assert commands.PLACE not in text
    for name, command in group.commands.items():
        _, _, section = text.partition(f"\n## `{name}`\n")
        section = section.partition("\n## ")[0]
        assert command.help.split("\n")[0] in section
        for parameter in command.params:
            spelled = parameter.opts[-1] if parameter.opts[-1].startswith("-") else parameter.metavar
            assert re.search(rf"^\* `(-\w, )?{spelled}\b", section, re.MULTILINE), (name, spelled)
        assert f"\n    attnres-rewrite {name} " in section


def test_a_tag_in_a_help_text_is_shown_and_not_taken_for_html():
    assert commands._without_tags("* `-o <path>`: Default: <name>.attnres") == (
        "* `-o <path>`: Default: &lt;name>.attnres"
    )


def test_page_of_benchmarks_says_whether_kernels_were_timed():
    # `make gpu` writes these
    timed = any((measurements.RESULTS / f"{name}_cuda.json").exists() for name in ("reads", "step"))
    assert ("**No GPU result of the kernels exists yet.**" in page("benchmarks.md")) == (not timed)


def test_page_of_benchmarks_shows_the_figures_and_where_they_come_from():
    text = measurements.on_page_markdown(page("benchmarks.md"))
    facts = json.loads((measurements.RESULTS / "step_cpu.json").read_text())
    assert facts["machine"]["device"] in text
    assert facts["machine"]["commit"] in text
    for row in facts["rows"]:
        assert f"| {row['ms']:,.0f} | {row['ratio']:.2f} |" in text
    proven = sum(
        row["outcome"] == "proven" for row in json.loads((measurements.RESULTS / "zoo.json").read_text())["rows"]
    )
    assert f"| proven | {proven} |" in text


@pytest.mark.parametrize(
    ("html", "num_found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ("<link rel=stylesheet href=//fonts.example/css>", 1),
        ('<img alt="x" src="http://example/x.png">', 1),
        ('<a href="https://arxiv.org/abs/2603.15031">paper</a><script src="assets/x.js"></script>', 0),
    ],
)
def test_a_page_that_loads_from_another_host_is_noticed(html, num_found):
    assert len(self_contained.loads_from_elsewhere(html)) == num_found


def test_picture_of_block_caching_shows_what_a_plan_sends():
    new = ar.rewrite(networks.gpt(depth=4), (networks.ids(),), None, ar.AttnResConfig(num_blocks=4), {}, verify=False)
    plan = ar.partition(new, num_ranks=2, num_virtual=2, cuts="blocks")
    drawn = re.findall(r">(e, B1[^<]*|B\d[^<]*)</text>", page("figures/block_caching.svg"))
    hops = [len(sent.split(",")) for sent in drawn]
    assert len(hops) == 9
    for row, mode in enumerate(("naive", "paper", "exact")):
        assert tuple(hops[3 * row : 3 * row + 3]) == plan.traffic[mode].per_hop_units


@pytest.mark.parametrize("blocks", ["full", 2])
def test_picture_of_the_sources_shows_those_of_a_plan(blocks):
    report = ar.inspect(networks.gpt(depth=3), (networks.ids(),), None, ar.AttnResConfig(num_blocks=blocks), {})
    squares = re.findall(
        r'<rect x="(\d+)" y="(\d+)" width="27" height="27" rx="3" class="(\w+)"', page("figures/sources.svg")
    )
    left = 360 if blocks == 2 else 0
    rows = {}
    for x, y, kind in squares:
        if left <= int(x) < left + 360 and kind != "faint":
            rows[int(y)] = rows.get(int(y), 0) + 1
    assert [rows[y] for y in sorted(rows)] == [read.num_sources for read in report.reads]


def test_pictures_load_nothing_and_have_a_title():
    for path in (DOCS / "figures").glob("*.svg"):
        text = path.read_text()
        assert "<title>" in text
        assert "href" not in text
        assert "prefers-color-scheme: dark" in text

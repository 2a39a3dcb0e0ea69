"""The page as a parser sees it: whole, escaped, and in need of nothing else."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import attnres_rewrite as ar
from attnres_rewrite.page.html_report import size_text, time_text
from tests.networks import gpt, ids

VOID = {"meta", "link", "img", "input", "br"}
PLOT = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


class Page(HTMLParser):
    """What is in a page: every element with its attributes, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data
        if "td" in self.open or ("th" in self.open and "thead" in self.open) or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *columns: str) -> list[list[str]]:
        """Return the rows of the table that has these columns among its own."""
        return next(table for table in self.tables if set(columns) <= set(table[0]))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def new():
    return ar.rewrite(gpt(4), (ids(),), config=ar.AttnResConfig(num_blocks=4), dynamic_shapes={})


@pytest.fixture(scope="module")
def text(new):
    return ar.html_report(new)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_every_element_is_closed_and_every_row_is_whole(page):
    assert not page.open
    assert all(len(row) == len(table[0]) for table in page.tables for row in table)


def test_ids_are_unique_and_references_lead_somewhere(page):
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [link["href"].removeprefix("#") for link in page.all("a")]
    labels = [name for _, attributes in page.elements for name in (attributes.get("aria-labelledby") or "").split()]
    assert {*links, *labels} <= set(names)
    assert len(links) >= 8


def test_every_read_is_there(new, page):
    rows = page.table("State", "Query")[1:]
    assert len(rows) == 8
    for row, read in zip(rows, new.report.reads, strict=True):
        assert row[0] == str(read.state)
        assert row[1] == (read.owner or "(the model)")
        assert row[2].endswith(f"networks.py:{read.source_line.rpartition(':')[2]}")
        assert row[3:5] == [str(read.num_sources), read.query_name]
        assert row[6] == (", ".join(read.fused_with) or "\N{EN DASH}")


def test_every_add_left_alone_is_there_with_its_reason(new, page):
    rows = page.table("Node", "Reason")[1:]
    assert [(row[0], row[3]) for row in rows] == [(add.node, add.reason) for add in new.report.left_alone]
    counted = page.table("Adds", "Reason")[1:]
    assert sum(int(row[0]) for row in counted) == len(rows) > 0


def test_every_proof_is_there_with_its_figures(new, page):
    rows = page.table("Proof", "Verdict")[1:]
    assert [row[0] for row in rows] == ["capture", *["original", "independent"]]
    for row, proof in zip(rows, new.report.verify.proofs, strict=True):
        assert float(row[3]) == pytest.approx(proof.output_error, rel=0.05)
        assert row[8] == "proven"


def test_the_bytes_of_every_group(new, page):
    rows = page.table("Group", "Chosen")[1:]
    shown = [[int(cell.replace(",", "")) for cell in row[1:6]] for row in rows]
    groups = new.report.streams[0].groups
    assert shown == [
        [group.num_finished, len(group.reads), group.num_merges, group.direct_bytes, group.two_phase_bytes]
        for group in groups
    ]


def test_it_needs_nothing_else(text, page):
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"@import|url\(", text)
    for _, attributes in page.elements:
        for name in ("src", "href", "data", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not any(name == "style" or name.startswith("on") for name in attributes)


def test_the_policy_allows_its_own_style_and_script_alone(text, page):
    policy = page.all("meta")[1]["content"]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    for directive, inline in (("style-src", style.group(1)), ("script-src", page.scripts[0])):
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert parts[directive] == f"'sha256-{digest}'"


def test_the_page_is_the_same_each_time(new, text):
    assert ar.html_report(new) == text


def test_hostile_names_are_text(report, hostile):
    page = Page(ar.html_report(report, figures={hostile: PLOT}))
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.open
    # the model, the stream, what runs, a module, a file, a parameter, a reason ...: 20 places at the least
    assert page.text.count(hostile) >= 20
    assert page.all("img")[0]["alt"] == hostile


def test_a_figure_is_a_picture(report):
    text = ar.html_report(report, figures={"Depth attention": PLOT})
    page = Page(text)
    data = page.all("img")[0]["src"].removeprefix("data:image/svg+xml;base64,")
    assert base64.b64decode(data).decode() == PLOT
    assert "What the network learnt" in page.text
    assert "What the network learnt" not in Page(ar.html_report(report)).text


def test_a_figure_without_colours_for_a_dark_page_stands_on_white(report):
    adaptive = PLOT.replace("<script>", "<style>@media(prefers-color-scheme:dark){}</style><script>")
    page = Page(ar.html_report(report, figures={"one": PLOT, "other": adaptive}))
    assert [figure["class"] for figure in page.all("figure")] == ["plot on-white", "plot"]


def test_a_diagnosis_has_its_plots_and_says_how_they_were_made(new):
    found = ar.diagnose(new.eval(), [ids(), ids()])
    page = Page(ar.html_report(new, diagnosis=found, figures={"mine": PLOT}))
    plots = [figure["class"] for figure in page.all("figure") if "plot" in (figure.get("class") or "")]
    assert plots == ["plot"] * 4 + ["plot on-white"]
    for line in ("Modeeval", f"Batches2, with {2 * ids().numel()} tokens in the figures", "Choicesnum_blocks=4"):
        assert line in page.text
    assert ar.html_report(new, diagnosis=found) == ar.html_report(new, diagnosis=found)


def test_a_diagnosis_that_does_not_belong_here(new, report):
    found = ar.diagnose(new.eval(), [ids()])
    with pytest.raises(ar.ArtifactError, match="this is the diagnosis of another model"):
        ar.html_report(report, diagnosis=found)
    with pytest.raises(ValueError, match="has no figures to plot: no batch was finite"):
        ar.html_report(new, diagnosis=replace(found, streams=()))


def test_without_proofs_it_says_so(report):
    page = Page(ar.html_report(replace(report, verify=None)))
    assert "Nothing was proven." in page.text
    assert "Proven." not in page.text


def test_a_failed_proof_is_no_small_print(report):
    failed = replace(report.verify.proofs[0], output_error=float("nan"))
    bad = replace(report, verify=replace(report.verify, proofs=(failed, report.verify.proofs[1])))
    page = Page(ar.html_report(bad))
    assert "Not proven. 1 of 2 proofs failed." in page.text
    assert [row[8] for row in page.table("Proof", "Verdict")[1:]] == ["failed", "proven"]


def test_it_says_that_a_recency_bias_changes_the_start(report):
    def text(**variant: object) -> str:
        return Page(ar.html_report(replace(report, config={"key_norm": True, "param_dtype": None} | variant))).text

    assert "does NOT start" not in text()
    biased = text(recency_bias=2.0)
    assert "does NOT start as the original: recency_bias=2.0" in biased
    assert "at zero queries, with the recency bias left out, the rewritten" in biased
    gated = text(recency_bias=2.0, gate=True)
    assert "does NOT start" not in gated
    assert "at zero gates, whatever the queries, the rewritten" in gated
    assert "added to" in gated


def test_a_report_alone_has_no_picture_of_a_layer(report):
    page = Page(ar.html_report(report))
    assert not page.all("svg")
    assert "A report alone holds no graph" in page.text


def test_blocks_of_one_update_are_full_attention_residuals(report):
    (stream,) = report.streams
    assert "reads of Block Attention Residuals" in ar.html_report(report)
    full = replace(report, streams=(replace(stream, blocks=((1, 1), (2, 2), (3, 3))),))
    assert "reads of Full Attention Residuals" in ar.html_report(full)


def test_several_streams_are_told_apart(report):
    two = replace(report, streams=(report.streams[0], replace(report.streams[0], name="decoder")))
    rows = Page(ar.html_report(two)).table("Stream", "State")[1:]
    assert [row[0] for row in rows].count("decoder") == 2


def test_a_saved_rewrite_has_its_stored_proofs_and_a_picture(new, tmp_path):
    ar.save(new, tmp_path / "saved")
    page = Page(ar.html_report(ar.load(tmp_path / "saved")))
    assert len(page.all("svg")) == 2
    assert page.table("Proof", "Verdict")[1][8] == "proven"
    assert "a saved rewrite keeps no sizes" in page.text


def test_what_is_no_rewrite_is_refused():
    with pytest.raises(TypeError, match="not Gpt"):
        ar.html_report(gpt())


def test_what_is_no_diagnosis_is_refused(report):
    with pytest.raises(TypeError, match=r"what diagnose\(\) or Diagnosis.load\(\) returned, not dict"):
        ar.html_report(report, diagnosis={})


def test_what_is_no_svg_is_refused(report):
    with pytest.raises(ValueError, match="'map' is no SVG text: it begins with 'PNG'"):
        ar.html_report(report, figures={"map": "PNG"})
    with pytest.raises(ValueError, match="'map' is no SVG text: it begins with b'<svg'"):
        ar.html_report(report, figures={"map": b"<svg"})


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.54 kB"), (999_600, "1 MB"), (3.2e9, "3.2 GB"), (5e15, "5,000 TB")],
)
def test_sizes(num_bytes, shown):
    assert size_text(num_bytes) == shown


@pytest.mark.parametrize(("ns", "shown"), [(0, "0 ns"), (999.6, "1 µs"), (1500, "1.5 µs"), (1.2345e9, "1,234 ms")])
def test_times(ns, shown):
    assert time_text(ns) == shown

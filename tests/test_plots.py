"""Mirrors attnres_rewrite/plots.py: what is drawn, how large, and what is refused."""

import itertools
import re
import sys
from dataclasses import replace

import pytest

from attnres_rewrite.diagnosis import Diagnosis, ReadDiagnosis, StreamDiagnosis, UpdateDiagnosis
from attnres_rewrite.errors import ArtifactError, MissingPackageError
from attnres_rewrite.plot_style import DARK, INK

np = pytest.importorskip("numpy")
matplotlib = pytest.importorskip("matplotlib")

from matplotlib.patches import StepPatch  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from attnres_rewrite import plots  # noqa: E402


def diagnosis(num_updates: int, num_blocks: int, baseline: bool = True, streams: int = 1) -> Diagnosis:
    ends = [num_updates * block // num_blocks for block in range(num_blocks + 1)]
    blocks = tuple((first + 1, last) for first, last in itertools.pairwise(ends))
    reads, updates = [], []
    for k in range(1, num_updates + 1):
        block = next(number for number, (_, last) in enumerate(blocks, start=1) if k <= last)
        weights = np.arange(1.0, block + 2)
        weights = tuple((weights / weights.sum()).tolist())
        sources = ("embedding", *(f"block {number}" for number in range(1, block + 1)))
        before = "" if k == num_updates else "mlp" if k % 2 else "attention"
        reads.append(ReadDiagnosis(f"{k}.attn_res.0", k, str(k), before, sources, weights, weights, 0.5, 1.6, 1.0))
        other = (1.0 + k, 2.0 * k, 1.0, 3.0 / k) if baseline else (None,) * 4
        updates.append(UpdateDiagnosis(k, str(k), before, block, k - 1, 1.0, 1.5, 1.0, 0.3, *other))
    kind, loss = ("own", 2.1) if baseline else ("", None)
    one = StreamDiagnosis("stream", 8, 10, blocks, 1.0, 1.0 if baseline else None, tuple(reads), tuple(updates))
    return Diagnosis("Tiny", "eval", 1, 0, (), 2.0, kind, loss, (one,) * streams)


def test_the_map_has_the_weights_and_blanks():
    figure = plots.depth_attention(diagnosis(6, 3))
    (image,) = figure.axes[0].get_images()
    cells = image.get_array().filled(np.nan)
    assert cells.shape == (6, 4)
    assert np.allclose(cells[0], [1 / 3, 2 / 3, np.nan, np.nan], equal_nan=True)
    assert np.allclose(cells[5], [0.1, 0.2, 0.3, 0.4])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["1 mlp", "2 attn"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["emb", "1", "2", "3"]
    # a black line below the reads of each block but the last, as wide as the sources there are
    black = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_color() == "black"]
    assert black == [[[-0.5, 1.5], [1.5, 1.5]], [[-0.5, 3.5], [2.5, 3.5]]]


@pytest.mark.parametrize("plot", plots.PLOTS.values(), ids=plots.PLOTS)
@pytest.mark.parametrize(("updates", "blocks"), [(4, 2), (24, 8), (96, 96)])
def test_a_figure_fits_a_column_and_can_be_read(plot, updates, blocks):
    figure = plot(diagnosis(updates, blocks), 0)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    assert width >= 3.3
    assert height <= 7
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(text.get_fontsize() for text in shown) >= 7
    drawn = figure.get_tightbbox()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.01


@pytest.mark.parametrize("plot", [plots.magnitudes, plots.gradient_norms])
def test_lines_are_the_figures(plot):
    name = "gradient_norm" if plot is plots.gradient_norms else "sum_rms"
    one = diagnosis(6, 3)
    original, new = plot(one).axes[0].lines
    assert list(new.get_ydata()) == [getattr(update, name) for update in one.streams[0].updates]
    assert list(original.get_ydata()) == [getattr(update, f"baseline_{name}") for update in one.streams[0].updates]
    assert new.get_marker() != original.get_marker()
    assert len(plot(diagnosis(6, 3, baseline=False)).axes[0].lines) == 1


def test_files(tmp_path):
    made = plots.save_plots(diagnosis(4, 2), tmp_path / "new", formats=("png", "svg"))
    assert [path.name for path in made][:2] == ["depth_attention.png", "depth_attention.svg"]
    assert len(made) == 8
    before = {path: path.read_bytes() for path in made}
    with pytest.raises(ArtifactError, match=r"a plot exists, at .*depth_attention\.png"):
        plots.save_plots(diagnosis(4, 2), tmp_path / "new")
    plots.save_plots(diagnosis(4, 2), tmp_path / "new", force=True)
    assert {path: path.read_bytes() for path in made} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"the folder cannot be written, at .*file"):
        plots.save_plots(diagnosis(4, 2), tmp_path / "file")


def test_what_exists_is_lined_off_from_the_blank():
    (steps,) = [
        patch for patch in plots.depth_attention(diagnosis(6, 3)).axes[0].patches if isinstance(patch, StepPatch)
    ]
    assert steps.get_data().values.tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]
    assert steps.get_data().edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_figures_for_a_page_follow_its_colours():
    figures = plots.svg_figures(diagnosis(4, 2))
    assert list(figures) == ["Depth attention", "Magnitudes", "Gradient norms", "Entropies"]
    for svg in figures.values():
        drawing = svg.partition("</style>")[2]
        assert not re.search("|".join(DARK), drawing)
        assert f"fill: var(--c{INK[1:]})" in drawing
        # nothing lies under the figure or its axes
        assert 'id="patch_1">\n   <path' in drawing
        assert drawing.partition('id="patch_1"')[2].partition("/>")[0].endswith('style="fill: none"')
    assert "var(--c0072b2)" in figures["Magnitudes"]
    assert plots.svg_figures(diagnosis(4, 2)) == figures
    assert list(plots.svg_figures(diagnosis(4, 2, streams=2)))[3:5] == [
        "stream.1: entropies",
        "stream.2: depth attention",
    ]
    with pytest.raises(ValueError, match="has no figures to plot: no batch was finite"):
        plots.svg_figures(diagnosis(4, 2, streams=0))


def test_files_stand_on_white(tmp_path):
    for path in plots.save_plots(diagnosis(4, 2), tmp_path, formats=("svg",)):
        assert "var(" not in path.read_text()
        assert "fill: #ffffff" in path.read_text()


def test_streams_have_files_of_their_own(tmp_path):
    made = plots.save_plots(diagnosis(4, 2, streams=2), tmp_path, formats=("svg",))
    assert [path.name for path in made][:5:4] == ["stream.1.depth_attention.svg", "stream.2.depth_attention.svg"]


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    found = diagnosis(4, 2, streams=2)
    named = replace(found, streams=tuple(replace(stream, name="a$x^$b") for stream in found.streams))
    assert plots.save_plots(named, tmp_path, formats=("svg",))


def test_reads_of_odd_states_alone_are_numbered():
    found = diagnosis(90, 6)
    odd = replace(found.streams[0], reads=found.streams[0].reads[::2])
    labels = plots.depth_attention(replace(found, streams=(odd,))).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels][:2] == ["1", "9"]


def test_no_state_of_pyplot_is_used(monkeypatch):
    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for plot in plots.PLOTS.values():
        plot(diagnosis(4, 2), 0)
    assert dict(matplotlib.rcParams) == before


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="stream=1, and the diagnosis has figures of 1 streams"):
        plots.magnitudes(diagnosis(4, 2), 1)
    with pytest.raises(ValueError, match="formats gif are not of png, svg, pdf"):
        plots.save_plots(diagnosis(4, 2), tmp_path, formats=("gif",))
    with pytest.raises(ValueError, match="no batch was finite"):
        plots.save_plots(diagnosis(4, 2, streams=0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r'pip install "attnres-rewrite\[plot\]"'):
        plots.save_plots(diagnosis(4, 2), tmp_path)
    with pytest.raises(MissingPackageError):
        plots.depth_attention(diagnosis(4, 2))

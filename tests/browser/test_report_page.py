"""The report in a real browser: it renders, sorts, searches, and fits."""

import base64
import io

import pytest

pytestmark = pytest.mark.browser

MOST_BYTES = 5_000_000
CSS, XPATH = "css selector", "xpath"
# keys as WebDriver numbers them
ENTER, SPACE = "\ue007", "\ue00d"


def column(driver, section: str, name: str) -> list[str]:
    """Return the cells of a column, in the order they stand in and without the rows that are filtered out."""
    return driver.execute_script(
        """const table = [...document.querySelectorAll(`#${arguments[0]} table`)]
             .find(table => [...table.tHead.rows[0].cells].some(cell => cell.textContent === arguments[1]));
           const index = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === arguments[1]);
           const shown = [...table.tBodies[0].rows].filter(row => row.offsetParent);
           return shown.map(row => row.cells[index].textContent);""",
        section,
        name,
    )


def header(driver, section: str, name: str):
    return driver.find_element(XPATH, f"//section[@id='{section}']//th[normalize-space()='{name}']")


def click(driver, section: str, name: str) -> str | None:
    """Sort by a column, and return what it says of its order now."""
    cell = header(driver, section, name)
    driver.execute_script("arguments[0].click()", cell.find_element(CSS, "button"))
    return cell.get_attribute("aria-sort")


def emulate(driver, width: int, scheme: str = "light", media: str = "screen") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def test_it_renders_without_a_complaint(browse, large_page):
    assert large_page.stat().st_size < MOST_BYTES
    driver = browse(large_page)
    assert driver.find_element(CSS, "h1").text == "Gpt"
    assert "Nothing was proven." in driver.find_element(CSS, ".verdict").text
    drawings = driver.find_elements(CSS, "svg.sketch")
    assert [drawing.size["height"] > 300 for drawing in drawings] == [True, True]
    assert len(column(driver, "reads", "State")) == 96
    assert driver.get_log("browser") == []


def test_nothing_is_fetched(browse, large_page):
    driver = browse(large_page)
    names = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in names if not name.startswith("data:")] == []


def test_numbers_sort_as_numbers(browse, large_page):
    driver = browse(large_page)
    assert click(driver, "reads", "Sources") == "ascending"
    sources = [int(text) for text in column(driver, "reads", "Sources")]
    assert sources == sorted(sources)
    assert max(sources) == 9
    assert click(driver, "reads", "State") == "ascending"
    assert click(driver, "reads", "State") == "descending"
    assert column(driver, "reads", "State") == [str(state) for state in range(96, 0, -1)]
    assert header(driver, "reads", "Sources").get_attribute("aria-sort") == "none"
    assert click(driver, "schedule", "Direct, bytes") == "ascending"
    moved = [int(text.replace(",", "")) for text in column(driver, "schedule", "Direct, bytes")]
    assert moved == sorted(moved)
    assert len({len(str(number)) for number in moved}) > 1


def test_errors_sort_by_size_and_a_proof_without_gradients_stands_last(browse, frozen_page):
    driver = browse(frozen_page)
    for order in ("ascending", "descending"):
        assert click(driver, "proofs", "Gradient error") == order
        *errors, last = column(driver, "proofs", "Gradient error")
        assert last == "none"
        assert len(errors) > 1
        assert [float(error) for error in errors] == sorted(map(float, errors), reverse=order == "descending")


def test_names_sort_by_their_numbers(browse, large_page):
    driver = browse(large_page)
    click(driver, "reads", "State")
    click(driver, "reads", "State")
    click(driver, "reads", "Read by")
    owners = column(driver, "reads", "Read by")
    layers = [int(owner.removeprefix("layers.")) for owner in owners if owner.startswith("layers.")]
    assert layers == sorted(layers)
    assert layers[-1] == 47


def test_the_keyboard_sorts(browse, large_page):
    driver = browse(large_page)
    cell = header(driver, "reads", "State")
    cell.find_element(CSS, "button").send_keys(ENTER)
    assert cell.get_attribute("aria-sort") == "ascending"
    cell.find_element(CSS, "button").send_keys(SPACE)
    assert cell.get_attribute("aria-sort") == "descending"
    assert column(driver, "reads", "State")[0] == "96"


def test_search_shows_the_rows_that_have_all_words(browse, large_page):
    driver = browse(large_page)
    box = driver.find_element(CSS, "#reads input[type=search]")
    said = driver.find_element(CSS, "#reads output")
    assert said.text == "96 of 96 shown"
    box.send_keys("LAYERS.47. two-phase")
    assert column(driver, "reads", "Query") == ["layers.47.attn_res.0.query", "layers.47.attn_res.1.query"]
    assert said.text == "2 of 96 shown"
    box.send_keys(" nowhere")
    assert column(driver, "reads", "Query") == []
    box.clear()
    box.send_keys(" ")
    assert len(column(driver, "reads", "Query")) == 96


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(browse, large_page, width):
    driver = browse(large_page)
    emulate(driver, width)
    assert driver.execute_script("return innerWidth") == width
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_wide_table_scrolls_in_its_box(browse, large_page):
    driver = browse(large_page)
    emulate(driver, 360)
    box = driver.find_element(CSS, "#reads .scroll")
    driver.execute_script("arguments[0].scrollLeft = 150", box)
    assert driver.execute_script("return [arguments[0].scrollLeft, scrollX]", box) == [150, 0]


def luminance(color: str) -> float:
    """Return the relative luminance of "rgb(1, 2, 3)", as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in color.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("selector", ["body", ".verdict", "nav a", ".lead", "thead th", "td.chosen", ".estimate"])
def test_text_is_readable_in_light_and_in_dark(browse, small_page, selector):
    driver = browse(small_page)
    pages = []
    for scheme in ("light", "dark"):
        emulate(driver, 1280, scheme)
        text, page = driver.execute_script(
            """let node = document.querySelector(arguments[0]);
               const text = getComputedStyle(node).color;
               while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
               return [text, getComputedStyle(node).backgroundColor];""",
            selector,
        )
        dark, bright = sorted((luminance(text), luminance(page)))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (selector, scheme)
        pages.append(luminance(page))
    assert pages[1] < 0.1 < 0.7 < pages[0]


def colours(driver, plot) -> list[tuple[int, str]]:
    """Return the colours of a picture as it is on the screen, with the number of their pixels, the most first."""
    from PIL import Image  # comes with matplotlib

    clip = driver.execute_script(
        """const box = arguments[0].getBoundingClientRect();
           return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1};""",
        plot,
    )
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    most = image.getcolors(image.width * image.height)
    return [(count, f"rgb{colour}") for count, colour in sorted(most, reverse=True)]


@pytest.mark.parametrize(("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("dark", "print")])
def test_plots_have_the_colours_of_the_page(browse, learnt_page, scheme, media):
    driver = browse(learnt_page)
    emulate(driver, 1280, scheme, media)
    plots = driver.find_elements(CSS, ".plot img")
    assert [plot.get_attribute("alt") for plot in plots] == [
        "Depth attention", "Magnitudes", "Gradient norms", "Entropies",
    ]  # fmt: skip
    for plot in plots:
        found = [(count, luminance(colour)) for count, colour in colours(driver, plot)]
        page = found[0][1]
        assert page < 0.1 if (scheme, media) == ("dark", "screen") else page > 0.9
        # text and axes, in a colour of many pixels
        assert max(abs(drawn - page) for count, drawn in found if count > 50) > 0.7
    assert driver.get_log("browser") == []


def test_without_scripts_the_page_is_whole(browse, large_page):
    driver = browse(large_page, "--blink-settings=scriptEnabled=false")
    assert len(driver.find_elements(CSS, "#reads tbody tr")) == 96
    assert driver.find_elements(CSS, "input, button") == []


def test_on_paper_tables_are_not_cut_off(browse, large_page):
    driver = browse(large_page)
    emulate(driver, 1000, media="print")
    shown = driver.execute_script(
        "return ['nav', '.tools', '#reads'].map(name => document.querySelector(name).offsetHeight > 0)"
    )
    assert shown == [False, False, True]
    overflow = driver.execute_script("return getComputedStyle(document.querySelector('#reads .scroll')).overflowX")
    assert overflow == "visible"

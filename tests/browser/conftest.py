"""Chromium without a window, and the pages it opens.

selenium is imported in the fixture alone: `make test` collects this folder, and has no selenium.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import attnres_rewrite as ar
from tests.networks import gpt, ids

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

Browse = Callable[..., "Chrome"]


def executable(name: str) -> str:
    """Return the path of a program; a test that needs a browser fails without one."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"there is no {name} on PATH: install Debian's chromium and chromium-driver", pytrace=False)
    return path


@pytest.fixture
def browse(tmp_path) -> Iterator[Browse]:
    """Open a file in a browser of its own: `browse(path, "--more-arguments")`."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    drivers: list[Chrome] = []

    def start(path: Path, *more: str) -> Chrome:
        options = ChromeOptions()
        options.binary_location = executable("chromium")
        for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path / 'profile'}{len(drivers)}", *more):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        drivers.append(Chrome(options, Service(executable("chromedriver"))))
        drivers[-1].get(path.as_uri())
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.quit()


@pytest.fixture(scope="session")
def small_page(tmp_path_factory) -> Path:
    """The page of a proven rewrite of 12 layers."""
    return _written(tmp_path_factory.mktemp("small"), layers=12, verify=True)


@pytest.fixture(scope="session")
def frozen_page(tmp_path_factory) -> Path:
    """The page of a proven rewrite of a frozen model: its capture has no gradients to compare."""
    return _written(tmp_path_factory.mktemp("frozen"), layers=4, verify=True, frozen=True)


@pytest.fixture(scope="session")
def large_page(tmp_path_factory) -> Path:
    """The page of a rewrite of 48 layers."""
    return _written(tmp_path_factory.mktemp("large"), layers=48, verify=False)


@pytest.fixture(scope="session")
def learnt_page(tmp_path_factory) -> Path:
    """The page of a rewrite and its diagnosis."""
    return _written(tmp_path_factory.mktemp("learnt"), layers=4, verify=False, diagnosed=True)


def _written(folder: Path, layers: int, verify: bool, diagnosed: bool = False, frozen: bool = False) -> Path:
    model = gpt(layers).requires_grad_(not frozen)
    new = ar.rewrite(model, (ids(),), config=ar.AttnResConfig(num_blocks=8), dynamic_shapes={}, verify=verify)
    path = folder / "report.html"
    found = ar.diagnose(new.eval(), [ids()]) if diagnosed else None
    path.write_text(ar.html_report(new, diagnosis=found), encoding="utf-8")
    return path

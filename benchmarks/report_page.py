"""Time the HTML report of a deep model: making it, its size, and opening it in Chromium.

    python benchmarks/report_page.py [--layers 48] [--runs 5] [--json benchmarks/results/report_page.json]

Needs chromium, chromedriver and selenium. Each run opens the file in a browser of its own, with an empty profile, and
takes loadEventEnd of the navigation: from the start of the navigation to the end of its load event, script included.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine_facts
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

import attnres_rewrite as ar

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt import GPT

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def make_page(layers: int, path: Path) -> float:
    """Write the page of a GPT with a width of 64, and return the seconds it took after the rewrite."""
    model, ids = GPT(width=64, depth=layers), torch.zeros(2, 16, dtype=torch.long)
    new = ar.rewrite(model, (ids,), config=ar.AttnResConfig(num_blocks=8), dynamic_shapes={}, verify=False)
    start = time.perf_counter()
    path.write_text(ar.html_report(new), encoding="utf-8")
    return time.perf_counter() - start


def load_ms(path: Path) -> float:
    """Open the page once, and return the milliseconds to the end of its load."""
    with tempfile.TemporaryDirectory() as profile:
        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or "chromium"
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = Chrome(options, Service(shutil.which("chromedriver")))
        try:
            driver.get(path.as_uri())
            # the load event must have ended before its end is asked for
            time.sleep(0.2)
            return driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        finally:
            driver.quit()


def measure(layers: int, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        seconds = make_page(layers, path)
        times = [load_ms(path) for _ in range(runs)]
        return {
            "layers": layers,
            "page_bytes": path.stat().st_size,
            "page_made_ms": round(1e3 * seconds),
            "load_ms": [round(value) for value in times],
            "load_ms_median": round(statistics.median(times)),
            "load_average": [round(value, 1) for value in os.getloadavg()],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[48])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(layers, options.runs) for layers in options.layers]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(machine_facts() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

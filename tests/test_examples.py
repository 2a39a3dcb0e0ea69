"""Every example runs, leaves nothing behind, and is short enough to be read; the ways in the docs run too."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))
# what a word in the name of a script asks for
NEEDS = {"huggingface": "transformers", "trainer": "accelerate", "lora": "peft", "timm": "timm"}
CURED = """
import runpy, sys
from tests.zoo.torchvision_cure import define_missing_ops
define_missing_ops()
runpy.run_path(sys.argv[1], run_name="__main__")
"""
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", (ROOT / "docs" / "ways.md").read_text(), re.MULTILINE | re.DOTALL)


def run(command, folder):
    bin_and_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # one thread: the other tests want the cores as well
    environment = {"PATH": bin_and_path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def skip_without(package):
    # looked for, not imported: timm has to wait for the cure, and the example runs in a process of its own
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def _cases():
    # tests/test_backend.py has a quicker test of it
    slow = {"08_data_parallel": pytest.mark.slow}
    return [pytest.param(script, id=script.stem, marks=slow.get(script.stem, ())) for script in SCRIPTS]


@pytest.mark.parametrize("script", _cases())
def test_example_runs(script, tmp_path):
    words = script.stem.split("_")
    for word in NEEDS.keys() & set(words):
        skip_without(NEEDS[word])
    run([sys.executable, *(["-c", CURED] if "timm" in words else []), str(script)], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.stem)
def test_example_is_under_60_lines(script):
    assert len(script.read_text().splitlines()) < 60


@pytest.mark.parametrize("way", ["rewrite", "attach", "command line"])
def test_way_in_the_docs_runs(way, tmp_path):
    skip_without("transformers")
    complete = [code for language, code in BLOCKS if language == "sh" or code.startswith("import ")]
    code = dict(zip(["rewrite", "attach", "command line"], complete, strict=True))[way]
    if way == "command line":
        if not (Path(sys.executable).parent / "attnres-rewrite").exists():
            pytest.skip("the package is not installed, so it has no command")
        run(["sh", "-ec", code], tmp_path)
    else:
        run([sys.executable, "-c", code], tmp_path)

"""Every example runs, leaves nothing behind, and is short enough to be read.

So does every complete block of code in the docs: Python that begins with an import, and what is marked `sh`. A block
marked `text` right behind one is what it prints.
"""

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
NEEDS = {
    "huggingface": "transformers",
    "trainer": "accelerate",
    "lora": "peft",
    "timm": "timm",
    "diffusers": "diffusers",
}
CURE = """
from tests.zoo.torchvision_cure import define_missing_ops
define_missing_ops()
"""
CURED = f"{CURE}import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
COMPLETE = re.compile(r"(import|from) ")


def run(command, folder):
    bin_and_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # one thread: the other tests want the cores as well
    environment = {"PATH": bin_and_path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stdout


def skip_without(package):
    # looked for, not imported: timm has to wait for the cure, and the example runs in a process of its own
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def _cases():
    # other tests do the same in less time
    slow = {"05", "06", "07", "08", "09", "11", "12", "13", "14"}
    return [
        pytest.param(script, id=script.stem, marks=pytest.mark.slow if script.stem[:2] in slow else ())
        for script in SCRIPTS
    ]


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


def _blocks():
    """Find every complete block of the docs with what it prints, None where the page does not say."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        found = [block for block in BLOCK.findall(page.read_text()) if block[0] == "sh" or COMPLETE.match(block[1])]
        for number, (language, code, printed) in enumerate(found, start=1):
            # a minute for five processes that import transformers; tests/cli runs the same commands
            marks = pytest.mark.slow if (name, number) == ("ways", 3) else ()
            yield pytest.param(language, code, printed or None, id=f"{name}-{number}", marks=marks)


@pytest.mark.parametrize(("language", "code", "printed"), list(_blocks()))
def test_block_of_the_docs_runs(language, code, printed, tmp_path):
    for package in NEEDS.values():
        if f"{package} import" in code or f"import {package}" in code:
            skip_without(package)
    if language == "sh":
        if not (Path(sys.executable).parent / "attnres-rewrite").exists():
            pytest.skip("the package is not installed, so it has no command")
        found = run(["sh", "-ec", code], tmp_path)
    else:
        cure = CURE if "import timm" in code or "from diffusers" in code else ""
        found = run([sys.executable, "-c", cure + code], tmp_path)
    assert printed is None or found == printed


def test_blocks_of_the_docs_are_found():
    names = [case.id for case in _blocks()]
    assert {"index-1", "quickstart/own_model-1", "quickstart/timm-1", "ways-1", "ways-2", "ways-3"} <= set(names)

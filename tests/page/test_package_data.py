"""The files that the page is made of are in a built wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_the_template_the_style_and_the_script(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("report.html.jinja", "report.css", "report.js"):
            shipped = archive.read(f"attnres_rewrite/page/{name}")
            assert shipped == (ROOT / "attnres_rewrite" / "page" / name).read_bytes()

"""No shipped kernel spills; rows are loaded and stored 128 bits at a time: seen in the machine code, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# rows are not what these load: they work on one scalar for each source, query and token
NARROW = {"64", "32"}
KERNELS = {
    "read_forward_kernel",
    "read_backward_kernel",
    "logit_kernel",
    "mix_kernel",
    "scalars_kernel",
    "rows_kernel",
    "merge_forward_kernel",
    "merge_backward_kernel",
}
PHASE_1 = {"logit_kernel", "mix_kernel", "scalars_kernel", "rows_kernel"}
# what a block has on GPUs with the least of it: sm_86, sm_89 and sm_120
LEAST_SHARED_BYTES = 99 * 1024
STORES_SCALARS = {"logit_kernel", "scalars_kernel"}


def compiled(*options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", "--jobs", "1", *options]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def check(kernels: list[dict]) -> None:
    for kernel in kernels:
        assert (kernel["stack"], kernel["spills"]) == (0, 0), kernel
        assert kernel["loads"]["128"] > 0, kernel
        assert set(kernel["loads"]) <= {"128", *NARROW}, kernel
        assert kernel["stores"].get("128", 0) > 0 or kernel["kernel"] in STORES_SCALARS, kernel
        assert set(kernel["stores"]) <= {"128", *NARROW}, kernel


def test_the_widest_rows_of_a_hopper():
    kernels = compiled("--arch", "90", "--width", "7168")
    assert {kernel["kernel"] for kernel in kernels} == KERNELS
    check(kernels)


# what the interpreter runs and the compiler refused: a constexpr assigned twice, a choice between int32 and int64
@pytest.mark.parametrize("form", ["three dimensions", pytest.param("all", marks=pytest.mark.slow)])
def test_rows_of_every_form_compile(form):
    found = compiled("--arch", "90", "--forms", form)
    assert len(found) == (7 if form == "all" else 1)
    assert all(set(each["kernels"]) == KERNELS for each in found)


# Once 112 to 160 KiB, which only GPUs of data centres have
@pytest.mark.parametrize("count", ["33", pytest.param("32,65,129,256", marks=pytest.mark.slow)])
def test_many_sources_fit_into_shared_memory(count):
    kernels = compiled("--arch", "89", "--many", count)
    assert {kernel["kernel"] for kernel in kernels} == PHASE_1
    assert max(kernel["shared_bytes"] for kernel in kernels) <= LEAST_SHARED_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_shipped_configuration(arch):
    check(compiled("--arch", arch))

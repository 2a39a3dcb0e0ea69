import pytest
from torch.distributed.pipelining import schedules

from attnres_rewrite.pipeline.schedules import SCHEDULES, placement_for


@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_knows_every_name(name):
    assert schedules.get_schedule_class(name)


def test_placements():
    assert placement_for("1F1B", 1) == "loop"
    assert placement_for("Interleaved1F1B", 3) == "loop"
    assert placement_for("ZBVZeroBubble", 2) == "v"


@pytest.mark.parametrize(
    ("name", "num_virtual", "says"),
    [
        ("GPipe", 2, "runs 1 stage"),
        ("Interleaved1F1B", 1, "two or more"),
        ("DualPipeV", 3, "runs 2 stage"),
        ("2F2B", 1, "must be one of GPipe"),
    ],
)
def test_numbers_that_do_not_fit(name, num_virtual, says):
    with pytest.raises(ValueError, match=says):
        placement_for(name, num_virtual)

import torch
from torch import nn

from attnres_rewrite.passes.shared_memory import share_memory


def memory_of(function, *args):
    program = torch.export.export(_module(function), args).module()
    nodes = {node.name: node for node in program.graph.nodes}
    return share_memory(program.graph.nodes), nodes


def _module(function):
    class Module(nn.Module):
        def forward(self, *args):
            return function(*args)

    return Module()


def test_views_are_one_piece_with_what_they_show():
    def forward(x):
        made = x.clone()
        made[0].fill_(1.0)
        return made, x + 1

    memory, nodes = memory_of(forward, torch.ones(3, 4))
    assert memory.piece_of[nodes["select"]] is memory.piece_of[nodes["clone"]]
    assert memory.writers_of(nodes["clone"]) == (nodes["fill_"],)
    assert memory.writers_of(nodes["add"]) == ()
    assert next(iter(memory.members.values())) == (nodes["clone"], nodes["select"], nodes["fill_"])


def test_a_piece_may_have_several_writers_and_a_list_of_views():
    def forward(x):
        made = x.clone()
        left, right = made.split(2)
        left.add_(1.0)
        right.mul_(2.0)
        return made

    memory, nodes = memory_of(forward, torch.ones(4, 4))
    assert memory.writers_of(nodes["clone"]) == (nodes["add_"], nodes["mul_"])


def test_a_batch_norm_writes_its_statistics_only_where_it_trains():
    norm = nn.BatchNorm1d(4)
    for training, count in ((True, 1), (False, 0)):
        program = torch.export.export(norm.train(training), (torch.ones(3, 4),)).module()
        memory = share_memory(program.graph.nodes)
        mean = next(node for node in program.graph.nodes if node.target == "running_mean")
        assert len(memory.writers_of(mean)) == count

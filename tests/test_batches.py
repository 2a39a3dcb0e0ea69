"""Mirrors attnres_rewrite/batches.py: batches as calls, and the loss that is taken when none is given."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from attnres_rewrite.batches import Inputs, inputs_of, loss_of, naming_batch

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)


class Takes(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids * 2


class TakesLabels(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return input_ids * labels


GRAPH, LABELLED = (fx.symbolic_trace(module).graph for module in (Takes(), TakesLabels()))


def by_hand(targets: Tensor) -> Tensor:
    """Return the mean of -log p of the next token, one at a time."""
    terms = [
        -LOGITS[row, at].softmax(-1)[targets[row, at + 1]].log()
        for row in range(2)
        for at in range(2)
        if targets[row, at + 1] >= 0
    ]
    return torch.stack(terms).mean()


def test_every_form_of_a_batch():
    for batch in (IDS, (IDS,), [IDS], {"input_ids": IDS}):
        (leaf,) = inputs_of(batch, GRAPH).leaves(GRAPH)
        assert leaf is IDS
    with pytest.raises(TypeError, match="a batch is a tensor.*got int"):
        inputs_of(3, GRAPH)
    with pytest.raises(TypeError, match="takes input_ids; got 0 positional and"):
        inputs_of({"input_ids": IDS, "attention_mask": IDS}, GRAPH).leaves(GRAPH)
    with pytest.raises(TypeError, match='got 2 positional.*for the loss alone goes under "labels" of a mapping'):
        inputs_of((IDS, IDS), GRAPH).leaves(GRAPH)


def test_labels_that_are_not_taken_are_kept_for_the_loss():
    batch = {"input_ids": IDS, "labels": IDS + 1}
    unused = inputs_of(batch, GRAPH)
    assert unused.leaves(GRAPH) == [IDS]
    assert unused.labels is batch["labels"]
    assert len(inputs_of(batch, LABELLED).leaves(LABELLED)) == 2
    assert "labels" in batch


def test_the_next_token_of_the_ids_or_of_the_labels():
    mask = torch.ones(2, 3, dtype=torch.bool)
    ids = Inputs((mask, IDS), {}, None)
    torch.testing.assert_close(loss_of({"logits": LOGITS}, None, ids, None), by_hand(IDS))
    labels = torch.tensor([[0, 3, -100], [0, -100, 2]])
    torch.testing.assert_close(loss_of((LOGITS,), None, Inputs((IDS,), {}, labels), None), by_hand(labels))
    decoder = Inputs((), {"input_ids": IDS, "decoder_input_ids": IDS - 1}, None)
    torch.testing.assert_close(loss_of(LOGITS, None, decoder, None), by_hand(IDS - 1))


def test_ids_are_found_by_their_name_before_a_mask_and_in_any_integers():
    mask = Inputs((), {"attention_mask": torch.ones_like(IDS), "input_ids": IDS.int()}, None)
    torch.testing.assert_close(loss_of(LOGITS, None, mask, None), by_hand(IDS))
    labelled = Inputs((IDS,), {}, (IDS - 1).int())
    torch.testing.assert_close(loss_of(LOGITS, None, labelled, None), by_hand(IDS - 1))


def test_a_mask_is_not_taken_for_ids():
    mask = {"attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(3).expand(2, 3)}
    found = loss_of(LOGITS, None, Inputs((), mask | {"tokens": IDS}, None), None)
    torch.testing.assert_close(found, by_hand(IDS))
    with pytest.raises(ValueError, match="fit labels or token ids"):
        loss_of(LOGITS, None, Inputs((), mask | {"inputs_embeds": LOGITS}, None), None)


def test_a_hidden_state_is_not_taken_for_logits():
    hidden, call = LOGITS.detach() * 2, Inputs((IDS,), {}, None)
    for outputs in ({"hidden": hidden, "logits": LOGITS}, SimpleNamespace(logits=LOGITS), (hidden[:, :2], LOGITS)):
        torch.testing.assert_close(loss_of(outputs, None, call, None), by_hand(IDS))
    with pytest.raises(ValueError, match=r"2 outputs could be logits.*\[2, 3, 7\] and \[2, 3, 7\].*give loss_fn"):
        loss_of((hidden, LOGITS), None, call, None)


def test_labels_of_a_decoder_stand_where_they_are_predicted():
    labels = torch.tensor([[0, 3, -100], [5, -100, 2]])
    batch = {"input_ids": IDS, "decoder_input_ids": IDS - 1}
    wanted = F.cross_entropy(LOGITS.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss_of(LOGITS, None, Inputs((), batch, labels), None), wanted)


def test_the_outputs_own_loss_comes_first():
    own = LOGITS.sum()
    for outputs in ({"loss": own, "logits": LOGITS}, SimpleNamespace(loss=own)):
        assert loss_of(outputs, None, Inputs((IDS,), {}, None), None) == own


def test_a_given_loss_sees_the_batch():
    batch = {"input_ids": IDS, "weight": 2.0}
    found = loss_of(LOGITS, batch, Inputs((IDS,), {}, None), lambda outputs, given: outputs.sum() * given["weight"])
    assert found == LOGITS.sum() * 2
    assert found.shape == ()


@pytest.mark.parametrize(
    ("outputs", "loss_fn", "says"),
    [
        (LOGITS[:, :2], None, "give loss_fn"),
        (LOGITS[:, 0], None, "give loss_fn"),
        (LOGITS, lambda outputs, batch: outputs, r"one element; got \[2, 3, 7\]"),
        (LOGITS, lambda outputs, batch: 3.0, "one element; got float"),
        (LOGITS, lambda outputs, batch: outputs.detach().sum(), "has no gradient"),
    ],
)
def test_no_loss_is_refused(outputs, loss_fn, says):
    with pytest.raises(ValueError, match=says):
        loss_of(outputs, None, Inputs((IDS,), {}, None), loss_fn)


def test_other_inputs_are_refused_with_what_to_do():
    inputs = inputs_of({"input_ids": IDS, "attention_mask": IDS}, GRAPH)
    with pytest.raises(TypeError, match="Leave out what it does not take, or rewrite the model on example inputs that"):
        inputs.leaves(GRAPH)


def test_what_is_raised_gets_a_note_of_the_batch():
    own = KeyError("x")
    with pytest.raises(KeyError) as raised, naming_batch(3, [IDS, LOGITS, 2.0], [torch.empty(0, 5)]):
        raise own
    assert raised.value is own
    assert own.__notes__ == [
        "in batch 3, int64 [2, 3] from 1 to 6 and float32 [2, 3, 7]; the network was captured on float32 [0, 5]"
    ]


def test_labels_that_are_no_tensor_are_not_passed_over_for_the_ids():
    with pytest.raises(ValueError, match="fit labels or token ids"):
        loss_of(LOGITS, None, inputs_of({"input_ids": IDS, "labels": IDS.tolist()}, GRAPH), None)

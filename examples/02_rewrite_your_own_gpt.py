"""Rewrite a hand-written GPT, and see which parameters it got and where they live."""

import gpt

import attnres_rewrite as ar


def main() -> None:
    model, args = gpt.build()

    # Look first: inspect changes nothing.
    report = ar.inspect(model, args, config=ar.AttnResConfig(block_layers=2))
    for read in report.streams[0].reads:
        print(f"state {read.state:2}, read by {read.owner or 'the model'}: {read.num_sources} sources")
    print(f"left alone: {report.left_alone[0].source_line}, which {report.left_alone[0].reason}")

    new = ar.rewrite(model, args, config=ar.AttnResConfig(block_layers=2))

    # The rewritten model uses the original's own parameters, under their own names, and adds new ones.
    added = sorted(new.state_dict().keys() - model.state_dict().keys())
    print(f"{len(added)} new parameters: {added[0]} ...")
    assert new.get_parameter("head.weight") is model.head.weight
    assert model.state_dict().keys() <= new.state_dict().keys()

    # Dropout follows the mode, as in the original.
    new.train()
    loss = new(*args).square().mean()
    loss.backward()
    query = new.get_parameter("layers.3.attn_res.1.query")
    print(f"a query at zero has a gradient: its norm is {query.grad.norm():.1e}")


if __name__ == "__main__":
    main()

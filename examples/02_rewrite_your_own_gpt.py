"""Rewrite a hand-written GPT, and see which parameters it got and where they live."""

import gpt

import attnres_rewrite as ar


def main() -> None:
    model, args = gpt.build()

    # Look first: inspect changes nothing.
    report = ar.inspect(model, args, config=ar.AttnResConfig(block_layers=2))
    for read in report.streams[0].reads:
        print(f"state {read.state:2} of {read.num_sources} sources, read by {read.owner}: {read.query_name}")
    print(f"{len(report.left_alone)} adds left alone, such as: {report.left_alone[0].reason}")

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
    print(f"the first query has a gradient of norm {new.get_parameter(added[-1]).grad.norm():.1e}")


if __name__ == "__main__":
    main()

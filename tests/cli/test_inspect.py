"""The command inspect, over a fake library."""

import json


def test_inspect_prints_the_report(cli, library, tiny_file):
    done = cli("inspect", f"{tiny_file}:build")
    assert done.code == 0
    assert "layers.1.attn_res.0.query" in done.out
    assert len(library.asked["args"]) == 1


def test_only_facts_on_stdout(cli, library, tiny_file):
    done = cli("inspect", tiny_file, "--json")
    assert done.facts == json.loads(json.dumps(library.report.to_dict()))
    assert done.facts["streams"][0]["reads"][0]["query_name"] == "layers.1.attn_res.0.query"
    assert "the model talks" in done.err


def test_inspect_a_saved_rewrite_shows_its_report(cli, library, artifact):
    assert "layers.1.attn_res.0.query" in cli("inspect", artifact).out

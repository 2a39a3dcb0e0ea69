"""The command verify, over a fake library."""


def test_verify_rewrites_in_memory(cli, library, tiny_file):
    done = cli("verify", tiny_file)
    assert done.code == 0
    assert library.asked["verify"] is True
    assert "folder" not in library.asked
    assert "proven" in done.out


def test_verify_a_saved_rewrite(cli, library, artifact):
    done = cli("verify", artifact, "--json")
    assert done.code == 0
    assert library.asked == {"loaded": artifact}
    assert done.facts["passed"] is True


def test_a_failed_proof_shows_its_figures_and_exits_1(cli, library, artifact, failing):
    library.figures = failing
    done = cli("verify", artifact)
    assert done.code == 1
    assert "FAILED" in done.out
    assert "failed: independent (eval)" in done.err
    done = cli("verify", artifact, "--json")
    assert done.code == 1
    assert done.facts["error"]["class"] == "ProofError"
    assert done.facts["passed"] is False
    # JSON has no NaN, and null is a gradient that was not taken
    assert [proof["output_error"] for proof in done.facts["proofs"]] == [1e-15, "NaN"]

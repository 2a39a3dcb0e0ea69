"""Mirrors attnres_rewrite/artifact.py and graph_json.py: all or nothing, there and back, and no pickle."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnres_rewrite as ar
from attnres_rewrite.errors import ArtifactError
from tests.networks import exported_gpt, gpt, ids
from tests.test_capture import Structured


@pytest.fixture(scope="module")
def new():
    result = ar.rewrite(gpt(dropout=0.2), (ids(),), config=ar.AttnResConfig(block_size=2, key_norm=False))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("query"):
                parameter.normal_()
    return result


@pytest.fixture
def saved(new, tmp_path) -> Path:
    return ar.save(new, tmp_path / "model")


def test_what_is_loaded_is_what_was_saved(new, saved):
    again = ar.load(saved)
    torch.testing.assert_close(again(ids(3, 7)), new(ids(3, 7)), rtol=0, atol=0)
    assert again.state_dict().keys() == new.state_dict().keys()
    assert again.head.weight is again.embed.weight
    assert again.report == new.report
    assert again.config == new.config
    again.train()
    assert not torch.equal(again(ids()), new(ids()))


def test_what_is_loaded_is_aligned_as_torch_aligns_its_tensors(saved):
    """Matrix products of weights that are not so round differently."""
    again = ar.load(saved)
    first = {id(value): value for value in (*again.parameters(), *again.buffers())}.values()
    assert {value.data_ptr() % 64 for value in first} == {0}


def test_a_loaded_rewrite_is_proven_again_and_saved_again(saved, tmp_path):
    again = ar.load(saved)
    assert ar.verify(again).passed
    twice = ar.load(ar.save(again, tmp_path / "twice"))
    assert [p.name for p in ar.verify(twice).proofs] == ["original", "independent"] * 2


def test_an_attached_model_is_no_rewrite(tmp_path):
    model = gpt()
    ar.attach(model, None, (ids(),))
    for function in (lambda model: ar.save(model, tmp_path / "model"), ar.verify, lambda model: ar.partition(model, 2)):
        with pytest.raises(TypeError, match=r"\(\) takes what rewrite\(\) or load\(\) returned.* as_rewritten\(model"):
            function(model)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_json_and_safetensors_is_written(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "attnres.json",
        "inputs.safetensors",
        "program.json",
        "report.json",
        "weights.safetensors",
    ]
    header = json.loads((saved / "attnres.json").read_text())
    assert len(header["source_sha256"]) == 64


def test_dataclass_outputs_and_nested_inputs_survive(tmp_path):
    torch.manual_seed(0)
    model = Structured(depth=2).eval()
    first = ar.rewrite(model, kwargs={"batch": {"ids": ids()}, "scale": 2.0}, verify=False)
    again = ar.load(ar.save(first, tmp_path / "m"))
    torch.testing.assert_close(again({"ids": ids()}).logits, first({"ids": ids()}).logits)
    assert ar.verify(again).passed


def test_an_existing_folder_is_not_touched_without_force(new, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ar.ArtifactError, match="the folder exists"):
        ar.save(new, saved)
    assert before == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert ar.save(new, saved, force=True) == saved
    assert ar.load(saved).report == new.report
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_foreign_folder_is_not_replaced_even_with_force(new, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("precious")
    with pytest.raises(ar.ArtifactError, match="is not a saved rewrite"):
        ar.save(new, tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "one.jpg").read_text() == "precious"


def test_a_save_that_fails_leaves_nothing_behind(new, tmp_path, monkeypatch):
    monkeypatch.setattr("attnres_rewrite.artifact.program_to_json", lambda program: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ar.save(new, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "program.json", "report.json", "inputs.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink])
def test_a_damaged_file_is_named(saved, name, damage):
    damage(saved / name)
    with pytest.raises(ar.ArtifactError, match=name):
        ar.load(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not a saved rewrite"),
        ("[]", "names another format"),
        ('{"format": "other"}', "names another format"),
        ('{"format": "attnres-rewrite", "format_version": 99}', "has format 99; this release reads 1"),
    ],
)
def test_a_foreign_header_is_refused(saved, content, message):
    (saved / "attnres.json").write_text(content)
    with pytest.raises(ar.ArtifactError, match=message):
        ar.load(saved)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def sign(saved: Path) -> None:
    """Write the checksums of what is there, as somebody who edits a folder can."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()}
    del digests["attnres.json"]
    edit(saved / "attnres.json", lambda header: header.update(files=digests))


@pytest.mark.parametrize("files", [None, [], {}, {"program.json": ""}, {"../program.json": ""}])
def test_checksums_cannot_be_left_out(saved, files):
    edit(saved / "attnres.json", lambda header: header.update(files=files))
    with pytest.raises(ar.ArtifactError, match=r"checksums of inputs\.safetensors, program\.json"):
        ar.load(saved)


@pytest.mark.parametrize("modes", [{}, {"train": -1}, {"train": 7}, {"both": 0}, {"train": 1}, [0]])
def test_modes_that_no_program_has_are_refused(saved, modes):
    edit(saved / "program.json", lambda facts: facts.update(modes=modes))
    sign(saved)
    with pytest.raises(ar.ArtifactError, match="cannot be read"):
        ar.load(saved)


@pytest.mark.parametrize("name", ["attnres.json", "program.json", "report.json"])
def test_json_that_is_nested_too_deep_is_refused(saved, name):
    (saved / name).write_text("[" * 100_000)
    if name != "attnres.json":
        sign(saved)
    with pytest.raises(ar.ArtifactError, match="cannot be read|not a saved rewrite"):
        ar.load(saved)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ar.ArtifactError, match="not a saved rewrite"):
        ar.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "is no torch op"),
        ("torch.ops.aten", "is no torch op"),
        ("torch.ops.load_library", "is no torch op"),
        ("torch.ops.nowhere.op.default", "not registered"),
        ("operator.attrgetter", "is no torch op"),
    ],
)
def test_a_program_can_name_torch_ops_only(target, message):
    from attnres_rewrite.graph_json import graph_from_json

    node = {
        "name": "x",
        "op": "call_function",
        "target": target,
        "args": {"tuple": []},
        "kwargs": {"dict": []},
    }
    with pytest.raises(ar.ArtifactError, match=message):
        graph_from_json({"nodes": [node | {"meta": {"source": "", "modules": []}}], "call": None})


RUN = "__import__('pathlib').Path('pwned').touch()"


def call_of(program: dict) -> dict:
    return program["call"]


def node_of(program: dict, op: str) -> dict:
    return next(node for node in program["nodes"] if node["op"] == op)


def as_default(program: dict) -> None:
    call_of(program)["arguments"][-1] += f"={RUN}"


def as_placeholder(program: dict) -> None:
    node_of(program, "placeholder")["target"] += f"={RUN}"


def as_attribute(program: dict) -> None:
    node_of(program, "get_attr")["target"] += f'-", {RUN}) + ("'


def as_keyword(program: dict) -> None:
    node_of(program, "call_function")["kwargs"] = {"dict": [[f"a={RUN}, b", 1]]}


def as_method(program: dict) -> None:
    node_of(program, "call_function")["op"] = "call_method"


def as_key(program: dict) -> None:
    spec = json.loads(call_of(program)["in_spec"])
    spec[1]["children_spec"][1] |= {"context": json.dumps([f"a': {RUN}, 'b"])}
    call_of(program)["in_spec"] = json.dumps(spec)


def as_factory(program: dict) -> None:
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    spec = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    call_of(program)["out_spec"] = json.dumps([1, spec])


def as_enum(program: dict) -> None:
    context = [{"__enum__": True, "fqn": "antigravity:x", "name": "y"}]
    spec = {"type": "builtins.dict", "context": json.dumps(context), "children_spec": []}
    call_of(program)["out_spec"] = json.dumps([1, spec])


@pytest.mark.parametrize(
    "put",
    [as_default, as_placeholder, as_attribute, as_keyword, as_method, as_key, as_factory, as_enum],
    ids=lambda put: put.__name__,
)
def test_a_folder_runs_nobodys_code(saved, put, tmp_path, monkeypatch):
    """torch.fx prints names into the source of a graph, as they stand; pytree imports what a spec names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "antigravity", None)

    def put_everywhere(facts: dict) -> None:
        for program in facts["programs"]:
            put(program["graph"])
            put(program["original"])

    edit(saved / "program.json", put_everywhere)
    sign(saved)
    with pytest.raises(ArtifactError, match=r"the program (calls an argument|names|holds a node|has a)"):
        ar.load(saved)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "variant",
    [
        {"num_heads": 4, "gate": True},
        {"key_rank": 5, "recency_bias": 1.0},
        {"gate": True, "recency_bias": -1.0, "schedule": "two_phase"},
    ],
)
def test_a_variant_is_saved_and_loaded(variant, tmp_path):
    config = ar.AttnResConfig(block_size=2, **variant)
    first = ar.rewrite(exported_gpt(), (ids(),), config=config, verify=False)
    with torch.no_grad():
        for parameter in ar.attnres_parameters(first):
            parameter.normal_()
    again = ar.load(ar.save(first, tmp_path / "m"))
    assert (again.config, again.report) == (config, first.report)
    torch.testing.assert_close(again(ids()), first(ids()), rtol=0, atol=0)
    assert ar.verify(again).passed


def test_without_variants_what_is_written_names_none_of_them(saved):
    header = json.loads((saved / "attnres.json").read_text())
    assert set(header["config"]) == {
        "num_blocks", "block_size", "output", "key_norm", "eps", "schedule", "param_dtype", "block_layers",
    }  # fmt: skip
    program = (saved / "program.json").read_text()
    assert not any(word in program for word in ("gate", "variant_attn_res", "recency_bias"))


class Scaled(nn.Module):
    """Two updates, and a number as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor, fill: float) -> Tensor:
        x = x + self.layer(self.norm(x))
        x = x + self.layer(self.norm(x))
        return x.masked_fill(x == fill, 0.0)


def test_an_infinite_input_is_saved(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    new = ar.rewrite(Scaled(), (x, -float("inf")), verify=False)
    loaded = ar.load(ar.save(new, tmp_path / "saved"))
    assert loaded.example_inputs.args[1] == -float("inf")
    assert torch.equal(loaded(x), new(x))


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    new = ar.rewrite(Scaled(), (torch.randn(2, 3, 8), 0.0), verify=False)
    with pytest.raises(ArtifactError, match="norm.weight is on the meta device"):
        ar.save(new.to("meta"), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    new = ar.rewrite(Scaled(), (torch.randn(2, 3, 8), 0.0), verify=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="the folder cannot be written, at .*saved"):
        ar.save(new, tmp_path / "file" / "saved")


def test_a_rewrite_on_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    new = ar.rewrite(Scaled(), (torch.randn(2, 3, 8), 0.0), verify=False)
    folder = ar.save(new, tmp_path / "saved")
    program, header = folder / "program.json", folder / "attnres.json"
    program.write_text(program.read_text().replace('"device":"cpu"', '"device":"cuda:99"'))
    facts = json.loads(header.read_text())
    facts["files"]["program.json"] = hashlib.sha256(program.read_bytes()).hexdigest()
    header.write_text(json.dumps(facts))
    with pytest.raises(ArtifactError, match=r"is on cuda:99, which this machine has not.*\n.*load\(folder, device="):
        ar.load(folder)
    inputs = (torch.randn(2, 3, 8), 0.0)
    assert torch.equal(ar.load(folder, device="cpu")(*inputs), new(*inputs))

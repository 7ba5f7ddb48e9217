"""ONNX files that are damaged, foreign or hostile, and weights beside the model."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import upvits.deploy.graphs.export
import upvits.deploy.graphs.files
from tests.deploy.conftest import Exported
from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.graphs.files import data_files, load_model, model_digest, save_model, with_shapes
from upvits.deploy.runtimes import open_onnx
from upvits.deploy.store.artifacts import file_digest


def small(values: int = 4096) -> ModelProto:
    value = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.arange(values, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], "add")],
        "small",
        [value("x", TensorProto.FLOAT, ["n", values])],
        [value("y", TensorProto.FLOAT, ["n", values])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """A model whose weights are in a second file."""
    path = tmp_path / "sub" / "model.onnx"
    save_model(small(), path, external_data=True)
    return path


def test_weights_beside_the_model_are_read_and_the_model_saved_stays_as_it_was(apart: Path) -> None:
    model = small()
    before = model.SerializeToString()
    save_model(model, apart, external_data=True)
    assert model.SerializeToString() == before
    assert sorted(file.name for file in apart.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert apart.stat().st_size < 1000
    assert (apart.parent / "model.onnx.data").stat().st_size == 4 * 4096
    onnx.checker.check_model(str(apart), full_check=True)
    assert load_model(apart) == model
    with open_onnx(apart, threads=1) as session:
        got = session.run({"x": np.ones((1, 4096), np.float32)})["y"]
    np.testing.assert_array_equal(got[0], 1 + np.arange(4096, dtype=np.float32))


def test_the_digest_covers_the_weights(apart: Path, tmp_path: Path) -> None:
    before = model_digest(apart)
    data = apart.parent / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    assert model_digest(apart) != before
    save_model(small(), tmp_path / "whole.onnx")
    assert model_digest(tmp_path / "whole.onnx") == file_digest(tmp_path / "whole.onnx")


def relocate(path: Path, **entries: str) -> None:
    model = onnx.load(path, load_external_data=False)
    change_location(model.graph.initializer[0], **entries)
    path.write_bytes(model.SerializeToString())


def change_location(tensor: TensorProto, **entries: str) -> None:
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)


def _missing(path: Path) -> None:
    (path.parent / "model.onnx.data").unlink()


def _cut(path: Path) -> None:
    data = path.parent / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])


def _outside(path: Path) -> None:
    (path.parent / "model.onnx.data").rename(path.parent.parent / "secret")
    relocate(path, location="../secret")


def _absolute(path: Path) -> None:
    relocate(path, location=str(path.parent / "model.onnx.data"))


def _link(path: Path) -> None:
    secret = path.parent.parent / "secret"
    (path.parent / "model.onnx.data").rename(secret)
    os.symlink(secret, path.parent / "model.onnx.data")


def _negative(path: Path) -> None:
    relocate(path, offset="-8")


def _no_number(path: Path) -> None:
    relocate(path, length="many")


def _too_short(path: Path) -> None:
    relocate(path, length="16")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing, "lacks its weights"),
        (_cut, "are damaged"),
        (_outside, "outside its folder"),
        (_absolute, "outside its folder"),
        (_link, "outside its folder"),
        (_negative, "are damaged"),
        (_no_number, "are damaged"),
        (_too_short, "are damaged"),
    ],
)
def test_weights_that_are_not_as_they_should_be_are_refused(
    apart: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(apart)
    with pytest.raises(UserError, match=said) as refusal:
        load_model(apart)
    assert refusal.value.why
    assert refusal.value.fix


BRANCH = np.arange(4, dtype=np.float32)


def hidden_weight(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    change_location(tensor, location=location, offset="0", length="16")
    return tensor


def branch(location: str, *, constant: bool = False) -> onnx.GraphProto:
    """A subgraph that returns a weight in another file."""
    weight, result = hidden_weight(location), [helper.make_tensor_value_info("r", TensorProto.FLOAT, [4])]
    if constant:
        return helper.make_graph([helper.make_node("Constant", [], ["r"], value=weight)], "branch", [], result)
    return helper.make_graph([helper.make_node("Identity", ["w"], ["r"])], "branch", [], result, [weight])


def branching(then: onnx.GraphProto) -> ModelProto:
    """y = BRANCH where c holds, else 0."""
    value = helper.make_tensor_value_info
    zero = numpy_helper.from_array(np.zeros(4, np.float32), "z")
    other = helper.make_graph(
        [helper.make_node("Identity", ["z"], ["s"])], "other", [], [value("s", TensorProto.FLOAT, [4])], [zero]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], "choice", then_branch=then, else_branch=other)],
        "branching",
        [value("c", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _in_if(location: str) -> ModelProto:
    return branching(branch(location))


def _in_if_constant(location: str) -> ModelProto:
    return branching(branch(location, constant=True))


def _in_if_in_if(location: str) -> ModelProto:
    inner = helper.make_node("If", ["c"], ["r"], then_branch=branch(location), else_branch=branch("w.bin"))
    result = [helper.make_tensor_value_info("r", TensorProto.FLOAT, [4])]
    return branching(helper.make_graph([inner], "outer", [], result))


def _in_loop(location: str) -> ModelProto:
    model = branching(branch("w.bin"))
    model.graph.node.append(helper.make_node("Loop", ["", "c"], ["l"], body=branch(location)))
    return model


def _in_a_list_of_graphs(location: str) -> ModelProto:
    model = branching(branch("w.bin"))
    model.graph.node.append(helper.make_node("Foreign", [], ["l"], domain="com.example", bodies=[branch(location)]))
    return model


def _of_a_denied_type(location: str) -> ModelProto:
    model = _in_if(location)
    for attribute in model.graph.node[0].attribute:
        attribute.type = onnx.AttributeProto.INT
    return model


def _in_a_function(location: str) -> ModelProto:
    model = _in_if("w.bin")
    constant = helper.make_node("Constant", [], ["r"], value=hidden_weight(location))
    opset = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("com.example", "F", [], ["r"], [constant], opset))
    return model


@pytest.mark.parametrize(
    "make",
    [_in_if, _in_if_constant, _in_if_in_if, _in_loop, _in_a_list_of_graphs, _of_a_denied_type, _in_a_function],
)
def test_weights_of_subgraphs_are_held_to_the_same_rules(make: Callable[[str], ModelProto], tmp_path: Path) -> None:
    path = tmp_path / "sub" / "model.onnx"
    path.parent.mkdir()
    (path.parent / "w.bin").write_bytes(BRANCH.tobytes())
    (tmp_path / "secret").write_bytes(BRANCH.tobytes())
    path.write_bytes(make("w.bin").SerializeToString())
    content = load_model(path).SerializeToString()
    assert BRANCH.tobytes() in content
    assert b"w.bin" not in content
    for location, said in (("../secret", "outside its folder"), ("absent", "lacks its weights")):
        path.write_bytes(make(location).SerializeToString())
        assert location in data_files(onnx.load(path, load_external_data=False))
        with pytest.raises(UserError, match=said):
            load_model(path)


def test_the_current_folder_supplies_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(_in_if("w.bin").SerializeToString())
    (tmp_path / "w.bin").write_bytes(np.full(4, 9, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lacks its weights"):
        open_onnx(path, threads=1)
    (path.parent / "w.bin").write_bytes(BRANCH.tobytes())
    with open_onnx(path, threads=1) as session:
        np.testing.assert_array_equal(session.run({"c": np.array(True)})["y"], BRANCH)


def test_shapes_of_a_model_above_the_limit(vit: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(vit.report.path)
    del model.graph.value_info[:]
    wanted = onnx.shape_inference.infer_shapes(model)
    monkeypatch.setattr(upvits.deploy.graphs.files, "MAX_FILE_BYTES", 1000)
    inferred = with_shapes(model)
    assert inferred.graph.initializer == wanted.graph.initializer
    assert {value.name: value for value in inferred.graph.value_info} == {
        value.name: value for value in wanted.graph.value_info
    }
    assert inferred.graph.output == wanted.graph.output
    assert not model.graph.value_info


def _not_onnx(model: ModelProto) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + bytes(range(200))


def _cut_off(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString())[:-100]


def _empty(model: ModelProto) -> bytes:
    return b""


def _claims_more(model: ModelProto) -> bytes:
    model.graph.initializer[0].dims[0] = 10**12
    return bytes(model.SerializeToString())


def _claims_less_than_nothing(model: ModelProto) -> bytes:
    model.graph.initializer[0].dims[0] = -4
    return bytes(model.SerializeToString())


def _numbers_claim_more(model: ModelProto) -> bytes:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0, 2.0])
    return bytes(model.SerializeToString())


def _vast_input(model: ModelProto) -> bytes:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 10**9
    return bytes(model.SerializeToString())


def _vast_inside(model: ModelProto) -> bytes:
    shape = numpy_helper.from_array(np.array([10**6, 10**6], np.int64), "vast")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["vast"], ["z"], "fill"))
    return bytes(model.SerializeToString())


def _unknown_type(model: ModelProto) -> bytes:
    model.graph.initializer[0].data_type = 99
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_not_onnx, "is not an ONNX model"),
        (_cut_off, "is not an ONNX model"),
        (_empty, "is not an ONNX model"),
        (_claims_more, "too large|is damaged"),
        (_claims_less_than_nothing, "is damaged"),
        (_numbers_claim_more, "is damaged"),
        (_vast_input, "too large"),
        (_vast_inside, "too large"),
        (_unknown_type, "cannot be read"),
    ],
)
def test_broken_and_absurd_files_are_refused_with_a_reason(
    make: Callable[[ModelProto], bytes], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make(small()))
    with pytest.raises(UserError, match=said) as refusal:
        load_model(path)
    assert refusal.value.exit_code == 2
    assert refusal.value.why


def test_numbers_in_fields_of_their_own_type_are_whole_too(tmp_path: Path) -> None:
    model = small(4)
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0]))
    model.graph.initializer.append(helper.make_tensor("h", TensorProto.FLOAT16, [2], [1.0, 2.0]))
    model.graph.initializer.append(helper.make_tensor("i", TensorProto.INT4, [3], [1, -2, 3]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0,), np.float32), "nothing"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert load_model(tmp_path / "model.onnx") == model


def test_a_model_too_large_for_one_file_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upvits.deploy.graphs.files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="`external_data=True`"):
        save_model(small(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    save_model(small(), tmp_path / "model.onnx", external_data=True)
    assert load_model(tmp_path / "model.onnx") == small()


def test_a_failed_write_leaves_no_file_of_mixed_parts(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upvits.deploy.graphs.files, "atomic_write", full)
    with pytest.raises(UserError, match="no space left"):
        save_model(small(8192), apart, external_data=True)
    assert not apart.exists()
    assert [file for file in apart.parent.iterdir() if file.suffix == ".tmp"] == []


def test_export_with_weights_apart_computes_the_same(
    vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = onnx.load(vit.report.path)
    monkeypatch.setattr(upvits.deploy.graphs.export, "_run_exporter", lambda *arguments: exported)
    report = export_onnx(vit.model, tmp_path / "model.onnx", vit.preprocess, external_data=True)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in files)
    assert report.sha256 == model_digest(report.path)
    images = {"images": vit.images.numpy()}
    with open_onnx(report.path, threads=1) as apart, open_onnx(vit.report.path, threads=1) as whole:
        np.testing.assert_allclose(apart.run(images)["logits"], whole.run(images)["logits"], atol=1e-5)

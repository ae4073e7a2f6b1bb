#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU: a product (ONNX' Mul) of tensors of seven axes whose sizes are known only when it runs, behind
# Expand and Reshape, computes a part of its values and leaves the others as the memory was: no error, no warning. Right
# with the size of the batch fixed, with six axes, with Add in place of Mul, and without Expand. Seen on an AMD EPYC:
#     7 axes, Mul, batch open: 96 of 192 values wrong
#     7 axes, Mul, batch fixed: 0 of 192 values wrong
#     6 axes, Mul, batch open: 0 of 192 values wrong
#     7 axes, Add, batch open: 0 of 192 values wrong
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 \
    numpy==2.4.6
cd "$folder"
cat > multiply.py <<'PROGRAM'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def write(operation, sizes):
    """x (N, 64), expanded to (N, 64), which it has, seen as (N, *sizes), with itself."""
    numbers = {name: numpy_helper.from_array(np.array(value, np.int64), name) for name, value in
               (("zero", [0]), ("one", [1]), ("width", [64]), ("sizes", sizes))}
    nodes = [helper.make_node("Shape", ["x"], ["shape"]),
             helper.make_node("Slice", ["shape", "zero", "one"], ["n"]),
             helper.make_node("Concat", ["n", "width"], ["same"], axis=0),
             helper.make_node("Expand", ["x", "same"], ["expanded"]),
             helper.make_node("Concat", ["n", "sizes"], ["axes"], axis=0),
             helper.make_node("Reshape", ["expanded", "axes"], ["seen"]),
             helper.make_node(operation, ["seen", "seen"], ["y"])]
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *sizes])],
                              numbers.values())
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "model.onnx")


def compare(operation, sizes, fixed):
    write(operation, sizes)
    expected, = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert np.array_equal(expected.ravel(), (x * x if operation == "Mul" else x + x).ravel())
    core = openvino.Core()
    model = core.read_model("model.onnx")
    if fixed:
        model.reshape([3, 64])
    found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    wrong = (~np.isclose(found, expected, rtol=1e-5, atol=1e-6)).sum()
    print(f"{1 + len(sizes)} axes, {operation}, batch {'fixed' if fixed else 'open'}: {wrong} of {found.size} values wrong")


compare("Mul", [2] * 6, False)
compare("Mul", [2] * 6, True)
compare("Mul", [2] * 4 + [4], False)
compare("Add", [2] * 6, False)
PROGRAM
venv/bin/python multiply.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
diff seen.txt - <<'SEEN' || { cat seen.txt >&2; exit 1; }
7 axes, Mul, batch open: 96 of 192 values wrong
7 axes, Mul, batch fixed: 0 of 192 values wrong
6 axes, Mul, batch open: 0 of 192 values wrong
7 axes, Add, batch open: 0 of 192 values wrong
SEEN

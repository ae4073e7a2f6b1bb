#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU: the end of a Slice that is an input of the model, or computed in it, is cut to its lower 32 bits.
# So the largest int64, which torch.onnx writes for "to the end", is read as -1, and the last row is missing: no error,
# no warning. As a constant of the model it is read right. Rows 1 to the end of 4, seen on an AMD EPYC:
#     end 9223372036854775807 as a constant: 3 rows, onnxruntime 3
#     end 9223372036854775807 as an input: 2 rows, onnxruntime 3
#     end 4294967298 as an input: 1 rows, onnxruntime 3
#     end 2147483647 as an input: 3 rows, onnxruntime 3
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --disable-pip-version-check -q openvino==2026.4.1 onnxruntime==1.32.0 onnx==1.23.2 \
    numpy==2.4.6
cd "$folder"
cat > slice.py <<'PROGRAM'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

x = np.arange(12, dtype=np.float32).reshape(4, 3)


def compare(end, constant):
    numbers = {"start": 1, "axis": 0} | ({"end": end} if constant else {})
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3])]
    inputs += [] if constant else [helper.make_tensor_value_info("end", TensorProto.INT64, [1])]
    graph = helper.make_graph([helper.make_node("Slice", ["x", "start", "end", "axis"], ["y"])], "graph", inputs,
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
                              [numpy_helper.from_array(np.array([value], np.int64), name)
                               for name, value in numbers.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "model.onnx")
    given = {"x": x} if constant else {"x": x, "end": np.array([end], np.int64)}
    expected, = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"]).run(None, given)
    assert np.array_equal(expected, x[1:])
    found = openvino.Core().compile_model("model.onnx", "CPU")(given)[0]
    print(f"end {end} as {'a constant' if constant else 'an input'}: {len(found)} rows, onnxruntime {len(expected)}")


compare(2**63 - 1, True)
compare(2**63 - 1, False)
compare(2**32 + 2, False)
compare(2**31 - 1, False)
PROGRAM
venv/bin/python slice.py > seen.txt 2> log.txt || { cat log.txt >&2; exit 1; }
diff seen.txt - <<'SEEN' || exit 1
end 9223372036854775807 as a constant: 3 rows, onnxruntime 3
end 9223372036854775807 as an input: 2 rows, onnxruntime 3
end 4294967298 as an input: 1 rows, onnxruntime 3
end 2147483647 as an input: 3 rows, onnxruntime 3
SEEN

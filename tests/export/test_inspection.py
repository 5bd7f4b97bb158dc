from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.inspection import Inspection, parse_inspection, parse_times, with_times
from profiles.errors import InputError

DETAILED = """{"Layers": [{
  "Name": "image_QuantizeLinear",
  "LayerType": "Reformat",
  "Inputs": [
  {
    "Name": "image",
    "Location": "Device",
    "Dimensions": [1,3,32,32],
    "Format/Datatype": "Row major linear FP32"
  }],
  "Outputs": [
  {
    "Name": "q0",
    "Location": "Device",
    "Dimensions": [1,3,32,32],
    "Format/Datatype": "Four wide channel vectorized row major Int8 format"
  }],
  "ParameterType": "Reformat",
  "Origin": "QDQ",
  "TacticValue": "0x0000000000000000"
},{
  "Name": "stem.weight + stem.weight_QuantizeLinear + stem + PWN(relu)",
  "LayerType": "CaskConvolution",
  "Inputs": [
  {
    "Name": "q0",
    "Location": "Device",
    "Dimensions": [1,3,32,32],
    "Format/Datatype": "Four wide channel vectorized row major Int8 format"
  }],
  "Outputs": [
  {
    "Name": "a0",
    "Location": "Device",
    "Dimensions": [1,32,32,32],
    "Format/Datatype": "Thirty-two wide channel vectorized row major FP16 format"
  }],
  "ParameterType": "Convolution",
  "Kernel": [3,3],
  "Groups": 1,
  "Weights": {"Type": "Int8", "Count": 864},
  "Bias": {"Type": "Float", "Count": 32},
  "HasBias": 1,
  "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32",
  "TacticValue": "0x10d7116a3fad9b7a"
},{
  "Name": "Reformatting CopyNode for Input Tensor 0 to head",
  "LayerType": "Reformat",
  "Inputs": [{"Name": "a0", "Format/Datatype": "Thirty-two wide channel vectorized row major FP16 format"}],
  "Outputs": [{"Name": "r0", "Format/Datatype": "Row major linear FP16 format"}],
  "ParameterType": "Reformat",
  "TacticValue": "0x00000000000003e8"
},{
  "Name": "__myl_MeanMul_myl0_1",
  "LayerType": "kgen",
  "Inputs": [{"Name": "r0", "Dimensions": [1,32,32,32], "Format/Datatype": "Half"}],
  "Outputs": [{"Name": "m0", "Dimensions": [1,32], "Format/Datatype": "Half"}],
  "TacticName": "__myl_MeanMul_0x3f2a",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: mean]"
},{
  "Name": "head_myl0_2",
  "LayerType": "gemm",
  "Inputs": [{"Name": "m0", "Dimensions": [1,32], "Format/Datatype": "Half"}],
  "Outputs": [{"Name": "logits", "Dimensions": [1,10], "Format/Datatype": "Float"}],
  "TacticName": "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize32x32x64_stage5_warpsize2x2x1_tensor16x8x16",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: head]"
},{
  "Name": "shape_call",
  "LayerType": "ShapeHostToDevice",
  "Outputs": [{"Name": "s0", "Format/Datatype": "Int32"}]
}],
"Bindings": ["image"
,"logits"
]}"""
"""As the inspectors of TensorRT 8.6 (Reformat, CaskConvolution) and 10 (kgen, gemm) write them, of an engine built with
detailed verbosity."""
TIMES = """[
  { "count" : 4216 }
, { "name" : "image_QuantizeLinear", "timeMs" : 51.4526, "averageMs" : 0.0100, "percentage" : 20.0 }
, { "name" : "stem.weight + stem.weight_QuantizeLinear + stem + PWN(relu)", "timeMs" : 45.3, "averageMs" : 0.0200 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to head", "timeMs" : 0, "averageMs" : 0.0100 }
, { "name" : "__myl_MeanMul_myl0_1", "timeMs" : 45.3, "averageMs" : 0.0050, "medianMs" : 0.005, "percentage" : 10.0 }
, { "name" : "head_myl0_2", "timeMs" : 45.3, "averageMs" : 0.0050, "percentage" : 10.0 }
, { "name" : "Reformatting CopyNode for Output Tensor 0 to head", "timeMs" : 9, "averageMs" : 0.0100 }
]
"""


def test_precisions_reformats_and_tactics_are_read() -> None:
    found = parse_inspection(DETAILED, "TensorRT 10.3.0")
    assert found.precisions == {"fp16": 2, "int8": 1}
    assert [layer.name for layer in found.reformats] == [
        "image_QuantizeLinear",
        "Reformatting CopyNode for Input Tensor 0 to head",
    ]
    assert found.layers[1].tactic.startswith("sm80_xmma_fprop")
    assert not found.layers[-1].computes
    assert str(found) == "fp16 in 2 of 3 layers, int8 in 1; 2 reformats (TensorRT 10.3.0)"


def test_layer_times_join_what_the_inspector_listed() -> None:
    found = with_times(parse_inspection(DETAILED, "TensorRT 10.3.0"), parse_times(TIMES, "times"))
    assert found.milliseconds == pytest.approx(0.06)
    assert found.layers[1].milliseconds == pytest.approx(0.02)
    assert len(found.reformats) == 3  # the profiler sees one more
    assert str(found) == "fp16 in 2 of 3 layers, int8 in 1; 3 reformats take 50% of the time (TensorRT 10.3.0)"
    assert Inspection.model_validate_json(found.model_dump_json()) == found


def test_engine_with_layer_names_only_tells_no_precision() -> None:
    text = '{"Layers": ["Conv_25 + Relu", "Reformatting CopyNode for Output Tensor 0 to MaxPool2d"], "Bindings": ["x"]}'
    found = parse_inspection(text, "TensorRT 8.4.1")
    assert found.precisions == {}
    assert len(found.reformats) == 1
    assert str(found) == "2 layers, precisions not told (TensorRT 8.4.1)"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": {}}', '{"Layers": [1]}', '{"Layers": [{"Name": 3}]}'])
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="JSON"):
        parse_inspection(text, "layers.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["Name", "LayerType", "Inputs", "Outputs", "Weights", "Type", "Format/Datatype", "name"]),
            inner,
        )
    ),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(layers=st.lists(JSON, max_size=3))
def test_any_json_is_read_or_refused(layers: list[object]) -> None:
    for read, document in ((parse_inspection, {"Layers": layers}), (parse_times, layers)):
        try:
            read(json.dumps(document), "file.json")
        except InputError:
            continue

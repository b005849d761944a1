"""Layer records of a build log: what is read from them, the flops, the shares, and what is refused."""

import json
from dataclasses import asdict

import pytest

from builder.compile.layers import LayerSummary, check_precision, of_one_frame, parse_layers, summarise
from earlytom.errors import UserError

LINEAR = "Format: (Linear) Row major linear format"


def tensor(shape, dtype="Half", name="t", layout=LINEAR):
    dims = ",".join(map(str, shape))
    return f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, {layout} }}"


def record(name, kind, inputs=(), constants=(), outputs=(), onnx=()):
    def section(tensors):
        return f"[ {', '.join(tensors)}]" if tensors else "[]"

    metadata = "".join(f"[ONNX Layer: {node}]" for node in onnx)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {section(inputs)}, Constants: {section(constants)}, "
        f"Outputs: {section(outputs)}, TacticName: {name}_0x1, StreamId: 0, Metadata: {metadata}"
    )


# As tensorrt-rtx 1.7.1 writes them for compute capability 8.0, one of each kind.
EXCERPT = """Layers:
Name: node_Conv_175_myl0_1, LayerType: correlation, Inputs: [ { Name: convolution.1_2_myl0, Dimensions: \
[4,4,126,126], Strides: [63504,1,504,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major \
format }], Constants: [ { Name: __mye40490_dconst_myl0, Dimensions: [128,4,14,14], Strides: [784,1,56,4], \
StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }, { Name: __mye40972_const_myl0, \
Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], \
Outputs: [ { Name: __myln_k_arg__bb1_3_myl0, Dimensions: [4,128,9,9], Strides: [10368,1,1152,128], StrideOrder: \
[3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, \
Metadata: [ONNX Layer: node_Conv_175]
Name: node_MatMul_24+node_MatMul_16+node_MatMul_8_myl0_3, LayerType: gemm, Inputs: [ { Name: n.1_myl0, \
Dimensions: [324,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear \
format }], Constants: [ { Name: __mye39876_dconst_myl0, Dimensions: [128,384], Strides: [384,1], StrideOrder: \
[1,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: __mye38051node_MatMul_24_alpha_myl0, \
Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], \
Outputs: [ { Name: __mye39881_myl0, Dimensions: [324,384], Strides: [384,1], StrideOrder: [1,0], Datatype: \
Half, Format: (Linear) Row major linear format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX \
Layer: node_MatMul_24][ONNX Layer: node_MatMul_16][ONNX Layer: node_MatMul_8]
Name: __mye31133_myl0_4, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, \
EventId: 1, Metadata:\x20
Name: _gemm_mha_v2_myl0_7, LayerType: kgen, Inputs: [ { Name: __mye40221_9_myl0, Dimensions: [16,81,32], \
Strides: [32,512,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride order = \
[1,2,0] }, { Name: __mye40221_8_myl0, Dimensions: [16,32,81], Strides: [32,1,512], StrideOrder: [1,0,2], \
Datatype: Half, Format: (Arbitrary) Format with stride order = [1,0,2] }, { Name: __mye40221_7_myl0, \
Dimensions: [16,81,32], Strides: [32,512,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format \
with stride order = [1,2,0] }], Constants: [], Outputs: [ { Name: __mye40221_myl0, Dimensions: [16,81,32], \
Strides: [32,512,1], StrideOrder: [1,2,0], Datatype: Half, Format: (Arbitrary) Format with stride order = \
[1,2,0] }], TacticName: _gemm_mha_v2_0x1533c023a313f08c, StreamId: 0, Metadata: [ONNX Layer: node_attention]
Name: __myl_FcAddAdd_myl0_8, LayerType: runtime_fusion, Inputs: [ { Name: a_myl0, Dimensions: [324,128], \
Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: \
b_myl0, Dimensions: [324,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Arbitrary) Format \
with stride order = [1,2,0] }], Constants: [ { Name: c_reshape_myl0, Dimensions: [1,128], Strides: [128,1], \
StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format }, { Name: d_dconst_myl0, \
Dimensions: [128,128], Strides: [128,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear \
format }], Outputs: [ { Name: e_myl0, Dimensions: [324,128], Strides: [128,1], StrideOrder: [1,0], Datatype: \
Half, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: \
node_MatMul_43][ONNX Layer: node_add_1]
Name: __myl_TopkCast_myl0_9, LayerType: kgen, Inputs: [ { Name: f_myl0, Dimensions: [4,81], Strides: [81,1], \
StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { \
Name: positions, Dimensions: [4,5], Strides: [5,1], StrideOrder: [1,0], Datatype: Int64, Format: (Linear) Row \
major linear format }], TacticName: __myl_TopkCast_0x7fda, StreamId: 0, Metadata: [ONNX Layer: inner_topk | \
select (SelectTokens)]

I/O Tensors:
 Name: frames, IOMode: Input, DataType: UInt8, Dimensions: [4,3,126,126], Location: Device
"""


def test_a_recorded_excerpt():
    layers = parse_layers(EXCERPT)
    assert [(layer.kind, layer.work) for layer in layers] == [
        ("correlation", "convolution"),
        ("gemm", "product"),
        ("signal", "other"),
        ("kgen", "attention"),
        ("runtime_fusion", "product"),
        ("kgen", "other"),
    ]
    conv, qkv, signal, attention, projection, topk = layers
    assert conv.flops == 2 * (4 * 128 * 9 * 9) * (4 * 14 * 14)
    assert qkv.flops == 2 * 324 * 128 * 384
    assert qkv.onnx == ("node_MatMul_24", "node_MatMul_16", "node_MatMul_8")
    assert (signal.inputs, signal.outputs, signal.precision) == ((), (), "")
    assert attention.flops == 2 * 16 * 81 * 81 * (32 + 32)
    assert attention.tactic == "_gemm_mha_v2_0x1533c023a313f08c"
    assert [t.shape for t in attention.inputs] == [(16, 81, 32), (16, 32, 81), (16, 81, 32)]
    assert attention.inputs[0].format == "(Arbitrary) Format with stride order = [1,2,0]"
    assert projection.flops == 2 * 324 * 128 * 128
    assert [t.dtype for t in projection.constants] == ["fp16", "fp16"]
    assert (topk.outputs[0].dtype, topk.precision, topk.flops) == ("int64", "fp32", 0)
    assert topk.onnx == ("inner_topk | select (SelectTokens)",)


def test_the_summary_of_the_excerpt():
    summary = summarise(
        parse_layers(EXCERPT), ["node_attention", "node_lost"], ["node_Conv_175", "node_MatMul_43", "node_gone", ""]
    )
    assert summary.layers == 5  # the signal is none
    assert summary.attention_fused == ("_gemm_mha_v2_myl0_7",)
    assert summary.attention_unfused == ("node_lost",)
    assert summary.unplaced == ("node_gone",)
    assert summary.unsized == ()
    assert summary.flop_shares == {"fp16": 1.0}
    assert 0.99 < summary.weight_shares["fp16"] < 1
    assert LayerSummary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary
    check_precision(summary, "fp16")


def test_a_function_body_counts_for_its_node():
    layers = parse_layers(
        record(
            "inner_mm_myl0_0", "gemm", [tensor([2, 64])], [tensor([64, 64])], [tensor([2, 64])], ["inner | call (F)"]
        )
    )
    assert summarise(layers, matrix_nodes=["inner"]).unplaced == ()


def test_data_centre_records_are_read_too():
    # Older releases give dtype and format in one field, and the location of the tensor.
    text = (
        "Name: gemm_1, LayerType: gemm, Inputs: [ { Name: x, Location: Device, Dimensions: [8,64], Format/Datatype: "
        "Half }], Constants: [ { Name: w, Dimensions: [64,32], Format/Datatype: Half }], Outputs: [ { Name: y, "
        "Location: Device, Dimensions: [8,32], Format/Datatype: Row major linear FP16 format }], "
        "TacticName: sm80_xmma_gemm, StreamId: 0, Metadata: [ONNX Layer: /mlp/fc1/MatMul]"
    )
    (layer,) = parse_layers(text)
    assert (layer.flops, layer.precision, layer.outputs[0].dtype) == (2 * 8 * 64 * 32, "fp16", "fp16")
    assert layer.onnx == ("/mlp/fc1/MatMul",)


@pytest.mark.parametrize(
    ("shapes", "flops"),
    [
        (([16, 81, 32], [16, 32, 82], [16, 81, 82]), 2 * 16 * 81 * 32 * 82),  # attention written out
        (([18, 24], [24, 9999], [18, 9999]), 2 * 18 * 24 * 9999),  # frames merged with weights
        (([81, 8, 128], [81, 128, 8], [81, 8, 8]), 2 * 81 * 8 * 8 * 128),  # similarity, a token at a time
        (([8, 10368], [10368, 8], [8, 8]), 2 * 8 * 8 * 10368),  # similarity in one product
        (([64, 64], [64, 64], [64, 64]), 2 * 64**3),
    ],
)
def test_products_of_two_activations(shapes, flops):
    a, b, c = (tensor(shape, "Float") for shape in shapes)
    (layer,) = parse_layers(record("node_matmul_myl0_0", "gemm", [a, b], [tensor([1], "Float")], [c]))
    assert (layer.work, layer.flops, layer.precision) == ("product", flops, "fp32")


def test_a_product_without_shapes_that_fit_is_named_not_guessed():
    layers = parse_layers(record("odd_myl0_0", "gemm", [tensor([7, 5])], [tensor([3, 2])], [tensor([7, 2])]))
    assert summarise(layers).unsized == ("odd_myl0_0",)
    assert summarise(layers).flop_shares == {}


def test_dynamic_frames_keep_the_shares():
    def network(frames):
        half = record("a_myl0_0", "gemm", [tensor([frames, 64])], [tensor([64, 64])], [tensor([frames, 64])])
        full = record(
            "b_myl0_1",
            "gemm",
            [tensor([frames, 64], "Float")],
            [tensor([64, 32], "Float")],
            [tensor([frames, 32], "Float")],
        )
        return summarise(parse_layers(f"{half}\n{full}")).flop_shares

    assert network(-1) == pytest.approx(network(12))
    assert network(-1)["fp16"] == pytest.approx(2 / 3)


def test_weights_in_half_that_are_multiplied_in_fp32_are_not_half():
    cast = record("__myl_Cast_myl0_0", "kgen", constants=[tensor([64, 64])], outputs=[tensor([64, 64], "Float")])
    product = record(
        "mm_myl0_1",
        "gemm",
        [tensor([8, 64], "Float"), tensor([64, 64], "Float")],
        [tensor([1], "Float")],
        [tensor([8, 64], "Float")],
    )
    summary = summarise(parse_layers(f"{cast}\n{product}"))
    assert summary.weight_shares["fp16"] > 0.99
    assert summary.half_share == 0
    with pytest.raises(UserError, match=r"--fp16.*100\.0 % fp32"):
        check_precision(summary, "fp16")


def test_an_fp32_residual_does_not_make_a_half_product_fp32():
    residual = tensor([324, 128], "Float")
    (layer,) = parse_layers(
        record(
            "__myl_FcAddCast_myl0_0",
            "runtime_fusion",
            [residual, tensor([324, 64])],
            [tensor([1, 128], "Float"), tensor([64, 128])],
            [residual],
        )
    )
    assert (layer.precision, layer.flops) == ("fp16", 2 * 324 * 64 * 128)


@pytest.mark.parametrize(("rows", "passes"), [(1000, True), (80, False)])
def test_the_fp32_islands_may_be_small_only(rows, passes):
    half = record("a_myl0_0", "gemm", [tensor([rows, 64])], [tensor([64, 64])], [tensor([rows, 64])])
    island = record(
        "b_myl0_1", "gemm", [tensor([20, 64], "Float")], [tensor([64, 64], "Float")], [tensor([20, 64], "Float")]
    )
    summary = summarise(parse_layers(f"{half}\n{island}"))
    assert summary.flop_shares["fp32"] == pytest.approx(20 / (rows + 20))
    if passes:
        check_precision(summary, "fp16")
    else:
        with pytest.raises(UserError, match=r"80\.0 % fp16"):
            check_precision(summary, "fp16")


def test_bf16_is_not_fp16():
    text = record(
        "a_myl0_0", "gemm", [tensor([8, 64], "BFloat16")], [tensor([64, 64], "BFloat16")], [tensor([8, 64], "BFloat16")]
    )
    summary = summarise(parse_layers(text))
    assert summary.half_share == 1
    check_precision(summary, "bf16")
    with pytest.raises(UserError, match="bf16"):
        check_precision(summary, "fp16")


def test_nothing_recognised_proves_nothing():
    with pytest.raises(UserError, match="not proved"):
        check_precision(summarise(parse_layers("no layer here")), "fp32")


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("_gemm_mha_v2_myl0_7", "attention"),
        ("_gemv_mha_v1_myl0_1", "attention"),
        ("__mye8037_gemm_mha_v2", "attention"),
        ("node_scaled_dot_product_attention_1_myl0_3", "other"),  # an ONNX name, not a kernel
        ("__myl_FcMul_myl0_3", "product"),
        ("__myl_AddFcTanh_myl0_3", "product"),
        ("__fc2408_myl0_3", "product"),
        ("__myl_FcaMul_myl0_3", "other"),
    ],
)
def test_kernels_are_told_by_name(name, work):
    (layer,) = parse_layers(record(name, "kgen", [tensor([4, 4])], [], [tensor([4, 4])]))
    assert layer.work == work
    assert json.loads(json.dumps(asdict(layer)))["work"] == work


def test_int8_is_counted_and_held() -> None:
    """A product of whole numbers with a result in half, as tensorrt-rtx lists it."""
    end = "Format: Row major linear }"
    record = (
        "Name: node_matmul_myl0_1, LayerType: gemm, "
        f"Inputs: [ {{ Name: q8, Dimensions: [%s,1152], Datatype: Int8, {end}], "
        f"Constants: [ {{ Name: w, Dimensions: [1152,4304], Datatype: Int8, {end}, "
        f"{{ Name: alpha, Dimensions: [1], Datatype: Float, {end}], "
        f"Outputs: [ {{ Name: out, Dimensions: [%s,4304], Datatype: Half, {end}], TacticName: t, StreamId: 0"
    )
    layers = parse_layers(record % (1458, 1458))
    summary = summarise(layers)
    assert summary.flop_shares == {"int8": 1.0}
    assert summary.int8_share == 1.0
    assert summary.matrix_flops == 2 * 1458 * 1152 * 4304
    assert summary.weight_shares["int8"] > 0.999
    check_precision(summary, "fp16", expected=0.0, int8=0.99)
    with pytest.raises(UserError, match=r"asked for --fp16, .* 100.0 % int8 \(expected 0.0 % int8\)"):
        check_precision(summary, "fp16")
    with pytest.raises(UserError, match=r"asked for --int8 --fp16, .*expected 90.0 % int8"):
        check_precision(summary, "fp16", expected=0.1, int8=0.9)
    (dynamic,) = of_one_frame(parse_layers(record % (-1, -1)), 729, 16)
    assert dynamic.flops == 2 * 729 * 1152 * 4304  # of one frame

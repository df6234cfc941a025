"""Reading compiled programs: trip counts, operations and groups, against counts made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lm2_jax
from lm2_jax.aot import costs, hlo
from lm2_jax.model import LanguageModel
from lm2_jax.training.flops import jaxpr_flops, traced_flops
from lm2_jax.training.objective import batch_shapes
from lm2_jax.training.state import make_plan
from lm2_jax.training.step import make_train_step

# As libtpu prints it, shortened: a loop of 3 with a counter that starts at 1, around a loop of 5 whose condition is a
# fusion; an attribute of several lines; something for another kind of core.
NESTED = """HloModule jit_f, is_scheduled=true, num_partitions=4

%inner_body (a: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %a = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %b = s32[] get-tuple-element(%a), index=0
  %c = bf16[8,16]{1,0} get-tuple-element(%a), index=1
  %w = bf16[16,16]{1,0} constant({...})
  %d = bf16[8,16]{1,0} convolution(%c, %w), dim_labels=bf_io->bf, frontend_attributes={kernel_metadata={
"x":"a = b"
}}, metadata={op_name="a/b"}
  ROOT %e = (s32[], bf16[8,16]{1,0}) tuple(%b, /*index=1*/%d)
}

%compare (p: s32[], q: s32[]) -> pred[] {
  %q = s32[] parameter(1)
  %p = s32[] parameter(0)
  ROOT %less = pred[] compare(%p, %q), direction=LT
}

%inner_condition (a.1: (s32[], bf16[8,16])) -> pred[] {
  %a.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %b.1 = s32[] get-tuple-element(%a.1), index=0
  %five = s32[] constant(5)
  ROOT %f = pred[] fusion(%b.1, %five), kind=kLoop, calls=%compare
}

%outer_body (g: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %g = (s32[], bf16[8,16]{1,0}) parameter(0)
  %h = bf16[8,16]{1,0} get-tuple-element(%g), index=1
  %zero = s32[] constant(0)
  %i = (s32[], bf16[8,16]{1,0}) tuple(%zero, %h)
  ROOT %j = (s32[], bf16[8,16]{1,0}) while(%i), condition=%inner_condition, body=%inner_body
}

%outer_condition (k: (s32[], bf16[8,16])) -> pred[] {
  %k = (s32[], bf16[8,16]{1,0}) parameter(0)
  %four = s32[] constant(4)
  %l = s32[] get-tuple-element(%k), index=0
  ROOT %m = pred[] compare(%l, %four), direction=LT
}

%aside (z: f32[]) -> f32[] {
  ROOT %z = f32[] parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (n: bf16[8,16]) -> bf16[8,16] {
  %n = bf16[8,16]{1,0} parameter(0)
  %one = s32[] constant(1)
  %copy = s32[] copy(%one)
  %o = (s32[], bf16[8,16]{1,0}) tuple(%copy, %n)
  %p.1 = (s32[], bf16[8,16]{1,0}) while(%o), condition=%outer_condition, body=%outer_body
  ROOT %r = bf16[8,16]{1,0} get-tuple-element(%p.1), index=1
}
"""


def read(text):
    return costs.program_costs(hlo.parse(text))


def test_loops_are_counted_as_often_as_they_run():
    found = read(NESTED)
    assert found.matmul_flops == 3 * 5 * (2 * 8 * 16 * 16)
    assert found.unknown_loops == 0


def test_what_the_compiler_knows_of_a_loop_counts_first():
    known = NESTED.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}')
    assert read(known).matmul_flops == 3 * 7 * (2 * 8 * 16 * 16)


def test_a_counter_may_step_by_two():
    """As in products that are split into windows: 0, 2 and 4 are below 5."""
    two = NESTED.replace("tuple(%b, /*index=1*/%d)", "tuple(%s, /*index=1*/%d)").replace(
        "  %d = ", "  %two = s32[] constant(2)\n  %s = s32[] add(%b, %two)\n  %d = "
    )
    assert read(two).matmul_flops == 3 * 3 * (2 * 8 * 16 * 16)


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    found = read(NESTED.replace("direction=LT", "direction=NE"))
    assert (found.matmul_flops, found.unknown_loops) == (2 * 8 * 16 * 16, 2)


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f {}")


@pytest.mark.parametrize(
    ("line", "shapes", "flops"),
    [
        # As TPUs multiply matrices per row (4) and head (3): windows that cover padding except at one position.
        (
            "f32[4,3,32,16] convolution(%x, %w), window={size=4x3 stride=3x2 lhs_dilate=4x3}, "
            "dim_labels=01bf_01oi->01bf",
            ("f32[4,3,32,8]", "f32[4,3,16,8]"),
            2 * 4 * 3 * 32 * 16 * 8,
        ),
        # A kernel with heads (2) and their width (8), made in one product.
        (
            "bf16[128,2,8] convolution(%x, %w), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            ("bf16[128,32,1]", "bf16[32,2,8]"),
            2 * 128 * 32 * 2 * 8,
        ),
        # A causal depthwise convolution of width 4: three of the first outputs' inputs are padding.
        (
            "f32[5,10,6] convolution(%x, %w), window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f, feature_group_count=6",
            ("f32[5,10,6]", "f32[4,1,6]"),
            2 * 5 * 6 * (4 * 10 - 3 - 2 - 1),
        ),
    ],
)
def test_convolutions(line, shapes, flops):
    text = (
        "HloModule m\n\nENTRY %main (x: f32[1]) -> f32[1] {\n"
        f"  %x = {shapes[0]} parameter(0)\n  %w = {shapes[1]} parameter(1)\n  ROOT %y = {line}\n}}\n"
    )
    assert read(text).matmul_flops == flops


def test_a_program_of_this_machine_nested_scans():
    def f(x, w):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(lambda x, _: jax.lax.scan(inner, x, w), x, None, length=3)[0]

    x, w = jnp.ones((24, 16)), jnp.ones((5, 16, 16))
    compiled = jax.jit(jax.grad(lambda x, w: f(x, w).sum(), argnums=1)).lower(x, w).compile()
    products = 3 * 5 * 2 * 24 * 16 * 16
    traced = traced_flops(jax.grad(lambda x, w: f(x, w).sum(), argnums=1), x, w)
    assert traced == 3 * products  # forward, and backward for both factors
    # What does not depend on w's gradient: the first product's input gradient may go.
    assert 0.9 * traced < read(compiled.as_text()).matmul_flops <= traced


def test_a_tiny_model_costs_what_its_equations_say():
    """Forward and backward, of layers in a loop."""
    config = lm2_jax.preset("none_tiny").model
    model = LanguageModel(config)
    tokens = jax.ShapeDtypeStruct((4, 2 * config.segment_tokens), np.int32)
    state = jax.eval_shape(lambda: model.init_state(4))
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, state))
    gradient = jax.grad(lambda params, tokens, state: (model.apply(params, tokens, state)[0] ** 2).sum())
    compiled = jax.jit(gradient).lower(params, tokens, state).compile()
    found, expected = read(compiled.as_text()), traced_flops(gradient, params, tokens, state)
    D, F, V, T, L = 32, 64, 512, 32, 2
    forward = L * (2 * D * D + D * D + 3 * D * F + 2 * T * D) + D * V  # q and o, k and v of half the heads, MLP, scores
    assert expected == pytest.approx(3 * 2 * forward * 4 * 2 * T)
    assert found.unknown_loops == 0
    assert found.matmul_flops == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_train_step_costs_what_its_equations_say(remat):
    """On one device; the memory has a loop over segments inside the one over layers."""
    run = lm2_jax.preset("lm2_tiny")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, remat=remat))
    plan = make_plan(run, LanguageModel(run.model))
    batch = batch_shapes(4, 3, run.model.segment_tokens)
    traced = jax.jit(make_train_step(plan)).trace(plan.shapes, batch)
    expected = jaxpr_flops(traced.jaxpr.jaxpr)
    found = read(traced.lower().compile().as_text())
    assert found.unknown_loops == 0
    assert found.matmul_flops == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_all_notations(text, expected):
    instruction = hlo.Instruction(
        "x", "f32[2]", "all-gather", ("y",), f", channel_id=1, {text}, dimensions={{0}}", False
    )
    assert hlo.groups(instruction, 4) == expected


def test_sizes():
    assert hlo.size_bytes("(f32[2,3]{1,0}, bf16[4]{0}, pred[5], s4[6], u32[], token[])") == 24 + 8 + 5 + 3 + 4
    assert hlo.size_bytes("(f32[2,3]{1,0:T(8,128)S(1)}, bf16[4]{0:T(8,128)(2,1)})", in_hbm=True) == 8
    assert np.prod(hlo.dimensions("bf16[4,2]{1,0}")) == 8

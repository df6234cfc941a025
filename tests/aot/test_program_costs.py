"""What collectives send, memory traffic, and the roofline bound."""

import pytest

from lm2_jax.aot import costs, hlo
from lm2_jax.aot.costs import Collective, Costs, Traffic
from lm2_jax.chips import CHIPS

HEAD = "HloModule m, is_scheduled=true, num_partitions=8\n\n"
HOW = 'replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, frontend_attributes={chain_id="3"}'

# A product that libtpu overlaps with an all-gather: started in one fusion, continued in a second, ended in a third.
CHAIN = (
    HEAD
    + """%begin (x: bf16[16,64]) -> bf16[32,64] {
  %x = bf16[16,64]{1,0} parameter(0)
  %all-gather.1 = bf16[32,64]{1,0} all-gather(%x), HOW
  ROOT %s = bf16[32,64]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%on (x.1: bf16[16,64]) -> bf16[32,64] {
  %x.1 = bf16[16,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,64]{1,0} all-gather(%x.1), HOW
}

%end (x.2: bf16[16,64]) -> bf16[32,64] {
  %x.2 = bf16[16,64]{1,0} parameter(0)
  %all-gather.3 = bf16[32,64]{1,0} all-gather(%x.2), HOW
  ROOT %d = bf16[32,64]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (y: f32[8,8]) -> f32[1,8] {
  %y = f32[8,8]{1,0} parameter(0)
  %sum = f32[8,8]{1,0} all-reduce(%y), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %part = f32[1,8]{1,0} slice(%sum), slice={[0:1], [0:8]}
}

ENTRY %main (a: bf16[16,64], b: f32[8,8]) -> bf16[32,64] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %f1 = bf16[32,64]{1,0} fusion(%a), kind=kCustom, calls=%begin
  %f2 = bf16[32,64]{1,0} fusion(%a), kind=kCustom, calls=%on
  %f3 = f32[1,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.7
  %go = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%b), source_target_pairs={{0,4},{4,0}}
  %went = f32[8,8]{1,0} collective-permute-done(%go)
  ROOT %f4 = bf16[32,64]{1,0} fusion(%a), kind=kCustom, calls=%end
}
""".replace("HOW", HOW)
)


def test_a_hidden_collective_counts_once_and_its_kind_is_what_it_does():
    found = costs.program_costs(hlo.parse(CHAIN))
    assert found.collectives == {
        Collective("all-gather", 2, 1): Traffic(1, 16 * 64 * 2, 0),
        Collective("reduce-scatter", 8, 1): Traffic(1, 8 * 8 * 4 * 7 / 8, 0),
        Collective("collective-permute", 2, 1): Traffic(1, 8 * 8 * 4, 0),
    }


def test_what_leaves_the_slice_goes_over_the_network():
    found = costs.program_costs(hlo.parse(CHAIN), lambda device: device // 4)
    assert found.collectives == {
        Collective("all-gather", 2, 1): Traffic(1, 16 * 64 * 2, 0),
        Collective("reduce-scatter", 8, 2): Traffic(1, 8 * 8 * 4 * 3 / 4, 8 * 8 * 4 / 4 / 2),
        Collective("collective-permute", 2, 2): Traffic(1, 0, 8 * 8 * 4),
    }


@pytest.mark.parametrize(
    ("kind", "size", "slices", "near", "far"),
    [
        ("all-gather", 4, 1, 3, 0),
        ("reduce-scatter", 4, 1, 3 / 4, 0),
        ("all-reduce", 4, 1, 3 / 2, 0),
        ("all-to-all", 4, 1, 3 / 4, 0),
        ("all-gather", 8, 2, 6, 1),  # seven pieces arrive, one over the network: the others pass it on
        ("reduce-scatter", 8, 2, 3 / 4, 1 / 8),
        ("all-reduce", 8, 2, 3 / 2, 1 / 4),
        ("all-to-all", 8, 2, 3 / 8, 1 / 2),
        ("all-reduce", 2, 2, 0, 1),
        ("all-reduce", 1, 1, 0, 0),
    ],
)
def test_bytes_sent(kind, size, slices, near, far):
    assert costs.sent(kind, 1.0, size, slices) == pytest.approx((near, far))


MEMORY = (
    HEAD
    + """%update (p: f32[6,8], q: f32[8], i: s32[]) -> f32[6,8] {
  %p = f32[6,8]{1,0} parameter(0)
  %q = f32[8]{0:T(128)S(1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %row = f32[1,8]{1,0} bitcast(%q)
  ROOT %u = f32[6,8]{1,0} dynamic-update-slice(%p, %row, %i, %i)
}

%take (p.1: f32[6,8], i.1: s32[]) -> f32[1,8] {
  %p.1 = f32[6,8]{1,0} parameter(0)
  %i.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %t = f32[1,8]{1,0} dynamic-slice(%p.1, %i.1, %i.1), dynamic_slice_sizes={1,8}
}

ENTRY %main (a: f32[6,8], b: f32[8], c: s32[]) -> f32[6,8] {
  %a = f32[6,8]{1,0} parameter(0)
  %b = f32[8]{0:T(128)S(1)} parameter(1)
  %c = s32[]{:T(128)S(6)} parameter(2)
  %one = f32[1,8]{1,0} fusion(%a, %c), kind=kLoop, calls=%take
  %all = f32[6,8]{1,0} negate(%a)
  ROOT %new = f32[6,8]{1,0} fusion(%all, %b, %c), kind=kLoop, calls=%update
}
"""
)


def test_slices_count_for_themselves_and_memory_on_the_chip_not_at_all():
    row, stack = 4 * 8, 4 * 6 * 8
    found = costs.program_costs(hlo.parse(MEMORY))
    assert found.hbm_bytes == (row + row) + (stack + stack) + row  # take; negate; update, from a row on the chip


def test_the_least_time_is_what_takes_longest():
    work = Costs(matmul_flops=197e12, hbm_bytes=81.9e9)
    work.send(Collective("all-gather", 4, 1), Traffic(3, 50e9, 6.25e9), times=2)
    least = costs.roofline_bound(work, CHIPS["v5e"])
    assert least == pytest.approx((1.0, 0.1, 0.5, 4.0))
    assert (least.seconds, least.bound) == (pytest.approx(4.0), "dcn")
    half = costs.roofline_bound(work, CHIPS["tpu7x"])  # a device is half a chip
    assert half.compute == pytest.approx(197e12 / (2307e12 / 2))


def test_what_goes_through_the_hosts_to_other_slices():
    text = (
        HEAD
        + """ENTRY %main (a: f32[4,8,128]) -> f32[4,8,128] {
  %a = f32[4,8,128]{2,1,0} parameter(0)
  %t = token[] after-all()
  %r = (f32[4,8,128]{2,1,0}, u32[], token[]) recv(%t), channel_id=8, is_host_transfer=true, frontend_attributes={TO}
  %s = (f32[4,8,128]{2,1,0}, u32[], token[]) send(%a, %t), channel_id=9, is_host_transfer=true, frontend_attributes={TO}
  %local = (f32[4,8,128]{2,1,0}, u32[], token[]) send(%a, %t), channel_id=7
  %e = token[] send-done(%s), channel_id=9, is_host_transfer=true
  %d = (f32[4,8,128]{2,1,0}, token[]) recv-done(%r), channel_id=8, is_host_transfer=true
  ROOT %x = f32[4,8,128]{2,1,0} get-tuple-element(%d), index=0
}
"""
    ).replace("TO", '_xla_megascale_target="{1,2,5:6}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"')
    found = costs.program_costs(hlo.parse(text)).collectives
    own = 4 * 8 * 128 * 4
    assert found == {Collective("all-reduce", 4, 4): Traffic(1, 0.0, 2 * own * 3 / 4)}

from dataclasses import replace

import torch

from petals_tune.swarm.sums import AdapterSums, Term
from petals_tune.swarm.trace import CallContext, Leg, Trace, stages_of
from tests.swarm.test_trace import ROUTE, adapter_on


def term(place: int) -> Term:
    (stage,) = stages_of(ROUTE[:1], CallContext(), keep=True, input_grad=True)
    leg = Leg(stage=stage, hidden=torch.zeros(1, 1, 1), lease=None)
    return Term(leg=leg, context=CallContext(), grad=torch.zeros(1, 1, 1), place=place)


def test_each_server_has_one_sum_for_each_of_its_spans():
    sums = AdapterSums()
    assert sums.on(ROUTE[0]) is sums.on(ROUTE[0])
    assert len({sums.on(hop).number for hop in ROUTE}) == 3
    assert AdapterSums().on(ROUTE[0]).number != sums.on(ROUTE[0]).number, "a later backward has sums of its own"


def test_a_server_is_told_with_how_many_micro_batches_its_sum_is_whole():
    context = adapter_on(0, 4)
    legs = tuple(
        Leg(stage=stage, hidden=torch.zeros(1, 1, 1), lease=1)
        for stage in stages_of(ROUTE, context, keep=True, input_grad=False)
    )
    trace = Trace(hidden=torch.zeros(1, 1, 1), context=context, legs=legs)
    sums = AdapterSums(3)
    for each in (trace, trace, replace(trace, legs=legs[:1])):
        assert [sums.on(hop).expected for hop in ROUTE] == [None] * 3, "not all went forward"
        sums.forwarded(each)
    assert [sums.on(hop).expected for hop in ROUTE] == [3, None, 2]


def test_sums_are_collected_by_blocks_whatever_the_order_in_which_servers_answered():
    sums = AdapterSums()
    for hop, place in ((ROUTE[2], 0), (ROUTE[0], 1), (ROUTE[0], 0), (ROUTE[1], 1)):
        sums.on(hop).terms.append(term(place))
    assert [each.hop for each in sums.in_order()] == list(ROUTE)

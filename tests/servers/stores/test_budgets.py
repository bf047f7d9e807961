from petals_tune.config import composed
from servers.options import Serve
from servers.stores.budgets import Budgets
from tests.servers.hosting import options_of


def limits(*overrides: str):
    return options_of(*(f"limits.{text}" for text in overrides)).limits


def test_the_total_is_all_that_the_stores_may_hold():
    assert Budgets(leases=1, sessions=20, adapters=300, sums=4000, stacks=50000).total_bytes == 54321


def test_adapters_and_the_sums_of_their_gradients_have_a_budget_each_and_both_count():
    budgets = limits("max_lease_gb=3", "max_cache_gb=0.5", "max_adapter_gb=0.25").budgets
    assert (budgets.adapters, budgets.sums, budgets.stacks) == (268435456, 268435456, 67108864)
    assert budgets.total_bytes == 4362076160, "3 + 0.5 + 2.25 x 0.25 GB"


def test_the_defaults_are_those_of_the_file():
    section = composed(config_name="serve").limits
    gigabytes = section.max_lease_gb + section.max_cache_gb + 2.25 * section.max_adapter_gb
    assert isinstance(options_of(), Serve)
    assert limits().budgets.total_bytes == gigabytes * 2**30


def test_a_share_of_them_is_a_share_of_each():
    assert Budgets(leases=100, sessions=50, adapters=7, sums=0, stacks=2).times(0.5) == Budgets(
        leases=50, sessions=25, adapters=3, sums=0, stacks=1
    )

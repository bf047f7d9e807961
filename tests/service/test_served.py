"""Models by their names in requests."""

import pytest

from petals_tune.service.errors import ServiceError
from petals_tune.service.served import Offer, Served

OFFERS = [Offer(name="base", adapter=None, created=1), Offer(name="annas", adapter="a", created=2, owner="anna")]


class Offers:
    def of(self, owner):
        return [offer for offer in OFFERS if offer.owner in (None, owner)]


SERVED = Served(offers=[Offers()], decoder=None, reader=None, tokenizer=None, format=None, most_positions=8)


def test_a_name_is_found_by_whom_it_is_offered_to():
    assert SERVED.find("base", "ben") is OFFERS[0]
    assert SERVED.find("annas", "anna") is OFFERS[1]


@pytest.mark.parametrize("name", ["annas", "nobody"])
def test_what_is_not_offered_is_404_and_names_nothing_of_others(name):
    with pytest.raises(ServiceError) as caught:
        SERVED.find(name, "ben")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert str(caught.value).endswith(": base")

import torch

from petals_tune.blocks.quantization import find_scheme
from tests.models import relative_error


def test_int8_linears_in_eval_mode_would_depend_on_the_mode():
    """Why `set_mode` leaves them in training mode: the trap that the test above guards is really there."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    linear = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=0.0)
    linear = linear.to("cpu")
    x = torch.randn(4, 64)
    outputs = []
    for mode in (True, False):
        linear.train(mode)
        with torch.no_grad():
            outputs.append(linear(x))
    assert relative_error(outputs[1], outputs[0]) > 1e-3
    find_scheme("int8").set_mode(linear, training=False)
    with torch.no_grad():
        assert torch.equal(linear(x), outputs[0])


def test_a_weight_takes_a_byte_and_an_output_a_float32_scale():
    assert find_scheme("int8").weight_bytes(1000, 30, torch.float16) == 30 * 1000 + 30 * 4

"""What the processes of servers do without is really not there, and comes when somebody asks for it.

In processes of their own: here, other tests have imported everything.
"""

import json
import subprocess
import sys
from typing import Any


def printed(code: str) -> Any:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_node_of_the_directory_loads_no_torch_and_finds_all_of_hivemind():
    code = """
import json, sys
from servers.lean import lean_hivemind
lean_hivemind()
import servers.dht, petals_tune.net.peer
loaded = [name for name in ("torch", "scipy", "transformers") if name in sys.modules]
import hivemind
try:
    hivemind.nothing
except AttributeError as error:
    text = str(error)
print(json.dumps([loaded, hivemind.dht.DHTNode.__module__, hivemind.DHT.__module__, "torch" in sys.modules, text]))
"""
    assert printed(code) == [
        *([], "hivemind.dht.node", "hivemind.dht.dht", True),
        "module 'hivemind' has no attribute 'nothing'",
    ]


def test_a_server_builds_and_runs_a_model_without_a_compiler():
    code = """
import json, sys
import torch
compile = torch.compile
from servers.lean import lean_hivemind, lean_transformers
lean_hivemind()
with lean_transformers():
    import bitsandbytes, servers.server
from transformers import LlamaConfig
from petals_tune.model.families import family_of, placeholder_model
config = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=8)
family = family_of(placeholder_model(config))
from transformers import AutoModel
out = AutoModel.from_config(config)(inputs_embeds=torch.rand(1, 4, 32)).last_hidden_state
names = ("torch._dynamo.eval_frame", "torch._inductor", "torch.distributed.tensor", "scipy.optimize", "pandas")
loaded = [name for name in names if sys.modules.get(name)]
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
with TransformGetItemToIndex():
    picked = torch.arange(3)[torch.tensor(1)].item()
print(json.dumps([loaded, family.blocks, list(out.shape), picked, torch.compile is compile]))
"""
    assert printed(code) == [[], "layers", [1, 4, 32], 1, True]

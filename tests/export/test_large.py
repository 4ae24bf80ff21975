"""A decoder of more than two gigabytes, exported in one piece from random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.layers.test_layers import ROOT

SIZES = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 11, "num_attention_heads": 16,
    "intermediate_size": 5632, "vocab_size": 8192,
}  # fmt: skip
WRITE = """
import json, resource, sys
import numpy as np, torch
import torch.nn.functional as F
from pathlib import Path
from engine.config.schema import Decoder
from engine.export import onnx, steps
from engine.models.decoders.language_model import DecoderInput
from engine.registry import find

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.manual_seed(0)
section = Decoder(name="causal", config=sizes, max_length=16)
decoder = find("models/decoders", "causal").build(section, vocab_size=300, pad_id=0, eos_id=1)
decoder = decoder.eval().requires_grad_(False)
image = torch.randn(1, 5, decoder.width)
ids = torch.tensor([[3, 4, 5]])
hidden = decoder.hidden(DecoderInput(image, ids, torch.ones_like(ids)))
np.savez(folder / "case.npz", image=image, ids=ids, logits=F.linear(hidden, *decoder.head()))
weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
before = peak()
step = steps.step_of(decoder, 5).eval()
given, past, outputs = steps.arguments_of(step, 5, decoder.width)
described = onnx.write_graph(
    step, given, outputs, folder / "decoder.onnx", past=past, opset=20, beside=False
)
print(json.dumps({"graph": described, "weights": weights, "before": before, "peak": peak()}))
"""
READ = """
import json, sys
import numpy as np
from pathlib import Path
from engine.export.onnx_runner import Graph, KVState

folder, described = Path(sys.argv[1]), json.loads(sys.argv[2])
case = np.load(folder / "case.npz")
graph, ids = Graph(folder, described, 1), case["ids"]
first, state = KVState.encode_prompt(
    graph, case["image"], ids[:, :2], attention_mask=np.ones_like(ids[:, :2])
)
last, _ = state.extend(ids[:, 2:], attention_mask=np.ones_like(ids[:, 2:]))
np.save(folder / "logits.npy", np.concatenate([first, last], axis=1))
"""


def python(code: str, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, timeout=1800, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_decoder_of_two_gigabytes_is_one_graph(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    try:
        told = json.loads(python(WRITE, str(tmp_path), json.dumps(SIZES)).splitlines()[-1])
        graph, data = tmp_path / "decoder.onnx", tmp_path / "decoder.onnx.data"
        assert told["weights"] > 2**31
        assert graph.stat().st_size < 2**22
        # every weight once, and next to nothing beside them
        assert told["weights"] <= data.stat().st_size < 1.01 * told["weights"]
        assert told["graph"]["outputs"]["logits"]["shape"] == ["batch", "length", 8192]
        more = (told["peak"] - told["before"]) / told["weights"]
        record_property("memory beyond the model, in sizes of its weights", more)
        print(f"weights {told['weights'] / 2**30:.2f} GiB, peak {told['peak'] / 2**30:.2f} GiB, "
              f"{more:.2f} × the weights more than before")  # fmt: skip
        assert more < 1.5
        python(READ, str(tmp_path), json.dumps(told["graph"]))
        logits = np.load(tmp_path / "logits.npy")
        assert np.abs(logits - np.load(tmp_path / "case.npz")["logits"]).max() < 1e-4
    finally:
        for path in tmp_path.iterdir():
            path.unlink()

"""Weights that are stored with the input first, (in, out), where others have (out, in).

GPT-2 and what descends from it keep their matrices so, in a layer that transformers calls Conv1D.
Shapes do not tell (the projection after attention is square): the configuration does.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from qconvert.files.shards import CONFIG
from qconvert.files.strict_json import strict_json
from qconvert.model import Model

# Values of ``model_type`` whose modules are Conv1D in transformers 5. Others (gpt_bigcode) have the
# same names for linear layers.
_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_NAMES = re.compile(r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)\.weight")


def input_first(model: Model) -> Callable[[str], bool]:
    """Whether the weight of a name is stored (in, out), by the model's own configuration.

    Raises:
        FormatError: config.json is no JSON.
    """
    config = next((c for c in model.companions if c.name == CONFIG), None)
    data = b"" if config is None else config.read()
    if not any(name.encode() in data for name in _TYPES):
        return lambda name: False
    fields = strict_json(data, model.path / CONFIG, infinity=True)
    if not isinstance(fields, dict) or fields.get("model_type") not in _TYPES:
        return lambda name: False
    return lambda name: _NAMES.fullmatch(name) is not None

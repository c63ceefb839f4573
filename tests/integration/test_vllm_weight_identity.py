"""Real vLLM takes exactly the weights that were sent, or none; and what it has loaded is told."""

from __future__ import annotations

import pytest

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import SamplingParams
from tests.carriers import make_request
from tests.integration import vllm_cases
from tests.vllm_models import make_model

MODEL = "qwen3_moe"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.0.gate_proj.weight"
OTHER_EXPERT = EXPERT.replace(".0.gate", ".1.gate")
CHANGED = "arrived with other content"

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=2, seed=1)
REQUEST = make_request(prompt_token_ids=[3, 4], sampling=SAMPLING)


@pytest.mark.parametrize(
    ("fault", "name", "said"),
    [
        ("lost", Q_PROJ, [f"{Q_PROJ} did not arrive"]),
        ("lost", EXPERT, [f"{EXPERT} did not arrive"]),
        ("bucket lost", Q_PROJ, [f"{Q_PROJ} did not arrive", "more"]),
        ("swapped", EXPERT, [f"{EXPERT} {CHANGED}", f"{OTHER_EXPERT} {CHANGED}"]),
        ("flipped", Q_PROJ, [f"weights 4 are not what was sent: {Q_PROJ} {CHANGED}"]),
    ],
)
def test_an_engine_with_other_weights_than_were_sent_names_them_and_does_not_serve(
    in_vllm, folders, fault, name, said
):
    """vLLM itself finishes each of these sessions and generates."""
    in_vllm(vllm_cases.start, folders[MODEL, "A"])
    in_vllm(vllm_cases.sync, folders[MODEL, "A"], 3)
    refused = in_vllm(vllm_cases.sync_falsified, folders[MODEL, "B"], 4, fault, name)
    assert all(part in refused for part in said), refused
    assert in_vllm(vllm_cases.weight_version) == -1
    with pytest.raises(RolloutError, match="has no complete weights"):
        in_vllm(vllm_cases.generate, [REQUEST])
    # Nor does it take others: its layers are half loaded.
    again = in_vllm(vllm_cases.refusal_of, vllm_cases.sync, folders[MODEL, "B"], 5)
    assert "whose last weight update broke off takes no other" in again


@pytest.fixture
def larger_by_half(models, tmp_path):
    """Weights A with every matrix of the layers times 1.5."""
    model = make_model(MODEL, 1)
    for name, parameter in model.named_parameters():
        if "layers" in name and parameter.dim() > 1:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_tied", "deepseek_v3"])
def test_what_was_loaded_from_a_sync_is_what_vllm_loads_from_the_folder(in_vllm, folders, name):
    """Parameter by parameter before packing, also after another set of weights, also in another
    engine; and another set of weights differs in every parameter of the layers."""
    a, b = folders[name, "A"], folders[name, "B"]
    in_vllm(vllm_cases.start, a)
    in_vllm(vllm_cases.sync, a, 0, True)
    (of_a,) = in_vllm(vllm_cases.loaded_digests)
    in_vllm(vllm_cases.sync, b, 1, True)
    (of_b,) = in_vllm(vllm_cases.loaded_digests)
    in_vllm(vllm_cases.sync, b, 2)
    assert in_vllm(vllm_cases.loaded_digests) == [{}]  # nobody asked for them
    assert in_vllm(vllm_cases.digests_of_folder, a) == [of_a]
    assert in_vllm(vllm_cases.weight_version) == -1
    in_vllm(vllm_cases.start, b)
    assert in_vllm(vllm_cases.digests_of_folder, b) == [of_b]
    in_vllm(vllm_cases.sync, a, 0, True)
    assert in_vllm(vllm_cases.loaded_digests) == [of_a]

    weights = [own for own in of_a if own.endswith(".weight") or "experts.w" in own]
    assert len(weights) >= 2 * 6
    assert {own for own in weights if of_a[own] == of_b[own]} == set()


def test_digests_see_what_vllm_s_own_checksums_miss(in_vllm, folders, larger_by_half):
    in_vllm(vllm_cases.start, folders[MODEL, "A"])
    in_vllm(vllm_cases.sync, folders[MODEL, "A"], 0, True)
    (digests,), checksums = in_vllm(vllm_cases.loaded_digests), in_vllm(vllm_cases.own_checksums)
    in_vllm(vllm_cases.sync, larger_by_half, 1, True)
    (others,), unlike = in_vllm(vllm_cases.loaded_digests), in_vllm(vllm_cases.own_checksums)
    assert digests.keys() == others.keys()
    changed = {name for name in digests if digests[name] != others[name]}
    matrices = ("qkv_proj.weight", "o_proj.weight", "gate.weight", "w13_weight", "w2_weight")
    assert len(changed) == 2 * len(matrices)
    assert all(name.endswith(matrices) for name in changed)
    seen = {name for name in checksums if checksums[name] != unlike[name]}
    assert not any(name.endswith("qkv_proj.weight") for name in seen)  # empty tensors to vLLM

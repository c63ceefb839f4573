"""A model family of one's own: MiMo, a Qwen2 under another name with layers to predict further.

`config.json` says `model_type` "mimo", which neither transformers nor this package knows. Its
decoder is Qwen2's, so the family is an alias; the layers for multi-token prediction,
`model.mtp_layers`, are left out, and exports do not have them. vLLM knows the architecture
MiMoForCausalLM and leaves them out too. Importing the module registers the name in both;
`MCORE_RL_PLUGINS` has every process import it.
"""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mcore_rl.models.qwen2 import Qwen2
from mcore_rl.models.spec import MODEL_FAMILIES

_FURTHER_LAYERS = "model.mtp_layers."


class MiMoConfig(Qwen2Config):
    model_type = "mimo"


class MiMoForCausalLM(Qwen2ForCausalLM):
    """For checks against transformers: `mcore-rl verify model`, `convert --verify`."""

    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = (r"model\.mtp_layers\..*",)


class MiMo(Qwen2):
    def unused_prefixes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return (_FURTHER_LAYERS,)


AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)
MODEL_FAMILIES.add("mimo", MiMo())

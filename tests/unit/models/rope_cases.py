"""What a process with Megatron's CPU support does in the tests of rotary positions."""

from mcore_rl.models.rope import gpt_rope_kwargs, yarn_config_kwargs


def yarn_angles(configs, head_size, num_positions):
    """Return (angles [num_positions, head_size], factor on cosine and sine) of each config."""
    from mcore_rl.megatron import cpu

    cpu.install()
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        YarnRotaryEmbedding,
    )

    answers = []
    for config in configs:
        kwargs = {
            name.removeprefix("yarn_").removeprefix("rotary_"): value
            for name, value in yarn_config_kwargs(config).items()
        }
        rotary = YarnRotaryEmbedding(
            head_size, rotary_base=gpt_rope_kwargs(config)["rotary_base"], **kwargs
        )
        angles, factor = rotary.get_emb(num_positions)
        answers.append((angles[:, 0, 0], factor))
    return answers

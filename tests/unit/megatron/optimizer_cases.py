"""An objective that is not finite where a certain token is read; it travels to the processes."""

from dataclasses import dataclass

from mcore_rl.algorithms.objectives import SftObjective


@dataclass(frozen=True)
class PoisonedObjective:
    """SFT whose value is multiplied by `factor` in micro-batches that hold `token_id`."""

    token_id: int
    factor: float
    with_entropy: bool = False

    def __call__(self, logprobs_T, entropy_T, batch, denominators):
        value, metrics = SftObjective()(logprobs_T, entropy_T, batch, denominators)
        is_hit = bool((batch.input_ids_T == self.token_id).any())
        return value * (self.factor if is_hit else 1.0), metrics

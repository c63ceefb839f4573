"""What the processes of `processes.py` do with a critic: one rank's part of each case."""

from mcore_rl.metrics import to_floats
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import load_hf_config
from mcore_rl.models.value_head import value_entries
from tests.actor_cases import cluster_of, lists, running_worker


def run_script(actor, critic, script, cut):
    """Do the commands of `script` with a critic; return (what they gave, its exported weights).

    Commands: ("values", sequences), ("begin_critic_step",), ("update_critic", sequences,
    objective), ("begin_save", folder), ("end_save",), ("load", folder).
    """
    from mcore_rl.weight_sync.export import WeightExporter

    with running_worker(actor, critic) as worker:
        trainer = cluster_of(worker, cut, critic_cut=cut).trainer
        answers = []
        for method, *args in script:
            if method == "end_save":
                assert trainer.end_save(wait=True)
                continue
            answer = getattr(trainer, method)(*args)
            if method == "update_critic":
                answer = to_floats(answer)
            elif method == "values":
                answer = lists(answer)
            answers.append(answer)
        reader = CheckpointReader(critic.model_path)
        entries = value_entries(load_hf_config(critic.model_path), reader)
        assert worker.critic is not None
        exporter = WeightExporter(worker.critic.params, entries, worker.parallel)
        return answers, {name: tensor.clone() for bucket in exporter for name, tensor in bucket}

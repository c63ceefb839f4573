"""What a test of one's own transport can call: python -m pytest examples/custom_transport"""

import safetensors_files  # noqa: F401  registers it

from mcore_rl.weight_sync.check import check_transport


def test_what_is_sent_is_what_arrives(tmp_path):
    check_transport("safetensors_files", tmp_path)

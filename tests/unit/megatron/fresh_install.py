"""A program of a fresh process: `cpu.install` where it must refuse, one line of JSON to stdout.

python fresh_install.py <folder with the metadata of another version of megatron-core>
"""

import json
import sys

import torch


def message_of(function):
    """Return the message of the RuntimeError that `function` raises, None if it raises none."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return None


def main():
    from mcore_rl.megatron import cpu

    device_call = torch.cuda.current_device
    sys.path.insert(0, sys.argv[1])
    other_version = message_of(cpu.install)
    untouched = torch.cuda.current_device is device_call
    sys.path.pop(0)

    from megatron.core.transformer.moe import token_dispatcher

    del token_dispatcher.maybe_move_tensor_to_cpu
    missing_name = message_of(cpu.install)
    result = {"other_version": other_version, "untouched": untouched, "missing_name": missing_name}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

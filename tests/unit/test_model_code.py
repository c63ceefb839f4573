"""What goes with a copy of a model folder: code that is named, and chat templates."""

from __future__ import annotations

import json

from mcore_rl.models.safetensors_io import copy_model_files

AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnModel",
    "AutoTokenizer": ["tokenization_own.OwnTokenizer", None],
    "AutoModel": "owner/other--modeling_other.Other",
}
CODE = {
    "configuration_own.py": "raise RuntimeError('code was run')\n",
    "modeling_own.py": "from .layers_own import Layer\nfrom . import more_own\nimport torch\n",
    "layers_own.py": "from .configuration_own import OwnConfig\n",
    "more_own.py": "",
    "tokenization_own.py": "",
    "unrelated.py": "",
}


def folder_with(tmp_path, code):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": AUTO_MAP}))
    for name in code:
        (source / name).write_text(CODE[name])
    return source


def test_a_copy_has_the_code_that_its_configuration_names_and_all_chat_templates(tmp_path):
    target = tmp_path / "target"
    copied = copy_model_files(folder_with(tmp_path, CODE), target)
    assert set(copied) == {
        "config.json",
        "additional_chat_templates/tool_use.jinja",
        *(CODE.keys() - {"unrelated.py"}),
    }
    assert all((target / name).is_file() for name in copied)
    assert json.loads((target / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_copy_names_no_code_that_is_not_there(tmp_path):
    source, target = folder_with(tmp_path, ["configuration_own.py"]), tmp_path / "target"
    copy_model_files(source, target)
    kept = json.loads((target / "config.json").read_text())
    assert kept == {
        "model_type": "own",
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoModel")},
    }
    assert json.loads((source / "config.json").read_text())["auto_map"] == AUTO_MAP
